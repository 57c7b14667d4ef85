// Steps of an answer, cut as `StepDelimiter.steps_of` in megatron_ledom/inference/engines/engine.py cuts them.

// The characters that Python's \s matches.
const CONTENT = /[^\s\x1c-\x1f\x85]|\ufeff/u;

/** Return the expression of a delimiter; throws an Error for one that is invalid or matches the empty text. */
export function delimiterOf(pattern) {
  let expression;
  try {
    expression = new RegExp(pattern, "gu");
  } catch (error) {
    throw new Error(`This is not a regular expression: ${error.message}`);
  }
  if (expression.test("")) throw new Error("It matches the empty text, so every step would end at once.");
  return expression;
}

/** Return the steps of an answer. White space at the end belongs to the last step. */
export function stepsOf(answer, delimiter) {
  const steps = [];
  let rest = answer;
  while (rest) {
    const end = endOfStep(rest, delimiter);
    if (end === null) {
      if (CONTENT.test(rest) || steps.length === 0) return [...steps, rest];
      steps[steps.length - 1] += rest;
      return steps;
    }
    steps.push(rest.slice(0, end));
    rest = rest.slice(end);
  }
  return steps;
}

function endOfStep(text, delimiter) {
  const content = CONTENT.exec(text);
  if (content === null) return null;
  delimiter.lastIndex = content.index + content[0].length;
  const found = delimiter.exec(text);
  return found ? found.index + found[0].length : null;
}
