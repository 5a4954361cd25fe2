/**
 * The inside of a paragraph: emphasis by CommonMark's delimiter runs (https://spec.commonmark.org/0.31.2/#phase-2-inline-structure),
 * code, links, strikethrough, line breaks. HTML stays text, but for `<br>`.
 */

/**
 * @typedef {{type: "text", text: string}} Text
 * @typedef {{type: "code", text: string}} CodeSpan
 * @typedef {{type: "break"}} Break
 * @typedef {{type: "strong" | "em" | "del", children: Inline[], depth: number}} Emphasis
 * @typedef {{type: "link", href: string, children: Inline[]}} Link
 * @typedef {Text | CodeSpan | Break | Emphasis | Link} Inline
 */

/**
 * A run of `*`, `_` or `~` that may open or close; it becomes text where it does neither.
 *
 * @typedef {{type: "run", mark: string, count: number, length: number, opens: boolean, closes: boolean}} Run
 * @typedef {{type: "bracket", image: boolean}} Bracket
 * @typedef {Inline | Run | Bracket} Part
 */

const PUNCTUATION = /[\p{P}\p{S}]/u;
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const ENTITIES = /** @type {Record<string, string>} */ ({ amp: "&", lt: "<", gt: ">", quot: '"', "#39": "'", nbsp: "\u00a0" });
const NESTED = 32; // brackets in an address, emphasis in emphasis: bounds on work and depth
const SAFE = new Set(["http:", "https:", "mailto:"]);
const ADDRESS = /(?:https?:\/\/|mailto:)[^\s<>"`]+/iy;

/**
 * The address if a link may lead there, else null: no script, no file, no other program.
 *
 * @param {string} address
 * @returns {string | null}
 */
export function safeAddress(address) {
  try {
    const found = new URL(address);
    return SAFE.has(found.protocol) ? found.href : null;
  } catch {
    return null; // relative: it would lead to this server
  }
}

/**
 * The parts of a text.
 *
 * @param {string} text
 * @returns {Inline[]}
 */
export function parseInline(text) {
  /** @type {Part[]} */
  const parts = [];
  /** @type {number[]} */
  let brackets = []; // where they stand in `parts`
  const unclosed = new Set(); // lengths of backtick runs without a second one
  let plain = "";
  let at = 0;

  const flush = () => {
    if (plain) parts.push({ type: "text", text: plain });
    plain = "";
  };
  /** @param {Part} part @param {number} length of its source */
  const push = (part, length) => {
    flush();
    parts.push(part);
    at += length;
  };

  while (at < text.length) {
    const letter = text[at];
    let found;
    if (letter === "\\" && text[at + 1] === "\n") push({ type: "break" }, 2);
    else if (letter === "\\" && ESCAPABLE.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (letter === "`") {
      const count = runLength(text, at);
      const end = unclosed.has(count) ? -1 : closingTicks(text, at + count, count);
      if (end < 0) {
        unclosed.add(count);
        plain += text.slice(at, at + count);
        at += count;
      } else push({ type: "code", text: codeText(text.slice(at + count, end)) }, end + count - at);
    } else if (letter === "*" || letter === "_" || (letter === "~" && text[at + 1] === "~")) {
      push(delimiters(text, at), runLength(text, at));
    } else if (letter === "[" || (letter === "!" && text[at + 1] === "[")) {
      flush();
      brackets.push(parts.length);
      push({ type: "bracket", image: letter === "!" }, letter === "!" ? 2 : 1);
    } else if (letter === "]" && brackets.length) {
      flush();
      const opening = /** @type {number} */ (brackets.pop());
      const target = destination(text, at + 1);
      if (target === null) {
        plain += "]";
        at++;
      } else {
        const [bracket, ...inner] = parts.splice(opening);
        // No link lies in another: a picture in a link's text is that text, and around a link there is none.
        const children = emphasised(inner).flatMap((one) => (one.type === "link" ? one.children : [one]));
        push({ type: "link", href: target.href, children }, 1 + target.length);
        const isImage = bracket.type === "bracket" && bracket.image;
        if (!isImage) brackets = brackets.filter((place) => /** @type {Bracket} */ (parts[place]).image);
      }
    } else if (letter === "\n") {
      const hard = / {2,}$/.test(plain);
      plain = plain.trimEnd();
      if (hard) push({ type: "break" }, 1);
      else {
        plain += "\n";
        at++;
      }
    } else if (letter === "<" && (found = /^<br ?\/?>/i.exec(text.slice(at, at + 6)))) {
      push({ type: "break" }, found[0].length);
    } else if (letter === "&" && (found = /^&(#39|[a-z]{2,4});/.exec(text.slice(at, at + 6))) && ENTITIES[found[1]]) {
      plain += ENTITIES[found[1]];
      at += found[0].length;
    } else if ((letter === "h" || letter === "m" || letter === "H") && !/\w/.test(text[at - 1] ?? "") && (found = bare(text, at))) {
      push({ type: "link", href: found, children: [{ type: "text", text: found }] }, found.length);
    } else {
      plain += letter;
      at++;
    }
  }
  flush();
  return emphasised(parts);
}

/** How often the letter at a place is repeated. @param {string} text @param {number} at */
function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end++;
  return end - at;
}

/** Where a run of exactly `count` backticks begins, or -1. @param {string} text @param {number} from @param {number} count */
function closingTicks(text, from, count) {
  for (let at = text.indexOf("`", from); at >= 0; at = text.indexOf("`", at)) {
    const length = runLength(text, at);
    if (length === count) return at;
    at += length;
  }
  return -1;
}

/** @param {string} text */
function codeText(text) {
  const flat = text.replace(/\n/g, " ");
  return /^ .* $/.test(flat) && flat.trim() ? flat.slice(1, -1) : flat;
}

/** An address that stands there without brackets. @param {string} text @param {number} at @returns {string | null} */
function bare(text, at) {
  ADDRESS.lastIndex = at;
  let found = ADDRESS.exec(text)?.[0];
  if (!found) return null;
  found = found.replace(/[.,:;!?'*_~\]]+$/, "");
  if (found.endsWith(")") && !found.includes("(")) found = found.slice(0, -1).replace(/[.,:;!?'*_~]+$/, "");
  return safeAddress(found) ? found : null;
}

/**
 * `(address "title")` behind a link's text. An address with spaces stands in <>.
 *
 * @param {string} text
 * @param {number} at
 * @returns {{href: string, length: number} | null}
 */
function destination(text, at) {
  if (text[at] !== "(") return null;
  const rest = text.slice(at, at + 4096);
  const pointed = /^\(\s*<([^<>\n]*)>(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(rest);
  if (pointed) return { href: pointed[1], length: pointed[0].length };
  const begin = 1 + rest.slice(1).search(/\S|$/);
  let open = 0;
  let end = begin;
  for (; end < rest.length && !/\s/.test(rest[end]); end++) {
    if (rest[end] === "(" && ++open > NESTED) return null;
    if (rest[end] === ")" && --open < 0) break;
  }
  const tail = /^(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(rest.slice(end));
  return tail && end > begin ? { href: rest.slice(begin, end), length: end + tail[0].length } : null;
}

/** @param {string} text @param {number} at @returns {Run} */
function delimiters(text, at) {
  const mark = text[at];
  const count = runLength(text, at);
  const before = text[at - 1] ?? " ";
  const after = text[at + count] ?? " ";
  const left = !/\s/.test(after) && (!PUNCTUATION.test(after) || /\s/.test(before) || PUNCTUATION.test(before));
  const right = !/\s/.test(before) && (!PUNCTUATION.test(before) || /\s/.test(after) || PUNCTUATION.test(after));
  const word = mark === "_"; // not within a word: snake_case_names
  return {
    type: "run",
    mark,
    count,
    length: count,
    opens: left && (!word || !right || PUNCTUATION.test(before)),
    closes: right && (!word || !left || PUNCTUATION.test(after)),
  };
}

/**
 * Pairs the runs, and makes text of those that are left.
 *
 * @param {Part[]} parts
 * @returns {Inline[]}
 */
function emphasised(parts) {
  /** @type {Part[]} */
  const done = [];
  /** @type {number[]} */
  let openers = []; // where they stand in `done`
  for (const part of parts) {
    if (part.type === "run" && part.closes) {
      for (let pair = lastOpener(done, openers, part); part.count && pair >= 0; pair = lastOpener(done, openers, part)) {
        const place = openers[pair];
        const opener = /** @type {Run} */ (done[place]);
        const size = part.mark === "~" ? 2 : Math.min(2, opener.count, part.count);
        openers = openers.slice(0, pair + 1); // those between are text
        const children = plainParts(done.splice(place + 1));
        const depth = 1 + Math.max(0, ...children.map((one) => ("depth" in one ? one.depth : 0)));
        if (depth > NESTED) {
          done.push(...children);
          openers = [];
          continue;
        }
        opener.count -= size;
        part.count -= size;
        const type = part.mark === "~" ? "del" : size === 2 ? "strong" : "em";
        if (!opener.count) {
          openers.pop();
          done.pop();
        }
        done.push({ type, children, depth });
      }
    }
    if (part.type === "run" && !part.count) continue;
    if (part.type === "run" && part.opens) openers.push(done.length);
    done.push(part);
  }
  return plainParts(done);
}

/**
 * The opener that a closing run belongs to, as a place in `openers`; -1 without one.
 *
 * @param {Part[]} done
 * @param {number[]} openers
 * @param {Run} closer
 */
function lastOpener(done, openers, closer) {
  const lowest = Math.max(0, openers.length - NESTED);
  for (let pair = openers.length - 1; pair >= lowest; pair--) {
    const one = /** @type {Run} */ (done[openers[pair]]);
    if (one.mark !== closer.mark || !closer.count) continue;
    if (one.mark === "~" && (one.count < 2 || closer.count < 2)) continue;
    // The rule of three: `**a*b**` is not read as emphasis from ** to *.
    const both = (one.closes || closer.opens) && (one.length + closer.length) % 3 === 0;
    if (both && (one.length % 3 || closer.length % 3)) continue;
    return pair;
  }
  return -1;
}

/** @param {Part[]} parts @returns {Inline[]} */
function plainParts(parts) {
  /** @type {Inline[]} */
  const found = [];
  for (const part of parts) {
    const text = part.type === "run" ? part.mark.repeat(part.count) : part.type === "bracket" ? (part.image ? "![" : "[") : null;
    const last = found.at(-1);
    if (text === null && part.type !== "text") found.push(/** @type {Inline} */ (part));
    else if (last?.type === "text") last.text += text ?? /** @type {Text} */ (part).text;
    else found.push({ type: "text", text: text ?? /** @type {Text} */ (part).text });
  }
  return found;
}
