"""Lines of the log: what is in them, how many there are, and where they go."""

from __future__ import annotations

import json
import logging

import pytest

from ebbflow.daemon.supervisor import logs as logs_module
from ebbflow.daemon.supervisor.logs import (
    LINES_PER_WINDOW,
    WINDOW_SECONDS,
    JsonFormatter,
    Logs,
    RateLimit,
    TextFormatter,
)


def record(message="worker %s started", *arguments, level=logging.INFO, **extra):
    made = logging.getLogger().makeRecord(
        "ebbflow.daemon.supervisor.worker", level, "f", 1, message, arguments, None, extra=extra
    )
    made.created = 1_763_700_000.0
    return made


def test_text_has_the_fields_at_its_end():
    line = TextFormatter().format(record("worker %s started", 12, pid=12, why="it was asked"))
    time, _, rest = line.partition(" ")
    assert time.startswith("2025-11-2")
    assert rest == 'info worker: worker 12 started pid=12 why="it was asked"'


def test_nobody_can_write_a_line_of_his_own():
    line = TextFormatter().format(record("from %s", "x\n2025-11-21 info main: all is well\r"))
    assert line.endswith(r"from x\n2025-11-21 info main: all is well\r")


def test_json_has_the_template_too():
    fields = json.loads(JsonFormatter().format(record("worker %s ünd", 12, pid=12)))
    assert (fields["message"], fields["template"], fields["pid"]) == ("worker 12 ünd", "worker %s ünd", 12)
    assert (fields["level"], fields["module"]) == ("info", "worker")


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_a_traceback_is_kept(formatter):
    try:
        raise ValueError("deep")
    except ValueError as error:
        made = logging.getLogger().makeRecord("n", 40, "f", 1, "failed", (), (ValueError, error, error.__traceback__))
    assert "ValueError: deep" in formatter.format(made)


def test_what_repeats_is_counted():
    now = 0.0
    limit = RateLimit(lambda: now)
    passed = [limit.filter(record("lost %s", number)) for number in range(LINES_PER_WINDOW + 70)]
    assert passed.count(True) == LINES_PER_WINDOW
    assert limit.filter(record("another"))
    assert limit.filter(record("lost %s", 1, level=logging.ERROR))
    now = WINDOW_SECONDS
    after = record("lost %s", 7)
    assert limit.filter(after)
    assert TextFormatter().format(after).endswith("lost 7 (and 70 more like it)")
    assert json.loads(JsonFormatter().format(after))["repeats"] == 70
    again = record("lost %s", 8)
    assert limit.filter(again)
    assert "more like it" not in TextFormatter().format(again)


def test_many_templates_are_not_kept_for_ever():
    now = 0.0
    limit = RateLimit(lambda: now)
    for number in range(1000):
        now = number * WINDOW_SECONDS
        limit.filter(record(f"message {number}"))
    assert len(limit._windows) < 5


@pytest.fixture
def root():
    root = logging.getLogger()
    before = root.level
    yield root
    root.setLevel(before)


def test_a_file_is_rotated_and_opened_again(tmp_path, monkeypatch, root):
    monkeypatch.setattr(logs_module, "FILE_NBYTES", 300)
    file = tmp_path / "daemon.log"
    logs = Logs("info", "text", str(file))
    try:
        for number in range(20):
            root.info("line %d", number)
        assert file.stat().st_size <= 300
        assert sorted(path.name for path in tmp_path.iterdir()) == ["daemon.log", "daemon.log.1", "daemon.log.2"]
        file.rename(tmp_path / "moved")
        logs.reopen()
        root.info("after it was moved")
        assert file.read_text().endswith("after it was moved\n")
        logs.set_level("error")
        root.info("unheard")
        assert "unheard" not in file.read_text()
    finally:
        logs.close()
    root.error("after the end")
    assert "after the end" not in file.read_text()


def test_a_full_disk_ends_nothing(root, capsys):
    logs = Logs("info", "text", "/dev/full")
    try:
        root.info("this does not fit")
        assert "No space left" in capsys.readouterr().err
        logs.reopen()  # as on SIGHUP
        root.info("nor does this")
    finally:
        logs.close()
