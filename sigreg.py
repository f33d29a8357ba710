"""SIGReg: the regularizers and the two losses of LeJEPA.

    loss = SIGReg("sketched", seed=step)(z)                          # z (N, D) -> scalar
    loss, pred, reg = multi_view_loss(z, 2, 0.05, SIGReg("sketched", seed=step))    # z (V, B, D)

Two documents call two different things SIGReg. Both are here, with one relative of the first:

    spectral   source A: KL of the normalised singular values of the batch from uniform
    legendre   not in A, but its Gaussian bound: KL of the batch's Gaussian fit from N(0, I)
    sketched   source B: Epps-Pulley normality test on random projections (arXiv:2511.08544)

`*_sigreg_plain` is each of them as it stands on paper, in one process and float64, to read and to
copy. `*_sigreg` is the same number over all ranks, finite also for identical rows and N = 1; all
ranks must call it. ValueError unless z is a 2-D float tensor. For training copy the whole file.

spectral and legendre want more rows than dimensions, N > D. A smaller sample cannot be white:
spectral is then at least log(D / (N - 1)), and legendre above 0 (2.6 for 256 rows of 768 numbers).
sketched looks at one direction at a time, and takes any N. Values and gradients are the same inside
torch.autocast as outside. torch.compile takes every loss.

N rows of D numbers; M slices, T knots; B images, V views; K target blocks of Nt patches, a context
of Nc; P patches in the whole image. This file needs torch alone.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

RIDGE = 1e-4  # keeps log det finite; zeros then cost -log(1e-4) / 2 - 1/2 = 4.1 nats a dimension


# ------------------------------------------------------------------------- the losses, as on paper
def spectral_sigreg_plain(z):
    """Spectral Isometry and Geometry Regularizer (source A): KL of the spectrum from uniform.

        sigma_1 .. sigma_D = singular values of z - mean(z)
        s_j = sigma_j / sum_i sigma_i
        value = sum_j s_j log(D s_j) = log D - H(s)

    z (N, D) -> scalar in [0, log D], nats: 0 for a flat spectrum, log D for a batch of rank 1.
    """
    z = z.double()  # autocast leaves float64 alone
    sigma = torch.linalg.svdvals(z - z.mean(0))
    s = sigma / sigma.sum()
    return math.log(z.shape[1]) - torch.special.entr(s).sum()


def legendre_sigreg_plain(z):
    """KL of the batch's Gaussian fit from N(0, I), per dimension.

    Source A starts from a Legendre-Fenchel bound on the log-partition function of |z|^2 / 2, and
    keeps the spectrum alone. At the batch's Gaussian fit the bound is, whole,

        -(tr C + |mean|^2 - log det C) / 2 + D log(2 pi e) / 2

    which is largest at mean 0 and C = I. So what is minimised here is

        C = cov(z) + RIDGE (I + diag cov(z))                    cov with 1 / N, not 1 / (N - 1)
        value = (tr C + |mean|^2 - log det C - D) / (2 D) = KL(N(mean, C) || N(0, I)) / D

    z (N, D) -> scalar >= 0, nats per dimension: 0 at mean 0 and C = I.
    """
    z = z.double()
    (n, dim), mean = z.shape, z.mean(0)
    c = (z - mean).T @ (z - mean) / n
    c = c + RIDGE * torch.diag(1 + c.diagonal())
    return (c.trace() + mean.square().sum() - torch.logdet(c) - dim) / (2 * dim)


def sketched_sigreg_plain(z, directions, knots=17, t_max=3.0):
    """Sketched Isotropic Gaussian Regularization (source B): Epps-Pulley test on projections.

        p = z @ directions                                 (N, M): M one-dimensional samples
        C(t) = mean cos(t p), S(t) = mean sin(t p)         their characteristic functions
        phi(t) = exp(-t^2 / 2)                             that of N(0, 1)
        value = mean over slices of N sum_k w_k [(C(t_k) - phi(t_k))^2 + S(t_k)^2]
        w = phi * [dt, 2 dt, .., 2 dt, dt]                 trapezoid, by symmetry on t >= 0 only

    z (N, D), directions (D, M) with unit columns -> scalar >= 0. It is about 1.05 for a standard
    normal batch whatever N, and grows like N for any other, so our lambda goes with 1 / N. The 17
    knots on [0, 3] are those of the authors' minimal example; the paper's Algorithm 1 has 17 on
    [-5, 5].
    """
    z = z.double()
    t, phi, w = quadrature(knots, t_max, like=z)
    angle = (z @ directions.double())[..., None] * t  # (N, M, T)
    gap = (angle.cos().mean(0) - phi).square() + angle.sin().mean(0).square()  # (M, T)
    return (len(z) * gap @ w).mean()


def quadrature(knots, t_max, like):
    """Knots t on [0, t_max], the normal's phi there and the weights w: (T,) each, as `like`."""
    dt = t_max / (knots - 1)
    t = dt * torch.arange(knots, dtype=like.dtype, device=like.device)
    phi = torch.exp(-t.square() / 2)
    w = 2 * dt * phi
    w[0], w[-1] = w[0] / 2, w[-1] / 2
    return t, phi, w


def masked_loss(
    z_context, z_target, z_pred, z_back=None, *, places=None, lam, regularizer, error, on
):
    """The loss of masked prediction, over encoded tokens x (context) and y (targets) without CLS.

        source A:      L = mean |z_pred - y|^2 + lam SIGReg(mean token of each image)
        the default:   L = sum |z_pred - t|^2 / sum |t|^2 + lam (SIGReg(c) + SIGReg(t)) / 2
                       c = centre(x), t = centre(y): each token less the mean of its place
                       (and multi_view_loss of whole images is added: see model.Masked)

    A has a spectral regularizer, and contradicts itself twice: error="norm" sums the square over D
    (its equation), "mse" takes the mean (its listing); on="context" pools the context alone (its
    algorithm), "pooled" all encoded tokens (its text). The default is error="relative",
    on="tokens", a legendre regularizer. "smooth_l1" is I-JEPA's error; see prediction_loss.

    z_context (B, 1 + Nc, D), z_target (B, K, 1 + Nt, D): encoded tokens, CLS first; z_pred
    (B, K, Nt, D). z_back (B, K, Nc, D), if there: the context predicted from each target; the error
    is then the mean of both directions. CLS is not predicted, and SIGReg of tokens does not see it:
    CLS alone could carry the spread. The predictor and mean_token do see it.

    places: (context (B, Nc), targets (B, K, Nt), P), patch indices below P; or None if all images,
    on all ranks, have one mask, so that an index is a place. regularizer: (N, D) -> scalar, such as
    a SIGReg. Gradients flow through everything. Returns loss, prediction loss, SIGReg. ValueError
    for another `error` or `on`.
    """
    if on not in ("context", "pooled", "tokens"):
        raise ValueError(f"sigreg.py: on must be context, pooled or tokens, got {on!r}")
    context, target = z_context[:, 1:], z_target[:, :, 1:]
    at_context, at_targets, num_patches = places or (None, None, None)
    c, t = centre(context, at_context, num_patches), centre(target, at_targets, num_patches)
    if on == "tokens":
        samples = [c.flatten(0, 1), t.flatten(0, 2)]
    else:
        samples = [mean_token(z_context) if on == "context" else mean_token(z_context, z_target)]
    context, target = (c, t) if error == "relative" else (context, target)
    reg = sum(regularizer(z) for z in samples) / len(samples)
    pred = prediction_loss(z_pred, target, error)
    if z_back is not None:
        context = context[:, None].expand_as(z_back)
        pred = (pred + prediction_loss(z_back, context, error)) / 2
    return pred + lam * reg, pred, reg


def multi_view_loss(z, num_global, lam, regularizer):
    """The loss of source B, over V views of each image, all of them drawn to the global ones.

        c = mean of the global z
        L = (1 - lam) * mean_v mean (z_v - c)^2 + lam * mean_v SIGReg(z_v)

    z (V, B, D), global views first; the squared error is a mean over images and dimensions.
    regularizer: (N, D) -> scalar, of each view apart, as views of one image are not independent.
    Gradients flow through c as well. Returns loss, prediction loss, regularizer. ValueError for
    another shape of z, and for a num_global that is not in 1 .. V.
    """
    z = _check_views(z, num_global)
    pred = prediction_loss(z, z[:num_global].mean(0).expand_as(z))
    reg = sum(regularizer(view) for view in z) / len(z)
    return (1 - lam) * pred + lam * reg, pred, reg


class SIGReg:
    """One step's regularizer by name: SIGReg("sketched", seed=step)(z), z (N, D) -> scalar.

    name: spectral, legendre, sketched, or none, which is 0. The sketched one has num_slices random
    directions, the same for all samples of its step and on all ranks; the others ignore both.
    ValueError for another name.
    """

    def __init__(self, name, num_slices=1024, seed=0):
        if name not in ("spectral", "legendre", "sketched", "none"):
            raise ValueError(f"sigreg.py: no {name!r}: spectral, legendre, sketched or none")
        self.name, self.num_slices, self.seed, self.directions = name, num_slices, seed, None

    def __call__(self, z):
        if self.name == "none":
            return z.new_zeros(())
        if self.name != "sketched":
            return {"spectral": spectral_sigreg, "legendre": legendre_sigreg}[self.name](z)
        if self.directions is None:
            self.directions = random_directions(z.shape[1], self.num_slices, self.seed, z.device)
        return sketched_sigreg(z, self.directions)


# ------------------------------------------------------------------------- the same over all ranks
# Under torch.distributed, tensors are this rank's share of the batch (shares may differ in size).
# The value is that of the whole batch, and once DDP has averaged the parameter gradients they are
# those of one process that holds it. Ranks exchange sums over images, never embeddings.
class _SumOverRanks(torch.autograd.Function):
    """All-reduce (sum) whose backward is the same all-reduce.

    Every rank back-propagates the same loss L(S) of the sum S: the backward sum is world * dL/dS,
    and DDP's division by world leaves the gradient of the whole batch. dist.all_reduce alone is
    invisible to autograd: the gradient would be divided by world.
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


def sum_over_ranks(*tensors):
    """Global sums of the tensors, in one collective; with one process the tensors themselves."""
    if _world() == 1:
        return tensors
    flat = _SumOverRanks.apply(torch.cat([t.reshape(-1) for t in tensors]))
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


class _MatMul(torch.autograd.Function):
    """a @ b in the type of a and b, forward and backward, whatever autocast would make of them."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        left, right = ctx.needs_input_grad
        return matmul(grad, b.T) if left else None, matmul(a.T, grad) if right else None


def matmul(a, b):
    """a @ b in their own type, also inside autocast, which would round all but float64."""
    return a @ b if a.dtype == torch.float64 else _MatMul.apply(a, b)


def wide(z):
    """z in at least float32: losses are sums over many numbers, whatever the encoder's type."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _check(z):
    if z.ndim != 2 or not z.is_floating_point() or len(z) == 0 and _world() == 1:
        got = f"{z.dtype} {tuple(z.shape)}"
        raise ValueError(f"sigreg.py: z must be a float tensor (N, D) with N above 0, got {got}")


def _check_views(z, num_global):
    if z.ndim != 3 or not 1 <= num_global <= len(z):
        got = f"got {tuple(z.shape)} and {num_global}"
        raise ValueError(f"sigreg.py: z must be (V, B, D), num_global from 1 to V; {got}")
    return wide(z)


def centre(z, places=None, num_places=None):
    """Each token less the mean of the tokens at its place, over the images of the global batch.

    What is left differs between images, so encoding the position lowers neither loss. z (B, ...,
    D); places: of z's shape without D, int64 below num_places, or None if an index is one place in
    all images, as with one mask for the batch. Returns z's shape, in at least float32.
    """
    z = wide(z)
    if places is None:
        count, total = sum_over_ranks(z.new_full((), len(z)), z.sum(0))
        return z - total / count
    z_flat, rows = z.flatten(0, -2), places.flatten()[:, None]
    at = z.new_zeros(len(rows), num_places).scatter(1, rows, 1.0)  # (tokens, places): a 1 in each
    count, total = sum_over_ranks(at.sum(0), matmul(at.T, z_flat))
    return z - matmul(at, total / count.clamp_min(1)[:, None]).view_as(z)


def mean_token(*tokens):
    """Mean of all tokens of each image: (B, 1 + Nc, D), (B, K, 1 + Nt, D), ... -> (B, D)."""
    return wide(torch.cat([z.flatten(1, -2) for z in tokens], dim=1)).mean(1)


def prediction_loss(z_pred, z_target, error="mse"):
    """The error of a prediction over the global batch, gradients to both sides.

        mse         mean (z_pred - z_target)^2, over all elements
        norm        mean |z_pred - z_target|^2, over all tokens: D times mse
        relative    sum |z_pred - z_target|^2 / sum |z_target|^2
        smooth_l1   mean of e^2 / 2 where |e| = |z_pred - z_target| < 1, else of |e| - 1/2

    For centred targets the relative loss is the share of their variance left unexplained: 1 for
    predicting their mean. z_pred, z_target (..., D) of one shape -> scalar >= 0; ValueError for two
    shapes, or for another error.
    """
    if z_pred.shape != z_target.shape:
        shapes = f"{tuple(z_pred.shape)} and {tuple(z_target.shape)}"
        raise ValueError(f"sigreg.py: z_pred and z_target differ in shape: {shapes}")
    if error not in ("mse", "norm", "relative", "smooth_l1"):
        raise ValueError(f"sigreg.py: no error {error!r}: mse, norm, relative or smooth_l1")
    z_pred, z_target = wide(z_pred), wide(z_target)
    distance = F.smooth_l1_loss if error == "smooth_l1" else F.mse_loss
    total, scale = distance(z_pred, z_target, reduction="sum"), z_target.square().sum()
    total, scale, n = sum_over_ranks(total, scale, z_target.new_full((), z_target.numel()))
    if error == "relative":  # targets that are all equal have nothing to predict: no 0 / 0
        return total / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return total / n * (z_target.shape[-1] if error == "norm" else 1)


def _moments(z, dtype=torch.float32):
    """Row count, mean (D,) and centred Gram matrix (D, D) over all ranks, in float64: in two
    exchanges, as centring before the product keeps all digits when the mean is large."""
    _check(z)
    z = z.to(torch.promote_types(z.dtype, dtype))
    n, total = sum_over_ranks(z.new_full((), len(z)), z.sum(0))
    mean = total / n
    (gram,) = sum_over_ranks(sum(matmul(x.T, x).double() for x in (z - mean).split(2**12)))
    return n.double(), mean.double(), gram


def spectral_sigreg(z):
    """log D - H(s), as in spectral_sigreg_plain, over all ranks, float64, finite for finite z.

    z (N, D) of any float dtype -> scalar in [0, log D], log D for identical rows too, not below
    log(D / (N - 1)). Scale-free, value(c z) = value(z): it shapes the spectrum and cannot keep the
    embedding from shrinking. sigma = sqrt(eig(Gram)), as a Gram matrix is a sum over ranks.
    """
    n, mean, gram = _moments(z, torch.float64)
    eps, tiny = torch.finfo(gram.dtype).eps, torch.finfo(gram.dtype).tiny
    finite = gram.isfinite().all()  # eigvalsh raises on others; this way they come out as nan
    eig = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0))
    # What rounding leaves counts as zero, and has no gradient: eigvalsh is off by D eps of its
    # largest value, centring by some eps of |z| in a constant column (16: with a margin).
    squares = gram.diagonal().sum() + n * mean.square().sum()
    rounding = (len(gram) * eps * eig[-1]).clamp_min((16 * eps) ** 2 * squares)
    keep = eig > rounding.detach().clamp_min(tiny)
    sigma = torch.where(keep, torch.where(keep, eig, 1.0).sqrt(), 0.0)
    s = sigma / sigma.sum().clamp_min(tiny)
    entropy = -(s * torch.where(keep, s, 1.0).log()).sum()
    return torch.where(finite, math.log(len(gram)) - entropy, torch.nan)


def effective_rank(z):
    """exp(H(s)) = D exp(-spectral_sigreg(z)) (Roy & Vetterli 2007). z (N, D) -> in [1, D]."""
    return z.shape[1] * torch.exp(-spectral_sigreg(z))


def embedding_std(z):
    """Root mean variance of the columns, sqrt(tr cov / D). z (N, D) -> scalar >= 0."""
    n, _, gram = _moments(z)
    variance = gram.diagonal().mean() / n
    return variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()  # the root of 0 has no slope


def legendre_sigreg(z):
    """(tr C + |mean|^2 - log det C - D) / (2 D), as in legendre_sigreg_plain, over all ranks.

    z (N, D) of any float dtype -> scalar >= 0, float64; products are in at least float32. Shrinking
    costs -log. The ridge is relative too, as rounding in float32 is.
    """
    n, mean, gram = _moments(z)
    cov = gram / n
    cov = cov + RIDGE * torch.diag(1 + cov.diagonal())
    factor, failed = torch.linalg.cholesky_ex(cov)  # no wait for the GPU; nan is left to the caller
    log_det = torch.where(failed == 0, 2 * factor.diagonal().log().sum(), torch.nan)
    trace = cov.diagonal().sum()  # not .trace(): its gradient waits for the GPU
    return (trace + mean.square().sum() - log_det - len(cov)) / (2 * len(cov))


# --------------------------------------------------------------------- the sketched one, made fast
def random_directions(dim, num_slices, seed, device=None):
    """(D, M) float32 unit columns, uniform on the sphere, by the seed alone: same on all ranks."""
    directions = torch.randn(dim, num_slices, generator=torch.Generator().manual_seed(int(seed)))
    directions = directions / directions.norm(dim=0)
    if torch.device(device or "cpu").type == "cuda":  # from pinned memory: does not wait
        return directions.pin_memory().to(device, non_blocking=True)
    return directions.to(device)


class _Sketched(torch.autograd.Function):
    """sketched_sigreg_plain over all ranks, value and gradient in one call.

    The knots are t_k = k dt, so e^(i t_k p) = u^k with u = e^(i dt p): one sine and one cosine for
    a projection, then a complex product for each knot. With the gaps of the global batch,
    g_k = mean u^k - phi(t_k),

        value     = N sum_k w_k |g_k|^2                                      mean over the M slices
        d / d p_n = Re sum_k c_k u_n^k,  c_k = 2 w_k t_k (Im g_k + i Re g_k)        by Horner's rule

    Rows go in blocks that fit the cache of a CPU, or fill a GPU. u (N, M) is kept for the gradient.
    """

    @staticmethod
    def forward(ctx, z, directions, knots, t_max):
        t, phi, w = (x[1:] for x in quadrature(knots, t_max, like=z))
        slices = directions.shape[1]
        block = max((2**16 if z.device.type == "cpu" else 2**24) // slices, 1)
        units = []
        sums = torch.complex(*torch.zeros(2, knots - 1, slices, dtype=z.dtype, device=z.device))
        for rows in z.split(block):
            angle = t_max / (knots - 1) * (rows @ directions)
            units.append(torch.complex(angle.cos(), angle.sin()))
            power = units[-1].clone()
            for total in sums:
                total += power.sum(0)
                power *= units[-1]
        sums, n = sum_over_ranks(torch.view_as_real(sums), z.new_full((), len(z)))
        gap = torch.view_as_complex(sums) / n - phi[:, None]
        if ctx.needs_input_grad[0]:
            c = (2 * w * t / slices)[:, None] * torch.complex(gap.imag, gap.real)
            ctx.grad = torch.empty_like(z)
            for u, rows in zip(units, ctx.grad.split(block), strict=True):
                horner = c[-1] * u
                for lower in c[:-1].flip(0):
                    horner += lower
                    horner *= u
                # every rank back-propagates the same loss, as in _SumOverRanks
                rows.copy_(_world() * (horner.real @ directions.T))
        return n * (w @ (gap.real.square() + gap.imag.square())).mean()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # it would be left out in silence
            raise RuntimeError("sigreg.py: no second derivative; take sketched_sigreg_plain")
        return grad * ctx.grad, None, None, None


def sketched_sigreg(z, directions, knots=17, t_max=3.0):
    """sketched_sigreg_plain over all ranks, without its (N, M, T) numbers: see _Sketched.

    z (N, D) of any float dtype, directions (D, M) with unit columns, knots >= 2 -> scalar in at
    least float32. Takes 8 N M bytes; no second derivative. ValueError for other shapes.
    """
    _check(z)
    if directions.ndim != 2 or len(directions) != z.shape[1] or knots < 2:
        got = f"got {tuple(directions.shape)} and {knots}"
        raise ValueError(f"sigreg.py: directions must be ({z.shape[1]}, M), knots >= 2; {got}")
    with torch.autocast(z.device.type, enabled=False):
        return _Sketched.apply(wide(z), directions.to(wide(z)), knots, t_max)
