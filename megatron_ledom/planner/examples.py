"""The worked examples of the project's README, and how marked parts of documents are kept equal to what scripts print."""

from pathlib import Path

from megatron_ledom.config.load import load_config
from megatron_ledom.errors import UsageError
from megatron_ledom.planner.hardware import load_hardware
from megatron_ledom.planner.memory import GIB
from megatron_ledom.planner.plan import Plan, name_layout
from megatron_ledom.planner.search import search
from megatron_ledom.storage.files import write_file
from megatron_ledom.storage.locks import output_file_lock

CONFIG = Path(__file__).parents[2] / "examples/configs/ledom_7b.yaml"
HARDWARE = ("a100-80", "h100-sxm")


def worked_examples() -> str:
    """The best layouts of the 7B on 64 devices of each kind, and what the first of them needs and takes."""
    lines = ["| on 64 | layout | s/iteration | MFU | GiB a device |", "|---|---|---:|---:|---:|"]
    best: list[Plan] = []
    for name in HARDWARE:
        found = search(load_config(str(CONFIG)), 64, load_hardware(name))
        best.append(found.ranked[0][1])
        for _, plan in found.ranked[:3]:
            cells = f"{plan.time.total:.1f} | {plan.mfu:.1%} | {plan.needed_gib:.1f}"
            lines.append(f"| {plan.hardware.name} | {name_layout(plan.layout)} | {cells} |")
    lines += ["", "| the best of them | " + " | ".join(plan.hardware.name for plan in best) + " |", "|---|---:|---:|"]
    rows = {
        "s/iteration, interval": [f"{plan.interval[0]:.1f} to {plan.interval[1]:.1f}" for plan in best],
        "tokens/s a device": [f"{plan.tokens_per_second_per_device:,.0f}" for plan in best],
        "days for 435.37 B tokens": [f"{plan.seconds / 86400:.1f}" for plan in best],
        "device-hours": [f"{plan.device_hours:,.0f}" for plan in best],
        "GiB: weights, gradients, optimizer": [f"{plan.stages[0].state / GIB:.1f}" for plan in best],
        "GiB: activations and logits": [f"{(plan.stages[0].activations + plan.stages[0].logits) / GIB:.1f}" for plan in best],
        "matrix products": [f"{plan.time.passes.matmul / plan.time.total:.0%}" for plan in best],
        "attention": [f"{plan.time.passes.attention / plan.time.total:.0%}" for plan in best],
        "element-wise kernels": [f"{plan.time.passes.memory / plan.time.total:.0%}" for plan in best],
        "tensor-parallel traffic": [f"{plan.time.passes.tensor_comm / plan.time.total:.0%}" for plan in best],
    }
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def write_between(file: str, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->` of a document. Raises UsageError without them."""
    with output_file_lock(file, "--write"):
        before, _, after = marked(Path(file).read_text(encoding="utf-8"), mark, file)
        write_file(file, f"{before}{text}{after}")


def marked(document: str, mark: str, name: str) -> tuple[str, str, str]:
    """A document up to and with a mark, what stands between it and its end, and the rest."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise UsageError(f"{name} lacks the lines {begin.strip()} and {end}, between which the text goes")
    before, rest = document.split(begin)
    between, after = rest.split(end)
    return before + begin, between, end + after
