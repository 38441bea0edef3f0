"""What is compiled when, and for what: settings of the user's other programs must not break or slow the worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from ebbflow.kernels.cache import PARTS, compile_once, compiled, use_cache
from ebbflow.kernels.instructions import available
from ebbflow.kernels.rows import JIT_OFF


def kernels_behind(statement: str) -> set[str]:
    """Modules of kernels that a process has after a statement."""
    code = f"import sys; {statement}; print(*(name for name in sys.modules if name.startswith('ebbflow.kernels.')))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300, check=True)
    return set(done.stdout.split())


def test_the_worker_imports_no_kernel_that_was_not_compiled_before() -> None:
    """Else it would carry the compiler's memory, and be as late."""
    # its `compile` runs that module; `cache` and `threads` hold no kernels
    ours = {f"ebbflow.kernels.{name}" for name in ("cache", "threads")}
    compiled = kernels_behind("import ebbflow.kernels.compile as c; c.compile_step(); c.compile_others()")
    assert kernels_behind("import ebbflow.daemon.worker.loop") - ours <= compiled


def test_the_threads_are_those_that_a_step_needs_whatever_other_programs_want(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """OpenMP may give fewer threads than asked for: a step would wait for the others for ever."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setenv("NUMBA_THREADING_LAYER", "omp")
    use_cache(tmp_path)
    assert os.environ["NUMBA_THREADING_LAYER"] == "workqueue"


@pytest.mark.parametrize("variable", ["EBBFLOW_INSTRUCTIONS", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"])
def test_kernels_for_other_instructions_are_kept_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    """Else those of one choice would be thought complete, and the worker compile them itself."""
    for name in ("NUMBA_CACHE_DIR", "NUMBA_THREADING_LAYER", variable):
        monkeypatch.setenv(name, "")
    folder = use_cache(tmp_path)
    assert use_cache(tmp_path) == folder
    monkeypatch.setenv(variable, "+sse2")
    assert use_cache(tmp_path) != folder


def test_a_run_without_the_compiler_does_not_make_the_cache_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    compile_once(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("together", [False, True])
def test_a_compiler_that_fails_is_told_of_and_leaves_nobody_behind(tmp_path: Path, together: bool) -> None:
    module = tmp_path / "failing_compiler.py"
    module.write_text("import sys, time; sys.argv[1] == 'step' and sys.exit(3); time.sleep(1000)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        patch.setenv("NUMBA_DISABLE_JIT", "0")
        with pytest.raises(subprocess.CalledProcessError):
            compile_once(tmp_path, "failing_compiler", together=together)
    assert not compiled(tmp_path)


class InterruptedCompiler:
    """A process whose first wait is cut short, as by Ctrl-C."""

    started: ClassVar[list[InterruptedCompiler]] = []

    def __init__(self, args: list[str], **_: object) -> None:
        self.args, self.waits, self.killed = args, 0, False
        self.started.append(self)

    def wait(self) -> int:
        self.waits += 1
        if self.waits == 1:
            raise KeyboardInterrupt
        return -9 if self.killed else 0

    def kill(self) -> None:
        self.killed = True


@pytest.mark.parametrize("together", [False, True])
def test_an_interrupted_wait_leaves_no_compiler_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, together: bool
) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "0")
    monkeypatch.setattr(InterruptedCompiler, "started", [])
    monkeypatch.setattr(subprocess, "Popen", InterruptedCompiler)
    with pytest.raises(KeyboardInterrupt):
        compile_once(tmp_path, together=together)
    assert len(InterruptedCompiler.started) == (len(PARTS) if together else 1)
    assert all(process.killed for process in InterruptedCompiler.started)
    assert not compiled(tmp_path)


@pytest.mark.skipif(JIT_OFF, reason="then there is one set only")
@pytest.mark.parametrize(
    ("variable", "value", "able"),
    [
        ("NUMBA_CPU_NAME", "generic", ("portable",)),
        ("NUMBA_CPU_FEATURES", "+sse2,-avx2", ("portable",)),
        ("NUMBA_CPU_FEATURES", "+sse2,+avx2", ("avx2", "portable")),
    ],
)
def test_what_numba_is_kept_from_is_not_used(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, able: tuple[str, ...]
) -> None:
    """LLVM would abort the process."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setenv(variable, value)
    assert available() == able
