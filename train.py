"""Train LeJEPA: one encoder, one loss, prediction + SIGReg, no teacher, no stop-gradient.

    python train.py                                             # embedded set `shapes`: 2 minutes on 2 cores, ckpt.pt
    python train.py --data cifar10                              # a torchvision data set, downloaded on first use
    python train.py --data /data/photos                         # a folder with train/<class>/ and val/<class>/
    python train.py --data cifar10 --recipe crops --model resnet18     # source B: many crops, any backbone
    torchrun --nproc_per_node=8 train.py --data /data/imagenet --model vit_b16      # one node, 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 --rdzv_backend=c10d train.py --data ...

--recipe masked (A): encode a context and target blocks of the image, predict the targets' patches from the context.
--recipe crops (B): encode global and local crops, project, draw all views to the mean of the global ones.
The loop under `# ---- training` holds both, a visible block each.

The same command again continues from its checkpoint. Beside ckpt.pt, ckpt.jsonl holds the command line, then one JSON
object for each logged step. `python probe.py ckpt.pt` measures what was learned.

Everything random is a pure function of the seed and of the step, epoch or image number: a resumed run repeats the
uninterrupted one, and the number of ranks changes rounding only. The batch, its masks and SIGReg's statistic are global
(and the projector's batch norm, on GPUs: torch synchronizes it there only).
"""
import argparse
import json
import math
import os
import pickle
import re
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets, models
from torchvision.transforms import v2

from masks import multi_block_masks, random_masks
from model import MLPPredictor, TransformerPredictor, projector, vit
from sigreg import (centre, effective_rank, embedding_std, legendre_sigreg, multi_view_loss, prediction_loss, random_directions,
                    sketched_sigreg, spectral_sigreg)

# ------------------------------------------------------------------------------------------------------- data

#   name: (class, arguments of the training split, of the one that is reported)
DATASETS = {
    "cifar10": (datasets.CIFAR10, {"train": True}, {"train": False}),
    "cifar100": (datasets.CIFAR100, {"train": True}, {"train": False}),
    "dtd": (datasets.DTD, {"split": "train"}, {"split": "test"}),
    "fgvc_aircraft": (datasets.FGVCAircraft, {"split": "trainval"}, {"split": "test"}),
    "flowers102": (datasets.Flowers102, {"split": "train"}, {"split": "test"}),
    "food101": (datasets.Food101, {"split": "train"}, {"split": "test"}),
    "imagenette": (datasets.Imagenette, {"split": "train"}, {"split": "val"}),
    "oxford_pets": (datasets.OxfordIIITPet, {"split": "trainval"}, {"split": "test"}),
    "stl10": (datasets.STL10, {"split": "train"}, {"split": "test"}),
    "svhn": (datasets.SVHN, {"split": "train"}, {"split": "test"}),
}


SHAPES = {  # signed distance to each outline in a cell of side 2, negative inside; y points down
    "disc": lambda x, y: np.hypot(x, y) - 0.6,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.55) - 0.16,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.55,
    "frame": lambda x, y: abs(np.maximum(abs(x), abs(y)) - 0.55) - 0.16,
    "plus": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.18, np.maximum(abs(x), abs(y)) - 0.75),
    "cross": lambda x, y: np.maximum(abs(abs(x) - abs(y)) / 2**0.5 - 0.18, (abs(x) + abs(y)) / 2**0.5 - 0.85),
    "triangle": lambda x, y: np.maximum(y - 0.5, 0.87 * abs(x) - 0.5 * y - 0.3),
    "chevron": lambda x, y: np.maximum(abs(y - 0.9 * abs(x) + 0.3) - 0.22, abs(x) - 0.75),
    "equals": lambda x, y: np.maximum(abs(abs(y) - 0.45) - 0.17, abs(x) - 0.7),
    "bar": lambda x, y: np.maximum(abs(x) - 0.2, abs(y) - 0.8),
}


class Shapes(torch.utils.data.Dataset):
    """Embedded data set: 4 x 4 copies of one shape; its kind is the label, all else is drawn anew for each copy.

    Item i -> uint8 array (size, size, 3) and label in 0 .. 9, a pure function of seed, split and i. A copy has its own
    two colours, angle, place and scale, so the patches of an image share the kind of the shape and nothing else, and no
    linear map of pixels sees it: either colour may be the brighter.
    """

    def __init__(self, size=32, seed=0, split="train"):
        self.size, self.seed, self.val = size, seed, split == "val"
        self.classes = list(SHAPES)
        self.cell = -(-size // 4)
        rng = np.random.default_rng(0)  # the stencils do not depend on the seed: (10 kinds, 64 variants, cell, cell) in [0, 1]
        angle, scale, dx, dy = (rng.uniform(low, high, (64, 1, 1)) for low, high in
                                ((-0.26, 0.26), (0.85, 1.15), (-0.24, 0.24), (-0.24, 0.24)))
        at = (np.arange(self.cell) + 0.5) / self.cell * 2 - 1
        x, y = at - dx, at[:, None] - dy
        x, y = (np.cos(angle) * x + np.sin(angle) * y) / scale, (np.cos(angle) * y - np.sin(angle) * x) / scale
        self.stencils = np.stack([np.clip(0.5 - outline(x, y) * scale * self.cell / 2, 0, 1) for outline in SHAPES.values()]).astype(np.float32)

    def __len__(self):
        return 4_000 if self.val else 20_000

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        rng, label, cell = np.random.default_rng((self.seed, self.val, index)), index % len(SHAPES), self.cell
        stencil = self.stencils[label, rng.integers(64, size=(4, 4))][..., None]  # (4, 4, cell, cell, 1)
        ground, figure = rng.random((2, 4, 4, 1, 1, 3), dtype=np.float32)
        image = (ground + (figure - ground) * stencil).transpose(0, 2, 1, 3, 4).reshape(4 * cell, 4 * cell, 3)[:self.size, :self.size]
        image = image + 0.1 * rng.standard_normal(image.shape, dtype=np.float32)
        return (image.clip(0, 1) * 255).astype(np.uint8), label


def read_image(path):
    """The image file as RGB; an OSError that names the path when it cannot be read."""
    try:
        return datasets.folder.pil_loader(path)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
        raise OSError(f"train.py: cannot read image {path} ({error}); replace or delete it") from None


def open_data(data, root, split, seed=0, image_size=32):
    """The `train` or `val` split of --data as (PIL image or uint8 array, label) pairs; exits in one line if it is not there."""
    if data == "shapes":
        return Shapes(image_size, seed, split)
    if data in DATASETS:
        make, *arguments = DATASETS[data]
        try:
            return make(root, **arguments[split == "val"], download=True)
        except (OSError, RuntimeError, ImportError) as error:  # no network, no room, broken archive, missing scipy
            sys.exit(f"train.py: --data {data} is not in {root} and cannot be had: {error}")
    folder = Path(data)
    if not folder.is_dir():
        sys.exit(f"train.py: --data {data} is neither a folder nor one of shapes {' '.join(DATASETS)}")
    if not (folder / split).is_dir():
        sys.exit(f"train.py: {folder} has no {split}/ folder; expected {folder}/{split}/<class>/<image files>")
    try:
        return datasets.ImageFolder(folder / split, loader=read_image)
    except FileNotFoundError as error:  # no class folder, or one without images
        sys.exit(f"train.py: {folder / split}: {str(error).splitlines()[0]}")


class Images(torch.utils.data.Dataset):
    """Item (epoch, index) -> uint8 views (V, 3, S, S), local views (L, 3, s, s) and label, a pure function of seed, epoch and index.

    By default V = 1, resized and centre-cropped. With num_global > 0: that many random resized crops and flips at full size, of a
    share `scale` of the image, and num_local of 0.05 to `scale[0]` at side local_size. Colours are photometric's work.
    """

    def __init__(self, source, size, num_global=0, num_local=0, local_size=1, scale=(0.3, 1), seed=0):
        self.source, self.num_global, self.num_local, self.local_size, self.seed = source, num_global, num_local, local_size, seed
        self.resize = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
        self.crop, self.local_crop = (v2.Compose([v2.RandomResizedCrop(side, scale=part, antialias=True), v2.RandomHorizontalFlip()])
                                      for side, part in ((size, scale), (local_size, (0.05, scale[0]))))

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        image, label = self.source[index]
        image = v2.functional.to_image(image if isinstance(image, np.ndarray) else image.convert("RGB"))
        local = [image.new_empty(0, 3, self.local_size, self.local_size)]
        if not self.num_global:
            return self.resize(image)[None], local[0], label
        with torch.random.fork_rng(devices=[]):  # the transforms draw from torch's global generator, which keeps 32 bits of a seed
            torch.default_generator.manual_seed(int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]))
            views = torch.stack([self.crop(image) for _ in range(self.num_global)])
            local += [self.local_crop(image)[None] for _ in range(self.num_local)]
        return views, torch.cat(local), label


def photometric(x, u, blur=0.0, solarize=0.0):
    """Colour jitter (0.4, 0.4, 0.2, 0.1) with p 0.8, grayscale with p 0.2, blur and solarize with the given p, each image by draws of its own.

    x (B, 3, H, W) float in [0, 1], u (B, 9) uniform draws in [0, 1) -> as x. What torchvision does to one image at a time, on the
    whole batch and its device (README has the speeds); brightness, contrast, saturation, hue always in this order, and the hue
    turns in the YIQ plane, not in HSV.
    """
    u = u.to(x.device)[:, :, None, None, None]
    brightness, contrast, saturation = (1 + (2 * u[:, i] - 1) * a for i, a in ((0, 0.4), (1, 0.4), (2, 0.2)))
    yiq = torch.tensor([[0.2989, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], device=x.device)

    def gray(x):
        return (x * yiq[0][:, None, None]).sum(1, keepdim=True)

    y = (x * brightness).clamp(0, 1)
    mean = gray(y).mean((2, 3), keepdim=True)
    y = (mean + contrast * (y - mean)).clamp(0, 1)
    y = (gray(y) + saturation * (y - gray(y))).clamp(0, 1)
    angle = 2 * math.pi * 0.1 * (2 * u[:, 3, 0, 0, 0] - 1)
    turn = torch.eye(3, device=x.device).repeat(len(x), 1, 1)
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = angle.cos(), -angle.sin(), angle.sin(), angle.cos()
    y = torch.einsum("bij,bjhw->bihw", torch.linalg.inv(yiq) @ turn @ yiq, y).clamp(0, 1)
    x = torch.where(u[:, 4] < 0.8, y, x)
    x = torch.where(u[:, 5] < 0.2, gray(x), x)
    if blur:
        radius = max(round(x.shape[-1] / 20), 1)  # 23 pixels wide at 224, as in DINO
        weights = torch.exp(-torch.arange(-radius, radius + 1, device=x.device).square() / (2 * (0.1 + 1.9 * u[:, 6, 0, 0]).square()))
        weights = (weights / weights.sum(1, keepdim=True)).T[..., None, None, None]  # (2 radius + 1, B, 1, 1, 1)
        y = torch.nn.functional.pad(x, [radius] * 4, mode="reflect")
        y = sum(w * y[:, :, i:i + x.shape[2]] for i, w in enumerate(weights))
        y = sum(w * y[..., i:i + x.shape[3]] for i, w in enumerate(weights))
        x = torch.where(u[:, 7] < blur, y, x)
    if solarize:
        x = torch.where((u[:, 8] < solarize) & (x >= 128 / 255), 1 - x, x)
    return x


def normalize(images):
    """float (..., 3, H, W) in [0, 1] -> normalised with ImageNet's mean and standard deviation."""
    mean, std = (torch.tensor(c, device=images.device)[:, None, None] for c in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (images - mean) / std


def batches(num_images, batch_size, first, last, seed, rank, world):
    """This rank's share of every global batch of the steps first .. last - 1, as lists of (epoch, index)."""
    per_epoch = num_images // batch_size
    for step in range(first, last):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == first:
            order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()
        share = batch_size // world
        start = i * batch_size + rank * share
        yield [(epoch, index) for index in order[start:start + share]]


def read(loader):
    """The loader's batches; an unreadable image ends the program with its one line, not with a worker's traceback."""
    try:
        yield from loader
    except OSError as error:
        sys.exit(str(error).strip().splitlines()[-1].removeprefix("OSError: "))


# ------------------------------------------------------------------------------------------------- checkpoint

# what may differ between the run that wrote a checkpoint and the one that continues it
MAY_CHANGE = {"epochs", "steps", "workers", "save_every", "log_every", "device", "ckpt"}


def load_checkpoint(path):
    """The dictionary that train.py saved; tensors and plain values only, so a pickle that runs code is refused."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"train.py: no checkpoint {path}; python train.py --ckpt {path} makes one")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        sys.exit(f"train.py: {path} is truncated or not a checkpoint of train.py ({type(error).__name__}); "
                 "delete it or choose another --ckpt")
    if not isinstance(checkpoint, dict) or not {"encoder", "predictor", "optimizer", "step", "rng", "args"} <= checkpoint.keys():
        sys.exit(f"train.py: {path} is not a checkpoint of train.py; choose another --ckpt")
    return checkpoint


# ------------------------------------------------------------------------------------------------------- main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=["masked", "crops"], default="masked",
                        help="masked: predict hidden patches from the others (source A); crops: embed many crops alike (source B)")
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="shapes", help=f"shapes (embedded), a folder with train/ and val/, or one of {' '.join(DATASETS)}")
    group.add_argument("--data-root", default="data", help="where torchvision data sets are downloaded to")
    group.add_argument("--image-size", type=int, help="side in pixels, a multiple of the model's patch; by default that of small images, else 224")
    group.add_argument("--augment", choices=["none", "crop", "color"],
                       help="none: resize and centre crop; crop: random resized crop and flip; color: crop, then photometric changes "
                            "drawn apart for each view, or for context and target, so that colour is no shortcut (default for small "
                            "photographs and --recipe crops)")
    group.add_argument("--global-views", type=int, default=2, help="crops: views of full size, 0.3 to 1 of the image")
    group.add_argument("--local-views", type=int, default=6, help="crops: views of 0.43 of the side, 0.05 to 0.3 of the image")
    group.add_argument("--local-size", type=int, help="crops: side of local views in pixels")
    group.add_argument("--workers", type=int, help="processes that load images; speed only")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="vit_{n,t,s,b,l,h}{patch}, n is for laptops; with --recipe crops also torchvision's "
                       "classifiers: resnet18 resnet50 convnext_tiny swin_t efficientnet_b0 ...; by default fits the data")
    group.add_argument("--predictor", choices=["mlp", "transformer"], default="mlp",
                       help="mlp sees the pooled context; transformer attends to its tokens")
    group.add_argument("--proj-dim", type=int, default=64, help="crops: width of the projection that the loss sees")
    group.add_argument("--masks", choices=["blocks", "random"], default="blocks", help="targets are rectangles, or scattered patches")
    group.add_argument("--masks-per", choices=["batch", "image"],
                       help="batch: all images of a step share one mask, so that its outline, which context and target both know, "
                            "is no shortcut (default for photographs); image: one each")
    group.add_argument("--num-targets", type=int, help="targets an image; 2 on shapes, 1 on small photographs, else 4")
    group.add_argument("--target-scale", type=float, nargs=2, metavar=("LOW", "HIGH"),
                       help="share of the patches in a target; 0.4 0.6 on small images, else I-JEPA's 0.15 0.2")
    group.add_argument("--min-context", type=float, help="least share of the patches that the context keeps; 0.35 on small images, else 0.25")
    group = parser.add_argument_group("loss")
    group.add_argument("--pred", choices=["relative", "mse"],
                       help="relative: the share of the targets' variance left unexplained, so that shrinking them gains nothing "
                            "(default for photographs); mse: mean squared error, as source A has it")
    group.add_argument("--sigreg", choices=["spectral", "legendre", "sketched"],
                       help="regularizer, see sigreg.py; by default legendre for masked, sketched for crops")
    group.add_argument("--sigreg-on", choices=["pooled", "tokens"],
                       help="its samples: the mean of each image's encoded tokens (default for shapes; wants a batch of several "
                            "times the width), or every encoded token (default for photographs)")
    group.add_argument("--lam", type=float, help="weight of SIGReg; larger spreads the embedding, smaller predicts better; masked: "
                       "pred + lam * sigreg, 1; crops: (1 - lam) * pred + lam * sigreg, 0.05")
    group.add_argument("--slices", type=int, default=1024, help="random directions a step of sketched SIGReg")
    group = parser.add_argument_group("optimization")
    group.add_argument("--batch-size", type=int, help="images per step over all ranks")
    group.add_argument("--epochs", type=int, help="passes over the data")
    group.add_argument("--steps", type=int, help="stop after this many steps, whatever --epochs says")
    group.add_argument("--lr", type=float, help="AdamW learning rate; 5e-4 for crops, 1.5e-4 for data of ImageNet's size, else 1e-3")
    group.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="cosine: the rate falls to 0 at the last step")
    group.add_argument("--warmup-epochs", type=float, default=0, help="epochs in which the rate rises from 0")
    group.add_argument("--weight-decay", type=float, help="AdamW decay of everything but biases and norms; 5e-4 for ResNets, else 0.05")
    group.add_argument("--seed", type=int, default=0, help="of the weights, the order, the crops, the masks and the slices")
    group = parser.add_argument_group("run")
    group.add_argument("--ckpt", default="ckpt.pt", help="written every --save-every steps, and continued from when it exists")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    group.add_argument("--log-every", type=int, default=50, help="steps between lines of the log")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction,
                       help="bfloat16 autocast of encoder and predictor; by default on GPUs only, and worth trying on CPUs with bfloat16 units")
    group.add_argument("--compile", action="store_true", help="torch.compile encoder and predictor: slow start, faster steps")
    args = parser.parse_args(argv)
    for name, low in dict(lam=0, weight_decay=0, seed=0, workers=0, warmup_epochs=0, local_views=0).items():
        if getattr(args, name) is not None and not getattr(args, name) >= low:
            sys.exit(f"train.py: --{name.replace('_', '-')} {getattr(args, name)} must be at least {low}")
    for name in "image_size lr slices epochs steps save_every log_every num_targets min_context global_views local_size proj_dim".split():
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            sys.exit(f"train.py: --{name.replace('_', '-')} {getattr(args, name)} must be above 0")
    return args


def build_encoder(name, image_size):
    """model.vit, or a torchvision classifier without its last layer, its feature width as .dim; ValueError for other names.

    ResNets for images up to 64 px get the usual small stem: 3 x 3, stride 1, no max-pooling.
    """
    if name not in models.list_models(module=models):
        return vit(name, image_size)
    encoder = models.get_model(name)
    path, last = [(path, module) for path, module in encoder.named_modules() if isinstance(module, torch.nn.Linear)][-1]
    parent, _, child = path.rpartition(".")
    setattr(encoder.get_submodule(parent), child, torch.nn.Identity())
    encoder.dim = last.in_features
    if isinstance(encoder, models.ResNet) and image_size <= 64:
        encoder.conv1, encoder.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    return encoder


def embed(features):
    """What is probed: tokens (B, 1 + N, D) -> the mean patch token (B, D); the (B, D) of other backbones as they are."""
    return features[:, 1:].float().mean(1) if features.ndim == 3 else features.float()


def learning_rate(step, last, warmup, args):
    """Rate of step 1 .. last: --lr, times a linear rise over the warm-up, times half a cosine over the rest if asked."""
    rise = min(step / warmup, 1) if warmup else 1
    progress = max(step - warmup, 0) / max(last - warmup, 1)
    return args.lr * rise * (0.5 * (1 + math.cos(math.pi * progress)) if args.schedule == "cosine" else 1)


def fill_in(args, train_set, world):
    """Settings that fit the data, where the command line gave none: by the number of images and the size of the first."""
    count, image = len(train_set), next(read(train_set))[0]
    side = min(image.shape[:2] if isinstance(image, np.ndarray) else image.size)
    shapes, crops = args.data == "shapes", args.recipe == "crops"
    large, small = count >= 500_000, side <= 96
    if args.model is None:
        args.model = "vit_n8" if shapes else "vit_n4" if side <= 48 else "vit_n8" if side <= 96 else "vit_b16" if large else "vit_s16"
    resnet = "resne" in args.model
    # the multiple that the side must be: a ViT's patch; what other networks reduce it by, but for a ResNet with its small stem
    own = re.fullmatch(r"vit_[a-z](\d+)", args.model)
    patch = max(int(own[1]), 1) if own else 1 if resnet and small else 32
    if args.image_size is None:
        args.image_size = max(side // patch * patch, 2 * patch) if small and (patch == 32 or side // patch >= 4) else 224 // patch * patch
    args.local_size = args.local_size or max(round(0.43 * args.image_size / patch), 1) * patch
    if args.batch_size is None:
        args.batch_size = min(4096 if large else 256, count) // world * world
    args.augment = args.augment or ("color" if crops or small and not shapes else "none")
    args.sigreg_on = args.sigreg_on or ("pooled" if shapes else "tokens")
    args.sigreg = args.sigreg or ("sketched" if crops else "legendre")
    args.lam = args.lam if args.lam is not None else 0.05 if crops else 1.0
    args.masks_per = args.masks_per or ("image" if shapes else "batch")
    args.pred = args.pred or ("mse" if shapes else "relative")
    args.num_targets = args.num_targets or (2 if shapes else 1 if small else 4)
    args.target_scale = args.target_scale or ([0.4, 0.6] if small else [0.15, 0.2])
    args.min_context = args.min_context or (0.35 if small else 0.25)
    args.epochs = args.epochs or (300 if not small else 5 if shapes else 100)
    args.lr = args.lr or (5e-4 if crops else 1.5e-4 if large else 1e-3)
    args.weight_decay = args.weight_decay if args.weight_decay is not None else 5e-4 if resnet else 0.05
    if args.workers is None:  # the embedded set is cheaper to draw than to send between processes
        args.workers = 0 if shapes and not crops else min(8, max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1))
    args.amp = args.device.startswith("cuda") if args.amp is None else args.amp
    if args.batch_size < 2 or args.batch_size > count:
        sys.exit(f"train.py: --batch-size {args.batch_size} must be from 2 (SIGReg compares images) to the {count} images of the data")
    if args.batch_size % world:
        sys.exit(f"train.py: --batch-size {args.batch_size} is the global batch and must divide by the {world} ranks "
                 f"(try {max(args.batch_size // world, 1) * world})")


def regularize(z, args, step):
    """SIGReg of z (N, D) as --sigreg says; the sketched one draws new directions every step."""
    if args.sigreg == "sketched":
        return sketched_sigreg(z, random_directions(z.shape[1], args.slices, args.seed * 100_003 + step, z.device))
    return {"spectral": spectral_sigreg, "legendre": legendre_sigreg}[args.sigreg](z)


def main(argv=None):
    args = parse_args(argv)
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    try:
        device = torch.empty(0, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"train.py: --device {args.device}: {str(error).splitlines()[0]}")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # On CPUs the backward pass of torch's fused attention is slow at these lengths: 1.9 to 4 times the plain one's time, 6 to 12 in bfloat16.
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")

    # ---- data, model, optimizer
    if local_rank:
        dist.barrier()  # the first process of each node downloads
    train_set = open_data(args.data, args.data_root, "train", args.seed, args.image_size or 32)
    if world > 1 and not local_rank:
        dist.barrier()
    fill_in(args, train_set, world)
    if args.data == "shapes":
        train_set = Shapes(args.image_size, args.seed)
    if args.recipe == "crops":
        images_of = Images(train_set, args.image_size, args.global_views, args.local_views, args.local_size, seed=args.seed)
    else:
        images_of = Images(train_set, args.image_size, num_global=int(args.augment != "none"), seed=args.seed)
    last = args.steps or args.epochs * (len(train_set) // args.batch_size)
    make_masks = {"blocks": multi_block_masks, "random": random_masks}[args.masks]
    mask_settings = dict(num_targets=args.num_targets, target_scale=args.target_scale, min_context=args.min_context)
    torch.manual_seed(args.seed)
    try:
        encoder = build_encoder(args.model, args.image_size).to(device)
        if args.recipe == "crops":
            predictor = projector(encoder.dim, args.proj_dim).to(device)  # kept under the predictor's name
        else:
            if not hasattr(encoder, "grid"):
                raise ValueError(f"train.py: --recipe masked needs patch tokens and {args.model} has none; take a vit_{{n,t,s,b,l,h}}{{patch}} "
                                 "or --recipe crops")
            make_masks(1, encoder.grid, **mask_settings)
            predictor = {"mlp": MLPPredictor, "transformer": TransformerPredictor}[args.predictor](encoder.dim, encoder.grid**2).to(device)
    except ValueError as error:
        sys.exit(str(error))
    named = [*encoder.named_parameters(), *predictor.named_parameters()]
    decayed = [p for name, p in named if name.endswith("weight") and p.ndim >= 2]
    others = [p for name, p in named if not (name.endswith("weight") and p.ndim >= 2)]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=args.lr, weight_decay=args.weight_decay)

    # ---- resume
    ckpt, log = Path(args.ckpt), Path(args.ckpt).with_suffix(".jsonl")
    step = 0
    if ckpt.exists():
        saved = load_checkpoint(ckpt)
        for name, value in vars(args).items():
            if name not in MAY_CHANGE and saved["args"].get(name) != value:
                sys.exit(f"train.py: {ckpt} was trained with {name}={saved['args'].get(name)}, this command says {value}; "
                         "repeat that setting or choose another --ckpt")
        encoder.load_state_dict(saved["encoder"])
        predictor.load_state_dict(saved["predictor"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        step = saved["step"]
        if step >= last:
            if rank == 0:
                print(f"train.py: {ckpt} is finished: {step} of {last} steps; next: python probe.py {ckpt}")
            return
        if rank == 0:
            print(f"train.py: continuing {ckpt} from step {step}")
    elif not ckpt.absolute().parent.is_dir():
        sys.exit(f"train.py: --ckpt {ckpt}: no such folder {ckpt.absolute().parent}")
    writer = None
    if rank == 0:
        # after a resume each step stands once, and a line cut short by a kill goes
        lines = log.read_text().splitlines(keepends=True) if step and log.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line).get("step", 0) <= step]
        header = json.dumps({"command": " ".join(sys.argv), "args": vars(args)}) + "\n"
        log.write_text("".join(kept or [header]))
        try:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(ckpt.with_suffix(".tb"), purge_step=step + 1)
        except ImportError:
            pass
        print(f"{args.model} at {args.image_size} px, {sum(p.numel() for _, p in named):,} parameters, on {len(train_set):,} images of "
              f"{args.data}: {last} steps of {args.batch_size} on {world} x {device.type}")

    # ---- training
    encode, predict = encoder, predictor  # the raw modules keep their names for the checkpoint
    if args.compile:
        encode, predict = torch.compile(encode, dynamic=True), torch.compile(predict, dynamic=True)  # mask sizes change by the step
    if world > 1:
        # batch norm over the global batch, as SIGReg is
        encode, predict = (torch.nn.SyncBatchNorm.convert_sync_batchnorm(m) if device.type == "cuda" else m for m in (encode, predict))
        ids = [local_rank] if device.type == "cuda" else None
        encode, predict = (DistributedDataParallel(m, device_ids=ids, broadcast_buffers=False) for m in (encode, predict))
    share = args.batch_size // world
    loader = torch.utils.data.DataLoader(
        images_of, batch_sampler=batches(len(train_set), args.batch_size, step, last, args.seed, rank, world),
        num_workers=args.workers, pin_memory=device.type == "cuda")
    healthy = torch.ones((), dtype=torch.bool, device=device)
    per_epoch = len(train_set) // args.batch_size
    logged, start, waited, ready = step, time.perf_counter(), 0.0, time.perf_counter()
    for step, (images, local, _) in enumerate(read(loader), step + 1):
        waited += time.perf_counter() - ready
        # Every rank draws masks and colours for the whole batch and takes its rows: any number of ranks sees the same.
        generator = torch.Generator().manual_seed(args.seed * 100_003 + step)
        views = [v / 255 for v in (*images.to(device, non_blocking=True).unbind(1), *local.to(device, non_blocking=True).unbind(1))]
        if args.recipe == "masked":
            masks = make_masks(args.batch_size if args.masks_per == "image" else 1, encoder.grid, generator=generator, **mask_settings)
            rows = torch.arange(rank * share, (rank + 1) * share) % len(masks[0])
            context, targets = (m[rows].to(device, non_blocking=True) for m in masks)  # (B, Nc), (B, K, Nt)
            views *= 2  # for the context and for the targets
        if args.augment == "color":
            draws = torch.rand(len(views), args.batch_size, 9, generator=generator)[:, rank * share:(rank + 1) * share]
            blur, solarize = (0.5, 0.2) if args.recipe == "crops" else (0, 0)
            views = [photometric(view, u, blur, solarize) for view, u in zip(views, draws)]
        views = [normalize(view) for view in views]  # (B, 3, S, S) each, local ones (B, 3, s, s); B is this rank's share of the batch

        if args.recipe == "masked":
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                z_context = encode(views[0], context)  # (B, 1 + Nc, D)
                z_target = encode(views[1], targets)  # (B, K, 1 + Nt, D), the same encoder, with its gradient
                z_pred = predict(z_context, context, targets)  # (B, K, Nt, D)

            pooled = torch.cat([z_context, z_target.flatten(1, 2)], dim=1).float().mean(1)  # (B, D)
            c_context, c_target = centre(z_context[:, 1:]), centre(z_target[:, :, 1:])  # what sets the images apart at each patch
            # Context and target are two samples, and CLS is in neither: tokens that nobody predicts could carry the spread alone.
            samples = [pooled] if args.sigreg_on == "pooled" else [c_context.flatten(0, 1), c_target.flatten(0, 2)]
            reg = sum(regularize(z, args, step) for z in samples) / len(samples)
            if args.pred == "relative":
                pred = prediction_loss(z_pred, c_target, relative=True)
            else:
                pred = prediction_loss(z_pred, z_target[:, :, 1:])
            loss = pred + args.lam * reg
        else:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                y = [embed(encode(torch.cat(part))) for part in (views[:args.global_views], views[args.global_views:]) if part]
                z = predict(torch.cat(y)).float().unflatten(0, (len(views), -1))  # (V, B, K)
            pooled = y[0]  # (V_global B, D)
            loss, pred, reg = multi_view_loss(z, args.global_views, args.lam, partial(regularize, args=args, step=step))

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, last, args.warmup_epochs * per_epoch, args)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        healthy &= loss.isfinite()  # read only where the GPU is waited for anyway

        log_now = step % args.log_every == 0 or step == last
        save_now = step % args.save_every == 0 or step == last
        if log_now or save_now:
            # weights too: a finite loss can have made a non-finite step
            if not healthy or not all(p.isfinite().all() for _, p in named):
                sys.exit(f"train.py: the loss or a weight became non-finite by step {step}; {ckpt} is untouched since its last save; "
                         "lower --lr or --lam")
        if log_now:
            with torch.no_grad():
                # spectral SIGReg of the same vectors is log D - log(effective rank): no second decomposition
                same = args.recipe == "masked" and args.sigreg == "spectral" and args.sigreg_on == "pooled"
                erank = (encoder.dim * torch.exp(-reg) if same else effective_rank(pooled)).item()  # collective: on every rank
                std = embedding_std(pooled).item()
            if rank == 0:
                speed = (step - logged) * args.batch_size / (time.perf_counter() - start)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes on macOS
                memory = (torch.cuda.max_memory_allocated() if device.type == "cuda" else peak) / 2**30
                left = time.strftime("%H:%M:%S", time.gmtime((last - step) * args.batch_size / speed))
                row = {"step": step, "epoch": (step - 1) * args.batch_size // len(train_set), "loss": loss.item(), "pred": pred.item(),
                       "sigreg": reg.item(), "erank": erank, "std": std, "lr": optimizer.param_groups[0]["lr"],
                       "images_per_s": round(speed, 1), "wait": round(waited / (time.perf_counter() - start), 3)}
                print(f"step {step}/{last}  epoch {row['epoch']}  loss {row['loss']:.4f}  pred {row['pred']:.4f}  sigreg {row['sigreg']:.4f}  "
                      f"erank {erank:.1f}/{encoder.dim}  std {std:.3f}  {speed:.0f} img/s  wait {row['wait']:.0%}  {memory:.1f} GB  eta {left}", flush=True)
                with log.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                for key, value in row.items():
                    if writer and key != "step":
                        writer.add_scalar(key, value, step)
            logged, start, waited = step, time.perf_counter(), 0.0
        if save_now and rank == 0:
            temporary = ckpt.with_name(ckpt.name + ".tmp")
            torch.save({"encoder": encoder.state_dict(), "predictor": predictor.state_dict(), "optimizer": optimizer.state_dict(),
                        "step": step, "rng": torch.get_rng_state(), "data": args.data, "args": vars(args)}, temporary)
            temporary.replace(ckpt)  # atomic: a kill leaves the old file or the new one
        ready = time.perf_counter()

    if rank == 0:
        print(f"train.py: finished {last} steps; next: python probe.py {ckpt}")
    if world > 1:
        # gloo's thread must drop the last step's tensors first: with torch 2.11 the end of the process group can wait for it forever
        del encode, predict
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
