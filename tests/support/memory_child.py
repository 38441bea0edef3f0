"""Child process of test_traps: fills and frees memory, and prints what the kernel says, in bytes, as JSON.

`WHAT CGROUP ARGUMENT...`: joins the group first, so that everything it ever touches is counted there.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from pathlib import Path

import numba.core.event
import numpy as np

from ebbflow.daemon.engine.kv import KvCache
from ebbflow.daemon.mapping import Mapping, drop_clean_pages, private_nbytes
from ebbflow.daemon.process import free_at_once
from ebbflow.daemon.worker.loop import Loop
from ebbflow.daemon.worker.resident import Resident
from ebbflow.daemon.worker.shared import SharedBlocks
from ebbflow.formats.architecture import Architecture
from ebbflow.formats.child_messages import Exit, LoadModel, SetTarget, ToWorker, Trim, UnloadModel
from ebbflow.formats.manifest import STACK
from ebbflow.formats.messages import Chunk, Generate
from ebbflow.formats.stack import Stack, read_stack
from ebbflow.formats.values import Sampling

from support.fake_line import FakeClock, FakeLine

NBYTES = 64 << 20
HUGE = 2 << 20
GROUP = ""


def used() -> int:
    """Bytes in use, as the kernel says: of our cgroup, or else this process's private pages."""
    for name in ("memory.usage_in_bytes", "memory.current"):
        if GROUP and (Path(GROUP) / name).exists():
            return int((Path(GROUP) / name).read_text())
    return private_nbytes()


def anonymous() -> int:
    """The anonymous part of that; of this process alone where there is no cgroup."""
    if GROUP:
        fields = dict(line.split() for line in (Path(GROUP) / "memory.stat").read_text().splitlines())
        return int(fields.get("anon") or fields["rss"])
    return _field("/proc/self/smaps_rollup", "Anonymous")


def _field(path: str, name: str) -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def mapping() -> dict[str, int]:
    before = used()
    memory = Mapping(NBYTES)
    reserved = used() - before
    memory.bytes[:] = 1
    filled = used() - before
    memory.release(NBYTES // 2, NBYTES)
    half = used() - before
    memory.release(0, NBYTES)
    return {"reserved": reserved, "filled": filled, "half": half, "none": used() - before}


def shared_mapping() -> dict[str, int]:
    before, rss = used(), _field("/proc/self/smaps_rollup", "Rss")
    memory = mmap.mmap(-1, NBYTES)
    np.frombuffer(memory, np.uint8)[:] = 1
    filled = used() - before
    memory.madvise(mmap.MADV_DONTNEED)
    dropped_rss = _field("/proc/self/smaps_rollup", "Rss") - rss
    return {"filled": filled, "rss": dropped_rss, "dropped": used() - before, "byte": memory[0]}


def huge_pages() -> dict[str, int]:
    before = used()
    memory = mmap.mmap(-1, NBYTES + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    start = -int(array.ctypes.data) % HUGE
    array[start : start + NBYTES] = 1
    filled, huge = used() - before, _field("/proc/self/smaps_rollup", "AnonHugePages")
    rss = _field("/proc/self/smaps_rollup", "Rss")
    for at in range(start, start + NBYTES, HUGE):
        memory.madvise(mmap.MADV_DONTNEED, at + HUGE // 2, HUGE // 2)
    freed_rss = rss - _field("/proc/self/smaps_rollup", "Rss")
    return {"filled": filled, "huge": huge, "freed_rss": freed_rss, "freed": filled - (used() - before)}


def kv_blocks() -> dict[str, int]:
    a = Architecture(
        family="llama",
        vocab=10,
        hidden=512,
        layers=8,
        heads=8,
        kv_heads=8,
        head_dim=64,
        intermediate=10,
        context=2048,
        norm_eps=1e-5,
        rotary_theta=1e4,
    )
    before, kv = used(), KvCache(a)
    reserved = used() - before
    blocks = kv.allocate(NBYTES // kv.block_nbytes)
    kv.array[list(blocks)] = 1
    filled = used() - before
    kv.free(blocks[::2])
    half = used() - before
    kv.free(blocks[1::2])
    return {"reserved": reserved, "filled": filled, "half": half, "none": used() - before, "held": kv.held}


def resident() -> dict[str, int]:
    stack = read_stack(Path(sys.argv[3]) / STACK)
    descriptor = os.open(stack.path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    droppable = not cached(descriptor)
    while os.read(descriptor, 1 << 20):
        pass
    warm = cached(descriptor)
    before, loaded = anonymous(), Resident(stack)
    while loaded.blocks < len(stack.blocks):
        loaded.grow(len(stack.blocks))
    result = {"droppable": droppable, "warm": warm, "cold": cached(descriptor), "nbytes": stack.nbytes}
    result |= {"anonymous": anonymous() - before}
    full = used()
    loaded.shrink(len(stack.blocks) // 2)
    result |= {"left": loaded.nbytes, "freed": full - used()}
    full = used()
    loaded.close()
    return result | {"closed": full - used()}


def variants() -> dict[str, int]:
    """Two models with blocks in common through their lives: what is booked and what the kernel says, step by step."""
    first, second = (read_stack(Path(folder) / STACK) for folder in sys.argv[3:5])
    for stack in (first, second):
        _loaded(stack, SharedBlocks()).close()  # what malloc keeps of the first load stays with it
    shared, start = SharedBlocks(), used()
    models: dict[str, Resident] = {}
    found = {}

    def look(when: str) -> None:
        statistics = [model.statistics() for model in models.values()]
        found[f"{when} booked"] = sum(s.nbytes - s.shared_nbytes for s in statistics)
        found[f"{when} used"] = used() - start

    models["first"] = _loaded(first, shared)
    look("first")
    models["second"] = _loaded(second, shared)
    look("both")
    models["first"].shrink(0)
    look("shrunk")
    while models["first"].blocks < len(first.blocks):
        models["first"].grow(len(first.blocks))
    look("grown")
    models.pop("first").close()
    look("second")
    models.pop("second").close()
    look("none")
    return found | {"alone": first.nbytes + second.nbytes, "second alone": second.nbytes}


def _loaded(stack: Stack, shared: SharedBlocks) -> Resident:
    model = Resident(stack, shared)
    while model.blocks < len(stack.blocks):
        model.grow(len(stack.blocks))
    return model


def cached(descriptor: int) -> int:
    """Bytes of a file that are in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    nbytes = os.fstat(descriptor).st_size
    view = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


def loop_rounds() -> dict[str, int]:
    """100 rounds of load, answer, shrink, grow, unload through the worker's own loop, with several models in turn."""
    line = FakeLine()
    loop = Loop(line, 1, FakeClock())
    sampling = Sampling(max_tokens=4, temperature=1.0)
    figures = []
    for number in range(110):
        folder = sys.argv[3:][number % len(sys.argv[3:])]
        line.script.append([LoadModel(model="m", folder=folder, target_nbytes=10**6)])
        line.script.append([Generate(id=1, model="m", prompt="x" * 70, sampling=sampling)])
        line.script.append([SetTarget(model="m", target_nbytes=0)])
        line.script.extend([[], [SetTarget(model="m", target_nbytes=10**6)], [], [], [UnloadModel(model="m")]])
        while line.script:
            loop.turn()
        line.take()
        address_space = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        figures.append((private_nbytes(), used(), address_space))
    line.script.append([Exit()])
    growth = [last - first for first, last in zip(figures[9], figures[-1], strict=True)]
    return dict(zip(("private", "used", "address_space"), growth, strict=True)) | {"ended": not loop.turn()}


def unload_trims() -> dict[str, int]:
    """What malloc keeps after a model's many arrays are freed, before and after the loop unloads the model."""
    line = FakeLine([LoadModel(model="m", folder=sys.argv[3], target_nbytes=10**6)], [], [UnloadModel(model="m")])
    loop = Loop(line, 1, FakeClock())
    loop.turn()
    loop.turn()
    before = used()
    arrays = [np.ones(100_000, np.uint8) for _ in range(NBYTES // 100_000)]
    filled = used() - before
    kept = arrays[::100]  # small ones in between and on top, as in life
    del arrays
    freed = used() - before
    loop.turn()
    return {"filled": filled, "freed": freed, "trimmed": used() - before, "kept": len(kept)}


def compiler_idle() -> dict[str, int]:
    """Models are loaded and asked: how often the compiler ran, and what of its code was there before and after."""
    recorder = numba.core.event.RecordingListener()
    numba.core.event.register("numba:compile", recorder)
    line = FakeLine()
    loop = Loop(line, 1, FakeClock())
    before = _code("llvmlite")
    drop_clean_pages("llvmlite")
    for key, folder in enumerate(sys.argv[3:]):
        request = Generate(id=key, model=folder, prompt="abc", sampling=Sampling(max_tokens=4))
        line.script.extend([[LoadModel(model=folder, folder=folder, target_nbytes=10**6)], [request], *[[]] * 8])
    while line.script:
        loop.turn()
    answered = sum(type(message).__name__ == "Finished" for message in line.take())
    return {"compiled": len(recorder.buffer), "before": before, "after": _code("llvmlite"), "answered": answered}


def _code(library: str) -> int:
    """Bytes of a library's unwritten pages that this process has mapped."""
    total, ours = 0, False
    for text in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = text.split()
        if not first.endswith(":"):
            ours = library in text and rest[0] == "r-xp"
        elif ours and first == "Rss:":
            total += int(rest[0]) * 1024
    return total


def ledger() -> dict[str, int]:
    """What the kernel and what the ledger says moved, in pairs, through the life of a model."""
    free_at_once()
    line = FakeLine()
    loop, moved = Loop(line, 2, time.monotonic), {}

    def play(*messages: ToWorker) -> None:
        line.script.append(list(messages))
        loop.turn()
        while line.script or any(served.engine.busy or not served.arrived for served in loop.models.values()):
            loop.turn()

    def booked() -> int:
        held = [served.residency("m") for served in loop.models.values()]
        return sum(r.nbytes + r.kv_nbytes + r.work_nbytes for r in held)

    def ask(key: int, prompt: str, tokens: int) -> Generate:
        return Generate(id=key, model="m", prompt=prompt, sampling=Sampling(max_tokens=tokens))

    play(LoadModel(model="m", folder=sys.argv[3], target_nbytes=0))
    play(ask(1, "warm up", 2), Trim(nbytes=1 << 40))  # what is compiled or imported late belongs to the runtime
    play(Trim(nbytes=1 << 40))
    kernel, ours = private_nbytes(), booked()

    def note(what: str) -> None:
        moved[what + " kernel"], moved[what + " ours"] = private_nbytes() - kernel, booked() - ours

    full = loop.models["m"].resident.stack.nbytes
    play(SetTarget(model="m", target_nbytes=full))
    note("grown")
    play(SetTarget(model="m", target_nbytes=full * 3 // 4))
    note("shrunk")
    line.script.append([ask(2, "x" * 450, 50)])
    while not any(isinstance(message, Chunk) and message.id == 2 for message in line.sent):
        loop.turn()
    note("running")
    play()
    note("finished")
    play(Trim(nbytes=1 << 40))
    note("trimmed")
    play(UnloadModel(model="m"))
    note("unloaded")
    return moved


if __name__ == "__main__":
    GROUP = sys.argv[2]
    if GROUP:
        (Path(GROUP) / "cgroup.procs").write_text(str(os.getpid()))
    measurements = (
        *(mapping, shared_mapping, huge_pages, kv_blocks, resident, loop_rounds, unload_trims),
        *(compiler_idle, ledger, variants),
    )
    print(json.dumps({m.__name__: m for m in measurements}[sys.argv[1]]() | {"counted": bool(GROUP)}))
