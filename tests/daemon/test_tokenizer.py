"""Text to tokens and back: streams that never tear a character or leak a stop string, templates that cannot harm."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ebbflow.daemon.engine.tokenizer import TextStream, Tokenizer
from ebbflow.formats.errors import CorruptFile, InvalidRequest
from ebbflow.formats.values import ChatMessage

from support.tiny_models import BOS, VOCAB, write_tokenizer

HELLO = (ChatMessage("user", "Hello"), ChatMessage("assistant", "Hi"), ChatMessage("user", "Bye"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


@cache
def byte_level() -> tokenizers.Tokenizer:
    """One token for each byte, joined before they are decoded (GPT-2, Llama 3, Qwen)."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@cache
def byte_fallback() -> tokenizers.Tokenizer:
    """Words with marked spaces, and bytes for the rest (Llama 2, Mistral, TinyLlama)."""
    words = ["▁", "a", "b", "▁a", "▁the", "é", "▁▁", "d", "\n", "世"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    decoders = tokenizers.decoders
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def streamed(tokenizer: tokenizers.Tokenizer, tokens: Iterable[int], stops: tuple[str, ...] = ()) -> list[str]:
    """The pieces of a stream, until it stops; the last is what `finish` gave."""
    stream, pieces = TextStream(tokenizer, stops), []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


def spell(text: str) -> list[int]:
    """A text's bytes as tokens of `byte_level`."""
    tokens: list[int] = byte_level().encode(text).ids
    return tokens


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 257), max_size=30))
@example(spell("é") + spell("é")[:1])
@example(spell("世")[:2] + spell("a"))
def test_any_bytes_stream_to_what_they_decode_to(tokens: list[int]) -> None:
    assert "".join(streamed(byte_level(), tokens)) == byte_level().decode(tokens, skip_special_tokens=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=30))
def test_no_piece_of_a_text_holds_half_a_character(text: str) -> None:
    pieces = streamed(byte_level(), spell(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert all(len(piece) <= 1 for piece in pieces)  # and every character comes with its last byte
        assert pieces[-1] == ""


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(3, 258), st.integers(259, 268), st.sampled_from([0, 1, 2])), max_size=20))
@example([54, 198, 238, 80, 41, 233])  # the library's own stream raises, or disagrees with itself
def test_byte_fallback_never_fails_and_is_exact_for_whole_characters(tokens: list[int]) -> None:
    text = "".join(streamed(byte_fallback(), tokens))
    whole = byte_fallback().decode(tokens, skip_special_tokens=True)
    assert "\ufffd" in whole or text == whole


@settings(deadline=None, derandomize=True)
@given(st.text(alphabet="ab é世\n", max_size=20))
def test_byte_fallback_streams_texts(text: str) -> None:
    tokens = byte_fallback().encode("▁" + text.replace(" ", "▁")).ids
    assert "".join(streamed(byte_fallback(), tokens)) == text


def test_a_continuation_keeps_its_first_space() -> None:
    tokenizer = byte_fallback()
    the, a = tokenizer.token_to_id("▁the"), tokenizer.token_to_id("▁a")
    assert TextStream(tokenizer, ()).push(a) == "a"
    assert TextStream(tokenizer, (), [1, the]).push(a) == " a"


def test_special_tokens_are_silent() -> None:
    stream = TextStream(byte_level(), ())
    pieces = [stream.push(token) for token in (256, *spell("a"), 257, *spell("b"))]
    assert pieces == ["", "a", "", "b"]


def before_stop(text: str, stops: tuple[str, ...]) -> str:
    """What may be seen of a text that ends at the first stop string to be complete."""
    for end in range(1, len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            return text[: min(found)]
    return text


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    st.text(alphabet="ab é", max_size=25),
    st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=3).map(tuple),
)
@example("aab", ("ab",))
@example("aaab", ("aab", "b"))
@example("abé", ("aba", "bé"))
def test_nothing_of_a_stop_string_leaks(text: str, stops: tuple[str, ...]) -> None:
    pieces = streamed(byte_level(), spell(text), stops)
    assert "".join(pieces) == before_stop(text, stops)
    so_far = ""
    for piece in pieces:  # at no moment was more to be seen than in the end
        so_far += piece
        assert before_stop(text, stops).startswith(so_far)


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    assert streamed(byte_level(), spell("axbc!"), ("bcd", "xyz")) == ["a", "", "x", "", "bc!", ""]


def test_a_stream_says_that_it_stopped() -> None:
    stream = TextStream(byte_level(), ("END",))
    stopped = []
    for token in spell("a END b")[:5]:
        stream.push(token)
        stopped.append(stream.stopped)
    assert stopped == [False, False, False, False, True]
    assert stream.finish() == ""


def test_a_stop_string_that_ends_with_a_torn_character_at_the_end() -> None:
    assert "".join(streamed(byte_level(), spell("aé")[:2], ("a\ufffd",))) == ""


def test_prompts(folder: Path) -> None:
    tokenizer = Tokenizer(folder, BOS)
    assert tokenizer.encode("a")[0] == BOS
    assert len(tokenizer.encode("abc")) == 4
    assert max(tokenizer.encode("\U0010ffff")) < VOCAB


def settings_of(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_missing_first_token_is_added_once_where_the_model_wants_one(folder: Path) -> None:
    plain = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(plain))
    assert len(Tokenizer(folder, BOS).encode("ab")) == 2
    settings_of(folder, add_bos_token=True)
    assert Tokenizer(folder, BOS).encode("ab")[0] == BOS
    assert len(Tokenizer(folder, BOS).encode("ab")) == 3
    assert len(Tokenizer(folder, None).encode("ab")) == 2


def rendered(folder: Path, template: Any, chat: tuple[ChatMessage, ...] = HELLO) -> str:
    settings_of(folder, chat_template=template)
    tokenizer = Tokenizer(folder, BOS)
    tokens = tokenizer.render_chat(chat)
    return str(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens, skip_special_tokens=False))


def test_a_template_renders_the_conversation(folder: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}U:{% else %}A:{% endif %}\n"
        "{{ m['content'] | trim }};{% endfor %}\n{% if add_generation_prompt %}A:{% endif %}"
    )
    assert rendered(folder, template) == "<s>U:Hello;A:Hi;U:Bye;A:"


def test_templates_may_break_out_of_loops(folder: Path) -> None:
    assert rendered(folder, "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}") == "Hello"


def test_of_several_templates_the_default_is_used(folder: Path) -> None:
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert rendered(folder, several) == "yes"


def test_a_template_in_its_own_file_comes_first(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("é file")
    assert rendered(folder, "setting") == "é file"


def test_special_tokens_may_be_described_at_length(folder: Path) -> None:
    settings_of(folder, bos_token={"content": "<s>", "special": True})
    assert rendered(folder, "{{ bos_token }}x") == "<s>x"


def test_without_a_template_turns_are_lines(folder: Path) -> None:
    tokenizer = Tokenizer(folder, BOS)
    assert tokenizer.render_chat(HELLO) == tokenizer.encode("Hello\nHi\nBye")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system turns') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{% set x = messages.append(1) %}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ range(10 ** 9) | list }}",
        "{{ nothing.at.all }}",
        "{% if %}",
        "{% include 'other' %}",
        "{{ messages[7].content.strip() }}",
    ],
)
def test_a_template_that_fails_refuses_the_conversation(folder: Path, template: str) -> None:
    with pytest.raises(InvalidRequest, match="template"):
        rendered(folder, template)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": {"type": "Nothing"}}'])
def test_a_file_that_is_no_tokenizer(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"tokenizer\.json"):
        Tokenizer(folder, BOS)


def test_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile, match=r"tokenizer\.json"):
        Tokenizer(tmp_path, BOS)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_settings_and_templates_that_cannot_be_read(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\xff{")
    with pytest.raises(CorruptFile, match=name):
        Tokenizer(folder, BOS)


def test_settings_may_be_missing(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer(folder, BOS).encode("a")[0] == BOS
