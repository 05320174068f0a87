"""Asking every planned question once, and counting every answer.

Each planned item ends as exactly one of four outcomes, all of them in the denominator: right (the
reply ended by itself and the task scores it 1), wrong (it scores less), truncated (it was cut at
its limit of tokens: never right, whatever its beginning holds) and error (no reply or no score,
because something failed, such as a prompt beyond the context; the message is kept).

Only what is no property of an item (no memory, a failing disk, Ctrl-C) ends the evaluation. Run
again, it goes on where it was: a batch, a fixed slice of the plan, is written whole or redone, so
that an evaluation killed anywhere ends in the same bytes.
"""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vicugna import chat, engine
from vicugna.engine import Sampling
from vicugna.errors import VicugnaError
from vicugna.evals.plan import PlannedItem, plan_digest, split_batches
from vicugna.evals.results import Results, read_records
from vicugna.files import canonical, digest_of, disk_errors, owned, read_json, write_json
from vicugna.tasks import TASKS, Item, Task

BATCH_TOKENS, GREEDY = 65_536, Sampling()
Tasks = Mapping[str, Task]


@dataclass(frozen=True)
class Reply:
    """One answer: `response` without `reasoning`; `tokens` counts both. `error` says why there is
    none. `prompt_digest` covers the prompt's tokens, so the chat template too."""

    response: str = ""
    reasoning: str | None = None
    tokens: int = 0
    finish_reason: str = ""
    prompt_digest: str = ""
    error: str | None = None


class LocalModel:
    """Answers with a model that has network, tokenizer and digest. The runner uses only `answer`,
    `digest`, `precision` and `platform`: where exactly the same answers can be expected again."""

    def __init__(self, model: Any) -> None:
        self.network, self.tokenizer, self.digest = model.network, model.tokenizer, model.digest
        if self.tokenizer is None:
            raise VicugnaError("the model has no tokenizer", "evaluation", "Add tokenizer.json")
        weight = next(self.network.parameters())
        self.precision = str(weight.dtype).removeprefix("torch.")
        chip = (torch.cuda.get_device_name(weight.device) if weight.is_cuda else
                f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
        self.platform = f"{platform.machine()} {chip}, torch {torch.__version__}"

    def answer(self, conversations: Sequence[list[dict[str, str]]],
               samplings: Sequence[Sampling]) -> list[Reply]:
        """A reply to each conversation, in order."""
        prompts = [chat.encode(self.tokenizer, messages) for messages in conversations]
        context = self.network.config.context_length
        replies = iter(self._generate([pair for pair in zip(prompts, samplings, strict=True)
                                       if len(pair[0]) <= context]))
        return [replace(next(replies) if len(prompt) <= context else Reply(
            error=f"the prompt has {len(prompt):,} tokens and the context {context:,}"),
            prompt_digest=digest_of(prompt)) for prompt in prompts]

    def _generate(self, asked: list[tuple[list[int], Sampling]]) -> list[Reply]:
        if not asked:
            return []
        prompts, samplings = map(list, zip(*asked, strict=True))
        try:
            done = engine.generate(self.network, self.tokenizer, prompts, samplings)
        except Exception as error:
            fault = _item_error(error)
            if len(asked) == 1:
                return [Reply(error=fault)]
            # One bad prompt must not take its batch with it.
            return [reply for one in asked for reply in self._generate([one])]
        return [Reply(text, reasoning, len(one.tokens), one.finish_reason)
                for one, prompt in zip(done, prompts, strict=True)
                for reasoning, text in [chat.parse_reply(self.tokenizer, one.tokens, prompt)]]


def run(model: Any, plan: Sequence[PlannedItem], folder: str | Path, *, batch_size: int = 32,
        sampling: Sampling = GREEDY, own_tasks: Tasks | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None) -> Results:
    """Ask every item of `plan` and write folder/{plan.json, items.jsonl, results.json}.

    `model` is a loaded one, or anything with the interface of `LocalModel`; max_new_tokens and
    seed are set per item; `own_tasks` take precedence over vicugna.tasks; `progress(done, total)`
    counts items.
    Raises VicugnaError when the folder holds another evaluation.
    """
    folder, path = Path(folder), Path(folder) / "items.jsonl"
    answerer = model if hasattr(model, "answer") else LocalModel(model)
    identity = json.loads(canonical({  # as it will be read back: tuples become lists
        "model_digest": answerer.digest, "plan_digest": plan_digest(plan),
        "precision": answerer.precision, "batch_size": batch_size, "batch_tokens": BATCH_TOKENS,
        "sampling": {k: v for k, v in asdict(sampling).items() if k != "max_new_tokens"}}))
    with owned(folder):
        if not (folder / "plan.json").exists() and not path.exists():
            write_json(folder / "plan.json", {**identity, "items": [asdict(one) for one in plan]})
        earlier = read_json(folder / "plan.json")
        for key, value in identity.items():
            if not isinstance(earlier, dict) or earlier.get(key) != value:
                raise VicugnaError(f"it holds an evaluation with another {key.replace('_', ' ')}",
                                   str(folder), "Choose another folder, or remove this one")
        records, left = _resume(path, split_batches(plan, batch_size, BATCH_TOKENS))
        progress(len(records), len(plan))
        for batch in left:
            new = run_batch(answerer, batch, sampling, {**TASKS, **(own_tasks or {})})
            with disk_errors(path), open(path, "ab") as file:
                file.write(b"".join(canonical(record) + b"\n" for record in new))
                file.flush()
                os.fsync(file.fileno())
            records += new
            progress(len(records), len(plan))
        results = Results.of(identity, records, answerer.platform)
        write_json(folder / "results.json", results.to_dict())
    return results


def run_batch(answerer: Any, batch: Sequence[PlannedItem], sampling: Sampling,
        known: Tasks = TASKS) -> list[dict[str, Any]]:
    """Ask one batch of known tasks and score it: a record for each item, in order."""
    made = [make_item(item, known) for item in batch]
    asked = [(item.messages, replace(
        sampling, max_new_tokens=planned.max_new_tokens,
        seed=int(digest_of([sampling.seed, planned.id])[:12], 16)))
        for planned, item in zip(batch, made, strict=True) if isinstance(item, Item)]
    replies = iter(answerer.answer([one for one, _ in asked], [one for _, one in asked]))
    records = []
    for planned, item in zip(batch, made, strict=True):
        reply, expected = (next(replies), item.answer) if isinstance(item, Item) else (
            Reply(error=item), None)
        records.append({**asdict(planned), "id": planned.id, "expected": expected,
                        **asdict(reply), **score_reply(item, reply, known)})
    return records


def make_item(planned: PlannedItem, known: Tasks = TASKS) -> Item | str:
    """The question, or what failed while making it; VicugnaError if it is not as it was planned."""
    try:
        item = known[planned.task].item(planned.seed, planned.difficulty)
    except Exception as error:
        return _item_error(error)
    if digest_of(item.messages) != planned.question_digest:
        raise VicugnaError(f"seed {planned.seed} no longer makes the planned question",
                           f"task {planned.task!r}", "Use the version that made the plan")
    return item


def score_reply(item: Item | str, reply: Reply, known: Tasks = TASKS) -> dict[str, Any]:
    """A reply's outcome, score and error message; the latter two are None where there is none."""
    outcome, score, fault = "error", None, reply.error
    if reply.finish_reason == "length":
        outcome = "truncated"
    elif fault is None and isinstance(item, Item):
        try:
            score = float(known[item.task].score(item, reply.response))
            if not 0 <= score <= 1:
                raise ValueError(f"the score {score} is not between 0 and 1")
            outcome = "right" if score == 1 else "wrong"
        except Exception as error:
            score, fault = None, _item_error(error)
    return {"outcome": outcome, "score": score, "error": fault}


def _item_error(error: Exception) -> str:
    """The message to keep of an item's error. What the machine failed in is raised again."""
    text = str(error)
    if (isinstance(error, MemoryError | OSError | torch.OutOfMemoryError)
            or "can't allocate memory" in text or "CUDA error" in text):
        raise error
    return text if isinstance(error, VicugnaError) else f"{type(error).__name__}: {text}"


def _resume(path: Path, batches: list[list[PlannedItem]]
              ) -> tuple[list[dict[str, Any]], list[list[PlannedItem]]]:
    """The records of finished batches, and the batches left; a part of one is cut off the file."""
    with disk_errors(path):
        path.touch()
        lines = path.read_bytes().splitlines(keepends=True)
        whole, kept = sum(line.endswith(b"\n") for line in lines), 0
        while batches and kept + len(batches[0]) <= whole:
            kept += len(batches.pop(0))
        os.truncate(path, sum(map(len, lines[:kept])))
    return read_records(path), batches
