"""Published measurements of runs, from the YAML files of this folder. Some fit the planner's numbers, the others test it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_ledom.planning.shapes import Architecture, Layout
from megatron_ledom.planning.step_time import Software

FILES = ("published.yaml", "published_h100.yaml")
OWN_SOFTWARE = ("deferred_output", "gradient_bytes")
"""Keys of Software that differ between the points of a family."""


@dataclass(frozen=True, slots=True)
class Point:
    """A published time of an iteration."""

    name: str
    family: str
    """Name of a group of points: one program on one cluster."""
    source: str
    hardware: str
    model: Architecture
    layout: Layout
    software: Software
    seconds: float
    use: Literal["fitted", "scaled", "unfitted"]
    """fitted: sets the hardware's numbers; scaled: sets the slowdown of its family; unfitted: tests the planner."""
    run: str = ""
    """Name of the run without its number of GPUs."""


@dataclass(frozen=True, slots=True)
class LayerPoint:
    """Published milliseconds of the passes of one layer; they set the hardware's numbers."""

    layout: Layout
    forward: float
    backward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UncertainPoint:
    """A published time whose layout or program is not fully known. The planner plans each of its variants."""

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
    """Everything in the YAML files."""

    points: list[Point]
    layers: list[LayerPoint]
    uncertain_points: list[UncertainPoint]
    judged: list[UncertainPoint]
    """Runs that no number was fitted on; each has one plan, that of its fastest variant that fits into memory."""
    other_releases: list[dict[str, Any]]
    """Seconds of one run in several releases of its program, by release."""
    refused: list[dict[str, str]]
    """Runs that the planner does not plan, with the reason."""
    table_3: dict[str, tuple[Architecture, dict[str, Any], list[float]]]
    """Models and layouts of Korthikanti et al. 2022, arXiv 2205.05198, table 3, and GiB a device by its formulas."""

    @property
    def peaks(self) -> list[UncertainPoint]:
        """Points with measured memory."""
        return [point for point in self.uncertain_points if point.num_bytes]


@cache
def published() -> Published:
    """Read the YAML files."""
    data: dict[str, Any] = {}
    for file in FILES:
        for key, found in yaml.safe_load(Path(__file__).with_name(file).read_text(encoding="utf-8")).items():
            data[key] = {**data[key], **found} if isinstance(data.get(key), dict) else found
    models = {name: _architecture(values) for name, values in data["models"].items()}
    families = data["families"].items()
    return Published(
        points=[
            point for family, found in families for row in found["points"] for point in _points(family, found, row, models)
        ],
        layers=[LayerPoint(Layout(**row["layout"]), row["forward"], row["backward"]) for row in data["layers"]],
        uncertain_points=[_uncertain_point(row, models[row["model"]]) for row in data["open"]],
        judged=[_uncertain_point(row, models[row["model"]]) for row in data["judged"]],
        other_releases=data["other_releases"],
        refused=data["refused"],
        table_3={name: (models[name], row["layout"], row["gib"]) for name, row in data["table_3"].items()},
    )


def _points(family: str, found: dict[str, Any], row: dict[str, Any], models: dict[str, Architecture]) -> Iterator[Point]:
    """Yield the points of a row: one, or one for each number of GPUs. Of several, the first has the row's use."""
    own = {key: row[key] for key in OWN_SOFTWARE if key in row}
    model, software = models[row.get("model", row["name"])], Software(**{**found["software"], **own})
    scales = row.get("seconds")
    for index, (ranks, seconds) in enumerate(scales.items() if isinstance(scales, dict) else [(None, scales)]):
        several = {} if ranks is None else {"ranks": ranks}
        (layout,) = _layouts(model, {**row["layout"], **several})
        yield Point(
            name=row["name"] if ranks is None else f"{row['name']}, {ranks:,} GPUs",
            family=family,
            source=found["source"],
            hardware=found["hardware"],
            model=model,
            layout=layout,
            software=software,
            seconds=_seconds({**row, "seconds": seconds} if seconds is not None else row, model, layout),
            use=row["use"] if ranks is None else "unfitted" if index else found["use"],
            run=row["name"],
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
        tensor, pipeline = keys.get("tensor", 1), keys.get("pipeline", 1)
        if "ranks" in keys:
            keys["data"] = keys.pop("ranks") // (tensor * pipeline * keys.get("context", 1))
        if "samples" in keys:
            keys["num_microbatches"], rest = divmod(keys.pop("samples"), keys["micro_batch_size"] * keys["data"])
            if rest or model.num_attention_heads % tensor:
                continue
        if keys.get("chunks", 1) > 1 and keys["num_microbatches"] % pipeline:
            continue
        if "overlap" in keys:
            keys["overlap_grad_reduce"] = keys["overlap_param_gather"] = keys.pop("overlap")
        for key in ("sequence_parallel", "overlap_tensor"):
            keys[key] = keys.get(key, False) and tensor > 1
        yield Layout(**keys)


def _seconds(row: dict[str, Any], model: Architecture, layout: Layout) -> float:
    """Return the seconds of an iteration, from the published kind of speed."""
    if "seconds" in row:
        return float(row["seconds"])
    if "tokens_per_second" in row:
        return layout.tokens_per_iteration / layout.num_ranks / float(row["tokens_per_second"])
    if "tflops" in row:
        return hardware_flops(model, layout) / (float(row["tflops"]) * 1e12 * layout.num_ranks)
    return megatron_flops(model, layout) / (float(row["megatron_tflops"]) * 1e12 * layout.num_ranks)


def hardware_flops(model: Architecture, layout: Layout) -> float:
    """Return the FLOPs of an iteration with full recompute: four forward passes (arXiv 2104.04473, equation 3)."""
    h, layers = model.hidden_size, model.num_layers
    correction = 1 + layout.seq_length / (6 * h) + model.padded_vocab_size / (16 * layers * h)
    return 96.0 * layout.tokens_per_iteration * layers * h * h * correction


def megatron_flops(model: Architecture, layout: Layout) -> float:
    """Return the FLOPs of an iteration as Megatron-LM counts them for GPT, with all of the scores.

    Its function is `num_floating_point_operations` of training.py, at the commit that published the table.
    """
    h, layers = model.hidden_size, model.num_layers
    correction = 1 + layout.seq_length / (6 * h) + model.padded_vocab_size / (12 * layers * h)
    return 72.0 * layout.tokens_per_iteration * layers * h * h * correction


def _uncertain_point(row: dict[str, Any], model: Architecture) -> UncertainPoint:
    layouts, software = list(_layouts(model, row["layout"])), row["software"]
    programs = [Software(**one) for one in (software if isinstance(software, list) else [software])]
    return UncertainPoint(
        **{key: row[key] for key in ("name", "source", "hardware", "unknown", "gpu", "num_bytes") if key in row},
        model=model,
        variants=list(itertools.product(layouts, programs)),
        seconds=_seconds(row, model, layouts[0]),
    )
