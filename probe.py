"""What did the encoder learn? The numbers and pictures of an evaluation section, from one checkpoint of train.py.

    python probe.py ckpt.pt                               # k-NN and linear top-1 on the data set that the checkpoint names
    python probe.py ckpt.pt --untrained                   # the same encoder before training: the floor under any claim
    python probe.py ckpt.pt --pixels                      # no encoder at all: the other floor
    python probe.py ckpt.pt --shots 1 10                  # and with n labelled images a class, 5 draws
    python probe.py ckpt.pt --layers 4 --pool both        # the last 4 blocks, mean of the patch tokens beside CLS (ViT)
    python probe.py ckpt.pt --data cifar10 dtd photos     # transfer: other data sets, one table
    python probe.py ckpt.pt --finetune                    # all weights trained on the labels; again: continues
    python probe.py ckpt.pt --pca pca.png --nearest nearest.png
    python probe.py ckpt.pt --export encoder.safetensors  # the encoder alone, under timm's names (or encoder.pt)
    torchrun --nproc_per_node=8 probe.py ckpt.pt          # features and fine-tuning on all ranks

Features are extracted once from resized, centre-cropped images. Every number is top-1 in percent on the validation split, which
takes no part in fitting or choosing anything, and stands with its protocol; the last line of standard output is one JSON object,
or with several data sets a list of them.
"""
import argparse
import copy
import datetime
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

from sigreg import effective_rank
from train import Images, batches, build_encoder, embed, learning_rate, load_checkpoint, normalize, open_data, read

NEIGHBOURS = (1, 5, 10, 20, 50, 200)
IN_MEMORY = 2**28  # features of more numbers than this are float16 in a file
#   the linear heads: learning rate x weight decay
HEADS = tuple(itertools.product((0.1, 0.3, 1.0, 3.0), (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)))

# --------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def extract_features(encoder, dataset, pool="avg", layers=1, batch_size=500, workers=0, amp=False, folder=None):
    """Features (N, D) and labels (N,) int64, on the CPU, of all N images in order; under torchrun each rank does its share.

    encoder: images (B, 3, S, S) -> tokens (B, 1 + n, D) or features (B, D), or None: the pixels themselves, reduced to 16 x 16;
    dataset: train.Images; pool avg: mean of the patch tokens, cls: the CLS token, both: one beside the other; layers: how many last
    blocks (ViT); amp: bfloat16 autocast. Float32; above IN_MEMORY numbers float16 in a nameless file in `folder`, mapped into memory.
    Rank 0 returns everything, the others their share.
    """
    device = next(encoder.parameters()).device if encoder else torch.device("cpu")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    bounds = [len(dataset) * r // world for r in range(world + 1)]
    first, last = bounds[rank:rank + 2]
    chunks = [[(0, i) for i in range(at, min(at + batch_size, last))] for at in range(first, last, batch_size)]
    rows = len(dataset) if rank == 0 else last - first
    features, labels, done = None, torch.zeros(rows, dtype=torch.int64), 0
    for images, _, label in read(torch.utils.data.DataLoader(dataset, batch_sampler=chunks, num_workers=workers)):
        images = images[:, 0].to(device) / 255
        if encoder is None:
            x = F.adaptive_avg_pool2d(images, 16).flatten(1)
        else:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                out = encoder(normalize(images), layers=layers) if layers > 1 else encoder(normalize(images))
            cls = [out[:, 0].float()] if pool != "avg" else []
            x = torch.cat([embed(out), *cls] if pool != "cls" else cls, dim=1)
        if features is None and len(dataset) * x.shape[1] <= IN_MEMORY:  # by the whole: all ranks send one type
            features = torch.empty(rows, x.shape[1])
        elif features is None:
            with tempfile.NamedTemporaryFile(dir=folder) as file:  # its name goes at once, its room when the tensor goes
                features = torch.from_file(file.name, shared=True, size=rows * x.shape[1], dtype=torch.float16).view(rows, -1)
        features[done:done + len(x)], labels[done:done + len(x)] = x.cpu(), label
        done += len(x)
    for r in range(1, world):
        if rank == 0 and bounds[r] < bounds[r + 1]:
            dist.recv(features[bounds[r]:bounds[r + 1]], r)
            dist.recv(labels[bounds[r]:bounds[r + 1]], r)
        elif rank == r and rows:
            dist.send(features, 0)
            dist.send(labels, 0)
    return features, labels


# ----------------------------------------------------------------------------------------------------- probes


def check_labels(train_y, val_y):
    """ValueError where the labels (N,), (M,) cannot be probed: some missing, a single class, or classes that training has not."""
    for name, y in (("training", train_y), ("validation", val_y)):
        if y.min() < 0:
            raise ValueError(f"probe.py: {int((y < 0).sum())} of {len(y)} {name} images have no label; probe a labelled data set")
    if len(train_y.unique()) < 2:
        raise ValueError("probe.py: the training split has a single class; a probe needs two to tell apart")
    missing = sorted(set(val_y.unique().tolist()) - set(train_y.unique().tolist()))
    if missing:
        raise ValueError(f"probe.py: {len(missing)} classes of the validation split, such as {missing[0]}, are not in the training split; "
                         "both need the same classes")


@torch.no_grad()
def knn_probe(train_x, train_y, val_x, val_y, k=20, temperature=0.07):
    """Top-1 in percent of the vote of the k nearest training images by cosine, each weighted exp(cosine / temperature).

    train_x (N, D), val_x (M, D) features, train_y (N,), val_y (M,) int64 labels (Wu et al. 2018); k an int, or several for a
    list. Exact, float32, on the device of train_x. ValueError as check_labels has it.
    """
    check_labels(train_y, val_y)
    ks = [min(n, len(train_x)) for n in ([k] if isinstance(k, int) else k)]
    device, most, classes = train_x.device, max(ks), int(train_y.max()) + 1
    train_x, train_y = train_x.to(torch.float32, copy=True), train_y.to(device)
    F.normalize(train_x, dim=1, out=train_x)  # one copy: of ImageNet it is 4 GB
    right = torch.zeros(len(ks), dtype=torch.int64, device=device)
    chunk = max(2**26 // len(train_x), 1)
    for x, y in zip(val_x.split(chunk), val_y.split(chunk)):
        cosine, nearest = (F.normalize(x.to(device).float(), dim=1) @ train_x.T).topk(most, dim=1)
        weight, label = (cosine / temperature).exp(), train_y[nearest]
        for i, n in enumerate(ks):
            votes = weight.new_zeros(len(x), classes).scatter_add_(1, label[:, :n], weight[:, :n])
            right[i] += (votes.argmax(1) == y.to(device)).sum()
    top1 = (100 * right.double() / len(val_y)).tolist()
    return top1[0] if isinstance(k, int) else top1


@torch.no_grad()
def fit_heads(x, y, heads=HEADS, seed=0, rows=None):
    """Linear classifiers of x (N, D), y (N,) for every (learning rate, weight decay) of heads, H of them in one matrix product.

    rows: int64 indices of the images to fit, by default all; above IN_MEMORY numbers x is read batch by batch.

    Each minimises  mean cross-entropy(standardised x W + b, y) + decay / 2 |W|^2  by momentum SGD (0.9, batch 1024, cosine rate,
    10 passes and at least 400 steps; the last one counts) in the features' principal axes scaled to unit variance, where the
    Hessian is well conditioned: some 10 passes do what takes hundreds on standardised features. The penalty stays that of the
    standardised ones; its step is implicit, so any decay is stable. Returns weight (D, H, C) and bias (H, C) that act on x as
    it is, on the device of x.
    """
    rows = torch.arange(len(x)) if rows is None else rows.cpu()
    n, width, classes, device = len(rows), x.shape[1], int(y.max()) + 1, x.device
    total, gram = torch.zeros(width, dtype=torch.float64, device=device), torch.zeros(width, width, dtype=torch.float64, device=device)
    for part in rows.split(2**14):
        part = x[part].double()
        total += part.sum(0)
        gram += part.T @ part
    mean = total / n
    covariance = gram / n - mean * mean[:, None]
    std = covariance.diagonal().clamp_min(1e-12).sqrt()
    if n > width:
        variance, axes = torch.linalg.eigh(covariance / std / std[:, None])
    else:  # the same from n images directly, without the axes on which they have nothing and no weight would move
        _, singular, axes = torch.linalg.svd((x[rows].double() - mean) / std, full_matrices=False)
        variance, axes = singular.square() / n, axes.T
    variance = variance.clamp_min(0) + 1e-3  # so that empty axes are not blown up
    turn = axes / variance.sqrt() / std[:, None]
    mean32, turn32, shrink = mean.float(), turn.float(), (1 / variance).float()[:, None, None]

    turned = (x[rows].float() - mean32) @ turn32 if n * width <= IN_MEMORY else None  # once, where there is room

    rate, decay = torch.tensor(heads, device=device).T[..., None]  # (H, 1) each
    weight, bias = torch.zeros(len(variance), len(heads), classes, device=device), torch.zeros(len(heads), classes, device=device)
    push, push_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    batch = min(1024, n)
    per_pass = n // batch
    steps = max(10 * per_pass, 400)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % per_pass == 0:
            order = torch.randperm(n, generator=generator)
        now = order[step % per_pass * batch:][:batch]
        z = turned[now] if turned is not None else (x[rows[now]].float() - mean32) @ turn32
        error = torch.addmm(bias.flatten(), z, weight.flatten(1)).view(batch, *bias.shape).softmax(-1)  # (B, H, C)
        error.scatter_add_(2, y[rows[now], None, None].expand(-1, len(heads), 1), error.new_full((batch, len(heads), 1), -1))
        error = error.flatten(1) / batch
        push.lerp_((z.T @ error).view_as(weight), 0.1)
        push_bias.lerp_(error.sum(0).view_as(bias), 0.1)
        pace = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        weight.sub_(pace * push).div_(1 + pace * decay * shrink)
        bias.sub_(pace * push_bias)
    weight = (turn @ weight.double().flatten(1)).view(width, *bias.shape)
    return weight.float(), (bias - (mean @ weight.flatten(1)).view_as(bias)).float()


@torch.no_grad()
def score(weight, bias, x, y):
    """Top-1 in percent of each of H linear heads: weight (D, H, C), bias (H, C), x (N, D), y (N,) -> list of H."""
    right = torch.zeros(len(bias), dtype=torch.int64, device=weight.device)
    for part, label in zip(x.split(4096), y.split(4096)):
        logits = torch.addmm(bias.flatten(), part.to(weight.device).float(), weight.flatten(1)).view(len(part), *bias.shape)
        right += (logits.argmax(-1) == label.to(weight.device)[:, None]).sum(0)
    return (100 * right.double() / len(y)).tolist()


def train_linear(train_x, train_y, seed=0, heads=HEADS):
    """The linear head of the probe, from the training split alone: weight, bias, (learning rate, decay), held-out top-1.

    All heads are fitted to nine tenths of train_x (N, D), train_y (N,); the best on the held-out tenth (drawn by the seed, class by
    class) is fitted again to everything. weight (D, 1, C), bias (1, C). ValueError with one image a class.
    """
    if train_y.bincount().max() < 2:
        raise ValueError("probe.py: with one training image a class none can be held out to choose the linear head; two are needed")
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(seed))
    order = order[train_y.cpu()[order].argsort(stable=True)]
    held = torch.zeros(len(order), dtype=torch.bool)
    held[order[::10]] = True
    rest, held = (~held).nonzero()[:, 0], held.nonzero()[:, 0].to(train_x.device)
    top1 = score(*fit_heads(train_x, train_y, heads, seed, rest), train_x[held], train_y[held])
    best = max(range(len(heads)), key=top1.__getitem__)
    return *fit_heads(train_x, train_y, [heads[best]], seed), heads[best], top1[best]


def linear_probe(train_x, train_y, val_x, val_y, seed=0):
    """Top-1 in percent of a linear classifier on frozen features: train_linear's head on the validation split.

    Shapes and errors as in knn_probe, on the device of train_x. The labels val_y are compared with predictions and nothing else.
    """
    check_labels(train_y, val_y)
    weight, bias, _, _ = train_linear(train_x, train_y, seed)
    return score(weight, bias, val_x, val_y)[0]


def few_shot_probe(train_x, train_y, val_x, val_y, shots, draws=5):
    """Top-1 in percent, one for each of `draws` draws, of linear heads fitted to `shots` training images a class.

    Shapes and errors as in knn_probe. So few leave none to choose by: rate 1 and decay 10 / (number of images) throughout.
    """
    check_labels(train_y, val_y)
    fewest, where = train_y.bincount()[train_y.unique()].min(0)
    if fewest < shots:
        raise ValueError(f"probe.py: --shots {shots}, but class {train_y.unique()[where]} has {fewest} training images")
    top1 = []
    for seed in range(draws):
        order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(seed)).to(train_y.device)
        rows = torch.cat([order[train_y[order] == c][:shots] for c in train_y.unique()])
        top1 += score(*fit_heads(train_x, train_y, [(1.0, 10 / len(rows))], seed, rows), val_x, val_y)
    return top1


# ------------------------------------------------------------------------------------------------ fine-tuning


def finetune(encoder, who, train_set, val_set, size, classes, options, path):
    """Trains a copy of the encoder and a new linear head on the labels; top-1 in percent of the last step (rank 0), else None.

    AdamW; the learning rate falls by --layer-decay with each block below the head, warms up over a twentieth of the steps and ends on
    half a cosine. Crops and flips, mixup or cutmix (a coin for each batch), label smoothing, drop path (ViT). who: what the encoder
    is, for the checkpoint at path, which is written after each pass and continued when there; train_set, val_set: (image, label)
    pairs. Under torchrun the batch is split over the ranks, and gradients are averaged.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(encoder.parameters()).device
    encoder = copy.deepcopy(encoder).requires_grad_(True).train()
    head = torch.nn.Linear(encoder.dim, classes, device=device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    if hasattr(encoder, "blocks"):
        for i, block in enumerate(encoder.blocks):  # deeper blocks are skipped more often, none in the first
            p = options.drop_path * i / max(len(encoder.blocks) - 1, 1)
            for branch in (block.attn["proj"], block.mlp["fc2"]):
                branch.register_forward_hook(lambda module, _, out, p=p: stochastic_depth(out, p, "row", module.training))
    # layer 0 is what comes before the first block (or stage), then one for each, the head's with what follows them
    layer_of, stages = {}, []
    for name, _ in encoder.named_parameters():
        stage = re.match(r"(blocks|features)\.\d+|layer\d+", name)
        if stage and stage[0] not in stages:
            stages.append(stage[0])
        layer_of[name] = stages.index(stage[0]) + 1 if stage else -1 if stages else 0
    groups = []
    for name, p in [*encoder.named_parameters(), *head.named_parameters()]:
        layer = layer_of.get(name, -1) % (len(stages) + 2)  # -1: the last
        groups.append({"params": [p], "scale": options.layer_decay ** (len(stages) + 1 - layer),
                       "weight_decay": options.weight_decay if name.endswith("weight") and p.ndim >= 2 else 0.0})
    optimizer = torch.optim.AdamW(groups, lr=options.lr)

    batch = min(options.batch_size, len(train_set)) // world * world
    if not batch:
        sys.exit(f"probe.py: --batch-size {options.batch_size} and {len(train_set)} images do not reach {world} ranks; lower the number of ranks")
    per_epoch = len(train_set) // batch
    last = options.steps or options.epochs * per_epoch
    settings = {name: getattr(options, name) for name in "layer_decay drop_path smoothing mixup cutmix lr weight_decay seed".split()}
    settings |= {"encoder": who, "batch": batch, "last": last, "size": size, "classes": classes}
    step = 0
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        changed = [name for name in settings if saved["settings"].get(name) != settings[name]]
        if changed:
            sys.exit(f"probe.py: {path} was fine-tuned with {changed[0]}={saved['settings'].get(changed[0])}, this command says "
                     f"{settings[changed[0]]}; repeat that setting or delete the file")
        encoder.load_state_dict(saved["encoder"])
        head.load_state_dict(saved["head"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
        if rank == 0:
            print(f"probe.py: continuing {path} from step {step} of {last}")
    encode, classify = encoder, head
    if world > 1:
        encode = torch.nn.SyncBatchNorm.convert_sync_batchnorm(encoder) if device.type == "cuda" else encoder
        ids = [device.index] if device.type == "cuda" else None
        encode, classify = (DistributedDataParallel(m, device_ids=ids) for m in (encode, classify))
    mixes = [mix(alpha=a, num_classes=classes) for mix, a in ((v2.MixUp, options.mixup), (v2.CutMix, options.cutmix)) if a > 0]
    images_of = Images(train_set, size, num_global=1, scale=(0.35, 1), seed=options.seed)
    loader = torch.utils.data.DataLoader(images_of, batch_sampler=batches(len(train_set), batch, step, last, options.seed, rank, world),
                                         num_workers=options.workers)
    logged, start = step, time.perf_counter()
    for step, (images, _, labels) in enumerate(read(loader), step + 1):
        torch.manual_seed((options.seed * 100_003 + step) * world + rank)  # mixes and drop path: a rerun repeats them
        images, labels = normalize(images[:, 0].to(device) / 255), labels.to(device)
        if mixes:
            images, labels = mixes[torch.randint(len(mixes), ())](images, labels)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
            logits = classify(embed(encode(images))).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=options.smoothing)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, last, 0.05 * last, options) * group["scale"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step % 50 == 0 or step == last) and rank == 0:
            print(f"fine-tuning {step}/{last}  loss {loss.item():.4f}  {(step - logged) * batch / (time.perf_counter() - start):.0f} img/s", flush=True)
            logged, start = step, time.perf_counter()
        if (step % per_epoch == 0 or step == last) and rank == 0:
            temporary = path.with_name(path.name + ".tmp")
            torch.save({"encoder": encoder.state_dict(), "head": head.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                        "settings": settings}, temporary)
            temporary.replace(path)
    if not all(p.isfinite().all() for p in [*encoder.parameters(), *head.parameters()]):
        sys.exit(f"probe.py: fine-tuning became non-finite; lower --lr, and delete {path}")
    x, y = extract_features(encoder.eval(), Images(val_set, size), workers=options.workers, amp=options.amp)
    with torch.no_grad():
        return 100 * (head(x.to(device)).argmax(1).cpu() == y).double().mean().item() if rank == 0 else None


# --------------------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def pca_picture(encoder, images, side):
    """images (B, 3, S, S) in [0, 1] -> (3, H, W) in [0, 1]: each image beside its patch tokens' first three principal components.

    As red, green, blue, over the tokens of all images together: one colour means one thing everywhere. Each axis points where its
    largest entry is positive, and runs from the 1st to the 99th percentile. side: pixels of an image in the picture.
    """
    tokens = encoder(normalize(images))[:, 1:].float()  # (B, n, D)
    x = tokens.flatten(0, 1).double()
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors[:, -3:].flip(1)  # (D, 3), the largest first
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    x = (x @ axes).float()
    low, high = (x.sort(0).values[int(q * (len(x) - 1))] for q in (0.01, 0.99))
    grid = images.shape[-1] // encoder.patch_size
    colours = ((x - low) / (high - low)).clamp(0, 1).view(len(images), grid, grid, 3).permute(0, 3, 1, 2)
    both = torch.stack([F.interpolate(part, (side, side), mode="nearest") for part in (images, colours)], dim=1)  # (B, 2, 3, side, side)
    return make_grid(both.flatten(0, 1).cpu(), nrow=4, padding=4, pad_value=1)


def nearest_picture(train_x, val_x, train_set, val_set, queries, neighbours=8, side=96):
    """(3, H, W) in [0, 1]: a row for each validation image of `queries`, and its nearest training images by cosine after it.

    train_x, val_x as in knn_probe; train_set, val_set: train.Images. A green frame: of the query's class; red: of another.
    """
    cosine = F.normalize(val_x[queries].float(), dim=1) @ F.normalize(train_x.float(), dim=1).T
    tiles = []
    for query, row in zip(queries, cosine.topk(neighbours, dim=1).indices.tolist()):
        for dataset, i in [(val_set, query), *((train_set, i) for i in row)]:
            image, _, label = dataset[0, i]
            image = F.interpolate(image, (side, side), mode="nearest")[0]
            if dataset is val_set:
                wanted, colour = label, "white"
            else:
                colour = "green" if label == wanted else "red"
            tiles.append(draw_bounding_boxes(image, torch.tensor([[0, 0, side - 1, side - 1]]), colors=[colour], width=4) / 255)
    return make_grid(torch.stack(tiles), nrow=neighbours + 1, padding=4, pad_value=1)


# ------------------------------------------------------------------------------------------------------- main


def export(encoder, path):
    """The encoder's state dict alone as a .safetensors or .pt file; a ViT's names are timm's."""
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import save_file
        except ImportError:
            sys.exit(f"probe.py: --export {path} needs the package safetensors; install it, or write a .pt file")
        save_file(state, path)
    else:
        torch.save(state, path)
    print(f"{path}: {len(state)} tensors")
    if hasattr(encoder, "blocks"):
        print(f"timm.models.VisionTransformer(img_size={encoder.grid * encoder.patch_size}, patch_size={encoder.patch_size}, embed_dim={encoder.dim}, "
              f"depth={len(encoder.blocks)}, num_heads={encoder.blocks[0].heads}, num_classes=0) loads it")


def commit():
    """The commit of this code, `-dirty` if it was changed since; None outside a git repository."""
    try:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", help="a checkpoint of train.py")
    group = parser.add_argument_group("what is probed")
    group.add_argument("--data", nargs="+", help="data sets as in train.py; by default the one of the checkpoint")
    group.add_argument("--data-root", help="where torchvision data sets are; by default as in training")
    group.add_argument("--image-size", type=int, help="side in pixels; by default as in training")
    group.add_argument("--untrained", action="store_true", help="the encoder as train.py's seed initialises it")
    group.add_argument("--pixels", action="store_true", help="the images themselves, reduced to 16 x 16, in place of features")
    group.add_argument("--pool", choices=["avg", "cls", "both"], default="avg", help="mean of the patch tokens, the CLS token, or both side by side")
    group.add_argument("--layers", type=int, default=1, help="features of this many last blocks side by side (ViT)")
    group.add_argument("--shots", type=int, nargs="+", default=[], help="also linear heads on so many training images a class, 5 draws")
    group.add_argument("--seed", type=int, default=0, help="of the held-out tenth, the order of the heads' images, fine-tuning")
    group = parser.add_argument_group("in place of k-NN and linear probe")
    group.add_argument("--finetune", action="store_true", help="train all weights on the labels; with --untrained, from scratch")
    group.add_argument("--pca", metavar="PNG", help="picture of the patch tokens' principal components, at 4 times the side")
    group.add_argument("--nearest", metavar="PNG", help="picture of validation images and their nearest training images")
    group.add_argument("--export", metavar="FILE", help="write the encoder alone as .safetensors or .pt")
    group = parser.add_argument_group("fine-tuning")
    group.add_argument("--epochs", type=int, default=20, help="passes over the training split")
    group.add_argument("--steps", type=int, help="stop after this many steps, whatever --epochs says")
    group.add_argument("--batch-size", type=int, default=256, help="images per step over all ranks")
    group.add_argument("--lr", type=float, help="AdamW learning rate of the head; 1e-3 for each 256 images of a batch")
    group.add_argument("--layer-decay", type=float, default=0.75, help="factor of the learning rate from each block to the one below")
    group.add_argument("--weight-decay", type=float, default=0.05, help="AdamW decay of everything but biases and norms")
    group.add_argument("--drop-path", type=float, default=0.1, help="how often the last block is skipped (ViT)")
    group.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    group.add_argument("--mixup", type=float, default=0.8, help="mixup's alpha; 0: none")
    group.add_argument("--cutmix", type=float, default=1.0, help="cutmix's alpha; 0: none")
    group = parser.add_argument_group("run")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    group.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast of the encoder; by default on GPUs only")
    group.add_argument("--workers", type=int, help="processes that load images; by default as in training")
    options = parser.parse_args(argv)
    for name in "layers image_size epochs steps batch_size lr layer_decay".split():
        if getattr(options, name) is not None and not getattr(options, name) > 0:
            sys.exit(f"probe.py: --{name.replace('_', '-')} {getattr(options, name)} must be above 0")
    if min(options.shots, default=1) < 1:
        sys.exit(f"probe.py: --shots {min(options.shots)} must be at least 1")
    if not 0 <= options.drop_path < 1:
        sys.exit(f"probe.py: --drop-path {options.drop_path} must be from 0 to below 1")
    if len(options.data or []) > 1 and (options.pca or options.nearest):
        sys.exit("probe.py: a picture is of one data set; give --data one")
    if (options.finetune or options.pca or options.export) and (options.pixels or options.pool != "avg" or options.layers > 1):
        sys.exit("probe.py: --pixels, --pool and --layers choose the features of k-NN, linear probe and --nearest; leave them out here")
    options.amp = options.device.startswith("cuda") if options.amp is None else options.amp
    options.lr = options.lr or 1e-3 * options.batch_size / 256
    options.schedule = "cosine"  # as learning_rate wants it
    return options


def main(argv=None):
    options = parse_args(argv)
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    try:
        device = torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"probe.py: --device {options.device}: {str(error).splitlines()[0]}")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1:
        # features travel as CPU tensors; the other ranks wait while rank 0 fits heads
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))

    # ---- encoder
    checkpoint = load_checkpoint(options.ckpt)
    args = checkpoint["args"]
    torch.manual_seed(args["seed"])
    encoder = build_encoder(args["model"], args["image_size"])
    is_vit = hasattr(encoder, "blocks")
    for asked, flag, missing in ((options.pool != "avg", f"--pool {options.pool}", "CLS token"), (options.layers > 1, "--layers", "blocks of one width"),
                                 (options.pca, "--pca", "patch tokens")):
        if asked and not is_vit:
            sys.exit(f"probe.py: {flag} needs a ViT and {args['model']} has no {missing}; leave it out")
    if is_vit and options.layers > len(encoder.blocks):
        sys.exit(f"probe.py: --layers {options.layers}, but {args['model']} has {len(encoder.blocks)} blocks")
    size = options.image_size or args["image_size"]
    if is_vit and size % encoder.patch_size:
        sys.exit(f"probe.py: --image-size {size} must be a multiple of {args['model']}'s patch size {encoder.patch_size}")
    if not options.untrained:
        encoder.load_state_dict(checkpoint["encoder"])  # strict: exactly these names and shapes
    encoder.to(device).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    who = "pixels" if options.pixels else f"{args['model']} (untrained)" if options.untrained else f"{args['model']} (step {checkpoint['step']})"
    options.workers = args["workers"] if options.workers is None else options.workers
    read_out = dict(pool=options.pool, layers=options.layers, workers=options.workers, amp=options.amp, folder=Path(options.ckpt).absolute().parent)
    if options.export and rank == 0:
        export(encoder, options.export)

    # ---- one data set after the other
    results = []
    for data in (options.data or [args["data"]]) if options.finetune or options.pca or options.nearest or not options.export else []:
        if local_rank:
            dist.barrier()  # the first process of each node downloads
        sources = [open_data(data, options.data_root or args["data_root"], split, args["seed"], size) for split in ("train", "val")]
        if world > 1 and not local_rank:
            dist.barrier()
        names = [list(getattr(source, "classes", [])) for source in sources]
        if names[0] != names[1]:
            odd = sorted(set(names[0]) ^ set(names[1]))
            sys.exit(f"probe.py: the training and validation splits of {data} have different classes, {odd[0]} is in one only; they must be the same")
        train_set, val_set = (Images(source, size) for source in sources)
        result = {"ckpt": options.ckpt, "data": data, "model": "pixels" if options.pixels else args["model"], "image_size": size,
                  "pool": options.pool, "layers": options.layers, "untrained": options.untrained, "pixels": options.pixels,
                  "step": 0 if options.untrained or options.pixels else checkpoint["step"], "train": len(train_set), "val": len(val_set),
                  "seed": options.seed, "commit": commit(), "torch": torch.__version__}
        protocol = (f"{who} on {data}: {len(train_set):,} training, {len(val_set):,} validation images at {size} px, {options.pool} pooling, "
                    f"{options.layers} layer{'s' * (options.layers > 1)}, seed {options.seed}, commit {result['commit']}")
        queries = torch.linspace(0, len(val_set) - 1, 8).long().tolist()
        if options.pca and rank == 0:
            large = Images(sources[1], 4 * size)
            images = torch.cat([large[0, i][0] for i in queries]).to(device) / 255
            save_image(pca_picture(encoder, images, max(4 * size, 128)), options.pca)
            print(f"{options.pca}: 8 validation images at {4 * size} px, {who}, and the three principal components of their patch tokens")
        if options.finetune:
            path = Path(options.ckpt)
            path = path.with_name(f"{path.stem}.finetune{'-untrained' * options.untrained}-{Path(data).name}.pt")
            classes = len(names[0]) or int(max(label for _, label in sources[0])) + 1
            top1 = finetune(encoder, who, sources[0], sources[1], size, classes, options, path)
            if rank == 0:
                result |= {"finetune": round(top1, 2), **{name: getattr(options, name) for name in
                           "epochs steps batch_size lr layer_decay weight_decay drop_path smoothing mixup cutmix".split()}}
                print(f"fine-tuned {top1:.2f}%  |  {protocol}, {options.steps or f'{options.epochs} epochs'}{' steps' * bool(options.steps)} of "
                      f"{options.batch_size}, lr {options.lr:g}, layer decay {options.layer_decay}, weight decay {options.weight_decay}, drop path "
                      f"{options.drop_path}, smoothing {options.smoothing}, mixup {options.mixup}, cutmix {options.cutmix}; last step")
        if options.nearest or not (options.finetune or options.pca):
            model = None if options.pixels else encoder
            (train_x, train_y), (val_x, val_y) = (extract_features(model, part, **read_out) for part in (train_set, val_set))
        if options.nearest and rank == 0:
            save_image(nearest_picture(train_x, val_x, train_set, val_set, queries), options.nearest)
            print(f"{options.nearest}: 8 validation images and their 8 nearest training images by cosine, {who}; frame green: same class, red: another")
        frozen = not (options.finetune or options.pca or options.nearest)
        # a collective: the other ranks' images are rank 0's by now
        erank = effective_rank(val_x.float() if rank == 0 else val_x[:0].float()).item() if frozen else None
        if frozen and rank == 0:
            train_x = train_x.to(device) if train_x.numel() <= 2**31 else train_x
            train_y = train_y.to(train_x.device)
            try:
                knn = knn_probe(train_x, train_y, val_x, val_y, NEIGHBOURS)
                weight, bias, (rate, decay), held_out = train_linear(train_x, train_y, options.seed)
                few = {n: few_shot_probe(train_x, train_y, val_x, val_y, n) for n in options.shots}
            except ValueError as error:
                sys.exit(str(error))
            linear = score(weight, bias, val_x, val_y)[0]
            result |= {"knn": round(knn[NEIGHBOURS.index(20)], 2), "knn_k": {str(k): round(top1, 2) for k, top1 in zip(NEIGHBOURS, knn)},
                       "linear": round(linear, 2), "linear_lr": rate, "linear_decay": decay, "linear_held_out": round(held_out, 2),
                       "linear_heads": len(HEADS), "erank": round(erank, 2)}
            print(f"k-NN {result['knn']:.2f}% (k=20; {', '.join(f'k={k} {top1:.2f}' for k, top1 in zip(NEIGHBOURS, knn) if k != 20)})  |  "
                  f"{protocol}, cosine, temperature 0.07")
            print(f"linear {result['linear']:.2f}%  |  {protocol}, lr {rate:g} and weight decay {decay:g} chosen of {len(HEADS)} by a held-out tenth of the "
                  f"training images ({held_out:.2f}%)")
            for n, top1 in few.items():
                mean, std = np.mean(top1), np.std(top1, ddof=1)
                result.setdefault("shots", {})[str(n)] = [round(mean, 2), round(std, 2)]
                print(f"{n}-shot {mean:.2f} ± {std:.2f}%  |  {protocol}, linear, {n} a class, 5 draws, lr 1, weight decay 10 / images")
            print(f"effective rank {result['erank']:.1f} of {val_x.shape[1]}  |  {protocol}, validation images")
        if frozen or options.finetune:
            results.append(result)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items()), "the probe moved the frozen encoder"
    if rank == 0 and results:
        if len(results) > 1:
            columns = [c for c in ("knn", "linear", "finetune") if c in results[0]]
            print(f"{'data':24}" + "".join(f"{c:>10}" for c in columns))
            for result in results:
                print(f"{result['data'][-23:]:24}" + "".join(f"{result[c]:10.2f}" for c in columns))
        print(json.dumps(results if len(results) > 1 else results[0]))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
