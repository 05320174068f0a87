"""`vicugna plan`: known models, configs and recipes; figures worked out by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from vicugna import models
from vicugna.chips import GPUS
from vicugna.cli import planning

GB = 1e9


def plan_of(cli: Any, *arguments: object) -> dict[str, Any]:
    ended = cli("plan", *arguments, "--json")
    assert ended.code == 0, ended.err
    assert ended.out.count("\n") == 1 and not ended.err
    return json.loads(ended.out)


def test_llama_8b_by_hand(cli: Any) -> None:
    plan = plan_of(cli, "llama-3.1-8b", "--batch", 1, "--utilisation", 0.5, "--price", 3)
    size = 8_030_261_248
    assert plan["parameters"]["total"] == plan["parameters"]["active"] == size
    assert plan["weight_bytes"] == {"fp32": 4 * size, "bf16": 2 * size, "fp8": size,
                                    "int4": size * 18 / 32}
    token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, width, bytes
    assert plan["cache_bytes"] == {"1K": token << 10, "128K": token << 17, "1M": token << 20,
                                   "10M": 10 * token << 20}
    assert plan["training_state_bytes"] == 16 * size
    multiplied = size - 128256 * 4096 - 65 * 4096
    forward = 2 * multiplied + 32 * 2 * 32 * 256 * 8193 / 2
    assert plan["flops_per_token"]["forward"] == forward
    assert plan["flops_per_token"]["training"] == 3 * forward
    assert plan["context"] == 131072 and plan["assumed"]["context"] == 8192
    # One sequence is written at half of 3.35 TB/s: all weights and the cache for each token.
    seconds = (2 * multiplied + token * 8192) / 3.35e12 / 0.5
    assert plan["decode"]["bound"] == "memory"
    assert plan["decode"]["tokens_per_second"] == pytest.approx(1 / seconds)
    assert plan["decode"]["cost_per_million"] == pytest.approx(3 * seconds * 1e6 / 3600)
    assert plan["prefill"]["tokens_per_second"] == pytest.approx(0.5 * 989e12 / forward)
    assert plan["gpus"] == {"fp32": 1, "bf16": 1, "fp8": 1, "int4": 1}
    assert plan["training_gpus"] == 2  # 128.5 GB of state, 72 GB of each GPU


@pytest.mark.parametrize(("arguments", "gpus"), [
    (["llama-3.1-70b"], 4),  # 141 GB and 86 GB of cache
    (["llama-3.1-70b", "--batch", "1"], 2),
    (["llama-3.1-70b", "--batch", "1", "--gpu", "b200"], 1),
    (["llama-3.1-405b"], 16),
    (["llama-3.1-405b", "--dtype", "fp8"], 8),
    (["deepseek-v3", "--dtype", "fp8", "--gpu", "h200"], 8),
    (["llama-4-scout", "--batch", "1", "--dtype", "int4"], 1),  # as announced
    (["llama-4-maverick", "--dtype", "fp8", "--gpu", "H100"], 8),  # as announced
    (["behemoth"], 64)])
def test_smallest_number_of_gpus(arguments: list[str], gpus: int, cli: Any) -> None:
    plan = plan_of(cli, *arguments)
    assert plan["gpus"][plan["assumed"]["dtype"]] == gpus


def test_a_larger_batch_is_cheaper_until_compute_binds(cli: Any) -> None:
    costs = [plan_of(cli, "llama-3.1-8b", "--batch", n, "--context", 128)["decode"]
             for n in (1, 8, 64, 4096)]
    assert [x["bound"] for x in costs] == ["memory"] * 3 + ["compute"]
    prices = [x["cost_per_million"] for x in costs]
    assert prices == sorted(prices, reverse=True)


def test_windows_and_latents_hold_less(cli: Any) -> None:
    sizes = {name: plan_of(cli, name)["cache_bytes"] for name in (
        "mistral-7b", "mistral-7b-v0.3", "llama-4-scout", "deepseek-v3")}
    assert sizes["mistral-7b"]["1K"] == sizes["mistral-7b-v0.3"]["1K"]
    assert sizes["mistral-7b"]["10M"] == 4096 * 2 * 32 * 8 * 128 * 2
    assert sizes["llama-4-scout"]["10M"] == 2 * 8 * 128 * 2 * (12 * 10 * 2**20 + 36 * 8192)
    assert sizes["deepseek-v3"]["1M"] == 2**20 * 61 * 576 * 2


@pytest.mark.parametrize("name", ["llama-3.1-405b", "llama-4-maverick", "behemoth"])
def test_the_table_fits_eighty_columns(name: str, cli: Any) -> None:
    ended = cli("plan", name, "--context", "10000000", "--batch", "1000")
    assert ended.code == 0 and not ended.err
    assert max(map(len, ended.out.splitlines())) <= 80, ended.out
    for words in ("10M", "training state", "cost/1M", "decode"):
        assert words in ended.out
    assert ("estimate" in ended.out) == (name == "behemoth")
    assert ("does not support" in ended.out) == (name != "behemoth")


def test_every_known_model_and_gpu() -> None:
    known = yaml.safe_load(Path(planning.__file__).with_name("published.yaml").read_text())
    for name, model in known["models"].items():
        subject = planning.subject(name)
        models.architecture(subject.config["model_type"]).Config.from_dict(subject.config)
        assert subject.context and planning.subject(model["source"]).source == model["source"]
    tiny = planning.Subject("tiny", "test", CONFIG)
    for gpu in GPUS:
        plan = planning.plan(tiny, gpu)
        assert plan["gpus"]["bf16"] == 1 and plan["assumed"]["gpu"]["name"] == gpu
        assert GPUS[gpu].peak("fp8") >= GPUS[gpu].peak("bf16")


CONFIG = {"model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24,
          "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 300}


def test_a_config_a_folder_and_a_recipe(tmp_path: Path, cli: Any) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    of_folder = plan_of(cli, folder)
    assert of_folder == plan_of(cli, folder / "config.json")
    assert of_folder["model"] == "mine" and of_folder["assumed"]["context"] == 300
    assert of_folder["parameters"]["total"] == 2 * 50 * 16 + 2 * (4 * 256 + 3 * 16 * 24 + 32) + 16
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({
        "name": "deep", "data": {"sources": ["stdlib"]},
        "stages": [{"kind": "tokenizer", "vocab_size": 300}],
        "model": {"architecture": "llama", "depth": 3, "context": 64, "tied": False}}))
    planned = plan_of(cli, recipe)
    assert (planned["model"], planned["layers"], planned["context"]) == ("deep", 3, 64)
    recipe.write_text(yaml.safe_dump({"model": {"architecture": "llama", "start": str(folder)},
                                      "stages": [{"kind": "sft", "steps": 1,
                                                  "sources": ["stdlib"]}]}))
    assert plan_of(cli, recipe) == of_folder


def test_hub_ids_of_known_models(cli: Any) -> None:
    assert plan_of(cli, "meta-llama/Llama-3.2-1B-Instruct")["model"] == "llama-3.2-1b"


@pytest.mark.parametrize(("arguments", "words"), [
    (["llama-3.1-8"], ["no such model", "llama-3.1-8b"]),
    (["deepseek"], ["deepseek-v3"]),
    (["x1"], ["Known: llama-2-7b"]),
    (["llama-3.1-8b", "--gpu", "h1000"], ["unknown GPU 'h1000'", "h100"]),
    (["llama-3.1-8b", "--dtype", "bf17"], ["unknown dtype 'bf17'", "bf16"]),
    (["llama-3.1-8b", "--utilisation", "0"], ["utilisation of 0"]),
    (["llama-3.1-8b", "--batch", "0"], ["batch"]),
    (["llama-3.1-8b", "--price", "nan"], ["price of nan"]),
    (["llama-3.1-8b", "--price", "1e308"], ["price of 1e+308"]),
    (["llama-3.1-8b", "--utilisation", "1e-320"], ["makes no sense"]),
    (["/dev/zero"], ["/dev/zero", "a regular file"]),
    (["llama-3.1-8b", "--context", "many"], ["context"])])
def test_wrong_words(arguments: list[str], words: list[str], cli: Any) -> None:
    ended = cli("plan", *arguments)
    assert ended.code == 2
    for word in words:
        assert word in ended.line


@pytest.mark.parametrize(("content", "word"), [
    ("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "missing model_type"),
    ('{"model_type": "lama"}', "'llama'"), ('{"model_type": "llama"}', "missing"),
    (json.dumps({**CONFIG, "num_hidden_layers": 10**12}), "num_hidden_layers"),
    (json.dumps({**CONFIG, "text_config": 3, "hidden_size": 2**60}), "network"),
    ("[" * 100_000, "not valid JSON"), (" " * 10**6 + "{}", "over 1,000,000 bytes"),
    ('{"rms_norm_eps": NaN}', "outside JSON"),
    (json.dumps({**CONFIG, "rope_theta": 0}), "rope_theta is 0"),
    (json.dumps({**CONFIG, "rms_norm_eps": -1e-5}), "rms_norm_eps is -1e-05"),
    (json.dumps({**CONFIG, "rope_scaling": {"type": "linear", "factor": -2}}), "factor is -2")])
def test_wrong_configs(content: str, word: str, tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    ended = cli("plan", tmp_path)
    assert ended.code == 2 and word in ended.line and "config.json" in ended.line


def test_sizes_that_no_memory_holds_are_only_counted(tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, "head_dim": 2**44}))
    assert cli("plan", path).code == 0


def test_a_pipe_is_not_waited_for(tmp_path: Path, cli: Any) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    ended = cli("plan", tmp_path / "pipe.json")
    assert ended.code == 2 and "pipe.json: no such file, or not a regular one" in ended.line


def test_a_folder_without_a_config(tmp_path: Path, cli: Any) -> None:
    ended = cli("plan", tmp_path)
    assert ended.code == 2 and "config.json" in ended.line
