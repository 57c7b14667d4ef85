"""Search a batch of documents and decide what remains of it."""

from collections import Counter

from megatron_ledom.contamination.cutting import pieces_without
from megatron_ledom.contamination.report import ContaminationCounts
from megatron_ledom.contamination.search import Searcher
from megatron_ledom.data.readers.records import TextBatch

CONTAMINATED = "contaminated"
"""Reason for skipped documents in manifests."""


def remains(batch: TextBatch, searcher: Searcher, counts: ContaminationCounts) -> dict[int, list[str]]:
    """Return the texts that remain of each contaminated document, by its number in the batch: none, or pieces. Adds to the counts.

    Empty for the action `report`, by which every document remains as it is.
    """
    counts.documents += len(batch.texts)
    found = searcher.search(batch.texts)
    kept = {}
    for number, passages in found.items():
        reader, origin = batch.origins[number]
        counts.add_document(reader.name(origin, exactly=False), batch.texts[number], passages)
        if searcher.settings.action != "report":
            kept[number] = pieces_without(batch.texts[number], passages) if searcher.settings.action == "cut" else []
            counts.pieces += len(kept[number])
    return kept


def decontaminated(batch: TextBatch, searcher: Searcher, counts: ContaminationCounts, skipped: Counter[str]) -> TextBatch:
    """Return the batch with what remains of its documents. Adds to the counts, and documents without a rest to `skipped`."""
    kept = remains(batch, searcher, counts)
    if not kept:
        return batch
    chosen: list[int] = []
    texts: list[str] = []
    for number, text in enumerate(batch.texts):
        pieces = kept.get(number, [text])
        chosen += [number] * len(pieces)
        texts += pieces
    if without := sum(not pieces for pieces in kept.values()):
        skipped[CONTAMINATED] += without
    result = batch.at(chosen)
    result.texts = texts
    return result
