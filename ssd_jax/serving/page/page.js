// The page: a form, lanes that fill in, a gallery. Text is only ever set as
// text, never as markup.
import { countFinal, last, paint } from "/paint.js";

const $ = (id) => document.getElementById(id);
const WAIT = 300;  // ms between looks at a job
const LONGEST = 8;  // s of a replay
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
const images = new Map();  // by address
let info, job = null, lanes = [], shown = 0, asHeat = false, clock = 0,
    replays = 0;

const make = (tag, text, kind) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};

async function ask(url, values) {
  const options = values && {
    method: "POST", body: JSON.stringify(values),
    headers: { "Content-Type": "application/json" },
  };
  const answer = await fetch(url, options).catch(() => {
    throw new Error("No answer: is the server still running?");
  });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

function load(url) {
  if (!url) return null;
  if (!images.has(url)) {
    if (images.size > 200) images.clear();
    const image = new Image();
    image.src = url;
    image.decode().then(() => { image.ready = true; render(); }, () => {});
    images.set(url, image);
  }
  const image = images.get(url);
  return image.ready ? image : null;
}

// --- the form

function chosen() {
  const settings = $("settings").value.trim();
  return $("name").value + (settings ? ":" + settings : "");
}

function showKeys() {
  const found = info.decoders.find((d) => d.name === $("name").value);
  const keys = found.settings.map((s) => `${s.key}=${s.default}`);
  $("keys").textContent =
      keys.length ? "Defaults: " + keys.join(", ") : "It has no settings.";
  const first = found.settings[0];
  $("settings").placeholder = first ? `${first.key}=${first.default}` : "";
  $("settings").disabled = !keys.length;
  if (!keys.length) $("settings").value = "";
}

function fillForm() {
  $("about").textContent = `Model ${info.model}, ${info.rows} × ${info.cols} ` +
      `tokens, on ${info.device}.`;
  for (const d of info.decoders) {
    const kind = d.lossless ? "lossless" : "lossy";
    const why = d.missing && `, needs a trained ${d.missing}`;
    const option = make("option", `${d.name} (${kind}${why})`);
    option.value = d.name;
    option.disabled = Boolean(d.missing);
    $("name").append(option);
  }
  const names = info.decoders.filter((d) => !d.missing).map((d) => d.name);
  $("name").value = names.includes("stair") ? "stair" : names[0];
  $("guidance").value = info.guidance;
  $("guidance").max = info.limits.guidance;
  $("images").max = info.limits.images;
  $("prompt").maxLength = info.limits.prompt;
  for (const text of info.examples) {
    const chip = make("button", text);
    chip.type = "button";
    chip.onclick = () => { $("prompt").value = text; };
    $("examples").append(chip);
  }
  showKeys();
}

// What was typed, or undefined for the server's own.
function number(id) {
  return $(id).value === "" ? undefined : Number($(id).value);
}

async function draw(event) {
  event.preventDefault();
  if ($("draw").disabled) return;  // Enter, while another request runs
  $("error").textContent = "";
  $("draw").disabled = true;
  try {
    const next = await ask("/api/jobs", {
      prompt: $("prompt").value, decoder: chosen(),
      seed: number("seed"), guidance: number("guidance"),
      images: number("images"), race: $("race").checked,
    });
    open(next);
    if (innerWidth <= 760) $("stage").scrollIntoView();
    await follow(next.id);
  } catch (error) {
    $("error").textContent = error.message;
  }
  $("draw").disabled = false;
}

// Looks at a job until it is over; shows it while it is the one on stage.
async function follow(id) {
  let misses = 0;
  for (;;) {
    await new Promise((done) => setTimeout(done, WAIT));
    let next;
    try {
      next = await ask("/api/jobs/" + id);
      misses = 0;
    } catch (error) {
      if (++misses > 10) throw error;
      continue;
    }
    if (job && job.id === id) { job = next; render(); }
    if (next.state === "failed") throw new Error(next.error);
    if (next.state === "done") break;
  }
  if (job && job.id === id && !calm) replay();
  gallery();
}

// --- the stage

function open(next) {
  job = next;
  shown = clock = 0;
  asHeat = false;
  $("lanes").replaceChildren();
  lanes = job.lanes.map(() => {
    const node = $("lane").content.firstElementChild.cloneNode(true);
    $("lanes").append(node);
    return node;
  });
  render();
}

// Empty grids, before anything was generated.
function blank() {
  const empty = Array.from({ length: info.rows },
                           () => new Array(info.cols).fill(0));
  const lane = (label, lossless) => ({
    label, lossless, state: "idle", passes: 0, seconds: null, together: 1,
    pictures: [{ commit: empty, url: null }],
  });
  const found = info.decoders.find((d) => d.name === $("name").value);
  open({ id: "", state: "idle", prompt: "nothing", notes: [],
         lanes: [lane(found.name, found.lossless), lane("ar", true)] });
}

// What a lane shows: everything so far, or what a replay has reached.
function reached(lane, commit) {
  const end = last(commit);
  if (!clock || job.state !== "done") return { pass: end, part: 1 };
  const part = Math.min(clock / lane.seconds, 1);
  return { pass: Math.floor(part * end + 1e-6), part };
}

function renderLane(lane, node) {
  const at = (name) => node.querySelector(name);
  const picture = lane.pictures[Math.min(shown, lane.pictures.length - 1)];
  const { pass, part } = reached(lane, picture.commit);
  const cells = info.rows * info.cols;
  const final = countFinal(picture.commit, pass);
  const passes = final ? pass : 0;
  at(".label").textContent = lane.label;
  at(".law").textContent = lane.lossless ? "lossless" : "lossy";
  at(".law").className = "law " + (lane.lossless ? "exact" : "relaxed");
  const canvas = at("canvas");
  paint(canvas, picture.commit, load(picture.url), pass, asHeat);
  canvas.setAttribute("aria-label",
      `${asHeat ? "Commit order of" : "Picture of"} ${job.prompt} by ` +
      `${lane.label}: ${final} of ${cells} tokens after ${passes} passes`);
  at(".heat").hidden = !asHeat;
  at(".last").textContent = String(last(picture.commit));
  at("progress").value = final / cells;
  at(".passes").textContent = String(passes);
  at(".rate").textContent = passes ? (final / passes).toFixed(1) : "–";
  at(".seconds").textContent = lane.seconds === null
      ? { idle: "–", waiting: "next", compiling: "compiling" }[lane.state]
        || "…"
      : (part * lane.seconds).toFixed(lane.seconds < 1 ? 2 : 1);
  const thumbs = at(".thumbs");
  if (lane.pictures.length > 1 && lane.state === "done" &&
      !thumbs.childElementCount) {
    lane.pictures.forEach((p, i) => {
      const button = make("button");
      button.type = "button";
      button.setAttribute("aria-label", `Show image ${i + 1}`);
      button.onclick = () => { shown = i; render(); };
      const image = make("img");
      image.alt = "";
      image.src = p.url;
      button.append(image);
      thumbs.append(button);
    });
  }
}

function status() {
  if (job.state === "idle") return "Nothing generated yet. Press Generate.";
  const compiling = job.lanes.some((lane) => lane.state === "compiling");
  if (job.state === "queued") return `Waiting: ${job.ahead} before you.`;
  if (job.state === "drawing") {
    return compiling ? "Compiling this decoder, once …" : "Generating …";
  }
  if (job.state === "failed") return "Not generated.";
  const most = Math.max(...job.lanes.map((lane) => lane.together));
  const shared = most > 1 ? `, in a batch of ${most}` : "";
  // Isolated: a prompt may turn the direction of what follows it.
  return `Done: “\u2068${job.prompt}\u2069”, seed ${job.seed}${shared}.`;
}

// A text as Python has it; marks of direction are spelled out.
function literal(text) {
  return JSON.stringify(text).replace(
      /[\u200e\u200f\u202a-\u202e\u2066-\u2069]/g,
      (mark) => "\\u" + mark.charCodeAt(0).toString(16));
}

function verdict() {
  if (job.state !== "done" || job.lanes.length < 2) return "";
  const [mine, ar] = job.lanes;
  const passes = ar.passes / mine.passes, time = ar.seconds / mine.seconds;
  return `${mine.label}: ${passes.toFixed(1)}× fewer passes than AR, ` +
      `${time.toFixed(time < 1 ? 2 : 1)}× its speed here.`;
}

function render() {
  if (!job) return;
  const is_done = job.state === "done";
  lanes.forEach((node, i) => renderLane(job.lanes[i], node));
  if ($("status").textContent !== status()) $("status").textContent = status();
  $("verdict").textContent = verdict();
  $("notes").textContent = job.notes.join(" ");
  $("again").textContent = is_done
      ? `In Python: pipe.generate([${literal(job.prompt)}], ` +
        `${literal(job.decoder)}, first_image=${job.seed}, ` +
        (job.images > 1 ? `num_images=${job.images}, ` : "") +
        `guidance=${job.guidance ?? "None"})` : "";
  $("replay").hidden = !is_done;
  $("order").hidden = !is_done;
  $("order").setAttribute("aria-pressed", String(asHeat));
}

// All lanes from the start, in the time that they took.
function replay() {
  const mine = job.id, turn = ++replays;
  const longest = Math.max(...job.lanes.map((lane) => lane.seconds));
  const speed = Math.max(longest / LONGEST, longest < 2 ? longest / 2 : 1);
  const start = performance.now();
  const tick = (now) => {
    if (!job || job.id !== mine || turn !== replays) return;
    const time = Math.max((now - start) / 1000 * speed, 1e-3);
    clock = time < longest ? time : 0;
    render();
    if (clock) requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
}

// --- gallery and benchmark

async function gallery() {
  const { jobs } = await ask("/api/gallery");
  if (!jobs.length) return;
  $("gallery").replaceChildren(...jobs.map((old) => {
    const lane = old.lanes[0];
    const button = make("button");
    button.type = "button";
    button.onclick = () => { open(old); $("stage").scrollIntoView(); };
    const image = make("img");
    image.alt = `${old.prompt}, by ${old.decoder}`;
    image.loading = "lazy";
    image.src = lane.pictures[0].url;
    button.append(image, make("b", old.prompt),
                  make("span", `${old.decoder}, ${lane.passes} passes`));
    return button;
  }));
}

function bench() {
  if (!info.bench.length) return;
  $("bench").hidden = false;
  $("pareto").src = "/bench/pareto.png";
  const number = (x, digits) => x === null ? "–" : x.toFixed(digits);
  for (const row of info.bench) {
    const settings = Object.entries(row.settings).map((x) => x.join("="));
    if (row.seed) settings.push(`seed=${row.seed}`);
    const line = make("tr");
    line.append(
        make("td", [row.decoder, ...settings].join(" ")),
        make("td", row.lossless ? "AR (lossless)" : "lossy"),
        make("td", number(row.pass_ratio, 2) + "×"),
        make("td", number(row.latency_ratio, 2) + "×"),
        make("td", number(row.nll_gap, 3)));
    $("rows").append(line);
  }
}

async function start() {
  info = await ask("/api/info");
  fillForm();
  bench();
  blank();
  $("name").onchange = () => {
    $("settings").value = "";
    showKeys();
    if (job.state === "idle") blank();
  };
  $("form").onsubmit = draw;
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      $("form").requestSubmit();
    }
  };
  $("replay").onclick = replay;
  $("order").onclick = () => { asHeat = !asHeat; render(); };
  await gallery();
}

start().catch((error) => { $("error").textContent = error.message; });
