// The server: the same endpoints that every client uses.

/** What the server refused, in its own words. */
export class Refusal extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The connection ended before the answer did, or there was none. */
export class Lost extends Error {
  constructor(begun) {
    super(
      begun
        ? "The connection broke off before the answer was finished: the server ended, or cannot be reached any more. What came until then is kept."
        : "The server cannot be reached. Look whether it still runs, and start it again if not.",
    );
  }
}

const KEY = "edgephi.key";

export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return unkept;
  }
}

let unkept = ""; // where the browser keeps nothing

export function setKey(value) {
  unkept = value;
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    // it holds until the page is left
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Lost(false);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    const said = body?.error?.message ?? `no reason, and status ${response.status}`;
    throw new Refusal(said, response.status, response.headers.get("retry-after"));
  }
  return response;
}

/** All models, as /v1/models lists them. None is loaded for it. */
export async function models() {
  return (await (await ask("v1/models")).json()).data;
}

/**
 * The chunks of an answer.
 * Throws Refusal, Lost, or AbortError when `signal` is.
 */
export async function* chat(request, signal) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const { name, data } of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (name === "error" || chunk.error) throw new Refusal(chunk.error?.message ?? "an error without words", null, null);
    yield chunk;
  }
  throw new Lost(true);
}

/** Server-sent events of a body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (problem) {
        if (problem.name === "AbortError") throw problem;
        throw new Lost(true);
      }
      if (part.done) return;
      rest += part.value;
      for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
        const lines = rest.slice(0, end).split("\n");
        const name = lines.find((line) => line.startsWith("event: "))?.slice(7);
        const data = lines.filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
        if (data.length) yield { name, data: data.join("\n") };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
