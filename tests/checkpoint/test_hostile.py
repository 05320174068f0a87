"""Checkpoints made to harm: one clear error each, at once, without memory, without running code.

All folders are opened by one process whose memory is limited, as a user would: load, then chat.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from every import EVERY, save

from vicugna import models, tokenizer
from vicugna.checkpoint.hf import weights

SECONDS = 4.0  # of CPU time on one folder: a quarter of that on a quiet machine
MEMORY = 300 * 2**20  # bytes that it may take beyond what it has when all is imported
OPEN = """
import json, resource, sys, time
from importlib import import_module
import vicugna
from vicugna import models

for line in sys.stdin:
    folder, chat = json.loads(line)
    try:  # imports first
        known = json.load(open(folder + "/config.json"))["model_type"]
        models.architecture(known)
        vicugna.load
    except Exception:
        pass
    held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[1]), -1))
    for attempt in range(3):  # again if it took long: the machine may have stood still
        began = time.process_time()
        try:
            model = vicugna.load(folder, dtype="auto")
            if chat:
                model.generate([{"role": "user", "content": "hi"}], max_new_tokens=1)
            said = ""
        except vicugna.VicugnaError as error:
            said = str(error)
        except BaseException as error:
            said = "NOT CLEAR " + repr(error)
        seconds = time.process_time() - began
        if seconds < float(sys.argv[2]):
            break
    print(json.dumps([said, seconds]), flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""


@pytest.fixture(scope="module")
def opened():
    """Opens a folder in the limited process: what it says, and its seconds of work."""
    process = subprocess.Popen([sys.executable, "-c", OPEN, str(MEMORY), str(SECONDS)],
                               text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def ask(folder: Path, chat: bool = False) -> tuple[str, float]:
        process.stdin.write(json.dumps([str(folder), chat]) + "\n")
        process.stdin.flush()
        said, seconds = json.loads(process.stdout.readline())
        return said, seconds

    yield ask
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Sound checkpoints, by kind; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    for kind in EVERY:
        save(kind, folder / kind)
    shard(save("llama", folder / "shards"), folder / "shards")
    tok = tokenizer.train(["the cat sat on the mat"] * 3, tokenizer.MINIMUM_VOCABULARY + 4)
    tok.save(folder / "llama")
    return folder


def shard(model, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / weights.SINGLE).unlink()


def copy(saved: Path, kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / kind, tmp_path / "m"))


def edit(path: Path, change) -> None:
    """Let `change` work on the content of a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(answer: tuple[str, float], *says: str) -> None:
    said, seconds = answer
    assert any(words in said for words in says), said
    assert "NOT CLEAR" not in said and "\n" not in said and len(said) < 2000
    assert seconds < SECONDS


# Absurd numbers.

LARGE = {"num_hidden_layers": 10**9, "vocab_size": 2**60, "hidden_size": 2**60,
         "intermediate_size": 2**60, "num_attention_heads": 2**60, "head_dim": 2**60}
OWN = {
    "mixtral": {"num_local_experts": 10**9},
    "vicugna": {"num_experts": 10**9, "conv_width": 2**60},
    "deepseek_v3": {"n_routed_experts": 10**9, "n_shared_experts": 10**9, "q_lora_rank": 2**60,
                    "kv_lora_rank": 2**60, "moe_intermediate_size": 2**60, "v_head_dim": 2**60,
                    "n_group": 10**9, "qk_nope_head_dim": 2**60, "qk_rope_head_dim": 2**60},
    "llama4_text": {"num_local_experts": 10**9, "intermediate_size_mlp": 2**60,
                    "no_rope_layers": [1] * 300_000, "interleave_moe_layer_step": 10**9},
}
OWN["llama4"] = OWN["llama4_text"]
EYES = {"num_hidden_layers": 10**9, "image_size": 2**40, "patch_size": 2**40, "hidden_size": 2**60,
        "intermediate_size": 2**60, "vision_output_dim": 2**60, "projector_input_dim": 2**60,
        "num_channels": 2**60, "num_attention_heads": 2**60}
HARMLESS = {"no_rope_layers", "interleave_moe_layer_step"}  # longer than needed; overridden


@pytest.mark.parametrize("kind", EVERY)
def test_absurd_numbers(kind, saved, tmp_path, opened):
    folder = copy(saved, kind, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    large = {**LARGE, **OWN.get(kind, {})}
    sections = {"llama4": {"text_config": large, "vision_config": EYES},
                "mistral3": {"text_config": large}}.get(kind, {None: large})
    for section, numbers in sections.items():
        for key, number in numbers.items():
            changed = json.loads(json.dumps(config))
            (changed[section] if section else changed)[key] = number
            (folder / "config.json").write_text(json.dumps(changed))
            answer = opened(folder)
            if key in HARMLESS and not answer[0]:
                assert answer[1] < SECONDS
            else:
                refused(answer, str(folder))


@pytest.mark.parametrize("kind", EVERY)
def test_values_of_other_types(kind, saved, tmp_path, opened):
    """Every key in turn: a clear error or a model, never another exception."""
    folder = copy(saved, kind, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for section in (None, *(key for key in config if key in ("text_config", "vision_config"))):
        for key in (config[section] if section else config):
            for value in (-1, 10**30, "x", []):
                changed = json.loads(json.dumps(config))
                (changed[section] if section else changed)[key] = value
                (folder / "config.json").write_text(json.dumps(changed))
                said, seconds = opened(folder)
                assert "NOT CLEAR" not in said and "\n" not in said, (section, key, value)
                assert seconds < SECONDS, (section, key, value)


# Hostile weights.

def second(folder: Path) -> Path:
    """A shard of several tensors: the first holds only the embeddings."""
    return sorted(folder.glob("*.safetensors"))[1]


def index(change):
    """Let `change` work on weight_map, given a name of the second shard and the folder too."""
    def work(folder: Path) -> None:
        edit(folder / weights.INDEX, lambda content: change(content["weight_map"], min(
            k for k, file in content["weight_map"].items() if file == second(folder).name), folder))
    return work


def header(change):
    """A change of the header of a shard, which keeps the file's length."""
    def work(folder: Path) -> None:
        path = second(folder)
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:8 + length])
        change(entries, sorted(set(entries) - {"__metadata__"}))
        text = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length:])
    return work


def first_bytes(change):
    def work(folder: Path) -> None:
        path = second(folder)
        path.write_bytes(change(path.read_bytes()))
    return work


def link_out(folder: Path) -> None:
    path = second(folder)
    shutil.move(path, folder.parent / path.name)
    path.symlink_to(folder.parent / path.name)


def values(change):
    def work(folder: Path) -> None:
        path = second(folder)
        tensors = safetensors.torch.load_file(path)
        change(tensors[min(tensors)].view(-1))
        safetensors.torch.save_file(tensors, path)
    return work


WEIGHTS = {
    "truncated": (first_bytes(lambda c: c[:-100]), "truncated"),
    "empty": (first_bytes(lambda c: b""), "truncated"),
    "header of 2^60": (first_bytes(lambda c: struct.pack("<Q", 2**60) + c[8:]), "a header of"),
    "header of 2^64-1": (first_bytes(lambda c: b"\xff" * 8 + c[8:]), "a header of"),
    "overlap": (header(lambda e, n: e[n[1]].update(data_offsets=e[n[0]]["data_offsets"],
                                                   shape=e[n[0]]["shape"])), "overlaps"),
    "overflow": (header(lambda e, n: e[n[0]].update(shape=[2**62, 2**62])), "takes 8"),
    "overflow to zero": (header(lambda e, n: e[n[0]].update(shape=[2**32, 2**32])), "takes 7"),
    "missing shard": (index(lambda m, n, f: m.update({n: "gone.safetensors"})), "no such file"),
    "no such tensor": (index(lambda m, n, f: m.update({"x": m[n]})), "weight_map gives x to"),
    "in another shard": (index(lambda m, n, f: m.update({n: max(m.values())})), "weight_map gives"),
    "one shard less": (index(lambda m, n, f: [m.pop(k) for k in list(m)
                                              if m[k] == second(f).name]), "missing"),
    "path out": (index(lambda m, n, f: m.update({n: f"../m/{m[n]}"})), "leads out of the folder"),
    "absolute path": (index(lambda m, n, f: m.update({n: f"{f}/{m[n]}"})), "leads out"),
    "link out": (link_out, "leads out of the folder"),
    "NaN": (values(lambda flat: flat[:2].fill_(float("nan"))), "values are NaN or infinite"),
    "infinity": (values(lambda flat: flat[-1:].fill_(-float("inf"))), "values are NaN or infinite"),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_hostile_weights(what, saved, tmp_path, opened):
    change, says = WEIGHTS[what]
    folder = copy(saved, "shards", tmp_path)
    assert opened(folder)[0] == ""
    change(folder)
    refused(opened(folder), says)


@pytest.mark.parametrize("kind", EVERY)
def test_nan_in_any_tensor_is_reported(kind, saved, tmp_path, opened):
    folder = copy(saved, kind, tmp_path)
    path = folder / weights.SINGLE
    tensors = safetensors.torch.load_file(path)
    for name in list(tensors)[:: max(1, len(tensors) // 6)]:
        spoiled = {**tensors, name: tensors[name].clone()}
        spoiled[name].view(-1)[-1] = float("nan")
        safetensors.torch.save_file(spoiled, path)
        refused(opened(folder), f"tensor {name}: 1 of {tensors[name].numel():,} values are NaN")


@pytest.mark.parametrize("name", [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "tokenizer.model", "merges.txt",
    "additional_chat_templates/x.jinja", weights.SINGLE])
def test_links_out_of_the_folder(name, saved, tmp_path, opened):
    folder = copy(saved, "llama", tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("{}")
    (folder / name).symlink_to(tmp_path / "secret")
    refused(opened(folder), f"'{name}' leads out of the folder")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json",
                                  "tokenizer_config.json", "chat_template.jinja", weights.INDEX])
def test_files_of_terabytes(name, saved, tmp_path, opened):
    folder = copy(saved, "llama", tmp_path)
    (folder / weights.SINGLE).rename(folder / "x.safetensors")
    (folder / weights.INDEX).write_text("{}")
    if name != weights.INDEX:
        (folder / "x.safetensors").rename(folder / weights.SINGLE)
    with open(folder / name, "wb") as file:
        file.truncate(2**40)  # sparse: takes no disk
    refused(opened(folder), f"{name}: over ")


def test_as_many_tensors_as_a_header_holds(saved, tmp_path, opened):
    folder = copy(saved, "llama", tmp_path)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"model.layers.{n}.x": entry for n in range(33_000)},
                        separators=(",", ":")).encode()
    assert len(header) < weights.HEADER_BYTES
    (folder / weights.SINGLE).write_bytes(struct.pack("<Q", len(header)) + header)
    for layers, says in ((2, "missing lm_head.weight"), (400, "missing lm_head.weight"),
                         (33_000, "num_hidden_layers is 33,000, but")):
        edit(folder / "config.json", lambda config, n=layers: config.update(num_hidden_layers=n))
        refused(opened(folder), says)


def test_a_block_as_large_as_memory(saved, tmp_path, opened):
    folder = copy(saved, "llama", tmp_path)
    path, name = folder / weights.SINGLE, "model.layers.0.mlp.up_proj.weight"
    tensors = safetensors.torch.load_file(path)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    safetensors.torch.save_file({**tensors, f"{name}_scale_inv": torch.ones(1, 1)}, path)
    for size, says in ((4096, ""), (2**31, "quantised")):
        edit(folder / "config.json", lambda config, n=size: config.update(quantization_config={
            "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [n, n]}))
        refused(opened(folder), says)


# Code.

class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self):
        return os.mkdir, (self.made,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt",
                                  "model.ckpt", "weights.pkl"])
@pytest.mark.parametrize("form", ["torch", "plain"])
def test_pickles_are_never_opened(name, form, saved, tmp_path, opened):
    folder, made = copy(saved, "llama", tmp_path), tmp_path / "made"
    (folder / weights.SINGLE).unlink()
    content = {"model.norm.weight": torch.ones(2), "x": Evil(made)}
    if form == "torch":
        torch.save(content, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(content))
    refused(opened(folder), f"{name}: refused: only safetensors")
    refused(opened(folder / name), f"{name}: refused")
    edit(folder / "config.json", lambda config: config.clear())
    refused(opened(folder), "refused", "missing model_type", "unknown model_type")
    assert not made.exists()


@pytest.mark.parametrize("kind", ["llama", "vicugna", "own"])
def test_code_of_a_checkpoint_is_never_run(kind, saved, tmp_path, opened):
    folder, made = copy(saved, "llama" if kind == "own" else kind, tmp_path), tmp_path / "made"
    code = f"import os\nos.mkdir({str(made)!r})\nclass X: pass\n"
    for name in ("evil.py", "modeling_evil.py", "modeling_vicugna.py", "configuration_evil.py",
                 "tokenization_evil.py", "__init__.py", "sitecustomize.py", "torch.py"):
        (folder / name).write_text(code)
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"),
                         "modeling_evil.X")
    edit(folder / "config.json", lambda config: config.update(
        auto_map=auto, custom_pipelines={"x": {"impl": "evil.X"}}, trust_remote_code=True,
        **({"model_type": "evil"} if kind == "own" else {})))
    if kind == "llama":
        edit(folder / "tokenizer_config.json", lambda config: config.update(
            auto_map={"AutoTokenizer": ["tokenization_evil.X", None]}, tokenizer_class="X"))
    said, _ = opened(folder, chat=kind == "llama")
    assert said == ("" if kind != "own" else said) and "NOT CLEAR" not in said
    assert ("unknown model_type 'evil'" in said) is (kind == "own")
    assert not made.exists()


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ cycler.__init__.__globals__.os.mkdir('MADE') }}",
    "{{ self._TemplateReference__context }}",
    "{{ (messages|map(attribute='__class__')|list)[0] }}",
    "{{ raise_exception.__globals__['__builtins__'] }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.mkdir('MADE') }}",
    "{{ messages.append(1) }}",
]
ENDLESS = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ 'a' * 10**12 }}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% for i in range(20000) %}{{ range(20000)|sort|join|length }}{% endfor %}",
    "{% for i in range(20000) %}{{ ('a,' * 9000).split(',')|unique|list|length }}{% endfor %}",
    "{{ 9**(9**9) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ range(10**9)|list }}",
    "{{ '%01000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
]


@pytest.mark.parametrize("template", ESCAPES + ENDLESS)
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_hostile_templates(template, place, saved, tmp_path, opened):
    folder = copy(saved, "llama", tmp_path)
    template = template.replace("MADE", str(tmp_path / "made"))
    if place == "chat_template.jinja":
        (folder / place).write_text(template)
    else:
        (folder / "chat_template.jinja").unlink()
        edit(folder / place, lambda config: config.update(chat_template=template))
    assert opened(folder)[0] == ""  # it is only a text until somebody chats
    # What is not defined is an empty text.
    refused(opened(folder, chat=True), "the chat template refused or failed", "prompt is empty")
    assert not (tmp_path / "made").exists()


def test_every_architecture_is_tried():
    assert set(models.ARCHITECTURES) == set(EVERY)
