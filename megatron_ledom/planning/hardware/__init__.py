"""What a cluster can do: the small YAML files beside this one, or those of the user's own calibration."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron_ledom.errors import ConfigError

FOLDER = Path(__file__).parent
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(kw_only=True, slots=True, frozen=True)
class Hardware:
    """One kind of device in nodes of some, and what of its peaks programs get."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    memory_gib: PositiveFloat
    """Memory that programs see."""
    peak_tflops: PositiveFloat
    """Dense bf16 peak in 1e12 FLOP/s; what the MFU is a share of."""
    memory_gb_per_second: PositiveFloat
    """Peak of the device's memory, 1e9 byte/s."""
    gpus_per_node: Annotated[int, Field(gt=0)]
    node_gb_per_second: PositiveFloat
    """What a device sends inside a node, each way, 1e9 byte/s."""
    network_gb_per_second: PositiveFloat
    """What a device sends between nodes, each way: its share of the node's network cards, 1e9 byte/s."""
    multiprocessors: Annotated[int, Field(gt=0)]
    """Units that tiles of a matrix product are dealt out to."""
    matmul_efficiency: Fraction
    """Of the peak, for a large matrix product whose tiles fill every unit."""
    matmul_half_depth: PositiveFloat
    """Inner size of a product at which half of that is reached."""
    attention_efficiency: Fraction
    """Of the peak, for flash attention forwards, counting the causal half of the scores."""
    attention_backward_efficiency: Fraction
    """The same backwards, whose five products are counted."""
    memory_efficiency: Fraction
    """Of the memory's peak, for element-wise kernels."""
    collective_efficiency: Fraction
    """Of the links, for collectives of ring algorithms."""
    overlap_efficiency: Fraction
    """Fraction of a kernel's time in which a collective beside it makes progress."""
    latency_us: PositiveFloat
    """Microseconds that each step of a collective takes besides its bytes."""
    iteration_ms: Annotated[float, Field(ge=0)]
    """Milliseconds of an iteration besides all that is modelled."""
    reserved_gib: Annotated[float, Field(ge=0)]
    """Memory that CUDA, NCCL and the kernels' own buffers take: an allowance."""
    fragmentation: Annotated[float, Field(ge=0, lt=1)]
    """What the allocator holds more than tensors need, as a share of activations: an allowance."""
    uncertainty: Annotated[float, Field(ge=0, lt=1)]
    """Half width of the interval of step times, as a share: what the errors on unfitted points are, or a guess."""
    storage_gb_per_second: PositiveFloat
    """What a node writes to the shared file system; a guess for any but your own."""
    price_per_device_hour: Annotated[float, Field(ge=0)]
    """In your currency; a guess for any but your own."""
    is_cpu: bool = False
    """Whether the devices are ranks of a CPU: torch keeps other tensors there."""
    source: str = ""
    """Where the numbers are from."""

    def allowance(self, activations: float) -> float:
        """Bytes beside tensors: the allocator, CUDA, NCCL."""
        return self.reserved_gib * 2**30 + self.fragmentation * activations


_ADAPTER: TypeAdapter[Hardware] = TypeAdapter(Hardware)


def hardware_files() -> dict[str, Path]:
    """Return the files that come with the package, by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def load_hardware(name: str) -> Hardware:
    """A known name, or the path of a YAML file. Raises ConfigError that names what is wrong, or the names there are."""
    known = hardware_files()
    path = Path(name) if name.endswith((".yaml", ".yml")) else known.get(name)
    if path is None or not path.is_file():
        close = [other for other in known if other.startswith(name.lower())]
        close = close or difflib.get_close_matches(name.lower(), known, 1)
        hint = f"did you mean {' or '.join(close)}?" if close and name else "or give the path of a YAML file"
        raise ConfigError(f"hardware {name} is not known; it can be {', '.join(known)}; {hint}")
    try:
        return _ADAPTER.validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc'])) or 'the file'}: {problem['msg'].lower()}" for problem in error.errors()
        ]
        raise ConfigError(f"{path} does not describe hardware: {'; '.join(problems)}") from error
