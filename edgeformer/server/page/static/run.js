/**
 * One answer that is being written.
 */
import { ServerError, streamChat } from "./api.js";
import { requestBody } from "./conversation.js";

/** @import { Conversation, Message } from "./conversation.js" */

export class Run {
  /**
   * @param {Conversation} conversation
   * @param {Message} message the answer, a child of its question
   * @param {() => void} changed called after each piece
   */
  constructor(conversation, message, changed) {
    this.conversation = conversation;
    this.message = message;
    this.changed = changed;
    this.control = new AbortController();
  }

  /** Ends the answer. The server sees that the connection closes, and frees its sequence. */
  stop() {
    this.control.abort();
  }

  /**
   * Reads the answer to its end, an error or `stop`; which of them stands in the message.
   *
   * @returns {Promise<void>}
   */
  async finish() {
    const { conversation, message } = this;
    try {
      const body = requestBody(conversation, message.parent ?? "");
      for await (const chunk of streamChat(body, this.control.signal)) {
        const choice = chunk.choices[0];
        if (choice?.delta.content) message.text += choice.delta.content;
        if (choice?.delta.reasoning_content) message.reasoning = (message.reasoning ?? "") + choice.delta.reasoning_content;
        if (choice?.finish_reason === "length") message.ending = "length";
        if (chunk.timings) message.timings = chunk.timings;
        this.changed();
      }
    } catch (error) {
      if (this.control.signal.aborted) {
        message.ending = "stopped";
        return;
      }
      message.ending = "error";
      message.error = error instanceof Error ? error.message : String(error);
      message.retryAfter = error instanceof ServerError ? error.retryAfter : null;
      this.status = error instanceof ServerError ? error.status : 0;
    }
  }
}

/** Prepares an answer for another try. @param {Message} message */
export function clear(message) {
  message.text = "";
  for (const name of /** @type {const} */ (["reasoning", "ending", "error", "retryAfter", "timings"])) delete message[name];
}
