// Small charts and the map of KV blocks, on canvases that are drawn only when there is news.

import { colours, surface } from "./dom.js";
import { SAMPLES } from "./feed.js";

export class Chart {
  /** `lines` are [series, colour variable]; `most` fixes the top of the scale; `format` writes a value. */
  constructor(canvas, lines, { most = null, format = String } = {}) {
    Object.assign(this, { canvas, lines, most, format });
  }

  draw(history) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width) return;
    const ctx = surface(this.canvas, width, height);
    const ink = colours("line", "dim", ...this.lines.map(([, colour]) => colour));
    let top = this.most ?? 0;
    if (this.most === null) {
      for (const [name] of this.lines) {
        for (let i = 0; i < history.size; i++) top = Math.max(top, history.get(name, i) || 0);
      }
      top = top * 1.1 || 1;
    }
    ctx.strokeStyle = ink.line;
    ctx.lineWidth = 1;
    for (const y of [0.5, height / 2, height - 0.5]) line(ctx, [[0, y], [width, y]]);
    ctx.lineJoin = "round";
    ctx.lineWidth = 1.6;
    this.lines.forEach(([name, colour], number) => {
      ctx.strokeStyle = ink[colour];
      ctx.setLineDash(number ? [4, 3] : []);
      let run = [];
      for (let i = 0; i <= history.size; i++) {
        const value = i < history.size ? history.get(name, i) : NaN;
        if (Number.isFinite(value)) {
          run.push([width - ((history.size - 1 - i) / (SAMPLES - 1)) * width, height - 1 - (value / top) * (height - 3)]);
        } else if (run.length) {
          line(ctx, run);
          run = [];
        }
      }
    });
    ctx.setLineDash([]);
    ctx.fillStyle = ink.dim;
    ctx.font = "10px system-ui, sans-serif";
    ctx.textAlign = "left";
    ctx.textBaseline = "top";
    ctx.fillText(this.format(top), 3, 3);
  }
}

function line(ctx, points) {
  ctx.beginPath();
  for (const [x, y] of points) ctx.lineTo(x, y);
  ctx.stroke();
}

export const CELLS = ["free", "private", "shared", "cached", "pinned"];

/** Each cell of the map stands for one KV block, or for several that are next to each other. */
export function drawMap(canvas, cells) {
  const width = canvas.parentElement.clientWidth;
  if (!width || !cells.length) return;
  const columns = Math.max(8, Math.min(64, Math.floor(width / 9)));
  const size = width / columns;
  const rows = Math.ceil(cells.length / columns);
  const height = rows * size;
  canvas.style.height = `${height}px`;
  const ctx = surface(canvas, width, height);
  const ink = colours(...CELLS.map((name) => `kv-${name}`));
  for (let i = 0; i < cells.length; i++) {
    ctx.fillStyle = ink[`kv-${CELLS[cells[i]] ?? "free"}`];
    ctx.fillRect((i % columns) * size, Math.floor(i / columns) * size, size - 1, size - 1);
  }
}

export function cellsOf(text) {
  const raw = atob(text ?? "");
  return Uint8Array.from(raw, (one) => one.charCodeAt(0));
}
