"""The command `ledom rerank`: settings, models and files from its options."""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import MismatchError, UsageError
from megatron_ledom.inference.engines.completions_engine import CompletionsEngine
from megatron_ledom.inference.engines.engine import Engine, StepDelimiter
from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
from megatron_ledom.inference.engines.vllm_engine import VllmEngine
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.language_model import ForwardLM, ReverseLM
from megatron_ledom.inference.line_output import usage_file
from megatron_ledom.inference.model_folder import (
    RERANK_OPTIONS,
    check_unchanged,
    folder_facts,
    read_model_config,
    surroundings,
)
from megatron_ledom.inference.reverse_reward.beam_search import BeamSettings
from megatron_ledom.inference.reverse_reward.reranking import SKIP, RerankSettings, rerank_file
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.inference.scoring import check_batch_size

Options = dict[str, Any]
SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "seed", "greedy")
BEAM = ("expansions", "step_delimiter")
VLLM_MEMORY = 0.9
"""Fraction of a GPU's memory that vLLM uses, divided by two if it runs both models."""
SAMPLED_BATCHES = 4
"""Number of batches of sampled candidates after which the output is saved; sampling takes minutes where scoring takes seconds."""


def rerank_command(options: Options) -> None:
    """Check the options and the folders, then load both models and rank the file."""
    settings = settings_from(options)
    check_batch_size(options["batch_size"])
    folders = {side: folder_facts(Path(options[side])) for side in ("forward", "reverse")}
    _check_not_swapped(options)

    def engines() -> tuple[Engine, Engine]:
        """Return both models; raise DataError if a folder changed since its facts were recorded."""
        made = _engines(options)
        for side, facts in folders.items():
            check_unchanged(Path(options[side]), facts)
        return made

    for side in folders:
        if options[f"{side}_server"] is not None and options[f"{side}_engine"] != "transformers":
            raise UsageError(f"--{side}-server and --{side}-engine are two ways to run the {side} model; pass only one")
    if options["reverse_eod_id"] is not None and (options["reverse_server"] or options["reverse_engine"] != "transformers"):
        raise UsageError(
            "--reverse-eod-id works only with --reverse-engine transformers; remove the other engine or the server"
        )
    run_by = {f"{side}_{way}": options[f"{side}_{way}"] for side in folders for way in ("server", "engine")}
    made_by = {
        **folders,
        **run_by,
        "batch_size": options["batch_size"],
        "reverse_eod_id": options["reverse_eod_id"],
        "surroundings": surroundings(),
    }
    paths = (options["input"], options["output"])
    rerank_file(engines, *paths, settings, made_by=made_by, overwrite=options["overwrite"])
    print(summary_of(Path(options["output"])), file=sys.stderr)
    if warning := skip_warning(Path(options["output"])):
        print(warning, file=sys.stderr)


def summary_of(output: Path) -> str:
    """Return one sentence about a complete output, from its `.spent.json` file."""
    notes = usage_file(output)
    usage = json.loads(notes.read_text(encoding="utf-8"))
    settings = usage["made_by"]["settings"]
    skipped = [
        f"{usage[name]:,} {what}"
        for name, what in (("num_skipped", "candidates"), ("num_skipped_prompts", "prompts"))
        if usage[name]
    ]
    return (
        f"{output}: ranked at weight {settings['reward']['weight']:g} (0 forward only, 1 reverse only);"
        f" lines: {usage['num_lines']:,}, candidates: {usage['num_candidates']:,}"
        f"{', skipped as too long: ' if skipped else ''}{' and '.join(skipped)}, forward tokens: {usage['forward_tokens']:,.0f},"
        f" reverse tokens: {usage['reverse_tokens']:,.0f}, seconds: {usage['seconds']:,.1f} ({notes.name})"
    )


def skip_warning(output: Path) -> str | None:
    """Return a warning with the percentage of skipped candidates of a complete output; None if none was skipped."""
    usage = json.loads(usage_file(output).read_text(encoding="utf-8"))
    num_skipped, num_candidates = usage["num_skipped"], usage["num_candidates"]
    if not num_skipped:
        return None
    settings = usage["made_by"]["settings"]
    reason = "they are too long for a model"
    if settings["sampling"] is not None and settings["too_long"] != SKIP:
        reason = "these answers have more tokens when they are scored than when they were sampled, so --too-long refuse did not catch them"
    remedy = "shorten them" if settings["sampling"] is None else "lower --max-new-tokens or shorten the prompts"
    return (
        f"warning: {num_skipped:,} of {num_candidates:,} candidates ({100 * num_skipped / num_candidates:.1f} %) have no score and"
        f" rank last: {reason}; {remedy}"
    )


def _check_not_swapped(options: Options) -> None:
    """Raise MismatchError if --forward is a reverse model and --reverse a forward model."""
    found = {side: read_model_config(Path(options[side])).get("direction") for side in ("forward", "reverse")}
    is_forward = found["reverse"] == "forward" or (found["reverse"] is None and options["reverse_eod_id"] is None)
    if found["forward"] == "reverse" and is_forward:
        raise MismatchError(
            f"--forward and --reverse are swapped: by their config.json, {options['forward']} is a reverse model and"
            f" {options['reverse']} a forward model; exchange the two folders"
        )


def _engines(options: Options) -> tuple[Engine, Engine]:
    """Return the forward and the reverse engine. Servers are checked first, before a model is loaded."""
    order = (Direction.REVERSE, Direction.FORWARD)
    servers_first = sorted(order, key=lambda direction: options[f"{direction}_server"] is None)
    made = {direction: _engine(options, direction) for direction in servers_first}
    return made[Direction.FORWARD], made[Direction.REVERSE]


def _engine(options: Options, direction: Direction) -> Engine:
    """Return the engine of one model: transformers or vLLM in this process, or a server."""
    folder, url, name = (options[f"{direction}{ending}"] for ending in ("", "_server", "_served_as"))
    if url is not None:
        return CompletionsEngine(
            url,
            name or folder,
            folder,
            direction,
            batch_size=options["batch_size"],
            key_over_http=options["key_over_http"],
            trust_token_counts=options["trust_token_counts"],
        )
    with_vllm = [side for side in ("forward", "reverse") if options[f"{side}_engine"] == "vllm"]
    if direction in with_vllm:
        return VllmEngine(folder, direction, gpu_memory_utilization=VLLM_MEMORY / len(with_vllm))
    if direction is Direction.FORWARD:
        return TransformersEngine(ForwardLM.from_pretrained(folder), options["batch_size"])
    eod_id = options["reverse_eod_id"]  # a folder that needs this option records no direction
    assumed = None if eod_id is None else str(direction)
    reverse = ReverseLM.from_pretrained(folder, direction=assumed, eod_id=eod_id, option_names=RERANK_OPTIONS)
    return TransformersEngine(reverse, options["batch_size"])


def settings_from(options: Options) -> RerankSettings:
    """Return the settings of the options; raises UsageError for options that exclude each other."""
    beam, num_samples = options["beam"], options["sample"]
    if beam is not None and num_samples is not None:
        raise UsageError("--sample and --beam are two ways to write candidates; pass only one")
    if beam is None and num_samples is None:
        _refuse(options, SAMPLING, "--sample or --beam; without them the given candidates are ranked")
    if beam is None:
        _refuse(options, BEAM, "--beam")
    names = ("weight", "forward_normalization", "reverse_normalization", "language_model_weight", "include_ends")
    reward = RewardSettings(**{name: options[name] for name in names}, temperature=options["reward_temperature"])
    given = {name: options[name] for name in SAMPLING if name != "greedy" and options[name] is not None}
    search = None
    if beam is not None:
        delimiter = StepDelimiter.parse(options["step_delimiter"] or "newline")
        num_expansions = 3 if options["expansions"] is None else options["expansions"]
        search = BeamSettings(num_beams=beam, num_expansions=num_expansions, delimiter=delimiter)
    sampling, window = None, {}
    if beam is not None or num_samples is not None:
        num = 1 if num_samples is None else num_samples
        sampling = Sampling(**{"temperature": 1.0, **given}, num_return_sequences=num)
        window = {"window_candidates": SAMPLED_BATCHES * options["batch_size"]}
    return RerankSettings(
        reward=reward,
        sampling=sampling,
        beam=search,
        greedy=bool(options["greedy"]),
        token_values=options["token_values"],
        too_long=options["too_long"],
        **window,
    )


def _refuse(options: Options, names: tuple[str, ...], needed: str) -> None:
    for name in names:
        if options[name] is not None:
            raise UsageError(f"--{name.replace('_', '-')} needs {needed}")
