"""Training state on disk: weights, optimisers and step, as a PyTorch DCP folder."""

import errno
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from vicugna.distributed import Ranks
from vicugna.errors import VicugnaError
from vicugna.files import replacing_folder, storage_error, sweep_temporaries

STATE = "state"
BEGINNING = {"step": 0, "skipped": 0, "bad": 0, "tokens": 0, "seconds": 0.0, "flops": 0.0}
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # in one process


def save(folder: Path, module: nn.Module, optimisers: list[torch.optim.Optimizer],
         progress: dict[str, Any], ranks: Ranks) -> None:
    """Replace `folder`/state, which all ranks see, atomically by the state after
    `progress["step"]` steps."""
    weights, optimiser = get_state_dict(module, optimisers)
    state = {"weights": weights, "optimiser": optimiser, "progress": progress}
    with replacing_folder(folder / STATE) if ranks.first else nullcontext() as temporary:
        shared = ranks.gather(temporary)[0]  # each rank writes its shards there
        with _explained(folder / STATE):
            dcp.save(state, checkpoint_id=shared, no_dist=ranks.world == 1)
    ranks.wait()


def load(folder: Path, module: nn.Module, optimisers: list[torch.optim.Optimizer],
         ranks: Ranks) -> dict[str, Any]:
    """Restore what `save` wrote and return its `progress`; BEGINNING when nothing is there yet."""
    if ranks.first:
        sweep_temporaries(folder)
    ranks.wait()
    if not (folder / STATE).exists():
        return BEGINNING
    weights, optimiser = get_state_dict(module, optimisers)
    state: dict[str, Any] = {"weights": weights, "optimiser": optimiser, "progress": {**BEGINNING}}
    with _explained(folder / STATE):
        dcp.load(state, checkpoint_id=folder / STATE, no_dist=ranks.world == 1)
    set_state_dict(module, optimisers, model_state_dict=state["weights"],
                   optim_state_dict=state["optimiser"])
    return state["progress"]


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """DCP wraps whatever happens, Ctrl-C too, in its own BaseException; raise what it was."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, RuntimeError) and shutil.disk_usage(folder.parent).free < 1 << 26:
            cause = OSError(errno.ENOSPC, str(cause))  # what PyTorch's own writer says of it
        if isinstance(cause, OSError):
            raise storage_error(cause, folder) from error
        if isinstance(cause, Exception):  # of many kinds for a damaged folder
            raise VicugnaError(f"the training state cannot be used ({type(cause).__name__})",
                               str(folder), "Delete it to start the stage again") from error
        raise cause from error
