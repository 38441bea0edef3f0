"""Where options come from, which of them wins, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebbflow.daemon.settings import DEFAULTS, WorkerSettings, parse_settings, worker_settings
from ebbflow.daemon.supervisor.options import gather
from ebbflow.formats.errors import InvalidConfig, InvalidSize
from ebbflow.formats.settings import HELP, SIZES, Settings


@pytest.fixture
def file(tmp_path):
    return tmp_path / "config.toml"


def test_without_anything_the_defaults(file):
    assert gather([], {}, file) == Settings()
    assert worker_settings(Settings()) == DEFAULTS == parse_settings([])
    assert list(HELP) == list(Settings.__struct_fields__)
    assert {name for name, (metavar, _) in HELP.items() if metavar == "SIZE"} == set(SIZES)


def test_everything_can_be_set_everywhere(file):
    wanted = Settings(
        idle_seconds=5.0,
        reserve=10**9,
        battery_reserve=2 * 10**9,
        cap=2**31,
        log_level="debug",
        log_format="json",
        log_file="/l",
        drain_seconds=2.5,
        listen="tcp://127.0.0.1:5555",
        kv="i8",
        exact=True,
        threads=3,
        kv_limit=10**9,
        kv_cached=0,
    )
    flags = "--idle-seconds=5 --reserve=1GB --battery-reserve=2GB --cap=2GiB --log-level=debug --log-format=json"
    flags += " --log-file=/l --kv=i8 --threads=3 --exact --kv-limit=1GB --kv-cached=0"
    assert gather([*flags.split(), "--drain-seconds", "2.5", "--listen", "tcp://127.0.0.1:5555"], {}, file) == wanted
    variables = {
        "EBBFLOW_IDLE_SECONDS": "5",
        "EBBFLOW_RESERVE": "1GB",
        "EBBFLOW_BATTERY_RESERVE": "2GB",
        "EBBFLOW_CAP": "2GiB",
        "EBBFLOW_LOG_LEVEL": "debug",
        "EBBFLOW_LOG_FORMAT": "json",
        "EBBFLOW_LOG_FILE": "/l",
        "EBBFLOW_DRAIN_SECONDS": "2.5",
        "EBBFLOW_LISTEN": "tcp://127.0.0.1:5555",
        "EBBFLOW_KV": "i8",
        "EBBFLOW_EXACT": "1",
        "EBBFLOW_THREADS": "3",
        "EBBFLOW_KV_LIMIT": "1GB",
        "EBBFLOW_KV_CACHED": "0",
        "EBBFLOW_HOME": "/not/ours",
    }
    assert gather([], variables, file) == wanted
    file.write_text(
        'idle_seconds = 5\nreserve = 1000000000\nbattery_reserve = "2GB"\ncap = "2GiB"\nlog_level = "debug"\n'
        'log_format = "json"\nlog_file = "/l"\ndrain_seconds = 2.5\nlisten = "tcp://127.0.0.1:5555"\n'
        'kv = "i8"\nexact = true\nthreads = 3\nkv_limit = "1GB"\nkv_cached = 0\n'
    )
    assert gather([], {}, file) == wanted


def test_a_log_file_lies_beside_the_file_that_names_it(file):
    file.write_text('log_file = "ebb.log"')
    assert gather([], {}, file).log_file == str(file.parent / "ebb.log")
    file.write_text('log_file = "~/ebb.log"')
    assert gather([], {"HOME": "ignored"}, file).log_file == str(Path.home() / "ebb.log")
    assert gather([], {"EBBFLOW_LOG_FILE": "~/e.log"}, file).log_file == str(Path.home() / "e.log")
    assert gather(["--log-file=~/e.log"], {}, file).log_file == str(Path.home() / "e.log")
    assert gather(["--log-file=ebb.log"], {}, file).log_file == "ebb.log"


def test_a_workers_command_line_says_what_the_settings_say():
    told = worker_settings(Settings(kv="i8", exact=True, threads=3, kv_limit=1, kv_cached=2))
    assert told == WorkerSettings("i8", exact=True, threads=3, kv_limit=1, kv_cached=2)
    for wanted in (WorkerSettings(), WorkerSettings("i8", exact=True, threads=3, kv_limit=10**9, kv_cached=7)):
        assert parse_settings([*wanted.flags()]) == wanted


def test_the_command_line_wins_over_variables_and_those_over_the_file(file):
    file.write_text('idle_seconds = 1\nreserve = "1MB"\ncap = "1MB"')
    variables = {"EBBFLOW_IDLE_SECONDS": "2", "EBBFLOW_RESERVE": "2MB", "EBBFLOW_CAP": ""}
    options = gather(["--idle-seconds=3"], variables, file)
    assert (options.idle_seconds, options.reserve, options.cap) == (3, 2_000_000, 1_000_000)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("idel_seconds = 1", "'idel_seconds' cannot be set; what can is battery_reserve, cap, drain_seconds"),
        ('idle_seconds = "5"', "idle_seconds cannot be '5'"),
        ("idle_seconds = nan", "idle_seconds cannot be nan"),
        ("drain_seconds = -1", "drain_seconds cannot be -1"),
        ('log_level = "loud"', "log_level cannot be 'loud'"),
        ('kv = "f32"', "kv cannot be 'f32'"),
        ("kv_limit = true", "kv_limit cannot be True"),
        ("threads = 0", "threads cannot be 0"),
        ("threads = 2.5", "threads cannot be 2.5"),
        ("cap = [1]", r"cap cannot be \[1\]"),
        ("cap = ", "is not TOML"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_key(file, text, words):
    file.write_text(text)
    with pytest.raises(InvalidConfig, match=words) as raised:
        gather([], {}, file)
    assert str(file) in str(raised.value)


def test_a_mistake_elsewhere_is_named_as_it_was_given(file):
    with pytest.raises(InvalidConfig, match="--idle-seconds cannot be 'nan'"):
        gather(["--idle-seconds=nan"], {}, file)
    with pytest.raises(InvalidConfig, match="--log-level cannot be 'loud'"):
        gather(["--log-level", "loud"], {}, file)
    with pytest.raises(InvalidConfig, match="EBBFLOW_DRAIN_SECONDS cannot be 'x'"):
        gather([], {"EBBFLOW_DRAIN_SECONDS": "x"}, file)
    with pytest.raises(InvalidSize, match="--cap: 'much' is not a size"):
        gather(["--cap", "much"], {}, file)
    with pytest.raises(InvalidSize, match="EBBFLOW_RESERVE"):
        gather([], {"EBBFLOW_RESERVE": "-1"}, file)
    with pytest.raises(SystemExit) as left:
        gather(["--loud"], {}, file)
    assert left.value.code == 2
    file.mkdir()
    with pytest.raises(InvalidConfig, match="cannot be read"):
        gather([], {}, file)
