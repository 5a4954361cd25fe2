// The blocks of each text of a JSON list, with the parts of their inside.
import { readFileSync } from "node:fs";

import { parseBlocks } from "../static/blocks.js";
import { parseInline } from "../static/inline.js";

function whole(block) {
  const { type } = block;
  if (type === "paragraph" || type === "heading") return { ...block, inside: parseInline(block.text) };
  if (type === "quote") return { ...block, blocks: block.blocks.map(whole) };
  if (type === "list") return { ...block, items: block.items.map((blocks) => blocks.map(whole)) };
  if (type === "table") {
    return { ...block, head: block.head.map(parseInline), rows: block.rows.map((row) => row.map(parseInline)) };
  }
  return block;
}

const texts = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(texts.map((text) => parseBlocks(text).map(whole))));
