"""`vicugna convert`: a checkpoint in another format or dtype."""

from typing import Annotated

import typer

from vicugna.cli import output


def convert(
    model: output.ModelArgument,
    target: Annotated[str, typer.Argument(help="The folder or .gguf file to write.")],
    to: Annotated[str | None, typer.Option(help="hf or gguf; else what TARGET looks like.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; for GGUF also "
                                              "q8_0 or q4_0. By default as stored.")] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Allow what changes values or leaves "
                                        "something out.")] = False,
    as_json: output.Json = False,
) -> None:
    """Convert MODEL to TARGET: Hugging Face or GGUF, another dtype, quantised."""
    from vicugna.checkpoint.convert import convert

    done = convert(model, target, to, dtype, lossy, progress=not as_json)
    if as_json:
        output.as_json(done)
        return
    output.say(f"Wrote {done['tensors']:,} tensors to {target}")
    for what in done["lost"]:
        output.say(f"Lost {what}")
