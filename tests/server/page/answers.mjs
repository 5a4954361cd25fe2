// Real answers: streamed, stopped, repeated, asked otherwise.
import assert from "node:assert/strict";

import { answers, ask, ended, question, ready, settle, stored, storedAnswer } from "./tools.mjs";

/** A stream grows before it ends; then its numbers are there. */
export async function streams({ page, bodies, model }) {
  await ready(page);
  await page.getByLabel("Model", { exact: true }).selectOption(model);
  await settle(page, { "Longest answer": 130 });
  await ask(page, "hello");
  await page.waitForFunction(() => document.querySelector(".answer-text").textContent.length > 2);
  const early = await page.locator(".answer-text").textContent();
  assert.equal(await answers(page).getAttribute("aria-busy"), "true");
  const last = await ended(page);
  assert.ok((await page.locator(".answer-text").textContent()).length > early.length, "the answer did not grow");
  await ask(page, "hello");
  await ended(page);
  assert.equal(bodies[1].messages.length, 3);
  const text = await storedAnswer(page);
  return { bodies, text, numbers: await page.locator(".statistics").allTextContents(), name: await last.ariaSnapshot() };
}

/** Both ways to stop. What was written stays, and the chat goes on. */
export async function stops({ page, way }) {
  await ask(page, "hello");
  await page.waitForFunction(() => document.querySelector(".answer-text").textContent.length > 2);
  if (way === "Escape") await page.keyboard.press("Escape");
  else await page.getByRole("button", { name: "Stop", exact: true }).click();
  const last = await ended(page);
  assert.match(await last.textContent(), /Stopped\./);
  assert.ok((await storedAnswer(page)).length > 2);
  assert.equal(await page.evaluate(() => document.activeElement.id), "question");
}

/** The answer to one more try stands beside the first. */
export async function regenerates({ page, bodies }) {
  await settle(page, { Temperature: 5, "Longest answer": 8 });
  await ask(page, "hello");
  const first = await (await ended(page)).locator(".answer-text").textContent();
  await page.getByRole("button", { name: "Answer again" }).click();
  await ended(page);
  assert.equal(await answers(page).count(), 1);
  assert.deepEqual(bodies[0].messages, bodies[1].messages);
  assert.match(await answers(page).textContent(), /2\/2/);
  await page.getByRole("button", { name: "Earlier version" }).click();
  assert.equal(await page.locator(".answer-text").textContent(), first);
  const [chat] = await stored(page);
  assert.equal(chat.messages.length, 3);
}

/** An edited question begins a branch; the first one is kept. */
export async function edits({ page, bodies }) {
  await settle(page, { "Longest answer": 4 });
  for (const text of ["one", "two"]) {
    await ask(page, text);
    await ended(page);
  }
  await question(page).press("ArrowUp");
  await page.getByLabel("Edit the message").press("Escape");
  assert.equal(await page.getByLabel("Edit the message").count(), 0);
  const first = page.locator("li.question").first();
  await first.hover();
  await first.getByRole("button", { name: "Edit this message" }).click();
  await page.getByLabel("Edit the message").fill("uno");
  await page.getByLabel("Edit the message").press("Enter");
  await ended(page);
  assert.deepEqual(bodies[2].messages, [{ role: "user", content: "uno" }]);
  assert.equal(await page.locator("li.message").count(), 2);
  await page.locator("li.question").getByRole("button", { name: "Earlier version" }).click();
  assert.equal(await page.locator("li.message").count(), 4);
  assert.deepEqual(await page.locator(".question-text").allTextContents(), ["one", "two"]);
}

/** The settings and the chosen model as the server gets them. */
export async function sends({ page, bodies, settings, model }) {
  await ready(page);
  await settle(page, settings);
  await page.getByLabel("Model", { exact: true }).selectOption(model);
  await ask(page, "hello");
  await ended(page);
  const numbers = await page.locator(".statistics").textContent();
  const options = await page.locator("#model option").allTextContents();
  return { body: bodies[0], numbers, options };
}

/** A wrong number is told beside its field and not saved; empty fields are not sent. */
export async function refuses({ page, bodies }) {
  await ready(page);
  await page.getByRole("button", { name: "Settings" }).click();
  await page.getByLabel("Top p", { exact: true }).fill("7");
  await page.getByRole("button", { name: "Save" }).click();
  assert.match(await page.locator("#settings-problem").textContent(), /^Top p: /);
  assert.equal(await page.evaluate(() => document.activeElement.id), "field-top_p");
  await page.getByRole("button", { name: "Empty all" }).click();
  await page.getByLabel("Longest answer", { exact: true }).fill("2");
  await page.keyboard.press("Enter");
  await ask(page, "hello");
  await ended(page);
  assert.deepEqual(Object.keys(bodies[0]).sort(), ["max_tokens", "messages", "model", "stream", "stream_options"]);
}

/** Real reasoning is folded. */
export async function reasons({ page, model }) {
  await ready(page);
  await page.getByLabel("Model", { exact: true }).selectOption(model);
  await settle(page, { "Longest answer": 12 });
  await ask(page, "hello");
  await ended(page);
  const details = page.locator("details.reasoning");
  assert.equal(await details.getAttribute("open"), null);
  const [chat] = await stored(page);
  const { reasoning } = chat.messages.at(-1);
  assert.equal(await page.locator(".reasoning-text").textContent(), reasoning);
  assert.equal(await page.locator(".reasoning-text").isVisible(), false);
  await page.locator("summary", { hasText: "Reasoning" }).press("Enter");
  assert.equal(await page.locator(".reasoning-text").isVisible(), true);
  return reasoning;
}

/** Texts of files go into the message; what is no text is refused by its name. */
export async function attaches({ page, bodies }) {
  await settle(page, { "Longest answer": 2 });
  const [chooser] = await Promise.all([
    page.waitForEvent("filechooser"),
    page.getByRole("button", { name: "Attach text files" }).click(),
  ]);
  await chooser.setFiles([
    { name: "a.txt", mimeType: "text/plain", buffer: Buffer.from("one\n```\ntwo\n") },
    { name: "b.png", mimeType: "image/png", buffer: Buffer.from([0x89, 0x50, 0xff, 0x00]) },
    { name: "c.csv", mimeType: "text/csv", buffer: Buffer.from("x,y") },
  ]);
  await page.getByText("b.png is no text in UTF-8").waitFor();
  await page.getByRole("button", { name: "Remove c.csv" }).click();
  await ask(page, "what is it?");
  await ended(page);
  assert.equal(bodies[0].messages[0].content, "File a.txt:\n````\none\n```\ntwo\n````\n\nwhat is it?");
  assert.equal(await page.locator("li.question summary").textContent(), "a.txt");
  assert.equal(await page.locator("#files").isVisible(), false);
}
