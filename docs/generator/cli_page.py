"""docs/reference/cli.md: every option of every command, from the commands' own parsers."""

import argparse
import inspect
import re
from collections.abc import Iterator

from docs.generator.paths import GENERATED
from megatron_ledom.cli.main import COMMANDS, GROUPS, load

SUBJECTS = {
    "Data": (
        *(
            "train-tokenizer",
            "preprocess-data",
            "corpus",
            "decontaminate",
            "summarize-tasks",
            "merge-shards",
            "reverse-shards",
            "plan-blend",
        ),
        *("prepare-pairs", "make-analysis-data"),
    ),
    "Training": ("train", "average-checkpoints", "status", "alert", "replay-step", "report-run"),
    "Conversion": ("convert-checkpoint",),
    "Generation and ranking": ("generate", "infill", "rerank", "report-rerank", "export-preferences", "serve"),
    "Evaluation": ("evaluate", "summarize-evaluation", "harness", "compare-losses"),
    "Planning": ("configs", "plan-run", "calibrate-hardware", "validate-planner"),
    "Inspection": ("inspect-shard", "inspect-checkpoint", "ops", "check-hardware", "check-nodes"),
    "Other": ("completion",),
}
"""Heading of the page -> its commands, by what a user does."""
UNNAMED = ("positional arguments", "options")
"""Titles of argparse's own groups."""
INTRODUCTION = """
# Command line

Every command is `ledom COMMAND`; `ledom COMMAND --help` prints what this page says. In a checkout most commands are also scripts:
`python tools/preprocess_data.py` is `ledom preprocess-data`. `torchrun ... -m megatron_ledom.pretrain` is `ledom train` on several
ranks. [Exit codes](file_formats.md#exit-codes) are the same for all of them.
"""


def cli_page() -> str:
    """Return the page. Fails if a command of `ledom` is missing from SUBJECTS, or does not exist."""
    named = [name for names in SUBJECTS.values() for name in names]
    assert sorted(named) == sorted(COMMANDS), f"SUBJECTS and the commands of ledom differ: {set(named) ^ set(COMMANDS)}"
    short = {name: text for group in GROUPS.values() for name, text in group.items()}
    lines = [GENERATED.format(source="the parsers of megatron_ledom/cli"), INTRODUCTION, _index(short)]
    for subject, names in SUBJECTS.items():
        lines.append(f"\n## {subject}\n")
        lines += [_command(name) for name in names]
    return "".join(lines)


def _index(short: dict[str, str]) -> str:
    rows = ["\n| subject | command | what it does |\n|---|---|---|\n"]
    for subject, names in SUBJECTS.items():
        rows += [f"| {subject} | [`ledom {name}`](#ledom-{name}) | {text_cell(short[name])} |\n" for name in names]
    return "".join(rows)


def _command(name: str) -> str:
    parser = load(name).build_parser(f"ledom {name}")
    return f"\n### ledom {name}\n\n" + _body(parser, description(parser))


def _body(parser: argparse.ArgumentParser, about: str) -> str:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    parts = [about, "" if below else f"```text\n{synopsis(parser)}\n```\n\n"]
    unnamed = [group for group in parser._action_groups if group.title in UNNAMED]
    parts.append(_options(parser, [action for group in unnamed for action in _shown(group)]))
    for group in parser._action_groups:
        if group not in unnamed and (rows := _options(parser, list(_shown(group)))):
            parts.append(
                f"**{prose(str(group.title).capitalize())}.** {prose(group.description or '')}".strip() + f"\n\n{rows}"
            )
    if parser.epilog:
        parts.append(f"{prose(parser.epilog)}\n\n")
    for action in below:
        for name, sub in action.choices.items():
            parts.append(f"#### {parser.prog} {name}\n\n" + _body(sub, description(sub)))
    return "".join(parts)


def description(parser: argparse.ArgumentParser) -> str:
    """Return a parser's description as Markdown: paragraphs, and blocks of text where lines are aligned by hand."""
    paragraphs = inspect.cleandoc(parser.description or "").split("\n\n")
    return "".join(f"{block(text)}\n\n" for text in paragraphs if text.strip())


def block(paragraph: str) -> str:
    """Return a paragraph as Markdown; one with aligned columns or indented lines keeps its lines."""
    is_aligned = any("  " in line for line in paragraph.splitlines())
    return f"```text\n{paragraph}\n```" if is_aligned else prose(paragraph)


def synopsis(parser: argparse.ArgumentParser) -> str:
    """Return the command with its required options and its positional arguments."""
    words = [parser.prog]
    flags = [action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS]
    words += [f"{action.option_strings[0]} {arguments(action)}".strip() for action in flags if action.required]
    if any(not action.required for action in flags):
        words.append("[OPTION ...]")
    words += [arguments(action) for action in parser._actions if not action.option_strings]
    return " ".join(words)


def arguments(action: argparse.Action) -> str:
    """Return the arguments of an option or a positional argument as the synopsis shows them."""
    if action.nargs == 0:
        return ""
    name = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    name = " ".join(name) if isinstance(name, tuple) else name
    shapes = {"+": f"{name} [{name} ...]", "*": f"[{name} ...]", "?": f"[{name}]", argparse.REMAINDER: f"[{name} ...]"}
    if isinstance(action.nargs, int):
        return " ".join([name] * action.nargs)
    return shapes.get(str(action.nargs), name)


def _options(parser: argparse.ArgumentParser, actions: list[argparse.Action]) -> str:
    if not actions:
        return ""
    return "".join(["| argument | default | meaning |\n|---|---|---|\n", *(_row(parser, action) for action in actions), "\n"])


def _shown(group: argparse._ArgumentGroup) -> Iterator[argparse.Action]:
    for action in group._group_actions:
        is_shown = not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        if is_shown and action.help != argparse.SUPPRESS:
            yield action


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    name = f"{', '.join(action.option_strings)} {arguments(action)}".strip().replace("|", r"\|")
    meaning = (action.help or "") % {**vars(action), "prog": parser.prog}
    is_shown = not (action.nargs == 0 or action.default is None or action.default in (argparse.SUPPRESS, []))
    default = f"`{action.default}`" if is_shown else "required" if action.required and action.option_strings else ""
    if is_shown:  # the column says it
        meaning = re.sub(
            rf" ?\(default {re.escape(str(action.default))}\)|[;:]? ?default: {re.escape(str(action.default))}$", "", meaning
        )
    return f"| `{name}` | {text_cell(default)} | {text_cell(meaning)} |\n"


def prose(text: str) -> str:
    """Return plain text as Markdown: what looks like HTML is escaped outside of code."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", r"\*") for part in parts[::2]]
    return "`".join(parts)


def text_cell(text: str) -> str:
    """Return plain text as the cell of a table."""
    return prose(" ".join(text.split())).replace("|", r"\|")
