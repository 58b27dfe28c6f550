// Elements and words. Nothing here, or anywhere on this page, turns text into markup.

export const $ = (selector, root = document) => root.querySelector(selector);

/** An element. `props` are properties or, with a dash or colon in their name, attributes; `on` listens; `data` is dataset. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "class") element.className = value;
    else if (name.includes("-") || name === "role" || name === "for" || name === "list") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A labelled control of a form. */
export function field(label, control, hint) {
  control.id ||= `field-${++count}`;
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, hint && h("small", {}, hint));
}

let count = 0;

export function choice(options, value) {
  return h("select", {}, options.map((one) => {
    const [id, text] = Array.isArray(one) ? one : [one, one];
    return h("option", { value: id, selected: id === value }, text);
  }));
}

/** A table of `rows`; each column is [heading, row => cell, class]. `empty` is said where there are none. */
export function table(columns, rows, empty) {
  if (!rows.length) return h("p", { class: "empty" }, empty);
  return h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, columns.map(([name, , kind]) => h("th", { scope: "col", class: kind ?? "" }, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, columns.map(([, cell, kind]) => h("td", { class: kind ?? "" }, cell(row) ?? "–")))))));
}

export function button(text, action, kind = "") {
  const made = h("button", { type: "button", class: kind }, text);
  made.addEventListener("click", async () => {
    made.disabled = true;
    try { await action(); } catch (error) { note(error.message, "bad"); } finally { made.disabled = false; }
  });
  return made;
}

/** Say something at the edge of the page for a while. At most four at a time. */
export function note(text, kind = "") {
  const box = $("#notes");
  const one = h("p", { class: kind }, text);
  box.append(one);
  while (box.children.length > 4) box.firstChild.remove();
  setTimeout(() => one.remove(), kind === "bad" ? 12000 : 5000);
}

/** Ask before something that cannot be undone. */
export function sure(question, yes) {
  return new Promise((resolve) => {
    const answer = (value) => () => { dialog.close(); resolve(value); };
    const dialog = h("dialog", { class: "ask", on: { close: () => { dialog.remove(); resolve(false); } } },
      h("p", {}, question),
      h("div", { class: "row end" },
        h("button", { type: "button", autofocus: true, on: { click: answer(false) } }, "No"),
        h("button", { type: "button", class: "danger", on: { click: answer(true) } }, yes)));
    document.body.append(dialog);
    dialog.showModal();
  });
}

export function show(title, ...content) {
  const dialog = h("dialog", { on: { close: () => dialog.remove(), click: (event) => event.target === dialog && dialog.close() } },
    h("div", { class: "row" }, h("h2", {}, title),
      h("button", { type: "button", class: "plain right", "aria-label": "Close", on: { click: () => dialog.close() } }, "✕")),
    content);
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** A box with a form. What is typed in is done by `act`; then the box closes, or says what went wrong and stays. */
export function enter(title, fields, verb, act) {
  const form = h("form", { on: { submit: async (event) => {
    event.preventDefault();
    event.submitter.disabled = true; // once is enough
    try {
      await act();
      dialog.close();
    } catch (error) { note(error.message, "bad"); } finally { event.submitter.disabled = false; }
  } } }, fields, h("div", { class: "row end" }, h("button", { type: "submit", class: "main" }, verb)));
  const dialog = show(title, form);
  return dialog;
}

/** A canvas, cleared, to be drawn on in CSS pixels. */
export function surface(canvas, width, height) {
  const dense = Math.min(2, devicePixelRatio || 1);
  const [wide, tall] = [Math.round(width * dense), Math.round(height * dense)];
  if (canvas.width !== wide || canvas.height !== tall) Object.assign(canvas, { width: wide, height: tall });
  const ctx = canvas.getContext("2d");
  ctx.setTransform(dense, 0, 0, dense, 0, 0);
  ctx.clearRect(0, 0, width, height);
  return ctx;
}

export const whole = (n) => (n === null || n === undefined ? "–" : Math.round(n).toLocaleString("en"));

export function seconds(s) {
  if (s === null || s === undefined || !Number.isFinite(s)) return "–";
  if (s < 0.001) return s === 0 ? "0 s" : `${(s * 1e6).toFixed(0)} µs`;
  if (s < 0.0995) return `${(s * 1000).toPrecision(3).replace(/\.0+$/, "")} ms`;
  if (s < 0.9995) return `${(s * 1000).toFixed(0)} ms`;
  if (s < 120) return `${s.toFixed(s < 10 ? 2 : 1)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return `${(s / 3600).toFixed(1)} h`;
}

export const percent = (share) => (Number.isFinite(share) ? `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %` : "–");

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) { n /= 1024; unit += 1; }
  return `${n.toFixed(unit ? 1 : 0)} ${units[unit]}`;
}

export const when = (unix) => (unix ? new Date(unix * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "medium" }) : "–");

export const short = (id) => (id && id.length > 18 ? `${id.slice(0, 9)}…${id.slice(-6)}` : id ?? "");

const resolved = new Map();

/** The values of CSS variables that are colours, by name without the dashes, as a canvas understands them. */
export function colours(...names) {
  const probe = document.documentElement;
  for (const name of names) {
    if (resolved.has(name)) continue;
    probe.style.setProperty("accent-color", `var(--${name})`);
    resolved.set(name, getComputedStyle(probe).accentColor);
  }
  probe.style.removeProperty("accent-color");
  return Object.fromEntries(names.map((name) => [name, resolved.get(name)]));
}

/** Colours have changed. */
export const recolour = () => resolved.clear();

export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
