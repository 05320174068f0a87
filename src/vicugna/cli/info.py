"""`vicugna info`: what a checkpoint is."""

from vicugna.cli import output


def info(model: output.ModelArgument, as_json: output.Json = False) -> None:
    """Architecture, parameters, dtype, context, tokenizer and digest of MODEL."""
    import vicugna

    loaded = vicugna.load(model, "auto")
    config, tok = loaded.config, loaded.tokenizer
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in loaded.network.parameters()})
    facts = {
        "model_type": config.to_dict()["model_type"],
        "parameters": sum(p.numel() for p in loaded.network.parameters()),
        "dtype": ", ".join(dtypes), "layers": config.num_hidden_layers,
        "width": config.hidden_size, "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings, "tokenizer": tok.digest if tok else None,
        "chat_template": bool(tok and tok.template), "digest": loaded.digest}
    if as_json:
        output.as_json(facts)
    else:
        output.table(model, ("what", "value"), ((k, str(v)) for k, v in facts.items()), 2)
