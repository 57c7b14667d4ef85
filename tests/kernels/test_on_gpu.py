"""The same cases on a GPU, if there is one, in a process of its own, because the other tests hide GPUs."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.build import nvcc, op_names
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="no NVIDIA GPU here: kernels not yet run on hardware"),
    pytest.mark.skipif(nvcc() is None, reason="no nvcc: install a CUDA toolkit, or set CUDA_HOME"),
]


@pytest.mark.parametrize("op", op_names())
def test_kernel_is_within_its_bound_on_a_gpu(op: str, environment_with_gpus: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tests.kernels.on_gpu", op]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment_with_gpus)
    assert done.returncode == 0, done.stdout + done.stderr
