/**
 * Markdown into blocks: the part of CommonMark (https://spec.commonmark.org) and of GitHub's tables that models write.
 * HTML is text here; nothing of it is parsed.
 */

/**
 * @typedef {{type: "heading", level: number, text: string}} Heading
 * @typedef {{type: "paragraph", text: string}} Paragraph
 * @typedef {{type: "code", language: string, text: string}} Code
 * @typedef {{type: "quote", blocks: Block[]}} Quote
 * @typedef {{type: "list", start: number | null, items: Block[][]}} List `start`: of an ordered one
 * @typedef {{type: "table", align: string[], head: string[], rows: string[][]}} Table
 * @typedef {{type: "rule"}} Rule
 * @typedef {Heading | Paragraph | Code | Quote | List | Table | Rule} Block
 */

const DEEPEST = 12; // quotes and lists in each other; what lies deeper is a paragraph
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*)|)$/;
const UNDERLINE = /^ {0,3}(=+|-+)[ \t]*$/;

/**
 * The blocks of a text.
 *
 * @param {string} text
 * @returns {Block[]}
 */
export function parseBlocks(text) {
  return sourced(text).map(({ block }) => block);
}

/**
 * The blocks of a text, each with the lines that it was made from: equal lines make equal blocks.
 *
 * @param {string} text
 * @returns {{block: Block, source: string}[]}
 */
export function sourced(text) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/^[ \t]+/gm, expanded).split("\n");
  return read(lines, 0);
}

/** Tabs at the beginning of a line reach to columns of four. @param {string} white */
function expanded(white) {
  let found = "";
  for (const letter of white) found += letter === "\t" ? " ".repeat(4 - (found.length % 4)) : " ";
  return found;
}

/**
 * @param {string[]} lines
 * @param {number} depth
 * @returns {{block: Block, source: string}[]}
 */
function read(lines, depth) {
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [block, end] = readOne(lines, at, depth);
    found.push({ block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return found;
}

/**
 * The block that begins at a line, and where the next one may begin.
 *
 * @param {string[]} lines
 * @param {number} at
 * @param {number} depth
 * @returns {[Block, number]}
 */
function readOne(lines, at, depth) {
  const line = lines[at];
  let found;
  if ((found = FENCE.exec(line))) return fenced(lines, at, found);
  if (line.startsWith("    ")) return indented(lines, at);
  if ((found = HEADING.exec(line))) {
    const text = (found[2] ?? "").trimEnd().replace(/(^|[ \t])#+$/, "").trim();
    return [{ type: "heading", level: found[1].length, text }, at + 1];
  }
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && (found = ITEM.exec(line))) return list(lines, at, found, depth);
  return table(lines, at) ?? paragraph(lines, at);
}

/** Whether a line ends a paragraph before it. @param {string} line */
function begins(line) {
  const item = ITEM.exec(line);
  return (
    FENCE.test(line) ||
    HEADING.test(line) ||
    RULE.test(line) ||
    QUOTE.test(line) ||
    // As CommonMark: a number other than 1 at a line's beginning may be a sentence's.
    (item !== null && Boolean(item[4]) && (/^[-*+]$/.test(item[2]) || /^1[.)]$/.test(item[2])))
  );
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @param {RegExpExecArray} opening
 * @returns {[Code, number]}
 */
function fenced(lines, at, opening) {
  const [, fence, info] = opening;
  const indent = lines[at].search(/[^ ]/);
  const text = [];
  let end = at + 1;
  for (; end < lines.length; end++) {
    const closing = lines[end].trim();
    if (closing.length >= fence.length && closing === fence[0].repeat(closing.length)) {
      end++;
      break;
    }
    text.push(lines[end].slice(Math.min(indent, lines[end].search(/[^ ]|$/))));
  }
  return [{ type: "code", language: info.trim(), text: text.join("\n") }, end];
}

/** @param {string[]} lines @param {number} at @returns {[Code, number]} */
function indented(lines, at) {
  let end = at;
  for (let next = at; next < lines.length && (lines[next].startsWith("    ") || !lines[next].trim()); next++) {
    if (lines[next].trim()) end = next + 1;
  }
  const text = lines.slice(at, end).map((line) => line.slice(4));
  return [{ type: "code", language: "", text: text.join("\n") }, end];
}

/** @param {string[]} lines @param {number} at @param {number} depth @returns {[Quote, number]} */
function quote(lines, at, depth) {
  const inner = [];
  let end = at;
  for (; end < lines.length && lines[end].trim(); end++) {
    if (!QUOTE.test(lines[end]) && begins(lines[end])) break; // else it goes on with the quote's paragraph
    inner.push(lines[end].replace(QUOTE, ""));
  }
  return [{ type: "quote", blocks: read(inner, depth + 1).map(({ block }) => block) }, end];
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @param {RegExpExecArray} first
 * @param {number} depth
 * @returns {[List, number]}
 */
function list(lines, at, first, depth) {
  const kind = first[2].at(-1); // a bullet, or what stands behind a number
  const start = /\d/.test(first[2]) ? Number.parseInt(first[2], 10) : null;
  const items = [];
  let end = at;
  for (let found; end < lines.length && (found = ITEM.exec(lines[end])) && found[2].at(-1) === kind; ) {
    if (found[1].length > first[1].length + 3 || RULE.test(lines[end])) break;
    const [item, next] = listItem(lines, end, found);
    items.push(read(item, depth + 1).map(({ block }) => block));
    end = next;
    let blank = end;
    while (blank < lines.length && !lines[blank].trim()) blank++;
    if (blank < lines.length && ITEM.test(lines[blank])) end = blank;
  }
  return [{ type: "list", start, items }, end];
}

/**
 * The lines of one item without their indent, and where the next one may begin. More indent than the marker's by two
 * is enough for what belongs to the item: models write so under numbers, where CommonMark wants three.
 *
 * @param {string[]} lines
 * @param {number} at
 * @param {RegExpExecArray} marker
 * @returns {[string[], number]}
 */
function listItem(lines, at, marker) {
  const gap = marker[3] === undefined || marker[3].length > 4 ? 1 : marker[3].length;
  const full = marker[1].length + marker[2].length + gap;
  const least = marker[1].length + 2;
  const inner = [" ".repeat(Math.max(0, (marker[3]?.length ?? 0) - gap)) + (marker[4] ?? "")];
  let end = at + 1;
  let fence = FENCE.test(inner[0]);
  for (; end < lines.length; end++) {
    const line = lines[end];
    const indent = line.search(/[^ ]/);
    if (indent < 0) {
      const next = lines.slice(end + 1).find((one) => one.trim());
      if (next === undefined || next.search(/[^ ]/) < least) break;
      inner.push("");
    } else if (indent >= least) {
      if (FENCE.test(line.slice(Math.min(indent, full)))) fence = !fence;
      inner.push(line.slice(Math.min(indent, full)));
    } else if (inner.at(-1) && !fence && !begins(line) && !ITEM.test(line)) {
      inner.push(line); // goes on with the item's paragraph
    } else break;
  }
  return [inner, end];
}

/** The cells of a table's line; a bar behind a backslash or in code is text. @param {string} line @returns {string[]} */
function cells(line) {
  const found = [""];
  let code = false;
  for (let at = 0; at < line.length; at++) {
    if (line[at] === "\\" && line[at + 1] === "|") found[found.length - 1] += line[++at];
    else if (line[at] === "|" && !code) found.push("");
    else {
      if (line[at] === "`") code = !code;
      found[found.length - 1] += line[at];
    }
  }
  if (!found[0].trim()) found.shift();
  if (found.length && !found[found.length - 1].trim()) found.pop();
  return found.map((cell) => cell.trim());
}

/** @param {string[]} lines @param {number} at @returns {[Table, number] | null} */
function table(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !lines[at + 1].includes("-")) return null;
  const head = cells(lines[at]);
  const marks = cells(lines[at + 1]);
  if (marks.length !== head.length || !marks.every((cell) => /^:?-+:?$/.test(cell))) return null;
  const align = marks.map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : cell.startsWith(":") ? "left" : "",
  );
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|"); end++) {
    const row = cells(lines[end]);
    rows.push(head.map((_, column) => row[column] ?? ""));
  }
  return [{ type: "table", align, head, rows }, end];
}

/** @param {string[]} lines @param {number} at @returns {[Paragraph | Heading, number]} */
function paragraph(lines, at) {
  let end = at + 1;
  for (; end < lines.length && lines[end].trim(); end++) {
    const line = UNDERLINE.exec(lines[end]);
    if (line) {
      const text = lines.slice(at, end).join("\n");
      return [{ type: "heading", level: line[1][0] === "=" ? 1 : 2, text }, end + 1];
    }
    if (begins(lines[end]) || table(lines, end)) break;
  }
  return [{ type: "paragraph", text: lines.slice(at, end).map((line) => line.trimStart()).join("\n") }, end];
}
