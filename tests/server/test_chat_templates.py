"""Chat templates: where they come from, what they may do, and what they do with messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nonet.errors import ConfigError, ModelError, RequestError
from nonet.openai.requests import Message
from nonet.server.chat import ChatTemplates

HI = [Message(role="user", content="hi")]
PLAIN = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def folder(path: Path, template: object = PLAIN, **settings) -> str:
    """A tokenizer's folder with this chat_template in tokenizer_config.json."""
    found = {**settings, **({} if template is None else {"chat_template": template})}
    (path / "tokenizer_config.json").write_text(json.dumps(found))
    return str(path)


def test_the_tokenizers_own(tmp_path):
    templates = ChatTemplates(folder(tmp_path))
    assert templates.render(HI) == "[user:hi]>"
    assert templates.render(HI, add_generation_prompt=False) == "[user:hi]"


def test_a_file_beside_wins_and_a_configured_one_wins_over_both(tmp_path):
    place = folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("beside")
    (tmp_path / "mine.jinja").write_text("mine")
    assert ChatTemplates(place).render(HI) == "beside"
    assert ChatTemplates(place, str(tmp_path / "mine.jinja")).render(HI) == "mine"


def test_named_templates(tmp_path):
    named = [{"name": name, "template": name[0]} for name in ("default", "tool_use", "rag")]
    templates = ChatTemplates(folder(tmp_path, named))
    assert templates.render(HI) == "d"
    assert templates.render(HI, tools=[{"type": "function"}]) == "t"
    assert templates.render(HI, template="rag") == "r"


def test_without_one_the_remedy_is_named(tmp_path):
    for templates in (ChatTemplates(str(tmp_path)), ChatTemplates(folder(tmp_path, None))):
        with pytest.raises(RequestError, match="the model has no chat template; start with --chat-template FILE"):
            templates.render(HI)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="chat_template = .*cannot be read"):
        ChatTemplates(str(tmp_path), str(tmp_path / "none.jinja"))
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match="is no Jinja template"):
        ChatTemplates(str(tmp_path), str(tmp_path / "bad.jinja"))
    with pytest.raises(ModelError, match="is no Jinja template"):
        ChatTemplates(folder(tmp_path, "{% if %}"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        ChatTemplates(str(tmp_path))


def test_special_tokens_variables_and_helpers(tmp_path):
    text = (
        "{{ bos_token }}|{{ eos_token }}|{{ enable_thinking }}|{{ messages | tojson }}|"
        "{{ strftime_now('%Y') | length }}"
        "{% generation %}|shown{% endgeneration %}"
    )
    place = folder(tmp_path, text, bos_token={"content": "<s>", "special": True}, eos_token="</s>")
    turns = [Message(role="user", content="<\u00fc>")]
    shown = ChatTemplates(place).render(turns, variables={"enable_thinking": False})
    assert shown == '<s>|</s>|False|[{"role": "user", "content": "<\u00fc>"}]|4|shown'


def test_blocks_are_trimmed_as_transformers_does(tmp_path):
    text = "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n{% endif %}\n{% endfor %}"
    assert ChatTemplates(folder(tmp_path, text)).render(HI) == "hi\n"


def test_what_a_template_refuses_is_the_clients_mistake(tmp_path):
    for text, words in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute"),
        ("{{ messages.append(1) }}", "is unsafe"),
    ):
        with pytest.raises(RequestError, match="messages = '1 given': the chat template refuses them") as raised:
            ChatTemplates(folder(tmp_path, text)).render(HI)
        assert words in str(raised.value)


def test_templates_of_requests_are_run_only_where_clients_are_trusted(tmp_path):
    place = folder(tmp_path)
    with pytest.raises(RequestError, match="chat_template = .*templates of requests are not run here"):
        ChatTemplates(place).render(HI, template="{{ 1 + 1 }}")
    trusting = ChatTemplates(place, trust_requests=True)
    assert trusting.render(HI, template="{{ 1 + 1 }}") == "2"
    with pytest.raises(RequestError, match="is no Jinja template"):
        trusting.render(HI, template="{{")


def test_variables_cannot_replace_what_the_request_sets(tmp_path):
    with pytest.raises(RequestError, match=r"chat_template_kwargs.messages = .*set by the request itself"):
        ChatTemplates(folder(tmp_path)).render(HI, variables={"messages": []})


def test_going_on_with_the_last_message(tmp_path):
    templates = ChatTemplates(folder(tmp_path))
    turns = [*HI, Message(role="assistant", content="hi, I am ")]
    go_on = {"add_generation_prompt": False, "continue_final_message": True}
    assert templates.render(turns, **go_on) == "[user:hi][assistant:hi, I am "
    with pytest.raises(RequestError, match="goes with add_generation_prompt = false"):
        templates.render(turns, continue_final_message=True)
    with pytest.raises(RequestError, match="the last message must have content"):
        templates.render([*HI, Message(role="assistant", content="")], **go_on)
    trimming = ChatTemplates(folder(tmp_path, "{% for m in messages %}{{ m.content | trim }};{% endfor %}"))
    assert trimming.render(turns, **go_on) == "hi;hi, I am"


def test_calls_reach_the_template_as_objects(tmp_path):
    text = "{% for c in messages[0].tool_calls %}{{ c.function.name }}({{ c.function.arguments.x }}){% endfor %}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 3}'}}
    templates = ChatTemplates(folder(tmp_path, text))
    assert templates.render([Message(role="assistant", tool_calls=[call])]) == "f(3)"
    call["function"]["arguments"] = "{"
    with pytest.raises(RequestError, match="send JSON"):
        templates.render([Message(role="assistant", tool_calls=[call])])
