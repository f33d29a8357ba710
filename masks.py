"""Context and target masks of masked prediction: blocks as in I-JEPA, or patches at random.

    context, targets = multi_block_masks(batch_size=256, grid=14)       # Assran et al. 2023
    context, targets = random_masks(batch_size=256, grid=14)            # source A's other option

Masks are patch indices in raster order (row * grid + column), int64, of one length in a batch:

    context (B, Nc)     the patches that the encoder sees
    targets (B, K, Nt)  K sets of patches to predict; the context holds none of them

The defaults are I-JEPA's targets, with a least context of our own; train.py's recipe has others,
see `Masked` in model.py. Each image has its own mask: masked_loss wants them as `places`.

Unlike I-JEPA's collator: scale and aspect ratio are independent draws; long contexts lose patches
at random, not at the image's bottom; small grids return at once. This file needs torch alone.
"""

import math

import torch

TARGET_ASPECT = (0.75, 1.5)  # least and most height / width of a target block, as in I-JEPA
CONTEXT_SCALE = (0.85, 1.0)  # share of the grid of the context block, before targets are cut out


def _check(batch_size, grid, num_targets, target_scale, min_context):
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
            raise ValueError(f"masks.py: masks take {rule}")


def _uniform(low, high, generator):
    return low + torch.rand((), generator=generator).item() * (high - low)


def _block_size(grid, scale, aspect):
    """(h, w) of the block of that share of the grid and that ratio h / w, kept inside the grid.

    Both are whole patches: h is off by half of one at most, and h w by h / 2, unless the grid cuts
    them. So on a grid of 14, targets of 0.15 to 0.2 have 0.14 to 0.21, and ratios of 0.62 to 1.75.
    """
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

    grid: patches per side. Scales are shares of its area, aspects log-uniform; _block_size says
    what rounding to patches does to them. Each call draws one target size and one context size,
    square to a patch, for all images; each image draws its own places, where blocks may overlap.
    generator: of the CPU; None is torch's global one. Returns context (B, Nc) and targets
    (B, K, Nt). ValueError names what is out of range.

    Nc is the size of the smallest context in the batch, but at least min_context, a share of the
    grid. An image whose context is smaller draws its places again, up to 8 times. After that its
    context may leave its block; and if its targets leave too few patches, all K become copies of
    the first.
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


def random_masks(
    batch_size, grid, num_targets=4, target_scale=(0.15, 0.2), min_context=0.25, generator=None
):
    """The same without blocks: each patch is drawn without regard to its neighbours.

    A target is a share of the grid from target_scale, and the context one from CONTEXT_SCALE of
    what the targets leave, at least min_context of the grid. Targets of an image share no patch,
    unless together they are more than 1 - min_context of it. Arguments, returns and errors as in
    multi_block_masks.
    """
    _check(batch_size, grid, num_targets, target_scale, min_context)
    wanted = min(max(round(min_context * grid**2), 1), grid**2 - 1)
    size = max(round(_uniform(*target_scale, generator) * grid**2), 1)
    size = min(size, grid**2 - wanted)
    order = torch.rand(batch_size, grid**2, generator=generator).argsort(1)
    asked, rest = order[:, wanted:], order[:, :wanted]
    at = torch.arange(num_targets * size) % asked.shape[1]
    rest = torch.cat([rest, asked[:, num_targets * size :]], dim=1)
    length = max(round(_uniform(*CONTEXT_SCALE, generator) * rest.shape[1]), wanted)
    targets = asked[:, at].unflatten(1, (num_targets, size))
    return rest[:, :length].sort().values, targets.sort().values
