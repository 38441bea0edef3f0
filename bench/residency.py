"""Memory of the processes, and bytes resident against bytes asked, as the kernel counts them; time to drop and regrow.

Run: .venv/bin/python bench/residency.py [--json FILE] [--check]
"""

from __future__ import annotations

import sys
import threading
import time

from ebbflow.client import Client, Resized
from ebbflow.client.errors import EbbflowError

from places import daemon, full_shape
from report import Report, percentile

ROUNDS = 50
STEP = 100_000_000


def private(client: Client, role: str) -> int:
    """Private bytes of one of the daemon's processes (smaps_rollup)."""
    return next((p.private_nbytes for p in client.status().processes if p.role == role), 0)


def nbytes(resized: Resized) -> int:
    """Bytes that a resize ended at."""
    assert resized.residency is not None
    return resized.residency.nbytes


def sizes(report: Report, client: Client, model: str, full: int, base: int) -> None:
    """Private memory at five sizes, against what was asked, over the worker's own at the base."""
    client.resize(model, f"{base}B")
    overhead = private(client, "worker") - base
    report.note("worker beyond the stack, at its base", f"{overhead / 1e6:.0f} MB", overhead)
    worst = 0.0
    for share in (0.5, 0.62, 0.75, 0.88, 1.0):
        asked = round(full * share)
        held = nbytes(client.resize(model, f"{asked}B"))
        kernel = private(client, "worker") - overhead
        report.note(
            f"asked {asked / 1e6:.0f} MB",
            f"resident {held / 1e6:.1f} MB, kernel {kernel / 1e6:.1f} MB",
            [asked, held, kernel],
        )
        worst = max(worst, abs(kernel - held) / held)
    report.bar("kernel_against_resident", worst, "<=", 0.05)


def breathe(report: Report, client: Client, model: str, full: int) -> None:
    """Drop and regrow 100 MB while a request runs."""
    drops: list[float] = []
    grows: list[float] = []
    failed: list[EbbflowError] = []
    ended = threading.Event()

    def stream() -> None:
        try:
            while not ended.is_set():
                with client.generate(model, "hello", max_tokens=200) as text:
                    for _ in text:
                        if ended.is_set():
                            return
        except EbbflowError as error:
            failed.append(error)

    running = threading.Thread(target=stream)
    running.start()
    while not any(m.running for m in client.status().models):
        time.sleep(0.02)
    for _ in range(ROUNDS):
        dropped = client.resize(model, f"{full - STEP}B")
        assert dropped.released_nbytes > 0.9 * STEP, dropped
        drops.append(dropped.seconds)
        grows.append(client.resize(model, f"{full}B").seconds)
    ended.set()
    running.join()
    report.times("drop 100 MB during generation", drops)
    report.times("regrow 100 MB during generation", grows)
    report.bar("drop_p99_seconds", percentile(drops, 0.99), "<=", 0.25)
    report.bar("failed_requests", len(failed), "<=", 0)


def main() -> int:
    """Measure and report."""
    report = Report("Residency on the full shape (random weights)")
    model = full_shape()
    with daemon(model) as client:
        idle = private(client, "supervisor")
        report.note("supervisor, idle", f"{idle / 1e6:.1f} MB", idle)
        client.generate(model.name, "hello", max_tokens=2).text()
        detail = client.show(model.name).summary
        loaded = private(client, "supervisor")
        report.note("supervisor, with a worker", f"{loaded / 1e6:.1f} MB", loaded)
        report.bar("supervisor_private_MB", max(idle, loaded) / 1e6, "<=", 30)
        sizes(report, client, model.name, detail.nbytes, detail.base_nbytes)
        breathe(report, client, model.name, detail.nbytes)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
