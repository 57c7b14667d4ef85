"""AdamW and Muon at equal tokens: the validation loss of the quickstart's model, the best of a sweep of learning rates for each.

    python tests/benchmarks/compare_optimizers.py WORK [--seeds 3] [--rates 1.5e-3 ...] [--overrides section.key=value ...]

Trains on text of this Python installation, each run in its own process. Every learning rate runs with the first seed, the best one
with the others too; a best one at the end of its list is named, because the list is then too short. The table has the mean of the
seeds and its 95 % interval (Student's t), and the paired difference per seed. WORK keeps every result: the same command continues.
"""

from comparison_runs import Runs, comparison_parser, mean_and_interval

RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
MUON = ["optimizer.muon_extra_scale_factor=0.2", "optimizer.muon_nesterov=true", "optimizer.muon_fp32_matmul_prec=highest"]
"""With them the updates are about as large as AdamW's, and both optimizers can have the same learning rates."""
OPTIMIZERS = {"adam": [], "muon": MUON}


def loss(runs: Runs, optimizer: str, lr: float, seed: int) -> float:
    """Return the validation loss at the end of a run."""
    settings = [f"optimizer.optimizer={optimizer}", f"optimizer.lr={lr}", f"optimizer.min_lr={lr / 10}", f"train.seed={seed}"]
    return runs.losses(f"{optimizer}_{lr:g}_{seed}", [*settings, *OPTIMIZERS[optimizer]])["validation"]


def main() -> None:
    """Train what is missing and print the tables."""
    parser = comparison_parser(__doc__)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates of the sweep")
    arguments = parser.parse_args()
    runs = Runs(arguments.work, arguments.megabytes, arguments.vocab_size, arguments.overrides)
    print("| optimizer | lr | seed 1 |\n|---|---|---|")
    chosen = {}
    for optimizer in OPTIMIZERS:
        losses = {lr: loss(runs, optimizer, lr, 1) for lr in arguments.rates}
        for lr, value in losses.items():
            print(f"| {optimizer} | {lr:g} | {value:.4f} |", flush=True)
        chosen[optimizer] = min(losses, key=losses.__getitem__)
    print("\n| optimizer | best lr | loss of each seed | mean and 95 % interval |\n|---|---|---|---|")
    best = dict[str, list[float]]()
    for optimizer, lr in chosen.items():
        best[optimizer] = [loss(runs, optimizer, lr, seed) for seed in range(1, arguments.seeds + 1)]
        at_end = " (end of the list)" if lr in (arguments.rates[0], arguments.rates[-1]) else ""
        seeds = ", ".join(f"{value:.4f}" for value in best[optimizer])
        print(f"| {optimizer} | {lr:g}{at_end} | {seeds} | {mean_and_interval(best[optimizer])} |", flush=True)
    differences = [muon - adam for muon, adam in zip(best["muon"], best["adam"], strict=True)]
    print(f"\nmuon - adam, paired by seed: {mean_and_interval(differences)}")


if __name__ == "__main__":
    main()
