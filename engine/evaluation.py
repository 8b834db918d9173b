"""How good is it? Accuracy over all ranks, weighted kNN, and published figures to print beside ours."""

from engine.checkpoints import config_of_run
from engine.errors import BadFilesError, RunError, printable
from engine.images import to_device
from engine.log import watch
from engine.run import raise_together
from engine.stream import one_pass

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

# ImageNet-1K top-1 of published models, to print beside ours: name, kind, size (all with patches of 16 pixels),
# fine-tuned, frozen. "EP bench" is as the efficient probe's benchmark has it; the others are from the released README
# of CAE and later papers' tables.
PUBLISHED = [
    ("CAE-B, 300 epochs", "cae", "base", 83.6, {"linear": 64.5, "attentive": 74.0}),
    ("CAE-B, 800 epochs", "cae", "base", 83.8, {"linear": 68.9, "attentive": 75.9}),
    ("CAE-B, 1600 epochs", "cae", "base", 83.9, {"linear": 70.3, "attentive": 77.2}),
    ("CAE-L, 1600 epochs", "cae", "large", 86.2, {"linear": 77.8, "attentive": 81.2}),
    ("CAE v2-B, 300 epochs", "cae-v2", "base", 85.3, {"linear": 80.5}),
    ("CAE v2-L, 300 epochs", "cae-v2", "large", 86.7, {"linear": 81.7}),
    ("MAE-B, 1600 epochs", "mae", "base", 83.6, {"linear": 67.8, "attentive": 74.2}),
    ("MAE-L, 1600 epochs", "mae", "large", 86.0, {"linear": 76.0, "attentive": 78.8}),
    ("MVP-B, 300 epochs", "mvp", "base", 84.4, {"linear": 75.4}),
    ("BEiT v2-B, 300 epochs", "beit-v2", "base", 85.0, {"linear": 80.1}),
    ("MAE-B, EP bench", "mae", "base", None, {"knn": 35.6, "linear": 67.8, "ep": 75.5}),
    ("BEiT v2-B, EP bench", "beit-v2", "base", None, {"knn": 70.1, "linear": 79.0, "ep": 81.4}),
    ("CLIP-B/16, EP bench", "clip", "base", None, {"knn": 65.7, "linear": 77.9, "ep": 77.9}),
]


def hits(scores, labels, above=-math.inf):
    """How many of scores (..., B, C) have the label (B) first, and among the first five: (..., 2). Scores that are not
    above a bound do not count."""
    first = scores.topk(min(5, scores.shape[-1]), dim=-1)                                # (..., B, 5)
    right = (first.indices == labels[:, None]) & (first.values > above)
    return torch.stack([right[..., :1].any(-1).sum(-1), right.any(-1).sum(-1)], dim=-1)


@torch.no_grad()
def accuracy(accelerator, model, batches, shape=()):
    """Top-1 and top-5 accuracy in percent, (*shape, 2) as lists, and the number of images.

    batches: (inputs, labels (B)) of this rank's part of a pass; model(inputs) gives scores (*shape, B, C). Every image
    counts once; ranks may have different numbers of batches, or none. Raises UserError and RunError, on all ranks.
    """
    total = torch.zeros(*shape, 2, dtype=torch.int64, device=accelerator.device)
    images = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    trouble = None
    try:
        for inputs, labels in batches:
            with accelerator.autocast():
                total += hits(model(inputs), labels)
            images += len(labels)
    except (BadFilesError, RunError) as error:  # other ranks may have all of their images
        trouble = error
    raise_together(trouble)
    total, images = accelerator.reduce(total, "sum"), accelerator.reduce(images, "sum").item()
    return (100 * total.double() / max(images, 1)).tolist(), images


def evaluation_batches(accelerator, source, view, data, what, skipped):
    """uint8 images (B, 3, S, S) and labels (B) of this rank's part of one pass, on the device, with a bar. `skipped` is
    emptied, then collects the files that cannot be used. Raises BadFilesError."""
    rank, world = accelerator.process_index, accelerator.num_processes
    total = source.num_images and len(range(rank, source.num_images, world))
    chunks = one_pass(source, view, data.batch_size, data.workers, rank, world)
    skipped.clear()
    for chunk in watch(chunks, total, what, accelerator.is_main_process):
        skipped += chunk["skipped"]
        for name in chunk["skipped"]:
            tqdm.write(printable(f"skipped {name}"), file=sys.stderr)
        if len(chunk["ids"]):
            yield to_device(chunk["images"], accelerator.device), to_device(chunk["labels"], accelerator.device)


def warn_if_seen(checkpoint, data):
    """Say if the run that a checkpoint came from has learned from images that --val-fraction holds out now."""
    folder = Path(checkpoint or "")
    args = config_of_run(folder.parent if folder.name == "model" else folder).get("args", {})
    is_same = Path(args.get("dataset", "")).absolute() == Path(data.dataset).absolute()
    if data.val_fraction is not None and is_same and (args.get("val_fraction") or 0) < data.val_fraction:
        print(printable(f"note: {checkpoint} has learned from the images that are held out here; train.py "
                        f"--val-fraction {data.val_fraction:g} leaves them out"), file=sys.stderr)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# kNN.

KS = (20, 5, 10, 15, 50, 100, 200)
BLOCK = 2**16  # rows of the bank that are compared at once


def nearest(queries, bank, labels, k):
    """The k most similar rows of the bank: cosines (Q, k) and labels (Q, k), nearest first.

    queries (Q, D), bank (n, D), labels (n). The bank is read in blocks, so that nothing else grows with it. Where
    n < k, cosines of -inf fill up.
    """
    queries = F.normalize(queries, dim=-1)
    best = queries.new_full((len(queries), k), -math.inf)
    best_labels = labels.new_zeros(len(queries), k)
    for rows, row_labels in zip(bank.split(BLOCK), labels.split(BLOCK), strict=True):
        cosines = torch.cat([best, queries @ F.normalize(rows, dim=-1).T], dim=1)        # (Q, k + block)
        best, index = cosines.topk(k, dim=1)
        candidates = torch.cat([best_labels, row_labels.expand(len(queries), -1)], dim=1)
        best_labels = candidates.gather(1, index)                                        # (Q, k)
    return best, best_labels


def votes(cosines, labels, temperature, num_classes):
    """Scores of the classes: exp(cosine / temperature), summed over the neighbours (Q, k) of each class: (Q, C)."""
    weights = ((cosines - cosines[:, :1]) / temperature).exp()  # a common factor; overflows nowhere
    return weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)


def gather_rows(accelerator, x):
    """Rows of all ranks, which may have different numbers of them: (n, ...) -> (sum of n, ...)."""
    counts = accelerator.gather(torch.tensor([len(x)], device=x.device)).tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = accelerator.gather(padded).split(max(counts))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@torch.no_grad()
def knn(accelerator, bank, labels, queries, query_labels, num_classes, ks, temperatures):
    """Weighted kNN accuracy for every number of neighbours and temperature: a list of result rows.

    bank (n, 2, D), labels (n), queries (m, 2, D), query_labels (m): this rank's parts, class token and mean of the
    patches. The bank stays where it is: all queries go to all ranks, and each query's nearest rows of every rank are
    merged. Exact, whatever the number of ranks.
    """
    everyone, everyones_labels = gather_rows(accelerator, queries), gather_rows(accelerator, query_labels)
    k_max, rows = max(ks), []
    for p, pool in enumerate(("class", "mean")):
        right = {(k, t): 0 for k in ks for t in temperatures}
        for q, y in zip(everyone[:, p].split(1024), everyones_labels.split(1024), strict=True):
            near = nearest(q, bank[:, p], labels, k_max)                                 # (Q, k) twice
            # gather joins along the first dimension: of (1, Q, k) it makes (world, Q, k)
            cosines, classes = (accelerator.gather(x[None]).transpose(0, 1).flatten(1) for x in near)
            cosines, index = cosines.topk(k_max, dim=1)
            classes = classes.gather(1, index)                                           # (Q, k)
            for k, t in right:
                right[k, t] = right[k, t] + hits(votes(cosines[:, :k], classes[:, :k], t, num_classes), y, above=0)
        for (k, t), count in right.items():
            top1, top5 = (100 * count / len(everyone)).tolist()
            rows.append({"pool": pool, "k": k, "temperature": t, "top1": round(top1, 3), "top5": round(top5, 3)})
    return rows
