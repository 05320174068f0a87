"""Vicugna: raise an open Llama-class language model, and prove it.

    import vicugna
    m = vicugna.load("path-or-hub-id")
    print(m.generate("Once upon a time").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vicugna.errors import VicugnaError

if TYPE_CHECKING:
    from vicugna.model import Generation, Model, load

__version__ = "0.1.0"
__all__ = ["Generation", "Model", "VicugnaError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import PyTorch only when a model is asked for, so that `import vicugna` is instant."""
    if name in ("Generation", "Model", "load"):
        from vicugna import model
        return getattr(model, name)
    raise AttributeError(f"module 'vicugna' has no attribute {name!r}")
