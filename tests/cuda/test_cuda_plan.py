"""Launch plans of the CUDA kernels: every plan covers its problem and stays within what a launch can be.

Plans are computed on the host, so all of this runs without a GPU. What the planned kernels then compute is
checked in tests/host, which runs them on the CPU from the same plans.
"""

import importlib
import itertools

import pytest

import gc_cuda  # noqa: F401  (loads torch, whose libraries the extension needs)

extension = importlib.import_module("gc_cuda._C")
plan, transform_plan = extension.plan, extension.transform_plan

KERNELS = (
    "pool_mask",
    "pool_logits",
    "pool_uniform",
    "pool_backward_mask",
    "pool_backward_logits",
    "pool_backward_block",
    "pixel_dot",
    "broadcast",
    "broadcast_mul_backward",
    "pool_mask_normalized",
    "pool_logits_normalized",
    "pool_uniform_normalized",
    "pixel_dot_normalized",
    "residual",
    "statistics",
    "residual_sums",
    "grad_y",
    "pool_backward_normalized",
)
# These walk over all channels of a pixel; and these merge nothing.
PIXEL_DOTS = ("pixel_dot", "pixel_dot_normalized")
MERGELESS = (*PIXEL_DOTS, "broadcast", "residual", "grad_y")
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
WHOLE_CHANNELS = {
    "pool_mask",
    "pool_mask_normalized",
    "pool_backward_mask",
    "pool_backward_logits",
    "pool_backward_block",
    "pool_backward_normalized",
}
V100 = {"multiprocessors": 80, "shared_bytes": 98304}
H200 = {"multiprocessors": 132, "shared_bytes": 232448}

# (images, channels, pixels)
PROBLEMS = {
    "one element": (1, 1, 1),
    "c3 of an 800x1333 image": (2, 512, 16800),
    "c4": (2, 1024, 4200),
    "c5: pixels a multiple of 2 only": (1, 2048, 1050),
    "7x7 maps of a large batch": (32, 2048, 49),
    "odd everything": (3, 199, 1134 + 3),
    "more channels than a block holds": (1, 20000, 7),
    "one channel, many pixels": (1, 1, 1 << 24),
    "more images than a grid's y": (70000, 3, 5),
}


@pytest.mark.parametrize("device", [V100, H200], ids=["V100", "H200"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_element_is_covered_once_within_the_limits_of_a_launch(kernel, problem, device):
    images, channels, pixels = problem
    for layout, dtype, paths in itertools.product(("NCHW", "NHWC"), BYTES, ("none", "all")):
        p = plan(kernel, images, channels, pixels, layout, dtype, paths=paths, **device)

        assert p.threads % 32 == 0 and 32 <= p.threads <= 512, p
        grid_x, grid_y = p.grid
        assert grid_x == images * p.splits < 2**31 and 1 <= grid_y <= 65535, p
        assert p.shared_bytes <= device["shared_bytes"] or not p.holds_channels, p

        # A flat tile is a run of elements, whatever their channel.
        tile, extent = (
            (p.threads * p.rows * p.width, channels * pixels) if p.flat else (p.tile_pixels, pixels)
        )
        covered = (p.splits * p.tiles_per_split + p.longer) * tile
        assert covered >= extent, p
        last_split_begins = covered - p.tiles_per_split * tile
        assert last_split_begins < extent, f"an empty split: {p}"
        if p.flat:
            continue
        if p.holds_channels and kernel not in PIXEL_DOTS:
            assert p.chunks * p.tile_channels >= channels > (p.chunks - 1) * p.tile_channels, p

        extent = channels if layout == "NHWC" else pixels
        assert extent % p.width == 0 and p.width * BYTES[dtype] <= 16, p


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kernel", sorted(WHOLE_CHANNELS))
def test_blocks_hold_all_channels_of_a_resnet(kernel, layout):
    for dtype in ("float32", "float16", "bfloat16"):
        for channels in (64, 256, 512, 1024, 2048):
            p = plan(kernel, 2, channels, 4200, layout, dtype)
            assert p.holds_channels and p.chunks == 1 and p.tile_channels >= channels, p


@pytest.mark.parametrize("kernel", sorted(WHOLE_CHANNELS))
def test_too_many_channels_for_a_block_ask_for_the_dot_products_first(kernel):
    assert not plan(kernel, 1, 20000, 64).holds_channels
    assert plan(kernel, 1, 20000, 64, dots_given=True).holds_channels


def test_the_width_of_loads_follows_alignment_and_extent():
    assert plan("pool_uniform", 1, 8, 64).width == 4
    assert plan("pool_uniform", 1, 8, 64, alignment=8).width == 2
    assert plan("pool_uniform", 1, 8, 1050).width == 2
    assert plan("pool_uniform", 1, 8, 49).width == 1
    assert plan("pool_uniform", 1, 8, 49, "NHWC").width == 4
    assert plan("pool_uniform", 1, 8, 64, dtype="float16").width == 8
    assert plan("pool_uniform", 1, 8, 64, dtype="float16", alignment=2).width == 1
    assert plan("pool_uniform", 1, 8, 64, dtype="float64").width == 2


def test_a_broadcast_over_odd_rows_takes_the_image_as_one_run_of_full_vectors():
    p = plan("broadcast", 2, 2048, 1050)
    assert p.flat and p.width == 4, p
    assert plan("broadcast", 32, 2048, 49, dtype="float16").width == 8
    for other in (
        plan("broadcast", 2, 512, 16800),  # its rows are full vectors
        plan("broadcast", 2, 2048, 1050, "NHWC"),
        plan("broadcast", 2, 3, 49),  # the next image would begin inside a vector
        plan("broadcast", 2, 2048, 1050, alignment=8),
    ):
        assert not other.flat, other


@pytest.mark.parametrize("kernel", ["pool_mask", "pool_backward_mask", "pool_backward_block"])
def test_nchw_tiles_of_a_resnet_take_fair_segments_of_memory(kernel):
    for channels, pixels in ((512, 16800), (1024, 4200), (2048, 1050)):
        for dtype in ("float32", "float16", "bfloat16"):
            p = plan(kernel, 2, channels, pixels, "NCHW", dtype)
            # A thread's registers hold half as many channels in the 16-bit types.
            fair = 32 if channels == 2048 and dtype != "float32" else 64
            assert p.tile_pixels * BYTES[dtype] >= fair, p


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_one_large_image_fills_the_device(layout):
    p = plan("pool_mask", 1, 512, 16800, layout)
    assert p.grid[0] >= 132, p


def test_a_large_batch_is_not_split_and_needs_no_merge():
    p = plan("pool_mask", 1024, 64, 196)
    assert p.splits == 1 and p.workspace == 0 and p.tickets == 0, p


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (
            (1, 65536, 65536),
            r"one image must have fewer than \d+ elements, got 65536 channels x 65536 pixels",
        ),
        ((2**31, 4, 4), r"images must be at most \d+, got 2147483648"),
        ((1, 0, 4), "needs images, channels and pixels"),
    ],
)
def test_what_no_launch_can_serve_is_refused(problem, message):
    with pytest.raises(ValueError, match=message):
        plan("broadcast", *problem)


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"kernel must be one of pool_mask, .*, got pool"):
        plan("pool", 1, 1, 1)
    with pytest.raises(
        ValueError, match="dtype must be one of float32, float16, bfloat16, float64, got int8"
    ):
        plan("broadcast", 1, 1, 1, dtype="int8")


def test_a_plan_prints_as_one_line_that_says_it_all():
    line = str(plan("pool_mask", 2, 512, 16800))
    assert line.startswith("pool_mask float32 NCHW 2x512x16800: ") and "\n" not in line
    for word in ("rows", "loads of 16 bytes", "threads", "splits", "grid", "shared", "workspace", "tickets"):
        assert word in line


# (images, channels, pixels) of the maps that uniform pooling and the flat broadcast meet.
REAL = [
    *((batch, *c) for batch in (1, 2, 8) for c in ((512, 16800), (1024, 4200), (2048, 1050))),
    (64, 256, 3136),
    (32, 2048, 49),
]


def used(p):
    """Blocks that run at once in the last wave or before, and their share of the slots of all waves."""
    slots = H200["multiprocessors"] * p.resident
    blocks = p.grid[0] * p.grid[1]
    return min(blocks, slots), blocks / (-(-blocks // slots) * slots)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("problem", REAL, ids=str)
@pytest.mark.parametrize("kernel", ["pool_uniform", "broadcast"])
def test_a_full_machine_has_no_fewer_blocks_at_once(kernel, problem, layout):
    for dtype in ("float32", "float16", "bfloat16"):
        old = plan(kernel, *problem, layout, dtype, **H200)
        p = plan(kernel, *problem, layout, dtype, paths="full_machine", **H200)
        if kernel == "broadcast" and not p.flat:
            assert p.paths == "none" and str(p) == str(old), p
            continue
        assert p.paths == "full_machine" and p.threads <= 256, p
        registers = 80 if p.flat else 64
        assert p.resident == min(65536 // 4 // (32 * registers) * 4 // (p.threads // 32), 16), p
        (before, share_before), (now, share) = used(old), used(p)
        tile, extent = (
            (p.threads * p.rows * p.width, problem[1] * problem[2]) if p.flat else (p.tile_pixels, problem[2])
        )
        no_more_tiles = p.splits == -(-extent // tile)
        assert no_more_tiles or share >= share_before, (old, p)
        assert no_more_tiles or share > 0.95, p
        if kernel == "pool_uniform":
            assert now >= before, (old, p)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_c4_takes_nearly_every_slot(layout, dtype):
    """It was the worst: 224 of 264, and 192 of halves."""
    p = plan("pool_uniform", 2, 1024, 4200, layout, dtype, paths="full_machine", **H200)
    assert used(p)[1] > 0.95, p
    assert p.tiles_per_split * p.splits + p.longer == -(-4200 // p.tile_pixels), p


def test_splits_of_a_full_machine_differ_by_one_tile():
    p = plan("pool_uniform", 2, 1024, 4200, paths="full_machine", **H200)
    assert (p.splits, p.tiles_per_split, p.longer) == (16, 2, 1), p
    assert "16 splits of 2 or 3 tiles" in str(p) and str(p).endswith("; full_machine"), p


def test_neighbours_are_for_loads_of_less_than_a_vector():
    for problem, layout, dtype, narrow in (
        ((2, 2048, 1050), "NCHW", "float32", True),
        ((2, 2048, 1050), "NCHW", "float16", True),
        ((2, 2048, 1050), "NHWC", "float16", False),
        ((2, 1024, 4200), "NCHW", "float32", False),
        ((2, 33, 4200), "NHWC", "float32", True),
    ):
        for others in ("", "full_machine"):
            p = plan(
                "pool_uniform", *problem, layout, dtype, paths=",".join(filter(None, (others, "neighbours")))
            )
            assert p.paths == (",".join(filter(None, (others, "neighbours" if narrow else ""))) or "none"), p
    for kernel in KERNELS:
        if kernel != "pool_uniform":
            assert "neighbours" not in plan(kernel, 2, 2048, 1050, paths="all").paths


TRANSFORMS = {
    "one of everything": (1, 1, [1]),
    "c4 at ratio 1/16": (2, 1024, [64]),
    "c5 at ratio 1/4, both branches": (2, 2048, [512, 512]),
    "7x7 maps of a large batch": (256, 2048, [128]),
    "odd everything": (3, 199, [33, 7]),
    "as many hidden units as a V100's block has memory for": (5, 64, [24000]),
}


@pytest.mark.parametrize("device", [V100, H200], ids=["V100", "H200"])
@pytest.mark.parametrize("problem", TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_transform_stays_within_the_limits_of_a_launch(problem, device):
    images, channels, hidden = problem
    for dtype in BYTES:
        if dtype == "float64" and hidden[0] * 8 > device["shared_bytes"]:
            continue  # refused, see below
        p = transform_plan("forward", images, channels, hidden, dtype, **device)
        assert len(p.blocks) == 2 and p.shared_bytes <= device["shared_bytes"], p
        assert 1 <= p.tile_images <= images and p.workspace == images * sum(hidden), p
        assert channels % p.width == 0 and all(units % p.width == 0 for units in hidden), p

        p = transform_plan("backward", images, channels, hidden, dtype, **device)
        assert len(p.blocks) == 3 and p.shared_bytes <= 48 * 1024, p
        # Beside two small gradients: what is left of sums over slabs of rows, at least 32 of them.
        partial = p.workspace - 2 * images * sum(hidden)
        rounding = images * (sum(hidden) + len(hidden) * channels)
        assert 0 < partial <= images * 2 * channels * sum(hidden) // 32 + rounding, p
    for pass_ in ("forward", "backward"):
        p = transform_plan(pass_, images, channels, hidden, **device)
        assert all(1 <= blocks <= 2 * device["multiprocessors"] for blocks in p.blocks), p


def test_a_large_transform_fills_the_device():
    """Few images leave each block one piece of a matrix; many take two blocks to a multiprocessor."""
    p = transform_plan("forward", 2, 2048, [512])
    assert p.tile_images == 2 and min(p.blocks) >= 64, p
    assert min(transform_plan("backward", 2, 2048, [512]).blocks[::2]) >= 132
    p = transform_plan("forward", 256, 2048, [128])
    assert p.tile_images == 8 and min(p.blocks) >= 132, p
    assert min(transform_plan("backward", 256, 2048, [128]).blocks[::2]) >= 132


def test_rows_of_a_matrix_are_shared_where_there_are_few_of_them():
    assert transform_plan("forward", 2, 2048, [128]).shares == [8, 2]
    assert transform_plan("forward", 2, 64, [4]).shares == [1, 1], "a lane would have nothing to fetch"


@pytest.mark.parametrize("parts", [1, 8, 9, 66, 132])
def test_many_partial_results_are_merged_in_two_rounds(parts):
    """In either round, a block reads about the root of their number."""
    p = plan("pool_mask", 1, 512, 32 * parts, multiprocessors=1000)
    assert p.splits == parts and p.group == (8 if parts <= 64 else -int(-(parts**0.5) // 1)), p
    groups = -(-parts // p.group)
    assert p.workspace == (0 if parts == 1 else (parts + (groups if groups > 1 else 0)) * (512 + 2)), p
    assert p.tickets == (0 if parts == 1 else groups + 1 if groups > 1 else 1), p


@pytest.mark.parametrize(
    ("images", "splits", "group", "rows", "tickets"),
    [
        (1, 1, 1, 1, 1),  # nothing to merge
        (2, 8, 1, 16, 1),  # one round
        (2, 9, 8, 18 + 4, 5),  # groups within an image: 9 is 8 and 1
        (1, 132, 12, 132 + 11, 12),
        (32, 4, 4, 128 + 32, 33),  # an image is a group
        (500, 1, 1, 500, 1),
    ],
)
def test_statistics_are_merged_by_image_first(images, splits, group, rows, tickets):
    p = plan("statistics", images, 64, 128 * splits, multiprocessors=-(-images * splits // 2))
    assert (p.splits, p.group) == (splits, group), p
    assert (p.workspace, p.tickets) == (3 * 64 * rows, tickets), p


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("images", [1, 7, 64, 1000])
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name not in MERGELESS])
def test_no_thread_adds_up_more_than_64_tiles(kernel, images, layout):
    """Or rounding errors would grow with the number of pixels and images."""
    for channels, pixels in ((1, 1 << 24), (64, 1 << 22), (512, 1 << 20), (2048, 1 << 19)):
        p = plan(kernel, images, channels, pixels, layout, **H200)
        assert p.tiles_per_split <= 64, p


def test_the_order_of_additions_does_not_depend_on_the_addresses_of_weights():
    """Only the width of loads does."""
    for images, channels, hidden in ((2, 2048, [128]), (2, 520, [130]), (9, 256, [16, 32])):
        pairs, single = (
            transform_plan("forward", images, channels, hidden, pairs=of) for of in (True, False)
        )
        assert (pairs.width, single.width) == (2, 1)
        for name in ("shares", "tile_images", "blocks"):
            assert getattr(pairs, name) == getattr(single, name), (pairs, single)


def test_single_weights_are_loaded_where_pairs_do_not_fit():
    assert transform_plan("forward", 2, 1024, [64]).width == 2
    assert transform_plan("forward", 2, 1024, [64], pairs=False).width == 1
    assert transform_plan("forward", 2, 1024, [63]).width == 1


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ((1, 64, [60000]), r"hidden units must be at most \d+ on this device, got 60000"),
        ((2**20, 4096, [1]), "images x channels, .* must each be at most"),
        ((0, 4, [1]), "needs images, channels, one or two branches and hidden units"),
        ((1, 4, []), "hidden must have one or two numbers, got 0"),
    ],
)
def test_a_transform_that_no_launch_can_serve_is_refused(problem, message):
    with pytest.raises(ValueError, match=message):
        transform_plan("forward", *problem)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kernel", ["pool_mask", "pool_logits", "pool_uniform", "broadcast_mul_backward"])
def test_sums_that_are_merged_late_leave_a_row_for_each_split(kernel, layout):
    for (images, channels, pixels), dtype in itertools.product(PROBLEMS.values(), BYTES):
        if pixels > 1 << 20 or (kernel == "pool_mask" and channels > 2048):
            continue
        old = plan(kernel, images, channels, pixels, layout, dtype)
        new = plan(kernel, images, channels, pixels, layout, dtype, paths="late_merge")
        if old.splits == 1:
            assert str(new) == str(old), "there is nothing to merge"
            continue
        assert (old.paths, new.paths) == ("none", "late_merge")
        assert "; late_merge" in str(new) and "merged later" in str(new)
        for name in ("splits", "tiles_per_split", "rows", "width", "chunks", "grid", "threads"):
            assert getattr(new, name) == getattr(old, name), (old, new)
        statistics = 2 * new.chunks if kernel in ("pool_mask", "pool_logits") else 0
        vectors = 2 if kernel == "broadcast_mul_backward" else 1
        row = vectors * channels + statistics
        assert new.tickets == 0 and new.workspace == images * new.splits * row, new
        assert new.workspace <= old.workspace and new.shared_bytes < old.shared_bytes, (old, new)


def test_a_pool_with_more_splits_than_a_transform_merges_at_once_merges_itself():
    for parts in (2, 132, 256):
        p = plan("pool_mask", 1, 512, 32 * parts, multiprocessors=1000, paths="late_merge")
        assert p.splits == parts and p.paths == "late_merge", p
    p = plan("pool_uniform", 1, 1, 1 << 28, paths="late_merge")
    assert p.splits > 256 and p.paths == "none" and p.tickets > 0, p


@pytest.mark.parametrize("kernel", ["pool_uniform", "broadcast_mul_backward"])
def test_the_backward_pass_leaves_fewer_splits_to_its_transform(kernel):
    for multiprocessors in (40, 60, 80, 132):
        device = {"multiprocessors": multiprocessors, "paths": "late_merge"}
        p = plan(kernel, 1, 256, 1 << 16, "NHWC", late_splits=64, **device)
        late = p.splits <= 64
        assert late == (multiprocessors < 80), p
        assert p.paths == ("late_merge" if late else "none") and (p.tickets == 0) == late, p
        assert p.splits == plan(kernel, 1, 256, 1 << 16, "NHWC", **device).splits
    # Up to there the measured path's groups are those that are added up at once.
    assert {plan(kernel, 1, 256, 1 << 16, "NHWC", multiprocessors=n).group for n in range(2, 64)} == {8}


OTHERS = ("pool_backward_mask", "pool_backward_block", "pool_mask_normalized", "statistics", *MERGELESS)


@pytest.mark.parametrize("kernel", OTHERS)
def test_other_kernels_merge_as_before(kernel):
    assert str(plan(kernel, 2, 512, 16800, paths="late_merge")) == str(plan(kernel, 2, 512, 16800))


@pytest.mark.parametrize("problem", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_that_merges_late_has_a_phase_before(problem):
    for dtype in ("float32", "float16"):
        old = transform_plan("forward", *problem, dtype)
        new = transform_plan("forward", *problem, dtype, paths="late_merge")
        assert (old.paths, new.paths) == ("none", "late_merge") and str(new).endswith("; late_merge")
        merging, *products = new.blocks
        assert products == old.blocks and len(products) == 2, (old, new)
        images, channels, _ = problem
        assert merging == min(images * -(-channels // 32), 2 * 132), new
        for name in ("width", "tile_images", "shares", "shared_bytes", "workspace"):
            assert getattr(new, name) == getattr(old, name), (old, new)
        # Backward, what is left is added up where it is read.
        old = transform_plan("backward", *problem, dtype)
        assert str(transform_plan("backward", *problem, dtype, paths="late_merge")) == f"{old}; late_merge"


def test_launches_that_follow_another_of_their_operator_can_begin_early():
    for kernel in KERNELS:
        p = plan(kernel, 2, 512, 16800, paths="early_start")
        early = kernel in {"broadcast", "pool_backward_block", "residual"}
        assert p.paths == ("early_start" if early else "none"), p
        assert str(p).endswith("; early_start") == early
        assert str(p).removesuffix("; early_start") == str(plan(kernel, 2, 512, 16800))
    assert plan("broadcast", 2, 2048, 1050, paths="early_start").paths == "early_start", "the flat form"
    for direction in ("forward", "backward"):
        p = transform_plan(direction, 2, 512, [32], paths="early_start")
        assert p.paths == "early_start" and str(p).endswith("; early_start"), p
        usual = transform_plan(direction, 2, 512, [32])
        assert usual.paths == "none" and str(p) == f"{usual}; early_start"


def test_what_a_gpu_cannot_do_is_not_chosen_for_it():
    before = extension.chosen_paths()
    try:
        extension.choose_paths("all")
        assert "early_start" in extension.paths_on(90).split(",")
        assert "early_start" in extension.paths_on(120).split(",")
        assert "early_start" not in extension.paths_on(89).split(",")
        assert {"staged_grad", "tiles_ahead"} < set(extension.paths_on(80).split(","))
        assert not {"staged_grad", "tiles_ahead"} & set(extension.paths_on(75).split(","))
        extension.choose_paths("none")
        assert extension.paths_on(90) == "none"
    finally:
        extension.choose_paths(before)
