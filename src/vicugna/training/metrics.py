"""metrics.jsonl: one line a step."""

import json
import os
from math import isfinite
from pathlib import Path
from typing import Any

from vicugna.files import disk_errors, read_text, write_text


class Metrics:
    """metrics.jsonl, and TensorBoard's files where that package is installed, for writing from
    `step` on: later lines, of a killed process, are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        lines = read_text(self.path).splitlines(keepends=True) if self.path.exists() else []
        write_text(self.path, "".join(line for line in lines if line.endswith("\n")  # not torn
                                      and json.loads(line)["step"] < step))
        with disk_errors(self.path):
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        except ImportError:
            self.board = None

    def write(self, row: dict[str, Any]) -> None:
        """Append one step's figures; null stands for what is not finite."""
        row = {key: value if isfinite(value) else None for key, value in row.items()}
        with disk_errors(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        for key, value in row.items() if self.board else ():
            if key != "step" and value is not None:
                self.board.add_scalar(key, value, row["step"])

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board:
            self.board.close()
