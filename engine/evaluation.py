"""How good is it? Accuracy over all ranks, weighted kNN, and published figures to print beside ours."""

from engine.checkpoints import flags_of_checkpoint
from engine.errors import BadFilesError, RunError, printable
from engine.images import to_device
from engine.log import watch
from engine.run import raise_together
from engine.stream import one_pass

import math
import sys
from collections import Counter
from contextlib import contextmanager
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


def psnr(error):
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [0, 1]; infinite for none."""
    return -10 * math.log10(error) if error > 0 else math.inf


@torch.no_grad()
def accuracy(accelerator, model, batches, shape=()):
    """Top-1 and top-5 accuracy in percent, (*shape, 2) as lists, and the number of images.

    batches: (inputs, labels (B)) of this rank's part of a pass; model(inputs) gives scores (*shape, B, C). Every image
    counts once; ranks may have different numbers of batches, or none. Raises UserError and RunError, on all ranks.
    """
    total = torch.zeros(*shape, 2, dtype=torch.int64, device=accelerator.device)
    images = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    with together():
        for inputs, labels in batches:
            with accelerator.autocast():
                total += hits(model(inputs), labels)
            images += len(labels)
    total, images = accelerator.reduce(total, "sum"), accelerator.reduce(images, "sum").item()
    return (100 * total.double() / max(images, 1)).tolist(), images


@contextmanager
def together():
    """Around an evaluation: what is wrong on one rank (others may have all of their images) is raised on all."""
    trouble = None
    try:
        yield
    except (BadFilesError, RunError) as error:
        trouble = error
    raise_together(trouble)


def evaluation_batches(accelerator, source, view, data, what, skipped):
    """What the view gives, and labels (B) where the source has classes, of this rank's part of one pass, on the device,
    with a bar. `skipped` is emptied, then collects the files that cannot be used. Raises BadFilesError."""
    names = (*view.names, *(("labels",) if source.classes else ()))
    for chunk in evaluation_chunks(accelerator, source, view, data, what, skipped):
        if len(chunk["ids"]):
            yield tuple(to_device(chunk[name], accelerator.device) for name in names)


def evaluation_chunks(accelerator, source, view, data, what, skipped):
    """The same as engine.stream's chunks, on the host: with ids. Some hold no image. Raises BadFilesError."""
    rank, world = accelerator.process_index, accelerator.num_processes
    total = source.num_images and len(range(rank, source.num_images, world))
    chunks = one_pass(source, view, data.batch_size, data.workers, rank, world)
    skipped.clear()
    for chunk in watch(chunks, total, what, accelerator.is_main_process):
        skipped += chunk["skipped"]
        for name in chunk["skipped"]:
            tqdm.write(printable(f"skipped {name}"), file=sys.stderr)
        yield chunk


def warn_if_seen(checkpoint, data):
    """Say if the run that a checkpoint came from has learned from images that --val-fraction holds out now."""
    args = flags_of_checkpoint(checkpoint or "")
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


# ----------------------------------------------------------------------------------------------------------------
# Segmentation: mean intersection over union.


def confusion(predicted, labels, num_classes, ignore=255):
    """How often each class was taken for each: int64 (C, C) on the tensors' device, a row for each label, a column for
    each prediction. Matrices of images, batches and ranks add up.

    predicted, labels: classes 0..C-1 of any integer type and any equal shape; where the label is `ignore`, nothing
    counts, whatever is predicted. The host does not wait for the device (as it would for torch.bincount, whose size
    depends on values). Raises ValueError for unequal shapes and, on the CPU, for numbers that are no classes; a GPU
    stops at these as it does in cross-entropy.
    """
    if predicted.shape != labels.shape:
        raise ValueError(f"predictions {tuple(predicted.shape)} and labels {tuple(labels.shape)} differ in shape: "
                         "resize the scores to the labels' size")  # fmt: skip
    rows, columns = labels.flatten().long(), predicted.flatten().long()
    is_known = (rows >= 0) & (rows < num_classes) & (columns >= 0) & (columns < num_classes)
    bins = torch.where(is_known, rows * num_classes + columns, -1)
    bins = torch.where(rows == ignore, num_classes**2, bins)  # one bin more, that is thrown away
    if bins.device.type == "cpu" and (bins < 0).any():
        raise ValueError(f"labels and predictions must be 0 to {num_classes - 1} (labels also {ignore}: not counted); "
                         f"labels go from {rows.min()} to {rows.max()}, predictions from {columns.min()} to "
                         f"{columns.max()}")  # fmt: skip
    counts = bins.new_zeros(num_classes**2 + 1).index_add_(0, bins, bins.new_ones(()).expand_as(bins))
    return counts[:-1].view(num_classes, num_classes)


def segmentation_scores(matrix):
    """Percentages of a confusion matrix (C, C) of all images: {"miou", "mean_accuracy", "pixel_accuracy", "iou": [per
    class], "accuracy": [per class]}.

    The mean IoU is over classes that labels or predictions have, the mean accuracy over those that labels have; the
    others are None in the lists, and so is every score where no pixel counted.
    """
    matrix = matrix.cpu().double()
    right, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)         # (C) each

    def percent(part, whole):
        return [100 * p / w if w else None for p, w in zip(part.tolist(), whole.tolist(), strict=True)]

    def mean(values):
        values = [value for value in values if value is not None]
        return sum(values) / len(values) if values else None

    iou, accuracies = percent(right, labelled + predicted - right), percent(right, labelled)
    pixel_accuracy = percent(right.sum(0, keepdim=True), labelled.sum(0, keepdim=True))[0]
    return {"miou": mean(iou), "mean_accuracy": mean(accuracies), "pixel_accuracy": pixel_accuracy,
            "iou": iou, "accuracy": accuracies}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Detection: COCO's average precision.


def checked_objects(image, what, num_classes, extra):
    """The boxes [x, y, width, height], labels and `extra` (scores or areas) of one image, as lists of equal length.
    Raises ValueError."""
    boxes = torch.as_tensor(image["boxes"], dtype=torch.float64, device="cpu").reshape(-1, 4)
    labels = torch.as_tensor(image["labels"], dtype=torch.int64).tolist()
    values = torch.as_tensor(image[extra], dtype=torch.float64).tolist()
    where = f"{what} of image {image['id']}"
    if not len(boxes) == len(labels) == len(values):
        raise ValueError(f"{where}: {len(boxes)} boxes, {len(labels)} labels and {len(values)} {extra}; "
                         "every object needs one of each")  # fmt: skip
    if not (boxes.isfinite().all() and all(map(math.isfinite, values))):
        raise ValueError(f"{where}: boxes and {extra} must be finite numbers; look for inf and nan in the model")
    if not all(0 <= label < num_classes for label in labels):
        raise ValueError(f"{where}: labels must be 0 to {num_classes - 1}, these are {sorted(set(labels))}")
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist(), labels, values


def checked_masks(image, what, count, size):
    """The masks of one image. Raises ValueError."""
    found = image.get("masks")
    if found is None and not count:
        return []
    if found is None or len(found) != count or any(list(mask["size"]) != size for mask in found):
        raise ValueError(f"{what} of image {image['id']}: every one of its {count} boxes needs a mask of the image's "
                         f"size {size} (height, width), as a compressed RLE")  # fmt: skip
    return found


def average_precision(truths, detections, num_classes, masks=False):
    """COCO's average precision of boxes, and with `masks` of masks: percentages {"ap", "ap50", "ap75", "ap_small",
    "ap_medium", "ap_large", "ap_per_class": [C]}, and the first six again as "mask_ap", "mask_ap50", ...

    truths: one dict per image: "id" (int), "height", "width" (pixels), "boxes" (n, 4) x1 y1 x2 y2 in pixels, "labels"
    (n) 0..C-1, "crowd" (n) bool, "area" (n) pixels, and "masks", n compressed RLEs, or None.
    detections: the same for those images that have any: "id", "boxes", "scores" (n), "labels", "masks" or None.

    Small is up to 32 x 32 pixels, large from 96 x 96, of the truth's "area" and of a detection's own box or mask.
    The 100 best detections of each class and image count; what lies in a crowd region counts for nothing. What no image
    has (a class, a size) is None. Raises ValueError.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    sizes = {int(image["id"]): [int(image["height"]), int(image["width"])] for image in truths}
    for what, images in (("truth", truths), ("detections", detections)):
        ids = [int(image["id"]) for image in images]
        repeated = sorted({i for i, count in Counter(ids).items() if count > 1})
        if repeated:
            raise ValueError(f"{what}: images {repeated[:5]} come more than once; let every image be seen by one rank")
        unknown = sorted(set(ids) - set(sizes))
        if unknown:
            raise ValueError(f"{what}: there is no truth of images {unknown[:5]}")

    objects, found = [], {"bbox": [], "segm": []}
    for image in truths:
        boxes, labels, areas = checked_objects(image, "truth", num_classes, "area")
        size, crowds = sizes[int(image["id"])], list(image["crowd"])
        if len(crowds) != len(boxes):
            raise ValueError(f"truth of image {image['id']}: {len(boxes)} boxes and {len(crowds)} crowd; "
                             "every object needs one of each")  # fmt: skip
        rles = checked_masks(image, "truth", len(boxes), size) if masks else [None] * len(boxes)
        for box, label, area, crowd, rle in zip(boxes, labels, areas, crowds, rles, strict=True):
            # numbers from 1: 0 would mean "not matched"
            objects.append({"id": len(objects) + 1, "image_id": int(image["id"]), "category_id": label, "bbox": box,
                            "area": area, "iscrowd": int(crowd), "segmentation": rle})  # fmt: skip
    for image in detections:
        boxes, labels, scores = checked_objects(image, "detections", num_classes, "scores")
        common = [{"image_id": int(image["id"]), "category_id": label, "score": score}
                  for label, score in zip(labels, scores, strict=True)]  # fmt: skip
        found["bbox"] += [row | {"bbox": box} for row, box in zip(common, boxes, strict=True)]
        if masks:  # without a box, whose area would be taken for the mask's
            rles = checked_masks(image, "detections", len(boxes), sizes[int(image["id"])])
            found["segm"] += [row | {"segmentation": rle} for row, rle in zip(common, rles, strict=True)]

    truth = COCO({
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in sizes.items()],
        "annotations": objects,
        "categories": [{"id": label, "name": str(label)} for label in range(num_classes)],
    })  # fmt: skip

    def mean(precisions):
        precisions = precisions[precisions > -1]  # COCO's sign for "there is nothing of this kind"
        return 100 * float(precisions.mean()) if precisions.size else None

    scores = {}
    for kind, prefix in (("bbox", ""), ("segm", "mask_"))[: 1 + masks]:
        judge = COCOeval_faster(truth, truth.loadRes(found[kind]), kind, print_function=lambda *_: None)
        judge.evaluate()
        judge.accumulate()
        # thresholds of IoU 0.5, 0.55, ..., recalls, classes, sizes; the last one of 1, 10 and 100 detections
        precision = judge.eval["precision"][..., -1]                                     # (10, 101, C, 4)
        scores |= {
            f"{prefix}ap": mean(precision[..., 0]),
            f"{prefix}ap50": mean(precision[0, ..., 0]),
            f"{prefix}ap75": mean(precision[5, ..., 0]),
            f"{prefix}ap_small": mean(precision[..., 1]),
            f"{prefix}ap_medium": mean(precision[..., 2]),
            f"{prefix}ap_large": mean(precision[..., 3]),
        }
        if kind == "bbox":
            scores["ap_per_class"] = [mean(precision[:, :, label, 0]) for label in range(num_classes)]
    return scores
