"""What the engine is asked for, and a sequence: a request with the tokens it has so far."""

from dataclasses import dataclass, field

from torch import Tensor

from vicugna.engine.sampling import Sampling, TopLogprobs, random_stream

Prefix = tuple[tuple[int, ...], int, str]


@dataclass(frozen=True)
class Request:
    """Continue `prompt` until one of `eos_ids`, `sampling.max_new_tokens` or the context's end.

    `images` are the tiles [N, 3, H, W] of the prompt's images. `copy` numbers requests that differ
    in nothing else, so that each has a random stream of its own. Cached prefixes are shared only
    between requests with the same `key`. Stop strings are for the layer above: the engine has no
    text.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    images: Tensor | None = None
    eos_ids: tuple[int, ...] = ()
    copy: int = 0
    key: str = ""

    @property
    def prefix(self) -> Prefix:
        """What equal prompts have in common: those are prefilled once."""
        return self.prompt, id(self.images), self.key


@dataclass
class Output:
    """What a step gave the request `id`: new tokens, their float32 log-probabilities under the
    network's own distribution, and in the end why it ended: "stop" (an end token) or "length"."""

    id: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: str | None = None


class Sequence:
    """A request's tokens so far. The keys of the first `computed` of them are in the cache; a
    sequence whose last token alone is not is decoding, otherwise it is in prefill."""

    def __init__(self, id: int, request: Request, capacity: int) -> None:
        self.id, self.request, self.sampling = id, request, request.sampling
        self.tokens = list(request.prompt)
        self.limit = min(len(self.tokens) + request.sampling.max_new_tokens, capacity)
        self.stream = random_stream(request.sampling.seed, request.copy)
        self.features_MD: Tensor | None = None  # of its images, once they are encoded
        self.tiles: dict[int, bytes] = {}  # of the position of an image token, its tile's digest
        self.followers: list[Sequence] = []  # equal prompts that wait for this one to be read
        self.digests: list[bytes] = []  # of its full blocks, each chained to the one before
        self.reset()

    def reset(self) -> None:
        """Nothing of it is in the cache any more."""
        self.slot = -1  # its row of the block tables while it runs
        self.computed = 0
        self.end = 0  # blocks it has had: the number after its last one's
        self.writable = 0  # positions below this, from `computed` on, are in blocks of its own
        self.complete = 0  # blocks that are full and may be shared by digest

    @property
    def uncomputed(self) -> int:
        """Tokens whose keys are not in the cache: one while it decodes, more during prefill."""
        return len(self.tokens) - self.computed
