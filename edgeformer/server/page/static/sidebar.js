/**
 * The list of chats: opening, naming, deleting; on a narrow screen it is a drawer.
 */
import { byId, h, iconButton } from "./dom.js";

/** @import { Conversation } from "./conversation.js" */

export class Sidebar {
  /**
   * @param {object} actions
   * @param {(conversation: Conversation) => void} actions.open
   * @param {() => void} actions.begin
   * @param {(conversation: Conversation, title: string) => void} actions.rename
   * @param {(conversation: Conversation) => void} actions.remove
   */
  constructor(actions) {
    this.actions = actions;
    this.list = byId("chats", HTMLUListElement);
    this.root = byId("sidebar", HTMLElement);
    this.opener = byId("open-sidebar", HTMLButtonElement);
    this.veil = byId("veil", HTMLElement);
    this.narrow = matchMedia("(max-width: 760px)");
    this.isOpen = false;
    this.opener.addEventListener("click", () => this.setOpen(true));
    byId("close-sidebar", HTMLButtonElement).addEventListener("click", () => this.setOpen(false));
    this.veil.addEventListener("click", () => this.setOpen(false));
    byId("new-chat", HTMLButtonElement).addEventListener("click", () => {
      this.setOpen(false);
      actions.begin();
    });
    this.narrow.addEventListener("change", () => this.setOpen(false));
    this.root.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.isOpen) return;
      event.stopPropagation();
      this.setOpen(false);
    });
    this.setOpen(false);
  }

  /** Opens or closes the drawer; on a wide screen the list is always there. @param {boolean} isOpen */
  setOpen(isOpen) {
    const was = this.isOpen;
    this.isOpen = isOpen && this.narrow.matches;
    this.root.classList.toggle("open", this.isOpen);
    this.root.inert = this.narrow.matches && !this.isOpen;
    for (const id of ["page", "skip"]) byId(id, HTMLElement).inert = this.isOpen; // the focus stays in the drawer
    this.veil.hidden = !this.isOpen;
    this.opener.setAttribute("aria-expanded", String(this.isOpen));
    if (this.isOpen) byId("close-sidebar", HTMLButtonElement).focus();
    else if (was) this.opener.focus();
  }

  /**
   * @param {Conversation[]} conversations
   * @param {Conversation} current
   * @param {(conversation: Conversation) => boolean} isRunning
   */
  show(conversations, current, isRunning) {
    this.list.replaceChildren(
      ...conversations.map((one) => {
        const open = h(
          "button",
          {
            type: "button",
            class: "chat-title",
            "data-id": one.id,
            title: one.title,
            "aria-current": one === current ? "page" : null,
            onclick: () => {
              this.setOpen(false);
              this.actions.open(one);
            },
          },
          one.title,
          isRunning(one) ? h("span", { class: "dot", role: "img", "aria-label": "being answered" }) : null,
        );
        const rename = iconButton("edit", `Rename ${one.title}`, () => this.rename(row, one));
        const remove = iconButton("bin", `Delete ${one.title}`, () => this.actions.remove(one));
        const row = h("li", { class: "chat" }, open, rename, remove);
        return row;
      }),
    );
  }

  /** @param {Conversation} conversation */
  focus(conversation) {
    for (const one of this.list.querySelectorAll("button")) if (one.dataset.id === conversation.id) one.focus();
  }

  /** @param {HTMLElement} row @param {Conversation} conversation */
  rename(row, conversation) {
    const input = h("input", { class: "chat-name", "aria-label": "Name of the chat", maxlength: 120 });
    input.value = conversation.title;
    let isDone = false;
    /** @param {string} title */
    const end = (title) => {
      if (isDone) return;
      isDone = true;
      const hadFocus = document.activeElement === input;
      this.actions.rename(conversation, title.trim() || conversation.title);
      if (hadFocus) this.focus(conversation);
    };
    input.addEventListener("keydown", (event) => {
      if (event.key === "Escape") event.stopPropagation(); // it stops no answer
      if (event.key === "Escape") end(conversation.title);
      else if (event.key === "Enter" && !event.isComposing) {
        event.preventDefault(); // else it also opens the chat
        end(input.value);
      }
    });
    input.addEventListener("blur", () => end(input.value));
    row.replaceChildren(input);
    input.focus();
    input.select();
  }
}
