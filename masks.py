"""Context and target masks of masked prediction, I-JEPA style (Assran et al. 2023).

    context, targets = multi_block_masks(batch_size=256, grid=14)

Masks are patch indices in raster order (row * width + column), int64, rectangular within the batch:

    context (B, Nc)     the patches that the encoder sees
    targets (B, K, Nt)  K blocks of patches to predict; the context holds none of them

Each image has a mask of its own: masked_loss then wants them as `masks`. For one mask in the whole
batch, the recipe on photographs, take batch_size 1 and .expand it.

Unlike I-JEPA's collator: scale and aspect ratio are independent draws; long contexts lose patches
at random, not at the image's bottom; small grids return at once. This file needs torch alone.
"""

import math

import torch

TARGET_ASPECT = (0.75, 1.5)  # least and most height / width of a target block, as in I-JEPA
CONTEXT_SCALE = (0.85, 1.0)  # share of the grid that the context block takes, less the targets


def _check(batch_size, grid, num_targets, min_context, target):
    """(height, width) of the grid if the arguments are legal; else an error that names one."""
    height, width = grid if isinstance(grid, tuple | list) else (grid, grid)
    if min(height, width) < 1 or height * width < 2:
        raise ValueError(f"masks.py: grid must hold at least 2 patches, got {grid}")
    for name, count in (("batch_size", batch_size), ("num_targets", num_targets)):
        if count < 1:
            raise ValueError(f"masks.py: {name} must be at least 1, got {count}")
    low, high = target
    if not 0 < low <= high < 1:  # one as large as the image would leave no context
        wanted = f"above 0, ascending and below 1, got {low} to {high}"
        raise ValueError(f"masks.py: target_scale must be {wanted}")
    if not 0 < min_context <= 1:
        raise ValueError(f"masks.py: min_context must be above 0, at most 1, got {min_context}")
    return height, width


def _uniform(bounds, generator, log=False):
    """One draw from [low, high], uniform or log-uniform, as a Python float."""
    low, high = bounds
    u = torch.rand((), generator=generator, device=generator.device if generator else None).item()
    return math.exp(math.log(low) + u * math.log(high / low)) if log else low + u * (high - low)


def _block_size(height, width, scale, aspect):
    """(h, w) of the block of that share of the grid and that ratio h / w, kept inside the grid."""
    h = min(max(round(math.sqrt(scale * height * width * aspect)), 1), height)
    w = min(max(round(scale * height * width / h), 1), width)
    return h, w


def _place(shape, block, height, width, generator):
    """Uniform places for blocks as masks of rows and columns, (*shape, height), (*shape, width)."""
    device = generator.device if generator else None
    inside = []
    for size, length in ((block[0], height), (block[1], width)):
        start = torch.randint(length - size + 1, (*shape, 1), generator=generator, device=device)
        at = torch.arange(length, device=device)
        inside.append((at >= start) & (at < start + size))
    return inside


def _cover(rows, cols):
    """Union over the K blocks of each image: (B, K, H), (B, K, W) bool -> (B, H * W) bool."""
    return (torch.einsum("bkh,bkw->bhw", rows.float(), cols.float()) > 0).flatten(1)


def multi_block_masks(
    batch_size, grid, num_targets=4, target_scale=(0.15, 0.2), min_context=0.25, generator=None
):
    """K rectangular target blocks per image, and one large context block less its image's targets.

    grid: patches per side, or (height, width). Scales are shares of its area, aspects log-uniform.
    One size of targets and one of the context (square in units of the grid) are drawn per call,
    places per image; blocks may overlap. Returns context (B, Nc) and targets (B, K, Nt).

    Nc is the smallest context of the batch. An image below min_context, a share of the grid, draws
    its places again, up to 8 times, then repeats its first target K times and takes free patches
    outside its context block where it still must.
    """
    height, width = _check(batch_size, grid, num_targets, min_context, target_scale)
    share, aspect = _uniform(target_scale, generator), _uniform(TARGET_ASPECT, generator, log=True)
    block = _block_size(height, width, share, aspect)
    if block == (height, width):  # rounding on a small grid: leave a line of patches to the context
        block = (height - 1, width) if height > 1 else (height, width - 1)
    frame = _block_size(height, width, _uniform(CONTEXT_SCALE, generator), height / width)
    wanted = min(max(round(min_context * height * width), 1), height * width - math.prod(block))

    def place(count):
        targets = _place((count, num_targets), block, height, width, generator)
        return *targets, *_place((count, 1), frame, height, width, generator)

    rows, cols, frame_rows, frame_cols = place(batch_size)
    for attempt in range(10):  # 0 to 7: new places; 8: the first target alone; 9: looks again
        free = ~_cover(rows, cols)
        allowed = _cover(frame_rows, frame_cols) & free
        short = (allowed.sum(1) < wanted).nonzero().squeeze(1)
        if len(short) == 0:
            break
        if attempt < 8:
            rows[short], cols[short], frame_rows[short], frame_cols[short] = place(len(short))
        else:
            starved = free.sum(1) < wanted
            rows[starved], cols[starved] = rows[starved, :1], cols[starved, :1]
    length = max(int(allowed.sum(1).min()), wanted)
    score = torch.rand(allowed.shape, generator=generator, device=allowed.device)
    # lowest first: allowed patches in random order, then free ones outside the frame, then targets
    score = torch.where(allowed, score, torch.where(free, 1 + score, 2 + score))
    chosen = score.topk(length, largest=False, sorted=False).indices
    context = torch.zeros_like(free).scatter(1, chosen, True).nonzero()[:, 1].view(-1, length)
    row, col = (x.nonzero()[:, 2].view(batch_size, num_targets, -1) for x in (rows, cols))
    return context, (width * row[..., None] + col[:, :, None]).flatten(2)
