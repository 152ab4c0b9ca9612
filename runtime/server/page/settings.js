// The settings panel: what it holds, what is wrong with it, and what of it goes into a request.

import { byId, make } from "./dom.js";
import { keepSettings, readSettings } from "./store.js";

const SAMPLING = [
  { name: "temperature", label: "Temperature", min: 0, max: 100, placeholder: "0" },
  { name: "top_p", label: "Top p", min: 0, max: 1 },
  { name: "top_k", label: "Top k", min: 0, whole: true },
  { name: "min_p", label: "Min p", min: 0, max: 1 },
  { name: "seed", label: "Seed", min: 0, whole: true },
  { name: "max_tokens", label: "Most tokens", min: 1, whole: true },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0, max: 100 },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2 },
];
const PLAIN = ["system", "format", "schema", "tools", "tool-choice", "stops", "model"];
const EXAMPLE_SCHEMA = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" } },
  required: ["name", "age"],
  additionalProperties: false,
};
const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "How warm it is in a city, in degrees Celsius.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

/** A field that has to be put right before anything is sent; the panel shows it. */
export class WrongSetting extends Error {
  constructor(message, field) {
    super(message);
    this.field = field;
  }
}

export class Settings {
  #panel = byId("settings");
  #opener = byId("open-settings");
  #wide = matchMedia("(min-width: 1100px)");

  constructor() {
    this.#makeSampling();
    this.#restore();
    this.#panel.addEventListener("input", () => this.#changed());
    byId("schema-example").addEventListener("click", () => this.#fill("schema", EXAMPLE_SCHEMA));
    byId("tools-example").addEventListener("click", () => this.#fill("tools", EXAMPLE_TOOLS));
    this.#opener.addEventListener("click", () => (this.#panel.open ? this.#panel.close() : this.open()));
    byId("close-settings").addEventListener("click", () => this.#panel.close());
    this.#panel.addEventListener("close", () => {
      this.#opener.setAttribute("aria-expanded", "false");
      this.#opener.focus();
    });
    this.#panel.addEventListener("click", (event) => {
      if (event.target === this.#panel && this.#panel.matches(":modal")) this.#panel.close(); // beside the panel
    });
    this.#panel.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation(); // it closes the panel and stops no answer
      this.#panel.close();
    });
    this.#wide.addEventListener("change", () => {
      if (!this.#panel.open) return;
      this.#panel.removeAttribute("open"); // without the event of closing
      this.#panel.close();
      this.open();
    });
  }

  /** Beside the conversation where there is room, over it where there is none. */
  open() {
    if (this.#panel.open) return;
    if (this.#wide.matches) this.#panel.show();
    else this.#panel.showModal();
    this.#opener.setAttribute("aria-expanded", "true");
    byId("close-settings").focus();
  }

  get model() {
    return byId("model").dataset.chosen ?? "";
  }

  set model(name) {
    byId("model").dataset.chosen = name;
  }

  /**
   * What goes into a request beside model and messages, and the system prompt.
   * Throws WrongSetting for a field that cannot be sent.
   */
  request() {
    this.#check();
    const wrong = this.#panel.querySelector("[aria-invalid='true']");
    if (wrong) throw new WrongSetting(wrong.dataset.wrong, wrong);
    const parameters = {};
    for (const { name } of SAMPLING) if (byId(name).value !== "") parameters[name] = byId(name).valueAsNumber;
    const stops = byId("stops").value.split("\n").filter((line) => line !== "");
    if (stops.length) parameters.stop = stops;
    const format = byId("format").value;
    if (format === "json_schema") {
      parameters.response_format = { type: format, json_schema: { name: "answer", schema: JSON.parse(byId("schema").value) } };
    } else if (format === "json_object") {
      parameters.response_format = { type: format };
    }
    const tools = byId("tools").value.trim();
    if (tools) {
      parameters.tools = JSON.parse(tools).map((one) => (one.type === "function" ? one : { type: "function", function: one }));
      parameters.tool_choice = byId("tool-choice").value;
    }
    return { system: byId("system").value.trim(), parameters };
  }

  clear() {
    for (const name of PLAIN) if (name !== "model") this.#setPlain(name, undefined);
    for (const { name } of SAMPLING) byId(name).value = "";
    this.#check();
  }

  #makeSampling() {
    const field = ({ name, label, min, max, whole, placeholder }) => {
      const bounds = { min: String(min), max: max === undefined ? "" : String(max), step: whole ? "1" : "any" };
      const input = make("input", { id: name, type: "number", inputMode: whole ? "numeric" : "decimal", placeholder: placeholder ?? "", ...bounds });
      const error = make("p", { id: `${name}-error`, className: "wrong", role: "alert" });
      input.setAttribute("aria-describedby", error.id);
      return make("div", {}, make("label", { for: name }, label), input, error);
    };
    const stop = make("textarea", { id: "stops", rows: 2, spellcheck: false });
    const wide = make("div", { className: "wide" }, make("label", { for: "stops" }, "Texts that end an answer, one a line"), stop);
    byId("sampling").append(...SAMPLING.map(field), wide);
  }

  #fill(id, value) {
    byId(id).value = JSON.stringify(value, null, 2);
    this.#changed();
    byId(id).focus();
    byId(id).setSelectionRange(0, 0);
    byId(id).scrollTop = 0;
  }

  #changed() {
    this.#check();
    this.keep();
  }

  #check() {
    const format = byId("format").value;
    byId("schema-field").hidden = format !== "json_schema";
    byId("format-note").hidden = format === "text";
    mark(byId("schema"), format === "json_schema" ? wrongSchema(byId("schema").value) : "");
    mark(byId("tools"), wrongTools(byId("tools").value));
    for (const { name, label, min, max, whole } of SAMPLING) {
      const range = max === undefined ? `${min} or more` : `from ${min} to ${max}`;
      mark(byId(name), byId(name).validity.valid ? "" : `${label} is a ${whole ? "whole " : ""}number ${range}.`);
    }
  }

  /** For the next visit. */
  keep() {
    const values = { model: this.model };
    for (const name of PLAIN) if (name !== "model") values[name] = byId(name).value;
    for (const { name } of SAMPLING) values[name] = byId(name).value;
    keepSettings(values);
  }

  #setPlain(name, value) {
    const field = byId(name);
    if (field instanceof HTMLSelectElement) {
      field.value = [...field.options].some((one) => one.value === value) ? value : field.options[0].value;
    } else field.value = typeof value === "string" ? value : "";
  }

  #restore() {
    const kept = readSettings();
    for (const name of PLAIN) if (name !== "model") this.#setPlain(name, kept[name]);
    for (const { name } of SAMPLING) if (typeof kept[name] === "string") byId(name).value = kept[name];
    byId("model").dataset.chosen = typeof kept.model === "string" ? kept.model : "";
    this.#check();
  }
}

function mark(field, wrong) {
  const line = byId(`${field.id}-error`);
  if (line.textContent !== wrong) line.textContent = wrong;
  field.dataset.wrong = wrong;
  if (wrong) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
}

function parsed(text) {
  try {
    return [JSON.parse(text), ""];
  } catch (problem) {
    return [undefined, problem.message];
  }
}

function wrongSchema(text) {
  if (!text.trim()) return "Write the JSON Schema that the answer has to follow.";
  const [schema, problem] = parsed(text);
  if (problem) return `The schema is no JSON: ${problem}`;
  return isObject(schema) ? "" : "A JSON Schema is an object: { … }.";
}

function wrongTools(text) {
  if (!text.trim()) return "";
  const [tools, problem] = parsed(text);
  if (problem) return `The tools are no JSON: ${problem}`;
  const named = (one) => isObject(one) && typeof (one.type === "function" ? one.function?.name : one.name) === "string";
  return Array.isArray(tools) && tools.every(named) ? "" : "Tools are a list of descriptions with a name each: [ … ].";
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
