// A conversation with the model: streamed, stoppable, with its own timeline under each answer.

import { ask, events, get } from "./api.js";
import { button, choice, field, h, note, seconds, show, whole } from "./dom.js";
import { life } from "./timeline.js";

const MOST_TURNS = 100;
const NUMBERS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05, value: 0.7 }],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01 }],
  ["max_tokens", "At most so many tokens", { min: 1, step: 1, value: 200 }],
  ["seed", "Seed", { min: 0, step: 1 }],
];

export class Playground {
  constructor() {
    this.turns = [];
    this.abort = null;
    this.element = this.build();
    addEventListener("keys", () => this.element.isConnected && this.models());
  }

  build() {
    this.model = choice([], "");
    this.system = h("textarea", { rows: 2, placeholder: "How the model should behave" });
    this.priority = choice([["", "as the server has it"], "high", "medium", "low"], "");
    this.numbers = Object.fromEntries(NUMBERS.map(([name, , props]) => [name, h("input", { type: "number", ...props })]));
    this.stops = h("input", { type: "text", placeholder: "commas between them" });
    this.talk = h("div", { class: "talk", role: "log", "aria-label": "Conversation", "aria-live": "off" },
      h("p", { class: "empty" }, "Say something. What you type goes to this server and nowhere else."));
    this.input = h("textarea", {
      id: "say", rows: 3, placeholder: "Message", "aria-label": "Message",
      on: { keydown: (event) => this.key(event) },
    });
    this.sendButton = h("button", { type: "submit", class: "main", id: "send" }, "Send");
    this.stopButton = h("button", { type: "button", id: "stop", hidden: true, on: { click: () => this.stop() } }, "Stop");
    const form = h("form", { class: "say", on: { submit: (event) => { event.preventDefault(); this.say(); } } },
      this.input, h("div", { class: "row" }, this.sendButton, this.stopButton,
        button("New conversation", () => this.forget()),
        h("span", { class: "right row" }, button("Copy as curl", () => this.code("curl")), button("Copy as Python", () => this.code("python")))));
    return h("div", { class: "playground" },
      h("section", { class: "card settings", "aria-label": "Parameters" }, h("h2", {}, "Parameters"),
        field("Model", this.model), field("System message", this.system),
        NUMBERS.map(([name, text]) => field(text, this.numbers[name])), field("Stop at", this.stops), field("Urgency", this.priority)),
      h("section", { class: "card chat", "aria-label": "Chat" }, this.talk, form));
  }

  open() {
    this.models();
    this.input.focus({ preventScroll: true });
  }

  close() {}

  async models() {
    try {
      const { data } = await get("v1/models");
      const old = this.model.value;
      this.model.replaceChildren(...data.map(({ id }) => h("option", { value: id, selected: id === old }, id)));
    } catch (error) { note(error.message, "bad"); }
  }

  key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.say();
    } else if (event.key === "Escape") this.stop();
  }

  stop() {
    this.abort?.abort();
  }

  forget() {
    this.stop();
    this.turns = [];
    this.talk.replaceChildren(h("p", { class: "empty" }, "A new conversation."));
    this.input.focus();
  }

  /** The request, as far as fields are filled in. */
  body(turns) {
    const system = this.system.value.trim();
    const found = { model: this.model.value, messages: [...(system ? [{ role: "system", content: system }] : []), ...turns] };
    for (const [name, input] of Object.entries(this.numbers)) if (input.value !== "") found[name] = Number(input.value);
    const stop = this.stops.value.split(",").map((one) => one.trim()).filter(Boolean);
    if (stop.length) found.stop = stop;
    if (this.priority.value) found.priority = this.priority.value;
    return found;
  }

  async say() {
    const text = this.input.value.trim();
    if (!text || this.abort) return;
    for (const input of Object.values(this.numbers)) if (!input.reportValidity()) return;
    this.input.value = "";
    if (!this.turns.length) this.talk.replaceChildren();
    this.turns.push({ role: "user", content: text });
    this.turns.splice(0, this.turns.length - MOST_TURNS);
    this.talk.append(h("div", { class: "turn user" }, h("p", {}, text)));
    const answer = new Answer(this.talk);
    while (this.talk.children.length > 2 * MOST_TURNS) this.talk.firstChild.remove();
    this.abort = new AbortController();
    this.busy(true);
    try {
      await answer.read(this.body(this.turns), this.abort.signal);
    } finally {
      this.abort = null;
      this.busy(false);
    }
    if (answer.text) this.turns.push({ role: "assistant", content: answer.text });
    else this.turns.pop();
    this.input.focus({ preventScroll: true });
  }

  busy(now) {
    this.sendButton.disabled = now;
    this.stopButton.hidden = !now;
  }

  code(kind) {
    const text = this.input.value.trim();
    const turns = text ? [...this.turns, { role: "user", content: text }] : this.turns;
    const body = this.body(turns.length ? turns : [{ role: "user", content: "Hello" }]);
    const root = new URL("../", document.baseURI).href.replace(/\/$/, "");
    const made = kind === "curl" ? curl(root, { ...body, stream: true }) : python(root, body);
    const box = h("pre", { tabIndex: 0, class: "code" }, made);
    const dialog = show(kind === "curl" ? "As curl" : "As Python", box,
      h("div", { class: "row end" }, button("Copy", async () => { await navigator.clipboard.writeText(made); dialog.close(); note("Copied."); }, "main")));
  }
}

/** One answer, as it comes. */
class Answer {
  constructor(talk) {
    this.talk = talk;
    this.text = "";
    this.written = new Text("");
    this.thought = new Text("");
    this.words = h("p", {}, this.written);
    this.thinking = h("details", { class: "thoughts", hidden: true }, h("summary", {}, "Thoughts"), h("p", {}, this.thought));
    this.foot = h("p", { class: "foot dim" }, "waiting…");
    this.element = h("div", { class: "turn assistant", "aria-busy": "true" }, this.thinking, this.words, this.foot);
    talk.append(this.element);
    this.follow();
  }

  async read(body, signal) {
    const begun = performance.now();
    let first = null;
    let usage = null;
    let finish = null;
    let id = null;
    try {
      const sent = { ...body, stream: true, stream_options: { include_usage: true } };
      const response = await ask("v1/chat/completions", { method: "POST", body: sent, signal });
      id = response.headers.get("x-request-id");
      for await (const { data, comment } of events(response)) {
        if (comment !== null && first === null) this.foot.textContent = comment === "keep-alive" ? "waiting…" : comment;
        if (!data || data === "[DONE]") continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        usage = chunk.usage ?? usage;
        const said = chunk.choices?.[0];
        if (!said) continue;
        finish = said.finish_reason ?? finish;
        if (this.take(said.delta ?? {})) first ??= performance.now();
      }
    } catch (error) {
      if (signal.aborted) finish = "stopped";
      else {
        finish = "failed";
        this.element.append(h("p", { class: "bad", role: "alert" }, error.message));
      }
    }
    const now = performance.now();
    const facts = [finish ?? "ended"];
    if (usage) facts.push(`${whole(usage.prompt_tokens)} + ${whole(usage.completion_tokens)} tokens`);
    if (first !== null) facts.push(`first after ${seconds((first - begun) / 1000)}`, `all after ${seconds((now - begun) / 1000)}`);
    if (usage?.completion_tokens > 1 && now > first) facts.push(`${((1000 * (usage.completion_tokens - 1)) / (now - first)).toFixed(1)} tokens/s`);
    this.foot.textContent = facts.join(" · ");
    this.element.setAttribute("aria-busy", "false");
    this.settle();
    if (id) await this.story(id);
    this.follow();
  }

  /** Whether a delta says anything. */
  take({ content, reasoning, tool_calls: calls }) {
    if (reasoning) {
      this.thinking.hidden = false;
      this.thought.appendData(reasoning);
    }
    const called = (calls ?? []).map((one) => (one.function?.name ? `\n→ ${one.function.name} ` : "") + (one.function?.arguments ?? "")).join("");
    const text = (content ?? "") + called;
    if (text) {
      this.text += text;
      this.written.appendData(text);
    }
    if (text || reasoning) this.foot.textContent = "…";
    this.follow();
    return Boolean(text || reasoning);
  }

  /** Code between fences stands in boxes of its own. */
  settle() {
    if (!this.text.includes("```")) return;
    this.words.replaceWith(...this.text.split("```").map((part, i) => (i % 2 ? h("pre", { class: "code" }, part.replace(/^\w*\n/, "")) : h("p", {}, part))));
  }

  async story(id) {
    try {
      this.element.append(life(await get(`v1/requests/${encodeURIComponent(id)}`)));
    } catch { /* it was answered too long ago, or never began */ }
  }

  /** Keep the end in sight, unless somebody reads further up. */
  follow() {
    const { talk } = this;
    if (talk.scrollHeight - talk.scrollTop - talk.clientHeight < 160) talk.scrollTop = talk.scrollHeight;
  }
}

export function curl(root, body) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl -N ${root}/v1/chat/completions \\\n  -H 'content-type: application/json' \\\n  -H "authorization: Bearer $ROPEWAY_API_KEY" \\\n  -d '${json}'`;
}

export function python(root, body) {
  const { model, messages, priority, ...rest } = body;
  const extra = priority ? { extra_body: { priority } } : {};
  const lines = Object.entries({ model, messages, ...rest, ...extra }).map(([name, value]) => `    ${name}=${literal(value, 4)},`);
  return [
    "import os", "", "from openai import OpenAI", "",
    `client = OpenAI(base_url=${JSON.stringify(`${root}/v1`)}, api_key=os.environ.get("ROPEWAY_API_KEY", "unused"))`,
    "stream = client.chat.completions.create(", ...lines, "    stream=True,", ")",
    "for chunk in stream:", "    if chunk.choices:", '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
  ].join("\n");
}

/** JSON data as Python would have it written. */
function literal(value, indent) {
  const pad = " ".repeat(indent);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return value.length ? `[\n${value.map((one) => `${pad}    ${literal(one, indent + 4)},`).join("\n")}\n${pad}]` : "[]";
  return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one, indent)}`).join(", ")}}`;
}
