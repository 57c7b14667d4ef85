"""Commands, code and names in README.md and docs/.

Every command fits its parser and is run by a test or by the quickstart, every path and key exists, and every Python block uses
names that the package exports.
"""

import ast
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from megatron_ledom.cli.main import COMMANDS, load, run
from megatron_ledom.config.load import load_config
from megatron_ledom.config.problems import config_keys
from megatron_ledom.config.shipped import shipped_configs
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.markdown import marked
from tests.support.completions_server import serving
from tests.support.documented_commands import (
    HARNESS,
    MINUTE,
    PAGES_RUN_BY_TESTS,
    RUN_BY_TESTS,
    RUN_HERE,
)
from tests.support.evaluation_sets import SETS, write_sets
from tests.support.forked import run_forked
from tests.support.paths import ROOT
from tests.support.tiny_models import random_model_folder

FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
RUN_BY_QUICKSTART = "<!-- run by the quickstart -->"
"""Marks the blocks that tests/quickstart compares with the commands that the quickstart ran."""


def commands_of(page: str, above: str | None = None) -> list[str]:
    """Return every command of a page's bash blocks; with `above`, only those of blocks below that line."""
    start = rf"{re.escape(above)}\n" if above else ""
    blocks = re.findall(rf"{start}```bash\n(.*?)```", PAGES[page], re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def without_variables(command: str) -> str:
    """Return the command without the NAME=VALUE words in front of it."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return " ".join(words)


ALL = [(page, command) for page in PAGES for command in commands_of(page)]
QUICKSTART = {without_variables(command) for page in PAGES for command in commands_of(page, RUN_BY_QUICKSTART)}
RERANK, SERVE = "docs/tutorials/rerank.md", "docs/tutorials/serve.md"
RUN_BY_THIS_FILE = {
    without_variables(command)
    for command in [*commands_of(RERANK), *commands_of(SERVE)]
    if command.startswith(("ledom rerank", "ledom report-rerank")) and "vllm" not in command
}
"""The commands that `test_the_commands_that_rank_answers_run` runs unchanged."""


def ledom_arguments(command: str) -> list[str] | None:
    """Return the words after `ledom` of a command that starts it in any way; None if it starts another program."""
    words = shlex.split(without_redirection(command))
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words[:2] == ["torchrun", "--nproc-per-node"]:
        words = words[3:]
        words = ["ledom", "train", *words[2:]] if words[:2] == ["-m", "megatron_ledom.pretrain"] else words[1:]
    return words[1:] if words[0] == "ledom" else None


def without_redirection(command: str) -> str:
    """Return the command without ` > FILE`."""
    return re.sub(r" > \S+$", "", command)


@pytest.mark.parametrize(("page", "command"), [one for one in ALL if ledom_arguments(one[1])], ids=lambda text: text[:80])
def test_a_command_of_ledom_is_accepted_by_its_parser(page: str, command: str) -> None:
    name, *arguments = ledom_arguments(command) or []
    if name == "--help":
        return
    assert name in COMMANDS, page
    if name == "harness":  # its options are those of lm-eval
        assert not [word for word in arguments if word.startswith("--") and not re.search(rf"{word}\b", help_of(HARNESS))]
        return
    options = load(name).build_parser(f"ledom {name}").parse_args(arguments)
    if name == "train":
        assert set(dotted(options.overrides)) <= set(config_keys())
        config = options.config.removeprefix("examples/configs/").removesuffix(".yaml")
        if "/" not in config and config not in ("run", "run_small"):  # files that the pages write
            load_config(config, options.overrides)


def dotted(overrides: list[str]) -> Iterator[str]:
    """Yield the key of each `section.key=value`."""
    yield from (override.partition("=")[0] for override in overrides)


@cache
def help_of(script: str) -> str:
    """Return the help of a script, or of a module named `-m MODULE`."""
    done = run_forked([*script.split(), "--help"])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", sorted({command for _, command in ALL if re.match(r"\S*python ", command)}))
def test_a_script_exists_and_has_the_options(command: str) -> None:
    script, *words = shlex.split(command)[1:]
    assert (ROOT / script).is_file()
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", help_of(script)), f"{script} has no option {option}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist_with_their_options(page: str) -> None:
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for name, rest in re.findall(r"`ledom ([a-z][\w-]+)([^`]*)`", text):
        assert name in COMMANDS, f"ledom {name}"
        parser = load(name).build_parser(f"ledom {name}")
        below = [sub for action in parser._actions if isinstance(action.choices, dict) for sub in action.choices.values()]
        known = "".join(one.format_help() for one in [parser, *below])
        for option in re.findall(r"(--[a-z][\w-]*)", rest):
            assert re.search(rf"{option}\b", known), f"ledom {name} has no option {option}"
    for script in re.findall(r"`(?:python )?(examples/[\w/]+\.py) --", text):
        for option in re.findall(rf"`(?:python )?{script} (--[\w-]+)`", text):
            assert option in help_of(script), f"{script} has no option {option}"


def test_every_command_is_run_by_the_quickstart_or_a_test() -> None:
    by_minute = {without_variables(command) for command in minute_commands()}
    documented = {without_variables(command) for page, command in ALL if page not in PAGES_RUN_BY_TESTS}
    documented -= QUICKSTART | by_minute | RUN_BY_THIS_FILE
    assert documented == set(RUN_BY_TESTS)


def minute_commands() -> list[str]:
    """Return the commands of the one-minute example on both of its pages; tests/quickstart runs those of each page."""
    return [
        command for page in ("README.md", "docs/get_started.md") for command in commands_of(page) if is_of_a_minute(command)
    ]


def test_the_readmes_example_of_a_minute_is_that_of_get_started() -> None:
    """tests/quickstart runs the commands and the Python of get_started.md."""
    readme, whole = (
        [line for line in commands_of(page) if is_of_a_minute(line)] for page in ("README.md", "docs/get_started.md")
    )
    assert readme
    assert readme == whole[: len(readme)]
    codes = [re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL) for page in ("README.md", "docs/get_started.md")]
    assert codes[0] == codes[1]


def is_of_a_minute(command: str) -> bool:
    """Return True for a command of the one-minute example."""
    return "minute/" in command or "one_minute" in command


def test_each_test_that_is_named_exists() -> None:
    texts = [*RUN_BY_TESTS.values(), *PAGES_RUN_BY_TESTS.values(), MINUTE]
    named = {path for text in texts for path in re.findall(r"tests/[\w./]+", text)}
    assert len(named) > 20
    assert not sorted(path for path in named if not (ROOT / path).is_file())


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = "\n".join(PAGES.values())
    for target in set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_variables_of_the_slurm_commands_are_read_by_the_scripts() -> None:
    for command in (command for _, command in ALL if "sbatch" in command):
        words = shlex.split(command)
        text = (ROOT / words[-1]).read_text(encoding="utf-8")
        text += (ROOT / "examples/slurm/container.sh").read_text(encoding="utf-8")  # by which every script reads its variables
        for name in (word.partition("=")[0] for word in words if re.match(r"[A-Z_]+=", word)):
            assert f"${{{name}:-" in text


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page: str) -> None:
    text = PAGES[page]
    tops = "megatron_ledom|tools|examples|tests|docs|csrc"
    named = set(re.findall(rf"`((?:{tops})/[\w./]*)`", text))
    inside = {path for path in re.findall(r"`((?:\w+/)+\w+\.py)`", text) if not re.match(rf"(?:{tops})/", path)}
    missing = [path for path in named if not (ROOT / path).exists() and not re.search(r"\b(NAME|OP|TASK)\b", path)]
    missing += [path for path in inside if not (ROOT / "megatron_ledom" / path).exists()]
    assert not sorted(missing)


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES["README.md"])
    assert len(links) > 25
    assert not [link for link in links if not link.startswith("https://") and not (ROOT / link).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_every_configuration_key_that_a_page_names_exists(page: str) -> None:
    sections = "model|data|parallel|optimizer|train|checkpoint|logging"
    named = set(re.findall(rf"`((?:{sections})\.[a-z_0-9]+)(?:=[^`]*)?`", PAGES[page]))
    assert not sorted(
        key
        for key in named
        if key not in config_keys() and not key.endswith((".py", ".json", ".jsonl", ".yaml", ".safetensors"))
    )


@pytest.mark.parametrize("page", [page for page in PAGES if "```yaml" in PAGES[page]])
def test_yaml_in_a_page_has_keys_of_the_configuration(page: str) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", PAGES[page], re.DOTALL):
        content = {section: values if isinstance(values, dict) else {} for section, values in yaml.safe_load(block).items()}
        keys = {f"{section}.{key}" if key else section for section, values in content.items() for key in values or [""]}
        assert keys
        assert keys <= set(config_keys())


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in PAGES[page]])
def test_python_in_a_page_uses_what_the_package_exports(page: str) -> None:
    for code in re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron_ledom"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)
        for name in re.findall(r"\bmodel\.(\w+)\(", code):
            assert hasattr(ReverseLM, name)


def test_json_in_a_page_is_json() -> None:
    blocks = [block for text in PAGES.values() for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    assert blocks
    for line in (line for block in blocks for line in block.splitlines()):
        json.loads(line)


def test_the_readme_is_short_and_states_what_has_not_been_run() -> None:
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 200
    assert any("The GPU path has not been run on hardware yet." in line for line in lines[:30])
    assert "```mermaid" in PAGES["README.md"]


def test_the_readme_has_ten_lines_of_the_quickstarts_result() -> None:
    short = marked(PAGES["README.md"], "quickstart", "README.md")[1].splitlines()
    whole = marked(PAGES["docs/get_started.md"], "quickstart", "get_started.md")[1].splitlines()
    assert len(short) == 10
    assert not [line for line in short if line not in whole]


def test_the_quickstart_writes_these_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples/quickstart"))
    report = importlib.import_module("report")
    keys = re.findall(r'\("[^"]+", "(\w+)", "\{', Path(report.__file__).read_text(encoding="utf-8"))
    models = {direction: dict.fromkeys(keys, 1) for direction in ("reverse", "forward")}
    machine = {"cores": 2, "cpu": "a processor", "gpu": None, "torch": "2"}
    right = {"accuracy": 0.5, "interval": [0.4, 0.6]}
    gain = [{"against": "majority vote", "difference": 0.1, "interval": [-0.1, 0.2]}]
    problems: dict[str, object] = {
        "num_questions": 200,
        "num_candidates": 16,
        "comparisons": gain,
        "comparisons_at_equal_tokens": gain,
    }
    problems |= {"methods": {"Reverse Reward": right, "majority vote": right}}
    problems["equal_tokens"] = [{"method": "Reverse Reward", "num_candidates": 3}]
    found = {"machine": machine, "overrides": ["a=b"], "seconds": 61.0, "models": models, "problems": problems}
    short = report.to_short_markdown(found).splitlines()
    stored = marked(PAGES["README.md"], "quickstart", "README.md")[1].splitlines()
    assert [line.split("|")[1:2] for line in short] == [line.split("|")[1:2] for line in stored]
    corpus = {split: {"text_bytes": 1_000_000, "documents": 2} for split in ("train", "valid")}
    texts = [{"text": "A cat.", "following": "cat."}]
    ranked = {"prompt": "p", "ranking": [0], "candidates": ["c"]}
    ranked["scores"] = [{"reward": 1.0, "forward_logprob": 1.0, "reverse_logprob": None}]
    found |= {"corpus": corpus, "resumed_at": 3, "phases": {"train": 1.0}, "generated": texts, "reranked": ranked}
    shapes = {
        re.sub(r"[\d.,+-]+", "", line.split("|")[1] if "|" in line else line)
        for line in PAGES["docs/get_started.md"].splitlines()
    }
    written = [
        line for line in report.to_markdown(found).splitlines() if not re.match(r"````|One run|.*⟧|\| 1|\| train ", line)
    ]
    own = {re.sub(r"[\d.,+-]+", "", line.split("|")[1] if "|" in line else line) for line in written if "`p`" not in line}
    assert not sorted(own - shapes - {"Eight continuations of `'p'` by the forward twin ranked by Reverse Reward:"})


def test_the_dry_run_of_the_7b_prints_the_numbers_of_the_pages(capsys: pytest.CaptureFixture[str]) -> None:
    done = run_forked(["-c", "from megatron_ledom.cli.main import main; main()", "train", "--config", "ledom_7b", "--dry-run"])
    assert done.returncode == 0, done.stderr
    for number in ("7.794 B", "435.37 B", "51,900"):
        assert number in done.stdout
        assert number in PAGES["README.md"]
        assert number in PAGES["docs/how_to/slurm.md"]
    assert re.search(r"\b32 (an|per) iteration", done.stdout)


def test_quick_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    sets = write_sets(tmp_path / "evaluation_sets")
    shots = {
        "gsm8k": [{"question": f"Eve has {n} cups. How many?", "answer": f"She has {n}.\n#### {n}"} for n in range(5)],
        "svamp": [{**SETS["svamp"][0], "Body": f"Eve has {n} pears. Ben has 1", "Answer": n + 1.0} for n in range(5)],
    }
    for name, rows in shots.items():
        (sets / f"{name}_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    random_model_folder(tmp_path / "quickstart/models/reverse", "byte_level", "reverse")
    (tmp_path / "corpus").mkdir()
    for name, key in (("corpus/pages", "text"), ("own_items", "question")):
        Path(f"{name}.jsonl").write_text(json.dumps({key: "A text of more than eight words that is on both sides."}) + "\n")
    quick = [
        command
        for command, test in RUN_BY_TESTS.items()
        if test == RUN_HERE and not command.startswith("ledom train --config ledom_7b --dry-run")
    ]
    assert len(quick) > 5
    for command in quick:
        assert not run(shlex.split(without_redirection(command))[1:]), command
        shown = capsys.readouterr().out
        if target := re.search(r" > (\S+)$", command):
            Path(target[1]).write_text(shown)
            load_config(target[1])
    assert (tmp_path / "synthetic/reversal/train.jsonl").is_file()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working folder, now the current one, with tiny models and the input files of the pages on ranking."""
    for name in ("forward", "reverse"):
        random_model_folder(tmp_path / "models" / name, "byte_level", name)
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart/models").symlink_to(tmp_path / "models")
    [example] = re.findall(r"```json\n(.*?)```", PAGES[RERANK], re.DOTALL)
    (tmp_path / "answers_in.jsonl").write_text(example * 6)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "What is 6 times 7?\n"}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_that_rank_answers_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in commands_of(RERANK):
        if command.startswith("ledom "):
            assert not run(shlex.split(command)[1:]), command
        if "--input answers_in.jsonl" in command:
            lines = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
            others = [{**line, "scores": line["scores"][::-1], "ranking": line["ranking"][::-1]} for line in lines]
            (place / "answers_seed1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in others))
    assert json.loads((place / "answers.jsonl").read_text().splitlines()[0])["best"] in ("It is 42.", "It is 41.")
    assert (place / "report").is_dir()
    (place / "answers.jsonl").rename(place / "answers_ranked.jsonl")
    [command] = [command for command in commands_of(SERVE) if "--forward-server" in command]
    with serving(ForwardLM.from_pretrained("models/forward")) as server:
        assert not run(shlex.split(command.replace("http://localhost:8000/v1", server.url))[1:])
    assert len(json.loads((place / "answers.jsonl").read_text())["scores"]) == 8


def test_configs_that_the_pages_name_come_with_the_package() -> None:
    named = {name for text in PAGES.values() for name in re.findall(r"--config (\w+)(?![\w./])", text)}
    assert named - {"NAME", "FILE", "run", "own"} <= set(shipped_configs())
    assert "one_minute" in named


def test_the_example_of_a_minute_is_the_same_on_both_pages() -> None:
    both = [
        [command for command in commands_of(page) if is_of_a_minute(command) and not command.startswith("ledom generate")]
        for page in ("README.md", "docs/get_started.md")
    ]
    assert both[0] == both[1]
    codes = [re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL) for page in ("README.md", "docs/get_started.md")]
    assert codes[0] == codes[1]
