"""An evaluation as an attempt: entered in the ledger before its first token."""

import time
from pathlib import Path
from typing import Any

from vicugna import progress
from vicugna.evals.plan import PlannedItem, plan_digest
from vicugna.evals.results import Results, read_results
from vicugna.evals.runner import run
from vicugna.ledger import Ledger, code_version, recorded
from vicugna.memory import peak_memory
from vicugna.model import Model
from vicugna.training import cost


def evaluate(model: Model, plan: list[PlannedItem], batch: int, folder: Path,
             ledger: Ledger, recipe_digest: str, where: str, own_tasks: Any = None,
             purpose: str = "research") -> Results:
    """Run a planned evaluation into `folder`, entered in the ledger, as done for `purpose`
    ("research" or "product"), before its first token."""
    planned, title = plan_digest(plan), f"eval {folder.name}"
    if (folder / "results.json").exists():
        old = read_results(folder)[0]
        entered = {attempt.result.get("digest") for attempt in ledger.attempts()}
        if (old.model_digest, old.plan_digest) == (model.digest, planned) and old.digest in entered:
            return old
    attempt = ledger.open("eval", purpose, recipe_digest, code_version(), planned,
                          [model.digest], where)
    begun = time.monotonic()
    with recorded(ledger, attempt, folder), progress.bar(title, len(plan)) as report:
        results = run(model, plan, folder, batch_size=batch, own_tasks=own_tasks,
                            progress=lambda done, total: report(done, ""))
    ledger.close(attempt, "done", {
        "tokens": results.tokens, "device_seconds": time.monotonic() - begun,
        "flops": results.tokens * cost.flops_per_token(model.network, 1) / 3,
        "peak_memory_bytes": peak_memory()}, {"digest": results.digest})
    return results
