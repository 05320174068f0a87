"""Training state on disk: weights, optimisers and step, as a PyTorch DCP folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from vicugna.errors import VicugnaError
from vicugna.files import replacing_folder, storage_error, sweep_temporaries
from vicugna.training.parallel import Ranks

STATE = "state"
BEGINNING = {"step": 0, "skipped": 0, "bad": 0, "tokens": 0, "seconds": 0.0, "flops": 0.0}
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # alone by choice


def save(folder: Path, module: nn.Module, optimisers: Sequence[torch.optim.Optimizer],
         progress: dict[str, Any], ranks: Ranks) -> None:
    """Replace `folder`/state atomically by the state after `progress["step"]` steps.

    With several ranks every one writes its shard to a folder that all of them see.
    """
    weights, optimiser = get_state_dict(module, list(optimisers))
    state = {"weights": weights, "optimiser": optimiser, "progress": progress}
    if ranks.world == 1:
        with replacing_folder(folder / STATE) as temporary, _explained(folder / STATE):
            dcp.save(state, checkpoint_id=temporary, no_dist=True)
        return
    shared = folder / f".{STATE}.shards.tmp"
    with _explained(folder / STATE):
        dcp.save(state, checkpoint_id=shared)
    if ranks.first:
        with replacing_folder(folder / STATE) as temporary:
            for file in shared.iterdir():
                file.rename(temporary / file.name)
        shared.rmdir()
    ranks.wait()


def load(folder: Path, module: nn.Module, optimisers: Sequence[torch.optim.Optimizer],
         ranks: Ranks) -> dict[str, Any] | None:
    """Restore what `save` wrote and return its `progress`; None when there is no state yet."""
    if ranks.first:
        sweep_temporaries(folder)
    ranks.wait()
    if not (folder / STATE).exists():
        return None
    weights, optimiser = get_state_dict(module, list(optimisers))
    state: dict[str, Any] = {"weights": weights, "optimiser": optimiser,
                             "progress": dict(BEGINNING)}
    with _explained(folder / STATE):
        dcp.load(state, checkpoint_id=folder / STATE, no_dist=ranks.world == 1)
    set_state_dict(module, list(optimisers), model_state_dict=state["weights"],
                   optim_state_dict=state["optimiser"])
    return state["progress"]


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """DCP wraps whatever happens, Ctrl-C too, in its own BaseException: raise what it was."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, OSError):
            raise storage_error(cause, folder) from error
        if isinstance(cause, Exception):  # of many kinds for a damaged folder
            raise VicugnaError(f"the training state cannot be used ({type(cause).__name__})",
                               str(folder), "Delete it to start the stage again") from error
        raise cause from error
