// Draws the figures in the palette that the reader's system asks for, and again when it changes.
"use strict";
(() => {
  const read = (id) => document.getElementById(id).textContent;
  const colors = JSON.parse(read("colors"));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const options = { displayModeBar: false };

  // The figures hold the light palette; every colour in it is unique, so a swap by text is exact.
  const figures = () => {
    const text = read("figures");
    return JSON.parse(dark.matches ? text.replace(/#[0-9a-f]{6}/g, (color) => colors[color] || color) : text);
  };

  const draw = () => {
    for (const [key, figure] of Object.entries(figures())) {
      Plotly.react(`plot-${key}`, figure.data, figure.layout, options);
    }
  };

  // The window can keep its size while a plot's column changes, so each plot is watched itself.
  const watcher = new ResizeObserver((entries) => entries.forEach((entry) => Plotly.Plots.resize(entry.target)));

  draw();
  document.querySelectorAll(".plot").forEach((plot) => watcher.observe(plot));
  dark.addEventListener("change", draw);
})();
