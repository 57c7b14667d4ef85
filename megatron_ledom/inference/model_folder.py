"""A model folder: its config.json, its tokenizer and stop ids, its weights as stock transformers loads them, and which it is.

`load_stock_model` loads all weights from the folder, or says why not. `folder_facts` and `surroundings` are what figures of a
model depend on besides settings: a run that resumes must find the same.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.tokenizers.reader import TokenizerFiles, other_ends, read_tokenizer

logger = logging.getLogger(__name__)
ADAPTER = "adapter_config.json"
KINDS = {
    "missing_keys": "not in the files, so that random numbers would stand there",
    "unexpected_keys": "in the files, but with no place in the model",
    "mismatched_keys": "of another shape than the model's",
}
MAX_NAMED = 4
"""Names of one kind that an error lists."""
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


@dataclass(frozen=True, slots=True)
class OptionNames:
    """How the caller names, in advice, the eod and the direction of a folder that records neither."""

    eod: str
    reverse: str


PYTHON_OPTIONS = OptionNames("eod_id=ID", "direction='reverse'")
COMMAND_OPTIONS = OptionNames("--eod-id ID", "--direction reverse")
RERANK_OPTIONS = OptionNames("--reverse-eod-id ID", "--reverse-eod-id ID, which says both")
HARNESS_OPTIONS = OptionNames("eod_id=ID in --model_args", "direction=reverse in --model_args")


def read_model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no model folder (it has no config.json); pass one that ledom convert-checkpoint wrote")
    return _read_json(folder / "config.json")


def load_tokenizer(
    folder: Path,
    direction: Direction = Direction.FORWARD,
    eod_id: int | None = None,
    option_names: OptionNames = PYTHON_OPTIONS,
) -> tuple[JointTokenizer, list[int]]:
    """The tokenizer of a model folder and its stop ids, checked against each other and against what the folder records.

    direction: that of the model, for a folder which records none; eod_id, option_names: see `LanguageModel.from_pretrained`.
    """
    config = read_model_config(folder)
    files = read_tokenizer(str(folder))
    _check_tokenizer(folder, files, config.get("tokenizer_sha256"))
    trained_here, is_reverse = config.get("direction") is not None, direction is Direction.REVERSE
    tokenizer = JointTokenizer.of_files(files, specials_are_text=trained_here or is_reverse)
    stop_ids = _stop_ids(folder, config)
    if is_reverse and not trained_here:
        stop_ids = [_eod_of_foreign_folder(folder, tokenizer, stop_ids, eod_id, option_names)]
    elif eod_id is not None:
        remedy = (
            "leave it out" if trained_here else f"leave it out, or, if it is a reverse model, say so ({option_names.reverse})"
        )
        raise UsageError(
            f"eod_id={eod_id} was passed, but {folder} is read as a {direction} model and says itself what ends a text; {remedy}"
        )
    _check_ids(folder, config, tokenizer, stop_ids)
    return tokenizer, stop_ids


def load_stock_model(folder: str | Path, **options: Any) -> Any:
    """Load a folder of safetensors offline, without code of the folder. `options`: as of transformers' `from_pretrained`.

    Raises DataError where transformers fails, MismatchError where not all weights of the model come from the folder.
    """
    check_no_adapter(folder)
    try:
        with _bar_on_terminals_only():
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
    if problems := [*_loading_problems(report), *_tie_problems(model), *_order_problems(model)]:
        raise MismatchError(
            f"{folder} does not load whole in stock transformers: {'; '.join(problems)}: its config.json and its weights do not belong"
            " together, or files were changed; copy or save the folder again"
        )
    return model


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


def check_no_adapter(folder: str | Path) -> None:
    """Refuse a folder with an adapter, which counts on some machines only."""
    if (Path(folder) / ADAPTER).is_file():
        raise MismatchError(
            f"{folder} holds an adapter ({ADAPTER}), which stock transformers adds to the weights where peft is installed and leaves"
            " out elsewhere; merge it into a folder of its own (merge_and_unload, then save_pretrained), or remove it"
        )


def folder_facts(folder: Path) -> dict[str, Any]:
    """Return which model a folder holds. The weights are told apart by their files' size and time of change."""
    weights = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.safetensors"))}
    beside = {name: sha256_of(folder / name) for name in READ_BESIDE_WEIGHTS if (folder / name).is_file()}
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


def first_words(error: Exception) -> str:
    """Return the type of an error and its first line; the next one too, where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); write the folder again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected an object; write the folder again")
    return content


def _stop_ids(folder: Path, config: dict[str, Any]) -> list[int]:
    """Return the ids that end a text: `eod_id` of an export (trap 1), a stock folder's generation eos."""
    generation = _read_json(path) if (path := folder / "generation_config.json").is_file() else {}
    found = (
        ("config.json has eod_id", config.get("eod_id")),
        ("generation_config.json has eos_token_id", generation.get("eos_token_id")),
        ("config.json has eos_token_id", config.get("eos_token_id")),
    )
    where, eos = next(((where, ids) for where, ids in found if ids is not None), ("", None))
    if eos is None:
        raise DataError(f"{folder} names no eod_id or eos_token_id, so generation would never stop; add eod_id to config.json")
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(id_) is int and id_ >= 0 for id_ in ids):
        raise DataError(f"{folder}/{where} {eos!r}, expected the id of a token or a list of ids; correct it")
    return list(ids)


def _eod_of_foreign_folder(
    folder: Path, tokenizer: JointTokenizer, stop_ids: list[int], eod_id: int | None, option_names: OptionNames
) -> int:
    """The eod of a reverse model that others exported: what is passed, or the folder's eos unless there is a doubt.

    The original's export names the tokenizer's eos, 2, and was trained with another token of its own, 64002: it would never stop.
    """
    doubtful = other_ends(tokenizer.vocab, stop_ids)
    if eod_id is None and doubtful:
        names = ", ".join(f"{token} = {id_}" for token, id_ in doubtful.items())
        raise MismatchError(
            f"{folder} names {stop_ids} as its eos, but its tokenizer has {names}, too: with the wrong one, generation never stops;"
            f" pass the one that documents were closed with in training ({option_names.eod})"
        )
    if eod_id is None:
        logger.warning(
            "%s does not say which id its documents were closed with; its eos %d is taken. Name another with %s",
            *(folder, stop_ids[0], option_names.eod),
        )
    return stop_ids[0] if eod_id is None else eod_id


def _check_tokenizer(folder: Path, files: TokenizerFiles, recorded: Any) -> None:
    """Refuse an export whose tokenizer is not the one it was trained with."""
    if recorded is not None and not isinstance(recorded, str):
        raise DataError(f"{folder}/config.json has tokenizer_sha256 {recorded!r}, expected a hash; write the folder again")
    if recorded is not None and files.sha256 != recorded:
        raise MismatchError(
            f"the tokenizer of {folder} has hash {files.sha256[:12]}, the model was trained with {recorded[:12]}: its ids would"
            " mean other texts; put back the tokenizer files that the export came with"
        )


def _check_ids(folder: Path, config: dict[str, Any], tokenizer: JointTokenizer, stop_ids: list[int]) -> None:
    """Refuse ids which the embedding does not have."""
    vocab_size = config.get("vocab_size", 0)
    if type(vocab_size) is not int:
        raise DataError(f"{folder}/config.json has vocab_size {vocab_size!r}, expected a number of ids; correct it")
    largest = max([*tokenizer.vocab.values(), *stop_ids])
    if largest >= vocab_size:
        raise MismatchError(
            f"the tokenizer of {folder} and its eod use ids up to {largest}, the model has {vocab_size}: they do not belong"
            " together; export again with the tokenizer that the shards were made with"
        )


@contextlib.contextmanager
def _bar_on_terminals_only() -> Iterator[None]:
    """Keep the progress bar with which transformers loads weights out of log files."""
    if sys.stderr.isatty() or not is_progress_bar_enabled():
        yield
        return
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()


def _loading_problems(report: dict[str, Any]) -> Iterator[str]:
    """Kinds of problems in transformers' report, which leaves out what each architecture declares harmless."""
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


def _tie_problems(model: Any) -> Iterator[str]:
    """The head that a config says is the embedding, and that is not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = model.config.get_text_config().tie_word_embeddings and getattr(model, "_tied_weights_keys", None)
    if is_tied and head is not None and head.weight is not embedding.weight:
        yield (
            "tie_word_embeddings is true, a tied head, but the head (lm_head.weight) is not the embedding; some releases of"
            " transformers tie it, some do not"
        )


def _order_problems(model: Any) -> Iterator[str]:
    """An encoder such as BERT, whose every position reads what comes later."""
    reads_all = any(getattr(module, "is_causal", None) is False for module in model.modules())
    if getattr(model.config, "is_decoder", None) is False and reads_all:
        yield f"a {model.config.model_type} without is_decoder reads in both directions, which is no causal language model"
