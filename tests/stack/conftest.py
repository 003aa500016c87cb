"""One local stack for all tests of this folder: every server, Triton with models of random weights, the gateway."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from editx.stack.process import free_ports
from editx.stack.stack import SPAN, Options, Stack
from tests.fixtures.tiny import with_reward

WEBHOOK_SECRET = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes....").decode()


@pytest.fixture(scope="session")
def stack(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    options = Options(
        port=free_ports(SPAN),
        checkpoint=str(with_reward(tiny, tmp_path_factory.mktemp("judged") / "tiny")),
        lease_s=4.0,
        settings={
            "EDITX_SWEEP_EVERY_S": "1",
            "EDITX_WEBHOOK_SECRET": WEBHOOK_SECRET,
            "EDITX_WEBHOOK_ALLOWED_HOSTS": '["127.0.0.1"]',
        },
    )
    stack = Stack(tmp_path_factory.mktemp("stack"), options)
    try:
        stack.up()
        yield stack
    finally:
        stack.down()
