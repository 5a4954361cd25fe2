// What goes wrong is told in words, and can be tried again.
import assert from "node:assert/strict";

import { ask, ended, fake, question, ready, settle, storedAnswer } from "./tools.mjs";

const problem = (page) => page.locator("li.answer .problem");

/** The server's own words for a prompt that is too long; a shorter one works. */
export async function tooLong({ page }) {
  await settle(page, { "Longest answer": 2 });
  await ask(page, "word ".repeat(1500));
  await ended(page);
  const told = await problem(page).textContent();
  await question(page).press("ArrowUp");
  await page.getByLabel("Edit the message").fill("word");
  await page.getByRole("button", { name: "Ask again" }).click();
  await ended(page);
  assert.equal(await problem(page).isVisible(), false);
  return told;
}

/** A full server, then a free one. */
export async function busy({ page, url, held }) {
  await settle(page, { "Longest answer": 3 });
  const control = new AbortController();
  const holding = await fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(held),
    signal: control.signal,
  });
  await holding.body.getReader().read(); // it runs
  await ask(page, "hello");
  await ended(page);
  const told = await problem(page).textContent();
  const spoken = await page.locator("#announcer").textContent();
  control.abort();
  for (let tries = 0; tries < 20 && (await problem(page).isVisible()); tries++) {
    await page.waitForTimeout(50);
    await page.getByRole("button", { name: "Try again" }).click();
    await ended(page);
  }
  assert.ok((await storedAnswer(page)).length);
  return { told, spoken };
}

/** Without a network: at an answer, and at the start. */
export async function unreachable({ page }) {
  await ready(page);
  await page.route("**/v1/**", (route) => route.abort());
  await ask(page, "hello");
  await ended(page);
  assert.match(await problem(page).textContent(), /cannot be reached/);
  await page.reload();
  await page.locator("#problem", { hasText: "cannot be reached" }).waitFor();
  await page.unrouteAll();
  await page.locator("#problem").getByRole("button", { name: "Try again" }).click();
  await ready(page);
  await page.locator("#problem").waitFor({ state: "hidden" });
}

/** A stream that breaks off keeps what came; so does one that ends with an error; another page's error is a status. */
export async function breaks({ page }) {
  await fake(page, ["half of an"], { isCut: true });
  await ask(page, "hello");
  await ended(page);
  assert.match(await problem(page).textContent(), /connection ended/);
  assert.equal(await storedAnswer(page), "half of an");

  await page.unrouteAll();
  const event = (value) => `data: ${JSON.stringify(value)}\r\n\r\n`;
  await page.route("**/v1/chat/completions", (route) =>
    route.fulfill({
      contentType: "text/event-stream",
      body: event({ choices: [{ delta: { content: "é" }, finish_reason: null }] }) + event({ error: { message: "It burns." } }),
    }),
  );
  await page.getByRole("button", { name: "Try again" }).click();
  await ended(page);
  assert.match(await problem(page).textContent(), /It burns\./);
  assert.equal(await storedAnswer(page), "é");

  await page.unrouteAll();
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ status: 502, body: "<h1>Bad gateway</h1>" }));
  await page.getByRole("button", { name: "Try again" }).click();
  await ended(page);
  assert.match(await problem(page).textContent(), /status 502/);
}

/** A server with a key: the page asks, a wrong one is told, the right one stays in this tab alone. */
export async function key({ page, context, url, key: right }) {
  const dialog = page.getByRole("dialog", { name: "This server asks for a key" });
  await dialog.waitFor();
  await page.getByLabel("API key").fill("wrong");
  await page.keyboard.press("Enter");
  await dialog.getByText("does not take this key").waitFor();
  await page.getByLabel("API key").fill(right);
  await dialog.getByRole("button", { name: "Use this key" }).click();
  await dialog.waitFor({ state: "hidden" });
  await settle(page, { "Longest answer": 2 });
  await ask(page, "hello");
  await ended(page);
  assert.equal(await problem(page).isVisible(), false);
  await page.reload();
  await ready(page);
  assert.ok(!(await page.evaluate(() => JSON.stringify(localStorage))).includes(right));
  const other = await context.newPage();
  await other.goto(`${url}/`);
  await other.getByRole("dialog").waitFor();
  await other.keyboard.press("Escape");
  await other.locator("#problem", { hasText: "API key" }).waitFor();
}
