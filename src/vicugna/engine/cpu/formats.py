"""How weights are stored: GGUF's formats of blocks, float32 and bfloat16, and their layout here.

A format of blocks stores each weight as an integer code of 4 to 8 bits, and one scale for every
group of 16 or 32 neighbouring weights of a row: weight = scale * (code - offset), or
scale * code - minimum. Layouts of blocks are those of llama.cpp (ggml-common.h).

In memory, 16 rows lie side by side, a row of the matrix in each lane of a vector. For each 32
columns, the codes are `bits` * 64 bytes: 64 bytes hold a column 4j + i of row r at 4r + i.
- 4 bits: columns 0 to 15 in the lower halves of 4 x 64 bytes, columns 16 to 31 in the upper ones.
- 5 bits: after those, 64 bytes with the highest bits of columns 4j to 4j + 3 in bit j.
- 6 bits: after those, 2 x 64 bytes with the two highest bits of columns 4j to 4j + 3 in bits
  2j and 2j + 1, columns 0 to 15 in the first, 16 to 31 in the second.
- 8 bits: 8 x 64 bytes.
Then, apart, for the same 16 rows, the scales of all columns: `scale_bytes` for each block.
Floats are simply [column][16 rows].
"""

from dataclasses import dataclass

ROWS = 16  # side by side


@dataclass(frozen=True)
class Format:
    """`number` names it in compiled code. A block of GGUF has `columns` weights in `block_bytes`.

    `offset` is subtracted from codes; `minima` says whether minima are stored instead.
    `scale_bytes` hold the scales of 16 rows and one block's columns. Floats have no blocks.
    """

    name: str
    number: int
    bits: int
    columns: int = 1
    block_bytes: int = 0
    group: int = 0
    offset: int = 0
    minima: bool = False
    scale_bytes: int = 0

    @property
    def is_float(self) -> bool:
        return self.columns == 1

    def code_bytes(self, columns: int) -> int:
        """Of 16 rows."""
        return columns * ROWS * self.bits // 8

    def nbytes(self, rows: int, columns: int) -> int:
        """Of a matrix in memory."""
        blocks = -(-rows // ROWS)
        return blocks * (self.code_bytes(columns) + columns // self.columns * self.scale_bytes)


FORMATS = {form.name: form for form in (
    Format("f32", 0, 32),
    Format("bf16", 1, 16),
    Format("q4_0", 2, 4, 32, 18, group=32, offset=8, scale_bytes=32),
    Format("q4_1", 3, 4, 32, 20, group=32, minima=True, scale_bytes=64),
    Format("q8_0", 4, 8, 32, 34, group=32, offset=128, scale_bytes=32),
    Format("q4_k", 5, 4, 256, 144, group=32, minima=True, scale_bytes=320),
    Format("q5_k", 6, 5, 256, 176, group=32, minima=True, scale_bytes=320),
    Format("q6_k", 7, 6, 256, 210, group=16, offset=32, scale_bytes=288),
)}
BY_NUMBER = {form.number: form for form in FORMATS.values()}
