"""pytest test_sigreg.py: losses, gradients over ranks, masks, models, training, data, probes.

Grouped as the files are. Tolerances: 1e-10 and below is float64 rounding over sums of some 1e4
terms, 1e-5 is float32's; others say why.
"""

import ast
import csv
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
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as tv

import data
import masks
import model
import probe
import sigreg
import train

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


def gaussian(n, dim, seed=0, scale=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, dim, dtype=torch.float64, generator=generator) * scale).to(dtype)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradient(loss, z):
    z = z.clone().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


def off(got, wanted):
    """Distance relative to the wanted tensor's norm."""
    return ((got - wanted).norm() / wanted.norm()).item()


# ------------------------------------------------------------------------------------------- losses
def sketched_reference(z, directions, knots=17, t_max=3.0):
    """The definition, one slice and one knot at a time."""
    t, total = np.linspace(0, t_max, knots), 0.0
    for direction in directions.T.double():
        p = z.double() @ direction
        for k in range(knots):
            phi = math.exp(-(t[k] ** 2) / 2)
            weight = (t[1] - t[0]) * (1 if k in (0, knots - 1) else 2) * phi
            gap = (torch.cos(t[k] * p).mean() - phi) ** 2 + torch.sin(t[k] * p).mean() ** 2
            total = total + len(z) * weight * gap
    return total / directions.shape[1]


def sketched(z, slices=16):
    return sigreg.sketched_sigreg(z, sigreg.random_directions(z.shape[-1], slices, seed=0))


@pytest.mark.parametrize("n, dim", [(256, 16), (64, 128), (17, 17), (2, 8)])
def test_spectral_is_the_kl_of_the_singular_values_and_forgets_the_scale(n, dim):
    z = gaussian(n, dim) @ torch.diag(torch.logspace(0, -2, dim, dtype=torch.float64)) + 3
    sigma = torch.linalg.svdvals(z - z.mean(0))
    s = (sigma / sigma.sum())[: min(n - 1, dim)]  # of n centred rows n - 1 directions are free
    wanted = (s * torch.log(dim * s)).sum().item()
    for scale in (1e-6, 1, 1e6):
        assert sigreg.spectral_sigreg(scale * z).item() == pytest.approx(wanted, abs=1e-9)
    assert sigreg.effective_rank(z).item() == pytest.approx(dim * math.exp(-wanted))
    assert sigreg.embedding_std(z).item() == pytest.approx(z.var(0, correction=0).mean().sqrt())
    if n > dim:
        plain = gradient(sigreg.spectral_sigreg_plain, z)
        assert plain[0].item() == pytest.approx(wanted, abs=1e-10)
        grad = gradient(sigreg.spectral_sigreg, z)[1]
        assert off(grad, plain[1]) <= 1e-8  # the Gram matrix squares a condition number of 100


def degenerate_batches():
    yield "constant", torch.full((33, 8), 0.3), math.log(8)
    yield "constant random row", gaussian(1, 8).expand(32, 8), math.log(8)
    yield "zeros", torch.zeros(32, 8), math.log(8)
    yield "rank 1", gaussian(32, 1) @ gaussian(1, 8), math.log(8)
    yield "duplicated singular values", torch.eye(8).repeat(4, 1), None
    for n in (1, 2, 8):
        yield f"N = {n}", gaussian(n, 8), math.log(8) if n < 3 else None
    for scale in (1e-6, 1e6):
        yield f"scale {scale}", scale * gaussian(32, 8), None
        yield f"N < D, scale {scale}", scale * gaussian(5, 8), None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name, z, collapsed", [pytest.param(*c, id=c[0]) for c in degenerate_batches()]
)
def test_degenerate_batches_are_finite(name, z, collapsed, dtype):
    z = z.to(dtype)
    for loss in (sigreg.spectral_sigreg, sigreg.legendre_sigreg, sketched, sigreg.embedding_std):
        value, grad = gradient(loss, z)
        assert value.isfinite() and grad.isfinite().all() and value.dtype != torch.bfloat16
    flat = lambda z: sigreg.prediction_loss(z, z.new_zeros(z.shape), "relative")
    assert gradient(flat, torch.zeros_like(z))[1].isfinite().all()  # nothing to predict
    value, grad = gradient(sigreg.spectral_sigreg, z)
    size = z.float().abs().max().clamp_min(1e-6)
    assert 0 <= value <= math.log(8) + 1e-12
    assert grad.double().abs().max() * size <= 100  # no rounding blown up to 1e6
    rounded = name == "rank 1" and dtype == torch.bfloat16  # rounding to bfloat16 adds rank
    if collapsed is not None and not rounded:
        assert value.item() == pytest.approx(collapsed, abs=1e-5)


def test_legendre_is_the_gaussian_kl():
    z = gaussian(300, 6) @ gaussian(6, 6, seed=1) + 0.5
    cov = torch.cov(z.T, correction=0)
    normal = torch.distributions.MultivariateNormal
    fit = normal(z.mean(0), cov + 1e-4 * torch.diag(1 + cov.diagonal()))
    standard = normal(torch.zeros(6).double(), torch.eye(6).double())
    wanted = torch.distributions.kl_divergence(fit, standard).item() / 6
    assert sigreg.legendre_sigreg(z).item() == pytest.approx(wanted, rel=1e-10)
    value, grad = gradient(sigreg.legendre_sigreg_plain, z)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        fast, slope = gradient(sigreg.legendre_sigreg, z.to(dtype))
        assert fast.item() == pytest.approx(value.item(), rel=tolerance)
        assert off(slope, grad) <= 10 * tolerance  # times the covariance's condition, 2600
    white = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(cov)).T
    assert 0 <= sigreg.legendre_sigreg(white) < 1e-6  # the ridge moves the optimum by its square
    assert sigreg.legendre_sigreg(0.1 * white) > 1.5 > sigreg.legendre_sigreg(0.5 * white)
    shifted = sigreg.legendre_sigreg(white + 1).item()
    assert shifted == pytest.approx(0.5, rel=1e-3)  # |1|^2 / 2D per dimension


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, dim", [(2, 1), (17, 768), (2048, 64)])
def test_fast_sketched_is_the_plain_form(n, dim, dtype):
    directions = sigreg.random_directions(dim, 40, seed=3)
    value_off = {torch.float64: 1e-10}.get(dtype, 1e-5)
    # float32: the rounding of an angle of 1200 is 6e-5 of a radian; bfloat16's has 8 bits
    grad_off = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-3}[dtype]
    for scale in (0.01, 1.0, 100.0):
        z = gaussian(dim, n, seed=n, scale=scale, dtype=dtype).T  # not contiguous, several blocks
        value, grad = gradient(lambda z: sigreg.sketched_sigreg(z, directions), z)
        plain = lambda z: sigreg.sketched_sigreg_plain(z, directions)
        wanted, wanted_grad = gradient(plain, z.double())
        assert value.item() == pytest.approx(wanted.item(), rel=value_off)
        assert off(grad, wanted_grad) <= grad_off
    z = z.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(sigreg.sketched_sigreg(z, directions), z, create_graph=True)


def test_random_directions_are_uniform_and_of_the_seed():
    directions = sigreg.random_directions(48, 100, seed=7)
    assert torch.equal(directions, sigreg.random_directions(48, 100, seed=7))
    assert not torch.equal(directions, sigreg.random_directions(48, 100, seed=8))
    assert torch.allclose(directions.norm(dim=0), torch.ones(100), atol=1e-6)
    a = sigreg.random_directions(2, 200_000, seed=0)  # fourth moment on the circle: 3/8
    assert a.mean(1).abs().max() < 0.01
    assert a[0].pow(4).mean().item() == pytest.approx(3 / 8, abs=0.004)


def test_sigreg_by_name_draws_once_a_step():
    z = gaussian(40, 6)
    for name in ("spectral", "legendre"):
        assert sigreg.SIGReg(name)(z) == getattr(sigreg, f"{name}_sigreg")(z)
    regularizer = sigreg.SIGReg("sketched", 7, seed=5)
    wanted = sigreg.sketched_sigreg(z, sigreg.random_directions(6, 7, seed=5))
    assert regularizer(z) == wanted == regularizer(z) and sigreg.SIGReg("none")(z) == 0


@pytest.mark.parametrize("own_masks", [False, True])
@pytest.mark.parametrize(
    "on, error",
    [("pooled", "mse"), ("context", "norm"), ("tokens", "relative"), ("tokens", "smooth_l1")],
)
def test_masked_loss_is_its_definition(on, error, own_masks):
    """Source A's two readings, and the default with both directions, against restatements."""
    relative = error == "relative"
    shapes = [(20, 1 + 4, 5), (20, 2, 1 + 3, 5), (20, 2, 3, 5)] + [(20, 2, 4, 5)] * relative
    z = [gaussian(20, math.prod(s[1:]), i).view(s).requires_grad_() for i, s in enumerate(shapes)]
    z_context, z_target, z_pred, *z_back = z
    at = torch.stack([torch.randperm(12, generator=generator(i)) for i in range(20)])
    places = (at[:, :4], at[:, 4:10].view(20, 2, 3), 12) if own_masks else None
    regularizer = sigreg.spectral_sigreg_plain
    settings = {"regularizer": regularizer, "error": error, "on": on}
    loss = sigreg.masked_loss(*z, places=places, lam=0.5, **settings)
    context, target = z_context[:, 1:], z_target[:, :, 1:]
    c, t = context - context.mean(0), target - target.mean(0)
    for x, centred, indices in ((context, c, at[:, :4]), (target, t, at[:, 4:10].view(20, 2, 3))):
        for place in range(12 * own_masks):  # less the mean of all tokens with its patch index
            here = indices == place
            centred[here] = x[here] - x[here].mean(0)
    pooled = torch.cat([z_context, z_target.flatten(1, 2)], dim=1).mean(1)
    tokens = [x.reshape(-1, 5) for x in (c, t)]
    samples = {"pooled": [pooled], "context": [z_context.mean(1)], "tokens": tokens}[on]
    reg = sum(regularizer(x) for x in samples) / len(samples)
    if relative:
        pairs = (z_pred, t), (z_back[0], c[:, None].expand(-1, 2, -1, -1))
        pred = sum((p - x).square().sum() / x.square().sum() for p, x in pairs) / 2
    else:
        gap = (z_pred - target).abs()
        huber = torch.where(gap < 1, gap.square() / 2, gap - 0.5)
        pred = {
            "mse": gap.square().mean(),
            "norm": gap.square().sum(-1).mean(),
            "smooth_l1": huber.mean(),
        }[error]
    wanted = pred + 0.5 * reg, pred, reg
    for value, expected in zip(loss, wanted, strict=True):
        assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    slopes = (torch.autograd.grad(value, z) for value in (loss[0], wanted[0]))
    for got, expected in zip(*slopes, strict=True):
        assert expected.abs().max() > 0 and off(got, expected) <= 1e-9


@pytest.mark.parametrize("views, num_global", [(8, 2), (3, 3)])
def test_multi_view_loss_is_its_definition(views, num_global):
    z, directions = gaussian(views * 20, 6).view(views, 20, 6), sigreg.random_directions(6, 7, 0)

    def reference(z):
        center = sum(z[v] for v in range(num_global)) / num_global
        pred = sum(((view - center) ** 2).mean() for view in z) / len(z)
        return 0.95 * pred + 0.05 * sum(sketched_reference(v, directions) for v in z) / len(z)

    regularizer = sigreg.SIGReg("sketched", 7)
    ours = lambda z: sigreg.multi_view_loss(z, num_global, 0.05, regularizer)[0]
    (value, grad), (wanted, wanted_grad) = gradient(ours, z), gradient(reference, z)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert off(grad, wanted_grad) <= 1e-10


def test_losses_name_what_is_wrong():
    z, views = torch.zeros(3, 4), torch.zeros(4, 5, 3)
    masked = {"lam": 1, "error": "mse", "regularizer": sketched}
    for call, says in (
        (lambda: sigreg.spectral_sigreg(torch.zeros(3)), "float tensor"),
        (lambda: sigreg.legendre_sigreg(torch.zeros(0, 4)), "N above 0"),
        (lambda: sigreg.sketched_sigreg(z, torch.zeros(5, 6)), "directions"),
        (lambda: sigreg.spectral_sigreg(z.long()), "float tensor"),
        (lambda: sigreg.prediction_loss(z, torch.zeros(3, 5)), "shape"),
        (lambda: sigreg.prediction_loss(z, z, "l2"), "relative or smooth_l1"),
        (lambda: sigreg.multi_view_loss(views, 0, 0.1, sketched), "1 to V"),
        (lambda: sigreg.multi_view_loss(views, 9, 0.1, sketched), "1 to V"),
        (lambda: sigreg.masked_loss(z, z, z, on="token", **masked), "pooled or tokens"),
        (lambda: sigreg.SIGReg("spectre"), "spectral, legendre"),
    ):
        with pytest.raises(ValueError, match=rf"^sigreg\.py: .*{says}"):
            call()


def test_non_finite_input_gives_nan_not_an_exception():
    z = torch.randn(16, 4)
    z[0, 0] = torch.nan
    for loss in (sigreg.spectral_sigreg, sigreg.legendre_sigreg, sketched):
        assert loss(z).isnan()


DIRECTIONS = sigreg.random_directions(12, 16, seed=0)


def masked(z, own_masks, error="relative", on="tokens"):
    """masked_loss of rows z (N, 12), each an image of four tokens, masked by what the row is."""
    order = z.detach()[:, :5].argsort(1)
    places = (order[:, :3], order[:, None, 3:], 5) if own_masks else None
    z = z.view(-1, 4, 3)
    embeddings = z, z.cos()[:, None, :3], z.sin()[:, None, :2], z.exp()[:, None, :3]
    settings = {"lam": 0.7, "regularizer": sigreg.legendre_sigreg, "error": error, "on": on}
    return sigreg.masked_loss(*embeddings, places=places, **settings)[0]


def whole_images(z):
    """The loss of whole images in masked prediction, of rows z (N, 12)."""
    views = sigreg.centre(torch.stack([z, z.sin(), z.exp()], dim=1)).transpose(0, 1)
    return sigreg.multi_view_loss(views, 3, 0.05, sigreg.legendre_sigreg)[0]


def crops(z):
    return sigreg.multi_view_loss(torch.stack([z, z.sin()]), 1, 0.05, sigreg.legendre_sigreg)[0]


LOSSES = {  # z (N, 12) -> scalar; over ranks, in autocast, compiled
    "spectral": sigreg.spectral_sigreg,
    "legendre": sigreg.legendre_sigreg,
    "sketched": lambda z: sigreg.sketched_sigreg(z, DIRECTIONS),
    "masked": lambda z: masked(z, own_masks=False),
    "masks of their own": lambda z: masked(z, own_masks=True),
    "pooled": lambda z: masked(z, own_masks=False, error="norm", on="pooled"),
    "context": lambda z: masked(z, own_masks=False, error="smooth_l1", on="context"),
    "whole images": whole_images,
    "crops": crops,
    "std": sigreg.embedding_std,
}
PLAIN = {
    "spectral, plain": sigreg.spectral_sigreg_plain,
    "legendre, plain": sigreg.legendre_sigreg_plain,
    "sketched, plain": lambda z: sigreg.sketched_sigreg_plain(z, DIRECTIONS),
}


@pytest.mark.parametrize("loss", [pytest.param(f, id=name) for name, f in (LOSSES | PLAIN).items()])
def test_autocast_changes_neither_value_nor_gradient(loss):
    z = gaussian(64, 12, dtype=torch.float32)
    value, grad = gradient(loss, z)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            again, slope = gradient(loss, z)  # backward inside, too
        assert torch.equal(value, again) and torch.equal(grad, slope)


@pytest.mark.parametrize("loss", [pytest.param(f, id=name) for name, f in LOSSES.items()])
def test_losses_compile_to_one_graph(loss):
    z = gaussian(64, 12, dtype=torch.float32)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (value, grad), (wanted, wanted_grad) = gradient(compiled, z), gradient(loss, z)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert off(grad, wanted_grad) <= 1e-5


# -------------------------------------------------------------------------------------------- ranks
def network():
    torch.manual_seed(0)
    layers = torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 12)
    return torch.nn.Sequential(*layers).double()


def rank_main(rank, shares, folder):
    """One gloo rank: the gradient of each loss after DDP on its share of the 64 rows, and the trap:
    the same with statistics of its share alone."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=len(shares))
    x = gaussian(64, 10, seed=5)[sum(shares[:rank]) : sum(shares[: rank + 1])]
    result, honest = {}, sigreg.sum_over_ranks
    for trap, sums in enumerate((honest, lambda *tensors: tensors)):
        sigreg.sum_over_ranks = sums
        for name, loss in LOSSES.items():
            net = DistributedDataParallel(network())
            value = loss(net(x))
            value.backward()
            slope = torch.cat([p.grad.flatten() for p in net.parameters()])
            result[name, trap] = value.detach(), slope
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    del net, value
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("shares", [(40, 24), (20, 30, 14)])
def test_gradient_over_ranks_is_that_of_one_process(shares, tmp_path):
    mp.spawn(rank_main, (shares, str(tmp_path)), nprocs=len(shares))
    result = torch.load(tmp_path / "result.pt")
    for name, loss in LOSSES.items():
        net = network()
        value = loss(net(gaussian(64, 10, seed=5)))
        value.backward()
        wanted = torch.cat([p.grad.flatten() for p in net.parameters()])
        assert result[name, 0][0].item() == pytest.approx(value.item(), rel=1e-9)
        error, trap = (off(result[name, i][1], wanted) for i in (0, 1))
        assert error <= 1e-9, f"{name}: gradient off by {error:.1e}"
        assert trap > 1e-2, f"{name}: statistics of each rank alone pass unnoticed"


# -------------------------------------------------------------------------------------------- masks
@pytest.mark.parametrize("grid", [2, 3, 14])
def test_masks_are_legal_on_any_grid(grid):
    for seed, count, scale in itertools.product(range(5), (1, 33), ((0.15, 0.2), (0.8, 0.95))):
        pair, again = (
            masks.multi_block_masks(count, grid, 4, scale, generator=generator(s))
            for s in (seed, seed)
        )
        assert all(map(torch.equal, pair, again))
        context, targets = pair
        assert context.dtype == targets.dtype == torch.int64
        assert context.shape[0] == targets.shape[0] == count and targets.shape[1] == 4
        assert context.shape[1] >= 1 and targets.shape[2] >= 1
        for indices in (context, targets):
            assert indices.min() >= 0 and indices.max() < grid * grid
            assert (indices.diff(dim=-1) > 0).all()  # raster order, none twice
        seen = torch.zeros(count, grid * grid, dtype=torch.bool).scatter_(1, context, True)
        assert not seen.gather(1, targets.flatten(1)).any()


def test_block_masks_are_blocks_of_the_asked_size(monkeypatch):
    monkeypatch.setattr(masks, "TARGET_ASPECT", (0.5, 2.0))
    sizes, ratios, reached = [], [], set()
    for seed in range(300):
        scale = {"target_scale": (0.1, 0.3), "generator": generator(seed)}
        context, targets = masks.multi_block_masks(3, 32, **scale)
        rows, cols = targets // 32, targets % 32
        h, w = rows.amax(-1) - rows.amin(-1) + 1, cols.amax(-1) - cols.amin(-1) + 1
        assert (h * w == targets.shape[2]).all() and (h == h[0, 0]).all()
        reached |= {*rows.flatten().tolist()}
        sizes.append(targets.shape[2] / 32**2)
        ratios.append(math.log(h[0, 0] / w[0, 0]))
        assert context.shape[1] >= 0.25 * 32**2 - 1
    assert reached == {*range(32)}
    assert 0.09 < min(sizes) < 0.12 and 0.28 < max(sizes) < 0.31
    assert min(ratios) < -0.6 and max(ratios) > 0.6
    assert abs(np.mean(ratios)) < 0.08  # log-uniform: wide ones as often as high ones
    # independent draws; I-JEPA's one draw for both gives 1.0. Standard error: 1 / sqrt(300) = 0.06
    assert abs(np.corrcoef(sizes, ratios)[0, 1]) < 0.2


@pytest.mark.parametrize("grid", [2, 3, 8, 14])
def test_random_masks_are_scattered(grid):
    for seed, targets, least in itertools.product(range(5), (1, 4), (0.1, 0.5, 1.0)):
        args = 40, grid, targets, (0.15, 0.3), least, generator(seed)
        context, target = masks.random_masks(*args)
        assert context.shape[0] == 40 and target.shape[:2] == (40, targets)
        assert context.shape[1] >= min(max(round(least * grid**2), 1), grid**2 - 1)
        both = torch.cat([context, target[:, 0]], dim=1)  # of an image, all different, in order
        assert all(len({*row}) == len(row) and max(row) < grid**2 for row in both.tolist())
        assert (context.diff() > 0).all() and (target.diff() > 0).all()
        assert not (context[:, :, None] == target.flatten(1)[:, None]).any()
        again = masks.random_masks(*args[:5], generator(seed))
        assert torch.equal(context, again[0]) and torch.equal(target, again[1])
    _, target = masks.random_masks(400, 8, 4, (0.15, 0.15), 0.25, generator())
    assert all(len({*row}) == 40 for row in target.flatten(1).tolist())  # targets share no patch
    count = target.flatten().bincount(minlength=64)  # each patch as often as any
    assert count.min() > 0.8 * count.max()


@pytest.mark.parametrize("grid", [4, 8, 14, 32])
def test_rounding_moves_a_block_by_half_a_patch(grid):
    for share, aspect in itertools.product(np.linspace(0.1, 0.5, 41), np.linspace(0.75, 1.5, 41)):
        height, width = masks._block_size(grid, share, aspect)
        assert abs(height - grid * math.sqrt(share * aspect)) <= 0.5 + 1e-9
        assert abs(height * width - share * grid**2) <= height / 2 or width == grid


def test_blocks_have_places_of_their_own_and_contexts_do_not_starve(monkeypatch):
    context, _ = masks.multi_block_masks(4096, 14, generator=generator())
    assert context.shape[1] >= 49  # min_context = 0.25 of 196
    monkeypatch.setattr(masks, "CONTEXT_SCALE", (0.25, 0.25))
    context, targets = masks.multi_block_masks(50, 16, 2, (0.04, 0.04), 0.1, generator())
    for at in (context // 16, context % 16):  # inside a block of 8 x 8
        assert (at.amax(1) - at.amin(1)).max() == 7
    assert (targets[:, 0] != targets[:, 1]).any(1).sum() > 40
    context, targets = masks.multi_block_masks(50, 16, 2, (0.1, 0.1), 0.4, generator())
    assert context.shape[1] == 102  # more than the block holds: free patches around it
    assert not (context[:, :, None] == targets.flatten(1)[:, None]).any()
    monkeypatch.undo()
    _, targets = masks.multi_block_masks(400, 14, 4, (0.2, 0.2), 0.4, generator())
    assert (targets[:, 0] != targets[:, 1]).any(1).sum() > 360  # drawn again, not repeated


# -------------------------------------------------------------------------------------------- model
PREDICTORS = [model.MLPPredictor, model.TransformerPredictor]


def small_vit(side=32):
    torch.manual_seed(0)
    return model.vit("vit_n8", side)


def test_encoder_in_bfloat16_takes_other_sizes():
    encoder, images = small_vit(), torch.rand(1, 3, 48, 48)
    wanted = encoder(images)
    assert off(encoder.bfloat16()(images.bfloat16()).float(), wanted) < 0.02  # 8 bits


def test_pieces_of_batch_norm_are_refused():
    encoder = torch.nn.Sequential(small_vit(), torch.nn.SyncBatchNorm(17))
    for make in (
        lambda: model.Masked(encoder, model.MLPPredictor(128, 16), at_once=2),
        lambda: model.MultiView(encoder, model.projector(128, 8), 2, at_once=2),
    ):
        with pytest.raises(ValueError, match="batch norm is of whole batches"):
            make()


def test_encoder_sees_only_the_given_patches():
    encoder, images = small_vit(), gaussian(3, 3 * 32 * 32, dtype=torch.float32).view(3, 3, 32, 32)
    everything = torch.arange(16).expand(3, -1)
    assert torch.allclose(encoder(images), encoder(images, everything), atol=1e-5)
    order = torch.stack([torch.randperm(16, generator=generator(i))[:8] for i in range(3)])
    targets = order.view(3, 2, 4).sort().values
    tokens = encoder(images, targets)
    assert tokens.shape == (3, 2, 5, 128)
    assert torch.allclose(tokens[:, 1], encoder(images, targets[:, 1]), atol=1e-5)
    changed = images.clone()
    unseen = next(i for i in range(16) if i not in targets[0, 0])
    changed[0, :, unseen // 4 * 8 : unseen // 4 * 8 + 8, unseen % 4 * 8 : unseen % 4 * 8 + 8] += 1
    assert torch.equal(encoder(changed, targets)[0, 0], tokens[0, 0])
    assert not torch.allclose(encoder(changed), encoder(images))
    with pytest.raises(ValueError, match="masks of 1 images for 3"):
        encoder(images, targets[:1])
    with pytest.raises(ValueError, match="with indices images must be 32 x 32"):
        encoder(torch.zeros(3, 3, 64, 64), targets)


def test_models_have_their_size_and_refuse_broken_patches():
    sizes = ("vit_b16", 85_798_656), ("vit_l16", 303_301_632), ("vit_h14", 630_764_800)
    with torch.device("meta"):
        for name, parameters in sizes:
            assert sum(p.numel() for p in model.vit(name).parameters()) == parameters
    with pytest.raises(ValueError, match=r"^model\.py: images of \(32, 36\) px .* 8 x 8"):
        small_vit()(torch.zeros(1, 3, 32, 36))


def test_encoder_loads_into_timm_at_any_image_size():
    timm = pytest.importorskip("timm")
    encoder = model.vit("vit_t16")
    for p in encoder.parameters():
        p.data += 0.05 * torch.randn_like(p)
    name = "vit_tiny_patch16_224"
    theirs = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    theirs.load_state_dict(encoder.state_dict(), strict=True)
    for side in (96, 224):
        images = torch.randn(2, 3, side, side, generator=generator())
        with torch.no_grad():
            assert (encoder(images) - theirs.forward_features(images)).abs().max() < 2e-4


def test_last_layers_stand_side_by_side():
    encoder, images, seen = small_vit(), torch.randn(2, 3, 32, 32), []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    three = encoder(images, layers=3)
    assert three.shape == (2, 17, 3 * 128) and torch.equal(three[..., :128], encoder(images))
    wanted = torch.cat([encoder.norm(seen[i]) for i in (3, 2, 1)], dim=-1)
    assert torch.equal(three, wanted)


@pytest.mark.parametrize("make", PREDICTORS)
def test_predictors_know_places_and_keep_images_apart(make):
    torch.manual_seed(0)
    context, targets = masks.multi_block_masks(3, 8, generator=generator())
    tokens, predict = torch.randn(3, 1 + context.shape[1], 32).double(), make(32, 64).double()
    predict.pos_embed.data *= 50
    z = predict(tokens.requires_grad_(), context, targets)
    assert z.shape == (*targets.shape, 32)
    (slope,) = torch.autograd.grad(z[0].sum(), tokens)
    assert slope[0].abs().max() > 0 and slope[1:].abs().max() == 0
    tokens, back = tokens.detach(), torch.arange(context.shape[1]).flip(0)
    torch.testing.assert_close(predict(tokens, context, targets.flip(2)), z.flip(2))
    moved = predict(tokens, context[:, back], targets)
    assert torch.allclose(moved, z) == (make is model.MLPPredictor)
    tokens[:, 0] += 1
    assert not torch.allclose(predict(tokens, context, targets), z)  # CLS is read


def test_mlp_predictor_is_its_definition():
    torch.manual_seed(0)
    _, targets = masks.multi_block_masks(3, 8, 2, generator=generator())
    tokens, predict = gaussian(3, 11 * 32).view(3, 11, 32), model.MLPPredictor(32, 64, width=4)
    predict = predict.double()
    predict.pos_embed.data *= 50
    z = predict(tokens, None, targets)
    for b, k, i in itertools.product(range(3), range(2), range(targets.shape[2])):
        pair = torch.cat([tokens[b].mean(0), predict.pos_embed[0, targets[b, k, i]]])
        hidden = torch.nn.functional.gelu(predict.fc1(pair))
        assert len(hidden) == 128
        torch.testing.assert_close(z[b, k, i], predict.fc2(hidden))


def test_masked_is_its_definition():
    encoder, predict, views = (
        small_vit(),
        model.TransformerPredictor(128, 16),
        torch.randn(2, 3, 3, 32, 32),
    )
    context, targets = masks.multi_block_masks(3, 4, 2, generator=generator())
    head = model.image_head(128, 5)
    net = model.Masked(encoder, predict, head, both_directions=True)
    found, of_images = net(views, context, targets)
    for b, k in itertools.product(range(3), range(2)):
        c, t = context[b : b + 1], targets[b : b + 1, k]
        z_context, z_target = encoder(views[0, b : b + 1], c), encoder(views[1, b : b + 1], t)
        back = predict(z_target, t, c[:, None])[:, 0]
        pred = predict(z_context, c, targets[b : b + 1])[:, k]
        got = found[0][b], found[1][b, k], found[2][b, k], found[3][b, k]
        for x, y in zip(got, (z_context, z_target, pred, back), strict=True):
            torch.testing.assert_close(x, y[0], atol=1e-5, rtol=1e-4)
        means = z_context[0, 1:].mean(0), z_target[0, 1:].mean(0)  # without CLS
        for view, mean in zip((0, 1 + k), means, strict=True):
            torch.testing.assert_close(of_images[b, view], head(mean), atol=1e-5, rtol=1e-4)
    assert of_images.shape == (3, 3, 5)


def test_heuristics_do_what_they_say():
    encoder, teacher, predict = small_vit(), model.vit("vit_n8", 32), model.MLPPredictor(128, 16)
    context, targets = masks.multi_block_masks(4, 4, 2, generator=generator())
    images = torch.rand(4, 3, 32, 32)
    for settings in ({}, {"stop_grad": True}, {"teacher": teacher}, {"whole_targets": True}):
        net = model.Masked(encoder, predict, **settings)
        (_, z_target, _), _ = net([images, images], context, targets)
        assert z_target.requires_grad == (not ({"stop_grad", "teacher"} & settings.keys()))
        source = settings.get("teacher", encoder)
        if "whole_targets" in settings:
            tokens = source(images)[:, 1:]
            tokens = torch.nn.functional.layer_norm(tokens, tokens.shape[2:])
            wanted = torch.stack([tokens[b, targets[b]] for b in range(4)])
        else:
            wanted = source(images, targets)[:, :, 1:]
        torch.testing.assert_close(z_target[:, :, 1:], wanted)


GRID = types.SimpleNamespace(grid=4)


class Pixels(torch.nn.Module):
    """Tokens of images (B, 3, S, S): their pixels, behind a CLS token that must not be read."""

    def forward(self, x):
        return torch.cat([x.mean((2, 3))[:, None] * 0 + 9, x.flatten(2).transpose(1, 2)], dim=1)


def test_multi_view_keeps_the_views_apart():
    views = [gaussian(5, 3 * 8 * 8, i).view(5, 3, 8, 8) for i in range(2)]
    views += [gaussian(5, 3 * 4 * 4, i).view(5, 3, 4, 4) for i in range(2, 6)]
    wanted = torch.stack([view.mean((2, 3)) for view in views])
    for at_once in (None, 2):
        y, z = model.MultiView(Pixels(), torch.nn.Identity(), 2, at_once)(views)
        torch.testing.assert_close(y.transpose(0, 1), wanted)
        torch.testing.assert_close(z, wanted)


def test_backbones_lose_their_classifier():
    for name, dim in (("resnet18", 512), ("convnext_tiny", 768), ("swin_t", 768)):
        encoder = model.build_encoder(name, 64).eval()
        assert encoder.dim == dim and encoder(torch.zeros(2, 3, 64, 64)).shape == (2, dim)
    small, large = (model.build_encoder("resnet18", side) for side in (64, 224))
    assert (small.conv1.kernel_size, large.conv1.kernel_size) == ((3, 3), (7, 7))
    assert isinstance(small.maxpool, torch.nn.Identity)


def step_gradients(flags, at_once, dtype):
    """Loss and parameter gradients of a first step, at_once images in memory, as train has it."""
    flags = f"--batch-size 25 --no-amp --augment crop {flags}".split()
    args = train.parse_args([*flags, "--micro-batch", str(at_once)])
    train.fill_in(args, 20_000, 32, 1)
    net, _ = train.build(args, CPU)
    encoder = net.to(dtype).encoder
    images = torch.from_numpy(np.stack([data.Shapes()[i][0] for i in range(25)]))
    images, mine = images.permute(0, 3, 1, 2), torch.arange(25)
    crops = [(2, 32, 0.3, 1), (3, 16, 0.05, 0.3)] if args.recipe == "crops" else [(1, 32, 0.3, 1)]
    views = data.crop_held(images, crops, data.generator_of("crops", args.seed, 5), mine, 25)
    views, drawn = train.draw(args, views, mine, encoder, step=5)
    embeddings = net([view.to(dtype) for view in views], *drawn)
    loss, _ = train.loss_of(args, embeddings, drawn, encoder, step=5)
    loss.backward()
    parameters = [*net.parameters()]
    assert all(p.grad is not None for p in parameters)
    return loss.detach(), torch.cat([p.grad.flatten() for p in parameters])


LETTER = """--sigreg spectral --sigreg-on pooled --pred mse --one-way
--num-targets 4 --target-scale 0.15 0.2 --min-context 0.25 --image-loss 0"""
PIECES = [
    "--augment color",
    LETTER,
    "--sigreg sketched --lam 0.1 --masks-per batch --slices 32",
    "--recipe crops",
    "--stop-grad --whole-targets",
]


@pytest.mark.parametrize("flags", PIECES)
def test_micro_batches_have_the_gradient_of_the_batch(flags):
    loss, whole = step_gradients(flags, 25, torch.float64)
    again, pieces = step_gradients(flags, 7, torch.float64)
    assert again.item() == pytest.approx(loss.item(), rel=1e-12)
    assert off(pieces, whole) <= 1e-10
    pieces, whole = (step_gradients(flags, n, torch.float32)[1] for n in (7, 25))
    assert off(pieces, whole) <= 1e-5


MATTERS = """--lam 2|--sigreg spectral|--sigreg sketched --lam 0.1|--sigreg none
--sigreg-on pooled|--sigreg-on context|--pred mse|--pred norm|--pred smooth_l1
--one-way|--whole-targets|--predictor transformer|--seed 1
--masks random|--masks-per batch|--num-targets 3|--target-scale 0.4 0.6
--min-context 0.9|--augment color|--image-loss 0|--image-loss 2|--slices 9
--recipe crops|--recipe crops --lam 0.1|--recipe crops --sigreg legendre
--recipe crops --proj-dim 8|--recipe crops --pool cls|--recipe crops --augment color
--predictor-size 2|--predictor transformer --predictor-size 2"""


def test_no_option_is_ignored():
    losses = {}
    for flags in ["", *re.split("[|\n]", MATTERS)]:
        losses[flags] = round(step_gradients(flags, 25, torch.float64)[0].item(), 9)
    assert len({*losses.values()}) == len(losses), losses


# ----------------------------------------------------------------------------------------- training
TINY = "--steps 8 --batch-size 32 --log-every 2 --save-every 3 --device cpu".split()


def run_train(path, flags=""):
    """Runs train.main on shapes, unless the flags say otherwise, and returns the checkpoint."""
    train.main([*TINY, "--ckpt", str(path), *flags.split()])
    return torch.load(path, weights_only=True)


def log_of(path):
    return [json.loads(line) for line in Path(path).with_suffix(".jsonl").read_text().splitlines()]


def same_weights(a, b):
    parts = a.keys() - {"optimizer", "step", "args"}
    return all(torch.equal(a[part][key], b[part][key]) for part in parts for key in a[part])


def torchrun(script, *arguments, ranks=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def refuse(main, arguments, match):
    """main ends with one line that matches, and a non-zero code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, str) and "\n" not in end.value.code.strip(), end.value.code
    assert re.search(match, end.value.code), end.value.code


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 200 if self.val else 600)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "ckpt.pt"
    with pytest.MonkeyPatch.context() as patch:
        few_shapes.__wrapped__(patch)
        return path, run_train(path)


def filled(flags, side=32):
    args = train.parse_args([*TINY, *flags.split()])
    train.fill_in(args, 20_000, side, 1)
    return args


def test_log_and_checkpoint(trained):
    path, saved = trained
    assert saved["step"] == 8 and saved["args"]["model"] == "vit_n8"
    header, *rows = log_of(path)
    assert header["args"] == saved["args"] and "command" in header
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:
        terms = row["pred"] + row["legendre"] + row["image"]
        assert row["loss"] == pytest.approx(terms, rel=1e-5)
        assert 1 <= row["erank"] <= 128 and row["std"] > 0 and row["images_per_s"] > 0
    assert not list(path.parent.glob("*.tmp"))


def test_learning_rate_is_a_function_of_the_step(tmp_path, few_shapes):
    assert {train.learning_rate(step, 100, 0.1) for step in (1, 50, 100)} == {0.1}
    flags = "--schedule cosine --warmup-epochs 1 --batch-size 300 --steps 4 --log-every 1 "
    flags += "--weight-decay 0.04 --weight-decay-end 0.4 --ema 0.9 --ema-end 1"
    run_train(tmp_path / "ckpt.pt", flags)  # two steps an epoch
    rows = log_of(tmp_path / "ckpt.pt")[1:]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 2e-3, 1.001e-3, 2e-6])
    assert [row["epoch"] for row in rows] == [0, 0, 1, 1]
    refuse(train.main, [*TINY, *f"{flags} --steps 5 --ckpt {tmp_path}/ckpt.pt".split()], "steps=4")
    args, found = filled(flags), []
    optimizer = train.build(args, CPU)[1]["optimizer"]
    for step in (1, 2, 4):
        train.set_rate_and_decay(args, optimizer, step, 4, 2)
        found += [[group["weight_decay"] for group in optimizer.param_groups]]
    rising = [0.04 + 0.36 * (1 - math.cos(math.pi * step / 4)) / 2 for step in (1, 2, 4)]
    assert found == [[0, pytest.approx(decay)] for decay in rising]
    assert [train.between(0.9, end, 0.5) for end in (None, 1)] == pytest.approx([0.9, 0.95])


def test_every_step_seed_and_purpose_draws_anew(monkeypatch, tmp_path, few_shapes):
    honest, seeds = data.seed_of, {}

    def spy(*key):
        assert key not in seeds or key[0] == "masks" and key[2] == 0  # which build checks
        return seeds.setdefault(key, honest(*key))

    monkeypatch.setattr(data, "seed_of", spy)
    for seed in (0, 1):
        run_train(tmp_path / f"{seed}.pt", f"--augment color --steps 3 --seed {seed}")
    assert {key[0] for key in seeds} == {*data.PURPOSES}
    draws = torch.stack([torch.rand(1000, generator=generator(seed)) for seed in seeds.values()])
    together = draws.corrcoef().fill_diagonal_(0).abs().max()
    assert together < 0.2  # 6 standard deviations


def test_first_weights_depend_on_seed_and_architecture_alone():
    same = "", "--num-targets 3", "--target-scale 0.4 0.6", "--masks-per batch", "--image-loss 0"
    weights = [train.build(filled(flags), CPU)[0].predictor.fc1.weight for flags in same]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    other = train.build(filled("--seed 1"), CPU)[0].predictor.fc1.weight
    assert not torch.equal(other, weights[0])


def test_matrices_decay_alone():
    net, parts = train.build(filled("--predictor transformer"), CPU)
    groups = parts["optimizer"].param_groups
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert {*map(id, groups[1]["params"])} == {id(m.weight) for m in layers}
    assert [group["weight_decay"] for group in groups] == [0, 0.05]
    assert sum(len(group["params"]) for group in groups) == len([*net.parameters()])


def test_teacher_makes_the_targets_and_follows_after_the_step(tmp_path, few_shapes):
    saved = run_train(tmp_path / "ckpt.pt", "--steps 1 --ema 0.8 --ema-end 0.9")
    torch.manual_seed(0)
    for name, start in model.vit("vit_n8", 32).state_dict().items():
        wanted = start.lerp(saved["encoder"][name], 0.1)
        torch.testing.assert_close(saved["teacher"][name], wanted, atol=1e-6, rtol=0)


def test_longer_runs_continue_and_others_are_refused(trained, tmp_path, capsys, few_shapes):
    path = tmp_path / "ckpt.pt"
    shutil.copy(trained[0], path), shutil.copy(trained[0].with_suffix(".jsonl"), tmp_path)
    before = path.stat().st_mtime_ns
    run_train(path)
    assert "finished" in capsys.readouterr().out and path.stat().st_mtime_ns == before
    again = [*TINY, "--ckpt", path]
    refuse(train.main, [*again, "--lam", "2"], r"lam=1.0, .* says 2.0; .*ckpt.pt")
    refuse(train.main, [*again, "--schedule", "cosine"], "schedule=constant, .* says cosine")
    cosine = vars(filled("--schedule cosine --steps 4"))
    with pytest.raises(SystemExit, match="steps=2, this command says 4"):  # part of the cosine
        train.check_settings(path, cosine | {"steps": 2}, cosine)
    longer = run_train(path, "--steps 10 --save-every 4 --log-every 5 --workers 1")
    assert same_weights(longer, run_train(tmp_path / "straight.pt", "--steps 10"))
    assert "image_head" in longer


def test_a_stopped_run_continues_bit_by_bit(tmp_path):
    """A killed one from its last checkpoint; by other signals it saves, ends well, and goes on."""
    folder = jpeg_folder(tmp_path / "photos", size=100)
    flags = f"--data {folder} --image-size 100 --model vit_n25 --augment color --ema 0.9"
    flags += " --steps 14 --batch-size 8 --log-every 1 --workers 1 --save-every "
    whole, pipe = run_train(tmp_path / "whole.pt", flags + "100"), subprocess.PIPE
    for number in (signal.SIGKILL, *train.SIGNALS):
        cut = tmp_path / f"{number}.pt"
        mine = flags + ("2" if number == signal.SIGKILL else "100")
        command = [sys.executable, HERE / "train.py", *TINY, *mine.split(), "--ckpt", cut]
        process = subprocess.Popen(
            [*map(str, command)], stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        next(line for line in process.stdout if line.startswith("step 5/"))
        os.killpg(process.pid, number)  # as torchrun does: the loaders get it, too
        if number == signal.SIGKILL:
            process.wait()
            with cut.with_suffix(".jsonl").open("a") as file:
                file.write('{"step": 9')  # as a kill in mid-write leaves it
        else:
            rest, errors = process.communicate(timeout=60)
            assert process.returncode == 128 + number and not errors
            assert "same command continues" in rest
        assert 4 <= torch.load(cut, weights_only=True)["step"] < 14
        again = run_train(cut, mine)
        assert same_weights(whole, again) and "teacher" in whole
        assert [row.get("step") for row in log_of(cut)] == [None, *range(1, 15)]


def test_two_ranks_train_what_one_does(tmp_path):
    flags = "--weight-decay 0 --lr 1e-4 --no-amp --augment color"
    one = log_of(tmp_path / "one.pt") if run_train(tmp_path / "one.pt", flags) else None
    done = torchrun("train.py", *TINY, *flags.split(), "--ckpt", tmp_path / "two.pt")
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in log[1:]] for log in (one, log_of(tmp_path / "two.pt"))]
    # the same batches, masks, statistics; float32 sums in another order, amplified by 8 steps
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_signal_on_one_rank_stops_all(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda code, op: code.fill_(143))
    assert [train.exit_code([], world) for world in (1, 2)] == [0, 143]
    assert train.exit_code([(130, 0.0)], 1) == 130


def test_a_second_signal_ends_a_run_that_hangs(tmp_path):
    code = f"""import time, train
def stalled(batches, caught):
    yield next(batches)
    print("stalled", flush=True)
    time.sleep(100)
train.one_ahead = stalled
train.main({[*TINY, "--ckpt", str(tmp_path / "a.pt")]})"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True
    )
    next(line for line in process.stdout if line == "stalled\n")
    process.terminate(), process.terminate()  # as torchrun and SLURM may: these count as one
    time.sleep(1.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=5) == 143


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the loaders in /proc")
def test_loaders_end_with_a_killed_run(tmp_path):
    folder = jpeg_folder(tmp_path / "photos", per_class=1100, classes=1, size=32)
    flags = ["--data", folder, "--model", "vit_n8", "--workers", "2", "--ckpt", tmp_path / "a.pt"]
    command = [sys.executable, HERE / "train.py", *TINY, *flags]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    below = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(loaders := below.read_text().split()) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # so that the pipes fill up
    time.sleep(3)
    process.kill(), process.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in loaders):
        assert time.monotonic() < end, "loaders outlive the run"
        time.sleep(0.1)


def test_a_path_is_claimed_from_the_start(tmp_path, few_shapes):
    """By a lock of the log; a run that made no step leaves the path to any other."""
    path = tmp_path / "ckpt.pt"
    flags = [*TINY, "--steps", "9999", "--ckpt", str(path)]
    command = [sys.executable, str(HERE / "train.py"), *flags, "--save-every", "99999"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    next(line for line in first.stdout if line.startswith("step"))
    for more in ([], ["--lam", "2"]):
        refuse(train.main, [*flags, *more], "another run writes .*ckpt.jsonl now")
    first.kill(), first.communicate()
    run_train(path, "--lam 2")  # once the first is gone
    path.unlink()
    refuse(train.main, [*TINY, "--ckpt", path], "ckpt.jsonl is the log of a run")


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    args = filled(f"--ckpt {tmp_path}/ckpt.pt")
    train.save(args, {}, 1)

    def full(state, path):
        Path(path).write_text("half")
        raise RuntimeError("unexpected pos 8606208 vs 8606100")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="cannot write .*ckpt.pt at step 2: unexpected pos"):
        train.save(args, {}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"] == 1


def test_bad_checkpoints(tmp_path, trained):
    good, ran, buffer = trained[0].read_bytes(), tmp_path / "ran", io.BytesIO()
    reduce = {"__reduce__": lambda self: (os.mkdir, (str(ran),))}
    evil = pickle.dumps(type("Evil", (), reduce)(), protocol=2)
    torch.save({"weights": torch.zeros(3)}, buffer)
    path = tmp_path / "ckpt.pt"
    for content in (good[: len(good) // 2], b"", b"hello", evil, buffer.getvalue()):
        path.write_bytes(content)
        refuse(train.main, [*TINY, "--ckpt", path], "truncated or not a checkpoint")
        refuse(probe.main, [path, "--device", "cpu"], "truncated or not a checkpoint")
        assert path.read_bytes() == content and not ran.exists()
    refuse(probe.main, [tmp_path / "absent.pt", "--device", "cpu"], "no checkpoint")


def test_non_finite_loss_keeps_the_last_good_checkpoint(tmp_path, few_shapes):
    path = tmp_path / "ckpt.pt"
    flags = [*TINY, "--steps", "40", "--save-every", "1", "--lr", "1e30", "--ckpt", path]
    refuse(train.main, flags, "non-finite by step")
    saved = torch.load(path, weights_only=True)
    assert all(value.isfinite().all() for value in saved["encoder"].values())
    net = torch.nn.Linear(2, 2)
    net.weight.data[0, 0] = torch.inf
    with pytest.raises(SystemExit, match="by step 3"):  # of a finite loss
        train.check_health(torch.tensor(1.0), net, 3, "a.pt")


BAD = """--model vit_z16 | vit_z16.*vit_b16
--model vit_b0 | vit_b0.*vit_b16
--model resnet18 | patch tokens, which resnet18 lacks.*--recipe crops
--recipe crops --model googlenet | googlenet cannot be a backbone.*swin
--recipe crops --model resnet18 --micro-batch 4 | batch norm.*--micro-batch
--recipe crops --lam 2 | --lam 2.0 of --recipe crops must be at most 1
--recipe crops --stop-grad | crops does not take --stop-grad
--slices 64 --image-loss 0 | --sigreg legendre does not take --slices
--slices 64 --stop-grad | --sigreg legendre does not take --slices
--sigreg none --lam 2 | --sigreg none does not take --lam
--recipe crops --local-size 20 | --local-size 20 .*patch of vit_n8
--min-context 0 | min_context above 0
--sigreg sketched | --recipe masked --sigreg sketched needs a --lam
--stop-grad --image-loss 1 | --stop-grad.*--image-loss 0
--recipe crops --image-loss 1 | crops does not take --image-loss
--ema 1 | --ema below 1
--ema 0.9 --ema-end 1.5 | --ema-end at most 1
--ema-end 1 | --ema-end goes with --ema
--pool cls | masked does not take --pool
--lr 0 | --lr must be above 0
--recipe crops --global-views 1 --local-views 0 | one view has nothing
--warmup-epochs 1 | 8 steps end in the warm-up of 625
--steps 1 --schedule cosine | 1 steps end in the warm-up of 0
--warmup-epochs inf | must be at least 0, and finite
--recipe crops --augment none | --augment crop or color
--data nowhere | nowhere is not a folder.*cifar10
--image-size 30 | image size 30 is not a multiple of 8
--image-size 8 | grid
--lam nan | --lam: nan must be at least 0
--epochs 0 | --epochs: 0 must be at least 1
--predictor mpl | invalid choice: 'mpl'
--lamda 2 | unrecognized arguments: --lamda
--batch-size 20001 | 20001.*20000 images
--device abacus | --device abacus
--target-scale 0.5 1.5 | target_scale
--ckpt run | --ckpt run must end in .pt
--ckpt /proc/ckpt.pt | cannot write /proc/ckpt"""


def test_running_out_of_memory_ends_in_one_line():
    says = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
    for error in (RuntimeError(says), torch.OutOfMemoryError(says)):
        line = pytest.raises(SystemExit, match="^probe.py: out of memory; .* smaller --batch-size")
        with line, train.ranks("probe.py", "cpu"):
            raise error
    with pytest.raises(RuntimeError, match="of another kind"), train.ranks("probe.py", "cpu"):
        raise RuntimeError("of another kind")


def test_bad_settings_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in BAD.splitlines():
        flags, says = line.split(" | ")
        refuse(train.main, [*TINY, *flags.split()], says)
        assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------- defaults by the kind of data
def test_defaults_follow_the_data(tmp_path, few_shapes, capsys):
    chosen = [filled(f"--data {name}", side=side) for name, side in (("x", 32), ("x", 300))]
    chosen = [(args.model, args.image_size, args.augment, args.lr) for args in chosen]
    assert chosen == [("vit_n4", 32, "color", 2e-3), ("vit_s16", 224, "none", 1e-3)]
    crops = [filled(f"--recipe crops --batch-size {n}").lam for n in (256, 4096)]
    assert crops == [0.05, 0.0031] and filled("").lam == 1
    assert filled("--recipe crops --sigreg legendre").lam == 0.05  # at 1 nothing is predicted
    chosen = [(args.one_way, args.image_loss) for args in map(filled, ("", "--ema 0.9"))]
    assert chosen == [(False, 1), (True, 0)]
    run_train(tmp_path / "b.pt", "--steps 1 --sigreg-on pooled")
    said = capsys.readouterr().out
    assert "shapes, drawn here (--data FOLDER takes yours)" in said
    assert "32 vectors of 128 numbers a step, too few to be white" in said
    assert "have a target twice" not in said
    run_train(tmp_path / "c.pt", "--steps 1 --target-scale 0.4 0.6")
    said = capsys.readouterr().out
    assert int(re.search(r"(\d+)% of images have a target twice", said)[1]) > 70
    train.warn(filled("--recipe crops"), None)  # 32 vectors of 64: sketched takes any number
    assert not capsys.readouterr().out
    assert "too few" not in said


def jpeg_folder(folder, per_class=12, classes=2, size=40):
    shapes = data.Shapes()
    for split, label, i in itertools.product(("train", "val"), range(classes), range(per_class)):
        path = folder / split / f"class{label}" / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shapes[10 * i + label][0]).resize((size, size)).save(path)
    return folder


# --------------------------------------------------------------------------------------------- data
def test_shapes_are_a_function_of_seed_and_index():
    a, b = data.Shapes(1), data.Shapes(1)
    assert np.array_equal(a[7][0], b[7][0]) and a[7][1] == 7
    others = a[17], data.Shapes(2)[7], data.Shapes(1, "val")[7]
    assert not any(np.array_equal(a[7][0], image) for image, _ in others)


def test_bad_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, inside in (("empty", ""), ("hollow", "train/dog"), ("classless", "train")):
        (tmp_path / name / inside).mkdir(parents=True)
        refuse(train.main, [*TINY, "--data", name], f"{name} is not a folder with train/<class>")
    (tmp_path / "cifar10" / "train").mkdir(parents=True)
    refuse(train.main, [*TINY, "--data", "cifar10"], "and a folder here; say ./cifar10")


def test_every_kind_of_image_file_is_read_right(tmp_path):
    """Not clipped, upright, on white; what has no range or cannot be read is named."""
    ramp = np.tile(np.linspace(0, 1, 256), (8, 1))
    sixteen = (ramp * 65535).round().astype(np.uint16)
    Image.fromarray(sixteen).save(tmp_path / "16.png")
    Image.fromarray(sixteen).save(tmp_path / "16.tif")
    (tmp_path / "16.pgm").write_bytes(b"P5 256 8 65535\n" + sixteen.astype(">u2").tobytes())
    eight = Image.fromarray((ramp * 255).round().astype(np.uint8))
    for mode in ("L", "P", "RGB", "RGBA", "CMYK", "LA"):
        eight.convert(mode).save(tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    for name in ("gif", "jpg", "bmp", "webp"):
        eight.convert("RGB").save(tmp_path / f"8.{name}")
    for path in sorted(tmp_path.iterdir()):
        image = np.asarray(data.read_image(path))
        assert image.shape == (8, 256, 3) and image.mean() == pytest.approx(127.5, abs=1), path
        assert len(np.unique(image)) > 100, f"{path}: clipped"
    pixels = np.zeros((4, 6, 4), np.uint8)  # black, and seen in the first row alone
    pixels[0, :, 3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(pixels).save(tmp_path / "clear.png", exif=exif)
    image = np.asarray(data.read_image(tmp_path / "clear.png"))
    assert (image[:, -1] == 0).all() and (image[:, :-1] == 255).all() and image.shape == (6, 4, 3)
    Image.fromarray((ramp * 1000).astype(np.float32)).save(tmp_path / "F.tif")
    with pytest.raises(OSError, match=r"^data\.py: cannot read image .*F.tif .*mode F"):
        data.read_image(tmp_path / "F.tif")


def test_images_of_12_bits_in_16_are_refused(tmp_path):
    folder = tmp_path / "photos" / "train" / "class"
    folder.mkdir(parents=True)
    pixels = np.arange(1024, dtype=np.uint16).reshape(32, 32)
    for i in range(3):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    with pytest.raises(SystemExit, match="such as .*0.png, have values up to 1023 of 65535"):
        data.open_data(str(tmp_path / "photos"), "", "train")
    Image.fromarray(64 * pixels).save(folder / "1.png")  # a dark one among others is fine
    assert len(data.open_data(str(tmp_path / "photos"), "", "train")) == 3


def test_downloads_that_broke_off_end_in_one_line(monkeypatch, capsys):
    def broken(root, **arguments):
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    short, sets = lambda root, **arguments: range(7), data.DATASETS
    for make, says in ((broken, "Compressed file ended"), (short, "it has 7 of its 10000 images")):
        monkeypatch.setitem(sets, "cifar10", (make, *sets["cifar10"][1:]))
        with pytest.raises(SystemExit, match=f"cifar10 is not in there.*{says}.*; remove"):
            data.open_data("cifar10", "there", "val")
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="svhn needs scipy: pip install scipy"):
        data.open_data("svhn", "there", "val")


def downloading_rank(rank, folder):
    """One of two nodes of two processes: notes when it opens the data."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=4)

    def make(root, **arguments):
        time.sleep(0.3)
        with open(f"{root}/order", "a") as file:
            file.write(f"{rank} ")
        return range(10_000)

    data.DATASETS["cifar10"] = make, *data.DATASETS["cifar10"][1:]
    data.open_data("cifar10", folder, "val")
    dist.destroy_process_group()


def test_nodes_download_one_after_the_other(tmp_path):
    mp.spawn(downloading_rank, (str(tmp_path),), nprocs=4)
    order = (tmp_path / "order").read_text().split()
    assert order[:2] == ["0", "2"] and {*order[2:]} == {"1", "3"}


def test_normalize_takes_images_between_0_and_1():
    for images in (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.full((1, 3, 4, 4), 255.0)):
        with pytest.raises(ValueError, match="divide by 255"):
            data.normalize(images)


def test_names_that_a_terminal_cannot_print(tmp_path):
    folder = jpeg_folder(tmp_path / "photos", per_class=20)
    (folder / "train" / "class0" / os.fsdecode(b"caf\xff.txt")).write_text("none")
    flags = [*TINY, "--steps", "1", "--data", folder, "--ckpt", tmp_path / "a.pt", "--workers", "0"]
    command = [*map(str, [sys.executable, HERE / "train.py", *flags])]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "left out 1 files" in done.stdout, done.stderr


def test_what_is_left_out_of_a_folder_is_said(tmp_path, capsys):
    folder = jpeg_folder(tmp_path / "photos", per_class=3)
    for name in ("notes.txt", "._00.jpg", ".thumbs/x.jpg"):
        (folder / "train" / "class1" / name).parent.mkdir(exist_ok=True)
        (folder / "train" / "class1" / name).write_text("none")
    Image.new("RGB", (40, 40)).save(folder / "train" / "class1" / "one.gif")
    images = data.open_data(str(folder), "", "train")
    assert len(images) == 7 and "left out 3 files, such as " in capsys.readouterr().out
    (folder / "train" / "class0" / "loop").symlink_to(folder / "train" / "class0")
    assert len(data.open_data(str(folder), "", "train")) == 7


def test_a_broken_image_saves_and_ends_in_one_line(tmp_path, monkeypatch, capsys):
    """The same images continue the run in a folder of another name; other ones are refused."""
    monkeypatch.chdir(tmp_path)
    folder = jpeg_folder(tmp_path / "photos", per_class=16, size=100)
    flags = [*TINY, "--batch-size", "4", "--model", "vit_n32", "--image-size", "96", "--workers"]
    flags += ["1", "--save-every", "100", "--data"]
    order = [key for batch in data.batch_keys(32, 4, 0, 8, 0, torch.arange(4)) for key in batch]
    images = data.open_data("photos", "", "train")
    bad = Path(images.samples[order[7 * 4 + 1][1]][0])  # read for the last step
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])  # its header is whole
    with pytest.raises(SystemExit, match="1"):
        train.main([*flags, "photos"])
    assert re.search(rf"cannot read image photos/.*{bad.name}", capsys.readouterr().err)
    assert torch.load("ckpt.pt", weights_only=True)["step"] == 7  # of --save-every 100
    bad.write_bytes(good)
    folder = folder.rename(tmp_path / "moved")
    train.main([*flags, f"{folder}/"])
    assert "images now in" in capsys.readouterr().out
    assert torch.load("ckpt.pt", weights_only=True)["step"] == 8
    (tmp_path / "photos").symlink_to(folder)
    for path in (folder / "train").glob("*/*"):
        path.write_bytes(path.read_bytes() + b"more")
    refuse(train.main, [*flags, "photos", "--steps", "9"], "other images of the same names")
    (folder / "train" / "class0" / "00.jpg").unlink()
    refuse(
        train.main, [*flags, "photos", "--steps", "9"], "image_files=32 .*, this command says 31 "
    )


def test_ranks_with_other_settings_or_images_are_named(monkeypatch, tmp_path):
    args = filled(f"--ckpt {tmp_path}/a.pt")
    for name, value in (("image_files", "5 xyz"), ("lr", 0.1), ("log_every", 7)):
        theirs = {**vars(args), "image_files": "6 abc", "step of the checkpoint": None, name: value}
        args.image_files = "6 abc"
        gather = lambda found, own, theirs=theirs: found.__setitem__(slice(None), [own, theirs])
        monkeypatch.setattr(dist, "all_gather_object", gather)
        with pytest.raises(SystemExit, match=f"ranks differ in {name}: .*, {value};"):
            train.resume(args, {}, 8, rank=0, world=2)


def test_two_nodes_with_other_settings_end_in_one_line(tmp_path):
    """Two processes as two torchruns start them, each with a command of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, HERE / "train.py", *TINY, "--ckpt", tmp_path / "a.pt", "--lr"]
    nodes = [
        subprocess.Popen(
            [*map(str, command), lr],
            env=env | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, lr in enumerate(("0.001", "0.01"))
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=120)
        assert node.returncode == 1 and "ranks differ in lr: 0.001, 0.01; start all" in errors
    assert not list(tmp_path.iterdir())


def test_images_are_a_function_of_seed_epoch_and_index():
    source, kinds = data.Shapes(40), [(2, 32, 0.3, 1), (3, 12, 0.05, 0.3)]
    images, state = data.Images(source, 32, kinds, seed=3), torch.get_rng_state()
    views, label = images[(1, 5)]
    assert [view.shape for view in views] == [(2, 3, 32, 32), (3, 3, 12, 12)] and label == 5
    assert all(map(torch.equal, views, images[(1, 5)][0]))
    assert torch.equal(torch.get_rng_state(), state)
    keys = itertools.product((0, 1), (0, 1), range(3))
    same = [source[0]] * 3
    found = [data.Images(same, 32, kinds, s)[e, i][0] for s, e, i in keys]
    every = torch.cat([large.flatten(1) for large, _ in found])
    assert len(every.unique(dim=0)) == 24  # two views for each seed, epoch and index


def test_photometric_is_torchvisions_with_the_same_factors():
    x, u = (
        torch.rand(40, 3, 24, 24, generator=generator()),
        torch.rand(40, 9, generator=generator(1)),
    )
    u[:, 3] = 0.5  # no turn of the hue: the two turn it in different planes
    branches = (4, 0.8), (5, 0.2), (7, 0.5), (8, 0.2)
    assert all(0 < (u[:, i] < p).sum() < 40 for i, p in branches)  # each is taken, and is not
    for image, draw, got in zip(x, u.tolist(), data.photometric(x, u, 0.5, 0.2), strict=True):
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


@pytest.mark.parametrize("side, width", [(12, 0.80), (32, 1.29), (224, 2.00)])
def test_blur_is_as_wide_as_its_docstring_says(side, width):
    x = torch.zeros(1, 1, side, side)
    x[..., side // 2, side // 2] = 1
    profile = data.blur(x, torch.tensor([[2.0]]))[0, 0].sum(0)
    offsets = torch.arange(side) - side // 2
    assert (profile @ offsets.square().float()).sqrt().item() == pytest.approx(width, abs=0.005)


def test_hue_turns_by_its_angle():
    x, u = 0.4 + 0.2 * torch.rand(9, 3, 4, 4, generator=generator()), torch.full((9, 9), 0.5)
    u[:, 3] = torch.linspace(0, 1, 9)
    yiq = torch.from_numpy(data.YIQ).float()
    pair = x, data.photometric(x, u)
    (luma, *before), (same, *after) = (torch.einsum("ic,bchw->ibhw", yiq, y) for y in pair)
    torch.testing.assert_close(luma, same, atol=1e-5, rtol=0)
    turned = torch.complex(*after) / torch.complex(*before)
    wanted = torch.polar(torch.ones(9), 2 * math.pi * 0.1 * (2 * u[:, 3] - 1))
    torch.testing.assert_close(turned, wanted[:, None, None].expand(9, 4, 4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("height, width, side", [(32, 32, 14), (40, 24, 32)])
def test_resized_crop_is_torchvisions_of_the_same_box(height, width, side):
    x = torch.rand(100, 3, height, width, generator=generator(), dtype=torch.float64)
    u = torch.rand(100, 23, generator=generator(1), dtype=torch.float64)
    sizes = []
    for image, draw, out in zip(x, u, data.resized_crop(x, u, side, (0.05, 1.0)), strict=True):
        for attempt in range(10):
            area = height * width * (0.05 + 0.95 * draw[attempt])
            ratio = math.exp((2 * draw[10 + attempt] - 1) * math.log(4 / 3))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if h <= height and w <= width:
                break
        h, w = min(h, height), min(w, width)
        top, left = int(draw[20] * (height - h + 1)), int(draw[21] * (width - w + 1))
        wanted = tv.resized_crop(image, top, left, h, w, [side, side], antialias=True)
        wanted = wanted.flip(2) if draw[22] < 0.5 else wanted
        assert (out - wanted).abs().max() < 1e-6  # its weights are float32
        sizes.append(h * w / (height * width))
    assert min(sizes) < 0.15 and max(sizes) > 0.75


def test_every_view_is_drawn_on_its_own():
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator())
    batch, mine, two = image.expand(4, -1, -1, -1), torch.arange(4), [(2, 32, 0.3, 1)]
    wanted = tv.normalize(batch / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    args, every = filled("--batch-size 4"), []
    torch.testing.assert_close(train.draw(args, [batch], mine, GRID, 1)[0][0], wanted)
    for step in (1, 2):
        every += data.crop_held(batch, two, data.generator_of("crops", 0, step), mine, 4)
        every += train.draw(filled("--batch-size 4 --augment color"), [batch], mine, GRID, step)[0]
    every = torch.cat(every).flatten(1)
    assert len(every) == 32 and len(every.unique(dim=0)) >= 24  # some colours are left alone (0.16)


def test_batches_cover_an_epoch_over_ranks():
    rows = torch.arange(6).tensor_split(4)  # 2, 2, 1, 1
    shares = [list(data.batch_keys(23, 6, 0, 6, 0, part)) for part in rows]
    whole = list(data.batch_keys(23, 6, 0, 6, 0, torch.arange(6)))
    assert whole == [[*itertools.chain(*parts)] for parts in zip(*shares, strict=True)]
    assert list(data.batch_keys(23, 6, 4, 6, 0, rows[1])) == shares[1][4:]
    for epoch in (0, 1):
        keys = [key for batch in whole[3 * epoch : 3 * epoch + 3] for key in batch]
        assert len({*keys}) == 18 and {e for e, _ in keys} == {epoch}
    orders = whole[:3], whole[3:], [*data.batch_keys(23, 6, 0, 3, 1, torch.arange(6))]
    orders = [tuple(i for batch in batches for _, i in batch) for batches in orders]
    assert len({*orders}) == 3  # by epoch, and by seed


def test_small_images_of_one_size_are_held(few_shapes):
    images, kinds = data.Shapes(), [(2, 32, 0.3, 1), (6, 16, 0.05, 0.3)]
    settings = 32, 1, 2, 0, torch.arange(32), 0, CPU
    (keys,) = data.batch_keys(600, 32, 1, 2, 0, torch.arange(32))
    wanted = torch.stack([torch.from_numpy(images[i][0]).permute(2, 0, 1) for _, i in keys])
    ((view,),) = data.batches(images, 32, [], *settings)
    assert torch.equal(view, wanted / 255)
    (views,) = data.batches(images, 32, kinds, *settings)
    again = data.crop_held(wanted, kinds, data.generator_of("crops", 0, 2), torch.arange(32), 32)
    assert [view.shape[2] for view in views] == [32] * 2 + [16] * 6
    assert all(map(torch.equal, views, again))
    assert train.crops_of(filled("--recipe crops --local-size 16")) == kinds
    assert train.crops_of(filled("--augment none")) == []
    for sizes in ([(100, 100)], [(64, 50_000)], [(40, 40), (40, 44)]):  # large, 9.6 GB, two sizes
        assert data.hold(range(1000), sizes, 0, CPU) is None


def test_large_photographs_are_the_same_with_any_number_of_workers(tmp_path):
    """One small image among them does not choose the recipe: the median does."""
    folder = jpeg_folder(tmp_path / "photos", size=100)
    Image.new("RGB", (40, 40)).save(folder / "train" / "class0" / "00.jpg")
    flags = f"--data {folder} --recipe crops --model vit_n32 --batch-size 6"
    flags += " --augment color --steps 2 --workers "
    one, two = (run_train(tmp_path / f"{n}.pt", flags + n) for n in "01")
    assert one["args"]["image_size"] == 224 and same_weights(one, two)


# ------------------------------------------------------------------------------------------- probes
def run_probe(capsys, *arguments):
    capsys.readouterr()
    probe.main([*map(str, arguments), "--device", "cpu"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


FROZEN = "--untrained --image-size 48 --layers 1 --shots 1 2", "--pool cls --layers 2"


@pytest.mark.parametrize("flags", [*FROZEN, "--finetune --steps 3 --batch-size 64"])
def test_probes_print_and_leave_the_encoder_alone(trained, capsys, monkeypatch, few_shapes, flags):
    encoders, build = [], probe.build_encoder
    keep = lambda *arguments: encoders.append(build(*arguments)) or encoders[-1]
    monkeypatch.setattr(probe, "build_encoder", keep)
    result = run_probe(capsys, trained[0], *flags.split())
    torch.manual_seed(0)
    untrained = model.vit("vit_n8", 32).state_dict()
    wanted = untrained if "--untrained" in flags else trained[1]["encoder"]
    state = encoders[0].state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert (result["train"], result["val"], result["classes"]) == (600, 200, 10)
    assert ("knn" in result and 1 <= result["erank"] <= 256) == (flags in FROZEN)
    assert ("1-shot" in result and "2-shot" in result) == ("--shots" in flags)


def test_validation_labels_never_reach_training(trained, capsys, monkeypatch, few_shapes):
    honest, draw, heads, results = probe.fit_heads, data.Shapes.__getitem__, [], []
    keep = lambda *a, **settings: heads.append(honest(*a, **settings)) or heads[-1]
    monkeypatch.setattr(probe, "fit_heads", keep)

    def permuted(self, i):
        image, label = draw(self, i)
        return image, (7 * label + 3) % 10 if self.val else label

    for item in (draw, permuted):
        monkeypatch.setattr(data.Shapes, "__getitem__", item)
        results.append(run_probe(capsys, trained[0], "--layers", "1"))
    for before, after in zip(heads[:2], heads[2:], strict=True):  # the grid, and the chosen head
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert results[0]["linear"] != results[1]["linear"]
    assert results[0]["linear_held_out"] == results[1]["linear_held_out"]


def test_few_shots_are_so_many_of_each_class(monkeypatch):
    x, y = gaussian(90, 5).float(), torch.arange(90) % 3
    honest, drawn = probe.fit_heads, []
    keep = lambda *a: drawn.append(a[4].tolist()) or honest(*a)
    monkeypatch.setattr(probe, "fit_heads", keep)
    x[:, :3] += 30 * torch.nn.functional.one_hot(y)
    found = probe.few_shot_probe(x, y, x, y, 4, seed=1)
    assert found["4-shot"] > 95 and "3 draws" in found["4-shot_how"]
    assert all(y[rows].bincount().tolist() == [4, 4, 4] for rows in drawn)
    assert len({tuple(sorted(rows)) for rows in drawn}) == 3
    with pytest.raises(ValueError, match="--shots 31, but a class has fewer"):
        probe.few_shot_probe(x, y, x, y, 31)


def test_what_was_trained_is_what_is_read(tmp_path, capsys, few_shapes, monkeypatch):
    path = tmp_path / "teacher.pt"
    saved, read = run_train(path, "--steps 2 --ema 0.9"), []
    monkeypatch.setattr(
        probe, "frozen_probes", lambda encoder, *_: read.append(encoder) or {"classes": 2}
    )
    for flags, part in (([], "teacher"), (["--student"], "encoder")):
        assert run_probe(capsys, path, *flags)["part"] == part
        assert torch.equal(read[-1].cls_token, saved[part]["cls_token"])
    path = tmp_path / "crops.pt"
    run_train(path, "--steps 1 --recipe crops --pool cls --local-views 0")
    assert run_probe(capsys, path)["pool"] == "cls"
    refuse(probe.main, [path, "--pool", "avg"], "trained with --pool cls: --pool avg had no grad")


def test_both_readouts_from_one_pass(trained, capsys, few_shapes):
    """By default the last block and four blocks, each as --layers gives it alone."""
    one, all_four = ["--layers", "1"], ["--layers", "4"]
    default, last, four = (run_probe(capsys, trained[0], *more) for more in ([], one, all_four))
    assert all(default[name] == last[name] for name in ("knn", "linear", "erank"))
    assert default["linear4"] == four["linear"]
    assert "linear4" not in last and "linear4" not in four


def test_the_memory_of_the_linear_probe_is_said_first(trained, capsys, monkeypatch, few_shapes):
    monkeypatch.setattr(data.Shapes, "__len__", lambda self: 10**6)
    monkeypatch.setattr(probe, "extract_features", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        probe.main([str(trained[0]), "--device", "cpu"])
    assert "the linear probe will take 4 GiB" in capsys.readouterr().out


def test_two_ranks_probe_what_one_does(trained, tmp_path, capsys):
    photos = jpeg_folder(tmp_path / "photos", per_class=13, classes=3)
    flags = [trained[0], "--device", "cpu", "--workers", "0", "--data", photos]
    one = run_probe(capsys, *flags)
    done = torchrun("probe.py", *flags)
    assert json.loads(done.stdout.splitlines()[-1]) == one
    tune = "--finetune --epochs 2 --batch-size 8".split()
    done = torchrun("probe.py", *flags, *tune)
    assert 0 <= json.loads(done.stdout.splitlines()[-1])["finetune"] <= 100


def test_finetuning_learns_slower_below_and_decays_matrices():
    encoder = small_vit()
    net = probe.Classifier(encoder, 10, "avg")
    groups = probe.layer_groups(encoder, net.head, 1e-3, 0.1)
    named = [*encoder.named_parameters(), *net.head.named_parameters()]
    for (name, p), group in zip(named, groups, strict=True):
        block = re.match(r"blocks\.(\d)", name)
        below = 4 - int(block[1]) if block else 0 if re.match("norm|weight|bias", name) else 5
        assert group["params"][0] is p and group["scale"] == pytest.approx(1e-3**below), name
        assert group["weight_decay"] == 0.1 * (name.endswith("weight") and p.ndim > 1), name


def test_finetuning_trains_and_scores_what_it_says(monkeypatch, few_shapes):
    """In training mode; scored are the tuned weights, in evaluation mode."""
    flags = "x --finetune --steps 3 --batch-size 32 --lr 0.01 --device cpu --workers 0"
    options, start, modes, nets = probe.parse_args(flags.split()), small_vit().eval(), [], []
    options.pool = "avg"
    build = probe.Classifier
    monkeypatch.setattr(probe, "Classifier", lambda *a: nets.append(build(*a)) or nets[-1])
    start.blocks[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    sets = [data.Shapes(0, split) for split in ("train", "val")]
    found = probe.finetune(start, *sets, 32, options, CPU)["finetune"]
    assert modes == [True] * 3 + [False] * 4  # 200 images, 64 at once
    encoder, head = nets[0].encoder, nets[0].head
    for p, q in zip(encoder.parameters(), start.parameters(), strict=True):
        assert not torch.equal(p, q)
    x, y = probe.extract_features(encoder, data.Images(sets[1], 32))
    assert found == pytest.approx(100 * (head(x).argmax(1) == y).float().mean().item(), abs=0.01)


BAD_PROBES = """--layers 9 | vit_n8 has 4 blocks
--student | ckpt.pt has no teacher
--shots 0 | --shots: 0 must be at least 1
--shots 99 | --shots 99, but a class has fewer
--image-size 36 | 36, 36.* px are not whole patches of 8 x 8
--lr -1 | --lr: -1 must be at least 0
--lr 9 | --lr goes with --finetune
--epochs 999 | --epochs goes with --finetune
--finetune --shots 1 | --shots: leave them out
--epochs x | invalid positive value
--finetune --layers 2 | leave them out
--device quantum | --device quantum"""


def test_bad_probes_end_in_one_line(trained, tmp_path, monkeypatch, few_shapes):
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained[0], "ckpt.pt")
    for line in BAD_PROBES.splitlines():
        flags, says = line.split(" | ")
        refuse(probe.main, ["ckpt.pt", "--device", "cpu", *flags.split()], says)
        assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    assert (tmp_path / "ckpt.pt").read_bytes() == trained[0].read_bytes()


def test_probe_refuses_impossible_splits(trained, tmp_path):
    photos = jpeg_folder(tmp_path / "photos")
    flags = [trained[0], "--data", photos, "--device", "cpu", "--workers", "0"]
    (photos / "val" / "class1").rename(photos / "val" / "class2")
    refuse(probe.main, flags, "class 'class1' is in only one")
    (photos / "val" / "class2").rename(photos / "val" / "caf\u00e9")  # an accent, in two codes
    (photos / "train" / "class1").rename(photos / "train" / "cafe\u0301")
    refuse(probe.main, flags, r"class 'cafe\\u0301' is in only one")
    (photos / "val" / "caf\u00e9").rename(photos / "val" / "class1")
    (photos / "train" / "cafe\u0301").rename(photos / "train" / "class1")
    for i in range(12):  # a class of two folders, as if classes were below it
        below = photos / "train" / "class1" / f"part{i % 2}"
        below.mkdir(exist_ok=True)
        (photos / "train" / "class1" / f"{i:02}.jpg").rename(below / f"{i:02}.jpg")
    refuse(probe.main, flags, "classes of .* have several folders each")
    shutil.rmtree(photos / "train"), (photos / "train").symlink_to(photos / "val")
    refuse(probe.main, flags, "train and val of .* are the same files")
    (photos / "train").unlink(), shutil.copytree(photos / "val", photos / "train")
    (photos / "train" / "class1").rename(photos / "train" / "class2")
    (photos / "val" / "class1").rename(photos / "val" / "class2")
    (photos / "train" / "class2").rename(tmp_path / "aside")
    refuse(probe.main, [*flags, "--finetune"], "photos has only one class")


def test_probe_of_a_backbone_without_tokens(tmp_path, capsys):
    path = tmp_path / "ckpt.pt"
    run_train(
        path, "--steps 1 --recipe crops --model shufflenet_v2_x0_5 --batch-size 4 --local-views 0"
    )
    photos = jpeg_folder(tmp_path / "photos")
    for extra in ([], "--finetune --steps 2 --batch-size 12".split()):
        found = run_probe(capsys, path, "--data", photos, "--workers", "0", *extra)
        assert found["val"] == 24 and found.get("layer_decay", 1) == 1  # it has no layers
    for flags in ("--pool cls", "--layers 2"):
        refuse(probe.main, [path, *flags.split()], f"{flags.split()[0]}.* need a ViT")


def test_features_are_of_normalised_images(few_shapes):
    encoder, five = small_vit().eval(), torch.utils.data.Subset(data.Shapes(), range(5))
    x = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in five]) / 255
    tokens = encoder(tv.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    cls, avg = tokens[:, 0], tokens[:, 1:].mean(1)
    for pool, wanted in (("cls", cls), ("avg", avg)):
        found, labels = probe.extract_features(encoder, data.Images(five, 32), pool, batch_size=2)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
        assert labels.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"training mode; call \.eval"):
        probe.extract_features(encoder.train(), data.Images(five, 32))
    encoder.num_prefix_tokens = 5  # timm's name, of CLS and four registers
    with pytest.raises(ValueError, match="no registers"):
        probe.extract_features(encoder.eval(), data.Images(five, 32))


@pytest.mark.parametrize("k", [1, 20, 1000])
def test_knn_is_brute_force(k):
    y, w = torch.arange(300) % 7, torch.arange(50) % 7
    x, v = (gaussian(len(c), 8, i) + 0.7 * gaussian(7, 8, 3)[c] for i, c in ((1, y), (2, w)))
    cosine = torch.cosine_similarity(v[:, None], x[None], dim=2)
    keep = cosine >= cosine.sort(descending=True).values[:, min(k, 300) - 1, None]
    votes = [((cosine / 0.2).exp() * keep * (y == c)).sum(1) for c in range(7)]
    wanted = 100 * (torch.stack(votes, 1).argmax(1) == w).double().mean().item()
    found = probe.knn_probe(x, y, v, w, k=k, temperature=0.2)
    assert found["knn"] == pytest.approx(wanted)


@pytest.mark.parametrize("decay", [1e-3, 1e-1])
def test_linear_heads_reach_their_minimum(decay):
    """On badly conditioned features (a factor of 1e4 between axes) against L-BFGS in float64."""
    y = (torch.arange(3000) % 7).clamp_max(3)  # the last class is four times as large
    x = gaussian(3000, 12, 1) + 1.5 * gaussian(4, 12, 2)[y]
    x = x * torch.logspace(0, -2, 12) @ gaussian(12, 12, 3) + 5
    std = x.std(0, correction=0)
    z = (x - x.mean(0)) / std
    weight = torch.zeros(12, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def objective(weight, bias):
        error = torch.nn.functional.cross_entropy(z @ weight + bias, y)
        return error + decay / 2 * weight.square().sum()

    settings = {"max_iter": 2000, "tolerance_grad": 1e-9, "tolerance_change": 1e-14}
    solver = torch.optim.LBFGS([weight, bias], line_search_fn="strong_wolfe", **settings)

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
        offset = b[h].double() + x.mean(0) @ w[:, h].double()
        reached = objective(w[:, h].double() * std[:, None], offset).item()
        assert best <= reached < best + 0.01 * (start - best)  # 400 steps get so far
    part = probe.fit_heads(x.float(), y, heads[:1], rows=torch.arange(300))[0]
    assert torch.allclose(part, probe.fit_heads(x[:300].float(), y[:300], heads[:1])[0])


def test_linear_head_is_chosen_on_a_held_out_tenth():
    x, y = gaussian(300, 400).float(), torch.arange(300) % 2  # noise: any fit is of the images seen
    with pytest.raises(ValueError, match="one training image a class"):
        probe.linear_probe(x[:2], y[:2], x, y)
    broken = x.index_fill(0, torch.tensor([7]), torch.nan)
    for probed in (probe.knn_probe, probe.linear_probe):
        for features, says in (((broken, y, x, y), "train_x"), ((x, y, broken, y), "val_x")):
            with pytest.raises(ValueError, match=f"1 of 300 rows of {says} are not finite"):
                probed(*features)
    one = probe.linear_probe(x[:2].repeat(9, 1), y[:18], x, y, heads=[(0.1, d) for d in range(5)])
    assert one["linear_decay"] == 2 and "5 on 2 held out" in one["linear_how"]  # all tie
    found = probe.linear_probe(x, y, x, y, seed=3)
    assert found["linear_held_out"] < 85 and found["linear"] > 95
    head = found["linear_lr"], found["linear_decay"]
    weight, bias = probe.fit_heads(x, y, [head], 3)  # fitted to everything
    assert head in probe.HEADS
    assert found["linear"] == round(probe.score(weight, bias, x, y)[0], 2)
    heads = [(1.0, 1e4), (1.0, 0.0), (1.0, 1e5)]  # one of them learns
    x[:, 0] += 9 * y
    assert probe.linear_probe(x, y, x, y, heads=heads)["linear_decay"] == 0


# ------------------------------------------------------------------------------- files and commands
def test_files_can_be_copied_alone(tmp_path):
    names = "sigreg", "masks", "model"
    for name in names:
        shutil.copy(HERE / f"{name}.py", tmp_path)
    code = f"""import sys
for name in {names}:
    __import__(name)
    assert {{*{names}, "torchvision"}} & {{*sys.modules}} == {{name}}
    del sys.modules[name]"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    ours = {*names, "data", "train", "probe"}
    imports = re.findall(r"^(?:import|from) (\w+)", (HERE / "data.py").read_text(), re.MULTILINE)
    assert not ours & {*imports}


def test_readmes_lines_and_pictures_of_a_network_without_tokens(trained, tmp_path, monkeypatch):
    path, script = tmp_path / "ckpt.pt", HERE / "assets" / "pca.py"
    run_train(path, "--steps 1 --recipe crops --model resnet18 --batch-size 4 --local-views 0")
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(saved = .*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    names = {"torch": torch, "model": model, "data": data, "images": torch.rand(4, 3, 32, 32)}
    exec(block[1], names)  # noqa: S102
    assert names["features"].shape == (4, 512)
    for arguments, says in (
        ((path, tmp_path / "a.png"), "resnet18 has no patch tokens"),
        ((trained[0], tmp_path / "p.foo"), "p.foo must end in .png or .jpg"),
        ((trained[0], tmp_path / "none" / "a.png"), "in a folder that is there"),
    ):
        command = [*map(str, [sys.executable, script, *arguments])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1


def test_readmes_loss_code_is_the_code():
    """A fenced function of README equals the one in sigreg.py, less its docstring and comments."""
    blocks = re.findall(r"```python\n(def .*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    source = re.sub(r' {4}"""(.|\n)*?"""\n', "", (HERE / "sigreg.py").read_text())
    assert len(blocks) == 2 and all(block in source for block in blocks)


def test_lines_of_source_bs_loss_are_those_that_results_counts():
    text = (HERE / "sigreg.py").read_text()
    lines, counts = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            code = {*range(first, node.end_lineno + 1)}
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part):
                    code -= {*range(part.body[0].lineno, part.body[0].end_lineno + 1)}
            code = [lines[i - 1].strip() for i in code]
            counts[node.name] = sum(bool(line) and not line.startswith("#") for line in code)
    both = (
        "multi_view_loss prediction_loss wide sum_over_ranks _world quadrature random_directions "
    )
    both += "random_directions "
    plain, fast = "sketched_sigreg_plain", "sketched_sigreg _Sketched _SumOverRanks _check SIGReg"
    plain, fast = (sum(counts[name] for name in (both + more).split()) for more in (plain, fast))
    said = f"{plain} lines of code as on paper, {fast} as train.py runs it"
    assert said in (HERE / "RESULTS.md").read_text(), f"RESULTS.md counts these lines: {said}"
    named = re.search(
        r"torchvision downloads: `(.*?)`", (HERE / "README.md").read_text(), re.DOTALL
    )
    assert named[1].split() == [*data.DATASETS]


def test_shown_code_runs(trained, monkeypatch):
    """README's lines that load an encoder, and the step in the docstring of Masked."""
    monkeypatch.chdir(trained[0].parent)
    images, encoder = torch.rand(4, 3, 32, 32), small_vit()
    names = {"torch": torch, "model": model, "data": data, "images": images}
    block = re.search(r"```python\n(saved = .*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    exec(block[1], names)  # noqa: S102
    encoder.load_state_dict(trained[1]["encoder"])
    wanted = probe.read_out(encoder, images, "avg", 1)
    torch.testing.assert_close(names["features"], wanted)
    names = vars(model) | vars(masks) | vars(sigreg)
    names |= {"encoder": encoder, "x": images, "x_in_other_colours": images, "step": 3}
    block = re.search(r" {8}from masks .*?\n\n", model.Masked.__doc__, re.DOTALL)
    exec(textwrap.dedent(block[0]), names)  # noqa: S102
    torch.testing.assert_close(names["loss"], names["pred"] + names["reg"] + names["whole"])


def test_readme_and_results_agree_with_the_table():
    """Every a / b / c of README and RESULTS is a row of assets/results.csv."""
    with (HERE / "assets" / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["last4"]]
    known = {f"{row['knn']} / {row['last']} / {row['last4']}" for row in rows}
    for name in ("README.md", "RESULTS.md"):
        shown = re.findall(r"\d\d?\.\d / \d\d\.\d / \d\d\.\d", (HERE / name).read_text())
        assert {*shown} <= known, {*shown} - known
