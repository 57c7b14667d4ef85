"""lm-evaluation-harness over models of either direction: its task files run unchanged.

    from lm_eval import simple_evaluate
    from megatron_ledom.evaluation.harness.model import LedomLM    # needs the extra `harness`

    simple_evaluate(model=LedomLM("models/reverse"), tasks=["hellaswag"])

The harness takes it for granted that a model reads from left to right. What is done with each of its assumptions; a forward model's
answers are those of the harness's own `hf` model:

pair encoding       context and continuation are encoded once, as one text, then cut and turned; never part by part
conditioned side    a reverse model has no log P(continuation | context). Of the choices of a document it scores the text with each
                    choice (`joint`), or the context given each choice (`context_given_choice`, `prior_removed`: the ways of
                    `evaluation.multiple_choice`; the harness hands over no labels, so the choice's prior is that of the choice alone). A
                    single continuation (output_type: loglikelihood) has no others to be compared with and is refused
start symbol        stands before the first token that the model reads: for a reverse model eod, behind the end of the text
truncation          a forward model loses the beginning of the context. A reverse model comes to it last; all choices of a document
                    lose the same characters, or their likelihoods could not be compared
exemplars           stay in front of the query. P(exemplars, query, choice) ranks choices as P(choice | exemplars, query) does,
                    whichever end a model reads from, so the text in reading order is the same for both
`until`             is looked for in what was written as people read it. A reverse model cannot write behind a prompt: refused, with
                    `ledom evaluate`, which has prompts for both directions
rolling windows     go from the text's end to its beginning for a reverse model; each token is predicted once
length of acc_norm  the harness divides by the length of the choice. A reverse model's scores are of longer texts, so they become
                    log-probabilities of the choices first: log P(choice | context, one of these choices). That moves no `acc`,
                    and leaves acc_norm close to it; figures per token and per byte of what was scored: `ledom evaluate`
delimiter's space   white space before a choice belongs to the choice, and is no part of a text that begins with the choice
"""

from megatron_ledom.errors import UsageError


def without_the_harness(error: ImportError) -> UsageError:
    """Return the error for an lm-eval that is missing, or a part of it."""
    return UsageError(f"the harness needs lm-eval ({error}): pip install 'megatron-ledom[harness]'")
