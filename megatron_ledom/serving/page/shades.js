// Shading of ranked candidates: tokens of prompt and answer, and the steps of the answer.

import { post } from "./api.js";
import { byId, make, shown } from "./dom.js";
import { nameOf } from "./models.js";
import { described, fractionOf, piecesOf, strip, visible } from "./shading.js";
import { delimiterOf, stepsOf } from "./steps.js";

let generation = 0; // grows when other candidates are scored
const shades = new Map(); // position -> prompt, answer, element, place of the steps, steps with their log-probabilities

export const isShaded = (position) => shades.has(position);

/** Remove all shaded candidates. */
export function clearShades() {
  generation += 1;
  shades.clear();
  show([]);
}

/** Show a candidate's shading, or remove it if it is shown. */
export async function toggleShade(position, prompt, answer) {
  if (shades.delete(position)) return;
  const delimiter = delimiterOf(byId("delimiter").value);
  const own = generation;
  const pair = { preceding: prompt, following: answer };
  const [tokens, steps] = await Promise.all([post("/v1/score", { pairs: [pair] }), scoredSteps(prompt, answer, delimiter)]);
  const { forward, reverse } = tokens.data[0];
  if (own !== generation) return;
  const place = make("ol", { class: "steps" });
  const element = make(
    "article",
    { class: "shade", "data-shaded": position },
    make("h3", {}, `Candidate ${position + 1}`),
    make("h4", {}, "Prompt, by log P", make("sub", {}, "R"), "(x|y) of its tokens"),
    tokenStrip(prompt, reverse, "log P_R", "Tokens of the prompt"),
    make("h4", {}, "Candidate, by log P", make("sub", {}, "F"), "(y|x) of its tokens"),
    forward ? tokenStrip(prompt + answer, forward, "log P_F", "Tokens of the candidate") : withoutForward(),
    make("h4", {}, "Steps, by log P", make("sub", {}, "R"), "(x|y up to the end of the step)"),
    place,
  );
  shades.set(position, { prompt, answer, element, place, steps });
}

/** Cut all shaded answers at another delimiter, and score their steps. */
export async function setDelimiter(pattern) {
  const delimiter = delimiterOf(pattern);
  const own = generation;
  const chosen = [...shades.values()];
  const found = await Promise.all(chosen.map(({ prompt, answer }) => scoredSteps(prompt, answer, delimiter)));
  if (own !== generation) return;
  chosen.forEach((shade, number) => Object.assign(shade, { steps: found[number] }));
  show([...byId("shaded").children].map((element) => Number(element.dataset.shaded)));
}

/** Show the shaded candidates in the order of the table. */
export function orderShades(positions) {
  show(positions.filter(isShaded));
}

async function scoredSteps(prompt, answer, delimiter) {
  const texts = stepsOf(answer, delimiter);
  const pairs = texts.map((_, number) => ({ preceding: prompt, following: texts.slice(0, number + 1).join("") }));
  const answered = await post("/v1/score", { model: nameOf("reverse"), pairs, token_values: false });
  return texts.map((text, number) => ({ text, logprob: answered.data[number].reverse.logprob ?? -Infinity }));
}

const withoutForward = () => make("p", { class: "hint" }, "The server has no forward model; start it with --forward DIR.");

function tokenStrip(text, score, name, label) {
  const shade = (piece) => ({ side: "warm", fraction: fractionOf(piece.logprob) });
  return strip(piecesOf(text, score), label, shade, (piece) => described(piece.text, name, piece.logprob));
}

/** Show candidates; a step's colour is its place between the lowest and the highest value of all shown steps. */
function show(positions) {
  const chosen = positions.map((position) => shades.get(position));
  const values = chosen.flatMap(({ steps }) => steps.map((step) => step.logprob)).filter(Number.isFinite);
  const low = Math.min(...values);
  const high = Math.max(...values);
  for (const { place, steps } of chosen) place.replaceChildren(...steps.map((step) => stepItem(step, low, high)));
  byId("shaded").replaceChildren(...chosen.map(({ element }) => element));
  byId("shading").hidden = chosen.length === 0;
}

function stepItem(step, low, high) {
  const fraction = high > low ? Math.max(0, (step.logprob - low) / (high - low)) : 1;
  const text = make("span", { class: "piece warm" }, visible(step.text.replace(/\n+$/u, "")));
  text.style.setProperty("--fraction", fraction.toFixed(4));
  return make("li", {}, make("span", { class: "value" }, shown(step.logprob, 2)), text);
}
