"""The losses of a forward and of a reverse model on each document of a file, for the options of `compare-losses`.

A stopped comparison resumes from the records in its folder. `loss_difference` computes the metrics from them.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.evaluation.item_file import ItemFile, numbered
from megatron_ledom.evaluation.loss_difference import CompareSettings, Document, document_records, is_same_tokenizer
from megatron_ledom.evaluation.record_checks import document_check
from megatron_ledom.evaluation.tasks.loading import ENDINGS, read_rows
from megatron_ledom.inference.language_model import ForwardLM, ReverseLM
from megatron_ledom.inference.model_folder import (
    COMMAND_OPTIONS,
    check_unchanged,
    folder_facts,
    load_tokenizer,
    read_model_config,
    surroundings,
)
from megatron_ledom.storage.hashes import sha256_of

WINDOW_DOCUMENTS = 64
"""Documents that are scored together and saved at once. Batches depend on the documents' numbers alone."""
Options = Mapping[str, Any]


def read_documents(options: Options) -> list[Document]:
    """Return the first `limit` documents of a file. Raises DataError, with the line, for a missing key, UsageError for a wrong file or limit."""
    path = Path(options["data"])
    if not path.is_file() or not path.name.endswith(ENDINGS):
        raise UsageError(f"{path} is not a file with one of the endings {' '.join(ENDINGS)}; give documents as JSON lines")
    if options["limit"] is not None and options["limit"] < 1:
        raise UsageError(f"--limit {options['limit']} must be at least 1")
    documents = []
    for where, row in read_rows(path):
        for key in (options["text_key"], options["domain_key"]):
            if key is not None and not isinstance(row.get(key), str):
                raise DataError(f"{where} has no text under {key!r}; found the keys {', '.join(row) or 'none'}")
        domain = "" if options["domain_key"] is None else row[options["domain_key"]]
        documents.append(Document(row[options["text_key"]], domain, where.removeprefix(f"{path}:").strip()))
        if len(documents) == options["limit"]:
            break
    if not documents:
        raise DataError(f"{path} contains no documents; give JSON lines with texts under {options['text_key']!r}")
    return documents


def check_tokenizers(options: Options) -> bool:
    """Return True if both tokenizers are the same.

    Raises MismatchError otherwise, unless the options allow it. Loads no weights.
    """
    forward, _ = load_tokenizer(Path(options["forward"]))
    reverse, _ = load_tokenizer(Path(options["reverse"]), Direction.REVERSE, options["eod_id"], COMMAND_OPTIONS)
    is_same = is_same_tokenizer(forward, reverse)
    if not is_same and not options["different_tokenizers"]:
        raise MismatchError(
            f"{options['forward']} and {options['reverse']} have different tokenizers, so losses per token and by position cannot be"
            " compared; give twins with one tokenizer, or --different-tokenizers to compare only bits per byte of whole documents"
        )
    return is_same


def common_context(options: Options) -> int:
    """Return the context in tokens for both models: `--context`, else the smaller number of positions of the two."""
    limits = [read_model_config(Path(options[side])).get("max_position_embeddings") for side in ("forward", "reverse")]
    known = [int(limit) for limit in limits if limit]
    if options["context"] is None and not known:
        raise UsageError("neither model records max_position_embeddings; give --context")
    context = min(known) if options["context"] is None else int(options["context"])
    if known and context > min(known):
        raise UsageError(
            f"--context {context} must be at most the model's {min(known)} positions; give a smaller number, or omit it"
        )
    return context


def made_by(options: Options, settings: CompareSettings) -> dict[str, Any]:
    """Return the settings of the losses. The number of documents is not one of them, so that documents can be added."""
    return {
        **{side: folder_facts(Path(options[side])) for side in ("forward", "reverse")},
        "data_sha256": sha256_of(options["data"]),
        "text_key": options["text_key"],
        "domain_key": options["domain_key"],
        "direction": options["direction"],
        "eod_id": options["eod_id"],
        "context": settings.context,
        "batch_size": settings.batch_size,
        "different_tokenizers": options["different_tokenizers"],
        "surroundings": surroundings(),
    }


def score_documents(
    output: Path,
    options: Options,
    documents: Sequence[Document],
    settings: CompareSettings,
    about: Mapping[str, Any],
    *,
    with_positions: bool,
) -> list[dict[str, Any]]:
    """Return one record per document, and write each to `output/losses.jsonl`.

    Records of an earlier run are not computed again. The caller holds the lock of the folder. Raises DataError if no
    document has a token.
    """
    file = ItemFile(output, "losses", about)
    records = file.resume(WINDOW_DOCUMENTS, len(documents), document_check(documents, with_positions=with_positions))
    if len(records) < len(documents):
        records += _read(options, documents, len(records), file, settings, about)
    if not any(record["forward"]["tokens"] and record["reverse"]["tokens"] for record in records):
        raise DataError(f"{options['data']} has no document with a token; give texts under {options['text_key']!r}")
    return records


def _read(
    options: Options,
    documents: Sequence[Document],
    num_kept: int,
    file: ItemFile,
    settings: CompareSettings,
    about: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the records of the documents after the first `num_kept`. Each window is written as soon as it is scored."""
    forward = ForwardLM.from_pretrained(options["forward"])
    loading = {"direction": options["direction"], "eod_id": options["eod_id"]}
    reverse = ReverseLM.from_pretrained(options["reverse"], **loading, option_names=COMMAND_OPTIONS)
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
