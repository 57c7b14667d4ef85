"""Ask nvidia-smi on one node, without torch, for GPUs that would stop or spoil a run. Not yet run on hardware.

Values, fields and exit codes are those of https://docs.nvidia.com/deploy/nvidia-smi/index.html. A field that nvidia-smi does not know makes it refuse
the whole query, so the query is repeated without it, and a warning names it.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ledom.hardware_check.node_facts import Facts, run_for

SMI_SECONDS = 20.0
INDEX, NAME, BUS = "index", "name", "gpu_bus_id"
ERRORS, ECC, MIG = "ecc.errors.uncorrected.volatile.total", "ecc.mode.current", "mig.mode.current"
ACTION, PENDING, FAILURE = "gpu_recovery_action", "remapped_rows.pending", "remapped_rows.failure"
GPU_FIELDS = (INDEX, NAME, ERRORS, ECC, MIG, ACTION)
"""Fields of --query-gpu. gpu_recovery_action, what the driver asks for before new work may start, is missing in older drivers."""
ROW_FIELDS = (BUS, PENDING, FAILURE)
REFUSED = re.compile(r'Field "([^"]+)" is not a valid field to query')
FIRST_CELL = re.compile(r"\d+|[0-9a-fA-F]+:[0-9a-fA-F:.]+")
UNKNOWN = re.compile(r"\[?(N/A|Not Supported|Not Found|Insufficient Permissions)\]?", re.IGNORECASE)
BROKEN = ("unknown error", "requires reset", "is lost", "fallen off")
"""Words in place of a value of a GPU that does not work any more."""
MIG_DEVICE = re.compile(r"^\s+MIG .*\(UUID: MIG-", re.MULTILINE)
NOT_AVAILABLE = (2, 3)
"""Exit codes for an argument that this nvidia-smi does not know, and for an operation that the GPU does not have."""
MOST_SAID = 200


@dataclass(slots=True)
class Table:
    """Values of each GPU by field, what else nvidia-smi said, its exit code, and why it has not answered."""

    rows: list[dict[str, str]] = field(default_factory=list)
    said: str = ""
    code: int = 0
    failure: str = ""


def facts_of_gpus(wanted: int) -> Facts:
    """Return what is wrong with this node's GPUs. wanted: the number that the job uses here; 0: none is checked."""
    facts = Facts()
    has_smi = shutil.which("nvidia-smi") is not None
    if wanted == 0:
        facts.warnings += ["it has nvidia-smi, but its GPUs were not checked: --gpus N checks them"] if has_smi else []
        return facts
    if not has_smi:
        facts.problems.append(f"{wanted} GPUs are wanted, but there is no nvidia-smi")
        return facts
    table = _query("gpu", GPU_FIELDS, facts)
    if table.failure:
        facts.problems.append(table.failure)
        return facts
    if table.code:
        facts.problems.append(f"nvidia-smi ended with {table.code}: {table.said}")
    elif table.said:
        is_broken = any(word in table.said.lower() for word in BROKEN)
        (facts.problems if is_broken else facts.warnings).append(f"nvidia-smi says {table.said!r}")
    _add_count(wanted, table.rows, facts)
    for gpu in table.rows:
        _add_gpu(gpu, facts)
    _add_rows_of_memory(len(table.rows), facts)
    return facts


def _query(kind: str, fields: Sequence[str], facts: Facts) -> Table:
    """Return the answer of nvidia-smi; fields that it does not know become warnings."""
    known = list(fields)
    while True:
        answer = run_for(SMI_SECONDS, ["nvidia-smi", f"--query-{kind}={','.join(known)}", "--format=csv,noheader,nounits"])
        refused = REFUSED.search(answer.out + answer.err)
        if refused is None or refused[1] not in known[1:]:
            break
        known.remove(refused[1])
        facts.warnings.append(f"this nvidia-smi does not know the field {refused[1]}, so it was not checked")
    table, others = Table(code=answer.code, failure=answer.failure), []
    for line in filter(None, map(str.strip, answer.out.splitlines())):
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(known) and FIRST_CELL.fullmatch(cells[0]):
            table.rows.append(dict(zip(known, cells, strict=True)))
        else:
            others.append(line)
    table.said = " ".join(others or (answer.err.split() if answer.code else []))[:MOST_SAID]
    return table


def _add_count(wanted: int, gpus: Sequence[Mapping[str, str]], facts: Facts) -> None:
    """Compare the number of GPUs with that of the job, which counts the devices of a GPU in MIG mode one by one."""
    divided = [gpu[INDEX] for gpu in gpus if gpu.get(MIG) == "Enabled"]
    if not divided:
        if len(gpus) < wanted:
            facts.problems.append(f"{wanted} GPUs are wanted, but nvidia-smi lists {len(gpus)}")
        return
    facts.warnings.append(
        f"GPU {', '.join(divided)} in MIG mode: its errors are not all visible, and NCCL does not join MIG devices"
    )
    listed = run_for(SMI_SECONDS, ["nvidia-smi", "-L"])
    if listed.failure or listed.code:
        facts.problems.append(listed.failure or f"nvidia-smi -L ended with {listed.code}")
        return
    devices = len(gpus) - len(divided) + len(MIG_DEVICE.findall(listed.out))
    if devices < wanted:
        facts.problems.append(f"{wanted} GPUs are wanted, but nvidia-smi -L lists {devices} GPUs and MIG devices")


def _add_gpu(gpu: Mapping[str, str], facts: Facts) -> None:
    """Judge the values of one GPU. A missing number of errors is healthy only without ECC, as of GeForce."""
    index, errors, action = gpu[INDEX], gpu.get(ERRORS, ""), gpu.get(ACTION, "")
    if any(word in cell.lower() for cell in gpu.values() for word in BROKEN):
        facts.problems.append(f"GPU {index} does not work: nvidia-smi says {', '.join(list(gpu.values())[1:])}")
        return
    if action and action != "None" and not UNKNOWN.fullmatch(action):
        facts.problems.append(f"GPU {index} needs {action!r} before new work, says its driver")
    if errors.isdigit():
        if int(errors):
            facts.problems.append(f"GPU {index} has {errors} uncorrected ECC errors since the driver was loaded")
    elif gpu.get(ECC) == "Disabled":
        facts.warnings.append(f"GPU {index} has ECC disabled, so errors of its memory are silent")
    elif errors and (gpu.get(ECC) == "Enabled" or errors.strip("[]").upper() != "N/A"):
        facts.warnings.append(f"the ECC errors of GPU {index} cannot be read: nvidia-smi says {errors!r}")


def _add_rows_of_memory(num_gpus: int, facts: Facts) -> None:
    """Add rows of memory that are replaced at the next reset, or could not be; GPUs before Ampere have no spare rows."""
    table = _query("remapped-rows", ROW_FIELDS, facts)
    if table.failure or table.code not in (0, *NOT_AVAILABLE):
        facts.problems.append(table.failure or f"nvidia-smi --query-remapped-rows ended with {table.code}: {table.said}")
        return
    if len(table.rows) < num_gpus:
        said = f": nvidia-smi says {table.said!r}" if table.said else ""
        facts.warnings.append(f"replaced rows of memory were checked on {len(table.rows)} of {num_gpus} GPUs{said}")
    for row in table.rows:
        for name, words in ((PENDING, "is pending, so it needs a reset"), (FAILURE, "has failed")):
            value = row.get(name, "N/A")
            if value in ("1", "Yes"):
                facts.problems.append(f"GPU {row[BUS]}: replacing a row of memory {words}")
            elif value not in ("0", "No") and not UNKNOWN.fullmatch(value):
                facts.warnings.append(f"GPU {row[BUS]}: nvidia-smi says {value!r} for {name}")
