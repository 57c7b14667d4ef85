"""lm-evaluation-harness: a forward model answers as the `hf` model, and each left-to-right assumption is handled.

The slow references are one pass of the stock model over one sequence.
"""

import json
import logging
import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from megatron_ledom.errors import DataError, UsageError
from megatron_ledom.evaluation.harness import __main__ as command
from megatron_ledom.evaluation.harness import model as harness_model
from megatron_ledom.evaluation.harness.model import LedomLM
from megatron_ledom.evaluation.harness.reverse_choices import WAYS, choice_requests
from megatron_ledom.inference import ForwardLM, ReverseLM
from megatron_ledom.inference.scoring import Span, measure_spans
from tests.support.exact_models import LETTERS, TEXTS, letters_lm, random_joint
from tests.support.harness_tasks import QUESTIONS, TASKS, write_tasks
from tests.support.tiny_models import EOD_TOKEN, chain_model, random_model_folder, save_model_folder, sentencepiece_like_json

Pair = tuple[str, str]
EXEMPLAR = "Question: Where was the cat?\nAnswer: on the mat\n\n"
QUERY = "Question: What is the capital of France?\nAnswer:"
CHOICES = (" Paris", " the mat", " Berlin is the capital of Germany")


def requests(*documents: Sequence[Pair], kind: str = "loglikelihood", task: str = "tiny") -> list[Instance]:
    """Return the requests of documents, each a list of (context, continuation)."""
    return [
        Instance(kind, {}, arguments, index, (task, number, 1))
        for number, choices in enumerate(documents)
        for index, arguments in enumerate(choices)
    ]


def folder_for_hf(root: Path, kind: str) -> Path:
    """Return a forward folder whose tokenizer names the start symbol that `hf` expects: eod, or BOS for a stock model."""
    tokenizer = kind.removeprefix("stock_")
    stock = kind.startswith("stock_")
    folder = random_model_folder(root / kind, tokenizer, None if stock else "forward")
    names = {"eos_token": EOD_TOKEN, **({"bos_token": "<s>"} if stock else {})}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    if stock:
        path, bos = folder / "tokenizer.json", {"SpecialToken": {"id": "<s>", "type_id": 0}}
        template = {"type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}], "pair": []}
        template |= {"special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("harness")
    forward = {kind: folder_for_hf(root, kind) for kind in ("byte_level", "sentencepiece", "stock_byte_level")}
    return {**forward, "reverse": random_model_folder(root / "reverse", "sentencepiece", "reverse")}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = write_tasks(tmp_path_factory.mktemp("tasks") / "tasks")
    return TaskManager(include_path=str(folder), include_defaults=False)


@cache
def stock(folder: Path) -> tuple[Any, Tokenizer, int]:
    """Return (model, tokenizer, eod), loaded with transformers and tokenizers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return (
        model,
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        json.loads((folder / "config.json").read_text())["eod_id"],
    )


@torch.no_grad()
def logprobs(folder: Path, tokens: list[int]) -> list[float]:
    """Return log P of each token after the first, given all tokens before it."""
    values = torch.log_softmax(stock(folder)[0](torch.tensor([tokens])).logits[0].double(), -1)
    return [float(values[position, token]) for position, token in enumerate(tokens[1:])]


def read_from_the_end(folder: Path, text: str) -> list[float]:
    """Return log P of each id of a text after eod, the last id first."""
    _, tokenizer, eod = stock(folder)
    return logprobs(folder, [eod, *reversed(tokenizer.encode(text).ids)])


def shares(values: Sequence[float]) -> list[float]:
    """Return the log of each value's fraction of the sum of the exponentials."""
    total = math.log(sum(math.exp(value - max(values)) for value in values)) + max(values)
    return [value - total for value in values]


def answers(model: LedomLM, *documents: Sequence[Pair]) -> list[float]:
    return [value for value, _ in model.loglikelihood(requests(*documents))]


def test_forward_answers_and_metrics_are_those_of_hf(folders: dict[str, Path], tasks: TaskManager) -> None:
    """Multiple choice (also with two contexts), a last word, whole texts and written answers, with a few-shot example."""
    folder = folders["byte_level"]
    hf = HFLM(str(folder), device="cpu", dtype="float32", batch_size=3)
    models = {"ours": LedomLM(folder, batch_size=4), "hf": hf}
    found = {
        name: simple_evaluate(model=model, tasks=list(TASKS), task_manager=tasks, num_fewshot=1, bootstrap_iters=0)
        for name, model in models.items()
    }
    for task in TASKS:
        ours, theirs = (found[name]["results"][task] for name in ("ours", "hf"))
        assert ours.keys() == theirs.keys()
        for metric in ours:
            close = pytest.approx(theirs[metric], rel=1e-5) if isinstance(theirs[metric], float) else theirs[metric]
            assert ours[metric] == close, (task, metric)
        for mine, other in zip(found["ours"]["samples"][task], found["hf"]["samples"][task], strict=True):
            for (answer,), (expected,) in zip(mine["resps"], other["resps"], strict=True):
                assert answer == pytest.approx(expected, abs=2e-5) if task != "tiny_answers" else answer == expected


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "stock_byte_level"])
def test_forward_requests_of_all_shapes_get_the_answers_of_hf(
    kind: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Boundaries, spaces, merges across the cut, BOS, no context, long texts, greedy continuations, windows."""
    ours = LedomLM(folders[kind], max_length=24, batch_size=2)
    hf = HFLM(str(folders[kind]), max_length=24, device="cpu", dtype="float32", batch_size=3)
    prompts = [("The cat sat", 8), ("漢字 and", 8), (EXEMPLAR + QUERY, 16), ("The dog ran after ", 5)]
    writing = requests(
        [(text, {"until": ["e", "\n"], "max_gen_toks": limit, "do_sample": False}) for text, limit in prompts],
        kind="generate_until",
    )
    written = ours.generate_until(writing)
    assert written == hf.generate_until(writing)
    words = ("The cat", "A dog", "in Paris", "of course", "Once upon a time")
    free = requests([(text, {"until": [], "max_gen_toks": 1}) for text in words], kind="generate_until")
    pairs = [
        *[(QUERY, choice) for choice in CHOICES],
        *[("", "The cat sat"), ("", " The cat sat"), ("Answer: ", "Paris"), ("Two  ", " spaces"), ("a\n", "\nb"), ("The", " ")],
        *[(3 * EXEMPLAR + QUERY, choice) for choice in CHOICES],
        *[("<s>A dog" if kind.startswith("stock") else "A dog", " ran")],
        *zip(words, hf.generate_until(free), strict=True),
    ]
    expected = hf.loglikelihood(requests(pairs))
    assert any(is_greedy for _, is_greedy in expected)
    for pair, answer, (value, is_greedy) in zip(pairs, ours.loglikelihood(requests(pairs)), expected, strict=True):
        assert answer == (pytest.approx(value, abs=5e-5), is_greedy), pair
    texts = requests(
        [(text,) for text in ("The cat sat on the mat, and the dog ran. " * 3, "x", "")], kind="loglikelihood_rolling"
    )
    assert ours.loglikelihood_rolling(texts) == pytest.approx(hf.loglikelihood_rolling(texts), abs=2e-4)
    assert "skipped the beginnings of" in caplog.text


def test_a_token_across_the_cut_is_scored_when_hf_has_nothing_to_score(folders: dict[str, Path]) -> None:
    folder = folders["byte_level"]
    whole = stock(folder)[1].encode("The capital of Paris")
    assert whole.tokens[-1] == "ĠParis"
    pair = ("The capital of Par", "is")
    ((value, _),) = LedomLM(folder).loglikelihood(requests([pair]))
    assert value == pytest.approx(logprobs(folder, whole.ids)[-1], abs=1e-4)
    with pytest.raises(AssertionError):
        HFLM(str(folder), device="cpu", dtype="float32").loglikelihood(requests([pair]))


# The harness's nine assumptions, for a reverse model


def test_a_pair_is_encoded_once_as_a_whole_and_reversed_after_eod(folders: dict[str, Path]) -> None:
    """Encoding the parts separately gives other ids (dummy prefix, space before the choice's first word)."""
    folder = folders["reverse"]
    tokenizer = stock(folder)[1]
    assert all(tokenizer.encode(QUERY).ids + tokenizer.encode(c).ids != tokenizer.encode(QUERY + c).ids for c in CHOICES)
    expected = shares([sum(read_from_the_end(folder, QUERY + choice)) for choice in CHOICES])
    assert answers(LedomLM(folder, batch_size=2), [(QUERY, choice) for choice in CHOICES]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_choices_of_a_true_model_are_ranked_by_the_closed_form(way: str) -> None:
    """The texts have four letters, the context is the first three. Few-shot examples stand before the query."""
    joint = random_joint(seed=11)
    model = LedomLM(letters_lm(ReverseLM, joint), way=way, batch_size=7)
    contexts = sorted({text[:3] for text in TEXTS})
    found = answers(model, *[[(context, letter) for letter in LETTERS] for context in contexts])
    prior = {letter: sum(p for text, p in joint.items() if text.endswith(letter)) for letter in LETTERS}
    for number, context in enumerate(contexts):
        masses = [joint[context + letter] / (1 if way == "joint" else prior[letter]) for letter in LETTERS]
        assert found[3 * number : 3 * number + 3] == pytest.approx([math.log(m / sum(masses)) for m in masses], abs=1e-5)
        if way == "joint":
            forward = LedomLM(letters_lm(ForwardLM, joint))
            ours = answers(forward, [(context, letter) for letter in LETTERS])
            assert found[3 * number : 3 * number + 3] == pytest.approx(ours, abs=1e-5)


def test_choices_with_different_contexts_are_compared_too(folders: dict[str, Path]) -> None:
    """As in WinoGrande: the choice is in the context, and the continuation is the same."""
    pairs = [("The cup fits the box, for the cup", " is small."), ("The cup fits the box, for the box", " is small.")]
    expected = shares([sum(read_from_the_end(folders["reverse"], "".join(pair))) for pair in pairs])
    assert answers(LedomLM(folders["reverse"]), pairs) == pytest.approx(expected, abs=1e-3)


def test_a_single_continuation_is_refused(folders: dict[str, Path], tasks: TaskManager) -> None:
    with pytest.raises(UsageError, match=r"tiny_last_word, document 0 .*reads the continuation first.*multiple_choice"):
        simple_evaluate(model=LedomLM(folders["reverse"]), tasks=["tiny_last_word"], task_manager=tasks)


def test_the_start_symbol_is_eod_after_the_end_of_the_text(folders: dict[str, Path]) -> None:
    """This holds for a whole text too, and the symbol affects the answer."""
    folder = folders["reverse"]
    _, tokenizer, eod = stock(folder)
    text = "The cat sat on the mat."
    ids = tokenizer.encode(text).ids
    (found,) = LedomLM(folder).loglikelihood_rolling(requests([(text,)], kind="loglikelihood_rolling"))
    assert found == pytest.approx(sum(logprobs(folder, [eod, *reversed(ids)])), abs=1e-4)
    assert abs(found - sum(logprobs(folder, [tokenizer.token_to_id("<s>"), *reversed(ids)]))) > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_truncation_drops_the_same_beginning_of_all_choices(
    way: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The rest keeps the log-likelihood that it has at the end of the whole text, which a longer model gives."""
    folder, context = folders["reverse"], 2 * EXEMPLAR + QUERY
    tokenizer, choices = stock(folder)[1], [(context, choice) for choice in CHOICES]
    requests = choice_requests(choices, way, reverse_lm(folder).tokenizer, 59, ("tiny", 0, True))
    texts = ["".join(one.pair) for one in requests]
    begins = {text.removesuffix(choice) for text, choice in zip(texts, CHOICES, strict=True)}
    assert len(begins) == 1
    kept = begins.pop()
    assert context.endswith(kept)
    assert max(len(tokenizer.encode(text).ids) for text in texts) in range(50, 60)  # a word is up to 8 ids
    scores = []
    for text, choice in zip(texts, CHOICES, strict=True):
        num_ids = {part: len(tokenizer.encode(part).ids) for part in (text, choice[1:])}
        given = logprobs(folder, tokenizer.encode(context + choice).ids[::-1])
        read = read_from_the_end(folder, context + choice)[: num_ids[text]]
        scores.append(
            {"joint": sum(read), "context_given_choice": sum(given[num_ids[choice[1:]] - 1 : num_ids[text] - 1])}.get(way)
        )
        if way == "prior_removed":
            scores[-1] = sum(read) - sum(read_from_the_end(folder, choice[1:]))
    assert answers(LedomLM(folder, way=way, max_length=60), choices) == pytest.approx(shares(scores), abs=1e-3)
    assert f"tiny, document 0: skipped {len(context) - len(kept)} characters of the context: 59 tokens fit" in caplog.text


@cache
def reverse_lm(folder: Path) -> ReverseLM:
    return ReverseLM.from_pretrained(folder, device="cpu")


def test_choices_that_do_not_fit_with_the_same_context_are_refused(folders: dict[str, Path]) -> None:
    model = LedomLM(folders["reverse"], max_length=24)
    with pytest.raises(DataError, match="tiny, document 0: the choices have more than 23 tokens without the context"):
        answers(model, [("Question: Where?", " here"), ("Question: Where?", " the mat and the dog" * 9)])
    with pytest.raises(DataError, match="exceeds the 24 positions"):
        LedomLM(folders["byte_level"], max_length=24).loglikelihood(requests([("a", " the mat and the dog" * 9)]))


def test_few_shot_examples_stay_before_the_query(folders: dict[str, Path], tasks: TaskManager) -> None:
    """Both directions get the same text, in text order, for a document with two few-shot examples."""
    found = simple_evaluate(model=LedomLM(folders["reverse"]), tasks=["tiny_choices"], task_manager=tasks, num_fewshot=2)
    sample = found["samples"]["tiny_choices"][3]
    text = "".join(f"Question: {row['question']}\nAnswer: {row['choices'][row['gold']]}\n\n" for row in QUESTIONS[:2])
    text += f"Question: {QUESTIONS[3]['question']}\nAnswer:"
    expected = shares([sum(read_from_the_end(folders["reverse"], f"{text} {choice}")) for choice in QUESTIONS[3]["choices"]])
    assert [value for ((value, _),) in sample["resps"][:3]] == pytest.approx(expected, abs=1e-3)


def test_until_is_matched_in_the_written_text_and_refused_in_reverse(
    folders: dict[str, Path], tmp_path: Path, tasks: TaskManager
) -> None:
    """The model writes "the cat of Paris" token by token. The first of two strings in the text ends it."""
    tokenizer = Tokenizer.from_str(sentencepiece_like_json())
    start, *pieces = tokenizer.encode("a the cat of Paris").ids
    assert len({start, *pieces}) == 1 + len(pieces)
    follows = dict(zip([start, *pieces], pieces, strict=False))
    folder = save_model_folder(
        tmp_path / "chain", chain_model(tokenizer.get_vocab_size(), follows), sentencepiece_like_json(), "forward"
    )
    for until, expected in (
        ([], "the cat of Paris"),
        (["Paris", " of"], "the cat"),
        ([" of", "Paris"], "the cat"),
        (["x"], None),
    ):
        options = {"until": until, "max_gen_toks": len(pieces), "do_sample": False}
        (written,) = LedomLM(folder).generate_until(requests([("a", options)], kind="generate_until"))
        assert written == (expected or "the cat of Paris")
    with pytest.raises(UsageError, match=r"tiny_answers: .*writes only before a text; use ledom evaluate"):
        simple_evaluate(model=LedomLM(folders["reverse"]), tasks=["tiny_answers"], task_manager=tasks)


def test_unknown_generation_options_are_refused(folders: dict[str, Path]) -> None:
    model = LedomLM(folders["byte_level"])
    for options, message in (
        ({"until": [], "repetition_penalty": 1.2}, "repetition_penalty.*known are until, max_gen_toks"),
        ({"until": [], "num_beams": 4}, "num_beams"),
        ({"until": [], "max_gen_toks": 512}, "max_gen_toks=512 leaves no room.*at most 511"),
    ):
        with pytest.raises(UsageError, match=message):
            model.generate_until(requests([("a", {"until": [], "num_beams": 1}), ("a", options)], kind="generate_until"))
    sampled = requests(
        [("a", {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 9.0})] * 4, kind="generate_until"
    )
    assert len(set(model.generate_until(sampled))) > 1


def test_rolling_windows_run_from_the_end_of_the_text_to_its_beginning(folders: dict[str, Path]) -> None:
    folder = folders["reverse"]
    _, tokenizer, eod = stock(folder)
    text = "The cat sat on the mat, and the dog ran after the cat."
    tokens = [eod, *reversed(tokenizer.encode(text).ids)]
    size = 9
    expected, predicted = 0.0, 1
    while predicted < len(tokens):
        end = min(predicted + size, len(tokens))
        window = tokens[max(0, end - size - 1) : end]
        expected += sum(logprobs(folder, window)[-(end - predicted) :])
        predicted = end
    (found,) = LedomLM(folder, max_length=size).loglikelihood_rolling(requests([(text,)], kind="loglikelihood_rolling"))
    assert found == pytest.approx(expected, abs=1e-3)


def test_acc_norm_divides_a_log_probability_of_the_choice(folders: dict[str, Path], tasks: TaskManager) -> None:
    """The likelihood of the whole text, divided by the choice's length, would favour the longest choice."""
    found = simple_evaluate(model=LedomLM(folders["reverse"]), tasks=["tiny_choices"], task_manager=tasks)
    for row, sample in zip(QUESTIONS, found["samples"]["tiny_choices"], strict=True):
        values = [value for ((value, _),) in sample["resps"]]
        assert sum(map(math.exp, values[:3])) == pytest.approx(1.0)
        lengths = [len(choice) for choice in row["choices"]]
        by_length = [value / length for value, length in zip(values, lengths, strict=False)]
        assert sample["acc_norm"] == float(by_length.index(max(by_length)) == row["gold"])
        texts = [f"Question: {row['question']}\nAnswer: {choice}" for choice in row["choices"]]
        joint = [sum(read_from_the_end(folders["reverse"], text)) for text in texts]
        assert sample["acc"] == float(joint.index(max(joint)) == row["gold"])
        wrong = [value / length for value, length in zip(joint, lengths, strict=True)]
        assert wrong.index(max(wrong)) == lengths.index(max(lengths)) != by_length.index(max(by_length))


def test_the_delimiters_space_belongs_to_the_choice(folders: dict[str, Path]) -> None:
    """This holds wherever the task puts the space. A choice alone does not begin with it."""
    folder = folders["reverse"]
    for way in WAYS:
        model = LedomLM(folder, way=way)
        usual = answers(model, [(QUERY, choice) for choice in CHOICES])
        assert answers(model, [(QUERY + "  ", choice[1:]) for choice in CHOICES]) == pytest.approx(
            answers(model, [(QUERY, " " + choice) for choice in CHOICES]), abs=1e-4
        )
        assert answers(model, [(QUERY + " ", choice[1:]) for choice in CHOICES]) == pytest.approx(usual, abs=1e-4)
    alone = shares([sum(read_from_the_end(folder, choice.strip())) for choice in CHOICES])
    assert answers(LedomLM(folder), [("", choice) for choice in CHOICES]) == pytest.approx(alone, abs=1e-3)
    with_space = shares([sum(read_from_the_end(folder, choice)) for choice in CHOICES])
    assert max(abs(a - b) for a, b in zip(alone, with_space, strict=True)) > 0.1


# The rest of the adapter


def test_a_reverse_model_runs_in_the_harness_with_all_supported_request_types(
    folders: dict[str, Path], tasks: TaskManager
) -> None:
    names = ["tiny_choices", "tiny_gaps", "tiny_texts"]
    found = simple_evaluate(
        model=LedomLM(folders["reverse"]), tasks=names, task_manager=tasks, num_fewshot=1, bootstrap_iters=0
    )
    assert 0 < found["results"]["tiny_texts"]["bits_per_byte,none"] < 16
    assert found["config"]["direction"] == "reverse"
    assert found["config"]["way"] == "joint"


def test_meaningless_arguments_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="way='choice' is unknown; it can be one of joint"):
        LedomLM(folders["reverse"], way="choice")
    with pytest.raises(UsageError, match="max_length=513 must be between 2 and the 512 positions"):
        LedomLM(folders["reverse"], max_length=513)
    with pytest.raises(UsageError, match="dtype='half precision' is not a torch dtype"):
        LedomLM(folders["reverse"], dtype="half precision")
    for way in ("context_given_choice", "prior_removed"):
        with pytest.raises(UsageError, match=f"tiny: way={way} .*no context; use way=joint"):
            answers(LedomLM(folders["reverse"], way=way), [(" ", "a"), (" ", "b")])
    with pytest.raises(UsageError, match="run without --use_cache"):
        simple_evaluate(model=LedomLM(folders["reverse"]), tasks=["x"], use_cache=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match="names no task and document"):
        LedomLM(folders["reverse"]).loglikelihood([Instance("loglikelihood", {}, ("a", " b"), 0)])


def test_without_cuda_the_harness_uses_the_cpu_with_a_warning(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its command line requests CUDA unless the user names a device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LedomLM(folders["reverse"], device="cuda:0").device.type == "cpu"
    assert "not on cuda:0" in caplog.text


def test_the_harness_caches_answers_of_a_forward_model(
    folders: dict[str, Path], tasks: TaskManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of finished windows survive a kill: of 24 requests the first ten are not computed again."""
    sizes: list[int] = []

    def measure(*model: Any, spans: list[Span], **options: Any) -> Any:
        sizes.append(len(spans))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return measure_spans(*model, spans=spans, **options)

    monkeypatch.setattr(harness_model, "WINDOW_REQUESTS", 10)
    monkeypatch.setattr(harness_model, "measure_spans", measure)
    arguments = {"tasks": ["tiny_choices", "tiny_answers"], "task_manager": tasks, "use_cache": str(tmp_path / "cache")}
    with pytest.raises(KeyboardInterrupt):
        simple_evaluate(model=LedomLM(folders["byte_level"]), bootstrap_iters=0, **arguments)
    first = simple_evaluate(model=LedomLM(folders["byte_level"]), bootstrap_iters=0, **arguments)
    assert sizes == [10, 10, 10, 4]
    model = LedomLM(folders["byte_level"])
    for name in ("loglikelihood", "generate_until"):
        monkeypatch.setattr(model, name, None)
    assert simple_evaluate(model=model, bootstrap_iters=0, **arguments)["results"] == first["results"]


def test_the_command_is_the_harnesss_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit, match="0"):
        command.main()
    assert "--include_path" in capsys.readouterr().out
    assert get_model("ledom") is LedomLM


@pytest.mark.slow  # the harness reads its own thousands of task files first
def test_the_command_runs_a_local_task(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_tasks(tmp_path / "tasks")
    words = ["--model_args", f"pretrained={folders['reverse']},way=prior_removed", "--tasks", "tiny_gaps"]
    monkeypatch.setattr(sys, "argv", ["x", *words, "--include_path", str(own), "--output_path", str(tmp_path / "results")])
    monkeypatch.setattr(logging.root, "handlers", list(logging.root.handlers))
    command.main()
    assert "tiny_gaps" in capsys.readouterr().out
    (file,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(file.read_text())["config"]["way"] == "prior_removed"


@pytest.mark.parametrize("name", ["model", "__main__"])
def test_without_the_harness_the_adapter_names_the_package_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_ledom.evaluation  # noqa: F401  (needs no harness)

    for module in [module for module in sys.modules if module.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "megatron_ledom.evaluation.harness.model", raising=False)
    with pytest.raises(UsageError, match=r"pip install 'megatron-ledom\[harness\]'"):
        command.main() if name == "__main__" else __import__("megatron_ledom.evaluation.harness.model")
