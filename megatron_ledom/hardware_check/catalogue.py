"""The list of checks, in the order in which they run: the cheapest and most basic first."""

from megatron_ledom.hardware_check.check import Check

_ROOM = "megatron_ledom.hardware_check"

CHECKS: tuple[Check, ...] = (
    Check("environment", "The devices, the driver and the versions of the software.", 1.5, f"{_ROOM}.machine:environment"),
    Check(
        "operators", "The compiled operators: built if needed and possible, and loaded.", 5.0, f"{_ROOM}.operators:operators"
    ),
    Check(
        "kernels",
        "Each operator, forward and backward, against the same formula in double precision on the device.",
        2.0,
        f"{_ROOM}.kernels:kernels",
    ),
    Check("bandwidth", "Bytes per second of each operator, against a copy.", 1.5, f"{_ROOM}.bandwidth:bandwidth"),
    Check("speed", "Tokens per second and MFU of a training step.", 2.0, f"{_ROOM}.speed:speed"),
    Check("planner", "The planner's errors on this machine after calibration.", 2.0, f"{_ROOM}.speed:planner"),
)
"""The first one describes the machine for the others and always runs."""
