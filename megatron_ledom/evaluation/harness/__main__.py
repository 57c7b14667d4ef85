"""`lm-eval run` of the harness with the model of this package: `python -m megatron_ledom.evaluation.harness --help`.

The options are the harness's. --model is `ledom`, --model_args are the arguments of `LedomLM`, such as
pretrained=DIR,way=joint.
"""

import sys

from megatron_ledom.errors import run_command
from megatron_ledom.evaluation.harness import without_the_harness


def main() -> None:
    """Register the model with the harness, which loads it when needed, and run the harness."""
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise without_the_harness(error) from error
    if "ledom" not in model_registry:
        model_registry.register("ledom", target="megatron_ledom.evaluation.harness.model:LedomLM")
    sys.argv = ["lm-eval", "run", "--model", "ledom", *sys.argv[1:]]
    cli_evaluate()


if __name__ == "__main__":
    run_command(main)
