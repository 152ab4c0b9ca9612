// The page in a browser, against `tests/page/server.py`; tests/end_to_end/test_page.py runs it, with EDGEPHI_PAGE_BUNDLE
// (a bundle with test_tools.py's template for Hermes) and EDGEPHI_PYTHON (which runs the server).

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { after, before, beforeEach, test } from "node:test";
import { fileURLToPath } from "node:url";
import { launch, resolve } from "./browser.mjs";

const PROJECT = join(dirname(fileURLToPath(import.meta.url)), "..", "..");
const BUNDLE = process.env.EDGEPHI_PAGE_BUNDLE;
const KEY = "a-key-for-the-page";
const AXE = readFileSync(resolve("axe-core/axe.min.js"), "utf8");
const IN_TIME = 60_000; // on a machine with other work to do

let browser, served, locked, page, complaints;

/** A server in a process of its own, which ends with this one. */
async function start(port, ...keys) {
  const command = ["-m", "tests.page.server", BUNDLE, String(port), ...keys];
  const child = spawn(process.env.EDGEPHI_PYTHON ?? "python", command, { cwd: PROJECT, stdio: ["pipe", "pipe", "inherit"] });
  const url = await new Promise((done, failed) => {
    child.stdout.once("data", (data) => done(String(data).trim()));
    child.once("exit", (code) => failed(new Error(`the server ended with status ${code}`)));
  });
  return { url, child, port: Number(new URL(url).port) };
}

async function kill({ child }) {
  const gone = new Promise((done) => child.once("exit", done));
  child.kill("SIGKILL");
  await gone;
}

before(async () => {
  // the browser last: where a server does not start, nothing is left running that would keep this process
  [served, locked] = await Promise.all([start(0), start(0, KEY)]);
  browser = await launch();
});

after(async () => {
  await browser?.close();
  for (const one of [served, locked]) one?.child.kill("SIGKILL");
});

/** A page of its own storage; what the browser complains about fails the test. */
async function open(url, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 800 }, reducedMotion: "reduce", ...options });
  const opened = await context.newPage();
  opened.setDefaultTimeout(IN_TIME);
  opened.on("pageerror", (error) => complaints.push(String(error)));
  opened.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  opened.on("request", (request) => request.url().startsWith(url) || complaints.push(`asks for ${request.url()}`));
  await opened.goto(url);
  return opened;
}

beforeEach(async () => {
  complaints = [];
  await page?.context().close();
  page = await open(served.url);
});

const prompt = () => page.getByRole("textbox", { name: "Message", exact: true });
const button = (name) => page.getByRole("button", { name, exact: true });
const answers = () => page.locator(".message.assistant .text");
const lastAnswer = () => answers().last();
const ended = () => button("Regenerate").waitFor();

async function ask(text) {
  await prompt().fill(text);
  await prompt().press("Enter");
}

/** Wait until an element's text has this. */
async function has(locator, text) {
  await locator.filter({ hasText: text }).first().waitFor({ timeout: IN_TIME });
}

const silent = () => assert.deepEqual(complaints, []);

test("a chat, its numbers, and what the browser keeps of it", async () => {
  await ask("greet me");
  await ended();
  assert.equal(await lastAnswer().innerText(), "Good morning. How can I help?");
  await has(page.locator(".stats summary"), /tokens\/s · CPU/);
  await page.locator(".stats summary").click();
  await has(page.locator(".stats"), /Prompt\s*\d+ tokens/);
  await has(page.locator("#place"), "CPU");
  await ask("markdown please");
  await page.locator(".message.assistant table").waitFor();
  await ended();
  assert.deepEqual(await page.locator(".message.assistant h4, .message.assistant th").allInnerTexts(), ["Two ways", "way", "memory", "time"]);
  assert.equal(await page.locator(".text ol > li > ul > li > em").innerText(), "slices");
  await page.reload();
  await has(answers().first(), "Good morning. How can I help?");
  assert.equal(await answers().count(), 2);
  await button("New chat").click();
  assert.equal(await answers().count(), 0);
  await button("Bring the last one back").click();
  assert.equal(await answers().count(), 2);
  silent();
});

test("an answer streams, and stops", async () => {
  await ask("a long one");
  await has(lastAnswer(), "It goes on");
  assert.ok(await button("Send").isHidden());
  await button("Stop").click();
  await has(page.locator(".ending"), "Stopped.");
  const text = await lastAnswer().innerText();
  assert.ok(text.startsWith("This answer is long.") && !text.includes("its end"), text);
  assert.equal(await page.evaluate(() => document.activeElement.id), "prompt");
  await ask("greet");
  await has(answers().nth(1), "Good morning");
  silent();
});

test("a new chat during an answer can bring the last one back", async () => {
  await ask("a long one");
  await has(lastAnswer(), "It goes on");
  await button("New chat").click();
  await button("Send").waitFor();
  await button("Bring the last one back").click();
  await has(lastAnswer(), "This answer is long.");
  await has(page.locator(".ending"), "Stopped.");
  silent();
});

test("a tab that is closed brings nothing back that another tab deleted", async () => {
  await ask("greet");
  await ended();
  const other = await page.context().newPage();
  await other.goto(served.url);
  await other.getByRole("button", { name: "Settings", exact: true }).click();
  await other.getByRole("button", { name: "Delete all of it", exact: true }).click();
  await page.goto("about:blank");
  assert.equal(await other.evaluate(() => localStorage.getItem("edgephi.chat")), null);
});

test("text that runs to the left does so, and code does not", async () => {
  const left = "\u05e9\u05dc\u05d5\u05dd, \u05e2\u05d5\u05dc\u05dd!";
  const text = `${left}\n\n- ${left}\n\n\`a < b\``;
  const chunks = [{ choices: [{ index: 0, delta: { content: text } }] }, { choices: [{ index: 0, delta: {}, finish_reason: "stop" }] }];
  const body = `${chunks.map((one) => `data: ${JSON.stringify(one)}\n\n`).join("")}data: [DONE]\n\n`;
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream", body }));
  await ask(left);
  await ended();
  /** Whether the last sign is left of the first letter. */
  const toTheLeft = (locator) =>
    locator.evaluate((element) => {
      const place = (at) => {
        const range = document.createRange();
        range.setStart(element.firstChild, at);
        range.setEnd(element.firstChild, at + 1);
        return range.getBoundingClientRect().left;
      };
      return place(element.firstChild.length - 1) < place(0);
    });
  for (const one of [page.locator(".user .body"), lastAnswer().locator("p").first(), lastAnswer().locator("li")]) assert.ok(await toTheLeft(one));
  assert.ok(!(await toTheLeft(lastAnswer().locator("code"))));
});

test("a growing answer is followed, unless somebody reads further up", async () => {
  await page.setViewportSize({ width: 390, height: 330 });
  await ask("a long one");
  await has(lastAnswer(), "Word 20.");
  const left = () => page.locator("#chat").evaluate((chat) => chat.scrollHeight - chat.scrollTop - chat.clientHeight);
  assert.ok((await left()) < 60);
  await page.locator("#chat").evaluate((chat) => (chat.scrollTop = 0));
  await has(lastAnswer(), "Word 40.");
  assert.equal(await page.locator("#chat").evaluate((chat) => chat.scrollTop), 0);
  silent();
});

test("what the server says is shown", async () => {
  const error = { message: "8 wait already. Try again later.", type: "rate_limit_error" };
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ status: 429, headers: { "retry-after": "7" }, json: { error } }));
  await ask("greet");
  await has(page.locator(".ending.bad"), "The server says: 8 wait already. Try again later. It asks to wait for 7 s.");
  await page.unroute("**/v1/chat/completions");
  const begun = { choices: [{ delta: { content: "It began" } }] };
  const ending = { error: { message: "The server ended before the answer did." } };
  const body = `data: ${JSON.stringify(begun)}\n\n: computing\n\nevent: error\ndata: ${JSON.stringify(ending)}\n\n`;
  await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream", body }));
  await button("Try again").click();
  await has(page.locator(".ending.bad"), "The server says: The server ended before the answer did.");
  assert.equal(await lastAnswer().innerText(), "It began");
  assert.deepEqual(complaints.filter((text) => !text.includes("status of 429")), []);
});

test("regenerate and edit", async () => {
  await ask("tell it again");
  await ended();
  await has(lastAnswer(), "The first answer.");
  await button("Regenerate").click();
  await has(lastAnswer(), "The second answer.");
  assert.equal(await answers().count(), 1);
  await ended();
  await button("Edit").click();
  await page.getByRole("textbox", { name: "Edit your message" }).fill("now greet me");
  await page.keyboard.press("Enter");
  await has(lastAnswer(), "Good morning");
  assert.deepEqual(await page.locator(".message.user .body").allInnerTexts(), ["now greet me"]);
  silent();
});

test("a form of the answer: JSON, cut off, and a schema that is none", async () => {
  await button("Settings").click();
  await page.getByLabel("Form of the answer").selectOption("json_schema");
  await button("Example schema").click();
  await ask("json of somebody");
  await ended();
  assert.deepEqual(JSON.parse(await page.locator(".text pre").innerText()), { name: "Ada", age: 36 });
  assert.ok((await page.locator(".text pre").innerText()).includes('\n  "name": "Ada"'));
  await page.getByLabel("Most tokens").fill("5");
  await button("Regenerate").click();
  await has(page.locator(".ending.bad"), "no whole JSON: it was cut off");
  await page.getByLabel("JSON Schema", { exact: true }).fill("{");
  await has(page.locator("#schema-error"), "The schema is no JSON");
  await ask("json again");
  await has(page.locator("#problem"), "The schema is no JSON");
  assert.equal(await page.evaluate(() => document.activeElement.id), "schema");
  await page.getByLabel("JSON Schema", { exact: true }).fill('{"type": "nothing"}');
  await ask("json again");
  await has(page.locator(".ending.bad"), /The server says: .*nothing/);
  assert.deepEqual(complaints.filter((text) => !text.includes("status of 400")), []);
});

test("a tool: the person gives its result", async () => {
  await button("Settings").click();
  await button("Example tool").click();
  await page.getByLabel("System prompt").fill("Be brief.");
  await ask("the weather in Oslo?");
  const result = page.getByRole("textbox", { name: "Result of get_weather" });
  await result.waitFor();
  await has(page.locator(".call pre"), '"city": "Oslo"');
  assert.equal(await lastAnswer().innerText(), "Let me see.");
  await ask("and now?");
  await has(page.locator("#problem"), "The model waits for the result of a tool.");
  await result.fill("21 degrees");
  const request = page.waitForRequest("**/v1/chat/completions");
  await button("Send the result").click();
  const { messages, tools } = (await request).postDataJSON();
  assert.deepEqual(messages.map((one) => one.role), ["system", "user", "assistant", "tool"]);
  assert.equal(messages[3].tool_call_id, messages[2].tool_calls[0].id);
  assert.equal(tools[0].function.name, "get_weather");
  await has(lastAnswer(), "It is 21 degrees in Oslo.");
  silent();
});

test("a question that is faster than the list of models waits for it", async () => {
  let told;
  const list = new Promise((done) => (told = done));
  await page.route("**/v1/models", async (route) => {
    await list;
    await route.continue();
  });
  await page.reload();
  await ask("greet me");
  await prompt().press("Enter");
  assert.equal(await answers().count(), 0);
  told();
  await ended();
  assert.deepEqual(await answers().allInnerTexts(), ["Good morning. How can I help?"]);
  assert.equal(await page.locator("#problem").innerText(), "");
  assert.equal(await prompt().inputValue(), "");
  silent();
});

test("models, and the devices of one", async () => {
  assert.deepEqual(await page.getByLabel("Model", { exact: true }).locator("option").allInnerTexts(), ["tiny", "other"]);
  assert.ok(await page.getByLabel("Device").isHidden());
  await ask("which model");
  await has(lastAnswer(), "I am tiny.");
  await ended();
  await page.getByLabel("Model", { exact: true }).selectOption("other");
  assert.deepEqual(await page.getByLabel("Device").locator("option").allInnerTexts(), ["cpu", "gpu"]);
  await has(page.locator("#place"), "not loaded");
  await page.getByLabel("Device").selectOption("gpu");
  await ask("which model");
  await has(answers().nth(1), "I am other@gpu.");
  await ended();
  await has(page.locator(".stats").last(), "CPU");
  await page.reload();
  await has(page.locator("#place"), "CPU");
  assert.deepEqual([await page.getByLabel("Model", { exact: true }).inputValue(), await page.getByLabel("Device").inputValue()], ["other", "other@gpu"]);
  silent();
});

test("an API key is asked for, and kept in this tab only", async () => {
  await page.goto(locked.url);
  const field = page.getByLabel("This server wants an API key");
  await field.fill("a-wrong-key-of-some-length");
  await field.press("Enter");
  await has(page.locator("#problem"), "The server does not take this key.");
  await giveKey();
  await ask("greet");
  await has(lastAnswer(), "Good morning");
  const kept = await page.evaluate(() => [localStorage, sessionStorage].map((one) => JSON.stringify(one)));
  assert.deepEqual(kept.map((text) => text.includes(KEY)), [false, true]);
});

async function giveKey() {
  const field = page.getByLabel("This server wants an API key");
  await field.fill(KEY);
  await field.press("Enter");
  await field.waitFor({ state: "hidden" });
}

test("the theme is the system's or one's own, and everything kept can be deleted", async () => {
  const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const light = await ground();
  await button("Theme: as the system").click();
  assert.notEqual(await ground(), light);
  await page.reload();
  await button("Theme: dark").click();
  assert.equal(await ground(), light);
  await button("Settings").click();
  await page.getByLabel("System prompt").fill("Be brief.");
  await ask("greet");
  await ended();
  await page.reload();
  await button("Settings").click();
  assert.equal(await page.getByLabel("System prompt").inputValue(), "Be brief.");
  await button("Delete all of it").click();
  assert.equal(await answers().count(), 0);
  await page.reload();
  assert.deepEqual(await page.evaluate(() => Object.keys(localStorage)), ["edgephi.theme"]);
  assert.equal(await page.locator("#system").inputValue(), "");
  silent();
});

test("a server that dies midway", async () => {
  await page.goto(locked.url);
  await giveKey();
  await ask("a long one");
  await has(lastAnswer(), "It goes on");
  await kill(locked);
  await has(page.locator(".ending.bad"), "The connection broke off before the answer was finished");
  await has(lastAnswer(), "This answer is long.");
  await button("Try again").click();
  await has(page.locator(".ending.bad"), "The server cannot be reached.");
  locked = await start(locked.port, KEY);
  await button("Try again").click();
  await has(lastAnswer(), "It goes on");
});

test("what a model writes stays text", async () => {
  await ask("something hostile");
  await ended();
  const answer = lastAnswer();
  const text = await answer.innerText();
  for (const part of ["<script>window.hacked = 1</script>", "<img src=x", "[click](javascript:window.hacked=3)", "![a picture](https://example.org/p.png)", "<b>code</b>"]) {
    assert.ok(text.includes(part), part);
  }
  assert.equal(await answer.locator("script, img, b").count(), 0);
  const links = await answer.locator("a").evaluateAll((all) => all.map((one) => [one.getAttribute("href"), one.rel]));
  assert.deepEqual(links, [["https://example.org/a?b=1", "noopener noreferrer"]]);
  assert.equal(await page.evaluate(() => window.hacked), undefined);
  // nor would the browser run it, were the renderer wrong
  await assert.rejects(page.evaluate(() => { document.createElement("p").innerHTML = "<b>x</b>"; }), /TrustedHTML/);
  assert.deepEqual(complaints.filter((text) => !text.includes("TrustedHTML")), []);
});

const MARKDOWN = [
  ["# One\n### Two\n## Three ##", "<h4>One</h4><h5>Two</h5><h5>Three</h5>"],
  ["a *b* **c** ***d*** ~~e~~ `f*g*` __h__ i_j_k 2 * 3 * 4", "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <del>e</del> <code>f*g*</code> <strong>h</strong> i_j_k 2 * 3 * 4</p>"],
  ["one\ntwo\n\nthree \\*four\\*", "<p>one<br>two</p><p>three *four*</p>"],
  ["1. a\n  - b\n\n   c\n2. d", "<ol><li><p>a</p><ul><li>b</li></ul><p>c</p></li><li>d</li></ol>"],
  ["- a\n- b\n\n3) c", '<ul><li>a</li><li>b</li></ul><ol start="3"><li>c</li></ol>'],
  ["> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"],
  ["---", "<hr>"],
  ["a https://example.org/b_(c). d", '<p>a <a href="https://example.org/b_(c)" target="_blank" rel="noopener noreferrer">https://example.org/b_(c)</a>. d</p>'],
  ["[a](http://x.org 't') [b](ftp://x) [c](/d)", '<p><a href="http://x.org/" target="_blank" rel="noopener noreferrer">a</a> [b](ftp://x) [c](/d)</p>'],
  ["**unclosed `too", "<p>**unclosed `too</p>"],
  ["<details open ontoggle=alert(1)>", "<p>&lt;details open ontoggle=alert(1)&gt;</p>"],
];

test("Markdown", async () => {
  const render = (texts) =>
    page.evaluate(async (given) => {
      const { MarkdownView } = await import("/markdown.js");
      return given.map((text) => {
        const element = document.createElement("div");
        const view = new MarkdownView(element);
        for (const end of [text.length / 3, text.length / 2, text.length]) view.update(text.slice(0, end)); // it grows
        return element.innerHTML;
      });
    }, texts);
  assert.deepEqual(await render(MARKDOWN.map(([text]) => text)), MARKDOWN.map(([, html]) => html.replaceAll("<ol>", '<ol start="1">')));
  const started = Date.now();
  const signs = ["*", "**a ", "_", "`", "``a`", "[", "![", "[a](", "> ", "- ", "1. ", "|a", "~~", "<", "\\", "# ", " - a\n", "http://", ")", "```\n", "&", "a|b\n-|-\n"];
  await render(signs.map((sign) => sign.repeat(20_000 / sign.length)));
  assert.ok(Date.now() - started < 10_000, "a model can make the page hang");
  silent();
});

test("the keyboard is enough", async () => {
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "Skip to the message field");
  await page.keyboard.press("Enter");
  await page.keyboard.type("a long");
  await page.keyboard.press("Shift+Enter");
  await page.keyboard.type("one");
  assert.equal(await prompt().inputValue(), "a long\none");
  await page.keyboard.press("Enter");
  await has(lastAnswer(), "It goes on");
  await page.keyboard.press("Escape");
  await has(page.locator(".ending"), "Stopped.");
  await has(page.locator("#announcer"), "This answer is long.");
  await has(page.locator("#announcer"), "Stopped.");
  await page.keyboard.press("Shift+Tab"); // back to the last answer's buttons
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "Regenerate");
  const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
  assert.equal(outline, "solid");
  await button("Settings").focus();
  await page.keyboard.press("Enter");
  assert.equal(await page.evaluate(() => document.activeElement.id), "close-settings");
  await page.keyboard.press("Escape");
  assert.equal(await page.evaluate(() => document.activeElement.id), "open-settings");
  silent();
});

test("axe finds nothing, in light and dark, on a phone and on a desk", async () => {
  await checkAll("empty");
  await ask("markdown please");
  await ended();
  await page.locator(".stats summary").click();
  await checkAll("an answer");
  await ask("something hostile");
  await button("Settings").click();
  await button("Example tool").click();
  await page.getByLabel("Form of the answer").selectOption("json_schema");
  await ended();
  await checkAll("settings");
  silent();
});

async function checkAll(what) {
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    for (const width of [1280, 390]) {
      await page.setViewportSize({ width, height: 800 });
      await check(`${what}, ${colorScheme}, ${width} px`);
    }
  }
  for (const width of [390, 768, 1280, 1920]) {
    await page.setViewportSize({ width, height: 800 });
    const wide = await page.evaluate(() => [document.documentElement, document.getElementById("chat")].map((one) => one.scrollWidth - one.clientWidth));
    assert.deepEqual(wide, [0, 0], `${what}: it is wider than ${width} px`);
  }
}

async function check(what) {
  if (!(await page.evaluate(() => "axe" in window))) await page.evaluate(AXE);
  const found = await page.evaluate(() => axe.run());
  const told = found.violations.map((one) => `${what}: ${one.id}: ${one.nodes.map((node) => node.html.slice(0, 120)).join(" | ")}`);
  assert.deepEqual(told, []);
  assert.ok(found.passes.length > 10);
}
