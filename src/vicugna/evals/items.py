"""A user's own questions: rows of a file, such as one JSON object a line.

    {"messages": [{"role": "user", "content": "..."}], "answers": ["Paris"], "task": "capitals"}
    {"prompt": "Who signed it?", "context_file": "contract.txt", "answers": ["Ann Lee", "A. Lee"]}

`context_file` (a path beside the file) is put before the last message. Any of the `answers`
counts, by the rule of matching.py. `task` names the row of the table. Items with one context file
share a cluster.
"""

from datetime import date as Date
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from vicugna.chat import check_messages
from vicugna.data.formats import json_lines, rows
from vicugna.errors import VicugnaError
from vicugna.evals.matching import matches
from vicugna.evals.plan import Plan, plan_item, sort_plan
from vicugna.files import canonical, read_text
from vicugna.tasks import Difficulty, Item
from vicugna.tokenizer import Tokenizer


class Question(BaseModel):
    messages: list[Any] | None = None
    prompt: str | None = None
    answers: list[str] = Field(min_length=1)
    context_file: str = ""
    task: str = "items"


class UserItems:
    """A file's questions as a task; a seed is an index. VicugnaError names a wrong line."""

    name = "items"

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        given = rows(path, lambda columns: columns) or json_lines(path)
        self.items = [_item(row, index, path, where) for index, (where, row) in enumerate(given)]
        if not self.items:
            raise VicugnaError("no items", str(path), "Write one JSON object a line")

    def item(self, seed: int, difficulty: Difficulty) -> Item:
        return self.items[seed]

    def score(self, item: Item, response: str) -> float:
        """1.0 if the response gives any of the answers (matching.py), else 0.0."""
        return float(any(matches(answer, response) for answer in item.metadata["answers"]))


def plan_items(path: str | Path, tokenizer: Tokenizer, date: Date, max_new_tokens: int = 128
               ) -> tuple[Plan, UserItems]:
    """Plan all items of a user's file; the task goes to run(own_tasks={task.name: task})."""
    task = UserItems(path)
    return sort_plan((plan_item(item.metadata["group"], item, max_new_tokens, tokenizer, date)
                      for item in task.items), date), task


def _item(row: dict[str, Any], index: int, path: Path, where: str) -> Item:
    try:
        canonical(row)  # refuses what has no UTF-8 form
        asked = Question.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        raise VicugnaError(" ".join([*map(str, first["loc"]), first["msg"].lower()]), where,
                           'Write {"prompt": "...", "answers": ["..."]}') from error
    except ValueError as error:
        raise VicugnaError(f"not valid JSON: {error}", where, "Correct the line") from error
    if (asked.messages is None) == (asked.prompt is None):
        raise VicugnaError("it needs messages or prompt, one of them", where, "Correct the line")
    if not all(map(str.strip, asked.answers)):
        raise VicugnaError("an answer is empty", where, 'Write "answers": ["..."]')
    messages = asked.messages or [{"role": "user", "content": asked.prompt}]
    check_messages(messages, where, images=False)
    if messages[-1]["role"] == "assistant":
        raise VicugnaError("the last message is the assistant's", where, "End with a question")
    if asked.context_file:
        try:
            text = read_text(path.parent / asked.context_file)
        except VicugnaError as error:
            raise VicugnaError(f"{asked.context_file}: {error.what}", where, error.fix) from error
        content = messages[-1]["content"]
        messages[-1]["content"] = f"{text}\n\n{content}" if isinstance(content, str) else [
            {"type": "text", "text": f"{text}\n\n"}, *content]
    solution = {"role": "assistant", "content": asked.answers[0]}
    return Item(UserItems.name, index, Difficulty(), messages, asked.answers[0], solution,
                {"answers": asked.answers, "group": asked.task, "cluster": asked.context_file,
                 "where": where.removeprefix(f"{path} ")})
