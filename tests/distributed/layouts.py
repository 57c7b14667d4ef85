"""Generate every layout of a number of ranks that the rules allow, with optimizers and recompute distributed over them."""

import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace

OPTIMIZERS = {
    "plain": [],
    "distributed": ["use_distributed_optimizer=true"],
    "overlapped": [
        "use_distributed_optimizer=true",
        "overlap_grad_reduce=true",
        "overlap_param_gather=true",
        "bucket_size=5000",  # several buckets per chunk, so that there is something to overlap
    ],
}
RECOMPUTE = {
    "none": [],
    "selective": ["recompute_granularity=selective", "recompute_modules=[core_attn,mlp]"],
    "uniform": ["recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"],
    "block": ["recompute_granularity=full", "recompute_method=block", "recompute_num_layers=1"],
}
GLOBAL_BATCH = 16


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """The layout of one run, with its optimizer and recompute."""

    dp: int = 1
    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    optimizer: str = "plain"
    recompute: str = "none"

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the run."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def num_layers(self) -> int:
        """Number of layers of its model: at least four, and the same number for every model chunk."""
        return max(4, self.pp * self.vpp)

    @property
    def name(self) -> str:
        """Name of the layout, such as `DP2 TP2+SP PP2x2, overlapped, uniform`."""
        parts = [f"DP{self.dp}"] if self.dp > 1 else []
        parts += [f"TP{self.tp}{'+SP' if self.sp else ''}"] if self.tp > 1 else []
        parts += [f"PP{self.pp}{f'x{self.vpp}' if self.vpp > 1 else ''}"] if self.pp > 1 else []
        parts += [f"CP{self.cp}"] if self.cp > 1 else []
        return ", ".join([" ".join(parts) or "one process", self.optimizer, self.recompute])

    def overrides(self) -> list[str]:
        """Return the layout as overrides of the config, with batches of at least two micro-batches per stage."""
        parallel = [
            f"tensor_model_parallel_size={self.tp}",
            f"sequence_parallel={str(self.sp).lower()}",
            f"pipeline_model_parallel_size={self.pp}",
            f"context_parallel_size={self.cp}",
            *([f"virtual_pipeline_model_parallel_size={self.vpp}"] if self.vpp > 1 else []),
            *OPTIMIZERS[self.optimizer],
            *RECOMPUTE[self.recompute],
        ]
        micro_batch = GLOBAL_BATCH // (2 * self.pp * self.dp)
        sizes = [f"model.num_layers={self.num_layers}", f"train.micro_batch_size={micro_batch}"]
        return [*[f"parallel.{setting}" for setting in parallel], *sizes]


def shapes(num_ranks: int) -> Iterator[Layout]:
    """Yield every factorization of the ranks into DP x TP x PP x CP, with and without SP and two chunks per stage if possible."""
    divisors = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    for dp, tp, pp, cp in itertools.product(divisors, repeat=4):
        if dp * tp * pp * cp != num_ranks:
            continue
        for sp, vpp in itertools.product([False, True] if tp > 1 else [False], [1, 2] if pp > 1 else [1]):
            yield Layout(dp=dp, tp=tp, sp=sp, pp=pp, vpp=vpp, cp=cp)


def value_pairs(layout: Layout) -> set[tuple[object, ...]]:
    """Return all pairs of (property, value) that a layout has."""
    names = [field.name for field in fields(layout)]
    return set(itertools.combinations(zip(names, astuple(layout), strict=True), 2))


def all_layouts(num_ranks: int) -> list[Layout]:
    """Return every shape, with optimizers and recompute such that any two compatible values occur together in a layout."""
    choices = list(itertools.product(OPTIMIZERS, RECOMPUTE))
    wanted = {pair for layout in every_combination(num_ranks) for pair in value_pairs(layout)}
    found: list[Layout] = []
    rounds = 0
    while not found or wanted:
        for shape in shapes(num_ranks):
            rotated = choices[len(found) % len(choices) :] + choices[: len(found) % len(choices)]
            options = [replace(shape, optimizer=optimizer, recompute=recompute) for optimizer, recompute in rotated]
            best = max(options, key=lambda layout: len(value_pairs(layout) & wanted))
            if rounds == 0 or value_pairs(best) & wanted:
                found.append(best)
                wanted -= value_pairs(best)
        rounds += 1
    return found


def measured(num_ranks: int, dtype: str) -> list[Layout]:
    """Return the layouts to run in a data type: all in fp32, which shows every error; every third in bf16, for its rounding."""
    layouts = all_layouts(num_ranks)
    return layouts if dtype == "fp32" else layouts[::3]


def every_combination(num_ranks: int) -> Iterator[Layout]:
    """Yield the whole product, several hundred layouts for eight ranks."""
    for shape in shapes(num_ranks):
        for optimizer, recompute in itertools.product(OPTIMIZERS, RECOMPUTE):
            yield replace(shape, optimizer=optimizer, recompute=recompute)
