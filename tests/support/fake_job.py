"""A job that begins a folder and never ends: `python fake_job.py ADDRESS IDENTITY LIBRARY CACHE REQUEST`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec

from ebbflow.daemon.channel import Child
from ebbflow.daemon.process import die_with_parent
from ebbflow.formats.child_messages import Ready
from ebbflow.formats.messages import AddModel, Progress

if __name__ == "__main__":
    die_with_parent()
    address, identity, library, _, text = sys.argv[1:]
    request = msgspec.json.decode(text, type=AddModel)
    (Path(library) / f".adding-{request.name}-{os.getpid()}").mkdir()
    line = Child(address, identity)
    line.send(Ready(pid=os.getpid()))
    line.send(Progress(id=request.id, stage="encode", done=1, total=2))
    while True:
        line.receive(60)
