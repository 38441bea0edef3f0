"""The sensor over trees that look like /proc and /sys/fs/cgroup."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from ebbflow.daemon.supervisor.reading import Reading
from ebbflow.daemon.supervisor.sensor import BATTERY_SECONDS, Sensor

GIB = 2**30
MIB = 2**20


class Tree:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {8 * 2**20} kB\n")

    def write(self, path: str, text: object) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(f"{text}\n")

    def group1(self, path: str, limit: int, usage: int, inactive: int = 0, active: int = 0) -> None:
        base = f"sys/fs/cgroup/memory/{path}/"
        self.write(base + "memory.limit_in_bytes", limit)
        self.write(base + "memory.usage_in_bytes", usage)
        own = "inactive_file 999999999999\nactive_file 999999999999\n"  # without children: not what we need
        self.write(base + "memory.stat", f"{own}total_inactive_file {inactive}\ntotal_active_file {active}")

    def group2(self, path: str, limit: object, usage: int, inactive: int = 0, active: int = 0, high="max") -> None:
        base = f"sys/fs/cgroup/{path}/"
        self.write(base + "memory.max", limit)
        self.write(base + "memory.high", high)
        self.write(base + "memory.current", usage)
        self.write(base + "memory.stat", f"anon 5\ninactive_file {inactive}\nactive_file {active}")

    def inside(self, *lines: str) -> None:
        self.write("proc/self/cgroup", "\n".join(lines))

    def read(self, **options) -> Reading:
        return Sensor(self.root, clocks=lambda: (7.0, 7.0), **options).read([41, 42], worker=42)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_without_limits_the_system_decides(tree):
    assert tree.read() == Reading(8 * GIB, "system memory")
    assert Sensor(tree.root).total() == 16 * GIB


def test_version_1_counts_page_cache_as_room(tree):
    tree.inside("9:name=systemd:/", "4:memory:/box", "0::/")
    tree.group1("box", 2 * GIB, 1536 * MIB, inactive=200 * MIB, active=56 * MIB)
    assert tree.read() == Reading(768 * MIB, "cgroup limit")
    assert Sensor(tree.root).total() == 2 * GIB


def test_every_ancestor_counts(tree):
    tree.inside("4:cpu,memory:/outer/middle/inner")
    tree.group1("outer/middle/inner", 4 * GIB, 1 * GIB)
    tree.group1("outer/middle", 9223372036854771712, 1 * GIB)
    tree.group1("outer", 5 * GIB, 4 * GIB)
    tree.group1("", 9223372036854771712, 15 * GIB)
    assert tree.read() == Reading(1 * GIB, "cgroup limit")
    assert Sensor(tree.root).total() == 4 * GIB


def test_version_2(tree):
    tree.inside("0::/user.slice/app.scope")
    tree.group2("user.slice/app.scope", "max", GIB)
    tree.group2("user.slice", 3 * GIB, 2 * GIB, inactive=128 * MIB, active=128 * MIB)
    assert tree.read() == Reading(1280 * MIB, "cgroup limit")
    tree.group2("user.slice/app.scope", "max", GIB, high=2 * GIB)
    assert tree.read() == Reading(1 * GIB, "cgroup limit")


def test_both_versions_at_once(tree):
    tree.inside("4:memory:/box", "0::/box")
    tree.group1("box", 6 * GIB, GIB)
    tree.group2("unified/box", 3 * GIB, GIB)
    assert tree.read() == Reading(2 * GIB, "cgroup limit")


def test_in_a_container_the_hosts_path_is_not_there_but_the_root_is(tree):
    tree.inside("4:memory:/docker/0123456789abcdef")
    tree.group1("", 2 * GIB, GIB)
    assert tree.read() == Reading(GIB, "cgroup limit")
    tree.inside("0::/../..")
    assert tree.read() == Reading(8 * GIB, "system memory")


def test_no_room_is_not_less_than_none(tree):
    tree.inside("4:memory:/box")
    tree.group1("box", GIB, 2 * GIB)
    assert tree.read() == Reading(0, "cgroup limit")


def test_the_cap_is_for_all_our_processes_together(tree):
    tree.write("proc/41/status", f"Name:\tpython\nVmRSS:\t 999999 kB\nRssAnon:\t {512 * 1024} kB\nRssFile:\t 9 kB")
    tree.write("proc/42/status", f"RssAnon:\t {256 * 1024} kB")
    assert tree.read(cap=GIB) == Reading(256 * MIB, "cap")
    assert tree.read(cap=100) == Reading(0, "cap")
    assert tree.read(cap=100 * GIB) == Reading(8 * GIB, "system memory")


@pytest.mark.parametrize("text", ["", "nonsense", "4:memory", ":::", "4:memory:relative/../..", "\x00\xff"])
def test_odd_files_limit_nothing(tree, text):
    tree.write("proc/self/cgroup", text)
    tree.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "-1")
    tree.write("sys/fs/cgroup/memory/memory.usage_in_bytes", "what?")
    assert tree.read() == Reading(8 * GIB, "system memory")


def test_where_there_is_no_proc_the_library_is_asked(tmp_path):
    reading = Sensor(tmp_path).read()
    assert reading.source == "system memory"
    assert reading.available > 0
    assert reading.fixed_only
    assert Sensor(tmp_path).total() >= reading.available
    memory = Sensor(tmp_path).process("worker", os.getpid())
    assert memory.private_nbytes > 1_000_000
    assert Sensor(tmp_path).oom_kills() == 0


def test_the_workers_own_limits_bound_what_it_may_hold(tree):
    limits = "Limit  Soft Limit  Hard Limit  Units\nMax cpu time  unlimited  unlimited  seconds\n"
    tree.write(
        "proc/42/limits", limits + f"Max data size  {3 * GIB}  unlimited  bytes\nMax address space unlimited 9 bytes"
    )
    tree.write("proc/42/status", f"RssAnon:\t {2**20} kB")
    tree.write("proc/41/limits", limits + "Max data size  5  5  bytes")  # a job's: set by us, and its own affair
    assert tree.read() == Reading(2 * GIB, "process limit")
    tree.write("proc/42/limits", f"Max address space  {GIB // 2}  unlimited  bytes")
    assert tree.read() == Reading(0, "process limit")


def test_what_is_swapped_out_of_ours_is_counted(tree):
    tree.write("proc/41/status", "RssAnon:\t 1 kB\nVmSwap:\t 5 kB")
    tree.write("proc/42/status", "RssAnon:\t 1 kB\nVmSwap:\t 7 kB")
    assert tree.read().swapped == 12 * 1024


def test_programs_that_wait_for_memory_are_noticed(tree):
    stalls = "some avg10={} avg60=0.00 avg300=0.00 total=5\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=5"
    tree.write("proc/pressure/memory", stalls.format("9.99"))
    assert not tree.read().pressure
    tree.write("proc/pressure/memory", stalls.format("10.00"))
    assert tree.read().pressure
    tree.write("proc/pressure/memory", stalls.format("0.00"))
    tree.inside("0::/user.slice/app.scope")
    tree.write("sys/fs/cgroup/user.slice/memory.pressure", stalls.format("55.10"))
    assert tree.read() == Reading(8 * GIB, "system memory", pressure=True)


@pytest.mark.parametrize(
    ("supply", "found"),
    [
        ({"type": "Battery", "status": "Discharging"}, True),
        ({"type": "Battery", "status": "Charging"}, False),
        ({"type": "Battery", "status": "Discharging", "scope": "Device"}, False),
        ({"type": "Mains", "online": "1"}, False),
        ({}, False),
    ],
)
def test_a_battery_that_feeds_the_machine(tree, supply, found):
    tree.write("sys/class/power_supply/AC/type", "Mains")
    for name, text in supply.items():
        tree.write(f"sys/class/power_supply/BAT0/{name}", text)
    assert tree.read().battery is found


def test_a_battery_is_not_asked_at_every_look(tree):
    now = [5.0]
    sensor = Sensor(tree.root, clocks=lambda: (now[0], now[0]))
    assert not sensor.read().battery
    tree.write("sys/class/power_supply/BAT0/type", "Battery")
    tree.write("sys/class/power_supply/BAT0/status", "Discharging")
    now[0] += BATTERY_SECONDS - 1
    assert not sensor.read().battery
    now[0] += 1
    assert sensor.read().battery


def test_the_time_asleep(tree):
    assert Sensor(tree.root, clocks=lambda: (100.0, 60.0)).read().slept == 40.0
    assert Sensor().read().slept >= 0.0 - 1e-3


def test_processes_are_counted_as_the_kernel_does(tree):
    rollup = (
        "55d0-7ffc ---p 00000000 00:00 0 [rollup]\nRss: 900 kB\nPrivate_Clean: 3 kB\nPrivate_Dirty: 40 kB\nSwap: 7 kB"
    )
    tree.write("proc/41/smaps_rollup", rollup)
    memory = Sensor(tree.root).process("worker", 41)
    assert (memory.role, memory.pid, memory.private_nbytes, memory.swapped_nbytes) == (
        "worker",
        41,
        43 * 1024,
        7 * 1024,
    )
    assert Sensor(tree.root).process("worker", 4711) is None


def test_the_oom_counter(tree):
    tree.write("proc/vmstat", "nr_free_pages 1\noom_kill 12\nunevictable_pgs_culled 3")
    assert Sensor(tree.root).oom_kills() == 12


def test_this_machine_can_be_read():
    sensor = Sensor()
    assert 0 < sensor.read([os.getpid()]).available <= sensor.total()
    assert sensor.process("test", os.getpid()).private_nbytes > 1_000_000


def test_without_a_descriptor_left_the_last_figures_hold():
    sensor = Sensor()
    read, total = sensor.read([os.getpid()]), sensor.total()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        assert sensor.read([os.getpid()]) == read
        assert sensor.total() >= total  # a cgroup's limit cannot be seen either
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
