"""Where a checkpoint comes from: a folder as it is, or a hub id, downloaded into the hub's own cache.

What is inside the folder is `formats/checkpoint`'s business. The only importer of huggingface_hub.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from ...formats.errors import Retryable, UnsupportedModel

PATTERNS: Final = ("*.safetensors", "*.json", "*.jinja")
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def find_source(source: str) -> Path:
    """The folder of the checkpoint named `source`.

    Raises `UnsupportedModel` when there is none, or when the hub refuses; `Retryable` when the hub cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(source):
        raise UnsupportedModel(f"{source!r} is neither a folder nor a hub id such as HuggingFaceTB/SmolLM-135M")
    return _download(source)


def _download(repository: str) -> Path:
    # A second of import and 20 MB that an ordinary folder need not pay.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(PATTERNS)))
    # The hub's own errors derive from its transport's HTTPError, which a broken connection raises bare.
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UnsupportedModel(f"the hub has no {repository} for you: {error}") from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:  # type: ignore[attr-defined]
        raise Retryable(f"{repository} could not be downloaded: {error}") from error
