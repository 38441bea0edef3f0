"""Memory given back and taken again on the full shape, as the kernel counts it, and beside a greedy neighbour.

Four parts, each with a real daemon in a memory cgroup of its own (v1; needs root), whose usage is what counts:

* `resize`: 100 MB dropped while a stream decodes and while prompts of 512 tokens are read, until the group's usage
  shows it; growing against a plain read of the same file; what the processes hold, against what was asked.
* `hog`: a program in the same group takes 50 to 400 MB at 1 GB/s and gives it back, ROUNDS times, while four streams
  run. Then the same with a fixed size instead of the automatic one, which has to end in an out-of-memory kill; its
  streams, which were opened with `resume=True`, go on in the next worker.
* `many`: RESIZES random sizes under load; answers at some of them against those of a fresh daemon at the same size.
* `variants`: two sparse models with the same masks, embedding and head, loaded, resized and unloaded in turn: what the
  kernel counts against what they are, and against the books.

The second part's first minute is drawn into docs/, if matplotlib is there.

Run: .venv/bin/python bench/breathing.py [--json FILE] [--check]    EBBFLOW_BENCH_PARTS=resize,hog,many names parts;
EBBFLOW_BENCH_MODEL=full-sparse takes a pruned model, whose picture is not drawn.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ebbflow.client import Client
from ebbflow.client.errors import EbbflowError

from places import daemon, full_shape
from report import Report, percentile
from support.cgroups import Limited, limited_cgroup
from support.hog import Hog

PARTS = os.environ.get("EBBFLOW_BENCH_PARTS", "resize,hog,many,variants").split(",")
MODEL = os.environ.get("EBBFLOW_BENCH_MODEL", "full")
VARIANTS = ("full-sparse", "full-sparse-i4")
ROUNDS = int(os.environ.get("EBBFLOW_BENCH_ROUNDS", "50"))
SHRINKS, RESIZES = 2 * ROUNDS, 20 * ROUNDS
STEP = 100_000_000
SEEN = 0.95  # of what was dropped: counters of a group are kept per processor and settled in batches
LIMIT, RESERVE = 1_300_000_000, 200_000_000
STREAMS = 4
PICTURE = Path(__file__).parent.parent / "docs" / "breathing.svg"


def usage(group: Limited) -> int:
    """Bytes charged to the group."""
    return group.read("memory.usage_in_bytes")


def anonymous(group: Limited) -> int:
    """Of those, what is no file's."""
    lines = (line.split() for line in (group.path / "memory.stat").read_text().splitlines())
    return int(dict(lines)["rss"])


def until_dropped(group: Limited, wanted: int, seconds: float = 5.0) -> float:
    """Waits until the anonymous memory is at most that; when it was."""
    end = time.perf_counter() + seconds
    while anonymous(group) > wanted and time.perf_counter() < end:
        time.sleep(0.001)
    return time.perf_counter()


@dataclass
class Load:
    """Streams that are asked again as soon as they end, until `stop`."""

    client: Client
    model: str
    prompt: str
    tokens: int
    streams: int
    resume: bool = False
    failures: list[EbbflowError] = field(default_factory=list)
    refusals: list[EbbflowError] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    finished: int = 0
    produced: int = 0

    def __enter__(self) -> Load:
        self._stopping, self._rounds = threading.Event(), itertools.count()
        self._threads = [threading.Thread(target=self._run) for _ in range(self.streams)]
        for thread in self._threads:
            thread.start()
        while not any(m.running for m in self.client.status().models):
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            started = False
            try:
                alone = f"{id(self)} {next(self._rounds)}"  # nothing is reused: prompts are to be read
                with self.client.generate(
                    self.model, self.prompt, max_tokens=self.tokens, resume=self.resume, namespace=alone
                ) as stream:
                    for _ in stream:
                        started = True
                        self.produced += 1
                        if self._stopping.is_set():
                            return
                result = stream.result
                assert result is not None
                self.finished += 1
                if result.reason == "length" and result.tokens != self.tokens:
                    self.broken.append(f"{result.tokens} tokens of {self.tokens}")
            except EbbflowError as error:
                (self.refusals if error.retryable and not started else self.failures).append(error)
                time.sleep(0.1)


@contextlib.contextmanager
def serving(limit: int) -> Iterator[tuple[Client, Limited, str]]:
    """A daemon with the full shape, loaded to its top, in a group of its own."""
    model = full_shape(MODEL)
    with limited_cgroup(limit) as group, daemon(("--reserve", str(RESERVE)), group.prefix) as client:
        client.generate(model.name, "hello", max_tokens=1).text()
        yield client, group, model.name


def shrink(report: Report, what: str, client: Client, group: Limited, model: str, load: Load) -> None:
    """Drop 100 MB SHRINKS times while `load` runs."""
    full = client.show(model).summary.nbytes
    times = []
    with load:
        for _ in range(SHRINKS):
            client.resize(model, f"{full}B")
            before, began = anonymous(group), time.perf_counter()
            asking = threading.Thread(target=client.resize, args=(model, f"{full - STEP}B"))
            asking.start()
            times.append(until_dropped(group, before - int(SEEN * STEP)) - began)
            asking.join()
    report.times(f"drop 100 MB during {what}, as the group shows", times)
    report.bar(f"shrink_p99_seconds_{what}", percentile(times, 0.99), "<=", 0.25)
    report.bar(f"shrink_lost_{what}", len(load.failures) + len(load.refusals) + len(load.broken), "<=", 0)


def grow(report: Report, client: Client, model: str, path: Path) -> None:
    """From the base to the top, against reading the same bytes; both find the page cache without the file."""
    summary = client.show(model).summary
    amount = summary.nbytes - summary.base_nbytes
    buffer = mmap.mmap(-1, 8_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    file = os.open(path, os.O_RDONLY)
    for number in range(6):
        client.resize(model, f"{summary.base_nbytes}B")
        for who in sorted(rates, reverse=number % 2 == 1):  # the disk may be quicker for who comes first
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            began, at = time.perf_counter(), summary.base_nbytes
            if who == "ours":
                client.resize(model, f"{summary.nbytes}B")
            while who == "plain" and at < summary.nbytes:
                at += os.preadv(file, [buffer], at)
            rates[who].append(amount / (time.perf_counter() - began) / 1e6)
    os.close(file)
    mine, read = statistics.median(rates["ours"]), statistics.median(rates["plain"])
    report.note("growing, nobody asks", f"{mine:.0f} MB/s; a plain read {read:.0f} MB/s", rates)
    report.bar("grow_by_plain_read", mine / read, ">=", 0.5)


def private(client: Client, role: str) -> int:
    """Private bytes of one of the daemon's processes (smaps_rollup)."""
    return next(p.private_nbytes for p in client.status().processes if p.role == role)


def sizes(report: Report, client: Client, model: str) -> None:
    """Private memory of the processes, and at five sizes against what was asked."""
    summary = client.show(model).summary
    client.resize(model, f"{summary.base_nbytes}B")
    overhead = private(client, "worker") - summary.base_nbytes
    report.bar("supervisor_MB", private(client, "supervisor") / 1e6, "<=", 30)
    report.bar("worker_beyond_weights_MB", overhead / 1e6, "<=", 110)
    worst = 0.0
    for share in (0.5, 0.62, 0.75, 0.88, 1.0):
        residency = client.resize(model, f"{round(summary.nbytes * share)}B").residency
        assert residency is not None
        kernel = private(client, "worker") - overhead
        text = f"resident {residency.nbytes / 1e6:.1f} MB, kernel {kernel / 1e6:.1f} MB"
        report.note(f"asked {summary.nbytes * share / 1e6:.0f} MB", text, [residency.nbytes, kernel])
        worst = max(worst, abs(kernel - residency.nbytes) / residency.nbytes)
    report.bar("kernel_against_resident", worst, "<=", 0.05)


def resize(report: Report) -> None:
    """The first part."""
    with serving(4_000_000_000) as (client, group, model):
        sizes(report, client, model)
        grow(report, client, model, full_shape(MODEL) / "stack.safetensors")
        shrink(report, "decode", client, group, model, Load(client, model, "hello", 400, 1))
        shrink(report, "prefill", client, group, model, Load(client, model, "x = 1\n" * 170, 1, 2))


@dataclass
class Watch:
    """What happens, ten times a second."""

    client: Client
    group: Limited
    load: Load
    samples: list[tuple[float, int, int, int, int]] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.perf_counter()
        while not self._stopping.wait(0.1):
            status = self.client.status()
            held = sum(m.nbytes for m in status.models)
            now = time.perf_counter() - began
            self.samples.append((now, status.available_nbytes, held, self.load.produced, anonymous(self.group)))


def hog_rounds(group: Limited, rounds: int) -> None:
    """Takes 50 to 400 MB at 1 GB/s, waits, gives it back, waits."""
    dice = random.Random(0)
    with contextlib.suppress(EOFError, BrokenPipeError), Hog(group.prefix) as hog:
        for _ in range(rounds):
            for _ in range(dice.randrange(1, 9)):
                began = time.perf_counter()
                hog.ask("grow 50")
                time.sleep(max(0.0, 0.05 - (time.perf_counter() - began)))
            time.sleep(dice.uniform(0.2, 1.0))
            hog.ask("free")
            time.sleep(dice.uniform(0.2, 3.0))


def hog(report: Report) -> None:
    """The second part."""
    with serving(LIMIT) as (client, group, model):
        load = Load(client, model, "hello", 64, STREAMS)
        with load, Watch(client, group, load) as watch:
            hog_rounds(group, ROUNDS)
        held = [sample[2] for sample in watch.samples]
        report.note("hog: group's limit and reserve", f"{LIMIT / 1e6:.0f} and {RESERVE / 1e6:.0f} MB")
        report.note(
            "hog: resident, least, median, most",
            " ".join(f"{part / 1e6:.0f}" for part in (min(held), statistics.median(held), max(held))) + " MB",
            watch.samples,
        )
        report.note(
            "hog: answers, refusals", f"{load.finished} whole, {len(load.refusals)} refused with a retryable error"
        )
        report.bar("hog_oom_kills", group.oom_kills, "<=", 0)
        report.bar("hog_lost_streams", len(load.failures) + len(load.broken), "<=", 0)
        if MODEL == "full":
            draw(watch, load)
    with serving(LIMIT) as (client, group, model):
        client.resize(model, "100%")
        load = Load(client, model, "hello", 64, STREAMS, resume=True)
        with load:
            for _ in range(10):
                if group.oom_kills:
                    break
                hog_rounds(group, 5)
            finished = load.finished
            while load.finished < finished + STREAMS and not load.failures:
                time.sleep(0.1)
        report.bar("hog_oom_kills_without_automatic_mode", group.oom_kills, ">=", 1)
        report.bar("hog_answers_lost_with_their_worker", len(load.failures) + len(load.broken), "<=", 0)


def draw(watch: Watch, load: Load) -> None:
    """The first minute as a picture, where matplotlib is there."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("  no matplotlib: no picture")
        return
    samples = [sample for sample in watch.samples if sample[0] < 60]
    seconds = [sample[0] for sample in samples]
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 5), height_ratios=[3, 1])
    others = [(LIMIT - sample[1] - sample[2]) / 1e6 for sample in samples]
    held = [sample[2] / 1e6 for sample in samples]
    top.stackplot(seconds, others, held, labels=["others", "the model's stack"], colors=["#c9c9c9", "#4a7fb5"])
    top.axhline(LIMIT / 1e6, color="black", linewidth=0.8)
    top.set_ylabel("MB")
    top.legend(loc="lower left")
    rates = [0.0] + [(after[3] - before[3]) / (after[0] - before[0]) for before, after in itertools.pairwise(samples)]
    bottom.plot(seconds, [statistics.fmean(rates[max(0, i - 4) : i + 5]) for i in range(len(rates))], color="#4a7fb5")
    bottom.set_ylabel("tokens/s")
    bottom.set_xlabel("seconds")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(PICTURE)
    pyplot.close(figure)


def many(report: Report) -> None:
    """The third part."""
    dice, model = random.Random(1), full_shape(MODEL).name
    asked: dict[int, str] = {}

    def answer(client: Client) -> str:
        return client.generate(model, "def f(x):", max_tokens=8, exact_prefix=True).text()

    with serving(4_000_000_000) as (client, group, _):
        summary = client.show(model).summary
        client.resize(model, "100%")
        private = before = 0
        with Load(client, model, "hello", 100, 1) as load:
            for number in range(RESIZES):
                size = dice.randrange(summary.base_nbytes, summary.nbytes)
                size = (
                    size
                    if number % 20 == 0
                    else min(summary.nbytes, max(summary.base_nbytes, before + dice.randrange(-STEP, STEP) // 4))
                )
                residency = client.resize(model, f"{size}B").residency
                assert residency is not None
                before = residency.nbytes
                if number == 20:
                    client.resize(model, "100%")
                    private = anonymous(group)
                if number % 200 == 0:
                    asked[before] = answer(client)
        client.resize(model, "100%")
        after = anonymous(group)
    with serving(4_000_000_000) as (client, group, _):
        wrong = 0
        for size, text in asked.items():
            client.resize(model, f"{size}B")
            wrong += answer(client) != text
    report.bar("resizes_wrong_answers", wrong, "<=", 0)
    report.bar("resizes_failed_requests", len(load.failures) + len(load.refusals) + len(load.broken), "<=", 0)
    report.bar("resizes_memory_growth", after / private - 1, "<=", 0.01)


def variants(report: Report) -> None:
    """The fourth part."""
    for name in VARIANTS:
        full_shape(name)
    first, second = VARIANTS
    with limited_cgroup(4_000_000_000) as group, daemon(("--reserve", str(RESERVE)), group.prefix) as client:
        sizes = {name: (client.show(name).summary.base_nbytes, client.show(name).summary.nbytes) for name in VARIANTS}

        def resize(name: str, nbytes: int) -> float:
            client.generate(name, "hello", max_tokens=1).text()
            began = time.perf_counter()
            client.resize(name, f"{nbytes}B")
            return time.perf_counter() - began

        resize(first, sizes[first][0])
        overhead, worst = private(client, "worker") - sizes[first][0], 0.0

        def look(what: str) -> int:
            nonlocal worst
            models = client.status().models
            kernel, booked = private(client, "worker") - overhead, sum(m.nbytes - m.shared_nbytes for m in models)
            whole = sum(m.nbytes for m in models)
            text = f"stacks {whole / 1e6:.0f} MB, kernel {kernel / 1e6:.0f} MB ({kernel / whole:.2f}), books "
            report.note(f"variants: {what}", text + f"{booked / 1e6:.0f} MB", [whole, kernel, booked])
            worst = max(worst, abs(kernel - booked) / booked)
            return kernel

        resize(first, sizes[first][1])
        resize(second, sizes[second][1])
        both = look("both whole")
        seconds = resize(first, sizes[first][0])
        report.note("variants: the one that was first to its base", f"{seconds * 1e3:.0f} ms")
        look("first at its base")
        resize(second, sizes[second][0])
        look("both at their bases")
        resize(second, sizes[second][1])
        resize(first, sizes[first][1])
        again = look("both whole, the second first")
        report.bar("variants_kernel_against_books", worst, "<=", 0.05)
        report.bar("variants_kernel_by_sum_of_stacks", both / sum(full for _, full in sizes.values()), "<=", 0.8)
        report.bar("variants_memory_growth", again / both - 1, "<=", 0.01)


def main() -> int:
    """Measure and report."""
    report = Report("Breathing on the full shape (random weights)")
    for part in PARTS:
        {"resize": resize, "hog": hog, "many": many, "variants": variants}[part](report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
