"""Muon in plain torch, written from its description, as a reference: Jordan et al. 2024, kellerjordan.github.io/posts/muon."""

import itertools
from typing import Any

import torch
from torch import nn

from megatron_ledom.config.schema import RunConfig
from tests.support.plain_llama import PlainLlama

COEFFICIENTS = {
    "simple": [(3.4445, -4.7750, 2.0315)],
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
}
"""a, b, c of each iteration, by their names in emerging-optimizers."""


class PlainMuon:
    """Muon for the matrices of a PlainLlama's layers and torch's fused AdamW for its other weights.

    As in megatron-core, gate and up projection are one matrix, and queries, keys and values are one matrix unless
    `optimizer.muon_split_qkv` is set.
    """

    def __init__(self, config: RunConfig, model: PlainLlama) -> None:
        self.settings = config.optimizer
        self.matrices = [matrix for layer in model.model["layers"] for matrix in self._matrices(layer)]
        in_muon = {id(weight) for matrix in self.matrices for weight in matrix}
        others = [weight for weight in model.parameters() if id(weight) not in in_muon]
        tables, vectors = ([weight for weight in others if weight.dim() == dim] for dim in (2, 1))
        decay, betas = self.settings.weight_decay, (self.settings.adam_beta1, self.settings.adam_beta2)
        groups = [{"params": tables, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=self.settings.adam_eps, fused=True)
        self.group: dict[str, Any] = {"params": [weight for matrix in self.matrices for weight in matrix], "lr": 1.0}
        self.momenta = [torch.zeros_like(torch.cat(matrix)) for matrix in self.matrices]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups of both optimizers; `lr` of each can be set."""
        return [self.group, *self.adam.param_groups]

    def _matrices(self, layer: nn.Module) -> list[list[nn.Parameter]]:
        """Return the matrices of a layer, each as the weights whose rows it has."""
        attention, mlp = layer.self_attn, layer.mlp
        heads = [projection.weight for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
        joint = [[weight] for weight in heads] if self.settings.muon_split_qkv else [heads]
        return [*joint, [attention.o_proj.weight], [mlp.gate_proj.weight, mlp.up_proj.weight], [mlp.down_proj.weight]]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight once."""
        self.adam.step()
        settings, lr = self.settings, self.group["lr"]
        for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
            gradient = torch.cat([weight.grad for weight in matrix])
            momentum.mul_(settings.muon_momentum).add_(gradient, alpha=1 - settings.muon_momentum)
            ahead = settings.muon_momentum * momentum + (1 - settings.muon_momentum) * gradient
            update = orthogonal(ahead if settings.muon_nesterov else momentum, self.iterations())
            update *= settings.muon_extra_scale_factor * max(update.shape) ** 0.5
            for weight, part in zip(matrix, update.split([len(weight) for weight in matrix]), strict=True):
                weight.mul_(1 - lr * settings.weight_decay).sub_(lr * part)

    def iterations(self) -> list[tuple[float, float, float]]:
        """Return the coefficients of each Newton-Schulz iteration."""
        endless = itertools.cycle(COEFFICIENTS[self.settings.muon_coefficient_type])
        return list(itertools.islice(endless, self.settings.muon_num_ns_steps))


def orthogonal(matrix: torch.Tensor, iterations: list[tuple[float, float, float]]) -> torch.Tensor:
    """Return a matrix of the same singular vectors whose singular values are near 1, in fp32."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp_min(1e-7)
    for a, b, c in iterations:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T.contiguous() if matrix.shape[0] > matrix.shape[1] else x
