"""A folder is read as stock transformers reads it, file by file; the parity check would find a reader that differs."""

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from megatron_ledom.convert.hf_config import load_hf_config, read_model
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.hf_folder import WeightsReader
from megatron_ledom.convert.hf_import import import_hf
from megatron_ledom.convert.stock_side import StockSide
from megatron_ledom.direction import Direction
from megatron_ledom.errors import DataError, LedomError, MismatchError, UsageError, VerificationError
from tests.support.legible import VOCAB_SIZE
from tests.support.stock_folders import stock_config, stock_folder

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with several files and an index."""
    return stock_folder(tmp_path_factory.mktemp("sharded") / "hf", stock_config("Llama"), max_shard_size="60KB")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write one file with different weights of the same shapes."""
    return stock_folder(tmp_path_factory.mktemp("single") / "hf", stock_config("Llama"), seed=1)


def add_single(folder: Path, other: Path) -> None:
    shutil.copy(other / SINGLE, folder / SINGLE)


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def name_the_index(folder: Path, other: Path) -> None:
    add_single(folder, other)
    edit_json(folder / "config.json", lambda values: values.update(transformers_weights=INDEX))


def name_a_file(folder: Path, other: Path) -> None:
    shutil.copy(other / SINGLE, folder / "newest.safetensors")
    edit_json(folder / "config.json", lambda values: values.update(transformers_weights="newest.safetensors"))


def add_to_shard(number: int) -> Callable[[Path, Path], None]:
    """Add another final norm to one of the shards, without a change of the index."""

    def added(folder: Path, other: Path) -> None:
        file = sorted(folder.glob("model-*"))[number]
        save_file({**load_file(file), NORM: load_file(other / SINGLE)[NORM]}, file, metadata={"format": "pt"})

    return added


def swap_in_index(folder: Path, other: Path) -> None:
    """Exchange the tensors of two shards in the index."""
    first, second = sorted(file.name for file in folder.glob("model-*"))[:2]
    swapped = {first: second, second: first}
    edit_json(
        folder / INDEX,
        lambda values: values.update(weight_map={name: swapped.get(at, at) for name, at in values["weight_map"].items()}),
    )


def add_pickled(folder: Path, other: Path) -> None:
    torch.save(load_file(other / SINGLE), folder / "pytorch_model.bin")


def add_variant(folder: Path, other: Path) -> None:
    shutil.copy(other / SINGLE, folder / "model.fp16.safetensors")


def only_variant(folder: Path, other: Path) -> None:
    add_variant(folder, other)
    for file in (INDEX, *(file.name for file in folder.glob("model-*"))):
        (folder / file).unlink()


def without_metadata(folder: Path, other: Path) -> None:
    edit_json(folder / INDEX, lambda values: values.pop("metadata"))


def name_outside(folder: Path, other: Path) -> None:
    edit_json(folder / "config.json", lambda values: values.update(transformers_weights="../hf/model.safetensors"))


FOLDERS: list[tuple[Callable[[Path, Path], None], bool]] = [
    (add_single, True),
    (name_the_index, True),
    (name_a_file, False),
    (add_to_shard(0), True),
    (add_to_shard(-1), False),
    (swap_in_index, True),
    (add_pickled, False),
    (add_variant, False),
    (only_variant, False),
    (without_metadata, False),
    (name_outside, False),
]
"""A folder with more than one set of weights; True if a warning reports it. One set is never read."""


def stock_weights(folder: Path) -> dict[str, torch.Tensor] | None:
    """Return every weight as stock transformers reads it; None if it refuses the folder."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).state_dict()
    except (OSError, KeyError, ValueError):
        return None


@pytest.mark.parametrize("number", range(len(FOLDERS)))
def test_the_reader_takes_the_weights_that_stock_takes(
    sharded: Path, other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    change, is_told = FOLDERS[number]
    folder = shutil.copytree(sharded, tmp_path / "hf")
    change(folder, other)
    expected = stock_weights(folder)
    try:
        reader = WeightsReader(str(folder), getattr(load_hf_config(str(folder)), "transformers_weights", None))
    except LedomError:
        assert expected is None or change is name_outside
        return
    assert expected is not None
    assert reader.shapes.keys() == expected.keys()
    assert [name for name, weight in expected.items() if not torch.equal(reader.read(name), weight)] == []
    assert any(record.levelname == "WARNING" for record in caplog.records) or not (is_told and change is not name_the_index)


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_an_old_index_next_to_a_new_file_is_not_followed(sharded: Path, other: Path, tmp_path: Path, how: Any) -> None:
    folder = shutil.copytree(sharded, tmp_path / "hf")
    add_single(folder, other)
    import_hf(str(folder), str(tmp_path / "run"), direction=Direction.FORWARD, verify=how)
    export_hf(str(tmp_path / "run"), str(tmp_path / "out"), verify=None)
    written, newest = load_file(tmp_path / "out" / SINGLE), load_file(other / SINGLE)
    assert torch.equal(written[EMBEDDING], newest[EMBEDDING][:VOCAB_SIZE])
    assert torch.equal(written[NORM], newest[NORM])


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_the_parity_check_finds_a_reader_of_other_files(
    sharded: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    """Our reader once followed the index although stock transformers reads the single file."""
    folder = shutil.copytree(sharded, tmp_path / "hf")
    add_single(folder, other)
    monkeypatch.setattr(WeightsReader, "_first_file", lambda self: INDEX)
    with pytest.raises(VerificationError, match=r"the embedding \(model.embed_tokens.weight\)"):
        import_hf(str(folder), str(tmp_path / "run"), direction=Direction.FORWARD, verify=how)


@pytest.mark.parametrize("how", ["whole", "layers"])
def test_a_tied_folder_may_contain_only_the_head(tmp_path: Path, how: Any) -> None:
    folder = stock_folder(tmp_path / "hf", stock_config("Qwen2", tie_word_embeddings=True))
    weights = load_file(folder / SINGLE)
    embedding = weights.pop(EMBEDDING)
    save_file({**weights, HEAD: embedding}, folder / SINGLE, metadata={"format": "pt"})
    import_hf(str(folder), str(tmp_path / "run"), direction=Direction.FORWARD, verify=how)
    export_hf(str(tmp_path / "run"), str(tmp_path / "out"), verify=how)
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)[EMBEDDING], embedding[:VOCAB_SIZE])


def test_stock_bf16_is_that_of_stock_transformers(tmp_path: Path) -> None:
    """Equal bits: the rotary frequencies stay in fp32, as in from_pretrained."""
    config = stock_config("Llama", max_position_embeddings=512, head_dim=32)
    folder = stock_folder(tmp_path / "hf", config, dtype=torch.bfloat16)
    ids = torch.arange(512)[None]
    stock = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, local_files_only=True, attn_implementation="sdpa"
    )
    sides = {
        whole: StockSide(str(folder), stock.config, VOCAB_SIZE, folder_dtype=torch.bfloat16, dtype=torch.bfloat16, whole=whole)
        for whole in (True, False)
    }
    with torch.no_grad():
        expected = stock(ids).logits[..., :VOCAB_SIZE].float()
        assert torch.equal(sides[True].forward(ids), expected)
        hidden = sides[False].embed(ids)
        for index in range(2):
            with sides[False].layer(index) as layer:
                hidden = sides[False].run_layer(layer, hidden)
        found = sides[False].head(sides[False].final_norm(hidden))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


def test_a_folder_with_an_adapter_is_refused(other: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(other, tmp_path / "hf")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(MismatchError, match="merge it"):
        import_hf(str(folder), str(tmp_path / "run"), direction=Direction.FORWARD)


def test_every_other_model_type_is_refused_by_name(tmp_path: Path) -> None:
    """Test the file itself, and stock transformers' config of it, which may have all sizes in text_config."""
    ours = {"llama", "mistral", "qwen2", "qwen3"}
    for model_type, name in CONFIG_MAPPING_NAMES.items():
        if model_type in ours:
            continue
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "text_config": {"model_type": "llama"}}))
        with pytest.raises(MismatchError, match=f"model_type '{model_type}' is not one of llama, mistral, qwen2, qwen3"):
            load_hf_config(str(tmp_path))
        try:
            config = getattr(transformers, name)()
        except Exception:  # a few cannot be made without arguments, or need a library
            continue
        if config.model_type not in ours:
            with pytest.raises(MismatchError, match="is not one of llama, mistral, qwen2, qwen3"):
                read_model(config, "config.json", None)


MARK = "from pathlib import Path\nPath({mark!r}).write_text('ran')\nclass Config: pass\nclass Model: pass\n"


@pytest.mark.parametrize("model_type", ["internlm2", "llama", None])
def test_no_code_of_a_folder_runs_and_there_is_no_prompt(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str | None
) -> None:
    folder = shutil.copytree(other, tmp_path / "hf")
    (folder / "code.py").write_text(MARK.format(mark=str(tmp_path / "mark")))
    asks = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Config", None]}
    edit_json(folder / "config.json", lambda values: values.update(model_type=model_type, auto_map=asks))
    monkeypatch.setattr(builtins, "input", lambda *prompt: pytest.fail("it asks at the terminal"))
    if model_type == "llama":
        import_hf(str(folder), str(tmp_path / "run"), direction=Direction.FORWARD)
    else:
        with pytest.raises(
            MismatchError, match=r"is not one of llama.*needs code of the folder \(auto_map\), which is never run"
        ):
            import_hf(str(folder), str(tmp_path / "run"), direction=Direction.FORWARD)
    assert not (tmp_path / "mark").exists()


WRONG = [
    {"model_type": ["llama"]},
    {"architectures": 3},
    {"num_hidden_layers": 0},
    {"hidden_size": None},
    {"max_position_embeddings": "64"},
    {"sliding_window": "x"},
    {"rope_parameters": {"rope_type": [], "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": "2"}},
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_value_in_the_config_is_named(other: Path, tmp_path: Path, number: int) -> None:
    shutil.copy(other / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", lambda values: values.update(WRONG[number]))
    with pytest.raises((DataError, MismatchError), match=next(iter(WRONG[number]))):
        read_model(load_hf_config(str(tmp_path)), str(tmp_path / "config.json"), None)


def test_chat_templates_survive_the_round_trip(other: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(other, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}!", "tools": "[{{ messages[0].content }}]"}
    tokenizer.save_pretrained(folder)
    assert (folder / "additional_chat_templates/tools.jinja").is_file()
    import_hf(str(folder), str(tmp_path / "run"), direction=Direction.REVERSE, verify=None)
    export_hf(str(tmp_path / "run"), str(tmp_path / "out"), verify=None)
    found = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert found.chat_template == tokenizer.chat_template


def test_an_export_and_an_import_contain_no_folder_of_the_machine(other: Path, tmp_path: Path) -> None:
    """Read all published files; model.yaml of a run folder stays on this machine."""
    import_hf(str(other), str(tmp_path / "run"), direction=Direction.REVERSE)
    export_hf(str(tmp_path / "run"), str(tmp_path / "out"))
    files = [*(tmp_path / "out").rglob("*"), *(tmp_path / "run/tokenizer").rglob("*"), tmp_path / "run/import.json"]
    assert len(files) > 8
    told = [file.name for file in files if file.is_file() and str(tmp_path.parent).encode() in file.read_bytes()]
    assert told == []


def test_an_export_over_a_link_keeps_the_link(other: Path, tmp_path: Path) -> None:
    import_hf(str(other), str(tmp_path / "run"), direction=Direction.REVERSE, verify=None)
    (tmp_path / "disk").mkdir()
    link, real = tmp_path / "latest", tmp_path / "disk/hf"
    export_hf(str(tmp_path / "run"), str(real), verify=None)
    link.symlink_to(real)
    before = (real / "export.json").stat().st_ino
    for save in (str(link), f"{link}/", str(link)):
        export_hf(str(tmp_path / "run"), save, verify=None, overwrite=True)
    assert link.readlink() == real
    assert (real / "export.json").stat().st_ino != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "latest", "run"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["hf"]
    shutil.rmtree(real)
    with pytest.raises(UsageError, match=r"is a link to .*, which does not exist"):
        export_hf(str(tmp_path / "run"), str(link), verify=None, overwrite=True)
