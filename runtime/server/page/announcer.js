// Reads an answer to a screen reader sentence by sentence: a region that changed with every token would stammer.

import { byId, make } from "./dom.js";

const MOST = 30; // sentences that stay in the region

export class Announcer {
  #region = byId("announcer");
  #given = 0;

  /** A new answer begins. */
  begin() {
    this.#given = 0;
    this.#region.replaceChildren();
  }

  /** The text so far: what has become a whole sentence is said. */
  push(text) {
    const fresh = text.slice(this.#given);
    const end = Math.max(...[...fresh.matchAll(/[.!?:;](?=\s)|\n/g)].map((match) => match.index + 1), 0);
    if (end > 0) {
      this.#given += end;
      this.say(fresh.slice(0, end));
    }
  }

  /** The rest of the text, then how it ended. */
  finish(text, ending) {
    this.say(text.slice(this.#given));
    this.#given = text.length;
    this.say(ending);
  }

  say(text) {
    const spoken = text.replace(/[*_`#|>~]+/g, " ").replace(/\s+/g, " ").trim();
    if (!spoken) return;
    this.#region.append(make("p", {}, spoken));
    while (this.#region.childElementCount > MOST) this.#region.firstElementChild.remove();
  }
}
