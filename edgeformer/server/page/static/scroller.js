/**
 * Keeps the end of the messages in view while an answer grows, unless the reader has scrolled up.
 */
import { byId } from "./dom.js";

const NEAR = 60; // pixels from the end that count as being there

export class Scroller {
  constructor() {
    this.root = byId("scroller", HTMLElement);
    this.button = byId("to-end", HTMLButtonElement);
    this.root.addEventListener("scroll", () => this.show(), { passive: true });
    this.button.addEventListener("click", () => {
      this.toEnd();
      byId("question", HTMLTextAreaElement).focus();
    });
  }

  isAtEnd() {
    return this.root.scrollHeight - this.root.scrollTop - this.root.clientHeight < NEAR;
  }

  toEnd() {
    this.root.scrollTop = this.root.scrollHeight;
    this.show();
  }

  /** Makes a change, and shows the end after it if the end was shown before. @param {() => void} change */
  follow(change) {
    const was = this.isAtEnd();
    change();
    if (was) this.toEnd();
    else this.show();
  }

  show() {
    this.button.hidden = this.isAtEnd();
  }
}
