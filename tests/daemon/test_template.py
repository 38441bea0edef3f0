"""What authors of chat templates count on, and what they must not get."""

from __future__ import annotations

import contextlib
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from ebbflow.daemon.engine.bounds import TookTooLong, bounded
from ebbflow.daemon.engine.template import template_environment
from ebbflow.daemon.engine.tokenizer import TEMPLATE_SECONDS, Tokenizer, load_tokenizer
from ebbflow.formats.errors import InvalidRequest
from ebbflow.formats.values import ChatMessage

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


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
        ("{{ 'x' * 10**10 }}", "takes more than"),
        ("{{ '%9999999999d' % 1 }}", "takes more than|refuses"),
        ("{{ 'x'.center(10**10) }}", "takes more than"),
        ("{{ 3 ** (10 ** 9) }}", "takes more than"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "refuses"),
        ("{{ 'abc' * 3000000 }}", "makes 9000000 letters"),
        ("{% for i in range(99999) %}{% set x = ['y' * (30000000 + i)] %}{% endfor %}", "takes more than"),
    ],
)
def test_a_hostile_template_is_stopped(tmp_path: Path, template: str, words: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = Tokenizer(tmp_path, 0)
    began = time.process_time()
    with pytest.raises(InvalidRequest, match=words):
        tokenizer.render_chat([ChatMessage("user", "hi")])
    assert time.process_time() - began < 3 * TEMPLATE_SECONDS + 0.5
    # Nothing of the bounds stays behind.
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGPROF) == signal.SIG_DFL
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_bounds_hold_also_around_what_goes_on_after_any_error() -> None:
    with pytest.raises(TookTooLong), bounded(0.05, 10**8):
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))


def test_in_another_thread_only_memory_is_bounded() -> None:
    def work() -> str:
        with bounded(0.01, 10**8):
            try:
                bytearray(10**10)
            except MemoryError:
                return "bounded"
        return "unbounded"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == "bounded"
