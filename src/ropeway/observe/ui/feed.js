// What the server tells of its batch: one stream for the whole page, begun again with patience when it ends.

import { ask, events, HttpError } from "./api.js";

export const SAMPLES = 360;
const FIRST = 500;
const LONGEST = 15000;
const SILENCE = 40000;
const NEWS = 40;
const SAMPLE_SECONDS = 0.25;

/** The last `SAMPLES` numbers of each series: memory that does not grow. */
export class History {
  constructor(...names) {
    this.size = 0;
    this.at = 0;
    this.series = Object.fromEntries(names.map((name) => [name, new Float64Array(SAMPLES)]));
  }

  push(values) {
    for (const [name, ring] of Object.entries(this.series)) ring[this.at] = Number.isFinite(values[name]) ? values[name] : NaN;
    this.at = (this.at + 1) % SAMPLES;
    this.size = Math.min(SAMPLES, this.size + 1);
  }

  /** The i-th oldest number of a series. */
  get(name, i) {
    return this.series[name][(this.at - this.size + i + SAMPLES) % SAMPLES];
  }
}

const SERIES = ["prompt_tps", "generation_tps", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "occupancy", "waiting", "kv"];

/** What is known of one model: its newest frame, and a bounded past. */
class Known {
  constructor() {
    this.frame = null;
    this.at = 0;
    this.interval = 250;
    this.history = new History(...SERIES);
    this.news = [];
  }

  /** `slots` are the seats of its engine. */
  take(frame, slots) {
    const now = performance.now();
    if (this.frame) this.interval = Math.max(50, Math.min(1500, now - this.at));
    this.at = now;
    const { used = 0, total = 0 } = frame.kv ?? {};
    const sample = { ...(frame.rates ?? {}), occupancy: frame.seats.length / slots, waiting: frame.waiting_total, kv: total ? used / total : 0 };
    const passed = this.frame ? (frame.t - this.frame.t) / SAMPLE_SECONDS : 1; // while nothing happens, frames are rare
    for (let i = Math.max(1, Math.min(SAMPLES, Math.round(passed))); i > 0; i--) this.history.push(sample);
    for (const one of frame.events ?? []) this.news.push(one);
    if (this.news.length > NEWS) this.news.splice(0, this.news.length - NEWS);
    this.frame = frame;
  }
}

/** Fires `hello`, `frame` and `state`. States: off, connecting, live, away (with `again`, a moment), denied, missing. */
export class Feed extends EventTarget {
  constructor() {
    super();
    this.state = "off";
    this.error = null;
    this.again = 0;
    this.hello = null;
    this.models = new Map();
    this.chosen = null;
    this.abort = null;
  }

  /** The models in memory, as the server has greeted with them. */
  get engines() {
    return this.hello?.engines ?? [];
  }

  /** What does not change of the model that the page shows: device, seats, size of blocks; null if none is in memory. */
  get engine() {
    return this.engines.find(({ model }) => model === this.chosen) ?? null;
  }

  /** What is known of the model that the page shows; null before its first frame. */
  get known() {
    return this.models.get(this.chosen) ?? null;
  }

  choose(model) {
    this.chosen = model;
    this.dispatchEvent(new Event("hello"));
  }

  start() {
    if (this.abort) return;
    this.abort = new AbortController();
    this.run(this.abort.signal);
  }

  stop() {
    this.abort?.abort();
    this.abort = null;
    this.set("off");
  }

  /** Try now instead of later. */
  restart() {
    if (!this.abort) return;
    this.stop();
    this.start();
  }

  async run(signal) {
    let pause = FIRST;
    while (!signal.aborted) {
      if (this.state !== "away") this.set("connecting");
      try {
        await this.read(signal, () => { pause = FIRST; });
        this.error = null;
      } catch (error) {
        if (signal.aborted) return;
        this.error = error;
        if (error instanceof HttpError && [401, 403].includes(error.status)) return this.set("denied");
        if (error instanceof HttpError && error.status === 404) return this.set("missing");
        pause = Math.max(pause, (error.retryAfter ?? 0) * 1000);
      }
      if (signal.aborted) return;
      const wait = Math.min(LONGEST, pause) * (0.8 + 0.4 * Math.random());
      pause = Math.min(LONGEST, pause * 1.7);
      this.again = performance.now() + wait;
      this.set("away");
      await sleep(wait, signal);
    }
  }

  /** Read one stream to its end. A silent one is given up: the network may have lost the other side. */
  async read(signal, alive) {
    const mine = new AbortController();
    const stop = () => mine.abort();
    signal.addEventListener("abort", stop);
    let timer = setTimeout(stop, SILENCE);
    try {
      for await (const { event, data } of events(await ask("ui/feed", { signal: mine.signal }))) {
        clearTimeout(timer);
        timer = setTimeout(stop, SILENCE);
        if (!data) continue;
        const told = JSON.parse(data);
        if (event === "hello") this.greet(told);
        else this.take(told);
        alive();
      }
    } finally {
      clearTimeout(timer);
      signal.removeEventListener("abort", stop);
      mine.abort();
    }
  }

  greet(hello) {
    this.hello = hello;
    for (const name of this.models.keys()) if (!this.engines.some(({ model }) => model === name)) this.models.delete(name);
    if (!this.engine) this.chosen = this.engines[0]?.model ?? null; // the one that was shown has left the memory
    this.dispatchEvent(new Event("hello"));
    this.set("live");
  }

  take(frame) {
    if (this.state !== "live") this.set("live");
    const { model } = frame;
    const slots = this.engines.find((one) => one.model === model)?.slots;
    if (!this.models.has(model)) this.models.set(model, new Known());
    this.models.get(model).take(frame, slots || frame.seats.length || 1);
    if (model === this.chosen) this.dispatchEvent(new Event("frame"));
  }

  set(state) {
    this.state = state;
    this.dispatchEvent(new Event("state"));
  }
}

function sleep(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); }, { once: true });
  });
}
