/**
 * The page: which chat is shown, which answers run, and what every button does.
 */
import { listModels, ServerError } from "./api.js";
import { Composer } from "./composer.js";
import { add, choose, newConversation, newId, shown, UNNAMED } from "./conversation.js";
import { announce, byId, h, saveFile } from "./dom.js";
import { askForKey } from "./key.js";
import { MessageList } from "./messages.js";
import { clear, Run } from "./run.js";
import { startSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { exported, imported, isAboutChats, loadAll, remember, remembered, remove, save } from "./store.js";
import { Scroller } from "./scroller.js";

/** @import { Attachment, Conversation, Message } from "./conversation.js" */

const CURRENT = "edgeformer.current"; // in sessionStorage: a reload shows the same chat, a new tab begins one
const SAVED_EACH = 2000; // milliseconds, while an answer is written
const READ_ALOUD = 600; // characters of an answer

export class App {
  constructor() {
    this.conversations = loadAll();
    /** @type {Map<string, Run>} by the chat's id */
    this.runs = new Map();
    /** @type {import("./api.js").Model[]} */
    this.models = [];
    this.current = this.conversations.find((one) => one.id === sessionStorage.getItem(CURRENT)) ?? this.fresh();
    this.modelSelect = byId("model", HTMLSelectElement);
    this.problem = byId("problem", HTMLElement);
    this.scroller = new Scroller();
    this.messages = new MessageList(byId("messages", HTMLOListElement), {
      edit: (message, text) => this.ask(text, message.files ?? [], message.parent),
      regenerate: (message) => this.answer(message.parent ?? ""),
      retry: (message) => this.retry(message),
      choose: (message) => {
        choose(this.current, message);
        this.keep(this.current);
        this.show();
      },
    });
    this.composer = new Composer({
      send: (text, files) => this.ask(text, files, this.current.leaf),
      stop: () => this.runs.get(this.current.id)?.stop(),
      editLast: () => {
        const last = shown(this.current).findLast((one) => one.role === "user");
        if (last && !this.runs.has(this.current.id)) this.messages.edit(last);
      },
      tell: (problem) => this.tell(problem),
    });
    this.sidebar = new Sidebar({
      open: (conversation) => this.open(conversation),
      begin: () => this.open(this.fresh()),
      rename: (conversation, title) => {
        conversation.title = title;
        this.keep(conversation);
        this.show();
      },
      remove: (conversation) => this.remove(conversation),
    });
    startSettings(
      () => this.current.settings,
      (settings) => {
        this.current.settings = settings;
        remember("settings", JSON.stringify(settings));
        if (this.current.messages.length) this.keep(this.current);
        this.show();
      },
    );
    this.listen();
    this.show();
  }

  listen() {
    this.modelSelect.addEventListener("change", () => {
      this.current.model = this.modelSelect.value;
      remember("model", this.modelSelect.value);
      if (this.current.messages.length) this.keep(this.current);
    });
    document.addEventListener("keydown", (event) => {
      const isInDialog = document.querySelector("dialog[open]") !== null;
      if (event.key === "Escape" && !isInDialog) this.runs.get(this.current.id)?.stop();
    });
    addEventListener("storage", (event) => {
      if (isAboutChats(event)) this.reload();
    });
    addEventListener("pagehide", () => {
      for (const run of this.runs.values()) {
        if (!run.message.ending) run.message.ending = "stopped";
        this.keep(run.conversation);
      }
    });
    byId("export", HTMLButtonElement).addEventListener("click", () => this.export([this.current]));
    byId("export-all", HTMLButtonElement).addEventListener("click", () => this.export(this.conversations));
    const chooser = byId("import-file", HTMLInputElement);
    byId("import", HTMLButtonElement).addEventListener("click", () => chooser.click());
    chooser.addEventListener("change", async () => {
      if (chooser.files?.[0]) this.import(await chooser.files[0].text());
      chooser.value = "";
    });
  }

  // ------------------------------------------------------------------------------------------------------------ models

  /**
   * Asks the server for its models; a server that wants a key gets one from the user.
   *
   * @returns {Promise<void>}
   */
  async loadModels() {
    try {
      this.models = await listModels();
      this.tell(this.models.length ? "" : "This server has no model that generates text.");
    } catch (error) {
      if (error instanceof ServerError && error.status === 401 && (await askForKey())) return this.loadModels();
      this.tell(/** @type {Error} */ (error).message, () => this.loadModels());
    }
    this.modelSelect.replaceChildren(...this.models.map((one) => h("option", { value: one.id }, one.id)));
    this.chooseModel();
  }

  /** The chat's model, else the one that was chosen last, else the first. */
  chooseModel() {
    const isHere = (/** @type {string | null | undefined} */ name) => this.models.some((one) => one.id === name);
    const wanted = this.current.model;
    if (!isHere(wanted) && this.models.length) {
      const last = remembered("model");
      this.current.model = isHere(last) ? /** @type {string} */ (last) : this.models[0].id;
      if (wanted) this.tell(`This server has no model ${wanted}, which this chat was with. ${this.current.model} goes on.`);
    }
    this.modelSelect.disabled = !this.models.length;
    if (this.current.model) this.modelSelect.value = this.current.model;
  }

  // ------------------------------------------------------------------------------------------------------------- chats

  /** @returns {Conversation} a chat that is not in the list before its first question */
  fresh() {
    return newConversation(JSON.parse(remembered("settings") ?? "{}"), remembered("model") ?? undefined);
  }

  /** @param {Conversation} conversation */
  open(conversation) {
    this.current = conversation;
    this.tell("");
    this.chooseModel();
    this.show();
    this.scroller.toEnd();
    this.composer.focus();
  }

  /** Writes a chat to the storage. @param {Conversation} conversation */
  keep(conversation) {
    try {
      save(conversation);
    } catch (error) {
      this.tell(/** @type {Error} */ (error).message);
    }
  }

  /** @param {Conversation} conversation */
  remove(conversation) {
    this.runs.get(conversation.id)?.stop();
    remove(conversation.id);
    this.conversations = this.conversations.filter((one) => one !== conversation);
    if (conversation === this.current) this.open(this.fresh());
    else this.show();
    this.toast(`“${conversation.title}” is deleted.`, "Undo", () => {
      this.conversations.unshift(conversation);
      this.keep(conversation);
      this.open(conversation);
    });
  }

  /** Another tab has changed chats. Those that are answered here stay as they are. */
  reload() {
    const here = new Map(this.conversations.filter((one) => this.runs.has(one.id)).map((one) => [one.id, one]));
    this.conversations = loadAll().map((one) => here.get(one.id) ?? one);
    const isFresh = !this.current.messages.length;
    if (!isFresh) this.current = this.conversations.find((one) => one.id === this.current.id) ?? this.fresh();
    this.show();
  }

  /** @param {Conversation[]} conversations */
  export(conversations) {
    const found = conversations.filter((one) => one.messages.length);
    if (!found.length) return this.toast("There is nothing to export yet.");
    const name = found.length === 1 ? found[0].title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") : "chats";
    saveFile(`${name || "chat"}.json`, exported(found));
  }

  /** Adds the chats of a file. One whose id is here comes as a copy. @param {string} text */
  import(text) {
    try {
      const found = imported(text);
      const ids = new Set(this.conversations.map((one) => one.id));
      for (const one of found) if (ids.has(one.id)) one.id = newId();
      found.forEach(save);
      this.conversations = [...found, ...this.conversations].sort((one, other) => other.updated - one.updated);
      this.toast(`${found.length} ${found.length === 1 ? "chat" : "chats"} imported.`);
      if (found.length) this.open(found[0]);
    } catch (error) {
      this.tell(/** @type {Error} */ (error).message);
    }
  }

  // ----------------------------------------------------------------------------------------------------------- answers

  /**
   * Adds a question behind `parent`, and has it answered.
   *
   * @param {string} text
   * @param {Attachment[]} files
   * @param {string | null} parent
   */
  ask(text, files, parent) {
    const conversation = this.current;
    if (this.runs.has(conversation.id)) return;
    const question = add(conversation, { parent, role: "user", text, ...(files.length ? { files } : {}) });
    this.conversations = [conversation, ...this.conversations.filter((one) => one !== conversation)];
    this.answer(question.id);
  }

  /** Asks for one more answer to a question. @param {string} question its id */
  answer(question) {
    const conversation = this.current;
    if (this.runs.has(conversation.id)) return;
    const message = add(conversation, { parent: question, role: "assistant", text: "", model: conversation.model });
    this.write(conversation, message);
  }

  /** @param {Message} message an answer that failed */
  retry(message) {
    if (this.runs.has(this.current.id)) return;
    clear(message);
    message.model = this.current.model;
    this.write(this.current, message);
  }

  /** @param {Conversation} conversation @param {Message} message */
  async write(conversation, message) {
    let isDrawing = false;
    let saved = Date.now();
    const draw = () => {
      isDrawing = false;
      if (this.current === conversation && this.runs.has(conversation.id)) this.scroller.follow(() => this.messages.grow(message));
    };
    const run = new Run(conversation, message, () => {
      if (!isDrawing) requestAnimationFrame(draw); // once a frame, however fast the tokens come
      isDrawing = true;
      if (Date.now() - saved > SAVED_EACH) {
        saved = Date.now();
        this.keep(conversation);
      }
    });
    this.runs.set(conversation.id, run);
    this.tell("");
    this.keep(conversation);
    this.show();
    this.scroller.toEnd();
    this.composer.focus();
    announce("The answer is being written.");
    await run.finish();
    this.runs.delete(conversation.id);
    if (this.conversations.includes(conversation)) this.keep(conversation);
    this.scroller.follow(() => this.show());
    if (this.current === conversation) announce(spoken(message));
    if (run.status === 401 && (await askForKey()) && this.current === conversation) this.retry(message);
  }

  // ----------------------------------------------------------------------------------------------------------- showing

  show() {
    const { current } = this;
    const run = this.runs.get(current.id);
    const isEmpty = !current.messages.length;
    sessionStorage.setItem(CURRENT, current.id);
    document.title = current.title === UNNAMED ? "edgeformer" : `${current.title} – edgeformer`;
    byId("welcome", HTMLElement).hidden = !isEmpty;
    byId("export", HTMLButtonElement).disabled = isEmpty;
    const system = byId("system", HTMLDetailsElement);
    system.hidden = !current.settings.system;
    byId("system-text", HTMLElement).textContent = current.settings.system ?? "";
    this.messages.show(current, run?.message.id ?? null);
    this.sidebar.show(this.conversations, current, (one) => this.runs.has(one.id));
    this.composer.setRunning(run !== undefined);
    if (current.model && this.models.length) this.modelSelect.value = current.model;
  }

  /**
   * Says what went wrong above the message box; "" takes it away.
   *
   * @param {string} text
   * @param {() => void} [again]
   */
  tell(text, again) {
    this.problem.hidden = !text;
    const button = again ? h("button", { type: "button", class: "quiet-button", onclick: again }, "Try again") : null;
    this.problem.replaceChildren(h("p", {}, text), ...(button ? [button] : []));
  }

  /**
   * Says what was done; it stays until the next one, or until it is closed.
   *
   * @param {string} text
   * @param {string} [label] of a button
   * @param {() => void} [act]
   */
  toast(text, label, act) {
    const root = byId("toast", HTMLElement);
    const close = () => {
      root.hidden = true;
      root.replaceChildren();
    };
    const button = h("button", { type: "button", class: "quiet-button" }, label ?? "Close");
    button.addEventListener("click", () => {
      close();
      act?.();
    });
    root.hidden = false;
    root.replaceChildren(h("span", {}, text), button);
    if (act) button.focus(); // what was pressed may be gone
    if (!act) setTimeout(() => root.contains(button) && close(), 6000);
  }
}

/** What a screen reader says of an answer that has ended. @param {Message} message */
function spoken(message) {
  if (message.ending === "error") return `The answer failed: ${message.error}`;
  const long = message.text.length > READ_ALOUD ? " … The whole answer stands in the list of messages." : "";
  return `${message.ending === "stopped" ? "Stopped" : "Answer"}: ${message.text.slice(0, READ_ALOUD)}${long}`;
}
