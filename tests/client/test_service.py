"""The unit's text as systemd reads it, and the commands, with a systemctl that only writes down what it hears."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ebbflow.client.cli.main import main
from ebbflow.client.cli.service import unit_path
from ebbflow.client.launch import COMMAND
from ebbflow.client.unit import NAME, state, unit_text
from ebbflow.formats.messages import Request, Status
from ebbflow.formats.settings import HELP

from support.fake_daemon import FakeDaemon

NO_BUS = "echo 'Failed to connect to bus: No medium found' >&2; exit 1"


@pytest.fixture(autouse=True)
def home(monkeypatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ebb") as folder:
        monkeypatch.setenv("XDG_CONFIG_HOME", f"{folder}/config")
        monkeypatch.setenv("EBBFLOW_HOME", folder)
        monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")
        yield Path(folder)


@pytest.fixture
def systemctl(home: Path) -> Callable[..., Callable[[], list[str]]]:
    """Puts one on the PATH that does as the script says; gives what it was asked."""

    def install(script: str = "") -> Callable[[], list[str]]:
        program, heard = home / "bin" / "systemctl", home / "heard"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$@" >> {heard}\n{script}\n')
        program.chmod(0o755)
        return lambda: heard.read_text().splitlines()

    return install


def ebb(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, ["service", *arguments])
    assert result.exit_code == code, result.output
    return result


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return parser


def test_the_unit_has_what_the_daemon_counts_on():
    unit = parsed(unit_text(COMMAND, {"EBBFLOW_HOME": "/a b"}, 25))["Service"]
    assert (unit["Type"], unit["NotifyAccess"], unit["OOMPolicy"]) == ("notify", "main", "continue")
    assert (unit["MemorySwapMax"], unit["Restart"], unit["KillMode"]) == ("0", "on-failure", "mixed")
    assert unit["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert unit["Environment"] == '"EBBFLOW_HOME=/a b"'
    assert unit["TimeoutStopSec"] == "25"
    assert unit["ExecStart"] == " ".join(f'"{word}"' for word in COMMAND)
    assert COMMAND[0].startswith("/")


def test_words_reach_the_daemon_as_they_were_given():
    unit = parsed(unit_text(["/x", '--a=50% "$HOME" \\n'], {"V": "5% $x"}, 25))["Service"]
    assert unit["ExecStart"] == r'"/x" "--a=50%% \"$$HOME\" \\n"'
    assert unit["Environment"] == '"V=5%% $x"'


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_itself_finds_nothing_wrong(home: Path):
    file = home / NAME
    file.write_text(unit_text([*COMMAND, '--log-file=/a b%/"$c"'], {"EBBFLOW_HOME": "/a b%"}, 25))

    def verify() -> tuple[int, str]:
        command = ["systemd-analyze", "--user", "--man=no", "verify", str(file)]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(home)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        return done.returncode, done.stdout + done.stderr

    assert verify() == (0, "")
    file.write_text(file.read_text().replace("OOMPolicy", "OOMPoliky"))
    assert "OOMPoliky" in verify()[1]


def test_whose_file_it_is():
    text = unit_text(COMMAND, {}, 25)
    assert [state(None), state(text)] == ["absent", "ours"]
    assert [state(text.replace("=30", "=3")), state("[Unit]\n"), state("")] == ["edited", "foreign", "foreign"]


def test_install_writes_enables_and_starts(systemctl):
    heard = systemctl()
    result = ebb("install", "--cap", "4GB", "--drain-seconds=20")
    text = unit_path().read_text()
    assert f'"{COMMAND[-1]}" "--cap=4GB" "--drain-seconds=20"\n' in text
    assert "TimeoutStopSec=35\n" in text
    assert heard()[:2] == ["--user daemon-reload", f"--user enable {NAME}"]
    assert heard()[-1] == f"--user restart {NAME}"
    assert "The service runs" in result.stderr
    ebb("install")  # another version, other options: ours to replace
    assert "--cap" not in unit_path().read_text()


def test_a_log_file_means_the_same_to_the_service(systemctl, home, monkeypatch):
    systemctl()
    monkeypatch.chdir(home)
    ebb("install", "--log-file=ebb.log")
    assert f'"--log-file={home}/ebb.log"' in unit_path().read_text()
    ebb("install", "--log-file=~/ebb.log")
    assert f'"--log-file={Path.home()}/ebb.log"' in unit_path().read_text()


def test_what_was_changed_by_hand_is_left_alone_without_force(systemctl):
    systemctl()
    ebb("install")
    edited = unit_path().read_text().replace("WatchdogSec=30", "WatchdogSec=300")
    unit_path().write_text(edited)
    assert "changed by hand" in ebb("install", code=69).stderr
    assert "--force removes" in ebb("uninstall", code=69).stderr
    assert unit_path().read_text() == edited
    ebb("install", "--force")
    assert unit_path().read_text() != edited


@pytest.mark.parametrize("script", [NO_BUS, None])
def test_without_a_service_manager_it_says_what_to_type(systemctl, monkeypatch, home, script):
    if script:
        systemctl(script)
    else:
        monkeypatch.setenv("PATH", str(home / "bin"))
    assert f"systemctl --user enable --now {NAME}" in ebb("install").stderr
    assert unit_path().exists()
    assert json.loads(ebb("status", "--json").stdout)["reachable"] is False
    assert "still does" in ebb("uninstall").stderr
    assert not unit_path().exists()


def test_a_service_manager_that_refuses_is_a_typed_error(systemctl):
    systemctl("case $2 in restart) echo 'Job failed.' >&2; exit 1;; esac")
    assert "systemd says: Job failed." in ebb("install", code=69).stderr
    systemctl("case $2 in disable) echo 'not now' >&2; exit 1;; esac")
    assert "systemd says: not now" in ebb("uninstall", code=69).stderr
    assert unit_path().exists()


def test_where_nothing_can_be_written(home, systemctl):
    systemctl()
    (home / "config").write_text("in the way")
    assert str(home / "config") in ebb("install", code=74).stderr


def test_uninstall_stops_and_removes_and_may_be_repeated(systemctl):
    heard = systemctl()
    ebb("install")
    ebb("uninstall")
    assert not unit_path().exists()
    assert heard()[-2:] == [f"--user disable --now {NAME}", "--user daemon-reload"]
    assert "not installed" in ebb("uninstall").stderr


def test_status(systemctl):
    systemctl(
        'case $2 in show) printf "LoadState=loaded\\nUnitFileState=enabled\\nActiveState=active\\nSubState=running\\n'
        'MainPID=12\\nStatusText=leaving 1 GB\\n";; esac'
    )
    shown = json.loads(ebb("status", "--json").stdout)
    assert shown == {
        "unit": str(unit_path()),
        "file": "absent",
        "reachable": True,
        "enabled": "enabled",
        "active": "active (running)",
        "pid": 12,
        "says": "leaving 1 GB",
    }
    ebb("install")
    assert "active (running)" in ebb("status").stdout


def test_a_daemon_that_runs_outside_is_not_fought_with(systemctl, home):
    def script(request: Request) -> Iterator[Status]:
        yield Status(
            id=request.id, version="0", pid=os.getpid(), uptime_seconds=0, available_nbytes=0, available_source="",
            reserve_nbytes=0,
        )  # fmt: skip

    heard = systemctl("case $2 in show) echo MainPID=0;; esac")
    (home / "run").mkdir()
    with FakeDaemon(f"ipc://{home}/run/ebbflow.sock", script):
        assert "`ebb stop`, then" in ebb("install").stderr
        assert not any("restart" in line for line in heard())
        systemctl(f"case $2 in show) echo MainPID={os.getpid()};; esac")
        ebb("install")
        assert f"--user restart {NAME}" in heard()


def test_the_command_line_offers_what_the_daemon_understands():
    for command in (main.commands["serve"], main.commands["service"].commands["install"]):
        named = [option.name for option in command.params if option.name != "force"]
        assert named == list(HELP)
    assert CliRunner().invoke(main, ["service", "install", "--drain-seconds=x"]).exit_code == 2
