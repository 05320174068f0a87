"""Llama 4: the text model, before whose names Hugging Face's files have `language_model.` where
there is a vision encoder, and the vision encoder."""

from vicugna.checkpoint.names.llama import OUTSIDE
from vicugna.checkpoint.names.names import Names, in_layers, parameters

TEXT = OUTSIDE + in_layers(
    ("input_layernorm.weight", "attn_norm.weight",
     "attention_norm.weight attention.wqkv.layer_norm_weight", None),
    ("self_attn.q_proj.weight", "attn_q.weight", "attention.wqkv.weight", 0),
    ("self_attn.k_proj.weight", "attn_k.weight", "attention.wqkv.weight", 0),
    ("self_attn.v_proj.weight", "attn_v.weight", "attention.wqkv.weight", 0),
    ("self_attn.o_proj.weight", "attn_output.weight", "attention.wo.weight", 1),
    ("post_attention_layernorm.weight", "ffn_norm.weight",
     "feed_forward.norm.weight feed_forward.mlp.layer_norm_weight", None),
    ("feed_forward.gate_proj.weight", "ffn_gate.weight",
     "feed_forward.w1.weight feed_forward.mlp.fc1_weight", 0),
    ("feed_forward.up_proj.weight", "ffn_up.weight",
     "feed_forward.w3.weight feed_forward.mlp.fc1_weight", 0),
    ("feed_forward.down_proj.weight", "ffn_down.weight",
     "feed_forward.w2.weight feed_forward.mlp.fc2_weight", 1),
    ("feed_forward.router.weight", "ffn_gate_inp.weight", "feed_forward.router_DE", None),
    ("feed_forward.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight",
     "feed_forward.w_in_shared_FD.weight", 0),
    ("feed_forward.shared_expert.up_proj.weight", "ffn_up_shexp.weight",
     "feed_forward.w_swiglu_FD.weight", 0),
    ("feed_forward.shared_expert.down_proj.weight", "ffn_down_shexp.weight",
     "feed_forward.w_out_shared_DF.weight", 1),
    ("feed_forward.experts.gate_up_proj", "ffn_gate_exps.weight ffn_up_exps.weight",
     "feed_forward.experts.moe_w_in_eD_F feed_forward.experts.moe_w_swiglu_eD_F", 2),
    ("feed_forward.experts.down_proj", "ffn_down_exps.weight",
     "feed_forward.experts.moe_w_out_eF_D", 1))
_META, _OURS = "vision_embeddings.vision_encoder.", "vision_model."
_META_LAYER, _OURS_LAYER = f"{_META}transformer.resblocks.#.", f"{_OURS}model.layers.#."
VISION = parameters(
    (f"{_OURS}class_embedding", "", f"{_META}class_embedding", None),
    (f"{_OURS}positional_embedding_vlm", "", f"{_META}positional_embedding_vlm", None),
    (f"{_OURS}patch_embedding.linear.weight", "", f"{_META}conv1._linear.weight", 0),
    (f"{_OURS}layernorm_pre.weight", "", f"{_META}ln_pre.weight", None),
    (f"{_OURS}layernorm_post.weight", "", f"{_META}ln_post.weight", None),
    (f"{_OURS_LAYER}input_layernorm.weight", "", f"{_META_LAYER}ln_1.weight", None),
    (f"{_OURS_LAYER}post_attention_layernorm.weight", "", f"{_META_LAYER}ln_2.weight", None),
    (f"{_OURS_LAYER}self_attn.q_proj.weight", "", f"{_META_LAYER}attn.wq.weight", 0),
    (f"{_OURS_LAYER}self_attn.k_proj.weight", "", f"{_META_LAYER}attn.wk.weight", 0),
    (f"{_OURS_LAYER}self_attn.v_proj.weight", "", f"{_META_LAYER}attn.wv.weight", 0),
    (f"{_OURS_LAYER}self_attn.o_proj.weight", "", f"{_META_LAYER}attn.wo.weight", 1),
    (f"{_OURS_LAYER}mlp.fc1.weight", "", f"{_META_LAYER}mlp.c_fc.weight", 0),
    (f"{_OURS_LAYER}mlp.fc2.weight", "", f"{_META_LAYER}mlp.c_proj.weight", 1),
    (f"{_OURS}vision_adapter.mlp.fc1.weight", "",
     "vision_embeddings.vision_adapter.mlp.c_fc.weight", 0),
    (f"{_OURS}vision_adapter.mlp.fc2.weight", "",
     "vision_embeddings.vision_adapter.mlp.c_proj.weight", 1),
    ("multi_modal_projector.linear_1.weight", "", "vision_projection.weight", 0))
NAMES = Names(TEXT + VISION)
