// Pieces of a text with a value each, shaded by it.

import { make, shown } from "./dom.js";

export const LOWEST = -10; // natural log-probability with the coldest colour

/** Return the pieces of a text that a score has tokens for. Tokens of one character are one piece; values are summed. */
export function piecesOf(text, score) {
  const characters = Array.from(text);
  const pieces = [];
  (score.token_offsets ?? []).forEach(([begin, end], position) => {
    const logprob = score.token_logprobs[position] ?? -Infinity;
    const last = pieces.at(-1);
    if (last && end <= last.end) last.logprob += logprob;
    else pieces.push({ begin: last ? last.end : begin, end, logprob });
  });
  for (const piece of pieces) piece.text = characters.slice(piece.begin, piece.end).join("");
  return pieces;
}

/** Return pieces that begin and end where pieces of both lists do, each with both log-probabilities. */
export function commonPieces(text, forward, reverse) {
  const characters = Array.from(text);
  const ends = new Set(reverse.map((piece) => piece.end));
  const common = forward.map((piece) => piece.end).filter((end) => ends.has(end));
  let begin = 0;
  return common.map((end) => {
    const sum = (pieces) => pieces.filter((p) => p.end > begin && p.end <= end).reduce((total, p) => total + p.logprob, 0);
    const piece = { text: characters.slice(begin, end).join(""), forward: sum(forward), reverse: sum(reverse) };
    begin = end;
    return piece;
  });
}

/** Return the place of a log-probability between the coldest colour, 0, and the warmest, 1. */
export const fractionOf = (logprob) => Math.min(1, Math.max(0, 1 - logprob / LOWEST));

/**
 * Return shaded pieces with a line that explains one of them: under the pointer, or chosen with the arrow keys.
 * shade: piece -> {side, fraction}, with side "warm" or, for differences, "forward" or "reverse". describe: piece -> text.
 */
export function strip(pieces, label, shade, describe) {
  const readout = make("p", { class: "hint readout", "aria-live": "polite" }, "\u00a0");
  const spans = pieces.map((piece) => {
    const { side, fraction } = shade(piece);
    const span = make("span", { class: `piece ${side}` }, visible(piece.text));
    span.style.setProperty("--fraction", fraction.toFixed(4));
    return span;
  });
  const group = make("div", { class: "strip", tabindex: "0", role: "group", "aria-label": label }, ...spans);
  let current = -1;
  const choose = (position) => {
    spans[current]?.classList.remove("current");
    current = position;
    spans[current].classList.add("current");
    readout.textContent = describe(pieces[current]);
  };
  group.addEventListener("pointerover", (event) => {
    const position = spans.indexOf(event.target);
    if (position >= 0) choose(position);
  });
  group.addEventListener("keydown", (event) => {
    const next = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: pieces.length - 1 }[event.key];
    if (next === undefined || !pieces.length) return;
    event.preventDefault();
    choose(Math.min(pieces.length - 1, Math.max(0, next)));
  });
  return make("div", { class: "strip-block" }, group, readout);
}

/** Return a text in which line breaks are visible, and still break the line. */
export const visible = (text) => text.replace(/\n/gu, "↵\n");

/** Return a text in quotes with a log-probability, for the line under a strip. */
export const described = (text, name, logprob) => `“${visible(text).replace(/\n/gu, "")}”  ${name} ${shown(logprob)}`;
