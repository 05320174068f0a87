"""An evaluation as an attempt: entered in the ledger before its first token."""

import time
from pathlib import Path

from vicugna import progress
from vicugna.distributed import Ranks
from vicugna.evals.plan import Plan
from vicugna.evals.results import Results, read_results
from vicugna.evals.runner import Tasks, run
from vicugna.ledger import Ledger, code_version, recorded
from vicugna.memory import peak_memory
from vicugna.model import Model
from vicugna.models.counts import count


def evaluate(model: Model, plan: Plan, batch: int, folder: Path, ledger: Ledger,
             recipe_digest: str, where: str, own_tasks: Tasks | None = None,
             purpose: str = "research", ranks: Ranks = Ranks()) -> Results:
    """Run a planned evaluation into `folder`, entered in the ledger, as done for `purpose`
    ("research" or "product"), before its first token. Called on all `ranks`, which share it."""
    if found := ranks.gather(_found(model, plan, folder, ledger) if ranks.first else None)[0]:
        return found
    attempt = ledger.open("eval", purpose, recipe_digest, code_version(), plan.digest,
                          [model.digest], where) if ranks.first else ""
    begun = time.monotonic()
    with (recorded(ledger, attempt, folder),
          progress.bar(f"eval {folder.name}", len(plan.items), ranks.first) as report):
        results = run(model, plan, folder, batch_size=batch, own_tasks=own_tasks, ranks=ranks,
                      progress=lambda done, total: report(done, ""))
    if ranks.first:
        ledger.close(attempt, "done", {
            "tokens": results.tokens,
            "device_seconds": (time.monotonic() - begun) * ranks.world,
            "flops": results.tokens * count(model.config.to_dict()).flops(1),
            **peak_memory()}, {"digest": results.digest})
    return results


def _found(model: Model, plan: Plan, folder: Path, ledger: Ledger) -> Results | None:
    """The results in `folder`, if they are those of this evaluation and the ledger has them."""
    if not (folder / "results.json").exists():
        return None
    results = read_results(folder)[0]
    entered = {attempt.result.get("digest") for attempt in ledger.attempts()}
    same = (results.model_digest, results.plan_digest) == (model.digest, plan.digest)
    return results if same and results.digest in entered else None
