// The choice of the theme, which the browser keeps.

import { byId } from "./dom.js";

const THEME = "ledom-theme";

/** Use the stored theme, and follow the field `#theme`. */
export function startTheme() {
  const choice = byId("theme");
  const use = () => {
    if (choice.value) document.documentElement.dataset.theme = choice.value;
    else delete document.documentElement.dataset.theme;
  };
  try {
    choice.value = localStorage.getItem(THEME) ?? "";
  } catch {
    // the browser forbids storage: the system's theme
  }
  use();
  choice.addEventListener("change", () => {
    use();
    try {
      localStorage.setItem(THEME, choice.value);
    } catch {
      // it lasts until the page is closed
    }
  });
}
