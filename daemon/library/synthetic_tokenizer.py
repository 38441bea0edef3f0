"""A byte-level tokenizer of any vocabulary size, for random models: every text encodes, every id decodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Final

from ...formats.errors import InvalidRequest

BOS: Final = 0
EOS: Final = 1
_SPECIAL: Final = ("<s>", "</s>")
_BYTES: Final = 256


def write_tokenizer(folder: Path, vocab: int) -> None:
    """`tokenizer.json` and `tokenizer_config.json` with exactly `vocab` tokens: two special, 256 bytes, then merges.

    Raises `InvalidRequest` when that is fewer than 258.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merged = vocab - len(_SPECIAL) - _BYTES
    if merged < 0:
        raise InvalidRequest(f"a vocabulary of {vocab} tokens; a byte-level tokenizer needs at least 258")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(_merges(letters), merged))
    tokens = [*_SPECIAL, *letters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": _SPECIAL[BOS], "eos_token": _SPECIAL[EOS]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _merges(letters: list[str]) -> Iterator[tuple[str, str]]:
    """All pairs of letters, then all pairs followed by a letter."""
    yield from product(letters, repeat=2)
    for left, middle, right in product(letters, repeat=3):
        yield left + middle, right
