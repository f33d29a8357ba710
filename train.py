"""Train LeJEPA: one encoder, one loss, prediction + SIGReg; no teacher, no stop-gradient.

    python train.py                                         # images drawn here: about a minute
    python train.py --data cifar10                          # torchvision's, downloaded at first use
    python train.py --data photos                           # a folder: photos/train/<class>/*.jpg
    python train.py --data cifar10 --recipe crops --model resnet18      # after the paper
    torchrun --nproc_per_node=8 train.py --data photos --model vit_b16 --batch-size 4096 --lr 1.5e-4

`--recipe masked` (after source A, the default) encodes a context and some target blocks of an
image, and predicts the tokens of each from the other. `--recipe crops` (source B,
arXiv:2511.08544) encodes several crops and pulls their projections together. masked has that loss
as well, on a projection of the context and of each target (--image-loss). The loop comes first,
then what it calls: steps, log, checkpoints, command line; data.py has the data. (--ema and
--stop-grad are for comparison.)

The same command again continues from its checkpoint. ckpt.jsonl holds the command line, then a JSON
object for each logged step. Everything random is a function of the seed and of the step, the epoch
or the image's number: a resumed run repeats the uninterrupted one, and the number of ranks changes
only rounding, and what each rank does on its own: batch norm on CPUs, dropout, stochastic depth.

B is the number of images of this rank; sigreg.py lists the other symbols.
"""

import argparse
import copy
import datetime
import fcntl
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

import data
import model
import sigreg
from masks import multi_block_masks, random_masks


# ---------------------------------------------------------------------------------------- the loop
def train(args, images, device, rank, world):
    """draw -> forward -> loss -> backward -> step -> log -> save, from the checkpoint's step on.
    Returns the last step, how many there are to be, and an exit code if it had to end."""
    net, parts = build(args, device)  # the same modules: net is called, parts are saved
    encoder, optimizer, teacher = parts["encoder"], parts["optimizer"], parts.get("teacher")
    per_epoch = len(images) // args.batch_size
    total, warmup = args.steps or args.epochs * per_epoch, args.warmup_epochs * per_epoch
    if total <= warmup + (args.schedule != "constant"):
        sys.exit(f"train.py: {total} steps end in the warm-up of {warmup:g}; take more --epochs")
    done = resume(args, parts, total, rank, world)  # steps of the checkpoint
    if done >= total:
        return done, total, 0
    mine = torch.arange(args.batch_size).tensor_split(world)[rank]  # this rank's of each batch
    order = args.batch_size, done, total, args.seed, mine
    batches = data.batches(images, args.image_size, crops_of(args), *order, args.workers, device)
    log = Log(args, parts, done, total) if rank == 0 else None
    compile_method(net, args)
    net = parallel(net, device)
    caught = catch_signals()
    for step, views in enumerate(one_ahead(batches, caught), done + 1):
        views, masks = draw(args, views, mine, encoder, step)
        torch.manual_seed(data.seed_of("network", args.seed, step, rank))  # dropout in backbones
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            embeddings = net(views, *masks)
        loss, terms = loss_of(args, embeddings, masks, encoder, step)
        loss.backward()  # every rank has the global batch's loss: see sigreg.py
        set_rate_and_decay(args, optimizer, step, total, warmup)
        optimizer.step()
        optimizer.zero_grad()
        if teacher:  # --ema, for comparison with I-JEPA
            update = get_ema_multi_avg_fn(between(args.ema, args.ema_end, step / total))
            update(list(teacher.parameters()), list(encoder.parameters()), None)
        stop = exit_code(caught, world)
        log_now = step % args.log_every == 0 or step == total
        save_now = step % args.save_every == 0 or step == total or stop
        if log_now or save_now:  # no bad step overwrites a good checkpoint
            check_health(loss, net, step, args.ckpt)
        if log_now:
            measured = diagnostics(args, embeddings, loss, terms)  # over all ranks
            if rank == 0:
                log.write(step, (step - 1) // per_epoch, measured, optimizer.param_groups[0]["lr"])
        if save_now and rank == 0:
            save(args, parts, step)
        if stop:
            break
    return step, total, stop


# ----------------------------------------------------- what the loop is made of, in order of use
def build(args, device):
    """The method as one module, and what a checkpoint holds by name: the module's children (such as
    encoder and predictor), and AdamW, which decays matrices alone."""
    torch.manual_seed(args.seed)
    encoder = model.build_encoder(args.model, args.image_size)
    if args.recipe == "crops":
        if args.local_size % getattr(encoder, "patch_size", 1):
            wrong = f"--local-size {args.local_size} is no multiple of the patch of {args.model}"
            raise ValueError(f"train.py: {wrong}")
        projector = model.projector(encoder.dim, args.proj_dim)
        net = model.MultiView(encoder, projector, args.global_views, args.micro_batch, args.pool)
    elif not hasattr(encoder, "grid"):
        lacks = f"--recipe masked needs patch tokens, which {args.model} lacks"
        raise ValueError(f"train.py: {lacks}; take vit_{{n,t,s,b,l,h}}{{patch}} or --recipe crops")
    else:
        draw_masks(args, encoder.grid, 1, step=0)  # ValueError where the settings are impossible
        make = model.MLPPredictor if args.predictor == "mlp" else model.TransformerPredictor
        predictor = make(encoder.dim, encoder.grid**2, args.predictor_size)
        head = model.image_head(encoder.dim) if args.image_loss else None
        teacher = copy.deepcopy(encoder).requires_grad_(False) if args.ema else None
        settings = {"stop_grad": args.stop_grad, "teacher": teacher, "at_once": args.micro_batch}
        settings |= {"both_directions": not args.one_way, "whole_targets": args.whole_targets}
        net = model.Masked(encoder, predictor, head, **settings)
    on_gpu, matrices, others = device.type == "cuda", [], []
    net.to(device)
    if on_gpu and not hasattr(encoder, "blocks"):
        encoder.to(memory_format=torch.channels_last)
    for name, p in net.named_parameters():
        if p.requires_grad:  # not the teacher's
            (matrices if name.endswith("weight") and p.ndim >= 2 else others).append(p)
    groups = [{"params": others, "weight_decay": 0.0}, {"params": matrices}]
    optimizer = torch.optim.AdamW(groups, args.lr, weight_decay=args.weight_decay, fused=on_gpu)
    return net, {**dict(net.named_children()), "optimizer": optimizer}


def compile_method(net, args):
    """--compile: torch.compile, in place. Mask sizes change with the step, crops have two."""
    if not args.compile:
        return
    dynamic, old = args.recipe == "masked", torch.__version__ < "2.14"
    # with these torch 2.11 crashes on GPUs where sizes change (pytorch #181563), 2.14 does not
    off = {"triton.coalesce_tiling_analysis": False, "triton.mix_order_reduction": False}
    options = off if dynamic and old else None
    if args.micro_batch:  # checkpoints stay outside of what is compiled
        net.embed = torch.compile(net.embed, dynamic=dynamic, options=options)
    else:
        net.compile(dynamic=dynamic, options=options)


def parallel(net, device):
    """The module as the loop calls it, over all ranks; the parts keep their names."""
    if dist.is_initialized():
        on_gpu = device.type == "cuda"
        if on_gpu:  # batch norm over the global batch, as SIGReg is
            net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
        net = DistributedDataParallel(net, [device] if on_gpu else None)
        net.broadcast_buffers = False  # as an argument it is deprecated since torch 2.13
    return net


def draw_masks(args, grid, count, step):
    """context (count, Nc), targets (count, K, Nt) on the CPU, as the flags ask for."""
    make = {"blocks": multi_block_masks, "random": random_masks}[args.masks]
    sizes = args.num_targets, args.target_scale, args.min_context
    return make(count, grid, *sizes, data.generator_of("masks", args.seed, step))


def crops_of(args):
    """The crops of an image, each kind as (count, size, least share, most share of the image)."""
    if args.recipe == "masked":
        return [(1, args.image_size, 0.3, 1)] * (args.augment != "none")
    small = [(args.local_views, args.local_size, 0.05, 0.3)] * (args.local_views > 0)
    return [(args.global_views, args.image_size, 0.3, 1), *small]


def draw(args, views, mine, encoder, step):
    """What the module takes: a function of --seed, the step and the images.

    views: of this rank's B images, from data.batches; mine (B,): their places in the global batch.
    Every rank draws for the whole batch and takes its own, so that any number of ranks sees the
    same. Returns views and masks. Views are normalised, (B, 3, size, size): two for the masked
    recipe (context, targets), else G global and L local ones. Masks are (context (B, Nc), targets
    (B, K, Nt)) on the device, or () for crops.
    """
    device, masks = views[0].device, ()
    views = [view if view.is_floating_point() else view / 255 for view in views]
    if args.recipe == "masked":
        different = args.batch_size if args.masks_per == "image" else 1
        masks = draw_masks(args, encoder.grid, different, step)
        masks = [data.send(m[mine % len(m)], device) for m in masks]
        views = [*views, *views]
    if args.augment == "color":  # blur and solarize with p 0.5 and 0.2 for crops alone
        more = (0.5, 0.2) if args.recipe == "crops" else (0, 0)
        generator = data.generator_of("colours", args.seed, step)
        draws = torch.rand(len(views), args.batch_size, 9, generator=generator)[:, mine]
        draws = data.send(draws, device)
        views = [data.photometric(x, u, *more) for x, u in zip(views, draws, strict=True)]
    return [data.normalize(view) for view in views], masks


def loss_of(args, embeddings, masks, encoder, step):
    """The step's loss, and its terms by the names under which they are logged."""
    seed = data.seed_of("directions", args.seed, step)
    regularizer = sigreg.SIGReg(args.sigreg, args.slices, seed)
    tokens, z = embeddings  # see Masked and MultiView
    if args.recipe == "crops":
        loss, pred, reg = sigreg.multi_view_loss(z, args.global_views, args.lam, regularizer)
        return loss, {"pred": pred, args.sigreg: reg}
    places = (*masks, encoder.grid**2) if args.masks_per == "image" else None
    settings = {"lam": args.lam, "regularizer": regularizer, "error": args.pred}
    loss, pred, reg = sigreg.masked_loss(*tokens, places=places, on=args.sigreg_on, **settings)
    terms = {"pred": pred, args.sigreg: reg}
    if args.image_loss:
        z, lam = sigreg.centre(z).transpose(0, 1), sketched_lam(args.batch_size)
        regularizer = sigreg.SIGReg("sketched", args.slices, seed)
        terms["image"], *_ = sigreg.multi_view_loss(z, len(z), lam, regularizer)
        loss = loss + args.image_loss * terms["image"]
    return loss, terms


def learning_rate(step, total, lr, warmup=0, schedule="constant"):
    """Rate of step 1 .. total: lr, a linear rise over `warmup` steps, then `schedule`: constant, or
    half a cosine to a thousandth of lr."""
    rise = min(step / warmup, 1) if warmup else 1
    progress = max(step - warmup, 0) / max(total - warmup, 1)
    fall = {"constant": 0, "cosine": half_cosine(progress)}[schedule]
    return rise * between(lr, lr / 1000, fall)


def between(start, end, progress):
    """From start at progress 0 to end at 1; start throughout if there is no end."""
    return start if end is None else start + (end - start) * progress


def half_cosine(progress):
    return (1 - math.cos(math.pi * progress)) / 2


def set_rate_and_decay(args, optimizer, step, total, warmup):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total, args.lr, warmup, args.schedule)
    decay = between(args.weight_decay, args.weight_decay_end, half_cosine(step / total))
    optimizer.param_groups[1]["weight_decay"] = decay  # of the matrices: see build


# the run saves, then ends: SIGHUP is a closed terminal, SIGUSR1 SLURM's warning before its limit
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1


def catch_signals():
    """A list of exit codes and times, empty until this process gets one of the signals."""
    caught = []
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: catch(caught, number))
    return caught


def catch(caught, number):
    """A second signal, a second later as launchers may send one twice, ends the process at once."""
    if caught and time.monotonic() > caught[0][1] + 1:
        os._exit(128 + number)
    caught.append((128 + number, time.monotonic()))


def one_ahead(batches, caught):
    """The batches, each once the next is here. If that cannot be read, the run saves and ends."""
    following = next(batches)
    while following is not None:
        views = following
        try:
            following = next(batches, None)
        except OSError as error:
            print(data.one_line(error), file=sys.stderr)
            caught.append((1, time.monotonic()))
        yield views


def exit_code(caught, world):
    """The exit code of a rank that has to end, 0 to go on; all ranks call it, in every step."""
    code = torch.tensor(caught[0][0] if caught else 0)
    if world > 1:
        dist.all_reduce(code, dist.ReduceOp.MAX)
    return int(code)


def check_health(loss, net, step, ckpt):
    """Ends the run if the loss or a weight is not finite. Weights show earlier bad steps, too."""
    if not loss.isfinite() or not all(p.isfinite().all() for p in net.parameters()):
        again = f"begin again with a lower --lr and another --ckpt; {ckpt} has the last step saved"
        sys.exit(f"train.py: loss or weight non-finite by step {step}: {again}")


@torch.no_grad()
def diagnostics(args, embeddings, loss, terms):
    """What is logged: losses; effective rank and std of the images' mean tokens, or of the global
    crops' features, over all ranks, which must all call it; on GPUs the peak memory."""
    if args.recipe == "masked":
        features = sigreg.mean_token(*embeddings[0][:2])  # (B, D)
    else:
        features = embeddings[0][:, : args.global_views].flatten(0, 1)  # (B G, width)
    row = {"loss": loss, **terms}
    row |= {"erank": sigreg.effective_rank(features), "std": sigreg.embedding_std(features)}
    row = {name: value.item() for name, value in row.items()}
    if features.is_cuda:
        row["gb"] = torch.cuda.max_memory_allocated(features.device) / 2**30
    return row


# ---------------------------------------------------------------------------- log and checkpoints
class Log:
    """The screen and ckpt.jsonl, locked while the run lasts. A new run saves its step 0 as well.

    Exits where another run writes the log, or where it is of a run whose checkpoint is gone.
    """

    def __init__(self, args, parts, done, total):
        ckpt, path = Path(args.ckpt), Path(args.ckpt).with_suffix(".jsonl")
        self.total, self.batch_size, self.last = total, args.batch_size, done
        try:
            self.file = path.open("a+", buffering=1)  # line by line
        except OSError as error:
            sys.exit(f"train.py: cannot write {path}: {error.strerror}")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the loaders
        except (BlockingIOError, PermissionError):
            sys.exit(f"train.py: another run writes {path} now; give this one a --ckpt of its own")
        except OSError:  # a file system without locks
            pass
        self.file.seek(0)
        lines = [line for line in self.file if line.endswith("\n")]  # no line cut short by a kill
        if lines and not ckpt.exists():
            sys.exit(f"train.py: {path} is the log of a run, but {ckpt} is gone; move the log, too")
        if done == 0:
            save(args, parts, 0)
            warn(args, parts["encoder"])
        # each step stands once
        kept = [line for line in lines if done and json.loads(line).get("step", 0) <= done]
        self.file.truncate(sum(len(line.encode()) for line in kept))
        if not kept:
            self.file.write(json.dumps({"command": " ".join(sys.argv), "args": vars(args)}) + "\n")
        self.start = time.perf_counter()

    def write(self, step, epoch, measured, lr):
        seconds = (time.perf_counter() - self.start) / (step - self.last)
        row = {"step": step, "epoch": epoch, **measured, "lr": lr}
        row["images_per_s"] = round(self.batch_size / seconds, 3)
        self.start, self.last = time.perf_counter(), step
        self.file.write(json.dumps(row) + "\n")
        numbers = [f"{key} {value:.4g}" for key, value in row.items() if key != "step"]
        eta = datetime.timedelta(seconds=int((self.total - step) * seconds))
        print("  ".join([f"step {step}/{self.total}", *numbers, f"eta {eta}"]), flush=True)


def warn(args, encoder):
    """A line where SIGReg's sample is too small to be white, or masks are not as asked for."""
    dim, count = args.proj_dim if args.recipe == "crops" else encoder.dim, args.batch_size
    if args.recipe == "masked" and args.sigreg_on == "tokens":
        count *= max(int(args.min_context * encoder.grid**2), 1)
    if args.sigreg in ("spectral", "legendre") and count <= dim:
        few = f"SIGReg sees {count} vectors of {dim} numbers a step, too few to be white"
        print(f"train.py: {few}: take a larger --batch-size or a narrower network")
    if args.recipe == "masked":
        _, targets = draw_masks(args, encoder.grid, 256, step=0)
        same = sum(len({*map(tuple, image)}) < len(image) for image in targets.tolist())
        if same > 64:
            few = f"{encoder.grid} x {encoder.grid} patches are few for these masks"
            print(f"train.py: {100 * same // 256}% of images have a target twice: {few}")


# what may differ between the run that wrote a checkpoint and the one that continues it
MAY_CHANGE = "epochs steps workers micro_batch save_every log_every device amp compile ckpt "
MAY_CHANGE += "data data_root image_bytes"  # image_files and image_bytes say if these are the same


def save(args, parts, step):
    """The checkpoint of this step: the parts' states by name, the step, the settings."""
    state, part_file = {name: part.state_dict() for name, part in parts.items()}, f"{args.ckpt}.tmp"
    try:
        torch.save(state | {"step": step, "args": vars(args)}, part_file)
        os.replace(part_file, args.ckpt)  # a kill or a full disk leaves the old one whole
    except (OSError, RuntimeError) as error:
        Path(part_file).unlink(missing_ok=True)
        why = f"{data.one_line(error)}; the last save stays, and the same command continues it"
        sys.exit(f"train.py: cannot write {args.ckpt} at step {step}: {why}")


def load_checkpoint(path):
    """The dictionary that was saved; plain values only: a pickle that runs code is refused."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        sys.exit(f"train.py: no checkpoint {path}; python train.py --ckpt {path} makes one")
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        saved = error
    names = {"encoder", "optimizer", "step", "args"}
    if not isinstance(saved, dict) or not names <= saved.keys():
        what = f"truncated or not a checkpoint of train.py ({type(saved).__name__})"
        sys.exit(f"train.py: {path} is {what}; name another")
    return saved


def resume(args, parts, total, rank, world):
    """The steps done by the checkpoint, which all ranks read into `parts`; 0 without one."""
    path = Path(args.ckpt)
    saved = load_checkpoint(path) if path.exists() else None
    compare_ranks(vars(args) | {"step of the checkpoint": saved and saved["step"]}, world)
    if saved is None or saved["step"] == 0:  # no step is lost
        return 0
    check_settings(path, saved["args"], vars(args))
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    step = saved["step"]
    says = f"continues from step {step}" if step < total else f"is finished: {step} steps"
    moved = "" if saved["args"]["data"] == args.data else f", images now in {args.data}"
    if rank == 0:
        print(f"train.py: {path} {says}{moved}")
    return step


def compare_ranks(mine, world):
    """Exits where another rank was started with other settings, or sees other files."""
    found = [mine] * world
    if world > 1:
        dist.all_gather_object(found, mine)
    own = {"ckpt", "data", "data_root", "workers", "device"}
    for name in [name for name in mine if name not in own]:
        values = [str(settings[name]) for settings in found]
        if len({*values}) > 1:
            differ = f"ranks differ in {name}: {', '.join(values)}"
            sys.exit(f"train.py: {differ}; start all with one command, on files that all see")


def check_settings(path, before, now):
    """Exits where a command has other settings than the run that it would continue."""
    may_change, sizes = set(MAY_CHANGE.split()), [x.get("image_bytes") or () for x in (before, now)]
    if (now["schedule"], now["weight_decay_end"], now["ema_end"]) != ("constant", None, None):
        may_change -= {"epochs", "steps"}  # the length is part of these
    for name in [name for name in now if name not in may_change]:
        pair = before.get(name), now[name]
        if pair[0] != pair[1]:
            was = f"{path} was trained with {name}={pair[0]}, this command says {pair[1]}"
            sys.exit(f"train.py: {was}; set it back, or move {path} and its .jsonl to begin anew")
    if sum(a != b for a, b in zip(*sizes, strict=False)) > len(sizes[0]) / 2:
        sys.exit(f"train.py: {path} was trained on other images of the same names; move it away")


@contextmanager
def ranks(script, device):
    """Device, rank and world size; joins torchrun's processes, and leaves them after success.

    Errors that name one of the scripts end it in their one line. Signal handlers are restored.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot print
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    names = ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")
    rank, local_rank, world = (int(os.environ.get(*name)) for name in names)
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        sys.exit(f"{script}: --device {device} is not here; take cpu, or cuda where there is a GPU")
    device = torch.device(device)
    if device.type == "cuda" and world > 1:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1:  # two hours: all wait while one downloads or fits; gloo is for the CPU's tensors
        backend, here = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2), device_id=here)
    try:
        yield device, rank, world
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
    except (OSError, ValueError, RuntimeError) as error:
        line = data.one_line(error)
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            less = "--micro-batch (same result)" if script == "train.py" else "--batch-size"
            line = f"{script}: out of memory; try a smaller {less} ({str(error).splitlines()[0]})"
        if not re.match(r"\w+\.py: ", line):  # none of ours
            raise
        sys.exit(line)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized() and device.type == "cpu":  # gloo's threads would abort the exit
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------ command line
UNUSED = {  # options that a recipe does not take
    "masked": "global_views local_views local_size proj_dim pool",
    "crops": "predictor predictor_size masks masks_per num_targets target_scale min_context pred "
    "one_way sigreg_on image_loss whole_targets stop_grad ema ema_end",
}


class Parser(argparse.ArgumentParser):
    def error(self, message):  # in one line, without the usage
        sys.exit(f"{self.prog}: {message}")


def natural(text, low=0, kind=int):
    """Type of an option: a number of that kind, at least low."""
    if not low <= kind(text) < math.inf:  # nan is not
        raise argparse.ArgumentTypeError(f"{text} must be at least {low}, and finite")
    return kind(text)


def positive(text):
    return natural(text, low=1)


def real(text):
    return natural(text, kind=float)


def add_method(parser):
    """The options of data, model and loss. Defaults in brackets; None is filled in by the data."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="shapes", help="shapes, cifar10 ..., or a folder of train/ and val/")
    add("--data-root", default="data", help="where torchvision's data sets are downloaded to")
    add("--image-size", type=positive, help="pixels [the images' own; 224]")
    names = ["none", "crop", "color"]
    add("--augment", choices=names, help="[color; none; crops color, shapes none]")
    add("--global-views", type=positive, default=2, help="crops: views of 0.3 to 1 of an image [2]")
    add("--local-views", type=natural, default=6, help="crops: views of 0.05 to 0.3 of it [6]")
    add("--local-size", type=positive, help="crops: pixels of local views [0.43 of the image size]")
    add("--workers", type=natural, help="processes that load images; speed only [cores, at most 8]")
    add = parser.add_argument_group("model").add_argument
    names = ["masked", "crops"]
    add("--recipe", choices=names, default="masked", help="after source A, or B [masked]")
    add("--model", help="vit_n8 ..., resnet18 ... [vit_n4 up to 48 px, vit_n8; vit_s16]")
    add("--predictor", choices=["mlp", "transformer"], default="mlp", help="[mlp]")
    add("--predictor-size", type=positive, default=4, help="mlp: width factor; else: blocks [4]")
    add("--pool", choices=["avg", "cls"], default="avg", help="crops: mean patch, or CLS [avg]")
    add("--proj-dim", type=positive, default=64, help="crops: width of the projection [64]")
    add("--masks", choices=["blocks", "random"], default="blocks", help="of patches [blocks]")
    add("--masks-per", choices=["image", "batch"], default="image", help="a mask for each [image]")
    add("--num-targets", type=positive, default=2, help="target blocks of an image [2]")
    add("--target-scale", type=float, nargs=2, default=[0.2, 0.3], help="least, most [0.2 0.3]")
    add("--min-context", type=real, default=0.35, help="least share for the context [0.35]")
    add = parser.add_argument_group("loss").add_argument
    names = ["relative", "mse", "norm", "smooth_l1"]
    add("--pred", choices=names, default="relative", help="error, see sigreg.py [relative]")
    add("--one-way", action="store_true", help="no prediction of the context from the targets")
    names = ["spectral", "legendre", "sketched", "none"]
    add("--sigreg", choices=names, help="see sigreg.py [masked: legendre, crops: sketched]")
    names = ["tokens", "pooled", "context"]
    add("--sigreg-on", choices=names, default="tokens", help="what it sees [tokens]")
    add("--lam", type=real, help="SIGReg's weight [1; crops: sketched 12.8 / batch, others 0.05]")
    add("--image-loss", type=real, help="weight of the loss of whole images [1; 0 with --ema, ...]")
    add("--whole-targets", action="store_true", help="cut targets from the encoded whole image")
    add("--stop-grad", action="store_true", help="no gradient through the targets")
    add("--ema", type=real, default=0.0, help="momentum of a teacher that makes the targets")
    add("--ema-end", type=real, help="the momentum goes there, along a line [stays]")
    add("--slices", type=positive, default=1024, help="random directions of sketched SIGReg [1024]")


def add_run(parser):
    """The options of the optimizer and of the run."""
    add = parser.add_argument_group("optimization").add_argument
    add("--batch-size", type=positive, default=256, help="images a step, over all ranks [256]")
    add("--micro-batch", type=positive, help="images that a rank has in memory at once; exact")
    add("--epochs", type=positive, help="passes over the data [20; 300; shapes 2]")
    add("--steps", type=positive, help="stop after so many steps, whatever --epochs says")
    add("--lr", type=real, help="AdamW's learning rate [2e-3; 1e-3; crops 5e-4]")
    names = ["constant", "cosine"]
    add("--schedule", choices=names, default="constant", help="cosine: to lr / 1000 [constant]")
    add("--warmup-epochs", type=real, default=0.0, help="epochs in which the rate rises [0]")
    add("--weight-decay", type=real, help="AdamW's, of weight matrices [0.05; ResNets 5e-4]")
    add("--weight-decay-end", type=real, help="the decay goes there, along a cosine [stays]")
    add("--seed", type=natural, default=0, help="of all that is random [0]")
    add = parser.add_argument_group("run").add_argument
    add("--ckpt", default="ckpt.pt", help="written to, and continued from if it is there [ckpt.pt]")
    add("--save-every", type=positive, default=500, help="steps between checkpoints [500]")
    add("--log-every", type=positive, default=50, help="steps between lines of the log [50]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 [where it is faster]")
    add("--compile", action="store_true", help="torch.compile: slow start, faster steps")


def parse_args(argv=None):
    about = "[Defaults]; [a; b] is for images up to 96 px; larger ones."
    parser = Parser(prog="train.py", description=about)
    add_method(parser)
    add_run(parser)
    args = parser.parse_args(argv)
    unused = {name: f"--recipe {args.recipe}" for name in UNUSED[args.recipe].split()}
    args.sigreg = args.sigreg or {"masked": "legendre", "crops": "sketched"}[args.recipe]
    as_ijepa = bool(args.stop_grad or args.ema or args.whole_targets)
    whole = args.recipe == "masked" and args.image_loss != 0 and not as_ijepa
    unused |= {} if whole or args.sigreg == "sketched" else {"slices": f"--sigreg {args.sigreg}"}
    unused |= {"lam": "--sigreg none"} if args.sigreg == "none" else {}
    for name, by in unused.items():
        if getattr(args, name) != parser.get_default(name):
            sys.exit(f"train.py: {by} does not take --{name.replace('_', '-')}; leave it out")
    check(args, as_ijepa)
    args.one_way |= as_ijepa  # what has no gradient cannot be asked to predict
    if args.recipe == "masked" and args.image_loss is None:
        args.image_loss = float(whole)
    return args


def check(args, as_ijepa):
    """Exits in one line where options are out of range or do not go together."""
    if not args.ckpt.endswith(".pt"):
        sys.exit(f"train.py: --ckpt {args.ckpt} must end in .pt; its log ends in .jsonl")
    if args.lr == 0 or args.ema >= 1 or (args.ema_end or 0) > 1:
        sys.exit("train.py: --lr must be above 0, --ema below 1, --ema-end at most 1")
    if args.ema_end is not None and not args.ema:
        sys.exit("train.py: --ema-end goes with --ema")
    if args.recipe == "crops" and args.augment == "none":
        sys.exit("train.py: --recipe crops always crops: take --augment crop or color")
    if args.image_loss and as_ijepa:
        sys.exit("train.py: --stop-grad, --ema, --whole-targets go with --image-loss 0 alone")
    if args.recipe == "crops" and args.global_views + args.local_views < 2:
        sys.exit("train.py: one view has nothing to agree with: take more --global-views")
    if args.recipe == "masked" and args.sigreg == "sketched" and args.lam is None:
        rule = "12.8 / (the vectors that SIGReg sees in a step); legendre and spectral take 1"
        sys.exit(f"train.py: --recipe masked --sigreg sketched needs a --lam, such as {rule}")
    if args.recipe == "crops" and (args.lam or 0) > 1:
        sys.exit(f"train.py: --lam {args.lam} of --recipe crops must be at most 1")


def defaults(args, side):
    """Values of the options that were not given, for images whose shorter side is `side` pixels."""
    shapes, crops = args.data == "shapes", args.recipe == "crops"
    side = args.image_size or side  # from here on: the size that is trained on
    large, small = side > 96, "vit_n4" if side <= 48 and not shapes else "vit_n8"
    name = args.model or ("vit_s16" if large else small)
    vit = re.fullmatch(r"vit_([a-z])(\d+)", name)
    # the image's side is a multiple of this: a ViT's patch; 1 for small ResNets; 32 for others
    patch = max(int(vit[2]), 1) if vit else 1 if "resne" in name and side <= 96 else 32
    enlarge = large or vit and side < 4 * patch  # few patches leave nothing to mask
    size = 224 // patch * patch if enlarge else max(side // patch, 2) * patch
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    chosen = {"augment": "none", "epochs": 300, "lr": 1e-3}
    chosen |= {} if large else {"augment": "color", "epochs": 20, "lr": 2e-3}
    chosen |= {"augment": "none", "epochs": 2} if shapes else {}
    chosen |= {"augment": "color", "lr": 5e-4} if crops else {}
    lam = sketched_lam(args.batch_size) if args.sigreg == "sketched" else 0.05
    return chosen | {
        "model": name,
        "image_size": size,
        "weight_decay": 5e-4 if "resne" in name else 0.05,
        "lam": lam if crops else 1.0,
        "local_size": max(round(0.43 * (args.image_size or size) / patch), 1) * patch,
        # shapes are cheaper to draw than to send between processes
        "workers": 0 if shapes and not crops else min(8, cores),
        "amp": args.device.startswith("cuda") or bfloat16_is_faster(),
    }


def sketched_lam(batch_size):
    """lambda of multi_view_loss. The statistic grows with the batch, so lambda falls with it, from
    0.05, which we take as of 256 images; no source gives a rule."""
    return min(float(f"{12.8 / batch_size:.2g}"), 0.5)


def fill_in(args, images, side, world):
    """Sets the options that were not given, and returns them; exits if no run is possible."""
    wanted = defaults(args, side)
    open_ones = [name for name in wanted if getattr(args, name) is None]
    chosen = {name: wanted[name] for name in open_ones if name not in UNUSED[args.recipe].split()}
    vars(args).update(chosen)
    if not max(2, world) <= args.batch_size <= images:  # SIGReg compares images
        limits = f"at least {max(2, world)}, at most the {images} images of the data"
        sys.exit(f"train.py: --batch-size {args.batch_size} must be {limits}")
    return chosen


def bfloat16_is_faster():
    """Whether it is, on this CPU: with AMX or AMD's AVX-512 units; Intel's take twice as long."""
    info = Path("/proc/cpuinfo")
    return info.exists() and bool(re.search("(?s)AMD.*avx512_bf16|amx_bf16", info.read_text()))


def main(argv=None):
    args = parse_args(argv)
    with ranks("train.py", args.device) as (device, rank, world):
        images = data.open_data(args.data, args.data_root, "train", args.seed)
        sides = sorted(min(size) for size in data.sizes_of(images))
        chosen = fill_in(args, len(images), sides[len(sides) // 2], world)
        args.image_files, args.image_bytes = data.fingerprint(images)
        if rank == 0:
            about = f"shorter side {sides[0]} to {sides[-1]} px, median {sides[len(sides) // 2]}"
            about = "drawn here (--data FOLDER takes yours)" if args.data == "shapes" else about
            print(f"train.py: {args.recipe} on {len(images):,} images of {args.data}, {about}")
            values = [f"{name.replace('_', '-')} {value}" for name, value in chosen.items()]
            print(f"train.py: {world} x {device.type}; chosen: {', '.join(values)}")
        step, total, stop = train(args, images, device, rank, world)
        if rank == 0:
            then = "the same command continues" if step < total else f"python probe.py {args.ckpt}"
            print(f"train.py: saved step {step} of {total}; next: {then}")
    if step < total:
        sys.exit(stop)  # the shell's code for the signal, so that && and queues stop


if __name__ == "__main__":
    main()
