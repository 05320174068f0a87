"""`vicugna convert`: a checkpoint in another format or dtype."""

from typing import Annotated

import typer

from vicugna.cli import output


def convert(
    source: Annotated[str, typer.Argument(metavar="A", help="A folder (Hugging Face, Meta), a GGUF "
                                          "file, a Hub id, or smollm2 (make smollm2).")],
    target: Annotated[str, typer.Argument(metavar="B", help="The folder or .gguf file to write.")],
    to: Annotated[str | None, typer.Option(help="hf or gguf; else what B looks like.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; for GGUF also "
                                              "q8_0 or q4_0. By default as stored.")] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Allow what changes values or leaves "
                                        "something out.")] = False,
    as_json: output.Json = False,
) -> None:
    """Convert checkpoint A to B: Hugging Face or GGUF, another dtype, quantised."""
    from vicugna.checkpoint.convert import convert

    done = convert(source, target, to, dtype, lossy, progress=not as_json)
    if as_json:
        output.as_json(done)
        return
    output.say(f"Wrote {done['tensors']:,} tensors to {target}")
    for what in done["lost"]:
        output.say(f"Lost {what}")
