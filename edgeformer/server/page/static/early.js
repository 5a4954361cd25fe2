// Not a module: it runs before the page is drawn, so that a chosen theme does not flash. See theme.js.
(() => {
  const chosen = localStorage.getItem("edgeformer.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
