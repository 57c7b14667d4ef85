"""The corrections of megatron-core that change speed and not results."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ledom.platform.core_fixes import norm_of_all, scale_all
from tests.support.paths import ROOT


class Launches(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += 1
        return function(*arguments, **(options or {}))


def launches(function: Any, *arguments: Any) -> int:
    """Return the number of operators that `function` runs."""
    with Launches() as found:
        function(*arguments)
    return found.count


@pytest.mark.parametrize("num_tensors", [20, 40])
def test_norm_and_clipping_launch_few_kernels(num_tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the correction "joined gradient tensors" the numbers grow with the tensors; the results are the same."""
    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, **options: make(data, **{**options, "device": "cpu"}))
    torch.manual_seed(0)
    gradients = [torch.randn(8, number + 1) for number in range(num_tensors)]
    stock = launches(local_multi_tensor_l2_norm, 0, None, [gradients], False)
    ours = launches(norm_of_all, 0, None, [gradients], False)
    assert ours < 10
    assert stock >= num_tensors
    torch.testing.assert_close(
        norm_of_all(0, make([0]), [gradients], False)[0], local_multi_tensor_l2_norm(0, None, [gradients], False)[0]
    )
    copies = [gradient.clone() for gradient in gradients]
    stock = launches(local_multi_tensor_scale, 0, None, [copies, copies], 0.5)
    ours = launches(scale_all, 0, None, [gradients, gradients], 0.5)
    assert ours < 10
    assert stock >= 2 * num_tensors
    assert all(torch.equal(one, other) for one, other in zip(gradients, copies, strict=True))


IN_USE = """
import sys
from megatron_ledom.platform import core_fixes
if len(sys.argv) > 1:
    del core_fixes.CORRECTIONS[sys.argv[1]]
core_fixes.install_core_fixes()
print(core_fixes.use_optimizer_kernels(None, None, None))
"""


@pytest.mark.parametrize(("without", "source"), [([], "torch"), (["joined gradient tensors"], "megatron")])
def test_the_optimizer_uses_joined_kernels(without: list[str], source: str, python: Path) -> None:
    """In a process of its own: tests of CUDA kernels replace the same functions."""
    done = subprocess.run([python, "-c", IN_USE, *without], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["adamw=torch", f"norm={source}", f"scale={source}"]
