"""docs/reference/config.md: every key of a run's configuration, from the dataclasses and docstrings of config/schema.py."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from docs.generator.cli_page import text_cell
from docs.generator.paths import GENERATED, ROOT

SCHEMA = ROOT / "megatron_ledom/config/schema.py"
NAMES = {
    "int": "integer",
    "float": "number",
    "str": "text",
    "bool": "true or false",
    "Direction": "`reverse` or `forward`",
    "ModelDirection": "`reverse`, `forward` or `both`",
}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
INTRODUCTION = """
# Configuration

A run is described by one YAML file with the sections below. `base: FILE` takes the keys of another file first, and
`section.key=value` on the command line overrides a key. An unknown key is refused with a suggestion. `ledom train --config FILE
--dry-run` prints the resolved configuration with every number that follows from it. `ledom configs list` names the files that come
with the package, and `ledom configs show NAME` prints one.

A default of `null` means that the value follows from other keys or from the machine, as the last column says.
"""


@dataclass(frozen=True)
class Key:
    """One key: its name, type and default as the page shows them, and its docstring."""

    name: str
    type: str
    default: str
    meaning: str


def config_page() -> str:
    """Return the page."""
    tree = ast.parse(SCHEMA.read_text(encoding="utf-8"))
    aliases = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    run = classes.pop("RunConfig")
    sections = {key.name: classes[key.type] for key in keys(run, aliases) if key.type in classes}
    top = [key for key in keys(run, aliases) if key.type not in classes]
    parts = [GENERATED.format(source="megatron_ledom/config/schema.py"), INTRODUCTION, "\n## The run\n\n", _table(top)]
    for name, node in sections.items():
        parts += _section(name, node, classes, aliases)
    return "".join(parts)


def _section(name: str, node: ast.ClassDef, classes: dict[str, ast.ClassDef], aliases: dict[str, ast.expr]) -> Iterator[str]:
    """Yield the part of a section, then those of the sections in it."""
    found = list(keys(node, aliases))
    yield f"\n## {name}\n\n{ast.get_docstring(node)}\n\n"
    yield _table([key for key in found if key.type not in classes], f"{name}.")
    for key in found:
        if key.type in classes:
            yield from _section(f"{name}.{key.name}", classes[key.type], classes, aliases)


def keys(node: ast.ClassDef, aliases: dict[str, ast.expr]) -> Iterator[Key]:
    """Yield the fields of a dataclass, each with the docstring that follows it."""
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
            continue
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        assert isinstance(field.target, ast.Name)
        yield Key(field.target.id, described(field.annotation, aliases), default_of(field.value), str(text))


def described(node: ast.expr, aliases: dict[str, ast.expr]) -> str:
    """Return a type in words; the name of a section's class stays as it is."""
    if isinstance(node, ast.Name):
        return described(aliases[node.id], aliases) if node.id in aliases else NAMES.get(node.id, node.id)
    if isinstance(node, ast.BinOp):  # X | None: the default says what stands for None
        sides = [node.left] if isinstance(node.right, ast.Constant) else [node.left, node.right]
        return " or ".join(described(side, aliases) for side in sides)
    if isinstance(node, ast.Subscript):
        return _subscript(ast.unparse(node.value), node.slice, aliases)
    return ast.unparse(node)


def _subscript(name: str, inside: ast.expr, aliases: dict[str, ast.expr]) -> str:
    members = inside.elts if isinstance(inside, ast.Tuple) else [inside]
    if name == "Literal":
        return " or ".join(f"`{ast.literal_eval(member)}`" for member in members)
    if name == "Annotated":
        assert isinstance(members[1], ast.Call)
        limits = [f"{SIGNS[str(word.arg)]} {ast.unparse(word.value)}" for word in members[1].keywords]
        return f"{described(members[0], aliases)} {' and '.join(limits)}"
    words = [described(member, aliases) for member in members]
    if name == "tuple":
        return f"[{', '.join(words)}]"
    return f"names, each with a {words[1]}" if name == "dict" else f"list of {words[0]}"


def default_of(node: ast.expr | None) -> str:
    """Return a default as YAML has it; nothing if the key is required."""
    if node is None:
        return ""
    if isinstance(node, ast.Call):
        [factory] = [word.value for word in node.keywords if word.arg == "default_factory"]
        empty = {"list": "[]", "dict": "{}"}
        return (
            ast.unparse(factory.body).replace("'", "")
            if isinstance(factory, ast.Lambda)
            else empty.get(ast.unparse(factory), "")
        )
    if isinstance(node, ast.Attribute):
        return node.attr.lower()
    value = ast.literal_eval(node)
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return value if isinstance(value, str) else ast.unparse(node)


def _table(rows: list[Key], section: str = "") -> str:
    lines = ["| key | type | default | meaning |\n|---|---|---|---|\n"]
    for key in rows:
        default = f"`{key.default}`" if key.default else "required"
        lines.append(f"| `{section}{key.name}` | {text_cell(key.type)} | {default} | {text_cell(key.meaning)} |\n")
    return "".join(lines)
