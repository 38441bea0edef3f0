from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from ebbflow.client.cli.main import main

KEY = "k" * 40


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("EBBFLOW_HOME", str(tmp_path))


def ebb(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["keys", *arguments])


def test_keys_are_made_once_and_shown():
    first = json.loads(ebb("show", "--json").stdout)
    assert json.loads(ebb("show", "--json").stdout) == first
    assert first["client"] != first["daemon"]
    assert first["allowed"] == {}
    assert "nobody" in ebb("show").stdout


def test_who_is_allowed_can_be_revoked_by_key_or_name():
    assert ebb("allow", KEY, "laptop").exit_code == 0
    assert f"{KEY} laptop" in ebb("show").stdout
    assert ebb("revoke", "laptop").exit_code == 0
    again = ebb("revoke", KEY)
    assert (again.exit_code, "is not allowed anyway" in again.stderr) == (2, True)


def test_nonsense_is_not_allowed():
    result = ebb("allow", "short")
    assert (result.exit_code, "is not a key" in result.stderr) == (2, True)
