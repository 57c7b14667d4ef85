// Parts of the document. Text of users and models becomes text nodes only.

export const byId = (id) => document.getElementById(id);

/** Return a new element; children are elements, or strings that become text nodes. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Return a number with a true minus sign and a fixed number of digits, for a cell. */
export function shown(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === -Infinity) return "−∞";
  return value.toFixed(digits).replace("-", "−");
}

/** Return a text on one line, cut to a number of characters. */
export function brief(text, length) {
  const line = Array.from(text.trim().replace(/\s+/gu, " "));
  return line.length > length ? `${line.slice(0, length).join("")}…` : line.join("");
}

const exact = new WeakMap(); // field -> its text as it was given; a field itself changes carriage returns
document.addEventListener("input", (event) => exact.delete(event.target), true);

/** Put a text into a field. */
export function setText(field, text) {
  field.value = text;
  exact.set(field, text);
}

/** Return the text of a field: as it was given, until the user edits it. */
export const textOf = (field) => exact.get(field) ?? field.value;

/** Show that the request of a form runs, or that it has ended. */
export function setBusy(form, stopButton, isBusy) {
  form.setAttribute("aria-busy", String(isBusy));
  if (!isBusy && document.activeElement === stopButton) form.querySelector(".primary").focus();
  stopButton.disabled = !isBusy;
}

/** Run `action` of a form for its button, Ctrl+Enter and Escape; `stop` ends it. */
export function bindForm(form, stopButton, action, stop) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    action();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      action();
    } else if (event.key === "Escape") stop();
  });
  stopButton.addEventListener("click", stop);
}
