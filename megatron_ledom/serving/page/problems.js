// Messages about a mistake, next to the field that has it.

import { make } from "./dom.js";

let count = 0;

/** Remove all messages within an element. */
export function clearProblems(root) {
  for (const shown of root.querySelectorAll(".problem[data-made]")) shown.remove();
  for (const field of root.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
}

/** Show a message after an element; a field is also marked as invalid and gets the focus. */
export function showProblem(element, message) {
  const id = `problem-${(count += 1)}`;
  const shown = make("p", { class: "problem", role: "alert", id, "data-made": true }, message);
  element.after(shown);
  if (!element.matches("input, textarea, select")) return;
  element.setAttribute("aria-invalid", "true");
  element.setAttribute("aria-errormessage", id);
  for (let parent = element.closest("details"); parent; parent = parent.parentElement.closest("details")) parent.open = true;
  element.focus();
}

/** Show an error at the field that it names, else after `place`. Nothing is shown for a stopped request. */
export function showError(error, root, place) {
  if (error.name === "AbortError") return;
  const name = (error.param ?? "").split(".")[0];
  const field = error.field ?? (name && root.querySelector(`[name="${CSS.escape(name)}"]`));
  showProblem(field || place, error.message);
}

/** A mistake that the page itself finds in a field. */
export class FieldError extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/** Return the number in a field; undefined if it is empty. The server checks the range. */
export function numberFrom(field) {
  if (field.validity.badInput) throw new FieldError(field, `${labelOf(field)}: this is not a number`);
  if (field.value.trim() === "") return undefined;
  const value = Number(field.value);
  if ("integer" in field.dataset && !Number.isSafeInteger(value)) {
    throw new FieldError(field, `${labelOf(field)}: ${field.value} is not a whole number up to ${Number.MAX_SAFE_INTEGER}`);
  }
  return value;
}

const labelOf = (field) => field.labels[0]?.textContent.trim() ?? field.name;

/** Return the numbers of all number fields within an element, by name. */
export function numbersIn(root) {
  const found = {};
  for (const field of root.querySelectorAll("input[type=number]")) found[field.name] = numberFrom(field);
  return found;
}
