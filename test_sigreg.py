"""pytest test_sigreg.py: losses, gradients over ranks, masks, models, training, probes, bad input.

Tolerances: 1e-10 and below is float64 rounding over sums of some 1e4 terms; 1e-5 is float32's;
others say why.
"""

import ast
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import masks
import model
import probe
import sigreg
import train

HERE = Path(__file__).resolve().parent


def gaussian(n, dim, seed=0, scale=1.0, dtype=torch.float64):
    return (
        torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        * scale
    ).to(dtype)


def gradient(loss, z):
    z = z.clone().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


# ------------------------------------------------------------------------------------------- losses


def spectral_reference(z):
    """The definition, by singular values of the centred batch in float64."""
    sigma = torch.linalg.svdvals(z.double() - z.double().mean(0))
    s = sigma / sigma.sum()
    return (s * torch.log(z.shape[1] * s)).sum()


def sketched_reference(z, directions, knots=17, t_max=3.0):
    """The definition, one slice and one knot at a time."""
    t, total = np.linspace(0, t_max, knots), 0.0
    for direction in directions.T.double():
        p = z.double() @ direction
        for k in range(knots):
            weight = (t[1] - t[0]) * (1 if k in (0, knots - 1) else 2) * math.exp(-(t[k] ** 2) / 2)
            total = total + len(z) * weight * (
                (torch.cos(t[k] * p).mean() - math.exp(-(t[k] ** 2) / 2)) ** 2
                + torch.sin(t[k] * p).mean() ** 2
            )
    return total / directions.shape[1]


@pytest.mark.parametrize("n, dim", [(256, 16), (64, 128), (17, 17), (2, 8)])
def test_spectral_is_its_definition(n, dim):
    z = gaussian(n, dim) @ torch.diag(torch.logspace(0, -2, dim, dtype=torch.float64)) + 3
    value = sigreg.spectral_sigreg(z)
    sigma = torch.linalg.svdvals(z - z.mean(0))
    s = (sigma / sigma.sum())[
        : min(n - 1, dim)
    ]  # of n centred rows at most n - 1 directions are free
    assert value.item() == pytest.approx((s * torch.log(dim * s)).sum().item(), abs=1e-10)
    if n > dim:
        _, grad = gradient(sigreg.spectral_sigreg, z)
        _, expected = gradient(spectral_reference, z)
        assert (
            grad - expected
        ).norm() <= 1e-8 * expected.norm()  # the Gram matrix squares a condition number of 100


def test_spectral_range_and_scale():
    flat = torch.linalg.qr(gaussian(64, 9))[0]
    flat = flat - flat.mean(0)
    flat = torch.linalg.svd(flat, full_matrices=False)[0]
    assert sigreg.spectral_sigreg(flat).item() == pytest.approx(0, abs=1e-12)
    z = gaussian(50, 12)
    for scale in (1e-6, 1e-3, 1e3, 1e6):
        assert sigreg.spectral_sigreg(z * scale).item() == pytest.approx(
            sigreg.spectral_sigreg(z).item(), rel=1e-10
        )
    assert 0 < sigreg.spectral_sigreg(z) < math.log(12)
    assert sigreg.effective_rank(z).item() == pytest.approx(
        12 * math.exp(-sigreg.spectral_sigreg(z).item())
    )
    assert sigreg.effective_rank(flat).item() == pytest.approx(9)


def degenerate_batches():
    torch.manual_seed(0)
    yield "constant", torch.full((32, 8), 0.3), math.log(8)
    yield "constant random row", torch.randn(1, 8).expand(32, 8), math.log(8)
    yield "zeros", torch.zeros(32, 8), math.log(8)
    yield "rank 1", torch.randn(32, 1) @ torch.randn(1, 8), math.log(8)
    yield "duplicated singular values", torch.eye(8).repeat(4, 1), None
    yield "N = 2", torch.randn(2, 8), math.log(8)
    yield "N = 1", torch.randn(1, 8), math.log(8)
    yield "N < D", torch.randn(5, 8), None
    yield "N = D", torch.randn(8, 8), None
    for scale in (1e-6, 1e6):
        yield f"scale {scale}", scale * torch.randn(32, 8), None
        yield f"N < D, scale {scale}", scale * torch.randn(5, 8), None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name, z, collapsed", [pytest.param(*case, id=case[0]) for case in degenerate_batches()]
)
def test_degenerate_batches_are_finite(name, z, collapsed, dtype):
    z = z.to(dtype)
    size = z.float().abs().max().clamp_min(1e-6)
    for loss in (
        sigreg.spectral_sigreg,
        sigreg.legendre_sigreg,
        lambda z: sigreg.sketched_sigreg(z, sigreg.random_directions(8, 16, 0)),
    ):
        value, grad = gradient(loss, z)
        assert value.isfinite() and grad.isfinite().all() and value.dtype != torch.bfloat16
    value, grad = gradient(sigreg.spectral_sigreg, z)
    assert 0 <= value <= math.log(8) + 1e-12
    assert (
        grad.double().abs().max() * size <= 100
    )  # relative to 1 / scale: no rounding blown up to 1e6
    if collapsed is not None and not (
        name == "rank 1" and dtype == torch.bfloat16
    ):  # rounding to bfloat16 adds rank
        assert value.item() == pytest.approx(collapsed, abs=1e-5)


def test_legendre_is_the_gaussian_kl():
    z = gaussian(300, 6) @ gaussian(6, 6, seed=1) + 0.5
    cov = torch.cov(z.T, correction=0)
    cov = cov + 1e-4 * torch.diag(1 + cov.diagonal())
    normal = torch.distributions.MultivariateNormal
    expected = (
        torch.distributions.kl_divergence(
            normal(z.mean(0), cov), normal(torch.zeros(6).double(), torch.eye(6).double())
        )
        / 6
    )
    assert sigreg.legendre_sigreg(z).item() == pytest.approx(expected.item(), rel=1e-10)
    white = (z - z.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(torch.cov(z.T, correction=0))
    ).T
    assert (
        0 <= sigreg.legendre_sigreg(white) < 1e-6
    )  # the ridge of 1e-4 moves the optimum by its square
    assert (
        sigreg.legendre_sigreg(0.1 * white) > 1.5 > sigreg.legendre_sigreg(0.5 * white)
    )  # it sees the scale
    assert sigreg.legendre_sigreg(white + 1).item() == pytest.approx(
        0.5, rel=1e-3
    )  # and the mean: |1|^2 / 2D per dimension
    assert torch.autograd.gradcheck(sigreg.legendre_sigreg, gaussian(12, 4).requires_grad_())


@pytest.mark.parametrize("n, dim", [(2, 3), (65, 7)])
def test_plain_sketched_is_its_definition(n, dim):
    z, directions = gaussian(n, dim), sigreg.random_directions(dim, 5, seed=3).double()
    for knots, t_max in [(17, 3.0), (9, 2.0), (2, 1.0)]:
        settings = {"directions": directions, "knots": knots, "t_max": t_max}
        value, grad = gradient(partial(sigreg.sketched_sigreg_plain, **settings), z)
        expected, expected_grad = gradient(partial(sketched_reference, **settings), z)
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
        assert (grad - expected_grad).norm() <= 1e-10 * expected_grad.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 17, 256, 2048])
@pytest.mark.parametrize("dim", [1, 64, 768])
def test_fast_sketched_is_the_plain_form(n, dim, dtype):
    directions = sigreg.random_directions(dim, 40, seed=3)
    for scale in (0.01, 1.0, 100.0):  # |p| up to 400: |z| = 100, four standard deviations
        z = gaussian(n, dim, seed=n, scale=scale, dtype=dtype)
        value, grad = gradient(lambda z: sigreg.sketched_sigreg(z, directions), z)
        expected, expected_grad = gradient(
            lambda z: sigreg.sketched_sigreg_plain(z, directions.double()), z.double()
        )
        tight = dtype == torch.float64
        # float32: rounding of an angle of 1200 is 6e-5 of a radian, averaged over the rows
        assert value.item() == pytest.approx(expected.item(), rel=1e-10 if tight else 1e-5)
        # a bfloat16 gradient is rounded to 8 bits on its way out
        assert (grad - expected_grad).norm() <= expected_grad.norm() * (
            1e-10 if tight else 4e-3 if dtype == torch.bfloat16 else 1e-4
        )


def test_fast_sketched_takes_any_layout_and_refuses_second_derivatives():
    directions, z = (
        sigreg.random_directions(24, 2000, seed=1),
        gaussian(24, 300).T,
    )  # rows in blocks of 131
    expected, expected_grad = gradient(
        lambda z: sigreg.sketched_sigreg_plain(z, directions.double()), z
    )
    for strided in (z, torch.stack([z, -z], 2)[..., 0], z.contiguous()):
        value, grad = gradient(lambda z: sigreg.sketched_sigreg(z, directions), strided)
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
        assert (grad - expected_grad).norm() <= 1e-10 * expected_grad.norm()
    assert not sigreg.sketched_sigreg(z, directions).requires_grad
    z = z.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sigreg.sketched_sigreg(z, directions), z, create_graph=True)


def test_sketched_knows_the_normal():
    directions = sigreg.random_directions(32, 64, seed=0)
    normal = np.mean(
        [sigreg.sketched_sigreg(gaussian(512, 32, seed), directions).item() for seed in range(16)]
    )
    assert (
        0.9 < normal < 1.2
    )  # expectation 1.05, see the docstring; 200 batches gave 1.05 +- 0.16 each
    assert sigreg.sketched_sigreg(2 * gaussian(4096, 32), directions) > 100 * normal
    assert sigreg.sketched_sigreg(torch.zeros(4096, 32), directions) > 100 * normal


def test_random_directions():
    directions = sigreg.random_directions(48, 100, seed=7)
    assert directions.shape == (48, 100)
    assert torch.equal(directions, sigreg.random_directions(48, 100, seed=7))
    assert not torch.equal(directions, sigreg.random_directions(48, 100, seed=8))
    assert torch.allclose(directions.norm(dim=0), torch.ones(100), atol=1e-6)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("on, relative", [("pooled", False), ("tokens", True)])
def test_masked_loss_is_its_definition(on, relative, back):
    """Source A to the letter, and the photographs' default, against plain restatements."""
    shapes = [(20, 1 + 4, 5), (20, 2, 1 + 3, 5), (20, 2, 3, 5)] + [(20, 2, 4, 5)] * back
    z = [gaussian(20, math.prod(s[1:]), i).view(s).requires_grad_() for i, s in enumerate(shapes)]
    z_context, z_target, z_pred, *z_back = z
    loss = sigreg.masked_loss(
        *z, lam=0.5, regularizer=sigreg.spectral_sigreg, relative=relative, on=on
    )
    if on == "pooled":
        pooled = torch.stack(
            [torch.cat([c, *t]).mean(0) for c, t in zip(z_context, z_target, strict=True)]
        )
        expected = [(z_pred - z_target[:, :, 1:]).square().mean(), spectral_reference(pooled)]
    else:
        context, target = z_context[:, 1:], z_target[:, :, 1:]
        context, target = context - context.mean(0), target - target.mean(0)
        expected = [(z_pred - target).square().sum() / target.square().sum()]
        samples = context.reshape(-1, 5), target.reshape(-1, 5)
        expected.append(sum(spectral_reference(x) for x in samples) / 2)
    if back and relative:
        context = context[:, None].expand(-1, 2, -1, -1)
        share = (z_back[0] - context).square().sum() / context.square().sum()
        expected[0] = (expected[0] + share) / 2
    elif back:
        error = (z_back[0] - z_context[:, None, 1:]).square().mean()
        expected[0] = (expected[0] + error) / 2
    expected.insert(0, expected[0] + 0.5 * expected[1])
    for value, wanted in zip(loss, expected, strict=True):
        assert value.item() == pytest.approx(wanted.item(), rel=1e-10)
    slopes = (torch.autograd.grad(value, z) for value in (loss[0], expected[0]))
    for got, wanted in zip(*slopes, strict=True):
        assert wanted.abs().max() > 0 and (got - wanted).norm() <= 1e-9 * wanted.norm()


def test_plain_forms_are_the_exact_ones():
    z = gaussian(200, 7) @ gaussian(7, 7, seed=1) + 0.5
    assert sigreg.spectral_sigreg_plain(z).item() == pytest.approx(
        sigreg.spectral_sigreg(z).item(), rel=1e-10
    )
    value, grad = gradient(sigreg.legendre_sigreg_plain, z)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        fast, slope = gradient(sigreg.legendre_sigreg, z.to(dtype))
        assert fast.item() == pytest.approx(value.item(), rel=tolerance)
        # the gradient multiplies by the inverse covariance, of condition 2600 here
        assert (slope - grad).norm() <= 10 * tolerance * grad.norm()


def test_relative_prediction_loss_is_the_unexplained_share():
    target = sigreg.centre(gaussian(20, 6 * 5).view(20, 6, 5) * 3 + 7)
    assert target.mean(0).abs().max() < 1e-13
    target.requires_grad_()
    assert sigreg.prediction_loss(
        torch.zeros_like(target), target, relative=True
    ).item() == pytest.approx(1, rel=1e-12)
    assert sigreg.prediction_loss(target, target, relative=True) == 0
    guess = gaussian(20, 6 * 5, seed=1).view(20, 6, 5)
    loss = sigreg.prediction_loss(guess, target, relative=True)
    assert loss.item() == pytest.approx(
        ((guess - target).square().mean() / target.square().mean()).item(), rel=1e-12
    )
    # shrinking prediction and targets together lowers the squared error and not this
    (slope,) = torch.autograd.grad(
        sigreg.prediction_loss(0.5 * target, target, relative=True), target
    )
    assert (slope * target).sum().abs() < 1e-12
    flat = torch.zeros(4, 3, requires_grad=True)
    assert (
        torch.autograd.grad(sigreg.prediction_loss(flat, flat, relative=True), flat)[0]
        .isfinite()
        .all()
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: sigreg.spectral_sigreg(torch.zeros(3)),
        lambda: sigreg.legendre_sigreg(torch.zeros(3, 4, 5)),
        lambda: sigreg.sketched_sigreg(torch.zeros(3, 4), torch.zeros(5, 6)),
        lambda: sigreg.spectral_sigreg(torch.zeros(3, 4, dtype=torch.int64)),
        lambda: sigreg.prediction_loss(torch.zeros(3, 4), torch.zeros(3, 5)),
    ],
)
def test_losses_name_wrong_shapes(call):
    with pytest.raises(ValueError, match=r"^sigreg\.py: .*(shape|directions)"):
        call()


def test_non_finite_input_gives_nan_not_an_exception():
    z = torch.randn(16, 4)
    z[0, 0] = torch.nan
    for loss in (
        sigreg.spectral_sigreg,
        sigreg.legendre_sigreg,
        lambda z: sigreg.sketched_sigreg(z, sigreg.random_directions(4, 3, 0)),
    ):
        assert loss(z).isnan()


def test_directions_favour_no_axis():
    """Uniform on the circle: mean 0, fourth moment of a coordinate 3/8 (a square's draws: 0.36)."""
    a = sigreg.random_directions(2, 200_000, seed=0)
    assert a.mean(1).abs().max() < 0.01
    assert a[0].pow(4).mean().item() == pytest.approx(3 / 8, abs=0.004)


def test_embedding_std():
    z = 3 * gaussian(50, 12) + 7
    expected = z.var(0, correction=0).mean().sqrt().item()
    assert sigreg.embedding_std(z).item() == pytest.approx(expected, rel=1e-10)


# -------------------------------------------------------------------------------------------- ranks

LOSSES = {
    "spectral": lambda z: sigreg.spectral_sigreg(z),
    "legendre": lambda z: sigreg.legendre_sigreg(z),
    "sketched": lambda z: sigreg.sketched_sigreg(
        z, sigreg.random_directions(z.shape[1], 20, seed=1)
    ),
    "masked": lambda z: sigreg.masked_loss(
        *tokens(z), lam=0.7, regularizer=sigreg.legendre_sigreg, relative=True, on="tokens"
    )[0],
    "crops": lambda z: sigreg.multi_view_loss(
        torch.stack([z, z.sin(), z.cos()]), 2, 0.05, LOSSES["sketched"]
    )[0],
    "relative": lambda z: sigreg.prediction_loss(z.sin(), sigreg.centre(z), relative=True),
}


def tokens(z):
    """z_context, z_target, z_pred, z_back of rows z (N, 12), as functions of z."""
    z = z.view(-1, 4, 3)
    return z, z.cos()[:, None, :3], z.sin()[:, None, :2], z.exp()[:, None, :3]


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12)
    ).double()


def rank_main(rank, shares, folder, exact):
    """One gloo rank: the gradient of each loss after DDP on its share of the 64 rows."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(shares)
    )
    x = gaussian(64, 10, seed=5)[sum(shares[:rank]) : sum(shares[: rank + 1])]
    if not exact:  # the trap: statistics of this rank's share alone
        sigreg.sum_over_ranks = lambda *tensors: tensors
    result = {}
    for name, loss in LOSSES.items():
        net = DistributedDataParallel(network())
        value = loss(net(x))
        value.backward()
        result[name] = value.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    del net, value  # see the end of train.py
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "shares, exact", [((32, 32), True), ((40, 24), True), ((20, 30, 14), True), ((40, 24), False)]
)
def test_gradient_over_ranks_is_that_of_one_process(shares, exact, tmp_path):
    mp.spawn(rank_main, (shares, str(tmp_path), exact), nprocs=len(shares))
    result = torch.load(tmp_path / "result.pt")
    for name, loss in LOSSES.items():
        net = network()
        value = loss(net(gaussian(64, 10, seed=5)))
        value.backward()
        grad = torch.cat([p.grad.flatten() for p in net.parameters()])
        error = ((result[name][1] - grad).norm() / grad.norm()).item()
        if exact:
            assert result[name][0].item() == pytest.approx(value.item(), rel=1e-9)
            assert error <= 1e-9, f"{name}: gradient off by {error:.1e}"
        else:  # the test sees what it is there to see
            assert error > 1e-2, f"{name}: per-rank statistics pass unnoticed"


# -------------------------------------------------------------------------------------------- masks


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("make", [masks.multi_block_masks, masks.random_masks])
@pytest.mark.parametrize("grid", [2, 3, 4, 7, 14, 64, (2, 5), (1, 4), (16, 3)])
def test_masks_are_legal_on_any_grid(make, grid):
    height, width = (grid, grid) if isinstance(grid, int) else grid
    for seed, count in itertools.product(range(5), (1, 33)):
        context, targets = make(count, grid, generator=generator(seed))
        again = make(count, grid, generator=generator(seed))
        assert torch.equal(context, again[0]) and torch.equal(targets, again[1])
        assert context.dtype == targets.dtype == torch.int64
        assert context.shape[0] == targets.shape[0] == count and targets.shape[1] == 4
        assert context.shape[1] >= 1 and targets.shape[2] >= 1
        for indices in (context, targets):
            assert indices.min() >= 0 and indices.max() < height * width
            assert (indices.diff(dim=-1) > 0).all()  # raster order, none twice
        seen = torch.zeros(count, height * width, dtype=torch.bool).scatter_(1, context, True)
        assert not seen.gather(1, targets.flatten(1)).any()


def test_block_masks_are_blocks_of_the_asked_size(monkeypatch):
    monkeypatch.setattr(masks, "TARGET_ASPECT", (0.5, 2.0))
    sizes, ratios = [], []
    for seed in range(300):
        context, targets = masks.multi_block_masks(
            3, 32, target_scale=(0.1, 0.3), generator=generator(seed)
        )
        rows, cols = targets // 32, targets % 32
        h, w = rows.amax(-1) - rows.amin(-1) + 1, cols.amax(-1) - cols.amin(-1) + 1
        assert (h * w == targets.shape[2]).all() and (h == h[0, 0]).all()
        sizes.append(targets.shape[2] / 32**2)
        ratios.append(math.log(h[0, 0] / w[0, 0]))
        assert context.shape[1] >= 0.25 * 32**2 - 1
    assert 0.09 < min(sizes) < 0.12 and 0.28 < max(sizes) < 0.31
    assert min(ratios) < -0.6 and max(ratios) > 0.6
    # independent draws; I-JEPA's one draw for both gives 1.0. Standard error: 1 / sqrt(300) = 0.06
    assert abs(np.corrcoef(sizes, ratios)[0, 1]) < 0.2


@pytest.mark.parametrize("make", [masks.multi_block_masks, masks.random_masks])
def test_mask_frequencies_are_symmetric(make):
    counts = torch.zeros(2, 14 * 14)
    for seed in range(60):
        context, targets = make(1000, 14, generator=generator(seed))
        counts[0] += context.flatten().bincount(minlength=196)
        counts[1] += targets.flatten().bincount(minlength=196)
    frequency = (counts / 60_000).view(2, 14, 14)
    assert (frequency - frequency.flip(1)).abs().max() < 0.03
    assert (frequency - frequency.flip(2)).abs().max() < 0.03
    assert frequency[0].min() > 0.05  # every patch is seen


def test_context_sizes_do_not_starve():
    context, _targets = masks.multi_block_masks(4096, 14, generator=generator())
    assert context.shape[1] >= 49  # min_context = 0.25 of 196


@pytest.mark.parametrize(
    "make, settings, name",
    [
        (masks.multi_block_masks, {"batch_size": 0}, "batch_size"),
        (masks.multi_block_masks, {"grid": 1}, "grid"),
        (masks.multi_block_masks, {"num_targets": 0}, "num_targets"),
        (masks.multi_block_masks, {"target_scale": (0.2, 0.1)}, "target_scale"),
        (masks.multi_block_masks, {"target_scale": (0.5, 1.0)}, "target_scale"),
        (masks.multi_block_masks, {"min_context": 0.0}, "min_context"),
        (masks.random_masks, {"target_scale": (0.0, 0.1)}, "target_scale"),
    ],
)
def test_masks_name_the_impossible_argument(make, settings, name):
    with pytest.raises(ValueError, match=rf"^masks\.py: {name} "):
        make(**dict({"batch_size": 4, "grid": 8}, **settings))


def test_blocks_have_places_of_their_own(monkeypatch):
    monkeypatch.setattr(masks, "CONTEXT_SCALE", (0.25, 0.25))
    context, targets = masks.multi_block_masks(50, 16, 2, (0.04, 0.04), 0.1, generator())
    for at in (context // 16, context % 16):  # inside a block of 8 x 8
        assert (at.amax(1) - at.amin(1)).max() == 7
    assert (targets[:, 0] != targets[:, 1]).any(1).sum() > 40


def test_random_masks_are_disjoint_and_leave_a_context(monkeypatch):
    monkeypatch.setattr(masks, "CONTEXT_SCALE", (0.5, 0.5))
    context, targets = masks.random_masks(50, 16, 3, (0.2, 0.2), generator=generator())
    assert targets.shape[2] == 51 and context.shape[1] == round((256 - 3 * 51) / 2)
    assert (targets.flatten(1).sort().values.diff(dim=1) > 0).all()
    monkeypatch.setattr(masks, "CONTEXT_SCALE", (1, 1))
    context, _ = masks.random_masks(2, 14, 4, (0.3, 0.3), generator=generator())  # these overlap
    assert context.shape[1] == 49


# -------------------------------------------------------------------------------------------- model


def test_encoder_sees_only_the_given_patches():
    torch.manual_seed(0)
    encoder = model.vit("vit_n8", 32)
    images = torch.randn(3, 3, 32, 32)
    everything = torch.arange(16).expand(3, -1)
    assert torch.allclose(encoder(images), encoder(images, everything), atol=1e-6)
    targets = torch.stack(
        [torch.randperm(16, generator=generator(i))[:8].view(2, 4).sort().values for i in range(3)]
    )
    tokens = encoder(images, targets)
    assert tokens.shape == (3, 2, 5, 128)
    assert torch.allclose(tokens[:, 1], encoder(images, targets[:, 1]), atol=1e-6)
    changed = images.clone()
    unseen = next(i for i in range(16) if i not in targets[0, 0])
    changed[0, :, unseen // 4 * 8 : unseen // 4 * 8 + 8, unseen % 4 * 8 : unseen % 4 * 8 + 8] += 1
    assert torch.equal(encoder(changed, targets)[0, 0], tokens[0, 0])
    assert not torch.allclose(encoder(changed), encoder(images))


def test_model_sizes_and_names():
    with torch.device("meta"):
        for name, parameters, depth in [
            ("vit_b16", 85_798_656, 12),
            ("vit_l16", 303_301_632, 24),
            ("vit_h14", 630_764_800, 32),
        ]:
            encoder = model.vit(name)
            assert (
                sum(p.numel() for p in encoder.parameters()) == parameters
                and len(encoder.blocks) == depth
            )
    for name in ("resnet50", "vit_x16", "vit_b", "vit_b0", "vit_b16x"):
        with pytest.raises(ValueError, match="vit_b16"):
            model.vit(name)
    with pytest.raises(ValueError, match="image size 30 .* 24 or 32"):
        model.vit("vit_n8", 30)


def test_encoder_loads_into_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = model.vit("vit_t16")
    for p in encoder.parameters():
        p.data += 0.05 * torch.randn_like(p)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    theirs.load_state_dict(encoder.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(encoder(images), theirs.eval().forward_features(images), atol=1e-4)


@pytest.mark.parametrize("predictor", [model.MLPPredictor, model.TransformerPredictor])
def test_predictors_share_a_call_and_use_their_input(predictor):
    torch.manual_seed(0)
    context, targets = masks.multi_block_masks(3, 8, generator=generator())
    tokens = torch.randn(3, 1 + context.shape[1], 32, requires_grad=True)
    predict = predictor(32, 64)
    z = predict(tokens, context, targets)
    assert z.shape == (*targets.shape, 32)
    assert (
        torch.autograd.grad(z.square().sum(), tokens, retain_graph=True)[0].abs().amax((1, 2)).min()
        > 0
    )
    assert not torch.allclose(
        z, predict(tokens, context, (targets + 1) % 64)
    )  # the position matters
    z[0].sum().backward()
    assert tokens.grad[1:].abs().max() == 0  # images do not mix


def test_block_is_torchs_layer():
    torch.manual_seed(0)
    block = model.Block(32, 4)
    settings = {"activation": "gelu", "batch_first": True, "norm_first": True}
    theirs = torch.nn.TransformerEncoderLayer(32, 4, 128, 0.0, layer_norm_eps=1e-6, **settings)
    for p in block.parameters():
        p.data += 0.3 * torch.randn_like(p)
    order, state = "attn.qkv attn.proj mlp.fc1 mlp.fc2 norm1 norm2", block.state_dict()
    values = [state[f"{name}.{kind}"] for name in order.split() for kind in ("weight", "bias")]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(block(x), theirs(x), atol=1e-4, rtol=1e-4)


def test_positions_resize():
    encoder = model.vit("vit_n8", 64)
    encoder.blocks, encoder.norm = torch.nn.ModuleList(), torch.nn.Identity()
    at = torch.arange(64)
    encoder.pos_embed.data[0, 1:, :3] = torch.stack([at // 8, at % 8, (-1.0) ** at], dim=1)
    encoder.patch_embed["proj"].bias.data.zero_()
    tokens = encoder(torch.zeros(1, 3, 40, 40))[0]
    torch.testing.assert_close(tokens[0], encoder.cls_token[0, 0] + encoder.pos_embed[0, 0])
    rows, columns, stripes = tokens[1:, :3].T.view(3, 5, 5)
    torch.testing.assert_close(rows, columns.T)
    assert (rows.diff(dim=0) > 1).all() and rows.diff(dim=1).abs().max() < 1e-5
    torch.testing.assert_close(rows + rows.flip(0), torch.full((5, 5), 7.0))
    assert stripes.abs().max() < 0.25  # antialiased


@pytest.mark.parametrize("predictor", [model.MLPPredictor, model.TransformerPredictor])
def test_predictors_know_places(predictor):
    torch.manual_seed(0)
    context, targets = masks.multi_block_masks(3, 8, generator=generator())
    tokens, predict = torch.randn(3, 1 + context.shape[1], 32), predictor(32, 64).double()
    predict.pos_embed.data *= 50
    tokens, back = tokens.double(), torch.arange(context.shape[1]).flip(0)
    z = predict(tokens, context, targets)
    turned = tokens[:, [0, *(1 + back)]]
    torch.testing.assert_close(predict(turned, context[:, back], targets), z)  # a set with places
    torch.testing.assert_close(predict(tokens, context, targets.flip(2)), z.flip(2))
    moved = predict(tokens, context[:, back], targets)
    assert torch.allclose(moved, z) == (predictor is model.MLPPredictor)
    tokens[:, 0] += 1
    assert not torch.allclose(predict(tokens, context, targets), z)  # CLS is read


@pytest.mark.parametrize("width", [1, 4])
def test_mlp_predictor_is_its_definition(width):
    torch.manual_seed(0)
    _, targets = masks.multi_block_masks(3, 8, 2, generator=generator())
    tokens, predict = gaussian(3, 11 * 32, 0).view(3, 11, 32), model.MLPPredictor(32, 64, width)
    predict = predict.double()
    predict.pos_embed.data *= 50
    z = predict(tokens, None, targets)
    for b, k, i in itertools.product(range(3), range(2), range(targets.shape[2])):
        pair = torch.cat([tokens[b].mean(0), predict.pos_embed[0, targets[b, k, i]]])
        hidden = torch.nn.functional.gelu(predict.fc1(pair))
        assert len(hidden) == 32 * width
        torch.testing.assert_close(z[b, k, i], predict.fc2(hidden))


def test_masked_forward_is_its_definition():
    torch.manual_seed(0)
    encoder, other, predict = (
        model.vit("vit_n8", 32),
        model.vit("vit_n8", 32),
        model.TransformerPredictor(128, 16),
    )
    views = torch.randn(2, 3, 3, 32, 32)
    context, targets = masks.multi_block_masks(3, 4, 2, generator=generator())
    found = train.masked_forward(encoder, other, predict, False, True, views, (context, targets))
    for b, k in itertools.product(range(3), range(2)):
        c, t = context[b : b + 1], targets[b : b + 1, k]
        z_context, z_target = encoder(views[0, b : b + 1], c), other(views[1, b : b + 1], t)
        back = predict(z_target, t, c[:, None])[:, 0]
        pred = predict(z_context, c, targets[b : b + 1])[:, k]
        wanted = z_context, z_target, pred, back
        got = found[0][b], found[1][b, k], found[2][b, k], found[3][b, k]
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y[0], atol=1e-5, rtol=1e-4)


def test_a_piece_may_be_empty():
    encoder, views = model.vit("vit_n8", 32), torch.zeros(2, 0, 3, 32, 32)
    pair = torch.zeros(0, 7, dtype=torch.int64), torch.zeros(0, 2, 4, dtype=torch.int64)
    for predictor in (model.MLPPredictor, model.TransformerPredictor):
        predict = predictor(128, 16)
        found = train.masked_forward(encoder, encoder, predict, False, True, views, pair)
        assert [z.shape[:-1] for z in found] == [(0, 8), (0, 2, 5), (0, 2, 4), (0, 2, 7)]


def test_crops_forward_and_loss_keep_the_views_apart():
    views = [gaussian(5, 3 * 8 * 8, i).view(5, 3, 8, 8) for i in range(2)]
    views += [gaussian(5, 3 * 4 * 4, i).view(5, 3, 4, 4) for i in range(2, 6)]
    encode = lambda x: torch.cat([x.mean((2, 3))[:, None] * 0 + 9, x.flatten(2).transpose(1, 2)], 1)
    (y,) = train.crops_forward(encode, 2, views, None)
    z = torch.stack([view.mean((2, 3)) for view in views])  # the mean patch token, without CLS
    torch.testing.assert_close(y, z.transpose(0, 1))
    reg = sigreg.legendre_sigreg
    loss = train.crops_loss(y, torch.nn.Identity(), 2, 0.3, reg)
    assert loss[0].item() == pytest.approx(sigreg.multi_view_loss(z, 2, 0.3, reg)[0].item())


# ------------------------------------------------------------------------------------- train, probe

TINY = [
    "--steps",
    "8",
    "--batch-size",
    "32",
    "--log-every",
    "2",
    "--save-every",
    "3",
    "--device",
    "cpu",
]


def run_train(folder, *arguments):
    train.main([*TINY, "--ckpt", str(folder / "ckpt.pt"), *arguments])
    return torch.load(folder / "ckpt.pt", weights_only=True)


def same_weights(a, b):
    return all(
        torch.equal(a[part][key], b[part][key])
        for part in ("encoder", "predictor")
        for key in a[part]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, run_train(folder)


def jpeg_folder(folder, per_class=12, classes=2, size=40):
    shapes = train.Shapes(size)
    from PIL import Image

    for split, label, i in itertools.product(("train", "val"), range(classes), range(per_class)):
        path = folder / split / f"class{label}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes[10 * i + label][0]).save(path)
    return folder


def test_loaded_batches_are_whole_and_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "hold", lambda *arguments: None)  # as if the sizes differed
    folder, share = jpeg_folder(tmp_path, per_class=20), torch.arange(37)
    options = ["--data", str(folder), "--batch-size", "37", "--workers", "1", "--device", "cpu"]
    args = train.parse_args(options)
    data = train.open_data(args.data, "", "train")
    train.fill_in(args, len(data), 40, world=1)
    loader, kinds = train.load(args, data, 0, 2, share, torch.device("cpu"))
    images = train.Images(data, 40, [(1, 40, 0.3, 1)], args.seed)
    steps = train.batches(len(data), 37, 0, 2, args.seed, share)
    for (views,), keys in zip(loader, steps, strict=True):  # 37 images: three messages
        assert torch.equal(views, torch.stack([images[key][0][0] for key in keys]))
    assert kinds == ()


def test_log_and_checkpoint(trained):
    folder, checkpoint = trained
    assert (
        checkpoint["step"] == 8
        and checkpoint["args"]["model"] == "vit_n8"
        and checkpoint["args"]["data"] == "shapes"
    )
    header, *rows = [json.loads(line) for line in (folder / "ckpt.jsonl").read_text().splitlines()]
    assert header["args"] == checkpoint["args"] and "command" in header
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:
        assert {
            "step",
            "epoch",
            "loss",
            "pred",
            "legendre",
            "erank",
            "std",
            "lr",
            "images_per_s",
        } <= row.keys()
        assert row["loss"] == pytest.approx(row["pred"] + row["legendre"], rel=1e-5)
        assert 1 <= row["erank"] <= 128 and row["std"] > 0
    train.main([*TINY, "--sigreg", "spectral", "--ckpt", str(folder / "spectral.pt")])
    for row in [
        json.loads(line) for line in (folder / "spectral.jsonl").read_text().splitlines()[1:]
    ]:
        assert row["erank"] == pytest.approx(128 * math.exp(-row["spectral"]), rel=1e-9)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "arguments",
    [
        "--recipe crops --schedule cosine --warmup-epochs 1 --slices 32 --amp",
        "--model vit_t8 --image-size 40 --masks random --predictor transformer",
    ],
)
def test_every_choice_trains(arguments, tmp_path):
    checkpoint = run_train(tmp_path, "--steps", "2", *arguments.split())
    torch.manual_seed(0)
    start = model.vit(checkpoint["args"]["model"], checkpoint["args"]["image_size"]).state_dict()
    for key in (
        "patch_embed.proj.weight",
        "cls_token",
        "pos_embed",
        "norm.weight",
        "blocks.0.attn.qkv.weight",
    ):
        assert not torch.equal(checkpoint["encoder"][key], start[key]), f"{key} has no gradient"


def crops_reference(z, num_global, lam, directions):
    """Source B's loss as it reads, in float64, one view at a time."""
    center = sum(z[v] for v in range(num_global)) / num_global
    pred = sum(((view - center) ** 2).mean() for view in z) / len(z)
    reg = sum(sketched_reference(view, directions) for view in z) / len(z)
    return (1 - lam) * pred + lam * reg


@pytest.mark.parametrize("views, num_global", [(8, 2), (3, 3), (2, 1)])
def test_multi_view_loss_is_its_definition(views, num_global):
    z, directions = (
        gaussian(views * 20, 6).view(views, 20, 6),
        sigreg.random_directions(6, 7, seed=0),
    )
    value, grad = gradient(
        lambda z: sigreg.multi_view_loss(
            z, num_global, 0.05, lambda v: sigreg.sketched_sigreg(v, directions)
        )[0],
        z,
    )
    expected, expected_grad = gradient(
        lambda z: crops_reference(z, num_global, 0.05, directions), z
    )
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert (grad - expected_grad).norm() <= 1e-10 * expected_grad.norm()


@pytest.mark.parametrize(
    "name, dim",
    [("resnet18", 512), ("convnext_tiny", 768), ("swin_t", 768), ("efficientnet_b0", 1280)],
)
def test_backbones_lose_their_classifier(name, dim):
    encoder = train.build_encoder(name, 64).eval()
    assert encoder.dim == dim and encoder(torch.zeros(2, 3, 64, 64)).shape == (2, dim)
    small = train.build_encoder("resnet18", 32)
    assert (
        small.conv1.stride == (1, 1)
        and small.conv1.kernel_size == (3, 3)
        and isinstance(small.maxpool, torch.nn.Identity)
    )
    assert train.build_encoder("resnet18", 224).conv1.kernel_size == (7, 7)


def test_position_embeddings_resize_as_in_timm():
    timm = pytest.importorskip("timm")
    encoder = model.vit("vit_t16")
    peer = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
    peer.load_state_dict(encoder.state_dict())
    for side in (96, 224, 320):
        images = torch.randn(2, 3, side, side, generator=generator())
        with torch.no_grad():
            assert (encoder(images) - peer.forward_features(images)).abs().max() < 1e-4


def test_learning_rate_is_a_function_of_the_step():
    rates = [train.learning_rate(step, 100, 0.1, 10, "cosine") for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.01 * i for i in range(1, 11)])
    assert rates[-1] == pytest.approx(0, abs=1e-12) and rates[54] == pytest.approx(0.05)
    assert sorted(rates[9:], reverse=True) == rates[9:]
    assert {train.learning_rate(step, 100, 0.1) for step in (1, 50, 100)} == {0.1}


def test_same_command_again_says_finished_and_longer_runs_continue(trained, tmp_path, capsys):
    folder, _checkpoint = trained
    (tmp_path / "ckpt.pt").write_bytes((folder / "ckpt.pt").read_bytes())
    before = (tmp_path / "ckpt.pt").stat().st_mtime_ns
    run_train(tmp_path)
    assert (
        "finished" in capsys.readouterr().out
        and (tmp_path / "ckpt.pt").stat().st_mtime_ns == before
    )
    with pytest.raises(SystemExit, match="lam=1.0, this command says 2.0"):
        run_train(tmp_path, "--lam", "2")
    with pytest.raises(SystemExit, match="ema=0, this command says 0.5"):
        run_train(tmp_path, "--ema", "0.5")
    longer = run_train(
        tmp_path, "--steps", "10", "--save-every", "4", "--log-every", "5", "--workers", "1"
    )
    train.main([*TINY, "--steps", "10", "--ckpt", str(tmp_path / "straight.pt")])
    assert same_weights(longer, torch.load(tmp_path / "straight.pt", weights_only=True))


def test_kill_and_resume_is_bit_identical(tmp_path):
    arguments = [
        "--steps",
        "14",
        "--save-every",
        "2",
        "--log-every",
        "1",
        "--workers",
        "1",
        "--augment",
        "color",
    ]
    train.main([*TINY, *arguments, "--ckpt", str(tmp_path / "whole.pt")])
    command = [
        sys.executable,
        str(HERE / "train.py"),
        *TINY,
        *arguments,
        "--ckpt",
        str(tmp_path / "cut.pt"),
    ]
    for stop_after in (3, 9):  # lines of the log
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        log = tmp_path / "cut.jsonl"
        while process.poll() is None and not (
            log.exists() and log.read_text().count("\n") > stop_after
        ):
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with log.open("a") as file:
        file.write('{"step": 9')  # as a kill in mid-write leaves it
    train.main(command[2:])
    whole, cut = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "cut")
    )
    assert cut["step"] == 14 and same_weights(whole, cut)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row.get("step") for row in rows] == [None, *range(1, 15)]


def test_heuristics_do_what_they_say():
    images = torch.rand(4, 3, 32, 32)
    for flags, whole, gradient in (
        ([], False, True),
        (["--stop-grad"], False, False),
        (["--ema", "0.9"], False, False),
        (["--targets", "full"], True, True),
    ):
        args = train.parse_args([*TINY, "--data", "x", "--no-amp", *flags])
        train.fill_in(args, 20_000, 32, 1)
        assert args.directions == ("one" if flags else "both")
        state = train.build(args, torch.device("cpu"))
        encoder, teacher = state["encoder"], state.get("teacher")
        modules = encoder, teacher, encoder, state["predictor"]
        settings, forward, _ = train.recipe(args, (), *modules, torch.device("cpu"))
        context, targets = settings["make_masks"]()
        context, targets = context.expand(4, -1), targets.expand(4, -1, -1)
        _, z_target, *_ = forward([images, images], (context, targets))
        assert z_target.requires_grad == gradient
        tokens = encoder(images, None if whole else targets)
        if whole:
            tokens = torch.nn.functional.layer_norm(tokens[:, 1:], tokens.shape[2:])
            wanted = torch.stack([tokens[b, targets[b]] for b in range(4)])
        else:
            wanted = tokens[:, :, 1:]
        torch.testing.assert_close(z_target[:, :, 1:], wanted)
    none = train.make_regularizer("none", 1, 0)
    assert none(images.flatten(1)) == 0


def test_lam_of_sketched_falls_with_the_samples():
    for flags, lam in (
        ([], 0.002),  # 256 images, some 32 of 64 patches
        (["--sigreg-on", "pooled"], 0.05),
        (["--lam", "0.1"], 0.1),
        (["--recipe", "crops"], 0.05),
    ):
        flags = ["--data", "x", "--sigreg", "sketched", "--device", "cpu", *flags]
        args = train.parse_args(flags)
        train.fill_in(args, 50_000, 32, 1)
        assert args.lam == lam


def test_weight_decay_falls_to_its_end():
    args = train.parse_args([*TINY, "--weight-decay", "0", "--wd-end", "0.1"])
    train.fill_in(args, 20_000, 32, 1)
    optimizer = train.build(args, torch.device("cpu"))["optimizer"]
    for step, decay in ((1, 0.1 * (1 - math.cos(math.pi / 8)) / 2), (4, 0.05), (8, 0.1)):
        train.set_rates(optimizer, args, step, 8, 0)
        values = [group["weight_decay"] for group in optimizer.param_groups]
        assert values == [0, pytest.approx(decay)]


def test_ema_and_weight_decay_resume_bit_by_bit(tmp_path):
    flags = ["--ema", "0.9", "--sigreg", "none", "--wd-end", "0.4", "--targets", "full"]
    saved = run_train(tmp_path, *flags)
    cut = [*TINY, *flags, "--ckpt", str(tmp_path / "cut.pt")]
    code = [
        "import train",
        "honest, calls = train.set_rates, []",
        "def failing(*arguments):",
        "    calls.append(1)",
        "    if len(calls) == 5: raise SystemExit",
        "    return honest(*arguments)",
        "train.set_rates = failing",
        f"train.main({cut})",
    ]
    subprocess.run(
        [sys.executable, "-c", "\n".join(code)], check=True, cwd=HERE, stdout=subprocess.DEVNULL
    )
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 3
    train.main(cut)
    again = torch.load(tmp_path / "cut.pt", weights_only=True)
    assert same_weights(saved, again)
    for name, value in saved["teacher"].items():
        assert torch.equal(value, again["teacher"][name])
    moved = (saved["teacher"][n] - p for n, p in saved["encoder"].items())
    assert max(difference.abs().max() for difference in moved) > 0
    decay = [group["weight_decay"] for group in saved["optimizer"]["param_groups"]]
    assert decay == [0.0, pytest.approx(0.4)]


def test_two_ranks_train_what_one_does(tmp_path):
    arguments = [*TINY, "--sigreg", "legendre", "--weight-decay", "0", "--lr", "1e-4"]
    train.main([*arguments, "--ckpt", str(tmp_path / "one.pt")])
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            str(HERE / "train.py"),
            *arguments,
            "--ckpt",
            str(tmp_path / "two.pt"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()[1:]
        ]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == 4
    # the same batches, masks, statistics; float32 sums in another order, amplified by 8 steps
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(train.Shapes, "__len__", lambda self: 200 if self.val else 600)


def run_probe(capsys, *arguments):
    capsys.readouterr()
    probe.main([*map(str, arguments), "--device", "cpu"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


FROZEN = [
    [],
    ["--untrained"],
    ["--pixels"],
    ["--pool", "cls"],
    ["--pool", "both", "--layers", "2", "--shots", "1", "10"],
    ["--image-size", "48"],
]


@pytest.mark.parametrize("extra", FROZEN, ids=" ".join)
def test_probe(trained, capsys, few_shapes, extra):
    result = run_probe(capsys, trained[0] / "ckpt.pt", *extra)
    assert {
        "data",
        "train",
        "val",
        "pool",
        "layers",
        "seed",
        "commit",
        "linear_lr",
        "linear_decay",
        "linear_heads",
    } <= result.keys()
    assert (
        result["untrained"] == ("--untrained" in extra)
        and result["train"] == 600
        and result["val"] == 200
    )
    assert (
        list(result["knn_k"]) == ["1", "5", "10", "20", "50", "200"]
        and result["knn_k"]["20"] == result["knn"]
    )
    assert (
        0 <= result["knn"] <= 100
        and 0 <= result["linear"] <= 100
        and 1 <= result["erank"] <= (768 if "--pixels" in extra else 128 * 4)
    )
    assert result["image_size"] == (48 if "--image-size" in extra else 32)
    assert [name for name in result if name.endswith("-shot")] == (
        ["1-shot", "10-shot"] if "--shots" in extra else []
    )


def test_transfer_prints_one_table(trained, tmp_path, capsys, few_shapes):
    photos = jpeg_folder(tmp_path / "photos")
    probe.main(
        [
            str(trained[0] / "ckpt.pt"),
            "--data",
            "shapes",
            str(photos),
            "--device",
            "cpu",
            "--workers",
            "0",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    results = json.loads(lines[-1])
    assert [r["data"] for r in results] == ["shapes", str(photos)] and [
        r["val"] for r in results
    ] == [200, 24]
    assert [line.split()[1:] for line in lines[-3:-1]] == [
        [f"{r[name]:.2f}" for name in ("knn", "linear", "linear4")] for r in results
    ]


@pytest.mark.parametrize(
    "extra",
    [
        *FROZEN,
        ["--finetune", "--steps", "3", "--batch-size", "64"],
        ["--pca", "p.png", "--export", "e.pt"],
    ],
    ids=" ".join,
)
def test_frozen_means_frozen(trained, tmp_path, capsys, monkeypatch, few_shapes, extra):
    monkeypatch.chdir(tmp_path)
    encoders = []
    build = train.build_encoder
    monkeypatch.setattr(
        train,
        "build_encoder",
        lambda *arguments: encoders.append(build(*arguments)) or encoders[-1],
    )
    (tmp_path / "ckpt.pt").write_bytes((trained[0] / "ckpt.pt").read_bytes())
    probe.main(["ckpt.pt", "--device", "cpu", *extra])
    torch.manual_seed(0)
    expected = (
        train.build_encoder("vit_n8", 32).state_dict()
        if "--untrained" in extra
        else trained[1]["encoder"]
    )
    state = encoders[0].state_dict()
    assert state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in expected
    )


def test_validation_labels_never_reach_training(trained, capsys, monkeypatch, few_shapes):
    honest, draw, heads, results = probe.fit_heads, train.Shapes.__getitem__, [], []
    monkeypatch.setattr(
        probe, "fit_heads", lambda *a, **settings: heads.append(honest(*a, **settings)) or heads[-1]
    )

    def permuted(self, i):
        image, label = draw(self, i)
        return image, (7 * label + 3) % 10 if self.val else label

    for item in (draw, permuted):
        monkeypatch.setattr(train.Shapes, "__getitem__", item)
        results.append(run_probe(capsys, trained[0] / "ckpt.pt", "--shots", "2"))
    half = len(heads) // 2
    assert half == 9  # the grid and the chosen head, 5 draws, and for four blocks grid and head
    for before, after in zip(heads[:half], heads[half:], strict=False):
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert (
        results[0]["linear"] != results[1]["linear"]
        and results[0]["linear_held_out"] == results[1]["linear_held_out"]
    )


def test_both_readouts_from_one_pass(trained, capsys, few_shapes):
    """By default the last block and four blocks, each as --layers gives it alone."""
    ckpt = trained[0] / "ckpt.pt"
    default, last, four = (
        run_probe(capsys, ckpt, *flags) for flags in ([], ["--layers", "1"], ["--layers", "4"])
    )
    for name in ("knn_k", "linear", "linear_lr", "linear_held_out", "erank"):
        assert default[name] == last[name], name
    assert default["linear4"] == four["linear"]
    assert default["linear4_held_out"] == four["linear_held_out"]
    assert "linear4" not in last and "linear4" not in four


def test_last_layers_stand_side_by_side():
    torch.manual_seed(0)
    encoder, images = model.vit("vit_n8", 32), torch.randn(2, 3, 32, 32)
    seen = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    three = encoder(images, layers=3)
    assert three.shape == (2, 17, 3 * 128) and torch.equal(three[..., :128], encoder(images))
    assert torch.equal(
        three, torch.cat([encoder.norm(x) for x in (seen[3], seen[2], seen[1])], dim=-1)
    )


def test_two_ranks_probe_what_one_does(trained, tmp_path, capsys):
    photos = jpeg_folder(tmp_path / "photos", per_class=13)
    path = tmp_path / "ckpt.pt"
    path.write_bytes((trained[0] / "ckpt.pt").read_bytes())
    arguments = [str(path), "--device", "cpu", "--workers", "0", "--data", str(photos), str(photos)]
    probe.main(arguments)
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        str(HERE / "probe.py"),
    ]
    out = subprocess.run(
        [*torchrun, *arguments], check=True, stdout=subprocess.PIPE, text=True, timeout=300
    ).stdout
    assert json.loads(out.splitlines()[-1]) == one
    tune = ["--data", str(photos), "--finetune", "--epochs", "2", "--batch-size", "8"]
    out = subprocess.run(
        [*torchrun, *arguments[:5], *tune],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    ).stdout
    assert 0 <= json.loads(out.splitlines()[-1])["finetune"] <= 100


def test_finetuning_resumes_bit_by_bit(trained, tmp_path, capsys, monkeypatch, few_shapes):
    arguments = ["--finetune", "--epochs", "3", "--batch-size", "200", "--workers", "0"]
    for name in ("whole", "cut"):
        (tmp_path / f"{name}.pt").write_bytes((trained[0] / "ckpt.pt").read_bytes())
    whole = run_probe(capsys, tmp_path / "whole.pt", *arguments)
    honest, calls = train.learning_rate, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) > 5:  # in the sixth step, after the first pass of three
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(train, "learning_rate", failing)
    with pytest.raises(SystemExit, match="interrupted; the same command continues"):
        run_probe(capsys, tmp_path / "cut.pt", *arguments)
    monkeypatch.setattr(train, "learning_rate", honest)
    saved = torch.load(tmp_path / "cut.finetune-shapes.pt", weights_only=True)
    assert saved["step"] == 3 and saved["args"]["last"] == 9
    assert " on shapes " in saved["args"]["encoder"]  # another data set of that name is refused
    cut = run_probe(capsys, tmp_path / "cut.pt", *arguments)
    assert cut["finetune"] == whole["finetune"]
    a, b = (
        torch.load(tmp_path / f"{name}.finetune-shapes.pt", weights_only=True)
        for name in ("whole", "cut")
    )
    assert a["step"] == b["step"] == 9
    assert all(
        torch.equal(a[part][key], b[part][key]) for part in ("encoder", "head") for key in a[part]
    )
    assert all(
        not torch.equal(a["encoder"][name], trained[1]["encoder"][name]) for name in a["encoder"]
    )
    with pytest.raises(SystemExit, match="lr=0.00078125, this command says 0.5"):
        probe.main([str(tmp_path / "cut.pt"), *arguments, "--device", "cpu", "--lr", "0.5"])


@pytest.mark.parametrize("name", ["vit_n8", "resnet18", "convnext_tiny"])
def test_finetuning_learns_slower_below(name, tmp_path, monkeypatch, few_shapes):
    torch.manual_seed(0)
    encoder = train.build_encoder(name, 64)
    options = probe.parse_args(
        [
            "x",
            "--finetune",
            "--steps",
            "1",
            "--batch-size",
            "4",
            "--layer-decay",
            "1e-3",
            "--device",
            "cpu",
        ]
    )
    options.workers = 0
    sets = [
        train.Shapes(64, 0, "train"),
        torch.utils.data.Subset(train.Shapes(64, 0, "val"), range(4)),
    ]
    monkeypatch.setattr(
        torch.nn.init, "zeros_", lambda p: torch.nn.init.normal_(p, std=0.1)
    )  # a zero head passes no gradient in its first step
    probe.finetune(encoder, name, *sets, 64, options, tmp_path / "f.pt")
    groups = torch.load(tmp_path / "f.pt", weights_only=True)["optimizer"]["param_groups"]
    names = [*dict(encoder.named_parameters()), "head.weight", "head.bias"]
    scale = {n: g["scale"] for n, g in zip(names, groups, strict=False)}
    deepest = {"vit_n8": 4, "resnet18": 4, "convnext_tiny": 8}[name]
    below = deepest + (name != "convnext_tiny")
    assert scale["head.weight"] == 1 and scale[names[0]] == pytest.approx(1e-3**below)
    assert list(scale.values()) == sorted(scale.values())
    assert len(set(scale.values())) == 1 + below
    assert all(g["lr"] == pytest.approx(g["scale"] * groups[-1]["lr"]) for g in groups)


def test_pca_picture_shows_the_variance():
    torch.manual_seed(0)
    encoder = model.vit("vit_n8", 32)
    images = torch.rand(3, 3, 64, 64)
    picture = probe.pca_picture(encoder, images, 64)
    assert (
        picture.shape == (3, 2 * 68 + 4, 4 * 68 + 4) and 0 <= picture.min() and picture.max() <= 1
    )
    assert torch.equal(picture, probe.pca_picture(encoder, images, 64))
    assert torch.equal(picture[:, 4:68, 4:68], images[0])
    tokens = encoder(train.normalize(images))[:, 1:].flatten(0, 1).double()
    first = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)[0][:, 0].view(3, 8, 8)
    red = torch.stack(
        [
            picture[
                0, 4 + 68 * (i // 2) : 68 + 68 * (i // 2), 72 + 136 * (i % 2) : 136 + 136 * (i % 2)
            ][::8, ::8]
            for i in range(3)
        ]
    )
    assert (
        np.corrcoef(first.flatten().detach(), red.flatten())[0, 1] ** 2 > 0.98
    )  # cut at the percentiles


def test_export_loads_elsewhere(trained, tmp_path, capsys):
    for name in ("encoder.pt", "encoder.safetensors"):
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors")
        probe.main(
            [str(trained[0] / "ckpt.pt"), "--export", str(tmp_path / name), "--device", "cpu"]
        )
        said = capsys.readouterr().out
        if name.endswith("safetensors"):
            from safetensors.torch import load_file

            state = load_file(tmp_path / name)
        else:
            state = torch.load(tmp_path / name, weights_only=True)
        assert state.keys() == trained[1]["encoder"].keys() and all(
            torch.equal(state[key], trained[1]["encoder"][key]) for key in state
        )
    timm = pytest.importorskip("timm")
    theirs = eval(re.search(r"timm\..*\)", said)[0], {"timm": timm}).eval()
    theirs.load_state_dict(state)  # strict
    ours = train.build_encoder("vit_n8", 32)
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(theirs.forward_features(images), ours(images), atol=1e-5)


@pytest.mark.parametrize("train_y", [[1, 1, 1, 1], [0, 1, 0, -1]])
def test_probes_name_impossible_labels(train_y):
    arguments = torch.randn(4, 3), torch.tensor(train_y), torch.randn(2, 3), torch.tensor([0, 1])
    for call in (probe.knn_probe, probe.linear_probe, lambda *a: probe.few_shot_probe(*a, shots=1)):
        with pytest.raises(ValueError, match="^probe.py: the training split needs labels"):
            call(*arguments)


def test_probes_name_too_few_images():
    x, y = torch.randn(6, 3), torch.arange(3)
    with pytest.raises(ValueError, match="one training image a class"):
        probe.linear_probe(x[:3], y, x[3:], y)
    with pytest.raises(ValueError, match="--shots 2, but class 0 has 1$"):
        probe.few_shot_probe(x[:3], y, x[3:], y, shots=2)
    assert 0 <= probe.knn_probe(x[:3], y, x[3:], y)["knn"] <= 100
    assert 0 <= probe.few_shot_probe(x[:3], y, x[3:], y, shots=1)["1-shot"] <= 100


def test_probe_refuses_impossible_splits(trained, tmp_path):
    photos = jpeg_folder(tmp_path / "photos")
    probe_photos = [
        str(trained[0] / "ckpt.pt"),
        "--data",
        str(photos),
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    (photos / "val" / "class1").rename(photos / "val" / "class2")
    with pytest.raises(SystemExit, match="class class1 is in one alone"):
        probe.main(probe_photos)
    (photos / "val" / "class2").rename(tmp_path / "aside")
    (photos / "train" / "class1").rename(tmp_path / "aside" / "more")
    with pytest.raises(SystemExit, match="of at least two classes"):
        probe.main(probe_photos)
    for extra, match in (
        (["--layers", "9"], "vit_n8 has 4 blocks"),
        (["--image-size", "33"], "--image-size of vit_n8 must be a multiple of 8"),
        (["--shots", "0"], "at least 1"),
        (["--data", "a", "b", "--pca", "x.png"], "one data set"),
        (["--lr", "0"], "--lr 0.0 must be at least"),
        (["--finetune", "--layers", "2"], "leave them out"),
        (["--device", "quantum"], "--device quantum"),
    ):
        with pytest.raises(SystemExit, match=match):
            probe.main([*probe_photos, *extra])


def test_probe_of_a_backbone_without_tokens(tmp_path, capsys, monkeypatch):
    saved = run_train(
        tmp_path,
        "--steps",
        "1",
        "--recipe",
        "crops",
        "--model",
        "resnet18",
        "--batch-size",
        "4",
        "--local-views",
        "0",
    )
    photos = jpeg_folder(tmp_path / "photos")
    encoders = []
    build = train.build_encoder
    monkeypatch.setattr(
        train,
        "build_encoder",
        lambda *arguments: encoders.append(build(*arguments)) or encoders[-1],
    )
    for extra in ([], ["--finetune", "--steps", "2", "--batch-size", "12"]):
        assert (
            run_probe(capsys, tmp_path / "ckpt.pt", "--data", photos, "--workers", "0", *extra)[
                "val"
            ]
            == 24
        )
        # the running statistics of batch norm too
        assert all(
            torch.equal(value, saved["encoder"][name])
            for name, value in encoders[-1].state_dict().items()
        )
    for extra, match in (
        (["--pool", "cls"], "--pool cls needs a ViT"),
        (["--layers", "2"], "--layers needs a ViT"),
        (["--pca", "x.png"], "--pca needs a ViT"),
    ):
        with pytest.raises(SystemExit, match=match):
            probe.main([str(tmp_path / "ckpt.pt"), *extra, "--device", "cpu"])


def test_probes_on_known_features():
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    centres = torch.tensor([[4.0, 0, 0], [0, 4.0, 0], [0, 0, 4.0]])
    x = centres[labels] + torch.randn(300, 3)
    assert probe.knn_probe(x[:200], labels[:200], x[200:], labels[200:])["knn"] > 95
    assert probe.linear_probe(x[:200], labels[:200], x[200:], labels[200:])["linear"] > 95
    shuffled = labels[torch.randperm(300)]
    assert probe.linear_probe(x[:200], shuffled[:200], x[200:], shuffled[200:])["linear"] < 60


def test_knn_is_brute_force_for_every_k():
    x, y, v, w = (
        gaussian(300, 8, 1),
        torch.arange(300) % 7,
        gaussian(50, 8, 2),
        torch.arange(50) % 7,
    )
    x, v = x + 0.7 * gaussian(7, 8, 3)[y], v + 0.7 * gaussian(7, 8, 3)[w]
    cosine = torch.cosine_similarity(v[:, None], x[None], dim=2)
    expected = []
    for k in (1, 3, 20, 300):
        keep = cosine >= cosine.sort(descending=True).values[:, k - 1 : k]
        votes = torch.stack(
            [((cosine / 0.2).exp() * keep * (y == c)).sum(1) for c in range(7)], dim=1
        )
        expected.append(100 * (votes.argmax(1) == w).double().mean().item())
    found = probe.knn_probe(x, y, v, w, ks=(1, 3, 20, 1000), temperature=0.2)
    assert (
        list(found["knn_k"].values()) == pytest.approx(expected)
        and found["knn"] == found["knn_k"][20]
    )
    assert len(set(expected)) > 2  # so that k matters here


@pytest.mark.parametrize("decay", [1e-3, 1e-1])
def test_linear_heads_reach_their_minimum(decay):
    """On badly conditioned features (a factor of 1e4 between axes) against L-BFGS in float64."""
    y = torch.arange(3000) % 4
    x = (gaussian(3000, 12, 1) + 1.5 * gaussian(4, 12, 2)[y]) * torch.logspace(
        0, -2, 12
    ) @ gaussian(12, 12, 3) + 5
    z = (x - x.mean(0)) / x.std(0, correction=0)
    weight, bias = (
        torch.zeros(12, 4, dtype=torch.float64, requires_grad=True),
        torch.zeros(4, dtype=torch.float64, requires_grad=True),
    )

    def objective(weight, bias):
        return (
            torch.nn.functional.cross_entropy(z @ weight + bias, y)
            + decay / 2 * weight.square().sum()
        )

    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=2000,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
    )

    def closure():
        solver.zero_grad()
        loss = objective(weight, bias)
        loss.backward()
        return loss

    solver.step(closure)
    best, start = objective(weight, bias).item(), math.log(4)
    heads = [(1.0, decay), (3.0, decay), (1.0, 10.0)]
    w, b = probe.fit_heads(x.float(), y, heads)
    for h in (0, 1):
        w_h = w[:, h].double() * x.std(0, correction=0)[:, None]
        reached = objective(w_h, b[h].double() + x.mean(0) @ w[:, h].double()).item()
        assert best <= reached < best + 0.01 * (start - best)  # 400 steps get so far
    alone = probe.fit_heads(x.float(), y, heads[1:2])
    assert torch.allclose(
        alone[0][:, 0], w[:, 1], rtol=1e-2, atol=1e-2 * w[:, 1].abs().max().item()
    )  # heads do not mix
    assert torch.allclose(
        probe.fit_heads(x.float(), y, heads[:1], rows=torch.arange(300))[0],
        probe.fit_heads(x[:300].float(), y[:300], heads[:1])[0],
    )


def test_linear_head_is_chosen_without_the_validation_split():
    x, y = gaussian(400, 30, 1).float(), torch.arange(400) % 2
    x[:, 0] += 2.0 * y
    found = probe.linear_probe(x, y, x, y, seed=3)
    head = found["linear_lr"], found["linear_decay"]
    assert head in probe.HEADS and 50 < found["linear_held_out"] <= 100
    weight, bias = probe.fit_heads(x, y, [head], 3)  # fitted to everything
    assert weight.shape == (30, 1, 2) and bias.shape == (1, 2)
    assert found["linear"] == round(probe.score(weight, bias, x, y)[0], 2)


def test_shapes_are_a_function_of_seed_and_index():
    a, b = train.Shapes(32, seed=1), train.Shapes(32, seed=1)
    assert np.array_equal(a[7][0], b[7][0]) and a[7][1] == 7
    assert not np.array_equal(a[7][0], a[17][0])
    assert not np.array_equal(a[7][0], train.Shapes(32, seed=2)[7][0])
    assert not np.array_equal(a[7][0], train.Shapes(32, seed=1, split="val")[7][0])
    assert train.Shapes(50)[0][0].shape == (50, 50, 3)


def test_shapes_are_not_linear_in_the_pixels():
    x, y = {}, {}
    for split, count in (("train", 1500), ("val", 500)):
        shapes = train.Shapes(32, split=split)
        x[split] = (
            torch.stack([torch.from_numpy(shapes[i][0]).flatten() for i in range(count)]) / 255
        )
        y[split] = torch.tensor([shapes[i][1] for i in range(count)])
    assert probe.linear_probe(x["train"], y["train"], x["val"], y["val"])["linear"] <= 40


def test_images_are_a_function_of_seed_epoch_and_index():
    source = train.Shapes(40)
    kinds = [(2, 32, 0.3, 1), (3, 12, 0.05, 0.3)]
    for crops in ((), kinds[:1], kinds):
        images = train.Images(source, 32, crops, seed=3)
        state = torch.get_rng_state()
        views, label = images[(1, 5)]
        wanted = [(count, 3, size, size) for count, size, *_ in crops] or [(1, 3, 32, 32)]
        assert [view.shape for view in views] == wanted and label == 5
        assert all(view.dtype == torch.uint8 for view in views)
        again, later = images[(1, 5)][0], images[(2, 5)][0]
        assert all(map(torch.equal, views, again))
        assert torch.equal(views[0], later[0]) == (crops == ())
        assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(views[0][0], views[0][1]) and not torch.equal(views[1][0], views[1][1])


TABLES = [train.constant(name, torch.device("cpu")) for name in ("luma", "hue")]


def test_photometric_is_torchvisions_with_the_same_factors():
    from torchvision.transforms.v2 import functional as tv

    x, u = (
        torch.rand(40, 3, 24, 24, generator=generator()),
        torch.rand(40, 9, generator=generator(1)),
    )
    u[:, 3] = 0.5  # no turn of the hue: the two turn it in different planes
    out = train.photometric(x, u, *TABLES, 0.5, 0.2)
    seen = set()
    for image, draw, got in zip(x, u.tolist(), out, strict=False):
        seen |= {
            (name, draw[i] < p)
            for name, i, p in (
                ("jitter", 4, 0.8),
                ("gray", 5, 0.2),
                ("blur", 7, 0.5),
                ("solarize", 8, 0.2),
            )
        }
        if draw[4] < 0.8:
            image = tv.adjust_brightness(image, 1 + (2 * draw[0] - 1) * 0.4)
            image = tv.adjust_contrast(image, 1 + (2 * draw[1] - 1) * 0.4)
            image = tv.adjust_saturation(image, 1 + (2 * draw[2] - 1) * 0.2)
        if draw[5] < 0.2:
            image = tv.rgb_to_grayscale(image, num_output_channels=3)
        if draw[7] < 0.5:
            image = tv.gaussian_blur(image, [3, 3], [0.1 + 1.9 * draw[6]] * 2)
        near = (image - 128 / 255).abs() < 1e-5  # on the threshold rounding decides
        if draw[8] < 0.2:
            image = tv.solarize(image, 128 / 255)
        assert ((got - image).abs() < 1e-5).logical_or(near).all()
    assert len(seen) == 8  # every branch, taken and not
    gray = torch.rand(8, 1, 9, 9, generator=generator()).expand(-1, 3, -1, -1)
    u[:8, :3] = 0.5
    u[:8, 3] = torch.rand(8, generator=generator(2))
    assert torch.allclose(
        train.photometric(gray, u[:8], *TABLES), gray, atol=1e-3
    )  # no hue to turn; the luma weights sum to 0.9999
    assert not torch.allclose(train.photometric(x[:8], u[:8], *TABLES), x[:8], atol=1e-2)


def test_cropping_and_colours_compile_to_one_graph_each():
    x, u = (
        torch.rand(6, 3, 32, 32, generator=generator()),
        torch.rand(6, 23, generator=generator(1)),
    )
    whole = partial(torch.compile, backend="aot_eager", dynamic=False, fullgraph=True)
    crop, recolor = whole(train.resized_crop), whole(train.photometric)
    for size, *scale in ((32, 0.3, 1), (14, 0.05, 0.3)):
        view = train.resized_crop(x, u, size, scale)
        torch.testing.assert_close(crop(x, u, size, scale), view)
        args = view, u[:, :9], *TABLES, 0.5, 0.2
        torch.testing.assert_close(recolor(*args), train.photometric(*args))


def test_batches_cover_an_epoch_over_ranks():
    rows = torch.arange(6).tensor_split(4)  # 2, 2, 1, 1
    shares = [list(train.batches(23, 6, 0, 6, 0, part)) for part in rows]
    assert [len(share[0]) for share in shares] == [2, 2, 1, 1]
    for epoch in (0, 1):
        seen = [
            key for share in shares for batch in share[3 * epoch : 3 * epoch + 3] for key in batch
        ]
        assert len(set(seen)) == 18 and {e for e, _ in seen} == {epoch}
    assert list(train.batches(23, 6, 4, 6, 0, rows[1])) == shares[1][4:]
    whole = list(train.batches(23, 6, 0, 6, 0, torch.arange(6)))
    assert whole == [[*itertools.chain(*parts)] for parts in zip(*shares, strict=True)]


@pytest.mark.parametrize("height, width, side", [(32, 32, 32), (32, 32, 14), (40, 24, 32)])
def test_resized_crop_is_torchvisions_of_the_same_box(height, width, side):
    from torchvision.transforms.v2 import functional as tv

    x = torch.rand(200, 3, height, width, generator=generator(), dtype=torch.float64)
    u = torch.rand(200, 23, generator=generator(1), dtype=torch.float64)
    got = train.resized_crop(x, u, side, (0.05, 1.0))
    sizes = []
    for image, draw, out in zip(x, u, got, strict=True):
        for attempt in range(10):
            area = height * width * (0.05 + 0.95 * draw[attempt])
            ratio = math.exp((2 * draw[10 + attempt] - 1) * math.log(4 / 3))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if h <= height and w <= width:
                break
        h, w = min(h, height), min(w, width)
        top, left = int(draw[20] * (height - h + 1)), int(draw[21] * (width - w + 1))
        expected = tv.resized_crop(image, top, left, h, w, [side, side], antialias=True)
        expected = expected.flip(2) if draw[22] < 0.5 else expected
        assert (out - expected).abs().max() < 1e-6  # its weights are float32
        sizes.append(h * w / (height * width))
    assert min(sizes) < 0.15 and max(sizes) > 0.75


@pytest.mark.parametrize("recipe", ["masked", "crops"])
def test_large_photographs_are_cropped_as_they_are_loaded(recipe, tmp_path):
    folder = jpeg_folder(tmp_path / "photos", size=100)
    arguments = [
        "--data",
        str(folder),
        "--recipe",
        recipe,
        "--model",
        "vit_n16",
        "--image-size",
        "64",
    ]
    arguments += ["--batch-size", "6", "--augment", "color", "--steps", "3"]
    one = run_train(tmp_path, *arguments, "--workers", "0")
    path = tmp_path / "again.pt"
    train.main([*TINY, *arguments, "--workers", "1", "--ckpt", str(path)])
    assert same_weights(one, torch.load(path, weights_only=True))


def test_small_images_of_one_size_are_held(tmp_path):
    folder = jpeg_folder(tmp_path / "photos")
    data = train.open_data(str(folder), "", "train")
    whole = train.hold(data, 0, torch.device("cpu"))
    assert whole.shape == (24, 3, 40, 40) and whole.dtype == torch.uint8
    assert np.array_equal(whole[13].permute(1, 2, 0), np.asarray(data[13][0]))
    from PIL import Image

    Image.new("RGB", (40, 44)).save(folder / "train" / "class1" / "x.jpg")
    odd = train.open_data(str(folder), "", "train")
    assert train.hold(odd, 0, torch.device("cpu")) is None
    assert train.hold(train.Shapes(100), 0, torch.device("cpu")) is None


def step_gradients(arguments, size, dtype, world=1, rank=0):
    """Loss and parameter gradients of a first step in pieces of `size`, as in train's loop."""
    args = train.parse_args([*TINY, "--no-amp", *arguments])
    train.fill_in(args, 20_000, 32, world)
    state = train.build(args, torch.device("cpu"))
    encoder, predictor = state["encoder"], state["predictor"]
    modules = [m.to(dtype) for m in (encoder, predictor)]
    if world > 1:
        modules = [DistributedDataParallel(m) for m in modules]
    rows = torch.arange(args.batch_size).tensor_split(world)[rank]
    images = torch.utils.data.Subset(train.Shapes(32), rows.tolist())
    whole = train.hold(images, 0, torch.device("cpu"))
    crops = [(2, 32, 0.3, 1), (3, 16, 0.05, 0.3)] if args.recipe == "crops" else [(1, 32, 0.3, 1)]
    modules = encoder, None, *modules
    settings, forward, loss_of = train.recipe(args, crops, *modules, torch.device("cpu"))

    def draw(images, some):
        views, masks = train.draw([images], 5, some, **settings)
        return [view.to(dtype) for view in views], masks

    parts = zip(whole.split(size), rows.split(size), strict=True)
    pieces = [partial(draw, *part) for part in parts]
    embeddings = train.first_pass(forward, pieces, 7)
    reg_of = train.make_regularizer(args.sigreg, 32, 5)
    loss = loss_of(*embeddings, regularizer=reg_of)[0]
    loss.backward()
    if len(pieces) > 1:
        train.second_pass(forward, pieces, 7, [z.grad for z in embeddings], modules[2:])
    parameters = [*encoder.parameters(), *predictor.parameters()]
    assert all(p.grad is not None for p in parameters)
    return loss.detach(), torch.cat([p.grad.flatten() for p in parameters])


PIECES = [
    ["--sigreg", name, "--sigreg-on", on, "--masks-per", per, "--augment", "color"]
    for name in ("spectral", "legendre", "sketched")
    for on, per in (("pooled", "image"), ("tokens", "batch"))
]
PIECES += [["--recipe", "crops", "--sigreg", name] for name in ("sketched", "legendre")]
PIECES += [["--directions", "both", "--pred", "relative", "--sigreg-on", "tokens"]]
PIECES += [["--stop-grad", "--targets", "full", "--masks-per", "batch", "--augment", "color"]]
PIECES += [["--sigreg", "none"]]  # the loss does not see the context's embedding then


@pytest.mark.parametrize("arguments", PIECES, ids=" ".join)
def test_micro_batches_have_the_gradient_of_the_batch(arguments):
    arguments = [*arguments, "--batch-size", "24"]
    loss, gradient = step_gradients(arguments, 24, torch.float64)
    for size in (7, 8):
        again, pieces = step_gradients(arguments, size, torch.float64)
        assert again.item() == pytest.approx(loss.item(), rel=1e-12)
        assert (pieces - gradient).norm() <= 1e-10 * gradient.norm()
    loss, gradient = step_gradients(arguments, 24, torch.float32)
    again, pieces = step_gradients(arguments, 7, torch.float32)
    assert (pieces - gradient).norm() <= 1e-5 * gradient.norm()


def pieces_rank(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for i, arguments in enumerate((PIECES[3], ["--sigreg", "sketched", "--recipe", "masked"])):
        arguments = [*arguments, "--batch-size", "25"]  # 13 and 12 images
        result = step_gradients(arguments, 5, torch.float64, 2, rank)
        if rank == 0:
            torch.save(result, f"{folder}/{i}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_micro_batches_over_two_uneven_ranks(tmp_path):
    mp.spawn(pieces_rank, (str(tmp_path),), nprocs=2)
    for i, arguments in enumerate((PIECES[3], ["--sigreg", "sketched", "--recipe", "masked"])):
        loss, gradient = torch.load(tmp_path / f"{i}.pt")
        arguments = [*arguments, "--batch-size", "25"]
        expected, whole = step_gradients(arguments, 25, torch.float64)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
        assert (gradient - whole).norm() <= 1e-10 * whole.norm()


def two_hosts(arguments, *checkpoints):
    """Two rendezvous agents on the loopback, one rank each, each with its own checkpoint path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    agent += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    script = [str(HERE / "train.py"), *TINY, *arguments, "--ckpt"]
    hosts = [
        subprocess.Popen(
            [*agent, f"--node_rank={i}", *script, str(path)], stdout=subprocess.DEVNULL
        )
        for i, path in enumerate(checkpoints)
    ]
    assert [host.wait(timeout=240) for host in hosts] == [0, 0]


def test_two_hosts_without_a_shared_disk(tmp_path):
    one, two = tmp_path / "one" / "ckpt.pt", tmp_path / "two" / "ckpt.pt"
    one.parent.mkdir(), two.parent.mkdir()
    arguments = ["--no-amp", "--weight-decay", "0", "--lr", "1e-4", "--batch-size", "33"]
    two_hosts([*arguments, "--steps", "6"], one, two)
    assert one.exists() and not two.exists()
    # the checkpoint is with rank 1 now; of 17 and 16 images both make two pieces
    two_hosts([*arguments, "--steps", "12", "--micro-batch", "16"], two, one)
    train.main([*TINY, *arguments, "--steps", "12", "--ckpt", str(tmp_path / "whole.pt")])
    logs = [tmp_path / "whole.jsonl", one.with_suffix(".jsonl"), two.with_suffix(".jsonl")]
    whole, before, after = (
        {row["step"]: row["loss"] for row in map(json.loads, log.read_text().splitlines()[1:])}
        for log in logs
    )
    assert list(before) == [2, 4, 6] and list(after) == [8, 10, 12]
    # float32 sums in another order, amplified by 12 steps of AdamW
    assert before | after == pytest.approx(whole, rel=1e-3)


def test_batch_norm_refuses_pieces(tmp_path):
    arguments = ["--recipe", "crops", "--model", "resnet18", "--micro-batch", "4", "--ckpt"]
    refuse([*TINY, *arguments, str(tmp_path / "x.pt")], "resnet18 has batch norm.*--micro-batch")


def test_a_signal_between_two_ranks_counts_once_for_both(monkeypatch):
    honest = {name: signal.getsignal(name) for name in train.SIGNALS}
    caught = train.catch_signals(world=2)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: signal.raise_signal(signal.SIGUSR1))
    assert not caught()  # the other rank has not heard of it
    monkeypatch.setattr(dist, "all_reduce", lambda *_: None)
    assert caught()
    for name, handler in honest.items():
        signal.signal(name, handler)


@pytest.mark.parametrize(
    "number, more",
    [
        (signal.SIGTERM, ["--workers", "0"]),
        (signal.SIGUSR1, ["--workers", "0"]),
        (signal.SIGTERM, ["--workers", "2", "--image-size", "104", "--model", "vit_n26"]),
    ],
)
def test_signals_save_and_continue(number, more, tmp_path):
    arguments = ["--steps", "14", "--save-every", "100", "--log-every", "1", *more]
    command = [sys.executable, str(HERE / "train.py"), *TINY, *arguments, "--ckpt"]
    process = subprocess.Popen(
        [*command, str(tmp_path / "cut.pt")],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("step 4/"):
            os.killpg(process.pid, number)  # as torchrun does: the loaders get it, too
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "saved; the same command continues" in rest
    stopped = torch.load(tmp_path / "cut.pt", weights_only=True)["step"]
    assert 4 <= stopped < 14
    train.main([*command[2:], str(tmp_path / "cut.pt")])
    train.main([*command[2:], str(tmp_path / "whole.pt")])
    cut, whole = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("cut", "whole"))
    assert same_weights(cut, whole)
    rows = [json.loads(line) for line in (tmp_path / "cut.jsonl").read_text().splitlines()]
    assert [row.get("step") for row in rows] == [None, *range(1, 15)]


def refuse(arguments, match):
    """train.main ends with one line that matches, and a non-zero code."""
    with pytest.raises(SystemExit) as end:
        train.main(arguments)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code.strip(), end.value.code
    assert re.search(match, end.value.code), end.value.code


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--model", "vit_z16"], "vit_z16.*vit_b16"),
        (["--model", "resnet18"], "resnet18 has none.*--recipe crops"),
        (["--recipe", "crops", "--local-views", "-1"], "local-views.*at least 0"),
        (["--recipe", "crops", "--model", "googlenet"], "googlenet cannot be a backbone.*swin"),
        (["--recipe", "crops", "--model", "squeezenet1_0"], "squeezenet1_0 cannot.*resne"),
        (["--recipe", "crops", "--model", "maxvit_t"], "maxvit_t cannot.*convnext"),
        (["--recipe", "crops", "--model", "vit_b_16"], "vit_b_16 cannot.*vgg"),
        (["--data", "nowhere"], "nowhere.*cifar10"),
        (["--image-size", "30"], "image size 30.*24 or 32"),
        (["--lam", "-1"], "--lam -1"),
        (["--recipe", "crops", "--lam", "2"], "--lam 2.0 of --recipe crops must be at most 1"),
        (["--recipe", "crops", "--stop-grad"], "crops does not take --stop-grad"),
        (["--ema", "0.9", "--directions", "both"], "--ema.*--directions one"),
        (["--local-views", "2"], "masked does not take --local-views"),
        (["--recipe", "crops", "--local-size", "20"], "--local-size 20 .*patch of vit_n8"),
        (["--ema", "1"], "--ema below 1"),
        (["--lam", "nan"], "--lam nan"),
        (["--lr", "-1"], "--lr -1"),
        (["--batch-size", "1"], "--batch-size 1 "),
        (["--batch-size", "20001"], "20001.*20000 images"),
        (["--image-size", "8"], "grid"),
        (["--steps", "0"], "--steps 0"),
        (["--device", "abacus"], "--device abacus"),
        (["--target-scale", "0.5", "1.5"], "target_scale"),
        (["--min-context", "2"], "min_context"),
        (["--ckpt", "no/such/folder/ckpt.pt"], "no such folder"),
    ],
)
def test_bad_settings(arguments, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse([*TINY, *arguments], match)
    assert not list(tmp_path.iterdir())


def test_the_log_of_a_run_named_with_a_dot_is_its_own(tmp_path):
    for name in ("lam0.1", "lam0.1.pt"):
        log, _ = train.start_log(train.parse_args(["--ckpt", str(tmp_path / name)]), 0)
        assert log == tmp_path / "lam0.1.jsonl"


def test_every_rank_has_an_image(tmp_path):
    args = train.parse_args(["--batch-size", "2"])
    with pytest.raises(SystemExit, match="--batch-size 2 must be at least 2 and 3 ranks"):
        train.fill_in(args, 20_000, 32, world=3)


def test_bad_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    refuse([*TINY, "--data", "empty"], "empty has no train/<class>")
    (tmp_path / "hollow" / "train" / "dog").mkdir(parents=True)
    refuse([*TINY, "--data", "hollow"], "hollow")
    (tmp_path / "classless" / "train").mkdir(parents=True)
    refuse([*TINY, "--data", "classless"], "classless")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_folder_trains_probes_and_names_a_corrupt_image(tmp_path, monkeypatch, capsys, workers):
    monkeypatch.chdir(tmp_path)
    folder = jpeg_folder(tmp_path / "photos")
    arguments = [
        "--data",
        "photos",
        "--steps",
        "2",
        "--batch-size",
        "24",
        "--workers",
        workers,
        "--device",
        "cpu",
    ]
    train.main(arguments)
    probe.main(["ckpt.pt", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        result["train"] == result["val"] == 24
        and result["image_size"] == 40
        and result["model"] == "vit_n4"
    )
    bad = folder / "train" / "class1" / "7.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    refuse([*arguments, "--ckpt", "other.pt"], r"cannot read image photos/train/class1/7\.jpg")


def test_bad_checkpoints(tmp_path, trained):
    folder, _ = trained
    good = (folder / "ckpt.pt").read_bytes()
    ran = tmp_path / "ran"
    evil = pickle.dumps(
        type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (str(ran),))})(), protocol=2
    )
    buffer = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, buffer)
    for content, match in (
        (good[: len(good) // 2], "truncated"),
        (b"", "truncated"),
        (b"hello", "not a checkpoint"),
        (evil, "not a checkpoint"),
        (buffer.getvalue(), "not a checkpoint"),
    ):
        path = tmp_path / "ckpt.pt"
        path.write_bytes(content)
        refuse([*TINY, "--ckpt", str(path)], match)
        with pytest.raises(SystemExit, match=match):
            probe.main([str(path)])
        assert path.read_bytes() == content and not ran.exists()
    with pytest.raises(SystemExit, match="no checkpoint"):
        probe.main([str(tmp_path / "absent.pt")])


def test_non_finite_loss_keeps_the_last_good_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    refuse(
        [
            "--steps",
            "40",
            "--batch-size",
            "32",
            "--save-every",
            "1",
            "--log-every",
            "10",
            "--device",
            "cpu",
            "--lr",
            "1e30",
            "--ckpt",
            str(path),
        ],
        "non-finite by step",
    )
    if path.exists():
        saved = torch.load(path, weights_only=True)
        assert all(value.isfinite().all() for value in saved["encoder"].values())


def test_every_view_is_drawn_on_its_own():
    from torchvision.transforms.v2 import functional as tv

    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator())
    batch, share = image.expand(4, -1, -1, -1), torch.arange(4)
    draw = partial(train.draw, crop=train.resized_crop, recolor=train.photometric, batch_size=4)
    (view,), _ = draw([batch[:, None]], 1, share)
    wanted = tv.normalize(batch / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(view, wanted)
    crops, _ = draw([batch], 1, share, crops=[(2, 32, 0.3, 1)])
    colours, _ = draw([batch[:, None]], 1, share, colors=(0, 0), make_masks=lambda generator: ())
    again, _ = draw([batch], 2, share, crops=[(2, 32, 0.3, 1)])
    for views in (crops, colours, again):
        assert len(views) == 2
    every = torch.cat([*crops, *colours, *again]).flatten(1)
    assert len(every.unique(dim=0)) >= 22  # one in five colours is left alone


def test_teacher_follows_after_the_step(tmp_path, few_shapes):
    saved = run_train(tmp_path, "--steps", "1", "--ema", "0.9")
    torch.manual_seed(0)
    for name, start in model.vit("vit_n8", 32).state_dict().items():
        wanted = start.lerp(saved["encoder"][name], 0.1)
        torch.testing.assert_close(saved["teacher"][name], wanted, atol=1e-6, rtol=0)


def test_rates_are_of_the_step(tmp_path, few_shapes):
    flags = ["--schedule", "cosine", "--warmup-epochs", "1", "--batch-size", "300"]
    run_train(tmp_path, *flags, "--steps", "4", "--log-every", "1")  # two steps an epoch
    rows = [json.loads(x) for x in (tmp_path / "ckpt.jsonl").read_text().splitlines()[1:]]
    assert [row["lr"] for row in rows] == pytest.approx([5e-4, 1e-3, 5e-4, 0], abs=1e-9)
    assert [row["epoch"] for row in rows] == [0, 0, 1, 1]


MATTERS = """--lam 2|--sigreg spectral|--sigreg sketched|--sigreg none|--sigreg-on tokens|--seed 1
--pred relative|--directions both|--targets full|--predictor transformer|--masks random
--masks-per batch|--num-targets 3|--min-context 0.6|--target-scale 0.2 0.2|--augment color
--recipe crops|--recipe crops --lam 0.1|--recipe crops --sigreg legendre
--recipe crops --proj-dim 8|--recipe crops --augment color
--predictor-size 2|--predictor transformer --predictor-size 2"""


def test_no_option_is_ignored():
    losses = {}
    for more in ["", *re.split("[|\n]", MATTERS)]:
        arguments = f"--batch-size 8 --augment crop {more}".split()
        losses[more] = round(step_gradients(arguments, 8, torch.float64)[0].item(), 9)
    assert len({*losses.values()}) == len(losses), losses


def test_matrices_decay():
    args = train.parse_args([*TINY, "--predictor", "transformer"])
    train.fill_in(args, 20_000, 32, 1)
    state = train.build(args, torch.device("cpu"))
    plain, matrices = (group["params"] for group in state["optimizer"].param_groups)
    modules = [m for name in ("encoder", "predictor") for m in state[name].modules()]
    linear = [m.weight for m in modules if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert {*map(id, matrices)} == {*map(id, linear)}
    assert [g["weight_decay"] for g in state["optimizer"].param_groups] == [0, 0.05]
    total = [p for name in ("encoder", "predictor") for p in state[name].parameters()]
    assert len(plain) + len(matrices) == len(total)


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        [
            key[1]
            for batch in train.batches(23, 6, first, first + 3, seed, torch.arange(6))
            for key in batch
        ]
        for first, seed in ((0, 0), (3, 0), (0, 1))
    ]
    assert len({*map(tuple, orders)}) == 3


def test_crops_are_of_seed_epoch_and_index():
    source = [train.Shapes(40)[0]] * 3
    keys = [(seed, epoch, i) for seed in (0, 1) for epoch in (0, 1) for i in range(3)]
    views = [
        train.Images(source, 32, [(1, 32, 0.3, 1)], s)[e, i][0][0].flatten() for s, e, i in keys
    ]
    assert len({tuple(view.tolist()) for view in views}) == len(keys)


@pytest.mark.parametrize("name", train.DATASETS)
def test_splits_are_apart(name, monkeypatch):
    _, train_split, val_split = train.DATASETS[name]
    monkeypatch.setitem(train.DATASETS, name, (lambda root, **said: said, train_split, val_split))
    one, two = (train.open_data(name, "", split) for split in ("train", "val"))
    assert one != two and (one.get("train") or one["split"] in ("train", "trainval"))
    assert two.get("train") is False or two["split"] in ("val", "test")


def test_hue_turns_by_its_angle():
    x, u = 0.4 + 0.2 * torch.rand(9, 3, 4, 4, generator=generator()), torch.full((9, 9), 0.5)
    u[:, 3] = torch.linspace(0, 1, 9)
    yiq = [
        torch.einsum("ic,bchw->ibhw", torch.from_numpy(train.YIQ).float(), y)
        for y in (x, train.photometric(x, u, *TABLES))
    ]
    (luma, *before), (same, *after) = yiq
    torch.testing.assert_close(luma, same, atol=1e-5, rtol=0)
    turned = torch.complex(*after) / torch.complex(*before)
    angle = 2 * math.pi * 0.1 * (2 * u[:, 3] - 1)
    wanted = torch.polar(torch.ones(9), angle)[:, None, None].expand(9, 4, 4)
    torch.testing.assert_close(turned, wanted, atol=1e-2, rtol=0)


def test_blur_widens_with_the_image():
    from torchvision.transforms.v2 import functional as tv

    x, sigma = torch.rand(2, 3, 60, 60, generator=generator()), torch.tensor([[0.5], [2.0]])
    for image, s, got in zip(x, sigma, train.blur(x, sigma), strict=True):
        torch.testing.assert_close(got, tv.gaussian_blur(image, [7, 7], [s.item()] * 2))


def test_saved_state_is_a_copy():
    state = {"a": {"b": torch.zeros(2)}}
    copied = train.on_host(state)
    state["a"]["b"] += 1
    assert copied["a"]["b"].sum() == 0


@pytest.mark.parametrize(
    "flags, kinds",
    [
        ([], []),
        (["--augment", "crop"], [(1, 32, 0.3, 1)]),
        (["--augment", "color"], [(1, 32, 0.3, 1)]),
        (["--recipe", "crops"], [(2, 32, 0.3, 1), (6, 16, 0.05, 0.3)]),
        (["--recipe", "crops", "--local-views", "0"], [(2, 32, 0.3, 1)]),
    ],
)
def test_held_images_are_those_of_the_batch(flags, kinds, few_shapes):
    args = train.parse_args([*TINY, *flags])
    data, share = train.Shapes(32), torch.arange(32)
    train.fill_in(args, len(data), 32, 1)
    loader, found = train.load(args, data, 1, 2, share, torch.device("cpu"))
    assert found == kinds
    (keys,), (batch,) = train.batches(600, 32, 1, 2, 0, share), next(iter(loader))
    wanted = torch.stack([torch.from_numpy(data[i][0]).permute(2, 0, 1) for _, i in keys])
    assert torch.equal(batch if kinds else batch[:, 0], wanted)
    settings, *_ = train.recipe(
        args, found, model.vit("vit_n8", 32), *[None] * 3, torch.device("cpu")
    )
    colours = {"crops": (0.5, 0.2)}.get(args.recipe, (0, 0)) if args.augment == "color" else None
    assert settings.get("colors") == colours


def test_features_are_of_normalised_images(few_shapes):
    from torchvision.transforms.v2 import functional as tv

    torch.manual_seed(0)
    encoder, data = (
        model.vit("vit_n8", 32).eval(),
        torch.utils.data.Subset(train.Shapes(32), range(5)),
    )
    x = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in data]) / 255
    tokens = encoder(tv.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    cls, avg = tokens[:, 0], tokens[:, 1:].mean(1)
    for pool, wanted in (("cls", cls), ("avg", avg), ("both", torch.cat([avg, cls], dim=1))):
        found, labels = probe.extract_features(encoder, train.Images(data, 32), pool, batch_size=2)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert labels.tolist() == [0, 1, 2, 3, 4]
    pixels, _ = probe.extract_features(None, train.Images(data, 32), batch_size=2)
    torch.testing.assert_close(pixels, torch.nn.functional.avg_pool2d(x, 2).flatten(1))


def test_held_out_tenth_is_held_out():
    x, y = gaussian(300, 400).float(), torch.arange(300) % 2  # noise: any fit is of the images seen
    found = probe.linear_probe(x, y, x, y)
    assert found["linear_held_out"] < 85 and found["linear"] > 95
    heads = [(1.0, 1e4), (1.0, 0.0), (1.0, 1e5)]  # one of them learns
    x[:, 0] += 9 * y
    assert probe.linear_probe(x, y, x, y, heads=heads)["linear_decay"] == 0


def test_shots_are_drawn_anew(monkeypatch):
    honest, rows = probe.fit_heads, []
    monkeypatch.setattr(probe, "fit_heads", lambda *a: rows.append(a[4]) or honest(*a))
    x, y = gaussian(60, 5).float(), torch.arange(60) % 3
    found = probe.few_shot_probe(x, y, x, y, shots=2)
    assert len({tuple(some.tolist()) for some in rows}) == 5 and found["2-shot_std"] > 0
    assert all(y[some].bincount().tolist() == [2, 2, 2] for some in rows)


def test_drop_path_skips_deep_blocks_while_training():
    torch.manual_seed(0)
    encoder, x = model.vit("vit_n8", 32), torch.randn(500, 2, 128)
    still = [block(x) for block in encoder.blocks]
    probe.add_drop_path(encoder.blocks, 0.6)
    skipped = []
    for block, before in zip(encoder.blocks, still, strict=True):
        assert torch.equal(block.eval()(x), before)
        skipped.append((block.train()(x) == x).all((1, 2)).float().mean().item())
    assert skipped == pytest.approx([0, 0.04, 0.16, 0.36], abs=0.08)  # both branches


def test_decay_of_finetuning_is_of_matrices():
    encoder, head = model.vit("vit_n8", 32), torch.nn.Linear(128, 10)
    groups = probe.layer_groups(encoder, head, 0.5, 0.1)
    named = [*encoder.named_parameters(), *head.named_parameters()]
    for (name, p), group in zip(named, groups, strict=True):
        matrix = name.endswith("weight") and "norm" not in name
        assert group["params"][0] is p and group["weight_decay"] == 0.1 * matrix, name


def test_both_passes_see_the_same_noise():
    seen = []

    def forward(x):
        seen.append(torch.nn.functional.dropout(x))
        return (seen[-1],)

    pieces = [lambda i=i: (torch.ones(4, 50, requires_grad=True) * i,) for i in (1, 2)]
    embeddings = train.first_pass(forward, pieces, 3)
    train.second_pass(forward, pieces, 3, [torch.ones_like(z) for z in embeddings], [])
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(2 * seen[0], seen[1])


def test_diagnostics_are_of_the_global_crops():
    args = train.parse_args(["--recipe", "crops"])
    y = gaussian(20 * 8, 6).view(20, 8, 6)
    args.sigreg = "sketched"
    row = train.diagnostics(args, *torch.zeros(3), [y])
    assert row["erank"] == pytest.approx(sigreg.effective_rank(y[:, :2].reshape(40, 6)).item())


def test_slices_are_of_the_seed_and_as_many_as_asked():
    z = gaussian(20, 6)
    found = train.make_regularizer("sketched", 7, 5)(z)
    assert found == sigreg.sketched_sigreg(z, sigreg.random_directions(6, 7, seed=5))


def test_images_keep_their_aspect():
    image = np.arange(20 * 40 * 3, dtype=np.uint8).reshape(20, 40, 3)
    (view,), _ = train.Images([(image, 0)], 20)[0, 0]
    assert np.array_equal(view[0].permute(1, 2, 0), image[:, 10:30])


def test_teacher_makes_the_targets():
    args = train.parse_args([*TINY, "--data", "x", "--no-amp", "--ema", "0.9"])
    train.fill_in(args, 20_000, 32, 1)
    state = train.build(args, torch.device("cpu"))
    encoder, teacher = state["encoder"], state["teacher"]
    teacher.pos_embed.data += torch.randn_like(teacher.pos_embed)
    modules = encoder, teacher, encoder, state["predictor"]
    settings, forward, _ = train.recipe(args, (), *modules, torch.device("cpu"))
    (context, targets), images = settings["make_masks"](), torch.rand(1, 3, 32, 32)
    found = forward([images, images], (context, targets))[1]
    torch.testing.assert_close(found, teacher(images, targets))


def test_batch_norm_is_of_all_gpus(monkeypatch):
    monkeypatch.setattr(train, "DistributedDataParallel", lambda module, devices: module)
    args = train.parse_args(["--recipe", "crops"])
    head = train.parallel(model.projector(4, 2), args, torch.device("cuda"), 2)
    assert sum(isinstance(m, torch.nn.SyncBatchNorm) for m in head) == 2


def test_pieces_are_of_micro_batch_images():
    args = train.parse_args(["--batch-size", "33", "--micro-batch", "8"])
    assert train.number_of_pieces(args, model.vit("vit_n8", 32), torch.device("cpu"), 2) == 3


def test_seed_and_step_drive_what_is_drawn(tmp_path, monkeypatch, few_shapes):
    draw, regularizer, draws, slices = train.draw, train.make_regularizer, [], []

    def noted(batch, seed, *more, **settings):
        draws.append((seed, torch.initial_seed()))  # the latter for stochastic depth
        return draw(batch, seed, *more, **settings)

    monkeypatch.setattr(train, "draw", noted)
    monkeypatch.setattr(train, "make_regularizer", lambda *a: slices.append(a) or regularizer(*a))
    weights = []
    for seed in "01":
        flags = "--steps", "2", "--slices", "7", "--ckpt", str(tmp_path / f"{seed}.pt")
        train.main([*TINY, "--seed", seed, *flags])
        saved = torch.load(tmp_path / f"{seed}.pt", weights_only=True)
        weights.append(saved["encoder"]["blocks.0.attn.qkv.weight"])
    assert [len({*some}) for some in zip(*draws, strict=True)] == [4, 4]
    assert slices == [("legendre", 7, seed) for seed, _ in draws]
    assert (weights[0] - weights[1]).abs().mean() > 0.01  # two steps of Adam move them by 0.002


def test_pixels_need_no_encoder(trained, monkeypatch):
    seen = []
    stop = lambda encoder, *a, **k: seen.append(encoder) or sys.exit("enough")
    monkeypatch.setattr(probe, "extract_features", stop)
    with pytest.raises(SystemExit, match="enough"):
        probe.main([str(trained[0] / "ckpt.pt"), "--pixels", "--device", "cpu"])
    assert seen == [None]


def test_finetuning_trains_and_scores_what_it_says(tmp_path, monkeypatch, few_shapes):
    """In training mode, with draws of each step's own; scored: the tuned weights, in eval mode."""
    torch.manual_seed(0)
    flags = ["x", "--finetune", "--steps", "3", "--batch-size", "32", "--lr", "0.01"]
    options, encoder = probe.parse_args([*flags, "--device", "cpu"]), model.vit("vit_n8", 32).eval()
    options.workers, seeds, modes, choice = 0, [], [], probe.v2.RandomChoice
    encoder.blocks[0].register_forward_hook(lambda module, *_: modes.append(module.training))

    def noted(kinds):
        assert [(type(k).__name__, k.alpha) for k in kinds] == [("MixUp", 0.8), ("CutMix", 1.0)]
        return lambda *batch: seeds.append(torch.initial_seed()) or choice(kinds)(*batch)

    monkeypatch.setattr(probe.v2, "RandomChoice", noted)
    path, sets = tmp_path / "f.pt", [train.Shapes(32, 0, split) for split in ("train", "val")]
    found = probe.finetune(encoder, "x", *sets, 32, options, path)["finetune"]
    assert len({*seeds}) == 3 and modes == [True] * 3 + [False] * 4  # 200 images, 64 at once
    saved, head = torch.load(path, weights_only=True), torch.nn.Linear(128, 10)
    encoder.load_state_dict(saved["encoder"]), head.load_state_dict(saved["head"])
    x, y = probe.extract_features(encoder, train.Images(sets[1], 32))
    assert found == pytest.approx(100 * (head(x).argmax(1) == y).float().mean().item(), abs=0.01)


# ------------------------------------------------------------------------------- files and command


def only_torch(path):
    """Whether a script imports torch and the standard library alone, demos included."""
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in imports if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize(
    "files, use",
    [
        (
            ["sigreg.py"],
            """
            import sigreg
            z = torch.randn(32, 8, requires_grad=True)
            directions = sigreg.random_directions(8, 16, seed=0)
            loss = sigreg.sketched_sigreg(z, directions) + sigreg.legendre_sigreg(z)
            (loss + sigreg.spectral_sigreg(z)).backward()
            assert z.grad.isfinite().all() and sigreg.effective_rank(z) > 4
            """,
        ),
        (
            ["masks.py", "model.py"],
            """
            import masks, model
            encoder = model.vit("vit_n8", 32)
            context, targets = masks.multi_block_masks(2, encoder.grid)
            tokens = encoder(torch.randn(2, 3, 32, 32), context)
            z = model.MLPPredictor(128, 16)(tokens, context, targets)
            assert z.shape == (*targets.shape, 128)
            """,
        ),
    ],
)
def test_files_can_be_copied_alone(files, use, tmp_path):
    for name in files:
        shutil.copy(HERE / name, tmp_path)
        assert only_torch(tmp_path / name)
    code = (
        "import torch"
        + textwrap.dedent(use)
        + "\nassert 'torchvision' not in __import__('sys').modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_masks_draws_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    masks.main(grid=7, count=3, side=4)
    from PIL import Image

    picture = np.asarray(Image.open("masks.png"))  # an independent reader
    assert picture.shape == (3 * (4 + 28), 3 * (4 + 28), 3) and len(np.unique(picture)) > 5


@pytest.mark.parametrize("script", ["train.py", "probe.py"])
def test_help_fits_a_screen(script):
    command = [sys.executable, str(HERE / script), "--help"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 100


def test_full_disk_keeps_the_last_checkpoint(tmp_path):
    """A limit on a file's size stands in for the disk: both end a write in the middle."""
    code = f"""
        import pathlib, resource, torch, train
        path = pathlib.Path({str(tmp_path / "ckpt.pt")!r})
        train.save({{"x": torch.zeros(10)}}, path, "train.py")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        train.save({{"x": torch.zeros(1_000_000)}}, path, "train.py")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and re.fullmatch(
        r"train.py: cannot write .*ckpt.pt.*\n", done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    assert len(torch.load(tmp_path / "ckpt.pt", weights_only=True)["x"]) == 10


def test_interrupt_saves_and_ends_in_one_line(tmp_path):
    command = [sys.executable, str(HERE / "train.py"), *TINY, "--steps", "9999", "--workers", "1"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == ""
    assert "saved; the same command continues" in rest
