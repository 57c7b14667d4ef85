"""Right answers and written answers: the exact value, or none."""

from fractions import Fraction

import pytest

from megatron_ledom.errors import DataError
from megatron_ledom.evaluation.grading.answers import answers_by, comparison_by, is_right, read_golds

READ = {
    "3/4": "3/4",
    "Answer: 1/2": "1/2",
    ".5": "1/2",
    "-.5": "-1/2",
    "\u22125": "-5",
    "\u2013 5": "-5",
    "x = \u22125.": "-5",
    "-$18": "-18",
    "\u2212$18": "-18",
    "$-18": "-18",
    "-\\$18": "-18",
    "($18)": "18",
    "1e5": "100000",
    "1.5e-3.": "3/2000",
    "3 \\times 10^{5}": "300000",
    "10{,}000": "10000",
    "10\\,000": "10000",
    "10 000": "10000",
    "10\u202f000": "10000",
    "1,234,567.": "1234567",
    "1 4/5": "9/5",
    "1\\frac{4}{5}": "9/5",
    "1\u00bd": "3/2",
    "-1 1/2": "-3/2",
    "\\dfrac34": "3/4",
    "5 million": "5000000",
    "50%": "50",
    "18\\%": "18",
    "18 cm^2": "18",
    "18 m\u00b2": "18",
    "20th": "20",
    "90^\\circ": "90",
    "**18**": "18",
    "<answer>18</answer>": "18",
    "\\boxed{18} because 3+15": "18",
    "The answer is 18. Step 3 done": "18",
    "The answer is 3 less than 21, so 18": "18",
    "it is 10-3 = 7": "7",
    "9 * 2 = $<<9*2=18>>18": "18",
    "#### 18 eggs (2 dozen minus 6)": "18",
    "\uff14\uff12": "42",
    "\u0664\u0662": "42",
    "the answer is '18'": "18",
    "in 3 hours, 20 eggs": "20",
    "\u5171 18 \u4e2a": "18",
}
UNREAD = [
    "7\\pi", "4a-2", "3x", "2+3i", "x^{18}", "x\u00b2", "\\sqrt{18}", "5\\sqrt{2}", "\\frac{\\pi}{2}", "log_2", "f(5)", "5!",
    "1,2,3", "(1,2)", "x = 1, 2", "1,2", "12,3", "[0, 5]", "5 or 6", "3 to 4", "between 5 and 7", "\\boxed{3, 5}",
    "3:05", "12:30 pm", "5:1", "5-7", "10-3", "3 * 6", "2^3", "$10-$15", "2023-05-01", "1/2/2023", "192.168.0.1",
    "1.000,00", "0,500", "1'000", "1 234,56", "5k", "2 dozen", "2 and a half", "1/0", "1e999999999", "9" * 5000,
    "3 hours 20 minutes", "3 feet 5 inches", "18 dollars and 50 cents", "x=18,y=3", "5/6 of 12", "not 18", "|-5|",
    "\u00b15", "x > 5", "18 \u2264 x", "52_8", "COVID-19", "x-5", "5'10\"", "0.333...", "five", "", "--5", "18e",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), READ.items())
def test_a_number_is_read_with_its_sign_its_scale_and_all_of_it(text: str, value: str) -> None:
    assert answers_by("number").read(text) == Fraction(value)


@pytest.mark.parametrize("text", UNREAD, ids=lambda text: text[:20])
def test_a_text_without_a_single_number_has_no_value_rather_than_a_part_of_it(text: str) -> None:
    assert answers_by("number").read(text) is None
    assert answers_by("number").read_gold(text) is None


GSM8K = ["18", "3", "70000", "540", "1,234", "2,280", "-5", "60", "104", "366", "694", "145.5", "5,600", "36"]
"""Right answers in the notation of GSM8K, after ####."""


@pytest.mark.parametrize("gold", GSM8K)
def test_a_gold_of_gsm8k_equals_itself_and_no_wrong_variant(gold: str) -> None:
    number = answers_by("number")
    solution = f"It takes 7 * 2 = <<7*2=14>>14 of them, and 3/4 more.\n#### {gold}"
    value = Fraction(gold.replace(",", ""))
    assert number.read_gold(solution) == number.read(solution) == number.read_gold(gold) == value
    for right in ("{}", "So ${}.", "It is **{}** eggs", "\\boxed{{{}}}", "The answer is {} apples. Well done, 2 of us!"):
        assert is_right(number, solution, right.format(gold)), right
    wrong = [
        "{}7",
        "{}/7",
        "{}x",
        "{}\\pi",
        "{}:30",
        "({}, 1)",
        "{} 1/2",
        "{}^2",
        "{} million",
        "{}-1",
        "1,{},9",
        "{} or 7",
        "7",
    ]
    for variant in [*wrong, *(["-{}", "\u2212${}", "{}e1"] if value > 0 else [])]:
        assert not is_right(number, solution, "So it is " + variant.format(gold)), variant


MATH = {
    "7\\pi": ["7", "\\pi", "7\\pi^2"],
    "4a-2": ["4", "-2", "4a"],
    "1\\frac{4}{5}": ["\\frac{4}{5}", "1", "\\frac{14}{5}"],
    "\\frac{9}{7}": ["9", "\\frac{7}{9}"],
    "\\left( 3, \\frac{\\pi}{2} \\right)": ["3", "(3, \\pi)"],
    "6 - 5i": ["6", "6 + 5i"],
    "x^3+3x-6": ["-6", "x^3"],
    "\\$18.90": ["18", "19.80"],
    "\\$32,\\!348": ["32", "348"],
    "11,\\! 111,\\! 111,\\! 100": ["11", "100"],
    "52_8": ["8", "52_7"],
    "\\text{Evelyn}": ["\\text{Briana}", "0"],
    "\\frac{1}{2004!}": ["\\frac{1}{2006!}", "0"],
    "\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}": ["\\frac15", "\\begin{pmatrix} 1/5 \\\\ 18/5 \\end{pmatrix}"],
    "2 2/3": ["2", "\\frac{2}{3}"],
    "-\\$18": ["18"],
    "\u22123": ["3"],
    "1e-3": ["e-3", "3"],
}
"""Right answers in the notations of MATH-500 and others, and wrong ones."""


@pytest.mark.parametrize("gold", MATH)
def test_a_bare_formula_equals_itself_and_none_of_its_parts(gold: str) -> None:
    pytest.importorskip("math_verify")
    math, fields = answers_by("math"), comparison_by("math")
    for text in (f"so \\boxed{{{gold}}}.", f"We get ${gold}$", f"The answer is {gold}.", f"#### {gold}"):
        assert is_right(math, gold, text), text
    assert fields.is_right([gold], gold)
    for wrong in MATH[gold]:
        for text in (f"so \\boxed{{{wrong}}}.", f"We get ${wrong}$", f"The answer is {wrong}."):
            assert not is_right(math, gold, text), text
        assert not fields.is_right([gold], wrong)


def test_prose_without_a_formula_gives_its_number_and_no_part_of_a_pair() -> None:
    pytest.importorskip("math_verify")
    math = answers_by("math")
    assert is_right(math, "18", "He has 3 apples, so it is 18 dollars")
    assert is_right(math, "\\frac{3}{4}", "That makes 75%")
    assert not is_right(math, "6", "So it is 6-5i")
    assert not is_right(math, "2", "The point is (1,2)")


def test_right_answers_that_cannot_be_read_are_counted_and_named() -> None:
    with pytest.raises(DataError, match=r"2 of 3 right answers cannot be read: a:2: '7.*pi'; a:3: ''; correct"):
        read_golds(answers_by("number"), [("a:1", "18"), ("a:2", "7\\pi"), ("a:3", "")])
    with pytest.raises(DataError, match=r"cannot be read: .*'18 or 20'"):
        is_right(answers_by("number"), "18 or 20", "20")
    assert answers_by("number").read_gold("She has 3 apples and 18 pears") is None


def test_right_answers_of_a_task_are_checked_before_the_model_runs() -> None:
    pytest.importorskip("math_verify")
    comparison_by("math").check([["18"], ["7\\pi"]])
    with pytest.raises(DataError, match="1 of 2 right answers cannot be read: item 1: ''"):
        comparison_by("math").check([["18"], [""]])
    with pytest.raises(DataError, match="1 items have no accepted answer"):
        comparison_by("alias").check([["Paris"], ["..."]])


SIGNED = [
    "-(5)", "-{5}", "-\\boxed{5}", "\u2212\\(5\\)", "-\\left(5\\right)", "-USD 5", "USD -5", "-US$5", "\u27965", "\u2796\ufe0f5", "minus 5",
    "negative 5", "Minus $5", "x = -\\boxed{5}", "$-\\boxed{5}$", "The answer is -(5).", "#### -(5)", "So it is minus 5", "-\\text{5}",
    "{-}5", "-\\,5", "&minus;5", "-$(5)$", "\\boxed{-(5)}", "-\\bigl(5\\bigr)",
]  # fmt: skip
LOST_SIGNS = [
    "10-\\boxed{5}", "x-\\boxed{5}", "twenty minus 5", "plus or minus 5", "-|5|", "-kr 5", "-(-5)", "-(5)^2", "(5)^2", "-(about 5)",
    "the negative of 5", "f(-5)", "\\sqrt{-5}", "> -5", "log -5",
]  # fmt: skip
PARTS = [
    "101\u2082", "5\u2082", "log\u20825", "5\u2019000", "5\u00b4000", "5\u2018000", "5`000", "0.(3)", "0.3\u0305", "0.\\overline{3}",
    "0.\\dot{3}", "3\\frac{-1}{2}", "\\frac{1.5}{-2}", "\\frac{-1}{\\pi}", "log 5", "sin 5", "log_2 5", "\\operatorname{lcm} 5", "ln (5)",
    "\\boxed{5}{6}", "\\boxed{5}^2", "\\boxed{5}.5", "\\sqrt{\\boxed{5}}", "{5}{6}", "(5)(3)", "5\u4e07", "5 lakh", "5\u2460", "\u00bd5",
    "5\u00b030'", "3 quarters", "5-dozen", "101 base 2", "(-\\infty, 0]", "twice 5",
]  # fmt: skip


@pytest.mark.parametrize("text", SIGNED)
def test_a_sign_in_front_of_a_bracket_a_box_a_currency_or_in_words_is_part_of_the_number(text: str) -> None:
    assert answers_by("number").read(text) == answers_by("number").read_gold(text) == -5


@pytest.mark.parametrize("text", [*LOST_SIGNS, *PARTS])
def test_a_number_with_an_unknown_part_has_no_value(text: str) -> None:
    assert answers_by("number").read(text) is None
    assert answers_by("number").read(f"#### {text}") is None
    assert answers_by("number").read_gold(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    {
        "\\frac{1}{-2}": "-1/2",
        "\\frac{-1}{-2}": "1/2",
        "-\\left(\\frac12\\right)": "-1/2",
        "-(1/2)": "-1/2",
        "5-million": "5000000",
        "5 bn": "5000000000",
        "18\u1d57\u02b0": "18",
        "\\large\\boxed{5}": "5",
        "a \\equiv \\boxed{3} \\pmod{7}": "3",
        "5-year": "5",
    }.items(),
)
def test_signed_fractions_and_joined_multipliers_are_read(text: str, value: str) -> None:
    assert answers_by("number").read(text) == Fraction(value)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (
            "18",
            ["18 dollars", "\\boxed{18}\\text{ cm}", "18%"],
            ["minus 18", "negative 18", "-\\boxed{18}", "\u279618", "-USD 18"],
        ),
        ("18", ["18.0", "+18"], ["\\boxed{18}{6}", "18 million", "18-million", "18\u2019000", "x-\\boxed{18}", "18\u4e07"]),
        ("-18", ["-\\boxed{18}", "minus 18", "negative 18", "\u279618", "-(18)", "x = -\\boxed{18}"], ["18", "\\boxed{18}"]),
        ("5", ["5"], ["log 5", "sin 5", "5\u2083", "\\boxed{log 5}", "5 base 3", "\\boxed{5}^2"]),
        ("52_8", ["\\boxed{52_8}", "52\u2088", "52_{\\text{eight}}", "52 (base 8)"], ["\\boxed{52}", "52", "52_7"]),
        ("52", ["52"], ["52_8", "5\u2082"]),
        ("3", ["3"], ["0.(3)", "0.\\overline{3}"]),
        ("\\log 5", ["log 5"], ["5"]),
        ("-\\frac12", ["-\\boxed{\\frac12}", "\\frac{1}{-2}"], ["\\boxed{\\frac12}"]),
    ],
)
def test_formulas_keep_their_sign_their_function_and_their_base(gold: str, right: list[str], wrong: list[str]) -> None:
    pytest.importorskip("math_verify")
    math, fields = answers_by("math"), comparison_by("math")
    for text in right:
        assert is_right(math, gold, text), text
        assert fields.is_right([gold], text), text
    for text in wrong:
        assert not is_right(math, gold, text), text
        assert not fields.is_right([gold], text), text


@pytest.mark.parametrize(
    ("golds", "right", "wrong"),
    [
        (["A"], ["A", "a"], ["", "!!!", "the"]),
        (["The The"], ["the the"], ["", "...", "a"]),
        (["A", "Paris"], ["paris!"], ["", "-", "the"]),
        (["1.5"], ["1.5"], ["15", "1,5"]),
        (["15"], ["15.", "$15"], ["1.5", "1/5", "-15", "1-5"]),
        (["-5"], ["-5", "\u22125", "-$5", "(-5)"], ["5"]),
        (["3/4"], ["3/4"], ["34"]),
        (["1,000"], ["1000"], ["1.000"]),
        (["C++"], ["c++."], ["C", "C#"]),
        (["U.S."], ["us"], ["u"]),
    ],
)
def test_no_alias_is_empty_and_numbers_keep_punctuation_between_digits(
    golds: list[str], right: list[str], wrong: list[str]
) -> None:
    alias = comparison_by("alias")
    alias.check([golds])
    assert all(alias.is_right(golds, text) for text in right)
    assert not any(alias.is_right(golds, text) for text in wrong)
