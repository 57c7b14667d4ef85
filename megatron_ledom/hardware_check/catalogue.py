"""The list of checks, in the order in which they run: the cheapest and most basic first."""

from megatron_ledom.hardware_check.check import Check

HERE = "megatron_ledom.hardware_check"
CHECKS: tuple[Check, ...] = (
    Check("golden", "Ten training steps on this device have the losses of the CPU", 2, f"{HERE}.golden:check_golden"),
    Check("layouts", "Parallel layouts train as one process does", 5, f"{HERE}.layouts:check_layouts"),
    Check("nodes", "A run over all nodes of a SLURM job trains as one process does", 2, f"{HERE}.nodes:check_nodes"),
    Check(
        "transformer_engine",
        "Layers of Transformer Engine train as this package's do, in bf16",
        1.5,
        f"{HERE}.transformer_engine:check_transformer_engine",
    ),
    Check("fp8", "Each fp8 recipe that this GPU supports trains as bf16 does", 3, f"{HERE}.transformer_engine:check_fp8"),
    Check("resume", "A saved and resumed run is bit-equal to the uninterrupted one", 2, f"{HERE}.resume:check_resume"),
    Check("conversion", "A run converts to Hugging Face and back", 1.5, f"{HERE}.conversion:check_conversion"),
    Check("scores", "Reverse Reward scores, ranks and generates as on the CPU", 2, f"{HERE}.scores:check_scores"),
)
