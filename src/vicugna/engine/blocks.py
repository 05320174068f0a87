"""Blocks of the KV cache: who holds them, which are free, and which hold a known prefix.

A block has room for the keys and values of 16 positions in all layers of one kind (full attention,
a window, chunks). Blocks are shared by reference counts: by copies of a prompt, and by requests
that begin with the same tokens. A shared block is copied before it is written.
"""

from array import array
from collections import OrderedDict
from hashlib import blake2b

import numpy as np

from vicugna.engine.sequence import Sequence
from vicugna.models.layers.mask import Span

BLOCK = 16  # positions


class Pool:
    """The blocks of one kind of layers, and of each slot the table of the blocks it holds: entry j
    of a table is block `first[slot] + j` of the sequence; those before have been given back. Block
    0 is never handed out: it stays zero, and fills the rest of the tables."""

    def __init__(self, span: Span, blocks: int, slots: int, width: int) -> None:
        self.span, self.blocks = span, blocks
        self.table = np.zeros((slots, width), np.int32)
        self.first = np.zeros(slots, np.int32)
        self.references: dict[int, int] = {}  # of each block in use, how many tables hold it
        self._fresh, self._free = 1, list[int]()
        self._known: dict[bytes, int] = {}  # digest of a full block -> the block
        self._digest: dict[int, bytes] = {}
        self._idle = OrderedDict[int, None]()  # known, in no table; least recently used first

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return len(self._free) + self.blocks - self._fresh + len(self._idle)

    def first_block(self, position: int) -> int:
        """The first block that a query at `position` attends to."""
        if self.span.chunk is not None:
            return position // self.span.chunk * self.span.chunk // BLOCK
        return 0 if self.span.window is None else max(0, position - self.span.window + 1) // BLOCK

    def allocate(self) -> int:
        """A block for one owner: a free one, then one never used, then a cached prefix's that no
        sequence holds, evicted least recently used first."""
        if self._free:
            block = self._free.pop()
        elif self._fresh < self.blocks:
            block, self._fresh = self._fresh, self._fresh + 1
        else:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._digest.pop(block)]
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """One owner more."""
        self.references[block] = self.references.get(block, 0) + 1
        self._idle.pop(block, None)

    def free(self, block: int) -> None:
        """One owner less."""
        self.references[block] -= 1
        if not self.references[block]:
            del self.references[block]
            if block in self._digest:
                self._idle[block] = None
            else:
                self._free.append(block)

    def register(self, block: int, digest: bytes) -> None:
        """The block is full, with the prefix that `digest` names."""
        if digest not in self._known and block not in self._digest:
            self._known[digest], self._digest[block] = block, digest

    def lookup(self, digest: bytes) -> int | None:
        """The block that ends the prefix of this digest."""
        return self._known.get(digest)

    def extend(self, slot: int, begin: int, end: int) -> None:
        """Take blocks `begin` to `end` - 1 of the sequence in `slot`."""
        first = int(self.first[slot])
        self.table[slot, begin - first : end - first] = [self.allocate() for _ in range(begin, end)]

    def trim(self, slot: int, first: int, end: int) -> None:
        """Give back the blocks before the sequence's block `first`; it has had `end`."""
        old = int(self.first[slot])
        if (gone := min(first, end) - old) > 0:
            row, held = self.table[slot], end - old
            for block in reversed(row[:gone].tolist()):  # a prefix is evicted from its end
                self.free(block)
            row[: held - gone] = row[gone:held].copy()
            row[held - gone : held] = 0
            self.first[slot] = old + gone

    def clear(self, slot: int, end: int) -> None:
        """Give back all blocks of the sequence in `slot`."""
        self.trim(slot, end, end)
        self.first[slot] = 0


class BlockManager:
    """The pools of all kinds of layers, whose tables always end at the same block, and the slots.
    `copies` are blocks to copy before the next step: (pool's number, from, to)."""

    def __init__(self, pools: list[Pool], slots: int, prefix_cache: bool = True) -> None:
        self.pools, self.prefix_cache = pools, prefix_cache
        self.copies: list[tuple[int, int, int]] = []
        self._slots = list(range(slots))[::-1]

    @property
    def used(self) -> int:
        """Blocks in use."""
        return sum(len(pool.references) for pool in self.pools)

    @property
    def free_slots(self) -> int:
        """Sequences that may be admitted."""
        return len(self._slots)

    def fits(self, length: int, spare: int) -> bool:
        """Whether a sequence of `length` could be held, leaving `spare` blocks of each kind."""
        return all(pool.available >= min(-(-length // BLOCK), pool.table.shape[1]) + spare
                   for pool in self.pools)

    def admit(self, sequence: Sequence) -> None:
        """Give the sequence a slot, and what is known of its prefix, but never its last token,
        whose hidden state is wanted."""
        sequence.slot = slot = self._slots.pop()
        if not (self.prefix_cache and self.pools):
            return
        found, runs = 0, [0] * len(self.pools)  # runs: known blocks in a row, up to this one
        for end in range(1, (len(sequence.tokens) - 1) // BLOCK + 1):
            digest = self._digest_of(sequence, end - 1)
            runs = [0 if pool.lookup(digest) is None else run + 1
                    for pool, run in zip(self.pools, runs, strict=True)]
            starts = [end - pool.first_block(end * BLOCK) for pool in self.pools]
            if all(run >= start for run, start in zip(runs, starts, strict=True)):
                found = end
            elif any(run < end for pool, run in zip(self.pools, runs, strict=True)
                     if pool.span == Span()):
                break
        for pool in self.pools:
            first = pool.first_block(found * BLOCK)
            pool.first[slot] = first
            for n, digest in enumerate(sequence.digests[first:found]):
                block = pool.lookup(digest)
                assert block is not None
                pool.share(block)
                pool.table[slot, n] = block
        sequence.end = sequence.complete = found
        sequence.computed = sequence.writable = found * BLOCK

    def reserve(self, sequence: Sequence, length: int) -> bool:
        """Blocks to write the keys up to `length` into; False, and nothing done, if too few are
        available."""
        if length <= sequence.writable:
            return True
        slot, tail, end = sequence.slot, sequence.computed // BLOCK, -(-length // BLOCK)
        new = max(0, end - sequence.end)
        shared = []
        for number, pool in enumerate(self.pools):
            place = tail - int(pool.first[slot])
            copied = tail < sequence.end and pool.references[int(pool.table[slot, place])] > 1
            if pool.available < new + copied:
                return False
            shared += [(number, pool, place)] if copied else []
        for number, pool, place in shared:
            old, own = int(pool.table[slot, place]), pool.allocate()
            pool.table[slot, place] = own
            pool.free(old)
            self.copies.append((number, old, own))
        for pool in self.pools:
            pool.extend(slot, sequence.end, sequence.end + new)
        sequence.end += new
        sequence.writable = sequence.end * BLOCK
        return True

    def commit(self, sequence: Sequence) -> None:
        """After a step: full blocks become known, and those that no later token attends to are
        given back."""
        full = sequence.computed // BLOCK
        if full == sequence.complete:
            return
        for index in range(sequence.complete, full) if self.prefix_cache else ():
            digest = self._digest_of(sequence, index)
            for pool in self.pools:
                place = sequence.slot, index - pool.first[sequence.slot]
                pool.register(int(pool.table[place]), digest)
        sequence.complete = full
        for pool in self.pools:
            pool.trim(sequence.slot, pool.first_block(sequence.computed), sequence.end)

    def fork(self, sequence: Sequence, copy: Sequence) -> None:
        """Let `copy`, whose tokens are the same, share all blocks."""
        copy.slot = self._slots.pop()
        for pool in self.pools:
            held = sequence.end - int(pool.first[sequence.slot])
            pool.first[copy.slot] = pool.first[sequence.slot]
            pool.table[copy.slot, :held] = pool.table[sequence.slot, :held]
            for block in pool.table[copy.slot, :held].tolist():
                pool.share(block)
        copy.computed, copy.end = sequence.computed, sequence.end
        copy.complete, copy.digests = sequence.complete, list(sequence.digests)
        copy.writable = sequence.writable = sequence.computed

    def release(self, sequence: Sequence) -> None:
        """Give back the slot and all blocks."""
        for pool in self.pools:
            pool.clear(sequence.slot, sequence.end)
        self._slots.append(sequence.slot)
        sequence.reset()

    def _digest_of(self, sequence: Sequence, index: int) -> bytes:
        """The digest of block `index`, which must be full: of its tokens, of the tiles that its
        image tokens stand for, and of all blocks before it and the request's key."""
        digests, tiles = sequence.digests, sequence.tiles
        while len(digests) <= index:
            places = range(len(digests) * BLOCK, (len(digests) + 1) * BLOCK)
            before = digests[-1] if digests else blake2b(sequence.request.key.encode()).digest()
            content = array("q", sequence.tokens[places.start : places.stop]).tobytes()
            if tiles:
                content += b"".join(tiles[at] for at in places if at in tiles)
            digests.append(blake2b(before + content, digest_size=16).digest())
        return digests[index]
