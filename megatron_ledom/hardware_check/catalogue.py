"""The list of checks, in the order in which they run: the cheapest and most basic first."""

from megatron_ledom.hardware_check.check import Check

HERE = "megatron_ledom.hardware_check"
CHECKS: tuple[Check, ...] = (
    Check("environment", "Devices, driver, and versions of the software", 6, f"{HERE}.machine:environment"),
    Check(
        "operators",
        "The compiled operators are there, built if needed and possible, and load",
        9,
        f"{HERE}.operators:operators",
    ),
    Check("kernels", "Each operator has the results of its formula in double precision", 4, f"{HERE}.kernels:kernels"),
    Check("bandwidth", "Each operator moves its bytes about as fast as a copy", 3, f"{HERE}.bandwidth:bandwidth"),
    Check("golden", "Ten training steps on this device have the losses of the CPU", 3, f"{HERE}.golden:check_golden"),
    Check("layouts", "Parallel layouts train as one process does", 5, f"{HERE}.layouts:check_layouts"),
    Check(
        "nodes",
        "A run over all nodes of a SLURM job trains as one process does",
        2,
        f"{HERE}.nodes:check_nodes",
        keeps_job=True,
    ),
    Check(
        "transformer_engine",
        "Layers of Transformer Engine train as this package's do, in bf16",
        3,
        f"{HERE}.transformer_engine:check_transformer_engine",
    ),
    Check("fp8", "Each fp8 recipe that this GPU supports trains as bf16 does", 3, f"{HERE}.transformer_engine:check_fp8"),
    Check("resume", "A saved and resumed run is bit-equal to the uninterrupted one", 2, f"{HERE}.resume:check_resume"),
    Check("conversion", "A run converts to Hugging Face and back", 1.5, f"{HERE}.conversion:check_conversion"),
    Check("scores", "Reverse Reward scores, ranks and generates as on the CPU", 2, f"{HERE}.scores:check_scores"),
    Check("speed", "Tokens per second and MFU of a training step", 2, f"{HERE}.speed:speed"),
    Check(
        "planner", "The calibrated planner predicts kernels, a training step and its memory", 2, f"{HERE}.planner:check_planner"
    ),
)
"""The first one describes the machine for the others and always runs."""
