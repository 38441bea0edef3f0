"""Asks: the client library and the command line.

::

    from ebbflow.client import Client, ensure_daemon

    ensure_daemon()
    with Client() as client, client.generate("pystd-16m", "def main(") as stream:
        for piece in stream:
            print(piece, end="")
"""

from ..formats.keys import KeyPair
from ..formats.messages import Finished, ModelDetail, Progress, Resized, Status
from ..formats.units import AUTO, SizeWish
from ..formats.values import ChatMessage, ModelSummary, PinSummary, ProcessMemory, Residency, Sampling
from . import errors
from .aio import AsyncClient
from .batch import BatchResult, BatchSummary, BatchText
from .batch_stream import AsyncBatchStream, BatchStream
from .client import Client
from .exchange import Lease
from .launch import ensure_daemon
from .stream import AsyncProgressStream, AsyncTextStream, ProgressStream, TextStream

__all__ = [
    "AUTO",
    "AsyncBatchStream",
    "AsyncClient",
    "AsyncProgressStream",
    "AsyncTextStream",
    "BatchResult",
    "BatchStream",
    "BatchSummary",
    "BatchText",
    "ChatMessage",
    "Client",
    "Finished",
    "KeyPair",
    "Lease",
    "ModelDetail",
    "ModelSummary",
    "PinSummary",
    "ProcessMemory",
    "Progress",
    "ProgressStream",
    "Residency",
    "Resized",
    "Sampling",
    "SizeWish",
    "Status",
    "TextStream",
    "ensure_daemon",
    "errors",
]
