"""AdamW, norm and clipping by the multi-tensor kernels, with the interface that megatron-core expects of apex."""

from collections.abc import Callable
from typing import Any

import torch

from megatron_ledom.ops.library import backend
from megatron_ledom.ops.multi_tensor import ChunkTables, Tensors, are_alike
from megatron_ledom.platform.adam import GroupStepAdam
from megatron_ledom.platform.core_fixes import norm_of_all, scale_all, use_optimizer_kernels


def _not_empty(tensors: Tensors) -> list[torch.Tensor]:
    """Return the tensors that have elements; the others have no address."""
    return [t for t in tensors if t.numel()]


class FusedAdam(GroupStepAdam):
    """GroupStepAdam with one launch for all parameters of a group and type; state and update are the same.

    A 16-bit parameter has fp32 moments and its fp32 value `master_param`; the parameter is the rounded copy. `load_state_dict` also
    accepts the state of torch.optim.AdamW.
    """

    def __init__(self, params: Any, lr: float = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr, **settings)
        self.tables = ChunkTables()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient once. Raises TypeError for gradients that the kernels do not support."""
        for index, group in enumerate(self.param_groups):
            group["step"] = group.get("step", 0) + 1
            by_types: dict[tuple[torch.dtype, torch.dtype], list[torch.Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_types.setdefault((p.dtype, p.grad.dtype), []).append(p)
            for types, params in by_types.items():
                self._update((index, *types), group, params)

    def _update(self, use: tuple[object, ...], group: dict[str, Any], params: list[torch.Tensor]) -> None:
        of_all = {p: self._state_of(p) for p in params}
        params = _not_empty(params)
        if not params:
            return
        states = [of_all[p] for p in params]
        gradients = [p.grad for p in params if p.grad is not None]
        exp_avgs, exp_avg_sqs = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        is_fp32 = params[0].dtype == torch.float32
        masters = params if is_fp32 else [state["master_param"] for state in states]
        if not are_alike(gradients, exp_avgs, exp_avg_sqs, masters, params):
            raise TypeError(
                f"found parameters of {params[0].dtype} with gradients of {gradients[0].dtype}, or not contiguous; expected contiguous"
                " tensors on one device, fp32 or one 16-bit type"
            )
        table = self.tables.table(use, gradients, exp_avgs, exp_avg_sqs, masters, params)
        beta1, beta2 = group["betas"]
        corrections = [1 - beta ** group["step"] if group["bias_correction"] else 1.0 for beta in (beta1, beta2)]
        scalars = [float(x) for x in (group["lr"], beta1, beta2, group["eps"], group["weight_decay"], *corrections)]
        weights = [] if is_fp32 else params
        torch.ops.ledom.multi_tensor_adamw(
            table, gradients, exp_avgs, exp_avg_sqs, masters, weights, *scalars, bool(self.adam_w_mode)
        )

    def _state_of(self, p: torch.Tensor) -> dict[str, Any]:
        """Return the state of a parameter, made at its first step."""
        state: dict[str, Any] = self.state[p]
        if "exp_avg" not in state:
            state.update({name: torch.zeros_like(p, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")})
        if p.dtype != torch.float32 and "master_param" not in state:
            state["master_param"] = p.detach().float()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, also of torch.optim.AdamW, which keeps `step` with the parameters. Moments stay fp32."""
        super().load_state_dict(state_dict)
        given = [state_dict["state"].get(key, {}) for group in state_dict["param_groups"] for key in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for p, state in zip(own, given, strict=True):
            for name in {"exp_avg", "exp_avg_sq", "master_param"} & state.keys():
                self.state[p][name] = state[name].to(device=p.device, dtype=torch.float32, copy=True)
        for group in self.param_groups:
            steps = {int(self.state[p].pop("step")) for p in group["params"] if "step" in self.state.get(p, {})}
            if len(steps) > 1:
                raise ValueError(f"found parameters at steps {sorted(steps)} in one group, expected one step for all")
            if steps:
                group["step"] = steps.pop()
            group.setdefault("bias_correction", True)


class MultiTensorKernels:
    """Norm and scaling with apex's arguments; torch computes lists that the kernels do not support."""

    def __init__(self) -> None:
        self.tables = ChunkTables()

    def norm(
        self, chunk_size: int, noop_flag: torch.Tensor, lists: list[Tensors], per_tensor: bool
    ) -> tuple[torch.Tensor, None]:
        """Return the norm of all tensors [1], and None in place of the norm of each."""
        tensors = _not_empty(lists[0])
        if not are_alike(tensors):
            return norm_of_all(chunk_size, noop_flag, [list(each) for each in lists], per_tensor)
        return torch.ops.ledom.multi_tensor_norm(self.tables.table("norm", tensors), tensors), None

    def scale(self, chunk_size: int, noop_flag: torch.Tensor, lists: list[Tensors], scale: float) -> None:
        """Set the second list to the first times `scale`."""
        sources, targets = (_not_empty(each) for each in lists)
        if not are_alike(sources, targets):
            scale_all(chunk_size, noop_flag, [list(sources), list(targets)], scale)
            return
        torch.ops.ledom.multi_tensor_scale(
            self.tables.table("scale", sources, targets), list(sources), list(targets), float(scale)
        )


def use_fused_adam(device_type: str) -> str:
    """Give megatron-core these kernels if it has neither Transformer Engine's nor apex's. Returns the kernels in use, for the log."""
    kernels_of_cuda = backend("cuda")
    if device_type == "cuda" and kernels_of_cuda.usable:
        kernels = MultiTensorKernels()
        return use_optimizer_kernels(FusedAdam, kernels.norm, kernels.scale)
    return use_optimizer_kernels(None, None, None)
