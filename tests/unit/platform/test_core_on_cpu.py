"""The patches that let megatron-core run on a CPU change nothing else; each check has a process of its own."""

import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is patched where CUDA is available")


def test_meta_device_context_still_redirects_every_factory(python: Path) -> None:
    """transformers loads models in such a context; a real tensor there would become an unfilled buffer with garbage positions."""
    program = (
        "import torch\n"
        "from megatron_ledom.platform.device import prepare_platform\n"
        "prepare_platform(1)\n"
        "with torch.device('meta'):\n"
        "    made = [torch.arange(3), torch.zeros(3), torch.ones(3), torch.empty(3), torch.tensor([1.0]), torch.full((2,), 1.0)]\n"
        "print({tensor.device.type for tensor in made})\n"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'meta'}"
