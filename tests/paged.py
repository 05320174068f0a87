"""Rows of tokens read through the engine's pages, in any calls."""

import torch
from torch import Tensor

from vicugna.engine.blocks import BlockManager, Pool
from vicugna.engine.budget import plan
from vicugna.engine.pages import Paged, Pages, layer_shapes
from vicugna.engine.sequence import Request, Sequence

CPU = torch.device("cpu")


class PagedRows:
    """The attention of `rows` sequences over pages of one network; `longest` bounds their length.

    Each call gives every row some tokens more, perhaps none, as one flat batch.
    """

    def __init__(self, network, rows, longest=4096):
        self.network, shapes = network, layer_shapes(network)
        kinds = plan(shapes, CPU, longest, memory=2**40, tokens=rows * longest, slots=rows,
                     token_budget=longest).kinds
        pools = [Pool(span, blocks, rows, width) for span, (blocks, width) in kinds.items()]
        self.blocks = BlockManager(pools, rows, prefix_cache=False)
        self.pages = Pages(shapes, pools, CPU)
        self.sequences = [Sequence(row, Request((0,)), longest) for row in range(rows)]
        for sequence in self.sequences:
            self.blocks.admit(sequence)

    @torch.no_grad()
    def logits(self, tokens: list[Tensor], positions: list[Tensor] | None = None, **images
               ) -> list[Tensor]:
        """Logits [n, V] of the new tokens [n] of each row."""
        batch = [(one, new) for one, new in zip(self.sequences, tokens, strict=True) if len(new)]
        if not batch:
            return [torch.empty(0, self.network.config.vocab_size) for _ in tokens]
        for sequence, new in batch:
            assert self.blocks.reserve(sequence, sequence.computed + len(new))
        for number, source, target in self.blocks.copies:
            self.pages.copy(self.blocks.pools[number].span, source, target)
        self.blocks.copies.clear()
        attend = Paged(self.pages, [one.slot for one, _ in batch],
                       torch.tensor([len(new) for _, new in batch]).numpy(),
                       torch.tensor([one.computed for one, _ in batch]).numpy(), CPU)
        at = torch.from_numpy(attend.positions_N) if positions is None else torch.cat(positions)
        hidden = self.network(torch.cat(tokens)[None], at[None], attend, **images)
        for sequence, new in batch:
            sequence.computed += len(new)
            self.blocks.commit(sequence)
        return list(self.network.lm_head(hidden)[0].split([len(new) for new in tokens]))
