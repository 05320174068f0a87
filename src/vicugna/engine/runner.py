"""One step of the network over the tokens that the scheduler chose."""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from vicugna.engine import cpu
from vicugna.engine.blocks import BlockManager
from vicugna.engine.pages import Paged, Pages
from vicugna.engine.scheduler import Batch
from vicugna.engine.sequence import Sequence

TILES = 32  # of images, encoded in one call


class Runner:
    """Runs the network on batches of sequences. Memory: the pages, and a step's activations."""

    def __init__(self, network: nn.Module, blocks: BlockManager, pages: Pages,
                 device: torch.device) -> None:
        self.network: Any = network
        self.blocks, self.pages, self.device = blocks, pages, device
        self._step = None
        if device.type == "cpu" and cpu.available():
            from vicugna.engine.cpu.step import lower  # which needs numba
            self._step = lower(self.network, pages)

    def run(self, batch: Batch) -> Tensor:
        """Compute the batch's tokens: the hidden states of each sequence's last one, [R, D]."""
        for number, source, target in self.blocks.copies:
            self.pages.copy(self.blocks.pools[number].span, source, target)
        self.blocks.copies.clear()
        counts_R = np.array([n for _, n in batch])
        computed_R = np.array([sequence.computed for sequence, _ in batch])
        attend = Paged(self.pages, (sequence.slot for sequence, _ in batch), counts_R, computed_R,
                       self.device)
        tokens = [token for sequence, n in batch
                  for token in sequence.tokens[sequence.computed : sequence.computed + n]]
        hidden_ND = self._compute(np.array(tokens), attend, self._images(batch))
        for sequence, n in batch:
            sequence.computed += n
            self.blocks.commit(sequence)
        if len(tokens) == len(batch):
            return hidden_ND
        return hidden_ND[torch.from_numpy(attend.last_R).to(self.device)]

    def _compute(self, tokens_N: np.ndarray, attend: Paged, images: dict[str, Tensor]) -> Tensor:
        """Final hidden states [N, D], by the fused step where the network has one."""
        if self._step is not None and not images:
            return self._step(tokens_N, attend.positions_N, attend)
        tokens_1N, positions_1N = (torch.from_numpy(x[None]).to(self.device)
                                   for x in (tokens_N, attend.positions_N))
        return cast(Tensor, self.network(tokens_1N, positions_1N, attend, **images)[0])

    def _images(self, batch: Batch) -> dict[str, Tensor]:
        """The features of the image tokens of a step, in order, and which tokens those are."""
        parts, marks = [], list[bool]()
        for sequence, n in batch:
            start, tiles = sequence.computed, sequence.tiles
            own = [at in tiles for at in range(start, start + n)] if tiles else [False] * n
            if any(own):
                before = sum(at < start for at in tiles)
                parts.append(self._features(sequence)[before : before + sum(own)])
            marks += own
        if not parts:
            return {}
        return {"features_MD": torch.cat(parts),
                "is_image_BT": torch.tensor([marks], device=self.device)}

    def _features(self, sequence: Sequence) -> Tensor:
        """The features of a sequence's images, encoded when they are first needed."""
        images = sequence.request.images
        if sequence.features_MD is None and images is not None:
            sequence.features_MD = torch.cat([self.network.encode_images(tiles.to(self.device))
                                              for tiles in images.split(TILES)])
        assert sequence.features_MD is not None
        return sequence.features_MD
