"""SIGReg: the regularizers of LeJEPA, and its loss.

    python sigreg.py            # times every loss, forward + backward, on the CPU and on a GPU if there is one

Two documents call two different things SIGReg; both are here, with one relative of the first:

    spectral_sigreg(z)               A: KL of the normalised singular values of the batch from uniform; scale-free
    legendre_sigreg(z)               A before its scale is dropped: KL of the batch's Gaussian fit from N(0, I)
    sketched_sigreg(z, directions)   B: Epps-Pulley normality test on random projections (arXiv:2511.08544)

Each takes z (N, D) of any float dtype. Under torch.distributed, z is this rank's share of the batch (shares may
differ in size), the value is that of the whole batch, and once DDP has averaged the parameter gradients they are
those of one process that holds the whole batch. Ranks exchange sums over images, (D, D), (knots, slices) or (patches, D),
never embeddings.
This file needs torch alone.
"""
import math

import torch
import torch.distributed as dist


class _SumOverRanks(torch.autograd.Function):
    """All-reduce (sum) whose backward is the same all-reduce.

    Every rank computes the same loss L(S) of the sum S and back-propagates it, so the backward sum is world * dL/dS,
    and DDP's division by the world size leaves the gradient of the whole batch. dist.all_reduce on its own is
    invisible to autograd: the other ranks' copies of L drop out and the gradient is too small by 1 / world.
    """

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _SumOverRanks.apply(grad)


def _world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_ranks(*tensors):
    """Global sums of the given tensors, in one collective; the tensors themselves when there is one process."""
    if _world() == 1:
        return tensors
    flat = _SumOverRanks.apply(torch.cat([t.reshape(-1) for t in tensors]))
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


def _check(z):
    if z.ndim != 2 or not z.is_floating_point():
        raise ValueError(f"sigreg.py: z must be a float tensor of shape (N, D), got {z.dtype} {tuple(z.shape)}")


class _Gram(torch.autograd.Function):
    """z^T z. Its gradient z (G + G^T) is one product; autograd's own takes two, one for each factor."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.T @ z

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return z @ (grad + grad.T)


def _moments(z):
    """Row count n, mean (D,), centred Gram matrix (D, D) and sum of squares of the global batch, in float64.

    The mean is exchanged before the Gram matrix: centring first keeps all digits when the mean is large, which the
    one-pass form sum(z z^T) - n mean mean^T does not. Apple's MPS has no float64; there it is float32.
    """
    _check(z)
    z = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
    n, total, squares = _sum_over_ranks(z.new_tensor([len(z)]), z.sum(0), z.square().sum().view(1))
    mean = total / n
    (gram,) = _sum_over_ranks(_Gram.apply(z - mean))
    return n, mean, gram, squares


def _spectral_entropy(z):
    """H = -sum_j s_j log s_j of s = sigma / sum(sigma), sigma the singular values of the centred batch; and log D.

    sigma = sqrt(eig(Gram)) in float64; eigvalsh's gradient has no 1 / (sigma_i - sigma_j), so equal values are safe.
    Values within rounding of zero count as zero, with zero gradient: sqrt has no slope there. 0 log 0 = 0.
    """
    _, _, gram, squares = _moments(z)
    eps = torch.finfo(gram.dtype).eps
    finite = gram.isfinite().all()  # eigvalsh raises on others; this way they come out as nan
    eig = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0))
    keep = eig > (len(gram) * eps * eig[-1]).clamp_min((16 * eps) ** 2 * squares.squeeze()).detach()
    keep &= eig > torch.finfo(gram.dtype).tiny
    sigma = torch.where(keep, torch.where(keep, eig, 1.0).sqrt(), 0.0)
    s = sigma / sigma.sum().clamp_min(torch.finfo(gram.dtype).tiny)
    entropy = -(s * torch.where(keep, s, 1.0).log()).sum()
    return torch.where(finite, entropy, torch.nan), math.log(len(gram))


def spectral_sigreg(z):
    """Spectral Isometry and Geometry Regularizer (source A): KL of the normalised spectrum from uniform.

        sigma_1 .. sigma_D = singular values of z - mean(z)  (zeros for the missing ones when N <= D)
        s_j = sigma_j / sum_i sigma_i
        value = sum_j s_j log(D s_j) = log D - H(s)

    z (N, D) -> scalar in [0, log D], nats, float64: 0 for a flat spectrum, log D for a batch of rank 1 and for a
    batch of identical rows. Written as log D - H(s), because the formula with a small constant under the division
    and tiny s_j dropped gives 0, the optimum, for complete collapse. With N <= D it cannot go below log(D / (N - 1)).
    Scale-free: value(c z) = value(z). It shapes the spectrum and cannot keep the embedding from shrinking.
    Raises ValueError unless z is a 2-D float tensor.
    """
    entropy, log_dim = _spectral_entropy(z)
    return log_dim - entropy


sigreg = spectral_sigreg


def effective_rank(z):
    """exp(H(s)), s the normalised singular values of the centred batch (Roy & Vetterli 2007). z (N, D) -> [1, D]."""
    return _spectral_entropy(z)[0].exp()


def embedding_std(z):
    """Root mean variance of the columns over the global batch, sqrt(tr cov / D). z (N, D) -> scalar >= 0, float32 or better."""
    z = centre(z)
    count, squares = _sum_over_ranks(z.new_tensor([z.numel()]), z.square().sum().view(1))
    return (squares / count).sqrt().squeeze()


def legendre_sigreg(z):
    """KL of the batch's Gaussian fit from N(0, I), per dimension: source A's bound with its scale kept.

    The Legendre-Fenchel bound on the log-partition function, -1/2 tr C + 1/2 log det C - D/2 log(2 pi e) and a term
    for the mean, is largest at C = I. As a loss per dimension:

        value = (tr C + |mean|^2 - log det C - D) / (2 D) = KL(N(mean, C) || N(0, I)) / D
        C = covariance of z (divided by N) + ridge I,   ridge = 1e-4 + 1e-10 tr(cov) / D

    z (N, D) -> scalar >= 0, nats per dimension, float64: 0 at mean 0 and C = I. The ridge keeps log det finite for
    N <= D and for constant batches (value about 4.1 there), and adds to the trace too, so value >= 0 still holds.
    Unlike spectral_sigreg it sees the scale: shrinking z is punished as -log. By Cholesky, no eigendecomposition.
    Raises ValueError unless z is a 2-D float tensor.
    """
    n, mean, gram, _ = _moments(z)
    dim = len(gram)
    cov = gram / n
    cov = cov + (1e-4 + 1e-10 * cov.trace() / dim) * torch.eye(dim, dtype=cov.dtype, device=cov.device)
    factor, failed = torch.linalg.cholesky_ex(cov)  # does not wait for the GPU, and leaves nan to the caller
    log_det = torch.where(failed == 0, 2 * factor.diagonal().log().sum(), torch.nan)
    return (cov.trace() + mean.square().sum() - log_det - dim) / (2 * dim)


def random_directions(dim, num_slices, seed, device=None):
    """(dim, num_slices) float32 unit columns, uniform on the sphere, a pure function of the seed.

    Drawn on the CPU: every rank gets the same ones, whatever its device, without a broadcast. Seed it with the step
    number and a resumed run draws what the uninterrupted one would have drawn.
    """
    directions = torch.randn(dim, num_slices, generator=torch.Generator().manual_seed(seed))
    return (directions / directions.norm(dim=0)).to(device)


def sketched_sigreg_plain(z, directions, knots=17, t_max=3.0):
    """The definition of sketched_sigreg for one process, as it reads on paper: z (N, D), directions (D, M) of one dtype -> scalar.

    value = mean over slices of N sum_k w_k [(mean_n cos(t_k p_n) - phi_k)^2 + (mean_n sin(t_k p_n))^2];  N M knots numbers, several times.
    """
    t = torch.linspace(0, t_max, knots, dtype=z.dtype, device=z.device)
    phi = torch.exp(-t.square() / 2)
    w = phi * t_max / (knots - 1) * torch.tensor([1.0] + [2.0] * (knots - 2) + [1.0]).to(z)
    angle = (z @ directions)[..., None] * t  # (N, M, knots)
    statistic = len(z) * ((angle.cos().mean(0) - phi).square() + angle.sin().mean(0).square()) @ w  # (M,)
    return statistic.mean()


class _Sketched(torch.autograd.Function):
    """sketched_sigreg_plain over all ranks: one sine and cosine a projection, and its gradient in the same call.

    The knots are t_k = k dt, so e^(i t_k p) = u^k with u = e^(i dt p): a complex product a knot. With the gaps
    g_k = mean u^k - phi(t_k) (k = 0 has none) of the global batch,

        value     = N sum_k w_k |g_k|^2                                            mean over the M slices
        d / d p_n = Re sum_k c_k u_n^k,   c_k = 2 w_k t_k (Im g_k + i Re g_k)      by Horner's rule
        d / d z_n = (d / d p_n) directions^T / M

    Rows go in blocks that stay in the cache; u, (N, M) complex, is kept from one pass to the other. One collective.
    """

    @staticmethod
    def forward(ctx, z, directions, knots, t_max):
        dt, slices, real = t_max / (knots - 1), directions.shape[1], dict(dtype=z.dtype, device=z.device)
        t = dt * torch.arange(1, knots, **real)
        phi = torch.exp(-t.square() / 2)
        w = 2 * dt * phi * torch.tensor([1.0] * (knots - 2) + [0.5], **real)
        block = max((2**16 if z.device.type == "cpu" else 2**24) // slices, 1)
        units, sums = [], torch.zeros(knots - 1, slices, dtype=z.dtype.to_complex(), device=z.device)
        for rows in z.split(block):
            p = dt * (rows @ directions)
            units.append(torch.complex(p.cos(), p.sin()))
            power = units[-1].clone()
            for total in sums:
                total += power.sum(0)
                power *= units[-1]
        sums, n = _sum_over_ranks(torch.view_as_real(sums), z.new_tensor([len(z)]))
        gap = torch.view_as_complex(sums) / n - phi[:, None]
        if ctx.needs_input_grad[0]:
            c = (2 * w * t / slices)[:, None] * torch.complex(gap.imag, gap.real)
            ctx.grad = torch.empty_like(z)
            for u, rows in zip(units, ctx.grad.split(block)):
                horner = c[-1] * u
                for lower in c[:-1].flip(0):
                    horner += lower
                    horner *= u
                # every rank back-propagates the same loss, as in _SumOverRanks: DDP's average divides by the world size
                rows.copy_(_world() * (horner.real @ directions.T))
        return n.squeeze() * (w @ (gap.real.square() + gap.imag.square())).mean()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("sigreg.py: sketched_sigreg has no second derivative; sketched_sigreg_plain has")
        return grad * ctx.grad, None, None, None


def sketched_sigreg(z, directions, knots=17, t_max=3.0):
    """Sketched Isotropic Gaussian Regularization (source B, arXiv:2511.08544): Epps-Pulley test on projections.

        p = z @ directions                                       (N, M): M one-dimensional samples
        C(t) = mean cos(t p), S(t) = mean sin(t p)               empirical characteristic function of each slice
        phi(t) = exp(-t^2 / 2)                                   that of N(0, 1)
        value = mean over slices of N sum_k w_k [(C(t_k) - phi(t_k))^2 + S(t_k)^2]
        w = phi * [dt, 2 dt, .., 2 dt, dt]                       trapezoid over [-t_max, t_max], by symmetry on t >= 0

    z (N, D), directions (D, M) with unit columns, knots >= 2 points on [0, t_max] -> scalar >= 0; about 1.05 for a
    standard normal batch whatever N, and growing like N for any other. float32, or float64 for float64 z. Memory 8 N M bytes;
    no gradient to the directions, no second derivatives. Raises ValueError for other shapes.
    """
    _check(z)
    if directions.ndim != 2 or len(directions) != z.shape[1] or knots < 2:
        raise ValueError(f"sigreg.py: directions must be ({z.shape[1]}, M) and knots >= 2, "
                         f"got {tuple(directions.shape)} and {knots}")
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return _Sketched.apply(z, directions.to(z), knots, t_max)


def centre(z):
    """z (B, ..., D) less its mean over the global batch, taken apart for every index but the first; at least float32.

    With one mask for the batch, index j is one patch position in every image. What is left is what sets the images apart:
    a token's position and the outline of its block are the same for all, so neither predicting them nor spreading them pays.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    count, total = _sum_over_ranks(z.new_tensor([len(z)]), z.sum(0))
    return z - total / count


def prediction_loss(z_pred, z_target, relative=False):
    """Mean squared error over all elements of the global batch, in at least float32, gradients to both sides.

        relative:  sum |z_pred - z_target|^2 / sum |z_target|^2

    For centred targets (see centre) the relative loss is the share of their variance that is left unexplained: 1 for predicting
    their mean, 0 for predicting all; shrinking the targets gains nothing. z_pred, z_target of one shape -> scalar >= 0.
    """
    if z_pred.shape != z_target.shape:
        raise ValueError(f"sigreg.py: z_pred {tuple(z_pred.shape)} and z_target {tuple(z_target.shape)} differ in shape")
    z_pred, z_target = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in (z_pred, z_target))
    error, scale, count = _sum_over_ranks((z_pred - z_target).square().sum().view(1), z_target.square().sum().view(1),
                                          z_target.new_tensor([z_target.numel()]))
    # targets that are all equal have nothing to predict: 0 / tiny, not 0 / 0
    return (error / (scale.clamp_min(torch.finfo(scale.dtype).tiny) if relative else count)).squeeze()


def lejepa_loss(z_pred, z_target, z_batch, lam=1.0):
    """The loss of source A:  L = MSE(z_pred, z_target) + lam * SIGReg(z_batch).

    z_pred, z_target (..., D) predicted and encoded target patches; z_batch (N, D) the batch SIGReg looks at.
    Gradients flow through all three; nothing is detached. Returns a scalar.
    """
    return prediction_loss(z_pred, z_target) + lam * sigreg(z_batch)


def multi_view_loss(z, num_global, lam, regularizer):
    """The loss of source B:  L = (1 - lam) * mean_v mean |z_v - mean of the global z|^2 + lam * mean_v SIGReg(z_v).

    z (V, N, K): V views of N images, the global ones first; regularizer: (N, K) -> scalar, on each view apart. Gradients flow
    through the mean as well. Returns loss, prediction loss, regularizer.
    """
    center = z[:num_global].mean(0)
    pred = prediction_loss(z, center.expand_as(z))
    reg = sum(regularizer(view) for view in z) / len(z)
    return (1 - lam) * pred + lam * reg, pred, reg


def _svd_losses(z):
    """spectral_sigreg and legendre_sigreg as one writes them down: from the singular values, in z's precision."""
    n, dim = z.shape
    mean = z.mean(0)
    sigma = torch.linalg.svdvals(z - mean)
    s = sigma / sigma.sum()
    var = sigma.square() / n
    var = var + 1e-4 + 1e-10 * var.mean()
    return (s * (dim * s).log()).sum(), (var.sum() + mean.square().sum() - var.log().sum() - dim) / (2 * dim)


def _peak_memory(run, device):
    """Bytes that `run` needs at its peak beyond what was there; on the CPU from Linux's own count, elsewhere nan."""
    import ctypes
    from pathlib import Path

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return math.nan
    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier runs left, or it hides what this one takes
    reset.write_text("5")
    before, _, after = status.read_text(), run(), status.read_text()
    return 1024 * (int(after.split("VmHWM:")[1].split()[0]) - int(before.split("VmRSS:")[1].split()[0]))


def benchmark(rounds=5):
    """Every loss beside its plain form and the bare product: time forward + backward, peak extra memory, error to float64."""
    import time

    losses = {  # name: (loss, plain form, sizes N, D, M); the bare product is (N, D) x (D, M), with M = D where there are no slices
        "sketched": (sketched_sigreg, sketched_sigreg_plain, [(256, 128, 1024), (2048, 128, 1024), (2048, 768, 1024)]),
        "legendre": (lambda z, a: legendre_sigreg(z), lambda z, a: _svd_losses(z)[1], [(1024, 384, 384), (4096, 768, 768)]),
        "spectral": (lambda z, a: spectral_sigreg(z), lambda z, a: _svd_losses(z)[0], [(1024, 384, 384), (4096, 768, 768)]),
    }
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
        print(f"\n{device} ({name}), torch {torch.__version__}: float32, forward + backward, median of {rounds} interleaved rounds")
        print(f"{'loss':9}{'N':>5}{'D':>5}{'M':>6}{'ms':>8}{'plain / it':>12}{'it / product':>14}{'extra MB':>10}{'plain MB':>10}"
              f"{'value err':>11}{'grad err':>10}")
        for key, (loss, plain, sizes) in losses.items():
            for n, dim, slices in sizes:
                z = torch.randn(n, dim, device=device, requires_grad=True)
                a = random_directions(dim, slices, seed=0, device=device)
                runs = {"it": loss, "plain": plain, "product": lambda z, a: (z @ a).square().mean()}
                results, times = {}, {k: [] for k in runs}
                for turn in range(rounds + 1):  # the first warms up
                    for k, f in runs.items():
                        start = time.perf_counter()
                        value = f(z, a)
                        (grad,) = torch.autograd.grad(value, z)
                        value.item()  # waits for the GPU
                        times[k].append(time.perf_counter() - start)
                        results[k] = value.detach(), grad
                del value, grad
                for k, f in runs.items():
                    results[k + " peak"] = _peak_memory(lambda: torch.autograd.grad(f(z, a), z), device) / 2**20
                ms = {k: 1e3 * sorted(t[1:])[rounds // 2] for k, t in times.items()}
                exact = plain(z.double(), a.double())
                (slope,) = torch.autograd.grad(exact, z)
                value, grad = results["it"]
                print(f"{key:9}{n:5}{dim:5}{slices:6}{ms['it']:8.1f}{ms['plain'] / ms['it']:12.1f}{ms['it'] / ms['product']:14.1f}"
                      f"{results['it peak']:10.0f}{results['plain peak']:10.0f}{abs(value / exact - 1).item():11.0e}"
                      f"{((grad - slope).norm() / slope.norm()).item():10.0e}")


if __name__ == "__main__":
    torch.manual_seed(0)
    benchmark()
