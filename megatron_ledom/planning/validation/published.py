"""Published measurements of runs, from `published.yaml`. Some fit the planner's numbers, the others test it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_ledom.planning.shapes import Architecture, Layout
from megatron_ledom.planning.step_time import Software

FILE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True, slots=True)
class Point:
    """A published time of an iteration."""

    name: str
    family: str
    """Name of a group of points: one program on one cluster."""
    source: str
    model: Architecture
    layout: Layout
    seconds: float
    use: Literal["fitted", "scaled", "unfitted"]
    """fitted: sets the hardware's numbers; scaled: sets the slowdown of its family; unfitted: tests the planner."""


@dataclass(frozen=True, slots=True)
class LayerPoint:
    """Published milliseconds of the passes of one layer; they set the hardware's numbers."""

    layout: Layout
    forward: float
    backward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UncertainPoint:
    """A published time whose layout or program is not fully known. The planner gives an interval over its variants."""

    name: str
    source: str
    hardware: str
    unknown: str
    model: Architecture
    variants: list[tuple[Layout, Software]]
    seconds: float
    gpu: str = ""
    num_bytes: int = 0
    """Peak bytes of tensors on the last rank; 0 if not measured. Points with a peak have one variant."""


@dataclass(frozen=True, slots=True)
class Published:
    """Everything in `published.yaml`."""

    points: list[Point]
    software: dict[str, Software]
    """The program of each family of points."""
    layers: list[LayerPoint]
    uncertain_points: list[UncertainPoint]
    table_3: dict[str, tuple[Architecture, dict[str, Any], list[float]]]
    """Models and layouts of Korthikanti et al. 2022, arXiv 2205.05198, table 3, and GiB a device by its formulas."""

    @property
    def peaks(self) -> list[UncertainPoint]:
        """Points with measured memory."""
        return [point for point in self.uncertain_points if point.num_bytes]


@cache
def published() -> Published:
    """Read `published.yaml`."""
    data = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    models = {name: _architecture(values) for name, values in data["models"].items()}
    points = []
    for family, found in data["families"].items():
        for row in found["points"]:
            model = models[row["model"]]
            (layout,) = _layouts(model, row["layout"])
            points.append(Point(row["name"], family, found["source"], model, layout, _seconds(row, model, layout), row["use"]))
    return Published(
        points=points,
        software={family: Software(**found["software"]) for family, found in data["families"].items()},
        layers=[LayerPoint(Layout(**row["layout"]), row["forward"], row["backward"]) for row in data["layers"]],
        uncertain_points=[_uncertain_point(row, models[row["model"]]) for row in data["open"]],
        table_3={name: (models[name], row["layout"], row["gib"]) for name, row in data["table_3"].items()},
    )


def _architecture(values: dict[str, Any]) -> Architecture:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    return Architecture(
        **{"ffn_hidden_size": 4 * hidden, "num_query_groups": heads, "head_dim": hidden // heads, **values},
    )


def _layouts(model: Architecture, values: dict[str, Any]) -> Iterator[Layout]:
    """Yield all layouts that the lists allow and that divide the model and the batch."""
    choices = [value if isinstance(value, list) else [value] for value in values.values()]
    for chosen in itertools.product(*choices):
        keys = dict(zip(values, chosen, strict=True))
        tensor = keys.get("tensor", 1)
        if "ranks" in keys:
            keys["data"] = keys.pop("ranks") // (tensor * keys.get("pipeline", 1))
        if "samples" in keys:
            keys["num_microbatches"], rest = divmod(keys.pop("samples"), keys["micro_batch_size"] * keys["data"])
            if rest or model.num_attention_heads % tensor:
                continue
        if "overlap" in keys:
            keys["overlap_grad_reduce"] = keys["overlap_param_gather"] = keys.pop("overlap")
        keys["sequence_parallel"] = keys.get("sequence_parallel", False) and tensor > 1
        yield Layout(**keys)


def _seconds(row: dict[str, Any], model: Architecture, layout: Layout) -> float:
    """Return the seconds of an iteration, from the published kind of speed."""
    if "seconds" in row:
        return float(row["seconds"])
    if "tokens_per_second" in row:
        return layout.tokens_per_iteration / layout.num_ranks / float(row["tokens_per_second"])
    fraction, key = (1.0, "tflops") if "tflops" in row else (0.75, "model_tflops")
    return fraction * hardware_flops(model, layout) / (float(row[key]) * 1e12 * layout.num_ranks)


def hardware_flops(model: Architecture, layout: Layout) -> float:
    """Return the FLOPs of an iteration with full recompute: four forward passes (arXiv 2104.04473, equation 3)."""
    h, layers = model.hidden_size, model.num_layers
    correction = 1 + layout.seq_length / (6 * h) + model.padded_vocab_size / (16 * layers * h)
    return 96.0 * layout.tokens_per_iteration * layers * h * h * correction


def _uncertain_point(row: dict[str, Any], model: Architecture) -> UncertainPoint:
    layouts, fused = list(_layouts(model, row["layout"])), row["fused"]
    programs = [Software(fused=one) for one in (fused if isinstance(fused, list) else [fused])]
    return UncertainPoint(
        **{key: row[key] for key in ("name", "source", "hardware", "unknown", "gpu", "num_bytes") if key in row},
        model=model,
        variants=list(itertools.product(layouts, programs)),
        seconds=_seconds(row, model, layouts[0]),
    )
