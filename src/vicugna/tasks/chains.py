"""Our own multi-step families: every single step is easy, and the depth says how many there are."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_letters, ascii_lowercase

from vicugna.tasks.task import Difficulty, Item, Posed, draw, final_line, make_item

_LARGEST = 19  # the state of `steps` stays in 0..19, so that one step is a small table
_PAIRS = [a + b for a in ascii_letters for b in ascii_letters if a != b]


@dataclass(frozen=True)
class Chain:
    """A task of `difficulty.depth` steps, any depth."""

    name: str
    pose: Callable[[Random, Difficulty], Posed]

    def item(self, seed: int, difficulty: Difficulty) -> Item:
        posed, _ = draw(self.name, seed, difficulty, lambda rng: self.pose(rng, difficulty),
                        lambda posed: posed.question)
        return make_item(self.name, seed, difficulty, posed, {})

    def score(self, item: Item, response: str) -> float:
        """1.0 when the last line is the answer."""
        return float(final_line(response) == item.answer)


def _steps(rng: Random, difficulty: Difficulty) -> Posed:
    """Additions, subtractions and doublings that stay within 0..19, told in any order.

    "k>m -3." leads from k to m by subtracting 3. Only the names say which step comes next, so a
    solver has to look each one up, and what it learns does not depend on how many there are.
    """
    state = rng.randint(0, _LARGEST)
    names = rng.sample(ascii_letters if difficulty.depth < 52 else _PAIRS, difficulty.depth + 1)
    clauses, steps = [], [f"{names[0]} {state}"]
    for here, there in pairwise(names):
        add = [("+", k) for k in range(1, min(9, _LARGEST - state) + 1)]
        subtract = [("-", k) for k in range(1, min(9, state) + 1)]
        double = [("*", 2)] if 0 < 2 * state <= _LARGEST else []
        sign, k = rng.choice(rng.choice([kind for kind in (add, subtract, double) if kind]))
        after = {"+": state + k, "-": state - k, "*": state * k}[sign]
        clauses.append(f"{here}>{there} {sign}{k}.")
        steps.append(f"{here}>{there} {sign}{k} {state}{sign}{k}={after}")
        state = after
    rng.shuffle(clauses)
    question = f"Start {steps[0]}. {' '.join(clauses)} {names[-1]}?"
    return Posed(question, f"{names[-1]} {state}", "; ".join([*steps, f"{names[-1]}?"]))


def _swaps(rng: Random, difficulty: Difficulty) -> Posed:
    """Letters under cups in a row, two places exchanged at a time; `count` + 3 cups."""
    cups = rng.sample(ascii_lowercase, min(26, difficulty.count + 3))
    words, steps = [f"Cups: {' '.join(cups)}."], []
    for _ in range(difficulty.depth):
        i, j = sorted(rng.sample(range(len(cups)), 2))
        cups[i], cups[j] = cups[j], cups[i]
        words.append(f"Swap {i + 1} {j + 1}.")
        steps.append(" ".join(cups))
    return Posed(" ".join(words), " ".join(cups), "; ".join(steps))


CHAINS = [Chain("reasoning.steps", _steps), Chain("reasoning.swaps", _swaps)]
