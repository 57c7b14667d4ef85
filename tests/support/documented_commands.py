"""The commands of README.md and docs/, and the test that runs each."""

from tests.support.corpus_recipes import TUTORIAL_COMMANDS

RUN_HERE = "tests/unit/docs/test_commands.py"
RUN_ON_QUICKSTART = "tests/quickstart/test_quickstart.py"
HARNESS = "-m megatron_ledom.evaluation.harness"
MINUTE = "tests/quickstart/test_one_minute.py"
LORA = "tests/unit/finetune/test_lora.py"
SLURM_JOBS = "tests/slurm/test_slurm_jobs.py"
PAGES_RUN_BY_TESTS = {
    "docs/tutorials/published_model.md": "tests/unit/tokenizers/test_published_folder.py",
    "docs/how_to/serve.md": "tests/unit/serving/test_page_commands.py",
    "docs/how_to/watch_runs.md": "tests/unit/monitoring/test_watch_page.py",
}
"""Pages all of whose commands one test runs."""
RUN_BY_TESTS = {
    "pip install .": "tests/packaging/test_wheel.py",
    "pip install --no-build-isolation .": "tests/unit/test_build.py, tests/packaging/test_wheel.py",
    "grep -Ev ^(torch|triton)== constraints/python3.12.txt > pins.txt": "tests/unit/test_make_venv.py",
    "pip install --no-build-isolation -c pins.txt .": "tests/unit/test_make_venv.py, tests/packaging/test_wheel.py",
    "make quickstart": "tests/unit/test_make_venv.py, tests/quickstart/test_quickstart.py",
    "make study SIZE=small": "tests/study/test_study.py",
    ".venv/bin/python examples/study/study.py --size small --only reinforcement": "tests/study/test_study.py",
    ".venv/bin/python examples/study/study.py --size small --only contamination": "tests/study/test_study.py",
    ".venv/bin/python examples/study/study.py --size full --parts controls": "tests/study/test_study.py",
    ".venv/bin/python examples/study/study.py --size full --parts loss_gap": "tests/study/test_study.py",
    ".venv/bin/python examples/study/study.py --size small --parts two_way": "tests/study/test_study.py",
    ".venv/bin/python examples/study/study.py --size small --parts teacher": "tests/study/test_study.py",
    "make test": "Makefile",
    "make check": "Makefile",
    "ledom --help": "tests/unit/cli/test_ledom.py",
    "eval $(ledom completion bash)": "tests/unit/cli/test_ledom.py",
    "ledom ops": "tests/unit/ops/test_ops.py",
    ".venv/bin/python examples/quickstart/run.py --keep": RUN_ON_QUICKSTART,
    "python examples/quickstart/real_forward.py --forward models/smollm2 --pairs gsm8k_train.jsonl --items gsm8k_test.jsonl": (
        "tests/quickstart/test_real_forward.py"
    ),
    **dict.fromkeys(
        (
            "bash examples/slurm/container_build.sh ledom.sif",
            "bash examples/slurm/container_build.sh ledom.sqsh",
            "bash examples/slurm/container.sh -m megatron_ledom.ops",
        ),
        "tests/unit/examples/test_containers.py",
    ),
    "bash examples/slurm/preprocess.sbatch": f"tests/unit/examples/test_slurm_scripts.py, {SLURM_JOBS}",
    "bash examples/slurm/pretrain.sbatch": "tests/slurm/test_slurm_training.py",
    "bash examples/slurm/convert.sbatch": SLURM_JOBS,
    "bash examples/slurm/evaluate.sbatch": SLURM_JOBS,
    "bash examples/slurm/evaluate_tasks.sbatch": SLURM_JOBS,
    "ledom check-nodes --folders runs --json nodes.json": "tests/slurm/test_node_check.py, tests/unit/hardware_check/test_node_health.py",
    "ledom summarize-evaluation evaluated": f"tests/unit/evaluation/test_joined_results.py, {SLURM_JOBS}",
    **dict.fromkeys(("ledom summarize-tasks data/dclm_01", "ledom summarize-tasks data/corpus"), SLURM_JOBS),
    "ledom inspect-shard data/dclm_01-*-of-00064 --verify": "tests/unit/data/shards/test_inspect_shard.py",
    "ledom merge-shards --input data/dclm_01-*-of-00064 --output-prefix data/dclm_01": "tests/unit/data/shards/test_merge_shards.py",
    "ledom merge-shards --input data/corpus-*-of-00064 --output-prefix data/corpus": "tests/unit/data/shards/test_merge_shards.py",
    "ledom reverse-shards --input data/web --output-prefix data/web_reverse --tokenizer data/tokenizer": (
        "tests/unit/data/shards/test_reverse_shards.py"
    ),
    "ledom plan-blend --input data/dclm_01-*-of-00064 --tokens 234e9 --seq-length 8192 --global-batch-size 1024": (
        "tests/unit/data/blends/test_plan_blend.py"
    ),
    "ledom plan-run --config ledom_7b --hardware h100-sxm --num-gpus 64 --search --save-config chosen.yaml --output plan": (
        "tests/unit/planning/test_planner_search.py"
    ),
    "ledom plan-run --config examples/configs/ledom_7b.yaml --hardware h100-sxm --num-gpus 64 --search --save-config chosen.yaml"
    " --output plan": "tests/unit/planning/test_planner_search.py",
    "ledom check-hardware": "tests/hardware_check/test_rehearsal.py",
    "ledom check-hardware --device cpu --output rehearsal": "tests/hardware_check/test_rehearsal.py",
    "ledom check-hardware --only kernels bandwidth --output kernels": "tests/hardware_check/test_rehearsal.py",
    "ledom check-hardware --only layouts --minutes 10 --output again": "tests/hardware_check/test_rehearsal.py",
    "bash examples/slurm/check_hardware.sbatch": "tests/slurm/test_slurm_jobs.py",
    "ledom calibrate-hardware --hardware h100-sxm --output own.yaml": "tests/unit/planning/test_calibration.py",
    "ledom report-run runs/ledom_7b --plan a100-80": "tests/unit/reports/test_run_report.py",
    **dict.fromkeys(
        (
            "ledom average-checkpoints --load runs/ledom_7b --last 5 --save runs/average",
            "ledom convert-checkpoint mcore-to-hf --load runs/average --save models/average",
            "ledom train --config runs/average/model.yaml data.train_blend=[[1.0, data/web]] train.train_iters=1000"
            " train.global_batch_size=8",
        ),
        "tests/distributed/test_average_checkpoints.py",
    ),
    **dict.fromkeys(
        (
            "ledom convert-checkpoint mcore-to-hf --load runs/ledom_7b --save models/ema --weights ema",
            "ledom average-checkpoints --load runs/ledom_7b --last 1 --weights ema --save runs/ema",
        ),
        "tests/distributed/test_weight_ema.py",
    ),
    "ledom inspect-checkpoint runs/reverse --verify": "tests/unit/checkpoint/test_inspect_checkpoint.py",
    "ledom convert-checkpoint hf-to-mcore --load models/qwen3 --save runs/qwen3_reverse --direction reverse --seq-length 4096": (
        "tests/numerics/test_export.py, tests/numerics/test_conversion.py"
    ),
    "ledom preprocess-data --input corpus/*.jsonl --tokenizer runs/qwen3_reverse/tokenizer --output-prefix data/qwen3_reverse": (
        "tests/unit/data/preprocess/test_preprocess.py"
    ),
    "torchrun --nproc-per-node 8 -m megatron_ledom.pretrain --config runs/qwen3_reverse/model.yaml"
    " data.train_blend=[[1.0,data/qwen3_reverse]] train.train_iters=1000 train.global_batch_size=64"
    " optimizer.lr_warmup_iters=50 parallel.tensor_model_parallel_size=8": "tests/distributed/test_train_imported.py",
    "ledom convert-checkpoint mcore-to-hf --load runs/qwen3_reverse --save models/qwen3_reverse": "tests/numerics/test_export.py",
    "ledom convert-checkpoint hf-to-mcore --load models/reverse --save runs/scorer --direction reverse --seq-length 1024": (
        "tests/numerics/test_conversion.py, tests/distributed/test_scorer_training.py"
    ),
    "ledom prepare-pairs --input pairs.jsonl --tokenizer runs/scorer/tokenizer --output-prefix data/pairs --seq-length 1024"
    r" --prompt-template Question: {question}\nAnswer:  --answer-template {answer} --too-long skip": (
        "tests/unit/finetune/test_prepare_pairs.py"
    ),
    **dict.fromkeys(
        (
            "ledom convert-checkpoint mcore-to-hf --load runs/reverse --save models/teacher",
            "ledom train --config run.yaml run_dir=runs/taught data.direction=forward data.train_blend=[[1.0,data/web_forward]]"
            " train.auxiliary.kind=reverse_state train.auxiliary.teacher=models/teacher",
        ),
        "tests/distributed/test_reverse_teacher.py",
    ),
    "ledom train --config ledom_7b checkpoint.mirror=s3://my-bucket/ledom_7b": "tests/distributed/test_mirror.py",
    **dict.fromkeys(
        (
            "ledom train --config ledom_7b logging.mlflow_experiment=ledom logging.mlflow_uri=http://mlflow:5000",
            "ledom train --config ledom_7b logging.otlp_endpoint=http://collector:4318",
        ),
        "tests/unit/callbacks/test_trackers.py",
    ),
    **dict.fromkeys(
        (
            "ledom alert runs/ledom_7b --webhook env:ALERT_WEBHOOK --format slack",
            "ledom alert runs --webhook env:ALERT_WEBHOOK --email me@example.org --smtp mail.example.org",
            "ledom alert --test --webhook env:ALERT_WEBHOOK --format slack",
        ),
        "tests/unit/monitoring/test_alerts.py",
    ),
    "ledom train --config runs/scorer/model.yaml data.train_blend=[[1.0,data/pairs]] data.loss_tokens=scored"
    " data.reset_attention_mask=true data.reset_position_ids=true train.train_iters=1060 train.global_batch_size=64"
    " optimizer.lr=1e-5 optimizer.min_lr=1e-6 optimizer.lr_warmup_iters=50": "tests/distributed/test_scorer_training.py",
    "ledom convert-checkpoint mcore-to-hf --load runs/scorer --save models/scorer": "tests/distributed/test_scorer_training.py",
    "torchrun --nproc-per-node 8 --no-python ledom replay-step --run runs/ledom_7b --iteration 1234": (
        "tests/distributed/test_anomalies.py"
    ),
    "ledom decontaminate --input corpus/*.jsonl --items evaluation_sets own_items.jsonl --output contamination": RUN_HERE,
    "ledom decontaminate --input corpus/*.jsonl --items evaluation_sets --output clean --action drop": RUN_HERE,
    "ledom preprocess-data --input corpus/*.jsonl --tokenizer data/tokenizer --output-prefix data/web"
    " --decontaminate evaluation_sets --action cut": "tests/unit/data/preprocess/test_decontaminated_shards.py",
    "make install-datatrove": "Makefile",
    "python examples/corpus/clean/clean.py --input corpus/*.jsonl --output cleaned --domain-key source --keep-languages en": (
        "tests/cleaning/test_clean_corpus.py"
    ),
    "ledom preprocess-data --input cleaned/documents/*.jsonl.gz --tokenizer data/tokenizer --output-prefix data/web": (
        "tests/unit/data/preprocess/test_preprocess.py"
    ),
    "ledom preprocess-data --input corpus/*.jsonl --tokenizer data/tokenizer --output-prefix data/web"
    " --decontaminate evaluation_sets --index-folder data/indexes": "tests/unit/contamination/test_stored_index.py",
    "ledom evaluate --list --data evaluation_sets": RUN_HERE,
    "ledom evaluate --model quickstart/models/reverse --tasks gsm8k,svamp --data evaluation_sets --num-fewshot 4 --show 2": RUN_HERE,
    "ledom evaluate --model quickstart/models/reverse --tasks gsm8k,hellaswag --data evaluation_sets --limit 200 --num-fewshot 4"
    " --output evaluated": "tests/unit/evaluation/test_evaluate_tool.py",
    "ledom harness --model_args pretrained=quickstart/models/reverse,way=joint --tasks my_choices --include_path my_tasks"
    " --batch_size 16": "tests/unit/evaluation/test_harness.py",
    "ledom make-analysis-data --task reversal --output synthetic/reversal --num 64 --seed 0": RUN_HERE,
    "ledom evaluate --model models/reverse --tasks reversal,reversal_written --data synthetic/reversal --output evaluated": (
        "tests/unit/evaluation/test_synthetic_sets.py, tests/quickstart/test_reversal_curse.py"
    ),
    "ledom compare-losses models/forward models/reverse --data held_out.jsonl --domain-key source --output compared": (
        "tests/unit/evaluation/test_loss_difference.py"
    ),
    "ledom rerank --forward models/forward --forward-engine vllm --reverse models/reverse --reverse-engine vllm"
    " --input prompts.jsonl --output answers.jsonl --sample 8 --max-new-tokens 64": "tests/unit/inference/test_vllm_engine.py",
    "ledom export-preferences answers.jsonl answers_seed1.jsonl --output pairs --pairs best-others --min-margin 2": (
        "tests/unit/rewards/test_trainers_page.py"
    ),
    "python examples/finetune/lora.py --model models/reverse --input corpus.jsonl --output finetuned --epochs 1"
    " --max-length 512": LORA,
    "ledom generate --model finetuned/model --following and they lived happily ever after.": LORA,
    "ledom convert-checkpoint hf-to-mcore --load finetuned/model --save runs/finetuned --seq-length 512": LORA,
    **dict.fromkeys(
        (
            "ledom infill --forward models/forward --reverse models/reverse --input gaps.jsonl --output filled.jsonl",
            "ledom infill --model models/two_way --input gaps.jsonl --output filled.jsonl --num-samples 8 --temperature 0.8",
        ),
        "tests/unit/inference/test_infill.py",
    ),
    ".venv/bin/python examples/study/study.py --size small --parts infill": "tests/study/test_infill_part.py",
    **TUTORIAL_COMMANDS,
    "ledom configs list": RUN_HERE,
    "ledom configs show quickstart_reverse > run.yaml": RUN_HERE,
    "ledom train --config ledom_7b --dry-run parallel.hardware=h100-sxm": RUN_HERE,
    "ledom plan-run --config ledom_7b --hardware h100-sxm --num-gpus 64 --search --save-config chosen.yaml"
    " data.train_blend=[[1.0,data/corpus]]": RUN_HERE,
    "ledom train-tokenizer --input corpus/train.jsonl --output data/tokenizer --vocab-size 8000": RUN_ON_QUICKSTART,
    "ledom preprocess-data --input corpus/train.jsonl --tokenizer data/tokenizer --output-prefix data/mine": RUN_ON_QUICKSTART,
    "ledom preprocess-data --input corpus/valid.jsonl --tokenizer data/tokenizer --output-prefix data/mine_valid": RUN_ON_QUICKSTART,
    "ledom preprocess-data --input corpus/train.jsonl --tokenizer data/tokenizer --output-prefix data/mine_forward"
    " --direction forward": RUN_ON_QUICKSTART,
    "ledom preprocess-data --input corpus/valid.jsonl --tokenizer data/tokenizer --output-prefix data/mine_forward_valid"
    " --direction forward": RUN_ON_QUICKSTART,
    "ledom train --config run.yaml run_dir=runs/mine data.tokenizer=data/tokenizer data.train_blend=[[1.0,data/mine]]"
    " data.valid_blend=[[1.0,data/mine_valid]] data.allow_repeats=true model.params_dtype=fp32 train.num_threads=2": (
        "tests/unit/cli/test_ledom.py, tests/packaging/test_wheel.py"
    ),
    "ledom train --config run.yaml run_dir=runs/mine_forward data.direction=forward data.tokenizer=data/tokenizer"
    " data.train_blend=[[1.0,data/mine_forward]] data.valid_blend=[[1.0,data/mine_forward_valid]] data.allow_repeats=true"
    " model.params_dtype=fp32 train.num_threads=2": RUN_ON_QUICKSTART,
    "ledom convert-checkpoint mcore-to-hf --load runs/mine --save models/mine": RUN_ON_QUICKSTART,
    "ledom inspect-shard quickstart/shards/reverse/valid --show 2": RUN_ON_QUICKSTART,
    "ledom inspect-checkpoint quickstart/runs/reverse --verify": RUN_ON_QUICKSTART,
    "ledom report-run quickstart/runs/reverse quickstart/runs/forward --output report --smooth 5": RUN_ON_QUICKSTART,
}
"""Command without its variables -> the tests that run the same or a similar command."""
