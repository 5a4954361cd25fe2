// What an answer may do to the page: nothing.
import assert from "node:assert/strict";

import { ask, ended, fake } from "./tools.mjs";

/** Answers made of what is usually tried. Each is text on the page. */
export async function hostile({ page, texts }) {
  for (const [number, text] of texts.entries()) {
    await page.unrouteAll();
    await fake(page, text.match(/[^]{1,3}/g));
    await ask(page, `question ${number}`);
    await ended(page);
  }
  await page.reload();
  await page.locator("li.answer").nth(texts.length - 1).waitFor();
  // Links that are left lead to the web, and open without a handle on this page.
  const links = await page.locator(".answer-text a").evaluateAll((all) => all.map(({ href, rel, target }) => ({ href, rel, target })));
  assert.ok(links.length);
  for (const { href, rel, target } of links) {
    assert.match(href, /^(https?|mailto):/);
    assert.match(rel, /\bnoopener\b/);
    assert.equal(target, "_blank");
  }
  const attributes = await page.locator(".answer-text *").evaluateAll((all) => all.flatMap((one) => one.getAttributeNames()));
  for (const name of attributes) assert.doesNotMatch(name, /^(on|src|style)/);
  const allowed = "a p h3 h4 h5 h6 ul ol li blockquote hr br code pre strong em del table thead tbody tr th td div span button svg use";
  const tags = await page.locator(".answer-text *").evaluateAll((all) => [...new Set(all.map((one) => one.localName))]);
  assert.deepEqual(tags.filter((tag) => !allowed.split(" ").includes(tag)), []);
  assert.equal(await page.evaluate(() => window.stolen), undefined);
  return page.locator(".answer-text").allTextContents();
}

/** The policy holds even against code of the page itself. */
export async function policy({ page }) {
  const refused = await page.evaluate(async () => {
    const found = [];
    try {
      document.body.insertAdjacentHTML("beforeend", "<b>x</b>");
    } catch (error) {
      found.push(error.name);
    }
    const blocked = [];
    document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
    const frame = document.createElement("iframe");
    frame.src = "data:text/html,x";
    const picture = document.createElement("img");
    picture.src = "https://elsewhere.example/x.png";
    const form = document.createElement("form");
    form.action = "/health";
    document.body.append(frame, picture, form);
    form.submit();
    // The events come when the browser gets to it; one that is too many may follow the four.
    const later = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
    for (let waited = 0; blocked.length < 4 && waited < 10_000; waited += 50) await later(50);
    await later(200);
    for (const one of [frame, picture, form]) one.remove();
    return [...found, ...blocked];
  });
  assert.deepEqual(refused.sort(), ["TypeError", "form-action", "frame-src", "img-src", "require-trusted-types-for"].sort());
}

/** Must fail: the driver sees a page that asks elsewhere. */
export async function elsewhere({ page }) {
  await page.evaluate(() => fetch("http://127.0.0.1:9/").catch(() => {}));
}

/** Must fail: the driver sees an error of the page. */
export async function broken({ page }) {
  await page.evaluate(() => setTimeout(() => undefined.x));
  await page.waitForTimeout(100);
}

/** Markdown as elements. */
export async function markdown({ page, text }) {
  await fake(page, text.match(/[^]{1,7}/g), { reasoning: ["I ", "think"] });
  await ask(page, "show me");
  await ended(page);
  const root = page.locator(".answer-text");
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  await root.getByRole("button", { name: "Copy code" }).first().click();
  await page.getByRole("status").filter({ hasText: "Copied." }).waitFor();
  return {
    snapshot: await root.ariaSnapshot(),
    copied: await page.evaluate(() => navigator.clipboard.readText()),
    numbers: await page.locator(".statistics").textContent(),
  };
}
