// The same requests through static and continuous batching: two ropeways side by side, as the server's simulator has
// them, replayed at a pace that one can follow.

import { send } from "./api.js";
import { choice, colours, field, h, note, percent, seconds, still, surface, whole } from "./dom.js";
import { reaching, Track } from "./track.js";

const FIELDS = [
  ["requests", "Requests", { min: 2, max: 256, value: 64 }], ["seats", "Seats", { min: 1, max: 64, value: 8 }],
  ["prompt_tokens", "Tokens of a prompt, on average", { min: 1, max: 512, value: 96 }],
  ["answer_tokens", "Tokens of an answer, on average", { min: 1, max: 512, value: 96 }],
  ["spread", "How much lengths differ", { min: 0, max: 1.5, step: 0.1, value: 0.8 }],
  ["rate", "Requests a second (empty: all at once)", { min: 0.01, max: 10000, step: "any" }],
  ["seed", "Seed", { min: 0, max: 2147483647, value: 1 }],
];
const ROWS = [
  ["All requests served after", (side) => side.seconds, seconds, -1], ["Answer tokens a second", (side) => side.output_rate, whole, 1],
  ["Seats computing while there was work", (side) => side.occupancy, percent, 1], ["Steps", (side) => side.steps, whole, -1],
  ["First token, p50", (side) => side.ttft_p50, seconds, -1], ["First token, p99", (side) => side.ttft_p99, seconds, -1],
  ["Whole answer, mean", (side) => side.e2e_mean, seconds, -1], ["Whole answer, p99", (side) => side.e2e_p99, seconds, -1],
];
const REPLAY_SECONDS = 24;
const POINTS = 300;

export class Compare {
  constructor() {
    this.found = null;
    this.time = 0;
    this.element = this.build();
    new ResizeObserver(() => this.resize()).observe(this.element);
  }

  build() {
    this.inputs = Object.fromEntries(FIELDS.map(([name, , props]) => [name, h("input", { type: "number", required: name !== "rate", ...props })]));
    this.profile = choice([["laptop-cpu", "2 CPU cores, a model of 4.7M (measured)"], ["h200-8b-estimate", "one H200, a model of 8B (an estimate)"]], "laptop-cpu");
    this.runButton = h("button", { type: "submit", class: "main", id: "run-compare" }, "Compare");
    const form = h("form", { class: "card mix", on: { submit: (event) => { event.preventDefault(); this.run(); } } },
      FIELDS.map(([name, text]) => field(text, this.inputs[name])), field("What a step costs", this.profile), this.runButton);
    this.sides = { static: new SideView("Static batching", "Everybody waits until the whole batch has arrived."), continuous: new SideView("Continuous batching", "A free seat is taken in the next step.") };
    this.playButton = h("button", { type: "button", on: { click: () => this.play(!this.playing) } }, "Play");
    this.slider = h("input", {
      type: "range", min: 0, max: 1000, value: 0, "aria-label": "Time", class: "grow",
      on: { input: () => { this.play(false); this.seek((this.slider.value / 1000) * this.length); } },
    });
    this.clock = h("span", { class: "clock" });
    this.speed = choice([["0.25", "¼ speed"], ["1", "normal speed"], ["4", "4 times"]], "1");
    this.speed.setAttribute("aria-label", "Speed");
    this.controls = h("div", { class: "row card", hidden: true }, this.playButton, this.slider, this.clock, this.speed);
    this.totals = h("section", { class: "card", hidden: true, id: "totals" });
    this.pair = h("div", { class: "pair", hidden: true }, Object.values(this.sides).map((side) => side.element));
    return h("div", { class: "compare" },
      h("div", { class: "row head" }, h("h1", {}, "Static against continuous batching")),
      h("p", { class: "dim" },
        "Both sides serve the same requests with this server's own scheduler and memory, in a simulation: time is virtual, and a step costs what the chosen machine was measured, or estimated, to take. ",
        "No model runs, and nobody's request is disturbed."),
      form, this.controls, this.pair, this.totals);
  }

  open() {
    if (!this.found) this.run();
    else this.play(!still());
  }

  close() {
    this.play(false);
  }

  restyle() {
    for (const side of Object.values(this.sides)) side.track.restyle();
    this.seek(this.time);
  }

  resize() {
    if (!this.element.isConnected || !this.found) return;
    for (const side of Object.values(this.sides)) side.track.fit();
    this.seek(this.time);
  }

  async run() {
    for (const input of Object.values(this.inputs)) if (!input.reportValidity()) return;
    const mix = { profile: this.profile.value };
    for (const [name, input] of Object.entries(this.inputs)) if (input.value !== "") mix[name] = Number(input.value);
    this.runButton.disabled = true;
    this.runButton.textContent = "Simulating…";
    try {
      this.take(await send("POST", "ui/compare", mix));
    } catch (error) {
      note(error.message, "bad");
    } finally {
      this.runButton.disabled = false;
      this.runButton.textContent = "Compare";
    }
  }

  take(found) {
    this.found = found;
    this.length = Math.max(found.static.seconds, found.continuous.seconds) * 1.02;
    for (const part of [this.controls, this.pair, this.totals]) part.hidden = false;
    for (const name of ["static", "continuous"]) this.sides[name].load(found[name], found.seats, this.length);
    this.totals.replaceChildren(...totals(found));
    this.seek(0);
    if (still()) this.seek(this.length / 3);
    else this.play(true);
  }

  play(on) {
    this.playing = on && Boolean(this.found);
    this.playButton.textContent = this.playing ? "Pause" : "Play";
    if (!this.playing) return;
    if (this.time >= this.length) this.time = 0;
    let last = performance.now();
    const turn = (this.turn = {}); // an older loop sees that it is not the one any more
    const step = (now) => {
      if (!this.playing || this.turn !== turn || !this.element.isConnected) return;
      this.seek(this.time + ((now - last) / 1000 / REPLAY_SECONDS) * this.length * Number(this.speed.value));
      last = now;
      if (this.time >= this.length) this.play(false);
      else requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  seek(time) {
    if (!this.found) return;
    this.time = Math.max(0, Math.min(this.length, time));
    this.slider.value = (1000 * this.time) / this.length;
    this.clock.textContent = `${seconds(this.time)} of ${seconds(this.length)}`;
    for (const side of Object.values(this.sides)) side.show(this.time);
  }
}

function totals(found) {
  const rows = ROWS.map(([name, value, format, better]) => {
    const [was, is] = [value(found.static), value(found.continuous)];
    const ratio = better > 0 ? is / was : was / is;
    return h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "number" }, format(was)), h("td", { class: "number" }, format(is)),
      h("td", { class: "number" }, Number.isFinite(ratio) ? h("b", { class: ratio >= 1.005 ? "good" : ratio <= 0.995 ? "bad" : "" }, `${ratio.toFixed(2)} ×`) : "–"));
  });
  const basis = found.basis === "measured" ? "Costs of a step were measured on" : "Costs of a step are an estimate from data sheets, not measured, for";
  return [h("h2", {}, "In all"), h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, h("th", { scope: "col" }, ""), ["static", "continuous", "better by"].map((one) => h("th", { scope: "col", class: "number" }, one)))),
    h("tbody", {}, rows))), h("p", { class: "dim small" }, `${basis} ${found.machine}, with ${found.model}.`)];
}

/** One of the two ropeways. */
class SideView {
  constructor(name, about) {
    this.canvas = h("canvas", { role: "img", "aria-label": name });
    this.strip = h("canvas", { class: "strip", role: "img", "aria-label": `${name}: seats taken over time` });
    this.facts = Object.fromEntries(["aboard", "idle", "waiting", "done", "tokens"].map((id) => [id, h("b", {}, "0")]));
    this.element = h("section", { class: "card", "aria-label": name }, h("h2", {}, name), h("p", { class: "dim small" }, about),
      h("dl", { class: "tiles small" }, Object.entries(this.facts).map(([id, value]) => h("div", {}, h("dt", {}, id), h("dd", {}, value)))),
      h("div", { class: "track" }, this.canvas), this.strip);
    this.track = new Track(this.canvas);
    this.track.empty = "empty";
  }

  load(side, seats, length) {
    this.rides = side.rides;
    this.seats = seats;
    this.length = length;
    this.track.clear();
    this.track.configure(seats);
    this.track.fit();
    this.track.least = reaching(Math.max(...side.rides.map((ride) => ride.answer)));
    this.track.scale = { from: this.track.least, to: this.track.least, at: 0 };
    this.taken = Array.from({ length: POINTS }, (_, i) => this.rides.filter((ride) => aboard(ride, ((i + 0.5) / POINTS) * length)).length / seats);
  }

  show(time) {
    const now = performance.now();
    const seats = [];
    let [waiting, done, tokens] = [0, 0, 0];
    this.rides.forEach((ride, id) => {
      if (ride.arrived > time) return;
      if (time >= ride.last) { done += 1; tokens += ride.answer; return; }
      if (time < ride.boarded) { waiting += 1; return; }
      const seat = at(ride, time, String(id));
      tokens += Math.floor(seat.known - seat.prompt);
      seats.push(seat);
    });
    const says = { aboard: seats.length, idle: this.seats - seats.length, waiting, done, tokens };
    for (const [id, value] of Object.entries(says)) this.facts[id].textContent = whole(value);
    this.track.lanes.forEach((lane, slot) => { if (lane && !seats.some((seat) => seat.slot === slot && seat.id === lane.seat.id)) this.track.lanes[slot] = null; });
    this.track.update(seats, { interval: 0, now });
    this.track.draw(now);
    this.drawStrip(time / this.length);
  }

  drawStrip(share) {
    const { clientWidth: width, clientHeight: height } = this.strip;
    if (!width) return;
    const ctx = surface(this.strip, width, height);
    const ink = colours("decode", "line", "ink");
    ctx.fillStyle = ink.line;
    ctx.fillRect(0, 0, width, height);
    ctx.fillStyle = ink.decode;
    this.taken.forEach((part, i) => {
      ctx.globalAlpha = i / POINTS <= share ? 1 : 0.3;
      ctx.fillRect((i / POINTS) * width, height * (1 - part), width / POINTS + 0.5, height * part);
    });
    ctx.globalAlpha = 1;
    ctx.fillStyle = ink.ink;
    ctx.fillRect(share * width - 1, 0, 2, height);
  }
}

const aboard = (ride, time) => ride.boarded <= time && time < ride.last;

/** A ride at a moment of it, as the live view would have it. */
export function at(ride, time, id) {
  const reads = time < ride.first;
  const read = reads ? (time - ride.boarded) / Math.max(1e-9, ride.first - ride.boarded) : 1;
  const wrote = reads ? 0 : 1 + ((ride.answer - 1) * (time - ride.first)) / Math.max(1e-9, ride.last - ride.first);
  return {
    slot: ride.seat, id, urgency: "high", phase: reads ? "prefill" : "decode", prompt: ride.prompt, computed: Math.round(ride.prompt * read),
    known: ride.prompt + Math.floor(wrote), cached: 0, count: 1, blocks: 0, fine: Math.max(0, wrote - 1),
  };
}
