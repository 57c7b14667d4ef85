// The reward, as megatron_ledom/inference/reverse_reward/reward.py defines it.

const MISSING_TOKENS = "a given forward_logprob has no forward_tokens to divide it by; add them, or remove forward_logprob";
const MISSING_TERM = "a weight µ needs log P_R(y), which these scores lack; press Score again";

/** Return the scores of a result of /v1/reward as numbers: -Infinity where the response lists "minus_infinity". */
export function scoresOf(result) {
  const infinite = new Set(result.minus_infinity ?? []);
  const value = (name) => (infinite.has(name) ? -Infinity : (result[name] ?? null));
  return {
    forward: value("forward_logprob"),
    reverse: value("reverse_logprob"),
    alone: value("language_model_logprob"),
    forwardTokens: result.forward_tokens ?? null,
    reverseTokens: result.reverse_tokens ?? null,
    skipped: result.skipped ?? null,
  };
}

/** Return the reward of scores; null if there is none. `settings` has the names of RewardSettings. */
export function rewardOf(scores, prompt, answer, settings) {
  const { weight, language_model_weight: mu = 0, temperature = 1 } = settings;
  if (scores.reverse === null || (scores.forward === null && weight < 1)) return null;
  if (mu < 0 && scores.alone === -Infinity) return null;
  if (settings.forward_normalization === "token" && scores.forwardTokens === null && weight < 1) throw new Error(MISSING_TOKENS);
  if (mu && scores.alone === null) throw new Error(MISSING_TERM);
  const total = weightedSum([
    [(1 - weight) / divisor(settings.forward_normalization, scores.forwardTokens, answer), scores.forward],
    [weight / divisor(settings.reverse_normalization, scores.reverseTokens, prompt), scores.reverse],
    [mu, scores.alone ?? 0],
  ]);
  return total / temperature;
}

/** Return the positions of rewards, best first; equal ones keep their order, null comes last. */
export function rank(rewards) {
  const positions = rewards.map((_, position) => position);
  return positions.sort((a, b) => {
    if (rewards[a] === null || rewards[b] === null) return (rewards[a] === null) - (rewards[b] === null);
    return rewards[a] === rewards[b] ? 0 : rewards[b] - rewards[a];
  });
}

function weightedSum(terms) {
  if (terms.some(([weight, value]) => weight > 0 && value === -Infinity)) return -Infinity;
  return terms.reduce((sum, [weight, value]) => (weight ? sum + weight * value : sum), 0);
}

function divisor(normalization, numTokens, text) {
  if (normalization === "byte") return Math.max(1, new TextEncoder().encode(text).length);
  return normalization === "token" ? Math.max(1, numTokens ?? 0) : 1;
}
