"""`vicugna chat`: talk to a model in the terminal, or through a pipe."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from vicugna.errors import VicugnaError

if TYPE_CHECKING:
    from vicugna.engine import Delta, Sampling
    from vicugna.model import Model

HELP = """\
/reset           begin a new conversation
/system TEXT     set the system prompt and begin anew (no TEXT: remove it)
/help            this list
/exit            leave (or Ctrl-D)
Ctrl-C           stop the answer; at the prompt, twice to leave"""
EXITS = ("/exit", "/quit")
DIM, BOLD, PLAIN = "\033[2m", "\033[1m", "\033[0m"


@dataclass
class Chat:
    """A conversation with a loaded model: `turns` alternate user and assistant."""

    model: Model
    sampling: Sampling
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> Iterator[tuple[str, str, Delta]]:
        """Stream the answer as (reasoning, answer, delta); the turn is kept if any answer came.

        Raises VicugnaError, with both counts, when the conversation does not fit the context.
        """
        from vicugna import engine
        from vicugna.server.reply import ReasoningSplitter, prompt_tokens, tokenizer_of

        system = [{"role": "system", "content": self.system}] if self.system else []
        user = {"role": "user", "content": text}
        prompt = prompt_tokens(self.model, [*system, *self.turns, user])
        tokenizer = tokenizer_of(self.model)
        splitter = ReasoningSplitter(tokenizer, prompt)
        answer = ""
        try:
            for delta in engine.stream(self.model.network, tokenizer, prompt, self.sampling):
                reasoning, new = splitter.push(delta.text, delta.finish_reason is not None)
                answer += new
                yield reasoning, new, delta
        finally:  # also when stopped half way
            if answer:
                self.turns += [user, {"role": "assistant", "content": answer}]


def chat(
    model: Annotated[str, typer.Argument(help="A Hugging Face style folder, or a Hub id.")],
    once: Annotated[str | None, typer.Option(help="Answer this one message and end.")] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(
        min=0, help="Longest answer in tokens; 0: to the context's end.")] = 0,
    temperature: Annotated[float, typer.Option(
        min=0, help="0 takes the likeliest token each time.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the mass.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from this many; 0: off.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Makes sampling repeatable.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto (as stored).")] = "float32",
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
    as_json: Annotated[bool, typer.Option(
        "--json", help="One JSON object per answer on standard output.")] = False,
) -> None:
    """Talk to MODEL. In a pipe, each line of standard input is one message."""
    from vicugna.engine import Sampling
    from vicugna.model import load  # PyTorch takes seconds to import: not for --help
    from vicugna.server.reply import tokenizer_of

    sampling = Sampling(max_new_tokens or sys.maxsize, temperature, top_k, top_p, seed=seed)
    conversation = Chat(load(model, dtype, device), sampling, system)
    tokenizer_of(conversation.model)  # says so now if there is none
    if once is not None:
        _answer(conversation, once, as_json)
    elif sys.stdin.isatty() and not as_json:
        _talk(conversation)
    else:
        _pipe(conversation, as_json)


def _pipe(conversation: Chat, as_json: bool) -> None:
    """Answer standard input line by line; the first error ends it."""
    try:
        for text in filter(None, map(str.strip, sys.stdin)):
            if text in EXITS:
                return
            if not _command(conversation, text):
                _answer(conversation, text, as_json)
    except UnicodeDecodeError as error:
        raise VicugnaError("not UTF-8 text", "standard input", "Send UTF-8") from error


def _talk(conversation: Chat) -> None:
    """The interactive loop: errors are shown and the conversation goes on."""
    import readline  # noqa: F401 - gives input() editing and history

    print("Type /help for the commands.", file=sys.stderr)
    leaving = False
    while True:
        try:
            text = input(f"\001{BOLD}\002> \001{PLAIN}\002").strip()
        except (EOFError, KeyboardInterrupt) as end:
            if leaving or isinstance(end, EOFError):
                return print()
            leaving = True
            print("\nCtrl-C again, or /exit, to leave.", file=sys.stderr)
            continue
        leaving = False
        if text in EXITS:
            return
        try:
            if text and not _command(conversation, text):
                _answer(conversation, text, as_json=False)
        except KeyboardInterrupt:
            print(f"{PLAIN}\nStopped.", file=sys.stderr)
        except VicugnaError as error:
            print(f"{error}{' (/reset)' if conversation.turns else ''}.", file=sys.stderr)


def _command(conversation: Chat, text: str) -> bool:
    """Obey a line that begins with a slash; False when it is a message."""
    name, _, rest = text.partition(" ")
    if name == "/help":
        print(HELP, file=sys.stderr)
    elif name in ("/reset", "/system"):
        conversation.turns.clear()
        if name == "/system":
            conversation.system = rest.strip()
            print(f"System prompt {'set' if rest.strip() else 'removed'}.", file=sys.stderr)
        print("A new conversation.", file=sys.stderr)
    else:
        return False
    return True


def _answer(conversation: Chat, text: str, as_json: bool) -> None:
    """Print one answer: as it comes (reasoning only on a terminal), or at its end as JSON."""
    terminal, tokens, finish_reason = sys.stdout.isatty(), 0, None
    thoughts = parts = ""
    for reasoning, answer, delta in conversation.ask(text):
        if not as_json and terminal:
            gap = "\n\n" if answer and thoughts + reasoning and not parts else ""
            thought = f"{DIM}{_visible(reasoning)}{PLAIN}" if reasoning else ""
            print(thought + gap + _visible(answer), end="", flush=True)
        elif not as_json:
            print(answer, end="", flush=True)
        thoughts, parts = thoughts + reasoning, parts + answer
        tokens, finish_reason = tokens + len(delta.tokens), delta.finish_reason
    if as_json:
        print(json.dumps({"text": parts, "reasoning": thoughts or None, "tokens": tokens,
                          "finish_reason": finish_reason}), flush=True)
    else:
        print(flush=True)
    if finish_reason == "length":
        print("(cut off at the token limit)", file=sys.stderr)


def _visible(text: str) -> str:
    """Text without control characters, so that a model cannot drive the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
