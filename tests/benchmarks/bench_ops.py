"""Time each fused operator on a GPU, next to torch eager, torch.compile and, if installed, Transformer Engine.

    python -m tests.benchmarks.bench_ops [--rounds 5]

A result is a fraction of the copy bandwidth, which is measured first: the least number of bytes that the operator must move,
divided by its time. All alternate on the same tensors; the result is the median of the rounds. Needs a GPU and nvcc. Not yet
run on hardware.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tests.kernels.cases import Case, c_arguments, pointers
from tests.kernels.catalogue import op_module
from tests.kernels.interface import functions
from tests.kernels.on_gpu import gpu_library
from tests.kernels.ops.multi_tensor import chunk_table, layout

CALLS_A_ROUND = 20
COPIED_BYTES = 1 << 30
Action = Callable[[], Any]


@dataclass
class Contest:
    """A launch of ours and the same computation in torch.

    `torch_call` is a function of `torch_inputs`; for a backward pass its gradients are taken with `output_gradient`.
    """

    op: str
    case: Case
    torch_call: Callable[..., torch.Tensor]
    torch_inputs: tuple[torch.Tensor, ...]
    output_gradient: torch.Tensor | None = None
    te_call: Callable[..., torch.Tensor] | None = None


def random(device: str, *shape: int, needs_gradient: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device).requires_grad_(needs_gradient)


def te_rms_norm(hidden: int, device: str) -> Callable[..., torch.Tensor] | None:
    try:
        from transformer_engine.pytorch import RMSNorm
    except ImportError:
        return None
    norm = RMSNorm(hidden, eps=1e-5, params_dtype=torch.bfloat16, device=device)
    return lambda x, weight: norm(x)


def te_rope() -> Callable[..., torch.Tensor] | None:
    try:
        from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
    except ImportError:
        return None
    return lambda x, freqs: apply_rotary_pos_emb(x, freqs, tensor_format="sbhd", fused=True)


def rms_norm_contests(device: str, rows: int = 8192, hidden: int = 4096) -> Iterator[Contest]:
    x, weight = random(device, rows, hidden, needs_gradient=True), random(device, hidden, needs_gradient=True)
    sizes = {"eps": 1e-5, "rows": rows, "hidden": hidden, "dtype": torch.bfloat16}
    call, te = (lambda x, weight: F.rms_norm(x, (hidden,), weight, 1e-5)), te_rms_norm(hidden, device)
    forward = {"input": x, "residual": None, "weight": weight, "output": torch.empty_like(x), "sum": None, **sizes}
    yield Contest("rms_norm", Case("ledom_rms_norm_forward", forward, {}), call, (x, weight), te_call=te)
    gradient = random(device, rows, hidden)
    backward = {"output_gradient": gradient, "sum_gradient": None, "input": x, "weight": weight, **sizes}
    backward |= {"input_gradient": torch.empty_like(x), "weight_gradient": torch.empty_like(weight)}
    backward |= {"partials": torch.empty(256, hidden, device=device)}
    yield Contest("rms_norm", Case("ledom_rms_norm_backward", backward, {}), call, (x, weight), gradient, te)


def swiglu_contests(device: str, rows: int = 8192, width: int = 14336) -> Iterator[Contest]:
    x, gradient = random(device, rows, 2 * width, needs_gradient=True), random(device, rows, width)
    sizes = {"rows": rows, "width": width, "dtype": torch.bfloat16}

    def call(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    forward = {"input": x, "output": torch.empty_like(gradient), **sizes}
    yield Contest("swiglu", Case("ledom_swiglu_forward", forward, {}), call, (x,))
    backward = {"output_gradient": gradient, "input": x, "input_gradient": torch.empty_like(x), **sizes}
    yield Contest("swiglu", Case("ledom_swiglu_backward", backward, {}), call, (x,), gradient)


def rope_contests(device: str, length: int = 4096, batch: int = 2, heads: int = 32, width: int = 128) -> Iterator[Contest]:
    x = random(device, length, batch, heads, width)
    inverse = 10_000.0 ** -(torch.arange(0, width, 2, device=device) / width)
    freqs = torch.outer(torch.arange(length, device=device).float(), inverse).repeat(1, 2)[:, None, None].contiguous()

    def call(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * freqs.cos().to(x.dtype) + torch.cat((-second, first), -1) * freqs.sin().to(x.dtype)

    strides = {
        f"{side}_{what}_stride": size
        for side in ("input", "output")
        for what, size in (("token", heads * width), ("head", width))
    }
    sizes = {"length": length, "batch": batch, "heads": heads, "head_dim": width, "rotated": width, **strides}
    arguments = {"input": x, "freqs": freqs, "output": torch.empty_like(x), "scale": 1.0, **sizes, "inverse": 0}
    case = Case("ledom_rope", {**arguments, "dtype": torch.bfloat16}, {})
    yield Contest("rope", case, call, (x, freqs), te_call=te_rope())


def softmax_contests(device: str, heads: int = 16, length: int = 4096) -> Iterator[Contest]:
    x, gradient = random(device, 1, heads, length, length, needs_gradient=True), random(device, 1, heads, length, length)
    mask = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    sizes = {"scale": 0.125, "batch": 1, "heads": heads, "queries": length, "keys": length, "dtype": torch.bfloat16}

    def call(x: torch.Tensor) -> torch.Tensor:
        return (x * 0.125).masked_fill(mask, -torch.inf).softmax(-1)

    forward = {"scores": x, "documents": None, "output": torch.empty_like(x), **sizes}
    yield Contest("causal_softmax", Case("ledom_causal_softmax_forward", forward, {}), call, (x,))
    backward = {"output_gradient": gradient, "output": call(x.detach()), "documents": None, **sizes}
    case = Case("ledom_causal_softmax_backward", {**backward, "scores_gradient": torch.empty_like(x)}, {})
    yield Contest("causal_softmax", case, call, (x,), gradient)


def multi_tensor_contests(device: str, count: int = 300, size: int = 1 << 20) -> Iterator[Contest]:
    """Yield AdamW and the norm in fp32. Torch's side works on copies, because AdamW changes its inputs."""
    pieces, length = layout([size] * count)
    gradients, exp_avgs, masters = (torch.randn(length, device=device) for _ in range(3))
    exp_avg_sqs = torch.rand(length, device=device)
    lists = {"gradients": gradients, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
    parts = [[copy[at : at + size] for at, size in pieces] for copy in (each.clone() for each in lists.values())]
    rates = {"lr": 0.01, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    step = torch.ones((), device=device)

    def adamw(masters: torch.Tensor) -> torch.Tensor:
        gradients_, exp_avgs_, exp_avg_sqs_, _ = parts
        weights = [masters[at : at + size] for at, size in pieces]
        steps, flags = [step] * count, {"amsgrad": False, "maximize": False}
        torch._fused_adamw_(weights, gradients_, exp_avgs_, exp_avg_sqs_, [], steps, **rates, **flags)
        return masters

    flags = {"num_chunks": 0, "is_decoupled": 1, "gradients_are_16_bit": 0, "dtype": torch.bfloat16}
    table = chunk_table(pieces, (4, 4, 4, 4, 4)).to(device)
    arguments = {"chunks": table, **lists, "weights": None, **rates, "correction1": 0.1, "correction2": 0.05, **flags}
    case = Case("ledom_multi_tensor_adamw", {**arguments, "num_chunks": len(table)}, {})
    yield Contest("multi_tensor", case, adamw, (masters.clone(),))
    table = chunk_table(pieces, (4,)).to(device)
    sums = {"norm": torch.empty(1, device=device), "partials": torch.empty(len(table), device=device)}
    arguments = {"chunks": table, "tensors": gradients, **sums, "num_chunks": len(table), "are_16_bit": 0}
    case = Case("ledom_multi_tensor_norm", {**arguments, "dtype": torch.bfloat16}, {})

    def norm(tensors: torch.Tensor) -> torch.Tensor:
        norms = torch._foreach_norm([tensors[at : at + size] for at, size in pieces])
        return torch.linalg.vector_norm(torch.stack(norms)).view(1)

    yield Contest("multi_tensor", case, norm, (gradients,))


CONTESTS: tuple[Callable[..., Iterator[Contest]], ...] = (
    rms_norm_contests,
    swiglu_contests,
    rope_contests,
    softmax_contests,
    multi_tensor_contests,
)


def ours(contest: Contest) -> Action:
    """Return a launch on torch's stream."""
    function = functions(contest.op)[contest.case.function]
    addresses = {name: tensor.data_ptr() for name, tensor in pointers(contest.case).items()}
    contest.case.arguments["stream"] = torch.cuda.current_stream().cuda_stream
    arguments, launch = c_arguments(function, contest.case, addresses), getattr(gpu_library(contest.op), function.name)
    if code := launch(*arguments):
        raise RuntimeError(f"{function.name} returned {code}")
    return lambda: launch(*arguments)


def theirs(contest: Contest, call: Callable[..., torch.Tensor]) -> Action:
    """Return the forward call, or the backward pass alone."""
    if contest.output_gradient is None:
        inputs = [x.detach() for x in contest.torch_inputs]
        return torch.no_grad()(lambda: call(*inputs))
    output = call(*contest.torch_inputs)
    wanted = [x for x in contest.torch_inputs if x.requires_grad]
    return lambda: torch.autograd.grad(output, wanted, contest.output_gradient, retain_graph=True, allow_unused=True)


def seconds(action: Action) -> float:
    """Return the seconds of one call, measured over a series of calls."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS_A_ROUND):
        action()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / CALLS_A_ROUND


def measured(actions: dict[str, Action], rounds: int) -> dict[str, float]:
    """Return median seconds. The actions alternate; one call of each before the first round does not count."""
    for action in actions.values():
        action()
    times = [{name: seconds(action) for name, action in actions.items()} for _ in range(rounds)]
    return {name: statistics.median(turn[name] for turn in times) for name in actions}


def copy_bandwidth(rounds: int) -> float:
    """Return bytes per second, read and written."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / measured({"copy": lambda: target.copy_(source)}, rounds)["copy"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        print("no GPU: nothing is measured")
        return 1
    bandwidth = copy_bandwidth(rounds)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e9:.0f} GB/s; fractions of it:")
    for contests in CONTESTS:
        for contest in contests("cuda"):
            actions = {"ours": ours(contest), "eager": theirs(contest, contest.torch_call)}
            actions["compile"] = theirs(contest, torch.compile(contest.torch_call))
            if contest.te_call is not None:
                actions["te"] = theirs(contest, contest.te_call)
            moved = op_module(contest.op).moved(contest.case.function, contest.case.arguments)
            least = moved.least_read + moved.least_written
            shares = {name: least / took / bandwidth for name, took in measured(actions, rounds).items()}
            print(
                f"{contest.case.function:32s} " + "  ".join(f"{name} {share:.2f}" for name, share in shares.items()), flush=True
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
