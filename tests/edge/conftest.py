"""Two worker processes, and connections to them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import worker_kit as kit
from oip_kit import Front

from gkp.edge.wire.client import Connection


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Pair]:
    with kit.Pair(tmp_path_factory.mktemp("pair"), "--queue", 6) as made:
        yield made


@pytest.fixture
def left(pair: kit.Pair) -> Iterator[Connection]:
    connection = pair.connect("left")
    yield connection
    connection.close()


@pytest.fixture
def right(pair: kit.Pair) -> Iterator[Connection]:
    connection = pair.connect("right")
    yield connection
    connection.close()


@pytest.fixture
def front(pair: kit.Pair) -> Iterator[Front]:
    """The coordinator's client at the right worker's front door."""
    with pair.front("right") as made:
        yield made


@pytest.fixture
def from_left(pair: kit.Pair) -> Iterator[Connection]:
    """The left worker's connection to the right one."""
    connection = pair.connect("right", role="left")
    yield connection
    connection.close()
