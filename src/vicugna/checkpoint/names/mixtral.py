"""Mixtral, whose files hold every expert's matrices w1 (gate), w3 (up) and w2 (down) apart."""

from vicugna.checkpoint.names.llama import ATTENTION, OUTSIDE
from vicugna.checkpoint.names.names import LAYER, Names, parameters

NAMES = Names(
    OUTSIDE + ATTENTION + parameters(LAYER,
        ("block_sparse_moe.gate.weight", "ffn_gate_inp.weight", "", None),
        ("block_sparse_moe.experts.*.w1.weight", "ffn_gate_exps.weight", "", None),
        ("block_sparse_moe.experts.*.w3.weight", "ffn_up_exps.weight", "", None),
        ("block_sparse_moe.experts.*.w2.weight", "ffn_down_exps.weight", "", None)),
    experts={"experts.gate_up_proj": ("experts.*.w1.weight", "experts.*.w3.weight"),
             "experts.down_proj": ("experts.*.w2.weight",)})
