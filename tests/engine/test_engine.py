"""The engine as a whole: any batch, any budget, the same answers."""

import random

import pytest
import torch
from tiny_networks import finish, pack_network, random_network, random_prompts

from vicugna.engine import Engine, Request, Sampling
from vicugna.errors import VicugnaError

KINDS = ("llama", "vicugna")


def network_of(kind):
    """A network of this architecture; "packed": one whose rows have the same bits in any batch."""
    if kind != "packed":
        return random_network(kind)
    pytest.importorskip("numba")
    return pack_network(random_network.__wrapped__(
        "mistral", hidden_size=64, intermediate_size=96, head_dim=32), "q8_0")


def requests_of(seed, count):
    """Greedy and sampled, some with the same beginning, short and long."""
    draw, common = random.Random(seed), tuple(random_prompts([40], seed=99)[0])
    made = []
    for n in range(count):
        own = tuple(random_prompts([draw.choice([1, 3, 10, 30])], seed=1000 * seed + n)[0])
        prompt = common[: draw.choice([0, 0, 20, 40])] + own
        made.append(Request(prompt, Sampling(
            draw.randint(1, 6), draw.choice([0.0, 0.8]), seed=n, top_p=draw.choice([1.0, 0.9]))))
    return made


@pytest.mark.parametrize("kind", (*KINDS, "packed"))
def test_a_request_is_answered_alike_alone_and_in_any_batch(kind):
    """100 random batches of each network, over one engine each that keeps what it has read, with
    too few blocks for all, and with requests that are cancelled."""
    network, pool = network_of(kind), requests_of(0, 20)
    alone = [_one(Engine(network, tokens=200, slots=1), request) for request in pool]
    crowded = Engine(network, tokens=100, slots=4, token_budget=48)
    draw = random.Random(1)
    for _ in range(100):
        chosen = [draw.randrange(len(pool)) for _ in range(draw.randint(2, 5))]
        ids = {crowded.add(pool[n]): n for n in chosen}
        gone = draw.sample(sorted(ids), draw.randint(0, 1))
        for _ in range(2):
            assert all(output.id in ids for output in crowded.step())
        for id in gone:
            crowded.cancel(id)
        assert crowded.blocks.used <= sum(pool.blocks - 1 for pool in crowded.blocks.pools)
        done = finish(crowded)
        assert not done.keys() & gone
        for id, (tokens, logprobs, reason) in done.items():
            due = alone[ids[id]]
            first = len(due[0]) - len(tokens)  # what the first steps gave was taken above
            assert (tokens, reason) == (due[0][first:], due[2])
            exact = kind == "packed"
            assert logprobs == pytest.approx(due[1][first:], rel=0, abs=0 if exact else 1e-4)
        assert crowded.blocks.used == 0


def _one(engine, request):
    id = engine.add(request)
    return finish(engine)[id]


@pytest.mark.parametrize("kind", KINDS)
def test_preemption_changes_nothing(kind):
    network, prompts = random_network(kind), random_prompts([30, 30, 30])
    requests = [Request(tuple(prompt), Sampling(40, 0.7, seed=n))
                for n, prompt in enumerate(prompts)]
    due = [_one(Engine(network, tokens=200, slots=1), request) for request in requests]
    small = Engine(network, tokens=80, slots=3)
    released = []
    release = small.blocks.release
    small.blocks.release = lambda sequence: (released.append(sequence.id), release(sequence))
    ids = [small.add(request) for request in requests]
    done = finish(small)
    assert len(released) > len(requests)  # some gave their blocks back before they ended
    for id, (tokens, logprobs, _) in zip(ids, due, strict=True):
        assert done[id][0] == tokens and done[id][1] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_is_not_read_again(kind):
    engine, batches = Engine(network := random_network(kind), tokens=500, slots=2), []
    hook = network.register_forward_pre_hook(lambda _, given: batches.append(given[0].shape[1]))
    for prompt, key, read in (([1] * 50, "", 50), ([1] * 50 + [2] * 20, "", 22),
                              ([1] * 50, "", 2), ([1] * 50, "another caller", 50)):
        _one(engine, Request(tuple(prompt), Sampling(2), key=key))
        assert batches[-2:] == [read, 1]
    hook.remove()


def test_cancelling_takes_effect_at_once():
    engine = Engine(random_network(), tokens=500, slots=2, token_budget=16)
    ids = [engine.add(Request((n,) * 40, Sampling(20))) for n in range(4)]
    engine.step()
    for id in ids[:3]:  # read in part, just begun, waiting
        engine.cancel(id)
    assert set(finish(engine)) == {ids[3]} and engine.blocks.used == 0
    engine.cancel(ids[0])
    engine.cancel(12345)
    assert not engine.busy and engine.step() == []


def test_memory_is_bounded_and_said():
    network, small = random_network("llama"), 4 * 2 * 2 * 8 * 4 * 16  # bytes of a block
    engine = Engine(network, memory=10 * small, slots=4)
    assert engine.budget.bytes <= 10 * small
    held = sum(part.numel() * part.element_size()
               for part in engine.runner.pages.keys + engine.runner.pages.values)
    assert held == engine.budget.bytes
    assert engine.budget.longest == engine.budget.tokens == 8 * 16
    assert str(engine.budget).startswith("KV cache: 0.00 GiB for 128 tokens")
    with pytest.raises(VicugnaError, match="129 tokens, but the cache holds 128"):
        engine.add(Request((1,) * 129))
    assert len(_one(engine, Request((1,) * 100, Sampling(500)))[0]) == 28
    with pytest.raises(VicugnaError, match="Give it at least"):
        Engine(network, memory=small)


def test_an_error_leaves_an_engine_that_goes_on():
    network = random_network("llama", vocab_size=50)
    engine = Engine(network, tokens=100, slots=2)
    weight = network.lm_head.weight
    bad = engine.add(Request((1, 2, 3)))
    with torch.no_grad():
        first = weight[0].clone()
        weight[0] = float("nan")
    with pytest.raises(VicugnaError, match="NaN"):
        engine.step()
    engine.cancel(bad)
    with torch.no_grad():
        weight[0] = first
    assert len(_one(engine, Request((1, 2, 3), Sampling(4)))[0]) == 4
    assert engine.blocks.used == 0
