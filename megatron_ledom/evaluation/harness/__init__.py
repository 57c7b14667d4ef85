"""Run lm-evaluation-harness on models of either direction. Its task files run unchanged.

    from lm_eval import simple_evaluate
    from megatron_ledom.evaluation.harness.model import LedomLM    # needs the extra `harness`

    simple_evaluate(model=LedomLM("models/reverse"), tasks=["hellaswag"])

The harness assumes that a model reads from left to right. A forward model gives the answers of the harness's own `hf`
model. This package treats each assumption as follows:

pair encoding       Context and continuation are encoded once, as one text, then cut and reversed; never separately.
conditioned side    A reverse model cannot compute log P(continuation | context). It scores the text with each choice of a document
                    (`joint`), or the context given each choice (`context_given_choice`, `prior_removed`: the ways of
                    `evaluation.multiple_choice`). The harness passes no labels, so a choice's prior is that of the choice alone.
                    A single continuation (output_type: loglikelihood) has nothing to be compared with and is refused.
start symbol        Precedes the first token that the model reads. For a reverse model it is eod, after the end of the text.
truncation          A forward model loses the beginning of the context, as in the harness. A reverse model reads the beginning last,
                    so all choices of a document lose the same characters; otherwise their likelihoods could not be compared.
exemplars           Stay before the query, so both directions score the same text. P(exemplars, query, choice) ranks choices as
                    P(choice | exemplars, query) does, whichever end a model reads from.
`until`             Is searched in the written text in text order. A reverse model cannot write after a prompt, so the task is
                    refused; `ledom evaluate` has prompts for both directions.
rolling windows     Run from the end of the text to its beginning for a reverse model. Each token is predicted once.
length of acc_norm  The harness divides a log-likelihood by the length of the choice. A reverse model scores longer texts, so its
                    scores are first normalized: the probability of a choice is that of the text with it, divided by the sum of
                    those of the texts with each choice of the document. So the choices' probabilities add up to 1. `acc` does not
                    change, and acc_norm is close to it. `ledom evaluate` has metrics per token and per byte of the scored text.
delimiter's space   White space before a choice belongs to the choice. A text that begins with the choice does not contain it.
"""

from megatron_ledom.errors import UsageError


def without_the_harness(error: ImportError) -> UsageError:
    """Return the error for a missing lm-eval, or a missing part of it."""
    return UsageError(f"the harness needs lm-eval ({error}); run pip install 'megatron-ledom[harness]'")
