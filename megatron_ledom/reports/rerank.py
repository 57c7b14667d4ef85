"""The command `ledom report-rerank`: compare methods over reranked files, or explain one choice step by step."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, LedomError, UsageError
from megatron_ledom.inference.line_output import usage_file
from megatron_ledom.inference.model_folder import RERANK_OPTIONS
from megatron_ledom.inference.reverse_reward.reward import RewardSettings
from megatron_ledom.reports.explanation import as_html, as_terminal, explain
from megatron_ledom.reports.method_comparison import ReportSettings, report_selection, sentences, verdict
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_folder_lock

Options = dict[str, Any]


def report_rerank(options: Options) -> None:
    """Compare the methods over reranked files, or explain one choice; write the page and print the main result."""
    for path in [*options["files"], *([options["beam"]] if options["beam"] else [])]:
        if not os.path.isfile(path):
            raise UsageError(f"{path} is not a file; pass output files of ledom rerank")
    with output_folder_lock(options["output"]):
        if options["explain"] is None:
            _compare(options)
        else:
            _explain(options)


def _compare(options: Options) -> None:
    if options["gold_key"] is None:
        raise UsageError("a comparison needs --gold-key, the field with the right answer")
    settings = ReportSettings(
        gold_key=options["gold_key"],
        answers=options["answers"],
        reward=recorded_reward(options["files"]),
        num_folds=options["folds"],
        seed=options["seed"],
        ranked_at=tuple(recorded_weight(path) for path in options["files"]),
    )
    report = report_selection(options["files"], options["output"], settings, beam=options["beam"])
    print(verdict(report))
    for name, found in report["methods"].items():
        print(f"{name:<28}{100 * found['accuracy']:6.1f} %")
    print(*report["notes"], *sentences(report), os.path.join(options["output"], "report.html"), sep="\n")


def _explain(options: Options) -> None:
    from megatron_ledom.inference.engines.engine import StepDelimiter
    from megatron_ledom.inference.engines.transformers_engine import TransformersEngine
    from megatron_ledom.inference.language_model import ReverseLM
    from megatron_ledom.inference.reverse_reward.ranked_lines import ranked_candidates, read_reranked

    if options["reverse"] is None:
        raise UsageError("--explain needs --reverse, the folder of the reverse model")
    records = read_reranked(options["files"][0])
    if not 1 <= options["explain"] <= len(records):
        raise UsageError(
            f"--explain {options['explain']}: {options['files'][0]} has lines 1 to {len(records)}; give one of them"
        )
    record = records[options["explain"] - 1]
    where = f"{options['files'][0]}:{options['explain']}"
    texts, rewards, skipped = ranked_candidates(record, where)
    eod_id = options["reverse_eod_id"]  # a folder that needs this option records no direction
    direction = None if eod_id is None else str(Direction.REVERSE)
    reverse = ReverseLM.from_pretrained(options["reverse"], direction=direction, eod_id=eod_id, option_names=RERANK_OPTIONS)
    engine = TransformersEngine(reverse)
    delimiter = StepDelimiter.parse(options["step_delimiter"])
    try:
        explanation = explain(engine, record["prompt"], texts, rewards, record["ranking"], delimiter, skipped)
    except LedomError as error:
        raise type(error)(f"{where}: {error}") from error
    page = Path(options["output"], f"explain_{options['explain']}.html")
    write_file(page, as_html(explanation).encode("utf-8", errors="xmlcharrefreplace"))
    print(as_terminal(explanation))
    print(page)


def recorded_reward(files: list[str]) -> RewardSettings:
    """Return the reward's settings from the `.spent.json` files; the defaults if there are none. UsageError if they differ."""
    found = []
    for path in files:
        record = usage_file(path)
        if record.is_file():
            found.append(_reward_in(record))
    for settings in found[1:]:
        if replace(settings, weight=0) != replace(found[0], weight=0):
            raise UsageError(f"the files have different rewards ({settings} and {found[0]}); compare files with equal settings")
    return found[0] if found else RewardSettings()


def _reward_in(path: Path) -> RewardSettings:
    """Return the reward's settings in the `.spent.json` file of a reranking. Raises DataError if there are none."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["made_by"]["settings"]["reward"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: has no made_by.settings.reward ({type(error).__name__}: {error}); rerank again, or remove this file to use the defaults"
        ) from error
    if not isinstance(settings, dict):
        raise DataError(f"{path}: made_by.settings.reward is {settings!r:.60}, expected an object; rerank again")
    if "weight" not in settings:
        raise DataError(
            f"{path}: made_by.settings.reward has no weight; rerank again, or remove {path.name} to use the defaults"
        )
    try:
        return RewardSettings(**settings)
    except (TypeError, OverflowError, UsageError) as error:
        raise DataError(f"{path}: made_by.settings.reward cannot be used ({error}); rerank again") from error


def recorded_weight(file: str) -> float | None:
    """Return the weight at which a file was ranked; None if no `.spent.json` file records it."""
    record = usage_file(file)
    return _reward_in(record).weight if record.is_file() else None
