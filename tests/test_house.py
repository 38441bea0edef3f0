"""The folder tree shows the architecture: what may import what, and what is packaged."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("client", "daemon", "formats", "kernels")
MAY_IMPORT = {
    "client": {"client", "formats"},
    "daemon": {"daemon", "formats", "kernels"},
    "formats": {"formats"},
    "kernels": {"kernels"},
}
# One importer for each outside thing: the seam where tests put a fake.
ONLY_IN = {
    "psutil": {"daemon/supervisor/sensor.py"},
    "zmq": {"client/channel.py", "daemon/channel.py"},
    "numba": {"kernels/"},
    "llvmlite": {"kernels/"},
    "torch": {"daemon/engine/dense.py", "daemon/library/", "formats/checkpoint.py", "kernels/gpu/"},
    "triton": {"kernels/gpu/"},
    "click": {"client/cli/"},
    "rich": {"client/cli/"},
    "jinja2": {"daemon/engine/template.py"},
    "transformers": set[str](),
}


# Model files are data: nothing in them is ever run or unpickled.
RUNS_DATA = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "runpy"}
RUNS_DATA_BY_CALL = {"eval", "exec", "compile", "__import__", "torch.load", "load_module", "yaml.load"}


def sources() -> list[Path]:
    return sorted(path for part in PARTS for path in (ROOT / part).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports."""
    package = ("ebbflow", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join((*base, *((node.module or "").split(".") if node.module else ())))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(ROOT).parts[0]
    name = str(path.relative_to(ROOT))
    for imported in imports(path):
        if imported.startswith("ebbflow."):
            assert imported.split(".")[1] in MAY_IMPORT[part], f"{part} imports {imported}"
            assert name.startswith("kernels/gpu/") or not imported.startswith("ebbflow.kernels.gpu"), "brings torch"
        allowed = ONLY_IN.get(imported.split(".")[0])
        assert allowed is None or any(name.startswith(place) for place in allowed), f"{imported} is imported here"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_model_files_are_data_only(path: Path) -> None:
    assert not RUNS_DATA & {name.split(".")[0] for name in imports(path)}
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        assert ast.unparse(call.func) not in RUNS_DATA_BY_CALL, f"line {call.lineno} may run what it reads"
        if ast.unparse(call.func) in ("np.load", "numpy.load"):
            assert "allow_pickle=False" in ast.unparse(call)
        assert not any(word.arg == "trust_remote_code" for word in call.keywords)


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {"ebbflow." + ".".join(path.parent.relative_to(ROOT).parts) for path in sources()}
    assert sorted(found) == sorted(listed)
    assert not (ROOT / "__init__.py").exists()


@pytest.mark.parametrize("module", ["client", "client.cli.main", "daemon.supervisor.main"])
def test_the_light_processes_stay_light(module: str) -> None:
    code = f"import sys, ebbflow.{module}; print(*sorted({{'torch', 'numba', 'numpy', 'llvmlite'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_scripts_are_short() -> None:
    for script in (ROOT / "scripts").iterdir():
        assert len(script.read_text().splitlines()) <= 20, script.name
