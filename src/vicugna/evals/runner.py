"""Asking every planned question once, and counting every answer.

Each planned item ends as exactly one of four outcomes, and all four are in the denominator:

  right      the reply ended by itself and the task scores it 1
  wrong      the reply ended by itself and the task scores it less
  truncated  the reply was cut at its limit of tokens: it gave no final answer, so it is never
             right, whatever its beginning holds
  error      no reply or no score, because something failed (the prompt exceeds the context, the
             task raised); the message is kept

Only what is no property of an item (no memory, a failing disk, Ctrl-C) ends the evaluation itself;
run again, it goes on where it was. Batches are fixed slices of the plan and a batch is written
whole or redone, so that an evaluation killed anywhere ends in the same bytes.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vicugna import engine, tasks
from vicugna.engine import Sampling
from vicugna.errors import VicugnaError
from vicugna.evals.plan import PlannedItem, plan_digest, slices
from vicugna.evals.results import Results, read_records
from vicugna.files import canonical, digest_of, owned, read_json, storage_error, write_json
from vicugna.tasks import Item, Task

BATCH_TOKENS = 65_536
OwnTasks = Mapping[str, Task] | None


@dataclass(frozen=True)
class Reply:
    """One answer: `text` without `reasoning`; `tokens` counts both. `error` says why there is no
    answer. `prompt_digest` covers the prompt's tokens, so the chat template too."""

    text: str = ""
    reasoning: str | None = None
    tokens: int = 0
    finish_reason: str = ""
    prompt_digest: str = ""
    error: str | None = None


class Local:
    """Answers with a model in this process. The runner uses no more than its `answer` and these:
    `digest`, `precision` (both enter the results' digest) and `platform`, which says where exactly
    the same answers can be expected again."""

    def __init__(self, model: Any) -> None:
        """`model` has network, tokenizer and digest, as vicugna.load and checkpoint.read give."""
        self.network, self.tokenizer, self.digest = model.network, model.tokenizer, model.digest
        if self.tokenizer is None:
            raise VicugnaError("the model has no tokenizer", "evaluation",
                               "Add tokenizer.json to its folder")
        weight = next(self.network.parameters())
        self.precision = str(weight.dtype).removeprefix("torch.")
        chip = (torch.cuda.get_device_name(weight.device) if weight.is_cuda else
                f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
        self.platform = f"{platform.machine()} {chip}, torch {torch.__version__}"

    def answer(self, conversations: Sequence[list[dict[str, str]]],
               samplings: Sequence[Sampling]) -> list[Reply]:
        """A reply to each conversation, in order."""
        prompts = [self.tokenizer.chat(messages) for messages in conversations]
        context = self.network.config.max_position_embeddings
        fitting = [k for k, prompt in enumerate(prompts) if len(prompt) <= context]
        done = self._generate([prompts[k] for k in fitting], [samplings[k] for k in fitting])
        replies = dict(zip(fitting, done, strict=True))
        return [replace(replies.get(k) or Reply(error=f"the prompt has {len(prompt):,} tokens and "
                                                f"the context {context:,}"),
                        prompt_digest=digest_of(prompt)) for k, prompt in enumerate(prompts)]

    def _generate(self, prompts: list[list[int]], samplings: list[Sampling]) -> list[Reply]:
        try:
            done = (engine.generate(self.network, self.tokenizer, prompts, samplings)
                    if prompts else [])
        except Exception as error:
            if len(prompts) == 1:
                return [Reply(error=_items_fault(error))]
            _items_fault(error)
            # One bad prompt must not take its batch with it.
            return [reply for prompt, sampling in zip(prompts, samplings, strict=True)
                    for reply in self._generate([prompt], [sampling])]
        split = [self.tokenizer.split_reasoning(completion.tokens) for completion in done]
        return [Reply(text, reasoning, len(completion.tokens), completion.finish_reason)
                for completion, (reasoning, text) in zip(done, split, strict=True)]


def run(model: Any, plan: Sequence[PlannedItem], folder: str | Path, *, batch_size: int = 32,
        sampling: Sampling | None = None, own_tasks: OwnTasks = None,
        progress: Callable[[int, int], None] | None = None) -> Results:
    """Ask every item of `plan` and write folder/{plan.json, items.jsonl, results.json}.

    `model` is a loaded model, or anything that answers as `Local` does. Greedy unless `sampling`
    says otherwise (max_new_tokens and seed are made per item). `own_tasks` are looked up before
    vicugna.tasks. `progress(done, total)` counts items. Raises VicugnaError when the folder holds
    an evaluation of another model, plan or sampling.
    """
    folder = Path(folder)
    answerer = model if hasattr(model, "answer") else Local(model)
    sampling = sampling or Sampling()
    identity = json.loads(canonical({  # as it will be read back: tuples become lists
        "model_digest": answerer.digest, "plan_digest": plan_digest(plan),
        "precision": answerer.precision, "batch_size": batch_size, "batch_tokens": BATCH_TOKENS,
        "sampling": {k: v for k, v in asdict(sampling).items() if k != "max_new_tokens"}}))
    with owned(folder):
        _claim(folder, identity, plan)
        records, left = _finished(folder / "items.jsonl", slices(plan, batch_size, BATCH_TOKENS))
        for batch in left:
            if progress:
                progress(len(records), len(plan))
            new = ask(answerer, batch, sampling, own_tasks)
            _append(folder / "items.jsonl", new)
            records += new
        if progress:
            progress(len(records), len(plan))
        results = Results.of(identity, records, answerer.platform)
        write_json(folder / "results.json", results.to_dict())
    return results


def ask(answerer: Any, batch: Sequence[PlannedItem], sampling: Sampling,
        own_tasks: OwnTasks = None) -> list[dict[str, Any]]:
    """Ask one batch and score it: a record for each item, in order."""
    made = [make(item, own_tasks) for item in batch]
    asked = [(planned, item) for planned, item in zip(batch, made, strict=True)
             if isinstance(item, Item)]
    answers = answerer.answer([item.messages for _, item in asked], [
        replace(sampling, max_new_tokens=planned.max_new_tokens,
                seed=int(digest_of([sampling.seed, planned.id])[:12], 16))
        for planned, _ in asked])
    replies = iter(answers)
    records = []
    for planned, item in zip(batch, made, strict=True):
        reply = next(replies) if isinstance(item, Item) else Reply(error=item)
        outcome, score, error = judge(item, reply, own_tasks)
        records.append({
            **asdict(planned), "id": planned.id, "outcome": outcome, "score": score,
            "expected": item.answer if isinstance(item, Item) else None, "response": reply.text,
            "reasoning": reply.reasoning, "tokens": reply.tokens, "error": error,
            "finish_reason": reply.finish_reason, "prompt_digest": reply.prompt_digest})
    return records


def make(planned: PlannedItem, own_tasks: OwnTasks = None) -> Item | str:
    """The planned question itself, or the message of what failed while making it.

    Raises VicugnaError when it is not the question that was planned.
    """
    try:
        item = _task(planned.task, own_tasks).item(planned.seed, planned.difficulty)
    except Exception as error:
        return _items_fault(error)
    if digest_of(item.messages) != planned.question_digest:
        raise VicugnaError(f"seed {planned.seed} no longer makes the planned question",
                           f"task {planned.task!r}", "Use the version that made the plan")
    return item


def judge(item: Item | str, reply: Reply, own_tasks: OwnTasks = None
          ) -> tuple[str, float | None, str | None]:
    """(outcome, score, error message) of a reply; the score is None where there is none."""
    if isinstance(item, str) or reply.error is not None:
        return "error", None, reply.error
    if reply.finish_reason == "length":
        return "truncated", None, None
    try:
        score = float(_task(item.task, own_tasks).score(item, reply.text))
        if not 0 <= score <= 1:
            raise ValueError(f"the score {score} is not between 0 and 1")
    except Exception as error:
        return "error", None, _items_fault(error)
    return ("right" if score == 1 else "wrong"), score, None


def _task(name: str, own_tasks: OwnTasks) -> Task:
    return own_tasks[name] if own_tasks and name in own_tasks else tasks.get(name)


def _items_fault(error: Exception) -> str:
    """The message to keep of an item's error. What the machine failed in is raised again: counting
    that as an outcome would freeze it."""
    text = str(error)
    if isinstance(error, MemoryError | OSError | torch.OutOfMemoryError) or any(
            sign in text for sign in ("can't allocate memory", "CUDA error")):
        raise error
    return text if isinstance(error, VicugnaError) else f"{type(error).__name__}: {text}"


def _claim(folder: Path, identity: dict[str, Any], plan: Sequence[PlannedItem]) -> None:
    """Write what will be evaluated before the first token, or check that it is the same."""
    path = folder / "plan.json"
    if not path.exists() and not (folder / "items.jsonl").exists():
        write_json(path, {**identity, "items": [asdict(item) for item in plan]})
    earlier = read_json(path)
    for key, value in identity.items():
        if not isinstance(earlier, dict) or earlier.get(key) != value:
            raise VicugnaError(f"it holds an evaluation with another {key.replace('_', ' ')}",
                               str(folder), "Choose another folder, or remove this one")


def _finished(path: Path, batches: list[list[PlannedItem]]
              ) -> tuple[list[dict[str, Any]], list[list[PlannedItem]]]:
    """The records of finished batches, and the batches left to do.

    A torn line and a part of a batch are cut off the file.
    """
    if not path.exists():
        return [], batches
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        due: list[str] = []
        for done, batch in enumerate(batches):
            if len(due) + len(batch) > sum(line.endswith(b"\n") for line in lines):
                batches = batches[done:]
                break
            due += [item.id for item in batch]
        else:
            batches = []
        os.truncate(path, sum(map(len, lines[:len(due)])))
    except OSError as error:
        raise storage_error(error, path) from error
    records = read_records(path)
    if [record["id"] for record in records] != due:
        raise VicugnaError("its items are not the planned ones", str(path),
                           "Remove the results folder and run again")
    return records, batches


def _append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    try:
        with open(path, "ab") as file:
            file.write(b"".join(canonical(record) + b"\n" for record in records))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(error, path) from error
