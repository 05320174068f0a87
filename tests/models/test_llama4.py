"""Llama 4 against transformers on random weights: text, long positions, images."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    TINY,
    agree_cached,
    agree_gradients,
    agree_padded,
    agree_round_trip,
    agree_uncached,
    converted,
    in_parts,
    logits_of,
    near,
    pair,
    random_tokens,
    reference,
)
from transformers import AutoModelForImageTextToText, DynamicCache, Llama4Config, Llama4TextConfig

from vicugna import models
from vicugna.errors import VicugnaError
from vicugna.model import Model
from vicugna.models.layers.attention import Dense

CHUNK, IMAGE = 16, 90
LAYERS = {**TINY, "num_hidden_layers": 4, "intermediate_size": 40, "intermediate_size_mlp": 72,
          "head_dim": 16, "num_local_experts": 4, "attention_chunk_size": CHUNK,
          "floor_scale": 8, "attn_scale": 0.5, "interleave_moe_layer_step": 2}
VISION = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 24, "patch_size": 4, "projector_input_dim": 24,
        "projector_output_dim": 24, "vision_output_dim": 24, "initializer_range": 0.1}
FEATURES = 9  # of a tile: 6 * 6 patches, four of which make one
SCOUT_ROPE = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
              "high_freq_factor": 1.0, "original_max_position_embeddings": 64,
              "rope_theta": 500000.0}


def text(**changes):
    return Llama4TextConfig(**{**LAYERS, **changes})


def multimodal(vision=(), **changes):
    return Llama4Config(text_config={**LAYERS, **changes}, vision_config={**VISION, **dict(vision)},
                        image_token_index=IMAGE, boi_token_index=88, eoi_token_index=89)


@functools.cache
def both(kind=text):
    """The models that several tests only look at."""
    make = {} if kind is text else {"make": AutoModelForImageTextToText}
    return pair(kind(), **make)


CASES = {
    "all features": {},
    "no query-key norm": {"use_qk_norm": False},
    "no temperature tuning": {"attn_temperature_tuning": False},
    "a global layer every second": {"no_rope_layer_interval": 2},
    "a list of global layers": {"no_rope_layers": [0, 1, 1, 0]},
    "RoPE everywhere": {"no_rope_layers": [1, 1, 1, 1]},
    "RoPE layers with full attention": {"layer_types": ["full_attention"] * 4},
    "a global layer in chunks": {"layer_types": ["chunked_attention", "full_attention"] * 2},
    "experts in every layer": {"interleave_moe_layer_step": 1},
    "experts in listed layers": {"moe_layers": [0, 3]},
    "no experts": {"moe_layers": []},
    "two experts a token": {"num_experts_per_tok": 2},
    "every expert": {"num_experts_per_tok": 4},
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "Scout's RoPE": {"rope_parameters": SCOUT_ROPE},
    "linear RoPE": {"rope_parameters": {"rope_type": "linear", "factor": 4.0,
                                        "rope_theta": 10000.0}},
    "one key head": {"num_key_value_heads": 1},
    "chunks of an odd size": {"attention_chunk_size": 7},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_equal_transformers(changes):
    theirs, ours = pair(text(**changes))
    tokens = random_tokens(2, 45)
    agree_uncached(theirs, ours, tokens)
    agree_cached(theirs, ours, tokens, [5, 12, 1, 1, 20, 6])
    agree_padded_by_column(theirs, ours, tokens, [0, 11], [30, 1, 1, 13])


def agree_padded_by_column(theirs, ours, tokens, pads, parts, images=None):
    """Left-padded rows as transformers takes them when it is given no positions: columns count,
    padding included."""
    mask = torch.arange(tokens.shape[1]) >= torch.tensor(pads)[:, None]
    pixels = {} if images is None else {"pixel_values": images}
    with torch.no_grad():
        due = theirs(tokens, attention_mask=mask.long(), **pixels).logits
    columns, left = torch.arange(tokens.shape[1]).expand(tokens.shape), images

    def next_images(part):
        nonlocal left
        count = int((part == IMAGE).sum()) // FEATURES
        now, left = left[:count], left[count:]
        return {"images": now}

    got = in_parts(ours, tokens, columns, parts, pads, None if images is None else next_images)
    near(got[mask], due[mask])


def test_padding_does_not_change_a_row():
    """Its own positions decide, so the padding that batching adds changes nothing; where
    temperature tuning is off, transformers says so too."""
    theirs, ours = both()
    tokens, pads = random_tokens(2, 40), [0, 13]
    positions = (torch.arange(40) - torch.tensor(pads)[:, None]).clamp(min=0)
    padded = in_parts(ours, tokens, positions, [40], pads)
    with torch.no_grad():
        near(padded[1:, 13:], theirs(tokens[1:, 13:]).logits)
    agree_padded(*pair(text(attn_temperature_tuning=False)), tokens, pads, [33, 1, 1, 5])


def test_ties_between_experts_break_as_in_transformers():
    theirs = reference(text(num_experts_per_tok=2, interleave_moe_layer_step=1))
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.feed_forward.router.weight[1:] = layer.feed_forward.router.weight[0]
    agree_uncached(theirs, converted(theirs), random_tokens(2, 30))


def test_without_a_chunk_size_every_layer_sees_everything():
    """transformers refuses to run such a file; layers of the same weights with full attention
    are what it means."""
    theirs, ours = pair(text(layer_types=["full_attention"] * 4))
    unbounded = models.build({**ours.config.to_dict(), "layer_types": None,
                              "attention_chunk_size": None})
    assert unbounded.config.attention_chunk_size is None
    unbounded.load_state_dict(ours.state_dict())
    agree_uncached(theirs, unbounded, random_tokens(1, 40))


# Positions at which the architecture itself changes: its chunks and its temperature.

LONG = {"hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1,
        "max_position_embeddings": 65536, "attention_chunk_size": 8192, "floor_scale": 8192,
        "attn_scale": 0.5, "no_rope_layers": [1, 0], "initializer_range": 0.2}


def test_8192_is_crossed_after_padding_and_in_a_cache():
    """The row begins after 20 columns of padding, so its first chunk ends 20 columns later."""
    theirs, ours = pair(text(**LONG))
    theirs.set_attn_implementation("sdpa")
    tokens = random_tokens(1, 8192 + 40)
    agree_padded_by_column(theirs, ours, tokens, [20], [8190, 1, 1, 1, 17, 1, 1, 20])


@pytest.mark.parametrize("past", [8190, 16380, 32766, 40000])
def test_temperature_grows_beyond_32k(past):
    """A layer with full attention, after `past` keys and values made up for both."""
    theirs, ours = pair(text(**LONG | {"num_hidden_layers": 1, "no_rope_layers": [0]}))
    torch.manual_seed(0)
    keys, values = torch.randn(1, 1, past, 8), torch.randn(1, 1, past, 8)
    tokens = random_tokens(1, 5)
    cache = DynamicCache()
    cache.update(keys, values, 0)
    with torch.no_grad():
        due = theirs(tokens, past_key_values=cache).logits
    positions = torch.arange(past, past + 5)[None]

    def attend(layer, q, k, v, span, scale=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        visible = torch.ones(5, past + 5, dtype=torch.bool).tril(past)
        return F.scaled_dot_product_attention(
            q, torch.cat([keys, k], 2), torch.cat([values, v], 2), visible).transpose(1, 2)

    near(logits_of(ours, tokens, positions, attend), due)
    flat = models.build({**ours.config.to_dict(), "attn_temperature_tuning": False})
    flat.load_state_dict(ours.state_dict())
    assert (logits_of(flat, tokens, positions, attend) - due).abs().max() > 1e-3


@pytest.mark.parametrize("first", [8190, 40000, 1000000])
def test_rope_turns_by_large_positions_as_in_transformers(first):
    theirs, ours = pair(text(no_rope_layers=[1, 1, 1, 1], rope_parameters=SCOUT_ROPE))
    agree_uncached(theirs, ours, random_tokens(1, 30), first)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_cached_equals_uncached(data):
    """Whatever the chunk, the padding and the split into calls."""
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3), "lengths")
    config = {**text().to_dict(), "attention_chunk_size": data.draw(st.integers(1, 45), "chunk"),
              "floor_scale": data.draw(st.integers(1, 50), "floor")}
    ours = models.build(config)
    ours.load_state_dict(both()[1].state_dict())
    T = max(lengths)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, T - 1))), "cuts") - {T})
    parts = [b - a for a, b in zip([0, *cuts], [*cuts, T], strict=True)]
    tokens, pads = random_tokens(len(lengths), T), [T - n for n in lengths]
    positions = (torch.arange(T) - torch.tensor(pads)[:, None]).clamp(min=0)
    got = in_parts(ours, tokens, positions, parts, pads)
    for row, pad in enumerate(pads):
        near(got[row : row + 1, pad:], logits_of(ours, tokens[row : row + 1, pad:]), 2e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_packed_documents_equal_documents_alone(lengths):
    """Chunks and temperature begin anew in every document."""
    ours, tokens = both()[1], random_tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits_of(ours, tokens, positions, Dense(positions)).split(lengths, 1)
    for part, document in zip(packed, tokens.split(lengths, 1), strict=True):
        near(part, logits_of(ours, document), 2e-5)


@pytest.mark.parametrize("changes", [{}, {"num_experts_per_tok": 2, "attention_bias": True},
                                     {"tie_word_embeddings": True, "moe_layers": []}])
def test_gradients_equal_transformers(changes):
    agree_gradients(*pair(text(**changes)), random_tokens(2, 24))


# Images.


def image_rows():
    """Two rows, the second with 7 tokens of padding before it: two images of one and two tiles in
    the first, one of one tile in the second. Their four tiles."""
    tokens, tile = random_tokens(2, 50, vocabulary=80), [IMAGE] * FEATURES
    tokens[0, 4 : 4 + FEATURES] = tokens[0, 20:29] = tokens[0, 29:38] = torch.tensor(tile)
    tokens[1, 10:19] = torch.tensor(tile)
    return tokens, [0, 7], torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(3))


def test_images_among_text_equal_transformers():
    theirs, ours = both(multimodal)
    tokens, pads, images = image_rows()
    with torch.no_grad():
        due = theirs(tokens, pixel_values=images).logits
        text_only = theirs(tokens).logits
    near(Model(ours).logits(tokens, images=images), due)
    near(Model(ours).logits(tokens), text_only)
    assert (due - text_only).abs().max() > 0.1  # the images matter
    swapped = Model(ours).logits(tokens, images=images[[1, 0, 2, 3]])
    assert (swapped - due)[0, 4:].abs().max() > 1e-2  # and their order matters
    agree_padded_by_column(theirs, ours, tokens, pads, [50], images)


def test_images_are_encoded_once_with_a_cache():
    """Row 0 alone: its three tiles come with the calls that hold their tokens."""
    theirs, ours = both(multimodal)
    tokens, _, images = image_rows()
    for parts in ([14, 15, 21], [4, 9, 7, 18, 1, 1, 10]):
        agree_padded_by_column(theirs, ours, tokens[:1], [0], parts, images[:3])


VISION_CASES = {
    "no shuffle": {"pixel_shuffle_ratio": 1.0, "intermediate_size": 32},
    "squares of nine": {"pixel_shuffle_ratio": 1 / 3, "intermediate_size": 288},
    "an edge cut off": {"image_size": 27},
    "other positions": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "one channel": {"num_channels": 1},
    "one head": {"num_attention_heads": 1},
}


@pytest.mark.parametrize("vision", VISION_CASES.values(), ids=VISION_CASES)
def test_image_features_equal_transformers(vision):
    theirs, ours = pair(multimodal(vision, num_hidden_layers=1), make=AutoModelForImageTextToText)
    config = ours.config.vision_config
    images = torch.randn(2, config.num_channels, config.image_size, config.image_size)
    with torch.no_grad():
        due = theirs.get_image_features(pixel_values=images).last_hidden_state
        got = ours.vision_model(images)
    assert due.std() > 0.1 and due.shape[1] == config.features
    near(got, due)


def test_gradients_reach_the_vision_encoder():
    theirs, ours = pair(multimodal(num_hidden_layers=2), make=AutoModelForImageTextToText)
    tokens, _, images = image_rows()
    theirs(tokens, pixel_values=images, labels=tokens).loss.backward()
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    logits = ours.lm_head(ours(tokens, positions, Dense(), images))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    due = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        got, right = parameter.grad, due[name].grad
        assert torch.allclose(got, right, atol=1e-5, rtol=1e-4), name
        assert right.any() or "k_proj.bias" in name, name  # which no softmax feels


IMAGE_ERRORS = {
    "a tile too many": ((5, 3, 24, 24), "36 image tokens, but 45 features"),
    "a tile too few": ((3, 3, 24, 24), "36 image tokens, but 27 features"),
    "none": ((0, 3, 24, 24), "36 image tokens, but 0 features"),
    "a wrong size": ((4, 3, 24, 28), "Give tiles of 3 x 24 x 24"),
    "no batch": ((3, 24, 24), "Give tiles of 3 x 24 x 24"),
}


@pytest.mark.parametrize("shape, words", IMAGE_ERRORS.values(), ids=IMAGE_ERRORS)
def test_images_that_do_not_fit_are_named(shape, words):
    tokens, _, _ = image_rows()
    with pytest.raises(VicugnaError) as error:
        Model(both(multimodal)[1]).logits(tokens, images=torch.zeros(shape))
    assert words in str(error.value)


def test_a_text_only_model_takes_no_images():
    with pytest.raises(VicugnaError, match="no vision encoder"):
        Model(both()[1]).logits([[1, 2]], images=torch.zeros(1, 3, 24, 24))


def test_a_multimodal_network_is_used_like_a_text_network():
    """Sharding, heads and losses find the decoder where every network has it."""
    ours = both(multimodal)[1]
    assert ours.model is ours.language_model.model
    assert len(ours.model.layers) == ours.config.num_hidden_layers
    tokens = random_tokens(1, 30, vocabulary=80)
    alone = models.build(ours.config.to_dict()["text_config"])
    alone.load_state_dict(ours.language_model.state_dict())
    assert torch.equal(logits_of(ours, tokens), logits_of(alone, tokens))


# Files.


@pytest.mark.parametrize("config, make", [
    (text(), {}),
    (text(**CASES["Scout's RoPE"], tie_word_embeddings=True, moe_layers=[1]), {}),
    (multimodal(), {"make": AutoModelForImageTextToText}),
    (multimodal(tie_word_embeddings=True), {"make": AutoModelForImageTextToText}),
], ids=["text", "text tied", "images", "images tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_come_back_bit_for_bit(config, make, dtype, tmp_path):
    theirs = reference(config, **make)
    for parameter in theirs.parameters():
        parameter.data = parameter.to(dtype)
    agree_round_trip(theirs, tmp_path, **make)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 5))
def test_intervals_give_the_layers_that_transformers_lists(layers, step, interval):
    theirs = text(num_hidden_layers=layers, interleave_moe_layer_step=step,
                  no_rope_layer_interval=interval)
    lists = {"moe_layers": None, "no_rope_layers": None, "layer_types": None}
    ours = models.architecture("llama4_text").Config.from_dict({**theirs.to_dict(), **lists})
    every = range(layers)
    assert [n for n in every if ours.has_experts(n)] == theirs.moe_layers
    assert [int(ours.has_rope(n)) for n in every] == theirs.no_rope_layers
    assert [ours.span(n).chunk == CHUNK for n in every] == [
        kind == "chunked_attention" for kind in theirs.layer_types]


def test_released_files_are_understood():
    """Keys as in Scout's config.json: empty lists, an integer for a switch, RoPE in two keys."""
    config = {
        "model_type": "llama4", "image_token_index": 200092, "boi_token_index": 200080,
        "eoi_token_index": 200081, "text_config": {
            "model_type": "llama4_text", "vocab_size": 202048, "hidden_size": 5120,
            "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48,
            "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
            "interleave_moe_layer_step": 1, "moe_layers": None, "no_rope_layers": [],
            "num_local_experts": 16, "num_experts_per_tok": 1, "attn_temperature_tuning": 4,
            "attn_scale": 0.1, "floor_scale": 8192, "attention_chunk_size": 8192,
            "use_qk_norm": True, "rope_theta": 500000.0, "hidden_act": "silu",
            "for_llm_compressor": False, "max_position_embeddings": 10485760,
            "rope_scaling": {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"}},
        "vision_config": {
            "model_type": "llama4_vision_model", "hidden_act": "gelu", "hidden_size": 1408,
            "image_size": 336, "intermediate_size": 5632, "multi_modal_projector_bias": False,
            "norm_eps": 1e-05, "num_attention_heads": 16, "num_channels": 3,
            "num_hidden_layers": 34, "patch_size": 14, "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 4096, "projector_output_dim": 4096, "rope_theta": 10000,
            "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
            "vision_output_dim": 4096}}
    with torch.device("meta"):
        scout = models.build(config)
    c = scout.config
    assert c.attn_temperature_tuning and c.vision_config.features == 144
    assert [n for n in range(48) if not c.has_rope(n)] == list(range(3, 48, 4))
    assert c.span(0).chunk == 8192 and c.span(3).chunk is None and c.has_experts(0)
    assert round(sum(p.numel() for p in scout.language_model.parameters()) / 1e9, 1) == 107.8
    again = models.architecture("llama4").Config.from_dict(json.loads(json.dumps(c.to_dict())))
    assert again == c


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_parameters_are_as_many_as_the_formula_says(data):
    def number(name, low, high):
        return data.draw(st.integers(low, high), name)

    D, F_, M, N, V = (number(name, 1, 30) for name in "DFMNV")
    G, share, K, E = number("G", 1, 3), number("share", 1, 3), 2 * number("K/2", 1, 8), 5
    H, step = G * share, number("step", 1, 4)
    tied, bias = number("tied", 0, 1), number("bias", 0, 1)
    config = {**text().to_dict(), "hidden_size": D, "intermediate_size": F_, "vocab_size": V,
              "intermediate_size_mlp": M, "num_hidden_layers": N, "num_attention_heads": H,
              "num_key_value_heads": G, "head_dim": K, "num_local_experts": E, "moe_layers": None,
              "interleave_moe_layer_step": step, "tie_word_embeddings": bool(tied),
              "attention_bias": bool(bias), "layer_types": None, "no_rope_layers": None}
    attention = 2 * D * (H + G) * K + bias * ((H + 2 * G) * K + D)
    sparse = N // step
    experts = 3 * D * F_ * (E + 1) + D * E
    expected = ((2 - tied) * V * D + D + N * (attention + 2 * D) + sparse * experts
                + (N - sparse) * 3 * D * M)
    shuffle, side, heads = number("shuffle", 1, 3), number("side", 1, 3), number("heads", 1, 3)
    C, out, L, P = 4 * heads * number("C", 1, 3), number("out", 1, 30), number("L", 1, 3), 2
    wide = C * shuffle**2
    patches = (side * shuffle) ** 2
    layer = 4 * (C * C + C) + 2 * C * wide + wide + C + 4 * C
    encoder = (3 * P * P * C + C + (patches + 1) * C + 4 * C + L * layer + wide * out + out * out)
    vision = {"hidden_size": C, "intermediate_size": wide, "num_hidden_layers": L,
              "num_attention_heads": heads, "image_size": side * shuffle * P, "patch_size": P,
              "pixel_shuffle_ratio": 1 / shuffle, "projector_input_dim": out,
              "projector_output_dim": out, "vision_output_dim": out}

    def count(config):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in models.build(config).parameters())

    assert count(config) == expected
    whole = {"model_type": "llama4", "text_config": config, "vision_config": vision}
    assert count(whole) == expected + encoder + out * D


def test_initialise_fills_everything_the_same_way():
    fresh = [models.build(multimodal(attention_bias=True).to_dict()) for _ in range(2)]
    for network in fresh:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(float("nan"))
        models.initialise(network, seed=3)
    for (name, one), two in zip(fresh[0].named_parameters(), fresh[1].parameters(), strict=True):
        assert torch.equal(one, two) and one.isfinite().all(), name
        if "bias" in name:
            assert (one == 0).all(), name
        else:
            assert (one == 1).all() if "norm" in name else 0 < one.std() < 1, name
