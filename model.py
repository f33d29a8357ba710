"""The encoder, the two predictors and the projector of LeJEPA.

    python model.py             # prints every model's parameters and GFLOPs per image

    encoder = vit("vit_b16", image_size=224)
    encoder(images)                # (B, 1 + P, D): CLS, then the P patches in raster order
    encoder(images, context)       # (B, 1 + Nc, D): these patches alone, context (B, Nc)
    encoder(images, targets)       # (B, K, 1 + Nt, D): each block on its own, targets (B, K, Nt)
    TransformerPredictor(768, 14 * 14)(tokens, context, targets)     # (B, K, Nt, D)

There is one encoder; train.py's --ema and --stop-grad are for comparison. Parameter names, shapes
and numerics are those of timm's ViT, so a state dict of ours loads there with strict=True
(timm.create_model("vit_base_patch16_224", num_classes=0)). This file needs torch alone.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

#         width depth heads
SIZES = {
    "n": (128, 4, 4),  # for laptops
    "t": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
}


class Block(nn.Module):
    """Pre-norm transformer block, (B, L, D) -> (B, L, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, heads, L, D / heads) each
        if x.is_cuda:
            heads = F.scaled_dot_product_attention(q, k, v)
        else:  # torch's own is slow on CPUs at these lengths, 1.9 to 2.8 times in bfloat16
            heads = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1) @ v
        x = x + self.attn["proj"](heads.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def init_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def gather_tokens(x, indices):
    """x (B, P, D), indices (B, ..., n) -> (B, ..., n, D): row b holds x[b, indices[b]]."""
    return x.take_along_dim(indices.flatten(1)[..., None], dim=1).unflatten(1, indices.shape[1:])


class VisionTransformer(nn.Module):
    """Pre-norm ViT, CLS token, learned position embeddings (Dosovitskiy et al. 2021), no head.

    images (B, 3, S, S) float, indices None, (B, n) or (B, K, n) int64 patch indices in raster order
    -> (B, 1 + P, D), (B, 1 + n, D) or (B, K, 1 + n, D) after the last LayerNorm, CLS first. With
    indices the other patches take no part: every (n,) set is a sequence of its own. Images of
    another size than the model's are taken too, their position embeddings resized (bicubic,
    antialiased). With layers = l the outputs of the last l blocks, each after the last LayerNorm,
    stand side by side: (..., l D), the last block's first.
    """

    def __init__(self, image_size=224, patch_size=16, dim=768, depth=12, heads=12):
        super().__init__()
        self.patch_size, self.grid, self.dim = patch_size, image_size // patch_size, dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.apply(init_weights)

    def forward(self, images, indices=None, layers=1):
        x = self.patch_embed["proj"](images)  # (B, D, side, side)
        position = self.pos_embed[:, 1:]
        if x.shape[2:] != (self.grid, self.grid):
            position = position.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            position = F.interpolate(position, x.shape[2:], mode="bicubic", antialias=True)
            position = position.flatten(2).transpose(1, 2)
        x = x.flatten(2).transpose(1, 2) + position  # (B, P, D)
        if indices is not None:
            x = gather_tokens(x, indices).flatten(0, -3)  # (B, n, D) or (B * K, n, D)
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        last = []
        for block in self.blocks:
            x = block(x)
            last = [x, *last][:layers]
        x = self.norm(x) if layers == 1 else torch.cat([self.norm(x) for x in last], dim=-1)
        return x if indices is None else x.unflatten(0, indices.shape[:-1])


def vit(name, image_size=224):
    """A VisionTransformer by name, vit_{n,t,s,b,l,h}{patch}.

    ValueError for another name, or for an image size that the patch size does not divide.
    """
    match = re.fullmatch(r"vit_([a-z])([1-9]\d*)", name)
    if not match or match[1] not in SIZES:
        names = f"vit_{{{','.join(SIZES)}}}{{patch}}, such as vit_b16 or vit_n8"
        raise ValueError(f"model.py: no model {name!r}; names are {names}")
    patch = int(match[2])
    if image_size < patch or image_size % patch:
        below = image_size // patch * patch
        near = f"{below} or {below + patch}" if below else f"{patch}"
        wrong = f"image size {image_size} is not a multiple of the patch size {patch} of {name}"
        raise ValueError(f"model.py: {wrong} (try {near})")
    return VisionTransformer(image_size, patch, *SIZES[match[1]])


class MLPPredictor(nn.Module):
    """Two layers on the pooled context and the position of the patch to predict.

        z_bki = W2 gelu(W1 [mean of b's tokens, CLS too ; position embedding of patch targets_bki])

    of width * D hidden units. tokens (B, 1 + Nc, D), context (B, Nc) (unused: a pool has no order),
    targets (B, K, Nt) -> (B, K, Nt, D).
    """

    def __init__(self, dim, num_patches, width=4):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, dim))
        self.fc1 = nn.Linear(2 * dim, width * dim)
        self.fc2 = nn.Linear(width * dim, dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def forward(self, tokens, context, targets):
        of_image, of_place = self.fc1.weight.tensor_split(2, dim=1)  # once an image, once a place
        place = F.linear(self.pos_embed, of_place).expand(len(targets), -1, -1)  # (B, P, width * D)
        image = F.linear(tokens.mean(1), of_image, self.fc1.bias)[:, None, None]
        return self.fc2(F.gelu(image + gather_tokens(place, targets)))


class TransformerPredictor(nn.Module):
    """A narrow transformer: mask tokens with positions attend to the context and to each other.

    tokens (B, 1 + Nc, D), context (B, Nc), targets (B, K, Nt) -> (B, K, Nt, D). The K blocks of an
    image share one sequence [CLS, context, mask tokens] of half the width; I-JEPA, whose predictor
    it follows, runs one sequence a block, which costs K contexts.
    """

    def __init__(self, dim, num_patches, depth=4):
        super().__init__()
        width = max(dim // 2, 64)
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, width))
        self.blocks = nn.ModuleList(Block(width, heads=max(width // 32, 1)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, dim)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def forward(self, tokens, context, targets):
        position = self.pos_embed.expand(len(targets), -1, -1)
        x = self.embed(tokens)
        context = x[:, 1:] + gather_tokens(position, context)
        asked = self.mask_token + gather_tokens(position, targets.flatten(1))
        x = torch.cat([x[:, :1], context, asked], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x[:, tokens.shape[1] :])).unflatten(1, targets.shape[1:])


def projector(dim, out_dim, hidden=2048):
    """MLP with batch norm for the loss only, as in source B: (N, dim) -> z (N, out_dim)."""
    sizes = (dim, hidden), (hidden, hidden)
    layers = [m for i, o in sizes for m in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(hidden, out_dim))


def main():
    """One row a model; GFLOPs of one forward pass of one image, a multiply-add counted as two."""
    from torch.utils.flop_counter import FlopCounterMode

    print("model     image  tokens  width  depth   parameters  GFLOPs/image")
    with torch.device("meta"):  # shapes without memory
        small = [("vit_n8", 32), ("vit_n4", 32), ("vit_n8", 64)]
        large = [(f"vit_{size}", 224) for size in ("t16", "s16", "b16", "l16", "h14")]
        for name, size in small + large:
            encoder = vit(name, size)
            with FlopCounterMode(display=False) as flops:
                tokens = encoder(torch.empty(1, 3, size, size)).shape[1]
            depth, count = len(encoder.blocks), sum(p.numel() for p in encoder.parameters())
            gflops = flops.get_total_flops() / 1e9
            print(f"{name:8}{size:7}{tokens:8}{encoder.dim:7}{depth:7}{count:13,}{gflops:14.2f}")
        for predictor in (MLPPredictor, TransformerPredictor):
            count = sum(p.numel() for p in predictor(768, 14 * 14).parameters())
            print(f"{predictor.__name__}(768, 196): {count:,} parameters")


if __name__ == "__main__":
    main()
