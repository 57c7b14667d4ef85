"""Pages, near-duplicates of pages by kind of change, and junk by kind, to plant into a corpus that is to be cleaned."""

import base64
import random
from collections.abc import Callable

NOUNS, VERBS, ADJECTIVES = (
    words.split()
    for words in (
        """river teacher window garden letter machine harbour forest bridge kitchen village engine mountain library market winter
        station doctor island carpet orchard factory painter lantern valley sailor chimney museum farmer castle pencil meadow
        captain basket theatre soldier turbine compass ladder glacier violin tailor canal barrel pigeon granite""",
        """carried watched repaired painted followed measured crossed opened visited described counted borrowed admired
        sheltered planted ordered polished gathered questioned remembered""",
        """quiet narrow ancient bright wooden heavy distant careful famous empty gentle frozen crowded rusty hidden curious
        patient hollow silver modest""",
    )
)
SENTENCES = (
    "The {a} {n} {v} a {n2} that stood near the {a2} {n3}.",
    "When the {n} of the {n2} was {a}, the {n3} {v} it with some {a2} help.",
    "They have often {v} the {n} and the {a} {n2} beyond that {n3}.",
    "It had to be a {a} {n}, for the {n2} {v} every {n3} with care.",
    "Before the {n} came, a {a2} {n2} {v} the {n3} of the town.",
    "Nobody knew which {n} had {v} the {a} {n2} to the {n3} that day.",
)


def page(number: int, num_paragraphs: int = 4) -> str:
    """Return a page of English sentences, another one for each number, that every filter for web pages keeps."""
    chance = random.Random(number)
    paragraphs = []
    for _ in range(num_paragraphs):
        sentences = []
        for _ in range(4):
            n, n2, n3 = chance.sample(NOUNS, 3)
            a, a2 = chance.sample(ADJECTIVES, 2)
            sentences.append(chance.choice(SENTENCES).format(n=n, n2=n2, n3=n3, a=a, a2=a2, v=chance.choice(VERBS)))
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs)


def boilerplate(chance: random.Random) -> str:
    """Return what a site might put around a page: 60 words, other ones each time."""
    sentences = [
        f"This {chance.choice(ADJECTIVES)} {chance.choice(NOUNS)} was {chance.choice(VERBS)} by the {chance.choice(NOUNS)}"
        f" with the {chance.choice(ADJECTIVES)} {chance.choice(NOUNS)}."
        for _ in range(5)
    ]
    return " ".join(sentences)


def with_other_words(share: float) -> Callable[[str, random.Random], str]:
    """Return a change that replaces a share of the words, at random places."""

    def change(text: str, chance: random.Random) -> str:
        parts = text.split(" ")
        places = [place for place, part in enumerate(parts) if part.strip()]
        for place in chance.sample(places, max(1, round(share * len(places)))):
            parts[place] = f"{chance.choice(NOUNS)}{chance.randrange(10)}"
        return " ".join(parts)

    return change


def with_another_block(share: float) -> Callable[[str, random.Random], str]:
    """Return a change that replaces a share of the words, all in one place."""

    def change(text: str, chance: random.Random) -> str:
        parts = text.split(" ")
        size = max(1, round(share * len(parts)))
        begin = chance.randrange(len(parts) - size + 1)
        new = [f"{chance.choice(NOUNS)}{chance.randrange(10)}" for _ in range(size)]
        return " ".join(parts[:begin] + new + parts[begin + size :])

    return change


def paragraphs_in_other_order(text: str, chance: random.Random) -> str:
    """Return the paragraphs, shuffled."""
    paragraphs = text.split("\n\n")
    chance.shuffle(paragraphs)
    return "\n\n".join(paragraphs)


def first(share: float) -> Callable[[str, random.Random], str]:
    """Return a change that keeps the first part only."""
    return lambda text, _: text[: int(share * len(text))]


NEAR_DUPLICATES: dict[str, Callable[[str, random.Random], str]] = {
    "exact copy": lambda text, _: text,
    "other case and white space": lambda text, _: "  ".join(text.lower().split(" ")),
    "other paragraph order": paragraphs_in_other_order,
    "other header and footer (2 x 60 words)": lambda text, chance: f"{boilerplate(chance)}\n\n{text}\n\n{boilerplate(chance)}",
    "1 % other words": with_other_words(0.01),
    "2 % other words": with_other_words(0.02),
    "3 % other words": with_other_words(0.03),
    "5 % other words": with_other_words(0.05),
    "10 % other words": with_other_words(0.10),
    "another block of 10 %": with_another_block(0.10),
    "another block of 20 %": with_another_block(0.20),
    "another block of 40 %": with_another_block(0.40),
    "first 80 %": first(0.80),
    "first half": first(0.50),
}
"""Kind of change -> the change."""


def _sentences(chance: random.Random, number: int) -> str:
    return " ".join(page(chance.randrange(1 << 30), 1) for _ in range(number))


def _words(chance: random.Random, number: int) -> list[str]:
    return [chance.choice(NOUNS) + chance.choice("abcdefgh") for _ in range(number)]


JUNK: dict[str, Callable[[random.Random], str]] = {
    "empty": lambda _: " \n",
    "20 words": lambda chance: " ".join(_sentences(chance, 2).split()[:20]) + ".",
    "one paragraph ten times": lambda chance: "\n\n".join([_sentences(chance, 1)] * 10),
    "list of keywords": lambda chance: ", ".join(_words(chance, 300)) + ".",
    "menu": lambda chance: "\n".join(" ".join(_words(chance, 2)) for _ in range(120)),
    "bullets": lambda chance: "\n".join(f"- the {chance.choice(NOUNS)} of that {word}" for word in _words(chance, 80)),
    "table of numbers": lambda chance: "\n".join(
        " ".join(str(chance.randrange(10**6)) for _ in range(8)) + f" the {chance.choice(NOUNS)} and" for _ in range(60)
    ),
    "base64": lambda chance: "the data of this " + base64.b64encode(chance.randbytes(4000)).decode(),
    "hash marks": lambda chance: " # ".join(f"the {word} and" for word in _words(chance, 100)) + ".",
    "teasers": lambda chance: "\n".join(
        f"The {word} and the {chance.choice(NOUNS)} that have ..." for word in _words(chance, 60)
    ),
    "lorem ipsum": lambda chance: _sentences(chance, 5) + " Lorem ipsum dolor sit amet. " + _sentences(chance, 5),
    "source code": lambda chance: (
        _sentences(chance, 2) + "\n" + "\n".join(f"  if (the_{word}) {{ and = of({word}); }}" for word in _words(chance, 40))
    ),
}
"""Kind of junk -> a page of it."""
FRENCH = (
    "Le gestionnaire de paquets cherche les programmes et garde une trace de leurs fichiers. Il vérifie aussi que les"
    " bibliothèques nécessaires sont présentes avant de commencer. "
)
