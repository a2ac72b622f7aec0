"use strict";
// Draws every chart from its specification in the page, as SVG, as wide as its container.
(function drawCharts() {
  const specs = JSON.parse(document.getElementById("charts").textContent);
  // Expressions are interpreted: the policy of the page lets no text be run as a script.
  const options = { renderer: "svg", actions: false, ast: true };
  for (const [id, spec] of Object.entries(specs)) {
    window.vegaEmbed(document.getElementById(id), spec, options)
      .catch((error) => console.error(`${id}: ${error.message}`));
  }
  // Closed parts are printed too.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const part of opened) part.open = true;
  });
  window.addEventListener("afterprint", () => {
    for (const part of opened) part.open = false;
  });
})();
