"""From the options of tools/compare_losses.py to models, losses of each document and a report."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.evaluation.item_file import ItemFile, numbered
from megatron_ledom.evaluation.kept_lines import document_check
from megatron_ledom.evaluation.loss_difference import CompareSettings, Document, document_records, is_same_tokenizer, summarize
from megatron_ledom.evaluation.loss_report import sentence, write_report
from megatron_ledom.evaluation.results import check_statistics
from megatron_ledom.evaluation.task_files import ENDINGS, file_hash, read_rows
from megatron_ledom.inference.forward_lm import ForwardLM
from megatron_ledom.inference.language_model import SAY_EOD_ID, load_tokenizer, read_model_config
from megatron_ledom.inference.model_facts import check_unchanged, folder_facts, surroundings
from megatron_ledom.inference.reverse_lm import ReverseLM
from megatron_ledom.inference.scoring import check_batch_size
from megatron_ledom.pages import check_plots
from megatron_ledom.storage.locks import output_folder_lock

WINDOW_DOCUMENTS = 64
"""Documents that are read together and kept at once; batches are cut by the documents' numbers alone."""
Options = Mapping[str, Any]


def compare_command(options: Options) -> None:
    """Read both models on every document of a file; the same command goes on where it stopped."""
    check_batch_size(options["batch_size"])
    check_statistics()
    check_plots()
    documents = read_documents(options)
    is_same = _check_tokenizers(options)
    settings = CompareSettings(_context(options), options["batch_size"], seed=options["seed"])
    with output_folder_lock(options["output"]):
        _compare_into(Path(options["output"]), options, documents, settings, with_positions=is_same)


def _compare_into(
    output: Path, options: Options, documents: Sequence[Document], settings: CompareSettings, *, with_positions: bool
) -> None:
    """Score the documents and write the report; resumes what the folder has. Nobody else writes there."""
    about = _made_by(options, settings)
    file = ItemFile(output, "losses", about)
    records = file.resume(WINDOW_DOCUMENTS, len(documents), document_check(documents, with_positions=with_positions))
    if len(records) < len(documents):
        records += _read(options, documents, len(records), file, settings, about)
    if not any(record["forward"]["tokens"] and record["reverse"]["tokens"] for record in records):
        raise DataError(f"{options['data']} has no document with a token; give texts under {options['text_key']!r}")
    summary = summarize(records, settings)
    write_report(output, summary, {**about, "resamples": settings.num_resamples, "seed": settings.seed})
    print(sentence(summary), output / "report.html", sep="\n")


def _read(
    options: Options,
    documents: Sequence[Document],
    num_kept: int,
    file: ItemFile,
    settings: CompareSettings,
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Both models over the documents after the first `num_kept`, each window kept at once."""
    forward = ForwardLM.from_pretrained(options["forward"])
    asked = {"direction": options["direction"], "eod_id": options["eod_id"]}
    reverse = ReverseLM.from_pretrained(options["reverse"], **asked, say=SAY_EOD_ID)
    for side in ("forward", "reverse"):
        check_unchanged(Path(options[side]), about[side])
    records: list[dict[str, Any]] = []
    with tqdm(total=len(documents), unit=" documents", file=sys.stderr, disable=not sys.stderr.isatty()) as bar:
        bar.update(num_kept)
        for begin in range(num_kept, len(documents), WINDOW_DOCUMENTS):
            window = documents[begin : begin + WINDOW_DOCUMENTS]
            found = numbered(begin, document_records(forward, reverse, window, settings))
            file.append(found)
            records += found
            bar.update(len(found))
    return records


def _check_tokenizers(options: Options) -> bool:
    """Return True if both are the same. Refuse different ones, unless that is asked for, before weights are loaded."""
    forward, _ = load_tokenizer(Path(options["forward"]))
    reverse, _ = load_tokenizer(Path(options["reverse"]), Direction.REVERSE, options["eod_id"], SAY_EOD_ID)
    is_same = is_same_tokenizer(forward, reverse)
    if not is_same and not options["different_tokenizers"]:
        raise MismatchError(
            f"{options['forward']} and {options['reverse']} have different tokenizers: their tokens are not the same, so losses a token"
            " and by position cannot be compared; give twins with one tokenizer, or --different-tokenizers for bits a byte of"
            " whole documents only"
        )
    return is_same


def read_documents(options: Options) -> list[Document]:
    """The first `limit` documents of a file; a line without the asked keys is refused by its number."""
    path = Path(options["data"])
    if not path.is_file() or not path.name.endswith(ENDINGS):
        raise UsageError(f"{path} is no file with one of the endings {' '.join(ENDINGS)}; give documents as JSON lines")
    if options["limit"] is not None and options["limit"] < 1:
        raise UsageError(f"--limit {options['limit']} compares nothing; it must be at least 1")
    documents = []
    for where, row in read_rows(path):
        for key in (options["text_key"], options["domain_key"]):
            if key is not None and not isinstance(row.get(key), str):
                raise DataError(f"{where}: no text under {key!r}; found the keys {', '.join(row) or 'none'}")
        domain = "" if options["domain_key"] is None else row[options["domain_key"]]
        documents.append(Document(row[options["text_key"]], domain, where.removeprefix(f"{path}:").strip()))
        if len(documents) == options["limit"]:
            break
    if not documents:
        raise DataError(f"{path} holds no documents; give JSON lines with texts under {options['text_key']!r}")
    return documents


def _context(options: Options) -> int:
    """The same for both models: what is asked for, else the fewer positions of the two."""
    limits = [read_model_config(Path(options[side])).get("max_position_embeddings") for side in ("forward", "reverse")]
    known = [int(limit) for limit in limits if limit]
    if options["context"] is None and not known:
        raise UsageError("neither model says how many positions it has; give --context")
    asked = min(known) if options["context"] is None else int(options["context"])
    if known and asked > min(known):
        raise UsageError(
            f"--context {asked} must be at most the model's {min(known)} positions; ask for fewer, or leave it out"
        )
    return asked


def _made_by(options: Options, settings: CompareSettings) -> dict[str, Any]:
    """What the losses depend on; not how many documents are read, so that more of them can be added."""
    return {
        **{side: folder_facts(Path(options[side])) for side in ("forward", "reverse")},
        "data_sha256": file_hash(Path(options["data"])),
        "text_key": options["text_key"],
        "domain_key": options["domain_key"],
        "direction": options["direction"],
        "eod_id": options["eod_id"],
        "context": settings.context,
        "batch_size": settings.batch_size,
        "different_tokenizers": options["different_tokenizers"],
        "surroundings": surroundings(),
    }
