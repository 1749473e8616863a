"""Launch plans for problems that nobody foresaw: any N, C, S, dtype, layout, alignment and device. No plan
exceeds a hardware limit, computes an index beyond 32 bits inside an image, or leaves an element uncovered;
what is refused is beyond a limit that is named.

Runs on the host: 3,000 problems a run, or GC_CUDA_FUZZ of them. tests/host runs kernels from such plans.
"""

from __future__ import annotations

import os

import pytest
from test_cuda_plan import (
    BYTES,
    H200,
    KERNELS,
    MERGELESS,
    PIXEL_DOTS,
    V100,
    WHOLE_CHANNELS,
    plan,
    transform_plan,
)

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

WANTED = int(os.environ.get("GC_CUDA_FUZZ", "0"))
SETTINGS = settings(
    max_examples=(WANTED or 3000) // 2,
    derandomize=not WANTED,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
INT = 2**31 - 1
SMALLEST = {"multiprocessors": 1, "shared_bytes": 65536}
# CUDA's limits on a launch, and what the kernels are compiled for (__launch_bounds__).
GRID_X, GRID_Y, THREADS = INT, 65535, 512
IMAGE = INT - 2**17  # elements of one image

# Small, around powers of two, or anything up to the largest.
extents = (
    st.integers(1, 100)
    | st.builds(lambda power, off: max(1, 2**power + off), st.integers(0, 31), st.integers(-3, 3))
    | st.integers(1, 2**31)
)
devices = st.fixed_dictionaries(
    {
        "multiprocessors": st.integers(1, 300),
        # what a block may opt in to, from sm_75 to sm_90
        "shared_bytes": st.sampled_from([65536, 98304, 101376, 166912, 232448]),
    }
)


def planned(kernel, size, device, **options):
    """The plan, or None where it is refused for a limit that the problem does exceed."""
    images, channels, pixels = size
    try:
        return plan(kernel, *size, **options, **device)
    except ValueError as error:
        message = str(error)
        if message.startswith("one image must have fewer than"):
            assert channels * pixels > IMAGE, message
        elif message.startswith("channels must be at most"):
            assert channels > GRID_Y * 8, message
        else:
            assert message.startswith("images must be at most"), message
            assert images > GRID_X // 2**16 or images > INT, message
        return None


@SETTINGS
@given(
    kernel=st.sampled_from(KERNELS),
    size=st.tuples(extents, extents, extents),
    layout=st.sampled_from(["NCHW", "NHWC"]),
    dtype=st.sampled_from(sorted(BYTES)),
    alignment=st.sampled_from([2, 4, 8, 16]),
    device=devices,
    paths=st.sampled_from(["none", "all"]),
)
@example("broadcast", (1, 1, IMAGE), "NCHW", "float16", 16, SMALLEST, "none")
@example("broadcast", (1, 1, IMAGE // 8 * 8), "NCHW", "float16", 2, SMALLEST, "all")
@example("pool_mask", (1, IMAGE, 1), "NHWC", "float64", 8, H200, "none")
@example("pool_uniform", (INT, 1, 1), "NCHW", "float32", 16, V100, "none")
@example("pool_uniform", (INT, 1, 1), "NCHW", "float32", 16, V100, "all")
def test_kernels(kernel, size, layout, dtype, alignment, device, paths):
    _, channels, pixels = size
    if channels * pixels > IMAGE:  # most of what is drawn; keep its fair share only
        assume(channels <= 2**16 and pixels <= 2**16)
    alignment = max(alignment, BYTES[dtype])  # a tensor's elements are aligned
    options = {"layout": layout, "dtype": dtype, "alignment": alignment, "paths": paths}
    p = planned(kernel, size, device, **options)
    if p is None:
        return
    if not p.holds_channels:
        assert kernel in WHOLE_CHANNELS
        dots = "pixel_dot_normalized" if kernel.endswith("_normalized") else "pixel_dot"
        assert planned(dots, size, device, **options) is not None, "the products come first"
        p = planned(kernel, size, device, **options, dots_given=True)
        if p is None:
            return
    check_limits(p, device)
    check_coverage(p, kernel, size, layout, dtype, alignment)


def check_limits(p, device):
    grid_x, grid_y = p.grid
    assert p.threads % 32 == 0 and 32 <= p.threads <= THREADS, p
    assert 1 <= grid_x <= GRID_X and 1 <= grid_y <= GRID_Y, p
    assert p.holds_channels and 0 <= p.shared_bytes <= device["shared_bytes"], p
    # 65536 registers; the kernels are compiled for at most 128 a thread at 512 threads
    assert p.threads * 128 <= 65536, p


MERGED_BY_IMAGE = (
    *("pool_mask", "pool_logits", "pool_uniform", "broadcast_mul_backward"),
    *("pool_mask_normalized", "pool_logits_normalized", "pool_uniform_normalized", "residual_sums"),
)


def merged(parts, group):
    """Rows of partial results and counters: a row and a counter more for each group, if there are several."""
    groups = -(-parts // group)
    assert groups <= group, "the second round would be longer than the first"
    return (parts + groups, groups + 1) if groups > 1 else (parts, 1)


def check_splits(p, tiles):
    """The splits are ranges of tiles: all of them, none twice, no range empty."""
    # Paths that take no instantiation of their own are cut as what was measured.
    if not set(p.paths.split(",")) - {"none", "late_merge", "early_start"}:
        assert p.longer == 0 and (p.splits - 1) * p.tiles_per_split < tiles <= p.splits * p.tiles_per_split, p
    else:
        assert p.splits * p.tiles_per_split + p.longer == tiles, p
        assert 0 <= p.longer < p.splits and p.tiles_per_split >= 1, p


def check_coverage(p, kernel, size, layout, dtype, alignment):
    images, channels, pixels = size
    elements = 16 // BYTES[dtype]
    assert p.grid == (images * p.splits, p.chunks), p
    if p.flat:
        assert kernel in ("broadcast", "residual") and layout == "NCHW" and pixels % elements, p
        assert p.width == elements and channels * pixels % elements == 0 and alignment % 16 == 0, p
        tile = p.threads * p.rows * elements
        check_splits(p, -(-channels * pixels // tile))
        assert (p.splits * p.tiles_per_split + p.longer) * tile < 2**32, "offsets are unsigned"
        assert p.workspace == p.tickets == 0, p
        return
    # The threads of a block hold its tile, no element twice.
    assert p.tile_channels * p.tile_pixels == p.threads * p.rows * elements, p
    tiles = -(-pixels // p.tile_pixels)
    check_splits(p, tiles)
    # The chunks are ranges of channels, likewise; pixel_dot walks over the channels by itself.
    if kernel in PIXEL_DOTS:
        assert p.chunks == 1, p
    else:
        assert (p.chunks - 1) * p.tile_channels < channels <= p.chunks * p.tile_channels, p
    # No load straddles a row's end, none is misaligned: rows begin at multiples of the extent.
    extent = channels if layout == "NHWC" else pixels
    assert p.width in (1, 2, 4, 8) and p.width <= elements, p
    assert extent % p.width == 0 and alignment % (p.width * BYTES[dtype]) == 0, p
    # Offsets inside an image are 32-bit, also those past its end that only a predicate keeps from memory.
    over_pixels, over_channels = tiles * p.tile_pixels, p.chunks * p.tile_channels
    assert (channels - 1) * pixels + over_pixels <= INT and (pixels - 1) * channels + over_channels <= INT, p
    # What is merged has room, and a counter for each merge.
    of_all = ("pool_backward_mask", "pool_backward_block", "pool_backward_normalized")
    merges = p.splits > 1 or kernel in of_all
    if kernel == "statistics":
        groups = -(-p.splits // p.group)
        rows, tickets = (p.splits + groups, images * groups + 1) if p.group > 1 else (p.splits, 1)
        assert p.workspace == 3 * images * rows * channels and p.tickets == tickets * p.chunks, p
        # Neither round is longer than the other needs.
        assert p.group <= p.splits and (p.group > 1 or images * p.splits <= 16 or p.splits == 1), p
    elif kernel in MERGED_BY_IMAGE and p.splits > 1:
        rows, tickets = (p.splits, 0) if "late_merge" in p.paths else merged(p.splits, p.group)
        assert p.workspace >= images * rows * channels and p.tickets == images * p.chunks * tickets, p
    elif kernel in of_all:
        rows, tickets = merged(images * p.splits, p.group)
        assert p.workspace == rows * channels and p.tickets == tickets * p.chunks, p
    elif not merges or kernel in ("pool_backward_logits", *MERGELESS):
        assert p.workspace == p.tickets == 0, p


@SETTINGS
@given(
    size=st.tuples(extents, extents),
    hidden=st.lists(extents, min_size=1, max_size=2),
    dtype=st.sampled_from(sorted(BYTES)),
    pairs=st.booleans(),
    device=devices,
)
def test_transform(size, hidden, dtype, pairs, device):
    images, channels = size
    wide = 8 if dtype == "float64" else 4
    most = INT - 2**20
    arguments = (images, channels, hidden, dtype, pairs)
    if max(images * channels, max(hidden) * channels, images * max(hidden)) > most:
        assume(channels <= 2**16)  # keep a fair share only
        for pass_ in ("forward", "backward"):
            with pytest.raises(ValueError, match=r"images x channels, .* must each be at most"):
                transform_plan(pass_, *arguments, **device)
        return

    p = transform_plan("backward", *arguments, **device)
    assert p.slab_steps in (1, 2, 4) and p.shared_bytes <= 48 * 1024, p
    assert len(p.blocks) == 3 and all(1 <= blocks <= 2 * device["multiprocessors"] for blocks in p.blocks), p
    # For each branch: sums of W2's and of W1's products over slabs of rows, and two gradients of [N, P].
    slab = 32 * p.slab_steps
    wanted = sum(
        -(-channels // slab) * images * units + 2 * images * units + -(-units // slab) * images * channels
        for units in hidden
    )
    assert p.workspace == wanted, p

    try:
        p = transform_plan("forward", *arguments, **device)
    except ValueError as error:
        assert str(error).startswith("hidden units must be at most"), error
        assert (max(hidden) + 528) * wide > device["shared_bytes"] - 64, error
        return
    assert len(p.blocks) == 2 and all(1 <= blocks <= 2 * device["multiprocessors"] for blocks in p.blocks), p
    assert p.shared_bytes <= device["shared_bytes"], p
    assert 1 <= p.tile_images <= min(images, 8) and all(share in (1, 2, 4, 8) for share in p.shares), p
    assert p.tile_images * max(hidden) * wide <= p.shared_bytes, p
    assert p.workspace == images * sum(hidden), p
    assert p.width == 1 or (pairs and not any(number % 2 for number in (channels, *hidden))), p
