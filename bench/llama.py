"""llama.cpp as the peer of the benches, built once from the source that the package llama-cpp-python carries.

Needs cmake, a C++ compiler and, the first time, the network for pip; about half an hour on two cores at low priority.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from places import CACHE

VERSION: Final = "0.3.36"  # of llama-cpp-python
PROGRAMS: Final = ("llama-quantize", "llama-imatrix", "llama-bench", "llama-server")
_OFF: Final = (
    "BUILD_SHARED_LIBS", "GGML_CCACHE", "LLAMA_OPENSSL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP",
    "LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI",
)  # fmt: skip


def programs(*, avx512: bool = True) -> Path:
    """The folder of the built `PROGRAMS`: for this processor, or on x86 for one that has no AVX-512."""
    build = CACHE / f"llama-{VERSION}" / ("native" if avx512 else "avx2")
    if not all((build / "bin" / name).exists() for name in PROGRAMS):
        build.mkdir(parents=True, exist_ok=True)
        options = [f"-D{name}=OFF" for name in _OFF] + [f"-DGGML_NATIVE={'ON' if avx512 else 'OFF'}"]
        configure = ["-S", _source(), "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options]
        make = ["--build", build, "--parallel", str(os.cpu_count() or 1), "--target", *PROGRAMS]
        print(f"building llama.cpp, about half an hour; see {build}.log")
        with Path(f"{build}.log").open("w") as log:
            for arguments in (configure, make):
                command = ["nice", "-n", "19", "cmake", *arguments]
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return build / "bin"


def _source() -> Path:
    """The unpacked tree of llama.cpp."""
    source = CACHE / f"llama-{VERSION}" / "source"
    if not source.exists():
        source.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            fetch = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
            command = [sys.executable, "-m", *fetch, "--dest", folder, f"llama-cpp-python=={VERSION}"]
            subprocess.run(command, check=True)
            with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
            next(Path(folder).glob("*/vendor/llama.cpp")).rename(source)
    return source
