"""OpenAI's formats. A parameter that would change the response is never silently ignored."""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vicugna.engine import Delta, Sampling
from vicugna.errors import did_you_mean
from vicugna.tokenizer import Tokenizer

MAX_SEED = 2**63 - 1
MAX_TOKENS = 100_000_000
MAX_IMAGES = 16  # per request: the tiles of a Llama 4 take up to 12 MB for each

# Unsupported parameters that would change the response, with the values that mean "not used".
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (), "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": ([],),
    "logit_bias": ({},), "modalities": (["text"],), "n": (1,), "prediction": (),
    "presence_penalty": (0,), "reasoning_effort": (), "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"), "tools": ([],), "verbosity": (), "web_search_options": (),
}
# Parameters that do not change the response.
IGNORED = frozenset({"metadata", "parallel_tool_calls", "prompt_cache_key", "service_tier",
                     "prompt_cache_retention", "safety_identifier", "store", "user"})


class ApiError(Exception):
    """An error response: HTTP status, message, and OpenAI's `param` and `code`."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.headers = {"WWW-Authenticate": "Bearer"} if status == 401 else headers
        self.status, self.body = status, {
            "error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The error as an HTTP response."""
        return JSONResponse(self.body, self.status, self.headers)


Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]


class StrictModel(BaseModel):
    """No coercion, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Message(StrictModel):
    """One message. A list of text parts is joined by newlines; images stay as `Model.read`
    takes it; null fields count as absent."""

    role: Literal["system", "user", "assistant"]
    content: Text | list[dict[str, str]]
    reasoning_content: Text = ""
    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = {k: v for k, v in value.items() if v not in (None, [])}
        if value.get("role") == "tool" or value.keys() & {"tool_calls", "function_call"}:
            raise ValueError("tool calls are not supported by this server")
        return value | {"role": "system"} if value.get("role") == "developer" else value

    @field_validator("content", mode="plain")
    @classmethod
    def _read(cls, value: Any) -> str | list[dict[str, str]]:
        if not isinstance(value, list):
            return _text(value)
        parts = list(map(_part, value))
        texts = [part["text"] for part in parts if part["type"] == "text"]
        return "\n".join(texts) if len(texts) == len(parts) else parts


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("content must be text without NUL, or a list of parts")
    return value


def _part(part: Any) -> dict[str, str]:
    match part:
        case {"type": "text", "text": text}:
            return {"type": "text", "text": _text(text)}
        case {"type": "image_url", "image_url": {"url": str(url), **more}} if more in (
                {}, {"detail": "auto"}):
            return {"type": "image", "url": url}
    raise ValueError('parts must be {"type": "text", "text": "..."} or {"type": "image_url", '
                     '"image_url": {"url": "data:..."}}, without a "detail"')


class ChatRequest(StrictModel):
    """The body of POST /v1/chat/completions; null means the default."""

    model: Text
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stop: Annotated[list[Stop], Field(max_length=16)] = []
    cache_salt: Text = ""  # cached prefixes are shared only among requests with the same one
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = {k: v for k, v in value.items() if v is not None and k not in IGNORED}
        for key, unused in UNSUPPORTED.items():
            if key in value and value.pop(key) not in unused:
                raise ApiError(400, f"'{key}' is not supported by this server.", key,
                               "unsupported_parameter")
        return value

    @field_validator("messages")
    @classmethod
    def _few_images(cls, messages: list[Message]) -> list[Message]:
        parts = [part for one in messages for part in one.content if isinstance(part, dict)]
        if sum(part["type"] == "image" for part in parts) > MAX_IMAGES:
            raise ValueError(f"more than {MAX_IMAGES} images")
        return messages

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same thing: give one")
        return self

    def sampling(self) -> Sampling:
        """The engine's sampling parameters; a request without a seed gets a random one."""
        limit = self.max_tokens or self.max_completion_tokens or MAX_TOKENS
        seed = secrets.randbelow(MAX_SEED) if self.seed is None else self.seed
        return Sampling(limit, self.temperature, self.top_k, self.top_p, self.min_p,
                        tuple(self.stop), seed, self.top_logprobs)


def parse(body: bytes) -> ChatRequest:
    """Validate a request body; raises ApiError 400 naming the invalid parameter."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    param = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"])
    param, message = param.lstrip("."), first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(param, ChatRequest.model_fields)
        raise ApiError(400, f"Unknown parameter: '{param}'. {hint}", param, "unknown_parameter")
    where = f"'{param}'" if param else "request"
    raise ApiError(400, f"Invalid {where}: {message}.", param or None, "invalid_value")


def token_logprobs(delta: Delta, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """OpenAI's `logprobs.content` entries for a delta's tokens (natural log; -9999 for never)."""
    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode(errors="replace"), "bytes": list(data),
                "logprob": max(logprob, -9999.0)}

    tops = delta.top_logprobs or [[]] * len(delta.tokens)
    return [entry(token, logprob) | {"top_logprobs": [entry(*pair) for pair in top]}
            for token, logprob, top in zip(delta.tokens, delta.logprobs, tops, strict=True)]
