"""List the configs and hardware files of the package, or show one.

`ledom train --config NAME` uses a config by its name. `ledom configs show NAME > run.yaml` copies it as the start of your own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print the names, with the first line of each file")
    show = commands.add_parser("show", help="print one as YAML: a config merged with its base, or a hardware file")
    show.add_argument("name", metavar="NAME", help="a name from `list`")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    from megatron_ledom.config.shipped import shipped_configs
    from megatron_ledom.planning.hardware import hardware_files

    configs, hardware = shipped_configs(), hardware_files()
    if arguments.command == "list":
        print(_listed("configs, for --config NAME", configs))
        print(_listed("hardware, for --hardware NAME and parallel.hardware", hardware), end="")
    elif arguments.name in hardware:
        print(hardware[arguments.name].read_text(encoding="utf-8"), end="")
    else:
        _show_config(arguments.name, configs)


def _listed(title: str, files: dict[str, Path]) -> str:
    lines = [f"  {name:20}{_comments(file)[0].lstrip('# ')}\n" for name, file in files.items()]
    return "".join([f"{title}:\n", *lines])


def _show_config(name: str, configs: dict[str, Path]) -> None:
    from megatron_ledom.config.load import merged_yaml
    from megatron_ledom.errors import UsageError

    if name not in configs:
        raise UsageError(f"{name} is not a config of the package; expected one of {', '.join(configs)}")
    print("\n".join(_comments(configs[name])))
    print(merged_yaml(str(configs[name])), end="")


def _comments(file: Path) -> list[str]:
    """Return the lines of the comment at the top of a file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return lines[: next((number for number, line in enumerate(lines) if not line.startswith("#")), None)]
