"""Texts with numbers, in one plain spelling: ASCII digits and signs, `a/b` for fractions, no LaTeX or HTML around them."""

import html
import itertools
import re
import unicodedata

CURRENCY = r"(?:(?:US|AU|CA|NZ|HK|(?<![A-Za-z])[A-Z])?[$£¥฿¢₠-₿]|(?<![A-Za-z])(?:USD|EUR|GBP|CAD|AUD|INR|JPY|CNY|CHF|Rs\.?)(?![A-Za-z]))"
FUNCTIONS = "log|ln|lg|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|gcd|max|min|det"
UNREAD = "\ufffd"
"""Stands where a number goes on in a way that is not read: the numbers beside it have no value."""
STYLES = r"text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|boldsymbol|bm|underline|boxed|fbox"
LENGTHS = r"(?:mm|cm|dm|km|m|ft|in|yd|mi|units?|feet|foot|inch|inches|meters?|metres?|yards?|miles?)"
BRACED = r"\\[dtc]?frac ?(?:\{ ?(SIGN\d+) ?\}|(\d)) ?(?:\{ ?(SIGN\d+) ?\}|(\d))"
SIGNED = re.compile(r"(?P<digit>\d ?)?" + BRACED.replace("SIGN", "[-+]? ?"))
REWRITES = [
    (re.compile(r"<<[^<>\n]*>>"), ""),  # calculations of GSM8K
    (re.compile(r"(?i)<sup> ?"), "^"),
    (re.compile(r"(?i)<sub> ?"), "_"),
    (re.compile(r"</?[a-zA-Z][^<>\n]*>"), "\n"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;: ]|(?<=\d)~(?=\d)"), " "),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle)(?![a-zA-Z])"), ""),
    (re.compile(r"\\textminus(?![a-zA-Z])|\{ ?- ?\}|\( ?- ?\)(?=\d)"), "-"),
    (re.compile(r"(?<=[-+])~(?=\d)"), ""),
    (re.compile(r"(?<=\d)\.(?:[({\[]|\\[a-zA-Z]+ ?\{)+(?=\d)"), UNREAD),  # a period, as 0.(3)
    (re.compile(rf"([-+]) ?\\(?:{STYLES}) ?\{{ ?"), r"\1{"),
    (re.compile(r"\\([%$&#])"), r"\1"),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])"), "×"),
    (re.compile(r"\\div(?![a-zA-Z])"), "÷"),
    (re.compile(r"\\(?:pm|mp)(?![a-zA-Z])"), "±"),
    (re.compile(r"\^ ?\{? ?\\(?:circ|degree) ?\}?"), "°"),
    (re.compile(r"\^ ?\{ ?\\(?:text|mathrm) ?\{ ?(st|nd|rd|th) ?\} ?\}"), r"\1"),
    (re.compile(r"\^ ?\{ ?([-+]?\d+) ?\}"), r"^\1"),
    (re.compile(rf"\\(?:{STYLES}) ?\{{([^{{}}]*)\}}"), r" \1 "),
    (re.compile(rf"\\(?:{STYLES}) ?\{{"), " "),
    (re.compile(r"(?<=[\w)])\*\*(?=[\w(])"), "^"),
    (re.compile(r"\*\*|__|`"), ""),
    (re.compile(r"(?<![\w)*\s])\*(?=[^\s*])|(?<=\s)\*(?=[^\s*][^*\n]*\*)|^\*(?=[^\s*])|(?<=\w)\*(?=\W|$)(?!\s*[\w(])"), ""),
    (re.compile(rf"(\d ?{LENGTHS}) ?\^? ?[23](?![\d.])"), r"\1"),  # the exponent of a unit is no number
]
ORDINALS = {"ˢᵗ": "st", "ⁿᵈ": "nd", "ʳᵈ": "rd", "ᵗʰ": "th"}
NUMBERED = r"[-+({\[$.\\]*(?:left\W*|[dtc]?frac\W*|boxed\W*)?\d"
"""What may follow a sign: a number, perhaps in brackets or a box."""
SIGN_WORDS = [
    (re.compile(r"(?i)\bplus(?: or |[-/ ]*)minus\b ?"), "±"),
    (re.compile(rf"(?i)\bneg(?:ative|\.)? ?-? ?(?={CURRENCY}? ?{NUMBERED})"), "-"),
    (
        re.compile(rf"(?i)((?:^|[=:≈(\[{{$\n]|\b(?:is|be|are|was|equals|to|of|at)\b) ?)minus -?(?={CURRENCY}? ?{NUMBERED})"),
        r"\1-",
    ),
    (re.compile(rf"(?i)(?<!\d )(?<!\d\) )\bminus (?={CURRENCY}? ?{NUMBERED})"), UNREAD),
]
ENTITY = re.compile(r"&(?:minus|[mn]dash|nbsp|#\d+|#x[\da-fA-F]+);")
CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d\u2796\u02d7\u2043\ufe58", "-"),
        "\u2795": "+",
        **dict.fromkeys("\ufe0f\u20e3\u200b\u2060\ufeff\u00ad\u200e\u200f"),
        "\u066b": ".",
        "\u066c": ",",
        "\u2044": "/",
        "\u2215": "/",
    }
)


def normalized(text: str) -> str:
    """Return a text whose numbers are spelled in one way; what it says stays the same."""
    text = unicodedata.normalize("NFKC", _unmerged(text)).translate(CHARACTERS)
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(character, character)) for character in text)
    text = re.sub(r"[^\S\n]+", " ", text)
    for pattern, by in [*SIGN_WORDS, *REWRITES]:
        text = pattern.sub(by, text)
    return re.sub(" +", " ", SIGNED.sub(_fraction, text))


def with_signs(text: str) -> str:
    """Return a text, LaTeX as it is, with one spelling of the minus, indices and exponents that stay such, and UNREAD in a number."""
    text = _unmerged(text)
    for pattern, by in SIGN_WORDS:
        text = pattern.sub(by, text)
    return text


def _unmerged(text: str) -> str:
    """Return a text in which no index, exponent, mark or sign would be lost or become a digit of the number beside it."""
    text = ENTITY.sub(lambda found: html.unescape(found.group()), text).translate(CHARACTERS)
    text = re.sub(r"(?<=\d)[’‘‛´ʼʹ`′＇](?=\d)", "'", text)
    if text.isascii():
        return text
    text = re.sub(r"(?<=\d)[\u0300-\u036f\u20d0-\u20f0]+", UNREAD, text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅟↉])|(?<=[¼-¾⅐-⅞↉])(?=\d)", " ", text)
    return "".join(_spelled(kind, "".join(run)) for kind, run in itertools.groupby(text, _kind))


def _kind(character: str) -> str:
    """How NFKC would change a character: `super`, `sub`, `number` (a circled one and the like); else empty."""
    if character.isascii():
        return ""
    kind = unicodedata.decomposition(character).partition(">")[0].removeprefix("<")
    if kind in ("super", "sub"):
        return kind
    is_number = unicodedata.category(character) == "No" and kind not in ("", "fraction")
    return "number" if is_number else ""


def _spelled(kind: str, run: str) -> str:
    if kind in ("super", "sub") and run not in ORDINALS:
        return f"{'^' if kind == 'super' else '_'}{{{unicodedata.normalize('NFKC', run)}}}".replace("\u2212", "-")
    if kind == "number":
        return " " + " ".join(unicodedata.normalize("NFKC", character) for character in run) + " "
    return ORDINALS.get(run, run)


def _fraction(found: re.Match[str]) -> str:
    """`\\frac` as `a/b` with the sign of both in front; UNREAD where a digit stands before a signed one."""
    above, below = (str(found[1 + first] or found[2 + first]).replace(" ", "") for first in (1, 3))
    digit, is_signed = found["digit"] or "", (above + below).strip("0123456789") != ""
    if digit:
        return f"{digit.strip()}{UNREAD}" if is_signed else f"{digit.strip()} {above}/{below}"
    sign = "-" if (above[0] == "-") != (below[0] == "-") else "+" if above[0] == "+" else ""
    return f"{sign}{above.lstrip('-+')}/{below.lstrip('-+')}"
