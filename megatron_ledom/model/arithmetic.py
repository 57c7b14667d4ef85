"""Formulas for the parameters and floating-point operations of a model. Every reported MFU uses them."""

from collections.abc import Iterator
from typing import Literal

from megatron_ledom.config.derived import head_dim, query_groups
from megatron_ledom.config.schema import ModelConfig

Attention = Literal["full", "causal", "none"]
_VISIBLE_FRACTION = {"full": 1.0, "causal": 0.5, "none": 0.0}


def count_parameters(model: ModelConfig, padded_vocab: int) -> int:
    """Return the number of weights of the model, with the padded rows of embedding and output layer."""
    norms = (2 * model.num_layers + 1) * model.hidden_size
    width = head_dim(model)
    if model.qk_layernorm:
        norms += 2 * model.num_layers * width
    biases = model.num_layers * width * (model.num_attention_heads + 2 * query_groups(model)) if model.add_qkv_bias else 0
    embeddings = padded_vocab * model.hidden_size * (1 if model.share_embeddings_and_output_weights else 2)
    return model.num_layers * sum(_layer_matrices(model)) + norms + biases + embeddings


def flops_per_token(model: ModelConfig, seq_length: int, padded_vocab: int, attention: Attention = "full") -> float:
    """Return the floating-point operations of forward and backward for one token, in a sequence of `seq_length`.

    Megatron's convention (Narayanan et al. 2021, arXiv 2104.04473, appendix; Korthikanti et al. 2022, arXiv 2205.05198,
    section 6.3): only matrix products count, each as a multiplication and an addition; backward counts twice as much as
    forward; recomputation does not count. `full` attention counts every pair of positions, also masked ones, and is used for
    reported throughput and MFU; `causal` counts half of them, `none` the weights only.
    """
    weights = model.num_layers * sum(_layer_matrices(model)) + model.hidden_size * padded_vocab
    scores_and_values = 2 * seq_length * head_dim(model) * model.num_attention_heads * _VISIBLE_FRACTION[attention]
    return 6.0 * (weights + model.num_layers * scores_and_values)


def model_flops_utilisation(flops_per_second: float, peak_tflops: float) -> float:
    """Return `flops_per_second` as a fraction of the peak (in 1e12 FLOP/s) of the same devices."""
    return flops_per_second / (peak_tflops * 1e12)


def _layer_matrices(model: ModelConfig) -> Iterator[int]:
    """Yield the number of elements of each matrix of a layer; a token needs as many multiplications and as many additions."""
    query_width = head_dim(model) * model.num_attention_heads
    key_width = head_dim(model) * query_groups(model)
    yield model.hidden_size * query_width
    yield 2 * model.hidden_size * key_width  # keys and values
    yield query_width * model.hidden_size
    yield 3 * model.hidden_size * model.ffn_hidden_size  # SwiGLU: gate, up, down
