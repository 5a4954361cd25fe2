// Takes the pictures of the chat page. Arguments: the browser, the server's address, the folder for the pictures.
import { chromium } from "playwright-core";

const [, , executablePath, url, folder] = process.argv;
const QUESTIONS = JSON.parse(process.env.QUESTIONS);
const SETTINGS = { Temperature: "0", "Longest answer": "220", "Repeat penalty": "1.1" };

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage({ viewport: { width: 1120, height: 760 }, colorScheme: "light", reducedMotion: "reduce" });
page.setDefaultTimeout(240_000);
await page.goto(url);
await page.waitForFunction(() => document.querySelector("#model option"));
await page.getByRole("button", { name: "Settings" }).click();
for (const [name, value] of Object.entries(SETTINGS)) await page.getByLabel(name, { exact: true }).fill(value);
await page.getByRole("button", { name: "Save" }).click();

for (const [number, { text, newChat }] of QUESTIONS.entries()) {
  if (newChat && number) await page.getByRole("button", { name: "New chat" }).click();
  await page.getByRole("textbox", { name: "Message", exact: true }).fill(text);
  await page.keyboard.press("Enter");
  await page.locator("li.answer").last().locator(".statistics").waitFor();
}

const shoot = (name) => page.screenshot({ path: `${folder}/page-${name}.png`, animations: "disabled" });
await page.locator("#scroller").evaluate((one) => one.scrollTo(0, 0));
await page.mouse.move(1100, 400);
await shoot("light");
await page.emulateMedia({ colorScheme: "dark" });
await page.getByRole("button", { name: "Settings" }).click();
await shoot("dark");
await page.keyboard.press("Escape");
await page.evaluate(() => document.activeElement.blur());
await page.emulateMedia({ colorScheme: "light" });
await page.setViewportSize({ width: 360, height: 720 });
await page.locator("#scroller").evaluate((one) => one.scrollTo(0, 0));
await page.waitForTimeout(300);
await shoot("phone");
await browser.close();
