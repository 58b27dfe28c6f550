// Seats as lanes of a ropeway, drawn on a canvas. A cabin boards at the left, rides through the first part of its lane
// while its prompt is computed, and then along a logarithmic scale of the tokens that it has written: nobody knows
// beforehand where it gets off.

import { colours, still, surface } from "./dom.js";
import { outline } from "./shapes.js";

const HEAD = 22;
const GUTTER = 34;
const STATION = 0.3;
const GONE = 900;
const BOARDING = -0.06;
const NAMES = ["ink", "dim", "line", "cable", "panel", "prefill", "decode", "cached", "bad", "high", "medium", "low", "focus"];
export const MOST_LANES = 512;

export class Track {
  constructor(canvas) {
    this.canvas = canvas;
    this.ctx = null;
    this.lanes = [];
    this.leaving = [];
    this.least = 6;
    this.scale = { from: 6, to: 6, at: 0 };
    this.selected = null;
    this.width = 0;
    this.empty = "";
    this.restyle();
  }

  restyle() {
    this.colours = colours(...NAMES);
  }

  /** So many lanes, in as many columns as there is room for. */
  configure(slots) {
    const lanes = Math.min(MOST_LANES, slots);
    while (this.lanes.length < lanes) this.lanes.push(null);
    this.lanes.length = lanes;
    this.fit();
  }

  fit() {
    const width = this.canvas.parentElement.clientWidth;
    if (!width || !this.lanes.length) return;
    const most = Math.max(1, Math.floor(width / 380));
    const lanes = this.lanes.length;
    const columns = Math.min(most, lanes <= 16 ? 1 : lanes <= 48 ? 2 : lanes <= 160 ? 3 : 4);
    const rows = Math.ceil(lanes / columns);
    const tall = rows <= 12 ? 38 : rows <= 20 ? 30 : rows <= 32 ? 22 : 15;
    const height = HEAD + rows * tall + 4;
    this.canvas.style.height = `${height}px`;
    Object.assign(this, { width, height, columns, rows, tall });
  }

  /** Where everybody is now. They glide there for `interval` ms; `endings` says by id how those who are not there any
      more have left. */
  update(seats, { interval = 250, endings = {}, now = performance.now() } = {}) {
    const seen = new Set();
    let longest = 32;
    for (const seat of seats) {
      if (seat.slot >= this.lanes.length) continue;
      seen.add(seat.slot);
      longest = Math.max(longest, seat.known - seat.prompt);
      const old = this.lanes[seat.slot];
      const same = old && old.seat.prompt === seat.prompt && old.seat.id === seat.id && seat.known >= old.seat.known;
      if (old && !same) this.leave(old, endings[old.seat.id], now);
      this.lanes[seat.slot] = { seat, from: same ? position(old, now) : BOARDING, to: goal(seat), at: now, interval };
    }
    this.lanes.forEach((lane, slot) => {
      if (lane && !seen.has(slot)) {
        this.leave(lane, endings[lane.seat.id], now);
        this.lanes[slot] = null;
      }
    });
    this.rescale(longest, now);
  }

  /** Let the scale reach to `longest` tokens and at least to `least`. It grows at once and shrinks only when it is far
      too wide. */
  rescale(longest, now = performance.now()) {
    const wanted = Math.max(this.least, reaching(longest));
    if (wanted > this.scale.to || wanted < this.scale.to - 1) this.scale = { from: this.reach(now), to: wanted, at: now };
  }

  reach(now) {
    const part = still() ? 1 : Math.min(1, (now - this.scale.at) / 400);
    return this.scale.from + (this.scale.to - this.scale.from) * part;
  }

  leave(lane, how, now) {
    this.leaving.push({ lane, how: how ?? "finished", at: now, position: position(lane, now) });
    if (this.leaving.length > 2 * this.lanes.length) this.leaving.shift();
  }

  /** Nobody is aboard, and nobody is seen to leave. */
  clear() {
    this.lanes.fill(null);
    this.leaving = [];
  }

  get busy() {
    return this.leaving.length > 0 || this.lanes.some(Boolean);
  }

  /** The lane under a point of the canvas, or null. */
  at(x, y) {
    const column = Math.floor(x / (this.width / this.columns));
    const row = Math.floor((y - HEAD) / this.tall);
    const slot = column * this.rows + row;
    return row >= 0 && row < this.rows && slot < this.lanes.length ? slot : null;
  }

  draw(now = performance.now()) {
    if (!this.width) return;
    const ctx = (this.ctx = surface(this.canvas, this.width, this.height));
    ctx.lineCap = "round";
    const reach = this.reach(now);
    for (let column = 0; column < this.columns; column++) this.backdrop(column, reach);
    this.lanes.forEach((lane, slot) => this.lane(slot, lane, now, reach));
    this.leaving = this.leaving.filter((one) => now - one.at < GONE);
    for (const one of this.leaving) this.farewell(one, now, reach);
    ctx.globalAlpha = 1;
  }

  /** The box of a lane: where its cable begins, where its prompt is done, where it ends, and its height. */
  box(slot) {
    const wide = this.width / this.columns;
    const left = Math.floor(slot / this.rows) * wide;
    const top = HEAD + (slot % this.rows) * this.tall;
    const x0 = left + GUTTER;
    const x2 = left + wide - 22;
    return { left, top, x0, x1: x0 + (x2 - x0) * STATION, x2, wide };
  }

  backdrop(column, reach) {
    const { ctx } = this;
    const { x0, x1, x2 } = this.box(column * this.rows);
    const bottom = this.height - 4;
    ctx.font = "11px system-ui, sans-serif";
    ctx.textBaseline = "middle";
    ctx.fillStyle = this.colours.dim;
    ctx.strokeStyle = this.colours.line;
    ctx.lineWidth = 1;
    ctx.textAlign = "left";
    ctx.fillText("prompt", x0, 10);
    ctx.textAlign = "center";
    for (let power = 0; power <= reach; power += 2) {
      const x = x1 + (x2 - x1) * (Math.log2(1 + 2 ** power) / reach);
      if (x > x2 + 2) break;
      ctx.beginPath();
      ctx.moveTo(x, HEAD - 4);
      ctx.lineTo(x, bottom);
      ctx.stroke();
      ctx.fillText(2 ** power < 1000 ? 2 ** power : `${2 ** power / 1024}k`, x, 10);
    }
    ctx.beginPath();
    ctx.moveTo(x1, HEAD - 8);
    ctx.lineTo(x1, bottom);
    ctx.strokeStyle = this.colours.cable;
    ctx.stroke();
  }

  lane(slot, lane, now, reach) {
    const { ctx, tall } = this;
    const { left, top, x0, x1, x2, wide } = this.box(slot);
    const y = top + tall * 0.3;
    if (slot === this.selected) {
      ctx.fillStyle = this.colours.focus;
      ctx.globalAlpha = 0.16;
      ctx.fillRect(left + 2, top, wide - 8, tall);
      ctx.globalAlpha = 1;
    }
    ctx.strokeStyle = this.colours.cable;
    ctx.lineWidth = 1.2;
    ctx.setLineDash(lane ? [] : [2, 5]);
    stroke(ctx, x0, y, x2, y);
    ctx.setLineDash([]);
    if (tall >= 15) {
      ctx.fillStyle = this.colours.dim;
      ctx.font = "11px system-ui, sans-serif";
      ctx.textAlign = "right";
      ctx.fillText(slot, x0 - 10, y + 1);
    }
    if (!lane) {
      if (this.empty && tall >= 21) {
        ctx.textAlign = "left";
        ctx.fillText(this.empty, x1 + 12, y + tall * 0.42);
      }
      return;
    }
    const x = this.x(slot, position(lane, now), reach);
    const { seat } = lane;
    const read = Math.min(x, x1);
    const known = x0 + (x1 - x0) * Math.min(1, seat.cached / Math.max(1, seat.phase === "prefill" ? toRead(seat) : seat.prompt));
    ctx.lineWidth = Math.max(2.5, tall * 0.12);
    ctx.strokeStyle = this.colours.prefill;
    if (read > x0) stroke(ctx, x0, y, read, y);
    ctx.strokeStyle = this.colours.cached;
    if (seat.cached && read > x0) stroke(ctx, x0, y, Math.min(read, known), y);
    ctx.strokeStyle = this.colours.decode;
    if (x > x1) stroke(ctx, x1, y, x, y);
    const speed = now - lane.at < lane.interval ? (lane.to - lane.from) / lane.interval : 0;
    this.cabin(seat, x, y, Math.max(-0.2, -60 * speed));
    if (tall >= 21) this.label(seat, x, y + tall * 0.42, x1, x2);
  }

  x(slot, position, reach) {
    const { x0, x1, x2 } = this.box(slot);
    if (position < 1) return x0 + (x1 - x0) * position;
    return x1 + (x2 - x1) * Math.min(1, (position - 1) / reach);
  }

  cabin(seat, x, y, swing) {
    const { ctx, tall } = this;
    const r = Math.min(10, tall * 0.26);
    ctx.save();
    ctx.translate(x, y);
    ctx.rotate(swing);
    ctx.strokeStyle = this.colours.ink;
    ctx.lineWidth = 1.2;
    stroke(ctx, 0, 0, 0, r * 0.7);
    outline(ctx, seat.urgency, 0, r * 1.5, r);
    ctx.fillStyle = seat.phase === "prefill" ? this.colours.prefill : this.colours.decode;
    ctx.fill();
    ctx.lineWidth = 2;
    ctx.strokeStyle = this.colours[seat.urgency] ?? this.colours.high;
    ctx.stroke();
    if (r >= 7) {
      ctx.fillStyle = this.colours.panel;
      for (const side of [-0.5, 0.1]) ctx.fillRect(side * r, r * 1.1, 0.4 * r, 0.4 * r);
    }
    ctx.restore();
  }

  label(seat, x, y, x1, x2) {
    const { ctx } = this;
    const text = seat.phase === "prefill" ? `${seat.computed}/${toRead(seat)}` : `${seat.prompt} + ${out(seat)}`;
    ctx.font = "11px system-ui, sans-serif";
    ctx.fillStyle = this.colours.dim;
    const right = x + 60 > x2;
    ctx.textAlign = right ? "right" : "left";
    ctx.fillText(text, right ? x - 15 : x + 15, y);
  }

  /** Who has finished rides out of the picture, who was put back returns to the station, who was ended drops off. */
  farewell({ lane, how, at, position: from }, now, reach) {
    const part = still() ? 1 : (now - at) / GONE;
    const { slot } = lane.seat;
    const { x0, x2, top } = this.box(slot);
    const x = this.x(slot, from, reach);
    const y = top + this.tall * 0.3;
    const ease = part * part;
    this.ctx.globalAlpha = Math.max(0, 1 - part);
    if (how === "preempted") this.cabin(lane.seat, x + (x0 - 20 - x) * ease, y, 0.2 * part);
    else if (how === "failed" || how === "cancelled") this.cabin(lane.seat, x, y + this.tall * ease, 0.5 * part);
    else this.cabin(lane.seat, x + (x2 + 20 - x) * ease, y, -0.2 * part);
    this.ctx.globalAlpha = 1;
  }
}

/** A scale on which so many tokens have room. */
export const reaching = (tokens) => Math.ceil(Math.log2(1 + tokens) + 0.3);

const out = (seat) => Math.max(0, seat.known - seat.prompt);

/** What it has to read before it goes on writing: after a preemption also what it had written. */
const toRead = (seat) => Math.max(seat.prompt, seat.known);

/** Where a cabin belongs: the share of its prompt that is computed, and from 1 on the logarithm of what it has written. */
function goal(seat) {
  const read = seat.computed / Math.max(1, toRead(seat));
  return seat.phase === "prefill" ? Math.min(read, 0.999) : 1 + Math.log2(1 + (seat.fine ?? out(seat)));
}

/** Where it is by now, on its way there. */
function position(lane, now) {
  const part = still() || lane.interval <= 0 ? 1 : Math.max(0, Math.min(1, (now - lane.at) / lane.interval));
  return lane.from + (lane.to - lane.from) * part;
}

function stroke(ctx, x0, y0, x1, y1) {
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}
