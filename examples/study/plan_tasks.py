"""Two tasks whose first token needs a plan: the path-star task and sibling discovery. A word is a token, a line a text.

Path-star (Bachmann and Nagarajan, arXiv 2403.06963): the shuffled edges of a star whose arms are equally long, its centre and the end
of one arm; the answer is that arm, from the centre. Only the second node is a decision: each later one follows from the one before it
and an edge, and so next-token training can learn the edges without learning to plan. Sibling discovery (Nagarajan et al.,
arXiv 2504.15266): two children of one parent, then the parent. The families are never listed; they are to be inferred from the
training pairs, and new pairs to be written.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path
from random import Random

from megatron_ledom.errors import DataError

STAR, SIBLINGS = "star", "siblings"
TASKS = (STAR, SIBLINGS)
END, UNKNOWN = "</s>", "<unk>"
HELD_OUT = 2
"""One of so many ordered pairs of siblings is not in the training part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Star:
    """Sizes of the path-star task."""

    degree: int
    """Arms, which is the inverse of the accuracy of a guess."""
    length: int
    """Nodes of an arm, with the centre."""
    nodes: int
    """Names of nodes, of which each star has a random part."""

    @property
    def words(self) -> list[str]:
        """The vocabulary."""
        return ["|", "/", "=", *map(str, range(self.nodes))]

    @property
    def num_tokens(self) -> int:
        """Tokens of every text, with the end."""
        return 3 * self.degree * (self.length - 1) + self.length + 4

    @property
    def answer_tokens(self) -> int:
        """Tokens of every answer, with the end."""
        return self.length + 1

    def draw(self, random_: Random) -> tuple[str, str]:
        """Return the prompt and the answer of a random star."""
        centre, *others = random_.sample(range(self.nodes), 1 + self.degree * (self.length - 1))
        each = self.length - 1
        arms = [[centre, *others[start : start + each]] for start in range(0, len(others), each)]
        edges = [f"{one} {other}" for arm in arms for one, other in pairwise(arm)]
        random_.shuffle(edges)
        arm = random_.choice(arms)
        return f"{' | '.join(edges)} / {centre} {arm[-1]} =", " ".join(map(str, arm))


def edges_of(prompt: str) -> frozenset[str]:
    """Return the edges of a star, whatever their order in the prompt."""
    return frozenset(prompt.partition(" / ")[0].split(" | "))


def begins_an_arm(prompt: str, answer: str) -> bool:
    """Return True if the answer begins with an edge from the centre of the prompt's star: the right arm, or another one."""
    edges, _, query = prompt.partition(" / ")
    return answer.split()[:1] == query.split()[:1] and " ".join(answer.split()[:2]) in edges.split(" | ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Siblings:
    """Sizes of sibling discovery."""

    parents: int
    children: int
    """Children of each parent."""

    num_tokens, answer_tokens = 5, 4
    prompt = "siblings"

    @property
    def words(self) -> list[str]:
        """The vocabulary."""
        return [self.prompt, *(f"P{n}" for n in range(self.parents)), *map(str, range(self.parents * self.children))]

    def families(self, seed: int) -> dict[str, str]:
        """Return the parent of each child; which children belong together is random."""
        children = list(map(str, range(self.parents * self.children)))
        Random(seed).shuffle(children)
        return {child: f"P{place // self.children}" for place, child in enumerate(children)}

    def answers(self, seed: int) -> tuple[list[str], list[str]]:
        """Return the answers that the training part has, and the others, which are right, too."""
        by_parent: dict[str, list[str]] = {}
        for child, parent in self.families(seed).items():
            by_parent.setdefault(parent, []).append(child)
        right = [f"{one} {two} {name}" for name, family in by_parent.items() for one, two in permutations(family, 2)]
        Random(seed).shuffle(right)
        num = len(right) // HELD_OUT
        return right[num:], right[:num]


def is_coherent(answer: str, families: dict[str, str]) -> bool:
    """Return True if an answer is two different children and their common parent."""
    words = answer.split()
    return len(words) == 3 and words[0] != words[1] and {families.get(child) for child in words[:2]} == {words[2]}


def new_answers(answers: Sequence[str], families: dict[str, str], trained: set[str]) -> Iterator[bool]:
    """Yield for each written answer True if it is coherent, not in the training part, and not written before.

    Their share is the measure of arXiv 2504.15266.
    """
    written = set(trained)
    for answer in answers:
        yield is_coherent(answer, families) and answer not in written
        written.add(answer)


def write_tasks(
    folder: Path, star: Star, siblings: Siblings, num: dict[str, int], seed: int
) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Return by task the records of its training and test part, and write the tokenizers.

    No star of the test part is trained on, nor the same edges in another order or with another goal.
    """
    random_ = Random(seed)
    test = dict(star.draw(random_) for _ in range(num["test"]))
    held_out = set(map(edges_of, test))
    drawn = [pair for pair in (star.draw(random_) for _ in range(num["train"])) if edges_of(pair[0]) not in held_out]
    if not drawn:
        raise DataError(
            f"with {star.nodes} names every star of the training part is one of the test part; raise teacher.star.nodes"
        )
    trained, _ = siblings.answers(seed)
    lines = random_.choices(trained, k=num["train"])
    for task, words in ((STAR, star.words), (SIBLINGS, siblings.words)):
        _write_tokenizer(folder / task / "tokenizer", words)
    return {
        STAR: {"train": [_record(*pair) for pair in drawn], "test": [_record(*pair) for pair in test.items()]},
        SIBLINGS: {"train": [_record(siblings.prompt, line) for line in lines], "test": [{"prompt": siblings.prompt}]},
    }


def _record(prompt: str, answer: str) -> dict[str, str]:
    return {"text": f"{prompt} {answer}", "prompt": prompt, "answer": answer}


def _write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """Write a tokenizer whose tokens are the words between spaces."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    vocabulary = {word: number for number, word in enumerate([END, UNKNOWN, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "unk_token": UNKNOWN}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
