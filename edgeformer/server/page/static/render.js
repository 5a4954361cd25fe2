/**
 * Blocks of Markdown as elements. Every string of an answer ends in a text node, or as an address that `safeAddress`
 * has let through; so no answer can bring an element, an attribute or a script of its own.
 */
import { sourced } from "./blocks.js";
import { copyButton, h } from "./dom.js";
import { parseInline, safeAddress } from "./inline.js";

/** @import { Block, Code, List, Table } from "./blocks.js" */
/** @import { Inline } from "./inline.js" */

/** The elements of one answer, which grows: only blocks whose lines have changed are made again. */
export class MarkdownView {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
    /** @type {{block: Block, source: string}[]} */
    this.blocks = [];
  }

  /** @param {string} text the whole text */
  update(text) {
    const next = sourced(text);
    let same = 0;
    while (same < next.length && next[same].source === this.blocks[same]?.source) same++;
    const old = this.blocks[same]?.block;
    const grown = next[same]?.block;
    if (old?.type === "code" && grown?.type === "code" && old.language === grown.language) {
      // The reader may be selecting in it, or have the focus on its button.
      const code = this.root.children[same].querySelector("code");
      if (code) code.textContent = grown.text;
      same++;
    }
    while (this.root.children.length > same) this.root.lastElementChild?.remove();
    this.root.append(...next.slice(same).map(({ block }) => blockElement(block)));
    this.blocks = next;
  }
}

/** @param {Block} block @returns {HTMLElement} */
function blockElement(block) {
  switch (block.type) {
    case "heading":
      // The page's own headings are h1 and h2.
      return h(/** @type {"h3"} */ (`h${Math.min(6, block.level + 2)}`), {}, ...inlineNodes(block.text));
    case "paragraph":
      return h("p", {}, ...inlineNodes(block.text));
    case "code":
      return codeElement(block);
    case "quote":
      return h("blockquote", {}, ...block.blocks.map(blockElement));
    case "list":
      return listElement(block);
    case "table":
      return tableElement(block);
    case "rule":
      return h("hr");
  }
}

/** @param {Code} block */
function codeElement(block) {
  const name = block.language ? `Code, ${block.language}` : "Code";
  const code = h("code", {}, block.text);
  return h(
    "div",
    { class: "code-block" },
    h(
      "div",
      { class: "code-head" },
      h("span", { class: "code-language" }, block.language || "text"),
      copyButton("Copy code", () => code.textContent ?? ""),
    ),
    // It scrolls sideways: the focus lets the arrow keys do that.
    h("pre", { tabindex: 0, role: "region", "aria-label": name }, code),
  );
}

/** @param {List} block */
function listElement(block) {
  const items = block.items.map((blocks) => {
    const [first, ...rest] = blocks;
    // A paragraph at the beginning is the item's line: without the space of paragraphs.
    if (first?.type === "paragraph") return h("li", {}, ...taskNodes(first.text), ...rest.map(blockElement));
    return h("li", {}, ...blocks.map(blockElement));
  });
  return block.start === null ? h("ul", {}, ...items) : h("ol", { start: block.start === 1 ? null : block.start }, ...items);
}

/** The line of an item, which `[ ]` or `[x]` makes a task. @param {string} text */
function taskNodes(text) {
  const task = /^\[([ xX])\]\s+/.exec(text);
  if (!task) return inlineNodes(text);
  const isDone = task[1] !== " ";
  const box = h("span", { class: "task", role: "img", "aria-label": isDone ? "done" : "open" }, isDone ? "☑" : "☐");
  return [box, " ", ...inlineNodes(text.slice(task[0].length))];
}

/** @param {Table} block */
function tableElement(block) {
  /** @param {"th" | "td"} tag @param {string[]} row */
  const line = (tag, row) =>
    h(
      "tr",
      {},
      ...row.map((cell, column) => {
        const align = block.align[column];
        const attributes = { class: align ? `align-${align}` : null, scope: tag === "th" ? "col" : null };
        return h(tag, attributes, ...inlineNodes(cell));
      }),
    );
  return h(
    "div",
    { class: "table-frame", tabindex: 0, role: "region", "aria-label": "Table" },
    h("table", {}, h("thead", {}, line("th", block.head)), h("tbody", {}, ...block.rows.map((row) => line("td", row)))),
  );
}

/** @param {string} text */
function inlineNodes(text) {
  return parseInline(text).map(inlineNode);
}

/** @param {Inline} part @returns {Node | string} */
function inlineNode(part) {
  switch (part.type) {
    case "text":
      return part.text;
    case "code":
      return h("code", {}, part.text);
    case "break":
      return h("br");
    case "link":
      return linkElement(part.href, part.children.map(inlineNode));
    default:
      return h(part.type, {}, ...part.children.map(inlineNode));
  }
}

/** A picture's address is a link too: the page loads nothing from elsewhere. @param {string} href @param {(Node | string)[]} children */
function linkElement(href, children) {
  const address = safeAddress(href);
  if (address === null) return h("span", { title: "This address is not opened: it is no http, https or mailto." }, ...children);
  const inside = children.length ? children : [address];
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...inside);
}
