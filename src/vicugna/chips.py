"""Published figures of GPUs (gpus.yaml): for plans, and for the MFU of training."""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, with the figures that gpus.yaml explains."""

    name: str
    memory: float
    bandwidth: float
    peaks: dict[str, float]
    source: str
    device: str

    def peak(self, dtype: str) -> float:
        """Peak for weights of `dtype`; bf16's where the GPU has no faster unit for that dtype."""
        return self.peaks.get(dtype, self.peaks["bf16"])


GPUS = {name: Gpu(name, **figures) for name, figures in yaml.safe_load(
    Path(__file__).with_name("gpus.yaml").read_text(encoding="utf-8")).items()}
DEVICES = {gpu.device: gpu for gpu in GPUS.values()}  # by what PyTorch calls them
