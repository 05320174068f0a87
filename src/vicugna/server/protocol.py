"""The OpenAI wire form: requests read strictly, errors and answers written as OpenAI writes them.

Every way a request can be wrong ends in an `ApiError` with the status, parameter and code that
OpenAI's clients expect; nothing that changes the meaning of a request is ever ignored.
"""

from __future__ import annotations

import difflib
import json
import math
import secrets
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NoReturn

from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.functional_validators import AfterValidator, field_validator, model_validator

from vicugna.engine import Delta, Sampling
from vicugna.tokenizer import Tokenizer

MAX_BODY_BYTES = 10_000_000
MAX_SEED = 2**63 - 1
MAX_TOKENS = 100_000_000

# Parameters that change the answer and that we do not have, with the values that mean "not used".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,), "frequency_penalty": (None, 0), "function_call": (None, "none", "auto"),
    "functions": (None, []), "logit_bias": (None, {}), "modalities": (None, ["text"]),
    "prediction": (None,), "presence_penalty": (None, 0), "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}), "tool_choice": (None, "none", "auto"),
    "tools": (None, []), "verbosity": (None,), "web_search_options": (None,),
}
# Parameters that change nothing about the answer.
IGNORED = frozenset({"metadata", "parallel_tool_calls", "prompt_cache_key", "service_tier",
                     "prompt_cache_retention", "safety_identifier", "store", "user"})


class ApiError(Exception):
    """An error answer: HTTP status, message, and OpenAI's `param` and `code`."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 403: "permission_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param,
                          "code": self.code}}

    def response(self) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return Response(dump(self.body()), self.status, headers, "application/json")


def dump(value: Any) -> str:
    """JSON in ASCII, so that a lone surrogate quoted back in an error cannot break the answer."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _clean(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


Text = Annotated[str, AfterValidator(_clean)]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]


class Part(BaseModel):
    """Strict: no coercion, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Message(Part):
    """One turn. A list of text parts arrives here joined by newlines; null fields as absent."""

    role: Literal["system", "user", "assistant"]
    content: Text
    reasoning_content: Text | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = {key: item for key, item in value.items() if item not in (None, [])}
        role = value.get("role")
        if role in ("tool", "function") or "tool_calls" in value or "function_call" in value:
            raise ValueError("tool calls are not supported by this server")
        return value | {"role": "system"} if role == "developer" else value

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" \
                    or not isinstance(part.get("text"), str):
                raise ValueError("only text parts are supported: "
                                 '{"type": "text", "text": "..."}')
        return "\n".join(part["text"] for part in value)

    def turn(self) -> dict[str, str]:
        """The turn as the tokenizer's chat template takes it."""
        turn = {"role": self.role, "content": self.content}
        if self.role == "assistant" and self.reasoning_content:
            turn["reasoning"] = self.reasoning_content
        return turn


class StreamOptions(Part):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: nothing to obfuscate


class ChatRequest(Part):
    """The body of POST /v1/chat/completions; null means the default."""

    model: Text
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Annotated[list[Stop], Field(max_length=16)] = []
    n: Annotated[int, Field(ge=1, le=8)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {key: item for key, item in value.items() if item is not None}

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is allowed only when stream is true")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same thing: give one")
        return self

    def sampling(self) -> Sampling:
        """The engine's form of it; without a seed, a random one."""
        limit = self.max_tokens or self.max_completion_tokens or MAX_TOKENS
        return Sampling(max_new_tokens=limit, temperature=self.temperature, top_k=self.top_k,
                        top_p=self.top_p, min_p=self.min_p, stop=tuple(self.stop),
                        seed=secrets.randbelow(MAX_SEED) if self.seed is None else self.seed,
                        top_logprobs=self.top_logprobs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key is given twice in one object")
    return value


def parse(body: bytes) -> ChatRequest:
    """Read a request body; raises ApiError (always status 400) naming the parameter at fault."""
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant,
                           object_pairs_hook=_unique_keys)
        if not isinstance(value, dict):
            raise ApiError(400, "The body must be a JSON object.")
        for key, unused in UNSUPPORTED.items():
            if value.get(key) not in unused:
                raise ApiError(400, f"'{key}' is not supported by this server.", key,
                               "unsupported_parameter")
        skip = IGNORED | UNSUPPORTED.keys()
        return ChatRequest.model_validate({k: v for k, v in value.items() if k not in skip})
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.") from None
    except ValidationError as error:  # a ValueError too
        raise _explain(error) from None
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from None


def _explain(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"])
    param = param.lstrip(".")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(param, ChatRequest.model_fields, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return ApiError(400, f"Unknown parameter: '{param}'.{hint}", param, "unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param}'.", param,
                        "missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    if not param:
        return ApiError(400, f"{message[:1].upper()}{message[1:]}.")
    return ApiError(400, f"Invalid '{param}': {message}.", param, "invalid_value")


def token_logprobs(delta: Delta, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """OpenAI's `logprobs.content` entries for a delta's tokens (natural log; -9999 for never)."""
    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "bytes": list(data),
                "logprob": logprob if math.isfinite(logprob) else -9999.0}

    tops: Sequence[Sequence[tuple[int, float]]] = delta.top_logprobs or [()] * len(delta.tokens)
    return [entry(token, logprob) | {"top_logprobs": [entry(*pair) for pair in top]}
            for token, logprob, top in zip(delta.tokens, delta.logprobs, tops, strict=True)]
