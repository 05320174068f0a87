"""Runs a planned evaluation: every item is asked once and counted.

Each planned item ends as exactly one of four outcomes, all of them in the denominator: right (the
reply ended by itself and the task scores it 1), wrong (it scores less), truncated (it reached
max_new_tokens: never right, whatever it contains) and error (no reply or no score,
because something failed, such as a chat that the template refuses; the message is recorded).

Only failures of the machine (out of memory, a full disk, Ctrl-C) end the evaluation. Run again, it
resumes: a batch, a fixed slice of the plan, is given to the engine at once, and written whole or
repeated, so that an evaluation killed anywhere ends in the same bytes. So does one shared by
several ranks: they take batches in turn (round robin), and the first gathers and writes the
records.
"""

import json
import os
import platform
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import date as Date
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from vicugna import chat, engine, tasks
from vicugna.distributed import Ranks
from vicugna.dtypes import name_of
from vicugna.engine import Sampling
from vicugna.errors import VicugnaError
from vicugna.evals.plan import Plan, PlannedItem, split_batches
from vicugna.evals.results import Results, read_records
from vicugna.files import canonical, digest_of, disk_errors, owned, read_json, write_json
from vicugna.tasks import Item, Task

BATCH_TOKENS, GREEDY = 1_048_576, Sampling()
Tasks = Mapping[str, Task]
FindTask = Callable[[str], Task]


@dataclass(frozen=True)
class Reply:
    """A reply: `response` without `reasoning`; `tokens` counts both. `error` says why there is
    none. `prompt_digest` is that of the prompt's tokens, which covers the chat template too."""

    response: str = ""
    reasoning: str | None = None
    tokens: int = 0
    finish_reason: str = ""
    prompt_digest: str = ""
    error: str | None = None


class LocalModel:
    """Replies of a loaded model. The runner uses only `answer`, `digest`, `precision` and
    `platform`: replies are reproducible to the token on the same platform."""

    def __init__(self, model: Any, date: Date) -> None:
        self.network, self.tokenizer, self.digest = model.network, model.tokenizer, model.digest
        self.date = date
        if self.tokenizer is None or self.tokenizer.template is None:
            raise VicugnaError("the model has no tokenizer or no chat template", "evaluation",
                               "Add tokenizer.json and chat_template.jinja to its folder")
        weight = next(self.network.parameters())
        self.precision = name_of(weight.dtype)
        chip = (torch.cuda.get_device_name(weight.device) if weight.is_cuda else
                f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
        self.platform = f"{platform.machine()} {chip}, torch {torch.__version__}"

    def answer(self, conversations: Sequence[list[dict[str, str]]],
               samplings: Sequence[Sampling]) -> list[Reply]:
        """A reply to each conversation, in order."""
        prompts = list(map(self._prompt, conversations))
        replies = iter(self._generate([
            (prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)
            if not isinstance(prompt, Reply)]))
        return [prompt if isinstance(prompt, Reply) else
                replace(next(replies), prompt_digest=digest_of(prompt)) for prompt in prompts]

    def _prompt(self, messages: list[dict[str, str]]) -> list[int] | Reply:
        """The prompt's tokens, or the error of a chat that the template or the context refuses."""
        try:
            tokens = chat.encode(self.tokenizer, messages, date=self.date)
        except Exception as error:
            return Reply(error=_item_error(error))
        context = self.network.config.context_length
        return tokens if len(tokens) <= context else Reply(
            error=f"the prompt has {len(tokens):,} tokens and the context {context:,}",
            prompt_digest=digest_of(tokens))

    def _generate(self, requests: list[tuple[list[int], Sampling]]) -> list[Reply]:
        try:
            done = engine.generate(self.network, self.tokenizer, [prompt for prompt, _ in requests],
                                   [sampling for _, sampling in requests])
        except Exception as error:
            message = _item_error(error)
            if len(requests) == 1:
                return [Reply(error=message)]
            # One invalid prompt must not fail the whole batch.
            return [reply for one in requests for reply in self._generate([one])]
        return [Reply(text, reasoning, len(one.tokens), one.finish_reason)
                for one, (prompt, _) in zip(done, requests, strict=True)
                for reasoning, text in [chat.parse_reply(self.tokenizer, one.tokens, prompt)]]


def run(model: Any, plan: Plan, folder: str | Path, *, batch_size: int = 32,
        sampling: Sampling = GREEDY, own_tasks: Tasks | None = None, ranks: Ranks = Ranks(),
        progress: Callable[[int, int], None] = lambda done, total: None) -> Results:
    """Ask every item of `plan` and write folder/{plan.json, items.jsonl, results.json}.

    `model` is a loaded one, or anything with the interface of `LocalModel`; max_new_tokens and
    seed are set per item; `own_tasks` take precedence over vicugna.tasks; `progress(done, total)`
    counts items. All `ranks` call it and share the batches; the first writes the files.
    Raises VicugnaError when the folder holds another evaluation.
    """
    def find(name: str) -> Task:
        return (own_tasks or {}).get(name) or tasks.get(name)

    folder, path = Path(folder), Path(folder) / "items.jsonl"
    answerer = model if hasattr(model, "answer") else LocalModel(model, plan.date)
    identity = json.loads(canonical({  # as it will be read back: tuples become lists
        "model_digest": answerer.digest, "plan_digest": plan.digest,
        "date": plan.date.isoformat(), "precision": answerer.precision, "batch_size": batch_size,
        "batch_tokens": BATCH_TOKENS,
        "sampling": {k: v for k, v in asdict(sampling).items() if k != "max_new_tokens"}}))
    platforms = "; ".join(sorted(set(ranks.gather(answerer.platform))))
    batches = split_batches(plan.items, batch_size, BATCH_TOKENS)
    with owned(folder) if ranks.first else nullcontext():
        records, done = ranks.gather(
            _start(folder, identity, plan, batches) if ranks.first else ([], 0))[0]
        progress(len(records), len(plan.items))
        for start in range(done, len(batches), ranks.world):
            own = next(iter(batches[start + ranks.rank:]), [])
            parts = ranks.gather(run_batch(answerer, own, sampling, find))
            new = [record for part in parts for record in part]
            if ranks.first:
                with disk_errors(path), open(path, "ab") as file:
                    file.write(b"".join(canonical(record) + b"\n" for record in new))
                    file.flush()
                    os.fsync(file.fileno())
            records += new
            progress(len(records), len(plan.items))
        results = Results.of(identity, records, platforms)
        if ranks.first:
            write_json(folder / "results.json", results.to_dict())
    return results


def run_batch(answerer: Any, batch: Sequence[PlannedItem], sampling: Sampling,
              find: FindTask = tasks.get) -> list[dict[str, Any]]:
    """Ask and score one batch of items: a record per item, in order."""
    items = [make_item(planned, find) for planned in batch]
    requests = [(item.messages, replace(
        sampling, max_new_tokens=planned.max_new_tokens,
        seed=int(digest_of([sampling.seed, planned.id])[:12], 16)))
        for planned, item in zip(batch, items, strict=True) if isinstance(item, Item)]
    replies = iter(answerer.answer([one for one, _ in requests], [one for _, one in requests]))
    records = []
    for planned, item in zip(batch, items, strict=True):
        reply, expected = (next(replies), item.answer) if isinstance(item, Item) else (
            Reply(error=item), None)
        if reply.error and isinstance(item, Item) and "where" in item.metadata:
            reply = replace(reply, error=f"{item.metadata['where']}: {reply.error}")
        records.append({**asdict(planned), "id": planned.id, "expected": expected,
                        **asdict(reply), **score_reply(item, reply, find)})
    return records


def make_item(planned: PlannedItem, find: FindTask = tasks.get) -> Item | str:
    """The item, or the error of generating it; VicugnaError if it is not the planned one."""
    try:
        item = find(planned.task).item(planned.seed, planned.difficulty)
    except Exception as error:
        return _item_error(error)
    if digest_of(item.messages) != planned.question_digest:
        raise VicugnaError(f"seed {planned.seed} no longer gives the planned item",
                           f"task {planned.task!r}", "Use the version that made the plan")
    return item


def score_reply(item: Item | str, reply: Reply, find: FindTask = tasks.get) -> dict[str, Any]:
    """A reply's outcome, score and error message; None for a score or an error that is missing."""
    outcome, score, message = "error", None, reply.error
    if reply.finish_reason == "length":
        outcome = "truncated"
    elif message is None and isinstance(item, Item):
        try:
            score = float(find(item.task).score(item, reply.response))
            if not 0 <= score <= 1:
                raise ValueError(f"the score {score} is not between 0 and 1")
            outcome = "right" if score == 1 else "wrong"
        except Exception as error:
            score, message = None, _item_error(error)
    return {"outcome": outcome, "score": score, "error": message}


def _item_error(error: Exception) -> str:
    """The message to record of an item's error. Failures of the machine are raised again."""
    text = str(error)
    if (isinstance(error, MemoryError | OSError | torch.OutOfMemoryError)
            or "can't allocate memory" in text or "CUDA error" in text):
        raise error
    return text if isinstance(error, VicugnaError) else f"{type(error).__name__}: {text}"


def _start(folder: Path, identity: dict[str, Any], plan: Plan, batches: list[list[PlannedItem]]
           ) -> tuple[list[dict[str, Any]], int]:
    """Write plan.json, or check it; the records of finished batches, and how many batches. The
    records of an unfinished batch are cut off."""
    path = folder / "items.jsonl"
    if not (folder / "plan.json").exists() and not path.exists():
        write_json(folder / "plan.json",
                   {**identity, "items": [asdict(one) for one in plan.items]})
    earlier = read_json(folder / "plan.json")
    for key, value in identity.items():
        if not isinstance(earlier, dict) or earlier.get(key) != value:
            raise VicugnaError(f"it holds an evaluation with another {key.replace('_', ' ')}",
                               str(folder), "Choose another folder, or remove this one")
    with disk_errors(path):
        path.touch()
        lines = path.read_bytes().splitlines(keepends=True)
        ends = [0, *accumulate(map(len, batches))]
        done = bisect(ends, sum(line.endswith(b"\n") for line in lines)) - 1
        os.truncate(path, sum(map(len, lines[:ends[done]])))
    return read_records(path), done
