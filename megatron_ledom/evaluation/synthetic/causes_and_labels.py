"""Abduction and label back-fill: infer the beginning of a text from the text after it.

Abduction: small worlds in which causes have outcomes.

    In Brimil on day 17 the lamp went out. So the river rose and the bells rang.

In every world each of 16 causes has two outcomes. Four causes share each outcome, so one outcome does not determine the
cause, but both together do. All worlds have the same causes and outcomes in other pairs, so a rule of one world is
wrong in another. The three wrong answers share the first outcome, the second, and none. The rules of a known world are
trained for several days; the question is about another day. In an unseen world the rules of all other worlds give
chance.

Label back-fill: a label stands before its text.

    Category: Brimil
    Text: tolva semu drenlo ...

Every label has its own words. A text has three of them, one word of another label, and words without a label. The right
label is the one with the most words in the text. Each label is the answer equally often, and no text of a question is
trained.
"""

import random

from megatron_ledom.evaluation.synthetic.sets import Namer, Row, SyntheticSet, check_num, choices_around, neighbours

CAUSES = (
    *("the lamp went out.", "the gate was left open.", "a stranger came.", "the old oak fell.", "the well ran dry."),
    *("the miller slept.", "the goats broke loose.", "the clock stopped.", "a letter was lost.", "the bridge burned."),
    *("the baker sang.", "the smith left town.", "a star fell.", "the fog came early.", "the king sneezed.", "the cat hid."),
)
FIRST = ("the river rose", "the market closed", "all doors were locked", "nobody spoke")
SECOND = ("the bells rang", "the children laughed", "the bread was late", "a fire was lit")
SIDE = len(FIRST)
DAYS_TRAINED = 6
GROUPS = ("known_world", "unseen_world")
SEVERAL = 4
"""One world in this many is not trained."""
NUM_LABELS, OWN_WORDS, COMMON_WORDS = 8, 10, 30
NUM_OWN, NUM_OTHER, NUM_COMMON = 3, 1, 4
TEST_SHARE = 5
NUM_EXEMPLARS = 16


def abduction(num: int, seed: int) -> SyntheticSet:
    """Generate `num` worlds of 16 rules; a fourth of the worlds is not trained."""
    check_num(num, SEVERAL, "worlds")
    rng = random.Random(f"abduction {seed}")
    namer = Namer(rng)
    texts: list[str] = []
    rows: list[Row] = []
    for number in range(num + 1):
        place, causes = namer.word(), rng.sample(CAUSES, len(CAUSES))
        is_shown, is_known = number == num, number % SEVERAL != SEVERAL - 1
        questions = _rows(rng, place, causes, GROUPS[0 if is_known else 1])
        if is_shown:
            exemplars = questions
            continue
        rows += [row for row, _ in questions]
        texts += [text for _, texts_of_rule in questions for text in texts_of_rule] if is_known else []
    rng.shuffle(texts)
    return SyntheticSet(
        texts=texts,
        files={"abduction": rows, "abduction_shots": [row for row, _ in exemplars]},
        chance=0.25,
        counts={"trained": len(texts), "asked": len(rows), "worlds_trained": len(texts) // (len(CAUSES) * DAYS_TRAINED)},
    )


def label_backfill(num: int, seed: int) -> SyntheticSet:
    """Generate about `num` texts, equally many for each of eight labels.

    A fifth of them are questions and not trained.
    """
    check_num(num, 2 * TEST_SHARE * NUM_LABELS, "texts")
    rng = random.Random(f"label_backfill {seed}")
    namer = Namer(rng)
    labels = [namer.word() for _ in range(NUM_LABELS)]
    own = {label: [namer.word().lower() for _ in range(OWN_WORDS)] for label in labels}
    common = [namer.word().lower() for _ in range(COMMON_WORDS)]
    texts: dict[str, str] = {}
    num_each = num // NUM_LABELS
    while len(texts) < NUM_LABELS * num_each + NUM_EXEMPLARS:
        label = labels[len(texts) % NUM_LABELS]
        texts.setdefault(_text(rng, label, own, common), label)
    pairs = list(texts.items())
    questions = _label_rows(labels, pairs[: num_each // TEST_SHARE * NUM_LABELS])
    exemplars = _label_rows(labels, pairs[-NUM_EXEMPLARS:])
    trained = [f"Category: {label}\nText: {text}" for text, label in pairs[len(questions) : -NUM_EXEMPLARS]]
    rng.shuffle(trained)
    return SyntheticSet(
        texts=trained,
        files={"label_backfill": questions, "label_backfill_shots": exemplars},
        chance=0.25,
        counts={"trained": len(trained), "asked": len(questions), "labels": NUM_LABELS},
    )


def _rows(rng: random.Random, place: str, causes: list[str], group: str) -> list[tuple[Row, list[str]]]:
    """Return the question and the training texts of each rule of a world.

    Cause `SIDE * i + j` has FIRST[i] and SECOND[j].
    """
    found: list[tuple[Row, list[str]]] = []
    for number, cause in enumerate(causes):
        i, j = divmod(number, SIDE)
        wrong = [causes[SIDE * i + (j + 1) % SIDE], causes[SIDE * ((i + 1) % SIDE) + j]]
        wrong.append(causes[SIDE * ((i + 1) % SIDE) + (j + 1) % SIDE])
        rng.shuffle(wrong)
        after = f"So {FIRST[i]} and {SECOND[j]}."
        day, *trained_days = rng.sample(range(1, 100), DAYS_TRAINED + 1)
        row = {"before": f"In {place} on day {day}", "after": after, **choices_around(cause, wrong, number)}
        row |= {"group": group, "cluster": place}
        found.append((row, [f"In {place} on day {day} {cause} {after}" for day in trained_days]))
    return found


def _label_rows(labels: list[str], pairs: list[tuple[str, str]]) -> list[Row]:
    """Return the questions. The next three labels in a circle are wrong.

    The right one's position changes with every round of labels.
    """
    rows: list[Row] = []
    for number, (text, label) in enumerate(pairs):
        wrong = neighbours(labels, labels.index(label))
        place = number + number // NUM_LABELS
        rows.append({"before": "", "after": text, **choices_around(label, wrong, place), "group": "all"})
    return rows


def _text(rng: random.Random, label: str, own: dict[str, list[str]], common: list[str]) -> str:
    other = rng.choice([name for name in own if name != label])
    words = [*rng.sample(own[label], NUM_OWN), *rng.sample(own[other], NUM_OTHER), *rng.sample(common, NUM_COMMON)]
    rng.shuffle(words)
    return " ".join(words)
