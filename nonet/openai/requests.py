"""Bodies of requests, field by field: OpenAI's, and those that vLLM adds.

Used by the server. Ranges of sampling fields are checked by `types.SamplingParams`, not here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from nonet.openai.fields import Body, Only, refuse

Tokens = list[int]
MAX_STOPS = 64
MAX_BIASES = 1024


def _prompts(value: Any) -> list[str] | list[Tokens]:
    """A list of prompts, whatever of the four forms came."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _are_tokens(value):
            return [value]
        if all(isinstance(item, list) and item and _are_tokens(item) for item in value):
            return value
    raise refuse("must be a text, a list of texts, a list of token ids, or a list of such lists, none of them empty")


def _are_tokens(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)


def _stops(value: Any) -> list[str]:
    """`stop` as a list."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise refuse("must be a text or a list of texts")
    if len(stops) > MAX_STOPS:
        raise refuse(f"must be at most {MAX_STOPS} texts")
    return stops


def _biases(value: Any) -> dict[int, float] | None:
    """`logit_bias` by token id: JSON's keys are texts."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise refuse(f"must be an object of at most {MAX_BIASES} token ids and biases")
    for token, bias in value.items():
        number = type(bias) in (int, float) and -100 <= bias <= 100
        if not (token.isascii() and token.isdigit() and len(token) < 10 and number):
            raise refuse('must map token ids to biases of -100 to 100, such as {"42": -100}')
    return {int(token): float(bias) for token, bias in value.items()}


def _content(value: Any) -> str | None:
    """A message's text; parts of type text are joined by line breaks, as vLLM does."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise refuse("must be a text or a list of parts of type text")
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in (None, "text") or not isinstance(text, str):
            what = f"part {kind!r}: " if isinstance(kind, str) and kind != "text" else ""
            raise refuse(f'{what}only text is read; parts are {{"type": "text", "text": "..."}}')
        texts.append(text)
    return "\n".join(texts)


_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPTS = [_TEXT, _IDS, *({"type": "array", "items": one, "minItems": 1} for one in (_TEXT, _IDS))]
_STOPS = {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS}
_BIASES = {
    "type": "object",
    "maxProperties": MAX_BIASES,
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": _TEXT}}

Prompts = Annotated[Any, PlainValidator(_prompts), WithJsonSchema({"anyOf": _PROMPTS})]
Stops = Annotated[Any, PlainValidator(_stops), WithJsonSchema({"anyOf": [{"type": "null"}, _TEXT, _STOPS]})]
Biases = Annotated[Any, PlainValidator(_biases), WithJsonSchema({"anyOf": [{"type": "null"}, _BIASES]})]
Content = Annotated[
    Any,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "null"}, _TEXT, {"type": "array", "items": _PART}]}),
]


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="A last chunk with the usage of the whole request.")
    continuous_usage_stats: bool | None = Field(None, description="The usage so far in every chunk.")
    include_obfuscation: Annotated[Any, Only(False, why="chunks carry no padding")] = None


class StructuredOutputs(Body):
    """What the text must match: one of these. Needs the extra `structured`."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema.")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, description="One of these texts.")
    grammar: str | None = Field(None, description="A Lark grammar, as llguidance reads it.")
    json_object: bool | None = Field(None, description="Any JSON object.")


class JsonSchema(Body):
    name: str = Field(description="Not shown to the model.")
    description: str | None = Field(None, description="Not shown to the model.")
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="The schema is enforced either way.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Body):
    """What completions and chat completions share."""

    model: str | None = Field(None, description="A served name; default: the first of them.")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")
    n: int | None = Field(None, description="Continuations of each prompt. Default 1.")
    max_tokens: int | None = Field(None, description="Longest output.")
    temperature: float | None = Field(None, description="0: greedy.")
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stops = []
    logit_bias: Biases = None
    response_format: ResponseFormat | None = None
    user: str | None = Field(None, description="No effect.")
    # vLLM's
    top_k: int | None = Field(None, description="-1 or 0: all tokens.")
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=1024)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = Field(None, description="The tokenizer's own, such as a first BOS.")
    truncate_prompt_tokens: int | None = Field(None, ge=-1, description="Keep the last so many; -1: what fits.")
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = Field(None, description='Tokens in logprobs as "token_id:42".')
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    guided_grammar: str | None = None
    request_id: str | None = Field(None, description="Like the header X-Request-Id, which wins.")
    priority: Annotated[Any, Only(0, why="there is one priority")] = None
    length_penalty: Annotated[Any, Only(1.0, 1, why="there is no beam search")] = None
    use_beam_search: Annotated[Any, Only(False, why="there is no beam search")] = None
    spaces_between_special_tokens: Annotated[Any, Only(True, why="text is as the tokenizer decodes it")] = None
    allowed_token_ids: Annotated[Any, Only(why="not supported; use logit_bias or structured_outputs")] = None
    bad_words: Annotated[Any, Only([], why="not supported; use logit_bias")] = None
    kv_transfer_params: Annotated[Any, Only(why="prefill and decode on separate servers is not supported")] = None


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: Prompts = Field(description="Text or token ids, one prompt or many.")
    echo: bool | None = Field(None, description="The prompt comes back before its continuation.")
    logprobs: int | None = Field(None, description="This many most likely tokens beside each sampled one.")
    best_of: int | None = Field(None, description="Only the value of `n`.")
    suffix: Annotated[Any, Only("", why="not supported; put what follows into the prompt")] = None


class Message(Body):
    """One turn. What is not used here is passed to the chat template."""

    role: str = Field(min_length=1)
    content: Content = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: Annotated[Any, Only([], why="only text is read")] = None
    audio: Annotated[Any, Only(why="only text is read")] = None
    function_call: Annotated[Any, Only(why="use tool_calls")] = None


_CALLS = "the text is not searched for calls"


class Templated(Body):
    """How messages become a prompt."""

    add_generation_prompt: bool = Field(True, description="End with the head of the assistant's turn.")
    continue_final_message: bool = Field(False, description="Go on with the last message instead of a new turn.")
    chat_template: str | None = Field(None, description="Refused where the server does not trust its clients.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the chat template.")
    tools: list[dict[str, Any]] | None = Field(None, description='For the template, with `tool_choice` "none".')
    documents: list[dict[str, str]] | None = Field(None, description="For the template.")


class ChatCompletionRequest(Sampling, Templated):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, description="Like `max_tokens`, and wins.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=100, description="Only with `logprobs`.")
    tool_choice: Annotated[Any, Only("none", why=f"{_CALLS}; use 'none' and read them in the text")] = None
    parallel_tool_calls: bool | None = Field(None, description="No effect: the text is not searched for calls.")
    reasoning_effort: str | None = Field(None, description="A variable for the chat template.")
    metadata: dict[str, str] | None = Field(None, description="No effect: nothing is stored.")
    safety_identifier: str | None = Field(None, description="No effect.")
    prompt_cache_key: str | None = Field(None, description="No effect: equal prefixes are always found.")
    service_tier: Annotated[Any, Only("auto", "default", why="there is one tier")] = None
    store: Annotated[Any, Only(False, why="nothing is stored")] = None
    modalities: Annotated[Any, Only(["text"], why="only text is written")] = None
    audio: Annotated[Any, Only(why="only text is written")] = None
    prediction: Annotated[Any, Only(why="not supported")] = None
    moderation: Annotated[Any, Only(why="not supported")] = None
    verbosity: Annotated[Any, Only("medium", why="not supported")] = None
    web_search_options: Annotated[Any, Only(why="not supported")] = None
    prompt_cache_options: Annotated[Any, Only(why="not supported")] = None
    prompt_cache_retention: Annotated[Any, Only(why="not supported")] = None
    functions: Annotated[Any, Only([], why="use tools")] = None
    function_call: Annotated[Any, Only("none", why="use tool_choice")] = None
    echo: Annotated[Any, Only(False, why="only completions echo")] = None


class TokenizeRequest(Templated):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]
