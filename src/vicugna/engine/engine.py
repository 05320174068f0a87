"""The engine: requests in, tokens out, step by step."""

from hashlib import blake2b
from typing import Any

import torch

from vicugna.engine.blocks import BlockManager, Pool
from vicugna.engine.budget import Budget, plan
from vicugna.engine.pages import Pages, layer_shapes
from vicugna.engine.runner import Runner
from vicugna.engine.sampling import Sampler
from vicugna.engine.scheduler import Scheduler
from vicugna.engine.sequence import Output, Request, Sequence
from vicugna.errors import VicugnaError

TOKEN_BUDGET = 2048


class Engine:
    """Continuous batching over a paged KV cache, on the device of the network's weights.

    `memory` bounds the cache, bytes (None: half of what is free); of that it takes what `tokens`
    tokens in all sequences need (None: as many as fit), at most `slots` sequences at once. A step
    computes at most `token_budget` tokens, or one of each running sequence: fewer make shorter
    steps, so that decodes wait less for prefills. Raises VicugnaError for too
    little memory.
    """

    def __init__(self, network: Any, *, memory: int | None = None, tokens: int | None = None,
                 slots: int = 256, token_budget: int = TOKEN_BUDGET, prefix_cache: bool = True
                 ) -> None:
        self.network, self.config = network, network.config
        context = self.config.context_length
        device = next(network.parameters()).device
        shapes = layer_shapes(network)
        self.budget: Budget = plan(shapes, device, context, memory=memory, tokens=tokens,
                                   slots=slots, token_budget=token_budget)
        pools = [Pool(span, blocks, slots, width)
                 for span, (blocks, width) in self.budget.kinds.items()]
        self.blocks = BlockManager(pools, slots, prefix_cache)
        self.scheduler = Scheduler(self.blocks, token_budget)
        self.runner = Runner(network, self.blocks, Pages(shapes, pools, device), device)
        self.sampler = Sampler(device)
        self._sequences: dict[int, Sequence] = {}
        self._ended: list[Output] = []
        self._next_id = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences or self._ended)

    def add(self, request: Request) -> int:
        """Take in a request: its id. Raises VicugnaError for an empty prompt, one too long for the
        context or the memory, tokens outside the vocabulary, images that do not fit the prompt."""
        check(self.config, request)
        if len(request.prompt) > self.budget.longest:
            raise VicugnaError(f"{len(request.prompt)} tokens, but the cache holds "
                               f"{self.budget.longest}", "prompt", "Give the engine more memory")
        self._next_id += 1
        sequence = Sequence(self._next_id, request, self.budget.longest)
        if len(sequence.tokens) == sequence.limit:
            self._ended.append(Output(sequence.id, finish_reason="length"))
        else:
            sequence.tiles = _tiles(self.config, request)
            self._sequences[sequence.id] = sequence
            self.scheduler.add(sequence)
        return sequence.id

    def cancel(self, id: int) -> None:
        """End a request at once; nothing more comes of it. Ids that have ended are ignored."""
        self._ended = [output for output in self._ended if output.id != id]
        if (sequence := self._sequences.pop(id, None)) is not None:
            self.scheduler.remove(sequence)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Compute one batch: what the requests in it gained, those that only read omitted.
        VicugnaError for weights that give NaN."""
        outputs, self._ended = self._ended, []
        if not (batch := self.scheduler.schedule()):
            return outputs
        hidden_RD = self.runner.run(batch)
        rows, sequences = [], list[Sequence]()
        for row, (sequence, _) in enumerate(batch):
            if sequence.uncomputed == 0:
                own = [sequence, *self.scheduler.fork(sequence)]
                sequences += own
                rows += [row] * len(own)
        if sequences:
            every = rows == list(range(len(batch)))
            logits = self.network.lm_head(hidden_RD if every else hidden_RD[rows])
            chosen = self.sampler.choose(logits, [one.sampling for one in sequences],
                                         [one.stream for one in sequences])
            outputs += [self._push(*one) for one in zip(sequences, *chosen, strict=True)]
        return outputs

    def _push(self, sequence: Sequence, token: int, logprob: float, top: Any) -> Output:
        """Append a token to a sequence, and end it if that was its last."""
        sequence.tokens.append(token)
        reason = ("stop" if token in sequence.request.eos_ids else
                  "length" if len(sequence.tokens) == sequence.limit else None)
        if reason:
            self.cancel(sequence.id)
        return Output(sequence.id, [token], [logprob], [top] if top else [], reason)


def check(config: Any, request: Request) -> None:
    """Raise VicugnaError for a prompt that this network cannot continue."""
    prompt, context, V = request.prompt, config.context_length, config.vocab_size
    if not prompt:
        raise VicugnaError("the prompt is empty", "prompt", "It needs at least one token")
    if len(prompt) > context:
        raise VicugnaError(f"{len(prompt)} tokens, but the context holds {context}", "prompt",
                           "Shorten it, or use a model with a longer context")
    if min(prompt) < 0 or max(prompt) >= V:
        raise VicugnaError(f"token ids from {min(prompt)} to {max(prompt)}, but the "
                           f"vocabulary has {V}", "prompt", "Use the model's own tokenizer")
    vision = getattr(config, "vision_config", None)
    if vision is None:
        if request.images is not None:
            raise VicugnaError("this is a text-only model: it has no vision encoder", "prompt",
                               "Leave images out")
        return
    given = 0 if request.images is None else len(request.images)
    if request.images is not None:
        vision.check_tiles(request.images)
    if (count := prompt.count(config.image_token_index)) != given * vision.features:
        raise VicugnaError(f"{count} image tokens, but {given} tiles make "
                           f"{given * vision.features} features", "prompt",
                           f"The prompt needs token {config.image_token_index} once for each")


def _tiles(config: Any, request: Request) -> dict[int, bytes]:
    """The digest of the tile that each image token stands for, by the token's position."""
    if request.images is None:
        return {}
    digests = [blake2b(tile.contiguous().view(torch.uint8).numpy(), digest_size=16).digest()
               for tile in request.images.cpu()]
    places = [at for at, token in enumerate(request.prompt) if token == config.image_token_index]
    return {at: digests[n // config.vision_config.features] for n, at in enumerate(places)}
