// The list of chats: it survives a reload, and goes through a file.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";

import { ask, ended, fake, settle, stored } from "./tools.mjs";

/** After a reload everything is as it was; a new tab begins a new chat. */
export async function survives({ page, context, url }) {
  await settle(page, { "System prompt": "Be brief.", Temperature: 0.5, "Longest answer": 6 });
  await ask(page, "hello");
  await ended(page);
  const before = await page.locator("#messages").ariaSnapshot();
  await page.reload();
  await page.locator(".statistics").waitFor();
  assert.equal(await page.locator("#messages").ariaSnapshot(), before);
  assert.equal(await page.locator("#system-text").textContent(), "Be brief.");
  await page.getByRole("button", { name: "Settings" }).click();
  assert.equal(await page.getByLabel("Temperature", { exact: true }).inputValue(), "0.5");
  const other = await context.newPage();
  await other.goto(`${url}/`);
  await other.getByRole("heading", { name: "What can I do for you?" }).waitFor();
  assert.equal(await other.getByRole("button", { name: "hello", exact: true }).count(), 1);
}

/** Renaming, a second chat, deleting, and undoing that. */
export async function lists({ page }) {
  await fake(page, ["good"]);
  await ask(page, "first\nquestion");
  await ended(page);
  await page.getByRole("button", { name: "New chat" }).click();
  await ask(page, "second");
  await ended(page);
  const titles = () => page.locator(".chat-title").allTextContents();
  assert.deepEqual(await titles(), ["second", "first question"]);
  await page.getByRole("listitem").filter({ hasText: "first question" }).hover();
  await page.getByRole("button", { name: "Rename first question" }).click();
  await page.getByLabel("Name of the chat").fill("Mine");
  await page.keyboard.press("Enter");
  assert.deepEqual(await titles(), ["second", "Mine"]);
  await page.getByRole("button", { name: "Mine", exact: true }).click();
  assert.equal(await page.title(), "Mine – edgeformer");
  await page.getByRole("button", { name: "Delete Mine" }).click();
  assert.deepEqual(await titles(), ["second"]);
  assert.equal((await stored(page)).length, 1);
  await page.getByRole("button", { name: "Undo" }).click();
  assert.equal(await page.locator(".answer-text").textContent(), "good");
  assert.equal((await stored(page)).length, 2);
}

/** What is exported can be imported elsewhere, and again here as a copy. Files of others are refused. */
export async function files({ page, url }) {
  await fake(page, ["good"]);
  await ask(page, "hello there");
  await ended(page);
  const [one] = await Promise.all([
    page.waitForEvent("download"),
    page.getByRole("button", { name: "Export this chat" }).click(),
  ]);
  assert.equal(one.suggestedFilename(), "hello-there.json");
  const data = JSON.parse(await readFile(await one.path(), "utf8"));
  assert.deepEqual(data.conversations, await stored(page));

  await page.evaluate(() => localStorage.clear());
  await page.goto(`${url}/`);
  const give = (value) =>
    page.locator("#import-file").setInputFiles({
      name: "x.json",
      mimeType: "application/json",
      buffer: Buffer.from(typeof value === "string" ? value : JSON.stringify(value)),
    });
  await give(data);
  await page.locator(".answer-text", { hasText: "good" }).waitFor();
  await give(data);
  await page.waitForFunction(() => document.querySelectorAll(".chat").length === 2);

  const wrong = structuredClone(data);
  wrong.conversations[0].messages[1].parent = "nobody";
  const odd = structuredClone(data);
  odd.conversations[0].messages[0].text = { toString: 1 };
  for (const [file, told] of [
    ["{", /not JSON/],
    [{ format: "other" }, /no export of this page/],
    [wrong, /before its parent/],
    [odd, /a message's text is no text/],
  ]) {
    await give(file);
    await page.waitForFunction((text) => new RegExp(text).test(document.querySelector("#problem").textContent), told.source);
  }
  assert.equal((await stored(page)).length, 2);
}

/** Two tabs: what one deletes and adds, the other shows. */
export async function tabs({ page, context, url }) {
  await fake(page, ["good"]);
  await ask(page, "one");
  await ended(page);
  const other = await context.newPage();
  await other.goto(`${url}/`);
  await fake(other, ["well"]);
  await ask(other, "two");
  await ended(other);
  await page.getByRole("button", { name: "two", exact: true }).waitFor();
  await other.getByRole("listitem").filter({ hasText: "one" }).hover();
  await other.getByRole("button", { name: "Delete one" }).click();
  await page.waitForFunction(() => document.querySelectorAll(".chat").length === 1);
}
