"""Published figures of GPUs, from their data sheets: for plans, and for the MFU of training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: memory in bytes, bandwidth in bytes a second, peak FLOPs a second by dtype,
    of matrix products without sparsity; fp8 only where it is faster than bf16."""

    name: str
    memory: float
    bandwidth: float
    peaks: dict[str, float]
    source: str

    def peak(self, dtype: str) -> float:
        """Peak for weights of `dtype`; bf16's where the GPU has no faster unit for that dtype."""
        return self.peaks.get(dtype, self.peaks["bf16"])


def _gpu(name: str, memory: float, bandwidth: float, fp32: float, bf16: float, fp8: float | None,
         source: str) -> Gpu:
    """From gigabytes, terabytes a second and teraFLOPs a second."""
    peaks = {"fp32": fp32, "bf16": bf16} | ({"fp8": fp8} if fp8 else {})
    return Gpu(name, memory * 1e9, bandwidth * 1e12,
               {dtype: peak * 1e12 for dtype, peak in peaks.items()}, source)


GPUS = {gpu.name: gpu for gpu in (
    _gpu("a100", 80, 2.039, 19.5, 312, None, "NVIDIA A100 80GB SXM"),
    _gpu("a100-40gb", 40, 1.555, 19.5, 312, None, "NVIDIA A100 40GB SXM"),
    _gpu("h100", 80, 3.35, 67, 989, 1979, "NVIDIA H100 SXM"),
    _gpu("h200", 141, 4.8, 67, 989, 1979, "NVIDIA H200 SXM"),
    _gpu("b200", 180, 8.0, 75, 2250, 4500, "NVIDIA DGX B200"),
    _gpu("l4", 24, 0.3, 30.3, 121, 242, "NVIDIA L4"),
    _gpu("l40s", 48, 0.864, 91.6, 362, 733, "NVIDIA L40S"),
    _gpu("rtx3090", 24, 0.936, 35.6, 71, None, "NVIDIA GeForce RTX 3090"),
    _gpu("rtx4090", 24, 1.008, 82.6, 165, 330, "NVIDIA GeForce RTX 4090"),
    _gpu("mi300x", 192, 5.3, 163.4, 1307, 2615, "AMD Instinct MI300X"))}

# What torch.cuda.get_device_name says. Other forms of a chip (PCIe, NVL, a MIG slice) are slower.
DEVICES = {
    "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200",
    "NVIDIA L4": "l4", "NVIDIA L40S": "l40s", "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090", "AMD Instinct MI300X": "mi300x"}


def of_device(name: str) -> Gpu | None:
    """The GPU that PyTorch calls `name`, if its figures are known."""
    return GPUS[DEVICES[name]] if name in DEVICES else None
