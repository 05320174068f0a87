"""transformers' Llama4Processor, also where torchvision, which it asks for, is not installed; and
a tiny Llama 4 for it, pictures and chats about them."""

import functools
import importlib.util
import sys
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

SIDE, PATCH, FEATURES = 24, 4, 9  # 6 * 6 patches, four of which make a feature
SPECIAL = ["<|begin_of_text|>", "<|eot|>", "<|header_start|>", "<|header_end|>", "<|python_start|>",
           "<|python_end|>", "<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>",
           "<|tile_x_separator|>", "<|tile_y_separator|>"]


def _stand_in() -> Any:
    """The three functions of torchvision.transforms.v2.functional that are called."""
    def resize(image: Any, size: Any, interpolation: Any, antialias: bool) -> Any:
        return F.interpolate(image, size, mode=interpolation, antialias=antialias)

    def pad(image: Any, padding: list[int], fill: list[int]) -> Any:
        left, top, right, bottom = padding
        assert not any(fill)
        return F.pad(image, (left, right, top, bottom))

    def normalize(image: Any, mean: Any, std: Any, inplace: bool) -> Any:
        mean, std = (torch.tensor(x, dtype=image.dtype).view(-1, 1, 1) for x in (mean, std))
        return (image - mean) / std

    return SimpleNamespace(resize=resize, pad=pad, normalize=normalize,
                           InterpolationMode=SimpleNamespace(LANCZOS="lanczos"))


@functools.cache
def _module() -> Any:
    """The module of Llama4ImageProcessor, whose own code is run either way."""
    name = "transformers.models.llama4.image_processing_llama4"
    if importlib.util.find_spec("torchvision"):
        return importlib.import_module(name)
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    modules[names[-1]].functional = _stand_in()
    backends: Any = importlib.import_module("transformers.image_processing_backends")
    backends.tvF, backends.pil_torch_interpolation_mapping = _stand_in(), {2: "bilinear"}
    sys.modules.update(modules)
    try:
        return importlib.import_module(name)
    finally:
        for name in names:
            del sys.modules[name]


def image_processor(**settings: Any) -> Any:
    """transformers' Llama4ImageProcessor."""
    _module().find_supported_resolutions.cache_clear()  # which forgets all but its last answer
    return _module().Llama4ImageProcessor(**{"size": {"height": SIDE, "width": SIDE}, **settings})


def processor(folder: Path, **settings: Any) -> Any:
    """transformers' processor, with the chat template of Llama 4; its files are in `folder`."""
    raw = tokenizers.Tokenizer(models.BPE({sign: id for id, sign in enumerate(
        sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(SPECIAL)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|begin_of_text|>", eos_token="<|eot|>")
    made = transformers.Llama4Processor(image_processor(**settings), tokenizer, patch_size=PATCH)
    made.save_pretrained(folder)
    return made


def loaded(folder: Path) -> Any:
    """transformers' processor of the files in `folder`."""
    return transformers.Llama4Processor(
        _module().Llama4ImageProcessor.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder), patch_size=PATCH)


def llama4(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """A tiny Llama 4 of random weights as transformers writes it into `folder`; it and its
    processor."""
    theirs = processor(folder, **settings)
    text = {"vocab_size": len(theirs.tokenizer), "hidden_size": 32, "intermediate_size": 48,
            "intermediate_size_mlp": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 3,
            "interleave_moe_layer_step": 2, "attention_chunk_size": 64, "pad_token_id": 0,
            "max_position_embeddings": 2048, "eos_token_id": theirs.tokenizer.eos_token_id}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH,
            "projector_input_dim": 24, "projector_output_dim": 24, "vision_output_dim": 24}
    torch.manual_seed(0)
    model = transformers.Llama4ForConditionalGeneration(transformers.Llama4Config(
        text_config=text, vision_config=vision,
        image_token_index=theirs.tokenizer.convert_tokens_to_ids("<|patch|>"))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model, theirs


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise over a slope of colours."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    slope = np.linspace(0, 190, width)[None, :, None] * [1, 0.5, 0.2]
    return Image.fromarray((noise + slope).astype(np.uint8))


def encoded(made: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The file of a picture."""
    file = BytesIO()
    made.save(file, form, **options)
    return file.getvalue()


def url(data: bytes) -> str:
    """The data: URL of a file."""
    return f"data:image/png;base64,{b64encode(data).decode()}"


def user(*parts: Image.Image | str) -> dict[str, Any]:
    """A message of pictures and texts."""
    return {"role": "user", "content": [
        {"type": "text", "text": part} if isinstance(part, str) else
        {"type": "image", "image": part} for part in parts]}
