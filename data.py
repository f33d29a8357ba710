"""The data, in the order in which an image travels: a name or a folder -> batches on the device.

    images = open_data("cifar10", "data", "train")         # (uint8 array (H, W, 3), label) pairs
    crops = [(2, 32, 0.3, 1), (6, 12, 0.05, 0.3)]          # (count, size, least, most of the image)
    for views in batches(images, 32, crops, 256, 0, 100, 0, torch.arange(256), 2, device):
        ...                                                # 8 views, each (256, 3, size, size)

Small images of one size are held on the device, and cropped there; others are cropped by the
processes that load them. Everything random is a function of the seed and of the epoch, the step or
the image's number, so a resumed run repeats the uninterrupted one, on any number of ranks. This
file knows no recipe, no loss and no options.

B is the number of images of this rank; `mine` (B,) are their places in the global batch.
"""

import hashlib
import importlib.util
import math
import multiprocessing
import os
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.transforms import v2

# ------------------------------------------------------------------------- from a name to images
#   name: (class, argument, its value and the images of the training split, of the reported one);
#   the class takes download=, and the numbers of images are len() of the whole splits
DATASETS = {
    "cifar10": (datasets.CIFAR10, "train", True, 50_000, False, 10_000),
    "cifar100": (datasets.CIFAR100, "train", True, 50_000, False, 10_000),
    "dtd": (datasets.DTD, "split", "train", 1_880, "test", 1_880),
    "fgvc_aircraft": (datasets.FGVCAircraft, "split", "trainval", 6_667, "test", 3_333),
    "flowers102": (datasets.Flowers102, "split", "train", 1_020, "test", 6_149),
    "food101": (datasets.Food101, "split", "train", 75_750, "test", 25_250),
    "imagenette": (datasets.Imagenette, "split", "train", 9_469, "val", 3_925),
    "oxford_pets": (datasets.OxfordIIITPet, "split", "trainval", 3_680, "test", 3_669),
    "stl10": (datasets.STL10, "split", "train", 5_000, "test", 8_000),
    "svhn": (datasets.SVHN, "split", "train", 73_257, "test", 26_032),
}


def open_data(data, root, split, seed=0):
    """The `train` or `val` split of --data, (uint8 array (H, W, 3), label) pairs, or an exit."""
    if data in ("shapes", *DATASETS) and Path(data, split).is_dir():
        sys.exit(f"data.py: --data {data} is a name of ours and a folder here; say ./{data}")
    if data == "shapes":
        return Shapes(seed, split)
    if data not in DATASETS:
        try:
            return open_folder(Path(data, split))
        except OSError as error:  # no folder, no class ...
            wanted = f"not a folder with {split}/<class>/<images>, or shapes {' '.join(DATASETS)}"
            sys.exit(f"data.py: --data {data} is {wanted}: {one_line(error)}")
    return download(data, root, split)


def download(data, root, split):
    """One of DATASETS: rank 0 first, then the first process of each node, whose disk may be its
    own, then the others. An error of one ends all."""
    if data in ("svhn", "flowers102") and not importlib.util.find_spec("scipy"):
        sys.exit(f"data.py: --data {data} needs scipy: pip install scipy")
    make, argument, *splits = DATASETS[data]
    value, count = splits[2:] if split == "val" else splits[:2]
    as_array = v2.Compose([v2.RGB(), np.array])  # gray ones, too: (H, W, 3)
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    turn, problem = 0 if rank == 0 else 1 if local_rank == 0 else 2, ""
    for now in range(3):
        try:
            if now == turn:
                found = make(root, **{argument: value}, download=True, transform=as_array)
                if len(found) != count:
                    problem = f"it has {len(found)} of its {count} images"
        except Exception as error:  # noqa: BLE001 (no network, or whatever a damaged file raises)
            problem = one_line(error)
        problems = [problem] * (dist.get_world_size() if dist.is_initialized() else 1)
        if dist.is_initialized():
            dist.all_gather_object(problems, problem)
        if any(problems):
            wrong = f"not in {root}, and cannot be downloaded, or is there in part: {max(problems)}"
            sys.exit(f"data.py: --data {data} is {wrong}; remove what is there, and try again")
    return found


def open_folder(folder):
    """torchvision's ImageFolder; rank 0 says how many other files it leaves out.

    A folder that several links lead to counts once in a class.
    """
    endings, others = (*datasets.folder.IMG_EXTENSIONS, ".gif", ".avif", ".jfif"), []
    real, ways = cache(os.path.realpath), {}

    def is_image(path):
        here, inside = os.path.dirname(path), path[len(str(folder)) :].lower()
        once = ways.setdefault((real(here), inside.split(os.sep)[1]), here) == here
        is_one = once and inside.endswith(endings) and "/." not in inside
        return is_one or others.append(path)

    data = datasets.ImageFolder(folder, np.array, loader=read_image, is_valid_file=is_image)
    if others and os.environ.get("RANK", "0") == "0":
        print(f"data.py: {folder}: left out {len(others)} files, such as {others[0]}")
    refuse_dim(data)
    return data


def refuse_dim(data):
    """Exits where 16-bit files use a sixteenth of their range, as of 12-bit cameras: scaled to 8
    bits as all others are, they would be almost black."""
    brightest = 0
    with suppress(OSError):  # read_image names it
        for i in spread(data):
            with Image.open(data.samples[i][0]) as image:
                if not image.mode.startswith("I"):
                    return
                brightest = max(brightest, np.asarray(image).max())
        if brightest < 4096:
            wrong = f"16-bit images, such as {data.samples[0][0]}, have values up to {brightest}"
            sys.exit(f"data.py: {wrong} of 65535; scale them up, or write 8 bits")


def spread(data, count=64):
    """Numbers of `count` images, from the first to the last."""
    return np.linspace(0, len(data) - 1, min(count, len(data))).astype(int).tolist()


def sizes_of(data):
    """(height, width) of 64 images spread over the data; of files, their headers alone."""
    if isinstance(data, datasets.ImageFolder):
        return [read_image(data.samples[i][0], size_alone=True) for i in spread(data)]
    return [data[i][0].shape[:2] for i in spread(data)]


def fingerprint(data):
    """What tells other images from these: their number with a hash of the files' names, and the
    sizes of 64 of them, of which a repaired file changes one."""
    paths = [path for path, _ in getattr(data, "samples", ())]
    names = [path[len(str(data.root)) :] for path in paths] or type(data).__name__
    sizes = [os.path.getsize(paths[i]) for i in spread(paths)]
    return f"{len(data)} {hashlib.sha256(repr(names).encode()).hexdigest()[:12]}", sizes


def read_image(path, size_alone=False):
    """The image file as RGB, upright, on white where it is transparent, 16 bits scaled to 8; or its
    (height, width) alone, from the header. OSError that names what cannot be read or scaled."""
    try:
        with Image.open(path) as file:
            if size_alone:
                return file.size[::-1]
            image = ImageOps.exif_transpose(file)
            sixteen = image.mode == "I" and file.format in ("PNG", "PPM")
            if sixteen or image.mode.startswith("I;16"):  # Pillow's own conversion clips
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"no range is known for mode {image.mode}")
            elif image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # noqa: BLE001 (Pillow raises struct.error and others)
        raise OSError(f"data.py: cannot read image {path} ({error}); replace the file") from None


# ------------------------------------------------------------------------------- the drawn shapes
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
    """Built-in data: images of 4 x 4 copies of one shape; its kind is the label, all else varies.

    Item i -> uint8 array (32, 32, 3) and label in 0 .. 9, a pure function of seed, split and i.
    A copy has its own two colours, angle, place and scale, so the patches of an image share the
    kind of the shape and nothing else, and no linear map of pixels sees it.
    """

    def __init__(self, seed=0, split="train"):
        self.seed, self.val = seed, {"train": False, "val": True}[split]
        rng = np.random.default_rng(0)  # the stencils are the same for every seed
        bounds = (-0.26, 0.26), (0.85, 1.15), (-0.24, 0.24), (-0.24, 0.24)
        angle, scale, dx, dy = (rng.uniform(*bound, (64, 1, 1)) for bound in bounds)
        at = (np.arange(8) + 0.5) / 8 * 2 - 1
        x, y = at - dx, at[:, None] - dy
        cos, sin = np.cos(angle), np.sin(angle)
        x, y = (cos * x + sin * y) / scale, (cos * y - sin * x) / scale
        found = outlines(x, y)
        self.classes, distance = list(found), np.stack(list(found.values()))
        # (10 kinds, 64 variants, 8, 8) in [0, 1], one pixel of slope at the outline
        self.stencils = np.clip(0.5 - distance * scale * 8 / 2, 0, 1).astype(np.float32)

    def __len__(self):
        return 4_000 if self.val else 20_000

    def __getitem__(self, index):
        index = range(len(self))[index]  # an IndexError ends loops
        rng, label = np.random.default_rng((self.seed, self.val, index)), index % len(self.classes)
        stencil = self.stencils[label, rng.integers(64, size=(4, 4))][..., None]
        ground, figure = rng.random((2, 4, 4, 1, 1, 3), dtype=np.float32)
        image = ground + (figure - ground) * stencil  # (4, 4, 8, 8, 3)
        image = image.transpose(0, 2, 1, 3, 4).reshape(32, 32, 3)
        image = image + 0.1 * rng.standard_normal(image.shape, dtype=np.float32)
        return (image.clip(0, 1) * 255).astype(np.uint8), label


# ------------------------------------------------------------------------------ what is drawn anew
PURPOSES = "order crops masks colours directions network".split()  # a new one comes last


def seed_of(purpose, *numbers):
    """The seed of what is drawn for a purpose, from --seed and the step, the epoch, the image's
    number ...: a hash, so that all draws of a step are unrelated. It has 32 bits, as torch's CPU
    generator keeps no more: two seeds of a long run may coincide, at steps far apart."""
    key = 1 + PURPOSES.index(purpose), *numbers
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def generator_of(purpose, *numbers):
    return torch.Generator().manual_seed(seed_of(purpose, *numbers))


def batch_keys(num_images, batch_size, done, total, seed, mine):
    """This rank's part of each global batch after step `done`, as lists of (epoch, index)."""
    per_epoch = num_images // batch_size
    for step in range(done, total):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == done:
            order = torch.randperm(num_images, generator=generator_of("order", seed, epoch))
        yield [(epoch, index) for index in order[i * batch_size + mine].tolist()]


# ---------------------------------------------------------------------- from images to batches
class Images(torch.utils.data.Dataset):
    """Item (epoch, index) -> uint8 views (count, 3, size, size), of each kind of crop, and label.

    crops: kinds of random resized crops and flips, each (count, size, least and most share of the
    image), by seed, epoch and index alone; by default one view, resized and centred.
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
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            torch.default_generator.manual_seed(seed_of("crops", self.seed, epoch, index))
            views = [[self.flip(crop(image)) for _ in range(n)] for n, crop in self.crops]
            return [torch.stack(kind) for kind in views], label


def batches(images, size, crops, batch_size, done, total, seed, mine, workers, device):
    """The views of each step after `done`, on the device: an iterator over lists of (B, 3, side,
    side). Held images are cropped here, float in [0, 1]; others by `Images` in the processes that
    load them, uint8. Without crops a view is the image, resized and centred."""
    keys = batch_keys(len(images), batch_size, done, total, seed, mine)
    whole = hold(images, sizes_of(images), workers, device)
    if whole is not None and (crops or whole.shape[2:] == (size, size)):
        indices = (send(torch.tensor([i for _, i in step]), device) for step in keys)
        drawn = (generator_of("crops", seed, step) for step in range(done + 1, total + 1))
        pairs = zip(indices, drawn, strict=True)
        return (crop_held(whole[i], crops, draw, mine, batch_size) for i, draw in pairs)
    loader = load(Images(images, size, crops, seed), workers, device, batch_sampler=keys)
    return ([v for kind in kinds for v in send(kind, device).unbind(1)] for kinds, _ in loader)


def crop_held(images, crops, generator, mine, batch_size):
    """Views of held images, uint8 (B, 3, H, W): drawn for the whole batch, `mine` are used."""
    images, views = images / 255, []
    for count, size, *scale in crops:
        draws = torch.rand(count, batch_size, 23, generator=generator)[:, mine]
        views += [resized_crop(images, send(u, images.device), size, scale) for u in draws]
    return views or [images]


def hold(data, sizes, workers, device):
    """All images, uint8 (N, 3, H, W), on the device; None if they have several sizes, or more than
    96 px, or 8 GiB."""
    if len({*sizes}) > 1 or min(sizes[0]) > 96 or len(data) * 3 * math.prod(sizes[0]) > 2**33:
        return None
    parts = load(data, workers, device, batch_size=500, collate_fn=list)
    images = [image for part in parts for image, _ in part]
    if len({image.shape for image in images}) > 1:
        return None
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)


def load(data, workers, device, **options):
    """The batches of a DataLoader, whose processes leave signals to the main one."""
    options |= {"num_workers": workers, "worker_init_fn": leave_signals}
    return iter(torch.utils.data.DataLoader(data, pin_memory=device.type == "cuda", **options))


def leave_signals(worker):
    """Signals are the main process's: a loader that one ends would end the run before it saves."""
    os.setpgrp()  # torchrun and Ctrl-C send theirs to the group; SIGTERM is how a loader is ended
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """A loader whose pipe is full would outlive a parent that was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


# ---------------------------------------------------------- crops and colours of whole batches
def send(x, device):
    """x on the device; to a GPU from pinned memory, which does not wait for what runs there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def resized_crop(x, u, size, scale):
    """torchvision's RandomResizedCrop and flip, each image by draws of its own, on x's device.

    x (B, 3, H, W) float, u (B, 23) uniform draws in [0, 1), scale: least, most share of the image
    -> (B, 3, size, size). A bilinear resize is two small matrix products. Of ten boxes the first
    that fits counts; if none does, the first of all, cut to the image.
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


def photometric(x, u, p_blur=0.0, p_solarize=0.0):
    """Colour jitter (0.4, 0.4, 0.2, 0.1) with p 0.8, grayscale with p 0.2, blur and solarize.

    x (B, 3, H, W) float in [0, 1], u (B, 9) uniform draws in [0, 1) -> as x, each image by draws of
    its own: what torchvision does to one image at a time, on the whole batch and its device.
    Brightness, contrast, saturation, hue always in this order; hue turns in the YIQ plane.
    """
    u = u.T[..., None, None, None]  # (9, B, 1, 1, 1)
    brightness, contrast, saturation, hue, jittered, grayed, sigma, blurred, solarized = u

    y = (x * (1 + (2 * brightness - 1) * 0.4)).clamp(0, 1)
    mean = gray(y).mean((2, 3), keepdim=True)
    y = (mean + (1 + (2 * contrast - 1) * 0.4) * (y - mean)).clamp(0, 1)
    y = (gray(y) + (1 + (2 * saturation - 1) * 0.2) * (y - gray(y))).clamp(0, 1)
    angle = 2 * math.pi * 0.1 * (2 * hue[:, 0] - 1)  # (B, 1, 1)
    still, cos, sin = constant("hue", x.device)
    turn = still + angle.cos() * cos + angle.sin() * sin  # (B, 3, 3)
    y = (turn @ y.flatten(2)).view_as(y).clamp(0, 1)
    x = torch.where(jittered < 0.8, y, x)
    x = torch.where(grayed < 0.2, gray(x), x)
    if p_blur or p_solarize:
        x = torch.where(blurred < p_blur, blur(x, 0.1 + 1.9 * sigma[:, 0, 0]), x)
        x = torch.where((solarized < p_solarize) & (x >= 128 / 255), 1 - x, x)
    return x


def gray(x):
    """x (B, 3, H, W) -> (B, 1, H, W): the luma, YIQ's first row."""
    return (x * constant("luma", x.device)).sum(1, keepdim=True)


def blur(x, sigma):
    """Gaussian blur of x (B, 3, H, W), sigma (B, 1) pixels, by a kernel of 2 round(S / 20) + 1.

    That is SimCLR's tenth of the image, 23 pixels at 224. DINO has the same sigmas in pixels, but
    Pillow's blur. The kernel cuts wide ones: at 32 px a sigma of 2 acts as 1.29, at 12 px as 0.80.
    """
    radius = max(round(x.shape[-1] / 20), 1)
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-offsets.square() / (2 * sigma.square()))  # (B, taps)
    weights = (weights / weights.sum(1, keepdim=True)).T[..., None, None, None]
    y = F.pad(x, [radius] * 4, mode="reflect")
    y = sum(w * y[:, :, i : i + x.shape[2]] for i, w in enumerate(weights))
    return sum(w * y[..., i : i + x.shape[3]] for i, w in enumerate(weights))


def normalize(images):
    """float (..., 3, H, W) in [0, 1] -> normalised with ImageNet's mean and standard deviation."""
    in_range = not images.is_cpu or -0.01 < images.min() <= images.max() < 1.01  # no wait on GPUs
    if not images.is_floating_point() or not in_range:
        raise ValueError("data.py: normalize takes floating-point images in [0, 1]: divide by 255")
    mean, std = constant("normal", images.device)
    return (images - mean) / std


def one_line(error):
    """What an error says, without the traceback that a loading process puts before it."""
    return str(error).strip().rpartition("\n")[2].removeprefix("OSError: ")
