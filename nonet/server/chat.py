"""Chat templates: messages to the text of a prompt, by the checkpoint's Jinja template in a sandbox.

Used by `prompts`. Sources, the first that is there: the request's (where clients are trusted), the file named in the
configuration, chat_template.jinja, and chat_template in tokenizer_config.json (a text, or a list of named ones).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nonet.errors import ConfigError, ModelError, RequestError
from nonet.openai.fields import Shown
from nonet.openai.requests import Message

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OURS = {"messages", "tools", "add_generation_prompt", "documents"}


class _Generation(Extension):
    """{% generation %} marks the assistant's tokens for training; here its body is shown as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatTemplates:
    """The templates of one tokenizer folder. Raises ConfigError or ModelError if they cannot be read."""

    def __init__(self, folder: str, file: str | None = None, trust_requests: bool = False) -> None:
        self._env = _environment()
        self._trust = trust_requests
        settings = _settings(Path(folder) / "tokenizer_config.json")
        self._special = {name: _token(settings.get(name)) for name in _SPECIAL}
        self._compiled = {name: self._compile(text, file) for name, text in _sources(folder, settings, file).items()}

    def _compile(self, text: str, file: str | None) -> jinja2.Template:
        try:
            return self._env.from_string(text)
        except jinja2.TemplateError as error:
            if file is not None:
                raise ConfigError("chat_template", file, f"is no Jinja template: {error}") from error
            raise ModelError(f"the tokenizer's chat_template is no Jinja template: {error}") from error

    def render(
        self,
        messages: list[Message],
        *,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, str]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt. Raises RequestError: no template, or it refuses these messages."""
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message", True, "goes with add_generation_prompt = false")
        if taken := _OURS & set(variables or ()):
            raise RequestError(f"chat_template_kwargs.{min(taken)}", "...", "is set by the request itself")
        chosen = self._choose(template, with_tools=bool(tools))
        turns = [_turn(message) for message in messages]
        values = {**self._special, **(variables or {}), "messages": turns, "tools": tools, "documents": documents}
        try:
            text = chosen.render({**values, "add_generation_prompt": add_generation_prompt})
        except Exception as error:  # noqa: BLE001 - a template is a program: whatever it raises is about its input
            words = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            remedy = f"the chat template refuses them: {words}"
            raise RequestError("messages", f"{len(messages)} given", remedy) from error
        return _cut(text, turns[-1]) if continue_final_message else text

    def _choose(self, template: str | None, with_tools: bool) -> jinja2.Template:
        if template is not None and template not in self._compiled:
            if not self._trust:
                remedy = "templates of requests are not run here; pass variables in chat_template_kwargs"
                raise RequestError("chat_template", Shown(template), remedy)
            try:
                return self._env.from_string(template)
            except (jinja2.TemplateError, RecursionError) as error:
                raise RequestError("chat_template", Shown(template), f"is no Jinja template: {error}") from error
        name = template or ("tool_use" if with_tools and "tool_use" in self._compiled else "default")
        if name not in self._compiled:
            remedy = "the model has no chat template; start with --chat-template FILE, or use /v1/completions"
            raise RequestError("messages", "a chat", remedy)
        return self._compiled[name]


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object")
    return found


def _token(value: Any) -> str:
    """A special token's text: given as such, or in an object."""
    return str(value.get("content", "")) if isinstance(value, dict) else value if isinstance(value, str) else ""


def _sources(folder: str, settings: Mapping[str, Any], file: str | None) -> dict[str, str]:
    """Templates by name; the one that is used without being asked for is "default"."""
    if file is not None:
        try:
            return {"default": Path(file).expanduser().read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("chat_template", file, f"cannot be read: {error}") from error
    beside = Path(folder) / "chat_template.jinja"
    if beside.is_file():
        return {"default": beside.read_text(encoding="utf-8")}
    given = settings.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        return {str(one["name"]): str(one["template"]) for one in given if isinstance(one, dict) and "template" in one}
    return {}


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates know it: only what was given, arguments of calls as objects."""
    turn = message.model_dump(exclude_none=True)
    turn.setdefault("content", "" if message.tool_calls is None else None)
    for call in turn.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except ValueError as error:
                raise RequestError("messages.tool_calls", Shown(function["arguments"]), "send JSON") from error
    return turn


def _cut(text: str, last: Mapping[str, Any]) -> str:
    """The text up to the end of the last message's content, so that the model goes on with it."""
    content = last.get("content") or ""
    at = text.rfind(content.strip())
    if not content.strip() or at < 0:
        raise RequestError("continue_final_message", True, "the last message must have content that the template shows")
    whole = text.rfind(content)
    return text[: whole + len(content)] if whole >= 0 else text[: at + len(content.strip())]
