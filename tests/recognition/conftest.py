"""Small maps stand for large ones here."""

import pytest

from gc_cuda.recognition import plan


@pytest.fixture(autouse=True)
def every_size_gains(monkeypatch):
    """Pooling and broadcast around a middle, however small the map."""
    monkeypatch.setattr(plan, "LEAST_NCHW_BYTES", 0)
    monkeypatch.setattr(plan, "LEAST_CHANNELS_LAST_BYTES", 0)
