"""A tiny model behind a real server on a free port."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import uvicorn
from torch import Tensor

from vicugna import models, tokenizer
from vicugna.model import Model
from vicugna.models import llama
from vicugna.server.app import create_app
from vicugna.server.guard import LOCAL_NAMES

TEXTS = ["The vicugna is the smallest of the camelids, and its wool is the finest.",
         "How many steps are there? There are twelve steps, counted one by one.",
         "Think first, then answer; a short answer is a good answer."] * 4


def tiny_tokenizer() -> tokenizer.Tokenizer:
    return tokenizer.train(TEXTS, tokenizer.MINIMUM_VOCABULARY + 40)


def config(vocab_size: int, hidden_size: int = 32, context: int = 2048) -> llama.Config:
    return llama.Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=0.2,
        max_position_embeddings=context, tie_word_embeddings=False)


def random_model(context: int = 2048) -> Model:
    tok = tiny_tokenizer()
    network = llama.Network(config(tok.vocab_size, context=context))
    models.initialise(network, 0)
    return Model(network, tok)


class Scripted(llama.Network):
    """A network sure of every next token: it recites `reply` after any prompt."""

    reply: list[int]
    start = 0
    calls = 0

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, attend: Any) -> Tensor:
        self.calls += 1
        if tokens_BT.shape[1] > 1:
            self.start = int(positions_BT[0, -1])
        at = [min(max(int(p) - self.start, 0), len(self.reply) - 1) for p in positions_BT[0]]
        one_hot = torch.nn.functional.one_hot(
            torch.tensor([[self.reply[i] for i in at]]), self.config.vocab_size)
        time.sleep(0.003)  # the pace of a small model, so that an answer can be seen streaming
        return one_hot.float() * 50


def scripted_model(reply: str, context: int = 4096) -> Model:
    """A model whose answer is always `reply`; <think> marks in it become the control tokens."""
    tok = tiny_tokenizer()
    network = Scripted(config(tok.vocab_size, tok.vocab_size, context))
    with torch.no_grad():
        network.lm_head.weight.copy_(torch.eye(tok.vocab_size))
    network.reply = _with_marks(tok, reply)
    return Model(network, tok)


def _with_marks(tok: tokenizer.Tokenizer, reply: str) -> list[int]:
    ids: list[int] = []
    thought, closed, answer = reply.removeprefix("<think>").partition("</think>")
    if closed:
        ids += [tok.id_of("<think>"), *tok.encode(thought), tok.id_of("</think>")]  # type: ignore
    return [*ids, *tok.encode(answer if closed else reply), tok.eos_ids[-1]]


def under(prefix: str, app: Any) -> Any:
    """The application as a proxy shows it that has it under a path."""
    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            assert scope["path"].startswith(prefix), scope["path"]
            scope = {**scope, "path": scope["path"][len(prefix):]}
        await app(scope, receive, send)
    return proxy


@contextmanager
def serving(model: Model, prefix: str = "", **options: Any) -> Iterator[SimpleNamespace]:
    """Serve `model` as "tiny" in a thread; yields its url and port."""
    bound = socket.create_server(("127.0.0.1", 0))
    port = bound.getsockname()[1]
    app = create_app(model, "tiny", **{"hosts": LOCAL_NAMES, **options})
    server = uvicorn.Server(uvicorn.Config(under(prefix, app), log_level="error", lifespan="on",
                                           timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}{prefix}", port=port, model=model,
                              engine=app.state.worker.engine)
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        bound.close()


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)
