"""The encoder, the predictors and the projector of LeJEPA, and its two methods, a module each.

    encoder = vit("vit_b16", image_size=224)
    encoder(images)                # (B, 1 + P, D): CLS, then the P patches in raster order
    encoder(images, context)       # (B, 1 + Nc, D): these patches alone, context (B, Nc)
    encoder(images, targets)       # (B, K, 1 + Nt, D): each block on its own, targets (B, K, Nt)

    Masked(encoder, MLPPredictor(768, 14 * 14), both_directions=True)     # A, changed: see there
    MultiView(encoder, projector(768, 64), num_global=2)(views)           # source B's

The parameter names, shapes and numerics of the encoder are those of timm's ViT, so a state dict of
ours loads there with strict=True (timm.create_model("vit_base_patch16_224", num_classes=0)).
This file needs torch alone; build_encoder takes backbones that are no ViTs from torchvision.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

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
            values = F.scaled_dot_product_attention(q, k, v)
        else:  # torch's own is slow on CPUs at these lengths, 1.9 to 2.8 times in bfloat16
            values = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1) @ v
        x = x + self.attn["proj"](values.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def init_weights(module):
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def gather_tokens(x, indices):
    """x (B, P, D), indices (B, ..., n) -> (B, ..., n, D): row b holds x[b, indices[b]].

    ValueError for indices of another number of images: one mask for all wants .expand.
    """
    if indices.shape[0] != x.shape[0]:
        raise ValueError(f"model.py: masks of {indices.shape[0]} images for {x.shape[0]} images")
    rows = indices.flatten(1)[..., None].expand(-1, -1, x.shape[2])
    return x.gather(1, rows).unflatten(1, indices.shape[1:])


class VisionTransformer(nn.Module):
    """Pre-norm ViT, CLS token, learned position embeddings (Dosovitskiy et al. 2021), no head.

    images (B, 3, S, S) float, indices None, (B, n) or (B, K, n) int64 patch indices in raster order
    -> (B, 1 + P, D), (B, 1 + n, D) or (B, K, 1 + n, D) after the last LayerNorm, CLS first. With
    indices the other patches take no part: every (n,) set is a sequence of its own. Images of
    another size get resized position embeddings (bicubic, antialiased). ValueError where the patch
    size does not divide them, and for indices into images of another size. layers: the outputs of
    so many last blocks, each after the last LayerNorm, side by side (..., layers * D), the last
    block's first.
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
        if images.shape[2] % self.patch_size or images.shape[3] % self.patch_size:
            wrong = f"images of {tuple(images.shape[2:])} px are not whole patches"
            raise ValueError(f"model.py: {wrong} of {self.patch_size} x {self.patch_size}")
        x = self.patch_embed["proj"](images)  # (B, D, side, side)
        position = self.pos_embed[:, 1:]
        if x.shape[2:] != (self.grid, self.grid):
            if indices is not None:  # they would pick patches of another raster
                side = self.grid * self.patch_size
                raise ValueError(f"model.py: with indices images must be {side} x {side} px")
            position = position.to(torch.promote_types(position.dtype, torch.float32))
            position = position.transpose(1, 2).unflatten(2, (self.grid, self.grid))
            position = F.interpolate(position, x.shape[2:], mode="bicubic", antialias=True)
            position = position.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        x = x.flatten(2).transpose(1, 2) + position  # (B, P, D)
        if indices is not None:
            x = gather_tokens(x, indices).flatten(0, -3)  # (B, n, D) or (B * K, n, D)
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(x.shape[0], -1, -1), x], dim=1)
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
        wrong = f"image size {image_size} is not a multiple of {patch}, the patch size of {name}"
        raise ValueError(f"model.py: {wrong}")
    return VisionTransformer(image_size, patch, *SIZES[match[1]])


class MLPPredictor(nn.Module):
    """Two layers on the pooled context and the position of the patch to predict.

        z_bki = W2 gelu(W1 [mean of all tokens of b ; position embedding of patch targets_bki])

    The mean includes CLS; there are width * D hidden units. tokens (B, 1 + Nc, D), context (B, Nc)
    (unused: a mean has no order), targets (B, K, Nt) -> (B, K, Nt, D).
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
        place = F.linear(self.pos_embed, of_place).expand(targets.shape[0], -1, -1)
        image = F.linear(tokens.mean(1), of_image, self.fc1.bias)[:, None, None]
        return self.fc2(F.gelu(image + gather_tokens(place, targets)))


class TransformerPredictor(nn.Module):
    """A narrow transformer: mask tokens with positions attend to the context and to each other.

    tokens (B, 1 + Nc, D), context (B, Nc), targets (B, K, Nt) -> (B, K, Nt, D). The K blocks of an
    image share one sequence, of width max(D / 2, 64); I-JEPA runs one for each block.
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
        position = self.pos_embed.expand(targets.shape[0], -1, -1)
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
    hidden_ones = [m for i, o in sizes for m in (nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU())]
    return nn.Sequential(*hidden_ones, nn.Linear(hidden, out_dim))


def image_head(dim, out_dim=64, hidden=512):
    """MLP for the loss of whole images in `Masked` only: (..., dim) -> (..., out_dim)."""
    first, last = nn.Linear(dim, hidden), nn.Linear(hidden, out_dim)
    return nn.Sequential(first, nn.LayerNorm(hidden), nn.ReLU(), last)


# torchvision's families whose classifiers take any image from some 32 px on, (B, classes) out
BACKBONES = "convnext|densenet|efficientnet|mnasnet|mobilenet|regnet|resne|shufflenet|swin|vgg"


def build_encoder(name, image_size):
    """vit(name), or a torchvision classifier without its last layer, its feature width as .dim.

    ResNets for images up to 64 px get the usual small stem: 3 x 3, stride 1, no max-pooling.
    ValueError for other names.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        return vit(name, image_size)
    if not re.search(BACKBONES, name):  # resne: resnext and wide_resnet, too
        raise ValueError(f"model.py: {name} cannot be a backbone; these can: {BACKBONES}")
    encoder = models.get_model(name)
    linear = [(p, m) for p, m in encoder.named_modules() if isinstance(m, nn.Linear)]
    path, classifier = linear[-1]
    encoder.set_submodule(path, nn.Identity())
    encoder.dim = classifier.in_features
    if isinstance(encoder, models.ResNet) and image_size <= 64:
        encoder.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        encoder.maxpool = nn.Identity()
    return encoder


def image_features(output, pool="avg"):
    """What stands for an image: the mean patch token (avg) of (B, 1 + P, D), or CLS (cls); features
    (B, D) of other networks as they are."""
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    if output.ndim == 2:
        return output
    return output[:, 0] if pool == "cls" else output[:, 1:].mean(1)


# ---------------------------------------------------------------- the two methods, a module each
def in_pieces(function, at_once, *tensors):
    """function(*tensors) with at_once images of the batch in memory at a time, or all for None.

    SIGReg is a statistic of the whole batch, so gradients added up over parts of it are those of
    another loss. Here each piece but the last is computed without its graph, and again when the
    loss of all of them is back-propagated: the gradient is that of the whole batch.
    """
    if at_once is None or at_once >= len(tensors[0]):
        return function(*tensors)
    *pieces, last = zip(*(x.split(at_once) for x in tensors), strict=True)
    parts = [checkpoint(function, *piece, use_reentrant=False) for piece in pieces]
    parts.append(function(*last))  # the backward pass starts here, so its graph can stay
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def _check_pieces(at_once, *modules):
    """ValueError where a module's output depends on the rest of the batch: no pieces of it."""
    names = [type(m).__name__ for module in modules for m in module.modules()]
    if at_once and any("BatchNorm" in name for name in names):
        raise ValueError("model.py: batch norm is of whole batches: no at_once (--micro-batch)")


class Masked(nn.Module):
    """After source A: encode the context, encode the targets, predict each side from the other.

    forward takes views, two of (B, 3, S, S), for the context and for the targets: the same crop and
    flip of each image, each view in colours of its own, or twice the same tensor; context (B, Nc)
    and targets (B, K, Nt), from masks.py. It returns two things. The first is what
    sigreg.masked_loss sees: z_context (B, 1 + Nc, D), z_target (B, K, 1 + Nt, D), z_pred
    (B, K, Nt, D), and with both_directions z_back (B, K, Nc, D), the context from each target. The
    second is what sigreg.multi_view_loss sees of whole images, where there is an image_head: the
    mean patch token of the context and of each target, through that head, (B, 1 + K, 64); else
    None. This is in neither source. An encoder of your own takes (images, indices) and gives CLS
    first, as VisionTransformer does. In a loop of your own, with the recipe's settings (x are crops
    of 0.3 to 1, normalised after their colours; batch 256, AdamW at 2e-3 with weight decay 0.05 of
    matrices alone):

        from masks import multi_block_masks
        from sigreg import SIGReg, centre, masked_loss, multi_view_loss
        predictor, head = MLPPredictor(encoder.dim, encoder.grid**2), image_head(encoder.dim)
        net = Masked(encoder, predictor, head, both_directions=True)
        context, targets = multi_block_masks(len(x), encoder.grid, 2, (0.2, 0.3), 0.35)
        tokens, g = net([x, x_in_other_colours], context, targets)
        places = context, targets, encoder.grid**2
        loss, pred, reg = masked_loss(*tokens, places=places, lam=1.0,
            regularizer=SIGReg("legendre"), error="relative", on="tokens")
        g = centre(g).transpose(0, 1)  # (1 + K, B, 64), each view less its mean over the batch
        whole, *_ = multi_view_loss(g, len(g), 0.05, SIGReg("sketched", seed=step))
        loss = loss + whole

    On several GPUs wrap net in DistributedDataParallel, and call the losses on every rank with its
    images; do not divide the loss, nor add up gradients of smaller batches (at_once does it right).
    Targets have their gradient. For comparison, stop_grad takes it away, teacher is another encoder
    for them, and whole_targets has them from the encoded whole image, normalised, as I-JEPA does.
    """

    def __init__(
        self, encoder, predictor, image_head=None, both_directions=False, stop_grad=False,
        teacher=None, whole_targets=False, at_once=None,
    ):  # fmt: skip
        super().__init__()
        _check_pieces(at_once, encoder, predictor)
        self.encoder, self.predictor, self.teacher = encoder, predictor, teacher
        self.image_head = image_head
        self.both_directions, self.stop_grad = both_directions, stop_grad
        self.whole_targets, self.at_once = whole_targets, at_once

    def forward(self, views, context, targets):
        tokens = in_pieces(self.embed, self.at_once, *views, context, targets)
        if self.image_head is None:
            return tokens, None
        of_context, of_targets = tokens[0][:, None, 1:].mean(2), tokens[1][:, :, 1:].mean(2)
        return tokens, self.image_head(torch.cat([of_context, of_targets], dim=1))

    def embed(self, view, other_view, context, targets):
        z_context = self.encoder(view, context)  # (B, 1 + Nc, D)
        z_target = self.encode_targets(other_view, targets)  # (B, K, 1 + Nt, D)
        z_pred = self.predictor(z_context, context, targets)  # (B, K, Nt, D)
        if not self.both_directions:
            return z_context, z_target, z_pred
        asked = context[:, None].expand(-1, targets.shape[1], -1)  # the context, of each target
        sources = z_target.flatten(0, 1), targets.flatten(0, 1)  # (B K, 1 + Nt, D), (B K, Nt)
        z_back = self.predictor(*sources, asked.flatten(0, 1)[:, None])  # (B K, 1, Nc, D)
        return z_context, z_target, z_pred, z_back[:, 0].unflatten(0, asked.shape[:2])

    def encode_targets(self, view, targets):
        encoder = self.teacher or self.encoder
        learn = torch.is_grad_enabled() and not (self.stop_grad or self.teacher)
        with torch.set_grad_enabled(learn):
            if not self.whole_targets:
                return encoder(view, targets)
            z = encoder(view)  # (B, 1 + P, D)
            patches = gather_tokens(F.layer_norm(z[:, 1:], z.shape[2:]), targets)  # (B, K, Nt, D)
            cls = z[:, None, :1].expand(-1, targets.shape[1], -1, -1)
            return torch.cat([cls, patches], dim=2)


class MultiView(nn.Module):
    """Source B: encode V views of each image, global ones first, and project them for the loss.

    forward takes views: V of (B, 3, size, size), of one size for the num_global first and of one
    for the others. It returns features (B, V, width of the encoder), which are probed, and z
    (V, B, D), which sigreg.multi_view_loss sees. pool: what of a ViT's output is a view's feature,
    see image_features. The projector sees all images at once.
    """

    def __init__(self, encoder, projector, num_global, at_once=None, pool="avg"):
        super().__init__()
        _check_pieces(at_once, encoder)
        self.encoder, self.projector = encoder, projector
        self.num_global, self.at_once, self.pool = num_global, at_once, pool

    def forward(self, views):
        (features,) = in_pieces(self.embed, self.at_once, *views)
        z = self.projector(features.transpose(0, 1).flatten(0, 1))  # (V B, D)
        return features, z.unflatten(0, (len(views), -1))

    def embed(self, *views):
        sizes = [same for same in (views[: self.num_global], views[self.num_global :]) if same]
        y = torch.cat([image_features(self.encoder(torch.cat(same)), self.pool) for same in sizes])
        return (y.unflatten(0, (len(views), -1)).transpose(0, 1),)
