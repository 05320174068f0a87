"""`vicugna plan`: memory, time and GPUs that a model needs."""

import math
import textwrap
from typing import Annotated, Any

import typer

from vicugna.cli import output


def plan(
    model: Annotated[str, typer.Argument(help="A known model (llama-3.1-8b, llama-4-scout, "
                                         "deepseek-v3, behemoth, ...), a config.json, a "
                                         "checkpoint, or a recipe.")],
    gpu: Annotated[str, typer.Option(help="GPU model: a100, h100, h200, b200, ...")] = "h100",
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16, fp8, int4.")] = "bf16",
    context: Annotated[int | None, typer.Option(
        min=1, max=10**12, help="Tokens per sequence; default: 8192, or the model's context length "
        "if that is shorter.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=10**9, help="Batch size in sequences.")] = 32,
    utilisation: Annotated[float, typer.Option(
        help="Assumed fraction of the GPU's published peak compute and bandwidth that is "
        "reached.")] = 0.5,
    price: Annotated[float, typer.Option(help="Assumed price of a GPU-hour, in any "
                                         "currency.")] = 2.0,
    as_json: output.Json = False,
) -> None:
    """Estimate memory, FLOPs, GPUs and cost of MODEL from its config alone.

    Forward FLOPs per token: 2 x the parameters in matrix products, and per layer
    2 x heads x (key + value width) x tokens attended to; training takes 3 times
    that. Training state: 16 bytes per parameter. GPUs: memory / (0.9 x memory of
    one), as 1, 2, 4, 8 or whole nodes of 8. Time of prefill and training: FLOPs /
    peak; of decode: the longer of FLOPs / peak and bytes read / bandwidth; peaks
    times --utilisation. Traffic between GPUs is not counted.
    """
    from vicugna.cli import planning  # which imports PyTorch, which takes seconds

    subject = planning.subject(model)
    length = context or min(8192, subject.context or 8192)
    made = {"model": subject.name, "source": subject.source, "note": subject.note,
            "model_type": subject.config.get("model_type"), "context": subject.context,
            **planning.plan(subject, gpu, dtype, length, batch, utilisation, price)}
    if as_json:
        output.as_json(made)
    else:
        _show(made)


def _show(plan: dict[str, Any]) -> None:
    sizes, assumed, flops = plan["parameters"], plan["assumed"], plan["flops_per_token"]
    gpu, context = assumed["gpu"]["name"], assumed["context"]
    output.table(plan["model"], ("what", "value"), [
        ("config", "\n".join(textwrap.wrap(plan["source"], 48))),
        ("architecture", f"{plan['model_type']}, {plan['layers']} layers"),
        ("context", f"{plan['context']:,} tokens" if plan["context"] else "not stated"),
        ("parameters", _count(sizes["total"])),
        ("active per token", _count(sizes["active"])),
        ("  in matrix products", _count(sizes["multiplied"])),
        (f"FLOPs per token\n  of {context:,}",
         f"{_si(flops['forward'])} forward, {_si(flops['training'])} trained"),
        ("training state",
         f"{_si(plan['training_state_bytes'])}B: {plan['training_gpus']} {gpu}")], 2)
    needs = f"{assumed['batch']:,} sequence{'s' * (assumed['batch'] > 1)} of {context:,} tokens"
    output.table("Weights, and the GPUs that hold them and the cache of\n" + needs,
                 ("", *plan["gpus"]),
                 [("weights", *(f"{_si(size)}B" for size in plan["weight_bytes"].values())),
                  (f"{gpu}, at least", *(f"{count:,}" for count in plan["gpus"].values()))])
    output.table("KV cache of one sequence", ("tokens", *plan["cache_bytes"]), [
        ("fp32" if assumed["dtype"] == "fp32" else "bf16",
         *(f"{_si(size)}B" for size in plan["cache_bytes"].values()))])
    gpus = plan["gpus"][assumed["dtype"]]
    output.table(f"{needs} in {assumed['dtype']},\nat {assumed['utilisation']:.0%} of the peaks of "
                 f"{gpu} and {assumed['price_per_gpu_hour']:,.2f} per GPU-hour", (
        "work", "GPUs", "tokens/s", "GPU-hours/1M", "cost/1M", "bound by"), [
        (name, f"{count:,}", _short(work["tokens_per_second"]),
         _short(work["gpu_hours_per_million"]), _short(work["cost_per_million"]), work["bound"])
        for name, count, work in (
            ("prefill", gpus, plan["prefill"]), ("decode", gpus, plan["decode"]),
            ("training (bf16)", plan["training_gpus"], plan["training"]))])
    if plan["context"] and context > plan["context"]:
        print(f"Its context is {plan['context']:,} tokens: it does not support {context:,}.")
    if plan["note"]:
        print(textwrap.fill(plan["note"], 78))


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:,.2f} billion" if parameters >= 1e9 else f"{parameters:,}"


def _short(value: float) -> str:
    """`value` to three digits, or whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _si(value: float) -> str:
    """`value` to three digits, and the prefix of its power of 1000."""
    power = min(6, max(0, int(math.log10(max(value * 1.0005, 1)) // 3)))
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}"
