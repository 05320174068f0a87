"""Who is computed next: fairness and pre-emption."""

from vicugna.engine import Request, Sampling
from vicugna.engine.blocks import BlockManager, Pool
from vicugna.engine.scheduler import Scheduler
from vicugna.engine.sequence import Sequence
from vicugna.models.layers.mask import Span


def scheduler(blocks=1000, budget=64, slots=8):
    return Scheduler(BlockManager([Pool(Span(), blocks, slots, 200)], slots), budget)


def add(to, id, length, token=None, new=50):
    prompt = (id if token is None else token,) * length
    to.add(sequence := Sequence(id, Request(prompt, Sampling(new)), 3000))
    return sequence


def step(of):
    """One step: {id: tokens computed}; those that have been read gain a token."""
    batch = of.schedule()
    for sequence, n in batch:
        sequence.computed += n
        of.blocks.commit(sequence)
        if sequence.uncomputed == 0:
            for own in [sequence, *of.fork(sequence)]:
                own.tokens.append(9)
    return {sequence.id: n for sequence, n in batch}


def test_a_long_prompt_does_not_freeze_short_ones():
    of = scheduler()
    chat = add(of, 1, 10)
    assert step(of) == {1: 10}
    long, late = add(of, 2, 1000), add(of, 3, 20)
    assert step(of) == {1: 1, 2: 43, 3: 20}  # the short one is read at once
    for _ in range(5):
        assert step(of) == {1: 1, 2: 62, 3: 1}
    assert (chat.uncomputed, late.uncomputed) == (1, 1) and long.uncomputed > 600


def test_short_prompts_do_not_starve_a_long_one():
    of = scheduler(slots=8)
    add(of, 1, 2500)
    for id in range(2, 30):
        add(of, id, 60, new=1)
        assert step(of)[1] >= 28


def test_equal_prompts_are_read_once():
    of = scheduler()
    copies = [add(of, id, 100, token=5) for id in (1, 2, 3)]
    assert step(of) == {1: 64} and step(of) == {1: 36}
    assert [one.uncomputed for one in copies] == [1, 1, 1]
    assert step(of) == {1: 1, 2: 1, 3: 1}


def test_when_the_first_of_equal_prompts_leaves_the_next_is_read():
    of = scheduler()
    first, second, third = (add(of, id, 100, token=5) for id in (1, 2, 3))
    step(of)
    of.remove(first)
    assert step(of) == {2: 36}  # 64 were in full blocks, and are known
    of.remove(third)
    assert step(of) == {2: 1} and not second.followers


def test_the_youngest_gives_its_blocks_to_the_oldest_and_is_read_again():
    of = scheduler(blocks=1 + 6, budget=200)
    old, young = add(of, 1, 40), add(of, 2, 30)
    assert step(of) == {1: 40, 2: 30}
    for _ in range(8):
        step(of)
    while young.slot >= 0:
        step(of)
    assert old.slot >= 0 and of.blocks.used == len(of.blocks.pools[0].references)
    gained = len(young.tokens)
    of.remove(old)
    assert step(of)[2] <= gained and len(young.tokens) == gained + 1
