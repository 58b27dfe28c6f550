// The first page: the batch as it moves, who waits and why, what the memory holds, and how fast all of it is.

import { ask, get } from "./api.js";
import { CELLS, cellsOf, Chart, drawMap } from "./charts.js";
import { button, h, note, percent, seconds, short, show, sure, whole } from "./dom.js";
import { mark } from "./shapes.js";
import { life } from "./timeline.js";
import { MOST_LANES, Track } from "./track.js";

const TILES = [
  ["generation_tps", "tokens/s"], ["prompt_tps", "prompt tokens/s"], ["ttft", "first token, p50"],
  ["itl", "between tokens, p50"], ["seats", "seats taken"], ["waiting", "waiting"],
];
const ENDS = { finished: "finished", preempted: "preempted", cancelled: "cancelled", failed: "failed" };

export class Ropeway {
  constructor(feed) {
    this.feed = feed;
    this.element = this.build();
    this.track = new Track(this.canvas);
    const on = (event, act) => feed.addEventListener(event, () => this.element.isConnected && act());
    on("hello", () => this.greet());
    on("frame", () => this.take());
    on("state", () => this.state());
    new ResizeObserver(() => this.resize()).observe(this.element);
  }

  build() {
    this.tiles = Object.fromEntries(TILES.map(([id]) => [id, h("b", {}, "–")]));
    this.canvas = h("canvas", {
      id: "track", tabIndex: 0, role: "img", "aria-label": "Seats",
      "aria-describedby": "track-help",
      on: { click: (event) => this.pick(event), keydown: (event) => this.key(event), blur: () => this.select(null) },
    });
    this.model = h("select", { "aria-label": "Model", on: { change: () => this.choose() } });
    this.about = h("span", { class: "dim" });
    this.phase = h("span", { class: "state starting", hidden: true });
    this.pause = h("button", { type: "button", class: "plain", title: "Hold the picture (p)", on: { click: () => this.hold() } }, "Hold");
    this.away = h("p", { class: "away", role: "status", hidden: true });
    this.spoken = h("p", { class: "unseen", role: "status" });
    this.map = h("canvas", { role: "img", "aria-label": "KV blocks" });
    this.counts = h("p", { class: "legend" });
    this.tiers = h("div", { class: "tiers" });
    this.line = h("ol", { class: "line" });
    this.lineHead = h("span", { class: "dim" });
    this.news = h("ul", { class: "news" });
    const perSecond = (n) => `${whole(n)}/s`;
    const charts = [
      ["Tokens", [["generation_tps", "decode"], ["prompt_tps", "prefill"]], { format: perSecond }, "written, – – read"],
      ["First token", [["ttft_p50", "high"], ["ttft_p99", "high"]], { format: seconds }, "p50, – – p99"],
      ["Between tokens", [["itl_p50", "medium"], ["itl_p99", "medium"]], { format: seconds }, "p50, – – p99"],
      ["In use", [["occupancy", "decode"], ["kv", "kv-shared"]], { most: 1, format: percent }, "seats, – – KV"],
      ["Waiting", [["waiting", "low"]], { format: whole }],
    ];
    this.charts = charts.map(([name, lines, rest, about = ""]) => {
      const canvas = h("canvas", { class: "chart", role: "img", "aria-label": `${name}: ${about}` });
      return { name, about, canvas, chart: new Chart(canvas, lines, rest) };
    });
    return h("div", { class: "ropeway" },
      h("div", { class: "row head" }, h("h1", {}, "The batch, live"), this.model, this.about, this.phase,
        h("span", { class: "right legend" }, swatch("prefill", "reads its prompt"), swatch("cached", "cached"), swatch("decode", "writes"),
          ["high", "medium", "low"].map((one) => h("span", {}, mark(one), one)), this.pause)),
      h("dl", { class: "tiles" }, TILES.map(([id, name]) => h("div", {}, h("dt", {}, name), h("dd", {}, this.tiles[id])))),
      this.away,
      h("div", { class: "halves" },
        h("div", { class: "side" },
          h("section", { class: "card", "aria-label": "Seats" }, h("div", { class: "track" }, this.canvas), this.spoken,
            h("p", { id: "track-help", class: "dim small" },
              "Each lane is a seat. Right of the line: tokens written so far, on a logarithmic scale, for nobody knows where a request gets off. ",
              "Click a lane, or choose one by arrow keys and Enter.")),
          h("div", { class: "charts" }, this.charts.map(({ name, about, canvas }) => h("section", { class: "card" }, h("h2", {}, name, " ", h("small", {}, about)), canvas)))),
        h("div", { class: "side" },
          h("section", { class: "card" }, h("h2", {}, "Waiting ", this.lineHead), this.line),
          h("section", { class: "card" }, h("h2", {}, "KV blocks"), h("div", { class: "map" }, this.map), this.counts, this.tiers),
          h("section", { class: "card" }, h("h2", {}, "Lately"), this.news))));
  }

  /** The page is looked at from now on. */
  open() {
    this.feed.start();
    this.greet();
    this.state();
    this.moving = true;
    const step = (now) => {
      if (!this.moving) return;
      if (this.changed) {
        this.changed = false;
        this.paint();
      }
      if (!this.held && (this.track.busy || this.fresh)) {
        this.fresh = this.track.busy;
        this.track.draw(now);
      }
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  close() {
    this.moving = false;
    this.feed.stop();
  }

  restyle() {
    this.track.restyle();
    this.redraw();
  }

  resize() {
    if (!this.element.isConnected) return;
    this.track.fit();
    this.redraw();
  }

  redraw() {
    this.track.draw();
    this.paint();
  }

  choose() {
    if (this.held) this.hold();
    this.feed.choose(this.model.value);
  }

  hold() {
    this.held = !this.held;
    this.pause.textContent = this.held ? "Go on" : "Hold";
    this.pause.setAttribute("aria-pressed", String(this.held));
    if (!this.held) this.take();
  }

  /** Which models there are, and which of them is shown. */
  greet() {
    const { hello, engines, engine, chosen } = this.feed;
    if (!hello) return;
    this.model.replaceChildren(...engines.map(({ model }) => h("option", { value: model, selected: model === chosen }, model)));
    this.model.hidden = engines.length < 2;
    this.about.textContent = !engine ? "No model is in memory."
      : [engines.length < 2 && engine.model, engine.device, `${engine.slots} seats`, `blocks of ${engine.block_size} tokens`].filter(Boolean).join(" · ");
    if (this.shown !== chosen) { // another batch: nobody of this one is seen to leave
      this.shown = chosen;
      this.track.clear();
    }
    const slots = engine?.slots ?? 0;
    if (this.track.lanes.length !== Math.min(MOST_LANES, slots)) {
      this.track.clear();
      this.track.configure(slots);
    }
    this.fresh = true;
    this.take();
  }

  state() {
    const { state, error, again, hello, engine } = this.feed;
    clearInterval(this.clock);
    this.away.hidden = ["live", "off"].includes(state);
    if (state === "connecting") this.away.textContent = "Connecting…";
    if (state === "denied") this.away.replaceChildren("This server wants a key. ", button("Enter keys", () => dispatchEvent(new Event("enter-keys"))));
    if (state === "missing") this.away.textContent = "This server has no live view.";
    if (state === "away") {
      const tell = () => {
        const left = Math.max(0, Math.ceil((again - performance.now()) / 1000));
        this.away.replaceChildren(`The server is away${error instanceof TypeError || !error ? "" : `: ${error.message}`} Trying again in ${left} s. `,
          button("Now", () => this.feed.restart()));
      };
      tell();
      this.clock = setInterval(() => (this.element.isConnected ? tell() : clearInterval(this.clock)), 1000);
    }
    this.element.classList.toggle("stale", ["away", "denied"].includes(state) || Boolean(hello && !engine));
  }

  take() {
    const { known, engine } = this.feed;
    if (this.held || !known?.frame) return;
    const { frame, interval } = known;
    const lanes = Math.min(MOST_LANES, frame.seats.reduce((most, seat) => Math.max(most, seat.slot + 1), engine?.slots || 1));
    if (this.track.lanes.length < lanes) this.track.configure(lanes);
    const endings = Object.fromEntries((frame.events ?? []).filter((one) => ENDS[one.event]).map((one) => [one.id, one.event]));
    this.track.update(frame.seats, { interval: interval * 1.1, endings });
    this.fresh = this.changed = true;
  }

  /** Everything but the lanes; once for each picture, however many frames have come since the last one. */
  paint() {
    const { known, engine } = this.feed;
    if (!known?.frame) return;
    const { frame, history } = known;
    const { rates = {}, seats } = frame;
    const slots = engine?.slots || "–";
    this.phase.hidden = !frame.state || frame.state === "ready";
    this.phase.textContent = `the engine is ${frame.state}`;
    const says = {
      generation_tps: whole(rates.generation_tps), prompt_tps: whole(rates.prompt_tps), ttft: seconds(rates.ttft_p50), itl: seconds(rates.itl_p50),
      seats: `${seats.length} / ${slots}`, waiting: whole(frame.waiting_total),
    };
    for (const [id, text] of Object.entries(says)) if (this.tiles[id].textContent !== text) this.tiles[id].textContent = text;
    for (const { chart } of this.charts) chart.draw(history);
    this.paintLine(frame);
    this.paintMemory(frame.kv);
    this.paintNews(known.news);
    const reading = seats.filter((one) => one.phase === "prefill").length;
    const now = performance.now();
    if (!this.told || now - this.told > 3000) {
      this.told = now;
      this.canvas.setAttribute("aria-label",
        `${seats.length} of ${slots} seats are taken: ${reading} read their prompts, ${seats.length - reading} write. ${frame.waiting_total} wait.`);
    }
  }

  paintLine(frame) {
    if (this.line.querySelector(":active, :focus")) return; // a button under a finger stays where it is
    this.lineHead.textContent = frame.waiting_total ? whole(frame.waiting_total) : "";
    const shown = frame.waiting.slice(0, 50).map((one) => h("li", {},
      h("span", { class: "place" }, one.position), mark(one.urgency),
      h("span", { class: "who" }, name(one.id) || "somebody"),
      h("span", { class: "right" }, one.eta_s === null || one.eta_s === undefined ? "" : `≈ ${seconds(one.eta_s)}`),
      mine(one.id) && h("button", { type: "button", class: "plain", title: "Cancel", "aria-label": `Cancel ${one.id}`, on: { click: () => cancel(one.id) } }, "✕"),
      h("span", { class: "why dim", title: one.reason ?? "" }, one.reason || (one.holder ? `held by ${one.holder}` : "boards with the next step"))));
    if (!shown.length) shown.push(h("li", { class: "empty" }, "Nobody waits."));
    if (frame.waiting_total > frame.waiting.length) shown.push(h("li", { class: "empty" }, `and ${whole(frame.waiting_total - frame.waiting.length)} more`));
    this.line.replaceChildren(...shown);
  }

  paintMemory(kv) {
    if (!kv?.total) return;
    const cells = cellsOf(kv.cells);
    drawMap(this.map, cells);
    const found = CELLS.map((_, kind) => cells.reduce((sum, one) => sum + (one === kind), 0));
    const each = cells.length ? kv.total / cells.length : 0;
    this.map.setAttribute("aria-label", `${whole(kv.used)} of ${whole(kv.total)} KV blocks are in use, ${whole(kv.cached)} cached`);
    this.counts.replaceChildren(...CELLS.map((kind, i) => swatch(`kv-${kind}`, kind, `about ${whole(found[i] * each)} blocks`)),
      h("span", { class: "dim" }, `${whole(kv.used)} of ${whole(kv.total)} in use (${percent(kv.used / kv.total)}), ${whole(kv.cached)} cached`));
    this.tiers.replaceChildren(...(kv.tiers ?? []).map((tier) => h("div", {},
      h("span", {}, `${tier.name}: ${whole(tier.used)} of ${whole(tier.blocks)}`),
      h("progress", { max: tier.blocks || 1, value: tier.used, "aria-label": `Tier ${tier.name}` }))));
  }

  paintNews(news) {
    const last = news.at(-1);
    if (last === this.last && this.news.children.length) return;
    this.last = last;
    const shown = news.slice(-12).reverse().map((one) => h("li", { class: one.event },
      h("time", { class: "dim" }, new Date(one.t * 1000).toLocaleTimeString("en-GB")), h("b", {}, one.event), h("span", {}, name(one.id)),
      one.reason && h("span", { class: "dim" }, one.reason)));
    this.news.replaceChildren(...(shown.length ? shown : [h("li", { class: "empty" }, "Nothing has happened yet. Send a request from the playground.")]));
  }

  pick(event) {
    const box = this.canvas.getBoundingClientRect();
    const slot = this.track.at(event.clientX - box.left, event.clientY - box.top);
    this.select(slot);
    if (slot !== null) this.details(slot);
  }

  select(slot) {
    this.track.selected = slot;
    this.fresh = true;
  }

  key(event) {
    const lanes = this.track.lanes.length;
    const { rows, selected } = this.track;
    const step = { ArrowDown: 1, ArrowUp: -1, ArrowRight: rows, ArrowLeft: -rows }[event.key];
    if (step && lanes) {
      const next = selected === null ? 0 : Math.max(0, Math.min(lanes - 1, selected + step));
      this.select(next);
      const seat = this.track.lanes[next]?.seat;
      this.spoken.textContent = seat ? `Seat ${next} ${sentence(seat)}` : `Seat ${next} is free.`;
      event.preventDefault();
    } else if (event.key === "Enter" && selected !== null) {
      event.preventDefault(); // else the same key presses the first button of the box
      this.details(selected);
    } else if (event.key === "Delete" && selected !== null) {
      const id = this.track.lanes[selected]?.seat.id;
      if (mine(id)) cancel(id);
    }
  }

  async details(slot) {
    const seat = this.track.lanes[slot]?.seat;
    if (!seat) return;
    const body = h("div", {}, h("p", {}, mark(seat.urgency), " ", sentence(seat)));
    const dialog = show(`Seat ${slot}`, body);
    if (!mine(seat.id)) return void body.append(h("p", { class: "dim" }, "It is somebody else's request."));
    body.append(h("p", { class: "dim" }, seat.id), button("Cancel it", async () => { await cancel(seat.id); dialog.close(); }, "danger"));
    try {
      const state = await get(`v1/requests/${encodeURIComponent(seat.id)}`);
      body.append(life(state));
    } catch (error) { body.append(h("p", { class: "dim" }, error.message)); }
  }
}

const mine = (id) => Boolean(id) && !id.startsWith("~");
const name = (id) => (mine(id) ? short(id) : "");

function sentence(seat) {
  const written = Math.max(0, seat.known - seat.prompt);
  const cached = seat.cached ? `, ${whole(seat.cached)} of them cached` : "";
  const prompt = `${whole(seat.prompt)} tokens of prompt${cached}`;
  if (seat.phase === "prefill" && written) return `reads again what it had before it was put back, ${whole(seat.computed)} of ${whole(seat.known)} tokens; holds ${seat.blocks} KV blocks.`;
  if (seat.phase === "prefill") return `reads ${whole(seat.computed)} of ${prompt}; holds ${seat.blocks} KV blocks.`;
  return `has read ${prompt}, and written ${whole(written)}; holds ${seat.blocks} KV blocks.`;
}

async function cancel(id) {
  if (!(await sure(`End the request ${short(id)}? Its client is told so.`, "End it"))) return;
  try {
    await ask(`v1/requests/${encodeURIComponent(id)}`, { method: "DELETE" });
    note(`${short(id)} is cancelled.`);
  } catch (error) { note(error.message, "bad"); }
}

function swatch(colour, text, title) {
  return h("span", { class: "swatch", title: title ?? "" }, h("i", { class: colour }), text);
}
