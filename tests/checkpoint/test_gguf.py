"""GGUF: out and in again bit-exact, and as llama.cpp's own package and transformers read it."""

import json
from pathlib import Path

import gguf
import gguf_kit
import numpy as np
import pytest
import torch
import transformers
from gguf_kit import LLAMA3, MODELS, SHAPE, TEXTS, fails, folder_of, rewritten, same, sentencepiece

from vicugna import checkpoint, tokenizer
from vicugna.chat import encode
from vicugna.checkpoint.convert import convert
from vicugna.checkpoint.gguf import file as ours
from vicugna.checkpoint.gguf import keys, tensors
from vicugna.errors import Refused, VicugnaError
from vicugna.model import Model
from vicugna.models.layers import rope


@pytest.fixture(scope="module")
def bpe() -> tokenizer.Tokenizer:
    return gguf_kit.learned()


# Out and in again.

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_out_and_in_again(tmp_path, bpe, changes, dtype):
    folder_of(tmp_path / "a", changes, bpe, dtype)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    before = checkpoint.read(tmp_path / "a", None)
    same(before, checkpoint.read(tmp_path / "m.gguf", None))
    convert(tmp_path / "m.gguf", tmp_path / "b")
    same(before, checkpoint.read(tmp_path / "b", None))
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "tokenizer_config.json",
                 "generation_config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_model_read_from_gguf_is_saved_with_its_tokenizer(tmp_path, bpe):
    folder_of(tmp_path / "a", MODELS["llama"], bpe)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    read = checkpoint.read(tmp_path / "m.gguf")
    read.save(tmp_path / "b")
    same(checkpoint.read(tmp_path / "a"), checkpoint.read(tmp_path / "b"))


def test_without_a_tokenizer(tmp_path):
    folder_of(tmp_path / "a", MODELS["llama"], None)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    same(checkpoint.read(tmp_path / "a"), checkpoint.read(tmp_path / "m.gguf"))


def test_the_same_model_gives_the_same_bytes(tmp_path, bpe):
    folder_of(tmp_path / "a", MODELS["mixtral"], bpe)
    for name in ("x.gguf", "y.gguf"):
        convert(tmp_path / "a", tmp_path / name)
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()


# What llama.cpp's own package finds in it.

def test_keys(tmp_path, bpe):
    folder_of(tmp_path / "a", MODELS["llama 3.1"], bpe)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()
            if not name.startswith(("GGUF.", "vicugna.", "tokenizer."))}
    assert keys == {
        "general.architecture": "llama", "general.type": "model",
        "general.file_type": gguf.LlamaFileType.ALL_F32,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.vocab_size": 610, "llama.context_length": 256, "llama.embedding_length": 64,
        "llama.block_count": 2, "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 24,
        "llama.attention.value_length": 24, "llama.rope.dimension_count": 24,
        "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5))}
    values = {name.removeprefix("tokenizer.ggml."): field.contents()
              for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    assert len(values["tokens"]) == len(values["token_type"]) == 610
    assert values["tokens"][600] == "[PAD600]" and values["token_type"][600:] == [5] * 10
    assert (values["model"], values["pre"], values["add_bos_token"]) == ("gpt2", "qwen2", True)
    assert values["tokens"][values["bos_token_id"]] == "<|begin_of_text|>"
    assert values["tokens"][values["eos_token_id"]] == "<|end_of_text|>"
    assert values["token_type"][values["bos_token_id"]] == gguf.TokenType.CONTROL
    assert values["token_type"][bpe.id_of("<think>")] == gguf.TokenType.USER_DEFINED
    assert values["tokenizer.chat_template"] == bpe.template
    assert all(merge.count(" ") == 1 for merge in values["merges"])


def test_names_and_shapes_of_tensors(tmp_path):
    """As gguf's own table gives them; norms, biases and routers are F32 in every file. Where
    tensors lie otherwise there, test_gguf_mixtures looks."""
    for name, changes in MODELS.items():
        if changes["model_type"] in ("llama4_text", "deepseek_v3"):
            continue
        folder = folder_of(tmp_path / name, changes, None, torch.bfloat16)
        convert(folder, tmp_path / "m.gguf")
        reader = gguf.GGUFReader(tmp_path / "m.gguf")
        arch = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[
            keys.ARCHITECTURES[changes["model_type"]]]
        table = gguf.get_tensor_name_map(arch, 2)
        stored = checkpoint.survey(folder).stored
        wanted = {}
        for key in stored:
            first, _, rest = key.partition(".experts.")
            merged = f"{first}.experts.{rest.partition('.')[2]}" if rest else key
            wanted[table.get_name(merged, (".weight", ".bias"))] = stored[key].shape
        found = {tensor.name: tensor for tensor in reader.tensors}
        factors = found.pop("rope_freqs.weight", None)
        assert (factors is not None) == (name == "llama 3.1")
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            shape = tuple(int(size) for size in tensor.shape)[::-1]
            assert shape[-len(wanted[key]):] == wanted[key]
            plain = len(shape) == 1 or "ffn_gate_inp" in key
            assert tensor.tensor_type.name == ("F32" if plain else "BF16")


@pytest.mark.parametrize("dtype", ["float32", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "mistral", "qwen2"])
def test_transformers_reads_it(tmp_path, bpe, name, dtype):
    """Its own reader, which knows these architectures without biases and scaling."""
    folder_of(tmp_path / "a", MODELS[name], bpe)
    convert(tmp_path / "a", tmp_path / "m.gguf", dtype=dtype, lossy=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    tokens = torch.randint(0, 600, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(tokens).logits
    logits = Model(checkpoint.read(tmp_path / "m.gguf").network).logits(tokens)
    assert torch.allclose(logits, want, atol=1e-5, rtol=0)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert (words.bos_token_id, words.eos_token_id) == (590, 591)
    for text in TEXTS[:-1]:
        assert words.encode(text, add_special_tokens=False) == bpe.encode(text)


@pytest.mark.parametrize("heads", [1, 4])
def test_permuting_rows_changes_between_the_two_layouts_of_rope(heads):
    """Halves rotated against each other, and neighbours after the rows were permuted, give the same
    scores: rotated features are the same numbers in another order."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(heads * 16, 8, generator=generator)
    x = torch.randn(1, 5, 8, generator=generator)
    rotation = rope.rotation(torch.arange(5)[None], rope.inverse_frequencies(16, 1e4, None),
                             torch.float32)
    halves = rope.rotate((x @ weight.T).view(1, 5, heads, 16), *rotation)
    permuted = tensors.permuted(weight, heads)
    pairs = rope.rotate_pairs((x @ permuted.T).view(1, 5, heads, 16), *rotation)
    assert torch.allclose(pairs, halves.unflatten(-1, (2, 8)).transpose(-1, -2).flatten(-2),
                          atol=1e-6)
    assert torch.equal(tensors.permuted(permuted, heads, back=True), weight)
    assert torch.equal(tensors.permuted(permuted[:, 0], heads, back=True), weight[:, 0])  # a bias


def test_frequencies_of_llama_3(tmp_path):
    """rope_freqs.weight divides the frequencies into those that the network uses."""
    folder_of(tmp_path / "a", MODELS["llama 3.1"], None)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    factors, = (t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors
                if t.name == "rope_freqs.weight")
    plain = rope.inverse_frequencies(24, 10000.0, None)
    wanted = rope.inverse_frequencies(24, 10000.0, LLAMA3)
    assert torch.allclose(plain / torch.tensor(factors), wanted, rtol=1e-6)
    assert factors.min() == 1 and factors.max() == pytest.approx(8)


# Quantised.

@pytest.mark.parametrize(("dtype", "error"), [("q8_0", 0.01), ("q4_0", 0.2)])
@pytest.mark.parametrize("experts", [4, 8])
def test_quantised(tmp_path, bpe, dtype, error, experts):
    changes = MODELS["mixtral"] | {"num_local_experts": experts}
    folder_of(tmp_path / "a", changes, bpe)
    with pytest.raises(Refused, match=f"{dtype} rounds the weights"):
        convert(tmp_path / "a", tmp_path / "m.gguf", dtype=dtype)
    convert(tmp_path / "a", tmp_path / "m.gguf", dtype=dtype, lossy=True)
    kinds = {tensor.name: tensor.tensor_type.name
             for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    finer = {"output.weight"} | ({"blk.0.attn_k.weight", "blk.1.attn_v.weight"}
                                 if experts == 8 else set())
    for name, kind in kinds.items():
        if "norm" in name or "ffn_gate_inp" in name:
            assert kind == "F32"
        elif name in finer:
            assert kind == "Q8_0"
        elif "attn_k" not in name and "attn_v" not in name:
            assert kind == dtype.upper()
    before, after = (checkpoint.named_tensors(checkpoint.read(tmp_path / name).network)
                     for name in ("a", "m.gguf"))
    for name, tensor in before.items():
        assert (after[name] - tensor).norm() <= error * tensor.norm(), name
        if "norm" in name or "gate.weight" in name:
            assert torch.equal(after[name], tensor)


def test_rows_that_fill_no_blocks_stay_f16(tmp_path):
    folder_of(tmp_path / "a", MODELS["llama"] | {"intermediate_size": 48}, None)
    convert(tmp_path / "a", tmp_path / "m.gguf", dtype="q8_0", lossy=True)
    kinds = {tensor.name: tensor.tensor_type.name
             for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
    checkpoint.read(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["Q5_0", "Q4_1", "Q5_1"])
def test_other_kinds_are_read(tmp_path, kind):
    """Whatever the package can take apart; the values are its own."""
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(values, kind)
    entry = ours.Entry(int(kind), (4, 64), packed.reshape(-1))
    assert torch.equal(ours.decode(entry), torch.from_numpy(gguf.quants.dequantize(packed, kind)))
    assert torch.equal(ours.decode(ours.Entry(int(kind), (2, 2, 64), packed.reshape(-1)), 1),
                       ours.decode(entry)[2:])


# Files of other writers.


@pytest.mark.parametrize("name", [name for name in MODELS if "3.1" not in name])
def test_files_of_other_writers(tmp_path, bpe, name):
    changes = MODELS[name]
    folder_of(tmp_path / "a", changes, bpe)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf")
    before, after = checkpoint.read(tmp_path / "a"), checkpoint.read(tmp_path / "f.gguf")
    tokens = torch.randint(0, 600, (2, 40), generator=torch.Generator().manual_seed(0))
    # Where RoPE's features come in another order, sums do too.
    assert torch.allclose(Model(after.network).logits(tokens), Model(before.network).logits(tokens),
                          atol=0 if changes.get("rope_interleave", True) else 1e-5, rtol=0)
    for text in TEXTS:
        assert after.tokenizer.encode(text) == before.tokenizer.encode(text)
    chat = [{"role": "user", "content": "Hi <|eot_id|>"}]
    assert encode(after.tokenizer, chat) == encode(before.tokenizer, chat)
    assert after.tokenizer.bos_id == bpe.bos_id and after.tokenizer.pad_id == bpe.pad_id
    assert set(bpe.eos_ids) == set(after.tokenizer.eos_ids)
    config = after.origin.config
    assert config["bos_token_id"] == bpe.bos_id and config["architectures"]


@pytest.mark.parametrize(("name", "high"), [("llama 3.1", 4.0), ("llama4", 1.0)])
def test_llama_3_of_other_writers(tmp_path, name, high):
    """The kind of scaling is known again by its factors, if they are Llama 3's or 4's."""
    scaling = LLAMA3 | {"original_max_position_embeddings": 8192, "factor": 32.0,
                        "high_freq_factor": high}
    folder_of(tmp_path / "a", MODELS[name] | {"rope_scaling": scaling, "rope_theta": 5e5}, None)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf")
    config = checkpoint.read(tmp_path / "f.gguf").network.config
    assert config.rope_scaling == pytest.approx(scaling) or config.rope_scaling == scaling
    folder_of(tmp_path / "b", MODELS["llama 3.1"], None)
    convert(tmp_path / "b", tmp_path / "m.gguf")
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf")
    with pytest.raises(VicugnaError, match="not of Llama 3's kind"):
        checkpoint.read(tmp_path / "f.gguf")


def test_changed_gguf_keys_override_our_config(tmp_path, bpe):
    folder_of(tmp_path / "a", MODELS["llama"], bpe)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    changed = {"llama.context_length": 512, "llama.rope.freq_base": 20000.0,
               "tokenizer.chat_template": "{{ messages[0].content }}"}
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf", drop=("nothing",), **changed)
    read = checkpoint.read(tmp_path / "f.gguf")
    assert read.network.config.max_position_embeddings == 512
    assert read.network.config.rope_theta == 20000.0
    assert read.tokenizer.template == changed["tokenizer.chat_template"]
    read.save(tmp_path / "b")
    assert checkpoint.read(tmp_path / "b").tokenizer.template == changed["tokenizer.chat_template"]


@pytest.mark.parametrize(("changes", "says"), [
    ({"llama.attention.sliding_window": 128}, "llama.attention.sliding_window is not known"),
    ({"llama.attention.value_length": 8}, "value_length is 8"),
    ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8"),
    ({"llama.rope.scaling.type": "longrope"}, "longrope"),
    ({"llama.block_count": 2**31 - 1}, "2,147,483,647 layers, but only 21 tensors"),
    ({"vicugna.config": json.dumps(SHAPE | {"model_type": "qwen2", "num_hidden_layers": 10**12})},
     "1,000,000,000,000 layers"),
    ({"vicugna.config": "[1]"}, "its keys make no model"),
    ({"llama.block_count": 1}, "unexpected model.layers.1"),
    ({"llama.embedding_length": "wide"}, "its keys make no model"),
    ({"llama.embedding_length": 128}, "wrong shape"),
    ({"llama.feed_forward_length": [96, 64]}, "its layers are of different shapes"),
    ({"llama.embedding_length": None}, "key llama.embedding_length is missing"),
    ({"general.file_type": 0, "split.count": 3}, "llama-gguf-split --merge"),
    ({"tokenizer.ggml.pre": "martian"}, "pre-tokenizer 'martian'"),
    ({"tokenizer.ggml.model": "t5"}, "a tokenizer of kind 't5'"),
    ({"tokenizer.ggml.tokens": ["a"] * 610}, "its keys make no model"),
    ({"tokenizer.ggml.merges": ["a"] * 9}, "not a tokenizer"),
    ({"tokenizer.ggml.bos_token_id": 10**6}, "its keys make no model"),
    ({"tokenizer.ggml.tokens": None}, "its keys make no model"),
])
def test_keys_that_are_refused(tmp_path, bpe, changes, says):
    folder_of(tmp_path / "a", MODELS["llama"], bpe)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf", **changes)
    fails(tmp_path / "f.gguf", says)


def test_files_are_written_under_their_own_names_only(tmp_path, bpe):
    folder_of(tmp_path / "a", MODELS["llama"], bpe)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf", drop=("nothing",),
              **{"vicugna.tokenizer_files": json.dumps({"../evil.json": "x"})})
    fails(tmp_path / "f.gguf", "files of other names")


# Tokenizers.


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path, prefix):
    tok = sentencepiece(prefix)
    folder_of(tmp_path / "a", MODELS["llama"], tok)
    convert(tmp_path / "a", tmp_path / "m.gguf")
    assert checkpoint.read(tmp_path / "m.gguf").tokenizer.digest == tok.digest
    values = {name: field.contents()
              for name, field in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.add_space_prefix"] is prefix
    assert values["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    # From its pieces and scores alone, as from a file of llama.cpp's converter.
    rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf")
    again = checkpoint.read(tmp_path / "f.gguf").tokenizer
    for text in [*TEXTS, Path(__file__).read_text()[:3000]]:
        assert again.encode(text) == tok.encode(text)
        assert again.decode(again.encode(text)) == tok.decode(tok.encode(text))
    assert (again.bos_id, again.eos_ids) == (1, (2,))


def test_bos_that_only_the_config_asks_for(tmp_path, bpe):
    """As DeepSeek's tokenizers do."""
    folder_of(tmp_path / "a", MODELS["llama"], bpe)
    path = tmp_path / "a" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    path = tmp_path / "a" / "tokenizer_config.json"
    for wanted in (True, False):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": wanted}))
        convert(tmp_path / "a", tmp_path / "m.gguf")
        rewritten(tmp_path / "m.gguf", tmp_path / "f.gguf")
        for name in ("a", "m.gguf", "f.gguf"):
            prompt = checkpoint.survey(tmp_path / name).tokenizer.prompt("a")
            assert prompt == [590] * wanted + bpe.encode("a")


@pytest.mark.parametrize(("part", "value", "says"), [
    ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "of type WordLevel"),
    ("pre_tokenizer", {"type": "Whitespace"}, "the pre-tokenizer step Whitespace"),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated",
                       "invert": False}, "this way to split text"),
    ("normalizer", {"type": "Lowercase"}, "the normalizer Lowercase"),
])
def test_tokenizers_that_llama_cpp_has_not(tmp_path, bpe, part, value, says):
    folder_of(tmp_path / "a", MODELS["llama"], bpe)
    path = tmp_path / "a" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    with pytest.raises(VicugnaError, match=f"{says}.*cannot be represented"):
        convert(tmp_path / "a", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


# What GGUF or llama.cpp has no place for.

def test_our_own_architecture_is_refused(tmp_path, bpe):
    folder_of(tmp_path / "a", {"model_type": "vicugna", "sliding_window": 16, "head_dim": 16}, bpe)
    with pytest.raises(VicugnaError, match="our own architecture cannot be represented"):
        convert(tmp_path / "a", tmp_path / "m.gguf", lossy=True)


@pytest.mark.parametrize("changes", [
    {"model_type": "mistral", "sliding_window": 32}, MODELS["mixtral"] | {"sliding_window": 32},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32,
     "max_window_layers": 1}])
def test_sliding_windows_are_a_loss(tmp_path, changes):
    folder_of(tmp_path / "a", changes, None)
    with pytest.raises(Refused, match="the sliding window of 32 tokens"):
        convert(tmp_path / "a", tmp_path / "m.gguf")
    done = convert(tmp_path / "a", tmp_path / "m.gguf", lossy=True)
    assert len(done["lost"]) == 1
    same(checkpoint.read(tmp_path / "a"), checkpoint.read(tmp_path / "m.gguf"))


@pytest.mark.parametrize(("scaling", "says"), [
    (MODELS["qwen2 yarn"]["rope_scaling"] | {"attention_factor": 1.5}, "yarn of unusual settings"),
    (LLAMA3, "rope_scaling llama3")])
def test_scalings_that_llama_cpp_has_not(tmp_path, scaling, says):
    folder_of(tmp_path / "a", {"model_type": "qwen2", "rope_scaling": scaling}, None)
    with pytest.raises(VicugnaError, match=f"{says} cannot be represented"):
        convert(tmp_path / "a", tmp_path / "m.gguf", lossy=True)
