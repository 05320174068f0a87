from __future__ import annotations

import pytest

from vicugna.training import cost


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's speed is of no interest here."""
    monkeypatch.setattr(cost, "matmul_rate", lambda dtype, device: 1e9)
