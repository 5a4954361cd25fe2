/**
 * The list of messages: an element for each that stays the same element while the message changes.
 */
import { fullText, shown, versions } from "./conversation.js";
import { copyButton, h, iconButton } from "./dom.js";
import { MarkdownView } from "./render.js";
import { statistics } from "./statistics.js";

/** @import { Conversation, Message } from "./conversation.js" */

/**
 * What the buttons of a message do.
 *
 * @typedef {object} Actions
 * @property {(message: Message, text: string) => void} edit asks again with another text
 * @property {(message: Message) => void} regenerate
 * @property {(message: Message) => void} retry after an error
 * @property {(message: Message) => void} choose shows this version
 */

/** @typedef {{element: HTMLElement, update: (message: Message, isRunning: boolean) => void, tools: HTMLElement}} View */

export class MessageList {
  /**
   * @param {HTMLElement} root
   * @param {Actions} actions
   */
  constructor(root, actions) {
    this.root = root;
    this.actions = actions;
    /** @type {Map<string, View>} */
    this.views = new Map();
  }

  /**
   * Shows the branch of a conversation.
   *
   * @param {Conversation} conversation
   * @param {string | null} running the message that is being written
   */
  show(conversation, running) {
    const messages = shown(conversation);
    const kept = new Set(messages.map((one) => one.id));
    for (const [id, view] of this.views) {
      if (kept.has(id)) continue;
      view.element.remove();
      this.views.delete(id);
    }
    messages.forEach((message, number) => {
      let view = this.views.get(message.id);
      if (!view) {
        view = message.role === "user" ? questionView(message, this.actions) : answerView(message, this.actions);
        this.views.set(message.id, view);
      }
      if (this.root.children[number] !== view.element) this.root.insertBefore(view.element, this.root.children[number] ?? null);
      view.update(message, message.id === running);
      versionButtons(view.tools, versions(conversation, message), message, this.actions);
    });
  }

  /** Shows what is new of one message. @param {Message} message */
  grow(message) {
    this.views.get(message.id)?.update(message, true);
  }

  /** Opens the editor of a question. @param {Message} message */
  edit(message) {
    const button = this.views.get(message.id)?.element.querySelector(".edit");
    if (button instanceof HTMLElement) button.click();
  }
}

/**
 * `‹ 1/2 ›` in front of a message's buttons, where it has several versions.
 *
 * @param {HTMLElement} tools
 * @param {Message[]} all
 * @param {Message} message
 * @param {Actions} actions
 */
function versionButtons(tools, all, message, actions) {
  const state = all.map((one) => one.id).join();
  if (tools.dataset.versions === state) return;
  tools.dataset.versions = state;
  tools.querySelector(".versions")?.remove();
  if (all.length < 2) return;
  const place = all.indexOf(message);
  const earlier = iconButton("before", "Earlier version", () => actions.choose(all[place - 1]), { disabled: place === 0 });
  const later = iconButton("after", "Later version", () => actions.choose(all[place + 1]), {
    disabled: place === all.length - 1,
  });
  tools.prepend(h("span", { class: "versions" }, earlier, h("span", {}, `${place + 1}/${all.length}`), later));
}

/** @param {Message} message @param {Actions} actions @returns {View} */
function questionView(message, actions) {
  const bubble = h("div", { class: "bubble" });
  for (const file of message.files ?? []) {
    bubble.append(h("details", { class: "file" }, h("summary", {}, file.name), h("pre", { tabindex: 0 }, file.text)));
  }
  if (message.text) bubble.append(h("p", { class: "question-text" }, message.text));
  const editButton = iconButton("edit", "Edit this message", () => openEditor(), { class: "icon-button edit" });
  const tools = h("div", { class: "tools" }, copyButton("Copy this message", () => fullText(message)), editButton);
  const element = h("li", { class: "message question" }, h("h2", { class: "visually-hidden" }, "You"), bubble, tools);

  function openEditor() {
    const area = h("textarea", { class: "editor-text", "aria-label": "Edit the message", rows: 3 });
    area.value = message.text;
    const close = () => {
      editor.remove();
      bubble.hidden = tools.hidden = false;
      editButton.focus();
    };
    const send = () => {
      const text = area.value.trim();
      if (!text && !message.files?.length) return;
      close();
      actions.edit(message, text);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation(); // it does not stop an answer too
        close();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    const row = h(
      "div",
      { class: "editor-row" },
      h("button", { type: "button", class: "quiet-button", onclick: close }, "Cancel"),
      h("button", { type: "button", class: "main-button", onclick: send }, "Ask again"),
    );
    const editor = h("div", { class: "editor" }, area, row);
    bubble.hidden = tools.hidden = true;
    element.append(editor);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  return { element, tools, update: () => {} };
}

/** @param {Message} first @param {Actions} actions @returns {View} */
function answerView(first, actions) {
  let message = first;
  const reasoningTitle = h("summary", {}, "Reasoning");
  const reasoningText = h("div", { class: "reasoning-text" });
  const reasoning = h("details", { class: "reasoning", hidden: true }, reasoningTitle, reasoningText);
  const text = h("div", { class: "answer-text" });
  const markdown = new MarkdownView(text);
  const waiting = h("span", { class: "waiting", "aria-hidden": "true" }, h("i"), h("i"), h("i"));
  const note = h("p", { class: "note", hidden: true });
  const problem = h("div", { class: "problem", hidden: true });
  const numbers = h("p", { class: "statistics", hidden: true });
  const copy = copyButton("Copy this answer", () => message.text);
  const again = iconButton("again", "Answer again", () => actions.regenerate(message), { class: "icon-button again" });
  const tools = h("div", { class: "tools" }, copy, again, numbers);
  const element = h(
    "li",
    { class: "message answer" },
    h("h2", { class: "visually-hidden" }, "Answer"),
    reasoning,
    text,
    waiting,
    note,
    problem,
    tools,
  );

  /** @param {Message} changed @param {boolean} isRunning */
  function update(changed, isRunning) {
    message = changed;
    element.setAttribute("aria-busy", String(isRunning));
    reasoning.hidden = !message.reasoning;
    reasoningTitle.textContent = isRunning && !message.text ? "Reasoning …" : "Reasoning";
    reasoningText.textContent = message.reasoning ?? "";
    markdown.update(message.text);
    waiting.hidden = !isRunning;
    note.hidden = message.ending !== "stopped" && message.ending !== "length";
    note.textContent =
      message.ending === "stopped" ? "Stopped." : "Cut: the limit of tokens is reached, or the context is full.";
    problem.hidden = message.ending !== "error";
    if (message.ending === "error") problem.replaceChildren(...problemNodes(message, actions));
    tools.hidden = isRunning;
    copy.hidden = !message.text;
    const shownNumbers = statistics(message);
    numbers.hidden = !shownNumbers;
    numbers.textContent = shownNumbers;
  }

  return { element, tools, update };
}

/** @param {Message} message @param {Actions} actions */
function problemNodes(message, actions) {
  const wait = message.retryAfter ? ` Try again in ${message.retryAfter} s.` : "";
  return [
    h("p", {}, (message.error ?? "The answer failed.") + wait),
    h("button", { type: "button", class: "quiet-button retry", onclick: () => actions.retry(message) }, "Try again"),
  ];
}
