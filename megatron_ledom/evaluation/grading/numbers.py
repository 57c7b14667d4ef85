r"""Read the number that is the answer of a text: its exact value, or None if the value is not certain.

It never reads a part of a number. A *group* is a run of numbers that belong together: `3/4`, `1 1/2`, `1,2,3`, or
`10 - 3`. It has a value only if the whole is one number and the surrounding text does not change the value. So `7\pi`,
`x^2` and `3:05` have no value.

Normalized texts have one spelling of numbers: ASCII digits and signs, `a/b` for fractions, no LaTeX or HTML around them.
"""

import html
import itertools
import re
import unicodedata
from fractions import Fraction

CURRENCY = r"(?:(?:US|AU|CA|NZ|HK|(?<![A-Za-z])[A-Z])?[$£¥฿¢₠-₿]|(?<![A-Za-z])(?:USD|EUR|GBP|CAD|AUD|INR|JPY|CNY|CHF|Rs\.?)(?![A-Za-z]))"
FUNCTIONS = "log|ln|lg|exp|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|gcd|max|min|det"
UNREAD = "\ufffd"
"""Marks a place where a number continues in an unknown way. The adjacent numbers have no value."""
FONT_COMMANDS = r"text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|boldsymbol|bm|underline|boxed|fbox"
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
    (re.compile(rf"([-+]) ?\\(?:{FONT_COMMANDS}) ?\{{ ?"), r"\1{"),
    (re.compile(r"\\([%$&#])"), r"\1"),
    (re.compile(r"\\(?:times|cdot|ast)(?![a-zA-Z])"), "×"),
    (re.compile(r"\\div(?![a-zA-Z])"), "÷"),
    (re.compile(r"\\(?:pm|mp)(?![a-zA-Z])"), "±"),
    (re.compile(r"\^ ?\{? ?\\(?:circ|degree) ?\}?"), "°"),
    (re.compile(r"\^ ?\{ ?\\(?:text|mathrm) ?\{ ?(st|nd|rd|th) ?\} ?\}"), r"\1"),
    (re.compile(r"\^ ?\{ ?([-+]?\d+) ?\}"), r"^\1"),
    (re.compile(rf"\\(?:{FONT_COMMANDS}) ?\{{([^{{}}]*)\}}"), r" \1 "),
    (re.compile(rf"\\(?:{FONT_COMMANDS}) ?\{{"), " "),
    (re.compile(r"(?<=[\w)])\*\*(?=[\w(])"), "^"),
    (re.compile(r"\*\*|__|`"), ""),
    (re.compile(r"(?<![\w)*\s])\*(?=[^\s*])|(?<=\s)\*(?=[^\s*][^*\n]*\*)|^\*(?=[^\s*])|(?<=\w)\*(?=\W|$)(?!\s*[\w(])"), ""),
    (re.compile(rf"(\d ?{LENGTHS}) ?\^? ?[23](?![\d.])"), r"\1"),  # the exponent of a unit is not a number
]
ORDINALS = {"ˢᵗ": "st", "ⁿᵈ": "nd", "ʳᵈ": "rd", "ᵗʰ": "th"}
NUMBERED = r"[-+({\[$.\\]*(?:left\W*|[dtc]?frac\W*|boxed\W*)?\d"
"""Text that may follow a sign: a number, perhaps in brackets or a box."""
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
    """Return the text with one spelling of numbers. The meaning stays the same."""
    text = unicodedata.normalize("NFKC", _unmerged(text)).translate(CHARACTERS)
    if not text.isascii():
        text = "".join(str(unicodedata.decimal(character, character)) for character in text)
    text = re.sub(r"[^\S\n]+", " ", text)
    for pattern, by in [*SIGN_WORDS, *REWRITES]:
        text = pattern.sub(by, text)
    return re.sub(" +", " ", SIGNED.sub(_fraction, text))


def with_signs(text: str) -> str:
    """Return the text, its LaTeX unchanged, with one spelling of signs.

    Indices and exponents are kept; UNREAD marks unknown parts.
    """
    text = _unmerged(text)
    for pattern, by in SIGN_WORDS:
        text = pattern.sub(by, text)
    return text


def _unmerged(text: str) -> str:
    """Return the text with indices, exponents and marks spelled so that NFKC adds none of them as a digit to a number."""
    text = ENTITY.sub(lambda found: html.unescape(found.group()), text).translate(CHARACTERS)
    text = re.sub(r"(?<=\d)[’‘‛´ʼʹ`′＇](?=\d)", "'", text)
    if text.isascii():
        return text
    text = re.sub(r"(?<=\d)[\u0300-\u036f\u20d0-\u20f0]+", UNREAD, text)
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅟↉])|(?<=[¼-¾⅐-⅞↉])(?=\d)", " ", text)
    return "".join(_spelled(kind, "".join(run)) for kind, run in itertools.groupby(text, _kind))


def _kind(character: str) -> str:
    """Return the change that NFKC makes to a character: `super`, `sub`, `number` (such as a circled one), or empty."""
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
    """Return `\\frac` as `a/b` with one sign before it. UNREAD replaces a signed fraction after a digit."""
    above, below = (str(found[1 + first] or found[2 + first]).replace(" ", "") for first in (1, 3))
    digit, is_signed = found["digit"] or "", (above + below).strip("0123456789") != ""
    if digit:
        return f"{digit.strip()}{UNREAD}" if is_signed else f"{digit.strip()} {above}/{below}"
    sign = "-" if (above[0] == "-") != (below[0] == "-") else "+" if above[0] == "+" else ""
    return f"{sign}{above.lstrip('-+')}/{below.lstrip('-+')}"


MOST_DIGITS = 300
CONTEXT = 60
"""Number of characters around a group that can change its value."""
BOX = "\ue000"
"""Replaces a box while the text before it is normalized."""
RAW = r"(?:\.?\d(?:[\d.,'_]*\d)?(?:[eE][-+]?\d+(?!\w|\.\d))?)"
OPERATOR = (
    r"(?:[-+*/×÷·^—;、]|,(?: ?(?:and|or)(?![a-z]))?|:(?=\d)|(?<= ):|[xX](?= ?[\d(])"
    r"|(?<= )(?:or|and|to|plus|minus|times|over|divided by|&)(?= ))"
)
JOIN = rf"(?:[ )]*{OPERATOR}[ (]*[-+]? ?{CURRENCY}? ?[-+]?| |\()"
GROUP = re.compile(rf"{RAW}(?:{JOIN}{RAW})*")
PLAIN = r"(?:\d+|[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|[1-9]\d?(?:,\d{2})+,\d{3})"
DECIMAL = rf"(?P<decimal>{PLAIN}(?:\.\d+)?|\.\d+)"
FORMS = [
    re.compile(rf"{DECIMAL}(?:[eE](?P<exponent>[-+]?\d+))?"),
    re.compile(rf"{DECIMAL} ?[*×·xX] ?10 ?\^ ?\(?(?P<exponent>[-+]?\d+)"),
    re.compile(r"10 ?\^ ?\(?(?P<exponent>[-+]?\d+)"),
    re.compile(r"(?:(?P<whole>\d+)(?: | and ))?(?P<above>\d+) ?/ ?(?P<below>\d+)"),
]
"""A number; a number with a power of ten; a power of ten; a fraction, perhaps after a whole number."""
MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
MULTIPLIERS |= {f"{name}s": factor for name, factor in MULTIPLIERS.items()} | {"mn": 10**6, "bn": 10**9, "tn": 10**12}
UNCERTAIN = re.compile(
    r"(?i:dozens?|score|gross|lakhs?|crores?|grand|quadrillions?|mln|mio|bln|mld|mrd|trn|point|squared|cubed|factorial|pi|mod|choose"
    r"|plus|minus|negative|base|binary|octal|hexadecimal|half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten)ths?"
    r"|(?:hundred|thousand|million)ths?)|[^aAIgmshlLtCFVWJN]"
)
"""Words that change the value of the number before them, and single letters that may be variables."""
UNITS = re.compile(
    r"st|nd|rd|th|[mcdk]?m|mi|ft|in|yd|[mk]?g|t|lbs?|oz|m[lL]|cl|[lL]|s|secs?|mins?|h|hrs?|ms|[ap]m|[AP]M|mph|kph|kWh|k?W|[VJNc]|Hz"
    r"|[kMGT]B|cents?|dollars|USD|EUR|hours?|minutes?|days?|years?|degrees|percent"
)
"""Units that may follow a number without a space and do not change its value."""
NUMERALS = "十百千万萬億亿兆点點십백천만억조"
"""Characters that multiply the number before them, or add a decimal point after it."""
STYLES = r"text|textbf|textit|textrm|mathrm|mathbf|mbox|quad|qquad|approx|Rightarrow|rightarrow|implies"
COMMANDS_BEFORE = re.compile(rf"\\(?:{STYLES}|Longrightarrow|longrightarrow|therefore|equiv|sim|simeq|item)$")
COMMANDS_AFTER = re.compile(
    rf"\\(?:(?:{STYLES}|end|degree|circ|euro|pounds|blacksquare|square|checkmark|qed|qedhere)(?![a-zA-Z])|[^a-zA-Z])"
)
GREATER = re.compile(
    r"\d ?(?:years?|months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|miles?|yards?|feet|foot|ft|m|km|kg|pounds?|lbs?|dollars?|euros?)"
    r",?(?: and)? $"
)
LESSER = re.compile(
    r" ?(?:months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|seconds?|secs?|s|yards?|feet|inch|inches|in|cm|mm|m|g|grams?|ounces?|oz|cents?)\b"
)
"""Text before (GREATER) and after (LESSER) the second part of a quantity such as `3 hours 20 minutes`."""
BOUND = re.compile(
    r"(?:(?:%|percent|\d ?/ ?\d+) of|\d ?(?:,|;|and) ?[a-zA-Z] ?[=:]|\b(?:not|twice|double|triple|half|times|divided by|plus|minus)"
    r"|\b(?i:half|negative|opposite|reciprocal|inverse|square|cube|root|logarithm|log|factorial|absolute value)(?: of)(?: the)?) ?$"
)
"""A fraction of the number, a second variable, a negated number, or a function in words."""
FUNCTION = re.compile(
    r"(?i:(?<![a-z])(?:log|ln|lg|lb|exp|a(?:rc)?(?:sin|cos|tan|cot|sec|csc)h?|(?:sin|cos|tan|cot|sec|csc)h?|sqrt|cbrt|root|gcd|lcm|hcf"
    r"|max|min|mod|det|abs|floor|ceil|round|sgn|sign|base|binomial))\}?"
    r" ?(?:[_^] ?(?:\{[^{}]*\}|-?\w) ?)?(?: base \w+ (?:of )?)?(?:[({\[] ?)*$"
)
VARIABLE = re.compile(r"(?:^|[^\w'.])[b-zB-HJ-Zα-ωΑ-Ω] ?$")
DANGLING = re.compile(
    r"(?:^|[\s=:({\[$≈,])-(?:[^\s\d\w-]{0,3}[A-Za-z]{0,4}|\\[a-zA-Z]+)[^\s\d\w]{0,3} ?$|(?<![\w)])-[({\[][^(){}\[\]\n]*$|(?:^|[\s=:(])[—―─]$"
)
"""A sign that is separated from the number by something else."""
OPENED = r"(?:[({\[]|\\[(\[])"
CLOSED = re.compile(r"(?: ?(?:[)}\]]|\\[)\]]))+")
ANSWER = re.compile(r"(?i)\banswer\b\s*(?:is\b\s*:?|[:=])")
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
PREFIX = re.compile(
    rf"(?:(?P<outer>[-+])(?P<gap> ?)(?:(?:{OPENED}|{CURRENCY}) ?)*)?(?P<currency>{CURRENCY} ?)?(?P<inner>[-+])?$"
)


def final_number(text: str) -> Fraction | None:
    """Return the number after the last `####`, in the last `\\boxed`, after "the answer is", else the last number."""
    marked, boxed = after_mark(text), last_boxed(text)
    if marked is not None:
        return _first(normalized(marked)) if last_boxed(marked) is None else sole_number(marked)
    if boxed is not None:
        return sole_number(text)
    plain = normalized(text)
    for told in [*ANSWER.finditer(plain)][-1:]:
        sentence = SENTENCE_END.split(plain[told.end() :].lstrip(), maxsplit=1)[0]
        if len(_values(sentence)) == 1:
            return _first(sentence)
    return next(iter(_values(plain)[-1:]), None)


def sole_number(text: str) -> Fraction | None:
    """Return the number of a right answer: after its last `####`, in its last `\\boxed`, or its only number."""
    marked = after_mark(text)
    shown = text if marked is None else marked
    boxed = last_boxed(shown)
    if boxed is not None:
        sign, value = sign_of_box(shown), sole_number(boxed)
        return None if sign is None or value is None else sign * value
    values = _values(normalized(shown))
    return values[0] if len(set(values)) == 1 else None


def sign_of_box(text: str) -> int | None:
    """Return the sign (1 or -1) before the last `\\boxed`, or None if the box is a part of a larger number or formula."""
    begin, end = _box(text) or (0, len(text))
    start = max(text.rfind("\\boxed", 0, begin), text.rfind("\\fbox", 0, begin), 0)
    before, after = (normalized(part) for part in (f"{text[:start][-4 * CONTEXT :]}{BOX}", text[end + 1 :][: 4 * CONTEXT]))
    before = before.removesuffix(BOX)
    after = re.sub(r"^[ }$]*\\pmod.*", "", after, flags=re.DOTALL)
    prefix = PREFIX.search(before)
    has_sign = prefix is not None and (prefix["outer"] or prefix["inner"])
    if re.search(r"(?:[_^√]|\\(?:sqrt|[dtc]?frac)) ?(?:\[[^\[\]]*\])? ?\{?$", before) or FUNCTION.search(before):
        return None
    if (
        before[-1:].isdigit()
        or before.endswith(UNREAD)
        or (not has_sign and DANGLING.search(before))
        or re.match(r" ?\{|\.?\d|_", after)
    ):
        return None
    return None if _factor(after) != 1 else _sign(before) if has_sign else 1


def after_mark(text: str) -> str | None:
    """Return the first line that is not empty after the last `####`, or None without a mark."""
    _, mark, rest = text.rpartition("####")
    return next((line for line in rest.splitlines() if line.strip()), "") if mark else None


def last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}`, or None if there is none or it is not closed."""
    found = _box(text)
    return text[found[0] : found[1]] if found else None


def _box(text: str) -> tuple[int, int] | None:
    """Return the begin and the end of the content of the last box, or None."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin, depth = text.index("{", start) + 1, 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return begin, end
    return None


def _first(plain: str) -> Fraction | None:
    return next(iter(_values(plain)), None)


def _values(plain: str) -> list[Fraction | None]:
    """Return the values of the groups of a normalized text, None for one without a value. `3 * 6 = 18` gives only 18."""
    found: list[Fraction | None] = []
    end, is_chained = 0, False
    for group in GROUP.finditer(plain):
        if is_chained and re.fullmatch(rf"\s*[=≈]\s*[-+]? ?{CURRENCY}? ?[-+]?", plain[end : group.start()]):
            found.pop()
        value, end = _value(group.group()), group.end()
        before, after = plain[max(0, group.start() - CONTEXT) : group.start()], plain[end : end + CONTEXT]
        sign, factor = _sign(before), _factor(after)
        closed = CLOSED.match(after)
        if closed and factor == 1 and not re.match(r" ", after[closed.end() :]):
            factor = _factor(after[closed.end() :])
        if GREATER.search(before) and LESSER.match(after):
            value = None
        found.append(None if value is None or sign is None or factor is None else value * sign * factor)
        is_chained = True
    return found


def _value(group: str) -> Fraction | None:
    """Return the value of a group without its sign, or None if it is not a single number."""
    form = next(filter(None, (form.fullmatch(group) for form in FORMS)), None)
    if form is None or len(group) > MOST_DIGITS:
        return None
    parts = form.groupdict()
    if parts.get("below"):
        whole, above, below = (int(parts[name] or 0) for name in ("whole", "above", "below"))
        if below == 0 or (parts["whole"] and above >= below):
            return None
        return whole + Fraction(above, below)
    exponent = int(parts.get("exponent") or 0)
    if abs(exponent) > MOST_DIGITS:
        return None
    return Fraction(re.sub("[ ,]", "", parts.get("decimal") or "1")) * Fraction(10) ** exponent


def _sign(before: str) -> int | None:
    """Return the sign (1 or -1) from the text before a group, or None if that text changes its value."""
    prefix = PREFIX.search(before)
    assert prefix is not None
    rest, outer, inner = before[: prefix.start()], prefix["outer"], prefix["inner"]
    if (outer and inner) or (inner and not prefix["currency"] and not outer):
        return None
    if not (outer or inner):
        return None if _is_bound(rest, has_currency=bool(prefix["currency"])) else 1
    near = rest.rstrip(" ")[-1:]
    is_detached = bool(prefix["gap"]) and rest.strip() != "" and near not in "=:(≈$"
    if (
        _is_bound(rest, has_currency=False)
        or is_detached
        or rest[-1:].isalnum()
        or near in (*")]}%+-*/×÷·^_|'\"", *("." if near == rest[-1:] else ""))
    ):
        return None
    return -1 if "-" in (outer, inner) else 1


def _is_bound(rest: str, *, has_currency: bool) -> bool:
    """Return True if the number after this text belongs to it: after a letter, an operator, a function or an inequality."""
    near = rest.rstrip(" ")
    last = rest[-1:]
    if (_is_letter(last) and not has_currency) or last in ("_", "."):
        return True
    if UNREAD in rest[-2:] or FUNCTION.search(rest) or VARIABLE.search(rest) or DANGLING.search(rest):
        return True
    if re.search(r"[)\]}]\($|\d° ?$|\\['_]$", rest):
        return True
    if BOUND.search(rest) or (last == "'" and rest[-2:-1].isalnum()):
        return True
    if near[-1:] in tuple("^_√±∓≠≤≥+*/×÷·"):
        return True
    if re.search(r"\\[a-zA-Z]+$", near) and not COMMANDS_BEFORE.search(near):
        return True
    if re.search(r"(?:\\[a-zA-Z]+|[\]}^_]|\d) ?\{$", near) or re.search(r"(?:[a-zA-Z]\(|\\[a-zA-Z]+\[)$", near):
        return True
    if re.search(rf"\b(?:{'|'.join(MULTIPLIERS)}),?(?: and)?$", near.lower()):
        return True
    return bool(re.search(r"(?:^|[^-=<>])[<>]=?$", near)) or near.endswith("!=")


def _factor(after: str) -> int | None:
    """Return the factor from the text after a group (`5 million`), or None if that text changes its value otherwise."""
    if re.match(
        rf" ?(?:{UNREAD}|[{NUMERALS}]|分之|\\_|‰|-?base|\{{ ?\d)|° ?\d|\.[({{\[\\]+\d| ?\((?:in )?(?:base|{'|'.join(MULTIPLIERS)})",
        after,
    ):
        return None
    attached = re.match(r"[^\W\d_]+", after)
    if attached and _is_letter(after[0]) and attached.group().lower() not in MULTIPLIERS:
        return 1 if UNITS.fullmatch(attached.group()) else None
    if re.match(r"(?:!|\(|\.\.| ?['′’\x22″]+ ?\d| ?(?:[√^_±]|[*+×÷·] ?\S|<(?!<)|[≤≥<]|>(?!>)))", after):
        return None
    if re.match(r" ?[-/] ?(?:[\\({]|[^\W\d_](?![^\W\d_]))", after):
        return None
    near = re.sub("^-(?=[a-zA-Z])", "", after).lstrip(" {}")
    if near.startswith("\\"):
        return 1 if COMMANDS_AFTER.match(near) else None
    word = re.match(r"[^\W\d_]+", near)
    if word is None or not _is_letter(near[0]):
        return 1
    name = word.group()
    if name.lower() in MULTIPLIERS:
        return MULTIPLIERS[name.lower()] if not _more_words(near[word.end() :]) else None
    is_and_a_half = bool(re.match(r"and (?:a|one|two|three)[ -](?:half|third|quarter|fourth|fifth|tenth)", near))
    return None if is_and_a_half or UNCERTAIN.fullmatch(name) else 1


def _more_words(after: str) -> bool:
    """Return True if a second multiplier follows, as in `5 hundred thousand`."""
    return bool(re.match(rf" (?:and )?(?:\d|{'|'.join(MULTIPLIERS)})", after.lower()))


def _is_letter(character: str) -> bool:
    """Return True for a letter of a script with spaces between words, unlike Chinese."""
    return character.isalpha() and ord(character) < 0x2E80
