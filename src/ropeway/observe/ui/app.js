// Which page is open, keys, colours, and the keyboard.

import { canary, models, usage } from "./admin.js";
import { get, keys } from "./api.js";
import { Compare } from "./compare.js";
import { $, enter, field, h, recolour, show } from "./dom.js";
import { Feed } from "./feed.js";
import { jobs } from "./jobs.js";
import { Playground } from "./playground.js";
import { Ropeway } from "./ropeway.js";

const feed = new Feed();
const MAKE = { ropeway: () => new Ropeway(feed), playground: () => new Playground(), compare: () => new Compare(), jobs, keys: usage, models, canary };
const NAMES = Object.keys(MAKE);
const HIDDEN = 10000;
const made = {};
let open = null;

function go() {
  const asked = location.hash.slice(1);
  if (open && !NAMES.includes(asked)) return; // a place on this page
  const name = NAMES.includes(asked) ? asked : NAMES[0];
  if (open === name) return;
  made[open]?.close();
  open = name;
  made[name] ??= MAKE[name]();
  $("#main").replaceChildren(made[name].element);
  for (const tab of document.querySelectorAll("#tabs a")) {
    const chosen = tab.hash === `#${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
  }
  $("#main").setAttribute("aria-labelledby", `tab-${name}`);
  document.title = name === "ropeway" ? "Ropeway" : `${$(`#tab-${name}`).textContent} · Ropeway`;
  made[name].open();
}

function turn(name) {
  location.hash = name;
}

/** The page is at work only while it can be seen: a hidden one lets go of the feed after a while. */
let leaving = null;
document.addEventListener("visibilitychange", () => {
  clearTimeout(leaving);
  if (document.hidden) leaving = setTimeout(() => feed.stop(), HIDDEN);
  else if (open === "ropeway") feed.start();
});

function enterKeys() {
  if ($("dialog.keys")) return;
  const inputs = Object.fromEntries(["client", "admin"].map((which) => [which, h("input", { type: "password", autocomplete: "off", spellcheck: false, value: keys.get(which) })]));
  const dialog = enter("Keys", [
    field("API key", inputs.client, "What clients send, if this server wants one."),
    field("Administrator's key", inputs.admin, "What --admin-key of this server is. With it you see everybody's requests, and may change things."),
    h("p", { class: "dim" }, "They stay in this tab until it is closed, and go to this server alone."),
  ], "Use them", () => { for (const [which, input] of Object.entries(inputs)) keys.set(which, input.value.trim()); });
  dialog.classList.add("keys");
}

const THEMES = ["auto", "light", "dark"];

function paint(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("ropeway.theme", theme); } catch { /* then it lasts as long as the page */ }
  $("#theme").title = `Colours: ${theme} (d)`;
  recolour();
  for (const page of Object.values(made)) page.restyle?.();
}

function nextTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme;
  const order = dark ? ["auto", "light", "dark"] : ["auto", "dark", "light"];
  paint(order[(order.indexOf(now) + 1) % order.length]);
}

function help() {
  const rows = [["1 … 7", "pages"], ["← →", "pages, when a tab has the focus"], ["p", "hold the picture"], ["d", "light or dark"], ["k", "keys"], ["Enter, Shift+Enter", "send, new line"], ["Esc", "stop an answer, close a box"],
    ["↑ ↓ ← →, Enter, Delete", "choose a seat, look at it, end its request"]];
  show("Keyboard", h("dl", { class: "keyboard" }, rows.map(([key, what]) => [h("dt", {}, key), h("dd", {}, what)])));
}

function typing(event) {
  return event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog");
}

document.addEventListener("keydown", (event) => {
  if (typing(event)) return;
  const tab = event.target.closest("#tabs a");
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (tab && step) {
    const next = NAMES[(NAMES.indexOf(open) + step + NAMES.length) % NAMES.length];
    turn(next);
    $(`#tab-${next}`).focus();
  } else if (/^[1-9]$/.test(event.key) && NAMES[event.key - 1]) turn(NAMES[event.key - 1]);
  else if (event.key === "d") nextTheme();
  else if (event.key === "k") enterKeys();
  else if (event.key === "?") help();
  else if (event.key === "p" && open === "ropeway") made.ropeway.hold();
  else return;
  event.preventDefault();
});

async function version() {
  try { $("#server").textContent = `v${(await get("version")).version}`; } catch { $("#server").textContent = ""; }
}

feed.addEventListener("state", () => {
  const badge = $("#server");
  badge.dataset.state = feed.state;
  if (feed.state === "away") badge.textContent = "away";
  else if (feed.state === "live" && !badge.textContent.startsWith("v")) version();
});
addEventListener("keys", () => {
  feed.restart();
  if (open === "ropeway") feed.start();
});
addEventListener("enter-keys", enterKeys);
addEventListener("hashchange", go);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint(document.documentElement.dataset.theme));
$("#enter-keys").addEventListener("click", enterKeys);
$("#theme").addEventListener("click", nextTheme);
$("#help").addEventListener("click", help);

let theme = "auto";
try { theme = localStorage.getItem("ropeway.theme") ?? "auto"; } catch { /* the system's */ }
paint(THEMES.includes(theme) ? theme : "auto");
version();
go();
