"""The Hugging Face spelling of a run: config.json and generation_config.json. The only file where these names occur."""

from transformers import GenerationConfig, LlamaConfig

import megatron_ledom
from megatron_ledom.config.derived import head_dim, query_groups
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.provenance import Provenance


def build_hf_config(config: RunConfig, provenance: Provenance) -> LlamaConfig:
    """A stock Llama config; direction and tokenizer hash ride along as extra keys, eos is the id trained as eod."""
    model = config.model
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=provenance.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=query_groups(model),
        head_dim=head_dim(model),
        hidden_act="silu",
        max_position_embeddings=config.data.seq_length,
        initializer_range=model.init_method_std,
        rms_norm_eps=model.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
        rope_theta=model.rotary_base,  # read by releases before rope_parameters
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=model.share_embeddings_and_output_weights,
        bos_token_id=None,
        eos_token_id=provenance.eod_id,
        pad_token_id=None,
        dtype={"bf16": "bfloat16", "fp32": "float32"}[model.params_dtype],
        direction=str(provenance.direction),
        eod_id=provenance.eod_id,
        tokenizer_name=provenance.tokenizer_name,
        tokenizer_sha256=provenance.tokenizer_sha256,
        megatron_ledom_version=megatron_ledom.__version__,
    )


def build_generation_config(provenance: Provenance) -> GenerationConfig:
    """Generation ends with the trained eod, whatever the tokenizer calls its eos."""
    return GenerationConfig(eos_token_id=provenance.eod_id, bos_token_id=None, do_sample=False)
