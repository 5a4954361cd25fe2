/**
 * Starts the page.
 */
import { App } from "./app.js";
import { startTheme } from "./theme.js";

startTheme();
const app = new App();
app.composer.focus();
await app.loadModels();
