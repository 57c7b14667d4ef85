#!/usr/bin/env python3
"""Train matched forward and reverse models, and test the paper's claims in miniature.

The report names the claims that do not reproduce. A stopped study resumes where it ended. A step runs again only if its
settings, inputs or code have changed.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_ledom.errors import run_command

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))
"""The study uses the quickstart's functions that run commands, collect text and read metrics."""


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "full"], default="full", help="(default %(default)s)")
    parser.add_argument("--gsm8k", metavar="FILE", help="also train on GSM8K's training part, JSON lines or Parquet")
    parser.add_argument("--output", type=Path, metavar="DIR", help="(default study/SIZE)")
    parser.add_argument(
        "--only", choices=["reinforcement", "contamination"], help="run this part and what it needs, and write only its section"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the settings of the size")
    return parser.parse_args()


def main() -> None:
    """Run every part in order, then write the report."""
    arguments = parse()
    from settings import load_settings

    settings = load_settings(arguments.size, arguments.overrides, arguments.gsm8k)
    from abilities import Abilities
    from ablations import Ablations
    from backward import Backward
    from contamination import Contamination
    from losses import Twins
    from reinforcement import Reinforcement, check_installed
    from rewards import Rewards
    from steps import Runner, steps_for
    from study_report import write_part, write_study

    from megatron_ledom.evaluation.intervals import check_statistics
    from megatron_ledom.reports.pages import check_plots

    check_plots()
    check_statistics()
    if arguments.only == "reinforcement":
        check_installed()
    output = arguments.output or Path("study") / arguments.size
    twins = Twins(output, settings)
    rewards = Rewards(twins)
    alone = {"reinforcement": Reinforcement(rewards), "contamination": Contamination(rewards)}
    parts = (twins, rewards, Backward(rewards), Ablations(rewards), Abilities(twins), *alone.values())
    runner = Runner(output, at_once=len(os.sched_getaffinity(0)))
    stages = [(part, steps) for part in parts for steps in part.stages()]
    chosen = [steps for _, steps in stages]
    if arguments.only is not None:
        own = [step for part, steps in stages if part is alone[arguments.only] for step in steps]
        chosen = steps_for(chosen, own)
    for steps in chosen:
        runner.run(steps)
    if arguments.only is None:
        print(write_study(output, arguments.size, settings, runner.all_notes()))
    else:
        print(write_part(arguments.only, output, arguments.size, settings, runner.all_notes()))


if __name__ == "__main__":
    run_command(main)
