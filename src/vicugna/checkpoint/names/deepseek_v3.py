"""DeepSeek V3 and R1."""

import re
from typing import Any

from vicugna.checkpoint.names.llama import ATTENTION, MLP, OUTSIDE
from vicugna.checkpoint.names.names import LAYER, Names, parameters


def _of_later_tokens(name: str, config: Any) -> bool:
    """Whether a tensor is of the layers that predict further tokens (arXiv 2412.19437, section
    2.2): they follow the others."""
    found = re.match(r"model\.layers\.([0-9]{1,9})\.", name)
    beyond = int(found[1]) - config.num_hidden_layers if found else -1
    return 0 <= beyond < config.num_nextn_predict_layers


NAMES = Names(
    OUTSIDE + ATTENTION + MLP + parameters(LAYER,
        ("self_attn.q_a_proj.weight", "attn_q_a.weight", "", None),
        ("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight", "", None),
        ("self_attn.q_b_proj.weight", "attn_q_b.weight", "", None),
        ("self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight", "", None),
        ("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight", "", None),
        ("self_attn.kv_b_proj.weight", "attn_k_b.weight attn_v_b.weight", "", None),
        ("mlp.gate.weight", "ffn_gate_inp.weight", "", None),
        ("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", "", None),
        ("mlp.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight", "", None),
        ("mlp.shared_experts.up_proj.weight", "ffn_up_shexp.weight", "", None),
        ("mlp.shared_experts.down_proj.weight", "ffn_down_shexp.weight", "", None),
        ("mlp.experts.*.gate_proj.weight", "ffn_gate_exps.weight", "", None),
        ("mlp.experts.*.up_proj.weight", "ffn_up_exps.weight", "", None),
        ("mlp.experts.*.down_proj.weight", "ffn_down_exps.weight", "", None)),
    experts={"experts.gate_up_proj": ("experts.*.gate_proj.weight", "experts.*.up_proj.weight"),
             "experts.down_proj": ("experts.*.down_proj.weight",)},
    passthrough=_of_later_tokens)
