"""Around an attempt: the version of the code, and the outcome of a block that fails."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

import vicugna
from vicugna import files
from vicugna.errors import Refused, VicugnaError
from vicugna.ledger.ledger import Ledger
from vicugna.memory import peak_memory


def code_version() -> str:
    """The package's version and the digest of its source files."""
    root = Path(vicugna.__file__).parent
    digests = {str(path.relative_to(root)): files.digest_file(path) for path in root.rglob("*.py")}
    return f"{vicugna.__version__}+{files.digest_of(digests)[:12]}"


@contextmanager
def recorded(ledger: Ledger, attempt: str, folder: Path) -> Iterator[None]:
    """Close the attempt, if there is one, when the block does not end: as refused, failed or
    interrupted. Where memory ran out, the error says what to lower."""
    try:
        yield
    except BaseException as error:
        outcome = ("refused" if isinstance(error, Refused) else
                   "failed" if isinstance(error, Exception) else "interrupted")
        with suppress(VicugnaError):  # it may be closed already, or its disk be full
            if attempt:
                ledger.close(attempt, outcome, peak_memory(),
                             {"error": files.printable(str(error))[:500]})
        exhausted = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if exhausted or "allocate memory" in str(error):
            raise VicugnaError(
                "memory ran out", str(folder), "Halve micro_rows (rows, when it is not set) or "
                "sequence_length; in rl, prompts; in eval, batch") from error
        raise
