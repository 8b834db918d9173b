"""Pictures of the demo.

    python demo/plot.py demo docs/demo.png                                 images and masks, loss, accuracies
    python demo/plot.py loss runs/cae-v2-nano-demo docs/demo_loss.png      the loss and its parts, from log.jsonl
    python demo/plot.py masks docs/masks.png                               block-wise and random masks of the demo
    python demo/plot.py dense docs/dense.png RUN=TITLE ...                 what segmenters and detectors make of scenes

The first one wants what demo/run.sh leaves in runs/.
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
RESULTS = {  # of demo/run.sh; colours that also colour-blind people tell apart
    "random weights": ("runs/linear-random-nano-demo", "#bbbbbb"),
    "pretrained here": ("runs/linear-cae-v2-nano-demo", "#0072b2"),
    "its teacher": ("runs/linear-demo-clip_teacher", "#e69f00"),
}


def pictures(count):
    """The first images of the demo, float (28, 28, 3) in [0, 1]."""
    file = str(ROOT / "demo" / "fashion_mnist" / "train.parquet")
    rows = load_dataset("parquet", data_files=file, split="train").select(range(count))["image"]
    images = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(28, 28) / 255 for picture in rows]
    return [image[..., None].repeat(1, 1, 3) for image in images]


def masked_picture(image, draw, seed):
    """The image under a mask of 13 of its 7 x 7 patches."""
    options = {"min_block": 4} if draw is block_mask else {}
    _, masked = draw(1, (7, 7), 13, generator=torch.Generator().manual_seed(seed), **options)
    image = image.clone()
    for index in masked[0].tolist():
        r, c = divmod(index, 7)
        image[4 * r : 4 * r + 4, 4 * c : 4 * c + 4] = torch.tensor([0.35, 0.45, 0.75])
    return image


def show(axis, image, label=""):
    axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_ylabel(label)


def draw_loss(axis, run_dir):
    """The loss of a run and its parts; returns what could be its title."""
    lines = [json.loads(line) for line in (Path(run_dir) / "log.jsonl").read_text().splitlines()]
    args = json.loads((Path(run_dir) / "config.json").read_text())["args"]
    for name, label in NAMES.items():
        if name in lines[0]:
            width = 2.5 if name == "loss" else 1.2
            axis.plot([v["images"] / 1000 for v in lines], [v[name] for v in lines], label=label, linewidth=width)
    axis.set_xlabel("images seen, in thousands")
    axis.set_ylabel("1 - cosine" if args["method"] == "cae-v2" else "loss")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    steps, batch = lines[-1]["step"], args["effective_batch_size"]
    return f"{args['method']} {args['size']} on {args['dataset']}: {steps} steps of {batch} images"


def demo(output):
    figure = plt.figure(figsize=(10, 3.2))
    left, middle, right = figure.subfigures(1, 3, width_ratios=[3.2, 3.6, 3.2])
    axes = left.subplots(4, 4, gridspec_kw=dict(wspace=0.06, hspace=0.06, left=0.1, right=0.98, top=0.9, bottom=0.04))
    for i, image in enumerate(pictures(8)):
        row, column = 2 * (i // 4), i % 4
        show(axes[row, column], image, "image" if column == 0 else "")
        show(axes[row + 1, column], masked_picture(image, block_mask, i), "masked" if column == 0 else "")
    left.suptitle("the encoder sees what is not masked", fontsize=10)
    axis = middle.subplots(gridspec_kw=dict(left=0.18, right=0.97, top=0.9, bottom=0.17))
    draw_loss(axis, "runs/cae-v2-nano-demo")
    axis.set_title("distance to CLIP's latents", fontsize=10)
    axis = right.subplots(gridspec_kw=dict(left=0.14, right=0.98, top=0.9, bottom=0.17))
    for i, (label, (folder, colour)) in enumerate(RESULTS.items()):
        result = json.loads(Path(folder, "result.json").read_text())
        for k, top1 in enumerate((result["knn"][0]["top1"], result["top1"])):
            axis.bar(k + 0.28 * (i - 1), top1, 0.26, color=colour, label=label if k == 0 else None)
            axis.text(k + 0.28 * (i - 1), top1 + 1, f"{top1:.0f}", ha="center", fontsize=8)
    axis.set_xticks([0, 1], ["kNN", "linear probe"])
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylim(0, 132)
    axis.set_title("top-1 of the frozen encoder, %", fontsize=10)
    axis.legend(frameon=False, fontsize=9, loc="upper left", borderaxespad=0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=110)


def loss(run_dir, output):
    figure, axis = plt.subplots(figsize=(7, 3.2))
    axis.set_title(draw_loss(axis, run_dir), fontsize=10)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def masks(output, columns=8):
    figure, axes = plt.subplots(3, columns, figsize=(columns, 3.2))
    for i, image in enumerate(pictures(columns)):
        show(axes[0, i], image)
        for axis, draw in zip(axes[1:, i], (block_mask, random_mask), strict=True):
            show(axis, masked_picture(image, draw, i))
    for axis, label in zip(axes[:, 0], ("image", "block-wise", "random"), strict=True):
        axis.set_ylabel(label)
    figure.tight_layout(pad=0.3)
    figure.savefig(output, dpi=110)


def dense(output, *runs, columns=2):
    """The first pictures that --save-pictures left in each of the runs: a row for each run."""
    figure, axes = plt.subplots(len(runs), columns, figsize=(5.2 * columns, 2.2 * len(runs)), squeeze=False)
    for row, run in zip(axes, runs, strict=True):
        folder, _, title = run.partition("=")
        for axis, file in zip(row, sorted(Path(folder, "pictures").glob("*.png")), strict=False):
            show(axis, plt.imread(file))
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(title or folder, fontsize=11)
    figure.tight_layout(pad=0.4)
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    {"demo": demo, "loss": loss, "masks": masks, "dense": dense}[sys.argv[1]](*sys.argv[2:])
