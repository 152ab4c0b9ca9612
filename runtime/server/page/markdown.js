// Markdown as models write it, made into elements. HTML in it stays text, images are not loaded, and links lead to
// http and https only. Every scan is bounded, because a model may write anything.

import { copyButton, make } from "./dom.js";

const DEEPEST = 10;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/**
 * Shows a text that grows in an element; blocks that did not change keep their elements, so a selection stays and a
 * long answer costs no more than its last block.
 */
export class MarkdownView {
  #shown = [];

  constructor(element) {
    this.element = element;
  }

  update(text) {
    const blocks = parseBlocks(text);
    let same = 0;
    while (same < blocks.length && same < this.#shown.length && this.#shown[same].key === blocks[same].key) same++;
    for (const { node } of this.#shown.splice(same)) node.remove();
    for (const block of blocks.slice(same)) {
      const node = renderBlock(block);
      this.#shown.push({ key: block.key, node });
      this.element.append(node);
    }
  }
}

/** The blocks of a text; `key` is the same for blocks that look the same. */
export function parseBlocks(text) {
  const lines = text.split(/\r\n?|\n/).map((line) => line.replace(/^[ \t]+/, (start) => start.replaceAll("\t", "    ")));
  const blocks = blocksOf(lines, 0);
  let before = 3; // the heading of the message
  for (const block of blocks) {
    if (block.kind === "heading") {
      before = block.level = Math.min(block.level + 3, before + 1, 6);
    }
    block.key = JSON.stringify(block);
  }
  return blocks;
}

function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at++;
    } else if ((match = FENCE.exec(line))) {
      const fence = match[1];
      const indent = line.length - line.trimStart().length;
      const code = [];
      for (at++; at < lines.length && !closes(lines[at], fence); at++) code.push(lines[at].replace(/^ +/, (s) => s.slice(indent)));
      const closed = at++ < lines.length;
      blocks.push({ kind: "code", language: match[2].trim().split(/\s/, 1)[0].slice(0, 30), text: code.join("\n"), closed });
    } else if ((match = HEADING.exec(line))) {
      let text = match[2].trimEnd();
      let end = text.length;
      while (end > 0 && text[end - 1] === "#") end--;
      if (end === 0 || text[end - 1] === " ") text = text.slice(0, end).trimEnd();
      blocks.push({ kind: "heading", level: match[1].length, text });
      at++;
    } else if (RULE.test(line)) {
      blocks.push({ kind: "rule" });
      at++;
    } else if (depth < DEEPEST && QUOTE.test(line)) {
      const inner = [];
      while (at < lines.length && QUOTE.test(lines[at])) inner.push(lines[at++].replace(QUOTE, ""));
      blocks.push({ kind: "quote", blocks: blocksOf(inner, depth + 1) });
    } else if (depth < DEEPEST && ITEM.test(line)) {
      const [list, next] = readList(lines, at, depth);
      blocks.push(list);
      at = next;
    } else if (isTable(lines, at)) {
      const align = cells(lines[at + 1]).map((cell) => (/:$/.test(cell) ? (/^:/.test(cell) ? "center" : "right") : ""));
      const head = cells(line);
      const rows = [];
      for (at += 2; at < lines.length && lines[at].includes("|"); at++) rows.push(cells(lines[at]).slice(0, head.length));
      blocks.push({ kind: "table", align, head, rows });
    } else {
      const text = [line.trimStart()];
      for (at++; at < lines.length && lines[at].trim() && !begins(lines, at, depth); at++) text.push(lines[at].trimStart());
      blocks.push({ kind: "paragraph", text: text.join("\n") });
    }
  }
  return blocks;
}

function closes(line, fence) {
  const trimmed = line.trim();
  return trimmed.length >= fence.length && trimmed === fence[0].repeat(trimmed.length);
}

function isTable(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length) return false;
  const next = lines[at + 1];
  return next.includes("-") && DELIMITERS.test(next) && cells(next).length === cells(lines[at]).length;
}

/** Whether a line ends the paragraph before it. */
function begins(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at)) return true;
  if (depth >= DEEPEST) return false;
  const item = ITEM.exec(line);
  return QUOTE.test(line) || (item !== null && item[3] !== "" && !/^\d/.test(item[2])) || /^ *1[.)] /.test(line);
}

function readList(lines, at, depth) {
  const [, , first] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first);
  const sort = first.at(-1);
  const items = [];
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[2].at(-1) !== sort || RULE.test(lines[at])) break;
    const indent = match[1].length;
    const inside = indent + match[2].length + 1; // where its text begins
    const own = [lines[at].slice(match[0].length)];
    let blank = false;
    for (at++; at < lines.length; at++) {
      const line = lines[at];
      if (!line.trim()) {
        blank = true;
        own.push("");
        continue;
      }
      const width = line.length - line.trimStart().length;
      // models indent what belongs to "1." by two as well as by three
      const belongs = width >= Math.min(inside, indent + 2);
      const goesOn = !blank && !ITEM.test(line) && !begins(lines, at, depth);
      if (!belongs && !goesOn) break;
      own.push(line.slice(Math.min(width, inside)));
      blank = false;
    }
    items.push(blocksOf(own, depth + 1));
  }
  return [{ kind: "list", start: ordered ? parseInt(first, 10) : null, items }, at];
}

function cells(line) {
  const found = [];
  let cell = "";
  const row = line.trim();
  for (let at = row.startsWith("|") ? 1 : 0; at < row.length; at++) {
    if (row[at] === "\\" && row[at + 1] === "|") cell += row[++at];
    else if (row[at] === "|") {
      found.push(cell.trim());
      cell = "";
    } else cell += row[at];
  }
  if (cell.trim() || !row.endsWith("|")) found.push(cell.trim());
  return found;
}

function renderBlock(block) {
  switch (block.kind) {
    case "code":
      return codeBlock(block.text, block.language);
    case "heading":
      return make(`h${Math.min(block.level, 6)}`, {}, ...inline(block.text));
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", {}, ...block.blocks.map(renderInner));
    case "list": {
      const items = block.items.map((blocks) => {
        const tight = blocks.length > 0 && blocks[0].kind === "paragraph" && blocks.slice(1).every((one) => one.kind === "list");
        const nodes = tight ? [...inline(blocks[0].text), ...blocks.slice(1).map(renderInner)] : blocks.map(renderInner);
        return make("li", {}, ...nodes);
      });
      return block.start === null ? make("ul", {}, ...items) : make("ol", { start: block.start }, ...items);
    }
    case "table": {
      const row = (tag, texts) =>
        make("tr", {}, ...block.head.map((_, n) => make(tag, { className: block.align[n] }, ...inline(texts[n] ?? ""))));
      const table = make("table", {}, make("thead", {}, row("th", block.head)), make("tbody", {}, ...block.rows.map((texts) => row("td", texts))));
      return make("div", { className: "table", tabIndex: 0, role: "group", "aria-label": "Table" }, table);
    }
    default:
      return make("p", {}, ...inline(block.text));
  }
}

/** Headings within lists and quotes are bold lines: they are no part of the answer's outline. */
function renderInner(block) {
  return block.kind === "heading" ? make("p", {}, make("strong", {}, ...inline(block.text))) : renderBlock(block);
}

/** Code with its language and a button that copies it. */
export function codeBlock(text, language) {
  const head = make("div", { className: "head" }, make("span", {}, language || "text"), copyButton(() => text, "the code"));
  const label = language ? `Code, ${language}` : "Code";
  const code = make("pre", { tabIndex: 0, role: "group", "aria-label": label }, make("code", {}, text));
  return make("div", { className: "block" }, head, code);
}

const PAIRS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];
const WORD = /[\p{L}\p{N}]/u;
const BARE = /https?:\/\/[^\s<>"'`]{1,2000}/iy;
const ANGLED = /<(https?:\/\/[^\s<>]{1,2000})>/iy;

/** Nodes of a line's text. */
export function inline(text, depth = 0) {
  const nodes = [];
  const unclosed = new Set(); // signs that nothing closes from here on: asked once, not at every place
  let plain = "";
  const put = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  for (let at = 0; at < text.length; ) {
    const sign = text[at];
    let found;
    if (sign === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
    } else if (sign === "\n") {
      plain = plain.trimEnd();
      put(make("br"));
      at++;
    } else if (sign === "`") {
      let length = 1;
      while (text[at + length] === "`") length++;
      const end = closingTicks(text, at + length, length, unclosed);
      if (end < 0) plain += text.slice(at, at + length);
      else put(make("code", {}, codeText(text.slice(at + length, end))));
      at = end < 0 ? at + length : end + length;
    } else if (depth < DEEPEST && (found = emphasis(text, at, unclosed))) {
      put(make(found.tag, {}, ...inline(found.text, depth + 1)));
      at = found.end;
    } else if ((sign === "[" || (sign === "!" && text[at + 1] === "[")) && (found = bracketed(text, sign === "!" ? at + 1 : at))) {
      const url = sign === "[" && depth < DEEPEST ? safeUrl(found.url) : null;
      if (url) put(link(url, inline(found.text, DEEPEST)));
      else plain += text.slice(at, found.end);
      at = found.end;
    } else if (sign === "<" && (found = sticky(ANGLED, text, at)) && safeUrl(found[1])) {
      put(link(safeUrl(found[1]), [found[1]]));
      at += found[0].length;
    } else if ((sign === "h" || sign === "H") && !WORD.test(text[at - 1] ?? "") && (found = sticky(BARE, text, at))) {
      const shown = trimmed(found[0]);
      const url = depth < DEEPEST ? safeUrl(shown) : null;
      if (url) put(link(url, [shown]));
      else plain += shown;
      at += shown.length;
    } else {
      plain += sign;
      at++;
    }
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** A space at both ends only keeps a backtick apart from those that enclose it. */
function codeText(text) {
  const flat = text.replaceAll("\n", " ");
  return flat.trim() && flat.startsWith(" ") && flat.endsWith(" ") ? flat.slice(1, -1) : flat;
}

function sticky(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

function closingTicks(text, from, length, unclosed) {
  const name = `\`${length}`;
  if (unclosed.has(name)) return -1;
  for (let at = text.indexOf("`", from); at >= 0; ) {
    let end = at;
    while (text[end] === "`") end++;
    if (end - at === length) return at;
    at = text.indexOf("`", end);
  }
  unclosed.add(name);
  return -1;
}

function emphasis(text, at, unclosed) {
  for (const [sign, tag] of PAIRS) {
    if (!text.startsWith(sign, at) || unclosed.has(sign)) continue;
    const start = at + sign.length;
    if (/\s/.test(text[start] ?? " ") || (sign[0] === "_" && WORD.test(text[at - 1] ?? ""))) continue;
    if (sign.length === 1 && text[start] === sign) continue;
    const end = closing(text, start, sign);
    if (end < 0) unclosed.add(sign);
    else if (end > start) return { tag, text: text.slice(start, end), end: end + sign.length };
  }
  return null;
}

function closing(text, start, sign) {
  const one = sign[0];
  for (let at = text.indexOf(sign, start); at >= 0; ) {
    let end = at;
    while (text[end] === one) end++;
    const run = end - at;
    const fits = sign.length === 1 ? run !== 2 : run >= sign.length;
    if (fits && !/\s/.test(text[at - 1]) && text[at - 1] !== "\\" && !(one === "_" && WORD.test(text[end] ?? ""))) {
      return end - sign.length; // of three signs the last ones: the others close what is inside
    }
    at = text.indexOf(sign, end);
  }
  return -1;
}

/** `[text](url)` from its bracket on. */
function bracketed(text, at) {
  const last = Math.min(text.length, at + 1000);
  let depth = 0;
  let close = at;
  for (; close < last; close++) {
    if (text[close] === "\\") close++;
    else if (text[close] === "[") depth++;
    else if (text[close] === "]" && --depth === 0) break;
  }
  if (depth !== 0 || text[close] !== "]" || text[close + 1] !== "(") return null;
  let parentheses = 0;
  const furthest = Math.min(text.length, close + 2000);
  for (let end = close + 1; end < furthest && text[end] !== "\n"; end++) {
    if (text[end] === "(") parentheses++;
    else if (text[end] === ")" && --parentheses === 0) {
      const url = text.slice(close + 2, end).trim().split(/\s/, 1)[0].replace(/^<(.*)>$/, "$1");
      return { text: text.slice(at + 1, close), url, end: end + 1 };
    }
  }
  return null;
}

/** Without the signs that end a sentence. */
function trimmed(url) {
  let end = url.length;
  while (end > 0) {
    const last = url[end - 1];
    const unbalanced = last === ")" && url.slice(0, end).split(")").length > url.slice(0, end).split("(").length;
    if (!unbalanced && !".,;:!?*_~]".includes(last)) break;
    end--;
  }
  return url.slice(0, end);
}

function safeUrl(text) {
  if (!/^https?:\/\//i.test(text)) return null;
  try {
    const url = new URL(text);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : null;
  } catch {
    return null;
  }
}

function link(url, children) {
  return make("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, ...children);
}
