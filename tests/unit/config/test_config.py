"""Reading a configuration: typing, bases, overrides, and a message for every mistake."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ledom.config.load import config_from_dict, load_config, published, save_config, text_keys, to_dict
from megatron_ledom.config.problems import config_keys
from megatron_ledom.config.schema import RunConfig
from megatron_ledom.direction import Direction
from megatron_ledom.errors import ConfigError
from tests.support.paths import ROOT

MINIMAL = """
run_dir: runs/tiny
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4}
train: {train_iters: 4, global_batch_size: 8}
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def load(folder: Path, *overrides: str) -> RunConfig:
    return load_config(write(folder, MINIMAL), overrides)


def complaint(folder: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, *overrides)
    return str(caught.value)


def test_every_key_is_listed_in_config_keys() -> None:
    listed = (ROOT / "tests/assets/config_keys.txt").read_text(encoding="utf-8").splitlines()
    assert listed == sorted(config_keys()), "a new key adds its line to tests/assets/config_keys.txt, sorted"


def dotted(values: dict[str, object], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a config and of its sections; a dict without a key of the config in it is a value."""
    for name, value in values.items():
        is_section = isinstance(value, dict) and f"{prefix}{name}" not in config_keys()
        yield from dotted(value, f"{prefix}{name}.") if is_section else [f"{prefix}{name}"]  # type: ignore[arg-type]


def test_keys_are_those_of_a_loaded_run(tmp_path: Path) -> None:
    assert sorted(dotted(to_dict(load(tmp_path)))) == sorted(config_keys())


def test_keys_that_the_file_omits_get_their_defaults(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.data.seq_length == 8192
    assert config.data.direction is Direction.REVERSE
    assert (config.optimizer.adam_beta1, config.optimizer.adam_beta2) == (0.9, 0.95)


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("optimizer.lr=1e-4", "optimizer", "lr", 1e-4),
        ("optimizer.lr=2", "optimizer", "lr", 2.0),
        ("train.train_iters=2e3", "train", "train_iters", 2000),
        ("train.train_iters=51_900", "train", "train_iters", 51900),
        ("data.direction=forward", "data", "direction", Direction.FORWARD),
        ("data.eod_mask_loss=false", "data", "eod_mask_loss", False),
        ("data.tokenizer='12'", "data", "tokenizer", "12"),
        ("data.train_blend=[[2e9,a/b],[1,c]]", "data", "train_blend", [(2e9, "a/b"), (1.0, "c")]),
        ("model.vocab_size=null", "model", "vocab_size", None),
    ],
)
def test_override_has_the_type_of_its_key(tmp_path: Path, override: str, section: str, key: str, expected: object) -> None:
    found = getattr(getattr(load(tmp_path, override), section), key)
    assert found == expected
    assert type(found) is type(expected)


def test_later_override_wins_and_leaves_neighbours(tmp_path: Path) -> None:
    config = load(tmp_path, "train.seed=1", "train.seed=2")
    assert (config.train.seed, config.train.train_iters) == (2, 4)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.num_layers=abc", "model.num_layers='abc' is text; expected a whole number above 0"),
        ("model.num_layers=2.5", "model.num_layers=2.5 is a number; expected a whole number above 0"),
        ("model.num_layers=true", "model.num_layers=true is a truth value; expected a whole number above 0"),
        ("model.num_layers=0", "model.num_layers=0 is not possible; expected a whole number above 0"),
        ("model.hidden_dropout=1.5", "model.hidden_dropout=1.5 is not possible; expected a number 0 or more and below 1"),
        ("optimizer.lr='1e-4'", "optimizer.lr='1e-4' is text; expected a number above 0"),
        ("optimizer.lr=.nan", "optimizer.lr=nan is not possible; expected a number above 0"),
        ("data.eod_mask_loss=1", "data.eod_mask_loss=1 is a whole number; expected true or false"),
        ("data.direction=backward", "data.direction='backward' is not possible; expected one of reverse, forward, both"),
        ("model.params_dtype=fp16", "model.params_dtype='fp16' is not possible; expected one of bf16, fp32"),
        ("data.tokenizer=12", 'data.tokenizer=12 is a whole number; expected text or null; quote it: data.tokenizer="12"'),
        ("train=3", "train=3 is a whole number; expected a section with keys below it"),
        ("train.auxiliary=3", "train.auxiliary=3 is a whole number; expected a section with keys below it"),
        ("train.auxiliary.weight=0", "train.auxiliary.weight=0 is not possible; expected a number above 0"),
        ("train.auxiliary.kind=mtp", "train.auxiliary.kind='mtp' is not possible; expected one of reverse_state or null"),
        ("train.seed=null", "train.seed=null is empty; expected a whole number 0 or more"),
        ("data.train_blend=[[0,a]]", "data.train_blend=[[0, 'a']] is not possible; expected a list of [weight, prefix]"),
        ("data.train_blend=[a]", "data.train_blend=['a'] is not possible; expected a list of [weight, prefix]"),
        (
            "data.train_blend=[[1,a,up]]",
            "[[1, 'a', 'up']] is not possible; expected a list of [weight, prefix] or [weight, prefix, dir",
        ),
    ],
)
def test_wrong_value_names_key_found_and_expected(tmp_path: Path, override: str, sentence: str) -> None:
    assert sentence in complaint(tmp_path, override)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.num_layer=2", "model.num_layer is not a key; did you mean model.num_layers?"),
        ("seq_len=16", "seq_len is not a key; did you mean data.seq_length?"),
        ("train.lr=1", "train.lr is not a key; did you mean optimizer.lr?"),
        ("optim.lr=1", "optim is not a key; did you mean optimizer?"),
        ("train.auxiliary.tacher=a", "train.auxiliary.tacher is not a key; did you mean train.auxiliary.teacher?"),
        ("train.auxiliary.zzz=1", "train.auxiliary.zzz is not a key; train.auxiliary has kind, teacher, weight"),
        ("logging.zzz=1", "logging.zzz is not a key; logging has log_interval, tensorboard"),
        ("zzz=1", "zzz is not a key or section; expected one of run_dir, init_from, init_state, model, data"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest_name(tmp_path: Path, override: str, sentence: str) -> None:
    assert sentence in complaint(tmp_path, override)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    message = complaint(tmp_path, "model.num_layers=x", "train.seed=-1", "seq_len=3", "run_dir=7")
    assert "has 4 problems" in message
    assert all(key in message for key in ("model.num_layers", "train.seed", "data.seq_length", "run_dir"))


def test_missing_required_keys_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "model: {num_layers: 2}"))
    for key in ("run_dir", "model.hidden_size", "model.ffn_hidden_size", "train.train_iters", "train.global_batch_size"):
        assert f"{key} is missing; expected" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.seed", "is not of the form section.key=value"),
        ("=3", "is not of the form section.key=value"),
        ("--train.seed=3", "remove the leading dashes"),
        ("base=other.yaml", "base can only be set in a file"),
        ("train.seed=[1,", "the value is not valid YAML"),
        ("run_dir=${nowhere}", "write the value itself"),
    ],
)
def test_malformed_override_is_refused(tmp_path: Path, override: str, sentence: str) -> None:
    assert sentence in complaint(tmp_path, override)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {num_layers: 2", "is not valid YAML"),
        ("train: {}\ntrain: {}", "is not valid YAML"),
        ("- 1\n- 2", "expected sections"),
        ("base: [a]", "is not a path"),
        ("base: nowhere.yaml", "nowhere.yaml (the base of"),
    ],
)
def test_unusable_file_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
        load_config(write(tmp_path, text))
    assert sentence in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(str(tmp_path / "nowhere.yaml"))


def test_base_is_relative_to_its_file_and_overridden_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", MINIMAL + "data: {seq_length: 16, train_blend: [[1, a], [1, b]]}", "root.yaml")
    write(tmp_path / "shared", "base: root.yaml\noptimizer: {lr: 1e-3}", "middle.yaml")
    path = write(tmp_path, "base: shared/middle.yaml\ndata: {train_blend: [[3, c]]}\nrun_dir: runs/other")
    config = load_config(path, ["data.seq_length=32"])
    assert (config.run_dir, config.optimizer.lr, config.model.num_layers) == ("runs/other", 1e-3, 2)
    assert (config.data.seq_length, config.data.train_blend) == (32, [(3.0, "c")])


def test_circular_bases_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml", "a.yaml")
    write(tmp_path, "base: a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match="based on each other"):
        load_config(str(tmp_path / "a.yaml"))


def test_saved_run_reads_back_equal(tmp_path: Path) -> None:
    config = load(tmp_path, "data.train_blend=[[2e9,a],[1e-3,b]]", "optimizer.adam_eps=1e-8", "data.tokenizer='1e-4'")
    saved = tmp_path / "run" / "config.yaml"
    save_config(config, str(saved))
    assert load_config(str(saved)) == config
    assert config_from_dict(to_dict(config), "memory") == config
    assert [path.name for path in saved.parent.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("name", ["ledom_2b", "ledom_7b", "quickstart_reverse", "quickstart_forward"])
def test_example_reads_and_round_trips(tmp_path: Path, name: str) -> None:
    config = load_config(str(ROOT / "examples/configs" / f"{name}.yaml"))
    save_config(config, str(tmp_path / "config.yaml"))
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_quickstart_twins_differ_in_direction_folder_and_shards_only() -> None:
    reverse, forward = (
        {key: value for section in to_dict(load_config(str(path))).items() for key, value in _flat(*section)}
        for path in (ROOT / "examples/configs" / f"quickstart_{name}.yaml" for name in ("reverse", "forward"))
    )
    different = {key for key in reverse if reverse[key] != forward[key]}
    assert different == {"run_dir", "data.direction", "data.train_blend", "data.valid_blend"}


def _flat(section: str, values: object) -> list[tuple[str, object]]:
    return [(f"{section}.{key}", value) for key, value in values.items()] if isinstance(values, dict) else [(section, values)]


def test_configuration_is_read_without_torch_or_megatron() -> None:
    code = (
        "import sys, megatron_ledom.config.load, megatron_ledom.config.checks, megatron_ledom.model.arithmetic;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_published_config_has_no_path_of_the_machine_and_no_free_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every key that can have a text gets one, so a new key is tested too."""
    monkeypatch.setenv("DATA_ROOT", "/scratch/somebody/corpora")
    overrides = [
        "run_dir=/scratch/somebody/runs/tiny",
        "data.tokenizer=${oc.env:DATA_ROOT}/words",
        "data.train_blend=[[1.0,'s3://name:hidden@host/bucket/somebody/web?sig=somebody']]",
        "data.valid_blend=[[1.0,'/scratch/somebody/valid']]",
        "data.valid_sets={books: [[1.0,'/scratch/somebody/books']]}",
        "data.test_sets={tests: [[1.0,'/scratch/somebody/tests']]}",
        "data.path_to_cache=/scratch/somebody/cache",
        "parallel.hardware=/scratch/somebody/h.yaml",
        "parallel.nccl_communicator_config_path=/scratch/somebody/nccl.yaml",
        "train.tasks=[/scratch/somebody/task]",
        "train.task_data=/scratch/somebody/tasks",
        "train.auxiliary.teacher=/scratch/somebody/teacher",
        "init_from=/scratch/somebody/base",
        "logging.wandb_project=somebody",
        "logging.mlflow_experiment=somebody",
        "logging.mlflow_uri=http://somebody",
        "logging.otlp_endpoint=http://somebody",
        "checkpoint.mirror=s3://bucket/somebody",
    ]
    assert sorted(override.partition("=")[0] for override in overrides) == sorted(text_keys())
    found = published(load(tmp_path, *overrides))
    assert "somebody" not in json.dumps(found)
    assert found["run_dir"] == "tiny"
    assert found["init_from"] == "base"
    assert found["data"]["tokenizer"] == "words"
    assert found["data"]["train_blend"] == [[1.0, "web"]]
    assert found["data"]["valid_sets"] == {"books": [[1.0, "books"]]}
    assert found["model"] == to_dict(load(tmp_path))["model"]


SECRETS = (
    "WANDB_API_KEY HF_TOKEN DB_PASSWORD MY_SECRET PGPASSWORD MYTOKEN GITHUBTOKEN ACCESSKEY DB_PWD AUTH DATABASE_URL MONGO_URI"
    " REDIS_URL pgpass GITHUBPAT SENTRY_DSN AWS_CREDENTIALS GPG_PASSPHRASE SESSION_COOKIE BASICAUTH AUTHORIZATION MYPWD APIKEY"
)


@pytest.mark.parametrize("name", SECRETS.split())
def test_a_secret_environment_variable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "hidden")
    for override in (f"logging.wandb_project=${{oc.env:{name}}}", f"data.train_blend=[[1.0,'s3://${{oc.env:{name}}}@host/x']]"):
        words = complaint(tmp_path, override)
        assert f"uses ${{oc.env:{name}}}, which looks like a secret by its name" in words
        assert override.partition("=")[0] in words
        assert "hidden" not in words


@pytest.mark.parametrize("value", ["https://somebody:hidden@host/x", "ghp_hidden0123456789", "hf_hidden0123456789abcdefg"])
def test_a_secret_is_also_recognized_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PLACE", value)
    words = complaint(tmp_path, "logging.wandb_project=x/${oc.env:PLACE}")
    assert "uses ${oc.env:PLACE}, which looks like a secret by its content" in words
    assert "hidden" not in words


def test_the_name_of_a_secret_cannot_be_composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "hidden")
    words = complaint(tmp_path, "run_dir=PASSWORD", "logging.wandb_project=${oc.env:MY_${run_dir}}")
    assert "write the whole name" in words
    assert "hidden" not in words


ORDINARY = (
    "TOKENIZER_PATH TOKENIZERS USER HOME SCRATCH SLURM_JOB_ID PWD PATH GIT_AUTHOR_NAME TMPDIR DATA_ROOT WORK_URL HOSTNAME"
)


@pytest.mark.parametrize("name", ORDINARY.split())
def test_other_environment_variables_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/words")
    assert load(tmp_path, f"data.tokenizer=${{oc.env:{name}}}").data.tokenizer == "/words"
