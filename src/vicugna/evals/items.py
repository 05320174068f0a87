"""A user's own questions: one JSON object a line.

    {"messages": [{"role": "user", "content": "..."}], "answers": ["Paris"], "task": "capitals"}
    {"prompt": "Who signed it?", "context_file": "contract.txt", "answers": ["Ann Lee", "A. Lee"]}

`context_file` (a path beside the JSONL file) is put before the last message. Any of the `answers`
counts, as the whole reply or as words within it; case, white space and punctuation at the ends do
not matter. `task` names the row of the table. Items with one context file share a cluster.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vicugna.errors import VicugnaError
from vicugna.evals.plan import PlannedItem, in_order, planned
from vicugna.files import canonical, storage_error
from vicugna.tasks import Difficulty, Item
from vicugna.tokenizer import Tokenizer, check_messages

NAME = "items"


class UserItems:
    """The lines of a JSONL file as a task, an item's seed being its index."""

    name = NAME

    def __init__(self, path: str | Path) -> None:
        """Raises VicugnaError naming the line that is wrong."""
        path = Path(path)
        self.groups: list[str] = []
        self.items: list[Item] = []
        for number, line in enumerate(_text(path, str(path)).split("\n"), start=1):
            if line.strip():
                where = f"{path} line {number}"
                content = _object(line, where)
                self.groups.append(_string(content.get("task", NAME), "task", where))
                self.items.append(_item(content, len(self.items), path.parent, where))
        if not self.items:
            raise VicugnaError("no items", str(path), "Write one JSON object a line")

    def item(self, seed: int, difficulty: Difficulty) -> Item:
        return self.items[seed]

    def score(self, item: Item, response: str) -> float:
        """1.0 if any answer is the response, or stands in it as words or a number of its own."""
        given = _plain(response)
        return float(any(
            re.search(rf"(?<![\w-])(?<!\d[.,]){re.escape(_plain(answer))}(?!\w|[.,]\d)", given)
            for answer in item.metadata["answers"]))


def plan_items(path: str | Path, tokenizer: Tokenizer, max_new_tokens: int = 128
               ) -> tuple[list[PlannedItem], UserItems]:
    """Plan all items of a user's file; the task goes to run(own_tasks={task.name: task})."""
    task = UserItems(path)
    return in_order(planned(group, item, max_new_tokens, tokenizer)
                    for group, item in zip(task.groups, task.items, strict=True)), task


def _item(content: dict[str, Any], index: int, folder: Path, where: str) -> Item:
    if ("messages" in content) == ("prompt" in content):
        raise VicugnaError("it needs messages or prompt, one of them", where, "Correct the line")
    messages = content.get("messages", [{"role": "user", "content": content.get("prompt")}])
    check_messages(messages, where)
    if messages[-1]["role"] == "assistant":
        raise VicugnaError("the last message is the assistant's", where, "End with a question")
    answers = content.get("answers")
    if not isinstance(answers, list) or not answers or not all(
            _plain(_string(answer, "an answer", where)) for answer in answers):
        raise VicugnaError("answers is not a list of texts with words in them", where,
                           'Write "answers": ["..."]')
    metadata: dict[str, Any] = {"answers": answers}
    if "context_file" in content:
        metadata["cluster"] = _string(content["context_file"], "context_file", where)
        text = _text(folder / metadata["cluster"], where)
        messages[-1]["content"] = f"{text}\n\n{messages[-1]['content']}"
    solution = {"role": "assistant", "content": answers[0]}
    return Item(NAME, index, Difficulty(), messages, answers[0], solution, metadata)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
        canonical(content)  # refuses what has no UTF-8 form
    except (ValueError, RecursionError) as error:
        raise VicugnaError(f"not valid JSON: {error}", where, "Correct the line") from error
    if not isinstance(content, dict):
        raise VicugnaError("not a JSON object", where, 'Write {"prompt": ..., "answers": [...]}')
    return content


def _string(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise VicugnaError(f"{key} is not a text", where, "Write it in quotation marks")
    return value


def _text(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise VicugnaError(f"{path.name} is not UTF-8 text (byte {error.start})", where,
                           "Save it as UTF-8") from error
    except OSError as error:
        problem = storage_error(error, path)
        raise VicugnaError(f"{path.name}: {problem.what}", where, problem.fix) from error


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*()[]")
