"""The Adam of megatron-core without Transformer Engine: that of NVIDIA's apex if installed, otherwise torch's fused Adam."""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Apex:
    """Result of the search for apex: True if megatron-core may use its kernels, and a line for the log."""

    usable: bool
    state: str


def find_apex() -> Apex:
    """Look for apex without importing it. The package apex on PyPI is a web framework and never usable."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return Apex(False, "apex not installed")
    where = found.origin or ", ".join(found.submodule_search_locations or [])
    if importlib.util.find_spec("amp_C") is None:  # the module with NVIDIA's kernels
        return Apex(False, f"apex at {where} ignored: it is not NVIDIA's, or was built without its CUDA kernels")
    return Apex(True, "apex of NVIDIA installed")


class GroupStepAdam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, arXiv 1412.6980) with decoupled decay (Loshchilov and Hutter, arXiv 1711.05101).

    State: `exp_avg` and `exp_avg_sq` for each parameter, `step` for each parameter group. megatron-core's own fallback, torch's
    AdamW, keeps `step` with the parameters; the distributed optimizer saves that state but cannot load it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **unused: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient once."""
        update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            steps = [torch.tensor(float(group["step"]), device=p.device) for p in params]
            update(
                params,
                [p.grad for p in params],  # type: ignore[misc]
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
