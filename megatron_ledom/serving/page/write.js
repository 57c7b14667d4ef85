// Write before: the reverse model's text grows at its front.

import { stream } from "./api.js";
import { bindForm, byId, make, setBusy, setText, textOf } from "./dom.js";
import { nameOf } from "./models.js";
import { clearProblems, FieldError, numbersIn, showError } from "./problems.js";

const SHOWN = 240; // characters of the given text in each alternative
let running = null;

/** Bind the panel. */
export function startWrite() {
  bindForm(byId("write-form"), byId("write-stop"), write, () => running?.abort());
}

async function write() {
  const form = byId("write-form");
  const box = byId("suffix");
  running?.abort();
  const own = (running = new AbortController());
  clearProblems(form);
  let cards = [];
  try {
    const options = numbersIn(form);
    const suffix = textOf(box);
    if (!suffix) throw new FieldError(box, "Type the text that follows, at least one character.");
    setBusy(form, byId("write-stop"), true);
    cards = Array.from({ length: Math.min(options.n ?? 1, 128) }, (_, number) => new Alternative(number, suffix));
    byId("alternatives").replaceChildren(...cards.map((card) => card.element));
    await fill(cards, { model: nameOf("reverse"), suffix, ...options }, own.signal);
  } catch (error) {
    if (cards.length && cards.every((card) => card.isEmpty) && error.name !== "AbortError") byId("alternatives").replaceChildren();
    for (const card of cards) card.finish(error.name === "AbortError" ? "stopped" : "broken off");
    showError(error, form, form.querySelector(".actions"));
  } finally {
    if (running === own) {
      running = null;
      setBusy(form, byId("write-stop"), false);
    }
  }
}

async function fill(cards, body, signal) {
  for await (const event of stream("/v1/completions", body, signal)) {
    for (const choice of event.choices) {
      const card = cards[choice.index];
      if (choice.text) card.grow(choice.text);
      if (choice.finish_reason) card.finish(choice.finish_reason === "stop" ? "the text begins here" : "cut at the limit");
    }
  }
}

/** One alternative: the written text, then the given one. A screen reader reads it when it is complete. */
class Alternative {
  constructor(number, given) {
    const characters = Array.from(given);
    const start = characters.length > SHOWN ? `${characters.slice(0, SHOWN).join("")}…` : given;
    this.given = given;
    this.text = document.createTextNode("");
    this.state = make("span", { class: "hint state" }, "writing");
    this.region = make(
      "p",
      { class: "text", "aria-live": "polite", "aria-atomic": "true", "aria-busy": "true" },
      make("span", { class: "written" }, this.text),
      make("span", { class: "given" }, start),
    );
    this.buttons = make(
      "div",
      { class: "actions small", hidden: true },
      make("button", { type: "button", click: () => this.copy() }, "Copy"),
      make("button", { type: "button", click: () => this.reuse() }, "Write before this"),
    );
    const title = make("h2", {}, `Alternative ${number + 1}`);
    this.element = make("article", { class: "alternative", "data-busy": true }, make("header", {}, title, this.state), this.region);
    this.element.append(this.buttons);
  }

  get isEmpty() {
    return this.text.length === 0;
  }

  grow(piece) {
    this.text.insertData(0, piece);
  }

  finish(state) {
    if (!("busy" in this.element.dataset)) return;
    delete this.element.dataset.busy;
    this.region.setAttribute("aria-busy", "false");
    this.state.textContent = state;
    this.buttons.hidden = this.isEmpty;
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.text.data + this.given);
      this.state.textContent = "copied";
    } catch {
      this.state.textContent = "the browser does not allow copying";
    }
  }

  reuse() {
    setText(byId("suffix"), this.text.data + this.given);
    byId("suffix").focus();
    byId("suffix").setSelectionRange(0, 0);
  }
}
