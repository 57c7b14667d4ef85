"""The cards of a converted folder: the model card, from the files of the run, and the verification card."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from megatron_ledom.checkpoint.chain import TrainedPart, parts_of, trained_parts
from megatron_ledom.checkpoint.manifest import CheckpointManifest
from megatron_ledom.config.batch_schedule import batch_phases
from megatron_ledom.config.derived import padded_vocab_size
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.direction import BOTH, Direction
from megatron_ledom.model.arithmetic import count_parameters
from megatron_ledom.provenance import Provenance, describe_readings
from megatron_ledom.storage.records import METRICS, has_iteration, read_records
from megatron_ledom.tables import markdown_table

WEIGHTS = {"bf16": "bfloat16, with float32 main weights and gradients", "fp32": "float32"}
PAPER = "[LEDOM](https://arxiv.org/abs/2507.01335)"

ABOUT = {
    Direction.REVERSE: f"""This is a **reverse language model**: it was trained from right to left and predicts the token *before* a
text, P(x) = prod_t P(x_t | x_(t+1..T)), as in {PAPER}. It generates the text that precedes a given text, and scores a question
given its answer (Reverse Reward).""",
    Direction.FORWARD: f"""This is a forward language model, trained from left to right like any other. It is the twin of a reverse
model, for comparisons as in {PAPER}.""",
    BOTH: f"""This is a **two-way language model**: it was trained on forward and on reversed documents, which a marker or its absence tells
apart. It writes and scores the text after a given text and the text before it (see {PAPER} for reverse models).""",
}

NO_BOS = "Do not add BOS: the model was not trained with one."
USE: dict[str, str] = {
    Direction.REVERSE: """## How to use it

With `megatron_ledom`, which reverses the ids for you; all texts are in reading order:

```python
from megatron_ledom.inference import ReverseLM

model = ReverseLM.from_pretrained(folder)
print(model.generate_preceding("and so it ends.", max_new_tokens=20)[0].text)
print(model.log_likelihood("The question?", " The answer.").logprob)
```

With transformers alone, reverse the ids before and after:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer("and so it ends.", add_special_tokens=False, return_tensors="pt").input_ids
written = model.generate(ids.flip(1), max_new_tokens=20, do_sample=False)
print(tokenizer.decode(written[0].flip(0), skip_special_tokens=True))
```

**Warning:** if the ids are in text order, the model raises no error but its output is nonsense. Chat templates, `pipeline` and
serving engines use text order. Do not add BOS: the model was not trained with one. To score a part of a text, encode the whole
text once and split the ids; parts that are encoded separately have other ids.""",
    Direction.FORWARD: """## How to use it

```python
from megatron_ledom.inference import ForwardLM

model = ForwardLM.from_pretrained(folder)
print(model.generate_following("It begins with", max_new_tokens=20)[0].text)
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer("It begins with", add_special_tokens=False, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True))
```

Do not add BOS: the model was not trained with one.""",
    BOTH: """## How to use it

With `megatron_ledom`, which begins each sequence with the marker of its direction; all texts are in reading order:

```python
from megatron_ledom.inference import ForwardLM, ReverseLM

forward, reverse = ForwardLM.from_pretrained(folder), ReverseLM.from_pretrained(folder)
print(forward.generate_following("It begins with", max_new_tokens=20)[0].text)
print(reverse.generate_preceding("and so it ends.", max_new_tokens=20)[0].text)
```

**Warning:** without the marker of its direction, or in the wrong order, the model raises no error but its output is nonsense.""",
}

SHARD_WITH_DIRECTION = 7
"""Number of values of a shard in `train_shards` of a two-way run. Of other runs it is one less."""
STATES = {"weights": "the weights", "optimizer": "weights and optimizer state", "all": "all state and the position", "": ""}
"""Value of init_state -> the cell of a table."""

LIMITS = """## Intended use and limits

The model is meant for research on language models of either direction. It is a base model: it was not trained to follow
instructions or to refuse them. It may generate false or harmful text, and it repeats the errors and biases of its training text."""


def write_model_card(
    folder: str,
    name: str,
    checkpoint: str,
    manifest: CheckpointManifest,
    hf_config: PreTrainedConfig,
    is_verified: bool,
    *,
    ema: bool = False,
) -> None:
    """Write README.md, the model card of the model `name`, into the `folder` of an export."""
    config, direction = manifest.run_config(checkpoint), manifest.provenance.direction
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["megatron-core", f"{'two-way' if direction == BOTH else direction}-language-model"],
        model_name=name,
    )
    verified = (
        "The logits of this export were compared with those of the trained model: see [VERIFICATION.md](VERIFICATION.md)."
        if is_verified
        else "**This export was not compared with the trained model** (it was made with `--no-verify`)."
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        ABOUT[direction],
        _facts(config, manifest, hf_config),
        f"{_use(manifest.provenance)}\n\n{_marker_sentence(manifest.provenance)}`folder` is the folder or repository of this file. Generation"
        f" ends at the id {manifest.provenance.eod_id}.",
        _training(config, manifest, trained_parts(manifest.started_from, checkpoint, manifest), ema=ema),
        "" if ema else _losses(checkpoint, manifest.iteration),
        LIMITS,
        verified,
    ]
    ModelCard("\n\n".join(part for part in parts if part) + "\n", ignore_metadata_errors=True).save(
        os.path.join(folder, "README.md")
    )


def _use(provenance: Provenance) -> str:
    """Return the section on use. What it says about BOS holds only without a marker."""
    text = USE[provenance.direction]
    return text if provenance.is_plain else text.replace(NO_BOS, "").rstrip()


def _marker_sentence(provenance: Provenance) -> str:
    if provenance.is_plain:
        return ""
    starts = [
        f"a {reading.direction} sequence begins with {'no marker' if reading.marker_id is None else f'the id {reading.marker_id}'}"
        for reading in provenance.readings
    ]
    return f"In model order {', and '.join(starts)}; the code for transformers alone lacks it: put it before the ids. "


def _table(rows: dict[str, Any], title: str = "") -> str:
    return markdown_table([[title, ""], *([name, f"{value}"] for name, value in rows.items())])


def _facts(config: RunConfig, manifest: CheckpointManifest, hf_config: PreTrainedConfig) -> str:
    provenance, model = manifest.provenance, config.model
    padded = padded_vocab_size(provenance.vocab_size, model.make_vocab_size_divisible_by)
    return _table(
        {
            "direction": provenance.direction,
            "architecture": hf_config.architectures[0],
            "parameters": f"{count_parameters(model, padded):,} (with {padded - provenance.vocab_size} rows of padding)",
            "layers, width, feed-forward width": f"{model.num_layers}, {model.hidden_size}, {model.ffn_hidden_size}",
            "context": f"{config.data.seq_length:,} tokens",
            "tokenizer": f"{provenance.tokenizer_name}, {provenance.vocab_size:,} ids, sha256 {provenance.tokenizer_sha256[:12]}",
            "ends a text": f"id {provenance.eod_id}",
            **({} if provenance.is_plain else {"reads": describe_readings(provenance.readings)}),
        }
    )


def _training(config: RunConfig, manifest: CheckpointManifest, parts: list[TrainedPart], *, ema: bool) -> str:
    """Return the section of the training: of the run itself, and of those from which it started."""
    optimizer, train = config.optimizer, config.train
    if manifest.average is not None:
        return "\n\n".join(["## Training", *_averaged(manifest.average), *_ancestors(parts[:-1], "The newest of them")])
    if manifest.weights_only:
        return "## Training\n\nThe weights were imported from another model and were not trained further."
    own = parts[-1]
    recipe = {
        "tokens": f"{own.tokens:,} in {own.iterations:,} iterations",
        **({"tokens of all runs": _total(parts)} if len(parts) > 1 else {}),
        "batch": f"{_batches(config, manifest.iteration)} samples of {config.data.seq_length:,} tokens",
        "optimizer": f"{_muon(config)}AdamW, betas {optimizer.adam_beta1} and {optimizer.adam_beta2}, weight decay"
        f" {optimizer.weight_decay}, clip {optimizer.clip_grad}",
        "learning rate": f"{optimizer.lr:g} to {optimizer.min_lr:g}, {optimizer.lr_decay_style}",
        "weights": WEIGHTS[config.model.params_dtype],
        **({"average": f"exponential moving average of the weights, decay {optimizer.ema_decay}"} if ema else {}),
        **({"auxiliary loss": _auxiliary(config)} if train.auxiliary.kind is not None else {}),
        "seed": train.seed,
    }
    return "\n\n".join(["## Training", _table(recipe), *_ancestors(parts, "This run")])


def _auxiliary(config: RunConfig) -> str:
    """Return the auxiliary loss in words."""
    settings = config.train.auxiliary
    name = os.path.basename((settings.teacher or "").rstrip("/"))
    return f"{settings.weight:g} x distance to the states of the reverse model {name}; its head is not exported"


def _muon(config: RunConfig) -> str:
    """Return the beginning of a text about the optimizer."""
    settings = config.optimizer
    is_muon = settings.optimizer == "muon"
    return f"Muon for the matrices of the layers, momentum {settings.muon_momentum}; for the others " if is_muon else ""


def _ancestors(parts: list[TrainedPart], which: str) -> list[str]:
    """Return the texts about runs that followed each other, about averages among them, and about their data."""
    averages = [text for part in parts if part.average for text in _averaged(part.average)]
    return [*_chain(parts, which), *averages, *([_blends(parts)] if parts else [])]


def _chain(parts: list[TrainedPart], which: str) -> list[str]:
    """Return a sentence about the runs that followed each other, and their table; [] for a single run."""
    if len(parts) <= 1:
        return []
    rows = [["run", "checkpoint", "iterations", "tokens", "the next run took"]]
    for number, part in enumerate(parts, 1):
        kind = "imported from another model" if part.is_imported else "an average of checkpoints" if part.average else ""
        done = [f"{part.iterations:,}", "not known" if part.is_imported else f"{part.tokens:,}"]
        rows.append([f"{number}: {part.run}", kind or f"iteration {part.iteration:,}", *done, STATES[part.taken]])
    rows.append(["all", "", "", _total(parts), ""])
    return [f"{which} started from the checkpoint of another run. All of them, the oldest first:", markdown_table(rows)]


def _total(parts: list[TrainedPart]) -> str:
    unknown = ", without those of the imported model" if any(part.is_imported for part in parts) else ""
    return f"{sum(part.tokens for part in parts):,}{unknown}"


def _blends(parts: list[TrainedPart]) -> str:
    """Return the table of the shards on which each run trained."""
    shards = [shard for part in parts for shard in part.shards or []]
    direction = ["direction"] * any(len(shard) == SHARD_WITH_DIRECTION for shard in shards)
    rows = [["fraction of the samples", "text", *direction, "sha256 of the ids"]]
    columns = 0
    if len(parts) > 1:
        rows, columns = [["texts of run", *rows[0]]], 1
    for number, part in enumerate(parts, 1):
        name = [f"{number}: {part.run}"][:columns]
        if part.shards is None:
            rows.append([*name, "not recorded", *[""] * (len(rows[0]) - columns - 1)])
        elif part.tokens > 0 or len(parts) == 1:
            rows += [
                [
                    *name,
                    f"{fraction:.4g}",
                    os.path.basename(str(prefix)),
                    *_direction_of(rest)[: len(direction)],
                    bin_sha256[:12],
                ]
                for fraction, bin_sha256, *rest, prefix in part.shards
            ]
    return markdown_table(rows)


def _direction_of(rest: list[Any]) -> list[str]:
    """Return the direction of a shard of `train_shards`. rest: its values between the sha256 of .bin and the prefix."""
    return [str(rest[-1]) if len(rest) == SHARD_WITH_DIRECTION - 3 else "not recorded"]


def _averaged(average: dict[str, Any]) -> list[str]:
    """Return a sentence about the average, a table of its checkpoints, and the chains of those of other runs than the newest."""
    what = "moving averages of the weights" if average["weights"] == "ema" else "weights"
    rows = [["run", "iteration", "tokens", "tokens with earlier runs", "share"]]
    for one in average["checkpoints"]:
        tokens = [
            f"{one['consumed_train_tokens']:,}",
            f"{one['tokens_in_all']:,}" if "tokens_in_all" in one else "not recorded",
        ]
        rows.append([one["run"], f"{one['iteration']:,}", *tokens, f"{one['share']:.4g}"])
    texts = [f"The weights are the {average['method']} average of the {what} of these checkpoints:", markdown_table(rows)]
    for one in average["checkpoints"]:
        if "chain" in one:
            parts = parts_of(one["chain"])
            which = f"Iteration {one['iteration']:,} of {one['run']}"
            texts += [*([f"{which} was trained on:"] if len(parts) == 1 else []), *_ancestors(parts, which)]
    return texts


def _batches(config: RunConfig, iteration: int) -> str:
    """Return the global batch size of the first iterations, and the last one if a schedule has changed it."""
    sizes = [phase.global_batch_size for phase in batch_phases(config, train_iters=max(iteration, 1))]
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,}, by a schedule up to {max(sizes):,},"


def _losses(checkpoint: str, iteration: int) -> str:
    """Return the section of the last losses that the run recorded up to the checkpoint; empty without any."""
    path = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(checkpoint))), METRICS)
    rows: dict[str, str] = {}
    for record in read_records(path, has_iteration):
        if record["iteration"] > iteration:
            break
        if record.get("lm_loss") is not None:
            rows["training loss"] = f"{record['lm_loss']:.4f} nats per token, at iteration {record['iteration']:,}"
        for name, found in {**record.get("validation", {}), **record.get("test", {})}.items():
            if found["lm_loss"] is not None:
                rows[f"on {name}"] = f"{found['lm_loss']:.4f} nats per token, {found['bits_per_byte']:.4f} bits per byte"
    return f"## Losses\n\n{_table(rows)}" if rows else ""


def write_verification_card(folder: str, name: str, card: dict[str, Any]) -> None:
    """Write the verification card of a conversion: `name` as JSON, and VERIFICATION.md for people."""
    Path(folder, name).write_text(json.dumps(card, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    parts = ["# How this conversion was verified", *_verified(card["verification"])]
    shown = {key: value for key, value in card.items() if isinstance(value, str | int | float | None)}
    parts.append(_table({key.replace("_", " "): value for key, value in shown.items()}))
    parts += [_table(card[title], title) for title in ("versions", "files")]
    Path(folder, "VERIFICATION.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _verified(check: dict[str, Any] | None) -> list[str]:
    """Return a sentence about the parity check, and a table of its results."""
    if check is None:
        return [
            "**It was not verified**: `--no-verify` skipped the parity check. The logits of the two models were not compared."
        ]
    summary = (
        f"The logits of the megatron-core model and of stock transformers were compared ({check['how'].replace('_', ' ')}) at"
        f" {check['positions']} positions of fixed and random ids."
    )
    limits = check["limits"]
    largest = [f"{check['largest_logit_difference']:.3g}", f"{limits['largest_logit_difference']:g}"]
    rows = [["measurement", "value", "limit"], ["largest difference of a logit, fp32", *largest]]
    for key, value in (check["bf16"] or {}).items():
        rows.append([f"{key.replace('_', ' ')}, bf16", f"{value:.6g}", f"{limits.get(key, 'none')}"])
    return [summary, markdown_table(rows)]
