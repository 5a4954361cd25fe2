/**
 * The box where questions are written: keys, attached files, and the button that sends or stops.
 */
import { announce, byId, h, icon, iconButton } from "./dom.js";

/** @import { Attachment } from "./conversation.js" */

const LARGEST = 1 << 20; // bytes of a file: more than any context holds

export class Composer {
  /**
   * @param {object} actions
   * @param {(text: string, files: Attachment[]) => void} actions.send
   * @param {() => void} actions.stop
   * @param {() => void} actions.editLast
   * @param {(problem: string) => void} actions.tell
   */
  constructor(actions) {
    this.actions = actions;
    this.question = byId("question", HTMLTextAreaElement);
    this.button = byId("send", HTMLButtonElement);
    this.list = byId("files", HTMLUListElement);
    /** @type {Attachment[]} */
    this.files = [];
    this.isRunning = false;
    this.listen();
  }

  listen() {
    const chooser = byId("attach-file", HTMLInputElement);
    const frame = byId("composer", HTMLElement);
    this.question.addEventListener("input", () => this.show());
    this.question.addEventListener("keydown", (event) => this.key(event));
    this.question.addEventListener("paste", (event) => {
      const files = event.clipboardData?.files;
      if (!files?.length) return;
      event.preventDefault();
      this.attach(files);
    });
    this.button.addEventListener("click", () => (this.isRunning ? this.actions.stop() : this.send()));
    byId("attach", HTMLButtonElement).addEventListener("click", () => chooser.click());
    chooser.addEventListener("change", async () => {
      await this.attach(chooser.files ?? []);
      chooser.value = "";
    });
    // Over the whole page, so that a file that misses the box does not replace the page.
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      frame.classList.add("drop");
    });
    document.addEventListener("dragleave", () => frame.classList.remove("drop"));
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      frame.classList.remove("drop");
      this.attach(event.dataTransfer?.files ?? []);
    });
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (event.isComposing) return; // Enter ends the word of an input method
    const isTouch = matchMedia("(pointer: coarse)").matches; // its keyboard has no Shift+Enter
    if (event.key === "Enter" && !event.shiftKey && !isTouch) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && !this.question.value) {
      event.preventDefault();
      this.actions.editLast();
    }
  }

  send() {
    const text = this.question.value.trim();
    if (this.isRunning) announce("An answer is being written. Escape stops it.");
    if (this.isRunning || (!text && !this.files.length)) return;
    const files = this.files;
    this.question.value = "";
    this.files = [];
    this.show();
    this.actions.send(text, files);
  }

  /**
   * Adds the texts of files.
   *
   * @param {Iterable<File>} files
   */
  async attach(files) {
    for (const file of files) {
      if (file.size > LARGEST) {
        this.actions.tell(`${file.name} has ${(file.size / LARGEST).toFixed(1)} MiB; a file may have 1 MiB.`);
        continue;
      }
      try {
        const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
        if (text.includes("\0")) throw new TypeError("binary");
        this.files.push({ name: file.name, text });
      } catch {
        this.actions.tell(`${file.name} is no text in UTF-8. The models here read text alone.`);
      }
    }
    this.show();
    this.focus();
  }

  /** @param {boolean} isRunning */
  setRunning(isRunning) {
    const hadFocus = document.activeElement === this.button; // which loses it when it is disabled
    this.isRunning = isRunning;
    this.show();
    if (hadFocus && this.button.disabled) this.focus();
  }

  /** Not on a touch screen, where it would open the keyboard over the messages. */
  focus() {
    if (!matchMedia("(pointer: coarse)").matches) this.question.focus();
  }

  show() {
    const { question, button, list } = this;
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight}px`;
    const label = this.isRunning ? "Stop" : "Send";
    if (button.title !== label || !button.dataset.shown) {
      button.dataset.shown = "yes";
      button.title = label;
      button.setAttribute("aria-label", label);
      button.replaceChildren(icon(this.isRunning ? "stop" : "up"));
    }
    button.disabled = !this.isRunning && !question.value.trim() && !this.files.length;
    list.hidden = !this.files.length;
    list.replaceChildren(
      ...this.files.map((file) =>
        h("li", {}, h("span", {}, file.name), iconButton("close", `Remove ${file.name}`, () => this.detach(file))),
      ),
    );
  }

  /** @param {Attachment} file */
  detach(file) {
    this.files = this.files.filter((one) => one !== file);
    this.show();
    this.focus();
  }
}
