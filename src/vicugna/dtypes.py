"""The float types by the names that config.json, recipes and the command line give them."""

import torch

from vicugna.errors import VicugnaError, did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str, where: str) -> torch.dtype:
    """The dtype called `name`; VicugnaError naming the nearest one."""
    if name not in DTYPES:
        raise VicugnaError(f"unknown dtype {name!r}", where, did_you_mean(name, DTYPES))
    return DTYPES[name]


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
