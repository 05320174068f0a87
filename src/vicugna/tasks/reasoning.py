"""Multi-step reasoning: each step is easy, and `difficulty.depth` sets how many there are.

chain_sum, number_sorting, number_filtering, spell_backward and word_sequence_reversal are families
of reasoning-gym (Stojanovski et al. 2025) with generators, worked solutions and exact verifiers of
our own; the package itself is an extra (tasks/reasoning_gym.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_letters, ascii_lowercase

from vicugna.tasks.task import Difficulty, Item, Problem, final_line, make_item, rejection_sample
from vicugna.tasks.words import COMMON_WORDS, pseudoword

_LARGEST = 19  # the state of `steps` stays in 0..19, so that one step is a small table
_PAIRS = [a + b for a in ascii_letters for b in ascii_letters if a != b]


@dataclass(frozen=True)
class Reasoning:
    """A family of problems; `generate` returns None for a candidate to be discarded."""

    name: str
    generate: Callable[[Random, Difficulty], Problem | None]

    def item(self, seed: int, difficulty: Difficulty) -> Item:
        problem, _ = rejection_sample(
            self.name, seed, difficulty, lambda rng: self.generate(rng, difficulty),
            lambda problem: problem.question)
        return make_item(self.name, seed, difficulty, problem, {})

    def score(self, item: Item, response: str) -> float:
        """1.0 when the last line is the answer, to the character; white space does not matter."""
        return float(final_line(response) == item.answer)


def _steps(rng: Random, difficulty: Difficulty) -> Problem:
    """Additions, subtractions and doublings that stay within 0..19, listed in random order.

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
    return Problem(question, f"{names[-1]} {state}", "; ".join([*steps, f"{names[-1]}?"]))


def _swaps(rng: Random, difficulty: Difficulty) -> Problem:
    """Letters under cups in a row, two places exchanged at a time; `count` + 3 cups."""
    cups = rng.sample(ascii_lowercase, min(26, difficulty.count + 3))
    sentences, steps = [f"Cups: {' '.join(cups)}."], []
    for _ in range(difficulty.depth):
        i, j = sorted(rng.sample(range(len(cups)), 2))
        cups[i], cups[j] = cups[j], cups[i]
        sentences.append(f"Swap {i + 1} {j + 1}.")
        steps.append(" ".join(cups))
    return Problem(" ".join(sentences), " ".join(cups), "; ".join(steps))


def _chain_sum(rng: Random, difficulty: Difficulty) -> Problem | None:
    """Terms added and subtracted from left to right, never below zero. All terms of one sum have
    the same number of digits, at most `count`."""
    digits = rng.randint(1, max(1, difficulty.count))
    low, high = 10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1
    total = rng.randint(low, high)
    parts, steps = [str(total)], []
    for _ in range(difficulty.depth + 1):
        sign, term = rng.choice("+-"), rng.randint(low, high)
        after = total + term if sign == "+" else total - term
        if after < 0:
            return None
        parts += [sign, str(term)]
        steps.append(f"{total}{sign}{term}={after}")
        total = after
    return Problem(f"Compute {' '.join(parts)}.", str(total), "; ".join(steps))


def _numbers(rng: Random, difficulty: Difficulty) -> list[int]:
    return [rng.randint(0, 99) for _ in range(difficulty.depth + 2)]


def _number_sorting(rng: Random, difficulty: Difficulty) -> Problem:
    """Selection sort: each step names the next number and what is left."""
    numbers = _numbers(rng, difficulty)
    direction = rng.choice(["ascending", "descending"])
    rest, steps = list(numbers), []
    for number in sorted(numbers, reverse=direction == "descending"):
        rest.remove(number)
        steps.append(" ".join([str(number), "|", *map(str, rest)]).rstrip(" |"))
    answer = " ".join(step.split()[0] for step in steps)
    return Problem(f"Sort {direction}: {' '.join(map(str, numbers))}", answer, "; ".join(steps))


def _number_filtering(rng: Random, difficulty: Difficulty) -> Problem:
    """Each step says of one number whether it stays; the empty list is "none"."""
    numbers = _numbers(rng, difficulty)
    bound = round(rng.uniform(min(numbers), max(numbers)))
    verb, than = rng.choice(["Keep", "Remove"]), rng.choice(["larger", "smaller"])
    steps, answer = [], []
    for number in numbers:
        matches = number > bound if than == "larger" else number < bound
        stays = matches == (verb == "Keep")
        steps.append(f"{number} {'yes' if stays else 'no'}")
        answer += [str(number)] * stays
    question = f"{verb} numbers {than} than {bound}: {' '.join(map(str, numbers))}"
    return Problem(question, " ".join(answer) or "none", "; ".join(steps))


def _reversal(instruction: str, parts: list[str]) -> Problem:
    """Each step numbers one part, from the first; the answer is all of them from the last."""
    steps = " ".join(f"{i} {part}" for i, part in enumerate(parts, 1))
    return Problem(f"{instruction}: {' '.join(parts)}", " ".join(parts[::-1]), steps)


def _spell_backward(rng: Random, difficulty: Difficulty) -> Problem:
    """Pseudowords, as a list of real ones has too few of each length to keep four splits apart."""
    return _reversal("Spell backward", list(pseudoword(rng, difficulty.depth + 2)))


def _word_sequence_reversal(rng: Random, difficulty: Difficulty) -> Problem:
    return _reversal("Reverse the words", rng.choices(COMMON_WORDS, k=difficulty.depth + 2))


REASONING = [
    Reasoning("reasoning.steps", _steps),
    Reasoning("reasoning.swaps", _swaps),
    Reasoning("reasoning.chain_sum", _chain_sum),
    Reasoning("reasoning.number_sorting", _number_sorting),
    Reasoning("reasoning.number_filtering", _number_filtering),
    Reasoning("reasoning.spell_backward", _spell_backward),
    Reasoning("reasoning.word_sequence_reversal", _word_sequence_reversal),
]
