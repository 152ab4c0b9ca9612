// The reports that EDGEPHI_REPORTS holds (*.html, *.svg), as a browser shows them; tests/end_to_end/test_bench_page.py
// runs it. EDGEPHI_SCREENSHOTS names a folder to keep pictures in.

import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { pathToFileURL } from "node:url";
import { launch, resolve } from "./browser.mjs";

const FOLDER = process.env.EDGEPHI_REPORTS;
const PICTURES = process.env.EDGEPHI_SCREENSHOTS;
const AXE = readFileSync(resolve("axe-core/axe.min.js"), "utf8");
const WIDTHS = [390, 1280, 1920];
const of = (ending) => readdirSync(FOLDER).filter((name) => name.endsWith(ending)).sort();

let browser;
before(async () => void (browser = await launch()));
after(async () => browser?.close());

/** A report in a page of its own; what it asks for beyond itself is a complaint. */
async function open(name, viewport, complaints = []) {
  const context = await browser.newContext({ viewport, colorScheme: "light", bypassCSP: true }); // axe must run
  const page = await context.newPage();
  const url = pathToFileURL(join(FOLDER, name)).href;
  page.on("request", (request) => request.url() === url || complaints.push(`asks for ${request.url()}`));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("dialog", (dialog) => complaints.push(dialog.message()));
  await page.goto(url);
  return page;
}

/** Pairs of labels of one drawing that lie on each other. */
const overlaps = () =>
  [...document.querySelectorAll("svg")].filter((svg) => !svg.parentElement?.closest("svg")).flatMap((svg) => {
    const texts = [...svg.querySelectorAll("text")].map((one) => [one.textContent, one.getBoundingClientRect()]);
    return texts.flatMap(([a, p], index) =>
      texts.slice(index + 1)
        .filter(([, q]) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
        .map(([b]) => `${a} on ${b}`),
    );
  });

for (const name of of(".html")) {
  test(`${name} at three widths, in light and dark`, async () => {
    const complaints = [];
    const page = await open(name, { width: 1280, height: 900 }, complaints);
    await page.evaluate(AXE);
    for (const width of WIDTHS) {
      await page.setViewportSize({ width, height: 900 });
      const wide = await page.evaluate(() => {
        const boxes = [document.documentElement, ...document.querySelectorAll("main > *:not(.wide), .tiles li, .chart")];
        return boxes.filter((box) => box.scrollWidth > box.clientWidth + 1).map((box) => box.outerHTML.slice(0, 80));
      });
      assert.deepEqual(wide, [], `${width} px`);
      assert.deepEqual(await page.evaluate(overlaps), [], `${width} px`);
      const grounds = [];
      for (const colorScheme of ["light", "dark"]) {
        await page.emulateMedia({ colorScheme });
        grounds.push(await page.evaluate(() => getComputedStyle(document.body).backgroundColor));
        if (width < 1920) {
          const found = await page.evaluate(() => axe.run());
          const told = found.violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.html.slice(0, 120)).join(" | ")}`);
          assert.deepEqual(told, [], `${width} px, ${colorScheme}`);
          assert.ok(found.passes.length > 10);
        }
        if (PICTURES) await page.screenshot({ path: join(PICTURES, `${name}-${width}-${colorScheme}.png`), timeout: 120_000 });
      }
      assert.notEqual(grounds[0], grounds[1]);
    }
    assert.ok((await page.locator(".tiles li strong").count()) > 0);
    const used = await page.evaluate(() => {
      const box = document.querySelector("main").getBoundingClientRect();
      const right = Math.max(...[...document.querySelectorAll(".chart")].map((one) => one.getBoundingClientRect().right));
      return right - box.right;
    });
    assert.ok(Math.abs(used) < 2, "charts end where the page ends");
    await page.emulateMedia({ media: "print", colorScheme: "dark" });
    assert.equal(await page.evaluate(() => getComputedStyle(document.body).backgroundColor), "rgb(255, 255, 255)");
    assert.deepEqual(complaints, []);
    await page.context().close();
  });
}

for (const name of of(".svg")) {
  test(`${name} has no label on another`, async () => {
    const page = await open(name, { width: 1280, height: 900 });
    assert.deepEqual(await page.evaluate(overlaps), []);
    assert.ok((await page.locator("text").count()) > 10);
    const ground = () => page.evaluate(() => getComputedStyle(document.querySelector(".ground")).fill);
    const light = await ground();
    await page.emulateMedia({ colorScheme: "dark" });
    assert.notEqual(await ground(), light);
    await page.context().close();
  });
}
