/**
 * The server's API. Addresses are relative, so that the page also works behind a proxy's prefix.
 */
import { events } from "./sse.js";

/**
 * @typedef {object} Model
 * @property {string} id
 * @property {string} task
 * @property {string} status loaded or unloaded
 * @property {{n_ctx_train: number | null, n_ctx: number | null, size: number, quantization: string}} meta
 */

/**
 * llama-server's numbers of one answer; times in milliseconds.
 *
 * @typedef {object} Timings
 * @property {number} cache_n tokens of the prompt that were cached
 * @property {number} prompt_n tokens of the prompt that ran
 * @property {number} prompt_ms
 * @property {number} predicted_n
 * @property {number} predicted_per_second
 * @property {number} queue_ms
 */

/**
 * @typedef {object} Chunk
 * @property {{delta: {content?: string, reasoning_content?: string}, finish_reason: string | null}[]} choices
 * @property {Timings} [timings]
 * @property {{message: string, code?: string}} [error]
 */

const KEY = "edgeformer.key"; // in sessionStorage: it ends with the tab

/** An answer that is an error, or none at all (`status` 0). */
export class ServerError extends Error {
  /**
   * @param {number} status
   * @param {string} message
   * @param {number | null} [retryAfter] seconds
   */
  constructor(status, message, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** @param {string} key */
export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

/**
 * @param {string} address
 * @param {RequestInit} options
 * @returns {Promise<Response>}
 * @throws {ServerError} the server cannot be reached, or answers with an error
 */
async function request(address, options) {
  const headers = new Headers(options.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(address, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const wait = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  throw new ServerError(response.status, await reason(response), Number.isNaN(wait) ? null : wait);
}

/** @param {Response} response */
async function reason(response) {
  try {
    const message = (await response.json()).error.message;
    if (typeof message === "string") return message;
  } catch {
    // A proxy's error page, for example.
  }
  return `The server answered with the status ${response.status} ${response.statusText}`.trim() + ".";
}

/**
 * The models that chat.
 *
 * @returns {Promise<Model[]>}
 */
export async function listModels() {
  const found = await (await request("v1/models", {})).json();
  return found.data.filter((/** @type {Model} */ one) => one.task === "text-generation");
}

/**
 * The chunks of a streamed answer.
 *
 * @param {Record<string, unknown>} body of POST /v1/chat/completions
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Chunk, void, void>}
 * @throws {ServerError}
 */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.body) throw new ServerError(0, "The answer has no body.");
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      /** @type {Chunk} */
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(500, chunk.error.message);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ServerError || signal.aborted) throw error;
    throw new ServerError(0, "The connection broke before the answer ended.");
  }
  throw new ServerError(0, "The connection ended before the answer did.");
}
