// The life of a request as a bar: queue, prefill and decode of each of its sequences, with what held it.

import { h, seconds, whole } from "./dom.js";

const NAMES = { queue: "waited", prefill: "read its prompt", decode: "wrote" };
const MOST_CHUNKS = 200;
const WORTH_TELLING = 0.005;

/** What `/v1/requests/{id}` says, as a picture with the same in words beneath. */
export function life(state) {
  const facts = [
    ["state", state.state], ["waited", seconds(state.queue_seconds)], ["first token after", seconds(state.ttft_seconds)], ["in all", seconds(state.seconds)],
    ["tokens", `${whole(state.usage.prompt_tokens)} + ${whole(state.usage.completion_tokens)}`], ["preempted", state.preemptions ?? "–"],
  ];
  if (state.reason && state.state === "queued") facts.push(["waits because", state.reason]);
  return h("div", { class: "life" },
    (state.timeline ?? []).map((sequence, number) => bar(sequence, state.timeline.length > 1 ? number + 1 : 0)),
    h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))));
}

function bar(sequence, number) {
  const spans = sequence.spans;
  const lived = Object.values(sequence.seconds ?? {}).reduce((sum, one) => sum + one, 0);
  const end = Math.max(...spans.map((span) => span.end ?? span.begin), lived, 1e-6);
  const wide = (from, to) => `${Math.max(0, (100 * (to - from)) / end)}%`;
  const picture = h("div", { class: "bar", role: "img", "aria-label": words(sequence) });
  for (const span of spans) {
    const until = span.end ?? end;
    const part = h("div", { class: `span ${span.phase}`, title: sentence(span, until) });
    part.style.left = wide(0, span.begin);
    part.style.width = wide(span.begin, until);
    picture.append(part);
    for (const chunk of (span.chunks ?? []).slice(0, MOST_CHUNKS)) {
      if (span.phase !== "prefill") continue;
      const tick = h("i", { class: "chunk", title: `step ${chunk.step}: ${whole(chunk.count)} tokens` });
      tick.style.left = wide(0, chunk.end ?? chunk.begin);
      picture.append(tick);
    }
  }
  const waits = spans.flatMap((span) => span.waits ?? []).filter((one) => one.seconds > WORTH_TELLING);
  return h("div", { class: "sequence" }, number ? h("span", { class: "dim" }, `sequence ${number}`) : null, picture,
    h("p", { class: "legend" },
      Object.entries(NAMES).map(([phase, name]) => h("span", { class: "swatch" }, h("i", { class: phase }), `${name} ${seconds(sequence.seconds?.[phase])}`))),
    waits.length ? h("ul", { class: "waits" }, waits.map((one) => h("li", {}, h("b", {}, seconds(one.seconds)), " ", one.reason || one.holder))) : null);
}

function words(sequence) {
  return sequence.spans.map((span) => sentence(span, span.end)).join("; ");
}

function sentence(span, end) {
  const took = end === null || end === undefined ? "still" : `for ${seconds(end - span.begin)}`;
  const seat = span.seat === null || span.seat === undefined ? "" : ` in seat ${span.seat}`;
  const steps = span.first_step === null || span.first_step === undefined ? "" : `, steps ${span.first_step} to ${span.last_step ?? "now"}`;
  const cached = span.cached ? `, ${whole(span.cached)} tokens cached` : "";
  return `${NAMES[span.phase] ?? span.phase} ${took}${seat}${steps}${cached}`;
}
