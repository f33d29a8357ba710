"""Context and target masks of masked prediction, I-JEPA style (Assran et al. 2023).

    context, targets = multi_block_masks(batch_size=256, grid=14)

Masks are patch indices in raster order (row * grid + column), int64, of one length in a batch:

    context (B, Nc)     the patches that the encoder sees
    targets (B, K, Nt)  K blocks of patches to predict; the context holds none of them

The defaults are source A's. Each image has a mask of its own: masked_loss then wants them as
`masks`. For one mask in the whole batch, the recipe on photographs, see `Masked` in model.py.

Unlike I-JEPA's collator: scale and aspect ratio are independent draws; long contexts lose patches
at random, not at the image's bottom; small grids return at once. This file needs torch alone.
"""

import math

import torch

TARGET_ASPECT = (0.75, 1.5)  # least and most height / width of a target block, as in I-JEPA
CONTEXT_SCALE = (0.85, 1.0)  # share of the grid of the context block, before targets are cut out


def _check(batch_size, grid, num_targets, target_scale, min_context):
    """ValueError that names the first argument out of range."""
    low, high = target_scale
    rules = {
        "batch_size at least 1": batch_size >= 1,
        "grid at least 2": grid >= 2,
        "num_targets at least 1": num_targets >= 1,
        # a target as large as the image would leave no context
        "target_scale above 0, ascending and below 1": 0 < low <= high < 1,
        "min_context above 0, at most 1": 0 < min_context <= 1,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"masks.py: multi_block_masks takes {rule}")


def _uniform(low, high, generator):
    """One draw from [low, high], as a Python float."""
    return low + torch.rand((), generator=generator).item() * (high - low)


def _block_size(grid, scale, aspect):
    """(h, w) of the block of that share of the grid and that ratio h / w, kept inside the grid."""
    h = min(max(round(math.sqrt(scale * grid * grid * aspect)), 1), grid)
    return h, min(max(round(scale * grid * grid / h), 1), grid)


def _place(shape, block, grid, generator):
    """Blocks at uniform places: masks of their rows and of their columns, (*shape, grid) each."""
    inside, at = [], torch.arange(grid)
    for size in block:
        start = torch.randint(grid - size + 1, (*shape, 1), generator=generator)
        inside.append((at >= start) & (at < start + size))
    return inside


def _cover(rows, cols):
    """Union over the K blocks of each image: two masks (B, K, grid) -> (B, grid * grid)."""
    return (torch.einsum("bkh,bkw->bhw", rows.float(), cols.float()) > 0).flatten(1)


def _free(rows, cols, frame_rows, frame_cols):
    """The patches outside the targets, and those of them in the context block: (B, grid * grid)."""
    free = ~_cover(rows, cols)
    return free, free & _cover(frame_rows, frame_cols)


def multi_block_masks(
    batch_size, grid, num_targets=4, target_scale=(0.15, 0.2), min_context=0.25, generator=None
):
    """K rectangular target blocks per image, and one large context block less its image's targets.

    grid: patches per side. Scales are shares of its area, aspects log-uniform. One size of targets
    and one of the context, a square, are drawn per call, places per image; blocks may overlap.
    generator: of the CPU; None is torch's global one. Returns context (B, Nc) and targets
    (B, K, Nt). ValueError names what is out of range.

    Nc is the size of the smallest context in the batch, but at least min_context, a share of the
    grid. An image with less draws new places, up to 8 times. After that its context may leave its
    block; and if its targets leave too few patches, all K become copies of the first.
    """
    _check(batch_size, grid, num_targets, target_scale, min_context)
    share = _uniform(*target_scale, generator)
    aspect = math.exp(_uniform(*map(math.log, TARGET_ASPECT), generator))
    block = _block_size(grid, share, aspect)
    if block == (grid, grid):  # rounding on a small grid: leave a row of patches to the context
        block = grid - 1, grid
    frame = _block_size(grid, _uniform(*CONTEXT_SCALE, generator), 1)
    wanted = min(max(round(min_context * grid**2), 1), grid**2 - math.prod(block))

    def place(count):
        targets = _place((count, num_targets), block, grid, generator)
        return targets + _place((count, 1), frame, grid, generator)

    blocks = place(batch_size)
    for _ in range(8):
        short = (_free(*blocks)[1].sum(1) < wanted).nonzero().squeeze(1)
        if len(short) == 0:
            break
        for old, new in zip(blocks, place(len(short)), strict=True):
            old[short] = new
    rows, cols = blocks[:2]
    starved = _free(*blocks)[0].sum(1) < wanted
    rows[starved], cols[starved] = rows[starved, :1], cols[starved, :1]
    free, allowed = _free(*blocks)
    length = max(int(allowed.sum(1).min()), wanted)
    score = torch.rand(allowed.shape, generator=generator)
    # lowest first: allowed patches in random order, then free ones outside the frame, then targets
    score = torch.where(allowed, score, torch.where(free, 1 + score, 2 + score))
    chosen = score.topk(length, largest=False, sorted=False).indices
    context = torch.zeros_like(free).scatter(1, chosen, True).nonzero()[:, 1].view(-1, length)
    row, col = (x.nonzero()[:, 2].view(batch_size, num_targets, -1) for x in (rows, cols))
    return context, (grid * row[..., None] + col[:, :, None]).flatten(2)
