"""What a request may say: OpenAI's fields that are honoured; all others are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mminfer.serving.errors import RequestError

MOST_STOPS, MOST_STOP_LENGTH = 4, 256
LEAST_TEMPERATURE = 1e-6  # above 0; logits that are divided by less may be no numbers any more
MOST_PARTS = 4096  # of a message, and messages
Words = Annotated[str, Field(min_length=1, max_length=MOST_STOP_LENGTH)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextContent(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImageContent(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Content], Field(max_length=MOST_PARTS)]


class JsonSchema(_Strict):
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type json_schema, and with no other")
        return self


class StreamOptions(_Strict):
    include_usage: bool = False


class OwnSettings(_Strict):
    preset: str | None = None
    min_tokens: Annotated[int, Field(ge=1)] | None = None


class ChatRequest(_Strict):
    """The body of `/v1/chat/completions`."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_PARTS)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] = 1
    stop: Words | Annotated[list[Words], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    mminfer: OwnSettings = OwnSettings()
    # What changes no answer, or is honoured at these values alone.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @field_validator("temperature")
    @classmethod
    def _is_taken(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < LEAST_TEMPERATURE:
            raise PydanticCustomError("temperature", f"Input should be 0, or {LEAST_TEMPERATURE:g} at least")
        return value

    @property
    def keeps_to_schema(self) -> bool:
        """Whether answers are JSON."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def parse_request(body: bytes) -> ChatRequest:
    """The request of a body.

    Raises:
        RequestError: it is no JSON, or not such a request; the message names the field, never its value.
    """
    try:
        return ChatRequest.model_validate_json(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(str(step) for step in first["loc"])[:200]
        if first["type"] == "json_invalid":
            raise RequestError(400, "the body is not JSON", code="invalid_json") from None
        message = "not supported: leave it out" if first["type"] == "extra_forbidden" else _plain(first)
        place = place if place.isascii() and place.isprintable() else "a field"
        raise RequestError(400, f"{place}: {message}", param=place, code=str(first["type"])) from None


def _plain(error: Any) -> str:
    """pydantic's words where they are of types and bounds, which name no value of the request."""
    return "this value is not supported" if error["type"] in ("union_tag_invalid", "value_error") else error["msg"]
