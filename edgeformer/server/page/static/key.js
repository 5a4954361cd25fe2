/**
 * The dialog that asks for the server's key.
 */
import { listModels, ServerError, setKey } from "./api.js";
import { byId } from "./dom.js";

/**
 * Asks for the key until the server takes one.
 *
 * @returns {Promise<boolean>} whether there is one now; false if the user cancels
 */
export function askForKey() {
  const dialog = byId("key-dialog", HTMLDialogElement);
  const input = byId("key", HTMLInputElement);
  const problem = byId("key-problem", HTMLElement);
  const use = byId("use-key", HTMLButtonElement);
  input.value = "";
  problem.hidden = true;
  if (!dialog.open) dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    let isTaken = false;
    const attempt = async () => {
      setKey(input.value.trim());
      try {
        await listModels();
        isTaken = true;
        dialog.close();
      } catch (error) {
        const isWrong = error instanceof ServerError && error.status === 401;
        problem.textContent = isWrong ? "The server does not take this key." : /** @type {Error} */ (error).message;
        problem.hidden = false;
        input.focus();
      }
    };
    use.onclick = attempt;
    input.onkeydown = (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault(); // else it also presses what gets the focus back
      attempt();
    };
    byId("cancel-key", HTMLButtonElement).onclick = () => dialog.close();
    dialog.onclose = () => resolve(isTaken);
  });
}
