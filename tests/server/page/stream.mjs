// The events of a body, for each list of its pieces in a JSON list (hexadecimal).
import { readFileSync } from "node:fs";

import { events } from "../static/sse.js";

const found = [];
for (const pieces of JSON.parse(readFileSync(0, "utf8"))) {
  const body = new ReadableStream({
    start(control) {
      for (const piece of pieces) control.enqueue(Uint8Array.from(Buffer.from(piece, "hex")));
      control.close();
    },
  });
  const own = [];
  for await (const data of events(body)) own.push(data);
  found.push(own);
}
process.stdout.write(JSON.stringify(found));
