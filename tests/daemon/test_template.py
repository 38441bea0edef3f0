"""What authors of chat templates count on, and what they must not get."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from ebbflow.daemon.engine.template import template_environment
from ebbflow.daemon.engine.tokenizer import Tokenizer, load_tokenizer
from ebbflow.formats.messages import ChatMessage

from support.tiny_models import write_tokenizer


def render(template: str, **values: object) -> str:
    return template_environment().from_string(template).render(**values)


def test_the_names_that_templates_use() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert render("{% generation %}said{% endgeneration %}") == "said"
    assert render("{{ {'é': '<b>'} | tojson }}") == '{"é": "<b>"}'
    assert render("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}") == "1"


def test_absent_tools_are_none_and_special_tokens_are_there(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    text = "{% if tools is not none or documents is not none %}wrong{% endif %}{{ bos_token }}{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text(text)
    tokenizer = Tokenizer(tmp_path, 0)
    assert tokenizer.render_chat([ChatMessage("user", "hi")]) == [0, *tokenizer.encode("hi")[1:]]


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(Exception, match="unsafe"):
        render("{{ ''.__class__.__mro__ }}")


def test_truncation_and_padding_left_in_the_tokenizer_file_are_ignored(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    whole = tokenizer.encode("a long sentence").ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("a long sentence").ids == whole
