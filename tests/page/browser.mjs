// Finds playwright-core and Chromium: EDGEPHI_NODE_MODULES and EDGEPHI_CHROMIUM name them, or they are where they
// usually are.

import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const folder = process.env.EDGEPHI_NODE_MODULES;
const require = createRequire(folder ? join(folder, "..", "anything.js") : import.meta.url);

/** A package, or a path in one. */
export const load = (name) => require(name);
export const resolve = (name) => require.resolve(name);

const USUAL = [
  "/usr/bin/chromium",
  "/usr/bin/chromium-browser",
  "/usr/bin/google-chrome",
  "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
  "C:\\Program Files\\Google\\Chrome\\Application\\chrome.exe",
  "C:\\Program Files (x86)\\Microsoft\\Edge\\Application\\msedge.exe",
];

/** A headless browser. */
export function launch() {
  const named = process.env.EDGEPHI_CHROMIUM;
  const executablePath = (named ? [named] : USUAL).find(existsSync);
  if (!executablePath) throw new Error(named ? `there is no ${named}` : "Chromium is not installed where it usually is");
  // root has no sandbox; only this repository's own page is opened
  const args = process.getuid?.() === 0 ? ["--no-sandbox"] : [];
  return load("playwright-core").chromium.launch({ executablePath, args, headless: true });
}
