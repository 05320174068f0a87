"""`vicugna serve`: an OpenAI-compatible server with a chat page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vicugna.cli import output
from vicugna.files import printable

if TYPE_CHECKING:  # it imports PyTorch, which takes seconds: not for --help
    from vicugna.engine.budget import Budget


def serve(
    model: output.ModelArgument,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind; 0 picks a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Model id; default: MODEL's name.")] = None,
    api_key: Annotated[str | None, typer.Option(
        envvar="VICUGNA_API_KEY", help="API key; required beyond loopback.")] = None,
    origin: Annotated[list[str] | None, typer.Option(
        help="Public origin of a proxy in front, such as https://chat.example.org. Repeatable."
    )] = None,
    memory: output.Memory = None,
    dtype: output.Dtype = "float32",
    weights: output.Weights = "auto",
    device: output.Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object when ready.")] = False,
) -> None:
    """Serve MODEL over HTTP: OpenAI's API under /v1, and a chat page at /."""
    from vicugna.model import load  # PyTorch takes seconds to import: not for --help
    from vicugna.server.guard import public_origins
    from vicugna.server.listen import bind, check_exposure, run

    check_exposure(host, api_key)
    origins = public_origins(origin or ())
    if origins and api_key is None:
        output.say(f"No API key is set: whoever reaches {', '.join(sorted(origins))} can use it.")
    with bind(host, port) as bound:  # first, so that a taken port is known at once
        loaded = load(model, dtype, weights, device)
        shown = printable(name or Path(model).resolve().name)

        def ready(url: str, budget: "Budget") -> None:
            if as_json:
                output.as_json({"url": url, "model": shown, "digest": loaded.digest,
                                "cache_tokens": budget.tokens, "cache_bytes": budget.bytes})
            output.say(f"{budget}.")
            output.say(f"Serving {shown}: chat at {url}, OpenAI API at {url}/v1. Ctrl-C stops.")

        run(loaded, shown, bound, host, api_key, origins, output.as_bytes(memory), ready)
