"""Long-context retrieval: needles, competing keys, variable tracking (RULER) and hash hop (Magic).

Every item is a haystack with statements hidden in it and one question at the end. Only the
statements that lead to the answer decide an item's split; distractors and filler are generated
after they were accepted, in one pass, so that ten million characters cost seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random

from vicugna.errors import VicugnaError
from vicugna.tasks.task import Difficulty, Item, Problem, final_line, make_item, rejection_sample
from vicugna.tasks.words import ADJECTIVES, NOUNS, filler, made_up_names, name_syllables


@dataclass(frozen=True)
class Query:
    """A question and the statements that answer it; `statements[0]`, the needle, holds the answer
    and stands at the position of the difficulty."""

    statements: list[str]
    names: list[str]
    question: str
    answer: str
    reasoning: str = ""


@dataclass(frozen=True)
class Retrieval:
    """A retrieval task: `query` generates a candidate, `distractors` statements of the same form
    about other names, given how many characters are still to be filled."""

    name: str
    query: Callable[[Random, Difficulty], Query]
    distractors: Callable[[Random, Difficulty, Query, int], list[str]]

    def item(self, seed: int, difficulty: Difficulty) -> Item:
        """The question's length is `difficulty.length` characters to a few percent, or as short as
        its statements allow. metadata: "needle" (statement with the answer), "position" (0..1)."""
        query, rng = rejection_sample(
            self.name, seed, difficulty, lambda rng: self.query(rng, difficulty),
            lambda query: " ".join([*query.statements, query.question]))
        left = difficulty.length - len(query.question) - _joined(query.statements)
        distractors = self.distractors(rng, difficulty, query, left)
        prose = filler(rng, left - _joined(distractors))
        haystack = _scatter(rng, prose, distractors + query.statements[1:])
        text, position = _insert(rng, haystack, query.statements[0], difficulty.position)
        problem = Problem(f"{text}\n{query.question}", query.answer, query.reasoning)
        return make_item(self.name, seed, difficulty, problem,
                         {"needle": query.statements[0], "position": position})

    def score(self, item: Item, response: str) -> float:
        """1.0 when the last line is the answer; white space and a full stop do not matter."""
        return float(final_line(response).replace(" ", "").rstrip(".") == item.answer)


def _joined(sentences: list[str]) -> int:
    """How many characters sentences take, each with a space."""
    return sum(map(len, sentences)) + len(sentences)


def _scatter(rng: Random, prose: list[str], statements: list[str]) -> list[str]:
    """Statements in random order at random places between the sentences of the prose."""
    shuffled = rng.sample(statements, len(statements))
    slots = sorted(rng.choices(range(len(prose) + 1), k=len(shuffled)))
    merged: list[str] = []
    start = 0
    for slot, statement in zip(slots, shuffled, strict=True):
        merged += prose[start:slot]
        merged.append(statement)
        start = slot
    return merged + prose[start:]


def _insert(rng: Random, haystack: list[str], needle: str, position: float | None
            ) -> tuple[str, float]:
    """The text with the needle in it, and where (0..1 of the haystack's characters) it stands."""
    wanted = rng.random() if position is None else position
    starts = [0, *accumulate(len(sentence) + 1 for sentence in haystack)]
    index = min(range(len(starts)), key=lambda i: (abs(starts[i] - wanted * starts[-1]), -i))
    text = " ".join([*haystack[:index], needle, *haystack[index:]])
    return text, starts[index] / starts[-1] if starts[-1] else wanted


# Needles: "The code of amber falcon is 4815."


def _digits(rng: Random) -> str:
    return f"{rng.randrange(10_000):04d}"


def _key(number: int) -> str:
    adjective, noun = divmod(number, len(NOUNS))
    return f"{ADJECTIVES[adjective]} {NOUNS[noun]}"


def _code(key: str, value: str) -> str:
    return f"The code of {key} is {value}."


def _query_code(rng: Random, difficulty: Difficulty) -> Query:
    key, value = _key(rng.randrange(len(ADJECTIVES) * len(NOUNS))), _digits(rng)
    return Query([_code(key, value)], [key], f"What is the code of {key}?", value)


def _other_codes(rng: Random, difficulty: Difficulty, query: Query, left: int) -> list[str]:
    """`count` other codes; up to half of them share a word with the key that is asked for."""
    total = len(ADJECTIVES) * len(NOUNS)
    if difficulty.count >= total:
        raise VicugnaError(f"count is {difficulty.count}", "retrieval.keys", f"Stay below {total}")
    adjective, noun = query.names[0].split()
    near = [f"{a} {noun}" for a in ADJECTIVES] + [f"{adjective} {n}" for n in NOUNS]
    chosen = dict.fromkeys([query.names[0], *rng.sample(near, min(difficulty.count // 2, 99))])
    numbers = rng.sample(range(total), min(total, difficulty.count + len(chosen)))
    chosen |= dict.fromkeys(map(_key, numbers))
    return [_code(key, _digits(rng)) for key in list(chosen)[1 : difficulty.count + 1]]


# Variables: "Let kora be 4815. Let mipu be kora."


def _other_chains(rng: Random, query: Query, n: int) -> list[list[str]]:
    """`n` chains of names, as many and as wide as the query's and different from them."""
    links, taken = len(query.names), set(query.names)
    names = made_up_names(rng, (n + 1) * links, len(query.names[0]) // 2)
    fresh = [name for name in names if name not in taken]
    return [fresh[i * links : (i + 1) * links] for i in range(n)]


def _tracking(names: list[str], value: str) -> list[str]:
    return [f"Let {b} be {a}." for a, b in pairwise([value, *names])]


def _query_variable(rng: Random, difficulty: Difficulty) -> Query:
    wanted = (difficulty.count + 1) * (difficulty.depth + 1)
    names = made_up_names(rng, difficulty.depth + 1, name_syllables(wanted))
    value = _digits(rng)
    steps = "; ".join(f"{a} = {b}" for a, b in pairwise([*reversed(names), value]))
    question = f"What is the value of {names[-1]}?"
    return Query(_tracking(names, value), names, question, value, steps)


def _other_variables(rng: Random, difficulty: Difficulty, query: Query, left: int) -> list[str]:
    """`count` other chains of the same depth."""
    return [statement for names in _other_chains(rng, query, difficulty.count)
            for statement in _tracking(names, _digits(rng))]


# Hash hop: "kora = mipu." pairs fill the whole text


def _pairs(names: list[str]) -> list[str]:
    return [f"{a} = {b}." for a, b in pairwise(names)]


def _query_hops(rng: Random, difficulty: Difficulty) -> Query:
    # A pair takes some 13 characters, and a chain has one name more than it has pairs.
    wanted = difficulty.length // 6 + (difficulty.count + 1) * (difficulty.depth + 1)
    names = made_up_names(rng, difficulty.depth + 1, name_syllables(wanted))
    times = "1 time" if difficulty.depth == 1 else f"{difficulty.depth} times"
    hops = _pairs(names)
    question = f"Hop {times} from {names[0]}."
    steps = "; ".join(pair[:-1] for pair in hops)
    return Query(hops[::-1], names, question, names[-1], steps)


def _other_hops(rng: Random, difficulty: Difficulty, query: Query, left: int) -> list[str]:
    """Chains of the same depth that fill the length, and at least `count` of them."""
    n = max(difficulty.count * difficulty.depth, left // (len(query.statements[0]) + 1))
    chains = _other_chains(rng, query, -(-n // difficulty.depth))
    return [pair for names in chains for pair in _pairs(names)][:n]


RETRIEVAL = [
    Retrieval("retrieval.single", _query_code, lambda rng, difficulty, query, left: []),
    Retrieval("retrieval.keys", _query_code, _other_codes),
    Retrieval("retrieval.variables", _query_variable, _other_variables),
    Retrieval("retrieval.hashhop", _query_hops, _other_hops),
]
