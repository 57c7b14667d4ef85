"""Check the layers of Transformer Engine, in bf16 and in fp8, against this package's. Not yet run on hardware."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec

from megatron_ledom.config.gpu_checks import FP8_NEEDS
from megatron_ledom.errors import ConfigError
from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed, skipped
from megatron_ledom.hardware_check.curves import Difference, Record, compare_each, numbers_of
from megatron_ledom.hardware_check.layouts import choose, prepare_layouts, train_layouts, unfinished, without_time
from megatron_ledom.hardware_check.training_runs import STEPS, TrainingRuns, own_layers

BF16_TOLERANCE = Difference(loss=5e-3, grad_norm=5e-2)
"""Relative tolerances in bf16 for ten steps. On a CPU bf16 differs from fp32 by 1e-3 of the loss and 6e-3 of the gradient norm."""
FP8_TOLERANCE = Difference(loss=2e-2, grad_norm=0.3)
"""Relative tolerances of fp8 against bf16: a sign of a wrong scale, not a measure of quality."""
WIDTHS = (
    "model.hidden_size=256",
    "model.ffn_hidden_size=512",
    "model.num_attention_heads=4",
    "model.num_query_groups=2",
    "model.params_dtype=bf16",
    "data.seq_length=128",
)
"""A model whose matrices every fp8 recipe can divide into its blocks."""
ENGINE = "model.transformer_impl=transformer_engine"
ENGINE_LAYOUTS = ("TP2 SP", "PP2", "CP2", "TP2 PP2", "TP2 DP2", "TP2 PP2 DP2")
"""Layouts in which Transformer Engine communicates by itself, receives from another stage, or gives gradients to the optimizer of
several ranks."""


def reason_to_skip(setting: Setting) -> str | None:
    """Return the reason why Transformer Engine cannot run here, or None."""
    if setting.device != "cuda":
        return "Transformer Engine needs a CUDA device"
    if find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed; pip install 'megatron-ledom[te]'"
    return None


def check_transformer_engine(setting: Setting) -> Outcome:
    """Train in bf16 with this package's layers and with Transformer Engine's, also on several GPUs, and compare every step."""
    if reason := reason_to_skip(setting):
        return skipped(reason)
    chosen, left = choose(setting, ENGINE_LAYOUTS)
    runs = TrainingRuns(setting, WIDTHS)
    runs.prepare(1)
    runs.prepare(1)  # own processes, because some libraries keep the choice of layers
    prepare_layouts(runs, chosen)
    expected = runs.train({"own_layers": [own_layers(setting.device)]})["own_layers"]
    found = runs.train({"one GPU": [ENGINE]})
    records, failures = train_layouts(runs, chosen, [ENGINE])
    left |= unfinished(chosen, records, failures)
    return judge("bf16 layers", found | records, expected, BF16_TOLERANCE, failures, left)


def check_fp8(setting: Setting) -> Outcome:
    """Train with each fp8 recipe that this GPU supports, and compare every step with Transformer Engine's bf16."""
    if reason := reason_to_skip(setting):
        return skipped(reason)
    recipes, left = possible_recipes()
    if not recipes:
        return skipped("this GPU supports no fp8 recipe", skipped_recipes=left)
    runs = TrainingRuns(setting, [*WIDTHS, ENGINE])
    for _ in ["bf16", *recipes]:
        runs.prepare(1)
    expected = runs.train({"bf16": []})["bf16"]
    found: dict[str, list[Record]] = {}
    failures: dict[str, str] = {}
    for recipe in recipes:  # a launch for each: Transformer Engine keeps the state of a recipe in its process
        records, failure = runs.try_each({recipe: fp8_overrides(recipe)})
        found |= records
        failures |= failure
    left |= unfinished(recipes, found, failures)
    return judge("fp8 recipes", found, expected, FP8_TOLERANCE, failures, left)


def fp8_overrides(recipe: str) -> list[str]:
    """Return the overrides of a run with an fp8 recipe."""
    form = "hybrid" if recipe in ("delayed", "tensorwise") else "e4m3"
    return [f"model.fp8={form}", f"model.fp8_recipe={recipe}"]


def possible_recipes() -> tuple[list[str], dict[str, str]]:
    """Return the fp8 recipes for this GPU and this Transformer Engine, and the reason for each of the others."""
    import torch

    from megatron_ledom.model.layer_specs import check_fp8_hardware

    recipes, left, installed = [], {}, version("transformer_engine")
    for recipe in FP8_NEEDS:
        try:
            check_fp8_hardware(recipe, torch.cuda.get_device_capability(), installed)
            recipes.append(recipe)
        except ConfigError as error:
            left[recipe] = str(error)
    return recipes, left


def judge(
    subject: str,
    found: Mapping[str, Sequence[Record]],
    expected: Sequence[Record],
    tolerance: Difference,
    failures: Mapping[str, str],
    left: Mapping[str, str],
) -> Outcome:
    """Return the outcome of runs of Transformer Engine: failed if one failed or is above the tolerance, or if none ended."""
    differences, problems = compare_each(found, expected, tolerance)
    problems += [f"{name} {failure}" for name, failure in failures.items()]
    numbers = {"steps": STEPS, "differences": numbers_of(differences), "skipped": dict(left)}
    if problems:
        return failed(f"{subject} of Transformer Engine: {'; '.join(problems)}", **numbers)
    if not found:
        return failed(f"no run with {subject} of Transformer Engine ended within the time limit; allow more time", **numbers)
    sentences = "; ".join(f"{name}: {one.sentence(tolerance)}" for name, one in differences.items())
    return passed(f"{subject} of Transformer Engine, {STEPS} steps: {sentences}{without_time(left)}", **numbers)
