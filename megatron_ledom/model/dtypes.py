"""The types of weights."""

import torch

PARAMS_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Values of `model.params_dtype`, with torch's types."""
