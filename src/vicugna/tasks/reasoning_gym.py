"""reasoning-gym's datasets as tasks `reasoning_gym.NAME`, where that package is installed.

Source: Stojanovski et al. 2025, "Reasoning Gym", https://github.com/open-thought/reasoning-gym.
Many of its verifiers (version 0.1.25) cannot be used for reward or evaluation: some evaluate the
reply as code; others give full marks to the right answer with any text around it, to another within
a tolerance, to `nan`, or to whatever is not empty. So a reply must be the dataset's answer, to the
character. Where several answers are right, the verifier decides if it is one of `_VERIFIERS`, which
were read and attacked; other datasets are refused.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from vicugna.errors import VicugnaError, did_you_mean
from vicugna.tasks.task import Difficulty, Item, Problem, lines_of, make_item, rejection_sample

PREFIX = "reasoning_gym."
_SIZE = 10_000  # instances of a dataset at one difficulty; some make all of them at the start

REFUSED = {
    "bf": "it prints to standard output",
    "boxnet": "it has no answer to teach, and any JSON object that moves boxes gets marks",
    "codeio": "it runs the programs of its data set in this process",
    "composite": "it is made of other datasets",
    "countdown": "its verifier evaluates the reply as code",
    "graph_color": "it has no answer to teach",
    "intermediate_integration": "its verifier evaluates the reply as code",
    "isomorphic_strings": "its instances depend on Python's hash seed",
    "knight_swap": "its curriculum gives settings that it refuses itself",
    "list_functions": "an instance changes from call to call",
    "n_queens": "its verifier evaluates the reply as code",
    "polynomial_multiplication": "its verifier evaluates the reply as code",
    "propositional_logic": "it has no answer to teach, and a premise repeated gets full marks",
    "puzzle24": "its verifier evaluates the reply as code, and accepts other numbers than given",
    "ransom_note": "its instances depend on Python's hash seed",
    "rubiks_cube": "its verifier repeats a move as often as the reply says, without a limit",
    "rush_hour": "it has no answer to teach",
    "simple_integration": "its verifier evaluates the reply as code",
    "sokoban": "its verifier takes minutes for some replies",
    "tower_of_hanoi": "its verifier prints to standard output",
    "word_ladder": "its size changes while items are drawn",
}
_VERIFIERS = frozenset((
    "cryptarithm", "group_anagrams", "jugs", "kakurasu", "palindrome_generation",
    "palindrome_partitioning", "quantum_lock", "shortest_path"))


def _package() -> Any:
    """The package; its import takes two seconds (it loads sympy), so it waits for the first use."""
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise VicugnaError(
            f"the package reasoning-gym cannot be imported ({error})", PREFIX.rstrip("."),
            "Run: pip install 'vicugna[reasoning-gym]'. It needs a C compiler and Python's headers "
            "(Debian: apt-get install gcc python3-dev)") from error
    return factory


def find(name: str) -> "ReasoningGym":
    """The task named `reasoning_gym.NAME`. Raises VicugnaError for an unknown or refused one."""
    dataset = name.removeprefix(PREFIX)
    if dataset in REFUSED:
        raise VicugnaError(f"this dataset is not offered: {REFUSED[dataset]}", name,
                           "Use another one")
    known = [PREFIX + known for known in _package().DATASETS if known not in REFUSED]
    if name not in known:
        raise VicugnaError(f"no task {name!r}", "tasks", did_you_mean(name, known))
    return ReasoningGym(name)


@dataclass(frozen=True)
class ReasoningGym:
    """One dataset. `difficulty.depth` is the level of its curriculum, from 1; deeper than its last
    level, or where there is no curriculum, changes nothing."""

    name: str

    def item(self, seed: int, difficulty: Difficulty) -> Item:
        """metadata: "index", the instance's place in the dataset of seed 0 at this level."""
        data = _dataset(self.name, difficulty.depth)

        def generate(rng: Random) -> tuple[Problem, int]:
            index = rng.randrange(_SIZE)
            entry = data[index]
            return Problem(entry["question"], entry["answer"], ""), index

        (problem, index), _ = rejection_sample(self.name, seed, difficulty, generate,
                                               lambda candidate: candidate[0].question)
        return make_item(self.name, seed, difficulty, problem, {"index": index})

    def score(self, item: Item, response: str) -> float:
        """1.0 when the last lines, as many as the answer has, are right; no partial marks."""
        wanted = lines_of(item.answer)
        given = lines_of(response)[-len(wanted):]
        if given == wanted or self.name.removeprefix(PREFIX) not in _VERIFIERS:
            return float(given == wanted)
        answer = "\n".join(given)
        if len(answer) <= 2 * len(item.answer) + 100:
            data = _dataset(self.name, item.difficulty.depth)
            with suppress(Exception):  # what it raises on malformed replies is of many kinds
                return float(data.score_answer(answer, data[item.metadata["index"]]) == 1.0)
        return 0.0


@lru_cache(maxsize=256)
def _dataset(name: str, depth: int) -> Any:
    """A dataset whose instances are pure functions of their index. Raises VicugnaError for a level
    whose settings the dataset itself refuses."""
    factory, dataset = _package(), name.removeprefix(PREFIX)
    settings = {"seed": 0, "size": _SIZE}
    if not factory.has_curriculum(dataset):
        return factory.create_dataset(dataset, **settings)
    curriculum = factory.create_curriculum(dataset)
    curriculum.set_global_level(depth - 1)
    try:
        return factory.DATASETS[dataset][0](curriculum.generate_configuration(settings))
    except AssertionError as error:
        raise VicugnaError(f"it refuses its own settings at depth {depth} ({error})", name,
                           "Use a smaller depth") from error
