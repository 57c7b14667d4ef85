"""Texts whose loss gap is known: products of primes (positive control) and walks of a reversible Markov chain (negative control)."""

import string
from itertools import combinations_with_replacement
from random import Random

PRIMES, CHAIN = "primes", "chain"
SMALLEST_PRIME = 11
HELD_OUT_SHARE = 10
LEAST_HELD_OUT = 600
"""Lines of the held-out part of the primes: it is repeated, because few pairs would not fill a sample of a long context."""
"""One of so many pairs of primes, or walks, is held out."""
STATES = string.ascii_lowercase
WALK = 60
"""States of a walk."""
SPREAD = 1.5
"""Standard deviation of the logarithms of the chain's weights: how unequal its transitions are."""


def products(num_lines: int, largest: int, seed: int) -> tuple[list[str], list[str]]:
    """Return the lines `p * q = n` of the training and of the held-out part, with random primes in random order.

    A pair of primes is in one part only, in both orders. The product is written from its last digit, as in the paper that has this
    example: a forward model can then multiply digit by digit.
    """
    random_ = Random(seed)
    primes = [n for n in range(SMALLEST_PRIME, largest + 1) if all(n % d for d in range(2, int(n**0.5) + 1))]
    pairs = list(combinations_with_replacement(primes, 2))
    random_.shuffle(pairs)
    size = max(1, len(pairs) // HELD_OUT_SHARE)

    def _line(pair: tuple[int, int]) -> str:
        first, second = random_.sample(pair, 2)
        return f"{first} * {second} = {from_last_digit(first * second)}"

    train = [_line(random_.choice(pairs[size:])) for _ in range(num_lines)]
    return train, [_line(pair) for _ in range(-(-LEAST_HELD_OUT // size)) for pair in pairs[:size]]


def from_last_digit(number: int) -> str:
    """Return the digits of a positive number, the last one first."""
    digits = ""
    while number:
        number, digit = divmod(number, 10)
        digits += str(digit)
    return digits


def walks(num_lines: int, num_states: int, seed: int) -> tuple[list[str], list[str]]:
    """Return walks of a reversible chain, the training and the held-out part.

    The weights of transitions are symmetric and a walk begins in the stationary distribution, so each walk is as likely as the same
    walk from its end to its start, and the losses of the two directions have the same limit.
    """
    random_ = Random(seed)
    weights = [[0.0] * num_states for _ in range(num_states)]
    for one, other in combinations_with_replacement(range(num_states), 2):
        weights[one][other] = weights[other][one] = 2 ** random_.gauss(0, SPREAD)
    totals, states = [sum(row) for row in weights], range(num_states)

    def _walk() -> str:
        found = random_.choices(states, totals)
        while len(found) < WALK:
            found += random_.choices(states, weights[found[-1]])
        return " ".join(STATES[state] for state in found)

    num = max(1, num_lines // HELD_OUT_SHARE)
    held_out = [_walk() for _ in range(num)]
    return [_walk() for _ in range(num_lines)], held_out


def vocab_size(control: str, num_states: int) -> int:
    """Return the vocabulary in which every digit or state is one token: 256 bytes, 3 controls, the characters, and pieces with a space."""
    return 256 + 3 + (13 + 2 if control == PRIMES else 1 + 2 * num_states)
