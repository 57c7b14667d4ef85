"""Check the conversion of a trained run to Hugging Face and back. On GPUs: not yet run on hardware."""

import torch

from megatron_ledom.checkpoint.folder import find_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.convert.core_side import core_side
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.hf_import import import_hf
from megatron_ledom.convert.verify import MAX_LOGIT_DIFFERENCE, probe_ids
from megatron_ledom.hardware_check.check import Outcome, Setting, failed, passed
from megatron_ledom.hardware_check.resume import first_different_tensor, stored_tensors
from megatron_ledom.hardware_check.training_runs import CONFIG, VOCAB_SIZE, TrainingRuns, own_layers
from megatron_ledom.inference.model_folder import load_stock_model

RUN, FOLDER, AGAIN = "trained", "hugging_face", "imported"
OF_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Tensors with a row for each token; an export has no padding rows, and an import makes new ones."""


def check_conversion(setting: Setting) -> Outcome:
    """Train, export and import, each with the parity check of whole models; compare the tensors and the logits.

    The parity check computes transformers' logits on the CPU, so those of this device are compared here too.
    """
    runs = TrainingRuns(setting, [own_layers(setting.device), "train.train_iters=4"])
    runs.train({RUN: []})
    run_dir, folder, again = map(runs.run_dir, (RUN, FOLDER, AGAIN))
    export_hf(run_dir, folder, verify="whole")
    import_hf(folder, again, verify="whole")
    imported = weights_of(again)
    trained = {name: tensor for name, tensor in weights_of(run_dir).items() if name in imported}
    if problem := first_different_tensor(imported, trained):
        return failed(f"after export and import {problem}")
    difference = device_difference(run_dir, folder, setting.device)
    numbers = {"tensors": len(imported), "logit_difference": difference}
    if not difference <= MAX_LOGIT_DIFFERENCE:
        return failed(
            f"on {setting.device} the logits of transformers differ from megatron-core's by {difference:.1e} (tolerance"
            f" {MAX_LOGIT_DIFFERENCE:.0e} in fp32), although the parity check passed with transformers on the CPU",
            **numbers,
        )
    return passed(
        f"exported and imported: {len(imported)} tensors are bit-equal; logits of both models on {setting.device} differ by"
        f" {difference:.1e} (tolerance {MAX_LOGIT_DIFFERENCE:.0e})",
        **numbers,
    )


def weights_of(run_dir: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a run's last checkpoint by name, without the padding rows of the vocabulary."""
    tensors = stored_tensors(run_dir)
    return tensors | {name: tensors[name][:VOCAB_SIZE] for name in OF_VOCABULARY}


def device_difference(run_dir: str, folder: str, device: str) -> float:
    """Return the largest difference of the logits of a run and of its export, both computed on the device in fp32."""
    checkpoint = find_checkpoint(run_dir)
    manifest = load_manifest(checkpoint)
    vocab_size = manifest.provenance.vocab_size
    ids = probe_ids(vocab_size, CONFIG["data"]["seq_length"])
    with core_side(checkpoint, manifest) as core:
        ours = core.forward(ids)
    model = load_stock_model(folder, dtype=torch.float32).to(device).eval()
    with torch.no_grad():
        theirs = model(ids.to(device)).logits[..., :vocab_size].float().cpu()
    return float((ours - theirs).abs().max())
