"""Two processes that train on half of a batch each, by DDP and by FSDP2, get the gradients and parameters of
one process with the whole batch. On the CPU over gloo; on GPUs, where there are two, over nccl.
"""

from __future__ import annotations

from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import torch.distributed
from evaluate import missing_gpu
from processes import run_processes
from small_net import new_net

WORKER = Path(worker.__file__)
TAILS_WORKER = WORKER.with_name("distributed_tails_worker.py")
SYNC_WORKER = WORKER.with_name("sync_tails_worker.py")
NO_GPU = missing_gpu()


def has_fsdp2():
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(
    "device_type",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
            ],
        ),
    ],
)
@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        pytest.param("fsdp", marks=pytest.mark.skipif(not has_fsdp2(), reason="this torch has no FSDP2")),
    ],
)
def test_two_processes_equal_one(kind, device_type, tmp_path):
    run_processes(WORKER, kind, str(tmp_path), device_type)
    if kind == "fsdp" and not (tmp_path / "fsdp.pt").exists():
        pytest.skip("FSDP2 of this torch sums the gradients of a plain layer where it should average them")
    *gradients, parameters = torch.load(tmp_path / f"{kind}.pt")

    net = new_net().to(device_type)
    expected = worker.train(net, slice(None), torch.device(device_type))
    for step, (actual, one) in enumerate(zip(gradients, expected)):
        assert actual.keys() == one.keys()
        for name, gradient in one.items():
            message = f"gradient of {name} in step {step}"
            tolerance = {"rtol": 1e-4, "atol": 1e-5 * max(1.0, float(gradient.abs().max()))}
            torch.testing.assert_close(
                actual[name], gradient, msg=lambda m, message=message: f"{message}: {m}", **tolerance
            )
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameters[name], worker.whole(parameter), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_tails():
    """DDP with a static graph, with buffers broadcast or not, with a search for unused parameters."""
    assert run_processes(TAILS_WORKER).count("compared") == 2


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize(
    "device_type",
    [
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU != "", reason=NO_GPU or "-")]),
    ],
)
def test_tails_with_a_sync_batch_norm(device_type):
    """On GPUs over nccl where there are two; else two processes share one, over gloo."""
    assert run_processes(SYNC_WORKER, device_type).count("compared") == 2
