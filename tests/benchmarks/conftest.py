"""Scripted timings must not depend on what else this machine does."""

from __future__ import annotations

import pytest

from cohobate.benchmarks import machine


class Quiet:
    """A machine of our own."""

    def cores(self) -> float:
        return 0.0


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Others", Quiet)
