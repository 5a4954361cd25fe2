// What the scenarios share: asking, waiting for an end, streams that say what a test wants.
import assert from "node:assert/strict";

export const question = (page) => page.getByRole("textbox", { name: "Message", exact: true });
export const answers = (page) => page.locator("li.answer");

/** Waits until the models are there. */
export async function ready(page) {
  await page.waitForFunction(() => document.querySelectorAll("#model option").length > 0);
}

/** Types a question and sends it by the keyboard. */
export async function ask(page, text) {
  await ready(page);
  await question(page).fill(text);
  await question(page).press("Enter");
}

/** Waits until no answer is being written, and gives the last one. */
export async function ended(page) {
  await page.waitForFunction(() => document.querySelector("#send").title === "Send" && document.querySelector("li.answer"));
  const last = answers(page).last();
  assert.equal(await last.getAttribute("aria-busy"), "false");
  return last;
}

export async function settle(page, values) {
  await page.getByRole("button", { name: "Settings" }).click();
  for (const [name, value] of Object.entries(values)) await page.getByLabel(name, { exact: true }).fill(String(value));
  await page.getByRole("button", { name: "Save" }).click();
}

/** The chats as the page has stored them. */
export function stored(page) {
  return page.evaluate(() =>
    Object.keys(localStorage)
      .filter((key) => key.startsWith("edgeformer.chat."))
      .map((key) => JSON.parse(localStorage.getItem(key))),
  );
}

/** The text of the last answer as the page has stored it. */
export async function storedAnswer(page) {
  const [chat] = await stored(page);
  return chat.messages.find((one) => one.id === chat.leaf).text;
}

/** Answers every question with these texts, one chunk each, as the server would. */
export async function fake(page, texts, more = {}) {
  const chunk = (delta, finish = null, rest = {}) =>
    `data: ${JSON.stringify({ choices: [{ index: 0, delta, finish_reason: finish }], ...rest })}\n\n`;
  const timings = { cache_n: 7, prompt_n: 3, prompt_ms: 12, queue_ms: 1, predicted_n: 5, predicted_per_second: 50 };
  const body = [
    ": ping\n\n",
    chunk({ role: "assistant", content: "" }),
    ...(more.reasoning ?? []).map((text) => chunk({ reasoning_content: text })),
    ...texts.map((text) => chunk({ content: text })),
    ...(more.isCut ? [] : [chunk({}, "stop"), `data: ${JSON.stringify({ choices: [], usage: {}, timings })}\n\n`, "data: [DONE]\n\n"]),
  ].join("");
  await page.route("**/v1/chat/completions", (route) =>
    route.fulfill({ status: 200, contentType: "text/event-stream", body }),
  );
}
