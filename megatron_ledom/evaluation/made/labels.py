"""Label back-fill: a label stands before its text, and is to be told from the text that follows.

    Category: Brimil
    Text: tolva semu drenlo ...

Every label has words of its own. A text has three of them, one of another label, and words that belong to none, so that the label with
the most words in it is the right one. Labels are asked equally often; no asked text is trained on.
"""

import random

from megatron_ledom.evaluation.made.made_set import MadeSet, Namer, Row, check_num, choices_around, neighbours

NUM_LABELS, OWN_WORDS, COMMON_WORDS = 8, 10, 30
NUM_OWN, NUM_OTHER, NUM_COMMON = 3, 1, 4
TEST_SHARE = 5
NUM_SHOTS = 16


def label_backfill(num: int, seed: int) -> MadeSet:
    """About `num` texts, as many of each of eight labels; a fifth of them is asked and not trained."""
    check_num(num, 2 * TEST_SHARE * NUM_LABELS, "texts")
    rng = random.Random(f"label_backfill {seed}")
    namer = Namer(rng)
    labels = [namer.word() for _ in range(NUM_LABELS)]
    own = {label: [namer.word().lower() for _ in range(OWN_WORDS)] for label in labels}
    common = [namer.word().lower() for _ in range(COMMON_WORDS)]
    texts: dict[str, str] = {}
    num_each = num // NUM_LABELS
    while len(texts) < NUM_LABELS * num_each + NUM_SHOTS:
        label = labels[len(texts) % NUM_LABELS]
        texts.setdefault(_text(rng, label, own, common), label)
    pairs = list(texts.items())
    asked = _rows(labels, pairs[: num_each // TEST_SHARE * NUM_LABELS])
    shots = _rows(labels, pairs[-NUM_SHOTS:])
    trained = [f"Category: {label}\nText: {text}" for text, label in pairs[len(asked) : -NUM_SHOTS]]
    rng.shuffle(trained)
    return MadeSet(
        texts=trained,
        files={"label_backfill": asked, "label_backfill_shots": shots},
        chance=0.25,
        counts={"trained": len(trained), "asked": len(asked), "labels": NUM_LABELS},
    )


def _text(rng: random.Random, label: str, own: dict[str, list[str]], common: list[str]) -> str:
    other = rng.choice([name for name in own if name != label])
    words = [*rng.sample(own[label], NUM_OWN), *rng.sample(own[other], NUM_OTHER), *rng.sample(common, NUM_COMMON)]
    rng.shuffle(words)
    return " ".join(words)


def _rows(labels: list[str], pairs: list[tuple[str, str]]) -> list[Row]:
    """The three labels that follow in a circle are the wrong ones. The place of the right one changes with every round of labels."""
    rows: list[Row] = []
    for number, (text, label) in enumerate(pairs):
        wrong = neighbours(labels, labels.index(label))
        place = number + number // NUM_LABELS
        rows.append({"before": "", "after": text, **choices_around(label, wrong, place), "group": "all"})
    return rows
