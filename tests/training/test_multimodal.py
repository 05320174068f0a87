"""A network with a vision encoder learns from text: what only images reach stays as it is."""

from pathlib import Path

import pytest
import torch
from kit import batch, network, spec, stopping_at

from vicugna import models
from vicugna.distributed import Ranks
from vicugna.models.counts import VISION
from vicugna.training.objectives import next_token
from vicugna.training.trainer import train

ENCODER = {"hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 1, "image_size": 8, "patch_size": 4, "projector_input_dim": 8,
        "projector_output_dim": 8, "vision_output_dim": 8}


def multimodal() -> torch.nn.Module:
    text = network("llama4_text", intermediate_size_mlp=24, num_local_experts=2,
                   interleave_moe_layer_step=2, tie_word_embeddings=False).config.to_dict()
    made = models.build({"model_type": "llama4", "text_config": text, "vision_config": ENCODER})
    models.initialise(made, seed=0)
    return made


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_killed_training_ends_in_the_same_bytes(kind: str, tmp_path: Path) -> None:
    stage, initial, ends = spec(optimiser={"kind": kind}), multimodal().state_dict(), []
    for folder, stops in (("whole", []), ("killed", [4, 7])):
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                train(multimodal(), next_token, stopping_at(stop), stage, tmp_path / folder, "t",
                      Ranks())
        ends.append(multimodal())
        train(ends[-1], next_token, batch, stage, tmp_path / folder, "t", Ranks())
    whole, killed = (end.state_dict() for end in ends)
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name
        assert torch.equal(tensor, initial[name]) == name.startswith(VISION), name
