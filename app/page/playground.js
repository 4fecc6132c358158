// The playground: reads the form, asks the service, and draws what its events say. No framework, no build step.
// Requests are plain data: { path, fields, source, mask }, with `fields` as docs/api.md has them.

const $ = (id) => document.getElementById(id);
const form = $("request");
const named = (name) => form.elements.namedItem(name);

// The service

const KEY = "flux-api-key"; // in the tab's own storage

class ApiError extends Error {
  constructor({ message, param = null, code = null }, status = null) {
    super(message);
    Object.assign(this, { param, code, status });
  }
}

async function send(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError({ message: "The service does not answer. Does it still run?", code: "no_answer" });
  }
  if (response.ok) return response;
  const text = await response.text();
  let error;
  try {
    error = JSON.parse(text).error;
  } catch {
    error = { message: text.slice(0, 300) || response.statusText }; // a proxy's
  }
  throw new ApiError(error, response.status);
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6)); // what has none is a comment: a sign of life
    }
  }
}

// Has the image made; `onEvent` gets what comes before the last event, which is returned.
async function make(request, signal, onEvent) {
  const fields = { ...request.fields, stream: true, partial_images: 3, progress: true };
  const options = request.source ? { body: formOf(fields, request) } : jsonOf(fields);
  for await (const event of eventsOf(await send(request.path, { method: "POST", signal, ...options }))) {
    if (event.type === "error") throw new ApiError(event.error);
    if (event.type.endsWith(".completed")) return event;
    onEvent(event);
  }
  throw new ApiError({ message: "The connection ended before the image was done.", code: "no_answer" });
}

// Seeds reach 2^64, and JavaScript's numbers are exact up to 2^53 only: digits stay text here.
// In JSON text a quote within a prompt is escaped, so the pattern meets the field alone.
function jsonText(fields) {
  return JSON.stringify(fields).replace(/"seed":"(-?\d+)"/, '"seed":$1');
}

function jsonOf(fields) {
  return { headers: { "Content-Type": "application/json" }, body: jsonText(fields) };
}

const formText = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));

function formOf(fields, { source, mask }) {
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, formText(value));
  body.append("image", source, "image");
  if (mask) body.append("mask", mask, "mask.png");
  return body;
}

function blobOf(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: `image/${event.output_format}` });
}

// The form

const OTHER_CACHE_FIELDS = ["quality", "deadline_s"]; // beside `magcache`

async function requestOf() {
  const fields = { prompt: $("prompt").value, ...sizeField(), ...cacheFields() };
  if ($("negative_prompt").value.trim()) fields.negative_prompt = $("negative_prompt").value;
  for (const name of ["true_cfg_scale", "num_inference_steps", "guidance_scale"]) Object.assign(fields, number(name));
  const seed = $("seed").value.trim();
  if (seed) fields.seed = seed;
  const lora = chosenLoras();
  if (lora.length) fields.lora = lora;
  if (!source.blob) return { path: "v1/images/generations", fields };
  Object.assign(fields, number("strength"));
  return { path: "v1/images/edits", fields, source: source.blob, mask: await brush.file() };
}

// A field that is left empty is not sent, and so the server's default.
function number(name) {
  const value = $(name).value;
  return value === "" ? {} : { [name]: Number(value) };
}

function sizeField() {
  const shape = $("shape").value;
  if (shape === "custom") return { size: `${$("width").value}x${$("height").value}` };
  return shape === "auto" ? {} : { size: shape };
}

function cacheFields() {
  switch (named("cache").value) {
    case "quality": return { quality: $("quality").value };
    case "budget": return { magcache: number("computed_steps") };
    case "deadline": return number("deadline_s");
    case "off": return { magcache: { enabled: false } };
    default: return {};
  }
}

function chosenLoras() {
  const chosen = [...$("lora-list").querySelectorAll("[type=checkbox]:checked")];
  return chosen.map(({ value: name }) => {
    const scale = named(`scale:${name}`).value;
    return scale === "" ? { name } : { name, scale: Number(scale) };
  });
}

function showChoices() {
  for (const part of form.querySelectorAll("[data-cache]")) part.hidden = part.dataset.cache !== named("cache").value;
  $("sides").hidden = $("shape").value !== "custom";
  for (const box of $("lora-list").querySelectorAll("[type=checkbox]")) {
    named(`scale:${box.value}`).disabled = !box.checked;
  }
}

// Puts the settings of a finished image back.
function restore({ form: values, request, strokes }) {
  form.reset();
  for (const [name, value] of Object.entries(values)) {
    const control = named(name);
    if (control?.type === "checkbox") control.checked = true;
    else if (control) control.value = value;
  }
  $("seed").value = request.fields.seed;
  source.show(request.source ?? null, strokes);
  showChoices();
  $("prompt").focus();
}

const ASPECTS = [["Square", 1], ["Landscape 3:2", 3 / 2], ["Portrait 2:3", 2 / 3], ["Wide 16:9", 16 / 9], ["Tall 9:16", 9 / 16]];

// Sizes about as large as the default, as far as the service makes them.
function shapesOf(defaultSize, pattern) {
  const [width, height] = defaultSize.split("x").map(Number);
  const taken = new RegExp(pattern);
  const shapes = new Map();
  for (const [name, aspect] of ASPECTS) {
    const sides = [Math.sqrt(width * height * aspect), Math.sqrt((width * height) / aspect)];
    const size = sides.map((side) => Math.round(side / 16) * 16).join("x");
    if (size !== defaultSize && taken.test(size)) shapes.set(size, `${name} (${size.replace("x", " × ")})`);
  }
  return [["auto", `Default (${width} × ${height})`], ...shapes, ["custom", "Custom…"]];
}

function showLimits({ size, num_inference_steps: steps, guidance_scale: guidance }) {
  const shapes = shapesOf(size.default, size.anyOf[0].pattern);
  const before = $("shape").value;
  $("shape").replaceChildren(...shapes.map(([value, text]) => new Option(text, value)));
  if (before) $("shape").value = before;
  const [width, height] = size.default.split("x");
  $("width").defaultValue = width;
  $("height").defaultValue = height;
  $("num_inference_steps").placeholder = steps.default;
  $("guidance_scale").placeholder = guidance.default;
}

function showLoras(adapters) {
  const rows = adapters.map(({ id }) => {
    const row = document.createElement("li");
    const label = document.createElement("label");
    const box = Object.assign(document.createElement("input"), { type: "checkbox", name: `lora:${id}`, value: id });
    label.append(box, ` ${id}`);
    const scale = Object.assign(document.createElement("input"), {
      type: "number", name: `scale:${id}`, step: "any", defaultValue: "1", disabled: true, ariaLabel: `Scale of ${id}`,
    });
    row.append(label, scale);
    return row;
  });
  $("lora-list").replaceChildren(...rows);
  $("loras").hidden = rows.length === 0;
}

let capabilities = null;

// What the service is and takes. While it starts it cannot say, and is asked again.
async function meet() {
  const get = async (path) => (await send(path)).json();
  try {
    const [schema, models] = await Promise.all([get("openapi.json"), get("v1/models")]);
    const [card] = models.data;
    const loras = "/v1/loras" in schema.paths ? await get("v1/loras").catch(() => ({ data: [] })) : { data: [] };
    // From here on without a pause: the model's name never stands above a form that still changes.
    $("model").textContent = card.id;
    $("model").hidden = false;
    showLimits(schema.components.schemas.ImagesRequest.properties);
    showLoras(loras.data);
    capabilities = card.capabilities;
    if (capabilities === null) {
      setTimeout(meet, 3000);
      return;
    }
    $("negative").hidden = !capabilities.negative_prompt;
    $("edit").hidden = capabilities.images === 0;
    $("strength-field").hidden = !capabilities.strength;
    showChoices();
  } catch (error) {
    if (error.status === 401) askForKey();
    if (error.status !== 401 || sessionStorage.getItem(KEY)) showError(error);
  }
}

function askForKey() {
  $("key-field").hidden = false;
  $("docs").hidden = true; // the browser would open it without the key
  $("key").focus();
}

// An error stands below its field, or below the button where it has none, in the API's own words.

function showError(error) {
  clearError();
  const box = $("error");
  box.textContent = error.message;
  if (error.code) {
    const code = Object.assign(document.createElement("code"), {
      textContent: [error.status, error.code, error.param].filter(Boolean).join(" · "),
    });
    box.append(code);
  }
  box.hidden = false;
  const param = (error.param ?? "").split("[")[0];
  const control = param && form.querySelector(`[data-param="${CSS.escape(param)}"]`);
  if (!control) return;
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-errormessage", "error");
  control.closest("details")?.setAttribute("open", "");
  let part = control;
  while (part.parentElement !== form) part = part.parentElement;
  part.after(box);
  control.focus();
}

function clearError() {
  $("error").hidden = true;
  form.append($("error"));
  for (const control of form.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-errormessage");
  }
}

// The image to edit, and the brush that marks what is painted anew

class Brush {
  #strokes = []; // { erase, width, points }, in pixels of the image
  #mask = document.createElement("canvas");
  #cursor = null;
  #stroke = null;

  constructor(canvas) {
    this.canvas = canvas;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", () => this.#up());
    canvas.addEventListener("pointercancel", () => this.#up());
    canvas.addEventListener("pointerleave", () => this.#place(null));
    canvas.addEventListener("blur", () => this.#place(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.#draw()).observe(canvas);
  }

  get strokes() {
    return [...this.#strokes];
  }

  set strokes(strokes) {
    this.#strokes = [...strokes];
    this.#replay();
  }

  resize(width, height) {
    Object.assign(this.#mask, { width, height });
    this.#replay();
  }

  undo() {
    this.strokes = this.#strokes.slice(0, -1);
  }

  // White where the image is painted anew, black elsewhere; null when nothing was painted.
  async file() {
    if (!this.#strokes.length) return null;
    const file = Object.assign(document.createElement("canvas"), { width: this.#mask.width, height: this.#mask.height });
    const context = file.getContext("2d");
    context.drawImage(this.#mask, 0, 0);
    for (const [operation, colour] of [["source-in", "#fff"], ["destination-over", "#000"]]) {
      context.globalCompositeOperation = operation;
      context.fillStyle = colour;
      context.fillRect(0, 0, file.width, file.height);
    }
    return new Promise((resolve) => file.toBlob(resolve, "image/png"));
  }

  get #width() {
    return (Math.min(this.#mask.width, this.#mask.height) * Number($("brush").value)) / 100;
  }

  get #erases() {
    return $("erase").ariaPressed === "true";
  }

  #at(event) {
    const { width, height } = this.canvas.getBoundingClientRect();
    return [(event.offsetX / width) * this.#mask.width, (event.offsetY / height) * this.#mask.height];
  }

  #down(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#cursor = this.#at(event);
    this.#begin();
  }

  #move(event) {
    this.#place(this.#at(event));
  }

  #up() {
    this.#stroke = null;
  }

  #begin() {
    this.#stroke = { erase: this.#erases, width: this.#width, points: [this.#cursor] };
    this.#strokes.push(this.#stroke);
    this.#replay();
  }

  #place(point) {
    this.#cursor = point;
    if (this.#stroke && point) {
      this.#stroke.points.push(point);
      this.#replay();
    } else this.#draw();
  }

  #key(event) {
    const { width, height } = this.#mask;
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const move = moves[event.key];
    this.#cursor ??= [width / 2, height / 2];
    if (move) {
      const far = this.#width / 2;
      const [x, y] = this.#cursor;
      const within = (value, most) => Math.min(Math.max(value, 0), most);
      this.#stroke = null;
      this.#place([within(x + move[0] * far, width), within(y + move[1] * far, height)]);
    } else if (event.key === " ") {
      this.#begin();
      this.#up();
    } else if (event.key === "e") $("erase").click();
    else if (event.key === "[") $("brush").stepDown();
    else if (event.key === "]") $("brush").stepUp();
    else return;
    event.preventDefault();
    this.#draw();
  }

  #replay() {
    const context = this.#mask.getContext("2d");
    context.clearRect(0, 0, this.#mask.width, this.#mask.height);
    Object.assign(context, { lineCap: "round", lineJoin: "round", strokeStyle: "#e5484d" });
    for (const { erase, width, points } of this.#strokes) {
      context.globalCompositeOperation = erase ? "destination-out" : "source-over";
      context.lineWidth = width;
      context.beginPath();
      context.moveTo(...points[0]);
      for (const point of points) context.lineTo(...point);
      context.stroke();
    }
    $("undo").disabled = $("clear-mask").disabled = !this.#strokes.length;
    this.#draw();
  }

  #draw() {
    const { clientWidth, clientHeight } = this.canvas;
    if (!clientWidth) return;
    const [width, height] = [clientWidth * devicePixelRatio, clientHeight * devicePixelRatio];
    Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    context.globalAlpha = 0.6;
    context.drawImage(this.#mask, 0, 0, width, height);
    if (!this.#cursor) return;
    const scale = width / this.#mask.width;
    for (const [colour, line] of [["#000", 3], ["#fff", 1]]) {
      Object.assign(context, { globalAlpha: 1, strokeStyle: colour, lineWidth: line * devicePixelRatio });
      context.beginPath();
      context.arc(this.#cursor[0] * scale, this.#cursor[1] * scale, (this.#width / 2) * scale, 0, 2 * Math.PI);
      context.stroke();
    }
  }
}

const brush = new Brush($("mask"));

const source = {
  blob: null,

  async show(blob, strokes = []) {
    if (this.blob) URL.revokeObjectURL($("source-image").src);
    this.blob = blob;
    $("source").value = "";
    $("source-view").hidden = !blob;
    form.querySelector(".drop").hidden = Boolean(blob);
    $("shape").options[0].text = blob ? "Shape of the image" : `Default (${$("width").defaultValue} × ${$("height").defaultValue})`;
    brush.strokes = [];
    if (!blob) return;
    const image = $("source-image");
    image.src = URL.createObjectURL(blob);
    try {
      await image.decode();
    } catch {
      this.show(null);
      showError(new ApiError({ message: "This file is no image that the browser can show.", param: "image" }));
      return;
    }
    const mask = capabilities?.mask ?? false;
    for (const id of ["mask", "mask-tools", "mask-help"]) $(id).hidden = !mask;
    $("strength").placeholder = mask ? "0.6, with a mask 1" : "0.6";
    brush.resize(image.naturalWidth, image.naturalHeight);
    brush.strokes = strokes;
  },
};

// The image on its way: its steps, its previews, its end

const seconds = (value) => `${value.toFixed(value < 10 ? 2 : 1)} s`;
const count = (schedule, decision) => schedule.split(decision).length - 1;

function announce(text) {
  $("announce").textContent = text;
}

function showTimeline({ schedule, negative_schedule: negative, step }) {
  const timeline = $("timeline");
  const branches = negative ? [["prompt", schedule], ["negative", negative]] : [["", schedule]];
  const plan = branches.flat().join(" ");
  if (timeline.dataset.plan !== plan) {
    timeline.dataset.plan = plan; // as long as it stays, its cells do
    timeline.replaceChildren(...branches.map(([name, decisions]) => branchRow(name, decisions)));
  }
  for (const row of timeline.querySelectorAll(".cells")) {
    [...row.children].forEach((cell, index) => cell.classList.toggle("ahead", index >= step));
  }
  const did = schedule[step - 1] === "C" ? "computed" : "reused";
  timeline.ariaValueMax = schedule.length;
  timeline.ariaValueNow = step;
  timeline.ariaValueText = step ? `step ${step} of ${schedule.length}, ${did}` : `none of ${schedule.length} steps done`;
}

function branchRow(name, decisions) {
  const row = Object.assign(document.createElement("div"), { className: "branch" });
  const cells = Object.assign(document.createElement("div"), { className: "cells" });
  cells.append(...[...decisions].map((decision, index) => {
    const kind = decision === "C" ? "computed" : "reused";
    return Object.assign(document.createElement("i"), { className: kind, title: `step ${index + 1}: ${kind}` });
  }));
  if (name) row.append(Object.assign(document.createElement("span"), { textContent: name }));
  row.append(cells);
  return row;
}

function showFacts(facts) {
  const shown = Object.entries(facts).filter(([, value]) => value !== null);
  $("facts").replaceChildren(...shown.map(([name, value]) => {
    const pair = document.createElement("div");
    pair.append(
      Object.assign(document.createElement("dt"), { textContent: name }),
      Object.assign(document.createElement("dd"), { textContent: value }),
    );
    return pair;
  }));
}

function planFacts({ schedule, negative_schedule: negative, predicted_error: error }) {
  const computed = (decisions) => `${count(decisions, "C")} of ${decisions.length} steps`;
  return {
    "Computed": computed(schedule),
    "Computed, negative": negative && computed(negative),
    "Predicted error": count(schedule, ".") === 0 ? "0" : error === null ? "beyond what was measured" : error.toPrecision(3),
  };
}

const PHASES = ["queue", "encode", "denoise", "decode"];

function showPhases(timings) {
  const total = PHASES.reduce((sum, phase) => sum + timings[`${phase}_s`], 0);
  const bar = Object.assign(document.createElement("div"), { className: "stack", ariaHidden: "true" });
  const list = Object.assign(document.createElement("ul"), { className: "plain" });
  for (const phase of PHASES) {
    const value = timings[`${phase}_s`];
    const part = Object.assign(document.createElement("i"), { className: phase });
    part.style.flexGrow = total ? value / total : 1;
    bar.append(part);
    const row = document.createElement("li");
    row.append(Object.assign(document.createElement("i"), { className: phase }), `${phase} ${seconds(value)}`);
    list.append(row);
  }
  $("phases").replaceChildren(bar, list);
  $("phases").hidden = false;
}

class Run {
  #clock = null;
  #waiting = null;

  constructor(request) {
    this.began = performance.now();
    $("progress").hidden = $("report").hidden = false;
    for (const id of ["actions", "phases", "code-view", "comparison"]) $(id).hidden = true;
    $("warnings").replaceChildren();
    $("facts").replaceChildren();
    $("timeline").replaceChildren();
    delete $("timeline").dataset.plan;
    $("timeline").ariaValueNow = null;
    $("phase").textContent = request.source ? "Reading prompt and image" : "Reading the prompt";
    $("eta").textContent = "";
    announce("The service was asked for the image.");
  }

  event(event) {
    if (event.type === "flux.progress") this.#progress(event);
    else this.#preview(event);
  }

  #progress(event) {
    showTimeline(event);
    showFacts(planFacts(event));
    this.#count(event.eta_s);
    if (event.queue_position && event.queue_position !== this.#waiting) announce(`Waiting, number ${event.queue_position}.`);
    if (!event.queue_position && this.#waiting !== 0) announce("The steps have begun.");
    this.#waiting = event.queue_position;
    const done = event.step === event.steps;
    $("phase").textContent = event.queue_position
      ? `Waiting, number ${event.queue_position} in the queue`
      : done ? "Decoding" : `Step ${event.step} of ${event.steps}`;
  }

  // The estimate runs down between two events.
  #count(eta) {
    clearInterval(this.#clock);
    const until = performance.now() + eta * 1000;
    const show = () => ($("eta").textContent = `${seconds(Math.max(until - performance.now(), 0) / 1000)} left`);
    show();
    this.#clock = setInterval(show, 100);
  }

  #preview(event) {
    showImage(URL.createObjectURL(blobOf(event)), "A preview of the image on its way", true);
  }

  end() {
    clearInterval(this.#clock);
  }
}

function showImage(url, alt, isPreview) {
  const image = $("image");
  if (image.dataset.preview) URL.revokeObjectURL(image.src);
  if (isPreview) image.dataset.preview = "1";
  else delete image.dataset.preview;
  Object.assign(image, { src: url, alt, hidden: false });
  $("empty").hidden = true;
}

// Finished images: the one that is shown, and the gallery

const MOST_KEPT = 60; // images in the tab's memory
const gallery = [];
let shown = null;

function show(entry) {
  shown = entry;
  const { event, request } = entry;
  const { magcache, timings } = event;
  showImage(entry.url, request.fields.prompt, false);
  $("progress").hidden = $("report").hidden = false;
  showTimeline({ ...magcache, step: magcache.schedule.length });
  $("phase").textContent = "Done";
  $("eta").textContent = `${seconds(timings.total_s)} in all`;
  showFacts({
    ...planFacts(magcache),
    "Steps estimated": seconds(event.eta_s),
    "Steps took": seconds(timings.queue_s + timings.denoise_s),
    "Seed": request.fields.seed,
    "Size": event.size.replace("x", " × "),
    "Lowered by": magcache.lowered_by,
    "Profile": magcache.profile,
    "All steps because": magcache.skipped ? null : magcache.uncached_reason,
  });
  showPhases(timings);
  $("warnings").replaceChildren(...event.warnings.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
  $("download").href = entry.url;
  $("download").download = `flux-${request.fields.seed}.${event.output_format}`;
  $("edit-this").hidden = !capabilities?.images;
  $("compare").hidden = !magcache.skipped;
  $("actions").hidden = false;
  $("code-view").hidden = true;
  showComparison();
  for (const one of gallery) one.button.ariaCurrent = String(one === entry);
}

function keep(entry) {
  const button = Object.assign(document.createElement("button"), { type: "button" });
  gallery.push(Object.assign(entry, { button }));
  const label = `${entry.request.fields.prompt}, seed ${entry.request.fields.seed}`;
  button.append(Object.assign(new Image(), { src: entry.url, alt: label, title: label }));
  button.addEventListener("click", () => show(entry));
  const row = document.createElement("li");
  row.append(button);
  $("images").prepend(row);
  $("gallery").hidden = false;
  if (gallery.length > MOST_KEPT) {
    const oldest = gallery.shift();
    $("images").lastElementChild.remove();
    for (const url of [oldest.url, oldest.full?.url]) if (url) URL.revokeObjectURL(url);
  }
}

// One request at a time: the form's, or the comparison's.
let running = null;

async function whileRunning(work) {
  running = new AbortController();
  showRunning();
  clearError();
  if (matchMedia("(max-width: 52rem)").matches) $("result").scrollIntoView(); // it is below the form there
  try {
    await work(running.signal);
  } catch (error) {
    const cancelled = error.name === "AbortError" || error.code === "request_cancelled";
    $("phase").textContent = cancelled ? "Cancelled" : "Failed";
    $("eta").textContent = "";
    announce(cancelled ? "Cancelled." : "");
    if (!cancelled) showError(error);
  } finally {
    running = null;
    showRunning();
  }
}

function showRunning() {
  const runs = running !== null;
  const focused = document.activeElement;
  const leaves = runs ? $("actions").contains(focused) || $("gallery").contains(focused) : focused === $("cancel");
  $("generate").ariaDisabled = $("result").ariaBusy = String(runs);
  $("cancel").hidden = !runs;
  if (leaves) $(runs ? "cancel" : "generate").focus({ preventScroll: true });
  $("actions").inert = $("gallery").inert = runs;
}

async function generate() {
  const values = Object.fromEntries([...new FormData(form)].filter(([, value]) => typeof value === "string"));
  const strokes = brush.strokes;
  await whileRunning(async (signal) => {
    const request = await requestOf();
    const run = new Run(request);
    try {
      const event = await make(request, signal, (one) => run.event(one));
      // From here on the seed is pinned: the comparison and the code ask for this very image.
      const seeded = { ...request, fields: { ...request.fields, seed: seedOf(request, event) } };
      const url = URL.createObjectURL(blobOf(event));
      const entry = { request: seeded, event, url, form: values, strokes };
      keep(entry);
      show(entry);
      const { computed, skipped } = event.magcache;
      announce(`The image is done: ${computed} of ${computed + skipped} steps computed, ${seconds(event.timings.total_s)}.`);
    } finally {
      run.end();
    }
  });
}

// A drawn seed is below 2^53, and so exact in the reply; a given one may not be.
function seedOf({ fields }, event) {
  return fields.seed === undefined || fields.seed === "-1" ? String(event.seed) : fields.seed;
}

// The same seed with every step computed, beside it

async function compare() {
  const entry = shown;
  if (!entry.full) {
    await whileRunning(async (signal) => {
      const fields = { ...entry.request.fields, magcache: { enabled: false } };
      for (const name of OTHER_CACHE_FIELDS) delete fields[name];
      const event = await make({ ...entry.request, fields }, signal, ({ step, steps }) => {
        if (steps) $("phase").textContent = `Every step computed: ${step} of ${steps}`;
      });
      entry.full = { event, url: URL.createObjectURL(blobOf(event)) };
    });
    if (entry.full) show(entry);
  }
  $(entry.full ? "comparison" : "compare").focus();
}

let compared = null; // the pixels of both images

async function showComparison() {
  const { full, event, url } = shown;
  $("comparison").hidden = !full;
  $("compare").textContent = full ? "Show the comparison" : "Compare with every step computed";
  $("verdict").textContent = "";
  if (!full) return;
  $("cached").src = url;
  $("full").src = full.url;
  $("cached-caption").textContent = `Cached: ${event.magcache.computed} steps computed`;
  $("full-caption").textContent = `Every step: ${full.event.magcache.computed} computed`;
  const pixels = await Promise.all([pixelsOf(url), pixelsOf(full.url)]);
  if (shown.full !== full) return; // another image was chosen meanwhile
  compared = pixels;
  const decibels = psnr(...pixels.map(({ data }) => data));
  const likeness = decibels === Infinity ? "The two are identical" : `${decibels.toFixed(1)} dB PSNR between the two`;
  const [ours, theirs] = [event, full.event].map(({ timings }) => seconds(timings.denoise_s));
  $("verdict").textContent = `${likeness}; the steps took ${ours} instead of ${theirs}.`;
  showDifference();
}

function showDifference() {
  const gain = 2 ** Number($("gain").value);
  $("gain-value").textContent = gain;
  const [cached, full] = compared;
  const canvas = Object.assign($("difference"), { width: cached.width, height: cached.height });
  canvas.ariaLabel = `The difference of the two, ${gain} times as strong`;
  const image = new ImageData(cached.width, cached.height);
  for (let index = 0; index < image.data.length; index++) {
    image.data[index] = index % 4 === 3 ? 255 : gain * Math.abs(cached.data[index] - full.data[index]);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

async function pixelsOf(url) {
  const image = Object.assign(new Image(), { src: url });
  await image.decode();
  const { naturalWidth: width, naturalHeight: height } = image;
  const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, width, height);
}

// Of RGBA bytes; the alpha, equal in both, does not count.
function psnr(one, other) {
  let squares = 0;
  for (let index = 0; index < one.length; index++) squares += (one[index] - other[index]) ** 2;
  return 10 * Math.log10((255 ** 2 * one.length * 0.75) / squares);
}

// The shown image's request as code

const address = () => new URL(".", location.href).href.replace(/\/$/, "");
const shellQuoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curlOf({ path, fields, source: image, mask }) {
  const lines = [`curl -s ${address()}/${path}`];
  if (sessionStorage.getItem(KEY)) lines.push('-H "Authorization: Bearer $FLUX_API_KEY"');
  const all = { ...fields, response_format: "file" };
  if (image) {
    lines.push("-F image=@source.png");
    if (mask) lines.push("-F mask=@mask.png");
    for (const [name, value] of Object.entries(all)) lines.push(`--form-string ${shellQuoted(`${name}=${formText(value)}`)}`);
  } else {
    lines.push("-H 'Content-Type: application/json'", `-d ${shellQuoted(jsonText(all))}`);
  }
  return [...lines, "-o image.png"].join(" \\\n  ");
}

const OPENAI_FIELDS = ["prompt", "size", "quality"]; // those that its client knows; others go into extra_body

function pythonOf({ path, fields, source: image, mask }) {
  const call = path.endsWith("edits") ? "edit" : "generate";
  const lines = image ? ['image=open("source.png", "rb"),'] : [];
  if (mask) lines.push('mask=open("mask.png", "rb"),');
  for (const name of OPENAI_FIELDS) if (name in fields) lines.push(`${name}=${pythonLiteral(fields[name])},`);
  const others = Object.entries(fields).filter(([name]) => !OPENAI_FIELDS.includes(name));
  const body = others.map(([name, value]) => {
    const text = name === "seed" ? value : pythonLiteral(image && typeof value === "object" ? JSON.stringify(value) : value);
    return `"${name}": ${text}`;
  });
  if (body.length) lines.push(`extra_body={${body.join(", ")}},`);
  const key = sessionStorage.getItem(KEY) ? 'os.environ["FLUX_API_KEY"]' : '"none"';
  return [
    "import base64", ...(sessionStorage.getItem(KEY) ? ["import os"] : []), "", "from openai import OpenAI", "",
    `client = OpenAI(base_url="${address()}/v1", api_key=${key})`,
    `reply = client.images.${call}(`, ...lines.map((line) => `    ${line}`), ")",
    'open("image.png", "wb").write(base64.b64decode(reply.data[0].b64_json))',
  ].join("\n");
}

function pythonLiteral(value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(pythonLiteral).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, one]) => `"${name}": ${pythonLiteral(one)}`).join(", ")}}`;
}

async function copy(code, files) {
  const note = $("code-note");
  $("code").textContent = code;
  $("code-view").hidden = false;
  getSelection().selectAllChildren($("code"));
  try {
    await navigator.clipboard.writeText(code);
    note.textContent = "Copied to the clipboard.";
  } catch {
    note.textContent = "Selected, to be copied: without HTTPS a page has no clipboard.";
    $("code").focus();
  }
  for (const [name, blob] of Object.entries(files)) {
    if (!blob) continue;
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
    link.textContent = name;
    note.append(note.childElementCount ? ", " : " It reads ", link);
  }
}

const filesOf = ({ source: image, mask }) => ({ "source.png": image, "mask.png": mask });

// What the controls do

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) generate();
});
form.addEventListener("change", showChoices);
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("cancel").addEventListener("click", () => running?.abort());
$("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, $("key").value.trim());
  clearError();
  meet();
});

$("source").addEventListener("change", () => source.show($("source").files[0] ?? null));
const drop = form.querySelector(".drop");
for (const type of ["dragover", "drop"]) $("edit").addEventListener(type, (event) => event.preventDefault());
for (const type of ["dragenter", "dragleave"]) {
  drop.addEventListener(type, () => drop.classList.toggle("over", type === "dragenter"));
}
$("edit").addEventListener("drop", ({ dataTransfer }) => {
  drop.classList.remove("over");
  if (dataTransfer.files.length) source.show(dataTransfer.files[0]);
});
$("remove-source").addEventListener("click", () => {
  source.show(null);
  $("source").focus();
});
$("erase").addEventListener("click", () => ($("erase").ariaPressed = String($("erase").ariaPressed !== "true")));
$("undo").addEventListener("click", () => brush.undo());
$("clear-mask").addEventListener("click", () => (brush.strokes = []));

$("compare").addEventListener("click", compare);
$("gain").addEventListener("input", showDifference);
$("restore").addEventListener("click", () => restore(shown));
$("copy-curl").addEventListener("click", () => copy(curlOf(shown.request), filesOf(shown.request)));
$("copy-python").addEventListener("click", () => copy(pythonOf(shown.request), filesOf(shown.request)));
$("edit-this").addEventListener("click", () => {
  source.show(blobOf(shown.event));
  $("prompt").focus();
});

meet();
