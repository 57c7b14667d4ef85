"""A run on forward and reverse shards (data.direction=both): it learns both, resumes bit for bit, and its export reads both ways."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tokenizers import AddedToken

from megatron_ledom.checkpoint.folder import latest_checkpoint
from megatron_ledom.checkpoint.inspection import inspect_checkpoint
from megatron_ledom.checkpoint.manifest import load_manifest
from megatron_ledom.config.load import load_config
from megatron_ledom.convert.hf_export import export_hf
from megatron_ledom.convert.hf_import import import_hf
from megatron_ledom.convert.reading_options import ReadingOptions
from megatron_ledom.data.preprocess.pipeline import preprocess
from megatron_ledom.data.preprocess.task import PreprocessSettings
from megatron_ledom.data.shards.model_order import OrderSettings
from megatron_ledom.data.shards.shard import load_manifest as load_shard_manifest
from megatron_ledom.direction import Direction, Reading, Unit, to_model_order
from megatron_ledom.errors import DataError, MismatchError, UsageError
from megatron_ledom.evaluation.loss_difference import document_losses
from megatron_ledom.evaluation.task_model import direction_of
from megatron_ledom.finetune.documents import DocumentCollator
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.engines.remote_engine import RemoteEngine
from megatron_ledom.inference.language_model import LanguageModel
from megatron_ledom.inference.model_folder import COMMAND_OPTIONS
from megatron_ledom.planning.dry_run import dry_run
from megatron_ledom.pretrain import check_start
from megatron_ledom.rewards import ReverseRewardFunction
from megatron_ledom.storage.records import Record
from megatron_ledom.training.replay import _texts
from tests.support.byte_level_bpe import write_byte_level_bpe
from tests.support.forked import run_forked
from tests.support.legible import EOD_TOKEN, write_jsonl
from tests.support.paths import ROOT
from tests.support.served import serving
from tests.support.tiny_runs import TinyData, check_same_run, read_metrics, run_on_ranks

MARKERS = {Direction.FORWARD: "<fwd>", Direction.REVERSE: "<rev>"}
LOADERS = {Direction.FORWARD: ForwardLM, Direction.REVERSE: ReverseLM}
BOTH_WAYS = pytest.mark.parametrize("direction", list(Direction))
LETTERS = "abcdefghijklmnop"
HELD_OUT = "d e f g h i j k"


def letters(first: int) -> str:
    """Return eight letters of a cycle, so that the next one depends on the direction alone."""
    return " ".join(LETTERS[(first + place) % len(LETTERS)] for place in range(8))


@dataclass(frozen=True, slots=True)
class TwoWay:
    """A finished two-way run, its config, its export, and the prefixes of its shards."""

    config: Path
    run_dir: Path
    folder: Path
    shards: dict[str, str]


@pytest.fixture(scope="module")
def two_way(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TwoWay:
    folder = tmp_path_factory.mktemp("two_way")
    added = [AddedToken(token, special=True) for token in (EOD_TOKEN, *MARKERS.values(), "<b>")]
    tokenizer = write_byte_level_bpe(folder / "bpe", 400, added)
    texts = {"train": write_jsonl(folder / "train.jsonl", [letters(7 * number) for number in range(800)])}
    texts["valid"] = write_jsonl(folder / "valid.jsonl", [HELD_OUT, *(letters(5 * number) for number in range(40))])
    shards = {}
    orders = {str(direction): (direction, OrderSettings(marker=marker)) for direction, marker in MARKERS.items()}
    orders["words"] = (Direction.REVERSE, OrderSettings(unit=Unit.WORD, marker="<rev>", boundary_token="<b>"))
    orders["bare"] = (Direction.REVERSE, OrderSettings())
    for name, (direction, order) in orders.items():
        for part, source in texts.items():
            shards[f"{name}_{part}"] = str(folder / f"{name}_{part}")
            preprocess(
                PreprocessSettings(
                    input=[str(source)],
                    tokenizer=tokenizer,
                    output_prefix=shards[f"{name}_{part}"],
                    direction=direction,
                    order=order,
                    eod_token=EOD_TOKEN,
                    workers=1,
                )
            )
    config = yaml.safe_load(data.config.read_text())
    config["data"] = {
        "direction": "both",
        "tokenizer": tokenizer,
        "seq_length": 32,
        "train_blend": [[2.0, shards["forward_train"]], [1.0, shards["reverse_train"]]],
        "valid_blend": [[1.0, shards["forward_valid"]], [1.0, shards["reverse_valid"]]],
        "path_to_cache": str(folder / "cache"),
        "allow_repeats": True,
        "reset_attention_mask": True,  # else a document could learn its direction from the one before it
    }
    config["train"] |= {"train_iters": 60, "eval_interval": 20, "eval_iters": 1}
    config["optimizer"] |= {"lr": 1e-2}
    config["checkpoint"] = {"save_interval": 30}
    path = folder / "two_way.yaml"
    path.write_text(yaml.safe_dump(config))
    run_on_ranks(path, folder / "run")
    export_hf(str(folder / "run"), str(folder / "export"))
    return TwoWay(path, folder / "run", folder / "export", shards)


def blends(two_way: TwoWay, reverse: str, *stated: str, weights: Sequence[float] = (1.0, 1.0)) -> dict[str, str]:
    """Return train_blend and valid_blend of the forward shard and of a reverse one. stated: the direction in each entry."""
    names = list(zip(("forward", reverse), weights, zip(stated) if stated else ((), ()), strict=True))
    parts = {"train_blend": "train", "valid_blend": "valid"}
    return {
        key: json.dumps([[weight, two_way.shards[f"{name}_{part}"], *direction] for name, weight, direction in names])
        for key, part in parts.items()
    }


def validation(records: list[Record], shard: str) -> list[float]:
    """Return the validation losses of a shard, in the order of the iterations."""
    return [record["validation"][shard]["lm_loss"] for record in records if "validation" in record]


def test_the_loss_falls_in_both_directions_and_each_is_validated_alone(two_way: TwoWay) -> None:
    records = read_metrics(two_way.run_dir)
    for direction in Direction:
        losses = validation(records, two_way.shards[f"{direction}_valid"])
        assert len(losses) == 3
        assert losses[-1] < losses[0] < math.log(404)
        assert losses[-1] < 2
    log = (two_way.config.parent / f"{two_way.run_dir.parent.name}-run.log").read_text()
    assert "66.67% of the samples forward, marker 401, 33.33% of the samples reverse, marker 402" in log


def test_a_resumed_two_way_run_equals_the_uninterrupted_one_on_two_ranks_too(two_way: TwoWay, tmp_path: Path) -> None:
    stopped = run_on_ranks(two_way.config, tmp_path / "resumed", "train.exit_interval=30")
    assert len(stopped) == 30
    run_on_ranks(two_way.config, tmp_path / "resumed")
    check_same_run(tmp_path / "resumed", two_way.run_dir)
    split = ["parallel.tensor_model_parallel_size=2", "train.train_iters=10", "optimizer.lr_decay_iters=60"]
    records = run_on_ranks(two_way.config, tmp_path / "split", *split, num_ranks=2)
    expected = [record["lm_loss"] for record in read_metrics(two_way.run_dir)[:10]]
    assert [record["lm_loss"] for record in records] == pytest.approx(expected, rel=2e-5)


def test_stated_directions_are_shown_and_count_as_the_same_data(two_way: TwoWay, tmp_path: Path) -> None:
    shutil.copytree(two_way.run_dir, tmp_path / "run")
    stated = blends(two_way, "reverse", "forward", "reverse", weights=[2.0, 1.0])
    chosen = [f"run_dir={tmp_path / 'run'}", *(f"data.{key}={value}" for key, value in stated.items())]
    assert "the run is complete at iteration 60" in check_start(load_config(str(two_way.config), chosen), 1)
    rows = dry_run(load_config(str(two_way.config), chosen), 1).text.partition("training data")[2].splitlines()[1:4]
    assert [row.split()[1] for row in rows] == ["direction", "forward", "reverse"]
    run_on_ranks(two_way.config, tmp_path / "run", *chosen[1:], "train.train_iters=61", "optimizer.lr_decay_iters=60")
    log = (two_way.config.parent / f"{tmp_path.name}-run.log").read_text()
    assert "changed since the checkpoint: train.train_iters" in log
    assert "train_blend was" not in log
    wrong = blends(two_way, "reverse", "reverse", "forward")
    with pytest.raises(MismatchError, match="forward_train is reverse, but its manifest says forward; correct or omit"):
        dry_run(load_config(str(two_way.config), [f"data.train_blend={wrong['train_blend']}"]), 1)
    card = (two_way.folder / "README.md").read_text()
    rows = [[cell.strip() for cell in row.split("|")[2:4]] for row in card.splitlines() if "_train |" in row]
    assert rows == [["forward_train", "forward"], ["reverse_train", "reverse"]]


def test_checkpoint_and_export_say_which_directions_the_model_reads(
    two_way: TwoWay, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(latest_checkpoint(str(two_way.run_dir / "checkpoints")))
    provenance = load_manifest(checkpoint).provenance
    readings = (Reading(direction=Direction.FORWARD, marker_id=401), Reading(direction=Direction.REVERSE, marker_id=402))
    assert (provenance.direction, provenance.readings) == ("both", readings)
    assert json.loads(Path(checkpoint, "manifest.json").read_text())["format_version"] == 3
    inspect_checkpoint(checkpoint)
    assert "forward, marker 401 and reverse, marker 402" in capsys.readouterr().out
    config = json.loads((two_way.folder / "config.json").read_text())
    assert config["direction"] == "both"
    assert [reading["marker_id"] for reading in config["readings"]] == [401, 402]
    card = (two_way.folder / "README.md").read_text()
    assert "a forward sequence begins with the id 401, and a reverse sequence begins with the id 402" in card


@BOTH_WAYS
def test_the_export_reads_each_direction_with_its_marker(two_way: TwoWay, direction: Direction) -> None:
    """The scores are those of the network after the marker, and the held-out loss is that of the run."""
    model: LanguageModel = LOADERS[direction].from_pretrained(two_way.folder, "cpu")
    marker_id = model.tokenizer.vocab[MARKERS[direction]]
    assert model.leading_ids == [marker_id]
    text_ids = model.tokenizer.encode(HELD_OUT)
    tokens = torch.tensor([[marker_id, *to_model_order(text_ids, direction), model.stop_ids[0]]])
    with torch.inference_mode():
        logprobs = torch.log_softmax(model.model(tokens).logits[0].float(), -1)
    expected = [float(logprobs[place, id_]) for place, id_ in enumerate(tokens[0, 1:].tolist())]
    score = document_losses(model, [text_ids], context=32, batch_size=1)[0]
    assert [*to_model_order(score.token_logprobs, direction), score.eod_logprob] == pytest.approx(expected, abs=1e-4)
    whole = ("", HELD_OUT) if direction is Direction.FORWARD else (HELD_OUT, "")
    assert model.log_likelihood(*whole).token_logprobs == pytest.approx(score.token_logprobs, abs=1e-4)  # type: ignore[attr-defined]
    write = model.generate_following if isinstance(model, ForwardLM) else model.generate_preceding  # type: ignore[attr-defined]
    given, following = ("d e f", " g h") if direction is Direction.FORWARD else (" f g h", "d e")
    written = write([given, ""], max_new_tokens=len(model.tokenizer.encode(following)))
    part = written[0].following if direction is Direction.FORWARD else written[0].preceding
    assert (part.startswith if direction is Direction.FORWARD else part.endswith)(
        following[:2] if following[0] == " " else following[-1:]
    )
    assert written[1].text


@BOTH_WAYS
def test_the_marker_of_the_other_direction_is_worse(two_way: TwoWay, direction: Direction) -> None:
    model = LOADERS[direction].from_pretrained(two_way.folder, "cpu")
    documents = [model.tokenizer.encode(letters(first)) for first in range(len(LETTERS))]

    def loss() -> float:
        return -sum(score.logprob for score in document_losses(model, documents, context=32, batch_size=16))

    right = loss()
    model.leading_ids = [model.tokenizer.vocab[MARKERS[direction.other]]]
    assert loss() > right + len(documents) * math.log(2)


def test_a_two_way_model_is_its_own_scorer_and_its_direction_must_be_chosen(two_way: TwoWay) -> None:
    rewards = ReverseRewardFunction(two_way.folder, two_way.folder)(["d e f", "d e f"], [" g h", " c b"])
    assert rewards[0] > rewards[1]
    with pytest.raises(UsageError, match=r"reads both directions; choose one with --direction reverse or --direction forward"):
        direction_of(two_way.folder, None, COMMAND_OPTIONS)
    with pytest.raises(UsageError, match="choose one with"):
        direction_of(two_way.folder, "both", COMMAND_OPTIONS)
    with pytest.raises(UsageError, match="'up' is not reverse or forward"):
        direction_of(two_way.folder, "up", COMMAND_OPTIONS)
    assert direction_of(two_way.folder, "forward", COMMAND_OPTIONS) is Direction.FORWARD


class _Remote(RemoteEngine):
    _logprobs = _written = None  # type: ignore[assignment]


@BOTH_WAYS
def test_engines_on_servers_and_fine_tuning_begin_with_the_marker_too(two_way: TwoWay, direction: Direction) -> None:
    marker_id = 401 if direction is Direction.FORWARD else 402
    assert _Remote(two_way.folder, direction).leading_ids == [marker_id]
    model = LOADERS[direction].from_pretrained(two_way.folder, "cpu")
    batch = DocumentCollator.of(model)([{"input_ids": [1, 2, 3]}])
    assert batch["input_ids"][0].tolist() == [marker_id, *to_model_order([1, 2, 3], direction), model.stop_ids[0]]


@BOTH_WAYS
def test_the_harness_scores_a_text_after_the_marker_and_keeps_it_in_a_text_that_is_too_long(
    two_way: TwoWay, direction: Direction
) -> None:
    harness = pytest.importorskip("lm_eval.api.instance")
    from megatron_ledom.evaluation.harness.model import LedomLM

    with pytest.raises(UsageError, match="direction=reverse in --model_args or direction=forward in --model_args"):
        LedomLM(two_way.folder)
    model = LedomLM(two_way.folder, direction=str(direction), device="cpu")
    request = harness.Instance("loglikelihood_rolling", {}, (HELD_OUT,), 0)
    loaded = LOADERS[direction].from_pretrained(two_way.folder, "cpu")
    expected = document_losses(loaded, [loaded.tokenizer.encode(HELD_OUT)], context=32, batch_size=1)[0]
    (found,) = model.loglikelihood_rolling([request])
    assert found == pytest.approx(sum(expected.token_logprobs), abs=1e-4)
    marker_id = loaded.leading_ids[0]
    assert model._without([marker_id, 1, 2, 3, 4], 2) == [marker_id, 3, 4]


def test_one_folder_is_both_models_of_rerank_and_of_a_server(two_way: TwoWay, tmp_path: Path) -> None:
    both = ["--forward", str(two_way.folder), "--reverse", str(two_way.folder)]
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "d e f", "candidates": [" c b", " g h"]}) + "\n")
    paths = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    done = run_forked([ROOT / "tools/rerank.py", *both, *paths])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.jsonl").read_text())["best"] == " g h"
    models = [LOADERS[direction].from_pretrained(two_way.folder, "cpu") for direction in Direction]
    reverse, forward = models
    with serving(*both) as server:
        asked = {"max_tokens": 4, "temperature": 0}
        written = server.post("/v1/completions", {"suffix": " f g h", **asked}).json()["choices"][0]["text"]
        assert written == reverse.generate_preceding(" f g h", max_new_tokens=4)[0].preceding  # type: ignore[attr-defined]
        written = server.post("/v1/completions", {"prompt": "d e f", **asked}).json()["choices"][0]["text"]
        assert written == forward.generate_following("d e f", max_new_tokens=4)[0].following  # type: ignore[attr-defined]


def test_a_direction_that_the_model_did_not_learn_is_refused(two_way: TwoWay, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(two_way.folder, folder)
    config = json.loads((folder / "config.json").read_text())

    def record(**changes: object) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    forward, reverse = config["readings"]
    record(direction="forward", readings=[forward])
    with pytest.raises(MismatchError, match="records the direction forward, ReverseLM needs a reverse model"):
        ReverseLM.from_pretrained(folder, "cpu")
    assert ForwardLM.from_pretrained(folder, "cpu").leading_ids == [401]
    record(readings=[forward, {**reverse, "unit": "word", "boundary_id": 403}])
    with pytest.raises(
        MismatchError, match="trained on reverse documents in word order; ReverseLM reads and writes token by token"
    ):
        ReverseLM.from_pretrained(folder, "cpu")
    assert ForwardLM.from_pretrained(folder, "cpu").leading_ids == [401]
    for readings, message in (
        ([forward], "but it reads forward"),
        ([forward, {**reverse, "marker_id": 401}], "same marker"),
        (None, "it reads nothing"),
        ([{"direction": "up"}], "expected a list of direction"),
    ):
        record(readings=readings)
        with pytest.raises(DataError, match=message):
            ForwardLM.from_pretrained(folder, "cpu")


def test_an_import_keeps_the_readings_or_takes_other_markers(two_way: TwoWay, tmp_path: Path) -> None:
    def imported(name: str, **options: object) -> tuple[object, ...]:
        import_hf(str(two_way.folder), str(tmp_path / name), verify=None, **options)  # type: ignore[arg-type]
        provenance = load_manifest(str(latest_checkpoint(str(tmp_path / name / "checkpoints")))).provenance
        return (str(provenance.direction), *(reading.marker_id for reading in provenance.readings))

    assert imported("same") == ("both", 401, 402)
    assert imported("reverse", direction=Direction.REVERSE) == ("reverse", 402)
    assert imported("other", direction=Direction.FORWARD, order=ReadingOptions(forward_marker="<b>")) == ("forward", 403)
    with pytest.raises(UsageError, match="--reverse-marker has no effect with --direction forward"):
        imported("x", direction=Direction.FORWARD, order=ReadingOptions(reverse_marker="<b>"))
    with pytest.raises(UsageError, match="different markers"):
        imported("x", order=ReadingOptions(reverse_marker="<fwd>"))
    with pytest.raises(UsageError, match="the reverse marker has the id 400, which is the eod"):
        imported("x", order=ReadingOptions(reverse_marker=EOD_TOKEN))
    by_word = ReadingOptions(reverse_unit=Unit.WORD, reverse_boundary_token="<b>")
    assert imported("by_word", order=by_word) == ("both", 401, 402)
    chosen = [f"run_dir={tmp_path / 'by_word'}", *(f"data.{key}={value}" for key, value in blends(two_way, "words").items())]
    check_start(load_config(str(two_way.config), chosen), 1)
    refused = {
        "--reverse-unit word needs --reverse-boundary-token": ReadingOptions(reverse_unit=Unit.WORD),
        "--reverse-boundary-token <b> has no effect with the unit token": ReadingOptions(reverse_boundary_token="<b>"),
        "have the same id 402": ReadingOptions(reverse_unit=Unit.SEGMENT, reverse_boundary_token="<rev>"),
        "the reverse boundary-token has the id 400, which is the eod": ReadingOptions(
            reverse_unit=Unit.SEGMENT, reverse_boundary_token=EOD_TOKEN
        ),
    }
    for message, order in refused.items():
        with pytest.raises(UsageError, match=message):
            imported("x", order=order)
    with pytest.raises(UsageError, match="--reverse-unit has no effect with --direction forward"):
        imported("x", direction=Direction.FORWARD, order=by_word)
    words = tmp_path / "words"
    shutil.copytree(two_way.folder, words)
    config = json.loads((words / "config.json").read_text())
    config["readings"][1] |= {"unit": "word", "boundary_id": 403}
    (words / "config.json").write_text(json.dumps(config))
    import_hf(str(words), str(tmp_path / "again"), verify=None, order=ReadingOptions(reverse_marker="<rev>"))
    found = load_manifest(str(latest_checkpoint(str(tmp_path / "again/checkpoints")))).provenance.readings[1]
    assert (found.unit, found.boundary_id, found.marker_id) == (Unit.WORD, 403, 402)
    check_start(load_config(str(two_way.config), [f"run_dir={tmp_path / 'same'}"]), 1)


def test_other_blends_and_other_starts_are_refused(two_way: TwoWay, tmp_path: Path) -> None:
    shards = two_way.shards

    def start(*overrides: str, train: tuple[str, ...] = ("forward", "reverse"), valid: str = "forward") -> str:
        blend = json.dumps([[1.0, shards[f"{name}_train"]] for name in train])
        held_out = json.dumps([[1.0, shards[f"{valid}_valid"]]])
        chosen = [f"run_dir={tmp_path / 'run'}", f"data.train_blend={blend}", f"data.valid_blend={held_out}", *overrides]
        return check_start(load_config(str(two_way.config), chosen), 1)

    with pytest.raises(MismatchError, match=r"is forward, the run has data.direction=reverse.*or both for a two-way model"):
        start("data.direction=reverse")
    with pytest.raises(MismatchError, match=r"all shards of data.train_blend are forward; add reverse ones"):
        start(train=("forward",), valid="reverse")
    with pytest.raises(MismatchError, match=r"use the same --unit, --marker and --boundary-token for both"):
        start(train=("forward", "reverse", "bare"))
    with pytest.raises(MismatchError, match=r"reverse by word, boundary 403, marker 402"):
        start(train=("forward", "reverse"), valid="words")
    stock = tmp_path / "stock"
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(shards["bare_train"] + suffix, f"{stock}{suffix}")
    manifest = json.loads(Path(f"{stock}.json").read_text())
    Path(f"{stock}.json").write_text(json.dumps({**manifest, "bos_token": "<rev>"}))
    with pytest.raises(MismatchError, match=r"begin with a BOS token.*--marker instead of --bos-token"):
        start(f"data.train_blend=[[1.0,{shards['forward_train']}],[1.0,{stock}]]")
    one = load_shard_manifest(shards["forward_train"]).provenance
    both = load_manifest(str(latest_checkpoint(str(two_way.run_dir / "checkpoints")))).provenance
    with pytest.raises(MismatchError, match=r"two-way model is trained on with data.direction=both"):
        both.check_same(one, "the checkpoint", "this run's data")
    with pytest.raises(MismatchError, match=r"is a two-way model, but data\.direction=forward"):
        start(f"init_from={two_way.run_dir}", "data.direction=forward", train=("forward",))
    with pytest.raises(
        MismatchError, match="reverse, marker 402, this run's data is forward, marker 401 and reverse: use the same"
    ):
        start(f"init_from={two_way.run_dir}", train=("forward", "bare"), valid="bare")
    assert "would start at iteration 0" in start(f"init_from={two_way.run_dir}")
    assert "would start from iteration 0" in start("data.direction=reverse", train=("words",), valid="words")


def test_a_replayed_step_shows_the_texts_of_every_order(two_way: TwoWay) -> None:
    from megatron_ledom.data.shards.shard import ShardReader
    from megatron_ledom.tokenizers.corpus_tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(two_way.config.parent / "bpe/tokenizer.json"), EOD_TOKEN)
    state = SimpleNamespace(provenance=SimpleNamespace(eod_id=tokenizer.eod_id))
    for name in ("forward", "reverse", "words", "bare"):
        prefix = two_way.shards[f"{name}_valid"]
        ids = ShardReader(prefix).document(0).tolist()
        shown = list(_texts(ids, tokenizer, state, load_shard_manifest(prefix)))  # type: ignore[arg-type]
        assert shown == [repr(HELD_OUT)]
