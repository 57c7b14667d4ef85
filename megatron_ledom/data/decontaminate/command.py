"""Search a corpus for evaluation items: a report, and for the actions `drop` and `cut` the corpus without them.

Each file to write, or each part of the input if only the report is wanted, is a unit of work in OUTPUT/contamination.work. A killed
command resumes after its finished units; the result does not depend on the number of workers. Nothing here imports torch.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from megatron_ledom.contamination.report import ContaminationCounts, describe, report_of
from megatron_ledom.contamination.search import Decontamination, Searcher
from megatron_ledom.data.decontaminate.batches import remains
from megatron_ledom.data.decontaminate.rewriting import check_writable, rewrite
from megatron_ledom.data.readers.byte_ranges import ByteRange, InputPath, Part, byte_ranges_of_task, parts_of
from megatron_ledom.data.readers.input_files import find_inputs, log_skipped_inputs
from megatron_ledom.data.readers.records import MAX_MESSAGES, OnError, ReadSettings, RecordReader, option_to_check
from megatron_ledom.data.readers.streams import MAX_RECORD_BYTES
from megatron_ledom.errors import DataError, LedomError, UsageError, VerificationError, cannot_write, visible
from megatron_ledom.platform.processes import ordered_map
from megatron_ledom.storage.files import write_json
from megatron_ledom.storage.jobs import WorkFolder, finish_unit
from megatron_ledom.storage.locks import output_folder_lock
from megatron_ledom.storage.signals import sigterm_as_interrupt

logger = logging.getLogger(__name__)
REPORT = "contamination.json"


@dataclass(kw_only=True, slots=True)
class DecontaminateSettings:
    """Options of `ledom decontaminate`."""

    input: list[str]
    output: str
    """Folder of the report and of the new files."""
    decontamination: Decontamination
    text_key: str = "text"
    workers: int | None = None
    """Number of processes; default: the cores that this process may use."""
    check: bool = False
    """Raise VerificationError if a document is contaminated."""
    on_error: OnError = "fail"
    max_record_bytes: int = MAX_RECORD_BYTES
    overwrite: bool = False
    part_bytes: int | None = None
    """Size of the input of a unit of a mere report; default: by the size of all input."""


@dataclass(slots=True)
class UnitRecord:
    """Result of a unit of work."""

    counts: dict[str, Any]
    """`ContaminationCounts`."""
    skipped: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    num_bytes: int | None = None
    """Size of the new file; None for a mere report."""


@dataclass(slots=True)
class UnitSearch:
    """A function of unit numbers that runs in every worker: searches a unit and finishes it in the work folder."""

    units: Sequence[Part]
    paths: Sequence[str]
    """Path of the record of each unit, without ending."""
    targets: Sequence[str]
    """New file of each unit; empty for a mere report."""
    searcher: Searcher
    read: ReadSettings

    def __call__(self, number: int) -> UnitRecord:
        """Search a unit."""
        counts, skipped, messages = ContaminationCounts(), Counter[str](), list[str]()
        if self.targets:
            Path(self.targets[number]).parent.mkdir(parents=True, exist_ok=True)
            found, reader = rewrite(self.units[number][0].source, self.targets[number], self.searcher, self.read)
            counts.add(found)
            readers = [reader]
        else:
            readers = [RecordReader(byte_range, self.read) for byte_range in self.units[number]]
            for reader in readers:
                for batch in reader.batches():
                    remains(batch, self.searcher, counts)
        for reader in readers:
            skipped += reader.skipped
            messages += reader.messages[: MAX_MESSAGES - len(messages)]
        size = os.path.getsize(self.targets[number]) if self.targets else None
        record = UnitRecord(asdict(counts), dict(skipped), messages, size)
        finish_unit(self.paths[number], asdict(record))
        return record

    def is_whole(self, number: int, record: UnitRecord) -> bool:
        """Return True if the new file of a finished unit is there, as long as it was written."""
        return not self.targets or _size(self.targets[number]) == record.num_bytes


def decontaminate(settings: DecontaminateSettings) -> dict[str, Any]:
    """Write the report, and the new files if the action asks for them; return the report and print its counts."""
    if settings.workers is not None and settings.workers < 1:
        raise UsageError(f"--workers {settings.workers} is not possible; use 1 or more")
    if settings.max_record_bytes < 1:
        raise UsageError(f"--max-record-bytes {settings.max_record_bytes} leaves no record; use 1 or more")
    sources, skipped_inputs = find_inputs(settings.input)
    request = _request(settings, sources)
    digest = hashlib.sha256(orjson.dumps(request)).hexdigest()
    is_writing = settings.decontamination.settings.action != "report"
    targets = _targets(settings, sources) if is_writing else []
    with output_folder_lock(settings.output), sigterm_as_interrupt():
        report = _finished_report(settings, digest, targets)
        if report is None:
            log_skipped_inputs(skipped_inputs)
            try:
                report = _made_report(settings, sources, targets, request, digest)
            except OSError as error:
                raise cannot_write(error, str(error.filename or settings.output)) from error
    print(describe(report))
    if settings.check and report["documents"]["contaminated"]:
        raise VerificationError(
            f"{report['documents']['contaminated']:,} documents have evaluation items, see {settings.output}/{REPORT}"
        )
    return report


def _request(settings: DecontaminateSettings, sources: Sequence[InputPath]) -> dict[str, Any]:
    request = {
        "input": [(source.path, source.num_bytes, source.version) for source in sources],
        "decontamination": settings.decontamination.request(),
        **{name: getattr(settings, name) for name in ("text_key", "on_error", "max_record_bytes", "part_bytes")},
    }
    return dict(orjson.loads(orjson.dumps(request)))


def _finished_report(settings: DecontaminateSettings, digest: str, targets: Sequence[str]) -> dict[str, Any] | None:
    """Return the report if the same request has made it, else None. Raises UsageError if another request has."""
    path = Path(settings.output, REPORT)
    if settings.overwrite or not path.exists():
        return None
    try:
        report = dict(orjson.loads(path.read_bytes()))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); replace it with --overwrite") from error
    if report.get("request_sha256") != digest:
        raise UsageError(
            f"{path} was made from other inputs, items or options; name another --output, or replace it with --overwrite"
        )
    if missing := [target for target in targets if not os.path.exists(target)]:
        raise UsageError(f"{path} names {missing[0]}, which is missing; bring it back, or make all again with --overwrite")
    logger.info("%s: the same request has made it before; nothing to do", path)
    return report


def _made_report(
    settings: DecontaminateSettings,
    sources: Sequence[InputPath],
    targets: Sequence[str],
    request: dict[str, Any],
    digest: str,
) -> dict[str, Any]:
    if targets:
        units: list[Part] = [(ByteRange(source, 0, source.num_bytes),) for source in sources]
    else:
        units = parts_of(byte_ranges_of_task(sources, 0, 1), settings.part_bytes)
    folder = Path(settings.output)
    is_begun = (folder / "contamination.work" / "plan.json").exists()
    if not settings.overwrite and not is_begun and (there := [target for target in targets if os.path.exists(target)]):
        raise UsageError(f"{there[0]} exists; name another --output, or replace it with --overwrite")
    searcher = Searcher(settings.decontamination)
    searcher.check_items()
    if settings.overwrite:
        (folder / REPORT).unlink(missing_ok=True)
    logger.info(
        "%d files, %d units, %d items, %s n-grams, index of %.1f MB",
        *(len(sources), len(units), len(searcher.items), f"{searcher.num_ngrams:,}", searcher.num_bytes / 1e6),
    )
    read = ReadSettings(
        text_key=settings.text_key,
        on_error=settings.on_error,
        max_record_bytes=settings.max_record_bytes,
        keep_lines=bool(targets),
    )
    with WorkFolder(str(folder / "contamination"), request, start_over=settings.overwrite, option="--output") as store:
        search = UnitSearch(units, [store.path(_unit(number)) for number in range(len(units))], targets, searcher, read)
        try:
            counts, skipped = _search_all(search, store, settings)
            if not counts.documents:
                advice = option_to_check(None, settings.text_key, skipped)
                raise DataError(f"found no document in {len(sources)} input files (skipped: {skipped}); {advice}")
        except (LedomError, KeyboardInterrupt):
            if finished := store.num_finished():
                logger.info("%d of %d units are kept in %s: the same command resumes", finished, len(units), store.folder)
            raise
        report = {"request_sha256": digest, **report_of(counts, searcher, settings.decontamination), "skipped": skipped}
        write_json(folder / REPORT, report)
        store.remove()
    _log_others(folder, targets)
    return report


def _log_others(folder: Path, targets: Sequence[str]) -> None:
    """Warn of files beside the new ones, such as those that an earlier run made of other inputs."""
    made = {os.path.realpath(path) for path in [*targets, str(folder / REPORT)]}
    there = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))  # not the lock
    others = sorted(str(path) for path in there if os.path.realpath(path) not in made)
    if targets and others:
        logger.warning(
            "%s has %d files that this command did not write, such as %s; who reads the whole folder reads them too, so"
            " remove those of an earlier corpus",
            *(folder, len(others), others[0]),
        )


def _search_all(
    search: UnitSearch, store: WorkFolder, settings: DecontaminateSettings
) -> tuple[ContaminationCounts, dict[str, int]]:
    """Search the unfinished units. Returns the counts of all units in order, and the numbers of skipped records by reason."""
    counts, skipped = ContaminationCounts(), Counter[str]()
    numbers = range(len(search.units))
    stored = {number: UnitRecord(**found) for number in numbers if (found := store.finished(_unit(number))) is not None}
    finished = {number: record for number, record in stored.items() if search.is_whole(number, record)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    unfinished = [number for number in numbers if number not in finished]
    made = ordered_map(
        search, unfinished, settings.workers or cores, lambda number: search.units[number][0].source.path, lambda: None
    )
    for number in tqdm(numbers, unit="unit", desc="decontaminate", disable=None):
        record = finished[number] if number in finished else next(made)
        counts.add(ContaminationCounts(**record.counts))
        skipped.update(record.skipped)
        for message in record.messages:
            logger.warning("skipped %s", visible(message))
    for _ in made:  # finishes the workers
        pass
    return counts, dict(sorted(skipped.items()))


def _size(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return None


def _unit(number: int) -> str:
    return f"unit-{number:06d}"


def _targets(settings: DecontaminateSettings, sources: Sequence[InputPath]) -> list[str]:
    """Return the new path of each file: below the output folder as the file is below the folder that all share.

    Raises UsageError if a new file would replace an input, the report, or another new file.
    """
    for source in sources:
        check_writable(source, settings.text_key)
    paths = [os.path.abspath(source.path) for source in sources]  # links keep their names
    shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    targets = [os.path.join(settings.output, os.path.relpath(path, shared)) for path in paths]
    taken = {os.path.realpath(path): f"the input {path}" for path in paths}
    taken[os.path.realpath(os.path.join(settings.output, REPORT))] = "the report"
    for path, target in zip(paths, targets, strict=True):
        real = os.path.realpath(target)
        if real in taken:
            raise UsageError(f"the new file of {path} would replace {taken[real]}; name another folder as --output")
        taken[real] = f"the new file of {path}"
    return targets
