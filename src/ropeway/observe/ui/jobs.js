// Requests, deferred jobs, batches and files: what there is, how far it is, and its end on demand.

import { ask, get, send } from "./api.js";
import { button, bytes, choice, enter, field, h, note, seconds, short, show, sure, table, when, whole } from "./dom.js";
import { Listing } from "./listing.js";
import { life } from "./timeline.js";

const OPEN_BATCH = ["validating", "in_progress", "finalizing"];
const ENDPOINTS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/score", "/v1/rerank"];

export function jobs() {
  let page = null;
  const act = (question, yes, method, path) => async () => {
    if (question && !(await sure(question, yes))) return;
    await ask(path, { method });
    await page.load();
  };
  const requests = async () => {
    const { data } = await get("v1/requests?limit=50");
    return table([
      ["Request", (one) => h("code", { title: one.id }, short(one.id))], ["State", (one) => state(one.state)], ["Model", (one) => one.model],
      ["Tokens", (one) => `${whole(one.usage.prompt_tokens)} + ${whole(one.usage.completion_tokens)}`, "number"],
      ["Waited", (one) => seconds(one.queue_seconds), "number"], ["First token", (one) => seconds(one.ttft_seconds), "number"], ["In all", (one) => seconds(one.seconds), "number"],
      ["Why it waits", (one) => one.reason], ["", (one) => h("span", { class: "row end" }, button("Life", () => story(one)),
        ["queued", "running"].includes(one.state) && button("Cancel", act(`End ${short(one.id)}?`, "End it", "DELETE", `v1/requests/${encodeURIComponent(one.id)}`), "danger"))],
    ], data, "No requests lately.");
  };
  const deferred = async () => {
    const { data } = await get("v1/jobs?limit=50");
    return table([
      ["Job", (one) => h("code", { title: one.id }, short(one.id))], ["State", (one) => state(one.status)], ["Endpoint", (one) => one.endpoint], ["Class", (one) => one.priority],
      ["Came", (one) => when(one.created_at)], ["Took", (one) => (one.ended_at && one.started_at ? seconds(one.ended_at - one.started_at) : null), "number"],
      ["", (one) => h("span", { class: "row end" }, button("Answer", async () => show("Job", h("pre", { class: "code" }, JSON.stringify(await get(`v1/jobs/${one.id}`), null, 2)))),
        ["queued", "in_progress"].includes(one.status)
          ? button("Cancel", act("End this job?", "End it", "POST", `v1/jobs/${one.id}/cancel`), "danger")
          : button("Delete", act("Delete this job and its answer?", "Delete", "DELETE", `v1/jobs/${one.id}`), "danger"))],
    ], data, 'No deferred requests. A request that says "deferred": true becomes one.');
  };
  const batches = async () => {
    const { data } = await get("v1/batches?limit=50");
    return table([
      ["Batch", (one) => h("code", { title: one.id }, short(one.id))], ["State", (one) => state(one.status)], ["Endpoint", (one) => one.endpoint],
      ["Done", (one) => progress(one.request_counts)], ["Failed", (one) => whole(one.request_counts.failed), "number"], ["Came", (one) => when(one.created_at)],
      ["Ready", (one) => one.estimated_completion ?? (one.completed_at ? when(one.completed_at) : null)],
      ["", (one) => h("span", { class: "row end" },
        one.errors?.data?.length ? button("Errors", () => show("What is wrong with the file", h("ul", {}, one.errors.data.map((e) => h("li", {}, `${e.line ? `line ${e.line}: ` : ""}${e.message}`))))) : null,
        one.output_file_id && button("Output", () => download(one.output_file_id, `${one.id}.jsonl`)), one.error_file_id && button("Failures", () => download(one.error_file_id, `${one.id}-errors.jsonl`)),
        OPEN_BATCH.includes(one.status) && button("Cancel", act(`End the batch ${short(one.id)}? What it has answered stays.`, "End it", "POST", `v1/batches/${one.id}/cancel`), "danger"))],
    ], data, "No batches. Upload a file of requests, one JSON object a line, to begin one.");
  };
  const files = async () => {
    const { data } = await get("v1/files?limit=50");
    return table([
      ["File", (one) => h("code", { title: one.id }, short(one.id))], ["Name", (one) => one.filename], ["For", (one) => one.purpose], ["Size", (one) => bytes(one.bytes), "number"], ["Came", (one) => when(one.created_at)],
      ["", (one) => h("span", { class: "row end" }, button("Download", () => download(one.id, one.filename)), button("Delete", act(`Delete ${one.filename}?`, "Delete", "DELETE", `v1/files/${one.id}`), "danger"))],
    ], data, "No files.");
  };
  page = new Listing("Requests and jobs", "What clients wait for, and what nobody waits for. With a client's key you see what is its own.", [
    ["Requests", requests], ["Batches", batches, button("New batch…", () => upload(page))], ["Deferred requests", deferred], ["Files", files],
  ]);
  return page;
}

async function story(one) {
  show(`Request ${short(one.id)}`, life(await get(`v1/requests/${encodeURIComponent(one.id)}`)));
}

function state(text) {
  return h("span", { class: `state ${text}` }, text.replaceAll("_", " "));
}

function progress({ total, completed, failed }) {
  const done = completed + failed;
  return h("span", { class: "row" }, h("progress", { max: total || 1, value: done, "aria-label": "Done" }), `${whole(done)} of ${whole(total)}`);
}

async function download(id, name) {
  const blob = await (await ask(`v1/files/${id}/content`)).blob();
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function upload(page) {
  const file = h("input", { type: "file", accept: ".jsonl", required: true });
  const endpoint = choice(ENDPOINTS, ENDPOINTS[0]);
  const span = choice(["1h", "24h", "7d"], "24h");
  enter("New batch", [field("File of requests, one JSON object a line", file), field("Endpoint", endpoint), field("Has time until", span)], "Begin", async () => {
    const sent = new FormData();
    sent.append("purpose", "batch");
    sent.append("file", file.files[0]);
    const { id } = await send("POST", "v1/files", sent);
    await send("POST", "v1/batches", { input_file_id: id, endpoint: endpoint.value, completion_window: span.value });
    note("The batch has begun.");
    page.load();
  });
}
