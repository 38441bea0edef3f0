"""What messages carry: structs without an id, used by several of them and by what users see."""

from __future__ import annotations

import msgspec

from .errors import InvalidRequest
from .units import AUTO, SizeWish


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """How the next token is chosen. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises `InvalidRequest` naming the first value out of range."""
        limits = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature <= 100, "between 0 and 100"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
            ("stop", len(self.stop) <= 16 and all(self.stop), "at most 16 strings, none empty"),
        )
        for name, valid, wanted in limits:
            if not valid:
                raise InvalidRequest(f"{name} must be {wanted}, not {getattr(self, name)!r}")


class Residency(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker holds of one model. All sizes in bytes; `reason` says why it is this size and not another.

    `arrived_nbytes`: how much of the stack is on disk, while its file is still arriving.
    `prompt_tokens` were asked for since the model was loaded, of which `reused_tokens` had been computed before, and
    `preemptions` times a request gave its place to another and went on later. Of `kv_nbytes`, which stay within
    `kv_limit_nbytes`, `kv_cached_nbytes` belong to no running request; `kv_pinned_nbytes` to pins.
    Beside the stack (`nbytes`) these are keys and values, the work space of steps, and of that the part that is kept
    only so that the next step finds it (`cache_nbytes`). An automatic size stays between floor and cap (0: none).
    `damage` says what is wrong with the stack beyond `damaged_at_nbytes`, where something was found to be.
    """

    model: str
    blocks: int
    total_blocks: int
    nbytes: int
    total_nbytes: int
    base_nbytes: int
    target_nbytes: int
    kv_nbytes: int = 0
    running: int = 0
    waiting: int = 0
    tokens_per_second: float = 0.0
    arrived_nbytes: int | None = None
    wish: SizeWish = AUTO
    reason: str = ""
    work_nbytes: int = 0
    cache_nbytes: int = 0
    floor_nbytes: int = 0
    cap_nbytes: int = 0
    priority: float = 1.0
    kv_limit_nbytes: int = 0
    kv_cached_nbytes: int = 0
    kv_pinned_nbytes: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    preemptions: int = 0
    shared_nbytes: int = 0
    shared_base_nbytes: int = 0
    damage: str = ""
    damaged_at_nbytes: int | None = None


class PinSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A prefix whose keys and values are kept: `tokens` of it are (whole blocks only), in `nbytes` bytes.

    `saved`: on disk too, for the next start. `current`: computed at no less than the quality that the model has now; a
    pin that is not is computed again when nothing else is to do.
    """

    name: str
    tokens: int
    nbytes: int
    saved: bool = False
    current: bool = True


class ProcessMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One of our processes as the kernel counts it (smaps_rollup): private bytes and bytes swapped out."""

    role: str
    pid: int
    private_nbytes: int
    swapped_nbytes: int = 0


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A line of `ebb list`. `arrived_nbytes`: what is there of a stack whose file is still arriving.

    `shared_nbytes` of `nbytes`, its masks, are on the disk once for this model and those that it `shares` them with.
    """

    name: str
    family: str
    codec: str
    nbytes: int
    base_nbytes: int
    original_nbytes: int
    created: str
    arrived_nbytes: int | None = None
    shares: tuple[str, ...] = ()
    shared_nbytes: int = 0
