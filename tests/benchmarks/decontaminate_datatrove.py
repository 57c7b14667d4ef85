"""Run datatrove's n-gram decontamination on a planted corpus, for bench_decontaminate.py, in an environment that has datatrove and spacy.

    python decontaminate_datatrove.py PLANTED.jsonl ITEMS.json N

The index is computed by its indexer's `compute_hashes`, with n-grams of query and label; its `run` would also need lighteval and the network.
Prints the numbers of the removed documents and the CPU seconds of the filter as JSON.
"""

import json
import sys
import time

from datatrove.data import Document
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter, NGramsDecontIndexer


def main() -> None:
    """Build the index, filter every document, and print the result."""
    planted, items, ngram = sys.argv[1], sys.argv[2], int(sys.argv[3])
    config = NGramsDecontConfig(n_grams=ngram, find_query_ngrams=True)
    NGramsDecontIndexer._requires_dependencies = []  # lighteval, which only `run` uses
    indexer = NGramsDecontIndexer("unused_index", config=config)
    keep = NGramsDecontFilter("unused_index", config=config)
    keep._index_hashes = {}
    with open(items, encoding="utf-8") as file:
        for name, question, answer in json.load(file):
            keep._index_hashes.update(dict.fromkeys(indexer.compute_hashes(answer, question), name))
    contaminated = []
    with open(planted, encoding="utf-8") as lines:
        documents = [Document(text=json.loads(line)["text"], id=str(number)) for number, line in enumerate(lines)]
    started = time.process_time()
    for number, document in enumerate(documents):
        if keep.filter(document) is not True:
            contaminated.append(number)
    print(json.dumps({"contaminated": contaminated, "seconds": time.process_time() - started}))


if __name__ == "__main__":
    main()
