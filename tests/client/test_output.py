"""What models say of themselves, and errors quote, does not drive the terminal."""

from __future__ import annotations

import pytest

from ebbflow.client.cli.output import note, write_fields, write_table

EVIL = "x\x1b]0;mine\x07\x9b2J\ry"


@pytest.mark.parametrize(
    "write",
    [
        lambda: note(EVIL),
        lambda: write_fields([("source", EVIL)]),
        lambda: write_table(("NAME",), [(EVIL,)]),
    ],
    ids=["note", "fields", "table"],
)
def test_control_characters_of_others_are_not_written(write, capfd):
    write()
    out, err = capfd.readouterr()
    assert "x\ufffd]0;mine\ufffd\ufffd2J\ufffdy" in out + err
