"""What did the encoder learn? The numbers of an evaluation, from a checkpoint.

    python probe.py ckpt.pt                         # k-NN, linear, linear on four blocks
    python probe.py ckpt.pt --untrained             # before training: the floor of any claim
    python probe.py ckpt.pt --pool cls --layers 2   # CLS of two blocks: source B's authors read it
    python probe.py ckpt.pt --shots 1 10            # and linear with n labels a class
    python probe.py ckpt.pt --data dtd              # transfer to another data set
    python probe.py ckpt.pt --finetune              # all weights on the labels
    torchrun --nproc_per_node=8 probe.py ckpt.pt    # features, fine-tuning on all ranks

Features are extracted once, from resized, centre-cropped images. k-NN and linear are functions of
features and labels. All report top-1 in percent on the validation split, which takes no part in
fitting or choosing anything. N training, N' validation images, D features, C classes, H heads.
"""

import argparse
import copy
import json
import math
import os
import re
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import train
from model import build_encoder, image_features
from sigreg import effective_rank
from train import natural, positive, real

RATES, DECAYS = (0.1, 0.3, 1.0, 3.0), (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
HEADS = tuple((rate, decay) for rate in RATES for decay in DECAYS)  # of the linear heads


# ---------------------------------------------------------------------------------------- features
def read_out(encoder, images, pool, layers):
    """Features (B, D) of images (B, 3, S, S) in [0, 1]."""
    images = data.normalize(images)
    tokens = encoder(images, layers=layers) if layers > 1 else encoder(images)
    if tokens.ndim == 3 and getattr(encoder, "num_prefix_tokens", 1) != 1:  # timm's name for it
        raise ValueError("probe.py: the first token must be CLS, the others patches, no registers")
    return image_features(tokens, pool)


@torch.no_grad()
def extract_features(encoder, images, pool="avg", layers=1, batch_size=64, workers=0, amp=False):
    """Features (N, D) float32 and labels (N,) int64 of all N images in order, on the CPU.

    encoder: images -> tokens (B, 1 + P, D) or features (B, D), in eval mode; images: data.Images;
    pool: avg, the mean of the patch tokens, or cls, the CLS token; layers: how many last blocks
    (ViT); amp: bfloat16 autocast. Under torchrun all ranks encode equally many images (the
    first ones fill the last share up); rank 0 returns all features, the others their own.
    """
    if encoder.training:
        raise ValueError("probe.py: the encoder is in training mode; call .eval() first")
    device = next(encoder.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    each = -(-len(images) // world)
    share = [(0, i % len(images)) for i in range(rank * each, (rank + 1) * each)]
    found = []
    for (views,), label in data.load(images, workers, device, batch_size=batch_size, sampler=share):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            x = read_out(encoder, views[:, 0].to(device) / 255, pool, layers)
        found.append((x.cpu(), label))
    found = [torch.cat(x) for x in zip(*found, strict=True)]
    for i, x in enumerate(found if world > 1 else ()):
        parts = [torch.empty_like(x) for _ in range(world)] if rank == 0 else None
        dist.gather(x, parts)
        found[i] = torch.cat(parts or [x])[: len(images)]
    return found


# -------------------------------------------------------------------------------- k-NN and linear
def check_finite(**features):
    """ValueError that names the features which are not finite."""
    for name, x in features.items():
        bad = (~x.isfinite().all(1)).sum().item()
        if bad:
            raise ValueError(f"probe.py: {bad} of {len(x)} rows of {name} are not finite")


@torch.no_grad()
def knn_probe(train_x, train_y, val_x, val_y, k=20, temperature=0.07):
    """The vote of the k nearest training images by cosine, each weighted exp(cosine / temperature).

    train_x (N, D), val_x (N', D) features, train_y (N,), val_y (N',) int64 labels (Wu et al. 2018).
    Exact, float32, on the device of train_x. Returns `knn`. ValueError for numbers not finite.
    """
    check_finite(train_x=train_x, val_x=val_x)
    device, classes, right = train_x.device, int(train_y.max()) + 1, 0
    train_x = F.normalize(train_x.float(), dim=1)
    chunk = max(2**26 // len(train_x), 1)
    for x, y in zip(val_x.split(chunk), val_y.to(device).split(chunk), strict=True):
        cosine = F.normalize(x.to(train_x), dim=1) @ train_x.T
        cosine, nearest = cosine.topk(min(k, len(train_x)), dim=1)
        votes = cosine.new_zeros(len(x), classes)
        votes.scatter_add_(1, train_y[nearest], (cosine / temperature).exp())
        right += (votes.argmax(1) == y).sum().item()
    how = f"k = {min(k, len(train_x))}, cosine, temperature {temperature}"
    return {"knn": round(100 * right / len(val_y), 2), "knn_how": how}


@torch.no_grad()
def fit_heads(x, y, heads=HEADS, seed=0, rows=None):
    """Linear classifiers of x (N, D), y (N,), for H (learning rate, weight decay) at once.

        min over W, b of  mean cross-entropy(standardised x W + b, y) + decay / 2 |W|^2

    by SGD (batch 1024, gradients averaged with 0.9 as momentum, cosine rate, 10 passes and at least
    400 steps) in principal axes scaled to variance 1 (+ 0.001, for axes that hold nothing). There
    the problem is well conditioned, and 10 passes do what takes hundreds on standardised features.
    The penalty is on W, and its step is implicit, so any decay is stable. rows: which images
    to fit. Returns weight (D, H, C) and bias (H, C), which act on x as it is, on its device.
    """
    rows = torch.arange(len(x)) if rows is None else rows.cpu()
    n, classes, count, device = len(rows), int(y.max()) + 1, len(heads), x.device
    z = torch.ones(n, x.shape[1] + 1, device=device)  # the last column is the bias's
    for part, some in zip(z.split(2**12), rows.split(2**12), strict=True):  # the only copy of x
        part[:, :-1] = x[some]
    std, mean = torch.std_mean(z[:, :-1], 0, correction=0)
    std = std.clamp_min(1e-6)
    parts = [part[:, :-1].sub_(mean).div_(std) for part in z.split(2**12)]
    correlation = sum((part.T @ part).double() for part in parts) / n
    variance, axes = torch.linalg.eigh(correlation)
    variance = variance.clamp_min(0) + 1e-3
    turn = axes / variance.sqrt()
    for part in parts:
        part.copy_(part @ turn.float())
    # W = turn @ weight, so |W|^2 is the sum of weight^2 / variance over the axes
    shrink = F.pad(1 / variance, (0, 1)).float()[:, None, None]  # 0 for the bias: no decay
    rate, decay = torch.tensor(heads, device=device).T[..., None]  # (H, 1) each
    weight = torch.zeros(z.shape[1], count, classes, device=device)
    momentum = torch.zeros_like(weight)
    batch = min(1024, n)
    steps = max(10 * (n // batch), 400)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        at = step % (n // batch) * batch
        if at == 0:
            order = torch.randperm(n, generator=generator)
        now = order[at : at + batch]
        logits = (z[now] @ weight.flatten(1)).view(batch, count, classes)
        error = logits.softmax(-1)  # less the one-hot labels, the gradient of the logits
        error -= F.one_hot(y[rows[now]], classes)[:, None]
        momentum.lerp_((z[now].T @ error.flatten(1) / batch).view_as(weight), 0.1)
        pace = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        weight.sub_(pace * momentum).div_(1 + pace * decay * shrink)
    weight, bias = weight[:-1].double(), weight[-1].double()
    weight = (turn / std[:, None]) @ weight.flatten(1)  # (D, H C), on the features as they came
    bias = bias - (mean.double() @ weight).view_as(bias)
    return weight.view(-1, count, classes).float(), bias.float()


@torch.no_grad()
def score(weight, bias, x, y):
    """Top-1 in percent of H heads: weight (D, H, C), bias (H, C), x (N, D), y (N,) -> list of H."""
    right = torch.zeros(len(bias), dtype=torch.int64, device=weight.device)
    for part, label in zip(x.split(4096), y.to(weight.device).split(4096), strict=True):
        logits = torch.addmm(bias.flatten(), part.to(weight), weight.flatten(1))
        right += (logits.view(-1, *bias.shape).argmax(-1) == label[:, None]).sum(0)
    return (100 * right.double() / len(y)).tolist()


def linear_probe(train_x, train_y, val_x, val_y, seed=0, heads=HEADS):
    """A linear classifier of frozen features; learning rate and weight decay chosen without val.

    All heads are fitted to nine tenths of the training images; the best on the held-out tenth
    (drawn by the seed, class by class) is fitted again to everything. Validation labels are only
    compared with predictions. Shapes and errors as in knn_probe; ValueError if no class has two
    images. Of rates and decays that tie, as they do where few images are held out, the middle one.
    """
    check_finite(train_x=train_x, val_x=val_x)
    if train_y.bincount().max() < 2:
        raise ValueError("probe.py: one training image a class; the linear probe needs two")
    order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(seed))
    order = order[train_y.cpu()[order].argsort(stable=True)]
    held = order[::10]
    rest = order[torch.arange(len(order)) % 10 > 0].sort().values
    top1 = score(*fit_heads(train_x, train_y, heads, seed, rest), train_x[held], train_y[held])
    ties = [i for i, value in enumerate(top1) if value == max(top1)]
    best = ties[len(ties) // 2]
    weight, bias = fit_heads(train_x, train_y, [heads[best]], seed)
    (rate, decay), held_out = heads[best], round(top1[best], 2)
    how = f"lr {rate:g}, weight decay {decay:g}: best of {len(heads)} on {len(held):,} held out"
    result = {"linear": round(score(weight, bias, val_x, val_y)[0], 2), "linear_how": how}
    return result | {"linear_lr": rate, "linear_decay": decay, "linear_held_out": held_out}


def few_shot_probe(train_x, train_y, val_x, val_y, shots, seed=0, draws=3):
    """A linear classifier of `shots` training images a class: the mean over some draws of them.

    So few images leave none to choose by: rate 1 and weight decay 10 / (number of images) always.
    Shapes as in knn_probe. ValueError where a class has fewer images.
    """
    top1, order = [], torch.Generator().manual_seed(seed)
    for _ in range(draws):
        rows = torch.randperm(len(train_y), generator=order)
        labels = train_y.cpu()[rows]
        rows = torch.cat([rows[labels == c][:shots] for c in range(int(labels.max()) + 1)])
        if len(rows) < shots * (int(labels.max()) + 1):
            raise ValueError(f"probe.py: --shots {shots}, but a class has fewer training images")
        head = fit_heads(train_x, train_y, [(1.0, 10 / len(rows))], seed, rows)
        top1 += score(*head, val_x, val_y)
    name, spread = f"{shots}-shot", max(top1) - min(top1)
    how = f"mean of {draws} draws, {spread:.2f} apart; linear, lr 1, weight decay 10 / images"
    return {name: round(sum(top1) / draws, 2), f"{name}_how": how}


def frozen_probes(encoder, train_set, val_set, options, device, rank):
    """Effective rank, k-NN and linear probe of frozen features, on rank 0; {} on the others."""
    settings = {name: getattr(options, name) for name in ("pool", "workers", "amp")}
    settings |= {"batch_size": min(64, options.batch_size), "layers": options.blocks}
    more = options.blocks > options.layers
    width = encoder.dim if more else None  # the last block's features come first
    numbers = len(train_set) * encoder.dim * options.blocks
    if numbers > 2**28 and rank == 0:  # features, and a copy in fit_heads
        print(f"probe.py: the linear probe will take {8 * numbers / 2**30:.0f} GiB", flush=True)
    train_x, train_y = extract_features(encoder, train_set, **settings)
    val_x, val_y = extract_features(encoder, val_set, **settings)
    mine = val_x[:0] if rank else val_x  # rank 0 has all images by now, so the others add none
    erank = effective_rank(mine[:, :width]).item()  # summed over ranks: all call it
    if rank:
        return {}
    if device.type == "cuda" and 12 * train_x.numel() < torch.cuda.mem_get_info()[0]:  # 2, and room
        train_x, train_y = train_x.to(device), train_y.to(device)
    last = train_x[:, :width], train_y, val_x[:, :width], val_y
    result = knn_probe(*last) | linear_probe(*last, seed=options.seed)
    for shots in options.shots:
        result |= few_shot_probe(*last, shots, options.seed)
    if more:
        four = linear_probe(train_x, train_y, val_x, val_y, seed=options.seed)
        result |= {name.replace("linear", "linear4"): value for name, value in four.items()}
        result["linear4_how"] = f"last {options.blocks} blocks; {four['linear_how']}"
    how = f"of {last[0].shape[1]}: effective rank of the validation features"
    return result | {"erank": round(erank, 2), "erank_how": how, "classes": int(train_y.max()) + 1}


# ------------------------------------------------------------------------------------- fine-tuning
def layer_groups(encoder, head, decay, weight_decay):
    """AdamW's parameter groups, one per tensor, with `scale`: decay for each layer below the head.

    Layer 0 comes before a ViT's first block, then each block is one; the last norm is the head's.
    Matrices alone decay.
    """
    groups, top = [], len(getattr(encoder, "blocks", ())) + 1
    for name, p in [*encoder.named_parameters(), *head.named_parameters()]:
        block = re.match(r"blocks\.(\d+)\.", name)
        first = re.match("patch_embed|cls_token|pos_embed", name)
        layer = int(block[1]) + 1 if block else 0 if first else top
        matrix = name.endswith("weight") and p.ndim >= 2
        group = {"params": [p], "scale": decay ** (top - layer)}
        groups.append(group | {"weight_decay": weight_decay * matrix})
    return groups


class Classifier(torch.nn.Module):
    """The encoder and a linear head, zero at the start: images (B, 3, S, S) -> logits (B, C)."""

    def __init__(self, encoder, classes, pool):
        super().__init__()
        self.pool = pool
        self.encoder, self.head = encoder, torch.nn.Linear(encoder.dim, classes)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, images):
        return self.head(image_features(self.encoder(images), self.pool))


def finetune(encoder, train_set, val_set, size, options, device):
    """All weights of a copy of the encoder and a new linear head, trained on the labels.

    AdamW; each block below the head multiplies the rate by --layer-decay. The rate warms up for a
    twentieth of the steps, then falls as half a cosine. Random crops, flips; smoothed labels. Ranks
    split the batch. Returns `finetune`, top-1 of the last step; ranks above 0 score their part.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    classes = len(getattr(train_set, "classes", ())) or max(label for _, label in train_set) + 1
    batch = min(options.batch_size, len(train_set)) // world * world
    if not batch:
        raise ValueError("probe.py: --finetune needs an image for each rank")
    total = options.steps or options.epochs * (len(train_set) // batch)
    lr = 1e-3 * batch / 256 if options.lr is None else options.lr
    net = Classifier(copy.deepcopy(encoder).requires_grad_(True), classes, options.pool)
    net.to(device).train()
    groups = layer_groups(net.encoder, net.head, options.layer_decay, options.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr, fused=device.type == "cuda")
    rows = torch.arange(batch).tensor_split(world)[rank]
    keys = data.batch_keys(len(train_set), batch, 0, total, options.seed, rows)
    crops = data.Images(train_set, size, [(1, size, 0.35, 1)], options.seed)
    loader = data.load(crops, options.workers, device, batch_sampler=keys)
    classify = train.parallel(net, device)
    for step, ((views,), labels) in enumerate(loader, 1):
        torch.manual_seed(data.seed_of("network", options.seed, step, rank))  # stochastic depth
        images, labels = (x.to(device, non_blocking=True) for x in (views[:, 0], labels))
        with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
            logits = classify(data.normalize(images / 255)).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=options.smoothing)
        rate = train.learning_rate(step, total, lr, 0.05 * total, "cosine")
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 50 == 0 or step == total):
            print(f"fine-tuning {step}/{total}  loss {loss.item():.4f}", flush=True)
    if not all(p.isfinite().all() for p in net.parameters()):
        sys.exit("probe.py: fine-tuning became non-finite; lower --lr")
    settings = {"workers": options.workers, "amp": options.amp, "pool": options.pool}
    x, y = extract_features(net.encoder.eval(), data.Images(val_set, size), **settings)
    top1 = score(net.head.weight.T[:, None], net.head.bias[None], x, y)[0]
    used = {"lr": lr, "batch": batch, "steps": total, "classes": classes}
    used |= {name: getattr(options, name) for name in ("smoothing", "layer_decay", "weight_decay")}
    how = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in used.items())
    return {"finetune": round(top1, 2), **used, "finetune_how": f"last step; {how}"}


# ------------------------------------------------------------------------------ command line, main
def parse_args(argv=None):
    parser = train.Parser(prog="probe.py")
    add = parser.add_argument_group("what is probed").add_argument
    add("ckpt", help="a checkpoint of train.py")
    add("--data", help="a data set as in train.py [the checkpoint's]")
    add("--data-root", help="where torchvision's data sets are [as in training]")
    add("--image-size", type=positive, help="pixels [as in training]")
    add("--untrained", action="store_true", help="the encoder as train.py's seed initialises it")
    add("--student", action="store_true", help="the online encoder, where there is a teacher")
    add("--pool", choices=["avg", "cls"], help="mean patch token, or CLS [as in training: avg]")
    add("--layers", type=positive, help="a ViT's last blocks side by side [1, and linear4: 4]")
    add("--shots", type=positive, nargs="+", default=[], help="also linear with n labels a class")
    add("--seed", type=natural, default=0, help="of what is held out or drawn, and its order [0]")
    add("--finetune", action="store_true", help="all weights; with --untrained, from scratch")
    add = parser.add_argument_group("fine-tuning").add_argument
    add("--epochs", type=positive, default=20, help="passes over the training split [20]")
    add("--steps", type=positive, help="stop after so many steps, whatever --epochs says")
    add("--lr", type=real, help="AdamW's, of the head [1e-3 for each 256 images of a batch]")
    add("--layer-decay", type=real, default=0.75, help="rate's factor per block below head [0.75]")
    add("--weight-decay", type=real, default=0.05, help="AdamW's, not of biases and norms [0.05]")
    add("--smoothing", type=real, default=0.1, help="of the labels [0.1]")
    add = parser.add_argument_group("run").add_argument
    size = "images at once: of a fine-tuning step over all ranks; of features, at most 64 [256]"
    add("--batch-size", type=positive, default=256, help=size)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 of the encoder [on GPUs]")
    add("--workers", type=natural, help="processes that load images [as in training]")
    options = parser.parse_args(argv)
    if options.finetune and (options.pool or options.layers or options.shots):
        sys.exit("probe.py: --finetune does not take --pool, --layers, --shots: leave them out")
    tuning = "epochs steps lr layer_decay weight_decay smoothing"
    for name in () if options.finetune else tuning.split():
        if getattr(options, name) != parser.get_default(name):
            sys.exit(f"probe.py: --{name.replace('_', '-')} goes with --finetune; add that")
    if options.lr == 0 or options.layer_decay == 0 or options.smoothing >= 1:
        sys.exit("probe.py: --lr and --layer-decay must be above 0, --smoothing below 1")
    options.amp = options.device.startswith("cuda") if options.amp is None else options.amp
    return options


def load_encoder(options, checkpoint):
    """The encoder of the checkpoint, or as it was before training; exits if a flag does not fit."""
    args, name = checkpoint["args"], checkpoint["args"]["model"]
    torch.manual_seed(args["seed"])
    encoder = build_encoder(name, args["image_size"])
    is_vit = hasattr(encoder, "blocks")
    # by default both readouts from one pass: source A's, the last block, and I-JEPA's, four
    default = is_vit and not (options.layers or options.pool)
    trained = args.get("pool", "avg")
    options.pool, options.layers = options.pool or trained, options.layers or 1
    if args["recipe"] == "crops" and is_vit and options.pool != trained:
        other = f"--pool {options.pool} had no gradient in training; leave it out"
        sys.exit(f"probe.py: {options.ckpt} was trained with --pool {trained}: {other}")
    options.layer_decay = options.layer_decay if is_vit else 1.0  # no other encoder has layers
    options.blocks = min(4, len(encoder.blocks)) if default else options.layers
    if not is_vit and (options.pool == "cls" or options.layers > 1):
        sys.exit(f"probe.py: --pool cls, --layers need a ViT's tokens; leave them out for {name}")
    if is_vit and options.layers > len(encoder.blocks):
        sys.exit(f"probe.py: --layers {options.layers}: {name} has {len(encoder.blocks)} blocks")
    if options.student and "teacher" not in checkpoint:
        sys.exit(f"probe.py: --student: {options.ckpt} has no teacher; leave it out")
    own = options.student or options.untrained or "teacher" not in checkpoint
    options.part = "encoder" if own else "teacher"
    if not options.untrained:
        encoder.load_state_dict(checkpoint[options.part])  # strict: exactly these names and shapes
    return encoder


def open_splits(name, root, seed):
    """Training and validation split of one data set, of other files, with the same classes."""
    sources = [data.open_data(name, root, split, seed) for split in ("train", "val")]
    one, two = (set(getattr(source, "classes", ())) for source in sources)
    if len(one) == 1:
        sys.exit(f"probe.py: {name} has only one class; the probes need two or more")
    if one != two:
        sys.exit(f"probe.py: class {min(one ^ two)!a} is in only one of the splits of {name}")
    files = [getattr(source, "samples", ()) for source in sources]
    folders = [{(label, os.path.dirname(path)) for path, label in found} for found in files]
    one, two = ({os.path.realpath(folder) for _, folder in found} for found in folders)
    if one & two:
        sys.exit(f"probe.py: train and val of {name} are the same files; split them")
    if len({label for label, _ in folders[0]}) < len(folders[0]):  # one below a class is usual
        sys.exit(f"probe.py: classes of {name} have several folders each; which are the classes?")
    return sources


def show(about, result, options):
    """The header, with what all numbers share, and a line for each number."""
    features = "mean patch token" if options.pool == "avg" else "CLS"
    if options.pool == "cls" and about["recipe"] == "masked":
        features += " (in training seen by the predictor alone)"
    blocks = "last block" if options.layers == 1 else f"last {options.layers} blocks"
    counts = f"{about['train']:,} training, {about['val']:,} validation images"
    precision = "bfloat16" if options.amp else "float32"
    name = about["model"] if options.part == "encoder" else f"teacher of {about['model']}"
    features = f"{features}, {blocks}" if about["model"].startswith("vit") else "pooled features"
    print(f"{name} (step {about['step']}) on {options.data}, {result['classes']} classes", end=", ")
    print(f"{counts} at {options.image_size} px; {features}, {precision}")
    for name in [name for name in result if f"{name}_how" in result]:
        print(f"  {name:10}{result[name]:8.2f}   {result[f'{name}_how']}")


def main(argv=None):
    options = parse_args(argv)
    with train.ranks("probe.py", options.device) as (device, rank, _):
        checkpoint = train.load_checkpoint(options.ckpt)
        args, names = checkpoint["args"], ("data", "image_size", "data_root", "workers")
        vars(options).update({n: args[n] for n in names if getattr(options, n) is None})
        encoder = load_encoder(options, checkpoint).to(device).eval().requires_grad_(False)
        sources = open_splits(options.data, options.data_root, args["seed"])
        if options.finetune:
            result = finetune(encoder, *sources, options.image_size, options, device)
        else:
            images = [data.Images(source, options.image_size) for source in sources]
            result = frozen_probes(encoder, *images, options, device, rank)
        if rank == 0:
            about = {"ckpt": options.ckpt, "step": 0 if options.untrained else checkpoint["step"]}
            about |= {name: args[name] for name in ("recipe", "model")}
            names = "data image_size part pool layers untrained amp seed"
            about |= {name: getattr(options, name) for name in names.split()}
            about |= {"train": len(sources[0]), "val": len(sources[1]), "torch": torch.__version__}
            show(about, result, options)
            print(json.dumps(about | {k: v for k, v in result.items() if not k.endswith("_how")}))


if __name__ == "__main__":
    main()
