// Grids on a canvas: final tokens of an image, or the pass they were final at.

const STEPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98],
               [253, 231, 37]];

function heat(place) {
  const at = Math.min(Math.max(place, 0), 1) * (STEPS.length - 1);
  const i = Math.min(Math.floor(at), STEPS.length - 2);
  const mix = STEPS[i].map((x, c) => x + (STEPS[i + 1][c] - x) * (at - i));
  return `rgb(${mix.map(Math.round).join(",")})`;
}

export function last(commit) {
  return Math.max(1, ...commit.flat());
}

// How many tokens are final after `pass` passes.
export function countFinal(commit, pass) {
  return commit.flat().filter((p) => p > 0 && p <= pass).length;
}

// Cells final after `pass` passes, from `image` (null while none is there) or,
// with `asHeat`, as the colour of their pass.
export function paint(canvas, commit, image, pass, asHeat) {
  const rows = commit.length, cols = commit[0].length;
  const size = Math.max(1, Math.floor(384 / Math.max(rows, cols)));
  canvas.width = cols * size;
  canvas.height = rows * size;
  canvas.style.aspectRatio = `${cols} / ${rows}`;
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const end = last(commit);
  pen.imageSmoothingEnabled = false;
  pen.strokeStyle = style.getPropertyValue("--line");
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < cols; c++) {
      const at = commit[r][c], x = c * size, y = r * size;
      if (at === 0 || at > pass) {
        pen.strokeRect(x + 0.5, y + 0.5, size - 1, size - 1);
      } else if (asHeat) {
        pen.fillStyle = heat((at - 1) / Math.max(end - 1, 1));
        pen.fillRect(x, y, size, size);
      } else if (image) {
        const w = image.naturalWidth / cols, h = image.naturalHeight / rows;
        pen.drawImage(image, c * w, r * h, w, h, x, y, size, size);
      } else {
        pen.fillStyle = style.getPropertyValue("--accent");
        pen.globalAlpha = 0.35;
        pen.fillRect(x, y, size, size);
        pen.globalAlpha = 1;
      }
    }
  }
}
