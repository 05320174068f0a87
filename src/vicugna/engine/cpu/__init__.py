"""Inference on CPUs: products with packed weights and attention over pages, compiled by numba for
the vector instructions of this CPU. `available` says whether they run here; without them the engine
uses PyTorch's."""

from functools import cache

from vicugna.errors import VicugnaError


@cache
def why_not() -> str:
    """Why the kernels do not run here, or "" if they do. A forced instruction set that this CPU
    lacks raises VicugnaError."""
    try:
        from vicugna.engine.cpu.probe import wrong
    except VicugnaError:
        raise
    except Exception as error:  # numba is missing, or too new for its internals used here
        return f"numba does not load: {error}"
    return wrong()


def available() -> bool:
    """Whether the kernels run here; compiles or loads a small one at the first call."""
    return not why_not()
