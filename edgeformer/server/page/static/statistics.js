/**
 * The numbers under an answer, from the server's own timings.
 */

/** @import { Message } from "./conversation.js" */

/**
 * Which model answered, how many tokens at what speed, how much of the prompt was cached, and the time to the first.
 *
 * @param {Message} message
 * @returns {string} "" without numbers
 */
export function statistics(message) {
  const timings = message.timings;
  if (!timings) return "";
  const prompt = timings.cache_n + timings.prompt_n;
  const first = timings.queue_ms + timings.prompt_ms;
  const parts = [
    message.model ?? "",
    `${count(timings.predicted_n)} ${timings.predicted_n === 1 ? "token" : "tokens"}`,
    timings.predicted_n > 1 ? `${rounded(timings.predicted_per_second)} tokens/s` : "",
    `${count(timings.cache_n)} of ${count(prompt)} prompt tokens cached`,
    `first token after ${first >= 1000 ? `${(first / 1000).toFixed(1)} s` : `${Math.round(first)} ms`}`,
  ];
  return parts.filter(Boolean).join(" · ");
}

/** @param {number} value */
function count(value) {
  return value.toLocaleString("en");
}

/** @param {number} value */
function rounded(value) {
  return value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(1);
}
