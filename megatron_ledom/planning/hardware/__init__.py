"""Hardware of a cluster, read from the YAML files in this folder or from a file that `ledom calibrate-hardware` wrote."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron_ledom.errors import ConfigError

FOLDER = Path(__file__).parent
UNPLANNED = {"gb200", "gb300", "nvl72"}
"""Hardware whose NVLink domain has more than 16 GPUs. Published runs do not suffice to fit and test a model of it."""
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(kw_only=True, slots=True, frozen=True)
class Hardware:
    """One kind of device: its peak rates, its nodes and links, and the fractions of the peaks that programs reach."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    memory_gib: PositiveFloat
    """Memory of a device that programs can use, in GiB."""
    peak_tflops: PositiveFloat
    """Dense bf16 peak in 1e12 FLOP/s; MFU is a fraction of it."""
    memory_gb_per_second: PositiveFloat
    """Peak bandwidth of the device's memory, in 1e9 byte/s."""
    gpus_per_node: Annotated[int, Field(gt=0, le=16)]
    node_gb_per_second: PositiveFloat
    """Bandwidth of a device inside its node, in each direction, in 1e9 byte/s."""
    network_gb_per_second: PositiveFloat
    """Bandwidth of a device between nodes, in each direction, in 1e9 byte/s: that of the node's network cards, per device."""
    multiprocessors: Annotated[int, Field(gt=0)]
    """Number of units that compute the tiles of a matrix product."""
    matmul_efficiency: Fraction
    """Fraction of the peak that a large matrix product reaches if its tiles fill every unit."""
    matmul_half_depth: PositiveFloat
    """Inner size of a matrix product that reaches half of `matmul_efficiency`."""
    attention_efficiency: Fraction
    """Fraction of the peak that flash attention reaches forward, with the FLOPs of the causal half of the scores."""
    attention_backward_efficiency: Fraction
    """Fraction of the peak that flash attention reaches backward, with the FLOPs of its five products."""
    memory_efficiency: Fraction
    """Fraction of the memory's peak that element-wise kernels reach."""
    collective_efficiency: Fraction
    """Fraction of the links' bandwidth that ring collectives reach."""
    overlap_efficiency: Fraction
    """Fraction of a kernel's time in which an overlapping collective makes progress."""
    latency_us: PositiveFloat
    """Latency of each step of a collective, in microseconds."""
    iteration_ms: Annotated[float, Field(ge=0)]
    """Time of an iteration that the model does not explain, in milliseconds."""
    reserved_gib: Annotated[float, Field(ge=0)]
    """Allowance for CUDA, NCCL and the kernels' own buffers, in GiB."""
    fragmentation: Annotated[float, Field(ge=0, lt=1)]
    """Allowance for unused memory of the allocator, as a fraction of the activations."""
    uncertainty: Annotated[float, Field(ge=0, lt=1)]
    """Half width of the interval of step times, as a fraction: from the errors on unfitted points, or a guess."""
    storage_gb_per_second: PositiveFloat
    """Write speed of a node to the shared file system, in 1e9 byte/s. A guess in the files of this folder."""
    price_per_device_hour: Annotated[float, Field(ge=0)]
    """Price in any currency. A guess in the files of this folder."""
    overlap_slowdown: Annotated[float, Field(ge=0)] = 0.189
    """Fraction by which kernels take longer while data-parallel traffic overlaps with them. The default is the mean that Lee et al. 2025
    (arXiv 2507.03114, abstract) measured on A100, H100, MI210 and MI250."""
    congestion: Annotated[float, Field(ge=0)] = 0.0
    """Fraction by which the passes take longer each time that the nodes of a data-parallel group double: congestion of the network, and
    waits for the slowest rank. 0 plans none; VALIDATION.md has the growth of published runs."""
    is_cpu: bool = False
    """True if the devices are ranks of a CPU, where torch keeps other tensors."""
    source: str = ""
    """Origin of the numbers."""

    def allowance(self, activations: float) -> float:
        """Return the bytes to add to those of tensors for the allocator, CUDA and NCCL."""
        return self.reserved_gib * 2**30 + self.fragmentation * activations


_ADAPTER: TypeAdapter[Hardware] = TypeAdapter(Hardware)


def hardware_files() -> dict[str, Path]:
    """Return the hardware files of this package by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def load_hardware(name: str) -> Hardware:
    """Load hardware by name, or from the path of a YAML file. Raises ConfigError for an unknown name or a bad file."""
    known = hardware_files()
    path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if name.lower().partition("-")[0] in UNPLANNED:
        raise ConfigError(
            f"hardware {name} has an NVLink domain of 72 GPUs, which the planner does not model, because published runs do not suffice"
            " to fit and test such a model; plan a run on nodes of eight with b200, or give the path of a YAML file of your own"
        )
    if path is None or not path.is_file():
        close = [other for other in known if other.startswith(name.lower())]
        close = close or difflib.get_close_matches(name.lower(), known, 1)
        hint = f"did you mean {' or '.join(close)}?" if close and name else "or give the path of a YAML file"
        raise ConfigError(f"hardware {name} is not known; the names are {', '.join(known)}; {hint}")
    try:
        return _ADAPTER.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg'].lower()}" for problem in error.errors()
        ]
        raise ConfigError(f"{path} is not a valid hardware file: {'; '.join(problems)}") from error
