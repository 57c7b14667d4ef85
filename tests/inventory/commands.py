"""The table of the inventory's commands and their outputs. `run.py` runs it in a folder with the inputs of `inputs.py`."""

from dataclasses import dataclass

RUN = "data.tokenizer=tokenizer data.train_blend=[[1.0,shards/gz]] data.valid_blend=[[1.0,shards/merged]]"
FORWARD_RUN = "data.direction=forward data.tokenizer=tokenizer data.train_blend=[[1.0,shards/parquet]]"
MODELS = "--forward models/forward --reverse models/reverse --reverse-eod-id 3"
REVERSE = "--model models/reverse --direction reverse --eod-id 3"
IDS = "--tokenizer tokenizer --eod-token <EOD>"

TOLERANCE, BF16_TOLERANCE = 1e-4, 2.0**-9
"""Relative tolerances for floats that torch computed on another kind of machine. 2^-9 is the largest rounding error of bf16:
processors with bf16 instructions round sums where others do not."""


@dataclass(frozen=True, slots=True)
class Step:
    """One command, by the name of its tool; `pretrain` is the trainer, `2 pretrain` the trainer on two ranks."""

    name: str
    command: str
    outputs: tuple[str, ...] = ()
    """Patterns of the files and checkpoint folders to compare, below the work folder."""
    needs: tuple[str, ...] = ()
    """Steps to run before this one."""
    stdout: str = ""
    """Comparison of stdout: `text`, `numbers`, or empty for none."""
    is_computed: bool = False
    """Torch computes the floats: their last bits may differ on another kind of machine."""
    tolerance: float = TOLERANCE
    """Relative tolerance for these floats on another kind of machine."""
    is_measured: bool = False
    """Numbers are times: only the text around them is compared."""


def shard(name: str, options: str, *needs: str) -> Step:
    """Return a call of preprocess_data that writes shards/NAME."""
    command = f"preprocess_data {options} --output-prefix shards/{name}"
    return Step(f"preprocess_{name}", command, (f"shards/{name}.*", f"shards/{name}.tokenizer/*"), needs)


def array(name: str, tasks: int, options: str, needs: tuple[str, ...] = ()) -> list[Step]:
    """Return a call of preprocess_data for each task of an array; the tool names the files of a task."""
    return [
        Step(
            f"preprocess_{name}_{task}",
            f"preprocess_data {options} --output-prefix shards/{name} --num-tasks {tasks} --task-id {task}",
            (f"shards/{name}-{task:05}-of-{tasks:05}.*",),
            needs,
        )
        for task in range(tasks)
    ]


def training(name: str, options: str, *needs: str, launch: str = "pretrain") -> Step:
    """Return a run in runs/NAME; compares its records, config, sample indices and last checkpoint."""
    files = ["config.yaml", "metrics.jsonl", "steps.jsonl", "launches.jsonl", "held_out.json", "index_cache/*.index"]
    files += ["tasks/*", "tokenizer/*", "checkpoints/iter_0000010"]
    outputs = tuple(f"runs/{name}/{file}" for file in files)
    command = f"{launch} --config tiny.yaml run_dir=runs/{name} {options}"
    tolerance = BF16_TOLERANCE if "params_dtype=bf16" in options else TOLERANCE
    return Step(f"train_{name}", command, outputs, needs, is_computed=True, tolerance=tolerance)


def computed(name: str, command: str, outputs: str = "", needs: str = "", stdout: str = "") -> Step:
    """Return a call in which torch computes."""
    return Step(name, command, tuple(outputs.split()), tuple(needs.split()), stdout, is_computed=True)


def made(task: str, num: int) -> Step:
    """Return a call of make_analysis_data."""
    return Step(f"make_{task}", f"make_analysis_data --task {task} --num {num} --out made/{task}", (f"made/{task}/*",))


DATA = [
    Step("train_tokenizer", "train_tokenizer --input texts.jsonl --vocab-size 340 --output sp", ("sp/*",)),
    shard("gz", f"--input texts.jsonl.gz {IDS} --workers 1"),
    shard("parquet", f"--input texts.parquet {IDS} --workers 2 --direction forward --text-template '{{title}}\\n{{text}}'"),
    *array("array", 3, f"--input texts.jsonl texts.jsonl.zst {IDS} --workers 1"),
    shard("txt", "--input texts.txt --tokenizer plain --add-specials --workers 2 --bos-token <CLS> --dtype int32"),
    shard("sp", "--input texts.jsonl.zst --tokenizer sp --eod-token <EOD> --workers 2", "train_tokenizer"),
    shard(
        "quality",
        f"--input broken.jsonl {IDS} --workers 2 --direction forward --filter chosen:keep --min-tokens 2 --max-tokens 300"
        " --on-error skip --deduplicate --shuffle-seed 5",
    ),
    *(
        Step(f"hash_{step.name}", f"{step.command} --hash-only", (step.outputs[0].replace(".*", ".hashes"),))
        for step in array("unique", 2, f"--input texts.jsonl {IDS} --workers 1 --deduplicate")
    ),
    *array(
        "unique",
        2,
        f"--input texts.jsonl {IDS} --workers 1 --deduplicate",
        ("hash_preprocess_unique_0", "hash_preprocess_unique_1"),
    ),
    Step(
        "summarize_tasks",
        "summarize_tasks shards/array --json summary.json",
        ("summary.json",),
        tuple(f"preprocess_array_{task}" for task in range(3)),
        stdout="text",
    ),
    Step(
        "merge_shards",
        "merge_shards --input 'shards/array-*-of-00003' --output-prefix shards/merged",
        ("shards/merged.*",),
        ("summarize_tasks",),
    ),
    Step(
        "reverse_shards",
        "reverse_shards --input shards/parquet --output-prefix shards/reversed",
        ("shards/reversed.*",),
        ("preprocess_parquet",),
    ),
    Step(
        "reverse_foreign",
        f"reverse_shards --input foreign/plain {IDS} --eod append --text-bytes 500 --output-prefix shards/foreign",
        ("shards/foreign.*",),
    ),
    Step(
        "inspect_shard",
        "inspect_shard shards/gz shards/merged --show 2 --verify --histogram lengths.png",
        ("lengths.png",),
        ("preprocess_gz", "merge_shards"),
        stdout="text",
    ),
    Step("inspect_quality", "inspect_shard shards/quality --show 3", (), ("preprocess_quality",), stdout="text"),
    Step(
        "plan_blend",
        "plan_blend --input shards/gz 'shards/array-*' --tokens 20000 --seq-length 32 --global-batch-size 8",
        (),
        ("preprocess_gz", "merge_shards"),
        stdout="text",
    ),
    Step("plan_blend_tokens", "plan_blend --input a=10B b=3e9 --tokens-per-source 5B 2B", stdout="text"),
    Step(
        "prepare_pairs",
        f"prepare_pairs --input pairs.jsonl {IDS} --seq-length 32 --too-long cut --output-prefix shards/pairs",
        ("shards/pairs.*",),
    ),
]
MADE = [
    made("reversal", 64),
    made("abduction", 8),
    made("inverse_relations", 32),
    made("label_backfill", 80),
    made("question_from_answer", 20),
]
PLANNER = [
    Step("dry_run", f"pretrain --config tiny.yaml --dry-run {RUN}", (), ("preprocess_gz", "merge_shards"), stdout="numbers"),
    Step("dry_run_large", "pretrain --config large.yaml --dry-run parallel.world_size=16", stdout="numbers"),
    Step(
        "plan_run_search",
        "plan_run --config large.yaml --hardware h100-sxm --num-gpus 8 --search --save-config planned.yaml --output plan",
        ("planned.yaml", "plan/*"),
        stdout="text",
    ),
    Step(
        "plan_run",
        "plan_run --config large.yaml --hardware a100-80 --num-gpus 16 parallel.pipeline_model_parallel_size=2"
        " parallel.tensor_model_parallel_size=2 parallel.use_distributed_optimizer=true",
        stdout="text",
    ),
    Step("validate_planner", "validate_planner --fit", stdout="text"),
    Step(
        "calibrate_hardware", "calibrate_hardware --hardware cpu --output measured.yaml", ("measured.yaml",), is_measured=True
    ),
    Step(
        "report_run",
        "report_run runs/made_reverse runs/made_forward --output run_report --smooth 5",
        ("run_report/*",),
        stdout="text",
    ),
]
TRAINING = [
    training("one", RUN, "preprocess_gz", "merge_shards"),
    training(
        "data_parallel",
        f"{RUN} parallel.use_distributed_optimizer=true model.params_dtype=bf16",
        "preprocess_gz",
        "merge_shards",
        launch="2 pretrain",
    ),
    training(
        "tensor_parallel",
        f"{RUN} parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true train.num_threads=1",
        "preprocess_gz",
        "merge_shards",
        launch="2 pretrain",
    ),
    computed("stop", f"pretrain --config tiny.yaml run_dir=runs/resumed train.exit_interval=5 {RUN}", needs="train_one"),
    training("resumed", RUN, "stop"),
    training(
        "tasks",
        f"{FORWARD_RUN} data.split=[8,1,1] data.seq_length=64 model.add_qkv_bias=true data.reset_attention_mask=true train.tasks=[piqa,boolq]"
        " train.task_data=tasks train.task_interval=5 optimizer.lr_decay_style=WSD optimizer.lr_wsd_decay_iters=4",
        "preprocess_parquet",
    ),
    computed("inspect_checkpoint", "inspect_checkpoint runs/one --verify", needs="train_one", stdout="text"),
    computed("replay_step", "replay_step --run runs/one --iteration 7 --show 1", needs="train_one", stdout="text"),
    computed("export_one", "convert_checkpoint mcore-to-hf --load runs/one --save exports/one", "exports/one/*", "train_one"),
    computed(
        "export_tasks",
        "convert_checkpoint mcore-to-hf --load runs/tasks --save exports/tasks",
        "exports/tasks/*",
        "train_tasks",
    ),
    computed(
        "import",
        "convert_checkpoint hf-to-mcore --load models/forward --save runs/imported --direction reverse --eod-token <EOD>"
        " --seq-length 32",
        "runs/imported/*.* runs/imported/tokenizer/* runs/imported/checkpoints/iter_0000000",
    ),
    Step(
        "train_scorer",
        "pretrain --config runs/imported/model.yaml data.train_blend=[[1.0,shards/pairs]]"
        " data.loss_tokens=scored_and_eod data.reset_attention_mask=true"
        " train.train_iters=4 train.global_batch_size=2 train.num_threads=1 optimizer.lr_warmup_iters=1 logging.log_interval=1"
        " logging.tensorboard=false logging.peak_tflops=1.0 data.allow_repeats=true",
        ("runs/imported/config.yaml", "runs/imported/*.jsonl", "runs/imported/checkpoints/iter_0000004"),
        ("import", "prepare_pairs"),
        is_computed=True,
    ),
]
INFERENCE = [
    computed("generate", f"generate {REVERSE} --following ' the sea; it is cold.' --max-new-tokens 12", stdout="text"),
    computed(
        "generate_samples",
        f"generate {REVERSE} --following ' naïve 漢字.' --max-new-tokens 12 --num-samples 3 --temperature 0.8 --top-k 20"
        " --top-p 0.9 --seed 3 --stop The",
        stdout="text",
    ),
    computed(
        "generate_exported",
        "generate --model exports/one --following ' the house.' --max-new-tokens 8",
        needs="export_one",
        stdout="text",
    ),
    computed(
        "rerank",
        f"rerank {MODELS} --input candidates.jsonl --output ranked/given.jsonl --token-values --weight 0.4",
        "ranked/given.jsonl*",
    ),
    computed(
        "rerank_samples",
        f"rerank {MODELS} --input prompts.jsonl --output ranked/samples.jsonl --sample 3 --greedy --temperature 0.8 --top-p 0.9"
        " --max-new-tokens 8 --seed 5 --include-ends --forward-normalization token --reverse-normalization byte"
        " --language-model-weight 0.1 --reward-temperature 2",
        "ranked/samples.jsonl*",
    ),
    computed(
        "rerank_beam",
        f"rerank {MODELS} --input prompts.jsonl --output ranked/beam.jsonl --beam 2 --expansions 2 --max-new-tokens 8"
        " --step-delimiter regex:[a-z]",
        "ranked/beam.jsonl*",
    ),
    computed(
        "report_rerank",
        "report_rerank ranked/given.jsonl --output rerank_report --gold-key gold --folds 2",
        "rerank_report/*",
        "rerank",
        stdout="text",
    ),
    computed(
        "explain",
        "report_rerank ranked/given.jsonl --output explained --explain 2 --reverse models/reverse --reverse-eod-id 3",
        "explained/*",
        "rerank",
        stdout="text",
    ),
    Step("list_tasks", "evaluate --list", stdout="text"),
    computed(
        "show_prompts",
        f"evaluate {REVERSE} --tasks gsm8k,boolq,piqa --data tasks --num-fewshot 2 --show 1",
        stdout="text",
    ),
    computed(
        "evaluate_reverse",
        f"evaluate {REVERSE} --tasks gsm8k,boolq,piqa,triviaqa --data tasks --max-new-tokens 6 --num-fewshot 1 --output judged/reverse",
        "judged/reverse/*",
    ),
    computed(
        "evaluate_forward",
        "evaluate --model models/forward --tasks gsm8k,piqa,humaneval --data tasks --max-new-tokens 6 --limit 2"
        " --allow-code-execution --sandbox none --output judged/forward",
        "judged/forward/*",
    ),
    computed(
        "evaluate_exported",
        "evaluate --model exports/tasks --tasks piqa,boolq --data tasks --output judged/exported",
        "judged/exported/summary.* judged/exported/*.items.jsonl",
        "export_tasks",
    ),
    computed(
        "evaluate_reversal",
        f"evaluate {REVERSE} --tasks reversal,reversal_written --data made/reversal --limit 4 --max-new-tokens 6"
        " --output judged/reversal",
        "judged/reversal/*",
        "make_reversal",
    ),
    computed(
        "evaluate_abduction",
        f"evaluate {REVERSE} --tasks abduction --data made/abduction --limit 4 --output judged/abduction",
        "judged/abduction/*",
        "make_abduction",
    ),
    computed(
        "compare_losses",
        "compare_losses models/forward models/reverse --direction reverse --eod-id 3 --data held_out.jsonl --domain-key source"
        " --limit 12 --context 64 --output compared",
        "compared/*",
    ),
]
STEPS = [*DATA, *TRAINING, *INFERENCE, *MADE, *PLANNER]
