"""Source B's claim, one setting for many networks: trains each, and scores it before and after.

python assets/networks.py DATA        # DATA as train.py takes it; about three hours on two cores

The recipe is crops with its default loss and rate, 150 steps of 64 images, two global and two local
views; the networks are our ViTs and all of torchvision's that build_encoder takes, up to 60 million
parameters. k-NN has 10,000 training and 2,000 validation images. A line for each network goes into
networks.csv beside this file; what stands there is not run again.
"""

import csv
import re
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import Subset
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
import probe
import sigreg
import train

TABLE = Path(__file__).with_name("networks.csv")
COLUMNS = (
    "network parameters dim knn_before knn_after rank_before rank_after seconds problem".split()
)
VITS = [f"vit_{size}{patch}" for size in "nts" for patch in (4, 8)] + ["vit_n2"]
FLAGS = "--recipe crops --batch-size 64 --local-views 2 --steps 150 --log-every 50 --save-every 150"

AMP = train.bfloat16_is_faster()


def names():
    """The networks, small ones first."""
    found = {}
    for name in models.list_models(module=models):
        if re.search(model.BACKBONES, name):
            found[name] = models.get_model_weights(name).DEFAULT.meta["num_params"]
    return VITS + sorted((name for name, count in found.items() if count <= 6e7), key=found.get)


def scores(encoder, splits, size):
    """k-NN, and the effective rank of the training images' features."""
    encoder.eval()
    found = []
    for source, count in zip(splits, (10_000, 2_000), strict=True):
        some = Subset(source, data.spread(source, count))
        found += probe.extract_features(encoder, data.Images(some, size), amp=AMP)
    return probe.knn_probe(*found)["knn"], sigreg.effective_rank(found[0]).item()


def one(name, source, splits, ckpt):
    """The row of one network: trained by train.main, from the same start that is scored first."""
    row = {"network": name}
    try:
        train.main(["--data", source, "--model", name, "--ckpt", str(ckpt), *FLAGS.split()])
        args = torch.load(ckpt, weights_only=True)["args"]
        torch.manual_seed(args["seed"])
        encoder = model.build_encoder(name, args["image_size"])
        row["parameters"] = sum(p.numel() for p in encoder.parameters())
        row["dim"] = encoder.dim
        before = scores(encoder, splits, args["image_size"])
        encoder.load_state_dict(torch.load(ckpt, weights_only=True)["encoder"])
        after = scores(encoder, splits, args["image_size"])
        row |= {"knn_before": before[0], "knn_after": after[0]}
        row |= {"rank_before": round(before[1], 1), "rank_after": round(after[1], 1)}
    except (SystemExit, ValueError) as error:  # what cannot run ends in one line
        row["problem"] = str(error)
    return row


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    splits = [data.open_data(sys.argv[1], "data", split) for split in ("train", "val")]
    known = list(csv.DictReader(TABLE.open())) if TABLE.exists() else []
    with TABLE.open("a", buffering=1) as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not known:
            table.writeheader()
        for name in [n for n in names() if n not in {row["network"] for row in known}]:
            ckpt, start = Path(f"{name}.pt"), time.perf_counter()
            row = one(name, sys.argv[1], splits, ckpt)
            table.writerow(row | {"seconds": round(time.perf_counter() - start)})
            ckpt.unlink(missing_ok=True)
            ckpt.with_suffix(".jsonl").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
