"""Check the settings with which megatron-core's modules of multi-token prediction are trained, and refuse the others.

The rule is as in `checks.py`, which runs it: one sentence per problem.
"""

from collections.abc import Iterator

from megatron_ledom.config.schema import RunConfig

KEY = "model.mtp_num_layers"


def multi_token(config: RunConfig) -> Iterator[str]:
    """Check that the modules are trained only with settings whose result was compared with that of one process."""
    model = config.model
    if model.mtp_num_layers is None:
        if model.mtp_loss_scaling_factor is not None:
            yield f"model.mtp_loss_scaling_factor={model.mtp_loss_scaling_factor} has no effect without {KEY}; remove it, or set {KEY}"
        return
    for key, reason in _refused(config):
        yield f"{key} cannot be used with {KEY}={model.mtp_num_layers}: {reason}; remove one of them"


def _refused(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield each setting that is refused, and the reason."""
    model, parallel, train = config.model, config.parallel, config.train
    if train.z_loss_coeff:
        yield f"train.z_loss_coeff={train.z_loss_coeff}", "megatron-core masks the losses of the modules itself, without log Z"
    if parallel.context_parallel_size > 1:
        cut = f"parallel.context_parallel_size={parallel.context_parallel_size}"
        yield cut, "megatron-core weights the losses of the modules by the tokens of one rank, not of the whole sequence"
    if parallel.pipeline_model_parallel_size > 1 and model.share_embeddings_and_output_weights:
        reason = "megatron-core cannot save that matrix beside the modules on the last pipeline stage"
        yield "model.share_embeddings_and_output_weights=true with pipeline stages", reason
    if parallel.recompute_granularity == "full" and (parallel.recompute_method, parallel.recompute_num_layers) != (
        "uniform",
        1,
    ):
        yield (
            "parallel.recompute_granularity=full",
            "the modules are recomputed only with recompute_method=uniform in groups of one layer",
        )
    if config.optimizer.optimizer == "muon":
        yield "optimizer.optimizer=muon", "the matrices of the modules were not tried with it"
    if model.fp8 is not None:
        yield f"model.fp8={model.fp8}", "the modules were not tried in fp8"
    if parallel.tp_comm_overlap:
        yield "parallel.tp_comm_overlap=true", "there are no user buffers for the projection of the modules"
