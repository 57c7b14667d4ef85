"""Import layers, uses of megatron-core, and sizes of files and functions, read from the source without importing it."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from tests.support.paths import ROOT

LAYERS = """
__init__: direction errors lazy
_helpers: errors
direction: _helpers
reversal_units: direction errors
errors:
lazy:
provenance: direction errors
storage: errors
contamination: _helpers errors storage
markdown: errors storage
tables:
tokenizers: _helpers direction errors lazy provenance reversal_units storage
config: direction errors storage
platform: errors storage
ops: platform
parallel: config errors platform
model: config errors ops parallel platform
planning: config errors tables model
planning.calibration: config parallel platform storage
planning.dry_run: config data direction
planning.verdicts: checkpoint config errors
data: config contamination direction errors lazy parallel platform provenance reversal_units storage tables tokenizers
checkpoint: config errors parallel platform provenance storage
monitoring: checkpoint config errors platform storage
reverse_teacher: checkpoint config data direction errors inference parallel provenance storage tokenizers
training: checkpoint config data direction errors lazy model monitoring ops parallel platform provenance reversal_units\
 reverse_teacher storage tokenizers
mirror: checkpoint config data errors platform storage
callbacks: checkpoint config data direction errors evaluation inference mirror model parallel platform storage training
pretrain: callbacks checkpoint config data errors mirror model ops parallel planning platform reverse_teacher tokenizers training
inference: direction errors lazy provenance storage tokenizers
convert: checkpoint config direction errors inference lazy tables model parallel platform provenance storage tokenizers
serving: direction errors inference monitoring tokenizers
rewards: direction errors inference lazy storage
finetune: data direction errors inference lazy provenance storage tokenizers
evaluation: contamination direction errors inference lazy storage tables tokenizers
reports: checkpoint config direction errors evaluation inference tables planning storage training
hardware_check: checkpoint config convert data direction errors inference model ops parallel planning platform pretrain\
 storage tables training
corpus: config contamination data direction errors evaluation platform storage tables tokenizers
cli: checkpoint config contamination convert corpus data direction errors evaluation finetune hardware_check inference markdown\
 monitoring ops planning platform reports rewards serving training
"""
MAY_IMPORT = {room: set(names.split()) for room, _, names in (line.partition(":") for line in LAYERS.split("\n") if line)}
"""Part of the package -> other parts that it may import; each is imported by some file of it."""
MEGATRON_FREE = {
    *(
        "config",
        "direction",
        "errors",
        "evaluation",
        "inference",
        "monitoring",
        "planning",
        "provenance",
        "reports",
        "rewards",
        "storage",
    ),
    "tokenizers",
}
TORCH_FREE = {"config", "monitoring", "planning", "storage", "tokenizers"}
OUTSIDE = {"tools", "tests", "examples"}
HEAVY = ("torch", "megatron", "transformers", "pyarrow", "tensorboard", "matplotlib", "sentencepiece", "tokenizers")
MAX_FUNCTION, MAX_FILE, MAX_NESTING = 60, 500, 4
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith, ast.Match)
Finding = tuple[int, str]
Rule = Callable[[Path, ast.Module], Iterator[Finding]]


def part_of(path: Path) -> str:
    """Return `data` for megatron_ledom/data/shards/shard.py, `errors` for megatron_ledom/errors.py."""
    return path.parts[1].removesuffix(".py") if path.parts[0] == "megatron_ledom" else ""


def room_of(path: Path) -> str:
    """Return the most exact entry of MAY_IMPORT for a file: its own, that of its folder, or that of its part; else nothing."""
    names = path.with_suffix("").parts[1:] if path.parts[0] == "megatron_ledom" else ()
    rooms = [".".join(names[:length]) for length in range(len(names), 0, -1)]
    return next((room for room in rooms if room in MAY_IMPORT), "")


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import, including late ones; relative names begin with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def layers(path: Path, tree: ast.Module) -> Iterator[Finding]:
    part, room = part_of(path), room_of(path)
    for line, name in imports(tree):
        top, *rest = name.split(".")
        known = top == "megatron_ledom" and bool(room and rest) and rest[0] in MAY_IMPORT
        if name.startswith("."):
            yield line, "a relative import; use the absolute name"
        elif known and rest[0] not in {part, *MAY_IMPORT[room]}:
            yield line, f"{room} must not import {rest[0]}"
        elif top in OUTSIDE and part:
            yield line, f"nobody imports {top}"
        elif top in ("megatron", "transformer_engine", "apex") and room in MEGATRON_FREE:
            yield line, f"{room} must not import {top}"
        elif top == "torch" and room in TORCH_FREE:
            yield line, f"{room} must not import torch"


def engine_is_met_in_few_places(path: Path, tree: ast.Module) -> Iterator[Finding]:
    for line, name in imports(tree):
        parts = name.split(".")
        if parts[0] != "megatron":
            continue
        if "parallel_state" in parts and part_of(path) not in ("parallel", ""):
            yield line, "only parallel/ uses parallel_state"
        if "GPTModel" in parts and path != Path("megatron_ledom/model/builder.py"):
            yield line, "only model/builder.py imports GPTModel"


def only_platform_patches(path: Path, tree: ast.Module) -> Iterator[Finding]:
    if part_of(path) in ("platform", ""):
        return
    theirs = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] in ("megatron", "torch")
    }
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            targets = [ast.Attribute(node.args[0], "set", ast.Store())]
        for target in targets:
            root = target.value if isinstance(target, ast.Attribute) else None
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in theirs:
                yield node.lineno, f"only platform/ changes {root.id}"


def sizes(path: Path, tree: ast.Module) -> Iterator[Finding]:
    lines = source_lines(path)
    if len(lines) > MAX_FILE and "# house:" not in lines[0]:
        yield 1, f"the file has {len(lines)} lines (limit {MAX_FILE})"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or "# house:" in lines[node.lineno - 1]:
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MAX_FUNCTION:
            yield node.lineno, f"{node.name} has {length} lines (limit {MAX_FUNCTION})"
        if (depth := nesting(node)) > MAX_NESTING:
            yield node.lineno, f"{node.name} nests {depth} deep (limit {MAX_NESTING})"


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Return the nesting depth of a function; `elif` adds none, and inner functions are counted separately."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


LINES = [
    (re.compile(r"\[::-1\]|\b(np|torch)\.(flip|flipud|fliplr)\("), "order changes in direction.py only"),
    (re.compile(r"trust_remote_code\s*=\s*True"), "no remote code"),
    (re.compile(r"\bpickle\.loads?\(|torch\.load\((?!.*weights_only\s*=\s*True)"), "nothing is unpickled"),
    (re.compile(r"(?<![\w.])/(work|root|home|tmp)/\w"), "a path of one machine"),
]


def lines(path: Path, tree: ast.Module) -> Iterator[Finding]:
    if path.parts[0] == "tests" or path.name == "direction.py":
        return
    for number, line in enumerate(source_lines(path), 1):
        yield from ((number, text) for pattern, text in LINES if pattern.search(line) and "# house:" not in line)


def no_code_of_a_folder(path: Path, tree: ast.Module) -> Iterator[Finding]:
    """Find loads without the option: transformers then prompts at the terminal, and runs code if the answer is yes."""
    if path.parts[0] == "tests":
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
            is_auto = ast.unparse(node.func.value).split(".")[-1].startswith("Auto")
            refuses = any(word.arg == "trust_remote_code" and ast.unparse(word.value) == "False" for word in node.keywords)
            if is_auto and not refuses:
                yield node.lineno, "trust_remote_code=False must be given"


PUBLISHES = {"fsync", "fdatasync", "flock", "lockf", "rename", "renames", "move"}


def only_storage_publishes(path: Path, tree: ast.Module) -> Iterator[Finding]:
    """Find renames, syncs and locks outside storage/, which protects files against kills."""
    if path.parts[0] == "tests" or part_of(path) == "storage":
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        is_module = owner in ("os", "fcntl", "shutil") and name in (*PUBLISHES, "replace")
        is_path = name in ("rename", "replace") and len(node.args) == 1 and not node.keywords  # text.replace has two arguments
        if is_module or is_path:
            yield node.lineno, f"{owner}.{name}: only storage/ renames, forces to disk and locks"


NAMES_FILES_OF_A_CHECKOUT = {"cli/__init__.py", "cli/main.py", "config/shipped.py"}


def no_file_of_a_checkout(path: Path, tree: ast.Module) -> Iterator[Finding]:
    """Find messages that name files of tools/ or examples/, which a wheel does not have."""
    if not part_of(path) or path.relative_to("megatron_ledom").as_posix() in NAMES_FILES_OF_A_CHECKOUT:
        return
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and re.search(r"\b(tools|examples)/", node.value) and "# house:" not in source_line(path, node.lineno):
            yield node.lineno, "names a file that a wheel does not have; write `ledom COMMAND`"


RULES: list[Rule] = [
    layers,
    engine_is_met_in_few_places,
    only_platform_patches,
    sizes,
    lines,
    no_code_of_a_folder,
    only_storage_publishes,
    no_file_of_a_checkout,
]


@cache
def source_lines(path: Path) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines() or [""]


def source_line(path: Path, number: int) -> str:
    """Return one line of a file of the checkout; nothing for source text of a test."""
    return source_lines(path)[number - 1] if (ROOT / path).is_file() else ""


@cache
def sources() -> list[tuple[Path, ast.Module]]:
    found = [file for top in ("megatron_ledom", "tools", "tests", "examples") for file in sorted((ROOT / top).rglob("*.py"))]
    return [(file.relative_to(ROOT), ast.parse(file.read_text(encoding="utf-8"))) for file in found]


def tools() -> list[str]:
    return [f"tools/{file.name}" for file in sorted((ROOT / "tools").glob("*.py"))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_keeps_the_rule(rule: Rule) -> None:
    findings = [f"{path}:{line}: {text}" for path, tree in sources() for line, text in rule(path, tree)]
    assert not findings, "\n".join(findings)


def test_every_part_of_the_package_has_an_entry_and_uses_all_of_it() -> None:
    unused = {room: set(allowed) for room, allowed in MAY_IMPORT.items()}
    for path, tree in sources():
        if not part_of(path):
            continue
        assert part_of(path) in MAY_IMPORT, f"{path} is in no part that MAY_IMPORT names"
        unused[room_of(path)] -= {name.split(".")[1] for _, name in imports(tree) if name.startswith("megatron_ledom.")}
    assert not {room: names for room, names in unused.items() if names}


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (layers, "data/x.py", "from megatron_ledom.model.builder import build_model"),
        (layers, "data/x.py", "def late():\n    from megatron_ledom import training"),
        (layers, "checkpoint/x.py", "import megatron_ledom.training.trainer"),
        (layers, "training/x.py", "from megatron_ledom.pretrain import run"),
        (layers, "lazy.py", "from megatron_ledom.errors import UsageError"),
        (layers, "config/x.py", "import torch.nn"),
        (layers, "planning/x.py", "import torch"),
        (layers, "planning/x.py", "from megatron_ledom.training.trainer import train"),
        (layers, "inference/x.py", "from megatron.core import tensor_parallel"),
        (layers, "evaluation/x.py", "from megatron_ledom.config.schema import RunConfig"),
        (layers, "model/x.py", "from .builder import build_model"),
        (layers, "training/x.py", "from tools.generate import main"),
        (engine_is_met_in_few_places, "training/x.py", "from megatron.core import parallel_state as mpu"),
        (engine_is_met_in_few_places, "training/x.py", "from megatron.core.parallel_state import get_data_parallel_rank"),
        (engine_is_met_in_few_places, "convert/x.py", "from megatron.core.models.gpt import GPTModel"),
        (only_platform_patches, "model/x.py", "import megatron.core.utils as u\nu.is_te = lambda: False"),
        (only_platform_patches, "model/x.py", "from megatron.core import optimizer\noptimizer.clip.norm = None"),
        (only_platform_patches, "model/x.py", "import torch\nsetattr(torch.cuda, 'x', 1)"),
        (no_code_of_a_folder, "inference/x.py", "import transformers\ntransformers.AutoTokenizer.from_pretrained('x')"),
        (no_code_of_a_folder, "inference/x.py", "AutoConfig.from_pretrained('x', trust_remote_code=asked)"),
        (only_storage_publishes, "data/x.py", "os.replace(part, path)"),
        (only_storage_publishes, "data/x.py", "Path(part).replace(path)"),
        (only_storage_publishes, "data/x.py", "part.rename(path)"),
        (only_storage_publishes, "data/x.py", "os.fsync(file.fileno())"),
        (only_storage_publishes, "data/x.py", "fcntl.flock(file, fcntl.LOCK_EX)"),
        (no_file_of_a_checkout, "data/x.py", "raise DataError(f'{path}: see tools/inspect_shard.py {path}')"),
        (no_file_of_a_checkout, "data/x.py", '"""Options of tools/inspect_shard.py."""'),
        (no_file_of_a_checkout, "data/x.py", "text = 'pass examples/configs/ledom_7b.yaml'"),
    ],
)
def test_rule_finds_bad_source(rule: Rule, path: str, source: str) -> None:
    assert list(rule(Path("megatron_ledom") / path, ast.parse(source)))


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (layers, "data/x.py", "from megatron_ledom.config.schema import RunConfig\nimport torch"),
        (layers, "pretrain.py", "from megatron_ledom.training.trainer import train"),
        (engine_is_met_in_few_places, "parallel/x.py", "from megatron.core import parallel_state"),
        (engine_is_met_in_few_places, "model/builder.py", "from megatron.core.models.gpt import GPTModel"),
        (only_platform_patches, "platform/x.py", "import megatron.core.utils as u\nu.is_te = lambda: False"),
        (
            no_code_of_a_folder,
            "inference/x.py",
            "AutoConfig.from_pretrained('x', trust_remote_code=False)\nLM.from_pretrained('x')",
        ),
        (only_storage_publishes, "storage/x.py", "os.replace(part, path)"),
        (no_file_of_a_checkout, "data/x.py", "text = 'ledom inspect-shard'; other = 'my_tools/x'"),
        (only_storage_publishes, "data/x.py", "text.replace('a', 'b')\nreplace(settings, seed=1)\npublish(part, path)"),
        (only_platform_patches, "model/x.py", "from megatron.core import optimizer\nmine = optimizer.clip\nself.x = 1"),
    ],
)
def test_rule_lets_good_source_pass(rule: Rule, path: str, source: str) -> None:
    assert not list(rule(Path("megatron_ledom") / path, ast.parse(source)))


HELP = """
import json, resource, runpy, sys
name, as_module = sys.argv[1], sys.argv[2] == "module"
sys.argv = [name, "--help"]
code = None
try:
    (runpy.run_module if as_module else runpy.run_path)(name, run_name="__main__")
except SystemExit as stop:
    code = stop.code
used = resource.getrusage(resource.RUSAGE_SELF)
report = {"code": code, "modules": sorted(sys.modules), "seconds": used.ru_utime + used.ru_stime}
print(json.dumps(report), file=sys.stderr)
"""


@pytest.mark.parametrize("command", [*tools(), "megatron_ledom.pretrain"])
def test_help_answers_at_once(command: str) -> None:
    how = "file" if command.endswith(".py") else "module"
    asked = subprocess.run([sys.executable, "-c", HELP, command, how], cwd=ROOT, capture_output=True, text=True, check=False)
    assert asked.stdout.startswith("usage:"), asked.stderr
    report = json.loads(asked.stderr.splitlines()[-1])
    assert report["code"] == 0
    assert not [name for name in HEAVY if name in report["modules"]]
    assert report["seconds"] < 2  # of processor time, so that a busy machine does not matter


def is_type_checking(node: ast.AST) -> bool:
    """Return whether this is `if TYPE_CHECKING:`, whose imports are not made when the program runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING"


def runtime_imports(node: ast.AST) -> Iterator[str]:
    """Return the dotted names that are imported when the program runs, late imports included."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for other in child.orelse:  # type: ignore[attr-defined]
                yield from runtime_imports(ast.Module([other], []))
        elif isinstance(child, ast.Import | ast.ImportFrom):
            yield from (name for _, name in imports(ast.Module([child], [])))
        else:
            yield from runtime_imports(child)


def imported_files(path: Path, tree: ast.Module, files: Iterable[Path]) -> set[Path]:
    """Return the files that a file imports: the module, or the `__init__.py` of a package, not those of the packages above."""
    found = set()
    for name in runtime_imports(tree):
        module, package = name.replace(".", "/"), name.rpartition(".")[0].replace(".", "/")
        candidates = map(Path, (f"{module}.py", f"{module}/__init__.py", f"{package}.py", f"{package}/__init__.py"))
        found.add(next((file for file in candidates if file in files), path))
    return found - {path}


def circles(files: dict[Path, ast.Module]) -> list[str]:
    """Return the groups of files that import each other, each as one line."""
    graph = nx.DiGraph({path: sorted(imported_files(path, tree, files)) for path, tree in files.items()})
    groups = [group for group in nx.strongly_connected_components(graph) if len(group) > 1]
    return sorted(" <-> ".join(sorted(map(str, group))) for group in groups)


def test_no_files_import_each_other() -> None:
    found = circles({path: tree for path, tree in sources() if path.parts[0] == "megatron_ledom"})
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("first", "second", "is_circle"),
    [
        ("from p.b import x", "import p.a", True),
        ("from p import b", "def late():\n    from p.a import y", True),
        ("from p.b import x", "from p import *\nimport p.c", False),
        ("import p.b", "if TYPE_CHECKING:\n    from p.a import y\nelse:\n    y = None", False),
        ("import p.b", "try:\n    import json\nexcept ImportError:\n    from p.a import y", True),
    ],
)
def test_a_circle_of_imports_is_found(first: str, second: str, is_circle: bool) -> None:
    files = {"p/a.py": first, "p/b.py": second, "p/c.py": "import p.b", "p/__init__.py": ""}
    if not is_circle:
        files["p/c.py"] = ""
    expected = ["p/a.py <-> p/b.py"] if is_circle else []
    assert circles({Path(name): ast.parse(source) for name, source in files.items()}) == expected


def imported_at_once(path: Path) -> set[str]:
    """Return the other packages that importing one of our files imports, without late imports."""
    trees, found, seen, waiting = dict(sources()), set[str](), {path}, [path]
    while waiting:
        at_top = [node for node in trees[waiting.pop()].body if isinstance(node, ast.Import | ast.ImportFrom)]
        for _, name in imports(ast.Module(at_top, [])):
            parts = name.split(".")
            found.add(parts[0])
            module, package = "/".join(parts), "/".join(parts[:-1])
            for file in map(Path, (f"{module}.py", f"{package}.py", f"{package}/__init__.py")):
                if file in trees and file not in seen:
                    seen.add(file)
                    waiting.append(file)
    return found


@pytest.mark.parametrize("file", ["hf_export.py", "hf_import.py"])
def test_a_conversion_without_the_parity_check_does_not_import_megatron_core(file: str) -> None:
    found = imported_at_once(Path("megatron_ledom/convert", file))
    assert {"torch", "transformers", "safetensors"} <= found
    assert "megatron" not in found
