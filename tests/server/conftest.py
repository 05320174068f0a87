from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from live_server import random_model, serving


@pytest.fixture(scope="session")
def live() -> Iterator[SimpleNamespace]:
    """A served model with random weights."""
    with serving(random_model()) as server:
        yield server
