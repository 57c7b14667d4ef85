"""The benchmark times the op itself: at small sizes, on the emulator, our launches give torch's results."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.benchmarks.bench_ops import CONTESTS, Contest
from tests.kernels.cases import Case, Expected, pointers
from tests.kernels.emulator import run_emulated

SMALL = {
    "rms_norm_contests": {"rows": 5, "hidden": 64},
    "swiglu_contests": {"rows": 3, "width": 48},
    "rope_contests": {"length": 6, "batch": 2, "heads": 3, "width": 64},
    "softmax_contests": {"heads": 2, "length": 24},
    "multi_tensor_contests": {"count": 3, "size": 37},
}


def wanted(contest: Contest) -> dict[str, torch.Tensor]:
    """Return torch's output, or the gradient of its first input."""
    output = contest.torch_call(*contest.torch_inputs)
    if contest.output_gradient is None:
        written = {"ledom_multi_tensor_adamw": "masters", "ledom_multi_tensor_norm": "norm"}
        return {written.get(contest.case.function, "output"): output.detach()}
    gradient = torch.autograd.grad(output, contest.torch_inputs[0], contest.output_gradient)[0]
    return {"scores_gradient" if contest.op == "causal_softmax" else "input_gradient": gradient}


@pytest.mark.parametrize("contests", CONTESTS, ids=lambda contests: contests.__name__)
def test_launch_and_torch_call_of_the_benchmark_agree(contests: Callable[..., Iterator[Contest]]) -> None:
    torch.manual_seed(0)
    for contest in contests("cpu", **SMALL[contests.__name__]):
        expected = {name: Expected(values.double()) for name, values in wanted(contest).items()}
        scratch = frozenset(pointers(contest.case)) & {"partials", "weight_gradient", "exp_avgs", "exp_avg_sqs"}
        arguments = {
            name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in contest.case.arguments.items()
        }
        found = run_emulated(contest.op, Case(contest.case.function, arguments, expected, scratch))
        for name, result in found.items():
            torch.testing.assert_close(result.double(), expected[name].values, rtol=0.03, atol=0.03)
