"""What libraries say at their import and of their own insides, which nobody who runs a command can act on."""

import logging
import warnings

SPEAKERS = (r"megatron\.core", r"torch\.distributed\.checkpoint", r"torch\.distributed\._shard")
"""Modules whose warnings are about what is installed (the commands say it in one line) or about their own future."""


def quiet_libraries() -> None:
    """Leave out these warnings from now on; call before megatron-core is imported."""
    for module in SPEAKERS:
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("megatron").setLevel(logging.WARNING)
