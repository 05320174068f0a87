"""Procedural tasks: one protocol for training data, reward and evaluation."""

from vicugna.errors import VicugnaError, did_you_mean
from vicugna.tasks import reasoning_gym
from vicugna.tasks.reasoning import REASONING
from vicugna.tasks.retrieval import RETRIEVAL
from vicugna.tasks.task import SPLITS, Difficulty, Item, Task, split_of, split_seed

__all__ = ["SPLITS", "TASKS", "Difficulty", "Item", "Task", "get", "is_builtin", "split_of",
           "split_seed"]

_ALL: list[Task] = [*RETRIEVAL, *REASONING]
TASKS = {task.name: task for task in _ALL}


def is_builtin(name: str) -> bool:
    """Whether `name` is that of a task here, whose items anybody can generate again."""
    return name in TASKS or name.startswith(reasoning_gym.PREFIX)


def get(name: str) -> Task:
    """The task of that name. Raises VicugnaError naming the nearest right one."""
    if name.startswith(reasoning_gym.PREFIX):
        return reasoning_gym.find(name)
    if name not in TASKS:
        raise VicugnaError(f"no task {name!r}", "tasks", did_you_mean(name, TASKS))
    return TASKS[name]
