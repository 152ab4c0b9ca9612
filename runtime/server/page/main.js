// The conversation: what is asked when, and what the keys do.

import { Announcer } from "./announcer.js";
import * as api from "./api.js";
import { byId, make } from "./dom.js";
import { Messages } from "./messages.js";
import { Models } from "./models.js";
import { Settings, WrongSetting } from "./settings.js";
import { forgetAll, keepChat, readChat } from "./store.js";

const prompt = byId("prompt");
const settings = new Settings();
const models = new Models(settings);
const announcer = new Announcer();
const view = new Messages(byId("messages"), { isRunning: () => running !== null, regenerate, edit, answerCalls });

let messages = readChat();
let running = null; // the AbortController of the answer under way

function show() {
  view.show(messages);
  byId("welcome").hidden = messages.length > 0;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
}

function status(text, ...more) {
  byId("status").replaceChildren(text, ...more);
}

function problem(text) {
  byId("problem").textContent = text;
}

function keep() {
  if (!keepChat(messages)) status("This browser keeps nothing: the conversation is gone when the page is.");
}

/** Follow a growing answer, unless the person has scrolled up to read. */
function following(change) {
  const chat = byId("chat");
  const atEnd = chat.scrollHeight - chat.scrollTop - chat.clientHeight < 60;
  change();
  if (atEnd) chat.scrollTop = chat.scrollHeight;
}

function toEnd() {
  byId("chat").scrollTop = byId("chat").scrollHeight;
}

// asking

async function send() {
  // a question that is written before the server has told its models
  if (prompt.value.trim() && !models.chosen && !(await refreshModels())) return;
  const text = prompt.value.trim();
  if (!text || running) return;
  const waiting = view.openResult();
  if (waiting) {
    problem("The model waits for the result of a tool. Fill it in above, or regenerate the answer.");
    waiting.focus();
    return;
  }
  if (begin([...messages, { role: "user", content: text }])) {
    prompt.value = "";
    fit();
  }
}

function regenerate() {
  const last = messages.findLastIndex((one) => one.role !== "assistant");
  if (last >= 0) begin(messages.slice(0, last + 1));
}

function edit(index, text) {
  begin([...messages.slice(0, index), { role: "user", content: text.trim() }]);
}

function answerCalls(index, results) {
  const calls = messages[index].calls;
  const told = calls.map((call, number) => ({ role: "tool", tool_call_id: call.id, name: call.function.name, content: results[number] }));
  begin([...messages.slice(0, index + 1), ...told]);
}

/** Whether the request can be sent at all. */
function begin(conversation) {
  if (running) return false;
  problem("");
  let wanted;
  try {
    wanted = settings.request();
    if (!models.chosen) throw new WrongSetting("The server has no model.", null);
  } catch (wrong) {
    if (!(wrong instanceof WrongSetting)) throw wrong;
    problem(wrong.message);
    if (wrong.field) {
      settings.open();
      wrong.field.focus();
    }
    return false;
  }
  messages = conversation;
  answer(request(conversation, wanted));
  return true;
}

function request(conversation, { system, parameters }) {
  const sent = system ? [{ role: "system", content: system }] : [];
  for (const { role, content, calls, tool_call_id } of conversation) {
    if (role === "tool") sent.push({ role, content, tool_call_id });
    else if (role === "user") sent.push({ role, content });
    else if (calls?.length) sent.push({ role, ...(content ? { content } : {}), tool_calls: calls });
    else if (content) sent.push({ role, content });
  }
  const asked = { ...parameters, model: models.chosen, messages: sent };
  // with the results there, the model may answer
  if (conversation.at(-1).role === "tool" && asked.tool_choice === "required") asked.tool_choice = "auto";
  return asked;
}

async function answer(asked) {
  const message = { role: "assistant", content: "", state: "running", model: asked.model };
  if (asked.response_format) message.form = "json";
  messages.push(message);
  const focusMoves = byId("messages").contains(document.activeElement) || document.activeElement === byId("send");
  running = new AbortController();
  show();
  if (focusMoves) byId("stop").focus();
  toEnd();
  keep();
  announcer.begin();
  status(models.showLoading() ? "Loading the model…" : "Reading the prompt…");
  let sawText = false;
  try {
    for await (const chunk of api.chat(asked, running.signal)) {
      take(chunk, message);
      if (message.content && !sawText) {
        sawText = true;
        status("Answering…");
      }
      view.stream(message, following);
      if (message.form !== "json") announcer.push(message.content);
    }
    message.state = message.finish === "length" ? (message.why === "repetition" ? "repetition" : "length") : "done";
  } catch (error) {
    fail(message, error);
  }
  delete message.finish;
  delete message.why;
  following(() => ended(message));
}

function take(chunk, message) {
  const choice = chunk.choices[0];
  message.content += choice?.delta.content ?? "";
  for (const { index, id, function: called } of choice?.delta.tool_calls ?? []) {
    message.calls ??= [];
    const call = (message.calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += called.name ?? "";
    call.function.arguments += called.arguments ?? "";
  }
  if (choice?.finish_reason) {
    message.finish = choice.finish_reason;
    message.why = chunk.edgephi_finish;
  }
  if (chunk.timings) {
    const { decode_tokens_per_s: rate, time_to_first_token_s: first, total_s: total, provider } = chunk.timings;
    message.stats = { ...message.stats, rate, first, total, provider };
  }
  if (chunk.usage) {
    const { prompt_tokens: prompt, completion_tokens: tokens, prompt_tokens_details: details } = chunk.usage;
    message.stats = { ...message.stats, prompt, tokens, cached: details?.cached_tokens };
  }
}

function fail(message, error) {
  if (error.name === "AbortError") {
    message.state = "stopped";
    return;
  }
  message.state = "failed";
  if (error instanceof api.Refusal) {
    const when = error.retryAfter ? ` It asks to wait for ${error.retryAfter} s.` : "";
    message.problem = `The server says: ${error.message}${when}`;
    if (error.status === 401) askForKey();
  } else if (error instanceof api.Lost) {
    message.problem = error.message;
  } else {
    message.problem = `The page could not read the answer: ${error.message}`;
    console.error(error);
  }
}

async function ended(message) {
  const hadStop = document.activeElement === byId("stop");
  running = null;
  view.flush();
  if (message.stats) message.stats.place = models.placement(message.stats.provider);
  show();
  if (!messages.includes(message)) {
    announcer.finish("", "Stopped."); // whoever took it away has said so in the status
    return;
  }
  if (message.calls && message.state === "done") view.openResult()?.focus();
  else if (hadStop) prompt.focus();
  status("");
  announcer.finish(message.form === "json" ? "" : message.content, spokenEnding(message));
  keep();
  if (await refreshModels()) {
    // a model that was asleep tells only now where it runs
    const place = message.stats && models.chosen === message.model ? models.placement(message.stats.provider) : null;
    if (place && place !== message.stats.place) {
      message.stats.place = place;
      show();
      keep();
    }
  }
}

function spokenEnding(message) {
  if (message.state === "failed") return message.problem;
  if (message.state === "stopped") return "Stopped.";
  if (message.calls) return `The model calls ${message.calls.map((call) => call.function.name).join(", ")} and waits for the result.`;
  return message.form === "json" ? "A JSON answer has come." : "End of the answer.";
}

/** Whether the server told; what it says instead is shown where it matters, at the next question. */
async function refreshModels() {
  try {
    await models.refresh();
    return true;
  } catch (error) {
    if (error instanceof api.Refusal && error.status === 401) askForKey();
    else if (messages.at(-1)?.state !== "failed") problem(error instanceof api.Refusal ? `The server says: ${error.message}` : error.message);
    return false;
  }
}

// the key

function askForKey() {
  const form = byId("key-form");
  if (form.hidden) {
    form.hidden = false;
    byId("key").focus();
  } else if (api.key()) {
    problem("The server does not take this key.");
    byId("key").select();
  }
}

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  problem("");
  api.setKey(byId("key").value.trim());
  if (await refreshModels()) {
    byId("key").value = "";
    byId("key-form").hidden = true;
    prompt.focus();
  }
});

// the composer and the keys

/** As high as its text, up to what the style allows. */
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !byId("settings").matches(":modal")) running.abort();
});

byId("new-chat").addEventListener("click", () => {
  running?.abort();
  const before = messages;
  messages = [];
  problem("");
  show();
  keep();
  prompt.focus();
  if (!before.length) return;
  const back = make("button", { type: "button", className: "small" }, "Bring the last one back");
  back.addEventListener("click", () => {
    if (running) return;
    messages = before;
    show();
    keep();
    toEnd();
    status("");
    prompt.focus();
  });
  status("A new chat.", back);
});

byId("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  settings.clear();
  api.setKey("");
  forgetAll();
  show();
  status("The conversation and the settings are deleted.");
});

byId("model").addEventListener("focus", () => refreshModels());
// only what is not kept yet: another tab may have gone on, or deleted all of it
window.addEventListener("pagehide", () => running && keepChat(messages));

show();
toEnd();
await refreshModels();
