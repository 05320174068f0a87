"""How much memory the KV cache takes, planned before it takes any."""

from dataclasses import dataclass

import torch

from vicugna.engine.blocks import BLOCK
from vicugna.engine.pages import LayerShape, block_bytes
from vicugna.errors import VicugnaError
from vicugna.memory import available_memory
from vicugna.models.layers.mask import Span


@dataclass(frozen=True)
class Budget:
    """`tokens` in all sequences together, at most `longest` in one, `bytes` in all; of each kind
    of layers the blocks, and those of one sequence."""

    tokens: int
    longest: int
    bytes: int
    kinds: dict[Span, tuple[int, int]]

    def __str__(self) -> str:
        return (f"KV cache: {self.bytes / 2**30:.2f} GiB for {self.tokens:,} tokens, at most "
                f"{self.longest:,} in one conversation")


def plan(layers: list[LayerShape], device: torch.device, context: int, *, memory: int | None,
         tokens: int | None, slots: int, token_budget: int) -> Budget:
    """The budget of an engine, whose arguments these are; VicugnaError for too little memory."""
    sizes = block_bytes(layers)
    wanted = slots * (context + BLOCK) if tokens is None else tokens + slots * BLOCK
    if memory is None:
        memory = free_memory(device) // 2

    def width(span: Span, longest: int) -> int:
        """Blocks of one sequence: with a window or chunks, what it attends to and what one step
        reads."""
        reach = span.window or span.chunk
        whole = -(-longest // BLOCK) + 1
        return whole if reach is None else min(whole, (reach + token_budget) // BLOCK + 3)

    def kinds(tokens: int) -> dict[Span, tuple[int, int]]:
        """Blocks of each kind for `tokens` in all sequences; block 0 is not used."""
        whole, found = -(-tokens // BLOCK) + 1, {}
        for span in sizes:
            reach = span.window or span.chunk
            most = whole if reach is None else min(
                whole, slots * (reach // BLOCK + 2) + token_budget // BLOCK + 2)
            found[span] = most + 1, width(span, min(tokens, context))
        return found

    def size(tokens: int) -> int:
        return sum(sizes[span] * blocks for span, (blocks, _) in kinds(tokens).items())

    low, high = 0, wanted
    while low < high:  # the most tokens that fit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= memory else (low, middle - 1)
    if low < min(2 * BLOCK, wanted):
        raise VicugnaError(f"{memory:,} bytes of memory hold {low} tokens of KV cache", "memory",
                           f"Give it at least {size(2 * BLOCK):,}")
    return Budget(low, min(context, low), size(low), kinds(low))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be used there."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
