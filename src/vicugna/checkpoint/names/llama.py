"""Llama 1 to 3.3; and Mistral, Ministral and Qwen2, whose parameters are called the same.

Sources of this and the other tables: transformers' modelling files and its converters of Meta's
files, llama.cpp's gguf-py/gguf/tensor_mapping.py, Meta's llama-models.
"""

from vicugna.checkpoint.names.names import LAYER, Names, parameters

OUTSIDE = parameters(("", "", ""),
    ("model.embed_tokens.weight", "token_embd.weight", "tok_embeddings.weight", 0),
    ("model.norm.weight", "output_norm.weight", "norm.weight", None),
    ("lm_head.weight", "output.weight", "output.weight", 0))
ATTENTION = parameters(LAYER,
    ("input_layernorm.weight", "attn_norm.weight", "attention_norm.weight", None),
    ("self_attn.q_proj.weight", "attn_q.weight", "attention.wq.weight", 0),
    ("self_attn.k_proj.weight", "attn_k.weight", "attention.wk.weight", 0),
    ("self_attn.v_proj.weight", "attn_v.weight", "attention.wv.weight", 0),
    ("self_attn.o_proj.weight", "attn_output.weight", "attention.wo.weight", 1),
    ("post_attention_layernorm.weight", "ffn_norm.weight", "ffn_norm.weight", None))
MLP = parameters(LAYER,
    ("mlp.gate_proj.weight", "ffn_gate.weight", "feed_forward.w1.weight", 0),
    ("mlp.up_proj.weight", "ffn_up.weight", "feed_forward.w3.weight", 0),
    ("mlp.down_proj.weight", "ffn_down.weight", "feed_forward.w2.weight", 1))
NAMES = Names(OUTSIDE + ATTENTION + MLP)
