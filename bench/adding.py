"""Adding a model of the 1.1B shape: peak memory of the job, and how long the whole would take.

Three pieces, because all of it takes an hour: the real job on the whole random checkpoint, cancelled after LAYERS
layers (sampling, gradients, layers); the real job on one layer of the same widths, to its end (embedding, head, writing
the stack); and `measure_curve` of the whole checkpoint against a stack that has that one layer's blocks in every layer.
The bar is on memory that the system cannot take back: anonymous pages (RssAnon), polled; pages of the checkpoint's own
files can be dropped at any time and are given beside it (VmHWM has both). The jobs run under a cap of as much. The
times are those of the machine as it is: processor seconds, halved, are what two cores without neighbours would need if
nothing waited.

Run: nice -n 19 .venv/bin/python bench/adding.py [--json FILE] [--check]      (half an hour and more, 6 GB of disk)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ebbflow.daemon.channel import Hub, wait
from ebbflow.daemon.library.order import order_entries
from ebbflow.daemon.library.shapes import SHAPES
from ebbflow.daemon.library.synthetic import write_checkpoint
from ebbflow.daemon.process import MEMORY_VARIABLE
from ebbflow.formats.child_messages import from_child_decoder
from ebbflow.formats.errors import Cancelled
from ebbflow.formats.index import BlockEntry
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import AddModel, Failed, Progress
from ebbflow.formats.stack import Stack, read_stack, write_stack

from places import full_source
from report import Report

FULL = SHAPES["tinyllama-1.1b"]
LAYERS = 1
ALLOWANCE = 1_000_000_000
TICKS = os.sysconf("SC_CLK_TCK")

MEASURE = """
import sys
from pathlib import Path
import torch
from ebbflow.daemon.library.add import CURVE_POINTS
from ebbflow.daemon.library.measure import curve_blocks, measure_curve
from ebbflow.daemon.library.texts import HOLD_BACK_EVERY, LENGTH, STREAMS
from ebbflow.formats.checkpoint import open_checkpoint
from ebbflow.formats.stack import read_stack
checkpoint, stack = open_checkpoint(Path(sys.argv[1])), read_stack(Path(sys.argv[2]))
tokens = torch.randint(2, checkpoint.architecture.vocab, (STREAMS // HOLD_BACK_EVERY, LENGTH))
measure_curve(checkpoint, stack, tokens, curve_blocks(stack, CURVE_POINTS))
"""


@dataclass
class Watch:
    """A process's peaks in bytes while it lives, and its processor seconds so far."""

    pid: int
    anonymous: int = 0
    resident: int = 0
    processor: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Poll until told to stop or the process is gone."""
        while not self._ended.wait(0.02) and self.poll():
            pass

    def poll(self) -> bool:
        """Look once; false when there is nothing to see."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
            times = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            values = dict(line.split(":", 1) for line in status.splitlines())
            self.anonymous = max(self.anonymous, int(values["RssAnon"].split()[0]) * 1024)
            self.resident = max(self.resident, int(values["VmHWM"].split()[0]) * 1024)
            self.processor = (int(times[11]) + int(times[12])) / TICKS
        except (OSError, KeyError):  # it is gone, or about to be
            return False
        return True

    def stop(self) -> None:
        """End `run`."""
        self._ended.set()


@contextmanager
def watched(pid: int) -> Iterator[Watch]:
    """Polled in a thread while the block runs."""
    watch = Watch(pid)
    thread = threading.Thread(target=watch.run)
    thread.start()
    try:
        yield watch
    finally:
        watch.stop()
        thread.join()


@dataclass
class Spent:
    """Seconds by the clock and of processors in each step of a job, by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    _last: tuple[float, float] = (0.0, 0.0)

    def begin(self, watch: Watch) -> None:
        """Count from now."""
        watch.poll()
        self._last = time.monotonic(), watch.processor

    def add(self, step: str, watch: Watch) -> None:
        """What was spent since the last call was spent on `step`."""
        before, processor = self._last
        self.begin(watch)
        self.seconds[step] = self.seconds.get(step, 0.0) + self._last[0] - before
        self.processor[step] = self.processor.get(step, 0.0) + self._last[1] - processor

    def per_layer(self, layers: int) -> tuple[float, float]:
        """Seconds and processor seconds of one layer, in the mean."""
        seconds, processor = (sum(kind.get(f"layer {i}", 0.0) for i in range(layers)) / layers for kind in self.kinds)
        return seconds, processor

    @property
    def kinds(self) -> tuple[dict[str, float], dict[str, float]]:
        """By the clock, and of processors."""
        return self.seconds, self.processor


def step_of(progress: Progress, last: str) -> str:
    """Which step of the job a message belongs to."""
    if progress.stage == "encoding" and progress.tensor:
        return f"layer {progress.tensor.split('.')[1]}" if "." in progress.tensor else "vocabulary"
    if progress.stage in ("encoding", "measuring activations"):
        return last if last.startswith(("layer", "vocabulary")) else "gradients"
    return progress.stage


def add_in(home: Path, source: Path, layers: int | None, cap: int) -> tuple[Watch, Spent]:
    """Add `source` by the real job, which may take `cap` bytes: all of it, or until some layers are encoded.

    The library and the cache are below `home`.
    """
    home.mkdir()
    hub = Hub(f"ipc://{home}/s", from_child_decoder, explain=False)
    request = msgspec.json.encode(AddModel(id=1, source=str(source), name="bench")).decode()
    places = [f"ipc://{home}/s", "job", str(home / "library"), str(home / "cache"), request]
    command = [sys.executable, "-P", "-m", "ebbflow.daemon.library.job", *places]
    process = subprocess.Popen(command, env=os.environ | {MEMORY_VARIABLE: str(cap)})
    spent, step = Spent(), "starting"
    with watched(process.pid) as watch:
        spent.begin(watch)
        while process.poll() is None:
            wait([hub], [], 0.2)
            for _, message in hub.receive():
                if isinstance(message, Failed) and message.code != Cancelled.code:
                    raise RuntimeError(f"the job failed: {message.message}")
                if isinstance(message, Progress) and (found := step_of(message, step)) != step:
                    print(f"    {time.strftime('%H:%M:%S')} {found}", flush=True)
                    spent.add(step, watch)
                    step = found
            if layers is not None and step == f"layer {layers}":
                process.terminate()
    spent.add(step, watch)
    hub.close()
    return watch, spent


def repeated_stack(one: Stack, folder: Path) -> Stack:
    """A stack of the whole shape, with the one layer's blocks in each layer."""
    entries: list[BlockEntry] = []
    positions: list[int] = []
    for position, entry in enumerate(one.blocks):
        inside = entry.tensor.startswith("layers.0.")
        for layer in range(FULL.layers if inside else 1):
            name = entry.tensor.replace("layers.0.", f"layers.{layer}.")
            uses = (name,) if inside else entry.uses
            entries.append(msgspec.structs.replace(entry, tensor=name, uses=uses))
            positions.append(position)
    index, order = order_entries(FULL, entries, "gain")

    def payload(i: int) -> bytes:
        position = positions[order[i]]
        with one.path.open("rb") as file:
            file.seek(one.data_start + one.edges[position])
            return file.read(one.blocks[position].nbytes)

    write_stack(folder / STACK, index, payload)
    return read_stack(folder / STACK)


def measure(source: Path, stack: Stack) -> tuple[Watch, Spent]:
    """`measure_curve` in a process of its own."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen([sys.executable, "-c", MEASURE, str(source), str(stack.path)], env=environment)
    with watched(process.pid) as watch:
        spent = Spent()
        spent.begin(watch)
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # so that it can still be read
        spent.add("quality", watch)
        assert ended and ended.si_status == 0
    process.wait()
    return watch, spent


def main() -> int:
    """Add two parts of the model, measure the whole, add up."""
    report = Report("Adding a model of the 1.1B shape")
    source = full_source()
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    report.note("the checkpoint", f"{nbytes / 1e9:.2f} GB of bf16", nbytes)
    root = Path(tempfile.mkdtemp(prefix="ebbadd"))
    try:
        watch, job = add_in(root / "whole", source, LAYERS, nbytes + ALLOWANCE)
        peaks = {"job on the whole": watch}
        shutil.rmtree(root / "whole")
        write_checkpoint(msgspec.structs.replace(FULL, layers=1), root / "one")
        peaks["job on one layer"], one = add_in(root / "small", root / "one", None, nbytes + ALLOWANCE)
        stack = repeated_stack(read_stack(root / "small" / "library" / "bench" / STACK), root)
        report.note("the whole stack", f"{stack.nbytes / 1e6:.0f} MB", stack.nbytes)
        peaks["measuring the whole"], quality = measure(source, stack)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for name, watch in peaks.items():
        text = f"{watch.anonymous / 1e9:.2f} GB anonymous, {watch.resident / 1e9:.2f} GB with files' pages"
        report.note(f"peak: {name}", text, [watch.anonymous, watch.resident])
    report.bar(
        "peak_anonymous_bytes_beyond_bf16_GB",
        (max(watch.anonymous for watch in peaks.values()) - nbytes) / 1e9,
        "<=",
        ALLOWANCE / 1e9,
    )
    totals = []
    for kind, label in enumerate(("by the clock", "of processors, halved")):
        share = (1.0, 0.5)[kind]
        steps = {
            name: share * job.kinds[kind].get(name, 0.0) for name in ("starting", "reading", "sampling", "gradients")
        }
        steps["layers"] = share * FULL.layers * job.per_layer(LAYERS)[kind]
        steps["vocabulary"] = share * one.kinds[kind].get("vocabulary", 0.0)
        steps["writing"] = share * FULL.layers * one.kinds[kind].get("writing", 0.0)
        steps["quality"] = share * quality.kinds[kind]["quality"]
        totals.append(sum(steps.values()))
        for name, seconds in steps.items():
            report.note(f"{name}, {label}", f"{seconds:.0f} s, {seconds / totals[-1]:.0%}", seconds)
        report.note(f"the whole, {label}", f"{totals[-1] / 60:.0f} min", totals[-1])
    report.bar("projected_minutes", totals[0] / 60, "<=", 60)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
