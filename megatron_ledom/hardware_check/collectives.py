"""Measure all-reduces, as one of several ranks: `python -m megatron_ledom.hardware_check.collectives FILE PARENT`."""

import os

from megatron_ledom.errors import run_command
from megatron_ledom.hardware_check.ranks import follow_the_parent, receive_work
from megatron_ledom.platform.launch import read_launch
from megatron_ledom.storage.files import write_json

MEASURED = ".measured"
"""Ending of the result's file, after the name of the file of the work."""


def measure() -> None:
    """Measure the collectives between all ranks; rank 0 writes the measured and planned seconds, and the fitted efficiency.

    The work has `port`, of the rendezvous, and `hardware`, the planner's hardware with its fitted kernels.
    """
    follow_the_parent()
    from megatron_ledom.planning.calibration import fit_kernels, measure_between_ranks
    from megatron_ledom.planning.hardware import Hardware
    from megatron_ledom.platform.device import prepare_platform

    path, work = receive_work()
    os.environ.update(MASTER_PORT=str(work["port"]))
    launch = read_launch()
    measurements = measure_between_ranks(prepare_platform(1, launch), launch)
    hardware = fit_kernels(Hardware(**work["hardware"]), measurements)
    if launch.rank == 0:
        rows = [
            {
                "collective": one.name,
                "seconds": one.seconds,
                "planned_seconds": one.planned(hardware),
                "is_fitted": one.is_fitted,
            }
            for one in measurements
        ]
        write_json(f"{path}{MEASURED}", {"collective_efficiency": hardware.collective_efficiency, "collectives": rows})


if __name__ == "__main__":
    run_command(measure)
