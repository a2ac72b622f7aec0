"use strict";
// Draws a chart from its specification in the page when the reader comes near it, as SVG, as wide
// as its container. Whatever is printed is drawn before.
(function drawCharts() {
  const specs = JSON.parse(document.getElementById("charts").textContent);
  // Expressions are interpreted: the policy of the page lets no text be run as a script.
  const options = { renderer: "svg", actions: false, ast: true };

  // The rows of data that the page holds as columns.
  function rows(columns) {
    const names = Object.keys(columns);
    const values = names.map((name) => columns[name].texts
      ? columns[name].at.map((place) => columns[name].texts[place]) : columns[name]);
    return values[0].map((_, i) => Object.fromEntries(names.map((name, k) => [name, values[k][i]])));
  }

  function unfolded(value) {
    if (Array.isArray(value)) return value.map(unfolded);
    if (value === null || typeof value !== "object") return value;
    if (value.columns && Object.keys(value).length === 1 && !Array.isArray(value.columns)) {
      return typeof value.columns === "object" ? { values: rows(value.columns) } : value;
    }
    return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, unfolded(entry)]));
  }

  function draw(id) {
    const spec = specs[id];
    if (!spec) return;
    delete specs[id];
    window.vegaEmbed(document.getElementById(id), unfolded(spec), options)
      .catch((error) => console.error(`${id}: ${error.message}`));
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      draw(entry.target.id);
    }
  }, { rootMargin: "500px" });
  const [first, ...others] = Object.keys(specs);
  for (const id of others) near.observe(document.getElementById(id));
  if (first) draw(first);

  // Closed parts are printed too.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const part of opened) part.open = true;
    Object.keys(specs).forEach(draw);
  });
  window.addEventListener("afterprint", () => {
    for (const part of opened) part.open = false;
  });
})();
