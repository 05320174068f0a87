"""Memory: how much this process has used, and how much it can still use."""

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path


def peak_memory() -> dict[str, int]:
    """For the cost of an attempt: the largest resident size of this process so far, bytes; on CUDA
    also the most that its tensors took of the device's memory."""
    import torch  # heavy: not every command needs it

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = {"peak_memory_bytes": resident if sys.platform == "darwin" else resident * 1024}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def trim_heap() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc). Tensors of
    ever-changing sizes otherwise leave holes that grow to several times what is in use."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def lower_mmap_threshold() -> None:
    """Let every block of 128 KiB and more be given back as soon as it is freed, where the C library
    can (glibc), which otherwise keeps up to 32 MiB of each: what is gathered and dropped layer by
    layer would add up. Allocation takes longer."""
    with suppress(AttributeError):
        M_MMAP_THRESHOLD = -3
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)


def available_memory() -> int:
    """Bytes this process can still use, by the kernel's estimate and the container's limit."""
    free = sys.maxsize
    with suppress(OSError, StopIteration, ValueError):  # not Linux, or no limit ("max")
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text())
                       for name in ("max", "current"))
        free = min(free, limit - used)
    return free
