// A page of tables: loaded when it is opened, and again every few seconds while somebody looks.

import { keys } from "./api.js";
import { button, h } from "./dom.js";

const EVERY = 5000;

export class Listing {
  /** `parts` are [heading, async () => elements, actions]. One that fails says why, and the others stand. */
  constructor(title, about, parts) {
    this.parts = parts.map(([name, load, ...actions]) => ({ load, body: h("div", {}, h("p", { class: "empty" }, "…")), name, actions }));
    this.element = h("div", { class: "listing" }, h("div", { class: "row head" }, h("h1", {}, title)), h("p", { class: "dim" }, about),
      this.parts.map(({ name, body, actions }) => h("section", { class: "card", "aria-label": name }, h("div", { class: "row" }, h("h2", {}, name), h("span", { class: "right row" }, actions)), body)));
    addEventListener("keys", () => this.element.isConnected && this.load());
  }

  open() {
    this.load();
    this.timer = setInterval(() => document.hidden || this.load(), EVERY);
  }

  close() {
    clearInterval(this.timer);
  }

  async load() {
    await Promise.all(this.parts.map(async (part) => {
      const turn = (part.turn = {});
      let made;
      try {
        made = await part.load();
      } catch (error) {
        made = problem(error);
      }
      // What somebody is typing into or pressing stays where it is.
      const held = part.loaded && part.body.querySelector("input:focus, select:focus, button:active");
      if (part.turn === turn && !held) part.body.replaceChildren(...[made].flat());
      part.loaded = true;
    }));
  }
}

/** What went wrong, and what to do about it. */
function problem(error) {
  const wants = [401, 403].includes(error.status);
  const away = error instanceof TypeError;
  return h("p", { class: "empty" }, away ? "The server is away. " : error.message, " ", wants && button(keys.get("admin") ? "Other keys" : "Enter keys", () => dispatchEvent(new Event("enter-keys"))));
}
