"""Context and target masks for masked prediction, after I-JEPA's multi-block masks (Assran et al. 2023).

    python masks.py             # writes masks.png: what the settings do, image by image

Both functions return patch indices in raster order (row * width + column), int64, rectangular within the batch:

    context (B, Nc)     the patches that the encoder sees
    targets (B, K, Nt)  K blocks of patches to predict; the context holds none of them

They are pure functions of their arguments and the generator's state, without a loop over images. Differences from
I-JEPA's collator: scale and aspect ratio are independent draws; contexts longer than the batch's common length lose
patches at random, not from the bottom of the image; small grids return at once. This file needs torch alone.
"""
import math

import torch


def _check(batch_size, grid, num_targets, **scales):
    """(height, width) of the grid once the arguments are found legal; else a one-line error that names the argument."""
    height, width = (grid, grid) if isinstance(grid, int) else grid
    if batch_size < 1:
        raise ValueError(f"masks.py: batch_size must be at least 1, got {batch_size}")
    if min(height, width) < 1 or height * width < 2:
        raise ValueError(f"masks.py: grid must hold at least 2 patches, got {grid}")
    if num_targets < 1:
        raise ValueError(f"masks.py: num_targets must be at least 1, got {num_targets}")
    for name, (low, high) in scales.items():
        # a target as large as the image would leave no context
        top, meaning = {"target_scale": (1, "below 1"), "target_aspect": (math.inf, "finite")}.get(name, (None, "at most 1"))
        if not 0 < low <= high or (high >= top if top else high > 1):
            raise ValueError(f"masks.py: {name} must be (low, high) with 0 < low <= high {meaning}, got {(low, high)}")
    return height, width


def _uniform(low_high, generator, log=False):
    """One draw from [low, high], uniform or log-uniform, as a Python float."""
    u = torch.rand((), generator=generator, device=generator.device if generator else None).item()
    low, high = low_high
    return math.exp(math.log(low) + u * math.log(high / low)) if log else low + u * (high - low)


def _block_size(height, width, scale, aspect):
    """(h, w) of the block of that share of the grid and that ratio h / w, rounded, kept inside the grid."""
    area = scale * height * width
    h = min(max(round(math.sqrt(area * aspect)), 1), height)
    w = min(max(round(area / h), 1), width)
    return h, w


def _place(shape, block, height, width, generator):
    """Uniform positions for blocks: their rows and columns as masks, (*shape, height) and (*shape, width) bool."""
    device = generator.device if generator else None
    inside = []
    for size, length in zip(block, (height, width)):
        start = torch.randint(length - size + 1, (*shape, 1), generator=generator, device=device)
        at = torch.arange(length, device=device)
        inside.append((at >= start) & (at < start + size))
    return inside


def _cover(rows, cols):
    """Union over the K blocks of each image: (B, K, H), (B, K, W) bool -> (B, H * W) bool."""
    return (torch.einsum("bkh,bkw->bhw", rows.float(), cols.float()) > 0).flatten(1)


def _pick(score, count):
    """Raster-ordered indices of the count smallest scores in each row: (B, N) -> (B, count)."""
    return score.topk(count, largest=False).indices.sort().values


def multi_block_masks(batch_size, grid, num_targets=4, target_scale=(0.15, 0.2), target_aspect=(0.75, 1.5),
                      context_scale=(0.85, 1.0), generator=None, min_context=0.25):
    """K rectangular target blocks per image, and one large context block less its image's targets.

    grid: patches per side, or (height, width). Scales are shares of the grid's area, aspect is height / width
    (log-uniform). One target size and one context size (square in units of the grid) are drawn per call, positions
    per image; blocks of one image may overlap. Returns context (B, Nc) and targets (B, K, Nt), see the module.

    Nc is the smallest context of the batch; min_context, a share of the grid, keeps one unlucky image from starving
    all: an image below it draws its positions again, up to 8 times, and then repeats its first target K times and
    takes free patches outside its context block where it still must. Raises ValueError naming a bad argument.
    """
    height, width = _check(batch_size, grid, num_targets, target_scale=target_scale, target_aspect=target_aspect,
                           context_scale=context_scale, min_context=(min_context, min_context))
    block = _block_size(height, width, _uniform(target_scale, generator), _uniform(target_aspect, generator, log=True))
    if block == (height, width):  # rounding on a small grid: leave at least one line of patches to the context
        block = (height - 1, width) if height > 1 else (height, width - 1)
    frame = _block_size(height, width, _uniform(context_scale, generator), height / width)
    num_patches = height * width
    wanted = min(max(round(min_context * num_patches), 1), num_patches - block[0] * block[1])

    rows, cols = _place((batch_size, num_targets), block, height, width, generator)
    frame_rows, frame_cols = _place((batch_size, 1), frame, height, width, generator)
    for _ in range(8):
        free = ~_cover(rows, cols)
        allowed = _cover(frame_rows, frame_cols) & free
        short = (allowed.sum(1) < wanted).nonzero().squeeze(1)
        if len(short) == 0:
            break
        rows[short], cols[short] = _place((len(short), num_targets), block, height, width, generator)
        frame_rows[short], frame_cols[short] = _place((len(short), 1), frame, height, width, generator)
    else:
        short = (~_cover(rows, cols)).sum(1) < wanted
        rows[short], cols[short] = rows[short, :1], cols[short, :1]
        free = ~_cover(rows, cols)
        allowed = _cover(frame_rows, frame_cols) & free

    length = max(int(allowed.sum(1).min()), wanted)
    score = torch.rand(allowed.shape, generator=generator, device=allowed.device)
    context = _pick(score + ~allowed + 2.0 * ~free, length)  # in [0, 1) allowed, [1, 2) outside the frame, then targets
    inside = (rows[..., :, None] & cols[..., None, :]).flatten(2)
    targets = inside.nonzero()[:, 2].view(batch_size, num_targets, -1)
    return context, targets


def random_masks(batch_size, grid, num_targets=4, target_scale=(0.15, 0.2), context_scale=(0.85, 1.0), generator=None,
                 min_context=0.25):
    """The same pair without blocks: patches drawn independently of their neighbours.

    Each target set is a random share of the grid in target_scale, disjoint from its image's others as long as
    min_context of the grid stays free (else they overlap); the context is a share in context_scale of the rest.
    """
    height, width = _check(batch_size, grid, num_targets, target_scale=target_scale, context_scale=context_scale,
                           min_context=(min_context, min_context))
    num_patches = height * width
    pool = min(max(num_patches - max(round(min_context * num_patches), 1), 1), num_patches - 1)
    size = min(max(round(_uniform(target_scale, generator) * num_patches), 1), pool)
    device = generator.device if generator else None
    order = torch.rand(batch_size, num_patches, generator=generator, device=device).argsort(1)
    at = torch.arange(num_targets * size, device=device) % pool
    targets = order[:, at].view(batch_size, num_targets, size).sort().values
    rest = order[:, min(pool, num_targets * size):]
    length = max(round(_uniform(context_scale, generator) * rest.shape[1]), 1)
    return rest[:, :length].sort().values, targets


def main():
    """A sheet of synthetic images: as they are, then in grey, tinted by what each patch is under three settings."""
    from torchvision.utils import save_image

    from train import Shapes

    size, grid, count = 112, 14, 10
    images = torch.stack([torch.from_numpy(Shapes(size)[i][0]) for i in range(count)]).permute(0, 3, 1, 2) / 255
    #                      context          targets
    tints = torch.tensor([[0.2, 0.9, 0.3], [1, 0.3, 0.2], [1, 0.7, 0.1], [0.9, 0.4, 0.9], [0.4, 0.6, 1]])
    sheet = [images]
    for masks in (multi_block_masks, random_masks, lambda *a, **k: multi_block_masks(*a, num_targets=2, target_scale=(0.05, 0.1), **k)):
        context, targets = masks(count, grid, generator=torch.Generator().manual_seed(0))
        tint = torch.full((count, grid * grid, 3), 0.25)  # what neither branch sees stays dark
        for indices, colour in zip([context, *targets.unbind(1)], tints):
            tint[torch.arange(count)[:, None], indices] = colour
        tint = tint.view(count, grid, grid, 3).permute(0, 3, 1, 2)
        sheet.append((0.3 + 0.7 * images.mean(1, keepdim=True)) * torch.nn.functional.interpolate(tint, size=size))
        print(f"context {tuple(context.shape)}, targets {tuple(targets.shape)} of {grid * grid} patches")
    save_image(torch.cat(sheet), "masks.png", nrow=count)
    print("masks.png: rows are the images, multi_block_masks, random_masks, and 2 smaller blocks; context green, targets "
          "in other colours, dark is seen by neither")


if __name__ == "__main__":
    main()
