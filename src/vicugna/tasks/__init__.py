"""Procedural tasks: one protocol for training data, reward and evaluation."""

from difflib import get_close_matches

from vicugna.errors import VicugnaError
from vicugna.tasks.chains import CHAINS
from vicugna.tasks.reasoning import FAMILIES
from vicugna.tasks.retrieval import RETRIEVAL
from vicugna.tasks.task import SPLITS, Difficulty, Item, Task, split_of, split_seed

__all__ = ["SPLITS", "TASKS", "Difficulty", "Item", "Task", "get", "split_of", "split_seed"]

_ALL: list[Task] = [*RETRIEVAL, *FAMILIES, *CHAINS]
TASKS = {task.name: task for task in _ALL}


def get(name: str) -> Task:
    """The task of that name. Raises VicugnaError naming the nearest right one."""
    if name not in TASKS:
        nearest = get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise VicugnaError(f'no task "{name}"', "tasks", f'Did you mean "{nearest}"?')
    return TASKS[name]
