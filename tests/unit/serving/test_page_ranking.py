"""Ranking and comparing on the web page, in a real browser; what it computes equals what the server and the library compute."""

import itertools
import json
import math
from typing import Any

import pytest

from megatron_ledom.inference.engines.engine import StepDelimiter
from tests.support.browser import CTRL, ENTER, HOME, LEFT, MISSING, RIGHT, TAB, Page
from tests.support.served import Served

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
PROMPT = "The capital of France is"
ANSWERS = [" Paris.\nIt is café.", " Berlin.", " the cat 漢字 and the dog.\n\nThe end.\n"]
NORMALIZATIONS = ("none", "token", "byte")


def cells(page: Page, column: int) -> list[str]:
    """Return a column of the table."""
    return [row.text for row in page.all(f"#ranked tbody tr > :nth-child({column})")]


def reward(server: Served, **settings: Any) -> dict[str, Any]:
    """Return the server's response for the candidates of this file."""
    body = {"prompt": PROMPT, "candidates": ANSWERS, **settings}
    return dict(server.post("/v1/reward", body).raise_for_status().json())


def test_the_slider_ranks_as_the_server_without_a_call(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    page.score(PROMPT, ANSWERS)
    page.until(lambda: page.all(".shade"))
    calls = "return performance.getEntriesByType('resource').length"
    before, orders = page.run(calls), set()
    for weight in (0, 0.25, 0.5, 0.83, 1):
        page.slide(weight)
        expected = reward(served, weight=weight)
        assert page.order() == expected["order"]
        ranked = [expected["rewards"][position] for position in expected["order"]]
        assert [float(cell.replace("−", "-")) for cell in cells(page, 3)] == pytest.approx(ranked, abs=6e-4)
        assert page.text("#weight-value") == f"{weight:.2f}"
        orders.add(tuple(expected["order"]))
    assert page.run(calls) == before
    assert len(orders) > 1, "every weight gives the same order, so the slider is not tested"


def test_the_reward_of_the_page_equals_the_servers(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    given = [*ANSWERS, "", {"text": " Rome.", "forward_logprob": -3.25, "forward_tokens": 4}]
    texts = [one if isinstance(one, str) else one["text"] for one in given]
    for forward, reverse, mu in itertools.product(NORMALIZATIONS, NORMALIZATIONS, (0, -0.3)):
        for weight, temperature in ((0, 1), (0.37, 1), (0.5, 0.7), (1, 1)):
            settings = {
                "weight": weight,
                "temperature": temperature,
                "language_model_weight": mu,
                "forward_normalization": forward,
                "reverse_normalization": reverse,
            }
            answer = reward(served, candidates=given, **settings)
            script = "const r = a[0].results.map((one, i) => m.rewardOf(m.scoresOf(one), a[1], a[2][i], a[3]));"
            found = page.module("reward.js", f"{script} return [r, m.rank(r)]", answer, PROMPT, texts, settings)
            for own, servers in zip(found[0], answer["rewards"], strict=True):
                assert own == (servers if servers is None else pytest.approx(servers, rel=1e-9))
            assert found[1] == answer["order"]


def test_impossible_answers_rank_as_in_python(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    result = {"forward_logprob": None, "reverse_logprob": -2.0, "forward_tokens": 1, "reverse_tokens": 1}
    impossible = {**result, "minus_infinity": ["forward_logprob"]}
    script = "const f = (one, w) => m.rewardOf(m.scoresOf(one), 'x', 'y', {weight: w});"
    found = page.module(
        "reward.js",
        f"{script} return [f(a[0], 0.5) === -Infinity, f(a[0], 1), f(a[1], 0.5), f(a[1], 1),"
        " m.rank([null, -Infinity, -3, null, -1, -1])]",
        impossible,
        result,
    )
    assert found == [True, -2.0, None, -2.0, [4, 5, 2, 1, 0, 3]]


def test_options_rank_again_and_say_what_needs_a_new_score(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    page.score(PROMPT, ANSWERS)
    page.click("#reward-options summary")
    page.run("const s = document.getElementById('forward-normalization'); s.value = 'token';"
             "s.dispatchEvent(new Event('input', {bubbles: true}))")  # fmt: skip
    assert page.order() == reward(served, forward_normalization="token")["order"]
    page.fill("#language-model-weight", "-0.5")
    assert "press Score again" in page.text("#ranking-problem")
    page.one("#prompt").send_keys(CTRL, ENTER)
    page.until(lambda: page.is_idle("rank") and not page.one("#ranking-problem").is_displayed())
    settings = {"forward_normalization": "token", "language_model_weight": -0.5}
    assert page.order() == reward(served, **settings)["order"]
    page.click("#include-ends")
    assert "press Score again" in page.text("#ranking-problem")
    page.fill("#reward-temperature", "-1")
    page.one("#prompt").send_keys(CTRL, ENTER)
    page.until(lambda: page.all("#reward-temperature[aria-invalid]"))
    assert "positive number" in page.problem_of("#reward-temperature")


def test_tokens_and_steps_are_shaded_by_their_values(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    page.score(PROMPT, ANSWERS)
    for position in range(len(ANSWERS)):
        if not page.all(f"[data-shaded='{position}']"):
            page.click(f"[data-shade='{position}']")
            page.until(lambda position=position: page.all(f"[data-shaded='{position}']"))
    assert [int(one.get_attribute("data-shaded")) for one in page.all(".shade")] == page.order()
    results, values = reward(served, token_values=True)["results"], []
    for position, answer in enumerate(ANSWERS):
        own = f"[data-shaded='{position}']"
        strips = [page.run("return arguments[0].textContent", one).replace("↵", "") for one in page.all(f"{own} .strip")]
        assert strips == [PROMPT, answer]
        steps = StepDelimiter().steps_of(answer)
        shown = [page.run("return arguments[0].textContent", one).replace("↵", "") for one in page.all(f"{own} li .piece")]
        assert shown == [step.rstrip("\n") for step in steps]
        cells = [float(one.text.replace("−", "-")) for one in page.all(f"{own} .value")]
        assert cells[-1] == pytest.approx(results[position]["reverse_logprob"], abs=6e-3)
        values += [(value, fraction(page, one)) for value, one in zip(cells, page.all(f"{own} li .piece"), strict=True)]
    low, high = min(values)[0], max(values)[0]
    assert high > low
    assert [shade for _, shade in values] == pytest.approx([(v - low) / (high - low) for v, _ in values], abs=0.02)
    first = page.one("[data-shaded='1'] .strip .piece")
    expected = results[1]["reverse_token_logprobs"][0]
    assert fraction(page, first) == pytest.approx(min(1, max(0, 1 + expected / 10)), abs=1e-3)


def fraction(page: Page, piece: Any) -> float:
    """Return the place of a piece's colour between the coldest and the warmest one."""
    return float(page.run("return getComputedStyle(arguments[0]).getPropertyValue('--fraction')", piece))


def test_values_are_read_with_the_arrow_keys(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    page.score(PROMPT, ANSWERS)
    page.until(lambda: page.all(".shade"))
    page.run("document.querySelector('.strip').focus()")
    for key, expected in ((HOME, 0), (RIGHT, 1), (RIGHT, 2), (LEFT, 1)):
        page.press(key)
        pieces = page.all(".shade .strip")[0].find_elements("css selector", ".piece")
        assert "current" in pieces[expected].get_attribute("class")
    assert "log P_R −" in page.text(".readout")


@pytest.mark.parametrize("pattern", ["\n", r"[.!?]\s", "\n\n"])
def test_steps_are_cut_as_in_the_search(page: Page, served: Served, pattern: str) -> None:
    page.open(served.url, "rank")
    texts = ["", "a", "a\n", "\n\na\nb", "a.\n\n b! c?\td\n \n", " \x1c\n", "\ufeff\n漢字. 🙂\n", "a\u0085\n\nb\n", "\n"]
    found = page.module("steps.js", "return a[0].map((text) => m.stepsOf(text, m.delimiterOf(a[1])))", texts, pattern)
    assert found == [StepDelimiter(pattern).steps_of(text) for text in texts]


def test_another_delimiter_cuts_again_and_a_wrong_one_is_explained(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    page.score(PROMPT, [" One. Two. Three.", " One."])
    page.until(lambda: page.all(".shade"))
    if not page.all("[data-shaded='0']"):
        page.click("[data-shade='0']")
    page.until(lambda: page.all("[data-shaded='0']"))
    for pattern, expected in (("[", "regular expression"), ("x*", "empty text")):
        page.fill("#delimiter", pattern)
        page.press(TAB)
        assert expected in page.until(lambda: page.all("#delimiter[aria-invalid]") and page.problem_of("#delimiter"))
    page.fill("#delimiter", r"\.")
    page.press(TAB)
    page.until(lambda: len(page.all("[data-shaded='0'] li")) == 3)
    assert page.problems() == []


def test_json_lines_are_loaded_and_wrong_ones_explained(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    page.click("#paste summary")
    wrong = {
        "": "no line",
        '{"prompt": "a"}': 'Line 1: a candidate must be a text, or an object with "text"',
        '"a"\n{': "Line 2 is not JSON",
        '{"prompt": 5, "candidates": ["a"]}': "Line 1: expected a text",
        '{"prompt": "x", "candidates": ["a"]}\n"b"': "paste one kind",
    }
    for lines, expected in wrong.items():
        page.run("document.getElementById('lines').value = arguments[0]", lines)
        page.click("#load-lines")
        assert expected in page.problem_of("#lines")
    known = '{"text": " Paris.", "forward_logprob": -1.5, "forward_tokens": 2}'
    lines = f'{{"prompt": "Q", "candidates": [" A", {known}]}}\n\n{{"prompt": "Second", "candidates": ["b"], "gold": 1}}'
    page.run("document.getElementById('lines').value = arguments[0]", lines)
    page.click("#load-lines")
    assert page.problems() == []
    assert [field.get_attribute("value") for field in page.all("#candidates textarea")] == [" A", " Paris."]
    assert "given: −1.500" in page.text("#candidates")
    page.one("#prompt").send_keys(CTRL, ENTER)
    page.until(lambda: page.is_idle("rank") and page.all("#ranked tbody tr"))
    assert "−1.500" in cells(page, 4)
    page.one("#question").send_keys("2")
    page.until(lambda: page.one("#prompt").get_attribute("value") == "Second")


def test_texts_of_pasted_lines_stay_exact_until_they_are_edited(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    page.click("#paste summary")
    prompt, answers = "Two\r\nlines", [" a\r\nb", " c\rd"]
    page.run("document.getElementById('lines').value = arguments[0]", json.dumps({"prompt": prompt, "candidates": answers}))
    page.click("#load-lines")
    page.one("#prompt").send_keys(CTRL, ENTER)
    page.until(lambda: page.all("#ranked tbody tr") and page.is_idle("rank"))
    expected = reward(served, prompt=prompt, candidates=answers)
    assert page.order() == expected["order"]
    values = [expected["results"][position]["reverse_logprob"] for position in expected["order"]]
    assert [float(cell.replace("−", "-")) for cell in cells(page, 5)] == pytest.approx(values, abs=6e-4)
    assert not page.one("#ranking-problem").is_displayed()
    page.one("#prompt").send_keys("!")
    assert "press Score again" in page.text("#ranking-problem")


def test_the_forward_model_samples_candidates(page: Page, served: Served) -> None:
    page.open(served.url, "rank")
    page.fill("#prompt", PROMPT)
    page.click("#sample summary")
    for name, value in (("n", 3), ("max_tokens", 5), ("seed", 4)):
        page.fill(f"#sample [name={name}]", str(value))
    page.click("#sample-run")
    page.until(lambda: len(page.all("#candidates textarea")) == 3)
    body = {"prompt": PROMPT + "\n", "n": 3, "max_tokens": 5, "seed": 4}
    expected = [choice["text"] for choice in served.post("/v1/completions", body).json()["choices"]]
    values = page.run("return [...document.querySelectorAll('#candidates textarea')].map((field) => field.value)")
    assert values == [text.replace("\r\n", "\n").replace("\r", "\n") for text in expected]
    page.fill("#sample [name=top_p]", "0")
    page.click("#sample-run")
    assert "greater than 0" in page.until(lambda: page.all("#sample-top-p[aria-invalid]") and page.problem_of("#sample-top-p"))


def test_compare_shows_both_models_token_by_token(page: Page, served: Served) -> None:
    page.open(served.url, "compare")
    text = "The cat sat on\nthe café 漢字 mat."
    page.fill("#compared", text)
    page.press(CTRL, ENTER)
    page.until(lambda: page.one("#comparison").is_displayed())
    assert page.text("#compared-strip .strip").replace("↵", "") == text
    pairs = [{"preceding": "", "following": text}, {"preceding": text, "following": ""}]
    data = served.post("/v1/score", {"pairs": pairs}).json()["data"]
    forward, reverse = data[0]["forward"], data[1]["reverse"]
    totals = [float(cell.text.replace("−", "-")) for cell in page.all("#totals td:nth-child(2)")]
    assert totals == pytest.approx([forward["logprob"], reverse["logprob"]], abs=6e-4)
    script = "const f = m.piecesOf(a[0], a[1]), r = m.piecesOf(a[0], a[2]); return m.commonPieces(a[0], f, r)"
    pieces = page.module("shading.js", script, text, forward, reverse)
    assert "".join(piece["text"] for piece in pieces) == text
    assert len(pieces) > 8
    for name, found in (("forward", forward), ("reverse", reverse)):
        assert math.fsum(piece[name] for piece in pieces) == pytest.approx(found["logprob"], rel=1e-9)
    page.one("#view").send_keys("log P of the f")
    assert page.all("#compared-strip .piece.warm")
    assert len(page.all("#differences tbody tr")) == 10


def test_without_a_forward_model_rank_uses_the_reverse_one_and_compare_says_what_is_missing(page: Page, lone: Served) -> None:
    page.open(lone.url, "rank")
    page.until(lambda: page.one("#key-value").is_displayed())
    page.fill("#key-value", "right key")
    page.press(ENTER)
    page.until(lambda: page.text("#models").startswith("reverse"))
    page.score(PROMPT, ANSWERS)
    page.until(lambda: page.all(".shade"))
    assert page.problems() == []
    headers = {"Authorization": "Bearer right key"}
    body = {"prompt": PROMPT, "candidates": ANSWERS, "weight": 1}
    assert page.order() == lone.post("/v1/reward", body, headers=headers).json()["order"]
    assert not page.one("#weight").is_enabled()
    assert "--forward DIR" in page.text("#weight-ends")
    assert not page.one("#sample-run").is_enabled()
    page.click("#tab-compare")
    assert "--forward DIR" in page.text("#compare-needs")
    assert not page.one("#compare-form .primary").is_enabled()
