"""Averaged weights beside a run whose learning rate decayed, at equal tokens: held-out loss of the quickstart's model over seeds.

    python tests/benchmarks/compare_averages.py WORK [--seeds 3] [--iters 600] [--overrides section.key=value ...]

Each seed trains two runs of the same samples: one with a constant learning rate, which saves every 20th part of the run and keeps a moving
average (`optimizer.ema_decay`), and one whose rate decays in the last fifth (WSD) to a tenth. `ledom average-checkpoints` makes uniform
averages of the last 2, 4 and 8 checkpoints of the constant run. An average is evaluated by a run of one iteration with a learning rate of
1e-12, which changes no weight by more than that. The table has the mean over the seeds, its 95 % interval (Student's t), and the paired
difference to the decayed run. WORK keeps every result: the same command continues.
"""

import shutil

from comparison_runs import Runs, comparison_parser, ledom, mean_and_interval

COUNTS = (2, 4, 8)
PARTS = 20
AS_IT_IS = [
    "optimizer.lr=1e-12",
    "optimizer.min_lr=1e-12",
    "optimizer.lr_warmup_iters=0",
    "optimizer.weight_decay=0",
    "train.train_iters=1",
    "train.eval_interval=1",
]


def losses_of_seed(runs: Runs, seed: int, iters: int, ema_decay: float) -> dict[str, float]:
    """Return the held-out loss of each kind of weights."""
    common = [f"train.seed={seed}", f"train.train_iters={iters}", f"train.eval_interval={iters}"]
    saved = [
        f"checkpoint.save_interval={iters // PARTS}",
        f"checkpoint.keep_last={max(COUNTS)}",
        f"optimizer.ema_decay={ema_decay}",
    ]
    constant = runs.losses(f"constant_{seed}", [*common, "optimizer.lr_decay_style=constant", *saved])
    wsd = ["optimizer.lr_decay_style=WSD", "optimizer.lr_wsd_decay_style=linear", f"optimizer.lr_wsd_decay_iters={iters // 5}"]
    found = {
        "decayed (WSD)": runs.losses(f"decayed_{seed}", [*common, *wsd, f"checkpoint.save_interval={iters}"])["validation"],
        "constant, last weights": constant["validation"],
        f"constant, moving average {ema_decay:g}": constant["validation_ema"],
    }
    for count in COUNTS:
        average = runs.work / "runs" / f"average_{seed}_{count}"
        if not average.exists():
            ledom("average-checkpoints", "--load", runs.folder(f"constant_{seed}"), "--last", count, "--save", average)
        settings = [f"init_from={average}", f"train.seed={seed}", "checkpoint.save_interval=1", *AS_IT_IS]
        found[f"constant, last {count} checkpoints"] = runs.losses(f"evaluated_{seed}_{count}", settings)["validation"]
        shutil.rmtree(runs.folder(f"evaluated_{seed}_{count}") / "checkpoints", ignore_errors=True)
    return found


def main() -> None:
    """Train what is missing and print the table."""
    parser = comparison_parser(__doc__)
    parser.add_argument("--iters", type=int, default=600, help="iterations of a run, a multiple of 20; default: %(default)s")
    parser.add_argument("--ema-decay", type=float, default=0.98, help="decay of the moving average; default: %(default)s")
    arguments = parser.parse_args()
    runs = Runs(arguments.work, arguments.megabytes, arguments.vocab_size, arguments.overrides)
    seeds = range(1, arguments.seeds + 1)
    found = [losses_of_seed(runs, seed, arguments.iters, arguments.ema_decay) for seed in seeds]
    print("| weights | loss of each seed | mean and 95 % interval | minus decayed, paired |\n|---|---|---|---|")
    for kind in found[0]:
        values = [one[kind] for one in found]
        paired = mean_and_interval([one[kind] - one["decayed (WSD)"] for one in found]) if kind != "decayed (WSD)" else ""
        print(f"| {kind} | {', '.join(f'{value:.4f}' for value in values)} | {mean_and_interval(values)} | {paired} |")


if __name__ == "__main__":
    main()
