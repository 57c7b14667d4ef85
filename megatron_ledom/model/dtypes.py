"""The types that weights may have."""

import torch

PARAMS_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""By `model.params_dtype`."""
