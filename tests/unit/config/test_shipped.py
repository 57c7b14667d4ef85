"""Configs and hardware that come with the package are found by name and shown as complete YAML."""

from pathlib import Path

import pytest

from megatron_ledom.cli.main import run
from megatron_ledom.config.load import load_config
from megatron_ledom.config.shipped import shipped_configs
from megatron_ledom.errors import ConfigError
from megatron_ledom.planning.hardware import hardware_files
from tests.support.paths import ROOT

RUNS = sorted(set(shipped_configs()) - {"ledom_base"})


def test_configs_are_those_of_examples() -> None:
    assert list(shipped_configs().values()) == sorted((ROOT / "examples/configs").glob("*.yaml"))


@pytest.mark.parametrize("name", RUNS)
def test_a_name_loads_the_file(name: str) -> None:
    assert load_config(name, ["train.seed=3"]) == load_config(f"{ROOT}/examples/configs/{name}.yaml", ["train.seed=3"])


@pytest.mark.parametrize("name", RUNS)
def test_the_shown_yaml_is_the_same_run_without_a_base(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["configs", "show", name])
    shown = capsys.readouterr().out
    assert shown.startswith(shipped_configs()[name].read_text().splitlines()[0])
    (tmp_path / "own.yaml").write_text(shown)
    assert load_config(str(tmp_path / "own.yaml")) == load_config(name)


def test_a_local_file_of_that_name_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ledom_7b").write_text(
        shipped_configs()["ledom_2b"].read_text().replace("base: ", f"base: {ROOT}/examples/configs/")
    )
    monkeypatch.chdir(tmp_path)
    assert load_config("ledom_7b").model == load_config("ledom_2b").model


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match="ledom_8b does not exist; give the path of a YAML file, or one of ledom_2b, ledom_7b, "
    ):
        load_config("ledom_8b")


def test_list_and_show_of_hardware(capsys: pytest.CaptureFixture[str]) -> None:
    run(["configs", "list"])
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in (*shipped_configs(), *hardware_files()))
    run(["configs", "show", "h200"])
    assert capsys.readouterr().out == hardware_files()["h200"].read_text()
