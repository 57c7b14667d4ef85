"""Inputs of the inventory, made from integers only: documents in every format, a tokenizer, models and questions.

Nothing here depends on the project or on the machine: the bytes are the same everywhere.
"""

import gzip
import json
import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from safetensors.numpy import save_file

Rows = list[dict[str, Any]]

SUBJECTS = ["The cat", "A dog", "Anna", "The old café", "漢字", "Berlin", "The river 🙂", "def area(width):", "One of 12 men"]
VERBS = ["sees", "is near", "wrote about", "was 3 times", "returns", "remembers", "does not know", "the end of"]
OBJECTS = [
    "the house.",
    "a small town.",
    "his letters,",
    "width * 2\n",
    "42 and 7.",
    "naïve people!",
    "the sea; it is cold.",
    ".",
]
MERGES = "Ġ t|h e|i n|e r|Ġ a|Ġt he|o n|r e|Ġ w|a t|n d|Ġ s|o f|i s|Ġ of|Ġ is|Ġa nd|e n|o u|T he|Ġt o|in g|Ġ 1|l l|Ġ b|e s"
SPECIALS = ["<unk>", "<s>", "</s>", "<EOD>"]
FILTER = '''def keep(text, record):
    """Keep all but texts about the sea, and what the record forbids."""
    return "the sea" not in text and not record.get("private", False)
'''
YAML = """run_dir: run
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2, params_dtype: fp32}
data: {seq_length: 32, allow_repeats: true}
optimizer: {lr: 3.0e-3, min_lr: 3.0e-4, lr_warmup_iters: 2}
train: {train_iters: 10, global_batch_size: 8, micro_batch_size: 2, eval_interval: 5, eval_iters: 2, num_threads: 1}
checkpoint: {save_interval: 5}
logging: {log_interval: 1, tensorboard: false, peak_tflops: 1.0}
"""
LARGE = """run_dir: run
model: {num_layers: 18, hidden_size: 2048, ffn_hidden_size: 16384, num_attention_heads: 8, num_query_groups: 1, vocab_size: 150000}
data: {seq_length: 8192}
train: {train_iters: 51900, global_batch_size: 1024}
parallel: {hardware: h100-sxm}
"""
WRITTEN_AT = 1_700_000_000
"""Time of every input, in seconds since 1970: shards record a hash of the times of their input files."""


def write_inputs(folder: Path) -> None:
    """Write every input below `folder`, the commands' current folder."""
    documents = made_documents(160)
    write_lines(folder / "texts.jsonl", documents)
    write_lines(folder / "held_out.jsonl", made_documents(24, seed=5))
    (folder / "texts.txt").write_text("".join(row["text"].replace("\n", " ") + "\n" for row in documents[:50]), "utf-8")
    lines = (folder / "texts.jsonl").read_bytes()
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "texts.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    pq.write_table(pa.Table.from_pylist(documents), folder / "texts.parquet", row_group_size=40)
    (folder / "broken.jsonl").write_bytes(lines + b'{"text": 3}\n{"no": "text"}\nnonsense\n')
    (folder / "chosen.py").write_text(FILTER, "utf-8")
    (folder / "tiny.yaml").write_text(YAML, "utf-8")
    (folder / "large.yaml").write_text(LARGE, "utf-8")
    write_tokenizer(folder / "tokenizer")
    write_tokenizer(folder / "plain", SPECIALS[:3])
    write_foreign_shard(folder / "foreign/plain", [[10 * k + place for place in range(3 + k)] for k in range(9)])
    for number, direction in enumerate(("reverse", "forward")):
        write_run(folder / f"runs/made_{direction}", direction, number)
    for number, direction in enumerate(("forward", "reverse")):
        write_model(folder / "models" / direction, seed=number)
    write_questions(folder)
    for path in folder.rglob("*"):
        os.utime(path, (WRITTEN_AT, WRITTEN_AT))


def write_lines(path: Path, rows: Rows) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def made_documents(count: int, seed: int = 1) -> Rows:
    """Return documents of 1 to 12 sentences with a source. Every tenth repeats an earlier one; a few are empty or short."""
    rng = random.Random(seed)
    rows: Rows = []
    for number in range(count):
        sentences = [" ".join(map(rng.choice, (SUBJECTS, VERBS, OBJECTS))) for _ in range(rng.randint(1, 12))]
        text = rows[number // 2]["text"] if number % 10 == 9 else " ".join(sentences)
        text = {30: "", 31: "a", 32: "\n\n"}.get(number, text)
        rows.append(
            {
                "text": text,
                "source": ["web", "code", "books"][number % 3],
                "title": f"Text {number}",
                "private": number % 17 == 3,
            }
        )
    return rows


def tokenizer_json(specials: Sequence[str] = SPECIALS) -> dict[str, Any]:
    """Return a byte-level BPE of 256 bytes and a few merges: </s> is 2, <EOD> is 3."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    pieces = [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
    merges = [merge.split(" ") for merge in MERGES.split("|")]
    vocab = {piece: number for number, piece in enumerate([*specials, *pieces, *("".join(merge) for merge in merges)])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": piece, **flags} for number, piece in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
        }
        | {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges},
    }


def write_tokenizer(folder: Path, specials: Sequence[str] = SPECIALS) -> None:
    """Write a Hugging Face tokenizer folder whose eos is </s>."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(specials), ensure_ascii=False), "utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def write_model(folder: Path, seed: int) -> None:
    """Write a stock Llama folder with the tokenizer: two layers, width 32, weights that are multiples of 1/64."""
    write_tokenizer(folder)
    size, hidden, inner, keys = len(tokenizer_json()["model"]["vocab"]), 32, 64, 16
    shapes = {"model.embed_tokens": (size, hidden), "lm_head": (size, hidden)}
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes |= {
            f"{attention}.{name}_proj": (width, hidden)
            for name, width in zip("qkvo", (hidden, keys, keys, hidden), strict=True)
        }
        shapes |= {f"{mlp}.gate_proj": (inner, hidden), f"{mlp}.up_proj": (inner, hidden), f"{mlp}.down_proj": (hidden, inner)}
    rng = np.random.RandomState(seed)
    tensors = {f"{name}.weight": (rng.randint(-32, 33, shape) / 64).astype(np.float32) for name, shape in shapes.items()}
    norms = ["model.norm", *(f"model.layers.{n}.{side}_layernorm" for n in range(2) for side in ("input", "post_attention"))]
    tensors |= {f"{name}.weight": np.ones(hidden, np.float32) for name in norms}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "dtype": "float32"}
    config |= {"vocab_size": size, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    config |= {"rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 3}
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")


def write_foreign_shard(prefix: Path, documents: list[list[int]]) -> None:
    """Write `.bin` and `.idx` of int32 ids like other Megatron tools: without a manifest and without eods."""
    prefix.parent.mkdir(parents=True)
    lengths = np.array([len(document) for document in documents], "<i4")
    pointers = 4 * (np.cumsum(lengths, dtype="<i8") - lengths)
    marks = np.arange(len(documents) + 1, dtype="<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 4, len(documents), len(marks))
    Path(f"{prefix}.bin").write_bytes(np.concatenate(documents).astype("<i4").tobytes())
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + pointers.astype("<i8").tobytes() + marks.tobytes())


def write_run(folder: Path, direction: str, number: int) -> None:
    """Write a run folder whose loss falls to 4, for the report of two runs."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(YAML.replace("data: {", f"data: {{direction: {direction}, "), "utf-8")
    rows: Rows = []
    for k in range(1, 61):
        row: dict[str, Any] = {
            "iteration": k,
            "lm_loss": 4 + number / 16 + 4 / k,
            "grad_norm": 1 + k % 5 / 8,
            "lr": 1 / (64 + k),
        }
        row |= {"consumed_train_tokens": 256 * k, "tokens_per_second": 4000.0 + k, "mfu": 0.375, "skipped_iterations": 0}
        if k % 15 == 0:
            row["validation"] = {name: {"lm_loss": row["lm_loss"] + 0.125, "bits_per_byte": 1.5} for name in ("a", "b")}
        rows.append(row)
    write_lines(folder / "metrics.jsonl", rows)


def write_questions(folder: Path) -> None:
    """Write pairs for fine-tuning, prompts with and without candidates, and the files of a few tasks."""
    sums = [(k, k + 3) for k in range(8)]
    pairs = [{"question": f"What is {a} and {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"} for a, b in sums]
    write_lines(folder / "pairs.jsonl", pairs)
    answers = [[f" It is\n#### {a + b}", f" {a} + {b}\n#### {a + b}", " no\n#### 1", f" so\n#### {b}"] for a, b in sums]
    asked: Rows = [{"prompt": pair["question"], "gold": str(a + b)} for pair, (a, b) in zip(pairs, sums, strict=True)]
    write_lines(folder / "prompts.jsonl", asked[:3])
    write_lines(folder / "candidates.jsonl", [{**row, "candidates": given} for row, given in zip(asked, answers, strict=True)])
    sets: dict[str, Rows] = {
        "gsm8k_test": [{"question": pair["question"], "answer": pair["answer"]} for pair in pairs[:3]],
        "gsm8k_train": [{"question": f"{k} and 1?", "answer": f"{k + 1}\n#### {k + 1}"} for k in range(4)],
        "boolq_validation": [
            {"passage": f"Ice {k} is cold.", "question": "is ice cold", "answer": k % 2 == 0} for k in range(3)
        ],
        "boolq_train": [{"passage": f"{k} is even.", "question": f"is {k} even", "answer": True} for k in (2, 4, 6)],
        "piqa_train": [{"goal": f"Find {k}.", "sol1": "Look.", "sol2": "Sleep.", "label": 0} for k in range(3)],
        "piqa_validation": [{"goal": "Cool water.", "sol1": "Add ice.", "sol2": "Add fire.", "label": k} for k in (0, 1)],
        "triviaqa_validation": [{"question": "Capital of France?", "answer": {"value": "Paris", "aliases": ["City of Paris"]}}],
        "triviaqa_train": [
            {"question": f"Letter {k}?", "answer": {"value": "abc"[k], "aliases": ["abc"[k]]}} for k in range(3)
        ],
        "humaneval": [
            {
                "task_id": f"Test/{k}",
                "prompt": f'def add_{k}(a: int) -> int:\n    """Add {k}."""\n',
                "canonical_solution": f"    return a + {k}\n",
                "test": f"def check(candidate):\n    assert candidate(1) == {k + 1}\n",
                "entry_point": f"add_{k}",
            }
            for k in (1, 2)
        ],
    }
    for name, rows in sets.items():
        write_lines(folder / "tasks" / f"{name}.jsonl", rows)
