// Calls of the server, with the key of this tab.

const KEY = "ledom-key";
let key = stored();

function stored() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // the browser forbids storage
  }
}

/** Use a key for all further calls of this tab; an empty one is forgotten. */
export function useKey(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  } catch {
    // it stays in memory
  }
}

export const hasKey = () => key !== "";

/** An error that the server reports. param: the field of the request that is wrong. */
export class ServerError extends Error {
  constructor(status, detail) {
    super(detail.message);
    Object.assign(this, { status, param: detail.param ?? null, code: detail.code ?? null });
  }
}

async function request(path, options) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (/[^\x20-\x7e]/u.test(key)) throw new ServerError(401, { message: "the API key has characters that no header can have" });
    throw new Error("The server does not answer. It may have ended: start `ledom serve` again, then repeat.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let detail = null;
  try {
    detail = (await response.json()).error;
  } catch {
    // no JSON: something between page and server answers
  }
  const error = new ServerError(response.status, detail ?? { message: `status ${response.status} without a reason` });
  if (response.status === 401) document.dispatchEvent(new CustomEvent("key-refused", { detail: error.message }));
  return error;
}

const postOptions = (body, signal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal,
});

/** Return the JSON of a GET request. */
export async function get(path) {
  return (await request(path, {})).json();
}

/** Return the JSON of a POST request. */
export async function post(path, body, signal) {
  return lost(async () => (await request(path, postOptions(body, signal))).json());
}

/** Yield the events of a streamed completion. */
export async function* stream(path, body, signal) {
  const response = await request(path, postOptions({ ...body, stream: true }, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await lost(() => reader.read());
    if (done) throw new Error("The connection ended before the text was complete. Is the server still running?");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((one) => one.startsWith("data: "))) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ServerError(200, event.error);
      yield event;
    }
  }
}

/** Await a read of a response, and explain a lost connection. */
async function lost(read) {
  try {
    return await read();
  } catch (error) {
    if (error instanceof TypeError) throw new Error("The connection to the server was lost. Is it still running?");
    throw error;
  }
}
