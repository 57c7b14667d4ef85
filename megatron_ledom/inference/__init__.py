"""Using a trained model: write what came before a text, score spans of it, rank answers. Needs torch and transformers only."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ledom.inference.language_model import ForwardLM, ReverseLM

__all__ = ["ForwardLM", "ReverseLM"]


def __getattr__(name: str) -> Any:
    """Import a model class when it is first asked for, so that importing the package stays instant."""
    if name == "ReverseLM":
        from megatron_ledom.inference.language_model import ReverseLM

        return ReverseLM
    if name == "ForwardLM":
        from megatron_ledom.inference.language_model import ForwardLM

        return ForwardLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
