"""Each relation between keys: a run that it refuses, with the message, and a run that it accepts."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_ledom.config.checks import check_config
from megatron_ledom.config.derived import (
    blend_shares,
    data_parallel_size,
    expected_world_size,
    head_dim,
    lr_decay_iters,
    num_microbatches,
    padded_vocab_size,
    query_groups,
    total_tokens,
    train_samples,
    validation_iterations,
)
from megatron_ledom.config.load import config_from_dict
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import ConfigError


def build(*settings: str) -> RunConfig:
    """Return a run that works on one rank, with each `section.key=value` set; the value is a Python expression."""
    values: dict[str, dict[str, object]] = {
        "model": {"num_layers": 8, "hidden_size": 72, "ffn_hidden_size": 96, "num_attention_heads": 18},
        "data": {"seq_length": 16, "train_blend": [[1.0, "data/a"]]},
        "train": {"train_iters": 100, "global_batch_size": 24},
        "optimizer": {"lr_warmup_iters": 10},
        "parallel": {},
        "checkpoint": {},
        "logging": {},
    }
    for setting in settings:
        key, value = setting.split("=")
        section, name = key.split(".")
        values[section][name] = eval(value)
    return config_from_dict({"run_dir": "runs/tiny", **values}, "test")


TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
VPP, CP = "parallel.virtual_pipeline_model_parallel_size", "parallel.context_parallel_size"
RECOMPUTE, SP = "parallel.recompute_", "parallel.sequence_parallel=True"
FP8_MODEL = ["model.fp8='hybrid'", "model.hidden_size=128", "model.num_attention_heads=4", "model.ffn_hidden_size=256"]
GATHER = "parallel.overlap_param_gather=True"

MODULES = "model.mtp_num_layers=1"

REFUSED: list[tuple[list[str], int, str]] = [
    (["model.mtp_loss_scaling_factor=0.3"], 1, "model.mtp_loss_scaling_factor=0.3 has no effect without model.mtp_num_layers"),
    (
        [MODULES, "train.z_loss_coeff=0.1"],
        1,
        "train.z_loss_coeff=0.1 cannot be used with model.mtp_num_layers=1: megatron-core masks",
    ),
    ([MODULES, f"{CP}=2"], 2, "parallel.context_parallel_size=2 cannot be used with model.mtp_num_layers=1"),
    (
        [MODULES, f"{PP}=2", "model.share_embeddings_and_output_weights=True"],
        2,
        "model.share_embeddings_and_output_weights=true with pipeline stages cannot be used with model.mtp_num_layers=1",
    ),
    (
        [MODULES, f"{RECOMPUTE}granularity='full'", f"{RECOMPUTE}method='block'", f"{RECOMPUTE}num_layers=1"],
        1,
        "parallel.recompute_granularity=full cannot be used with model.mtp_num_layers=1",
    ),
    ([MODULES, "optimizer.optimizer='muon'"], 1, "optimizer.optimizer=muon cannot be used with model.mtp_num_layers=1"),
    ([MODULES, *FP8_MODEL], 1, "model.fp8=hybrid cannot be used with model.mtp_num_layers=1"),
    (
        ["data.direction='both'", "train.tasks=['boolq']", "train.task_data='tasks'"],
        1,
        "train.tasks are evaluated in the direction of the model, but data.direction=both; remove train.tasks",
    ),
    (
        ["data.train_blend=[[1, 'a', 'reverse'], [1, 'b', 'forward']]"],
        1,
        "data.train_blend says that b is forward, but data.direction=reverse; correct one of them, or set data.direction=both",
    ),
    (
        ["data.direction='both'", "data.train_blend=[[1, 'a', 'forward'], [1, 'b', 'forward']]"],
        1,
        "data.direction=both, but data.train_blend says that all its shards are forward; add reverse ones, or set"
        " data.direction=forward",
    ),
    (
        ["checkpoint.mirror_keep_interval=2000", "checkpoint.mirror_keep_last=None"],
        1,
        "checkpoint.mirror_keep_interval=2000 without checkpoint.mirror_keep_last has no effect",
    ),
    (["checkpoint.mirror_keep_interval=1500"], 1, "checkpoint.mirror_keep_interval=1500 is not a multiple of"),
    (["checkpoint.mirror=''"], 1, "checkpoint.mirror is empty"),
    (
        ["checkpoint.keep_interval=2000", "checkpoint.keep_last=None"],
        1,
        "checkpoint.keep_interval=2000 without checkpoint.keep_last has no effect",
    ),
    (
        ["checkpoint.keep_last=2", "checkpoint.keep_interval=1500"],
        1,
        "checkpoint.keep_interval=1500 is not a multiple of checkpoint.save_interval=1000, so few or no checkpoints"
        " would be written at its multiples; the next possible value is 2000",
    ),
    (["train.watchdog_seconds=600"], 1, "is above 0.9 x parallel.distributed_timeout_minutes=10"),
    (["optimizer.muon_nesterov=True"], 1, "optimizer.muon_nesterov=True needs optimizer.optimizer=muon, found adam"),
    (
        ["optimizer.optimizer='muon'", "parallel.use_distributed_optimizer=True", "model.params_dtype='fp32'"],
        2,
        "parallel.use_distributed_optimizer=true with optimizer.optimizer=muon needs model.params_dtype=bf16, found fp32",
    ),
    (
        ["optimizer.optimizer='muon'", "model.num_query_groups=1", f"{TP}=2", "model.vocab_size=256"],
        2,
        "optimizer.muon_split_qkv=true needs at least one key-value head per tensor-parallel rank, found"
        " model.num_query_groups=1 for parallel.tensor_model_parallel_size=2",
    ),
    (["logging.profile_stop=5"], 1, "needs a logging.profile_start of at most 5, found null"),
    (["logging.profile_start=6", "logging.profile_stop=5"], 1, "needs a logging.profile_start of at most 5, found 6"),
    (["logging.profile_start=101"], 1, "is after the last iteration, train.train_iters=100"),
    (["logging.profile_start=1", "logging.profile_ranks=[0, 2]"], 2, "logging.profile_ranks has [2], but 2 ranks are launched"),
    (
        [f"{TP}=4", "model.vocab_size=256"],
        4,
        "parallel.tensor_model_parallel_size=4 does not divide model.num_attention_heads=18;"
        " it can be one of [1, 2, 3, 6, 9, 18]",
    ),
    (["model.hidden_size=70"], 1, "model.num_attention_heads=18 does not divide model.hidden_size=70"),
    (["model.hidden_size=54"], 1, "the width of a head is 3; rotary positions rotate pairs"),
    (["model.kv_channels=5"], 1, "the width of a head is 5"),
    (
        ["model.rope_scaling_factor=4"],
        1,
        "model.rope_scaling_factor=4.0 needs model.rope_scaling=linear or llama3 or yarn, found null",
    ),
    (
        ["model.rope_scaling='linear'", "model.rope_scaling_beta_slow=2"],
        1,
        "model.rope_scaling_beta_slow=2.0 needs model.rope_scaling=yarn, found linear",
    ),
    (
        ["model.rope_scaling='llama3'", "model.rope_scaling_low_freq_factor=5"],
        1,
        "model.rope_scaling_low_freq_factor=5.0 is not below model.rope_scaling_high_freq_factor=4.0",
    ),
    (["model.num_query_groups=4"], 1, "model.num_query_groups=4 does not divide model.num_attention_heads=18"),
    (
        ["model.num_query_groups=2", f"{TP}=9"],
        9,
        "neither divides model.num_query_groups=2 nor is a multiple of it, so the key-value heads cannot be distributed evenly;"
        " it can be one of [1, 2, 6, 18]",
    ),
    (
        [f"{TP}=2", "model.ffn_hidden_size=99"],
        2,
        "does not divide model.ffn_hidden_size=99; it can be one of [1, 3, 9, 11, 33, 99]",
    ),
    (
        [f"{TP}=3"],
        3,
        "does not divide every padded vocabulary, which is a multiple of 128 rows; set model.make_vocab_size_divisible_by (now 128) to a",
    ),
    ([f"{TP}=3", "model.vocab_size=4096"], 3, "does not divide the padded vocabulary of 4,096 rows"),
    ([f"{TP}=3", "model.vocab_size=200"], 3, "does not divide the padded vocabulary of 256 rows"),
    (
        ["parallel.sequence_parallel=True"],
        1,
        "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size above 1",
    ),
    ([f"{TP}=2", "parallel.sequence_parallel=True", "data.seq_length=15"], 2, "the next possible length is 16"),
    ([f"{CP}=2", "data.seq_length=18"], 2, "data.seq_length=18 is not a multiple of 2 x parallel.context_parallel_size = 4"),
    (
        [f"{PP}=3"],
        3,
        "parallel.pipeline_model_parallel_size=3 does not divide model.num_layers=8; it can be one of [1, 2, 4, 8]",
    ),
    ([f"{VPP}=2"], 1, "needs parallel.pipeline_model_parallel_size above 1"),
    ([f"{PP}=2", f"{VPP}=1"], 2, "virtual_pipeline_model_parallel_size=1 has no effect"),
    ([f"{PP}=2", f"{VPP}=3"], 2, "does not divide the 4 layers of a stage"),
    ([f"{PP}=2", f"{VPP}=2", "train.global_batch_size=3"], 2, "3 micro-batches are not a multiple of parallel.pipeline"),
    ([GATHER, "parallel.overlap_grad_reduce=True"], 1, "needs parallel.use_distributed_optimizer=true"),
    ([GATHER, "parallel.use_distributed_optimizer=True"], 1, "needs parallel.overlap_grad_reduce=true"),
    (["optimizer.min_lr=0.1"], 1, "optimizer.min_lr=0.1 is above optimizer.lr=0.0002"),
    (["optimizer.lr_warmup_iters=100"], 1, "optimizer.lr_warmup_iters=100 leaves no iterations of train.train_iters=100"),
    (["optimizer.lr_decay_iters=10"], 1, "leaves no iterations of optimizer.lr_decay_iters=10 for the decay"),
    (["optimizer.lr_decay_style='WSD'"], 1, "optimizer.lr_decay_style=WSD needs optimizer.lr_wsd_decay_iters"),
    (
        ["optimizer.lr_decay_style='WSD'", "optimizer.lr_wsd_decay_iters=91"],
        1,
        "optimizer.lr_wsd_decay_iters=91 is more than the 90 iterations from the end of the warm-up",
    ),
    (["optimizer.lr_wsd_decay_iters=9"], 1, "needs optimizer.lr_decay_style=WSD, found cosine"),
    (["data.reset_position_ids=True"], 1, "data.reset_position_ids=true without data.reset_attention_mask=true"),
    (["parallel.bucket_size=1000"], 1, "parallel.bucket_size=1000 needs parallel.overlap_grad_reduce=true"),
    ([f"{RECOMPUTE}granularity='full'"], 1, "needs parallel.recompute_method, found null; set uniform or block"),
    (
        [f"{RECOMPUTE}granularity='full'", f"{RECOMPUTE}method='block'", f"{RECOMPUTE}num_layers=3", f"{PP}=2", f"{VPP}=2"],
        2,
        "parallel.recompute_num_layers=3, expected 1 to 2, the layers of a model chunk",
    ),
    (
        [f"{RECOMPUTE}method='block'"],
        1,
        "parallel.recompute_method=block needs parallel.recompute_granularity=full, found null",
    ),
    ([f"{RECOMPUTE}granularity='selective'", f"{RECOMPUTE}num_layers=1"], 1, "=full, found selective; set that, or remove"),
    ([f"{RECOMPUTE}granularity='selective'", f"{RECOMPUTE}modules=[]"], 1, "expected one part or more, each once"),
    (["model.fp8='hybrid'", "model.transformer_impl='torch'"], 1, "model.fp8=hybrid needs Transformer Engine"),
    (["model.fp8='hybrid'", "data.reset_attention_mask=True"], 1, "model.fp8=hybrid needs Transformer Engine, whose attention"),
    (["model.fp8='hybrid'", "model.params_dtype='fp32'"], 1, "model.fp8=hybrid needs model.params_dtype=bf16, found fp32"),
    (
        ["model.fp8='e4m3'"],
        1,
        "model.hidden_size: 72 is not a multiple of 16, which model.fp8_recipe=tensorwise needs; the next one is 80",
    ),
    (
        [*FP8_MODEL, "model.fp8_recipe='blockwise'"],
        1,
        "the tokens of a micro-batch on a rank: 16 is not a multiple of 128, which model.fp8_recipe=blockwise needs",
    ),
    ([*FP8_MODEL, f"{TP}=2", SP], 2, "the tokens of a micro-batch on a rank: 8 is not a multiple of 16"),
    (["parallel.tp_comm_overlap=True"], 1, "parallel.tp_comm_overlap=true needs parallel.sequence_parallel=true"),
    (
        ["parallel.tp_comm_overlap=True", f"{TP}=2", SP, "model.transformer_impl='torch'"],
        2,
        "parallel.tp_comm_overlap=true needs Transformer Engine, found model.transformer_impl=torch",
    ),
    (["parallel.high_priority_stream_groups=['dp', 'dp']"], 1, "names a group twice; name each once"),
    (["parallel.nccl_communicator_config_path='no/such.yaml'"], 1, "no/such.yaml cannot be read"),
    (["data.reset_attention_mask=True", "model.transformer_impl='transformer_engine'"], 1, "set model.transformer_impl=torch"),
    (["model.attention_backend='unfused'", "model.transformer_impl='transformer_engine'"], 1, "unfused needs layers without"),
    (
        ["model.attention_backend='unfused'", "model.fp8='hybrid'"],
        1,
        "found model.fp8=hybrid; set model.attention_backend=auto",
    ),
    (["data.train_blend=[[1, 'a'], [2, 'a']]"], 1, "data.train_blend lists a 2 times"),
    (["data.valid_blend=[[1, 'a.bin']]"], 1, "data.valid_blend lists the file a.bin; expected the prefix of a shard, a"),
    (["data.valid_blend=[[1, ' ']]"], 1, "empty prefix"),
    (["data.valid_sets={'web': [[1, 'a'], [2, 'a']]}"], 1, "data.valid_sets.web lists a 2 times"),
    (
        ["data.valid_sets={'web': []}"],
        1,
        "data.valid_sets has the set 'web' with 0 shards; give it a name and at least one shard",
    ),
    (["data.test_sets={' ': [[1, 'a']]}"], 1, "data.test_sets has the set ' ' with 1 shards"),
    (["data.valid_blend=[[1, 'a']]", "data.valid_sets={'a': [[1, 'b']]}"], 1, "a names a shard of data.valid_blend and a set"),
    (["data.split=[9,1,0]", "data.valid_blend=[[1, 'b']]"], 1, "data.split=[9.0, 1.0, 0.0] and data.valid_blend are both set"),
    (
        ["data.split=[9,1,0]", "data.test_sets={'a': [[1, 'b']]}"],
        1,
        "data.split=[9.0, 1.0, 0.0] and data.test_sets are both set",
    ),
    (["data.blend_unit='tokens'", "data.train_blend=[[99e3, 'a']]"], 1, "data.train_blend add up to 99,000 tokens"),
    (["parallel.world_size=4"], 2, "parallel.world_size=4, but 2 ranks are launched"),
    ([f"{TP}=2", f"{PP}=2"], 6, "6 ranks are not a multiple of the 4 ranks that one copy of the model needs"),
    ([f"{TP}=2"], 1, "1 ranks are not a multiple of the 2"),
    (
        [],
        5,
        "train.global_batch_size=24 is not a multiple of train.micro_batch_size=1 x data-parallel size 5 = 5;"
        " the next multiple is 25",
    ),
]

ACCEPTED: list[tuple[list[str], int]] = [
    (["train.watchdog_seconds=600", "parallel.distributed_timeout_minutes=12"], 1),
    (["logging.profile_start=5", "logging.profile_stop=5", "logging.profile_ranks=[0, 1]"], 2),
    ([], 1),
    ([], 8),
    ([f"{TP}=2", "model.vocab_size=256"], 2),
    (["optimizer.optimizer='muon'", "optimizer.muon_nesterov=True", f"{TP}=2", "model.vocab_size=256"], 2),
    (
        [
            "optimizer.optimizer='muon'",
            "optimizer.muon_split_qkv=False",
            "model.num_query_groups=1",
            f"{TP}=2",
            "model.vocab_size=256",
        ],
        2,
    ),
    (["model.hidden_size=70", "model.kv_channels=4"], 1),
    (["model.num_query_groups=6"], 1),
    (["model.num_query_groups=1", f"{TP}=2"], 2),
    (["model.num_query_groups=2", f"{TP}=6", "model.make_vocab_size_divisible_by=384"], 6),
    ([f"{TP}=3", "model.make_vocab_size_divisible_by=129"], 3),
    ([f"{TP}=2", "parallel.sequence_parallel=True"], 2),
    ([f"{TP}=2", f"{CP}=2", "parallel.sequence_parallel=True"], 4),
    ([f"{PP}=4"], 4),
    ([f"{PP}=2", f"{VPP}=2"], 2),
    ([f"{PP}=2", "train.global_batch_size=3"], 2),
    ([GATHER, "parallel.use_distributed_optimizer=True", "parallel.overlap_grad_reduce=True"], 2),
    (["optimizer.min_lr=2e-4"], 1),
    (["optimizer.lr_warmup_iters=99"], 1),
    (["optimizer.lr_decay_iters=11"], 1),
    (["optimizer.lr_decay_style='WSD'", "optimizer.lr_wsd_decay_iters=90"], 1),
    (["data.reset_position_ids=True", "data.reset_attention_mask=True"], 1),
    (["data.reset_attention_mask=True", f"{CP}=2"], 2),
    ([f"{RECOMPUTE}granularity='full'", f"{RECOMPUTE}method='block'", f"{RECOMPUTE}num_layers=4", f"{PP}=2"], 2),
    ([f"{RECOMPUTE}granularity='selective'", f"{RECOMPUTE}modules=['mlp']"], 1),
    (FP8_MODEL, 1),
    ([*FP8_MODEL, f"{TP}=2", SP, "data.seq_length=32", "parallel.tp_comm_overlap=True"], 2),
    ([*FP8_MODEL, "model.fp8_recipe='mxfp8'", "data.seq_length=32"], 1),
    (["parallel.bucket_size=1000", "parallel.overlap_grad_reduce=True"], 1),
    (["parallel.high_priority_stream_groups=['dp_cp', 'tp']", "parallel.use_sharp=True"], 1),
    (["data.train_blend=[[1, 'a'], [2, 'b']]", "data.valid_blend=[[1, 'a']]"], 1),
    (["parallel.world_size=4"], 4),
]


@pytest.mark.parametrize(("settings", "world_size", "sentence"), REFUSED, ids=lambda value: str(value)[:60])
def test_run_that_cannot_work_is_refused(settings: Sequence[str], world_size: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(build(*settings), world_size)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("settings", "world_size"), ACCEPTED, ids=lambda value: str(value)[:60])
def test_run_that_works_passes(settings: Sequence[str], world_size: int) -> None:
    config = build(*settings)
    check_config(config, world_size)
    assert num_microbatches(config, world_size) >= 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("dp_cp: {max_ctas: 16, net_name: IB}\ntp: {cga_cluster_size: 2}", None),
        ("- dp", "has no settings by process group"),
        ("dp_cp: 16", "has no settings by process group"),
        ("expert: {max_ctas: 16}", "names the process group expert; expected one of tp, cp, dp, dp_cp"),
        ("dp: {maxctas: 16}", "sets dp.maxctas; expected one of cga_cluster_size, min_ctas"),
        ("dp: [", "cannot be read"),
    ],
)
def test_the_file_of_nccl_settings_is_read(tmp_path: Path, content: str, sentence: str | None) -> None:
    path = tmp_path / "nccl.yaml"
    path.write_text(content)
    config = build(f"parallel.nccl_communicator_config_path='{path}'")
    if sentence is None:
        check_config(config, 1)
    else:
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            check_config(config, 1)


def test_all_problems_are_collected() -> None:
    config = build(f"{TP}=4", f"{PP}=3", "optimizer.min_lr=1.0", "data.reset_position_ids=True", "parallel.world_size=12")
    with pytest.raises(ConfigError) as caught:
        check_config(config, 24)
    assert str(caught.value).splitlines()[0] == "the configuration has 5 problems:"
    assert len(str(caught.value).splitlines()) == 6


def test_derived_numbers_by_hand() -> None:
    config = build(f"{TP}=2", f"{PP}=2", "train.micro_batch_size=2", "model.num_query_groups=9", "train.eval_interval=30")
    assert (data_parallel_size(config.parallel, 8), num_microbatches(config, 8), expected_world_size(config)) == (2, 6, 4)
    assert (head_dim(config.model), query_groups(config.model)) == (4, 9)
    assert (train_samples(config), total_tokens(config)) == (2400, 38400)
    assert (lr_decay_iters(config), validation_iterations(config)) == (100, 4)
    assert blend_shares([(3.0, "a"), (1.0, "b")]) == [0.75, 0.25]


@pytest.mark.parametrize(
    ("vocab", "divisible_by", "rows"), [(64005, 256, 64256), (64000, 128, 64000), (1, 128, 128), (129, 128, 256)]
)
def test_padded_vocabulary(vocab: int, divisible_by: int, rows: int) -> None:
    assert padded_vocab_size(vocab, divisible_by) == rows
