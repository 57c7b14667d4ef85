#!/usr/bin/env python3
"""Matched forward and reverse models, and the paper's claims in miniature: what does not reproduce is reported as such.

Every step is done once. Started again, the study goes on where it was stopped; what depends on a changed setting is made anew.
"""

import argparse
import os
import sys
from pathlib import Path

from megatron_ledom.errors import run_command

sys.path.append(str(Path(__file__).resolve().parents[1] / "quickstart"))
"""The quickstart's ways to run commands, to collect text and to read metrics are used here too."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "small", "full"], default="full", help="(default %(default)s)")
    parser.add_argument("--gsm8k", metavar="FILE", help="GSM8K's training part, JSON lines or Parquet, to learn from as well")
    parser.add_argument("--output", type=Path, metavar="DIR", help="(default study/SIZE)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the size's settings")
    return parser.parse_args()


def main() -> None:
    """Every part in order, then the report."""
    arguments = parse()
    from settings import load_settings

    settings = load_settings(arguments.size, arguments.overrides, arguments.gsm8k)
    from abilities import Abilities
    from ablations import Ablations
    from backward import Backward
    from losses import Twins
    from rewards import Rewards
    from steps import Runner
    from study_report import write_study

    from megatron_ledom.evaluation.intervals import check_statistics
    from megatron_ledom.reports.pages import check_plots

    check_plots()
    check_statistics()
    output = arguments.output or Path("study") / arguments.size
    twins = Twins(output, settings)
    rewards = Rewards(twins)
    runner = Runner(output, at_once=len(os.sched_getaffinity(0)))
    for part in (twins, rewards, Backward(rewards), Ablations(rewards), Abilities(twins)):
        for steps in part.stages():
            runner.run(steps)
    print(write_study(output, arguments.size, settings, runner.all_notes()))


if __name__ == "__main__":
    run_command(main)
