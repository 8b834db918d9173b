"""Pictures of a run.

    python demo/plot.py loss runs/cae-v2-nano-demo docs/demo_loss.png      the loss and its parts, from log.jsonl
    python demo/plot.py masks docs/masks.png                               block-wise and random masks of the demo
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from datasets import load_dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cae import block_mask, random_mask  # noqa: E402

NAMES = {
    "loss": "loss",
    "loss_cls": "class token",
    "loss_visible": "visible patches",
    "loss_masked": "masked patches",
    "loss_reconstruct": "reconstruction",
    "loss_align": "latent alignment",
}


def loss(run_dir, output):
    lines = [json.loads(line) for line in (Path(run_dir) / "log.jsonl").read_text().splitlines()]
    args = json.loads((Path(run_dir) / "config.json").read_text())["args"]
    figure, axis = plt.subplots(figsize=(7, 3.2))
    for name, label in NAMES.items():
        if name in lines[0]:
            width = 2.5 if name == "loss" else 1.2
            axis.plot([v["images"] / 1000 for v in lines], [v[name] for v in lines], label=label, linewidth=width)
    axis.set_xlabel("images seen, in thousands")
    axis.set_ylabel("1 - cosine" if args["method"] == "cae-v2" else "loss")
    axis.set_ylim(bottom=0)
    axis.set_title(f"{args['method']} {args['size']} on {args['dataset']}: {lines[-1]['step']} steps of "
                   f"{args['effective_batch_size']} images", fontsize=10)  # fmt: skip
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def masks(output, columns=8):
    file = str(ROOT / "demo" / "fashion_mnist" / "train.parquet")
    rows = load_dataset("parquet", data_files=file, split="train").select(range(columns))["image"]
    figure, axes = plt.subplots(3, columns, figsize=(columns, 3.2))
    for i, picture in enumerate(rows):
        for axis, draw in zip(axes[:, i], (None, block_mask, random_mask), strict=True):
            image = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(28, 28) / 255
            image = image[..., None].expand(-1, -1, 3).clone()
            if draw is not None:
                options = {"min_block": 4} if draw is block_mask else {}
                _, masked = draw(1, (7, 7), 13, generator=torch.Generator().manual_seed(i), **options)
                for index in masked[0].tolist():
                    r, c = divmod(index, 7)
                    image[4 * r : 4 * r + 4, 4 * c : 4 * c + 4] = torch.tensor([0.35, 0.45, 0.75])
            axis.imshow(image)
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, label in zip(axes[:, 0], ("image", "block-wise", "random"), strict=True):
        axis.set_ylabel(label)
    figure.tight_layout(pad=0.3)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    {"loss": loss, "masks": masks}[sys.argv[1]](*sys.argv[2:])
