"""Fine-tune a reverse model on texts with LoRA, with transformers' Trainer and PEFT, on one GPU or a CPU.

Writes OUTPUT/adapter (the LoRA weights) and OUTPUT/model (the merged model, which ReverseLM and `ledom` commands load). The extra
`finetune` brings PEFT.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_ledom.errors import DataError, UsageError, run_command


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a reverse model")
    parser.add_argument(
        "--eod-id", type=int, metavar="ID", help="eod of a published model whose config.json records no direction"
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="JSON lines, one document each")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="key of the text (default %(default)s)")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="new folder for the adapter and the merged model"
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA matrices (default %(default)s)")
    parser.add_argument("--alpha", type=float, default=32, help="the update is scaled by alpha / rank (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="highest learning rate (default %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the documents (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="documents in a batch (default %(default)s)")
    parser.add_argument(
        "--max-length", type=int, help="longest document in tokens; of a longer one its end stays (default: all positions)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the order and of the LoRA weights (default %(default)s)")
    return parser


def read_texts(path: str, key: str) -> list[str]:
    """Return the texts of a file of JSON lines. Raises DataError with the line."""
    texts = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}:{number} is not JSON ({error}); repair it") from error
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                raise DataError(f"{path}:{number} has no text under {key!r}; name the key with --text-key")
            texts.append(record[key])
    return texts


def finetune(options: argparse.Namespace) -> None:
    """Train the adapter, then save it and the merged model."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError("LoRA needs PEFT; pip install 'megatron-ledom[finetune]'") from error
    from transformers import Trainer, TrainingArguments, set_seed

    from megatron_ledom.finetune import DocumentCollator, encode_documents, save_finetuned
    from megatron_ledom.inference import ReverseLM

    for name in ("adapter", "model"):
        if (options.output / name).exists():
            raise UsageError(f"{options.output / name} exists already; name another --output")
    assumed: dict[str, Any] = {} if options.eod_id is None else {"direction": "reverse", "eod_id": options.eod_id}
    lm = ReverseLM.from_pretrained(options.model, **assumed)
    documents = encode_documents(lm, read_texts(options.input, options.text_key))
    if not documents:
        raise DataError(f"{options.input} contains no text with a token; name the key of the texts with --text-key")
    set_seed(options.seed)
    lora = LoraConfig(task_type="CAUSAL_LM", r=options.rank, lora_alpha=options.alpha, target_modules="all-linear")
    model = get_peft_model(lm.model, lora)
    arguments = TrainingArguments(
        output_dir=str(options.output / "trainer"),
        learning_rate=options.learning_rate,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # a fraction of all steps
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )
    Trainer(model, arguments, DocumentCollator.of(lm, options.max_length), documents).train()
    model.save_pretrained(options.output / "adapter")
    save_finetuned(lm, model, options.model, options.output / "model")


if __name__ == "__main__":
    run_command(lambda: finetune(build_parser().parse_args()))
