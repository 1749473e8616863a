"""Pooling and broadcasting around a middle in plain PyTorch: results, sweeps, and what is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from around_cases import (
    MIDDLES,
    SIZE,
    Additive,
    Both,
    C,
    GeluTanh,
    N,
    NormalizedSE,
    assert_same,
    eager,
    names_of,
    results,
    sweeps,
)
from block_cases import Spy
from tolerance import assert_close_to_truth
from torch.func import functional_call

from gc_cuda.ops.around import around


@pytest.fixture(params=MIDDLES)
def middle(request):
    torch.manual_seed(2)
    return MIDDLES[request.param]().double()


class TestResults:
    def test_first_and_second_derivatives(self, middle, random, layout):
        small = (3, C, 2, 3)
        x = random(*small, layout=layout, grad=True)
        names, parameters = zip(*middle.named_parameters())
        buffers = {name: buffer.clone() for name, buffer in middle.named_buffers()}

        def run(x, *values):
            given = {**dict(zip(names, values)), **{name: one.clone() for name, one in buffers.items()}}
            return around(x, lambda context: functional_call(middle, given, (context,)))

        assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)
        assert torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True)

    def test_as_eager(self, middle, random, layout, dtype, device):
        x, grad = (random(*SIZE, dtype=dtype, device=device, layout=layout) for _ in range(2))
        middle = middle.to(device, dtype)
        ours, theirs = (results(run, x, middle, grad) for run in (around, eager))
        truth = results(eager, x.double(), copy.deepcopy(middle).double(), grad.double())
        assert ours[0].is_contiguous(memory_format=layout) and ours[1].is_contiguous(memory_format=layout)
        for name, *three in zip(names_of(middle), ours, theirs, truth, strict=True):
            assert_close_to_truth(name, *three, roundings=4)

    def test_create_graph_gives_the_same_first_derivatives(self, middle, random, layout):
        x, grad = random(*SIZE, layout=layout, grad=True), random(*SIZE, layout=layout)
        inputs = [x, *middle.parameters()]
        expected = torch.autograd.grad(eager(x, middle), inputs, grad)
        assert_same(torch.autograd.grad(around(x, middle), inputs, grad, create_graph=True), expected)

    def test_many_gradients_at_once(self, middle, random):
        x, grads = random(*SIZE, grad=True), random(3, *SIZE)
        inputs = [x, *middle.parameters()]
        got, expected = (
            torch.autograd.grad(run(x, middle), inputs, grads, is_grads_batched=True)
            for run in (around, eager)
        )
        assert_same(got, expected)

    @pytest.mark.parametrize("n", [0, 1])
    def test_few_images(self, random, n):
        middle = Both().double()
        x, grad = random(n, C, 5, 7), random(n, C, 5, 7)
        assert_same(results(around, x, middle, grad), results(eager, x, middle, grad))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite(self, random, value):
        middle = Both().double()
        x, grad = random(*SIZE), random(*SIZE)
        x[1, 2, 3, 4] = value
        for got, expected in zip(results(around, x, middle, grad), results(eager, x, middle, grad)):
            torch.testing.assert_close(got, expected, equal_nan=True)

    def test_running_statistics(self, random):
        middle = NormalizedSE().double()
        ours, theirs = copy.deepcopy(middle), copy.deepcopy(middle)
        for _ in range(3):
            x = random(*SIZE)
            around(x, ours)
            eager(x, theirs)
        assert ours.norm.num_batches_tracked == 3
        assert_same(
            [ours.norm.running_mean, ours.norm.running_var],
            [theirs.norm.running_mean, theirs.norm.running_var],
        )
        assert not torch.equal(ours.norm.running_mean, middle.norm.running_mean)

    @pytest.mark.parametrize("kind", [GeluTanh, Additive])
    def test_threads_do_not_change_a_bit(self, random, layout, threads, kind):
        """Of a middle of matrix products, that is: PyTorch's convolutions differ by themselves."""
        middle = kind()
        x, grad = (random(3, C, 56, 56, dtype=torch.float32, layout=layout) for _ in range(2))
        found = []
        for count in (1, 2, 3):
            threads(count)
            found.append(results(around, x, middle, grad))
        for other in found[1:]:
            assert all(map(torch.equal, found[0], other))

    def test_a_gradient_in_another_layout(self, middle, random):
        x, grad = random(*SIZE, layout=torch.channels_last), random(*SIZE)
        expected = results(eager, x, middle, grad)
        assert_same(results(around, x, middle, grad), expected)
        got = results(around, x, middle, grad[:1, :1, :1, :1].expand(SIZE))
        assert_same(got, results(eager, x, middle, grad[:1, :1, :1, :1].expand(SIZE)))
        assert got[1].is_contiguous(memory_format=torch.channels_last)

    def test_x_is_used_beside_it(self, middle, random):
        x, grad = random(*SIZE), random(*SIZE)
        got, expected = (
            results(lambda x, middle, run=run: run(x, middle) * x, x, middle, grad) for run in (around, eager)
        )
        assert_same(got, expected)

    def test_hooks_see_the_whole_gradient_once(self, middle, random):
        found = {}
        for name, run in (("ours", around), ("theirs", eager)):
            seen = found[name] = []
            leaf = random(1, C, 1, 1).expand(SIZE).clone().requires_grad_()
            x = leaf + 0
            x.register_hook(seen.append)

            def watched(context, seen=seen):
                context.register_hook(seen.append)
                return middle(context)

            run(x, watched).square().sum().backward()
        assert len(found["ours"]) == 2
        random(1)
        assert [one.shape for one in found["ours"]] == [one.shape for one in found["theirs"]]


class TestSweeps:
    FORWARD, BACKWARD = ["pixel_sum", "broadcast"], ["broadcast_sums", "broadcast"]

    def test_of_a_training_step(self, middle, random, layout):
        x, grad = random(*SIZE, layout=layout, grad=True), random(*SIZE, layout=layout)
        with Spy() as forward:
            out = around(x, middle)
        with Spy() as backward:
            torch.autograd.grad(out, [x, *middle.parameters()], grad)
        assert sweeps(forward) == self.FORWARD
        expected = ["pixel_sum", "broadcast"] if isinstance(middle, Additive) else self.BACKWARD
        assert sweeps(backward) == expected

    def test_without_gradients(self, middle, random, layout):
        x = random(*SIZE, layout=layout, grad=True)
        with torch.no_grad(), Spy() as spy:
            out = around(x, middle)
        assert sweeps(spy) == self.FORWARD
        assert_same([out], [eager(x, copy.deepcopy(middle))])
        assert not out.requires_grad

    @pytest.mark.parametrize("wanted", ["parameters", "x", "x as an input", "parameters as inputs"])
    def test_only_those_that_are_needed(self, middle, random, wanted):
        x, grad = random(*SIZE, grad=wanted != "parameters"), random(*SIZE)
        parameters = list(middle.parameters())
        middle.requires_grad_(wanted != "x")
        inputs = [x] if wanted in ("x", "x as an input") else parameters
        expected = torch.autograd.grad(eager(x, middle), inputs, grad)
        out = around(x, middle)
        with Spy() as spy:
            got = torch.autograd.grad(out, inputs, grad)
        assert_same(got, expected)
        first = "pixel_sum" if isinstance(middle, Additive) else "broadcast_sums"
        assert sweeps(spy) == ([first, "broadcast"] if inputs[0] is x else [first])

    def test_of_a_middle_that_does_not_look(self, random):
        """Where neither scale nor term depends on x, what is left is a product, or nothing at all."""
        x, grad, scale = random(*SIZE, grad=True), random(*SIZE), random(N, C)
        out = around(x, lambda _: (scale, scale))
        with Spy() as spy:
            (got,) = torch.autograd.grad(out, x, grad)
        assert sweeps(spy) == ["broadcast"]
        assert_same([got], [grad * scale[:, :, None, None]])
        out = around(x, lambda _: (None, scale))
        with Spy() as spy:
            (got,) = torch.autograd.grad(out, x, grad)
        assert sweeps(spy) == []
        assert torch.equal(got, grad)

    def test_what_is_kept(self, middle, random, layout):
        """x once, scale, and what the middle keeps."""
        size = (N, C, 40, 50)
        x, kept = random(*size, layout=layout, grad=True), {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
            out = around(x, middle)
        assert (x.data_ptr() in kept) == (not isinstance(middle, Additive))
        kept.pop(x.data_ptr(), None)
        assert out.data_ptr() not in kept
        assert sum(kept.values()) < x.nbytes / 20
