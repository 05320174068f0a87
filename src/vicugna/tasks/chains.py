"""Our own multi-step families: every single step is easy, and the depth says how many there are."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from vicugna.tasks.task import Difficulty, Item, Posed, draw, final_line, make_item

_LARGEST = 19  # the state of `steps` stays in 0..19, so that one step is a small table
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PAIRS = [a + b for a in _LETTERS for b in _LETTERS if a != b]


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
    """Additions, subtractions and doublings that stay within 0..19, each with a random name.

    The names let a solver find the next step by what stands beside the last, at any depth. The
    answer names the last step too, so that stopping early and guessing scores nothing.
    """
    state = rng.randint(0, _LARGEST)
    words, steps = [f"Start with {state}."], [f"start {state}"]
    for name in rng.sample(_LETTERS if difficulty.depth <= 26 else _PAIRS, difficulty.depth):
        add = [("+", k) for k in range(1, min(9, _LARGEST - state) + 1)]
        subtract = [("-", k) for k in range(1, min(9, state) + 1)]
        double = [("*", 2)] if 0 < 2 * state <= _LARGEST else []
        sign, k = rng.choice(rng.choice([kind for kind in (add, subtract, double) if kind]))
        after = {"+": state + k, "-": state - k, "*": state * k}[sign]
        words.append(f"{name}: {sign}{k}.")
        steps.append(f"{name} {state}{sign}{k}={after}")
        state = after
    return Posed(f"{' '.join(words)} Last step and value?", f"{name} {state}", "; ".join(steps))


def _swaps(rng: Random, difficulty: Difficulty) -> Posed:
    """Letters under cups in a row, two places exchanged at a time; `count` + 3 cups."""
    cups = rng.sample(_LETTERS, min(26, difficulty.count + 3))
    words, steps = [f"Cups: {' '.join(cups)}."], []
    for _ in range(difficulty.depth):
        i, j = sorted(rng.sample(range(len(cups)), 2))
        cups[i], cups[j] = cups[j], cups[i]
        words.append(f"Swap {i + 1} {j + 1}.")
        steps.append(" ".join(cups))
    return Posed(" ".join(words), " ".join(cups), "; ".join(steps))


CHAINS = [Chain("reasoning.steps", _steps), Chain("reasoning.swaps", _swaps)]
