"""`vicugna chat`: talk to a model in the terminal, or through a pipe."""

import re
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from vicugna.cli import output
from vicugna.errors import VicugnaError

if TYPE_CHECKING:
    from vicugna.engine import Engine, Sampling
    from vicugna.model import Model

HELP = """\
/reset           start a new conversation
/system TEXT     set the system prompt and start anew (no TEXT: remove it)
/help            show this list
/exit            quit (or Ctrl-D)
Ctrl-C           stop the reply; at the prompt, twice to quit"""
DIM, BOLD, PLAIN = "\033[2m", "\033[1m", "\033[0m"
# Control characters are replaced, so that a model cannot control the terminal.
_visible = partial(re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]").sub, "\N{REPLACEMENT CHARACTER}")


@dataclass
class Chat:
    """A conversation with a loaded model: `turns` alternate user and assistant. The engine keeps
    what it has read of it."""

    model: "Model"
    engine: "Engine"
    sampling: "Sampling"
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)


def chat(
    model: output.ModelArgument,
    once: Annotated[str | None, typer.Option(help="Reply to this one message and exit.")] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=0, help="0: up to the context length.")] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy decoding.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling: probability mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many tokens; 0: off.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampler.")] = 0,
    memory: output.Memory = None,
    dtype: output.Dtype = "float32",
    weights: output.Weights = "auto",
    device: output.Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per reply.")] = False,
) -> None:
    """Talk to MODEL. In a pipe, each line of standard input is one message."""
    from vicugna.engine import Engine, Sampling
    from vicugna.model import load  # PyTorch takes seconds to import: not for --help

    once, system = once and output.as_text(once, "--once"), output.as_text(system, "--system")
    sampling = Sampling(max_new_tokens or sys.maxsize, temperature, top_k, top_p, seed=seed)
    loaded = load(model, dtype, weights, device)
    engine = Engine(loaded.network, memory=output.as_bytes(memory), slots=1)
    conversation = Chat(loaded, engine, sampling, system)
    if once is None and sys.stdin.isatty() and not as_json:
        return _interactive(conversation)
    try:
        for text in filter(None, map(str.strip, sys.stdin if once is None else [once])):
            _handle(conversation, text, as_json)
    except UnicodeError as error:
        raise _undecodable(error) from error


def _undecodable(error: UnicodeError) -> VicugnaError:
    byte = (f": byte 0x{error.object[error.start]:02x}" if isinstance(error, UnicodeDecodeError)
            else f": {error}")
    return VicugnaError(f"not {sys.stdin.encoding.upper()} text{byte}", "standard input",
                        "Send that encoding, or name yours: PYTHONIOENCODING=latin-1")


def _interactive(conversation: Chat) -> None:
    """The interactive loop; an error is printed and the conversation continues."""
    import readline  # noqa: F401 - gives input() editing and history
    print(f"{conversation.engine.budget}.\nType /help for the commands.", file=sys.stderr)
    leaving = False  # after Ctrl-C at the prompt
    while True:
        text = None
        try:
            text = input(f"\001{BOLD}\002> \001{PLAIN}\002").strip()
            leaving = False
            if text:
                _handle(conversation, text)
        except (EOFError, KeyboardInterrupt) as end:
            if leaving or isinstance(end, EOFError):
                return print()
            leaving = text is None
            print("\nCtrl-C again to quit." if leaving else f"{PLAIN}\nStopped.", file=sys.stderr)
        except UnicodeDecodeError as error:
            print(_undecodable(error), file=sys.stderr)
        except VicugnaError as error:
            print(f"{error}{' (/reset)' if conversation.turns else ''}.", file=sys.stderr)


def _handle(conversation: Chat, text: str, as_json: bool = False) -> None:
    name, _, rest = text.partition(" ")
    if name in ("/exit", "/quit"):
        raise typer.Exit
    elif name == "/help":
        print(HELP, file=sys.stderr)
    elif name in ("/reset", "/system"):
        conversation.turns.clear()
        if name == "/system":
            conversation.system = rest.strip()
            print(f"System prompt {'set' if rest.strip() else 'removed'}.", file=sys.stderr)
        print("New conversation.", file=sys.stderr)
    else:
        _reply(conversation, text, as_json)


def _reply(chat: Chat, text: str, as_json: bool) -> None:
    """Print one reply: streamed (reasoning on a terminal only), or whole as JSON."""
    from vicugna.chat import ReplyParser
    from vicugna.engine import stream  # which import PyTorch

    system = [{"role": "system", "content": chat.system}] if chat.system else []
    user = {"role": "user", "content": text}
    messages, engine = [*system, *chat.turns, user], chat.engine
    prompt, _ = chat.model.read_chat(messages, engine.budget.longest)
    tokenizer = chat.model.text_tokenizer()
    parser = ReplyParser(tokenizer, prompt)
    terminal, begun, tokens = sys.stdout.isatty() and not as_json, False, 0
    try:
        for delta in stream(chat.model.network, tokenizer, prompt, chat.sampling, engine=engine):
            new = parser.push(delta.tokens, delta.text, delta.finish_reason is not None)
            if terminal:
                gap = "\n\n" if new.content and parser.reasoning and not begun else ""
                print(f"{DIM}{_visible(new.reasoning)}{PLAIN}{gap}{_visible(new.content)}",
                      end="", flush=True)
            elif not as_json:
                print(new.content, end="", flush=True)
            begun, tokens = begun or bool(new.content), tokens + len(delta.tokens)
    finally:  # also when interrupted
        if parser.content:
            chat.turns += [user, {"role": "assistant", "content": parser.content}]
    if as_json:
        output.as_json({"text": parser.content, "reasoning": parser.reasoning or None,
                        "tokens": tokens, "finish_reason": delta.finish_reason})
    else:
        print(flush=True)
    if delta.finish_reason == "length":
        print("(truncated at the token limit)", file=sys.stderr)
