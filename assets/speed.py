"""Times the regularizers of sigreg.py against their plain forms, interleaved in one run.

python assets/speed.py        # on the CPU, and on a GPU if there is one; 20 s on two cores
"""

import itertools
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import sigreg


def benchmark(device, rounds=5):
    """Times each regularizer, its plain form and the product (N, D) x (D, M), with gradients."""
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, M = 1024")
    print("regularizer    N    D        ms  plain / it  it / product")
    pairs = [
        (sigreg.spectral_sigreg, sigreg.spectral_sigreg_plain),
        (sigreg.legendre_sigreg, sigreg.legendre_sigreg_plain),
        (sigreg.sketched_sigreg, sigreg.sketched_sigreg_plain),
    ]
    for forms, (n, dim) in itertools.product(pairs, [(256, 128), (2048, 128), (2048, 768)]):
        z = torch.randn(n, dim, device=device, requires_grad=True)
        a = sigreg.random_directions(dim, 1024, seed=0, device=z.device)
        more = (a,) if forms[0] is sigreg.sketched_sigreg else ()
        ms = torch.empty(rounds + 1, 3)  # interleaved; the first round warms up
        for turn, i in itertools.product(range(rounds + 1), range(3)):
            start = time.perf_counter()
            value = forms[i](z, *more) if i < 2 else (z @ a).square().mean()
            torch.autograd.grad(value, z)[0].sum().item()  # waits for the GPU
            ms[turn, i] = 1e3 * (time.perf_counter() - start)
        it, plain, product = ms[1:].median(0).values.tolist()
        row = f"{it:10.1f}{plain / it:12.1f}{it / product:14.1f}"
        print(f"{forms[0].__name__[:8]:11}{n:5}{dim:5}{row}")


if __name__ == "__main__":
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        benchmark(device)
