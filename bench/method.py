"""How bench/report.py measures, in the words of its page."""

from __future__ import annotations

from typing import Any

LIMIT = (
    "100 % is the time of a copy that reads and writes, together, as many bytes as the block must by the formula, "
    "measured in the same run, in turn with the peers. A share above 100 % is possible where the block finds in the "
    "cache what it has read before: x is read twice forward, and the copy never reads a byte twice."
)
PASSES = (
    "A pass is a read or a write of a tensor of x's size (`channel_add`). Passes are counted in the algorithm, "
    "launches on the GPU by torch.profiler (kernels, memsets and memcpys of one call)."
)
KERNELS = (
    "A training step (forward + backward); medians of the profiler's durations, without the gaps between launches. "
    "GB/s: the bytes that the kernel must move by the formula, in that time."
)
TRAFFIC = (
    "One call under Nsight Compute, which empties the caches before every kernel: what one kernel could leave there for "
    "the next is read again, and what was written may leave the cache only after its kernel."
)
MEMORY = (
    'Ratio 1/16, float32, a block in every bottleneck of c3 to c5. "Kept": the storages of all tensors that autograd '
    "saves for the backward pass, each once, without parameters, found by saved_tensors_hooks under FakeTensorMode, "
    "which runs the model on shapes alone; it needs no GPU, and nothing in it is an estimate. Eager's block keeps the "
    "same x as ours (which autograd needs either way), so that its cost over ours is in the peak: the temporaries of its "
    'backward pass. "Peak": torch.cuda.max_memory_allocated of a real training step beyond the model, its gradients and '
    "its input; only where there is a GPU and torchvision."
)
MODELS = (
    "The three variants are timed in turn, in one process, outputs compared before; without blocks is what no block "
    "could be faster than."
)
PUBLISHED = (
    "Mask R-CNN with FPN at 800×1333 (padded to 800×1344), GC in c3 to c5, 2 images per GPU in training: what the whole "
    "detector took without → with the blocks, and the difference. Beside it what the blocks alone take here: the times "
    "of c3, c4 and c5 times the number of blocks (4, 6, 3; 4, 23, 3 in R101 and X101), NCHW, float32; training: forward "
    "and backward at batch 2; inference: forward at batch 1. The one is a difference of whole programs of 2019 on "
    "another GPU, the other a sum of blocks: read them as orders of magnitude."
)


def section(result: dict[str, Any]) -> list[str]:
    """What was done, and how to do it again."""
    settings = result["settings"]
    cache = result["device"]["cache_bytes"] / 2**20
    cpu = result["device"]["kind"] == "cpu"
    lines = [
        "## Method",
        "",
        "- Repeat it: `python bench/report.py"
        + (" --quick" if result["length"] == "quick" else "")
        + "`; this page "
        f"again from its data: `python bench/report.py --render {result['device']['slug']}.json`.",
        "- Every peer's output and gradients are compared with the reference in float64 before it is timed; what is wrong "
        "is not timed and fails the run. Eager is `gc_cuda.reference.ContextBlock`, torch.compile the same through "
        "Inductor, static shapes.",
        "- The peers and the copy take turns, one call each per round, each round beginning with another one; at least "
        f"{settings['rounds']} rounds and {settings['seconds']} s for each series where that is not too long. All figures are medians; "
        "the 20th and 80th percentile are in the data.",
        f"- Warm: the same call again and again. Cold: before every call, a buffer of {5 * cache:.0f} MiB, five times the "
        "last-level cache, is overwritten, and the device is idle when the call begins.",
        "- Bytes are those of the formula (passes × size of x; parameters left out), not what a peer moved: 3 passes "
        "forward, 7 forward and backward (8 with `channel_mul`).",
        "- Forward runs without gradients; forward+backward gives the gradients of x and of all parameters from a dense "
        "random gradient of the output.",
    ]
    if cpu:
        lines += [
            f"- Times are those of the clock, freeing the result included; {result['threads']} threads. Outputs get "
            f"{result['allocator']}: glibc maps every block above 32 MiB anew, which costs page faults, whoever computes "
            "it; the copy's target is there already, and the clone of x in the data has the same fresh pages.",
        ]
    else:
        lines += [
            "- Times are those of CUDA events around a call on an idle stream, so that they hold what Python and the "
            "launches cost where the GPU waits for them. At batch 1 and 2 the same calls are captured in CUDA graphs and "
            "replayed, the peers' too. Clocks are read, never set.",
        ]
    return lines
