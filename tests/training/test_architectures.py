"""Every architecture trains: the loss falls, experts are balanced, each parameter learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import VOCAB, batch, network, spec

from vicugna.distributed import Ranks
from vicugna.models.layers.moe import Balanced
from vicugna.training import cost
from vicugna.training.objectives import next_token
from vicugna.training.trainer import train

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "mistral without a window": {"sliding_window": None},
    "ministral3": {},
    "mistral3": {"text_config": {
        "model_type": "mistral", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.02},
    "deepseek_v3": {"num_key_value_heads": 2, "q_lora_rank": 12, "kv_lora_rank": 10,
                    "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 6,
                    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4,
                    "topk_group": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 24,
                    "attention_chunk_size": 6, "interleave_moe_layer_step": 2},
    "vicugna": {"num_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_trains(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                   ) -> None:
    monkeypatch.setattr(cost, "matmul_rate", lambda dtype, device: 1e9)
    net = network(kind.split()[0], tie_word_embeddings=False, **KINDS[kind])
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    stage = spec(steps=12, micro_rows=2, optimiser={"kind": "adamw", "learning_rate": 0.01})
    train(net, next_token, lambda step: batch(0), stage, tmp_path, "t", Ranks())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert all(row["matmul_utilisation"] > 0 and "mfu" not in row for row in rows)
    for name, p in net.named_parameters():
        assert not torch.equal(p, before[name]), name
    biases = [m.get_buffer(m.bias_name) for m in net.modules() if isinstance(m, Balanced)]
    assert len(biases) == {"vicugna": 3, "deepseek_v3": 2}.get(kind, 0)
    assert all(bias.any() for bias in biases)
