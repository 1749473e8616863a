"""Modules that gc_cuda 0.1.0 pickled load, run and are restored (see tests/models/old_files/README.md)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from block_cases import Spy

import gc_cuda
from gc_cuda.models import swap

FOLDER = Path(__file__).parent / "old_files"
NEEDS = {
    "registered_mmcv": "mmcv",
    "accelerated_mmcv": "mmcv",
    "accelerated_timm": "timm",
    "accelerated_timm_se": "timm",
    "accelerated_torchvision": "torchvision",
    "inserted_torchvision": "torchvision",
}
FILES = sorted(path.stem for path in FOLDER.glob("*.pt"))


def test_every_kind_is_there():
    assert set(NEEDS) < set(FILES) and len(FILES) == 10


@pytest.fixture(params=FILES)
def old(request):
    if request.param in NEEDS:
        pytest.importorskip(NEEDS[request.param])
    return torch.load(FOLDER / f"{request.param}.pt", weights_only=False)


def test_it_computes_what_it_did(old):
    module, x, y = old["module"], old["x"], old["y"]
    with torch.no_grad(), Spy() as spy:
        out = module(x)
    torch.testing.assert_close(out, y, rtol=1e-5, atol=1e-5)
    assert any(name.startswith("gc_cuda::") for name in spy.names())


def test_it_trains_is_copied_and_saved_again(old, tmp_path):
    module, x = old["module"], old["x"]
    twin = copy.deepcopy(module)
    torch.save(module, tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=False)
    for one in (module, twin, again):
        one(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        for one in (twin, again):
            assert torch.equal(one.get_parameter(name).grad, parameter.grad)


def test_it_is_restored(old):
    module, x, y = old["module"], old["x"], old["y"]
    gc_cuda.restore(module)
    kinds = [type(part) for part in module.modules()]
    assert not any(kind.__name__.startswith("Accelerated") for kind in kinds)
    torch.testing.assert_close(module(x), y, rtol=1e-5, atol=1e-5)
    assert gc_cuda.accelerate(module) is not None
    assert [swap.innermost(type(part)) for part in module.modules()] == list(map(swap.innermost, kinds))
