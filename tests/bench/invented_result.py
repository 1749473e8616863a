"""A result of bench/report.py that nobody measured: every section filled, as a full run on a GPU would."""

from __future__ import annotations

import itertools
from typing import Any

MAPS = {
    "c3": (512, 100, 168),
    "c4": (1024, 50, 84),
    "c5": (2048, 25, 42),
    "28x28": (512, 28, 28),
    "14x14": (1024, 14, 14),
    "7x7": (2048, 7, 7),
}
DIRECTIONS = {"forward": 3, "forward+backward": 7}
LAYOUTS = ("nchw", "channels_last")
# How many times slower than the copy of as many bytes
PEERS = {"gc_cuda": 1.25, "eager": 4.0, "torch.compile": 2.5, "copy": 1.0}
BYTES_PER_MS = 3e9
LAUNCH_MS = 0.006
# Microseconds of the host: for each launch of a call, and of a replay
LAUNCH_HOST_US = 7.0
REPLAY_HOST_US = {"gc_cuda": 9.0, "eager": 21.0, "torch.compile": 15.0, "copy": 6.0}
LAUNCHES = {"gc_cuda": (3, 6), "eager": (12, 32), "torch.compile": (9, 17), "copy": (1, 1)}


def gpu_result() -> dict[str, Any]:
    """Its times are those of a formula."""
    return {
        "schema": 1,
        "length": "full",
        "date": "2026-01-02T03:04:05Z",
        "device": {
            "kind": "cuda",
            "name": "Invented GPU 80GB",
            "slug": "invented-gpu-80gb",
            "memory_bytes": 80 * 2**30,
            "cache_bytes": 50 * 2**20,
            "capability": "sm_90, 132 SMs",
            "clocks": {"sm_mhz": 1980.0, "memory_mhz": 2619.0, "power_limit_w": None},
        },
        "versions": {
            "gc_cuda": "0.1.0",
            "commit": "0123456789ab",
            "torch": "2.13.0+cu130",
            "cuda": "13.0",
            "driver": "580.1",
            "python": "3.11.7",
            "system": "Linux",
            "timm": "1.0.31",
            "torchvision": None,
        },
        "threads": 16,
        "load_average": 0.4,
        "allocator": "caching",
        "tf32": {"convolutions": True, "products": False},
        "settings": {"seconds": 0.2, "rounds": 20, "limit": 480.0},
        "samples": samples(),
        "missing": [
            {"case": "c5", "peer": "torch.compile", "reason": "not captured in a CUDA graph: no"},
            {"case": "timm seresnet50", "peer": "whole model", "reason": "No module named 'timm'"},
        ],
        "launches": [
            {"direction": direction, "layout": layout, "dtype": "float32", "fusion": "add"}
            | {"map": "c4 2x1024x50x84", "peer": peer, "launches": counts[passes == 7]}
            for (direction, passes), layout in itertools.product(DIRECTIONS.items(), LAYOUTS)
            for peer, counts in LAUNCHES.items()
            if peer != "copy"
        ],
        "kernels": kernels(),
        "memory": memory(),
        "models": models(),
        "traffic": [
            {"direction": "forward", "layout": "nchw", "map": "c3 2x512x100x168", "peer": "gc_cuda"}
            | {"formula_bytes": 3 * 2**26, "read_bytes": 2**27, "written_bytes": 2**26, "kernels": 3}
        ],
        "left_out": ["c3 8x512x100x168 nchw, forward, float32, ratio 1/16, add"],
        "wrong": [],
        "remarks": {"launches": ""},
    }


def samples() -> list[dict[str, Any]]:
    """Both ratios and batches of what was published; graphs where the batch is small."""
    found = []
    settings = [(1 / 16, 2), (1 / 16, 1), (1 / 4, 2)]
    grid = itertools.product(settings, DIRECTIONS.items(), MAPS.items(), LAYOUTS, PEERS.items())
    for (ratio, batch), (direction, passes), (stage, (c, h, w)), layout, (peer, slower) in grid:
        if "x" in stage and (ratio, batch) != (1 / 16, 2):
            continue
        n = 32 if "x" in stage else batch
        moved = passes * n * c * h * w * 4
        for cache, launch in itertools.product(("warm", "cold"), ("stream", "graph")):
            if launch == "graph" and n > 2:
                continue
            ms = slower * moved / BYTES_PER_MS * (1 + 0.2 * (cache == "cold"))
            launches = LAUNCHES[peer][passes == 7]
            ms += LAUNCH_MS * launches * (launch == "stream")
            host_us = LAUNCH_HOST_US * launches if launch == "stream" else REPLAY_HOST_US[peer]
            found.append(
                {"direction": direction, "fusion": "add", "ratio": ratio, "dtype": "float32"}
                | {"stage": stage, "shape": [n, c, h, w], "layout": layout, "peer": peer}
                | {"cache": cache, "launch": launch, "p20_ms": 0.98 * ms, "p50_ms": ms, "p80_ms": 1.03 * ms}
                | {"rounds": 20, "passes": passes, "bytes": moved, "host_us": host_us}
            )
    return found


def kernels() -> list[dict[str, Any]]:
    fields = {"stage": "c4", "shape": [2, 1024, 50, 84], "layout": "nchw", "dtype": "float32"}
    fields |= {"ratio": 1 / 16, "fusion": "add"}
    times = {
        "copy of x": (2**26, 28.0, 31.0),
        "pool_forward (mask)": (2**25, 15.0, 17.0),
        "some_new_kernel": (None, 1.0, 1.5),
        "sum": (7 * 2**25, 140.0, 160.0),
    }
    return [
        {**fields, "kernel": kernel, "bytes": moved, "warm_us": warm, "cold_us": cold}
        for kernel, (moved, warm, cold) in times.items()
    ]


def memory() -> list[dict[str, Any]]:
    inputs = {"800×1333, padded to 800×1344": [2, 3, 800, 1344], "224×224": [32, 3, 224, 224]}
    kept = {"as it is": 4.0, "accelerated": 4.0, "without blocks": 3.5}
    peak = {"as it is": 4.6, "accelerated": 4.3, "without blocks": 3.8}
    return [
        {"model": model, "input": title, "shape": shape, "variant": variant, "blocks_only": False}
        | {"kept_bytes": int(gib * 2**30), "peak_bytes": int(peak[variant] * 2**30)}
        for model in ("resnet50", "resnet101")
        for title, shape in inputs.items()
        for variant, gib in kept.items()
    ]


def models() -> list[dict[str, Any]]:
    names = ("torchvision resnet50 + GC r16", "timm gcresnet50t", "timm efficientnet_b0")
    ms = {"as it is": 20.0, "accelerated": 15.0, "without blocks": 12.0}
    return [
        {"model": name, "direction": direction, "blocks": 13, "batch": 32, "size": 224}
        | {"layout": "channels_last", "variant": variant, "rounds": 10}
        | {"p20_ms": 0.9 * time * (k + 1), "p50_ms": time * (k + 1), "p80_ms": 1.1 * time * (k + 1)}
        for name in names
        for k, direction in enumerate(("forward", "training"))
        for variant, time in ms.items()
    ]
