"""What can be asked of the codec `sparse`: how much is pruned, in what pattern, how it is chosen, and how it is stored.

Checked here for the client, who hears at once, and again by the job. How it is done is `daemon/library/prune`'s and
`encode_sparse`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .errors import InvalidRequest, Unsupported
from .paths import check_name

CODEC: Final = "sparse"
METHODS: Final = ("magnitude", "wanda", "admm", "sparsegpt", "frankwolfe")
PATTERNS: Final = {"2:4": (2, 4), "4:8": (4, 8)}  # how many of how many neighbours in a row are kept
VALUES: Final = ("i8", "f16", "i4")
DEFAULT_SPARSITY: Final = 0.5
DEFAULT_METHOD: Final = "admm"
DEFAULT_VALUES: Final = "i8"


@dataclass(frozen=True)
class Pruning:
    """Checked options. `sparsity` is the share of a linear's weights that becomes zero; None, when nobody said: half,
    or what is zero already in a checkpoint that was pruned before.
    """

    sparsity: float | None = None
    pattern: str | None = None
    method: str = DEFAULT_METHOD
    values: str = DEFAULT_VALUES

    @property
    def wanted(self) -> float:
        """The share to prune, where the checkpoint does not say it."""
        if self.pattern is not None:
            kept, group = PATTERNS[self.pattern]
            return 1 - kept / group
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def group(self, tensor: str, n: int) -> int:
        """How many neighbours in a row of n columns share a count of kept weights: all, or those of the pattern.

        Raises `InvalidRequest` when the pattern does not divide the row of `tensor`.
        """
        if self.pattern is None:
            return n
        group = PATTERNS[self.pattern][1]
        if n % group:
            raise InvalidRequest(
                f"the pattern {self.pattern} does not divide the {n} columns of {tensor}; prune without a pattern"
            )
        return group

    def keep(self, group: int) -> int:
        """How many of `group` weights are kept: at least one."""
        return max(1, round((1 - self.wanted) * group))


def read_pruning(
    codec: str,
    sparsity: float | None,
    pattern: str | None,
    method: str | None,
    values: str | None,
    masks_of: str | None = None,
) -> Pruning | None:
    """The options of `sparse`, None with another codec; `masks_of` is only looked at, it is the library's to find.

    Raises `InvalidRequest`, `InvalidName`, or `Unsupported` for unknown names.
    """
    given = {"sparsity": sparsity, "pattern": pattern, "method": method, "values": values, "masks_of": masks_of}
    if codec != CODEC:
        alien = [name for name, value in given.items() if value is not None]
        if alien:
            belong = "belongs" if len(alien) == 1 else "belong"
            raise InvalidRequest(f"{' and '.join(alien)} {belong} to the codec {CODEC}; the codec {codec} has none")
        return None
    if masks_of is not None:
        check_name(masks_of)
    if sparsity is not None and not 0 < sparsity < 1:  # a NaN is neither
        raise InvalidRequest(f"sparsity must be above 0 and below 1, not {sparsity}: 0.5 keeps half of the weights")
    if pattern is not None and pattern not in PATTERNS:
        raise Unsupported(f"pattern {pattern!r}; this version knows {', '.join(PATTERNS)}")
    if method is not None and method not in METHODS:
        raise Unsupported(f"method {method!r}; this version knows {', '.join(METHODS)}")
    if values is not None and values not in VALUES:
        raise Unsupported(f"values as {values!r}; this version knows {', '.join(VALUES)}")
    found = Pruning(sparsity, pattern, method or DEFAULT_METHOD, values or DEFAULT_VALUES)
    if sparsity not in (None, found.wanted):
        raise InvalidRequest(f"the pattern {pattern} prunes {found.wanted:g}, not {sparsity}; give one of the two")
    return found
