/**
 * A conversation is a tree: an edited question and a repeated answer stand beside the earlier ones. `leaf` is the last
 * message of the branch that is shown.
 */

/**
 * @typedef {object} Attachment
 * @property {string} name
 * @property {string} text
 */

/**
 * @typedef {object} Message
 * @property {string} id
 * @property {string | null} parent
 * @property {"user" | "assistant"} role
 * @property {string} text
 * @property {string} [reasoning]
 * @property {Attachment[]} [files]
 * @property {string} [model]
 * @property {import("./api.js").Timings} [timings]
 * @property {"stopped" | "length" | "error"} [ending] without it the model ended the answer
 * @property {string} [error] what the server said
 * @property {number | null} [retryAfter] seconds
 */

/**
 * Settings of a conversation: a number is a field of the request by that name; what is missing is the server's choice.
 *
 * @typedef {object} Settings
 * @property {string} [system]
 * @property {string[]} [stop]
 * @property {Record<string, number>} [numbers]
 */

/**
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} title
 * @property {number} updated milliseconds since 1970
 * @property {string} [model]
 * @property {Settings} settings
 * @property {Message[]} messages in the order in which they were made
 * @property {string | null} leaf
 */

export const UNNAMED = "New chat";
const TITLE = 60; // characters

/** A new id. crypto.randomUUID is missing where the page is not a secure context. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/**
 * @param {Settings} settings
 * @param {string} [model]
 * @returns {Conversation}
 */
export function newConversation(settings, model) {
  return { id: newId(), title: UNNAMED, updated: Date.now(), model, settings, messages: [], leaf: null };
}

/**
 * The messages from the first to `id`.
 *
 * @param {Conversation} conversation
 * @param {string | null} id
 * @returns {Message[]}
 */
export function pathTo(conversation, id) {
  const byId = new Map(conversation.messages.map((one) => [one.id, one]));
  const found = [];
  for (let one = id === null ? undefined : byId.get(id); one; ) {
    byId.delete(one.id); // an imported circle ends here
    found.push(one);
    one = one.parent === null ? undefined : byId.get(one.parent);
  }
  return found.reverse();
}

/** @param {Conversation} conversation @returns {Message[]} the messages that are shown */
export function shown(conversation) {
  return pathTo(conversation, conversation.leaf);
}

/**
 * Adds a message, and shows it. The first question gives an unnamed conversation its title.
 *
 * @param {Conversation} conversation
 * @param {Omit<Message, "id">} message
 * @returns {Message}
 */
export function add(conversation, message) {
  const made = { id: newId(), ...message };
  conversation.messages.push(made);
  conversation.leaf = made.id;
  conversation.updated = Date.now();
  if (conversation.title === UNNAMED && message.role === "user") {
    const line = (message.text || message.files?.[0]?.name || "").replace(/\s+/g, " ").trim();
    if (line) conversation.title = line.length > TITLE ? line.slice(0, TITLE - 1).trimEnd() + "…" : line;
  }
  return made;
}

/**
 * The versions of a message: those with the same parent and role.
 *
 * @param {Conversation} conversation
 * @param {Message} message
 * @returns {Message[]}
 */
export function versions(conversation, message) {
  return conversation.messages.filter((one) => one.parent === message.parent && one.role === message.role);
}

/**
 * Shows the branch through `message` that is newest.
 *
 * @param {Conversation} conversation
 * @param {Message} message
 */
export function choose(conversation, message) {
  let leaf = message;
  for (const one of conversation.messages) if (one.parent === leaf.id) leaf = one; // children come behind their parent
  conversation.leaf = leaf.id;
}

/**
 * The text of a message with its attached files, as the model gets it.
 *
 * @param {Message} message
 * @returns {string}
 */
export function fullText(message) {
  const files = (message.files ?? []).map(({ name, text }) => {
    // A fence longer than any in the file.
    const longest = Math.max(2, ...Array.from(text.matchAll(/^ {0,3}(`{3,})/gm), (found) => found[1].length));
    const fence = "`".repeat(longest + 1);
    return `File ${name}:\n${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
  });
  return [...files, message.text].filter(Boolean).join("\n\n");
}

/**
 * The body of the request for the answer to the message `id`.
 *
 * @param {Conversation} conversation
 * @param {string} id
 * @returns {Record<string, unknown>}
 */
export function requestBody(conversation, id) {
  const { system, stop, numbers } = conversation.settings;
  /** @type {Record<string, string>[]} */
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const one of pathTo(conversation, id)) {
    const last = messages.at(-1);
    if (one.role === "assistant") {
      if (!one.text && !one.reasoning) continue; // an error, or stopped before it began
      messages.push({ role: "assistant", content: one.text });
      if (one.reasoning) messages[messages.length - 1].reasoning_content = one.reasoning;
    } else if (last?.role === "user") {
      last.content += `\n\n${fullText(one)}`; // many templates want the roles by turns
    } else messages.push({ role: "user", content: fullText(one) });
  }
  return { model: conversation.model, messages, ...numbers, ...(stop?.length ? { stop } : {}) };
}
