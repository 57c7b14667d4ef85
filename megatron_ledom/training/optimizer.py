"""Build megatron-core's optimizer and learning-rate schedule from the config."""

import dataclasses
import logging
from typing import Any

from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ledom.config.derived import lr_decay_iters
from megatron_ledom.config.schema import OptimizerSettings, RunConfig
from megatron_ledom.model.dtypes import PARAMS_DTYPES
from megatron_ledom.ops.fused_adam import use_fused_adam
from megatron_ledom.parallel.groups import ParallelGroups

log = logging.getLogger(__name__)


MUON_KEYS = tuple(field.name for field in dataclasses.fields(OptimizerSettings) if field.name.startswith("muon_"))
"""Settings of Muon, spelled as in megatron-core's OptimizerConfig."""


def build_optimizer(config: RunConfig, model: list[Any], groups: ParallelGroups) -> Any:
    """Build AdamW or Muon over fp32 main weights, and connect the model's gradient reduction. Norms and biases have no weight decay.

    Muon has the matrices of the layers, AdamW all other weights: two optimizers that megatron-core chains. With the distributed optimizer
    each data-parallel rank updates some of the matrices (layer-wise), and its part of the other weights.
    """
    settings, parallel = config.optimizer, config.parallel
    is_muon = settings.optimizer == "muon"
    of_muon: dict[str, Any] = {}  # 0.16 has not all of them
    if is_muon:
        of_muon = {key: getattr(settings, key) for key in MUON_KEYS}
        of_muon["use_layer_wise_distributed_optimizer"] = parallel.use_distributed_optimizer
        of_muon["overlap_param_gather"] = parallel.overlap_param_gather
    adam = use_fused_adam(next(model[0].parameters()).device.type)
    log.info("optimizer: %s%s", "Muon for the matrices of the layers, " if is_muon else "", adam)
    optimizer_config = OptimizerConfig(
        optimizer=settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=config.model.params_dtype == "bf16",
        params_dtype=PARAMS_DTYPES[config.model.params_dtype],
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        **of_muon,
    )
    optimizer = get_megatron_optimizer(optimizer_config, model, use_gloo_process_groups=False, pg_collection=groups.collection)
    _connect_gradient_reduction(config, model, optimizer)
    return optimizer


def _connect_gradient_reduction(config: RunConfig, model: list[Any], optimizer: Any) -> None:
    """Set the functions by which megatron-core's schedules reduce gradients and gather parameters, overlapped if configured."""
    parallel, core_config = config.parallel, model[0].config

    def each_or_one(functions: list[Any]) -> Any:
        return functions if len(functions) > 1 else functions[0]

    core_config.grad_scale_func = optimizer.scale_loss
    core_config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        core_config.no_sync_func = each_or_one([chunk.no_sync for chunk in model])
        if parallel.pipeline_model_parallel_size > 1:
            core_config.grad_sync_func = each_or_one([chunk.start_grad_sync for chunk in model])
    if parallel.overlap_param_gather:
        core_config.param_sync_func = each_or_one([chunk.start_param_sync for chunk in model])


def build_scheduler(config: RunConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Build the schedule: linear warm-up, then decay. It counts iterations, so a new batch size on resume does not shift it."""
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=lr_decay_iters(config),
        lr_decay_style=settings.lr_decay_style,
        wsd_decay_steps=settings.lr_wsd_decay_iters,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=config.train.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # the config decides; only the position comes from the checkpoint
    )
