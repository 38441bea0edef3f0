"""`ebb batch`: bad lines are named before anything runs, and what was interrupted goes on where it was."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ebbflow.client import BatchSummary
from ebbflow.client.cli import batch as batch_module
from ebbflow.client.cli.batch_file import open_answers, read_questions
from ebbflow.client.cli.main import main
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.errors import InvalidRequest
from ebbflow.formats.messages import Chunk, Failed, Finished, Generate, ModelDetail, Request, ShowModel
from ebbflow.formats.values import ModelSummary

from support.fake_daemon import VANISH, FakeDaemon, Item

SUMMARY = ModelSummary(
    name="tiny", family="llama", codec="nested", nbytes=1000, base_nbytes=100, original_nbytes=2000, created="now"
)
SHAPE = Architecture(
    family="llama", vocab=258, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=96, context=256,
    norm_eps=1e-5, rotary_theta=10_000.0,
)  # fmt: skip


def answering(*bad: str, vanish: str = "") -> Callable[[Request], Iterable[Item]]:
    """A daemon that echoes, fails at the prompts `bad`, and dies after it has answered `vanish`."""

    def script(request: Request) -> Iterable[Item]:
        match request:
            case ShowModel(model="tiny"):
                yield ModelDetail(
                    id=request.id, summary=SUMMARY, architecture=SHAPE, source="", checksum="", options={}, blocks=1,
                    curve=(),
                )  # fmt: skip
            case ShowModel():
                yield Failed(id=request.id, code="unknown_model", message="no such model")
            case Generate() if request.prompt in bad:
                yield Failed(id=request.id, code="prompt_too_long", message="too long")
            case Generate():
                yield Chunk(id=request.id, text=f"<{request.prompt}>", tokens=1)
                yield Finished(
                    id=request.id, reason="length", prompt_tokens=10, tokens=1, seconds_to_first=0, seconds=0,
                    reused_tokens=4, shareable_tokens=5,
                )  # fmt: skip
                if request.prompt == vanish:
                    yield VANISH
            case _:
                raise AssertionError(request)

    return script


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ebb") as folder:
        monkeypatch.setenv("EBBFLOW_HOME", folder)
        (Path(folder) / "run").mkdir()
        yield Path(folder)


@pytest.fixture
def daemon(home: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(f"ipc://{home}/run/ebbflow.sock", answering()) as running:
        yield running


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{number}"}) + "\n" for number in range(5)))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def ebb(file: Path | str, out: Path, *more: str, code: int = 0, typed: bytes | None = None) -> Result:
    result = CliRunner().invoke(main, ["batch", "tiny", str(file), "-o", str(out), *more], input=typed)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == code, result.output
    return result


def lines(out: Path) -> dict[int, dict[str, object]]:
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line["index"] for line in found}) == len(found)
    return {line["index"]: line for line in found}


def asked(daemon: FakeDaemon, count: int) -> list[Generate]:
    return [daemon.wait_for(Generate) for _ in range(count)]


def test_each_line_is_answered(daemon: FakeDaemon, tmp_path: Path, out: Path):
    file = tmp_path / "in.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a", "id": "first", "max_tokens": 3, "stop": "x"}\r\n\n'
        b'{"chat": [{"role": "user", "content": "hi"}], "id": 7, "priority": 5}\n'
        b'{"ids": [1, 2], "temperature": 1, "namespace": "n", "deadline": "20s"}'
    )
    result = ebb(file, out, "--max-tokens", "9", "--window", "2")
    assert {index: line.get("id") for index, line in lines(out).items()} == {0: "first", 1: 7, 2: None}
    first = lines(out)[0]
    assert {name: first[name] for name in ("text", "reason", "tokens", "prompt_tokens", "reused_tokens")} == {
        "text": "<a>", "reason": "length", "tokens": 1, "prompt_tokens": 10, "reused_tokens": 4,
    }  # fmt: skip
    requests = {request.prompt or request.ids or "chat": request for request in asked(daemon, 3)}
    assert requests["a"].sampling.max_tokens == 3
    assert requests["a"].sampling.stop == ("x",)
    assert (requests["chat"].priority, requests["chat"].sampling.max_tokens) == (5, 9)
    assert (requests[1, 2].priority, requests[1, 2].namespace, requests[1, 2].deadline_seconds) == (-1, "n", 20.0)
    assert "3 answered, 0 failed" in result.stderr
    assert "of 30 prompt tokens 12 (40%) had been computed before, 80% of what could be" in result.stderr
    assert result.stdout == ""


def test_from_stdin(daemon: FakeDaemon, out: Path):
    ebb("-", out, typed=b'{"prompt": "a"}\n')
    assert lines(out)[0]["text"] == "<a>"


def test_nothing_to_ask(home: Path, tmp_path: Path, out: Path):
    empty = tmp_path / "empty"
    empty.write_bytes(b"\n  \n")
    assert "nothing is left" in ebb(empty, out).stderr  # no daemon was needed
    assert out.read_bytes() == b""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "\xff"}', "line 2: 'utf-8' codec"),
        (b'{"prompt": "a"', "line 2: "),
        (b"[1]", "line 2: Expected `object`"),
        (b'{"prompt": "a", "promt": 1}', "line 2: Object contains unknown field `promt`"),
        (b'{"prompt": "a", "ids": [1]}', "line 2: give a prompt, a chat or ids"),
        (b'{"id": 1}', "line 2: give a prompt, a chat or ids"),
        (b'{"ids": []}', "line 2: give a prompt, a chat or ids"),
        (b'{"ids": [-1]}', "line 2: token ids are"),
        (b'{"ids": ["1"]}', "line 2: Expected `int`, got `str`"),
        (b'{"ids": "1"}', "line 2: Expected `array`"),
        (b'{"prompt": 1}', "line 2: Expected `str`"),
        (b'{"prompt": null}', "line 2: Expected `str`"),
        (b'{"prompt": "a", "id": 1.5}', "line 2: Expected `int | str`, got `float`"),
        (b'{"prompt": "a", "id": [1]}', "line 2: Expected `int | str`, got `array`"),
        (b'{"prompt": "a", "id": true}', "line 2: Expected `int | str`, got `bool`"),
        (b'{"prompt": "a", "id": null}', "line 2: Expected `int | str`, got `null`"),
        (b'{"prompt": "a", "id": "x"}', "line 2: the id 'x' is that of line 1, too"),
        (b'{"prompt": "a", "top_p": 2}', "line 2: top_p must be"),
        (b'{"prompt": "a", "temperature": 1e400}', "line 2: "),
        (b'{"prompt": "a", "deadline": "soon"}', "line 2: 'soon' is not a time"),
        (b'{"chat": [{"role": "user"}]}', "line 2: Object missing required field `content`"),
        (b'{"prompt": ' + b"[" * 100_000, "line 2: "),
    ],
)
def test_bad_lines_are_named_before_anything_runs(home: Path, tmp_path: Path, out: Path, line: bytes, words: str):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"prompt": "fine", "id": "x"}\n' + line + b"\n")
    assert words in ebb(file, out, code=2).stderr  # and there is no daemon here
    assert not out.exists()


def test_many_bad_lines_are_not_all_named():
    with pytest.raises(InvalidRequest, match=r"(?s)line 1:.*line 10:.*and 90 more"):
        read_questions("in", b"?\n" * 100, "tiny", {})


def test_a_file_that_is_not_there(home: Path, tmp_path: Path, out: Path):
    assert "No such file" in ebb(tmp_path / "nowhere", out, code=74).stderr
    assert "No such file" in ebb("-", tmp_path / "no" / "folder", typed=b'{"prompt":"a"}', code=74).stderr


def test_a_model_that_is_not_there_is_said_once(daemon: FakeDaemon, file: Path, out: Path):
    result = CliRunner().invoke(main, ["batch", "nobody", str(file), "-o", str(out)])
    assert (result.exit_code, result.stderr) == (3, "ebb: no such model\n")


def test_one_that_fails_does_not_end_the_others_and_is_asked_again(daemon: FakeDaemon, file: Path, out: Path):
    daemon.script = answering("p2")
    result = ebb(file, out, code=2)
    assert "4 answered, 1 failed" in result.stderr
    assert lines(out)[2]["error"] == {"code": "prompt_too_long", "message": "too long"}
    asked(daemon, 5)
    daemon.script = answering()
    assert "4 of 5 are answered already" in ebb(file, out).stderr
    assert [request.prompt for request in asked(daemon, 1)] == ["p2"]
    assert [lines(out)[index]["text"] for index in range(5)] == [f"<p{index}>" for index in range(5)]
    before = out.read_bytes()
    assert "nothing is left" in ebb(file, out).stderr
    assert out.read_bytes() == before


def test_a_daemon_that_dies_in_the_middle(home: Path, file: Path, out: Path):
    address = f"ipc://{home}/run/ebbflow.sock"
    with FakeDaemon(address, answering(vanish="p1")):
        ebb(file, out, "--window", "1", code=69)
    answered = {index for index, line in lines(out).items() if "text" in line}
    assert answered == {0, 1}
    with FakeDaemon(address, answering()) as daemon:
        ebb(file, out)
        assert [request.prompt for request in asked(daemon, 3)] == ["p2", "p3", "p4"]
    assert {index for index, line in lines(out).items() if "text" in line} == {*range(5)}


@pytest.mark.parametrize("torn", [1, 5, 30, -1])
def test_a_line_torn_by_a_kill_is_written_again(daemon: FakeDaemon, file: Path, out: Path, torn: int):
    ebb(file, out)
    asked(daemon, 5)
    *whole, last = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(whole) + last[:torn])
    ebb(file, out)
    assert len(asked(daemon, 1)) == 1
    assert lines(out).keys() == {*range(5)}


def test_answers_to_other_questions_are_not_touched(daemon: FakeDaemon, file: Path, out: Path):
    ebb(file, out)
    before = out.read_bytes()
    file.write_text('{"prompt": "another"}\n' + file.read_text())
    assert "line 1 answers another question" in ebb(file, out, code=2).stderr
    assert out.read_bytes() == before


@pytest.mark.parametrize("command", [["big"], ["tiny", "--temperature", "1"]])
def test_answers_of_another_model_or_sampling_are_not_taken_for_these(
    daemon: FakeDaemon, file: Path, out: Path, command: list[str]
):
    ebb(file, out)
    before = out.read_bytes()
    result = CliRunner().invoke(main, ["batch", *command, str(file), "-o", str(out)])
    assert (result.exit_code, out.read_bytes()) == (2, before)
    assert "another model or sampling" in result.output
    ebb(file, out, "--priority", "-7")  # which changes no answer


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"index": true}\n', b"\xff\n", b"\0" * 9])
def test_a_file_that_is_not_ours_is_left_alone(daemon: FakeDaemon, file: Path, out: Path, content: bytes):
    out.write_bytes(content)
    assert "ebb: " in ebb(file, out, code=2).stderr
    assert out.read_bytes() == content
    before = file.read_bytes()
    ebb(file, file, code=2)
    assert file.read_bytes() == before


def test_ids_are_what_answers_are_known_by(daemon: FakeDaemon, tmp_path: Path, out: Path):
    file = tmp_path / "in.jsonl"
    rows = ['{"prompt": "a", "id": "1"}\n', '{"prompt": "b", "id": 1}\n', '{"prompt": "c", "id": "x"}\n']
    file.write_text("".join(rows[:2]))
    ebb(file, out)
    asked(daemon, 2)
    file.write_text("".join(rows[::-1]))  # in another order, and one more
    ebb(file, out)
    assert [request.prompt for request in asked(daemon, 1)] == ["c"]
    answers = {line["id"]: line["text"] for line in map(json.loads, out.read_text().splitlines())}
    assert answers == {"1": "<a>", 1: "<b>", "x": "<c>"}


def test_a_person_sees_a_bar(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with batch_module._progress(10) as notify:
        notify(BatchSummary(prompts=10, ended=5, failures=1, tokens=100, seconds=2))
    assert "5/10" in screen.getvalue()
    assert ", 1 failed, 50 tokens/s" in screen.getvalue()


def test_two_cannot_write_the_same_file(file: Path, out: Path):
    questions = read_questions("in", file.read_bytes(), "tiny", {})
    with (
        open_answers(out, questions),
        pytest.raises(InvalidRequest, match="another `ebb batch`"),
        open_answers(out, questions),
    ):
        raise AssertionError("both have it")
    with open_answers(out, questions) as answers:
        assert answers.done == frozenset()
