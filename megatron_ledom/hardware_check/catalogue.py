"""The list of checks, in the order in which they run: the cheapest and most basic first."""

from megatron_ledom.hardware_check.check import Check

CHECKS: tuple[Check, ...] = ()
