
"use strict";
const at = (id) => document.getElementById(id);
const test = JSON.parse(at("data").textContent);
const PAIR = test.method === "ab";
const STORE = `diffgap-listening/${test.digest}`;
const TIE = "tie";
const GRADES = ["Bad", "Poor", "Fair", "Good", "Excellent"];
let state = null; // what is kept: participant, started, finished, records, current
let schedule = []; // this participant's trials, in their order

function make(kind, attributes, ...children) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// FNV-1a of the text seeds mulberry32: numbers in 0..1 that a participant gets again whenever the page opens.
function randomOf(text) {
  let seed = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) seed = Math.imul(seed ^ byte, 0x01000193);
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

function shuffled(list, random) {
  const result = [...list];
  for (let i = result.length - 1; i > 0; i -= 1) {
    const j = Math.floor(random() * (i + 1));
    [result[i], result[j]] = [result[j], result[i]];
  }
  return result;
}

// Shortest way between two presentations of the same sounds.
function nearest(trials) {
  const last = new Map();
  let found = Infinity;
  trials.forEach((trial, place) => {
    const sounds = [...trial.order].sort().join();
    if (last.has(sounds)) found = Math.min(found, place - last.get(sounds));
    last.set(sounds, place);
  });
  return found;
}

function ordered(participant) {
  const random = randomOf(`${test.digest}/${participant}`);
  const trials = test.blocks.flatMap((block) => {
    const turn = random() < 0.5; // the sides of a block turn together, which keeps them balanced
    return block.map((trial) => {
      const order = PAIR ? (turn ? [...trial.stimuli].reverse() : trial.stimuli) : shuffled(trial.stimuli, random);
      return { id: trial.id, caption: trial.caption, reference: trial.reference, order };
    });
  });
  let best = shuffled(trials, random);
  for (let tries = 0; tries < 100 && nearest(best) < 4; tries += 1) {
    const other = shuffled(trials, random);
    if (nearest(other) > nearest(best)) best = other;
  }
  return best;
}

// All sounds of a trial run in step and loop; one of them is audible.
const player = {
  context: null, voices: new Map(), audible: null, running: false, begun: 0, position: 0, last: 0,

  buffer(id) {
    const bytes = Uint8Array.from(atob(test.sounds[id]), (letter) => letter.charCodeAt(0));
    const samples = Float32Array.from(new Int16Array(bytes.buffer), (value) => value / 32768);
    const buffer = this.context.createBuffer(1, samples.length, test.sample_rate);
    buffer.copyToChannel(samples, 0);
    return buffer;
  },

  load(ids) {
    this.pause();
    Object.assign(this, { ids, voices: new Map(), audible: null, position: 0 });
    this.length = atob(test.sounds[ids[0]]).length / 2 / test.sample_rate;
  },

  play(id) {
    this.context ??= new AudioContext({ sampleRate: test.sample_rate });
    this.context.resume();
    if (!this.voices.size) for (const each of this.ids) this.voices.set(each, { buffer: this.buffer(each) });
    const now = this.context.currentTime;
    if (this.running) this.count();
    else {
      this.begun = now + 0.02 - this.position;
      this.last = now + 0.02;
      for (const [each, voice] of this.voices) {
        voice.source = new AudioBufferSourceNode(this.context, { buffer: voice.buffer, loop: true });
        voice.gain = new GainNode(this.context, { gain: each === id ? 1 : 0 });
        voice.source.connect(voice.gain).connect(this.context.destination);
        voice.source.start(this.begun + this.position, this.position % this.length);
      }
    }
    // 5 ms of fading: no click, and no gap that could be heard.
    for (const [each, voice] of this.voices) voice.gain.gain.setTargetAtTime(each === id ? 1 : 0, now, 0.005);
    this.audible = id;
    this.running = true;
    state.current.plays[id] = (state.current.plays[id] || 0) + 1;
  },

  pause() {
    if (!this.running) return;
    this.count();
    this.position = Math.max(0, this.context.currentTime - this.begun) % this.length;
    for (const voice of this.voices.values()) voice.source.stop();
    this.running = false;
  },

  // Adds what was heard since the last count.
  count() {
    const now = Math.max(this.last, this.context.currentTime);
    state.current.heard[this.audible] = (state.current.heard[this.audible] || 0) + now - this.last;
    this.last = now;
  },

  // A listener who changes just before the end has heard it.
  whole(id) {
    return (state.current.heard[id] || 0) >= Math.max(this.length - 0.05, this.length / 2);
  },
};

function keep() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    at("notice").textContent = "This browser keeps nothing: leave the page open until your answers are saved.";
    at("notice").hidden = false;
  }
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(STORE));
  } catch {
    return null;
  }
}

const trial = () => schedule[state.records.length];
const stimuli = () => (trial().reference ? [trial().reference, ...trial().order] : trial().order);
const letter = (id) => (id === trial().reference ? "R" : PAIR ? "AB"[trial().order.indexOf(id)] : String(trial().order.indexOf(id) + 1));
const named = (id) => (id === trial().reference ? "Reference" : PAIR ? letter(id) : `Sound ${letter(id)}`);

function soundButton(id) {
  const button = make("button", { type: "button", "data-sound": id, "aria-pressed": "false" });
  button.append(`${named(id)} `, make("kbd", { "aria-hidden": "true" }, letter(id)), " ", make("span", { class: "heard" }));
  button.addEventListener("click", () => listen(id));
  return button;
}

function sliderRow(id) {
  const slider = make("input", { type: "range", min: 0, max: 100, value: 50, "data-score": id, "aria-label": `Score of ${named(id)}` });
  const row = make("div", { class: "row" }, soundButton(id), slider, make("output", {}), scale());
  slider.addEventListener("input", () => {
    state.current.answers[id] = Number(slider.value);
    refresh();
  });
  slider.addEventListener("focus", () => { if (player.running && player.audible !== id) listen(id); });
  return row;
}

function scale() {
  return make("div", { class: "scale", "aria-hidden": "true" }, ...GRADES.map((grade) => make("span", {}, grade)));
}

function choices(question, place) {
  const options = [...trial().order, ...(test.ties ? [TIE] : [])];
  const set = make("fieldset", { "data-question": question.id }, make("legend", {}, question.text));
  options.forEach((option, number) => {
    const radio = make("input", { type: "radio", name: question.id, value: option });
    const key = make("kbd", { "aria-hidden": "true" }, String(place * options.length + number + 1));
    radio.addEventListener("change", () => {
      state.current.answers[question.id] = option;
      refresh();
    });
    set.append(make("label", { class: "choice" }, radio, option === TIE ? "No difference" : named(option), key));
  });
  return set;
}

function show() {
  const ended = Boolean(state) && state.records.length === schedule.length;
  at("start").hidden = Boolean(state);
  at("trial").hidden = !state || ended;
  at("end").hidden = !ended;
  at("progress").hidden = !state;
  if (!state) {
    at("place").textContent = "";
    at("saved").textContent = "";
    return at("participant").focus();
  }
  Object.assign(at("progress"), { max: schedule.length, value: state.records.length });
  at("place").textContent = `Listener ${state.participant}`;
  if (ended) return at("thanks").focus();
  player.load(stimuli());
  at("task").textContent = `Trial ${state.records.length + 1} of ${schedule.length}`;
  at("caption").textContent = trial().caption || "(none)";
  at("sounds").className = test.method;
  at("sounds").replaceChildren(...stimuli().map((id) => (PAIR || id === trial().reference ? soundButton(id) : sliderRow(id))));
  at("questions").replaceChildren(...test.questions.map(choices));
  at("lacking").textContent = "";
  refresh();
  at("task").focus();
  scrollTo(0, 0);
}

function listen(id) {
  if (player.running && player.audible === id) player.pause();
  else player.play(id);
  refresh();
}

function refresh() {
  const { answers } = state.current;
  for (const button of at("sounds").querySelectorAll("button")) {
    const id = button.dataset.sound;
    button.setAttribute("aria-pressed", String(player.running && player.audible === id));
    const mark = button.querySelector(".heard");
    const said = player.whole(id) ? "✓ heard" : "";
    if (mark.textContent !== said) mark.textContent = said;
  }
  for (const slider of at("sounds").querySelectorAll("input")) {
    const score = answers[slider.dataset.score];
    if (score !== undefined) slider.value = score;
    slider.setAttribute("aria-valuetext", score === undefined ? "not rated yet" : `${score}, ${GRADES[Math.min(4, Math.floor(score / 20))]}`);
    slider.closest(".row").querySelector("output").textContent = score ?? "–";
  }
  for (const radio of at("questions").querySelectorAll("input")) radio.checked = answers[radio.name] === radio.value;
  at("pause").disabled = !player.audible;
  at("pause").firstChild.data = player.running || !player.audible ? "Pause " : "Play ";
  if (!lacking()) at("lacking").textContent = "";
  keep();
}

// What is still to do, and where: nothing if the next trial may come.
function lacking() {
  const unheard = stimuli().filter((id) => !player.whole(id));
  if (unheard.length) {
    const names = unheard.map(named).join(", ");
    return { text: `Listen to the whole of: ${names}.`, where: at("sounds").querySelector(`[data-sound="${unheard[0]}"]`) };
  }
  if (PAIR) {
    const open = test.questions.find((question) => !(question.id in state.current.answers));
    return open && { text: `Not answered yet: ${open.text}`, where: at("questions").querySelector(`[data-question="${open.id}"] input`) };
  }
  const unrated = trial().order.filter((id) => !(id in state.current.answers));
  return unrated.length && { text: `Move the sliders of: ${unrated.map(named).join(", ")}.`, where: at("sounds").querySelector(`[data-score="${unrated[0]}"]`) };
}

function begin() {
  state.current = { answers: {}, plays: {}, heard: {}, seconds: 0 };
}

const rounded = (times) => Object.fromEntries(Object.entries(times).map(([id, value]) => [id, Number(value.toFixed(3))]));

function next() {
  if (player.running) player.count();
  const missing = lacking();
  if (missing) {
    at("lacking").textContent = missing.text;
    return missing.where.focus();
  }
  player.pause();
  const { answers, plays, heard, seconds } = state.current;
  state.records.push({ trial: trial().id, order: trial().order, answers, plays, heard: rounded(heard), seconds: Number(seconds.toFixed(1)) });
  begin();
  if (state.records.length === schedule.length) state.finished = new Date().toISOString();
  keep();
  show();
}

function save() {
  const { participant, started, finished, records } = state;
  const answers = { format: test.format, digest: test.digest, method: test.method, participant, started, finished, trials: records };
  const link = make("a", {
    href: URL.createObjectURL(new Blob([JSON.stringify(answers, null, 1)], { type: "application/json" })),
    download: `answers-${participant}-${test.digest.slice(0, 8)}.json`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  at("saved").textContent = `Saved as ${link.download}.`;
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !at("shortcuts").checked || event.target.type === "text") return;
  const key = event.key.toUpperCase();
  if (!at("end").hidden && key === "S") save();
  else if (at("trial").hidden) return;
  else if (key === "P" && player.audible) listen(player.audible);
  else if (key === "N") next();
  else {
    const id = stimuli().find((one) => letter(one) === key);
    const radio = PAIR && /^[1-9]$/.test(key) && at("questions").querySelectorAll("input")[Number(key) - 1];
    if (id) {
      if (!player.running || player.audible !== id) listen(id);
      (at("sounds").querySelector(`[data-score="${id}"]`) ?? at("sounds").querySelector(`[data-sound="${id}"]`)).focus();
    } else if (radio) radio.click();
    else return;
  }
  event.preventDefault();
}

function describe() {
  const trials = test.blocks.flat();
  const seconds = trials.reduce((sum, one) => {
    const ids = [...one.stimuli, ...(one.reference ? [one.reference] : [])];
    return sum + (ids.length * atob(test.sounds[ids[0]]).length) / 2 / test.sample_rate;
  }, 0);
  const minutes = Math.max(1, Math.round((2 * seconds) / 60));
  at("purpose").textContent = `${trials.length} trials, about ${minutes} minute${minutes > 1 ? "s" : ""}. ` + (PAIR
    ? "In each you hear two sounds, A and B, that were made for one caption, and say which is better."
    : "In each you hear a reference and several sounds that were made for one caption, and rate each from 0 to 100.");
  at("hint").textContent = PAIR
    ? "Listen to the whole of both sounds, then answer. Answer by what you hear, even if the difference is small."
    : "How good is each sound, as a rendering of the caption, beside the reference? One of them is the reference itself, and should get 100.";
  const most = Math.max(...trials.map((one) => one.stimuli.length));
  const answers = test.questions.length * (test.ties ? 3 : 2);
  const keys = PAIR
    ? [["A B", "play that sound, or change to it"], [`1 – ${answers}`, "answer, as written beside each answer"]]
    : [["R", "play the reference, or change to it"], [`1 – ${most}`, "play that sound, or change to it; then arrow keys, Page Up and Page Down set its score"]];
  keys.push(["P", "pause and go on"], ["N", "next trial"], ["S", "save the answers, at the end"]);
  for (const [key, meaning] of keys) {
    at("keys").append(make("dt", {}, ...key.split(" ").map((one) => (one === "–" ? " – " : make("kbd", {}, one)))), make("dd", {}, meaning));
  }
}

at("start").addEventListener("submit", (event) => {
  event.preventDefault();
  const participant = at("participant").value;
  state = { participant, started: new Date().toISOString(), finished: null, records: [] };
  schedule = ordered(participant);
  begin();
  keep();
  show();
});
at("trial").addEventListener("submit", (event) => {
  event.preventDefault();
  next();
});
at("pause").addEventListener("click", () => listen(player.audible));
at("save").addEventListener("click", save);
at("again").addEventListener("click", () => {
  if (!at("saved").textContent && !confirm("The answers are not saved. Forget them?")) return;
  state = null;
  try { localStorage.removeItem(STORE); } catch { /* nothing was kept */ }
  at("participant").value = "";
  show();
});
at("shortcuts").addEventListener("change", () => document.body.classList.toggle("plain-keys", !at("shortcuts").checked));
addEventListener("keydown", press);
addEventListener("visibilitychange", () => {
  if (document.hidden && state && !at("trial").hidden) {
    player.pause();
    refresh();
  }
});
setInterval(() => {
  if (!state || at("trial").hidden || document.hidden) return;
  state.current.seconds += 0.1;
  if (!player.running) return;
  player.count();
  at("time").style.setProperty("--part", `${((Math.max(0, player.last - player.begun) % player.length) / player.length) * 100}%`);
  refresh();
}, 100);

describe();
state = kept();
if (state) schedule = ordered(state.participant);
show();
