"""The command `ledom infill`: fills the gap between `prompt` and `suffix` of each line of a JSON Lines file.

Lines are filled in windows (see `line_output`). A line that is too long for a model is found before anything is computed, then
refused or skipped.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, LedomError, UsageError
from megatron_ledom.inference.engines.engine import UsageMeter
from megatron_ledom.inference.generation import Sampling
from megatron_ledom.inference.infilling.infiller import DIRECTIONS, Filled, Gap, Infiller, InfillModel, InfillSettings
from megatron_ledom.inference.json_fields import read_objects, text_of, writable
from megatron_ledom.inference.language_model import ForwardLM, ReverseLM
from megatron_ledom.inference.line_output import LineKind, SkipLog, Window, naming_lines, usage_file, write_line_file
from megatron_ledom.inference.model_folder import check_unchanged, folder_facts, surroundings
from megatron_ledom.inference.reverse_reward.reranking import REFUSE, SKIP
from megatron_ledom.inference.scoring import check_batch_size

Options = dict[str, Any]
Models = tuple[InfillModel, InfillModel]
WRITTEN = ("middle", "met", "infillings", "skipped")
"""Fields that the command writes; it replaces those of an input that was filled before."""
FILLED = LineKind(counts=("num_lines", "num_met", "num_skipped"), written=WRITTEN, mark="infillings")
WINDOW_TEXTS = 256
"""A window ends with the line that brings it to this number of written texts; a kill loses at most one window."""
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")


@dataclass(frozen=True, slots=True)
class Record:
    """One line of an input. problem: the reason why its gap is not filled."""

    number: int
    where: str
    prompt: str
    suffix: str
    fields: dict[str, Any]
    problem: str | None = None

    def gap(self, settings: InfillSettings) -> Gap:
        """Return the gap; the line's number gives equal texts other random numbers."""
        return Gap(self.prompt, self.suffix, f"{settings.sampling.seed or 0}/{self.number}", settings)


def infill_command(options: Options) -> None:
    """Check the options and the folders, then load the models and fill the gaps of the file."""
    check_batch_size(options["batch_size"])
    settings = settings_from(options)
    folders = _folders(options)
    facts = {side: folder_facts(folder) for side, folder in folders.items()}

    def models() -> Models:
        """Return both models; raise DataError if a folder changed since its facts were recorded."""
        made = load_models(folders["forward"], folders["reverse"], options["batch_size"])
        for side, known in facts.items():
            check_unchanged(folders[side], known)
        return made

    made_by = {
        "settings": asdict(settings),
        **facts,
        "too_long": options["too_long"],
        "batch_size": options["batch_size"],
        "surroundings": surroundings(),
    }
    job = Infill(models, settings, options["too_long"])
    write_line_file(job, options["input"], options["output"], made_by, overwrite=options["overwrite"])
    print(summary_of(Path(options["output"])), file=sys.stderr)


def settings_from(options: Options) -> InfillSettings:
    """Return the settings of the options."""
    given = {name: options[name] for name in SAMPLING}
    sampling = Sampling(**given, num_return_sequences=options["num_samples"], stop_strings=options["stop"])
    return InfillSettings(sampling=sampling, overlap_tokens=options["overlap_tokens"])


def _folders(options: Options) -> dict[str, Path]:
    """Return the folder of each model. Raises UsageError unless --model, or both --forward and --reverse, are given."""
    given = [name for name in ("model", "forward", "reverse") if options[name] is not None]
    if given not in (["model"], ["forward", "reverse"]):
        found = " and ".join(f"--{name}" for name in given) or "none"
        raise UsageError(f"found {found} of the models; pass --forward and --reverse, or a two-way model as --model")
    return {side: Path(options[side] if given != ["model"] else options["model"]) for side in ("forward", "reverse")}


def load_models(forward: Path, reverse: Path, batch_size: int) -> Models:
    """Return the models of two folders. A two-way model that is both is loaded once."""
    one = ForwardLM.from_pretrained(forward)
    other = ReverseLM.sharing(one, reverse) if forward.resolve() == reverse.resolve() else ReverseLM.from_pretrained(reverse)
    return InfillModel.of(one, batch_size), InfillModel.of(other, batch_size)


@dataclass(frozen=True, slots=True)
class Infill:
    """The work of the command, a LineJob. models: loads the forward and the reverse model."""

    models: Callable[[], Models]
    settings: InfillSettings
    too_long: str = REFUSE
    kind: LineKind = FILLED

    def read(self, path: Path) -> list[Record]:
        """Return the checked lines."""
        return [
            Record(number, where, text_of(fields, "prompt", where), text_of(fields, "suffix", where), writable(fields, where))
            for number, where, fields in read_objects(path)
        ]

    def windows(self, lines: list[Record]) -> list[list[Record]]:
        """Return windows of WINDOW_TEXTS written texts, at least one line each."""
        size = max(1, WINDOW_TEXTS // (2 * self.settings.sampling.num_return_sequences))
        return [lines[begin : begin + size] for begin in range(0, len(lines), size)]

    def compute(self, windows: list[list[Record]]) -> Iterator[Window]:
        """Load the models, refuse or skip lines that are too long, and yield the output of each window."""
        forward, reverse = self.models()
        infiller = Infiller(forward, reverse)
        checked = self._checked(infiller, windows)
        for window in checked:
            meter = UsageMeter(forward.engine, reverse.engine)
            lines, written = naming_lines(window, lambda part: self._filled(infiller, part))
            usage = meter.usage()
            for direction, number in written.items():
                usage[f"{direction}_tokens"] += number
            yield Window(lines, usage, _counts(lines))

    def _checked(self, infiller: Infiller, windows: list[list[Record]]) -> list[list[Record]]:
        """Return the records with their problems. Raises DataError for the first one unless it is to be skipped."""
        skips, checked = SkipLog(), []
        for window in windows:
            checked.append([self._with_problem(infiller, record) for record in window])
        for record in [record for window in checked for record in window if record.problem is not None]:
            if self.too_long != SKIP:
                remedy = "shorten it, lower --max-new-tokens, or pass --too-long skip"
                raise DataError(f"{record.where}: {record.problem}; {remedy}")
            skips.add(record.where, record.problem)
        return checked

    def _with_problem(self, infiller: Infiller, record: Record) -> Record:
        try:
            return replace(record, problem=infiller.problem(record.gap(self.settings)))
        except LedomError as error:
            raise type(error)(f"{record.where}: {error}") from error

    def _filled(self, infiller: Infiller, window: list[Record]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Return the output of the lines, and by direction the tokens that were read and written before scoring."""
        kept = [record for record in window if record.problem is None]
        found = infiller.fill([record.gap(self.settings) for record in kept])
        made = iter(found)
        lines = [{**_own_fields(record), **_fields(record, made)} for record in window]
        return lines, {str(d): sum(one.read[d] + one.written[d] for one in found) for d in DIRECTIONS}


def _own_fields(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.fields.items() if name not in WRITTEN}


def _fields(record: Record, made: Iterator[Filled]) -> dict[str, Any]:
    """Return the fields that the command adds to a line; those of a line that is not skipped are the next of `made`."""
    if record.problem is not None:
        return {"middle": None, "met": False, "infillings": [], "skipped": record.problem}
    found = next(made).infillings
    return {"middle": found[0].middle, "met": found[0].met, "infillings": [one.as_fields() for one in found]}


def _counts(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Return the counts of FILLED."""
    met, skipped = (sum(bool(line.get(name)) for line in lines) for name in ("met", "skipped"))
    return {"num_lines": len(lines), "num_met": met, "num_skipped": skipped}


def summary_of(output: Path) -> str:
    """Return one sentence about a complete output, from its `.spent.json` file."""
    notes = usage_file(output)
    usage = json.loads(notes.read_text(encoding="utf-8"))
    skipped = f", skipped as too long: {usage['num_skipped']:,}" if usage["num_skipped"] else ""
    return (
        f"{output}: lines: {usage['num_lines']:,}, met: {usage['num_met']:,}{skipped}, forward tokens: {usage['forward_tokens']:,.0f},"
        f" reverse tokens: {usage['reverse_tokens']:,.0f}, seconds: {usage['seconds']:,.1f} ({notes.name})"
    )
