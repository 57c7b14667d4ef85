"""Make a training corpus from a recipe: one YAML file with its sources, revisions, licences, filters and wanted tokens.

In this order: `plan` shows what will be read, `pin` fixes the revisions, `fetch` copies the files (optional), `build` makes the shards,
`blend` gives the lines for the config of a run, `card` writes the data card, `publish` copies everything to a folder or the hub. `make` does
all of it except fetch and publish.
"""

import argparse
from collections.abc import Sequence
from typing import Any


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands)
    _command(
        commands, "pin", "look up commits, list all files, and store both in RECIPE with the ending .lock.json", of_sources=True
    )
    _add_fetch(commands)
    _add_build(commands)
    _add_blend(commands)
    _add_card(commands)
    _add_publish(commands)
    _add_make(commands)
    text = "print the name and the number of tasks of every source, for a SLURM script; options of build have no effect"
    _add_build_options(_command(commands, "tasks", text))
    return parser


def _command(commands: Any, name: str, text: str, *, of_sources: bool = False) -> argparse.ArgumentParser:
    """Add a command with the options that all have."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file of the recipe")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the recipe, such as sources.web.tokens=1000000; can be given several times",
    )
    if of_sources:
        parser.add_argument(
            "--source", action="append", default=[], metavar="NAME", help="a source; can be given several times (default: all)"
        )
    return parser


def _add_listing(parser: argparse.ArgumentParser) -> None:
    text = "stored listing of the files (default: RECIPE with the ending .lock.json, if it exists)"
    parser.add_argument("--listing", metavar="FILE", help=text)


def _add_plan(commands: Any) -> None:
    parser = _command(commands, "plan", "show what will be read, with tokens, disk and core-hours", of_sources=True)
    _add_listing(parser)
    parser.add_argument("--write-listing", metavar="FILE", help="store the listing of the files, for a plan without network")


def _add_build(commands: Any) -> None:
    parser = _command(commands, "build", "make the shards; the same command resumes", of_sources=True)
    _add_build_options(parser)
    parser.add_argument(
        "--task-id",
        type=int,
        metavar="I",
        help="task of the one --source, from 0 (default: SLURM_ARRAY_TASK_ID; outside an array all tasks in turn)",
    )


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `build` for every source and task."""
    _add_listing(parser)
    parser.add_argument("--copies", metavar="DIR", help="folder of `ledom corpus fetch`, to read instead of the sources")
    parser.add_argument("--workers", type=int, metavar="N", help="number of processes (default: the number of available cores)")
    parser.add_argument(
        "--hash-only", action="store_true", help="first pass of filters.deduplicate for a source of several tasks"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing shards, and unfinished work with other settings"
    )


def _add_run_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seq-length", type=int, metavar="N", help="with --global-batch-size: also print samples and iterations"
    )
    parser.add_argument("--global-batch-size", type=int, metavar="N", help="samples per iteration")
    parser.add_argument("--allow-repeats", action="store_true", help="allow a source to be read more than once")


def _add_fetch(commands: Any) -> None:
    parser = _command(commands, "fetch", "copy the listed files, verified; the same command resumes", of_sources=True)
    _add_listing(parser)
    parser.add_argument("--to", required=True, metavar="DIR", help="folder of the copies, for `ledom corpus build --copies`")
    parser.add_argument("--threads", type=int, default=4, metavar="N", help="files copied at once (default %(default)s)")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--report",
        action="append",
        default=[],
        metavar="SOURCE=FILE",
        help="JSON of filters that ran before the build: documents_in, documents_out, removed by reason, languages by code",
    )


def _add_card(commands: Any) -> None:
    parser = _command(commands, "card", "write the data card: sources, licences, counts, removed documents, hashes")
    parser.add_argument("--output", metavar="FILE", help="file of the card (default: README.md in the output folder)")
    _add_report(parser)


def _add_publish(commands: Any) -> None:
    parser = _command(commands, "publish", "copy shards, card and recipe to a folder or the hub; asks before it writes")
    parser.add_argument("--to", required=True, metavar="PLACE", help="new folder, or hf://datasets/OWNER/NAME")
    parser.add_argument("--yes", action="store_true", help="do not ask; the terms of the sources are printed all the same")
    parser.add_argument(
        "--public", action="store_true", help="make a new repository public, or write to a public one (default: private)"
    )
    parser.add_argument(
        "--replace", action="store_true", help="replace all files of a hub repository that has some, in one commit"
    )
    _add_report(parser)


def _add_make(commands: Any) -> None:
    parser = _command(commands, "make", "pin, build, blend and write the card, with one command; it resumes")
    parser.add_argument("--workers", type=int, metavar="N", help="number of processes (default: the number of available cores)")
    _add_run_shape(parser)


def _add_blend(commands: Any) -> None:
    parser = _command(commands, "blend", "print or write the config lines that draw the wanted tokens from the shards")
    _add_run_shape(parser)
    parser.add_argument("--output", metavar="FILE", help="write the lines to a YAML file, a `base:` for the config of a run")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command. Imports follow parsing, so `--help` is fast."""
    arguments = build_parser(prog).parse_args(argv)
    import logging
    import os

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in preprocess_data.py
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = vars(arguments)
    _RUN[given.pop("command")](given)


def _plan(given: dict[str, Any]) -> None:
    from megatron_ledom.corpus.plan import CorpusPlanSettings, describe, plan_corpus

    print(describe(plan_corpus(CorpusPlanSettings(**given))))


def _build(given: dict[str, Any]) -> None:
    from megatron_ledom.corpus.build import BuildSettings, build

    build(BuildSettings(**given))


def _blend(given: dict[str, Any]) -> None:
    from megatron_ledom.corpus.blend import CorpusBlendSettings, corpus_blend

    corpus_blend(CorpusBlendSettings(**given))


def _pin(given: dict[str, Any]) -> None:
    from megatron_ledom.corpus.pin import PinSettings, pin

    pin(PinSettings(**given))


def _fetch(given: dict[str, Any]) -> None:
    from megatron_ledom.corpus.fetch import FetchSettings, fetch

    fetch(FetchSettings(**given))


def _card(given: dict[str, Any]) -> None:
    from megatron_ledom.corpus.card import CardSettings, write_card

    print(write_card(CardSettings(**given)))


def _publish(given: dict[str, Any]) -> None:
    from megatron_ledom.corpus.publish import PublishSettings, publish

    publish(PublishSettings(**given))


def _make(given: dict[str, Any]) -> None:
    from megatron_ledom.corpus.make import MakeSettings, make

    make(MakeSettings(**given))


def _tasks(given: dict[str, Any]) -> None:
    from megatron_ledom.corpus.recipe import load_recipe

    for name, source in load_recipe(given["recipe"], given["overrides"]).sources.items():
        print(name, source.tasks)


_RUN = {
    "plan": _plan,
    "pin": _pin,
    "fetch": _fetch,
    "build": _build,
    "blend": _blend,
    "card": _card,
    "publish": _publish,
    "make": _make,
    "tasks": _tasks,
}
