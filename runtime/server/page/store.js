// What the browser keeps: the conversation and the settings. Nothing is sent anywhere.

const CHAT = "edgephi.chat";
const SETTINGS = "edgephi.settings";

/** Whether it was kept; a browser may be told to keep nothing, or be full. */
function keep(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name) ?? "null");
  } catch {
    return null;
  }
}

const isMessage = (one) => ["user", "assistant", "tool"].includes(one?.role) && typeof one.content === "string";

/** The messages; an answer that was under way when the page was left is a stopped one. */
export function readChat() {
  const kept = read(CHAT);
  if (!Array.isArray(kept) || !kept.every(isMessage)) return [];
  return kept.map((one) => (one.state === "running" ? { ...one, state: "stopped" } : one));
}

export const keepChat = (messages) => (messages.length ? keep(CHAT, messages) : forget(CHAT));
export const keepSettings = (settings) => keep(SETTINGS, settings);

export function readSettings() {
  const kept = read(SETTINGS);
  return typeof kept === "object" && kept !== null && !Array.isArray(kept) ? kept : {};
}

export function forgetAll() {
  forget(CHAT);
  forget(SETTINGS);
}

function forget(name) {
  try {
    localStorage.removeItem(name);
  } catch {
    // there is nothing kept
  }
  return true;
}
