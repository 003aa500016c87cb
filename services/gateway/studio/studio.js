// The studio: one form, one job at a time, its events, and its audio side by side.

import { decode, record, spectrogram } from "/studio/audio.js";
import { voices } from "/studio/voices.js";

const $ = (id) => document.getElementById(id);
const state = { options: null, recording: null, job: null, recorder: null, urls: [], sounds: [] };
const SECONDS_BEFORE_RETRY = [0.5, 1, 2, 4, 8];
const STAGES = { tokenize: "reading the recording", generate: "writing audio tokens", score: "choosing the best", decode: "making sound" };

// The gateway ---------------------------------------------------------------------------------------------------------

async function call(path, settings = {}) {
  const headers = { ...settings.headers };
  const key = $("key").value.trim();
  if (key) headers.authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...settings, headers });
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({ detail: `The gateway answered ${answer.status}.` }));
  const error = new Error([problem.detail, problem.hint].filter(Boolean).join(" "));
  error.status = answer.status;
  throw error;
}

/** A job's events as they come, to its last; a stream that breaks is taken up after the last event seen. */
async function* events(id) {
  let last = 0, failures = 0;
  while (true) {
    try {
      const answer = await call(`/v1/jobs/${id}/events`, { headers: { "last-event-id": String(last) } });
      for await (const event of parsed(answer.body)) {
        failures = 0;
        last = event.seq ?? last;
        yield event;
        if (event.job) return;
      }
      const job = await (await call(`/v1/jobs/${id}`)).json();
      if (["done", "failed", "cancelled"].includes(job.status)) return;
    } catch (error) {
      if (error.status && error.status < 500 && error.status !== 429) throw error;
    }
    if (failures >= SECONDS_BEFORE_RETRY.length) throw new Error("The connection to the gateway was lost.");
    await new Promise((resolve) => setTimeout(resolve, 1000 * SECONDS_BEFORE_RETRY[failures++]));
  }
}

async function* parsed(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data) yield JSON.parse(data);
    }
  }
}

// The form ------------------------------------------------------------------------------------------------------------

function chip(group, name, label, isChecked) {
  const holder = document.createElement("label");
  holder.className = "chip";
  const input = Object.assign(document.createElement("input"), { type: "radio", name: group, value: name, checked: isChecked });
  holder.append(input, label);
  return holder;
}

function span(...parts) {
  const element = document.createElement("span");
  element.append(...parts);
  return element;
}

function element(tag, text) {
  return Object.assign(document.createElement(tag), { textContent: text });
}

const picker = voices({ call, recording: () => state.recording, changed: () => state.options && showEdit() });
const chosen = (group) => document.querySelector(`input[name=${group}]:checked`)?.value;
const option = () => state.options.edits.find((edit) => edit.type === chosen("type"));

function showTypes() {
  $("types").replaceChildren(...state.options.edits.map((edit, i) => chip("type", edit.type, span(edit.type), i === 0)));
  $("format").replaceChildren(...state.options.formats.map((name) => element("option", name)));
  $("model").textContent = `model: ${state.options.model}`;
  showEdit();
}

function showEdit() {
  const edit = option();
  $("meaning").textContent = edit.meaning + (edit.trained ? "" : " This checkpoint was not trained on it.");
  $("tags-row").hidden = !edit.takes.includes("detail");
  $("target-row").hidden = !edit.takes.includes("target_text");
  $("text-row").hidden = Boolean(picker.chosen()) || !edit.takes.includes("text");
  $("target-label").textContent = edit.type === "clone" ? "What to say" : "The same words, with sounds";
  $("run").textContent = edit.type === "clone" ? "Clone it" : "Edit it";
  $("iterations").disabled = edit.type === "clone";
  if (edit.type === "paralinguistic" && !$("target").value.trim()) $("target").value = $("text").value;
  $("filter").value = "";
  showTags();
  const sounds = state.options.edits.find((one) => one.type === "paralinguistic").tags;
  $("sounds").replaceChildren(...sounds.map((tag) => {
    const button = Object.assign(element("button", tag.name), { type: "button", title: tag.meaning });
    button.addEventListener("click", () => insert(`[${tag.name}]`));
    return button;
  }));
}

function showTags() {
  const wanted = $("filter").value.trim().toLowerCase(), before = chosen("detail");
  const tags = option().tags.filter((tag) => `${tag.name} ${tag.meaning}`.toLowerCase().includes(wanted));
  tags.sort((a, b) => b.trained - a.trained);
  $("tags").replaceChildren(...tags.map((tag, i) => {
    const note = tag.trained ? [] : [element("em", "untrained")];
    const isChecked = tags.some((one) => one.name === before) ? tag.name === before : i === 0;
    return chip("detail", tag.name, span(element("b", tag.name), element("i", tag.meaning), ...note), isChecked);
  }));
}

function insert(text) {
  const field = $("target");
  field.setRangeText(text, field.selectionStart, field.selectionEnd, "end");
  field.focus();
}

async function choose(blob, name) {
  state.recording = { blob, name };
  picker.choose("");
  const sound = await decode(blob);
  $("chosen").textContent = sound ? `${name}, ${sound.seconds.toFixed(1)} s` : name;
  clearCards();
  await addCard(`Source: ${name}`, blob, sound);
  tell("", "");
}

async function toggleRecording() {
  const button = $("record");
  try {
    if (state.recorder) {
      const blob = await state.recorder.stop();
      state.recorder = null;
      if (blob) await choose(blob, "recording.wav");
    } else {
      state.recorder = await record();
    }
  } catch (error) {
    state.recorder = null;
    tell("", `The microphone cannot be used: ${error.message}`);
  }
  button.setAttribute("aria-pressed", String(Boolean(state.recorder)));
  $("record-label").textContent = state.recorder ? "Stop" : "Record";
}

function request() {
  const edit = option(), form = new FormData(), voice = picker.chosen();
  const fields = {
    type: edit.type,
    detail: edit.takes.includes("detail") ? chosen("detail") : "",
    target_text: edit.takes.includes("target_text") ? $("target").value : "",
    text: edit.takes.includes("text") && !voice ? $("text").value : "",
    n_best: $("n-best").value,
    iterations: edit.type === "clone" ? "" : $("iterations").value,
    seed: $("seed").value,
    format: $("format").value,
    "generate.temperature": $("temperature").value,
    "decode.steps": $("steps").value,
  };
  for (const [name, value] of Object.entries(fields)) if (value) form.append(name, value);
  if (voice) form.append("voice", voice.id);
  else form.append("audio", state.recording.blob, state.recording.name);
  return form;
}

function missing() {
  const edit = option(), voice = picker.chosen();
  if (!state.recording && !voice) return ["Choose or record a recording first.", "file"];
  if (edit.takes.includes("text") && !voice && !$("text").value.trim()) return ["Write down what the recording says.", "text"];
  if (edit.takes.includes("target_text") && !$("target").value.trim()) return ["Write the new text.", "target"];
  return null;
}

// A job ---------------------------------------------------------------------------------------------------------------

async function run(event) {
  event.preventDefault();
  const lack = missing();
  if (lack) {
    tell("", lack[0]);
    $(lack[1]).focus();
    return;
  }
  busy(true);
  tell("Sending the recording", "");
  try {
    const key = Array.from(crypto.getRandomValues(new Uint8Array(16)), (value) => value.toString(16).padStart(2, "0")).join("");
    const answer = await call("/v1/audio/edits", { method: "POST", body: request(), headers: { "idempotency-key": key } });
    state.job = await answer.json();
    clearCards();
    await showSource(state.job.id);
    await follow(state.job.id);
  } catch (error) {
    tell("", error.message);
  }
  busy(false);
  await showHistory();
}

async function showSource(id) {
  const voice = picker.chosen();
  const blob = voice ? await (await call(`/v1/jobs/${id}/audio?iteration=0`)).blob() : state.recording.blob;
  await addCard(`Source: ${voice ? voice.name : state.recording.name}`, blob, await decode(blob));
}

async function follow(id) {
  const shown = new Set();
  for await (const event of events(id)) {
    $("bar").value = event.progress;
    const stage = event.data?.kind && event.type === "started" ? STAGES[event.data.kind] ?? event.data.kind : event.note;
    if (stage) tell(`${Math.round(100 * event.progress)} %: ${stage}`, "");
    if (event.type === "step" && event.data.kind === "decode" && !event.job) await showReady(id, shown);
    if (event.job) state.job = event.job;
  }
  const job = state.job;
  if (job.status === "done") {
    await showReady(id, shown);
    tell("Done.", "");
    showFacts(job);
    $("results").focus({ preventScroll: true });
  } else if (job.status === "cancelled") {
    tell("Cancelled.", "");
  } else if (job.error) {
    tell("", `${job.error.message} ${job.error.hint}`);
  }
}

async function showReady(id, shown) {
  const job = await (await call(`/v1/jobs/${id}`)).json();
  for (const audio of job.audio) {
    if (shown.has(audio.iteration)) continue;
    shown.add(audio.iteration);
    const blob = await (await call(audio.href)).blob();
    const title = [job.edit.type, job.edit.detail].filter(Boolean).join(" ");
    const number = job.iterations > 1 ? `, iteration ${audio.iteration}` : "";
    await addCard(title + number, blob, await decode(blob), `${id}-${audio.iteration}.${audio.format}`);
  }
}

async function open(job) {
  tell("", "");
  clearCards();
  state.job = job;
  try {
    const source = await (await call(`/v1/jobs/${job.id}/audio?iteration=0`)).blob();
    await addCard("Source", source, await decode(source));
    await showReady(job.id, new Set());
    showFacts(job);
    $("results").focus();
  } catch (error) {
    tell("", error.message);
  }
}

function showFacts(job) {
  const seconds = job.steps.reduce((sum, step) => sum + step.seconds, 0);
  $("facts").textContent = [`${seconds.toFixed(1)} s of work`, `seed ${job.seed}`, ...job.warnings].join(" · ");
}

async function showHistory() {
  const { data } = await (await call("/v1/jobs?limit=8")).json();
  $("history").replaceChildren(...data.map((job) => {
    const line = document.createElement("li");
    const what = [job.edit.type, job.edit.detail].filter(Boolean).join(" ");
    const when = new Date(1000 * job.created_at).toLocaleTimeString();
    const view = Object.assign(element("button", "Open"), { type: "button", disabled: job.status !== "done" });
    view.setAttribute("aria-label", `Open ${what} of ${when}`);
    view.addEventListener("click", () => open(job));
    const remove = Object.assign(element("button", "Delete"), { type: "button" });
    remove.setAttribute("aria-label", `Delete ${what} of ${when}`);
    remove.addEventListener("click", async () => {
      await call(`/v1/jobs/${job.id}`, { method: "DELETE" }).catch((error) => tell("", error.message));
      await showHistory();
    });
    line.append(span(`${when} · ${what} · ${job.status}`), view, remove);
    return line;
  }));
}

// What is shown -------------------------------------------------------------------------------------------------------

function tell(status, problem) {
  $("status").textContent = status;
  $("problem").textContent = problem;
}

function busy(isBusy) {
  $("run").disabled = isBusy;
  $("cancel").hidden = !isBusy;
  $("bar").hidden = !isBusy;
  $("bar").value = 0;
}

function clearCards() {
  state.urls.forEach((url) => URL.revokeObjectURL(url));
  state.urls = [];
  state.sounds = [];
  $("cards").replaceChildren();
  $("facts").textContent = "";
}

async function addCard(title, blob, sound, filename) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  const url = URL.createObjectURL(blob);
  state.urls.push(url);
  card.querySelector("h3").textContent = title;
  const player = card.querySelector("audio");
  player.src = url;
  player.setAttribute("aria-label", title);
  player.addEventListener("play", () => document.querySelectorAll("audio").forEach((one) => one !== player && one.pause()));
  const link = card.querySelector(".download");
  link.hidden = !filename;
  if (filename) Object.assign(link, { href: url, download: filename });
  const canvas = card.querySelector("canvas");
  canvas.setAttribute("aria-label", `Spectrogram of ${title}, 0 to 8 kilohertz`);
  $("cards").append(card);
  if (!sound) return;
  card.querySelector(".length").textContent = `${sound.seconds.toFixed(2)} s`;
  state.sounds.push({ canvas, sound });
  const longest = Math.max(...state.sounds.map((one) => one.sound.seconds));
  for (const one of state.sounds) spectrogram(one.canvas, one.sound, longest);
}

async function start() {
  $("key").value = sessionStorage.getItem("editx-key") ?? "";
  try {
    state.options = await (await call("/v1/edits/options")).json();
    showTypes();
    await picker.refresh();
    $("run").disabled = false;
    tell("", "");
    await showHistory();
  } catch (error) {
    $("run").disabled = true;
    if (error.status === 401) document.querySelector(".access").open = true;
    tell("", error.message);
  }
}

$("form").addEventListener("submit", run);
$("cancel").addEventListener("click", () => state.job && call(`/v1/jobs/${state.job.id}/cancel`, { method: "POST" }).catch((error) => tell("", error.message)));
$("types").addEventListener("change", showEdit);
$("filter").addEventListener("input", showTags);
$("filter").addEventListener("keydown", (event) => event.key === "Enter" && event.preventDefault());
$("file").addEventListener("change", () => $("file").files[0] && choose($("file").files[0], $("file").files[0].name));
$("record").addEventListener("click", toggleRecording);
$("key").addEventListener("change", () => { sessionStorage.setItem("editx-key", $("key").value.trim()); start(); });
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    const file = name === "drop" && event.dataTransfer.files[0];
    if (file) choose(file, file.name);
  });
}
start();
