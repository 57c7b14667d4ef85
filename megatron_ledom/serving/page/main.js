// The frame of the page: tabs, theme, key, and the models of the server.

import { get, hasKey, useKey } from "./api.js";
import { adaptCompare, startCompare } from "./compare.js";
import { byId } from "./dom.js";
import { setModels } from "./models.js";
import { clearProblems, showProblem } from "./problems.js";
import { adaptRank, startRank } from "./rank.js";
import { startTheme } from "./theme.js";
import { startWrite } from "./write.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function openTab(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    byId(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  history.replaceState(null, "", `#${tab.getAttribute("aria-controls")}`);
}

function startTabs() {
  tabs.forEach((tab, position) => {
    tab.addEventListener("click", () => openTab(tab));
    tab.addEventListener("keydown", (event) => {
      const last = tabs.length - 1;
      const next = { ArrowRight: position + 1, ArrowLeft: position - 1, Home: 0, End: last }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      const chosen = tabs[(next + tabs.length) % tabs.length];
      openTab(chosen);
      chosen.focus();
    });
  });
  openAsked();
  addEventListener("hashchange", openAsked);
}

/** Open the tool that the address names. */
function openAsked() {
  const asked = tabs.find((tab) => `#${tab.getAttribute("aria-controls")}` === location.hash);
  if (asked) openTab(asked);
}

function startKey() {
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(byId("key-value").value.trim());
    byId("key-value").value = "";
    showModels();
  });
  byId("key-forget").addEventListener("click", () => {
    useKey("");
    showModels();
  });
  byId("key").addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    byId("key").open = false;
    byId("key").querySelector("summary").focus();
  });
  document.addEventListener("key-refused", (event) => {
    byId("key").hidden = false;
    byId("key").open = true;
    clearProblems(byId("key-form"));
    showProblem(byId("key-value"), event.detail);
  });
}

async function showModels() {
  const place = byId("models");
  clearProblems(byId("key-form"));
  try {
    const { data } = await get("/v1/models");
    place.textContent = data.map((model) => (model.id === model.direction ? model.id : `${model.id} (${model.direction})`)).join(" · ");
    place.classList.remove("problem");
    setModels(data);
    adaptRank();
    adaptCompare();
    byId("key").open = false;
    byId("key").hidden = !hasKey();
  } catch (error) {
    place.textContent = error.message;
    place.classList.add("problem");
  }
}

startTabs();
startTheme();
startKey();
startWrite();
startRank();
startCompare();
showModels();
