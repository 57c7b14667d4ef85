// Compare: where forward and reverse model differ on a text, token by token.

import { post } from "./api.js";
import { bindForm, brief, byId, make, setBusy, shown, textOf } from "./dom.js";
import { nameOf } from "./models.js";
import { clearProblems, FieldError, showError } from "./problems.js";
import { commonPieces, described, fractionOf, LOWEST, piecesOf, strip } from "./shading.js";

const MOST = 4; // difference in nats with the strongest colour
const LISTED = 10;
const LEGENDS = {
  difference: [`Blue: likelier for the forward model. Orange: for the reverse model. Full colour from ${MOST} nats on. Point at a piece, or use the arrow keys, for its values.`, "both"],
  forward: [`Warmer: likelier for the forward model, from log-probability −${-LOWEST} or less to 0.`, "warm"],
  reverse: [`Warmer: likelier for the reverse model, from log-probability −${-LOWEST} or less to 0.`, "warm"],
};
let running = null;
let compared = null; // pieces of the text

/** Bind the panel. */
export function startCompare() {
  bindForm(byId("compare-form"), byId("compare-stop"), compare, () => running?.abort());
  byId("view").addEventListener("change", showStrip);
}

/** Adapt the panel to the models of the server. */
export function adaptCompare() {
  const hasForward = nameOf("forward") !== null;
  byId("compare-needs").hidden = hasForward;
  byId("compare-needs").textContent =
    "Compare needs a forward model, and this server has none. Start it with both: ledom serve --reverse DIR --forward DIR";
  byId("compare-form").querySelector("[type=submit]").disabled = !hasForward;
}

async function compare() {
  const form = byId("compare-form");
  const box = byId("compared");
  running?.abort();
  const own = (running = new AbortController());
  clearProblems(form);
  try {
    const text = textOf(box);
    if (!text) throw new FieldError(box, "Type a text, at least one character.");
    if (form.querySelector("[type=submit]").disabled) throw new FieldError(box, byId("compare-needs").textContent);
    setBusy(form, byId("compare-stop"), true);
    // Each model scores the whole text in one of the two pairs, and nothing in the other.
    const pairs = [{ preceding: "", following: text }, { preceding: text, following: "" }];
    const { data, models } = await post("/v1/score", { pairs }, own.signal);
    show(text, data[0].forward, data[1].reverse, models);
  } catch (error) {
    showError(error, form, byId("compare-stop").parentElement);
  } finally {
    if (running === own) {
      running = null;
      setBusy(form, byId("compare-stop"), false);
    }
  }
}

function show(text, forward, reverse, [reverseName, forwardName]) {
  compared = commonPieces(text, piecesOf(text, forward), piecesOf(text, reverse));
  const numBytes = new TextEncoder().encode(text).length;
  const rows = [[forwardName, "forward", forward], [reverseName, "reverse", reverse]];
  byId("totals").tBodies[0].replaceChildren(...rows.map((row) => totalRow(...row, numBytes)));
  const largest = [...compared].sort((a, b) => size(b) - size(a)).slice(0, LISTED);
  byId("differences").tBodies[0].replaceChildren(...largest.map(differenceRow));
  byId("comparison").hidden = false;
  showStrip();
}

/** Return F - R of a piece; 0 if it is impossible for both models. */
const difference = (piece) => (piece.forward === piece.reverse ? 0 : piece.forward - piece.reverse);
const size = (piece) => Math.abs(difference(piece));

function totalRow(name, direction, score, numBytes) {
  const total = score.logprob ?? -Infinity;
  const label = name === direction ? name : `${name} (${direction})`;
  return make(
    "tr",
    {},
    make("th", { scope: "row", class: "words" }, label),
    make("td", {}, shown(total)),
    make("td", {}, String(score.num_tokens)),
    make("td", {}, shown(score.num_tokens ? total / score.num_tokens : null)),
    make("td", {}, shown(-total / Math.LN2 / numBytes)),
  );
}

function differenceRow(piece) {
  const side = difference(piece) > 0 ? "forward" : "reverse";
  const text = make("span", { class: `piece ${side}` }, brief(piece.text, 40) || spaces(piece.text));
  text.style.setProperty("--fraction", strength(piece));
  const cells = [piece.forward, piece.reverse, difference(piece)].map((value) => make("td", {}, value === Infinity ? "∞" : shown(value)));
  return make("tr", {}, make("th", { scope: "row", class: "words" }, text), ...cells);
}

const spaces = (text) => text.replace(/\n/gu, "↵").replace(/\s/gu, "␣");
const strength = (piece) => Math.min(1, size(piece) / MOST);

function showStrip() {
  if (compared === null) return;
  const view = byId("view").value;
  const shade = (piece) => {
    if (view !== "difference") return { side: "warm", fraction: fractionOf(piece[view]) };
    return { side: difference(piece) > 0 ? "forward" : "reverse", fraction: strength(piece) };
  };
  const describe = (piece) => `${described(piece.text, "log P_F", piece.forward)},  log P_R ${shown(piece.reverse)}`;
  byId("compared-strip").replaceChildren(strip(compared, "Tokens of the text", shade, describe));
  [byId("compare-legend").textContent, byId("compare-scale").dataset.kind] = LEGENDS[view];
}
