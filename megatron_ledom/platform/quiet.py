"""Suppresses warnings of libraries that the user of a command cannot act on."""

import logging
import warnings

from megatron_ledom.platform.core_versions import quiet_announcements

NOISY_MODULES = (r"megatron\.core", r"torch\.distributed\.checkpoint", r"torch\.distributed\._shard")
"""Modules that warn about missing packages (which the commands log in one line) or about their own future versions."""


def quiet_libraries() -> None:
    """Suppress these warnings from now on. Call before importing megatron-core."""
    for module in NOISY_MODULES:
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    quiet_announcements()
