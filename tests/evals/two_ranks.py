"""An evaluation that test_shared.py starts with torchrun, or alone.

Arguments: the folder, and before which call rank 1 (or the only rank) is killed (-1: never).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from test_eval_runner import ECHO, Scripted, plan_of

from vicugna.distributed import process_group
from vicugna.engine import Sampling
from vicugna.evals.runner import Reply, run


class Killed(Scripted):
    """Kills its process before call number `dies`."""

    def answer(self, conversations: Sequence[list[dict[str, str]]],
               samplings: Sequence[Sampling]) -> list[Reply]:
        if self.calls == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(conversations, samplings)


def main() -> None:
    folder, dies = Path(sys.argv[1]), int(sys.argv[2])
    with process_group() as ranks:
        model = Killed(dies if ranks.rank == ranks.world - 1 else -1)
        results = run(model, plan_of(37), folder, batch_size=4, own_tasks=ECHO, ranks=ranks)
        Path(f"{folder}.{ranks.rank}").write_text(json.dumps([results.digest, model.calls]))


if __name__ == "__main__":
    main()
