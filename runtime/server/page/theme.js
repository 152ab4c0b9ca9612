// Runs before the page is painted, so that a chosen theme does not flash. main.js wires the button.
"use strict";
(() => {
  const themes = ["auto", "dark", "light"];
  const root = document.documentElement;
  let chosen = "auto";
  try {
    chosen = localStorage.getItem("edgephi.theme") ?? "auto";
  } catch {
    // a browser that keeps nothing follows the system
  }
  const set = (theme) => {
    chosen = themes.includes(theme) ? theme : "auto";
    root.dataset.theme = chosen;
  };
  set(chosen);
  window.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const name = () => {
      const label = `Theme: ${chosen === "auto" ? "as the system" : chosen}`;
      button.setAttribute("aria-label", label);
      button.title = label;
    };
    name();
    button.addEventListener("click", () => {
      set(themes[(themes.indexOf(chosen) + 1) % themes.length]);
      name();
      try {
        localStorage.setItem("edgephi.theme", chosen);
      } catch {
        // it holds until the page is closed
      }
    });
  });
})();
