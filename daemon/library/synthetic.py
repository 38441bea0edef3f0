"""Random models of real shapes, for measuring memory and speed where quality does not matter; what they say is noise.

Covers the command behind `scripts/make-model`: `SHAPE --checkpoint FOLDER` writes a source for `ebb add`
(`synthetic_checkpoint`), `SHAPE --stack LIBRARY --name NAME` a model of the library, directly, in seconds and little
memory (`synthetic_stack`). The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ...formats.errors import EbbflowError
from ...formats.kinds import VALUES_DTYPES
from ...formats.units import format_size
from .shapes import SHAPES, find_shape
from .synthetic_checkpoint import write_checkpoint
from .synthetic_stack import LEVELS, write_random_stack

__all__ = ["main", "write_checkpoint", "write_random_stack"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make what the command line asks for; `->` exit code."""
    options = _parser().parse_args(arguments)
    try:
        sys.stdout.write(_make(options) + "\n")
    except EbbflowError as error:
        sys.stderr.write(f"make-model: {error}\n")
        return error.exit_code
    return 0


def _make(options: argparse.Namespace) -> str:
    shape = find_shape(options.shape)
    if options.checkpoint:
        write_checkpoint(shape, options.checkpoint, seed=options.seed)
        return f"checkpoint of {options.shape} in {options.checkpoint}"
    manifest = write_random_stack(
        shape,
        options.stack,
        options.name or options.shape,
        codec=options.codec,
        seed=options.seed,
        levels=options.levels,
        rank=options.rank,
        sparsity=options.sparsity,
        values=options.values,
    )
    return f"{manifest.name}: {manifest.blocks} blocks, {format_size(manifest.nbytes)} in {options.stack}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("make-model", description="Write a random model of a named shape.")
    parser.add_argument("shape", help=", ".join(SHAPES))
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="write a Hugging Face folder")
    kind.add_argument("--stack", type=Path, metavar="LIBRARY", help="write a model straight into a library")
    parser.add_argument("--name", help="the model's name in the library (the shape's, if not given)")
    parser.add_argument("--codec", choices=LEVELS, default="nested", help="of a model of the library")
    parser.add_argument("--levels", type=int, help="as many as the codec's default, if not given")
    parser.add_argument("--rank", type=int, help="rank of every block of bitstack (by shape, if not given)")
    parser.add_argument("--sparsity", type=float, help="share of the linears' weights that are zero (sparse; 0.5)")
    parser.add_argument("--values", choices=VALUES_DTYPES, default="i8", help="what is stored (sparse, dense)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
