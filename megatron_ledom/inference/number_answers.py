"""The number that a text gives as its answer: its exact value, or None where the value is not certain; never a part of a number.

A *group* is a run of numbers that belong together: `3/4`, `1 1/2`, `1,2,3`, `10 - 3`. It has a value only if it is one number as a
whole and the text around it leaves that value alone, as `7\\pi`, `x^2` or `3:05` do not.
"""

import re
from fractions import Fraction

from megatron_ledom.inference.number_text import CURRENCY, normalized

MOST_DIGITS = 300
CONTEXT = 60
"""Characters around a group that can change its value."""
RAW = r"(?:\.?\d(?:[\d.,'_]*\d)?(?:[eE][-+]?\d+(?!\w|\.\d))?)"
OPERATOR = (
    r"(?:[-+*/×÷·^—;]|,(?: ?(?:and|or)(?![a-z]))?|:(?=\d)|(?<= ):|[xX](?= ?[\d(])"
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
"""A number; one with a power of ten; a power of ten; a fraction, perhaps behind a whole number."""
MULTIPLIERS = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
UNCERTAIN = re.compile(r"(?i:dozens?|score|point|half|squared|cubed|factorial|pi|mod|choose|plus|minus)|[^aAIgmshlLtCFKVWJN]")
"""Words that change the value of the number in front of them, and single letters that may be variables."""
UNITS = re.compile(
    r"st|nd|rd|th|[mcdk]?m|mi|ft|in|yd|[mk]?g|t|lbs?|oz|m[lL]|cl|[lL]|s|secs?|mins?|h|hrs?|ms|[ap]m|[AP]M|mph|kph|kWh|k?W|[VJNc]|Hz"
    r"|[kMGT]B|cents?|dollars|USD|EUR|hours?|minutes?|days?|years?|degrees|percent"
)
"""Words that may stand at a number without a space and leave its value alone."""
STYLES = r"text|textbf|textit|textrm|mathrm|mathbf|mbox|quad|qquad|approx|Rightarrow|rightarrow|implies"
COMMANDS_BEFORE = re.compile(rf"\\(?:{STYLES}|Longrightarrow|longrightarrow|therefore|equiv|sim|simeq|item)$")
COMMANDS_AFTER = re.compile(rf"\\(?:(?:{STYLES}|end|degree|circ|euro|pounds|blacksquare|square)(?![a-zA-Z])|[^a-zA-Z])")
GREATER = re.compile(
    r"\d ?(?:years?|months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|miles?|yards?|feet|foot|ft|m|km|kg|pounds?|lbs?|dollars?|euros?)"
    r",?(?: and)? $"
)
LESSER = re.compile(
    r" ?(?:months?|weeks?|days?|hours?|hrs?|h|minutes?|mins?|seconds?|secs?|s|yards?|feet|inch|inches|in|cm|mm|m|g|grams?|ounces?|oz|cents?)\b"
)
"""What stands before and behind the second part of a quantity such as `3 hours 20 minutes`."""
BOUND = re.compile(r"(?:(?:%|percent|\d ?/ ?\d+) of|\d ?(?:,|;|and) ?[a-zA-Z] ?[=:]|\bnot) ?$")
"""A share of the number, a second variable, a number that is denied."""
ANSWER = re.compile(r"(?i)\banswer\b\s*(?:is\b\s*:?|[:=])")
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
PREFIX = re.compile(rf"(?:(?P<outer>[-+])(?P<gap> ?))?(?P<currency>{CURRENCY} ?)?(?P<inner>[-+])?$")


def final_number(text: str) -> Fraction | None:
    """Return the number after the last `####`, in the last `\\boxed`, in the last sentence "the answer is", else the last one."""
    marked, boxed = after_mark(text), last_boxed(text)
    if marked is not None:
        return _first(normalized(marked))
    if boxed is not None:
        return sole_number(boxed)
    plain = normalized(text)
    for told in [*ANSWER.finditer(plain)][-1:]:
        sentence = SENTENCE_END.split(plain[told.end() :].lstrip(), maxsplit=1)[0]
        if len(_values(sentence)) == 1:
            return _first(sentence)
    return next(iter(_values(plain)[-1:]), None)


def sole_number(text: str) -> Fraction | None:
    """Return the number of a right answer: after its last `####`, in its last `\\boxed`, or the only one of all of it."""
    marked, boxed = after_mark(text), last_boxed(text)
    values = _values(normalized(text if marked is None and boxed is None else marked if marked is not None else boxed or ""))
    return values[0] if len(set(values)) == 1 else None


def after_mark(text: str) -> str | None:
    """Return the first line that is not empty after the last `####`; None where there is no mark."""
    _, mark, rest = text.rpartition("####")
    return next((line for line in rest.splitlines() if line.strip()), "") if mark else None


def last_boxed(text: str) -> str | None:
    """Return what stands in the last `\\boxed{...}`; None where there is none, or it is not closed."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin, depth = text.index("{", start) + 1, 1
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None


def _first(plain: str) -> Fraction | None:
    return next(iter(_values(plain)), None)


def _values(plain: str) -> list[Fraction | None]:
    """The values of the groups of a normalized text, None for one without; of `3 * 6 = 18` only what stands last."""
    found: list[Fraction | None] = []
    end, is_chained = 0, False
    for group in GROUP.finditer(plain):
        if is_chained and re.fullmatch(rf"\s*[=≈]\s*[-+]? ?{CURRENCY}? ?[-+]?", plain[end : group.start()]):
            found.pop()
        value, end = _value(group.group()), group.end()
        before, after = plain[max(0, group.start() - CONTEXT) : group.start()], plain[end : end + CONTEXT]
        sign, factor = _sign(before), _factor(after)
        if GREATER.search(before) and LESSER.match(after):
            value = None
        found.append(None if value is None or sign is None or factor is None else value * sign * factor)
        is_chained = True
    return found


def _value(group: str) -> Fraction | None:
    """The value of a group without its sign; None where it is no single number."""
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
    """1 or -1 by the text in front of a group; None where that text makes it a part of something else."""
    prefix = PREFIX.search(before)
    assert prefix is not None
    rest, outer, inner = before[: prefix.start()], prefix["outer"], prefix["inner"]
    if (outer and inner) or (inner and not prefix["currency"] and not outer):
        return None
    if not (outer or inner):
        return None if _is_bound(rest, has_currency=bool(prefix["currency"])) else 1
    near = rest.rstrip(" ")[-1:]
    is_detached = bool(prefix["gap"]) and rest.strip() != "" and near not in "=:(≈$"
    if is_detached or rest[-1:].isalnum() or near in (*")]}%+-*/×÷·^_|'\"", *("." if near == rest[-1:] else "")):
        return None
    return -1 if "-" in (outer, inner) else 1


def _is_bound(rest: str, *, has_currency: bool) -> bool:
    """Whether the text that ends here goes on into the number behind it: a letter, an operator, a function, an inequality."""
    near = rest.rstrip(" ")
    last = rest[-1:]
    if (_is_letter(last) and not has_currency) or last in ("_", "."):
        return True
    if BOUND.search(rest) or (last == "'" and rest[-2:-1].isalnum()):
        return True
    if near[-1:] in tuple("^_√±∓≠≤≥+*/×÷·"):
        return True
    if re.search(r"\\[a-zA-Z]+$", near) and not COMMANDS_BEFORE.search(near):
        return True
    if re.search(r"(?:\\[a-zA-Z]+|[\]}^_]) ?\{$", near) or re.search(r"(?:[a-zA-Z]\(|\\[a-zA-Z]+\[)$", near):
        return True
    if re.search(rf"\b(?:{'|'.join(MULTIPLIERS)}),?(?: and)?$", near.lower()):
        return True
    return bool(re.search(r"(?:^|[^-=<>])[<>]=?$", near)) or near.endswith("!=")


def _factor(after: str) -> int | None:
    """By what the text behind a group multiplies it (`5 million`); None where it makes the number a part of something else."""
    attached = re.match(r"[^\W\d_]+", after)
    if attached and _is_letter(after[0]):
        return 1 if UNITS.fullmatch(attached.group()) else None
    if re.match(r"(?:!|\(|\.\.| ?['′’] ?\d| ?(?:[√^_±]|[*+×÷·] ?\S|<(?!<)|[≤≥<]|>(?!>)))", after):
        return None
    if re.match(r" ?[-/] ?(?:[\\(]|[^\W\d_](?![^\W\d_]))", after):
        return None
    near = after.lstrip(" {}")
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
    """Whether a second multiplier follows, as in `5 hundred thousand`."""
    return bool(re.match(rf" (?:and )?(?:\d|{'|'.join(MULTIPLIERS)})", after.lower()))


def _is_letter(character: str) -> bool:
    """Whether a character is of an alphabet that is written with spaces between words, unlike Chinese."""
    return character.isalpha() and ord(character) < 0x2E80
