// Pictures of the page for the documentation: node tools/page_screenshots.mjs URL [FOLDER] [QUESTION]
// A server has to run at URL. EDGEPHI_NODE_MODULES and EDGEPHI_CHROMIUM are as for tests/page/page.test.mjs.

import { join } from "node:path";
import { launch } from "../tests/page/browser.mjs";

const [url, folder = "docs/images", asked] = process.argv.slice(2);
const question = asked ?? "Write a Python function that returns the larger of two numbers, and explain it.";
if (!url) {
  console.error("usage: node tools/page_screenshots.mjs URL [FOLDER] [QUESTION]");
  process.exit(2);
}
const VIEWS = [
  { width: 390, height: 760 },
  { width: 1280, height: 760, settings: true },
];

const browser = await launch();
try {
  for (const colorScheme of ["light", "dark"]) {
    for (const { width, height, settings } of VIEWS) {
      const page = await browser.newPage({ viewport: { width, height }, colorScheme, reducedMotion: "reduce" });
      await page.goto(url);
      if (settings) await page.getByRole("button", { name: "Settings", exact: true }).click();
      const prompt = page.getByRole("textbox", { name: "Message" });
      await prompt.fill(question);
      await prompt.press("Enter");
      await page.getByRole("button", { name: "Regenerate" }).waitFor({ timeout: 300_000 });
      await page.locator("#place[data-state=loaded]").waitFor();
      await page.locator("#chat").evaluate((chat) => (chat.scrollTop = 0));
      await page.screenshot({ path: join(folder, `page-${width}-${colorScheme}.png`) });
      await page.close();
    }
  }
} finally {
  await browser.close();
}
