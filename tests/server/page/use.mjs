// Keyboard, screen reader, themes, and the width of a phone.
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";

import { answers, ask, ended, fake, question, ready } from "./tools.mjs";

const axe = await readFile(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const focused = (page) =>
  page.evaluate(() => {
    const one = document.activeElement;
    return one.getAttribute("aria-label") || (one.localName === "select" ? one.id : one.textContent.trim()) || one.id;
  });

/** A whole chat without a mouse. */
export async function keyboard({ page }) {
  await fake(page, ["See [this](https://example.org/) and\n```\ncode\n```"]);
  await ready(page);
  assert.equal(await focused(page), "question");
  await page.keyboard.type("one");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("two");
  assert.equal(await question(page).inputValue(), "one\ntwo");
  await page.keyboard.press("Enter");
  await ended(page);
  assert.equal(await focused(page), "question");

  // From the beginning, in the order of the page.
  await page.evaluate(() => document.activeElement.blur());
  const order = [];
  for (let count = 0; count < 30 && order.at(-1) !== "Send"; count++) {
    await page.keyboard.press("Tab");
    order.push(await focused(page));
    if (order.at(-1) === "question") await page.keyboard.type("x"); // without it the button is off
  }
  assert.deepEqual(order.slice(order.indexOf("Skip to the message box")), [
    "Skip to the message box", "New chat", "one two", "Rename one two", "Delete one two", "Import", "Export all", "model",
    "Export this chat", "Theme: as the system", "Settings", "Copy this message", "Edit this message", "this", "Copy code",
    "Code", "Copy this answer", "Answer again", "question", "Attach text files", "Send",
  ]);

  await page.getByRole("button", { name: "Settings" }).focus();
  await page.keyboard.press("Enter");
  await page.getByRole("dialog", { name: "Settings of this chat" }).waitFor();
  await page.keyboard.press("Escape");
  await page.getByRole("dialog").waitFor({ state: "hidden" });
  assert.equal(await focused(page), "Settings");
  await page.locator(".skip").focus();
  await page.keyboard.press("Enter");
  assert.equal(await focused(page), "question");
}

/** No scrolling sideways, whatever an answer holds; the list of chats is a drawer that keeps the focus. */
export async function phone({ page, text }) {
  await fake(page, [text]);
  await ready(page);
  await question(page).fill(`look ${"x".repeat(300)}`);
  await page.getByRole("button", { name: "Send" }).click();
  await ended(page);
  const width = () =>
    page.evaluate(() => {
      const far = [...document.querySelectorAll("body, .page *")].filter((one) => {
        const inside = one.closest("pre, .table-frame, .visually-hidden, svg, .skip");
        return (!inside || inside === one) && one.getBoundingClientRect().right > innerWidth + 0.5;
      });
      return [document.scrollingElement.scrollWidth, document.querySelector("#scroller").scrollWidth, ...far.map((one) => one.outerHTML)];
    });
  assert.deepEqual(await width(), [360, 360]);
  await page.getByRole("button", { name: "Settings" }).click();
  const box = await page.getByRole("dialog").boundingBox();
  assert.ok(box.x >= 0 && box.x + box.width <= 360);
  await page.keyboard.press("Escape");

  assert.equal(await page.getByRole("button", { name: "New chat" }).count(), 0, "the closed drawer can be reached");
  await page.getByRole("button", { name: "Chats", exact: true }).click();
  assert.equal(await focused(page), "Close the list of chats");
  for (let count = 0; count < 12; count++) {
    await page.keyboard.press("Tab");
    assert.ok(await page.evaluate(() => document.activeElement === document.body || document.activeElement.closest("#sidebar")));
  }
  await page.keyboard.press("Escape");
  assert.equal(await focused(page), "Chats");
  // Enter begins a line on a touch screen, where nothing else does.
  await question(page).fill("a");
  await question(page).press("Enter");
  await page.keyboard.type("b");
  assert.equal(await question(page).inputValue(), "a\nb");
  await page.getByRole("button", { name: "Send" }).click();
  assert.equal(await answers(page).count(), 2);
}

/** As the system says, until the switch says otherwise; a reload keeps it. */
export async function themes({ page }) {
  const colour = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  await page.emulateMedia({ colorScheme: "light" });
  const light = await colour();
  await page.emulateMedia({ colorScheme: "dark" });
  const dark = await colour();
  assert.notEqual(light, dark);
  const button = page.getByRole("button", { name: /^Theme/ });
  await button.click();
  assert.equal(await button.getAttribute("aria-label"), "Theme: light");
  assert.equal(await colour(), light);
  await page.reload();
  assert.equal(await colour(), light);
  await page.emulateMedia({ colorScheme: "light" });
  await button.click();
  assert.equal(await colour(), dark);
  await button.click();
  assert.equal(await colour(), light);
}

/** No serious fault that axe-core finds, in each state of the page. */
export async function accessible({ page, text, colors }) {
  await page.emulateMedia({ colorScheme: colors });
  const found = [];
  const check = async (state) => {
    await page.evaluate(axe); // not a script of the page: its policy does not let one in
    const { violations } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
    for (const { id, impact, nodes } of violations) {
      if (impact === "serious" || impact === "critical") found.push(`${state}: ${id} ${nodes.map((one) => one.html)}`);
    }
  };
  await ready(page);
  await check("empty");
  await fake(page, [text], { reasoning: ["so"] });
  await ask(page, "show me");
  await ended(page);
  await page.getByRole("button", { name: "Answer again" }).click();
  await ended(page);
  await check("chat");
  await page.getByRole("button", { name: "Edit this message" }).focus();
  await page.keyboard.press("Enter");
  await check("editor");
  await page.keyboard.press("Escape");
  await page.getByRole("button", { name: "Settings" }).click();
  await check("settings");
  await page.keyboard.press("Escape");
  await page.getByRole("button", { name: "Delete show me" }).focus();
  await page.keyboard.press("Enter");
  await check("deleted");
  assert.deepEqual(found, []);
}

/** Must fail: axe-core sees a field without a name. */
export async function inaccessible({ page }) {
  await page.evaluate(() => document.querySelector("label[for=model]").remove());
  await accessible({ page, text: "x", colors: "light" });
}

/** What a screen reader finds: regions, headings, names; and what it is told. */
export async function tree({ page }) {
  await fake(page, ["Good **day**."]);
  await ask(page, "hello");
  await ended(page);
  const spoken = await page.locator("#announcer").textContent();
  const live = await page.locator("#messages").evaluate((one) => one.closest("[aria-live], [role=log], [role=status]") !== null);
  return { tree: await page.locator("body").ariaSnapshot(), spoken, live };
}
