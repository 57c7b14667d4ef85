"""From the options of `ledom rerank` to settings, models and files."""

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
from megatron_ledom.inference.model_folder import (
    RERANK_OPTIONS,
    check_unchanged,
    folder_facts,
    read_model_config,
    surroundings,
)
from megatron_ledom.inference.reverse_reward.beam_search import BeamSettings
from megatron_ledom.inference.reverse_reward.rerank_part import usage_file
from megatron_ledom.inference.reverse_reward.reranking import SKIP, RerankSettings, rerank_file
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.inference.scoring import check_batch_size

Options = dict[str, Any]
SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "seed", "greedy")
BEAM = ("expansions", "step_delimiter")
VLLM_MEMORY = 0.9
"""Share of a GPU's memory that vLLM takes; two models on one GPU share it."""
SAMPLED_BATCHES = 4
"""Batches of candidates that are written before they are kept: writing takes minutes where scoring takes seconds."""


def rerank_command(options: Options) -> None:
    """Check everything that can be checked, then load both models and rank the file."""
    settings = settings_from(options)
    check_batch_size(options["batch_size"])
    folders = {side: folder_facts(Path(options[side])) for side in ("forward", "reverse")}
    _check_not_swapped(options)

    def engines() -> tuple[Engine, Engine]:
        """Return both models, loaded from the folders as they were found."""
        made = _engines(options)
        for side, facts in folders.items():
            check_unchanged(Path(options[side]), facts)
        return made

    for side in folders:
        if options[f"{side}_server"] is not None and options[f"{side}_engine"] != "transformers":
            raise UsageError(f"--{side}-server and --{side}-engine are two ways to run the {side} model; choose one")
    if options["reverse_eod_id"] is not None and (options["reverse_server"] or options["reverse_engine"] != "transformers"):
        raise UsageError("--reverse-eod-id is for a model that transformers runs in this process; leave out the other engine")
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
    """Return what was done for a complete output, in one sentence, from the notes beside it."""
    notes = usage_file(output)
    spent = json.loads(notes.read_text(encoding="utf-8"))
    settings = spent["made_by"]["settings"]
    skipped = [
        f"{spent[name]:,} {what}"
        for name, what in (("num_skipped", "candidates"), ("num_skipped_prompts", "prompts"))
        if spent[name]
    ]
    return (
        f"{output}: ranked at weight {settings['reward']['weight']:g} (0 forward only, 1 reverse only);"
        f" lines: {spent['num_lines']:,}, candidates: {spent['num_candidates']:,}"
        f"{', skipped as too long: ' if skipped else ''}{' and '.join(skipped)}, forward tokens: {spent['forward_tokens']:,.0f},"
        f" reverse tokens: {spent['reverse_tokens']:,.0f}, seconds: {spent['seconds']:,.1f} ({notes.name})"
    )


def skip_warning(output: Path) -> str | None:
    """Return the warning of a complete output whose candidates were skipped in part, with their share; None if none was."""
    spent = json.loads(usage_file(output).read_text(encoding="utf-8"))
    num_skipped, num_candidates = spent["num_skipped"], spent["num_candidates"]
    if not num_skipped:
        return None
    settings = spent["made_by"]["settings"]
    reason = "they are too long for a model"
    if settings["sampling"] is not None and settings["too_long"] != SKIP:
        reason = "these answers came out longer when they were read again to be scored, which --too-long refuse cannot foresee"
    remedy = "shorten them" if settings["sampling"] is None else "lower --max-new-tokens or shorten the prompts"
    return (
        f"warning: {num_skipped:,} of {num_candidates:,} candidates ({100 * num_skipped / num_candidates:.1f} %) have no score and"
        f" rank last: {reason}; {remedy}"
    )


def _check_not_swapped(options: Options) -> None:
    """Refuse the folder of a reverse model as --forward beside one of a forward model as --reverse."""
    found = {side: read_model_config(Path(options[side])).get("direction") for side in ("forward", "reverse")}
    is_forward = found["reverse"] == "forward" or (found["reverse"] is None and options["reverse_eod_id"] is None)
    if found["forward"] == "reverse" and is_forward:
        raise MismatchError(
            f"--forward and --reverse are swapped: {options['forward']} is a reverse model and {options['reverse']} a forward"
            " one, by their config.json; exchange the two folders"
        )


def _engines(options: Options) -> tuple[Engine, Engine]:
    """The forward and the reverse engine. Servers come first: what is wrong with them costs no loading of a model."""
    order = (Direction.REVERSE, Direction.FORWARD)
    servers_first = sorted(order, key=lambda direction: options[f"{direction}_server"] is None)
    made = {direction: _engine(options, direction) for direction in servers_first}
    return made[Direction.FORWARD], made[Direction.REVERSE]


def _engine(options: Options, direction: Direction) -> Engine:
    """The model's folder in this process, by transformers or by vLLM, or the server that serves it."""
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
    eod_id = options["reverse_eod_id"]  # a folder for which it is given records no direction either
    asked = None if eod_id is None else str(direction)
    reverse = ReverseLM.from_pretrained(folder, direction=asked, eod_id=eod_id, option_names=RERANK_OPTIONS)
    return TransformersEngine(reverse, options["batch_size"])


def settings_from(options: Options) -> RerankSettings:
    """The settings that the options mean; UsageError for those that do not go together."""
    beam, num_samples = options["beam"], options["sample"]
    if beam is not None and num_samples is not None:
        raise UsageError("--sample and --beam are two ways to write candidates; choose one")
    if beam is None and num_samples is None:
        _refuse(options, SAMPLING, "--sample or --beam: given candidates are not written anew")
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
