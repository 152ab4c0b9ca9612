// Messages as a person sees them.

import { codeBlock, MarkdownView } from "./markdown.js";
import { copyButton, make } from "./dom.js";

const ENDINGS = {
  stopped: "Stopped.",
  length: "Cut off: the answer has as many tokens as it may have. More are allowed with “Most tokens” in the settings.",
  repetition: "Ended, because it came to repeat itself.",
};

export class Messages {
  #shown = new Map();
  #streamed = null;

  /**
   * Shows a conversation.
   * `actions`: regenerate(), edit(index, text), answerCalls(index, results); `isRunning()`.
   */
  constructor(element, actions) {
    this.element = element;
    this.actions = actions;
  }

  /** Show these messages; those that look the same keep their elements. */
  show(messages) {
    const running = this.actions.isRunning();
    const kept = new Map();
    const elements = messages.map((message, index) => {
      const isLast = index === messages.length - 1;
      const look = JSON.stringify([message, index, isLast && !running, running && message.role === "user"]);
      const before = this.#shown.get(message);
      const entry = before?.look === look ? before : { look, ...this.#make(message, index, isLast && !running, running) };
      kept.set(message, entry);
      return entry.element;
    });
    this.#shown = kept;
    for (const element of [...this.element.children]) if (!elements.includes(element)) element.remove();
    elements.forEach((element, at) => {
      if (this.element.children[at] !== element) this.element.insertBefore(element, this.element.children[at] ?? null);
    });
  }

  /** Show what a running answer says by now, at the next frame; `around` is called with what changes the page. */
  stream(message, around) {
    const isFirst = this.#streamed === null;
    this.#streamed = { message, around };
    if (isFirst) requestAnimationFrame(() => this.flush());
  }

  /** Show it now. */
  flush() {
    if (this.#streamed === null) return;
    const { message, around } = this.#streamed;
    this.#streamed = null;
    around(() => this.#shown.get(message)?.update(message));
  }

  /** The first field for a tool's result that is not filled in, if the model waits for any. */
  openResult() {
    return this.element.querySelector("textarea.result");
  }

  #make(message, index, isLast, running) {
    if (message.role === "user") return this.#user(message, index, running);
    if (message.role === "tool") return { element: toolResult(message), update() {} };
    return this.#assistant(message, index, isLast);
  }

  #user(message, index, running) {
    const body = make("div", { className: "body" }, message.content);
    const edit = make("button", { type: "button", className: "small", disabled: running }, "Edit");
    const row = make("div", { className: "row" }, edit, copyButton(() => message.content, "your message"));
    const element = make("article", { className: "message user" }, make("h3", {}, "You"), body, row);
    edit.addEventListener("click", () => this.#edit(element, message, index, [body, row]));
    return { element, update() {} };
  }

  #edit(element, message, index, hidden) {
    const field = make("textarea", { value: message.content, rows: Math.min(12, message.content.split("\n").length + 1), "aria-label": "Edit your message" });
    const save = make("button", { type: "submit", className: "main" }, "Send");
    const cancel = make("button", { type: "button" }, "Cancel");
    const note = make("p", { className: "note" }, "What came after this message is replaced.");
    const form = make("form", { className: "edit", "aria-label": "Edit your message" }, field, make("div", { className: "row" }, note, cancel, save));
    const close = () => {
      form.remove();
      for (const one of hidden) one.hidden = false;
      hidden[1].firstElementChild.focus();
    };
    cancel.addEventListener("click", close);
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && event.target === field && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) this.actions.edit(index, field.value);
    });
    for (const one of hidden) one.hidden = true;
    element.append(form);
    field.focus();
  }

  #assistant(message, index, isLast) {
    const body = make("div", { className: "text" });
    const element = make("article", { className: "message assistant" }, make("h3", {}, message.model), body);
    const view = message.form === "json" ? new JsonView(body) : new MarkdownView(body);
    const update = ({ content, state }) => {
      view.update(content, state);
      body.classList.toggle("busy", state === "running");
    };
    update(message);
    if (message.calls?.length) element.append(this.#calls(message, index, isLast));
    if (message.state !== "running") {
      element.append(...this.#ending(message, isLast), this.#row(message, isLast));
    }
    return { element, update };
  }

  #ending(message, isLast) {
    if (message.state === "failed") {
      const line = make("p", { className: "ending bad" }, message.problem);
      if (isLast) {
        const again = make("button", { type: "button" }, "Try again");
        again.addEventListener("click", () => this.actions.regenerate());
        line.append(" ", again);
      }
      return [line];
    }
    if (message.form === "json" && !isJson(message.content)) {
      const why = message.state === "length" ? "it was cut off at the most tokens it may have" : "it did not come to its end";
      return [make("p", { className: "ending bad" }, `This is no whole JSON: ${why}.`)];
    }
    return message.state in ENDINGS ? [make("p", { className: "ending" }, ENDINGS[message.state])] : [];
  }

  #row(message, isLast) {
    const row = make("div", { className: "row" });
    if (message.content) row.append(copyButton(() => message.content, "the answer"));
    if (isLast && message.state !== "failed") {
      const again = make("button", { type: "button", className: "small" }, "Regenerate");
      again.addEventListener("click", () => this.actions.regenerate());
      row.append(again);
    }
    if (message.stats) row.append(statistics(message.stats));
    return row;
  }

  #calls(message, index, isLast) {
    const cards = message.calls.map((call, number) => {
      const card = make("div", { className: "call" }, make("h4", {}, "Calls ", make("code", {}, call.function.name)));
      card.append(make("pre", {}, pretty(call.function.arguments)));
      if (isLast) {
        const id = `result-${index}-${number}`;
        card.append(make("label", { for: id }, `Result of ${call.function.name}`), make("textarea", { id, className: "result code", rows: 2, spellcheck: false }));
      }
      return card;
    });
    if (!isLast) return make("div", {}, ...cards);
    const send = make("button", { type: "submit", className: "main results" }, message.calls.length > 1 ? "Send the results" : "Send the result");
    const form = make("form", { "aria-label": "Results of the tools" }, ...cards, send);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.actions.answerCalls(index, [...form.querySelectorAll("textarea")].map((field) => field.value));
    });
    return form;
  }
}

/** JSON that grows: as it comes, then laid out. */
class JsonView {
  constructor(element) {
    this.element = element;
  }

  update(content, state) {
    if (content) this.element.replaceChildren(codeBlock(state === "running" ? content : pretty(content), "json"));
  }
}

function toolResult(message) {
  const name = make("h3", {}, "Result of ", make("code", {}, message.name));
  return make("article", { className: "message tool" }, name, make("div", { className: "text" }, make("div", { className: "block" }, make("pre", { tabIndex: 0, role: "group", "aria-label": "Result" }, message.content))));
}

function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

const pretty = (text) => (isJson(text) ? JSON.stringify(JSON.parse(text), null, 2) : text);

function statistics(stats) {
  const seconds = (value) => (value == null ? null : `${value.toFixed(value < 10 ? 2 : 1)} s`);
  const rate = stats.rate == null ? null : `${stats.rate.toFixed(stats.rate < 100 ? 1 : 0)} tokens/s`;
  const summary = [rate, stats.place].filter(Boolean).join(" · ");
  const cached = stats.cached ? `, ${stats.cached.toLocaleString("en")} of them from the cache` : "";
  const facts = [
    ["Prompt", stats.prompt == null ? null : `${stats.prompt.toLocaleString("en")} tokens${cached}`],
    ["Answer", stats.tokens == null ? null : `${stats.tokens.toLocaleString("en")} tokens`],
    ["First token after", seconds(stats.first)],
    ["Whole answer", seconds(stats.total)],
    ["Computed on", stats.place],
  ];
  const rows = facts.filter(([, value]) => value).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  return make("details", { className: "stats" }, make("summary", {}, summary || "Statistics"), make("dl", { className: "facts" }, ...rows));
}
