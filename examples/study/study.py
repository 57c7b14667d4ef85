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
        "--parts",
        "--only",
        metavar="NAME[,NAME]",
        help="run these parts and what they need, and write only their sections: reinforcement, contamination, controls, loss_gap, infill,"
        " two_way, teacher",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the settings of the size")
    return parser.parse_args()


def main() -> None:
    """Run every part in order, then write the report."""
    arguments = parse()
    from settings import load_settings, named_parts

    alone_parts = None if arguments.parts is None else named_parts(arguments.parts)
    settings = load_settings(arguments.size, arguments.overrides, arguments.gsm8k)
    from abilities import Abilities
    from ablations import Ablations
    from backward import Backward
    from contamination import Contamination
    from controls import Controls
    from infill import Infilling
    from loss_gap import LossGap
    from losses import Twins
    from reinforcement import Reinforcement, check_installed
    from rewards import Rewards
    from steps import Runner, steps_for
    from study_report import write_part, write_study
    from teacher import Teacher
    from two_way import TwoWay

    from megatron_ledom.evaluation.intervals import check_statistics
    from megatron_ledom.reports.pages import check_plots

    check_plots()
    check_statistics()
    wanted = alone_parts or settings.parts
    if "reinforcement" in (alone_parts or []):
        check_installed()
    output = arguments.output or Path("study") / arguments.size
    twins = Twins(output, settings)
    rewards = Rewards(twins)
    alone = {"reinforcement": Reinforcement(rewards), "contamination": Contamination(rewards)}
    abilities = Abilities(twins)
    alone |= {
        "controls": Controls(twins),
        "loss_gap": LossGap(twins),
        "infill": Infilling(twins),
        "two_way": TwoWay(abilities),
        "teacher": Teacher(twins),
    }
    chosen = [part for name, part in alone.items() if name in wanted]
    parts = (twins, rewards, Backward(rewards), Ablations(rewards), abilities, *chosen)
    runner = Runner(output, at_once=len(os.sched_getaffinity(0)))
    stages = [(part, steps) for part in parts for steps in part.stages()]
    needed = [steps for _, steps in stages]
    if alone_parts is not None:
        needed = steps_for(needed, [step for part, steps in stages if part in chosen for step in steps])
    for steps in needed:
        runner.run(steps)
    if alone_parts is None:
        print(write_study(output, arguments.size, settings, runner.all_notes()))
    for name in alone_parts or []:
        print(write_part(name, output, arguments.size, settings, runner.all_notes()))


if __name__ == "__main__":
    run_command(main)
