"""Which tokens the next step computes."""

from collections import deque
from collections.abc import Iterable

from vicugna.engine.blocks import BLOCK, BlockManager
from vicugna.engine.sequence import Prefix, Sequence

READING = 64  # prompts under way at once, at most
Batch = list[tuple[Sequence, int]]  # sequences, and how many of their unread tokens


class Scheduler:
    """Continuous batching: sequences join and leave at any step.

    A step takes at most `token_budget` tokens, and first one of each sequence that decodes. Prompts
    are read with what is left, in chunks: the oldest takes half of it while others wait, which
    share the rest, the shortest first; so neither a long prompt nor many short ones make anybody
    wait for ever. When blocks run out, the youngest sequences are pre-empted: they give back all
    their blocks and are read again later, which changes nothing in what they say.
    """

    def __init__(self, blocks: BlockManager, token_budget: int) -> None:
        self.blocks, self.token_budget = blocks, token_budget
        self.waiting: deque[Sequence] = deque()  # oldest first
        self.running: list[Sequence] = []  # oldest first
        self._reading: dict[Prefix, Sequence] = {}  # prompts under way, which equal ones follow

    def add(self, sequence: Sequence) -> None:
        """Let it wait for its turn; or, if an equal prompt waits or is read already, for that."""
        leader = self._reading.setdefault(sequence.request.prefix, sequence)
        if leader is sequence:
            self.waiting.append(sequence)
        else:
            leader.followers.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        leader = self._reading.get(sequence.request.prefix)
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
        """The prompt of `leader` has been read: those of its followers that there are slots for
        share its blocks and run from here, the others wait."""
        if self._reading.get(leader.request.prefix) is not leader:
            return []
        followers = self._unfollow(leader)
        for sequence in (forked := followers[: self.blocks.free_slots]):
            self.blocks.fork(leader, sequence)
            self._run(sequence)
        self._lead(followers[len(forked):])
        return forked

    def schedule(self) -> Batch:
        """The next step's batch: those that decode, then those that are read, oldest first."""
        batch: Batch = []
        for sequence in [one for one in self.running if one.unread == 1]:
            if sequence.slot >= 0 and self._reserve(sequence, 1):
                batch.append((sequence, 1))
        reading = [one for one in self.running if one.unread > 1]
        self._admit(reading)
        for sequence, n in self._shares(reading, max(self.token_budget - len(batch), BLOCK)):
            if sequence.slot >= 0 and self._reserve(sequence, n):
                batch.append((sequence, n))
        return [(sequence, n) for sequence, n in batch if sequence.slot >= 0]

    def _admit(self, reading: list[Sequence]) -> None:
        """Take in sequences that wait, while there is room for all that is being read, and for a
        block more of every sequence."""
        due = sum(-(-one.unread // BLOCK) for one in reading)
        while self.waiting and self.blocks.free_slots and len(reading) < READING:
            sequence = self.waiting[0]
            if self.running and not self.blocks.room(sequence.unread, len(self.running) + due):
                break
            self.blocks.admit(self.waiting.popleft())
            self._run(sequence)
            reading.append(sequence)
            due += -(-sequence.unread // BLOCK)

    def _shares(self, reading: list[Sequence], left: int) -> Iterable[tuple[Sequence, int]]:
        """How many tokens of each prompt are read."""
        if not reading:
            return
        oldest = min(reading, key=lambda one: one.id)
        half = left if len(reading) == 1 else -(-left // 2)
        others = sorted(reading, key=lambda one: (one.unread, one.id))
        shares = {}
        for sequence in [oldest, *(one for one in others if one is not oldest)]:
            most = half if sequence is oldest else left
            if n := min(sequence.unread, most, left):
                shares[sequence.id] = n
                left -= n
        shares[oldest.id] += min(left, oldest.unread - shares[oldest.id])
        yield from ((one, shares[one.id]) for one in reading if one.id in shares)

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
        """Let nobody wait for `leader` any more: those who did."""
        del self._reading[leader.request.prefix]
        followers, leader.followers = leader.followers, []
        return followers

    def _lead(self, sequences: list[Sequence]) -> None:
        """Let the first of these, whose prompts are equal, be read, and the others wait for it."""
        if sequences:
            first, *first.followers = sequences
            self._reading[first.request.prefix] = first
            self.waiting.appendleft(first)

    def _run(self, sequence: Sequence) -> None:
        self.running.append(sequence)
        if len(self.running) > 1 and self.running[-2].id > sequence.id:
            self.running.sort(key=lambda one: one.id)
