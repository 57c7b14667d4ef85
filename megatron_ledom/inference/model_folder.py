"""A model folder: its config.json, its tokenizer and stop ids, and its weights as stock transformers loads them.

Results depend on the settings, on the model (`folder_facts`) and on the software (`surroundings`). A command that resumes
requires all of them to be unchanged.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
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

from megatron_ledom.direction import BOTH, Direction, Reading, Unit
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.inference.joint_tokenizer import JointTokenizer
from megatron_ledom.provenance import check_readings, readings_from
from megatron_ledom.storage.hashes import sha256_of
from megatron_ledom.tokenizers.reader import TokenizerFiles, other_ends, read_tokenizer

logger = logging.getLogger(__name__)
ADAPTER = "adapter_config.json"
KINDS = {
    "missing_keys": "missing in the files, so they would be random numbers",
    "unexpected_keys": "in the files, but not in the model",
    "mismatched_keys": "of another shape than in the model",
}
MAX_NAMED = 4
"""Number of names of one kind that an error lists."""
SMALL_FILES = (
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
"""Small files that results depend on: the architecture, the list of weight files, and the tokenizer."""


@dataclass(frozen=True, slots=True)
class OptionNames:
    """Names of the caller's options for eod and direction, for messages about a folder that records neither."""

    eod: str
    reverse: str

    @property
    def forward(self) -> str:
        """The same for the other direction."""
        return self.reverse.replace("reverse", "forward")


PYTHON_OPTIONS = OptionNames("eod_id=ID", "direction='reverse'")
COMMAND_OPTIONS = OptionNames("--eod-id ID", "--direction reverse")
RERANK_OPTIONS = OptionNames("--reverse-eod-id ID", "--reverse-eod-id ID, which sets both")
HARNESS_OPTIONS = OptionNames("eod_id=ID in --model_args", "direction=reverse in --model_args")


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model folder."""
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} is not a model folder (it has no config.json); pass one that ledom convert-checkpoint wrote"
        )
    return _read_json(folder / "config.json")


def recorded_reading(folder: Path, config: Mapping[str, Any], direction: Direction) -> Reading | None:
    """Return how the model of a folder reads in a direction; None if its config.json records no direction.

    Raises MismatchError if the model was not trained in this direction, or on another unit than the token there.
    """
    recorded = config.get("direction")
    if recorded is None:
        return None
    mine, other = ("ReverseLM", "ForwardLM") if direction is Direction.REVERSE else ("ForwardLM", "ReverseLM")
    if recorded not in (str(direction), BOTH):
        raise MismatchError(
            f"{folder}/config.json records the direction {recorded}, {mine} needs a {direction} model; load it with"
            f" {other}, or pass the folder of a {direction} model (in the wrong order, a model gives nonsense without an error)"
        )
    try:
        readings = readings_from(config.get("readings") or ([] if recorded == BOTH else [_plain(direction)]))
        check_readings(BOTH if recorded == BOTH else direction, readings)
    except DataError as error:
        raise DataError(f"{folder}/config.json: {error}; write the folder again") from error
    reading = next(reading for reading in readings if reading.direction is direction)
    if reading.unit is not Unit.TOKEN:
        raise MismatchError(
            f"the model of {folder} was trained on {direction} documents in {reading.unit} order; {mine} reads and writes token by token:"
            f" load it with {other} if it reads the other direction too, or train on shards of --unit token"
        )
    return reading


def _plain(direction: Direction) -> dict[str, Any]:
    return {"direction": str(direction), "unit": str(Unit.TOKEN)}


def leading_ids_of(reading: Reading | None, direction: Direction, tokenizer: JointTokenizer) -> list[int]:
    """Return the ids before every sequence: the marker of a model that has one, or the BOS of a stock forward model."""
    if reading is not None:
        return [] if reading.marker_id is None else [reading.marker_id]
    return tokenizer.leading_ids if direction is Direction.FORWARD else []  # a reverse model must not begin with BOS


def load_tokenizer(
    folder: Path,
    direction: Direction = Direction.FORWARD,
    eod_id: int | None = None,
    option_names: OptionNames = PYTHON_OPTIONS,
) -> tuple[JointTokenizer, list[int]]:
    """Return the tokenizer and the stop ids of a model folder, after checking that they and the config belong together.

    direction: of the model, for a folder that records none. eod_id, option_names: see `LanguageModel.from_pretrained`.
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
        remedy = "remove it" if trained_here else f"remove it, or pass {option_names.reverse} if this is a reverse model"
        raise UsageError(
            f"eod_id={eod_id} was passed, but {folder} counts as a {direction} model, which records its own eod; {remedy}"
        )
    _check_ids(folder, config, tokenizer, stop_ids)
    return tokenizer, stop_ids


def load_stock_model(folder: str | Path, **options: Any) -> Any:
    """Load a folder of safetensors offline, without running code of the folder; options: those of `from_pretrained`.

    Raises DataError if transformers fails, MismatchError if not all weights of the model come from the folder.
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
            f"{folder} does not load whole in stock transformers: {'; '.join(problems)}. Its config.json and its weights do not belong"
            " together, or files were changed; copy or save the folder again"
        )
    return model


def check_model_type(folder: Path, config: dict[str, Any]) -> None:
    """Check that model_type in config.json is a causal language model of the installed transformers.

    Raises DataError if it is not a name, MismatchError if it is another kind of model.
    """
    model_type = config.get("model_type")
    where = f"{folder}/config.json has model_type {model_type!r}"
    if not isinstance(model_type, str):
        raise DataError(f"{where}, expected the name of an architecture, such as llama; correct it, or write the folder again")
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if model_type in CONFIG_MAPPING_NAMES:
        raise MismatchError(f"{where}, which is not a causal language model; give the folder of one, such as a llama")
    code = "; the folder's own code is never run" if config.get("auto_map") else ""
    raise MismatchError(
        f"{where}, which stock transformers {transformers.__version__} does not support{code}; give a folder of a stock architecture"
    )


def check_no_adapter(folder: str | Path) -> None:
    """Raise MismatchError for a folder with an adapter, which stock transformers applies on some machines only."""
    if (Path(folder) / ADAPTER).is_file():
        raise MismatchError(
            f"{folder} contains an adapter ({ADAPTER}), which stock transformers adds to the weights only if peft is installed;"
            " merge it into a new folder (merge_and_unload, then save_pretrained), or remove it"
        )


def folder_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that identify the model of a folder: size and time of change of the weights, hashes of the small files."""
    weights = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.glob("*.safetensors"))}
    hashes = {name: sha256_of(folder / name) for name in SMALL_FILES if (folder / name).is_file()}
    found = hashes.pop("config.json", None)
    return {"model": str(folder.resolve()), "weights": weights, "config_sha256": found, "files": hashes}


def check_unchanged(folder: Path, known: dict[str, Any]) -> None:
    """Raise DataError if a folder differs from `known`, the `folder_facts` from before the model was loaded.

    The facts, the tokenizer and the weights are read one after another; files that are replaced meanwhile would not be one model.
    """
    now, before = (
        {"config.json": facts["config_sha256"], **facts["files"], **facts["weights"]} for facts in (folder_facts(folder), known)
    )
    names = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
    if names:
        raise DataError(
            f"the model folder {folder} was changed while it was read ({', '.join(names)}); wait until it is complete, then run the"
            " same command again"
        )


def surroundings() -> dict[str, str]:
    """Return the device, which decides the precision, and the versions of the packages that compute."""
    versions = {name: version(name) for name in ("megatron-ledom", "torch", "transformers")}
    return {"device": "cuda" if torch.cuda.is_available() else "cpu", **versions}


def first_words(error: Exception) -> str:
    """Return the type of an error and its first line, and the next line if the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); write the folder again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is a {type(content).__name__}, expected an object; write the folder again")
    return content


def _stop_ids(folder: Path, config: dict[str, Any]) -> list[int]:
    """Return the ids that end a text: `eod_id` of an export, else the generation eos of a stock folder.

    The tokenizer's own eos would be wrong for an export whose documents end with another token: generation would never stop.
    """
    generation = _read_json(path) if (path := folder / "generation_config.json").is_file() else {}
    found = (
        ("config.json has eod_id", config.get("eod_id")),
        ("generation_config.json has eos_token_id", generation.get("eos_token_id")),
        ("config.json has eos_token_id", config.get("eos_token_id")),
    )
    where, eos = next(((where, ids) for where, ids in found if ids is not None), ("", None))
    if eos is None:
        raise DataError(
            f"{folder} records no eod_id or eos_token_id, so generation would never stop; add eod_id to config.json"
        )
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(id_) is int and id_ >= 0 for id_ in ids):
        raise DataError(f"{folder}/{where} {eos!r}, expected the id of a token or a list of ids; correct it")
    return list(ids)


def _eod_of_foreign_folder(
    folder: Path, tokenizer: JointTokenizer, stop_ids: list[int], eod_id: int | None, option_names: OptionNames
) -> int:
    """Return the eod of a reverse model that others exported: `eod_id` if passed, else the folder's eos.

    Raises MismatchError if the tokenizer has other tokens that may be the eod. The published LEDOM folder records the
    tokenizer's eos, 2, but was trained with the token 64002 as eod; with 2 its generation would never stop.
    """
    doubtful = other_ends(tokenizer.vocab, stop_ids)
    if eod_id is None and doubtful:
        names = ", ".join(f"{token} = {id_}" for token, id_ in doubtful.items())
        raise MismatchError(
            f"{folder} records the eos {stop_ids}, but its tokenizer also has {names}. With the wrong one, generation never stops;"
            f" pass the one that ended documents in training ({option_names.eod})"
        )
    if eod_id is None:
        logger.warning(
            "%s does not record which id ended its documents in training; its eos %d is used. Pass another one with %s",
            *(folder, stop_ids[0], option_names.eod),
        )
    return stop_ids[0] if eod_id is None else eod_id


def _check_tokenizer(folder: Path, files: TokenizerFiles, recorded: Any) -> None:
    """Raise MismatchError if the tokenizer of an export is not the one of its training."""
    if recorded is not None and not isinstance(recorded, str):
        raise DataError(f"{folder}/config.json has tokenizer_sha256 {recorded!r}, expected a hash; write the folder again")
    if recorded is not None and files.sha256 != recorded:
        raise MismatchError(
            f"the tokenizer of {folder} has hash {files.sha256[:12]}, the model was trained with {recorded[:12]}, so the ids would"
            " mean other texts; put back the tokenizer files of the export"
        )


def _check_ids(folder: Path, config: dict[str, Any], tokenizer: JointTokenizer, stop_ids: list[int]) -> None:
    """Raise MismatchError if the tokenizer has ids that the embedding does not have."""
    vocab_size = config.get("vocab_size", 0)
    if type(vocab_size) is not int:
        raise DataError(f"{folder}/config.json has vocab_size {vocab_size!r}, expected a number of ids; correct it")
    largest = max([*tokenizer.vocab.values(), *stop_ids])
    if largest >= vocab_size:
        raise MismatchError(
            f"the tokenizer of {folder} and its eod use ids up to {largest}, the model has {vocab_size} ids; export again with the"
            " tokenizer of the shards"
        )


@contextlib.contextmanager
def _bar_on_terminals_only() -> Iterator[None]:
    """Show the progress bar of transformers, for loading weights, only on a terminal, not in log files."""
    if sys.stderr.isatty() or not is_progress_bar_enabled():
        yield
        return
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()


def _loading_problems(report: dict[str, Any]) -> Iterator[str]:
    """Yield each kind of problem in transformers' report, which ignores the names that an architecture declares harmless."""
    for kind, found in report.items():
        names = sorted(_named(key) for key in found)
        if names:
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            yield f"{KINDS.get(kind, kind)}: {', '.join(names[:MAX_NAMED])}{more}"


def _named(key: Any) -> str:
    """Return the text of a key of the report; a mismatched key has both shapes."""
    if isinstance(key, str):
        return key
    name, stored, expected = key
    return f"{name} {list(stored)}, expected {list(expected)}"


def _tie_problems(model: Any) -> Iterator[str]:
    """Yield a problem if the config ties the head to the embedding, but the loaded head is another tensor."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = model.config.get_text_config().tie_word_embeddings and getattr(model, "_tied_weights_keys", None)
    if is_tied and head is not None and head.weight is not embedding.weight:
        yield (
            "tie_word_embeddings is true, a tied head, but the head (lm_head.weight) is not the embedding; some releases of"
            " transformers tie it, others do not"
        )


def _order_problems(model: Any) -> Iterator[str]:
    """Yield a problem for an encoder such as BERT, in which each position also reads the later positions."""
    reads_all = any(getattr(module, "is_causal", None) is False for module in model.modules())
    if getattr(model.config, "is_decoder", None) is False and reads_all:
        yield f"a {model.config.model_type} without is_decoder reads in both directions, so it is not a causal language model"
