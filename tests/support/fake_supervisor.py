"""The real supervisor with children that are not: `python fake_supervisor.py OPTIONS...`."""

from __future__ import annotations

import sys
from pathlib import Path

from ebbflow.daemon.supervisor.children import CommandLauncher
from ebbflow.daemon.supervisor.main import parse, serve
from ebbflow.formats.paths import default_paths

if __name__ == "__main__":
    paths = default_paths()
    here = Path(__file__).parent
    worker, job = (sys.executable, str(here / "fake_worker.py")), (sys.executable, str(here / "fake_job.py"))
    options = parse(sys.argv[1:], paths)
    serve(options, paths, CommandLauncher(paths, worker, job), lambda: parse(sys.argv[1:], paths))
