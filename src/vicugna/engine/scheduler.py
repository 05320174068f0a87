"""Which tokens the next step computes."""

from collections import deque
from collections.abc import Iterable

from vicugna.engine.blocks import BLOCK, BlockManager
from vicugna.engine.sequence import Prefix, Sequence

MAX_PREFILLS = 64  # prompts in prefill at once
Batch = list[tuple[Sequence, int]]  # sequences, and how many of their uncomputed tokens


class Scheduler:
    """Continuous batching: sequences join and leave at any step.

    A step computes at most `token_budget` tokens, first one of each sequence that decodes. Prompts
    are prefilled with what is left, in chunks: the oldest takes half of it while others wait, which
    share the rest, the shortest first; so neither a long prompt nor many short ones starve the
    others. When blocks run out, the youngest sequences are pre-empted: their blocks are freed and
    they are recomputed later, which does not change their output.
    """

    def __init__(self, blocks: BlockManager, token_budget: int) -> None:
        self.blocks, self.token_budget = blocks, token_budget
        self.waiting: deque[Sequence] = deque()  # oldest first
        self.running: list[Sequence] = []  # oldest first
        self._leaders: dict[Prefix, Sequence] = {}  # equal prompts follow these

    def add(self, sequence: Sequence) -> None:
        """Queue it; or, if an equal prompt is waiting or in prefill, let it follow that one."""
        leader = self._leaders.setdefault(sequence.request.prefix, sequence)
        if leader is sequence:
            self.waiting.append(sequence)
        else:
            leader.followers.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence, waiting or running, and free its blocks."""
        leader = self._leaders.get(sequence.request.prefix)
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self.blocks.release(sequence)
        elif leader is not None and sequence in leader.followers:
            leader.followers.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if leader is sequence:
            self._lead(self._unfollow(sequence))

    def fork(self, leader: Sequence) -> list[Sequence]:
        """The prompt of `leader` has been prefilled: those of its followers that there are slots
        for share its blocks and run from here, the others wait."""
        if self._leaders.get(leader.request.prefix) is not leader:
            return []
        followers = self._unfollow(leader)
        for sequence in (forked := followers[: self.blocks.free_slots]):
            self.blocks.fork(leader, sequence)
            self._run(sequence)
        self._lead(followers[len(forked):])
        return forked

    def schedule(self) -> Batch:
        """The next step's batch: those that decode, then those in prefill, oldest first."""
        batch: Batch = []
        for sequence in [one for one in self.running if one.uncomputed == 1]:
            if sequence.slot >= 0 and self._reserve(sequence, 1):
                batch.append((sequence, 1))
        prefilling = [one for one in self.running if one.uncomputed > 1]
        self._admit(prefilling)
        for sequence, n in self._shares(prefilling, max(self.token_budget - len(batch), BLOCK)):
            if sequence.slot >= 0 and self._reserve(sequence, n):
                batch.append((sequence, n))
        return [(sequence, n) for sequence, n in batch if sequence.slot >= 0]

    def _admit(self, prefilling: list[Sequence]) -> None:
        """Start waiting sequences while blocks suffice for all that is in prefill, and for one more
        block of every sequence."""
        due = sum(-(-one.uncomputed // BLOCK) for one in prefilling)
        while self.waiting and self.blocks.free_slots and len(prefilling) < MAX_PREFILLS:
            sequence = self.waiting[0]
            if self.running and not self.blocks.fits(sequence.uncomputed, len(self.running) + due):
                break
            self.blocks.admit(self.waiting.popleft())
            self._run(sequence)
            prefilling.append(sequence)
            due += -(-sequence.uncomputed // BLOCK)

    def _shares(self, prefilling: list[Sequence], left: int) -> Iterable[tuple[Sequence, int]]:
        """How many tokens of each prompt are computed."""
        if not prefilling:
            return
        oldest = min(prefilling, key=lambda one: one.id)
        half = left if len(prefilling) == 1 else -(-left // 2)
        others = sorted(prefilling, key=lambda one: (one.uncomputed, one.id))
        shares = {}
        for sequence in [oldest, *(one for one in others if one is not oldest)]:
            most = half if sequence is oldest else left
            if n := min(sequence.uncomputed, most, left):
                shares[sequence.id] = n
                left -= n
        shares[oldest.id] += min(left, oldest.uncomputed - shares[oldest.id])
        yield from ((one, shares[one.id]) for one in prefilling if one.id in shares)

    def _reserve(self, sequence: Sequence, n: int) -> bool:
        """Blocks for `n` more tokens, if need be those of younger sequences."""
        while not self.blocks.reserve(sequence, sequence.computed + n):
            youngest = max(self.running, key=lambda one: one.id)
            if youngest is sequence:
                return False
            self.running.remove(youngest)
            self.blocks.release(youngest)
            self.waiting.appendleft(youngest)
        return True

    def _unfollow(self, leader: Sequence) -> list[Sequence]:
        """Its followers, which follow it no more."""
        del self._leaders[leader.request.prefix]
        followers, leader.followers = leader.followers, []
        return followers

    def _lead(self, sequences: list[Sequence]) -> None:
        """Queue the first of these equal prompts, and let the others follow it."""
        if sequences:
            first, *first.followers = sequences
            self._leaders[first.request.prefix] = first
            self.waiting.appendleft(first)

    def _run(self, sequence: Sequence) -> None:
        self.running.append(sequence)
        if len(self.running) > 1 and self.running[-2].id > sequence.id:
            self.running.sort(key=lambda one: one.id)
