// The list of candidates: typed, pasted as JSON lines, or sampled.

import { byId, make, setText, shown, textOf } from "./dom.js";
import { FieldError } from "./problems.js";

let made = 0;
const known = new WeakMap(); // text box -> forward_logprob and forward_tokens of its unchanged text

/** Return the candidates as /v1/reward takes them. */
export function candidates() {
  return boxes().map((box) => (known.has(box) ? { text: textOf(box), ...known.get(box) } : textOf(box)));
}

/** Return the text boxes of the candidates. */
export const boxes = () => [...byId("candidates").querySelectorAll("textarea")];

/** Replace all candidates; each is a text, or an object with text and perhaps forward_logprob and forward_tokens. */
export function setCandidates(given) {
  byId("candidates").replaceChildren();
  given.forEach((candidate) => addCandidate(candidate));
}

/** Add a candidate and return its text box. */
export function addCandidate(candidate = "") {
  const text = typeof candidate === "string" ? candidate : candidate.text;
  const id = `candidate-${(made += 1)}`;
  const box = make("textarea", { id, rows: Math.min(6, Math.max(1, text.split("\n").length)) });
  setText(box, text);
  const note = make("span", { class: "hint" });
  const label = make("label", { for: id });
  const remove = make("button", { type: "button", class: "quiet" }, "Remove");
  const row = make("div", { class: "candidate" }, make("div", { class: "candidate-head" }, label, note, remove), box);
  remove.addEventListener("click", () => removeRow(row));
  if (typeof candidate !== "string" && typeof candidate.forward_logprob === "number") {
    const { forward_logprob, forward_tokens } = candidate;
    known.set(box, { forward_logprob, ...(forward_tokens !== undefined && { forward_tokens }) });
    note.textContent = `log P_F given: ${shown(forward_logprob)}`;
  }
  box.addEventListener("input", () => {
    known.delete(box);
    note.textContent = "";
  });
  byId("candidates").append(row);
  number();
  return box;
}

function removeRow(row) {
  const next = row.nextElementSibling ?? row.previousElementSibling;
  row.remove();
  number();
  (next?.querySelector("textarea") ?? byId("add-candidate")).focus();
}

function number() {
  [...byId("candidates").children].forEach((row, position) => {
    row.querySelector("label").textContent = `Candidate ${position + 1}`;
    row.querySelector("button").setAttribute("aria-label", `Remove candidate ${position + 1}`);
  });
}

/** Return the questions of JSON lines, each with prompt and candidates. Lines without a prompt are candidates of one question. */
export function questionsOf(field) {
  const questions = [];
  const loose = [];
  field.value.split("\n").forEach((line, position) => {
    if (!line.trim()) return;
    const value = parsed(field, line, position + 1);
    if (value !== null && typeof value === "object" && "candidates" in value) questions.push(question(field, value, position + 1));
    else loose.push(candidate(field, value, position + 1));
  });
  if (questions.length && loose.length) {
    throw new FieldError(field, "Some lines are questions with candidates, others are single candidates; paste one kind.");
  }
  if (!questions.length && !loose.length) throw new FieldError(field, "There is no line to load; paste at least one.");
  return questions.length ? questions : [{ prompt: null, candidates: loose }];
}

function parsed(field, line, number) {
  try {
    return JSON.parse(line);
  } catch (error) {
    throw new FieldError(field, `Line ${number} is not JSON: ${error.message}`);
  }
}

function question(field, value, number) {
  if (typeof value.prompt !== "string" || !Array.isArray(value.candidates) || !value.candidates.length) {
    throw new FieldError(field, `Line ${number}: expected a text as "prompt" and a list of at least one as "candidates".`);
  }
  return { prompt: value.prompt, candidates: value.candidates.map((one) => candidate(field, one, number)) };
}

function candidate(field, value, number) {
  if (typeof value === "string") return value;
  if (value === null || typeof value !== "object" || typeof value.text !== "string") {
    throw new FieldError(field, `Line ${number}: a candidate must be a text, or an object with "text".`);
  }
  return value;
}
