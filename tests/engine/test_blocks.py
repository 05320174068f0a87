"""Blocks and their owners: random requests come, are read, answered, cancelled and pre-empted, and
every key that a token attends to is the one that its own prefix put there."""

from itertools import accumulate, count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vicugna.engine import Request, Sampling
from vicugna.engine.blocks import BLOCK, BlockManager, Pool
from vicugna.engine.scheduler import Scheduler
from vicugna.engine.sequence import Sequence
from vicugna.models.layers.mask import Span

KINDS = {Span(): 14, Span(window=20): 14, Span(chunk=24): 14}  # and how many blocks there are
SLOTS, BUDGET, LONGEST = 5, 40, 12 * BLOCK


class Machine(RuleBasedStateMachine):
    """The engine without a network: what a key would depend on is written instead of it."""

    def __init__(self):
        super().__init__()
        self.pools = [Pool(span, blocks, SLOTS, LONGEST // BLOCK + 2)
                      for span, blocks in KINDS.items()]
        self.blocks = BlockManager(self.pools, SLOTS)
        self.scheduler = Scheduler(self.blocks, BUDGET)
        self.content = [{} for _ in self.pools]  # (block, offset) -> mark of the tokens up to there
        self.marks = {}  # of each sequence, the mark of every beginning of its tokens
        self.sequences, self.ids = [], count(1)

    @rule(length=st.integers(1, 100), new=st.integers(1, 60), kind=st.integers(0, 2))
    def add(self, length, new, kind):
        """Prompts of one kind begin alike."""
        prompt = tuple([kind] * length) if kind < 2 else tuple(n % 3 for n in range(length))
        sequence = Sequence(next(self.ids), Request(prompt, Sampling(new)), LONGEST)
        self.sequences.append(sequence)
        self.marks[sequence.id] = list(accumulate(prompt, lambda mark, token: hash((mark, token))))
        self.scheduler.add(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cancel(self, data):
        chosen = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(chosen)
        self.scheduler.remove(chosen)

    @rule(token=st.integers(0, 2))
    def step(self, token):
        batch = self.scheduler.schedule()
        assert sum(n for _, n in batch) <= max(BUDGET, BLOCK + SLOTS)
        assert batch or not self.sequences
        for number, source, target in self.blocks.copies:
            for offset in range(BLOCK):
                self.content[number][target, offset] = self.content[number].get((source, offset))
        self.blocks.copies.clear()
        for sequence, n in batch:
            self.write(sequence, n)
        for sequence, n in batch:
            self.read(sequence, n)
            sequence.computed += n
            self.blocks.commit(sequence)
        for sequence, _ in batch:
            if sequence.uncomputed == 0:
                for own in [sequence, *self.scheduler.fork(sequence)]:
                    self.push(own, (token + own.id) % 3)

    def push(self, sequence, token):
        sequence.tokens.append(token)
        marks = self.marks[sequence.id]
        marks.append(hash((marks[-1], token)))
        if len(sequence.tokens) == sequence.limit:
            self.sequences.remove(sequence)
            self.scheduler.remove(sequence)

    def place(self, pool, sequence, position):
        block = pool.table[sequence.slot, position // BLOCK - pool.first[sequence.slot]]
        assert block > 0
        return int(block), position % BLOCK

    def write(self, sequence, n):
        for number, pool in enumerate(self.pools):
            for at in range(sequence.computed, sequence.computed + n):
                place = self.place(pool, sequence, at)
                assert pool.references[place[0]] == 1  # nobody else's
                self.content[number][place] = self.marks[sequence.id][at]

    def read(self, sequence, n):
        for number, pool in enumerate(self.pools):
            for query in {sequence.computed, sequence.computed + n - 1}:
                first = {Span(): 0, Span(window=20): max(0, query - 19),
                         Span(chunk=24): query // 24 * 24}[pool.span]
                for at in {query, *range(first, query, 5)}:
                    place = self.place(pool, sequence, at)
                    assert self.content[number][place] == self.marks[sequence.id][at]

    @invariant()
    def every_block_has_the_owners_it_counts(self):
        for pool in self.pools:
            owners = {}
            for sequence in self.scheduler.running:
                held = sequence.end - int(pool.first[sequence.slot])
                row = pool.table[sequence.slot]
                assert (row[held:] == 0).all()
                for block in row[:held].tolist():
                    owners[block] = owners.get(block, 0) + 1
            assert owners == pool.references
            assert pool.available + len(owners) == pool.blocks - 1

    def teardown(self):
        for _ in range(3000):
            if not self.sequences:
                break
            self.step(1)
        assert not self.sequences and self.blocks.used == 0
        assert self.blocks.free_slots == SLOTS and not self.scheduler.waiting


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=100, deadline=None)


def sequence_of(id, tokens, key="", new=8):
    return Sequence(id, Request(tuple(tokens), Sampling(new), key=key), 1000)


def manager(blocks=20, span=Span(), prefix_cache=True):
    return BlockManager([Pool(span, blocks, 4, 40)], 4, prefix_cache)


def read(blocks, sequence, until=None):
    until = len(sequence.tokens) if until is None else until
    blocks.admit(sequence)
    known = sequence.computed
    assert blocks.reserve(sequence, until)
    sequence.computed = until
    blocks.commit(sequence)
    return known


def test_a_prefix_is_known_by_its_tokens_and_the_callers_key():
    blocks, tokens = manager(), list(range(50))
    first = sequence_of(1, tokens)
    assert read(blocks, first) == 0
    blocks.release(first)
    for known, sequence in ((48, sequence_of(2, tokens)), (32, sequence_of(3, tokens[:48])),
                            (16, sequence_of(4, tokens[:20] + [7] * 30)),
                            (0, sequence_of(5, tokens, key="other")),
                            (0, sequence_of(6, [1, *tokens]))):
        assert read(blocks, sequence) == known
        blocks.release(sequence)
    assert blocks.used == 0


def test_the_prefix_of_a_window_is_what_it_still_sees():
    blocks, tokens = manager(span=Span(window=20)), list(range(100))
    first = sequence_of(1, tokens)
    read(blocks, first)
    assert blocks.used == -(-100 // BLOCK) - (100 - 19) // BLOCK
    blocks.release(first)
    assert read(blocks, sequence_of(2, tokens)) == 96


def test_the_least_recently_used_prefix_is_forgotten_first():
    blocks = manager(blocks=1 + 8)
    for id, token in ((1, 5), (2, 6), (3, 5)):  # the first is used again
        sequence = sequence_of(id, [token] * 49)
        read(blocks, sequence)
        blocks.release(sequence)
    large = sequence_of(4, range(60))
    read(blocks, large)
    blocks.release(large)
    assert read(blocks, sequence_of(5, [5] * 49)) == 48
    assert read(blocks, sequence_of(6, [6] * 49)) < 48


def test_without_a_prefix_cache_nothing_is_known():
    blocks = manager(prefix_cache=False)
    for id in (1, 2):
        sequence = sequence_of(id, range(50))
        assert read(blocks, sequence) == 0
        blocks.release(sequence)


@pytest.mark.parametrize("length", [20, 32])
def test_copies_of_a_prompt_share_blocks_until_they_write(length):
    blocks = manager()
    first, second = sequence_of(1, [3] * length), sequence_of(2, [3] * length)
    read(blocks, first)
    blocks.fork(first, second)
    assert blocks.used == 2
    for sequence in (first, second):
        assert blocks.reserve(sequence, length + 1)
    assert len(blocks.copies) == (1 if length % BLOCK else 0)  # the second has the old block alone
    assert blocks.used == (3 if length % BLOCK else 4)


def test_nothing_is_taken_when_too_little_is_left():
    blocks, sequence = manager(blocks=4), sequence_of(1, [1] * 60)
    blocks.admit(sequence)
    assert not blocks.reserve(sequence, 60) and blocks.used == 0
    assert blocks.reserve(sequence, 48) and blocks.used == 3
