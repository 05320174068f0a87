"""Matrices packed in place of a network's own."""

from typing import Any

import pytest
import torch
from tiny_networks import VOCABULARY, pack_network, plain_logits, random_network, random_prompts

from vicugna import models
from vicugna.checkpoint import Checkpoint, survey
from vicugna.checkpoint.state_dict import Parts
from vicugna.engine import Sampling, cpu, generate, weights
from vicugna.engine.cpu import linear
from vicugna.engine.packed import PackedEmbedding, PackedLinear
from vicugna.engine.weights import plan
from vicugna.errors import VicugnaError

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {"tie_word_embeddings": True}, "vicugna": {"num_experts": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 64},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": None, "q_lora_rank": 32,
                    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                    "v_head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 8,
                    "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
                    "first_k_dense_replace": 1}}


def copy_of(kind: str) -> Any:
    """A network whose rows fill blocks of 32."""
    made = random_network(kind, intermediate_size=64, **SHAPES[kind])
    copy = models.build(made.config.to_dict())
    copy.load_state_dict(made.state_dict())
    return copy.eval()


@pytest.mark.parametrize("kind", SHAPES)
def test_every_architecture_computes_the_same_when_packed(kind):
    """Where nothing is rounded; also token by token, and beside other requests."""
    network, plain = pack_network(copy_of(kind), "f32"), copy_of(kind)
    assert any(isinstance(module, PackedLinear) for module in network.modules())
    prompts = random_prompts([5, 17, 30])
    for prompt in prompts:
        ours, theirs = plain_logits(network, prompt), plain_logits(plain, prompt)
        assert torch.allclose(ours, theirs, atol=1e-3)
    sampling = Sampling(max_new_tokens=12)
    outs, wanted = (generate(one, None, prompts, sampling) for one in (network, plain))
    assert [out.tokens for out in outs] == [out.tokens for out in wanted]


def test_biases_and_dtypes():
    layer = torch.nn.Linear(64, 32)
    packed = PackedLinear(linear.pack(layer.weight.detach(), "bf16"), layer.bias)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    assert packed(x).shape == (2, 3, 32) and torch.allclose(packed(x), layer(x), atol=0.02)
    for dtype in (torch.bfloat16, torch.float16):
        assert packed(x.to(dtype)).dtype == dtype
        assert torch.allclose(packed(x.to(dtype)).float(), layer(x), atol=0.05)
    rows = PackedEmbedding(linear.pack(layer.weight.detach(), "f32"), torch.bfloat16)
    assert torch.equal(rows(torch.tensor([[3, 1]])), layer.weight[[3, 1]][None].bfloat16())


@pytest.fixture
def folder(tmp_path):
    Checkpoint(copy_of("llama")).save(tmp_path / "m")
    return tmp_path / "m"


def test_quantised_when_loaded(folder):
    """Whatever the files hold; the digest says into what."""
    digests = set()
    for how, (inner, outer) in weights.KINDS.items():
        read = weights.read(folder, weights=how)
        assert read.network.model.layers[0].mlp.down_proj.packed.kind == inner
        assert read.network.lm_head.packed.kind == outer
        assert read.network.model.embed_tokens.packed.kind == outer
        digests |= {read.digest, weights.read(folder, torch.bfloat16, how).digest}
    assert len(digests) == 2 * len(weights.KINDS)


def test_the_plan_says_why(folder):
    parts = Parts(survey(folder))
    chosen = plan(parts, "int4")
    down = chosen["model.layers.0.mlp.down_proj.weight"]
    assert (down.stored, down.kind, down.packed, down.nbytes) == (
        "float32", "q4_0", True, 32 * 64 // 32 * 18)
    assert chosen["lm_head.weight"].kind == "q8_0"
    assert chosen["model.norm.weight"].why == "norms, biases and routers are floats"
    assert not any(one.packed for one in plan(parts, "auto").values())


def test_rows_that_do_not_fill_blocks_stay_floats(tmp_path):
    Checkpoint(random_network("llama")).save(tmp_path / "m")
    network = weights.read(tmp_path / "m", weights="int4").network
    assert isinstance(network.model.layers[0].mlp.down_proj, torch.nn.Linear)
    chosen = plan(Parts(survey(tmp_path / "m")), "int4")["model.layers.0.mlp.down_proj.weight"]
    assert chosen.why == "rows of 48 values do not fill blocks"


def test_unknown_weights_are_refused(folder):
    with pytest.raises(VicugnaError, match="unknown weights 'int3'"):
        weights.read(folder, weights="int3")


def test_without_kernels(folder, monkeypatch):
    monkeypatch.setattr(cpu, "why_not", lambda: "numba does not load")
    assert not any(one.packed for one in plan(Parts(survey(folder))).values())
    with pytest.raises(VicugnaError, match="needs the packed kernels: numba does not load"):
        weights.read(folder, weights="int8")
    assert weights.read(folder).network.lm_head.weight.shape[0] == VOCABULARY
