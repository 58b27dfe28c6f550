// Keys and their usage, models and how they are scheduled, canaries: read and changed with the administrator's key.

import { ask, get, send } from "./api.js";
import { button, choice, enter, field, h, note, percent, show, sure, table, when, whole } from "./dom.js";
import { Listing } from "./listing.js";

const POLICIES = ["fcfs", "sjf", "hrrn", "prefix", "deadline", "fair"].flatMap((name) => [name, name === "fcfs" ? "priority" : `priority:${name}`]);
const BY = [["key,model", "key and model"], ["key,model,day", "key, model and day"], ["tenant", "tenant"], ["model,day", "model and day"], ["hour", "hour"]];

export function usage() {
  const by = choice(BY, BY[0][0]);
  by.setAttribute("aria-label", "Told by");
  const rows = async () => {
    const { data, currency, has_more: more } = await get(`v1/usage?by=${by.value}&limit=200`);
    const named = ["month", "day", "hour", "key", "tenant", "model"].filter((name) => data.some((row) => row[name] !== null && row[name] !== undefined));
    const longest = Math.max(1, ...data.map((row) => row.total_tokens));
    return [table([
      ...named.map((name) => [name, (row) => (name === "key" ? row.name ?? (row.key || "without a key") : row[name] || "–")]),
      ["requests", (row) => whole(row.requests), "number"], ["prompt", (row) => whole(row.prompt_tokens), "number"], ["cached", (row) => percent(row.prompt_tokens ? row.cached_tokens / row.prompt_tokens : 0), "number"],
      ["answers", (row) => whole(row.completion_tokens), "number"], ["tokens", (row) => h("meter", { max: longest, value: row.total_tokens, title: whole(row.total_tokens) })],
      ["cost", (row) => (row.cost === null ? "no price" : `${row.cost.toFixed(4)} ${currency}`), "number"],
    ], data, "Nothing has been used yet."), more && h("p", { class: "dim" }, "There are more rows: ask GET /v1/usage for them.")].filter(Boolean);
  };
  const every = async () => {
    const { data, required } = await get("admin/keys");
    const now = Date.now() / 1000;
    return [h("p", { class: "dim" }, required ? "Nobody comes in without a key." : "Who asks needs no key yet. With the first one this server is closed to everybody else."), table([
      ["Key", (one) => h("b", {}, one.name)], ["Begins with", (one) => h("code", {}, one.hint)], ["Tenant", (one) => (one.tenant === one.id ? "its own" : one.tenant)],
      ["May", (one) => allowed(one.limits ?? {})], ["Made", (one) => when(one.created)], ["Ends", (one) => (one.expires ? when(one.expires) : "never")],
      ["", (one) => h("span", { class: "row end" }, one.revoked ? h("span", { class: "state revoked" }, "revoked") : one.expires && one.expires <= now ? h("span", { class: "state expired" }, "expired")
        : button("Revoke", async () => {
          if (!(await sure(`Revoke the key ${one.name} for good?`, "Revoke"))) return;
          await ask(`admin/keys/${encodeURIComponent(one.id)}`, { method: "DELETE" });
          await page.load();
        }, "danger"))],
    ], [...data].reverse().sort((a, b) => Boolean(a.revoked) - Boolean(b.revoked)).slice(0, 200), "No keys were made for this server.")];
  };
  const page = new Listing("Keys and usage", "Who may use this server and how much of it, what each key has used, and what that cost.", [
    ["Keys", every, button("New key…", () => create(page))], ["Usage", rows, by],
  ]);
  by.addEventListener("change", () => page.load());
  return page;
}

const LIMITS = [
  ["requests_per_minute", "Requests a minute", "requests/min"], ["tokens_per_minute", "Tokens a minute", "tokens/min"], ["concurrency", "Requests at a time", "at a time"],
  ["max_prompt_tokens", "Tokens of a prompt", "tokens of prompt"], ["budget_tokens", "Tokens in a month", "tokens in all its time"],
];

/** What a key may do, in a line. */
function allowed(limits) {
  const said = LIMITS.filter(([name]) => limits[name] !== undefined).map(([name, , unit]) =>
    `${whole(limits[name])} ${name === "budget_tokens" && limits.budget_period !== "total" ? "tokens a month" : unit}`);
  if (limits.budget_cost !== undefined) said.push(`${limits.budget_cost} of money`);
  if (limits.weight !== undefined) said.push(`weight ${limits.weight}`);
  if (limits.models?.length) said.push(`only ${limits.models.join(", ")}`);
  return said.join(", ") || "everything";
}

function create(page) {
  const name = h("input", { type: "text", required: true, maxLength: 128, pattern: "[A-Za-z0-9][A-Za-z0-9._:@\\-]*" });
  const inputs = LIMITS.map(([id, text]) => [id, text, h("input", { type: "number", min: 1, step: 1 })]);
  enter("New key", [field("Name", name), h("p", { class: "dim small" }, "Limits; what is left empty is unlimited."), inputs.map(([, text, input]) => field(text, input))], "Make it", async () => {
    const limits = Object.fromEntries(inputs.filter(([, , input]) => input.value).map(([id, , input]) => [id, Number(input.value)]));
    const { key, account } = await send("POST", "admin/keys", { name: name.value, limits });
    show(`The key ${account.name}`, h("p", {}, "Keep it now: it is never shown again."), h("pre", { class: "code", id: "new-key" }, key),
      h("div", { class: "row end" }, button("Copy", async () => { await navigator.clipboard.writeText(key); note("Copied."); }, "main")));
    page.load();
  });
}

export function models() {
  const which = choice([], "");
  which.setAttribute("aria-label", "Model");
  which.hidden = true;
  const query = (path) => (which.value ? `${path}?model=${encodeURIComponent(which.value)}` : path);
  const cards = async () => {
    const { data } = await get("v1/models");
    return table([["Model", (one) => h("b", {}, one.id)], ["Made from", (one) => one.root], ["Longest prompt and answer", (one) => whole(one.max_model_len), "number"], ["Since", (one) => when(one.created)]], data, "No models.");
  };
  const deployments = async () => {
    let found;
    try {
      found = await get("admin/deployments");
    } catch (error) {
      if (error.code === "no_routes") return h("p", { class: "empty" }, error.message);
      throw error;
    }
    const local = found.data.filter((one) => one.kind === "local").map((one) => one.name);
    if (local.join() !== [...which.options].map((one) => one.value).join()) {
      which.replaceChildren(...local.map((name) => h("option", { value: name }, name)));
      setTimeout(() => page.load()); // what is asked of one model is asked of this one
    }
    which.hidden = local.length < 2;
    const change = (one, verb) => button(verb === "start" ? "Start" : "Stop", async () => {
      if (verb === "stop" && !(await sure(`Take ${one.name} out of service? What it is answering it finishes.`, "Stop it"))) return;
      await ask(`admin/deployments/${encodeURIComponent(one.name)}/${verb}`, { method: "POST" });
      await page.load();
    }, verb === "stop" ? "danger" : "");
    const memory = found.memory_gib === null ? "" : `${(found.memory_used_gib ?? 0).toFixed(1)} of ${found.memory_gib.toFixed(1)} GiB are given out.`;
    return [table([
      ["Deployment", (one) => h("b", {}, one.name)], ["Kind", (one) => one.kind], ["Phase", (one) => h("span", { class: `state ${one.phase}` }, one.phase)], ["Circuit", (one) => one.circuit.replace("_", " ")],
      ["In flight", (one) => whole(one.in_flight), "number"], ["Requests", (one) => Object.entries(one.requests).map(([what, n]) => `${what} ${whole(n)}`).join(", ")], ["Routes", (one) => one.routes.join(", ")],
      ["", (one) => h("span", { class: "row end" }, one.reason && h("span", { class: "dim" }, one.reason), change(one, one.takes_requests ? "stop" : "start"))],
    ], found.data, "No deployments."), h("p", { class: "dim" }, memory)];
  };
  const scheduling = async () => {
    const { policy, waiting } = await get(query("admin/scheduler"));
    const wanted = choice(POLICIES.includes(policy) ? POLICIES : [policy, ...POLICIES], policy);
    wanted.setAttribute("aria-label", "Policy");
    const put = button("Board by it", async () => {
      const now = await send("PUT", query("admin/scheduler"), { policy: wanted.value });
      note(`Requests board by ${now.policy} from the next step on.`);
      document.activeElement?.blur();
      await page.load();
    }, "main");
    return h("div", { class: "row" }, h("span", {}, "Requests board by ", h("b", {}, policy), `; ${whole(waiting)} wait.`), wanted, put);
  };
  const pins = async () => {
    const { pins: found } = await get(query("admin/pins"));
    return table([
      ["Pin", (one) => h("b", {}, one.name)], ["Tokens", (one) => whole(one.tokens), "number"], ["Blocks there", (one) => `${whole(one.cached)} of ${whole(one.blocks)}`, "number"],
      ["", (one) => button("Give up", async () => {
        if (!(await sure(`Let the prefix ${one.name} be lost as others are?`, "Give it up"))) return;
        await ask(query(`admin/pins/${encodeURIComponent(one.name)}`), { method: "DELETE" });
        await page.load();
      }, "danger")],
    ], found, "No prefix is pinned.");
  };
  const pin = button("Pin a prefix…", () => {
    const name = h("input", { type: "text", required: true, maxLength: 100 });
    const system = h("textarea", { rows: 5, required: true });
    const tenant = h("input", { type: "text", maxLength: 128 });
    enter("Pin a prefix", [
      field("Name", name), field("System message that many requests begin with", system), field("Tenant", tenant, "Whose requests begin so; empty on a server without keys."),
    ], "Compute and pin", async () => {
      const whose = tenant.value.trim() ? { tenant: tenant.value.trim() } : {};
      await send("PUT", query(`admin/pins/${encodeURIComponent(name.value)}`), { messages: [{ role: "system", content: system.value }], ...whose });
      page.load();
    });
  });
  const page = new Listing("Models", "What is served, and how requests board it.", [["Models", cards], ["Deployments", deployments], ["Scheduling", scheduling, which], ["Pinned prefixes", pins, pin]]);
  which.addEventListener("change", () => page.load());
  return page;
}

export function canary() {
  const list = async () => {
    let found;
    try {
      found = (await get("admin/canary")).data;
    } catch (error) {
      if (error.code === "no_routes") return h("p", { class: "empty" }, error.message);
      throw error;
    }
    if (!found.length) return h("p", { class: "empty" }, "No canary runs. Try a deployment on a share of a route's traffic: it is stopped by itself when it is proven worse.");
    return found.map(trial);
  };
  const path = (one) => `admin/canary/${one.route.split("/").map(encodeURIComponent).join("/")}`;
  const change = async (one, body) => { await send("PATCH", path(one), body); await page.load(); };
  const trial = (one) => {
    const weight = h("input", { type: "range", min: 0, max: 100, value: 100 * one.weight, "aria-label": "Share of the traffic in percent" });
    const says = h("b", {}, percent(one.weight));
    weight.addEventListener("input", () => { says.textContent = `${weight.value} %`; });
    weight.addEventListener("change", () => change(one, { weight: weight.value / 100 }).catch((error) => note(error.message, "bad")));
    const end = (state, text, question) => button(text, async () => { if (await sure(question, text)) await change(one, { state }); }, state === "promoted" ? "main" : "danger");
    return h("article", { class: "trial" }, h("div", { class: "row" }, h("h3", {}, one.route), h("span", { class: `state ${one.state}` }, one.state.replace("_", " ")),
      h("span", { class: "dim" }, `${one.control} against ${one.canary}, since ${when(one.since)}`)),
    one.reason && h("p", { class: "bad" }, one.reason), analysis(one.analysis),
    h("div", { class: "row" }, one.state === "running" && [h("span", {}, "The canary gets ", says), weight],
      h("span", { class: "right row" }, one.state !== "promoted" && end("promoted", "Promote", `Send all traffic of ${one.route} to ${one.canary}?`), one.state !== "rolled_back" && end("rolled_back", "Roll back", `Send all traffic of ${one.route} to ${one.control}?`),
        one.state !== "running" && button("Forget", async () => { await ask(path(one), { method: "DELETE" }); await page.load(); }))));
  };
  const begin = button("Try a canary…", () => {
    const inputs = { route: h("input", { type: "text", required: true }), canary: h("input", { type: "text", required: true }), weight: h("input", { type: "number", min: 0, max: 100, step: "any", value: 5, required: true }) };
    enter("Try a canary", [field("Route", inputs.route), field("Deployment to try", inputs.canary), field("Percent of its traffic", inputs.weight)], "Begin", async () => {
      await send("PUT", path({ route: inputs.route.value }), { canary: inputs.canary.value, weight: inputs.weight.value / 100 });
      page.load();
    });
  });
  const page = new Listing("Canary", "A new deployment on a share of the traffic, with bounds that hold however often one looks.", [["Trials", list, begin]]);
  return page;
}

function analysis(found) {
  const ms = (value) => (value === null ? "–" : `${value.toPrecision(3)} ms`);
  const points = (value) => (value === null ? "–" : `${value > 0 ? "+" : ""}${value.toFixed(1)} %`);
  const rows = [["latency", found.latency], ["first token", found.ttft], ["between tokens", found.itl]];
  return table([
    ["", ([name]) => h("b", {}, name)], ["control", ([, one]) => ms(one.control_avg_ms), "number"], ["canary", ([, one]) => ms(one.canary_avg_ms), "number"],
    ["answers", ([, one]) => `${whole(one.control_samples)} / ${whole(one.canary_samples)}`, "number"], ["faster by", ([, one]) => points(one.typical_percent), "number"],
    ["surely between", ([, one]) => (one.low_percent === null ? "too early" : `${points(one.low_percent)} and ${points(one.high_percent)}`), "number"],
  ], rows, "");
}
