/**
 * Conversations in localStorage, one entry each, and as JSON files. What comes from a file is checked field by field.
 */

/** @import { Attachment, Conversation, Message, Settings } from "./conversation.js" */

const PREFIX = "edgeformer.chat.";
const FORMAT = "edgeformer-chats";

/**
 * A value of the page's own, such as the last model.
 *
 * @param {string} name
 * @returns {string | null}
 */
export function remembered(name) {
  return localStorage.getItem(`edgeformer.${name}`);
}

/**
 * @param {string} name
 * @param {string} value
 */
export function remember(name, value) {
  localStorage.setItem(`edgeformer.${name}`, value);
}

/** All conversations, the newest first. Damaged entries are left where they are. @returns {Conversation[]} */
export function loadAll() {
  const found = [];
  for (let number = 0; number < localStorage.length; number++) {
    const key = localStorage.key(number) ?? "";
    if (!key.startsWith(PREFIX)) continue;
    try {
      found.push(checkConversation(JSON.parse(localStorage.getItem(key) ?? "")));
    } catch (error) {
      console.warn(`${key} cannot be read`, error);
    }
  }
  return found.sort((one, other) => other.updated - one.updated);
}

/**
 * @param {Conversation} conversation
 * @throws {Error} the browser's storage is full
 */
export function save(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
  } catch (error) {
    throw new Error("The browser's storage is full: export and delete some chats.", { cause: error });
  }
}

/** @param {string} id */
export function remove(id) {
  localStorage.removeItem(PREFIX + id);
}

/** Whether a storage event of another tab is about conversations. @param {StorageEvent} event */
export function isAboutChats(event) {
  return event.key === null || event.key.startsWith(PREFIX);
}

/** @param {Conversation[]} conversations @returns {string} the text of a file */
export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/**
 * The conversations of a file.
 *
 * @param {string} text
 * @returns {Conversation[]}
 * @throws {Error} it is no export of this page
 */
export function imported(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (value?.format !== FORMAT || value.version !== 1 || !Array.isArray(value.conversations)) {
    throw new Error(`The file is no export of this page: it has no "format": "${FORMAT}" of version 1.`);
  }
  return value.conversations.map(checkConversation);
}

// ------------------------------------------------------------------------------------------------------------- checks

/** @param {boolean} holds @param {string} what */
function expect(holds, what) {
  if (!holds) throw new Error(`A chat of the file is damaged: ${what}.`);
}

/** @param {unknown} value @param {string} what @returns {string} */
function text(value, what) {
  expect(typeof value === "string", `${what} is no text`);
  return /** @type {string} */ (value);
}

/** @param {unknown} value @param {string} what @returns {unknown[]} */
function list(value, what) {
  expect(Array.isArray(value), `${what} is no list`);
  return /** @type {unknown[]} */ (value);
}

/** The entries whose values are finite numbers. @param {unknown} value @returns {Record<string, number>} */
function numbers(value) {
  const entries = Object.entries(value ?? {}).filter(([, one]) => Number.isFinite(one));
  return Object.fromEntries(entries);
}

/** @param {any} value @returns {Conversation} */
function checkConversation(value) {
  expect(typeof value === "object" && value !== null, "it is no object");
  const messages = list(value.messages, "messages").map(checkMessage);
  const ids = new Set();
  for (const one of messages) {
    expect(one.parent === null || ids.has(one.parent), `message ${one.id} stands before its parent`);
    expect(!ids.has(one.id), `message ${one.id} is there twice`);
    ids.add(one.id);
  }
  expect(value.leaf === null ? !messages.length : ids.has(value.leaf), "its last message is missing");
  /** @type {Settings} */
  const settings = { numbers: numbers(value.settings?.numbers) };
  if (value.settings?.system) settings.system = text(value.settings.system, "the system prompt");
  if (value.settings?.stop) settings.stop = list(value.settings.stop, "stop").map((one) => text(one, "stop"));
  return {
    id: text(value.id, "id"),
    title: text(value.title, "title"),
    updated: Number.isFinite(value.updated) ? value.updated : Date.now(),
    model: typeof value.model === "string" ? value.model : undefined,
    settings,
    messages,
    leaf: value.leaf,
  };
}

/** @param {any} value @returns {Message} */
function checkMessage(value) {
  expect(typeof value === "object" && value !== null, "a message is no object");
  expect(value.role === "user" || value.role === "assistant", "a message has another role than user or assistant");
  /** @type {Message} */
  const found = {
    id: text(value.id, "a message's id"),
    parent: value.parent === null ? null : text(value.parent, "a message's parent"),
    role: value.role,
    text: text(value.text, "a message's text"),
  };
  if (value.reasoning) found.reasoning = text(value.reasoning, "reasoning");
  if (value.model) found.model = text(value.model, "a message's model");
  if (value.files) found.files = list(value.files, "files").map(checkFile);
  if (["stopped", "length", "error"].includes(value.ending)) found.ending = value.ending;
  if (value.error) found.error = text(value.error, "an error");
  if (value.timings) found.timings = /** @type {any} */ (numbers(value.timings));
  return found;
}

/** @param {any} value @returns {Attachment} */
function checkFile(value) {
  return { name: text(value?.name, "a file's name"), text: text(value?.text, "a file's text") };
}
