"""The command `ebb`: its group, and the boundary where errors become one line and an exit code."""

from __future__ import annotations

import importlib.metadata
import io
import os
import sys
from typing import Any, NoReturn

import click

from ...formats.errors import EbbflowError, InternalError
from .add import add
from .batch import batch
from .copy import export, import_
from .give import pause, resume, yield_memory
from .keys import keys
from .models import list_models, rm, show
from .output import note
from .pin import pin
from .ps import ps
from .resize import resize
from .run import run
from .serve import serve, status, stop
from .service import service
from .standard import give_up, open_missing
from .top import top

EPILOG = """\b
Exit codes:
    0  done                                  69  the daemon is not running, went away, or cannot start
    1  another error                         70  a bug of ours (the log has the traceback)
    2  the request or its usage is wrong     73  another daemon is running
    3  no such model                         74  the system refuses to read or write a file or folder
    4  not supported                         75  not now: memory, disk, too busy, a process died; try again
    5  a file is corrupt                     77  the daemon does not let us in
                                            130  cancelled, or Ctrl-C

\b
EBBFLOW_HOME=FOLDER keeps everything in one folder; EBBFLOW_DEBUG=1 shows tracebacks.
Completion: eval "$(_EBB_COMPLETE=bash_source ebb)", also zsh_source and fish_source.
"""


class Commands(click.Group):
    """A group that ends every error with one line on stderr and the error's exit code, never with a traceback."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line; leaves with its exit code."""
        open_missing()
        try:
            return super().main(*args, **extra)
        except OSError as error:
            if os.environ.get("EBBFLOW_DEBUG"):
                raise
            give_up(error)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a model may write what this terminal cannot show
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except EbbflowError as error:
            _end(ctx, str(error), error.exit_code)
        except OSError:
            raise  # of reading or writing: click leaves quietly when nobody reads any more, `main` says the rest
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(130)
        except Exception as error:  # the last boundary: whatever it is, no traceback
            if os.environ.get("EBBFLOW_DEBUG"):
                raise
            message = f"unexpected {type(error).__name__}: {error}; EBBFLOW_DEBUG=1 shows where"
            _end(ctx, message, InternalError.exit_code)


def _end(ctx: click.Context, message: str, code: int) -> NoReturn:
    note(f"ebb: {message}")
    ctx.exit(code)


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(importlib.metadata.version("ebbflow"), prog_name="ebb")
def main() -> None:
    """Runs local language models inside whatever memory the machine can spare right now."""


COMMANDS = (
    *(serve, stop, status, service, keys),
    *(add, import_, export, list_models, show, rm),
    *(run, batch, pin),
    *(ps, top, resize, yield_memory, pause, resume),
)
for command in COMMANDS:
    main.add_command(command)

if __name__ == "__main__":
    main()
