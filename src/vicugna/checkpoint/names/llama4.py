"""Llama 4: the text model, before whose names Hugging Face's files have `language_model.` where
there is a vision encoder, and the vision encoder."""

from vicugna.checkpoint.names.llama import OUTSIDE
from vicugna.checkpoint.names.names import LAYER, Names, parameters

ATTENTION = parameters(LAYER,
    ("input_layernorm.weight", "attn_norm.weight",
     "attention_norm.weight attention.wqkv.layer_norm_weight", None),
    ("self_attn.q_proj.weight", "attn_q.weight", "attention.wqkv.weight", 0),
    ("self_attn.k_proj.weight", "attn_k.weight", "attention.wqkv.weight", 0),
    ("self_attn.v_proj.weight", "attn_v.weight", "attention.wqkv.weight", 0),
    ("self_attn.o_proj.weight", "attn_output.weight", "attention.wo.weight", 1),
    ("post_attention_layernorm.weight", "ffn_norm.weight",
     "feed_forward.norm.weight feed_forward.mlp.layer_norm_weight", None))
FEED_FORWARD = parameters(("model.layers.#.feed_forward.", "blk.#.", "layers.#.feed_forward."),
    ("gate_proj.weight", "ffn_gate.weight", "w1.weight mlp.fc1_weight", 0),
    ("up_proj.weight", "ffn_up.weight", "w3.weight mlp.fc1_weight", 0),
    ("down_proj.weight", "ffn_down.weight", "w2.weight mlp.fc2_weight", 1),
    ("router.weight", "ffn_gate_inp.weight", "router_DE", None),
    ("shared_expert.gate_proj.weight", "ffn_gate_shexp.weight", "w_in_shared_FD.weight", 0),
    ("shared_expert.up_proj.weight", "ffn_up_shexp.weight", "w_swiglu_FD.weight", 0),
    ("shared_expert.down_proj.weight", "ffn_down_shexp.weight", "w_out_shared_DF.weight", 1),
    ("experts.gate_up_proj", "ffn_gate_exps.weight ffn_up_exps.weight",
     "experts.moe_w_in_eD_F experts.moe_w_swiglu_eD_F", 2),
    ("experts.down_proj", "ffn_down_exps.weight", "experts.moe_w_out_eF_D", 1))
VISION = parameters(("vision_model.", "", "vision_embeddings."),
    ("class_embedding", "", "vision_encoder.class_embedding", None),
    ("positional_embedding_vlm", "", "vision_encoder.positional_embedding_vlm", None),
    ("patch_embedding.linear.weight", "", "vision_encoder.conv1._linear.weight", 0),
    ("layernorm_pre.weight", "", "vision_encoder.ln_pre.weight", None),
    ("layernorm_post.weight", "", "vision_encoder.ln_post.weight", None),
    ("vision_adapter.mlp.fc1.weight", "", "vision_adapter.mlp.c_fc.weight", 0),
    ("vision_adapter.mlp.fc2.weight", "", "vision_adapter.mlp.c_proj.weight", 1))
VISION_LAYERS = parameters(("vision_model.model.layers.#.", "",
                            "vision_embeddings.vision_encoder.transformer.resblocks.#."),
    ("input_layernorm.weight", "", "ln_1.weight", None),
    ("post_attention_layernorm.weight", "", "ln_2.weight", None),
    ("self_attn.q_proj.weight", "", "attn.wq.weight", 0),
    ("self_attn.k_proj.weight", "", "attn.wk.weight", 0),
    ("self_attn.v_proj.weight", "", "attn.wv.weight", 0),
    ("self_attn.o_proj.weight", "", "attn.wo.weight", 1),
    ("mlp.fc1.weight", "", "mlp.c_fc.weight", 0),
    ("mlp.fc2.weight", "", "mlp.c_proj.weight", 1))
PROJECTOR = parameters(("", "", ""),
    ("multi_modal_projector.linear_1.weight", "", "vision_projection.weight", 0))
NAMES = Names(OUTSIDE + ATTENTION + FEED_FORWARD + VISION + VISION_LAYERS + PROJECTOR)
