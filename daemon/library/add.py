"""Adding a model: checkpoint -> moments -> encoded blocks -> ordered stack -> measured and named, in the library.

The pipeline only. The process around it is `job`, the folder the model is made in `place`'s, so that the library is as
it was after any failure, kill or full disk; what was finished until then is in the cache, and `resume` says who goes on
from it. Calibration text is `texts`'s. What a block is worth is in `gain`, where it goes in `order`.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from torch import Tensor

from ...formats.checkpoint import Checkpoint, open_checkpoint
from ...formats.errors import DiskFull, storage_failed
from ...formats.manifest import STACK, CurvePoint, Manifest, Source, write_manifest
from ...formats.masks import digest
from ...formats.messages import AddModel
from ...formats.pruning import Pruning, read_pruning
from ...formats.stack import Stack, read_blocks, read_stack, write_stack
from ...formats.summary import summary
from ...formats.values import ModelSummary
from .encode import EncodePlan, choose_levels, encode_model, expected_nbytes, layer_linears
from .encode_sparse import SparsePlan, find_zeros
from .gain import GainEstimate, second_order_gain
from .given import GivenMasks
from .masks import link_masks
from .measure import curve_blocks, measure_curve
from .order import check_rule, order_entries
from .place import check_room, copy_tokenizer, free_place, making
from .progress import Clock, Reporter, Send
from .resume import leftover_nbytes, resumable, work_key
from .source import find_source
from .spool import Spool
from .texts import Texts, file_texts, sampled_texts

CURVE_POINTS: Final = 16


def add_model(
    request: AddModel,
    library: Path,
    cache: Path,
    send: Send,
    *,
    commit: Callable[[], None] = lambda: None,
    clock: Clock = time.monotonic,
    estimate: GainEstimate = second_order_gain,
) -> ModelSummary:
    """Add the model that `request` asks for and say how far it is through `send`, at most ten times a second.

    `commit` is called when all is made and the model is about to be in the library; it may raise.

    Raises `InvalidName`, `ModelExists`, `InvalidRequest`, `Unsupported`, `CorruptCheckpoint`, `DiskFull`,
    `StorageFailed`, `Retryable` (hub out of reach) or what `send` raises; the library is then untouched.
    """
    try:
        # What is in use, and the work so far, is let go when the model is in the library.
        with contextlib.ExitStack() as work:
            return _add(request, library, cache, send, commit, clock, estimate, work)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no room left in {library} or {cache} while adding {request.name}; nothing was added"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
            raise storage_failed(error, library) from error
        raise


def _add(
    request: AddModel,
    library: Path,
    cache: Path,
    send: Send,
    commit: Callable[[], None],
    clock: Clock,
    estimate: GainEstimate,
    work: contextlib.ExitStack,
) -> ModelSummary:
    place = free_place(library, request.name)
    levels, pruning = _check_options(request)
    given = None if request.masks_of is None else work.enter_context(GivenMasks(library, request.masks_of))
    Reporter(request.id, 0, send, clock).begin("reading")
    checkpoint = open_checkpoint(find_source(request.source))
    reporter = Reporter(request.id, checkpoint.nbytes, send, clock)
    sparse = _sparse(request, checkpoint, pruning, given, reporter)
    levels = given.levels if given else levels
    plan = EncodePlan(checkpoint, request.codec, levels, request.rank, request.seed, estimate, reporter, sparse)
    most = expected_nbytes(checkpoint.architecture, request.codec, levels, request.rank, sparse)
    there = given.linkable_nbytes if given else 0  # the cache holds masks until then, too
    check_room({library: most - there, cache: most - leftover_nbytes(cache)})
    with making(place, commit) as folder:
        checksum = checkpoint.checksum()
        texts = _texts(request, plan, checksum, cache)
        key = _work_key(request, plan, checksum, texts.calibration)
        spool = Spool(work.enter_context(resumable(cache, key, 2 * most)))
        stack = _make_stack(plan, request.order, texts.calibration, spool, folder)
        curve = _measure(plan, stack, texts.held_back)
        manifest = _manifest(request, plan, checksum, stack, curve)
        copy_tokenizer(checkpoint.folder, folder)
        write_manifest(folder, manifest)
    return summary(manifest)


def _check_options(request: AddModel) -> tuple[int, Pruning | None]:
    """The number of levels, and what is asked of pruning. Raises `Unsupported` or `InvalidRequest`."""
    check_rule(request.order)
    levels = choose_levels(request.codec, request.levels, request.rank)
    asked = (request.sparsity, request.pattern, request.method, request.values, request.masks_of)
    return levels, read_pruning(request.codec, *asked)


def _sparse(
    request: AddModel,
    checkpoint: Checkpoint,
    pruning: Pruning | None,
    given: GivenMasks | None,
    reporter: Reporter,
) -> SparsePlan | None:
    """How its linears are to be pruned. Raises `InvalidRequest` when a pattern does not fit one of them, or masks of
    another model do not.
    """
    if pruning is None:
        return None
    if given:
        reporter.begin(f"reading the masks of {given.name}")
        given.check(layer_linears(checkpoint.architecture), pruning, request.levels)
    reporter.begin("looking for zeros")
    zeros = find_zeros(checkpoint, layer_linears(checkpoint.architecture), pruning)
    if zeros is not None:
        reporter.begin(f"keeping {zeros.text}")
    return SparsePlan(pruning, zeros, given)


def _texts(request: AddModel, plan: EncodePlan, checksum: str, cache: Path) -> Texts:
    plan.reporter.begin("sampling")
    if request.calibration is not None:
        return file_texts(plan.checkpoint, Path(request.calibration))
    return sampled_texts(plan.checkpoint, checksum, request.seed, cache, plan.reporter)


def _work_key(request: AddModel, plan: EncodePlan, checksum: str, tokens: Tensor) -> str:
    estimate = f"{plan.estimate.__module__}.{plan.estimate.__qualname__}"
    sparse = None if plan.sparse is None else repr(plan.sparse.pruning)
    masks = plan.sparse.given.digest if plan.sparse and plan.sparse.given else None
    return work_key(checksum, tokens, request.codec, plan.levels, request.rank, request.seed, estimate, sparse, masks)


def _make_stack(plan: EncodePlan, rule: str, tokens: Tensor, spool: Spool, folder: Path) -> Stack:
    """Encode, order, write and read back."""
    encode_model(plan, tokens, spool)
    plan.reporter.begin("ordering")
    index, positions = order_entries(plan.checkpoint.architecture, spool.entries, rule)
    plan.reporter.begin("writing")
    shared = link_masks(folder.parent, index.blocks, folder)
    write_stack(folder / STACK, index, lambda i: spool.read(positions[i]), masks_there=shared)
    stack = read_stack(folder / STACK)
    for position, (entry, _) in enumerate(read_blocks(stack)):
        plan.reporter.fraction(stack.edges[position], stack.nbytes, entry.tensor)
    return stack


def _measure(plan: EncodePlan, stack: Stack, tokens: Tensor) -> tuple[CurvePoint, ...]:
    """The curve from the base to the whole stack."""
    plan.reporter.begin("checking quality")
    blocks = curve_blocks(stack, CURVE_POINTS)
    return measure_curve(
        plan.checkpoint, stack, tokens, blocks, lambda what, done, total: plan.reporter.fraction(done, total)
    )


def _manifest(
    request: AddModel, plan: EncodePlan, checksum: str, stack: Stack, curve: tuple[CurvePoint, ...]
) -> Manifest:
    options: dict[str, str | int | float] = {
        "levels": plan.levels,
        **({"rank": request.rank or "by shape"} if request.codec == "bitstack" else {}),
        **(_pruned(plan.sparse) if plan.sparse else {}),
        "order": request.order,
        "calibration": request.calibration or "sampled",
        "seed": request.seed,
    }
    return Manifest(
        name=request.name,
        architecture=plan.checkpoint.architecture,
        source=Source(request.source, checksum),
        codec=request.codec,
        options=options,
        nbytes=stack.nbytes,
        base_nbytes=stack.base_nbytes,
        blocks=len(stack.blocks),
        original_nbytes=plan.checkpoint.nbytes,
        bos=plan.checkpoint.bos,
        eos=plan.checkpoint.eos,
        curve=curve,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        masks=digest(stack.blocks),
        base_masks_nbytes=stack.base_masks_nbytes,
    )


def _pruned(sparse: SparsePlan) -> dict[str, str | int | float]:
    """What the manifest says of it."""
    pruning, zeros = sparse.pruning, sparse.zeros
    asked, pattern = pruning.pattern or pruning.sparsity, pruning.pattern
    sparsity: str | float = pruning.wanted if asked or zeros is None else "as it came"
    if sparse.given:
        sparsity, pattern = sparse.given.sparsity, sparse.given.pattern
    return {
        "sparsity": sparsity,
        **({"pattern": pattern} if pattern else {}),
        **({"masks_of": sparse.given.name} if sparse.given else {}),
        "method": pruning.method,
        "values": pruning.values,
        **({"kept": zeros.text} if zeros else {}),
    }
