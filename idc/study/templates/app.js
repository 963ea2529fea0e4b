"use strict";
// The questionnaire. The rater's key is in the address (after #) and in the browser's storage; the server knows the
// questions and the answers sent so far, the storage what is not sent or half filled in.

const $ = (id) => document.getElementById(id);
const KEY = "idc-study-" + document.body.dataset.study;
const SIDES = ["left", "right"];
const LABELS = { left: "A", tie: "No difference", right: "B" };
const ORDER = ["left", "tie", "right"];

const state = { rater: "", questions: [], answers: {}, drafts: {}, outbox: [], at: 0, shownAt: 0, watched: 0 };

function remember() {
  const { rater, drafts, outbox } = state;
  try {
    localStorage.setItem(KEY, rater);
    localStorage.setItem(KEY + rater, JSON.stringify({ drafts, outbox }));
  } catch { /* private mode: the address still has the key */ }
}

function recall() {
  const inAddress = location.hash.slice(1);
  state.rater = /^[0-9a-f]{32}$/.test(inAddress) ? inAddress : "";
  let kept = {};
  try {
    if (!state.rater) state.rater = localStorage.getItem(KEY) || "";
    // Each rater's own: a link of another one, opened in this browser, loses nobody's unsent answers.
    kept = JSON.parse(localStorage.getItem(KEY + state.rater)) || {};
  } catch { /* nothing kept, or not readable */ }
  state.drafts = kept.drafts || {};
  state.outbox = kept.outbox || [];
}

function show(name) {
  for (const part of ["intro", "question", "done", "failed"]) $(part).hidden = part !== name;
  window.scrollTo(0, 0);
}

class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

async function request(path, body) {
  const options = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  const response = await fetch(path, { cache: "no-store", ...options });
  const value = await response.json().catch(() => ({ error: response.statusText }));
  if (!response.ok) throw new Refused(value.error || response.statusText, response.status);
  return value;
}

async function start() {
  if (!state.rater) {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    state.rater = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
    remember();
  }
  await request("api/join", { rater: state.rater });
  await load();
}

async function load() {
  const session = await request("api/session?rater=" + state.rater);
  history.replaceState(null, "", "#" + state.rater);
  state.questions = session.questions;
  state.answers = session.answers;
  for (const { question, choices, revision } of state.outbox) state.answers[question] = { choices, revision };
  remember();
  const first = state.questions.findIndex((question) => !state.answers[question.id]);
  first < 0 ? finish() : go(first);
  flush();
}

async function open() {
  recall();
  if (!state.rater) return show("intro");
  try {
    await load();
  } catch (error) {
    // A key that was drawn but never joined (the connection broke), or one of another study.
    if (error instanceof Refused && error.status === 404) return show("intro");
    $("failed-text").textContent = "The server cannot be reached. Your answers so far are kept.";
    show("failed");
  }
}

// ---- one question -------------------------------------------------------------------------------------------------

function go(position) {
  state.at = position;
  state.watched = 0;
  state.shownAt = performance.now();
  const question = state.questions[position];
  $("progress").max = state.questions.length;
  $("progress").value = position;
  $("where").textContent = `Pair ${position + 1} of ${state.questions.length}`;
  $("back").disabled = position === 0;
  $("next").textContent = position + 1 === state.questions.length ? "Finish" : "Next";
  $("unplayable").hidden = true;
  showPrompt(question);
  showVideos(question);
  showCriteria(question);
  show("question");
  $("more").hidden = $("prompt").scrollHeight <= $("prompt").clientHeight + 2;
  const next = state.questions[position + 1];
  if (next) preload(next);
}

function showPrompt(question) {
  $("prompt").textContent = question.prompt;
  $("prompt").classList.add("short");
  $("references").replaceChildren(...question.references.map((reference, number) => {
    const button = document.createElement("button");
    const image = document.createElement("img");
    image.src = "media/" + reference.file;
    image.width = reference.width;
    image.height = reference.height;
    image.alt = reference.label || `Reference ${number + 1}`;
    button.append(image);
    if (reference.label) {
      const name = document.createElement("span");
      name.textContent = reference.label;
      button.append(name);
    }
    button.onclick = () => {
      $("large-image").src = image.src;
      $("large-image").alt = image.alt;
      $("large").showModal();
    };
    return button;
  }));
}

function showVideos(question) {
  question.videos.forEach((video, number) => {
    const element = $("video-" + SIDES[number]);
    element.parentElement.classList.remove("broken", "paused");
    element.width = video.width;
    element.height = video.height;
    element.style.aspectRatio = `${video.width} / ${video.height}`;
    element.parentElement.style.setProperty("--ratio", video.width / video.height);
    element.src = "media/" + video.file;
    element.load();
  });
  $("pair").classList.toggle("wide", question.videos.some((video) => video.width > 1.15 * video.height));
  replay();
}

const videos = () => SIDES.map((side) => $("video-" + side));

function play() {
  for (const video of videos()) {
    // Refused where the phone saves power: a tap on either plays both.
    video.play().catch((error) => { if (error.name === "NotAllowedError") video.parentElement.classList.add("paused"); });
  }
}

let ready = () => {};
function replay() {
  // Both begin in the same moment: as soon as each can play.
  for (const video of videos()) { video.pause(); video.currentTime = 0; }
  ready = () => {
    if (videos().every((video) => video.readyState >= 3 || video.error)) { ready = () => {}; play(); }
  };
  ready();
}

function toggle() {
  videos().every((video) => video.paused) ? play() : videos().forEach((video) => video.pause());
}

function preload(question) {
  for (const { file } of question.videos) {
    const video = document.createElement("video");
    video.muted = true;
    video.preload = "auto";
    video.src = "media/" + file;
  }
  for (const { file } of question.references) new Image().src = "media/" + file;
}

function showCriteria(question) {
  const chosen = current(question);
  $("criteria").replaceChildren(...question.criteria.map((criterion) => {
    const set = document.createElement("fieldset");
    set.dataset.key = criterion.key;
    const legend = document.createElement("legend");
    legend.textContent = criterion.title;
    const hint = document.createElement("p");
    hint.className = "hint";
    hint.id = "hint-" + criterion.key;
    hint.textContent = criterion.question;
    set.setAttribute("aria-describedby", hint.id);
    const choices = document.createElement("div");
    choices.className = "choices";
    for (const choice of ORDER) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      Object.assign(input, { type: "radio", name: criterion.key, value: choice, checked: chosen[criterion.key] === choice });
      const text = document.createElement("span");
      text.textContent = LABELS[choice];
      label.append(input, text);
      choices.append(label);
    }
    set.append(legend, hint, choices);
    return set;
  }));
  refresh();
}

function current(question) {
  return state.drafts[question.id] || (state.answers[question.id] || {}).choices || {};
}

function refresh() {
  const question = state.questions[state.at];
  const chosen = current(question);
  const open = question.criteria.filter(({ key }) => !ORDER.includes(chosen[key]));
  $("next").disabled = open.length > 0;
  $("left-over").textContent = open.length ? `${open.length} of ${question.criteria.length} to answer` : "";
  for (const set of $("criteria").children) set.classList.toggle("current", open.length > 0 && set.dataset.key === open[0].key);
}

function choose(key, choice) {
  const question = state.questions[state.at];
  state.drafts[question.id] = { ...current(question), [key]: choice };
  for (const each of Object.keys(state.drafts[question.id])) {
    if (!ORDER.includes(state.drafts[question.id][each])) delete state.drafts[question.id][each];
  }
  remember();
  refresh();
}

function submit(skipped) {
  const question = state.questions[state.at];
  const choices = skipped ? Object.fromEntries(question.criteria.map(({ key }) => [key, "skip"])) : current(question);
  const before = state.answers[question.id];
  const same = before && question.criteria.every(({ key }) => before.choices[key] === choices[key]);
  if (!same) {
    const revision = before ? before.revision + 1 : 1;
    const seconds = Math.min(86400, Math.round((state.watched + performance.now() - state.shownAt) / 100) / 10);
    state.answers[question.id] = { choices, revision };
    state.outbox.push({ question: question.id, choices, revision, seconds });
  }
  delete state.drafts[question.id];
  remember();
  flush();
  const after = state.at + 1;
  after < state.questions.length ? go(after) : finish();
}

function finish() {
  const open = state.questions.findIndex((question) => !state.answers[question.id]);
  if (open >= 0) return go(open);
  for (const video of videos()) video.pause();
  show("done");
  report();
}

// ---- sending ------------------------------------------------------------------------------------------------------

let sending = false;
let wait = 1000;
let timer = 0;

async function flush() {
  if (sending) return;
  sending = true;
  clearTimeout(timer);
  while (state.outbox.length) {
    report();
    try {
      await request("api/answer", { rater: state.rater, ...state.outbox[0] });
    } catch (error) {
      const refused = error instanceof Refused && error.status < 500 && error.status !== 408 && error.status !== 429;
      if (!refused) {
        timer = setTimeout(flush, wait);
        wait = Math.min(30000, wait * 2);
        break;
      }
      console.error("an answer was refused: " + error.message);
    }
    state.outbox.shift();
    wait = 1000;
    remember();
  }
  sending = false;
  report();
}

function report() {
  const waiting = state.outbox.length;
  $("saved").classList.toggle("pending", waiting > 0 && !sending);
  $("saved").textContent = !waiting ? (Object.keys(state.answers).length ? "Saved" : "") : sending ? "Saving…" : "Not saved yet: no connection. Trying again";
  $("done-text").textContent = waiting
    ? "Your last answers are being saved. Please leave this page open."
    : "All your answers are saved. You can close this page.";
}

// ---- events -------------------------------------------------------------------------------------------------------

$("consent").onchange = () => { $("start").disabled = !$("consent").checked; };
$("start").onclick = async () => {
  $("start").disabled = true;
  $("intro-error").textContent = "";
  try {
    await start();
  } catch (error) {
    $("intro-error").textContent = error instanceof Refused ? "The study cannot begin: " + error.message : "The server cannot be reached. Please try again.";
    $("start").disabled = false;
  }
};
$("again").onclick = open;
$("more").onclick = () => { $("prompt").classList.remove("short"); $("more").hidden = true; };
$("replay").onclick = replay;
$("back").onclick = () => go(state.at - 1);
$("next").onclick = () => submit(false);
$("unplayable").onclick = () => submit(true);
$("review").onclick = () => go(state.questions.length - 1);
$("close-large").onclick = () => $("large").close();
$("large").onclick = (event) => { if (event.target === $("large")) $("large").close(); };
$("criteria").onchange = (event) => choose(event.target.name, event.target.value);
$("criteria").onsubmit = (event) => event.preventDefault();
for (const video of videos()) {
  video.onclick = toggle;
  video.oncanplay = () => ready();
  video.onplaying = () => video.parentElement.classList.remove("paused");
  video.onpause = () => { if (!video.error && video.readyState >= 3 && !video.seeking) video.parentElement.classList.add("paused"); };
  video.onerror = () => { video.parentElement.classList.add("broken"); $("unplayable").hidden = false; ready(); };
}
window.addEventListener("online", flush);
document.addEventListener("visibilitychange", () => {
  // Only time in which the page is looked at counts.
  if (document.hidden) state.watched += performance.now() - state.shownAt;
  else state.shownAt = performance.now();
});
document.addEventListener("keydown", (event) => {
  if ($("question").hidden || $("large").open || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const onButton = event.target instanceof HTMLButtonElement;
  const choice = ORDER[["1", "2", "3"].indexOf(event.key)];
  if (choice) {
    const focused = document.activeElement.closest("fieldset");
    const set = focused || $("criteria").querySelector(".current");
    if (!set) return;
    const input = set.querySelector(`input[value="${choice}"]`);
    input.checked = true;
    choose(set.dataset.key, choice);
    const following = $("criteria").querySelector(".current");
    if (following) following.querySelector("input").focus();
    else $("next").focus();
  } else if (event.key === "r" || event.key === "R") replay();
  else if (event.key === "Enter" && !onButton && !$("next").disabled) { event.preventDefault(); submit(false); }
  else if (event.key === "Backspace" && !$("back").disabled) { event.preventDefault(); go(state.at - 1); }
});

open();
