"""Measured runs that others published, as the planner takes them: what it is fitted on, and what it is judged by."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_ledom.planning.shapes import Architecture, Granularity, Layout
from megatron_ledom.planning.step_time import Software

Use = Literal["fitted", "scaled", "unfitted"]


@dataclass(frozen=True, slots=True)
class Point:
    """One published time of an iteration."""

    name: str
    family: str
    """Points of one program on one cluster."""
    source: str
    model: Architecture
    layout: Layout
    seconds: float
    use: Use
    """fitted: decides the hardware's numbers; scaled: decides its family's slowdown only; unfitted: judges the planner."""


@dataclass(frozen=True, slots=True)
class LayerPoint:
    """A published time of one layer's passes, in milliseconds; those of Korthikanti et al. decide the hardware's numbers."""

    name: str
    layout: Layout
    forward: float
    backward: float


def gpt(num_layers: int, hidden_size: int, num_attention_heads: int, vocab: int = 51_200) -> Architecture:
    """A GPT-3-like model: GELU, biases, dropout, attention that keeps its scores."""
    return Architecture(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=4 * hidden_size,
        num_attention_heads=num_attention_heads,
        num_query_groups=num_attention_heads,
        head_dim=hidden_size // num_attention_heads,
        padded_vocab_size=vocab,
        gated=False,
        biased=True,
        attention_dropout=True,
        hidden_dropout=True,
        flash=False,
        shared_embeddings=True,
    )


LEDOM_7B = Architecture(
    num_layers=28,
    hidden_size=3072,
    ffn_hidden_size=24576,
    num_attention_heads=16,
    num_query_groups=16,
    head_dim=192,
    padded_vocab_size=64256,
)


def _batch(micro_batch_size: int, num_microbatches: int, **layout: int) -> dict[str, Any]:
    return {
        "seq_length": 2048,
        "micro_batch_size": micro_batch_size,
        "num_microbatches": num_microbatches,
        "tensor": 8,
        **layout,
    }


KORTHIKANTI: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "22B": (gpt(48, 6144, 64), _batch(4, 1)),
    "175B": (gpt(96, 12288, 96), _batch(1, 64, pipeline=8, chunks=3)),
    "530B": (gpt(105, 20480, 128), _batch(1, 280, pipeline=35, chunks=3)),
    "1T": (gpt(128, 25600, 160), _batch(1, 512, pipeline=64)),
}
"""Models and layouts of Korthikanti et al. 2022, arXiv 2205.05198, table 3."""

SOFTWARE = {
    "Korthikanti 2022": Software(fused=True, scattered_transfers=True, blocking_transfers=True),
    "MT-NLG 2022": Software(fused=True, blocking_transfers=True),
    "Narayanan 2021": Software(fused=True, scattered_transfers=True, blocking_transfers=True),
}
"""The program of each family of points, as its paper describes it."""

SAVING: dict[str, Any] = {"recompute": "selective", "sequence_parallel": True}
_TIMES = {"22B": (1.42, 1.10), "175B": (18.13, 13.75), "530B": (49.05, 37.83), "1T": (94.42, 71.49)}
_TABLE_5 = "arXiv 2205.05198, table 5"


def layer_points() -> list[LayerPoint]:
    """One layer of the 22B, arXiv 2205.05198, table 4."""
    shape = KORTHIKANTI["22B"][1]
    return [
        LayerPoint("neither", Layout(**shape), 7.7, 11.9),
        LayerPoint("sequence parallel", Layout(**shape, sequence_parallel=True), 7.2, 11.8),
        LayerPoint("selective recompute", Layout(**shape, recompute="selective"), 7.7, 13.2),
        LayerPoint("both", Layout(**shape, **SAVING), 7.2, 13.1),
    ]


def points() -> list[Point]:
    """Every published iteration whose inputs are known."""
    found = []
    for name, (full, saving) in _TIMES.items():
        model, shape = KORTHIKANTI[name]
        use: Use = "fitted" if name == "22B" else "unfitted"
        for words, seconds, settings in (("full recompute", full, {"recompute": "full"}), ("SP, selective", saving, SAVING)):
            found.append(
                Point(f"{name}, {words}", "Korthikanti 2022", _TABLE_5, model, Layout(**shape, **settings), seconds, use)
            )
    for gpus, seconds in ((2240, 60.1), (2800, 50.2), (3360, 44.4)):
        layout = Layout(**_batch(1, 1920 * 280 // gpus, pipeline=35, data=gpus // 280), recompute="full")
        found.append(
            _by_gpus("530B (MT-NLG)", "MT-NLG 2022", "arXiv 2201.11990, section 4.1", gpt(105, 20480, 128), layout, seconds)
        )
    big = gpt(96, 12288, 96)
    for gpus, tflops in ((384, 153.0), (768, 149.0), (1536, 141.0)):
        layout = Layout(**_batch(1, 1536 * 96 // gpus, pipeline=12, data=gpus // 96), recompute="full")
        seconds = hardware_flops(big, layout) / (tflops * 1e12 * gpus)
        found.append(_by_gpus("174.6B", "Narayanan 2021", "arXiv 2104.04473, table 2", big, layout, seconds))
    return found


def _by_gpus(name: str, family: str, source: str, model: Architecture, layout: Layout, seconds: float) -> Point:
    """A point of a series over GPUs, whose smallest decides the family's slowdown."""
    first = layout.num_ranks in (384, 2240)
    return Point(
        f"{name}, {layout.num_ranks:,} GPUs", family, source, model, layout, seconds, "scaled" if first else "unfitted"
    )


def hardware_flops(model: Architecture, layout: Layout) -> float:
    """FLOPs of an iteration with full recompute, as arXiv 2104.04473, equation 3, counts them: four forward passes."""
    h, layers = model.hidden_size, model.num_layers
    correction = 1 + layout.seq_length / (6 * h) + model.padded_vocab_size / (16 * layers * h)
    return 96.0 * layout.tokens_per_iteration * layers * h * h * correction


@dataclass(frozen=True, slots=True)
class OpenPoint:
    """A published time whose layout or program is not all known: the planner gives an interval over what it may have been."""

    name: str
    source: str
    hardware: str
    unknown: str
    model: Architecture
    variants: tuple[tuple[Layout, Software], ...]
    seconds: float


def llama(
    num_layers: int, hidden_size: int, heads: int, ffn_hidden_size: int, groups: int = 0, vocab: int = 32_000
) -> Architecture:
    """A model of the LLaMA family."""
    return Architecture(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups or heads,
        head_dim=hidden_size // heads,
        padded_vocab_size=vocab,
    )


@dataclass(frozen=True, slots=True)
class MeasuredPeak:
    """Bytes of tensors at their most (`torch.cuda.max_memory_allocated`) on the last rank, and seconds of an iteration."""

    name: str
    gpu: str
    hardware: str
    model: Architecture
    layout: Layout
    num_bytes: int
    seconds: float


MEGATRON_TESTS = "Megatron-LM, tests/functional_tests/test_cases/gpt"


def measured_peaks() -> list[MeasuredPeak]:
    """The two dense 7B cases whose memory Megatron-LM's own tests record on eight GPUs; the median time of iterations 4 to 24."""
    batch: dict[str, Any] = {"seq_length": 8192, "data": 2, "distributed_optimizer": True}
    batch |= {"overlap_grad_reduce": True, "overlap_param_gather": True}
    tensor = Layout(**batch, micro_batch_size=2, num_microbatches=2, tensor=4)
    pipeline = Layout(**batch, micro_batch_size=1, num_microbatches=4, pipeline=4, chunks=8)
    rows = (
        ("TP 4", "A100", "a100-80", tensor, 131_584, 58_188_115_968, 2.587),
        ("TP 4", "H100", "h100-sxm", tensor, 131_584, 57_143_791_616, 1.097),
        ("PP 4, 8 chunks", "A100", "a100-80", pipeline, 131_200, 60_489_064_448, 2.942),
        ("PP 4, 8 chunks", "H100", "h100-sxm", pipeline, 131_200, 60_518_293_504, 1.061),
    )
    return [
        MeasuredPeak(f"7B, {name}", gpu, hardware, _tested_7b(vocab), layout, num_bytes, seconds)
        for name, gpu, hardware, layout, vocab, num_bytes, seconds in rows
    ]


def _tested_7b(padded_vocab_size: int) -> Architecture:
    """GPT of 32 layers with GQA, learned positions and dropout, on Transformer Engine's fused attention."""
    model = gpt(32, 4096, 32, padded_vocab_size)
    return replace(model, num_query_groups=8, flash=True, shared_embeddings=False, learned_positions=8192)


def open_points() -> list[OpenPoint]:
    """Points with unknown inputs, each with everything it may have been."""
    found = [_ledom()]
    sizes = {
        "7B": (32, 4096, 32, 11008),
        "13B": (40, 5120, 40, 13824),
        "33B": (60, 6656, 52, 17920),
        "65B": (80, 8192, 64, 22016),
    }
    for (name, size), tokens in zip(sizes.items(), (3370, 2055, 733, 380), strict=True):
        variants = tuple((layout, Software()) for layout in _llama_layouts(size[2]))
        seconds = 2048 * 2048 / 2048 / tokens
        found.append(
            OpenPoint(
                f"LLaMA {name}",
                "arXiv 2302.13971",
                "a100-80",
                "layout, micro-batch, recompute",
                llama(*size),
                variants,
                seconds,
            )
        )
    model = llama(32, 4096, 32, 14336, 8, 128_256)
    for words, fused, tokens in (("eager", False, 5762), ("compiled", True, 6667)):
        recomputes: tuple[Granularity | None, ...] = (None, "full")
        variants = tuple((_torchtitan(recompute), Software(fused=fused)) for recompute in recomputes)
        name = f"Llama-3.1-8B, {words}"
        unknown = "fully sharded, not planned here; which parts are computed again; GPUs of 500 W"
        found.append(OpenPoint(name, "torchtitan", "h100-sxm", unknown, model, variants, 2 * 8192 / tokens))
    unknown = "what deterministic kernels and dropout in the attention take"
    for one in measured_peaks():
        variants = ((one.layout, Software(fused=True)),)
        found.append(
            OpenPoint(f"{one.name}, {one.gpu}", MEGATRON_TESTS, one.hardware, unknown, one.model, variants, one.seconds)
        )
    return found + [_megatron_readme(*row) for row in README_H100]


README_H100 = (("1.7B", 24, 2304, 24, 1, 1, 408.8), ("16B", 40, 5632, 44, 4, 1, 489.1), ("70B", 84, 8192, 64, 8, 2, 419.7))
"""Size, then guesses of layers, width and heads that give it, TP, PP, and the TFLOP/s a GPU that were measured."""


def _megatron_readme(name: str, layers: int, hidden: int, heads: int, tensor: int, pipeline: int, tflops: float) -> OpenPoint:
    """A line of the table of weak scaling on H100 in Megatron-LM's README."""
    model = replace(gpt(layers, hidden, heads, 131_072), flash=True, attention_dropout=False, hidden_dropout=False)
    variants = []
    for size, chunks in itertools.product((1, 2, 4), (1, 6) if pipeline > 1 else (1,)):
        layout = Layout(
            seq_length=4096,
            micro_batch_size=size,
            num_microbatches=16 // size,
            tensor=tensor,
            pipeline=pipeline,
            chunks=chunks,
            data=24,
            sequence_parallel=tensor > 1,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        )
        variants.append((layout, Software(fused=True)))
    layout = variants[0][0]
    seconds = 0.75 * hardware_flops(model, layout) / (tflops * 1e12 * layout.num_ranks)
    unknown = "shape, batch, interleaving, overlap"
    return OpenPoint(f"Megatron-LM {name}", "its README", "h100-sxm", unknown, model, tuple(variants), seconds)


def _ledom() -> OpenPoint:
    variants = []
    recomputes: tuple[Granularity | None, ...] = (None, "selective")
    for fused, overlap, recompute in itertools.product((True, False), (True, False), recomputes):
        layout = Layout(
            seq_length=8192,
            micro_batch_size=1,
            num_microbatches=32,
            tensor=2,
            data=32,
            sequence_parallel=True,
            distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
            recompute=recompute,
        )
        variants.append((layout, Software(fused=fused)))
    unknown = "fusions, overlap, recompute of the core attention, attention kernel, network"
    return OpenPoint("LEDOM 7B, 64 GPUs", "logs of the original run", "a100-80", unknown, LEDOM_7B, tuple(variants), 37.576)


def _llama_layouts(heads: int) -> Iterator[Layout]:
    """2,048 sequences of 2,048 tokens on 2,048 devices."""
    recomputes: tuple[Granularity | None, ...] = (None, "full")
    for tensor, size, recompute in itertools.product((1, 2, 4, 8), (1, 2, 4), recomputes):
        if heads % tensor == 0 and tensor >= size:
            yield Layout(
                seq_length=2048,
                micro_batch_size=size,
                num_microbatches=tensor // size,
                tensor=tensor,
                data=2048 // tensor,
                sequence_parallel=tensor > 1,
                distributed_optimizer=True,
                overlap_grad_reduce=True,
                overlap_param_gather=True,
                recompute=recompute,
            )


def _torchtitan(recompute: Granularity | None) -> Layout:
    return Layout(
        seq_length=8192,
        micro_batch_size=2,
        num_microbatches=1,
        data=8,
        distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        recompute=recompute,
    )
