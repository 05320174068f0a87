"""Prompts with images, in batches and in chunks: each is continued as it is alone."""

from typing import Any

import pytest
import torch
from tiny_networks import finish

from vicugna import models
from vicugna.engine import Completion, Engine, Request, Sampling, generate, runner, stream
from vicugna.errors import VicugnaError
from vicugna.models.layers.attention import Dense

IMAGE, FEATURES = 60, 4
GREEDY = Sampling(max_new_tokens=6)
VISION = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projector_input_dim": 16,
        "projector_output_dim": 16, "vision_output_dim": 16}
TEXT = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "intermediate_size_mlp": 40,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_local_experts": 2, "interleave_moe_layer_step": 2, "attention_chunk_size": 16,
        "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def network() -> Any:
    made = models.build({"model_type": "llama4", "text_config": TEXT, "vision_config": VISION,
                         "image_token_index": IMAGE})
    models.initialise(made, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.4)
    return made


def tiles(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()


def tokens(length: int, seed: int, *images: int) -> list[int]:
    """A prompt with tiles at these places."""
    drawn = torch.randint(0, IMAGE, (length,), generator=torch.Generator().manual_seed(seed))
    prompt = drawn.tolist()
    for at in images:
        prompt[at : at + FEATURES] = [IMAGE] * FEATURES
    return prompt


# One text, one with two images, one without any, the first with another image.
PROMPTS = [tokens(30, 0, 14), tokens(50, 1, 0, 20, 40), tokens(12, 2), tokens(30, 0, 14)]
IMAGES = [tiles(1, 0), tiles(3, 1), None, tiles(1, 3)]


@torch.no_grad()
def alone(network: Any, prompt: list[int], images: torch.Tensor | None) -> list[int]:
    """Greedy tokens, all of the prompt and its images anew for each."""
    generated: list[int] = []
    for _ in range(GREEDY.max_new_tokens):
        row = torch.tensor([[*prompt, *generated]])
        hidden = network(row, torch.arange(row.shape[1])[None], Dense(), images=images)
        generated.append(int(network.lm_head(hidden)[0, -1].argmax()))
    return generated


def tokens_of(done: list[Completion]) -> list[list[int]]:
    return [one.tokens for one in done]


@pytest.mark.parametrize("budget", [16, 2048])
def test_a_batch_continues_as_each_prompt_alone(network: Any, budget: int,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the prompts are read in chunks, of which one ends within an image, and again,
    when what was read is known: by the pictures, not only by their tokens."""
    monkeypatch.setattr(runner, "TILES", 2)
    due = [alone(network, *pair) for pair in zip(PROMPTS, IMAGES, strict=True)]
    assert due[0] != due[3]  # the image alone tells them apart
    engine = Engine(network, tokens=500, slots=4, token_budget=budget)
    for _ in range(2):
        ids = [engine.add(Request(tuple(prompt), GREEDY, images))
               for prompt, images in zip(PROMPTS, IMAGES, strict=True)]
        done = finish(engine)
        assert [done[id][0] for id in ids] == due
    assert tokens_of(generate(network, None, PROMPTS, GREEDY, images=IMAGES)) == due
    for prompt, images, expected in zip(PROMPTS, IMAGES, due, strict=True):
        steps = stream(network, None, prompt, GREEDY, images=images)
        assert [token for step in steps for token in step.tokens] == expected


def test_images_are_encoded_once(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    with monkeypatch.context() as patch:
        encode = network.encode_images
        patch.setattr(network, "encode_images", lambda images: encoded.append(len(images))
                      or encode(images))
        twice = generate(network, None, PROMPTS[:1] * 2, GREEDY, images=IMAGES[:1] * 2)
    assert encoded == [1]
    assert twice[0].tokens == twice[1].tokens


@pytest.mark.parametrize(("prompts", "images", "message"), [
    (PROMPTS[:1], [tiles(2, 0)], "4 image tokens, but 2 tiles make 8"),
    (PROMPTS[:1], [tiles(0, 0)], "4 image tokens, but 0 tiles"),
    (PROMPTS[2:3], [tiles(1, 0)], "0 image tokens, but 1 tiles"),
    (PROMPTS[:2], [None, tiles(3, 0)], "prompt 1: 4 image tokens, but 0 tiles"),
    (PROMPTS[:2], [tiles(1, 0)], "2 prompts but 1 lists of images"),
    (PROMPTS[:1], [tiles(1, 0)[..., 1:]], "Give tiles of 3 x 16 x 16")])
def test_images_that_do_not_fit_are_named(network: Any, prompts: Any, images: Any, message: str
                                          ) -> None:
    with pytest.raises(VicugnaError, match=message):
        generate(network, None, prompts, GREEDY, images=images)


def test_a_network_without_a_vision_encoder_takes_no_images() -> None:
    text_only = models.build({"model_type": "llama4_text", **TEXT})
    with pytest.raises(VicugnaError, match="no vision encoder"):
        stream(text_only, None, PROMPTS[0], GREEDY, images=IMAGES[0])
