/**
 * The dialog of a chat's settings. The names are those of the API; an empty field is left out of the request.
 */
import { byId, h } from "./dom.js";

/** @import { Settings } from "./conversation.js" */

/**
 * @typedef {object} Field
 * @property {string} name
 * @property {string} label
 * @property {number} [min]
 * @property {number} [max]
 * @property {boolean} [whole]
 * @property {string} hint
 */

/** @type {Field[]} */
const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 10, hint: "0 takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0, max: 1, hint: "share of the probability" },
  { name: "top_k", label: "Top k", min: 0, whole: true, hint: "that many tokens; 0 is all" },
  { name: "min_p", label: "Min p", min: 0, max: 1, hint: "share of the likeliest" },
  { name: "max_tokens", label: "Longest answer", min: 1, whole: true, hint: "tokens" },
  { name: "seed", label: "Seed", min: 0, whole: true, hint: "the same draws again" },
  { name: "repeat_penalty", label: "Repeat penalty", min: 0.01, max: 10, hint: "1 is none" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, hint: "for tokens that were used" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, hint: "for each time" },
];

/**
 * Makes the dialog work.
 *
 * @param {() => Settings} read the settings of the chat
 * @param {(settings: Settings) => void} write
 */
export function startSettings(read, write) {
  const dialog = byId("settings", HTMLDialogElement);
  const system = byId("system-prompt", HTMLTextAreaElement);
  const stop = byId("stop-texts", HTMLTextAreaElement);
  const problem = byId("settings-problem", HTMLElement);
  /** @type {Map<Field, HTMLInputElement>} */
  const inputs = new Map();
  for (const field of FIELDS) {
    const id = `field-${field.name}`;
    const input = h("input", {
      id,
      type: "number",
      inputmode: field.whole ? "numeric" : "decimal",
      min: field.min ?? null,
      max: field.max ?? null,
      step: field.whole ? 1 : "any",
      "aria-describedby": `${id}-hint`,
    });
    inputs.set(field, input);
    const hint = h("small", { id: `${id}-hint` }, field.hint);
    byId("fields", HTMLElement).append(
      h("div", { class: "field" }, h("label", { for: id }, field.label), input, hint),
    );
  }

  /** @param {Settings} settings */
  function fill(settings) {
    system.value = settings.system ?? "";
    stop.value = (settings.stop ?? []).join("\n");
    for (const [field, input] of inputs) input.value = String(settings.numbers?.[field.name] ?? "");
    problem.hidden = true;
  }

  function save() {
    /** @type {Record<string, number>} */
    const numbers = {};
    for (const [field, input] of inputs) {
      if (!input.checkValidity()) {
        problem.textContent = `${field.label}: ${input.validationMessage}`;
        problem.hidden = false;
        input.focus();
        return;
      }
      if (input.value !== "") numbers[field.name] = input.valueAsNumber;
    }
    const stops = stop.value.split("\n").filter(Boolean);
    write({
      numbers,
      ...(system.value.trim() ? { system: system.value.trim() } : {}),
      ...(stops.length ? { stop: stops } : {}),
    });
    dialog.close();
  }

  byId("open-settings", HTMLButtonElement).addEventListener("click", () => {
    fill(read());
    dialog.showModal();
  });
  byId("close-settings", HTMLButtonElement).addEventListener("click", () => dialog.close());
  byId("reset-settings", HTMLButtonElement).addEventListener("click", () => fill({}));
  byId("save-settings", HTMLButtonElement).addEventListener("click", save);
  dialog.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.target instanceof HTMLInputElement)) return;
    event.preventDefault(); // else it also presses the button that gets the focus back
    save();
  });
}
