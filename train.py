"""Train LeJEPA: one encoder, one loss, prediction + SIGReg; no teacher, no stop-gradient.

    python train.py                                         # embedded `shapes`: 1 to 2 minutes
    python train.py --data cifar10                          # torchvision's, downloaded at first use
    python train.py --data /data/photos                     # train/<class>/ and val/<class>/
    python train.py --data cifar10 --recipe crops --model resnet18                      # source B
    torchrun --nproc_per_node=8 train.py --data /data/imagenet --model vit_b16          # 8 GPUs

--recipe masked (A): encode a context and target blocks of the image, predict the targets' patches.
--recipe crops (B): encode global and local crops, project, draw all to the mean of the global ones.

The algorithm comes first: draw -> forward -> loss, and the loop, common to both recipes; then data,
checkpoint, defaults and command line. The same command again continues from its checkpoint. Beside
ckpt.pt, ckpt.jsonl holds the command line, then one JSON object a logged step.

Everything random is a pure function of the seed and of the step, epoch or image number: a resumed
run repeats the uninterrupted one, and the number of ranks changes rounding only. The batch, its
masks and SIGReg's statistic are global; batch norm's is on GPUs only, as torch has it, and the
stochastic depth of some of torchvision's networks is drawn by each rank.
B is the number of images of this rank's share of the batch; README explains the other symbols.
"""

import argparse
import copy
import datetime
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision import datasets, models
from torchvision.transforms import v2

import sigreg
from masks import multi_block_masks, random_masks
from model import MLPPredictor, TransformerPredictor, gather_tokens, projector, vit


# ------------------------------------------------------------ the algorithm: draw, forward, loss
def draw(batch, seed, share, batch_size, crop, recolor, crops=(), make_masks=None, colors=None):
    """Views and masks of a step: a pure function of `seed` and of the images.

    batch: a list of uint8, what the loader gives of B images: global crops (B, G, 3, S, S), then
    local ones (B, L, 3, s, s) if any; or small images as they are, (B, 3, H, W), with crops:
    (count, size, least and most share of the image) of each kind to take. share (B,): which of the
    batch_size images of the global batch they are. crop, recolor: resized_crop and photometric,
    compiled or not. make_masks: generator -> (context, targets), for the global batch or one for
    all images; colors: (p of blur, p of solarize), or None. Every rank draws for the whole batch
    and takes its share: any number of ranks sees the same. Returns

    views: G + L of (B, 3, size, size), normalised; with masks, one for context, one for targets;
    masks: context (B, Nc) and targets (B, K, Nt), or None.
    """
    device, generator = batch[0].device, torch.Generator().manual_seed(seed)
    views, masks = [], None
    images = [part / 255 for part in batch]
    for count, size, *scale in crops:
        draws = torch.rand(count, batch_size, 23, generator=generator)[:, share]
        views += [crop(images[0], send(u, device), size, scale) for u in draws]
    views = views or [view for part in images for view in part.unbind(1)]
    if make_masks:
        masks = [send(m[share % len(m)], device) for m in make_masks(generator=generator)]
        views = [*views, *views]
    if colors:
        draws = send(torch.rand(len(views), batch_size, 9, generator=generator)[:, share], device)
        more = constant("luma", device), constant("hue", device), *colors
        views = [recolor(view, u, *more) for view, u in zip(views, draws, strict=True)]
    return [normalize(view) for view in views], masks


def send(x, device):
    """x on the device; to a GPU from pinned memory, which does not wait for what runs there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def masked_forward(encode, encode_target, predict, whole, both, views, masks):
    """Source A: encode the context, encode the targets, predict the targets from the context.

    views: two of (B, 3, S, S), one crop of each image, in colours of its own where colours change.
    encode_target: the same encoder, with its gradient; --stop-grad and --ema change that. whole:
    targets are patches of the encoded whole image, normalised, as I-JEPA has it. both: predict the
    context from each target, too. Returns what masked_loss sees.
    """
    context, targets = masks
    z_context = encode(views[0], context)  # (B, 1 + Nc, D)
    if whole:
        z = encode_target(views[1])  # (B, 1 + P, D)
        patches = gather_tokens(F.layer_norm(z[:, 1:], z.shape[2:]), targets)  # (B, K, Nt, D)
        z_target = torch.cat([z[:, None, :1].expand_as(patches[:, :, :1]), patches], dim=2)
    else:
        z_target = encode_target(views[1], targets)  # (B, K, 1 + Nt, D)
    z_pred = predict(z_context, context, targets)  # (B, K, Nt, D)
    if not both:
        return z_context, z_target, z_pred
    asked = context[:, None].expand(-1, targets.shape[1], -1)  # of each target: the context
    z_back = predict(z_target.flatten(0, 1), targets.flatten(0, 1), asked.flatten(0, 1)[:, None])
    return z_context, z_target, z_pred, z_back[:, 0].unflatten(0, asked.shape[:2])  # (B, K, Nc, D)


def crops_forward(encode, num_global, views, masks):
    """Source B: encode the num_global crops and the local ones, V in all: y (B, V, width)."""
    sizes = [crops for crops in (views[:num_global], views[num_global:]) if crops]
    y = torch.cat([embed(encode(torch.cat(crops))) for crops in sizes])  # (V B, width)
    return (y.unflatten(0, (len(views), -1)).transpose(0, 1),)


def crops_loss(y, project, num_global, lam, regularizer):
    """Source B: project y (B, V, width), what follows is sigreg.multi_view_loss of z (V, B, D).

    The projector sees all images at once, as its batch norm wants.
    """
    z = project(y.transpose(0, 1).flatten(0, 1)).unflatten(0, (y.shape[1], -1))
    return sigreg.multi_view_loss(z, num_global, lam, regularizer)


def make_regularizer(name, slices, seed):
    """SIGReg of one step as a function (N, D) -> scalar; the sketched one draws its slices anew."""
    if name == "none":
        return lambda z: z.new_zeros(())
    if name != "sketched":
        return {"spectral": sigreg.spectral_sigreg, "legendre": sigreg.legendre_sigreg}[name]
    slices_of = cache(lambda dim, device: send(sigreg.random_directions(dim, slices, seed), device))
    return lambda z: sigreg.sketched_sigreg(z, slices_of(z.shape[1], z.device))


def learning_rate(step, last, lr, warmup=0, schedule="constant"):
    """Rate of step 1 .. last: lr, a linear rise over `warmup` steps, then `schedule`."""
    rise = min(step / warmup, 1) if warmup else 1
    progress = max(step - warmup, 0) / max(last - warmup, 1)
    return lr * rise * (0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1)


def set_rates(optimizer, args, step, last, warmup):
    """The step's learning rate, and weight decay on its way along half a cosine to --wd-end."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, last, args.lr, warmup, args.schedule)
    if args.wd_end is not None:  # of the matrices: see build
        fall = learning_rate(step, last, args.weight_decay - args.wd_end, 0, "cosine")
        optimizer.param_groups[1]["weight_decay"] = args.wd_end + fall


def masks_of(args, grid, count):
    """The masks that the flags ask for, `count` of them, as a function of the generator."""
    make = {"blocks": multi_block_masks, "random": random_masks}[args.masks]
    return partial(make, count, grid, args.num_targets, args.target_scale, args.min_context)


def recipe(args, crops, encoder, teacher, encode, predict, device):
    """By --recipe: what draw takes, forward: (views, masks) -> embeddings, and their loss.

    encode, predict: encoder and predictor (masked) or projector (crops), as parallel made them.
    """
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.amp)
    settings = {"batch_size": args.batch_size, "crops": crops}
    for name, change in (("crop", resized_crop), ("recolor", photometric)):
        settings[name] = torch.compile(change, dynamic=False) if args.compile else change
    if args.augment == "color":  # blur and solarize with p 0.5 and 0.2 for crops, none for masked
        settings["colors"] = (0.5, 0.2) if args.recipe == "crops" else (0, 0)
    if args.recipe == "crops":
        forward = partial(crops_forward, encode, args.global_views)
        project, views = autocast(lambda y: predict(y)), args.global_views
        loss = partial(crops_loss, project=project, num_global=views, lam=args.lam)
    else:
        count = args.batch_size if args.masks_per == "image" else 1
        settings["make_masks"] = masks_of(args, encoder.grid, count)
        encode_target, relative = encode, args.pred == "relative"
        if teacher or args.stop_grad:  # past DDP: no gradient; a lambda, as no_grad copies names
            encode_target = torch.no_grad()(lambda *inputs: (teacher or encoder)(*inputs))
        whole, both = args.targets == "full", args.directions == "both"
        forward = partial(masked_forward, encode, encode_target, predict, whole, both)
        loss = partial(sigreg.masked_loss, lam=args.lam, relative=relative, on=args.sigreg_on)
    return settings, autocast(forward), loss


@torch.no_grad()
def diagnostics(args, loss, pred, reg, embeddings):
    """What is logged: losses; effective rank, std of sigreg.pool or of the global crops' features
    over all ranks, which must all call it; on GPUs the peak memory."""
    if args.recipe == "masked":
        pooled = sigreg.pool(*embeddings[:2])  # (B, D)
    else:
        pooled = embeddings[0][:, : args.global_views].flatten(0, 1)  # (B G, width)
    erank, std = sigreg.effective_rank(pooled), sigreg.embedding_std(pooled)
    row = {"loss": loss, "pred": pred, args.sigreg: reg, "erank": erank, "std": std}
    peak = {"gb": torch.cuda.max_memory_allocated() / 2**30} if pooled.is_cuda else {}
    return {name: value.item() for name, value in row.items()} | peak


# ------------------------------------------------ draw and forward, `--micro-batch` images at once
#
# SIGReg is a statistic of all images: gradients added up over parts of the batch are those of
# another loss. Exactly, in two passes: the first, without graph, collects the embeddings; their
# loss gives their gradients; the second repeats each piece and sends these through it. A piece is a
# call of draw for some of the images, and costs nothing until it is made.


def first_pass(forward, pieces, coins):
    """The embeddings of all pieces together; of several, without graph, as leaves."""
    alone, parts = len(pieces) == 1, []
    for i, piece in enumerate(pieces):
        torch.manual_seed(coins + i)
        with torch.set_grad_enabled(alone):
            parts.append(forward(*piece()))
    several = zip(*parts, strict=True)
    return parts[0] if alone else [torch.cat(part).requires_grad_() for part in several]


def second_pass(forward, pieces, coins, gradients, modules):
    """Repeats the pieces, back-propagates the embeddings' gradients; ranks reduce in the last."""
    start = 0
    for i, piece in enumerate(pieces):
        torch.manual_seed(coins + i)
        for module in modules:
            module.require_backward_grad_sync = i + 1 == len(pieces)  # DDP's, what no_sync sets
        parts = forward(*piece())
        rows = slice(start, start + len(parts[0]))
        both = zip(parts, gradients, strict=True)  # less targets without gradient, what no loss saw
        pairs = [(y, slope[rows]) for y, slope in both if y.requires_grad and slope is not None]
        embeddings, slopes = zip(*pairs, strict=True)
        torch.autograd.backward(embeddings, slopes)
        start = rows.stop


# ---------------------------------------------------------------------------------------- the loop
def train(args, train_set, device, rank, world):
    """The loop: draw -> forward -> loss -> step -> log -> save, from the checkpoint's step on."""
    state = build(args, device)
    encoder, predictor, optimizer, teacher = (state.get(name) for name in (*PARTS, "teacher"))
    per_epoch = len(train_set) // args.batch_size
    last, warmup = args.steps or args.epochs * per_epoch, args.warmup_epochs * per_epoch
    first = resume("train.py", Path(args.ckpt), state, vars(args), last, rank, world)
    if first >= last:
        return
    share = torch.arange(args.batch_size).tensor_split(world)[rank]
    loader, crops = load(args, train_set, first, last, share, device)
    count = number_of_pieces(args, encoder, device, world)
    modules = [parallel(m, args, device, world) for m in (encoder, predictor)]
    settings, forward, loss_of = recipe(args, crops, encoder, teacher, *modules, device)
    logs, pool = start_log(args, first) if rank == 0 else (), ThreadPoolExecutor(1)
    caught, follow = catch_signals(world), get_ema_multi_avg_fn(args.ema)
    healthy, saving = torch.ones((), dtype=torch.bool, device=device), None
    logged, start, waited, ready = first, time.perf_counter(), 0.0, time.perf_counter()
    for step, batch in enumerate(loader, first + 1):
        waited += time.perf_counter() - ready
        seed = args.seed * 100_003 + step
        parts = zip(*(x.tensor_split(count) for x in (share, *batch)), strict=True)
        pieces = [partial(draw, part, seed, some, **settings) for some, *part in parts]
        coins = (seed * world + rank) * 1000  # of stochastic depth, the same in both passes
        embeddings = first_pass(forward, pieces, coins)
        regularizer = make_regularizer(args.sigreg, args.slices, seed)
        loss, pred, reg = loss_of(*embeddings, regularizer=regularizer)
        loss.backward()
        loss, pred, reg = loss.detach(), pred.detach(), reg.detach()  # lets the graph go
        log_now = step % args.log_every == 0 or step == last
        measured = diagnostics(args, loss, pred, reg, embeddings) if log_now else {}
        if len(pieces) > 1:
            embeddings = [z.grad for z in embeddings]  # all that the second pass needs
            second_pass(forward, pieces, coins, embeddings, modules)
        set_rates(optimizer, args, step, last, warmup)
        optimizer.step()
        optimizer.zero_grad()
        if teacher:
            follow(list(teacher.parameters()), list(encoder.parameters()), None)
        healthy &= loss.isfinite()  # read only where the GPU is waited for anyway
        stop_now = caught()
        save_now = step % args.save_every == 0 or step == last or stop_now
        if log_now or save_now:
            check_health(healthy, encoder, predictor, step, args.ckpt)
        if log_now and rank == 0:
            row = {"step": step, "epoch": (step - 1) // per_epoch, **measured}
            seconds = time.perf_counter() - start
            row["lr"], row["wait"] = optimizer.param_groups[0]["lr"], round(waited / seconds, 3)
            row["images_per_s"] = round((step - logged) * args.batch_size / seconds, 3)
            write_log(args, row, last, *logs)
            logged, start, waited = step, time.perf_counter(), 0.0
        if save_now and rank == 0:
            saving = store(saving, pool, state, {"step": step, "args": vars(args)})
        if stop_now:
            break
        ready = time.perf_counter()
    if rank == 0:
        saving.result()
        then = "the same command continues" if stop_now else f"next: python probe.py {args.ckpt}"
        print(f"train.py: step {step} of {last}, saved; {then}")


# ------------------------------------------------------- what the loop is made of, and its log
# torchvision's families whose classifiers take any image size, (B, classes) out
BACKBONES = "convnext|densenet|efficientnet|mnasnet|mobilenet|regnet|resne|shufflenet|swin|vgg"


def build_encoder(name, image_size):
    """model.vit, or a torchvision classifier without its last layer, its feature width as .dim.

    ResNets for images up to 64 px get the usual small stem: 3 x 3, stride 1, no max-pooling.
    ValueError for other names.
    """
    if name not in models.list_models(module=models):
        return vit(name, image_size)
    if not re.search(BACKBONES, name):  # resne: resnext and wide_resnet, too
        raise ValueError(f"train.py: {name} cannot be a backbone; these can: {BACKBONES}")
    encoder = models.get_model(name)
    linear = [(p, m) for p, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)]
    path, classifier = linear[-1]
    encoder.set_submodule(path, torch.nn.Identity())
    encoder.dim = classifier.in_features
    if isinstance(encoder, models.ResNet) and image_size <= 64:
        encoder.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        encoder.maxpool = torch.nn.Identity()
    return encoder


def embed(features):
    """What is probed: the mean patch token of tokens (B, 1 + P, D); features (B, D) as they are."""
    features = sigreg.wide(features)
    return features[:, 1:].mean(1) if features.ndim == 3 else features


def build(args, device):
    """By name: encoder, predictor or projector, AdamW that decays matrices, teacher or none."""
    torch.manual_seed(args.seed)
    encoder = build_encoder(args.model, args.image_size)
    if args.recipe == "crops":
        if args.local_size % getattr(encoder, "patch_size", 1):
            wanted = f"a multiple of the patch of {args.model}"
            raise ValueError(f"train.py: --local-size {args.local_size} must be {wanted}")
        predictor = projector(encoder.dim, args.proj_dim)  # kept under the predictor's name
    elif not hasattr(encoder, "grid"):
        has_none = f"{args.model} has none; take a vit_{{n,t,s,b,l,h}}{{patch}}"
        raise ValueError(f"train.py: patch tokens: {has_none} or --recipe crops")
    else:
        masks_of(args, encoder.grid, 1)()  # ValueError where the settings are impossible
        make = {"mlp": MLPPredictor, "transformer": TransformerPredictor}[args.predictor]
        predictor = make(encoder.dim, encoder.grid**2, args.predictor_size)
    on_gpu, groups = device.type == "cuda", ([], [])
    for name, p in torch.nn.ModuleList([encoder, predictor]).to(device).named_parameters():
        groups[name.endswith("weight") and p.ndim >= 2].append(p)
    groups = [{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1]}]
    if on_gpu and not hasattr(encoder, "blocks"):
        encoder.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=on_gpu)
    state = dict(zip(PARTS, (encoder, predictor, optimizer), strict=True))
    if args.ema:
        state["teacher"] = copy.deepcopy(encoder).requires_grad_(False)
    return state


def parallel(module, args, device, world):
    """The module as the loop calls it; `module` itself keeps its names for the checkpoint."""
    if getattr(args, "compile", False):  # mask sizes change by the step, crops have two
        dynamic, old = args.recipe == "masked", torch.__version__ < "2.14"
        # with these torch 2.11 crashes on GPUs where sizes change (pytorch #181563), 2.14 does not
        off = {"triton.coalesce_tiling_analysis": False, "triton.mix_order_reduction": False}
        module = torch.compile(module, dynamic=dynamic, options=off if dynamic and old else None)
    if world > 1:
        if device.type == "cuda":  # batch norm over the global batch, as SIGReg is
            module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module)
        module = DistributedDataParallel(module, [device] if device.type == "cuda" else None)
        module.broadcast_buffers = False  # as an argument it is deprecated since torch 2.13
    return module


def check_health(healthy, encoder, predictor, step, ckpt):
    """Ends the run if a loss was non-finite or a weight is, as a finite loss can make one."""
    weights = [*encoder.parameters(), *predictor.parameters()]
    if not healthy or not all(p.isfinite().all() for p in weights):
        sys.exit(f"train.py: loss or weight non-finite by step {step}: lower --lr; {ckpt} is whole")


def number_of_pieces(args, encoder, device, world):
    """In how many pieces a rank's images go: by --micro-batch, or on GPUs by what has room.

    The same on all ranks, also where their shares differ by an image: they reduce in the last one.
    A ViT's activations in bfloat16 come to 38 bytes a block, token and unit of width (measured for
    B, L and H); weights, gradients and AdamW's state to 16 bytes a parameter. A fifth is left free.
    """
    count = -(-args.batch_size // world)  # the largest share
    if args.micro_batch and any("BatchNorm" in type(m).__name__ for m in encoder.modules()):
        sys.exit(f"train.py: {args.model} has batch norm, of whole batches; no --micro-batch then")
    if args.micro_batch or device.type != "cuda" or not hasattr(encoder, "blocks"):
        return -(-count // (args.micro_batch or count))
    patches, local = encoder.grid**2, (args.local_size // encoder.patch_size) ** 2
    if args.recipe == "masked":  # targets, and somewhat more than half the image as context
        asked = args.num_targets * sum(args.target_scale) / 2
        tokens = (0.55 + (1 if args.targets == "full" else asked)) * patches
    else:
        tokens = args.global_views * (patches + 1) + args.local_views * (local + 1)
    each = 38 * len(encoder.blocks) * encoder.dim * tokens * (1 if args.amp else 2)
    if args.directions == "both":  # the context once for each target, in float32 for its loss
        each += (94 + 17 * args.predictor_size) * encoder.dim * 0.55 * patches * args.num_targets
    room = 0.8 * torch.cuda.get_device_properties(device).total_memory
    room -= 16 * sum(p.numel() for p in encoder.parameters())
    at_once = min(count, 2 ** int(math.log2(max(room / each, 1))))
    if at_once < count and os.environ.get("RANK", "0") == "0":
        print(f"train.py: {at_once} images a GPU at once (--micro-batch) of its {count}")
    return -(-count // at_once)


def start_log(args, first):
    """ckpt.jsonl with the command line, or cut back to `first`; TensorBoard's writer, or None."""
    log = Path(args.ckpt.removesuffix(".pt") + ".jsonl")  # a run named lam0.1 keeps its name
    # after a resume each step stands once, and a line cut short by a kill goes
    lines = log.read_text().splitlines(keepends=True) if first and log.exists() else []
    kept = [x for x in lines if x.endswith("\n") and json.loads(x).get("step", 0) <= first]
    header = json.dumps({"command": " ".join(sys.argv), "args": vars(args)}) + "\n"
    log.write_text("".join(kept or [header]))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return log, None
    return log, SummaryWriter(log.with_suffix(".tb"), purge_step=first + 1)


def write_log(args, row, last, log, writer):
    """One logged step: a line on the screen, a JSON object in ckpt.jsonl, points in TensorBoard."""
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")
    for key, value in row.items():
        if writer and key != "step":
            writer.add_scalar(key, value, row["step"])
    numbers = [f"{key} {value:.4g}" for key, value in row.items() if key != "step"]
    eta = datetime.timedelta(seconds=(last - row["step"]) * args.batch_size // row["images_per_s"])
    print("  ".join([f"step {row['step']}/{last}", *numbers, f"eta {eta}"]), flush=True)


SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@contextmanager
def ranks(script, device):
    """Device, rank and world size: joins torchrun's processes, and parts them at a clean end.

    Errors that name one of the scripts end it in their one line; signals are as before then.
    """
    handlers = {name: signal.getsignal(name) for name in SIGNALS}
    names = ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")
    rank, local_rank, world = (int(os.environ.get(*name)) for name in names)
    try:
        device = torch.device(device)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"{script}: --device {device}: {str(error).splitlines()[0]}")
    if world > 1:
        # CPU tensors too: the probe's features. A day, since all wait while one downloads or fits.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        here = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1), device_id=here)
    try:
        yield device, rank, world
    except KeyboardInterrupt:
        sys.exit(f"{script}: interrupted; the same command continues from the last save")
    except (OSError, ValueError) as error:  # a loading process puts its traceback before the line
        line = str(error).strip().rpartition("\n")[2].removeprefix("OSError: ")
        if not re.match(r"\w+\.py: ", line):  # none of ours
            raise
        sys.exit(line)
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def catch_signals(world):
    """A function, called by all ranks: has one of them caught a signal of SIGNALS since now?"""
    caught = torch.tensor(0)
    for name in SIGNALS:
        signal.signal(name, lambda number, _: caught.fill_(1))

    def any_rank():
        now = caught.clone()  # what is caught while ranks wait for each other counts the next time
        if world > 1:
            dist.all_reduce(now, dist.ReduceOp.MAX)
        return bool(now)

    return any_rank


@contextmanager
def first_of_node():
    """The first process of each node runs the block, and downloads; then the others do."""
    together, local_rank = dist.is_initialized(), int(os.environ.get("LOCAL_RANK", "0"))
    if together and local_rank:
        dist.barrier()
    yield
    if together and not local_rank:
        dist.barrier()


# ------------------------------------------------------------------------------------------- data
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


def outlines(x, y):
    """Signed distance to each outline in a cell of side 2, negative inside; y points down."""
    ax, ay, radius = abs(x), abs(y), np.hypot(x, y)
    box = np.maximum(ax, ay)
    return {
        "disc": radius - 0.6,
        "ring": abs(radius - 0.55) - 0.16,
        "square": box - 0.55,
        "frame": abs(box - 0.55) - 0.16,
        "plus": np.maximum(np.minimum(ax, ay) - 0.18, box - 0.75),
        "cross": np.maximum(abs(ax - ay) / 2**0.5 - 0.18, (ax + ay) / 2**0.5 - 0.85),
        "triangle": np.maximum(y - 0.5, 0.87 * ax - 0.5 * y - 0.3),
        "chevron": np.maximum(abs(y - 0.9 * ax + 0.3) - 0.22, ax - 0.75),
        "equals": np.maximum(abs(ay - 0.45) - 0.17, ax - 0.7),
        "bar": np.maximum(ax - 0.2, ay - 0.8),
    }


class Shapes(torch.utils.data.Dataset):
    """Embedded data set: 4 x 4 copies of one shape; its kind is the label, all else varies.

    Item i -> uint8 array (size, size, 3) and label in 0 .. 9, a pure function of seed, split and i.
    A copy has its own two colours, angle, place and scale, so the patches of an image share the
    kind of the shape and nothing else, and no linear map of pixels sees it: either colour may be
    the brighter.
    """

    def __init__(self, size=32, seed=0, split="train"):
        self.size, self.seed, self.val = size, seed, split == "val"
        self.cell = -(-size // 4)
        rng = np.random.default_rng(0)  # the stencils are the same for every seed
        bounds = (-0.26, 0.26), (0.85, 1.15), (-0.24, 0.24), (-0.24, 0.24)
        angle, scale, dx, dy = (rng.uniform(*bound, (64, 1, 1)) for bound in bounds)
        at = (np.arange(self.cell) + 0.5) / self.cell * 2 - 1
        x, y = at - dx, at[:, None] - dy
        cos, sin = np.cos(angle), np.sin(angle)
        x, y = (cos * x + sin * y) / scale, (cos * y - sin * x) / scale
        found = outlines(x, y)
        self.classes, distance = list(found), np.stack(list(found.values()))
        # (10 kinds, 64 variants, cell, cell) in [0, 1], one pixel of slope at the outline
        self.stencils = np.clip(0.5 - distance * scale * self.cell / 2, 0, 1).astype(np.float32)

    def __len__(self):
        return 4_000 if self.val else 20_000

    def __getitem__(self, index):
        index = range(len(self))[index]  # an IndexError ends loops
        rng, label = np.random.default_rng((self.seed, self.val, index)), index % len(self.classes)
        stencil = self.stencils[label, rng.integers(64, size=(4, 4))][..., None]
        ground, figure = rng.random((2, 4, 4, 1, 1, 3), dtype=np.float32)
        image = ground + (figure - ground) * stencil  # (4, 4, cell, cell, 3)
        side = 4 * self.cell
        image = image.transpose(0, 2, 1, 3, 4).reshape(side, side, 3)[: self.size, : self.size]
        image = image + 0.1 * rng.standard_normal(image.shape, dtype=np.float32)
        return (image.clip(0, 1) * 255).astype(np.uint8), label


def read_image(path):
    """The image file as RGB; an OSError that names the path when it cannot be read."""
    try:
        return datasets.folder.pil_loader(path)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
        raise OSError(f"train.py: cannot read image {path} ({error}); mend or delete it") from None


def open_data(data, root, split, seed=0, image_size=32):
    """The `train` or `val` split of --data, (uint8 array (H, W, 3), label) pairs, or an exit."""
    if data == "shapes":
        return Shapes(image_size, seed, split)
    if data in DATASETS:
        make, *arguments = DATASETS[data]
        try:
            return make(root, **arguments[split == "val"], download=True, transform=np.array)
        except (OSError, RuntimeError, ImportError) as error:  # no network, no room, no scipy ...
            sys.exit(f"train.py: --data {data} is not in {root} and cannot be had: {error}")
    try:
        return datasets.ImageFolder(Path(data, split), np.array, loader=read_image)
    except OSError as error:  # no folder, no class folder, or one without images
        wanted = f"{split}/<class>/<image files>; or take shapes {' '.join(DATASETS)}"
        sys.exit(f"train.py: {data} has no {wanted} ({str(error).splitlines()[0]})")


class Images(torch.utils.data.Dataset):
    """Item (epoch, index) -> uint8 views (count, 3, size, size), of each kind of crop, and label.

    A pure function of seed, epoch and index. crops: kinds of random resized crops and flips, each
    (count, size, least and most share of the image); by default one view, resized and centred.
    """

    def __init__(self, source, size, crops=(), seed=0):
        self.source, self.seed, self.flip = source, seed, v2.RandomHorizontalFlip()
        self.resize = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
        self.crops = [(n, v2.RandomResizedCrop(side, scale)) for n, side, *scale in crops]

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        image, label = self.source[index]
        image = v2.functional.to_image(image)
        if not self.crops:
            return [self.resize(image)[None]], label
        # the transforms draw from torch's global generator, which keeps 32 bits of a seed
        seed = np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            views = [[self.flip(crop(image)) for _ in range(n)] for n, crop in self.crops]
            return [torch.stack(kind) for kind in views], label


def resized_crop(x, u, size, scale):
    """torchvision's RandomResizedCrop and flip, each image by draws of its own, on x's device.

    x (B, 3, H, W) float, u (B, 23) uniform draws in [0, 1), scale: least, most share of the image
    -> (B, 3, size, size). An antialiased bilinear resize is linear in rows and columns: two small
    matrix products. Of ten boxes the first that fits counts.
    """
    area = x.shape[2] * x.shape[3] * (scale[0] + u[:, :10] * (scale[1] - scale[0]))
    ratio = torch.exp((2 * u[:, 10:20] - 1) * math.log(4 / 3))  # width / height, 3/4 to 4/3
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (height <= x.shape[2]) & (width <= x.shape[3])
    first = fits.int().argmax(1, keepdim=True)
    height = height.gather(1, first).clamp(1, x.shape[2])  # (B, 1)
    width = width.gather(1, first).clamp(1, x.shape[3])
    top = (u[:, 20:21] * (x.shape[2] - height + 1)).floor()
    left = (u[:, 21:22] * (x.shape[3] - width + 1)).floor()
    rows = resize_weights(top, height, x.shape[2], size)
    columns = resize_weights(left, width, x.shape[3], size)
    columns = torch.where(u[:, 22:, None] < 0.5, columns.flip(1), columns)
    return rows[:, None] @ x @ columns.transpose(1, 2)[:, None]


def resize_weights(start, length, before, after):
    """[start, start + length) of `before` pixels resized to `after`: (B, after, before)."""
    step = length[..., None] / after  # (B, 1, 1)
    centre = start[..., None] + step * (torch.arange(after, device=start.device)[:, None] + 0.5)
    pixel = torch.arange(before, device=start.device) + 0.5
    inside = (pixel > start[..., None]) & (pixel < (start + length)[..., None])
    weights = (1 - (pixel - centre).abs() / step.clamp_min(1)).clamp_min(0) * inside
    return weights / weights.sum(2, keepdim=True)


YIQ = np.array([[0.2989, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
# a turn of the hue by an angle: HUE[0] + cos HUE[1] + sin HUE[2], all on RGB
TURNS = np.diag([1, 0, 0]), np.diag([0, 1, 1]), np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]])
HUE = np.stack([np.linalg.inv(YIQ) @ turn @ YIQ for turn in TURNS])
MEAN_STD = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # ImageNet's


@cache
def constant(name, device):
    """One of the tables above on the device, made once: a copy from the host waits for the GPU."""
    table = {"luma": YIQ[0][:, None, None], "hue": HUE, "normal": MEAN_STD[..., None, None]}
    return torch.tensor(table[name], dtype=torch.float32, device=device)


def photometric(x, u, luma, hue_turn, p_blur=0.0, p_solarize=0.0):
    """Colour jitter (0.4, 0.4, 0.2, 0.1) with p 0.8, grayscale with p 0.2, blur and solarize.

    x (B, 3, H, W) float in [0, 1], u (B, 9) uniform draws in [0, 1), luma and hue_turn: constant's,
    given, as torch.compile would make them anew each time -> as x, each image by draws of its own:
    what torchvision does to one image at a time, on the whole batch and its device. Brightness,
    contrast, saturation, hue always in this order; hue turns in the YIQ plane, not in HSV.
    """
    u = u.T[..., None, None, None]  # (9, B, 1, 1, 1)
    brightness, contrast, saturation, hue, jittered, grayed, sigma, blurred, solarized = u

    def gray(x):
        return (x * luma).sum(1, keepdim=True)

    y = (x * (1 + (2 * brightness - 1) * 0.4)).clamp(0, 1)
    mean = gray(y).mean((2, 3), keepdim=True)
    y = (mean + (1 + (2 * contrast - 1) * 0.4) * (y - mean)).clamp(0, 1)
    y = (gray(y) + (1 + (2 * saturation - 1) * 0.2) * (y - gray(y))).clamp(0, 1)
    angle = 2 * math.pi * 0.1 * (2 * hue[:, 0] - 1)  # (B, 1, 1)
    still, cos, sin = hue_turn
    turn = still + angle.cos() * cos + angle.sin() * sin  # (B, 3, 3)
    y = (turn @ y.flatten(2)).view_as(y).clamp(0, 1)
    x = torch.where(jittered < 0.8, y, x)
    x = torch.where(grayed < 0.2, gray(x), x)
    if p_blur:
        x = torch.where(blurred < p_blur, blur(x, 0.1 + 1.9 * sigma[:, 0, 0]), x)
    if p_solarize:
        x = torch.where((solarized < p_solarize) & (x >= 128 / 255), 1 - x, x)
    return x


def blur(x, sigma):
    """Gaussian blur of x (B, 3, H, W), sigma (B, 1) pixels; 23 pixels wide at 224, as in DINO."""
    radius = max(round(x.shape[-1] / 20), 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-offsets.square() / (2 * sigma.square()))  # (B, taps)
    weights = (weights / weights.sum(1, keepdim=True)).T[..., None, None, None]
    y = F.pad(x, [radius] * 4, mode="reflect")
    y = sum(w * y[:, :, i : i + x.shape[2]] for i, w in enumerate(weights))
    return sum(w * y[..., i : i + x.shape[3]] for i, w in enumerate(weights))


def normalize(images):
    """float (..., 3, H, W) in [0, 1] -> normalised with ImageNet's mean and standard deviation."""
    mean, std = constant("normal", images.device)
    return (images - mean) / std


def batches(num_images, batch_size, first, last, seed, rows):
    """This rank's `rows` of each global batch after step `first`, as lists of (epoch, index)."""
    per_epoch = num_images // batch_size
    for step in range(first, last):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == first:
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            order = torch.randperm(num_images, generator=generator).tolist()
        yield [(epoch, order[i * batch_size + row]) for row in rows.tolist()]


def load(args, train_set, first, last, share, device):
    """What draw gets of this rank's images, step by step, on the device, and the crops it takes.

    Sets of small images of one size are held on the device as they are, and cropped there by draw;
    others are cropped as they are loaded.
    """
    kinds = [(1, args.image_size, 0.3, 1)] * (args.augment != "none")  # as draw takes them
    if args.recipe == "crops":
        kinds = [(args.global_views, args.image_size, 0.3, 1)]
        kinds += [(args.local_views, args.local_size, 0.05, 0.3)] * (args.local_views > 0)
    steps = batches(len(train_set), args.batch_size, first, last, args.seed, share)
    whole = hold(train_set, args.workers, device)
    if whole is not None and (kinds or whole.shape[2:] == (args.image_size, args.image_size)):
        indices = (send(torch.tensor([i for _, i in keys]), device) for keys in steps)
        return ([whole[i] if kinds else whole[i][:, None]] for i in indices), kinds
    images = Images(train_set, args.image_size, kinds, args.seed)
    # 16 images a message: workers keep two each in shared memory, of which Docker gives 64 MB
    some = (keys[i : i + 16] for keys in steps for i in range(0, len(keys), 16))
    loader = read(images, args.workers, batch_sampler=some, pin_memory=device.type == "cuda")
    of_a_step = zip(*[loader] * -(-len(share) // 16), strict=True)  # so many messages each
    return (on_device(messages, device) for messages in of_a_step), ()


def on_device(messages, device):
    """Loaded (views by kind of crop, labels), several -> all views of each kind, on the device."""
    kinds = zip(*(views for views, _ in messages), strict=True)
    return [torch.cat([x.to(device, non_blocking=True) for x in kind]) for kind in kinds]


def hold(data, workers, device):
    """All images, uint8 (N, 3, H, W), on the device; None if they differ in size or are large."""
    if min(data[0][0].shape[:2]) > 96 or len(data) * 3 * 96**2 > 2**33:
        return None
    try:
        whole = torch.cat([images for images, _ in read(data, workers, batch_size=500)])
        return whole.permute(0, 3, 1, 2).to(device)
    except RuntimeError:  # torch's, where sizes differ
        return None


def read(data, workers, **options):
    """A DataLoader's batches."""
    options |= {"num_workers": workers, "worker_init_fn": leave_signals}
    return iter(torch.utils.data.DataLoader(data, **options))


def leave_signals(worker):
    """Signals are the main process's: a loader that one ends would end the run before it saves."""
    os.setpgrp()  # torchrun and Ctrl-C send theirs to the group; SIGTERM is how a loader is ended
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


# -------------------------------------------------------------------------------------- checkpoint
# what may differ between the run that wrote a checkpoint and the one that continues it
MAY_CHANGE = "epochs steps workers micro_batch save_every log_every device amp compile ckpt"
PARTS = ("encoder", "predictor", "optimizer")


def on_host(state):
    """A copy of the state's tensors in host memory, which later steps leave alone."""
    if isinstance(state, dict):
        return {name: on_host(part) for name, part in state.items()}
    return state.detach().to("cpu", copy=True) if isinstance(state, torch.Tensor) else state


def store(before, pool, parts, rest):
    """Copies the state, has `pool` write it; the one before must have ended well."""
    if before:
        before.result()
    state = {name: part.state_dict() for name, part in parts.items()} | rest
    return pool.submit(save, on_host(state), Path(rest["args"]["ckpt"]), "train.py")


def save(state, path, script):
    """Writes a checkpoint; a kill or a full disk leaves the old file whole, and no other."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(state, temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError
        temporary.unlink(missing_ok=True)
        sys.exit(f"{script}: cannot write {path}, left as it was: {str(error).splitlines()[0]}")


def load_checkpoint(path, parts=PARTS):
    """The dictionary that was saved; plain values only: a pickle that runs code is refused."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"train.py: no checkpoint {path}; python train.py --ckpt {path} makes one")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        saved = error
    if not isinstance(saved, dict) or not {*parts, "step", "args"} <= saved.keys():
        what = f"truncated or not a checkpoint of train.py ({type(saved).__name__})"
        sys.exit(f"train.py: {path} is {what}; choose another --ckpt")
    return saved


def resume(script, path, parts, settings, last, rank, world):
    """The step of the checkpoint, whose state is put into `parts`; 0 where there is none.

    Whichever rank has the newest reads it and sends it to all: nodes need not share a disk. Exits
    where it was made with other settings, and where its folder does not exist.
    """
    if not path.absolute().parent.is_dir():
        sys.exit(f"{script}: --ckpt {path}: no such folder {path.absolute().parent}")
    written = torch.zeros(world, dtype=torch.float64)
    written[rank] = path.stat().st_mtime if path.exists() else 0
    if world > 1:
        dist.all_reduce(written)
    source = int(written.argmax())
    found = [load_checkpoint(path, ["encoder"]) if rank == source and written[rank] else None]
    if world > 1:
        dist.broadcast_object_list(found, src=source, device=torch.device("cpu"))
    saved = found[0]
    if saved is None:
        return 0
    for name, value in settings.items():
        if name not in MAY_CHANGE.split() and saved["args"].get(name) != value:
            was = f"{path} was trained with {name}={saved['args'].get(name)}"
            sys.exit(f"{script}: {was}, this command says {value}; repeat that or move it")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    step = saved["step"]
    says = f"continues from step {step}" if step < last else f"is finished: {step} steps"
    if rank == 0:
        print(f"{script}: {path} {says}")
    return step


# ------------------------------------------------------------------ defaults, command line, main
# fmt: off
KINDS = "shapes|to 48 px|to 96 px|photographs|from 500,000"
DEFAULTS = {  # by the kind of data; --image-size, --weight-decay, --workers ... : see fill_in
    "model":        ("vit_n8",   "vit_n4",   "vit_n8",   "vit_s16",    "vit_b16"),
    "augment":      ("none",     "color",    "color",    "none",       "none"),
    "masks_per":    ("image",    "batch",    "batch",    "batch",      "batch"),
    "target_scale": ([0.4, 0.6], [0.2, 0.3], [0.2, 0.3], [0.2, 0.3],   [0.2, 0.3]),
    "pred":         ("mse",      "relative", "relative", "relative",   "relative"),
    "directions":   ("one",      "both",     "both",     "both",       "both"),
    "sigreg_on":    ("pooled",   "tokens",   "tokens",   "tokens",     "tokens"),
    "batch_size":   (256,        256,        256,        256,          4096),
    "epochs":       (5,          100,        100,        300,          300),
    "lr":           (1e-3,       2e-3,       2e-3,       1e-3,         1.5e-4),
}
UNUSED = {  # options that a recipe does not take
    "masked": "global_views local_views local_size proj_dim",
    "crops": "predictor predictor_size masks masks_per num_targets target_scale min_context pred "
    "directions sigreg_on targets stop_grad ema",
}
RECIPES = {  # what the recipe then says
    "masked":       {"sigreg": "legendre", "lam": 1.0},
    "crops":        {"sigreg": "sketched", "lam": 0.05, "augment": "color", "lr": 5e-4},
}
OPTIONS = [  # group, or option, type or choices, default (None: see above, fill_in), least, effect
    "data",
    ("data", str, "shapes", "", "folder with train/ and val/, embedded shapes, cifar10 ..."),
    ("data-root", str, "data", "", "where torchvision's data sets are downloaded to"),
    ("image-size", int, None, 1, "pixels, a multiple of the patch [small images: theirs; 224]"),
    ("augment", "none crop color", None, "", "color: crop, and colours"),
    ("global-views", int, 2, 1, "crops: views of 0.3 to 1 of the image, at full size"),
    ("local-views", int, 6, 0, "crops: views of 0.05 to 0.3 of the image"),
    ("local-size", int, None, 1, "crops: pixels of local views [0.43 of the image size]"),
    ("workers", int, None, 0, "processes that load images; speed only [cores, at most 8]"),
    "model",
    ("recipe", "masked crops", "masked", "", "A: predict hidden patches; B: embed crops alike"),
    ("model", str, None, "", "vit_n8 ... vit_h14, resnet18"),
    ("predictor", "mlp transformer", "mlp", "", "from the pooled context, or attending to it"),
    ("predictor-size", int, 4, 1, "mlp: hidden units, in widths of the encoder; else blocks"),
    ("proj-dim", int, 64, 1, "crops: width of the projection that the loss sees"),
    ("masks", "blocks random", "blocks", "", "targets are rectangles, or scattered patches"),
    ("masks-per", "batch image", None, "", "batch: one for all, its outline is no shortcut"),
    ("num-targets", int, 2, 1, "target blocks an image"),
    ("target-scale", [float, float], None, "", "share of patches in a target"),
    ("min-context", float, 0.35, 0, "least share of patches for the context"),
    "loss",
    ("pred", "relative mse", None, "", "relative: share unexplained, shrinking gains nothing"),
    ("directions", "one both", None, "", "both: the context from each target, too"),
    ("sigreg", "spectral legendre sketched none", None, "", "see sigreg.py"),
    ("sigreg-on", "pooled tokens", None, "", "mean token of each image, or all patch tokens"),
    ("lam", float, None, 0, "weight of SIGReg; masked, sketched 13 / N"),
    ("targets", "blocks full", "blocks", "", "full: patches of the encoded whole image"),
    ("stop-grad", bool, False, "", "no gradient through the targets, SIGReg's neither"),
    ("ema", float, 0, 0, "targets by a teacher, the encoder's average with this momentum"),
    ("slices", int, 1024, 1, "random directions a step of sketched SIGReg"),
    "optimization",
    ("batch-size", int, None, "", "images a step over all ranks"),
    ("micro-batch", int, None, 1, "images a rank at once, exact all the same [what has room]"),
    ("epochs", int, None, 1, "passes over the data"),
    ("steps", int, None, 1, "stop after so many steps, whatever --epochs says"),
    ("lr", float, None, 0, "AdamW learning rate"),
    ("schedule", "constant cosine", "constant", "", "cosine: falls to 0 at the last step"),
    ("warmup-epochs", float, 0, 0, "epochs in which the rate rises from 0"),
    ("weight-decay", float, None, 0, "AdamW's, of weight matrices [0.05; ResNets 5e-4]"),
    ("wd-end", float, None, 0, "weight decay goes there along a cosine"),
    ("seed", int, 0, 0, "of weights, order, crops, masks, slices and the shapes"),
    "run",
    ("ckpt", str, "ckpt.pt", "", "written to, and continued from where it exists"),
    ("save-every", int, 500, 1, "steps between checkpoints"),
    ("log-every", int, 50, 1, "steps between lines of the log"),
    ("device", str, "cuda" if torch.cuda.is_available() else "cpu", "", "cuda or cpu"),
    ("amp", bool, None, "", "bfloat16 autocast of encoder, predictor [where it is faster]"),
    ("compile", bool, False, "", "torch.compile: slow start, faster steps"),
]
# fmt: on


def fill_in(args, count, side, world):
    """What the command line left open: by kind of data, by recipe, then by what follows from it.

    count images, whose shorter side is `side` pixels; exits in one line where the batch cannot be.
    """
    larger = 2 if side <= 96 else 3 if count < 500_000 else 4
    kind = 0 if args.data == "shapes" else 1 if side <= 48 else larger
    names = [name for name in DEFAULTS if name not in UNUSED[args.recipe].split()]
    chosen = {name: DEFAULTS[name][kind] for name in names} | RECIPES[args.recipe]
    name = args.model or "vit"
    chosen["weight_decay"] = 5e-4 if "resne" in name else 0.05
    most = count if name.startswith("vit") else 2048  # batch norm: all activations at once
    chosen["batch_size"] = min(chosen["batch_size"], most, count)
    # shapes are cheaper to draw than to send between processes
    cores = max((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    chosen["workers"] = 0 if kind == 0 and args.recipe == "masked" else min(8, cores)
    chosen["amp"] = args.device.startswith("cuda") or bfloat16_is_faster()
    chosen = {name: value for name, value in chosen.items() if getattr(args, name) is None}
    vars(args).update(chosen)
    patch = patch_size(args.model, side)
    if args.image_size is None:
        few = kind > 2 or patch < 32 and side // patch < 4  # patches for a mask: enlarge to 224
        args.image_size = 224 // patch * patch if few else max(side // patch, 2) * patch
    if args.local_size is None:
        args.local_size = max(round(0.43 * args.image_size / patch), 1) * patch
    if not max(2, world) <= args.batch_size <= count:  # SIGReg compares images
        limits = f"at least 2 and {world} ranks, at most the {count} images of the data"
        sys.exit(f"train.py: --batch-size {args.batch_size} must be {limits}")
    if "lam" in chosen and args.recipe == "masked" and args.sigreg == "sketched":
        context = max((args.image_size // patch) ** 2 // 2, 1)  # about half of the patches
        samples = args.batch_size * (context if args.sigreg_on == "tokens" else 1)
        args.lam = chosen["lam"] = float(f"{0.05 * 256 / samples:.1g}")  # it grows with them
    return chosen | {"image_size": args.image_size}


def bfloat16_is_faster():
    """Whether it is, on this CPU: with AMX or AMD's AVX-512 units; Intel's take twice as long."""
    info = Path("/proc/cpuinfo")
    return info.exists() and bool(re.search("(?s)AMD.*avx512_bf16|amx_bf16", info.read_text()))


def patch_size(model, side):
    """What divides the image's side: a ViT's patch; 1 for small images' ResNets; 32 for others."""
    name = re.fullmatch(r"vit_[a-z](\d+)", model)
    return max(int(name[1]), 1) if name else 1 if "resne" in model and side <= 96 else 32


def parse(script, parser, argv, options, text_of=lambda name: None):
    """The arguments by a table such as OPTIONS; text_of: name -> what [default] says, or None.

    Exits in one line that names the first option below its least number, or not a number.
    """
    for row in options:
        if isinstance(row, str):
            add = parser.add_argument_group(row).add_argument
            continue
        name, kind, default, _, effect = row
        said = text_of(name.replace("-", "_")) or default
        help = effect if said is None or said is False else f"{effect} [{said}]"
        if kind is bool:
            action = "store_true" if default is False else argparse.BooleanOptionalAction
            add(f"--{name}", action=action, default=default, help=help)
        elif kind == [float, float]:
            add(f"--{name}", type=float, nargs=2, metavar=("LOW", "HIGH"), help=help)
        elif isinstance(kind, str):
            add(f"--{name}", choices=kind.split(), default=default, help=help)
        else:
            add(f"--{name}", type=kind, default=default, metavar=kind.__name__, help=help)
    args = parser.parse_args(argv)
    for name, _, _, least, _ in [row for row in options if not isinstance(row, str)]:
        value = getattr(args, name.replace("-", "_"))
        if value is not None and least != "" and not value >= least:
            sys.exit(f"{script}: --{name} {value} must be at least {least}")
    return args


def default_text(name):
    """The defaults of an option that depend on the data and on the recipe, for its help line."""
    by_kind = [str(v).strip("[]").replace(", ", " ") for v in DEFAULTS.get(name, ())]
    while by_kind[-2:-1] == by_kind[-1:] != []:
        by_kind.pop()
    by_recipe = [f"{recipe} {said[name]}" for recipe, said in RECIPES.items() if name in said]
    return "; ".join(filter(None, ["|".join(by_kind), ", ".join(by_recipe)]))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="train.py [options], or over N GPUs torchrun --nproc_per_node=N train.py [options]",
        description=f"[default], by data, the last goes on: {KINDS}; by recipe",
        formatter_class=partial(argparse.HelpFormatter, width=100, max_help_position=33),
    )
    args = parse("train.py", parser, argv, OPTIONS, default_text)
    if args.lr == 0 or args.min_context == 0 or args.ema >= 1:
        sys.exit("train.py: --lr and --min-context must be above 0, --ema below 1")
    for name in UNUSED[args.recipe].split():
        if getattr(args, name) != parser.get_default(name):
            option = "--" + name.replace("_", "-")
            sys.exit(f"train.py: --recipe {args.recipe} does not take {option}; leave it out")
    if args.stop_grad or args.ema or args.targets == "full":  # without gradient, or see the context
        if args.directions == "both":
            sys.exit("train.py: --stop-grad, --ema, --targets full go with --directions one alone")
        args.directions = "one"
    if args.recipe == "crops" and (args.lam or 0) > 1:
        sys.exit(f"train.py: --lam {args.lam} of --recipe crops must be at most 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    with ranks("train.py", args.device) as (device, rank, world):
        if args.data == "shapes":  # drawn at the size that follows from the settings
            chosen = fill_in(args, 20_000, args.image_size or 32, world)
        with first_of_node():
            train_set = open_data(args.data, args.data_root, "train", args.seed, args.image_size)
        if args.data != "shapes":
            chosen = fill_in(args, len(train_set), min(train_set[0][0].shape[:2]), world)
        if rank == 0:
            said = [f"{name.replace('_', '-')} {value}" for name, value in chosen.items()]
            data = f"{len(train_set):,} images of {args.data}, {world} x {device.type}"
            print(f"train.py: {args.recipe} on {data}; chosen: {', '.join(said)}")
        train(args, train_set, device, rank, world)


if __name__ == "__main__":
    main()
