/**
 * The switch of the theme: as the system says, light, dark. theme.css has the colours.
 */
import { announce, byId, icon } from "./dom.js";
import { remember, remembered } from "./store.js";

const THEMES = ["auto", "light", "dark"];
const NAMES = /** @type {Record<string, string>} */ ({ auto: "as the system", light: "light", dark: "dark" });

/** Makes the switch work. */
export function startTheme() {
  const button = byId("theme", HTMLButtonElement);
  let chosen = remembered("theme") ?? "auto";

  function show() {
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    button.replaceChildren(icon(chosen));
    button.title = `Theme: ${NAMES[chosen]}`;
    button.setAttribute("aria-label", button.title);
  }

  button.addEventListener("click", () => {
    chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
    remember("theme", chosen);
    show();
    announce(button.title);
  });
  show();
}
