"""How bench/report.py measures, in the words of its page."""

from __future__ import annotations

from typing import Any

from timing import HOST_CALLS, HOST_ROWS, HOST_SECONDS


def prose(text: str) -> str:
    """One line of Markdown."""
    return " ".join(text.split())


LIMIT = prose(
    """
    100 % is the time of a copy that reads and writes, together, as many bytes as the block must by the
    formula, measured in the same run, in turn with the peers. A share above 100 % is possible where a block
    finds in the cache what it has read before (x is read twice forward, and the copy reads no byte twice),
    or, with a warm cache, where x fits into the cache and the copy's buffers do not.
    """
)
PASSES = prose(
    """
    A pass is a read or a write of a tensor of x's size (`channel_add`). Passes are counted in the algorithm,
    not measured; launches are counted on a GPU by torch.profiler (kernels, memsets and memcpys of one call).
    """
)
GRAPHS = prose(
    """
    Milliseconds, plain stream → replay of a CUDA graph, for every peer. What Python and the launches cost is
    in the first and not in the second. Faster and share: among the replays.
    """
)
HOST = prose(
    """
    Host µs, beside the milliseconds on the GPU: how long a call keeps the host busy, from the call until it
    returns, which is what a program that runs ahead of the GPU waits for. On the plain stream that is Python
    and every launch, for a CUDA graph the replay.
    """
)
KERNELS = prose(
    """
    A training step (forward + backward); medians of the profiler's durations, without the gaps between
    launches. GB/s: the bytes that the kernel must move by the formula, in that time. pool_forward weighs the
    pixels by the softmax of the mask forward, and uniformly for the gradient's sums backward.
    """
)
TRAFFIC = prose(
    """
    One call under Nsight Compute, which empties the caches before every kernel: what one kernel could leave
    there for the next is read again, and what was written may leave the cache only after its kernel.
    """
)
MEMORY = prose(
    """
    Ratio 1/16, float32, a block in every bottleneck of c3 to c5. "Kept": the storages of all tensors that
    autograd saves for the backward pass, each once, without parameters, found by saved_tensors_hooks under
    FakeTensorMode, which runs the model on shapes alone: it needs no GPU, and nothing in it is an estimate.
    Both blocks keep x and hardly anything else. Where a bottleneck's tail is one operation, "gc_cuda", x is
    not kept either; "blocks only" leaves the tails as they are. What eager's backward pass needs besides are
    temporaries, which are in the peak. "Peak": torch.cuda.max_memory_allocated of a real training step beyond
    the model, its gradients and its input, where there are a GPU and torchvision. Without torchvision, only
    the blocks of the model are accounted for. Backbones have no classifier, need no framework and are
    accounted for on meta tensors, as the CPU runs them; SE is in every bottleneck, and norm_eval is
    mmdetection's training: batch norm by running statistics.
    """
)
MODELS = prose(
    """
    The variants are timed in turn, in one process, and their outputs are compared before. No block by itself
    could be faster than no block: that is what "without blocks" is for. A tail that is one operation could:
    it moves less than the plain tail's operations do. "block only" leaves the tails as they are.
    """
)
PUBLISHED = prose(
    """
    Published: Mask R-CNN with FPN at 800×1333 (padded to 800×1344), GC in c3 to c5, 8 V100s, without → with
    the blocks, and the difference. Here: what the blocks alone take, which is the times of c3, c4 and c5
    times the number of blocks (R50: 4, 6, 3; R101 and X101: 4, 23, 3), NCHW, float32, plain stream; training
    is forward and backward at batch 2, inference forward at batch 1. The one is a difference of whole
    programs of 2019 on another GPU, the other a sum of blocks: read them as orders of magnitude. – is what
    this run did not measure.
    """
)


def section(result: dict[str, Any]) -> list[str]:
    """What was done, and how to do it again."""
    settings, device = result["settings"], result["device"]
    flush = 5 * device["cache_bytes"] / 2**20
    quick = " --quick" if result["length"] == "quick" else ""
    points = [
        f"""Repeat it: `python bench/report.py{quick}`; this page again from its data: `python
        bench/report.py --render {device["slug"]}.json`.""",
        """Every peer's output and gradients are compared with the reference in float64 before it is timed;
        what is wrong is not timed and fails the run. Eager is `gc_cuda.reference.ContextBlock`,
        torch.compile the same through Inductor, with static shapes.""",
        f"""The peers and the copy take turns, one call each per round, each round beginning with another
        one, for {settings["seconds"]} s and {settings["rounds"]} rounds (fewer rounds where they take four
        times as long). All figures are medians; the 20th and 80th percentiles are below and in the data.""",
        f"""Warm: the same call again and again. Cold: before every call, a buffer of {flush:.0f} MiB, five
        times the last-level cache, is overwritten; the call begins when that is over.""",
        """Bytes are those of the formula (passes × size of x; parameters left out), not what a peer moved: 3
        passes forward, 7 forward and backward, 8 with `channel_mul`.""",
        """Forward runs without gradients; forward+backward gives the gradients of x and of all parameters
        from a dense random gradient of the output.""",
    ]
    if device["kind"] == "cpu":
        points.append(
            f"""Times are those of the clock, freeing the result included. Outputs get {result["allocator"]}:
            by default glibc maps every block above 32 MiB anew, which costs page faults, whoever computes
            it. The copy's target is there already; the clone of x in the data gets its memory as the outputs
            do."""
        )
    else:
        points.append(
            """Times are those of CUDA events around a call on an idle stream, so that they hold what Python
            and the launches cost where the GPU waits for them. At batch 1 and 2 the same calls, the peers'
            too, are captured in CUDA graphs and replayed. Clocks are read, never set."""
        )
    if any("host_us" in entry for entry in result["samples"]):
        points.append(
            f"""Host µs are those of the clock: {HOST_CALLS} calls in a row on an idle GPU, over their number,
            the peers in turn; nothing in between waits for the GPU, and so few calls do not fill the queue of
            launches, which would make the host wait. Medians of 3 to {HOST_ROWS} rows, {HOST_SECONDS} s for
            all peers; measured once for each way of launching, whatever the cache."""
        )
    return ["## Method", "", *(f"- {prose(point)}" for point in points)]
