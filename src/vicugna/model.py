"""The Python face: load a model, ask it for logits or text, save it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicugna import chat, checkpoint, engine
from vicugna.chat.messages import image_parts
from vicugna.dtypes import dtype_of
from vicugna.engine import Delta, Sampling
from vicugna.errors import VicugnaError
from vicugna.models.layers.attention import Dense
from vicugna.tokenizer import Tokenizer

Prompt = str | list[dict[str, Any]]


class ContextExceeded(VicugnaError):
    """The prompt leaves no room in the context for an answer."""


@dataclass(frozen=True)
class Generation:
    """A completion: its `text`; the `reasoning` inside <think>, if any; its `tokens` and their
    `logprobs` under the model's own distribution; `finish_reason`, "stop" or "length"; and `usage`:
    prompt_tokens, completion_tokens and total_tokens."""

    text: str
    reasoning: str | None
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    usage: dict[str, int]


def load(path: str | Path, dtype: str = "float32", weights: str = "auto", device: str = "cpu"
         ) -> "Model":
    """Load the checkpoint `path`: a folder in Hugging Face's form or Meta's, a GGUF file, a Hub id
    `org/name[@revision]`, or the name of a packaged model (`smollm2`). `dtype`, in which is
    computed, is "float32", "bfloat16", "float16", or "auto" for what is stored.

    `weights` is how matrices are kept on the CPU: "auto", those that a GGUF file has quantised as
    they are, all others in `dtype`; "bf16", "int8" or "int4", packed into that; or "float", all in
    `dtype`, as is needed to train or to save the network. Raises VicugnaError."""
    kind = None if dtype == "auto" else dtype_of(dtype, "load")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise VicugnaError(f"device {device!r} is not usable here", "load",
                           "Use 'cpu', or install a PyTorch that knows it") from error
    read = engine.weights.read(path, kind, weights, device)
    return Model(read.network, read.tokenizer, read.generation_config, read.origin)


class Model(checkpoint.Checkpoint):
    """A checkpoint that is used. A model without a tokenizer has logits, but no text."""

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor | Sequence[Sequence[int]],
               images: Tensor | None = None) -> Tensor:
        """Logits after every token, float32 [B, T, V], from one forward pass without a cache.

        `images`, for a network with a vision encoder, are pixel values [tiles, 3, H, W], in the
        order of their image tokens. VicugnaError unless the tokens are a rectangle [B, T] of ids in
        the vocabulary, and the images fit them."""
        try:
            tokens = torch.as_tensor(tokens_BT)
        except (TypeError, ValueError, RuntimeError) as error:
            raise VicugnaError(f"not a rectangle of token ids: {error}", "logits",
                               "Give rows of the same length") from error
        if tokens.dim() != 2 or not tokens.numel() or tokens.is_floating_point():
            raise VicugnaError(f"not token ids of shape [B, T], but {tokens.dtype} of shape "
                               f"{list(tokens.shape)}", "logits", "Give one row for each sequence")
        V = self.config.vocab_size
        if outside := tokens[(tokens < 0) | (tokens >= V)].tolist():
            raise VicugnaError(f"token id {outside[0]} is outside the vocabulary of {V}", "logits",
                               "Use this model's tokenizer")
        tokens = tokens.to(next(self.network.parameters()).device, torch.long)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        vision = {}
        if images is not None:
            if not hasattr(self.network, "vision_model"):
                raise VicugnaError("this is a text-only model: it has no vision encoder",
                                   "logits", "Leave images out")
            vision["images"] = torch.as_tensor(images).to(tokens.device)
        return self.network.lm_head(self.network(tokens, positions, Dense(), **vision)).float()

    def generate(self, prompt: Prompt, **settings: Any) -> Generation:
        """Continue or answer a prompt (see `read`). `settings` are engine.Sampling's:
        max_new_tokens=64, temperature=0.0 (greedy), seed=0, top_k, top_p, min_p, stop.
        VicugnaError without a tokenizer, for an impossible setting, for a prompt too long."""
        sampling, tokenizer = _sampling(settings), self.text_tokenizer()
        tokens, images = self.read(prompt)
        out = engine.generate(self.network, tokenizer, [tokens], sampling, images=[images])[0]
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(out.tokens),
                 "total_tokens": len(tokens) + len(out.tokens)}
        reasoning, _ = chat.parse_reply(tokenizer, out.tokens, tokens)
        return Generation(out.text, reasoning, out.tokens, out.logprobs, out.finish_reason, usage)

    def stream(self, prompt: Prompt, **settings: Any) -> Iterator[Delta]:
        """As `generate`, token by token; the last delta has a finish_reason. Errors come now."""
        sampling, tokenizer = _sampling(settings), self.text_tokenizer()
        tokens, images = self.read(prompt)
        return engine.stream(self.network, tokenizer, tokens, sampling, images=images)

    def read(self, prompt: Prompt) -> tuple[list[int], Tensor | None]:
        """Tokens of a text to continue (after the beginning-of-text token), or of a list of
        {"role", "content"} messages to answer, through the chat template; and the tiles of its
        images, as `logits` takes them, None without images. A content may be parts such as
        {"type": "text", "text": "..."} and, for a vision model, {"type": "image", "image" (of
        Pillow), "path", or "url" (data:)}."""
        tokenizer = self.text_tokenizer()
        if isinstance(prompt, str):
            return tokenizer.prompt(prompt), None
        chat.check_messages(prompt)
        if not image_parts(prompt):
            return chat.encode(tokenizer, prompt), None
        if (vision := getattr(self.config, "vision_config", None)) is None:
            raise VicugnaError("this model has no vision encoder: it takes text only", "messages",
                               "Leave the images out, or use a vision model")
        from vicugna.chat.images import encode_with_images  # Pillow is imported for images alone
        return encode_with_images(tokenizer, prompt, vision.image_size, vision.features,
                                  self.config.image_token_index)

    def read_chat(self, messages: list[dict[str, Any]], context: int | None = None
                  ) -> tuple[list[int], Tensor | None]:
        """As `read`; raises ContextExceeded, with both counts, where no room is left to answer in
        `context` tokens (None: the model's own)."""
        tokens, images = self.read(messages)
        context = self.config.context_length if context is None else context
        if len(tokens) >= context:
            raise ContextExceeded(f"the conversation is {len(tokens)} tokens long, and the model's "
                                  f"context holds {context} tokens, answer included", "",
                                  "Shorten it, or begin a new one")
        return tokens, images

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer; VicugnaError when there is none."""
        if self.tokenizer is None:
            raise VicugnaError("this model has no tokenizer: there is no tokenizer.json", "text",
                               "Add its tokenizer files to the folder, or use logits()")
        return self.tokenizer


def _sampling(settings: dict[str, Any]) -> Sampling:
    try:
        return Sampling(**settings)
    except TypeError as error:  # a name that Sampling does not have, or a value's type
        known = ", ".join(field.name for field in fields(Sampling))
        raise VicugnaError(str(error), "sampling", f"The settings are {known}") from error
