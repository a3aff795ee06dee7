// The page: a form, lanes that fill in, a gallery. Text is only ever set as
// text, never as markup.
import * as api from "/api.js";
import { countFinal, last, paint } from "/paint.js";

const $ = (id) => document.getElementById(id);
const LONGEST = 8;  // s of a replay
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
const images = new Map();  // by address
const GALLERY = 24;
const done = [];  // what was generated here, latest first
let info, job = null, lanes = [], shown = 0, asHeat = false, clock = 0,
    replays = 0;

const make = (tag, text, kind) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};

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
  $("name").value = info.decoders.find((d) => !d.missing).name;
  $("guidance").value = info.guidance;
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

const empty = () =>
    Array.from({ length: info.rows }, () => new Array(info.cols).fill(0));

// Images of one decoder: final tokens by pass, and the picture so far.
const newLane = (label, lossless, count) => ({
  label, lossless, state: "waiting", passes: 0, seconds: null,
  pictures: Array.from({ length: count },
                       () => ({ commit: empty(), url: null })),
});

function lossless(label) {
  const found = info.decoders.find((d) => d.name === label.split(":")[0]);
  return Boolean(found && found.lossless);
}

async function draw(event) {
  event.preventDefault();
  if ($("draw").disabled) return;  // Enter, while another request runs
  $("error").textContent = "";
  $("draw").disabled = true;
  api.setKey($("key").value);
  const values = {
    prompt: $("prompt").value, seed: number("seed") ?? 0,
    guidance_scale: number("guidance"), n: number("images") ?? 1 };
  const labels = [chosen()];
  const hasAr = info.decoders.some((d) => d.name === "ar");
  if ($("race").checked && hasAr && labels[0] !== "ar") labels.push("ar");
  const mine = {
    state: "waiting", notes: [], ...values,
    lanes: labels.map((label) => newLane(label, lossless(label), 0)) };
  try {
    for (const lane of mine.lanes) await fill(mine, lane, values);
    mine.state = "done";
    done.unshift(mine);
    done.splice(GALLERY);
    gallery();
    if (job === mine && !calm) replay();
  } catch (error) {
    mine.state = "failed";
    if (error.status === 401) $("key-field").hidden = false;
    $("error").textContent = error.message;
  }
  render();
  $("draw").disabled = false;
}

// Draws the images of a lane, and shows them as they become.
async function fill(mine, lane, values) {
  Object.assign(lane, newLane(lane.label, lane.lossless, values.n));
  const accepted = () => {
    if (lane !== mine.lanes[0]) return;
    open(mine);
    if (innerWidth <= 760) $("stage").scrollIntoView();
  };
  await api.draw({ ...values, decoder: lane.label }, accepted, (event) => {
    const picture = lane.pictures[event.image_index];
    mine.state = lane.state = "drawing";
    // An unfinished picture is painted late: newer commits are here already.
    if (!("partial_image_index" in event)) picture.commit = event.commit_pass;
    if (event.b64_json) {
      picture.url = `data:image/${event.output_format};base64,` +
          event.b64_json;
    }
    if ("passes" in event) {
      lane.lossless = event.lossless;
      lane.seconds = Math.max(lane.seconds ?? 0, event.seconds);
      mine.notes = event.notes;
    }
    lane.passes = last(lane.pictures[0].commit);
    if (job === mine) render();
  });
  lane.state = "done";
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
  const label = $("name").value;
  open({ state: "idle", prompt: "nothing", notes: [],
         lanes: [newLane(label, lossless(label), 1),
                 newLane("ar", true, 1)] });
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
  const picture = lane.pictures[Math.min(shown, lane.pictures.length - 1)] ||
      { commit: empty(), url: null };
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
      ? { waiting: job.state === "idle" ? "–" : "next" }[lane.state] || "…"
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
  if (job.state === "waiting") return "Waiting for the first pass …";
  if (job.state === "drawing") return "Generating …";
  if (job.state === "failed") return "Not generated.";
  // Isolated: a prompt may turn the direction of what follows it.
  return `Done: “\u2068${job.prompt}\u2069”, seed ${job.seed}.`;
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
        `${literal(job.lanes[0].label)}, seed=${job.seed}, ` +
        (job.n > 1 ? `num_images=${job.n}, ` : "") +
        `guidance=${job.guidance_scale ?? "None"})` : "";
  $("replay").hidden = !is_done;
  $("order").hidden = !is_done;
  $("order").setAttribute("aria-pressed", String(asHeat));
}

// All lanes from the start, in the time that they took.
function replay() {
  const mine = job, turn = ++replays;
  const longest = Math.max(...job.lanes.map((lane) => lane.seconds));
  const speed = Math.max(longest / LONGEST, longest < 2 ? longest / 2 : 1);
  const start = performance.now();
  const tick = (now) => {
    if (job !== mine || turn !== replays) return;
    const time = Math.max((now - start) / 1000 * speed, 1e-3);
    clock = time < longest ? time : 0;
    render();
    if (clock) requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
}

// --- gallery and benchmark

function gallery() {
  $("gallery").replaceChildren(...done.map((old) => {
    const lane = old.lanes[0];
    const button = make("button");
    button.type = "button";
    button.onclick = () => { open(old); $("stage").scrollIntoView(); };
    const image = make("img");
    image.alt = `${old.prompt}, by ${lane.label}`;
    image.loading = "lazy";
    image.src = lane.pictures[0].url;
    button.append(image, make("b", old.prompt),
                  make("span", `${lane.label}, ${lane.passes} passes`));
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
  info = await api.info();
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
}

start().catch((error) => { $("error").textContent = error.message; });
