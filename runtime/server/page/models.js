// Which model and device is asked, and what the server says about it. "phi4@webgpu" is the model phi4 on a device of
// its own; the part behind the sign is picked apart from the model.

import * as api from "./api.js";
import { byId, make } from "./dom.js";

const PROVIDERS = { cpu: "CPU", webgpu: "WebGPU", cuda: "CUDA", qnn: "Snapdragon NPU", openvino: "OpenVINO", dml: "DirectML" };
const STATES = { sleeping: "not loaded", loading: "loading", missing: "its folder is gone" };

export class Models {
  #list = [];
  #picker = byId("model");
  #devices = byId("device");

  constructor(settings) {
    this.settings = settings;
    const pick = (model) => {
      this.#choose(model);
      settings.keep();
    };
    this.#picker.addEventListener("change", () => pick(this.#variants(this.#picker.value)[0]));
    this.#devices.addEventListener("change", () => pick(this.#list.find((one) => one.id === this.#devices.value)));
  }

  get chosen() {
    return this.settings.model;
  }

  /** Ask the server anew; its errors are api's. */
  async refresh() {
    this.#list = await api.models();
    const bases = [...new Set(this.#list.map((one) => base(one.id)))];
    if (bases.join("\n") !== [...this.#picker.options].map((one) => one.value).join("\n")) {
      this.#picker.replaceChildren(...bases.map((name) => make("option", { value: name }, name)));
    }
    this.#choose(this.#list.find((one) => one.id === this.chosen) ?? this.#list[0]);
  }

  /** Show that the chosen model is being loaded, until the server says more. */
  showLoading() {
    const model = this.#current();
    if (model && model.state === "sleeping") this.#showPlace({ ...model, state: "loading" });
    return model?.state === "sleeping";
  }

  /** In words, for an answer: provider and device. */
  placement(provider) {
    const { edgephi } = this.#current() ?? {};
    return edgephi ? deviceText(edgephi) : provider ? providerName(provider) : "";
  }

  #current() {
    return this.#list.find((one) => one.id === this.chosen);
  }

  #variants(name) {
    return this.#list.filter((one) => base(one.id) === name);
  }

  #choose(model) {
    if (!model) {
      byId("place").textContent = "";
      return;
    }
    this.settings.model = model.id;
    this.#picker.value = base(model.id);
    const variants = this.#variants(base(model.id));
    this.#devices.hidden = variants.length < 2;
    this.#devices.replaceChildren(...variants.map((one) => make("option", { value: one.id }, one.id.slice(base(one.id).length + 1) || "auto")));
    this.#devices.value = model.id;
    this.#showPlace(model);
  }

  #showPlace(model) {
    const place = byId("place");
    const text = model.edgephi ? deviceText(model.edgephi) : STATES[model.state] ?? model.state;
    place.dataset.state = model.state;
    place.textContent = text;
    const facts = [["Model", model.id], ["State", model.state === "sleeping" ? "not loaded; it is when you ask" : STATES[model.state] ?? model.state]];
    if (model.context_length) facts.push(["Context", `${model.context_length.toLocaleString("en")} tokens`]);
    if (model.edgephi) facts.push(...placeFacts(model.edgephi));
    byId("where").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  }
}

const base = (id) => (id.lastIndexOf("@") > 0 ? id.slice(0, id.lastIndexOf("@")) : id);

const providerName = (short) => PROVIDERS[short] ?? short;

function deviceText({ provider, decode_provider: decode, device }) {
  const by = decode === provider ? providerName(provider) : `${providerName(provider)} and ${providerName(decode)}`;
  return device?.vendor ? `${by}, ${device.vendor}` : by;
}

function placeFacts({ provider, decode_provider: decode, device, threads, placement, rejected }) {
  const facts = [["Device", device ? `${device.kind.toUpperCase()}, ${device.vendor}` : "CPU"]];
  if (decode !== provider) facts.push(["Prompt", providerName(provider)], ["Answer", providerName(decode)]);
  if (provider === "cpu" || decode === "cpu") facts.push(["Threads", String(threads)]);
  if (placement === null) facts.push(["Nodes", "all on the CPU; the session has no other provider"]);
  for (const part of placement ?? []) {
    const name = part.provider.replace(/ExecutionProvider$/, "");
    facts.push([name, `${part.nodes.toLocaleString("en")} nodes, ${Math.round(part.weight_bytes / 1e6).toLocaleString("en")} MB of weights`]);
  }
  for (const reason of rejected) facts.push(["Not used", reason]);
  return facts;
}
