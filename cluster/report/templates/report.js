// Draws the figures in the palette of the reader's system, and again when that changes.
"use strict";
(() => {
  const read = (id) => document.getElementById(id).textContent;
  const colors = JSON.parse(read("colors"));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const options = { displayModeBar: false };

  // The figures use the light palette, whose colours are unique, so they can be replaced as text.
  const figures = () => {
    const text = read("figures");
    return JSON.parse(dark.matches ? text.replace(/#[0-9a-f]{6}/g, (color) => colors[color] || color) : text);
  };

  const draw = () => {
    for (const [key, figure] of Object.entries(figures())) {
      Plotly.react(`plot-${key}`, figure.data, figure.layout, options);
    }
  };

  // A plot's column can change while the window keeps its size, so each plot is observed itself.
  const watcher = new ResizeObserver((entries) => entries.forEach((entry) => Plotly.Plots.resize(entry.target)));

  draw();
  document.querySelectorAll(".plot").forEach((plot) => watcher.observe(plot));
  dark.addEventListener("change", draw);
})();
