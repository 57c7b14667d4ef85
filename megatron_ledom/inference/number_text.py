"""Texts with numbers, in one plain spelling: ASCII digits and signs, `a/b` for fractions, no LaTeX or HTML around them."""

import re
import unicodedata

CURRENCY = r"(?:(?:US|AU|CA|NZ|HK)?[$€£¥₹])"
STYLES = r"text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|boldsymbol|bm|underline|boxed|fbox"
LENGTHS = r"(?:mm|cm|dm|km|m|ft|in|yd|mi|units?|feet|foot|inch|inches|meters?|metres?|yards?|miles?)"
BRACED = r"\\[dtc]?frac ?(?:\{ ?(SIGN\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))"
REWRITES = [
    (re.compile(r"<<[^<>\n]*>>"), ""),  # calculations of GSM8K
    (re.compile(r"(?i)<sup> ?"), "^"),
    (re.compile(r"(?i)<sub> ?"), "_"),
    (re.compile(r"</?[a-zA-Z][^<>\n]*>"), "\n"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\[,;: ]|(?<=\d)~(?=\d)"), " "),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])"), ""),
    (re.compile(r"\\([%$&#])"), r"\1"),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])"), "×"),
    (re.compile(r"\\div(?![a-zA-Z])"), "÷"),
    (re.compile(r"\\(?:pm|mp)(?![a-zA-Z])"), "±"),
    (re.compile(r"\^ ?\{? ?\\(?:circ|degree) ?\}?"), "°"),
    (re.compile(r"\^ ?\{ ?\\(?:text|mathrm) ?\{ ?(st|nd|rd|th) ?\} ?\}"), r"\1"),
    (re.compile(r"\^ ?\{ ?([-+]?\d+) ?\}"), r"^\1"),
    (re.compile(rf"\\(?:{STYLES}) ?\{{([^{{}}]*)\}}"), r" \1 "),
    (re.compile(rf"\\(?:{STYLES}) ?\{{"), " "),
    (re.compile(r"(?<=\d) ?" + BRACED.replace("SIGN", "")), r" \1\2/\3\4"),
    (re.compile(BRACED.replace("SIGN", "[-+]?")), r"\1\2/\3\4"),
    (re.compile(r"(?<=[\w)])\*\*(?=[\w(])"), "^"),
    (re.compile(r"\*\*|__|`"), ""),
    (re.compile(r"(?<![\w)*\s])\*(?=[^\s*])|(?<=\s)\*(?=[^\s*][^*\n]*\*)|^\*(?=[^\s*])|(?<=\w)\*(?=\W|$)(?!\s*[\w(])"), ""),
    (re.compile(rf"(\d ?{LENGTHS}) ?\^? ?[23](?![\d.])"), r"\1"),  # the exponent of a unit is no number
]
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\u200b\u2060\ufeff\u00ad\u200e\u200f"),
        "\u066b": ".",
        "\u066c": ",",
        "\u2044": "/",
        "\u2215": "/",
    }
)


def normalized(text: str) -> str:
    """Return a text whose numbers are spelled in one way; what it says stays the same."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda found: "^" + found.group().translate(SUPERSCRIPTS), text)
    text = re.sub("(?<=[0-9])(?=[¼-¾⅐-⅞↉])", " ", text)
    text = unicodedata.normalize("NFKC", text.translate(CHARACTERS)).translate(CHARACTERS)
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(character, character)) for character in text)
    text = re.sub(r"[^\S\n]+", " ", text)
    for pattern, by in REWRITES:
        text = pattern.sub(by, text)
    return re.sub(" +", " ", text)
