"""The tools with which preprocessing is compared, re-created on public libraries without using their code.

    python tests/benchmarks/preprocess_anchors.py classic --input F.jsonl --tokenizer tokenizer.json --output-prefix P \\
        --eod-id 151645 --eod-token '<|im_end|>' --dtype int32 [--workers 1]

All write forward shards (P.bin, P.idx) with an eod after each document and no BOS. bench_preprocess.py runs each in a process
of its own and counts the imports, because the real tools have them too. They import nothing from this project.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

KEY = "text"
CHUNK_OF_LINES = 32  # per request to a worker of the classic tool
BLOCK_BYTES = 4 << 20


@dataclass(slots=True)
class Task:
    """The options of an anchor."""

    input: str
    tokenizer: str
    output_prefix: str
    eod_id: int
    eod_token: str
    dtype: str
    workers: int


@dataclass(slots=True)
class ClassicWorker:
    """Converts a JSON line to a list of ids, with one tokenizer per worker process."""

    tokenizer_json: str
    eod_id: int
    tokenizer: ClassVar[Any] = None

    def start(self) -> None:
        """Load the tokenizer, once in each worker."""
        from transformers import PreTrainedTokenizerFast

        ClassicWorker.tokenizer = PreTrainedTokenizerFast(tokenizer_file=self.tokenizer_json)

    def __call__(self, line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
        """Return ids and lengths by key, and the number of characters, as Python objects to be pickled for the parent."""
        ids: list[int] = ClassicWorker.tokenizer(json.loads(line)[KEY], add_special_tokens=False).input_ids
        if ids:
            ids.append(self.eod_id)
        return {KEY: ids}, {KEY: [len(ids)]}, len(line)


def run_classic(task: Task) -> None:
    """Run like Megatron-LM's preprocess_data.py: a pool encodes one document at a time; the parent collects and writes.

    Single documents cost about 1.3 times the CPU seconds of batches (tokenizers 0.23).
    """
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    worker = ClassicWorker(task.tokenizer, task.eod_id)
    worker.start()  # the parent loads a tokenizer too, for the size of the vocabulary
    builder = IndexedDatasetBuilder(task.output_prefix + ".bin", dtype=np.dtype(task.dtype).type)
    with open(task.input, encoding="utf-8") as lines, multiprocessing.Pool(task.workers, initializer=worker.start) as pool:
        for documents, lengths, _ in pool.imap(worker, lines, CHUNK_OF_LINES):
            if documents[KEY]:
                builder.add_document(torch.IntTensor(documents[KEY]), lengths[KEY])
        pool.close()
        pool.join()
    builder.finalize(task.output_prefix + ".idx")


def run_gigatoken(task: Task) -> None:
    """Run like Megatron-LM's newer tool: GigaToken encodes the whole file in memory, then one serial stage writes."""
    import gigatoken
    import numpy as np
    import torch  # noqa: F401  the tool imports it, so its time counts
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokenizer = gigatoken.Tokenizer(task.tokenizer)
    source = gigatoken.JsonlFileSource([task.input], field=KEY)
    encoded = tokenizer.encode_files(source, parallel=task.workers > 1).layout
    ids, offsets = np.asarray(encoded.content.data), np.asarray(encoded.offsets.data).tolist()
    builder = IndexedDatasetBuilder(task.output_prefix + ".bin", dtype=np.dtype(task.dtype).type)
    for begin, end in itertools.pairwise(offsets):
        if end > begin:
            document = np.empty(end - begin + 1, task.dtype)
            document[:-1] = ids[begin:end]
            document[-1] = task.eod_id
            builder.add_document(document, [len(document)])
    builder.finalize(task.output_prefix + ".idx")


def run_datatrove(task: Task) -> None:
    """Run datatrove's JSONL reader and Megatron writer in one task with the default batch."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    folder = Path(task.output_prefix + "_datatrove")
    source, name = Path(task.input), Path(task.output_prefix).name
    reader = JsonlReader(str(source.parent), glob_pattern=source.name, text_key=KEY)
    writer = MegatronDocumentTokenizer(
        str(folder), save_filename=name, tokenizer_name_or_path=task.tokenizer, eos_token=task.eod_token
    )
    executor = LocalPipelineExecutor(
        [reader, writer], tasks=1, workers=1, logging_dir=str(folder / "logs"), skip_completed=False
    )
    executor.run()
    for suffix in (".bin", ".idx"):
        (folder / f"{name}_00000_tokens{suffix}").replace(task.output_prefix + suffix)


def run_sentencepiece(task: Task) -> None:
    """Use the `sentencepiece` library directly: orjson, whole batches, numpy arrays, no other imports."""
    import numpy as np
    import orjson
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=task.tokenizer)
    lengths: list[int] = []
    with open(task.output_prefix + ".bin", "wb") as shard:
        for lines in _batches_of_lines(task.input):
            texts = [orjson.loads(line)[KEY] for line in lines]
            for ids in processor.encode(texts, out_type=int, num_threads=1):
                if ids:
                    ids.append(task.eod_id)
                    shard.write(np.array(ids, task.dtype).data)
                    lengths.append(len(ids))
        shard.flush()
        os.fsync(shard.fileno())
    sizes = np.array(lengths, np.int64)
    itemsize, code = np.dtype(task.dtype).itemsize, {"int32": 4, "uint16": 8}[task.dtype]
    with open(task.output_prefix + ".idx", "wb") as index:
        index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1))
        index.write(sizes.astype(np.int32).tobytes())
        index.write(((np.cumsum(sizes) - sizes) * itemsize).tobytes())
        index.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())


def _batches_of_lines(path: str) -> Iterator[list[bytes]]:
    with open(path, "rb") as file:
        while lines := file.readlines(BLOCK_BYTES):
            yield lines


ANCHORS = {
    "classic": run_classic,
    "gigatoken": run_gigatoken,
    "datatrove": run_datatrove,
    "sentencepiece": run_sentencepiece,
}


def main() -> None:
    """Run one anchor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("anchor", choices=ANCHORS)
    parser.add_argument("--input", required=True, help="plain JSONL with a key `text`")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json, or a .model for sentencepiece")
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--eod-id", type=int, required=True)
    parser.add_argument("--eod-token", required=True)
    parser.add_argument("--dtype", choices=["int32", "uint16"], required=True)
    parser.add_argument("--workers", type=int, default=1)
    arguments = vars(parser.parse_args())
    ANCHORS[arguments.pop("anchor")](Task(**arguments))


if __name__ == "__main__":
    main()
