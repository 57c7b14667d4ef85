// Rank: candidates by reward. The slider ranks again from the returned log-probabilities, without a call.

import { post } from "./api.js";
import { addCandidate, boxes, candidates, questionsOf, setCandidates } from "./candidates.js";
import { bindForm, brief, byId, make, setBusy, setText, shown, textOf } from "./dom.js";
import { nameOf } from "./models.js";
import { clearProblems, FieldError, numberFrom, numbersIn, showError } from "./problems.js";
import { rank, rewardOf, scoresOf } from "./reward.js";
import { clearShades, isShaded, orderShades, setDelimiter, toggleShade } from "./shades.js";

let running = null;
let sampling = null;
let scored = null; // prompt, answers and scores of the table
let questions = [];
let hasForward = true;

/** Bind the panel. */
export function startRank() {
  bindForm(byId("rank-form"), byId("rank-stop"), score, () => (running ?? sampling)?.abort());
  byId("add-candidate").addEventListener("click", () => addCandidate().focus());
  byId("clear-candidates").addEventListener("click", () => setCandidates(["", ""]));
  byId("candidates").addEventListener("click", showRanking);
  byId("load-lines").addEventListener("click", loadLines);
  byId("question").addEventListener("change", () => useQuestion(questions[byId("question").selectedIndex]));
  byId("sample-run").addEventListener("click", sample);
  byId("sample-stop").addEventListener("click", () => sampling?.abort());
  byId("weight").addEventListener("input", showRanking);
  byId("rank-form").addEventListener("input", showRanking);
  byId("delimiter").addEventListener("change", changeDelimiter);
  setCandidates(["", ""]);
}

/** Adapt the panel to the models of the server. */
export function adaptRank() {
  hasForward = nameOf("forward") !== null;
  byId("sample-run").disabled = !hasForward;
  byId("sample-needs").hidden = hasForward;
  byId("sample-needs").textContent = "This server has no forward model; start it with --forward DIR to sample candidates.";
  showRanking();
}

const promptText = () => textOf(byId("prompt")) && textOf(byId("prompt")) + byId("separator").value;
const answersOf = (given) => given.map((one) => (typeof one === "string" ? one : one.text));

function settings() {
  const divisor = byId("reward-temperature");
  const temperature = numberFrom(divisor) ?? 1;
  if (!(temperature > 0)) throw new FieldError(divisor, "T must be a positive number; 1 changes nothing.");
  return {
    weight: Number(byId("weight").value),
    forward_normalization: byId("forward-normalization").value,
    reverse_normalization: byId("reverse-normalization").value,
    language_model_weight: numberFrom(byId("language-model-weight")) ?? 0,
    temperature,
    include_ends: byId("include-ends").checked,
  };
}

async function score() {
  const form = byId("rank-form");
  running?.abort();
  const own = (running = new AbortController());
  clearProblems(form);
  try {
    const given = candidates();
    const prompt = promptText();
    if (!prompt) throw new FieldError(byId("prompt"), "Type a prompt, at least one character.");
    if (given.every((one) => one === "")) throw new FieldError(boxes()[0] ?? byId("add-candidate"), "Type at least one candidate.");
    lockWeight(given);
    const body = { prompt, candidates: given, ...settings(), too_long: "skip" };
    setBusy(form, byId("rank-stop"), true);
    const { results } = await post("/v1/reward", body, own.signal);
    scored = { prompt, answers: answersOf(given), scores: results.map(scoresOf), includeEnds: body.include_ends };
    clearShades();
    showRanking();
    const best = order()[0];
    if (scored.scores[best].reverse !== null) await shade(best);
  } catch (error) {
    placed(error, form);
    showError(error, form, byId("rank-stop").parentElement);
  } finally {
    if (running === own) {
      running = null;
      setBusy(form, byId("rank-stop"), false);
    }
  }
}

/** Without a forward model only weight 1 gives a reward, unless each candidate brings its forward_logprob. */
function lockWeight(given) {
  const needed = !hasForward && given.some((one) => typeof one === "string");
  if (needed) byId("weight").value = "1";
  byId("weight").disabled = needed;
  const why = "This server has no forward model, so λ is 1; start it with --forward DIR, or give a forward_logprob for each candidate.";
  byId("weight-ends").firstElementChild.textContent = needed ? why : "0: forward model alone";
}

/** Attach the field of the page to an error of the server that names a field by another name. */
function placed(error, form) {
  const [name, position] = (error.param ?? "").split(".");
  if (name === "candidates") error.field = boxes()[Number(position)] ?? boxes()[0];
  if (name === "temperature") error.field = form.querySelector('[name="reward_temperature"]');
}

function rewards() {
  const chosen = settings();
  return scored.scores.map((one, position) => rewardOf(one, scored.prompt, scored.answers[position], chosen));
}

const order = () => rank(rewards());

function showRanking() {
  byId("weight-value").textContent = Number(byId("weight").value).toFixed(2);
  if (scored === null) return;
  const problem = byId("ranking-problem");
  byId("ranking").hidden = false;
  try {
    const values = rewards();
    const positions = rank(values);
    const rows = positions.map((position, place) => row(position, place + 1, values[position]));
    const focused = document.activeElement?.dataset?.shade;
    byId("ranked").tBodies[0].replaceChildren(...rows);
    if (focused !== undefined) byId("ranked").querySelector(`[data-shade="${focused}"]`)?.focus();
    orderShades(positions);
    const best = positions[0];
    byId("ranking-status").textContent = `Best: candidate ${best + 1}, reward ${shown(values[best])}`;
    problem.hidden = !isStale();
    if (!problem.hidden) problem.textContent = "The input has changed: press Score again.";
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
  }
}

/** Return true if the table belongs to an earlier prompt, other candidates, or another choice of the ends. */
function isStale() {
  const answers = answersOf(candidates());
  const isSame = answers.length === scored.answers.length && answers.every((answer, position) => answer === scored.answers[position]);
  return !isSame || promptText() !== scored.prompt || scored.includeEnds !== byId("include-ends").checked;
}

function row(position, place, reward) {
  const scores = scored.scores[position];
  const name = `Candidate ${position + 1}`;
  const text = brief(scored.answers[position], 90) || "(empty)";
  const note = scores.skipped ? make("span", { class: "hint" }, ` skipped: ${scores.skipped}`) : "";
  const button = make("button", { type: "button", class: "quiet", "data-shade": position, click: () => shade(position) });
  button.setAttribute("aria-pressed", String(isShaded(position)));
  button.setAttribute("aria-label", `Shade candidate ${position + 1}`);
  button.textContent = isShaded(position) ? "Hide" : "Show";
  button.disabled = scores.reverse === null;
  return make(
    "tr",
    { "data-position": position },
    make("td", {}, String(place)),
    make("th", { scope: "row", class: "words" }, make("span", { class: "hint" }, `${name} `), text, note),
    make("td", { class: "reward" }, shown(reward)),
    make("td", {}, shown(scores.forward)),
    make("td", {}, shown(scores.reverse)),
    make("td", {}, shown(scores.forwardTokens, 0)),
    make("td", {}, shown(scores.reverseTokens, 0)),
    make("td", {}, button),
  );
}

async function shade(position) {
  clearProblems(byId("ranking"));
  try {
    await toggleShade(position, scored.prompt, scored.answers[position]);
    showRanking();
  } catch (error) {
    showError(error, byId("ranking"), byId("ranked").parentElement);
  }
}

async function changeDelimiter() {
  const box = byId("delimiter");
  clearProblems(byId("shading"));
  try {
    await setDelimiter(box.value);
  } catch (error) {
    showError(error.status ? error : new FieldError(box, error.message), byId("shading"), box);
  }
}

function loadLines() {
  clearProblems(byId("paste"));
  try {
    questions = questionsOf(byId("lines"));
  } catch (error) {
    showError(error, byId("paste"), byId("lines"));
    return;
  }
  const names = questions.map((question, number) => make("option", {}, `${number + 1}. ${brief(question.prompt ?? "", 60)}`));
  byId("question").replaceChildren(...names);
  byId("question-field").hidden = questions.length < 2;
  useQuestion(questions[0]);
}

function useQuestion(question) {
  if (question.prompt !== null) {
    setText(byId("prompt"), question.prompt);
    byId("separator").value = ""; // a reranking file joins prompt and candidate as given
  }
  setCandidates(question.candidates);
  showRanking();
}

async function sample() {
  const place = byId("sample");
  clearProblems(place);
  const own = (sampling = new AbortController());
  const button = byId("sample-run");
  try {
    const options = numbersIn(place);
    const prompt = promptText();
    if (!prompt) throw new FieldError(byId("prompt"), "Type a prompt, at least one character.");
    byId("sample-stop").disabled = false;
    button.disabled = true;
    const answer = await post("/v1/completions", { model: nameOf("forward"), prompt, ...options }, own.signal);
    const kept = candidates().filter((one) => one !== "");
    setCandidates([...kept, ...answer.choices.map((choice) => choice.text)]);
    showRanking();
  } catch (error) {
    if (error.param === "prompt") error.field = byId("prompt");
    showError(error, place, button.parentElement);
  } finally {
    sampling = null;
    byId("sample-stop").disabled = true;
    button.disabled = !hasForward;
  }
}
