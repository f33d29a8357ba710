"""What did the encoder learn? k-NN and linear-probe accuracy of its frozen features.

    python probe.py ckpt.pt                  # the encoder and the data set that the checkpoint names
    python probe.py ckpt.pt --untrained      # the same encoder as it was before training: the floor under any claim
    python probe.py ckpt.pt --pool cls       # the CLS token instead of the mean of the patch tokens; no loss here looks at it

Features are extracted once from resized, centre-cropped images. Top-1 in percent on the validation split; the last line of
standard output is one JSON object. The validation split takes no part in fitting or choosing anything.
"""
import argparse
import json
import sys

import torch
import torch.nn.functional as F

from sigreg import effective_rank
from train import Images, build_encoder, embed, load_checkpoint, normalize, open_data, read


@torch.no_grad()
def extract_features(encoder, dataset, pool="avg", batch_size=500, workers=0, amp=False):
    """Features (N, D) float32 and labels (N,) int64, on the CPU, of all N images in order.

    dataset: train.Images; pool avg: mean of the patch tokens, cls: the CLS token; amp: bfloat16 autocast.
    """
    device = next(encoder.parameters()).device
    chunks = [[(0, i) for i in range(start, min(start + batch_size, len(dataset)))] for start in range(0, len(dataset), batch_size)]
    features, labels = [], []
    for images, _, label in read(torch.utils.data.DataLoader(dataset, batch_sampler=chunks, num_workers=workers)):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            out = encoder(normalize(images[:, 0].to(device) / 255))  # (B, 1 + N, D) or (B, D)
        features.append((out[:, 0].float() if pool == "cls" and out.ndim == 3 else embed(out)).cpu())
        labels.append(label)
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def knn_probe(train_x, train_y, val_x, val_y, k=20, temperature=0.07):
    """Top-1 in percent of the vote of the k nearest training images by cosine, each weighted exp(cosine / temperature).

    train_x (N, D), val_x (M, D) float features, train_y (N,), val_y (M,) int64 labels (Wu et al. 2018). Exact.
    """
    train_x = F.normalize(train_x, dim=1)
    classes = int(max(train_y.max(), val_y.max())) + 1
    right = 0
    for x, y in zip(F.normalize(val_x, dim=1).split(1000), val_y.split(1000)):
        cosine, nearest = (x @ train_x.T).topk(min(k, len(train_x)), dim=1)
        votes = x.new_zeros(len(x), classes).scatter_add_(1, train_y[nearest], (cosine / temperature).exp())
        right += (votes.argmax(1) == y).sum().item()
    return 100 * right / len(val_y)


def linear_probe(train_x, train_y, val_x, val_y, seed=0):
    """Top-1 in percent of multinomial logistic regression on features standardised by the training split.

    min_W,b  mean cross-entropy(x W + b, y) + 1e-4 |W|^2,  convex, by at most 200 steps of L-BFGS from zero; the last one
    counts. Shapes as in knn_probe. Nothing is drawn: seed is there for other solvers and changes nothing.
    """
    mean, std = train_x.mean(0), train_x.std(0).clamp_min(1e-6)
    train_x, val_x = (train_x - mean) / std, (val_x - mean) / std
    classes = int(max(train_y.max(), val_y.max())) + 1
    weight, bias = (train_x.new_zeros(shape, requires_grad=True) for shape in ((train_x.shape[1], classes), (classes,)))
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(train_x @ weight + bias, train_y) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        return 100 * ((val_x @ weight + bias).argmax(1) == val_y).double().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ckpt", help="a checkpoint of train.py")
    parser.add_argument("--untrained", action="store_true", help="probe the encoder as train.py's seed initialises it")
    parser.add_argument("--pool", choices=["avg", "cls"], default="avg", help="mean of the patch tokens, or the CLS token")
    parser.add_argument("--data-root", help="where torchvision data sets are; by default as in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--workers", type=int, help="processes that load images; by default as in training")
    options = parser.parse_args(argv)

    checkpoint = load_checkpoint(options.ckpt)
    args = checkpoint["args"]
    torch.manual_seed(args["seed"])
    encoder = build_encoder(args["model"], args["image_size"])
    if options.pool == "cls" and not hasattr(encoder, "cls_token"):
        sys.exit(f"probe.py: --pool cls needs a ViT and {args['model']} has no CLS token; leave it at avg")
    if not options.untrained:
        encoder.load_state_dict(checkpoint["encoder"])  # strict: exactly these names and shapes
    encoder.to(options.device).eval().requires_grad_(False)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}

    features = {}
    workers = args["workers"] if options.workers is None else options.workers
    for split in ("train", "val"):
        source = open_data(args["data"], options.data_root or args["data_root"], split, args["seed"], args["image_size"])
        features[split] = extract_features(encoder, Images(source, args["image_size"]), options.pool, workers=workers, amp=options.device.startswith("cuda"))
    (train_x, train_y), (val_x, val_y) = features["train"], features["val"]
    result = {
        "ckpt": options.ckpt, "data": args["data"], "model": args["model"], "image_size": args["image_size"], "pool": options.pool,
        "untrained": options.untrained, "step": 0 if options.untrained else checkpoint["step"], "train": len(train_x), "val": len(val_x),
        "knn": round(knn_probe(train_x, train_y, val_x, val_y), 2),
        "linear": round(linear_probe(train_x, train_y, val_x, val_y), 2),
        "erank": round(effective_rank(val_x).item(), 2),
    }
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items()), "the probe moved the frozen encoder"
    who = "untrained" if options.untrained else f"step {result['step']}"
    print(f"{args['model']} ({who}) on {args['data']}: {len(train_x):,} training and {len(val_x):,} validation images, {options.pool} pooling")
    print(f"k-NN (k=20, cosine) {result['knn']:.2f}%   linear {result['linear']:.2f}%   effective rank {result['erank']:.1f} of {encoder.dim}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
