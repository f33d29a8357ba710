"""Patch tokens as colours: python assets/pca.py ckpt.pt pca.png

Eight validation images, up to four times finer than in training, each beside the first three
principal components of its tokens as red, green and blue. The components are those of all eight
together, so one colour means one thing everywhere. Each axis points where its largest entry is
positive, and runs from the 1st to the 99th percentile.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import model
import train

if len(sys.argv) != 3:
    sys.exit(__doc__)
saved, path = train.load_checkpoint(sys.argv[1]), Path(sys.argv[2])
args = saved["args"]
if not args["model"].startswith("vit_"):
    sys.exit(f"pca.py: {args['model']} has no patch tokens; take the checkpoint of a ViT")
if path.suffix not in (".png", ".jpg") or not path.parent.is_dir():
    sys.exit(f"pca.py: {path} must end in .png or .jpg, in a folder that is there")
encoder = model.vit(args["model"], args["image_size"]).eval()
encoder.load_state_dict(saved["encoder"])

side = args["image_size"] * max(min(4, 448 // args["image_size"]), 1)
source = data.open_data(args["data"], args["data_root"], "val", args["seed"])
images = data.Images(source, side)
chosen = torch.linspace(0, len(images) - 1, 8).long().tolist()
images = torch.cat([images[0, i][0][0] for i in chosen]) / 255
with torch.no_grad():
    tokens = encoder(data.normalize(images))[:, 1:].flatten(0, 1).double()  # (8 P, D)
tokens -= tokens.mean(0)
axes = torch.linalg.eigh(tokens.T @ tokens).eigenvectors[:, -3:].flip(1)  # the largest first
axes *= axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
tokens = (tokens @ axes).float()
low, high = tokens.quantile(torch.tensor([0.01, 0.99]), dim=0)
grid = side // encoder.patch_size
colours = ((tokens - low) / (high - low)).clamp(0, 1).view(8, grid, grid, 3).permute(0, 3, 1, 2)
pairs = [F.interpolate(x, (max(side, 128),) * 2) for x in (images, colours)]
save_image(torch.stack(pairs, dim=1).flatten(0, 1), path, nrow=4, padding=4, pad_value=1)
print(f"{path}: 8 validation images at {side} px beside their tokens' components")
