"""How many threads: on trees that say what machines of all kinds say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ebbflow.daemon.worker.processors import usable_threads


class Machine:
    """Its /proc and /sys, below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def processors(self, count: int, name: str, value: object) -> None:
        """A fact about some processors; `value` may be a function of their number."""
        for number in range(count):
            said = value(number) if callable(value) else value
            self.write(f"sys/devices/system/cpu/cpu{number}/{name}", said)

    def threads(self, count: int) -> int:
        return usable_threads(self.root, range(count))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_where_nothing_is_known_every_processor_counts(machine: Machine) -> None:
    assert machine.threads(6) == 6


def test_the_threads_of_a_core_count_once(machine: Machine) -> None:
    machine.processors(8, "topology/thread_siblings_list", lambda number: f"{number % 4},{number % 4 + 4}")
    assert machine.threads(8) == 4
    assert usable_threads(machine.root, [1, 5, 6]) == 2


def test_small_cores_do_not_count(machine: Machine) -> None:
    """A laptop with two fast cores of two threads, and eight slow ones of one."""
    siblings = [f"{number // 2 * 2}-{number // 2 * 2 + 1}" if number < 4 else str(number) for number in range(12)]
    machine.processors(12, "topology/thread_siblings_list", lambda number: siblings[number])
    machine.processors(12, "cpufreq/cpuinfo_max_freq", lambda number: 5_200_000 if number < 4 else 3_900_000)
    assert machine.threads(12) == 2
    assert usable_threads(machine.root, range(4, 12)) == 8


def test_nor_do_those_of_little_capacity(machine: Machine) -> None:
    machine.processors(8, "cpu_capacity", lambda number: (1024, 900, 900, 900, 300, 300, 300, 300)[number])
    assert machine.threads(8) == 4


def test_cores_that_differ_by_some_percent_are_equal(machine: Machine) -> None:
    machine.processors(4, "cpufreq/cpuinfo_max_freq", lambda number: 5_800_000 - 100_000 * number)
    assert machine.threads(4) == 4


@pytest.mark.parametrize(("quota", "threads"), [(400_000, 4), (250_000, 2), (100_000, 1), (20_000, 1), (-1, 8)])
def test_a_quota_of_version_1(machine: Machine, quota: int, threads: int) -> None:
    machine.write("proc/self/cgroup", "4:memory:/elsewhere\n3:cpu,cpuacct:/jobs/one")
    machine.write("sys/fs/cgroup/cpu/jobs/cpu.cfs_quota_us", quota)
    machine.write("sys/fs/cgroup/cpu/jobs/cpu.cfs_period_us", 100_000)
    assert machine.threads(8) == threads


@pytest.mark.parametrize("quota", ["300000 100000", "30000 10000"])
def test_a_quota_of_version_2_above_a_group_without_one(machine: Machine, quota: str) -> None:
    machine.write("proc/self/cgroup", "0::/user.slice/app.scope")
    machine.write("sys/fs/cgroup/user.slice/cpu.max", quota)
    machine.write("sys/fs/cgroup/user.slice/app.scope/cpu.max", "max 100000")
    assert machine.threads(8) == 3
    assert machine.threads(2) == 2


def test_the_tightest_quota_counts(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/a/b")
    machine.write("sys/fs/cgroup/a/cpu.max", "200000 100000")
    machine.write("sys/fs/cgroup/a/b/cpu.max", "500000 100000")
    assert machine.threads(8) == 2


@pytest.mark.parametrize("text", ["", "nonsense", "0 0", "max", "1 2 3"])
def test_a_quota_that_says_nothing_limits_nothing(machine: Machine, text: str) -> None:
    machine.write("proc/self/cgroup", "0::/")
    machine.write("sys/fs/cgroup/cpu.max", text)
    assert machine.threads(3) == 3


def test_of_this_machine_it_is_what_we_may_run_on_at_most() -> None:
    assert 1 <= usable_threads() <= (os.cpu_count() or 1)
