// Reads scenarios as lines of JSON, runs each in a fresh context of one browser, and writes a line for each.
import { createInterface } from "node:readline";
import { chromium } from "playwright-core";

import * as answers from "./answers.mjs";
import * as chats from "./chats.mjs";
import * as errors from "./errors.mjs";
import * as safety from "./safety.mjs";
import * as use from "./use.mjs";

const scenarios = { answers, chats, errors, safety, use };
const WAIT = 15_000;

const browser = await chromium.launch({
  executablePath: process.argv[2],
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});

for await (const line of createInterface({ input: process.stdin })) {
  const { scenario, url, arguments: given } = JSON.parse(line);
  process.stdout.write(JSON.stringify(await run(scenario, url, given)) + "\n");
}
await browser.close();

async function run(scenario, url, given) {
  const context = await browser.newContext({
    viewport: { width: 1100, height: 760 },
    acceptDownloads: true,
    reducedMotion: "reduce",
    ...given.context,
  });
  context.setDefaultTimeout(WAIT);
  const faults = [];
  const bodies = []; // of the requests for answers
  context.on("request", (request) => {
    const address = request.url();
    if (!address.startsWith(`${url}/`) && !address.startsWith("blob:")) faults.push(`request to ${address}`);
    if (address.endsWith("/v1/chat/completions")) bodies.push(request.postDataJSON());
  });
  context.on("weberror", (error) => faults.push(`error ${error.error().stack ?? error.error()}`));
  context.on("console", (message) => {
    if (message.type() === "error" && !/Failed to load resource/.test(message.text())) faults.push(message.text());
  });
  try {
    const [file, name] = scenario.split(".");
    const page = await context.newPage();
    await page.goto(`${url}/`);
    const value = await scenarios[file][name]({ page, context, url, bodies, ...given });
    if (faults.length) return { error: faults.join("\n") };
    return { value: value ?? null };
  } catch (error) {
    return { error: [error.stack ?? String(error), ...faults].join("\n") };
  } finally {
    await context.close();
  }
}
