"""`vicugna info`: what a checkpoint is."""

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vicugna.cli import output

if TYPE_CHECKING:  # it imports PyTorch, which takes seconds: not for --help
    from vicugna.checkpoint import Survey


def info(
    model: output.ModelArgument,
    digest: Annotated[bool, typer.Option(help="Its digest too, for which every byte is read.")]
    = True,
    run: Annotated[bool, typer.Option("--run", help="Instead: in what form each kind of tensor is "
                                      "kept to run it, why, and the memory that takes.")] = False,
    dtype: output.Dtype = "float32",
    weights: output.Weights = "auto",
    device: output.Device = "cpu",
    as_json: output.Json = False,
) -> None:
    """Show architecture, sizes, dtypes, context, tokenizer and digest of MODEL."""
    if run:
        return _run(model, dtype, weights, device, as_json)
    from vicugna import checkpoint, progress
    from vicugna.checkpoint.digest import digest_stored
    from vicugna.checkpoint.state_dict import Parts
    from vicugna.engine.weights import plan

    found = checkpoint.survey(model)
    parts = Parts(found)
    facts = _facts(found, parts.network)
    if digest:
        packed = {name for name, one in plan(parts, "auto", None).items() if one.packed}
        with progress.bar("digest", len(parts.by_name) + len(parts.passthrough)) as report:
            facts["digest"] = digest_stored(parts, found, packed, report)
    if as_json:
        output.as_json(facts)
    else:
        output.table(model, ("what", "value"), ((what.replace("_", " "), _text(value))
                                                for what, value in facts.items()), 2)


def _run(model: str, dtype: str, weights: str, device: str, as_json: bool) -> None:
    """Show how MODEL would be kept in memory; nothing is loaded."""
    from vicugna import checkpoint
    from vicugna.checkpoint.names import general
    from vicugna.checkpoint.state_dict import Parts
    from vicugna.dtypes import dtype_of
    from vicugna.engine.weights import plan

    parts = Parts(checkpoint.survey(model))
    chosen = plan(parts, weights, None if dtype == "auto" else dtype_of(dtype, "--dtype"), device)
    groups: dict[tuple[str, str, str, str], list[int]] = {}
    for name, one in chosen.items():
        group = general(name)[1], one.stored, one.kind, one.why
        groups.setdefault(group, []).append(one.nbytes)
    total, head = sum(one.nbytes for one in chosen.values()), ("tensor", "stored", "kept", "why")
    if as_json:
        output.as_json({"weight_bytes": total, "tied": parts.tied, "tensors": [
            dict(zip(head, group, strict=True)) | {"count": len(sizes), "bytes": sum(sizes)}
            for group, sizes in groups.items()]})
        return
    output.table(f"{model}: {total:,} bytes of weights", (*head, "count", "bytes"), (
        (*group, f"{len(sizes):,}", f"{sum(sizes):,}") for group, sizes in groups.items()), 4)
    for name, other in parts.tied.items():
        print(f"{name} is {other}: one copy")


def _facts(found: "Survey", network: Any) -> dict[str, Any]:
    from vicugna.models import counts

    config, tok = network.config, found.tokenizer
    files = {part.file for part in found.stored.values()}
    size, dtypes = counts.of(network), _dtypes(found)
    return {
        "model_type": config.to_dict()["model_type"], "parameters": size.total,
        "active_per_token": size.active, "layers": len(size.layers), "width": config.hidden_size,
        "heads": config.num_attention_heads, "key_value_heads": config.num_key_value_heads,
        "context": config.context_length, "vocabulary": config.vocab_size,
        "format": "gguf" if found.folder.is_file() else ", ".join(
            sorted({file.suffix.removeprefix(".") for file in files})),
        "files": len(files), "tensors": len(found.stored), "dtypes": dict(dtypes.most_common()),
        "tokenizer": tok.digest if tok else None, "tokens": tok.vocab_size if tok else None,
        "chat_template": bool(tok and tok.template)}


def _dtypes(found: "Survey") -> Counter[str]:
    """The bytes that the files hold of each dtype or GGML type."""
    from vicugna.dtypes import name_of
    sizes: Counter[str] = Counter()
    if found.folder.is_file():
        from vicugna.checkpoint.gguf.file import DTYPES, scan, type_name
        for entry in scan(found.folder)[1].values():
            dtype = DTYPES.get(entry.kind)
            sizes[name_of(dtype) if dtype else type_name(entry.kind)] += entry.data.nbytes
        return sizes
    for part in found.stored.values():
        for tensor in filter(None, (part, part.scale)):
            sizes[name_of(tensor.dtype)] += tensor.nbytes
    return sizes


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {size:,} bytes" for name, size in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value or "none")
