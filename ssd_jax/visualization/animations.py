"""Visualizations of decoding: animations, heat maps and the Pareto plot.

Pillow draws everything but the Pareto plot, which needs matplotlib.

T frames; R rows and C columns of the grid; H, W pixels.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from ssd_jax.core.extras import need
from ssd_jax.core.outputs import Output
from ssd_jax.core.protocols import Decoder
from ssd_jax.decoding.ar import AR
from ssd_jax.pipeline.pipeline import Pipeline
from ssd_jax.storage.files import replacing
from ssd_jax.visualization import contact_sheets

_BLANK = 236  # grey of grid positions without a token
_DIM = 0.5  # share of that grey in drafts
_MOST_FRAMES = 96
_SECONDS = 6.0  # length of an animation
_MARKERS = "os^Dv*P"
# Dark blue through green to yellow in steps of even brightness (after viridis).
_HEAT = np.array([
    (68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)])


@dataclasses.dataclass(frozen=True)
class Filling:
  """Frames of an image that is being decoded.

  Attributes:
    label: Label of the decoder.
    frames: uint8 [T, H, W, 3], final tokens as in the finished image, drafts
      dimmed, empty grid positions grey.
    shown: int [T], the pass after which each frame was taken, increasing.
    passes: Passes of the image.
    seconds: Seconds of the image, or None if only passes count.
  """

  label: str
  frames: np.ndarray
  shown: np.ndarray
  passes: int
  seconds: float | None = None

  def at(self, passes: float) -> np.ndarray:
    """Returns the image after `passes` passes, uint8 [H, W, 3]."""
    index = np.searchsorted(self.shown, passes, side="right") - 1
    if index < 0:
      return np.full_like(self.frames[0], _BLANK)
    return self.frames[index]


def filling(
    pipe: Pipeline, output: Output, index: int, label: str,
    seconds: float | None = None,
) -> Filling:
  """Returns the frames of image `index` of a traced output.

  Raises:
    ValueError: if the output was not traced.
  """
  passes, commit_RC = int(output.passes[index]), output.commit_pass[index]
  count = min(passes, _MOST_FRAMES)
  shown = np.unique(np.linspace(1, passes, count).round().astype(int))
  if output.history is None:
    raise ValueError("the output was not traced")
  history = output.history[index]
  moments = np.minimum(shown, len(history)) - 1
  # A grid position holds token 0 until something is written there.
  is_written = np.maximum.accumulate(history != 0, axis=0)[moments]
  is_final = commit_RC <= shown[:, None, None]
  is_draft = is_written & ~is_final
  image = output.images[index]
  drafts = np.broadcast_to(image, (len(shown), *image.shape))
  if is_draft.any():
    drafts = pipe.decode_images(history[moments])
  frames = [
      compose(image, draft, final_RC, draft_RC)
      for draft, final_RC, draft_RC in zip(
          drafts, is_final, is_draft, strict=True)]
  return Filling(label, np.stack(frames), shown, passes, seconds)


def compose(
    image: np.ndarray, draft: np.ndarray, is_final_RC: np.ndarray,
    is_draft_RC: np.ndarray,
) -> np.ndarray:
  """Returns final tokens of an image over dimmed drafts, uint8 [H, W, 3].

  Args:
    image: uint8 [H, W, 3], the finished image.
    draft: uint8 [H, W, 3], the image of tokens and drafts.
    is_final_RC: bool [R, C], whether a token is final.
    is_draft_RC: bool [R, C], whether a grid position holds a draft.
  """
  final_HW1, draft_HW1 = (
      _enlarge(x_RC, image.shape[:2])[..., None]
      for x_RC in (is_final_RC, is_draft_RC))
  dimmed = (1 - _DIM) * draft + _DIM * _BLANK
  mixed = np.where(final_HW1, image, np.where(draft_HW1, dimmed, _BLANK))
  return mixed.astype(np.uint8)


def _enlarge(x_RC: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Returns x with a block of pixels per grid position, [H, W]."""
  rows, cols = x_RC.shape
  return x_RC.repeat(shape[0] // rows, 0).repeat(shape[1] // cols, 1)


def heat_map(commit_RC: np.ndarray, shape: tuple[int, int]) -> Image.Image:
  """Returns a heat map of the pass in which each token became final.

  Args:
    commit_RC: int [R, C], 1 for the first pass.
    shape: Height and width of the image.
  """
  last = int(commit_RC.max())
  share = (commit_RC - 1) / max(last - 1, 1)
  heat = Image.fromarray(_enlarge_colours(_heat(share), shape))
  scale = np.linspace(0, 1, heat.width)[None].repeat(8, axis=0)
  bar = Image.fromarray(_heat(scale))
  foot = contact_sheets.caption(heat.width, ["pass 1", str(last)])
  return contact_sheets.stack([heat, bar, foot])


def _heat(share: np.ndarray) -> np.ndarray:
  """Returns the colours of values in [0, 1], uint8 [..., 3]."""
  steps = np.linspace(0, 1, len(_HEAT))
  channels = [np.interp(share, steps, _HEAT[:, i]) for i in range(3)]
  return np.stack(channels, -1).round().astype(np.uint8)


def _enlarge_colours(x_RC3: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  return np.stack([_enlarge(x_RC3[..., i], shape) for i in range(3)], -1)


def animation(fillings: Sequence[Filling]) -> list[Image.Image]:
  """Returns frames of images that are decoded side by side.

  The common clock is seconds if all images have them, otherwise passes.
  """
  timed = all(f.seconds is not None for f in fillings)
  spans = [f.seconds if timed and f.seconds else float(f.passes)
           for f in fillings]
  count = min(max(f.passes for f in fillings), _MOST_FRAMES)
  frames = []
  for time in np.linspace(0, max(spans), count + 1):
    panels = []
    for f, span in zip(fillings, spans, strict=True):
      # A pass is shown once it has ended; rounding must not lose the last one.
      done = min(np.floor(time / span * f.passes + 1e-6), f.passes)
      panel = Image.fromarray(f.at(done))
      words = [f"pass {done:.0f}", f"of {f.passes}"]
      if timed:
        words.append(f"{min(time, span):.1f} s")
      foot = [
        contact_sheets.caption(panel.width, x) for x in ([f.label], words)
      ]
      panels.append(contact_sheets.stack([panel, *foot]))
    frames.append(contact_sheets.abreast(panels))
  return frames


def save_animation(frames: Sequence[Image.Image], path: pathlib.Path) -> None:
  """Writes a GIF that repeats and pauses on its last frame."""
  step = max(int(1000 * _SECONDS / len(frames)), 20)
  contact_sheets.save_picture(
      frames[0], path, "gif", save_all=True, append_images=list(frames[1:]),
      duration=[step] * (len(frames) - 1) + [2000], loop=0)


def write_trace(
    pipe: Pipeline, output: Output, stems: Sequence[pathlib.Path], label: str
) -> list[pathlib.Path]:
  """Writes an animation and a heat map of each image of a traced output.

  Per image, these are STEM_filling.gif, its frames as PNG in STEM_filling/, and
  the heat map STEM_passes.png.

  Returns:
    Paths of the written files and folders.
  """
  paths = []
  for index, stem in enumerate(stems):
    frames = animation([filling(pipe, output, index, label)])
    gif = stem.with_name(f"{stem.name}_filling.gif")
    save_animation(frames, gif)
    folder = gif.with_suffix("")
    for old in folder.glob("*.png"):  # from a longer animation
      old.unlink()
    for number, frame in enumerate(frames):
      contact_sheets.save_picture(frame, folder / f"{number:03d}.png")
    heat = stem.with_name(f"{stem.name}_passes.png")
    shape = output.images.shape[1:3]
    contact_sheets.save_picture(
      heat_map(output.commit_pass[index], shape), heat
    )
    paths += [gif, folder, heat]
  return paths


def write_race(
    pipe: Pipeline, prompt: str, decoder: Decoder, label: str,
    path: pathlib.Path, **settings: Any,
) -> None:
  """Generates one prompt with AR and a decoder and animates both side by side.

  Args:
    pipe: The model.
    prompt: Prompt of the image.
    decoder: Decoder to compare with AR.
    label: Label of the decoder.
    path: Path of the GIF.
    **settings: Settings of `Pipeline.generate`.
  """
  fillings = []
  for name, each in (("ar", AR()), (label, decoder)):
    output = pipe.generate([prompt], each, batch=1, trace=True, **settings)
    fillings.append(filling(pipe, output, 0, name, output.seconds))
  save_animation(animation(fillings), path)


@dataclasses.dataclass(frozen=True)
class Point:
  """A decoder in the plot of speed against quality.

  Attributes:
    label: Label of the decoder.
    is_lossless: Whether the decoder is lossless.
    speed: AR's passes or time over the decoder's.
    speeds: Quartiles of the speed.
    quality: Loss of quality.
    qualities: 95% interval of the quality, or None.
  """

  label: str
  is_lossless: bool
  speed: float
  speeds: Sequence[float]
  quality: float
  qualities: Sequence[float] | None


@dataclasses.dataclass(frozen=True)
class Panel:
  """A plot of one speed against one quality.

  Attributes:
    speed: Name of the speed.
    quality: Name of the quality.
    points: One per decoder.
    spread: Bounds of AR's own spread, or None.
  """

  speed: str
  quality: str
  points: Sequence[Point]
  spread: Sequence[float] | None


def pareto(rows: Sequence[Sequence[Panel]], path: pathlib.Path) -> None:
  """Writes a plot of speed against loss of quality, with error bars.

  Args:
    rows: Rows of panels; the first panel holds all decoders. Without rows, no
      file is written.
    path: Path of the PNG.

  Raises:
    MissingExtra: if matplotlib is not installed.
  """
  if not rows:
    return
  columns = max(map(len, rows))
  figure = need("matplotlib.figure", "bench").Figure(
      (2 + 5.5 * columns, 4.5 * len(rows)), layout="constrained")
  styles = {
      p.label: dict(color=f"C{i % 10}", fmt=_MARKERS[i % len(_MARKERS)])
      for i, p in enumerate(rows[0][0].points)}
  for y, row in enumerate(rows):
    for x, panel in enumerate(row):
      number = y * columns + x + 1
      _plot(figure.add_subplot(len(rows), columns, number), panel, styles)
  handles, labels = figure.axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside right upper", fontsize=8)
  with replacing(path) as partial:
    figure.savefig(partial, format="png", dpi=150)


def _plot(axes: Any, panel: Panel, styles: dict[str, dict]) -> None:
  """Plots a panel's points, filled if lossless, and AR's own spread."""
  for p in panel.points:
    lo, hi = p.qualities or (p.quality, p.quality)
    axes.errorbar(
        p.speed, p.quality, _bar(p.quality, lo, hi), _bar(p.speed, *p.speeds),
        **styles[p.label], capsize=2, elinewidth=0.8,
        markerfacecolor=None if p.is_lossless else "white",
        label=p.label if p.is_lossless else f"{p.label} (relaxed)")
  axes.margins(x=0.1, y=0.1)
  axes.axhline(0, color="grey", linewidth=0.8, linestyle=":")
  if panel.spread:
    low, high = panel.spread
    if low == -high < 0:  # nats span decades; the scale is linear in the spread
      axes.set_yscale("symlog", linthresh=high)
    bottom, top = axes.get_ylim()
    axes.axhspan(max(low, bottom), min(high, top), color="grey", alpha=0.15,
                 linewidth=0, label="within AR's own spread")
    axes.set_ylim(bottom, top)
  axes.set_xlabel(f"speed: AR's {panel.speed} per image over the decoder's")
  axes.set_ylabel(panel.quality)


def _bar(value: float, low: float, high: float) -> list[list[float]]:
  """Returns the lengths of an error bar, never negative."""
  return [[max(value - low, 0.0)], [max(high - value, 0.0)]]
