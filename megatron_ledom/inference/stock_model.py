"""A folder's causal language model as stock transformers loads it: all of it from the folder, or an error that says why not.

What figures of a model depend on besides settings: a run that goes on from kept work must find the same.
"""

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_ledom.errors import DataError, MismatchError

ADAPTER = "adapter_config.json"
KINDS = {
    "missing_keys": "not in the files, so that random numbers would stand there",
    "unexpected_keys": "in the files, but with no place in the model",
    "mismatched_keys": "of another shape than the model's",
}
MAX_NAMED = 4
"""Names of one kind that an error lists."""


def check_model_type(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a config.json whose model_type is no causal language model of the installed transformers.

    Raises DataError where it is no name, MismatchError where it is another kind of model.
    """
    model_type = config.get("model_type")
    where = f"{folder}/config.json has model_type {model_type!r}"
    if not isinstance(model_type, str):
        raise DataError(f"{where}, expected the name of an architecture, such as llama; correct it, or write the folder again")
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if model_type in CONFIG_MAPPING_NAMES:
        raise MismatchError(f"{where}, which is no causal language model; give the folder of one, such as a llama")
    code = "; the folder's own code is never run" if config.get("auto_map") else ""
    raise MismatchError(
        f"{where}, which stock transformers {transformers.__version__} does not know{code}: give a folder of a stock architecture"
    )


def load_stock_model(folder: str | Path, **options: Any) -> Any:
    """Load a folder of safetensors offline, without code of the folder. `options`: as of transformers' `from_pretrained`.

    Raises DataError where transformers fails, MismatchError where not all weights of the model come from the folder.
    """
    check_no_adapter(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them
            **options,
        )
    except Exception as error:  # transformers raises many kinds
        raise DataError(f"{folder} does not load as a model of safetensors files: {first_words(error)}") from error
    if faults := [*_loading_faults(report), *_tie_faults(model), *_order_faults(model)]:
        raise MismatchError(
            f"{folder} does not load whole in stock transformers: {'; '.join(faults)}: its config.json and its weights do not belong"
            " together, or files were changed; copy or save the folder again"
        )
    return model


def check_no_adapter(folder: str | Path) -> None:
    """Refuse a folder with an adapter, which counts on some machines only."""
    if (Path(folder) / ADAPTER).is_file():
        raise MismatchError(
            f"{folder} holds an adapter ({ADAPTER}), which stock transformers adds to the weights where peft is installed and leaves"
            " out elsewhere; merge it into a folder of its own (merge_and_unload, then save_pretrained), or remove it"
        )


def first_words(error: Exception) -> str:
    """Return the type of an error and its first line; the next one too, where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


def _loading_faults(report: dict[str, Any]) -> Iterator[str]:
    """Kinds of faults in transformers' report, which leaves out what each architecture declares harmless."""
    for kind, found in report.items():
        names = sorted(_named(key) for key in found)
        if names:
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            yield f"{KINDS.get(kind, kind)}: {', '.join(names[:MAX_NAMED])}{more}"


def _named(key: Any) -> str:
    """A key of the report; a mismatched one comes with both shapes."""
    if isinstance(key, str):
        return key
    name, stored, expected = key
    return f"{name} {list(stored)}, expected {list(expected)}"


def _tie_faults(model: Any) -> Iterator[str]:
    """The head that a config says is the embedding, and that is not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = model.config.get_text_config().tie_word_embeddings and getattr(model, "_tied_weights_keys", None)
    if is_tied and head is not None and head.weight is not embedding.weight:
        yield (
            "tie_word_embeddings is true, a tied head, but the head (lm_head.weight) is not the embedding; some releases of"
            " transformers tie it, some do not"
        )


def _order_faults(model: Any) -> Iterator[str]:
    """An encoder such as BERT, whose every position reads what comes later."""
    reads_all = any(getattr(module, "is_causal", None) is False for module in model.modules())
    if getattr(model.config, "is_decoder", None) is False and reads_all:
        yield f"a {model.config.model_type} without is_decoder reads in both directions, which is no causal language model"


READ_BESIDE_WEIGHTS = (
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""Small files on which the figures depend: what the model is, which files hold it, and what its ids mean."""


def folder_facts(folder: Path) -> dict[str, Any]:
    """Which model a folder holds. The weights are told apart by their files' size and time of change."""
    weights = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.safetensors"))}
    beside = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in READ_BESIDE_WEIGHTS
        if (folder / name).is_file()
    }
    found = beside.pop("config.json", None)
    return {"model": str(folder.resolve()), "weights": weights, "config_sha256": found, "files": beside}


def check_unchanged(folder: Path, known: dict[str, Any]) -> None:
    """Raise DataError for a folder that is no longer what `folder_facts` has found: call it once the model is loaded.

    Weights, tokenizer and what is noted of both are read at different times; replaced in between they would not be one model.
    """
    now, before = (
        {"config.json": facts["config_sha256"], **facts["files"], **facts["weights"]} for facts in (folder_facts(folder), known)
    )
    names = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    if names:
        raise DataError(
            f"the model folder {folder} was changed while it was read ({', '.join(names)}): something else writes to it; wait until"
            " it is complete, then run the same command again"
        )


def surroundings() -> dict[str, str]:
    """The device, on which the precision depends, and versions of the packages that compute."""
    versions = {name: version(name) for name in ("megatron-ledom", "torch", "transformers")}
    return {"device": "cuda" if torch.cuda.is_available() else "cpu", **versions}
