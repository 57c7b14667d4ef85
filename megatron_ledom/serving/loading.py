"""Load the models of a server."""

from pathlib import Path

from megatron_ledom.direction import Direction
from megatron_ledom.inference.engines.remote_engine import RECORDED, UnrecordedReverse
from megatron_ledom.inference.language_model import ForwardLM, LanguageModel, ReverseLM
from megatron_ledom.inference.model_folder import COMMAND_OPTIONS
from megatron_ledom.serving.settings import ServeSettings


def unrecorded_reverse(settings: ServeSettings, direction: Direction) -> UnrecordedReverse:
    """Return what the user says of a folder that records no direction."""
    if direction is Direction.FORWARD:
        return RECORDED
    return UnrecordedReverse(settings.direction == str(direction), settings.eod_id, COMMAND_OPTIONS)


def load_model(settings: ServeSettings, direction: Direction, folder: Path, device: str | None = None) -> LanguageModel:
    """Return the model of a folder; device: by default CUDA if available, else the CPU."""
    if direction is Direction.FORWARD:
        return ForwardLM.from_pretrained(folder, device)
    return ReverseLM.from_pretrained(
        folder, device, direction=settings.direction, eod_id=settings.eod_id, option_names=COMMAND_OPTIONS
    )
