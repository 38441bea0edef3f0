"""The thread that writes pins: in order, cancelled with what waits, and never waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ebbflow.daemon.engine.pin_writer import PinWriter

LEAVING = """
import os, sys
from functools import partial
from ebbflow.daemon.engine.pin_writer import PinWriter
writer = PinWriter()
written = writer.submit(partial(os.open, sys.argv[1], os.O_WRONLY))  # a pipe without a reader: the slowest of disks
while not written.running():
    pass
writer.close()
print("left")
"""


def test_the_process_ends_though_a_file_is_being_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-P", "-c", LEAVING, str(tmp_path / "pipe")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")


def test_files_are_written_in_order_and_what_waits_is_cancelled() -> None:
    writer, begun, goes_on, order = PinWriter(), threading.Event(), threading.Event(), list[int]()

    def first() -> None:
        begun.set()
        assert goes_on.wait(60)
        order.append(1)

    one, two, three = (writer.submit(work) for work in (first, lambda: order.append(2), lambda: order.append(3)))
    assert begun.wait(60)
    two.cancel()
    goes_on.set()
    assert three.result(60) is None
    assert order == [1, 3]
    writer.close()
    writer.join()
    assert one.done()


def test_what_fails_is_said_and_the_next_is_written() -> None:
    writer = PinWriter()

    def fail() -> None:
        raise MemoryError

    failed, after = writer.submit(fail), writer.submit(lambda: None)
    with pytest.raises(MemoryError):
        failed.result(60)
    assert after.result(60) is None
    writer.close()
    writer.join()
