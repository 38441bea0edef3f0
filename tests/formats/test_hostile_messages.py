from __future__ import annotations

import pytest

from ebbflow.formats.errors import InvalidRequest
from ebbflow.formats.messages import request_decoder
from ebbflow.formats.wire import HEADER, decode


def test_deeply_nested_message():
    body = b"\x82\xa4type\xa4Ping\xa3new" + b"\x91" * 100_000 + b"\x01"
    with pytest.raises(InvalidRequest, match="not understood"):
        decode(request_decoder, [HEADER, body])
