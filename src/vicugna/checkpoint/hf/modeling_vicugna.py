"""A Vicugna for transformers: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).

The network is the one of the package `vicugna` (pip install vicugna); this file only wraps it.
There is no cache here: `generate` recomputes the sequence for every token, whatever `use_cache`
says (`vicugna serve` and `vicugna.load` do not). `attention_mask` hides padding on either side.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vicugna import models
from vicugna.models.layers.attention import Dense


class VicugnaConfig(PretrainedConfig):
    model_type = "vicugna"


class VicugnaForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = VicugnaConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012

    def __init__(self, config: VicugnaConfig) -> None:
        super().__init__(config)
        network: Any = models.build(config.to_dict())
        if network.lm_head.weight.device.type != "meta":  # from_pretrained fills it by itself
            models.initialise(network, seed=torch.initial_seed())
        self.model, self.lm_head = network.model, network.lm_head
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Done as a whole by `models.initialise`."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, labels: Tensor | None = None,
                logits_to_keep: int = 0, **unused: Any) -> CausalLMOutputWithPast:
        """Token ids [B, T], mask [B, T] with 0 on padding -> logits [B, T or logits_to_keep, V]."""
        if attention_mask is not None:
            # Padding on the left stands at position 0, and so does the first real token: it begins
            # a document of its own, which sees nothing before it. Causality hides the right.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        elif position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        position_ids = position_ids.expand(input_ids.shape)
        hidden = self.model(input_ids, position_ids, Dense(position_ids, self.model.spans))
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels,
                                      vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)
