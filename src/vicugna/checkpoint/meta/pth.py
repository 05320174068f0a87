"""PyTorch's .pth files: where their tensors are stored, without unpickling anything else.

Format: a zip archive without compression, of a pickle (names, dtypes, shapes) and one record for
the bytes of each storage (https://docs.pytorch.org/docs/stable/notes/serialization.html).
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Mapping
from errno import EINVAL
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import torch
from torch import Tensor

from vicugna.checkpoint.hf import weights
from vicugna.checkpoint.stored import Stored, broken, short
from vicugna.errors import VicugnaError

# Five times those of Llama 4 Maverick; more only serve to use up time.
PICKLE_BYTES, PICKLE_STEPS, DIRECTORY_BYTES = 2 * 10**6, 300_000, 2 * 10**6
# All that a pickle of tensors names; Llama 4's holds byte strings beside them, which are not used.
HARMLESS = re.compile(r"torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)"
                      r"|collections OrderedDict|_codecs encode|_io BytesIO")


def scan(path: Path, unused: re.Pattern[str]) -> dict[str, Stored]:
    """The tensors of a .pth file by name, but for those whose names hold `unused`; nothing of
    their bytes is read. The pickle is first searched for names that tensors do not need, and then
    read by PyTorch's restricted unpickler. VicugnaError for such a name, and for a broken file;
    OSError."""
    try:
        records = _records(path)
        with torch.serialization.safe_globals([io.BytesIO]):
            loaded = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        found = {name: _stored(name, value, records, path) for name, value in loaded.items()
                 if isinstance(value, Tensor) and not unused.search(name)}
    except VicugnaError:
        raise
    except Exception as error:  # whatever a malformed file makes zipfile and PyTorch raise
        if isinstance(error, OSError) and error.errno != EINVAL:  # that is an impossible offset
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, UnpicklingError):  # whose message is advice to programmers
            reason = "PyTorch does not unpickle it"
        raise broken(f"truncated, or not a file of tensors: {short(reason)}", path) from error
    # A tied tensor is there twice; many views of the same bytes would only fill memory.
    if sum(stored.nbytes for stored in found.values()) > 2 * path.stat().st_size:
        raise broken("its tensors claim more bytes than it has", path)
    return found


def _records(path: Path) -> dict[int, int]:
    """Where the archive's records begin, and their lengths, if the archive is of PyTorch's kind
    and its pickle harmless."""
    with open(path, "rb") as file:
        if _directory_bytes(file) > DIRECTORY_BYTES:
            raise broken("more records than a model has tensors", path)
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if (len(pickles) != 1 or pickles[0].file_size > PICKLE_BYTES
                or sum(entry.file_size for entry in entries) > path.stat().st_size
                or any(entry.compress_type or entry.compress_size != entry.file_size
                       for entry in entries)):
            raise broken("not an archive as PyTorch writes them", path)
        _search(archive.read(pickles[0]), path)
        records = {}
        for entry in entries:
            file.seek(entry.header_offset + 26)  # the local header gives the lengths of two fields
            name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
            records[entry.header_offset + 30 + name + extra] = entry.file_size
    return records


def _directory_bytes(file: BinaryIO) -> int:
    """How long the archive says that the list of its records is, which zipfile reads whole: the
    length is in the last 22 bytes, and where it may be too great for that, in 76 before them."""
    file.seek(-min(98, file.seek(0, 2)), 2)
    tail = file.read()
    if tail[-22:-18] != b"PK\5\6":
        raise ValueError("File is not a zip file")
    lengths = [int.from_bytes(tail[-10:-6], "little")]
    if tail[-42:-38] == b"PK\6\7" and tail[:4] == b"PK\6\6":
        lengths.append(int.from_bytes(tail[40:48], "little"))
    return lengths[-1]


def _search(pickle: bytes, path: Path) -> None:
    """Raise VicugnaError if `pickle` names anything that could do more than make a tensor."""
    for step, (operation, argument, _) in enumerate(pickletools.genops(pickle)):
        if operation.name in ("GLOBAL", "INST", "STACK_GLOBAL") and not HARMLESS.fullmatch(
                named := str(argument)):
            raise VicugnaError(
                f"refused: its pickle calls {short(named.replace(' ', '.'))}, and so could run "
                "code", str(path), "Get it from its makers, or in safetensors form")
        if step > PICKLE_STEPS or (operation.name == "PROTO" and argument != 2):
            raise broken("not a pickle as PyTorch writes them", path)


def _stored(name: str, tensor: Tensor, records: Mapping[int, int], path: Path) -> Stored:
    """Where `tensor`, which PyTorch has put on its meta device, is stored in the file."""
    start = tensor.untyped_storage()._checkpoint_offset
    if start is None or start not in records:
        raise broken("not an archive as PyTorch writes them", path)
    stored = Stored(name, path, start + int(tensor.storage_offset()) * tensor.itemsize,
                    tensor.dtype, tuple(tensor.shape))
    if tensor.dtype not in weights.NAMES:
        raise VicugnaError(f"stored as {tensor.dtype}, which is not read", stored.where,
                           "Use the unquantised checkpoint")
    if not tensor.is_contiguous() or stored.begin + stored.nbytes > start + records[start]:
        raise broken("its bytes are not in the file", stored.where)
    return stored
