"""What was published about the block on V100s, and what was measured beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import method
from cases import FORWARD, TRAINING
from markdown_text import NOTHING, number, table
from peers import COMPILED, EAGER, OURS
from samples import STREAM, Comparison, Sample, comparisons, samples_of

Result = dict[str, Any]

# Blocks in c3, c4 and c5: one in every bottleneck
BLOCKS = {"R50": {"c3": 4, "c4": 6, "c5": 3}, "R101": {"c3": 4, "c4": 23, "c5": 3}}
BLOCKS["X101"] = BLOCKS["R101"]


class Published(NamedTuple):
    """Mask R-CNN with FPN at 800×1333 on V100s, as published; without and with the blocks."""

    backbone: str
    norm: str
    ratio: float
    seconds: tuple[float, float]  # of a training iteration
    fps: tuple[float, float]  # of inference
    gigabytes: tuple[float, float]  # of training memory

    @property
    def training_ms(self) -> float:
        """What the blocks add to an iteration."""
        return 1e3 * (self.seconds[1] - self.seconds[0])

    @property
    def inference_ms(self) -> float:
        """What they add to an image."""
        return 1e3 / self.fps[1] - 1e3 / self.fps[0]


PUBLISHED = (
    Published("R50", "fixed BN", 1 / 16, (0.453, 0.533), (10.6, 10.1), (3.9, 4.5)),
    Published("R50", "fixed BN", 1 / 4, (0.453, 0.533), (10.6, 9.9), (3.9, 4.6)),
    Published("R101", "fixed BN", 1 / 16, (0.571, 0.731), (9.5, 8.6), (5.8, 7.0)),
    Published("R101", "fixed BN", 1 / 4, (0.571, 0.747), (9.5, 8.6), (5.8, 7.1)),
    Published("X101", "SyncBN", 1 / 16, (0.912, 1.055), (8.5, 7.7), (7.1, 8.2)),
    Published("X101", "SyncBN", 1 / 4, (0.912, 1.037), (8.5, 7.6), (7.1, 8.3)),
)
SOURCES = (
    "Cao, Xu, Lin, Wei, Hu: GCNet ([arXiv:1904.11492](https://arxiv.org/abs/1904.11492)), and the table "
    '"Main Results" of its model zoo ([github.com/xvjiarui/GCNet](https://github.com/xvjiarui/GCNet)): '
    "8 NVIDIA Tesla V100, PyTorch 1.1.0, CUDA 9.0, cuDNN 7.0"
)


def of_backbone(
    samples: list[Sample], backbone: str, ratio: float, direction: str, batch: int, cache: str
) -> Comparison | None:
    """The blocks of a backbone summed, NCHW as there; None where not all maps were measured."""
    total: dict[str, float] = {}
    peers: dict[str, Sample] = {}
    wanted = {"direction": direction, "ratio": ratio, "dtype": "float32", "fusion": "add", "layout": "nchw"}
    rows = comparisons([s for s in samples if s.batch == batch], cache=cache, launch=STREAM, **wanted)
    stages = {row.any.stage: row for row in rows}
    if not set(BLOCKS[backbone]) <= set(stages):
        return None
    for stage, count in BLOCKS[backbone].items():
        for peer, one in stages[stage].peers.items():
            total[peer] = total.get(peer, 0.0) + count * one.p50_ms
            peers[peer] = one
    return Comparison({peer: peers[peer]._replace(p50_ms=ms) for peer, ms in total.items()})


def section(result: Result, measured: Sequence[Result], cache: str) -> list[str]:
    samples = samples_of(result)
    rows = []
    for p in PUBLISHED:
        cells = [f"{p.backbone}, {p.norm}, r{1 / p.ratio:.0f}"]
        cells += [f"{p.seconds[0]:.3f} → {p.seconds[1]:.3f}", f"+{p.training_ms:.0f}"]
        cells += [
            f"{p.fps[0]} → {p.fps[1]}",
            f"+{p.inference_ms:.1f}",
            f"{p.gigabytes[0]} → {p.gigabytes[1]}",
        ]
        for direction, batch in ((TRAINING, 2), (FORWARD, 1)):
            here = of_backbone(samples, p.backbone, p.ratio, direction, batch, cache)
            cells += [number(here.ms(peer)) if here else NOTHING for peer in (EAGER, COMPILED, OURS)]
        rows.append(cells)
    titles = ["backbone", "V100: s per iteration", "ms of that", "V100: images/s", "ms of that", "V100: GB"]
    titles += [f"here, training, {p}: ms" for p in ("eager", "torch.compile", "gc_cuda")]
    titles += [f"here, inference, {p}: ms" for p in ("eager", "torch.compile", "gc_cuda")]
    lines = [
        "## Beside what was published for V100s",
        "",
        f"{method.PUBLISHED} The cache is {cache}. Source: {SOURCES}.",
    ]
    return [*lines, "", *table(titles, rows), "", gpus_sentence([*measured, result])]


def gpus_sentence(results: Sequence[Result]) -> str:
    """Which GPUs there are results of, and whether a V100 is among them."""
    found = {r["device"]["name"]: r for r in results if r["device"]["kind"] == "cuda"}
    v100 = any("V100" in name for name in found)
    if not found:
        return "**No GPU has been measured: neither a V100 nor any other.**"
    names = ", ".join(
        f"{name} ({r['date'][:10]}, commit {r['versions']['commit'] or 'unknown'})"
        for name, r in sorted(found.items())
    )
    rest = "and a V100 is among them" if v100 else "and no other; **no V100 has been measured**"
    return f"GPUs that have been measured: {names}; {rest}."
