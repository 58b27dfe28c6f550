// Calls to this server, with the keys that were typed into the page. They stay in this tab alone.

const ROOT = new URL("../", document.baseURI);
const OPERATOR = [/^admin\//, /^v1\/requests(\/|$)/, /^v1\/usage(\/|$)/, /^ui\/feed$/];
const MOST = 8 << 20;

export class HttpError extends Error {
  constructor(status, code, message, retryAfter) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

export const keys = {
  get(which) {
    try { return sessionStorage.getItem(`ropeway.${which}`) ?? ""; } catch { return memory[which] ?? ""; }
  },
  set(which, value) {
    memory[which] = value;
    try {
      if (value) sessionStorage.setItem(`ropeway.${which}`, value);
      else sessionStorage.removeItem(`ropeway.${which}`);
    } catch { /* a browser that keeps nothing: until the tab is closed */ }
    dispatchEvent(new Event("keys"));
  },
};
const memory = {};

function keyFor(path) {
  const name = path.split("?")[0];
  const shared = OPERATOR.some((pattern) => pattern.test(name));
  return (shared && keys.get("admin")) || keys.get("client");
}

/** A response that is fine. Raises HttpError for one that is not, and TypeError where no server answers. */
export async function ask(path, { method = "GET", body, headers = {}, signal } = {}) {
  if (path.startsWith("admin/") && !keys.get("admin")) throw new HttpError(401, null, "This is the administrator's.");
  const key = keyFor(path);
  const sent = { ...headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  if (body !== undefined && !(body instanceof FormData)) {
    sent["content-type"] = "application/json";
    body = JSON.stringify(body);
  }
  const response = await fetch(new URL(path, ROOT), { method, body, headers: sent, signal, cache: "no-store", credentials: "omit" });
  if (response.ok) return response;
  let told = {};
  try { told = (await response.json()).error ?? {}; } catch { /* not ours: the status has to do */ }
  const later = Number(response.headers.get("retry-after")) || null;
  throw new HttpError(response.status, told.code ?? null, told.message ?? `The server answered ${response.status}.`, later);
}

export const get = async (path, options) => (await ask(path, options)).json();
export const send = async (method, path, body) => (await ask(path, { method, body })).json();

/** The server-sent events of a response: {event, data}. Comments come as {comment}, so that a reader sees it lives. */
export async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      let end;
      while ((end = rest.search(/\r?\n\r?\n/)) >= 0) {
        const block = rest.slice(0, end);
        rest = rest.slice(end).replace(/^\r?\n\r?\n/, "");
        yield parse(block);
      }
      if (done) return;
      if (rest.length > MOST) throw new Error("The server sent an event that is larger than 8 MiB.");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  const found = { event: "message", data: "", comment: null };
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    const colon = line.indexOf(":");
    if (colon === 0) { found.comment = line.slice(1).trim(); continue; }
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") data.push(value);
    else if (name === "event") found.event = value;
  }
  found.data = data.join("\n");
  return found;
}
