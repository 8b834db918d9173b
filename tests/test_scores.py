"""The scores of segmentation and detection: against other implementations, against a slow one of COCO's rules in plain
Python, and against cases that are counted by hand."""

from engine.evaluation import average_precision, confusion, segmentation_scores

import copy
import logging
import math

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as rle
from torch._subclasses.fake_tensor import FakeTensorMode

# ----------------------------------------------------------------------------------------------------------------
# Segmentation.

C, ABSENT, UNLABELLED = 7, 4, 5  # a class that nothing has, and one that is only predicted


def maps(seed=0, shape=(6, 20, 30)):
    """Predictions that are right half of the time, and labels with ignored pixels."""
    draw = torch.Generator().manual_seed(seed)
    classes = torch.tensor([k for k in range(C) if k != ABSENT])
    predicted = classes[torch.randint(len(classes), shape, generator=draw)]
    labels = torch.where(torch.rand(shape, generator=draw) < 0.5, predicted, torch.randint(4, shape, generator=draw))
    labels[labels == UNLABELLED] = 6
    labels[torch.rand(shape, generator=draw) < 0.2] = 255
    return predicted, labels


def test_scores_are_those_of_torchmetrics():
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    predicted, labels = maps()
    scores = segmentation_scores(confusion(predicted, labels, C))

    def theirs(metric, average):
        return 100 * metric(C, average=average, ignore_index=255, validate_args=False)(predicted, labels).double()

    assert scores["miou"] == pytest.approx(theirs(MulticlassJaccardIndex, "macro").item(), rel=1e-6)
    assert scores["pixel_accuracy"] == pytest.approx(theirs(MulticlassAccuracy, "micro").item(), rel=1e-6)
    iou, accuracies = theirs(MulticlassJaccardIndex, "none").tolist(), theirs(MulticlassAccuracy, "none").tolist()
    # theirs are 0 where there is nothing to be right about, and their mean accuracy counts predicted classes as well
    assert [k for k in range(C) if scores["iou"][k] is None] == [ABSENT]
    assert [k for k in range(C) if scores["accuracy"][k] is None] == [ABSENT, UNLABELLED]
    assert [value or 0 for value in scores["iou"]] == pytest.approx(iou, rel=1e-6)
    assert [value or 0 for value in scores["accuracy"]] == pytest.approx(accuracies, rel=1e-6)
    labelled = [k for k in range(C) if k not in (ABSENT, UNLABELLED)]
    assert scores["mean_accuracy"] == pytest.approx(sum(accuracies[k] for k in labelled) / len(labelled), rel=1e-6)
    assert scores["iou"][UNLABELLED] == 0 and 0 < scores["miou"] < scores["mean_accuracy"] < 100


def test_scores_by_hand():
    labels = torch.tensor([[0, 0, 0, 1], [1, 255, 255, 255]])
    predicted = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 2]])
    matrix = confusion(predicted, labels, 3)
    assert matrix.dtype == torch.int64 and matrix.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert segmentation_scores(matrix) == {
        "miou": pytest.approx((50 + 100 / 3) / 2), "mean_accuracy": pytest.approx((200 / 3 + 50) / 2),
        "pixel_accuracy": pytest.approx(60), "iou": [50, pytest.approx(100 / 3), None],
        "accuracy": [pytest.approx(200 / 3), 50, None],
    }  # fmt: skip


def test_matrices_of_parts_add_up():
    predicted, labels = maps()
    whole = confusion(predicted, labels, C)
    assert whole.sum() == (labels != 255).sum()
    for sizes in ([1, 5], [2, 2, 2], [6, 0]):
        parts = zip(predicted.split(sizes), labels.split(sizes), strict=True)
        assert torch.equal(sum(confusion(*part, C) for part in parts), whole)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_any_integer_type(dtype):
    """The bins of 150 classes do not fit into the types that maps come in."""
    labels = torch.randint(150, (40, 40), generator=torch.Generator().manual_seed(0))
    predicted = labels.flip(0)
    assert torch.equal(confusion(predicted.to(dtype), labels.to(dtype), 150), confusion(predicted, labels, 150))


def test_another_number_may_mean_ignored():
    predicted, labels = maps()
    for other in (-1, -100, ABSENT):  # a class can be left out as well
        changed = torch.where(labels == 255, other, labels)
        assert torch.equal(confusion(predicted, changed, C, ignore=other), confusion(predicted, labels, C))


def test_a_perfect_prediction_and_an_empty_one():
    _, labels = maps()
    scores = segmentation_scores(confusion(labels.clamp(max=C - 1), labels, C))
    assert {scores[name] for name in ("miou", "mean_accuracy", "pixel_accuracy")} == {100}
    assert {*scores["iou"], *scores["accuracy"]} == {100, None}
    nothing = segmentation_scores(confusion(labels.clamp(max=C - 1), torch.full_like(labels, 255), C))
    none = dict.fromkeys(("miou", "mean_accuracy", "pixel_accuracy"))
    assert nothing == {**none, "iou": [None] * C, "accuracy": [None] * C}


def test_numbers_beyond_those_of_float32():
    """ADE20K's and COCO's pixels: a count that float32 cannot hold."""
    matrix = torch.tensor([[2**25 + 1, 1], [0, 2**40]])
    assert segmentation_scores(matrix)["iou"][0] == 100 * (2**25 + 1) / (2**25 + 2)


def test_what_is_no_prediction():
    predicted, labels = maps()
    with pytest.raises(ValueError, match=r"\(6, 20, 30\) and labels \(5, 20, 30\)"):
        confusion(predicted, labels[:5], C)
    for wrong in (-1, C, 254):
        with pytest.raises(ValueError, match="must be 0 to 6"):
            confusion(predicted, torch.where(labels == 3, wrong, labels), C)
        with pytest.raises(ValueError, match="must be 0 to 6"):
            confusion(torch.where(labels == 3, wrong, predicted), labels, C)
        unseen = torch.where(labels == 255, wrong, predicted)  # nobody looks at it
        assert torch.equal(confusion(unseen, labels, C), confusion(predicted, labels, C))


def test_the_host_does_not_wait_for_the_device():
    device = torch.device("cuda", 0)
    with FakeTensorMode():
        part = torch.zeros(2, 5, 5, dtype=torch.uint8, device=device)
        matrix = confusion(part, part, 150)
    assert matrix.shape == (150, 150) and matrix.device == device


# ----------------------------------------------------------------------------------------------------------------
# Detection: COCO's rules, slowly.

RANGES = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2), "_large": (96**2, 1e10)}
THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]


def box_overlap(found, true, is_crowd):
    width = min(found[2], true[2]) - max(found[0], true[0])
    height = min(found[3], true[3]) - max(found[1], true[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (found, true)]
    return width * height / (areas[0] if is_crowd else sum(areas) - width * height)


def mask_overlap(found, true, is_crowd):
    both, either = (found & true).sum(), (found | true).sum()
    whole = found.sum() if is_crowd else either
    return both / whole if whole else 0.0


def match_image(truth, found, overlap, threshold, low, high):
    """Of one class in one image: [(score, right, ignored)] and how many objects there are to be found.

    truth: [(shape, area, is_crowd)], found: [(shape, area, score)]. The best detection chooses first, among objects
    that count; only if none of them fits, among those that do not (crowds, other sizes).
    """
    counts = [not is_crowd and low <= area <= high for _, area, is_crowd in truth]
    taken, outcome = set(), []
    for shape, area, score in sorted(found, key=lambda row: -row[2])[:100]:
        partner = None
        for group in (True, False):
            best = min(threshold, 1 - 1e-10)
            for i, (other, _, is_crowd) in enumerate(truth):
                free = is_crowd or i not in taken
                if partner is not None and counts[partner] != group:
                    continue
                if counts[i] == group and free and overlap(shape, other, is_crowd) >= best:
                    best, partner = overlap(shape, other, is_crowd), i
        if partner is None:
            outcome.append((score, False, not low <= area <= high))
        else:
            taken.add(partner)
            outcome.append((score, counts[partner], not counts[partner]))
    return outcome, sum(counts)


def precisions(outcome, total):
    """At recalls 0, 0.01, ..., 1: the best precision at that recall or a higher one."""
    curve, right, wrong = [], 0, 0
    for _, is_right, is_ignored in sorted(outcome, key=lambda row: -row[0]):
        right, wrong = right + (is_right and not is_ignored), wrong + (not is_right and not is_ignored)
        if right + wrong:
            curve.append((right / total, right / (right + wrong)))
    return [max((p for recall, p in curve if recall >= r), default=0.0) for r in np.linspace(0, 1, 101)]


def reference(truths, detections, num_classes, masks):
    result = {}
    by_image = {image["id"]: image for image in detections}
    for prefix in ("", "mask_")[: 1 + masks]:
        overlap = mask_overlap if prefix else box_overlap

        def shapes(image, prefix=prefix):
            if prefix:
                return [rle.decode(one).astype(bool) for one in image["masks"]]
            return [[float(x) for x in box] for box in image["boxes"]]

        def area(shape, prefix=prefix):
            return shape.sum() if prefix else (shape[2] - shape[0]) * (shape[3] - shape[1])

        prepared = []
        for image in sorted(truths, key=lambda image: image["id"]):
            other = by_image.get(image["id"])
            there = zip(shapes(image), image["area"], image["crowd"], image["labels"], strict=True)
            found = zip(shapes(other), other["scores"], other["labels"], strict=True) if other else ()
            prepared.append((list(there), list(found)))
        tables = {}  # of classes, thresholds: 101 precisions
        for name, (low, high) in RANGES.items():
            for c in range(num_classes):
                for t, threshold in enumerate(THRESHOLDS):
                    outcome, total = [], 0
                    for there, found in prepared:
                        one = [row[:3] for row in there if row[3] == c]
                        two = [(shape, area(shape), score) for shape, score, label in found if label == c]
                        rows, count = match_image(one, two, overlap, threshold, low, high)
                        outcome, total = outcome + rows, total + count
                    if total:
                        tables[name, c, t] = precisions(outcome, total)

        def mean(name, classes, steps, tables=tables):
            chosen = [tables[name, c, t] for c in classes for t in steps if (name, c, t) in tables]
            return 100 * float(np.mean(chosen)) if chosen else None

        everything, every = range(num_classes), range(10)
        for name in RANGES:
            result[f"{prefix}ap{name}"] = mean(name, everything, every)
        result[f"{prefix}ap50"] = mean("", everything, [0])
        result[f"{prefix}ap75"] = mean("", everything, [5])
        if not prefix:
            result["ap_per_class"] = [mean("", [c], every) for c in everything]
    return result


def ellipse(box, height, width):
    """Its RLE and its number of pixels."""
    y, x = np.mgrid[:height, :width] + 0.5
    x1, y1, x2, y2 = (float(value) for value in box)
    inside = ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
    one = rle.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": one["size"], "counts": one["counts"].decode()}, int(inside.sum())


def random_scenes(seed, images=8, num_classes=3, height=270, width=290):
    """Objects of every size, a quarter of them crowds; detections near most of them, doubles, and some from nowhere."""
    draw = np.random.default_rng(seed)

    def clipped(box):
        x1, x2 = np.sort(np.clip(box[[0, 2]], 0, width))
        y1, y2 = np.sort(np.clip(box[[1, 3]], 0, height))
        return [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]

    truths, detections = [], []
    for number in draw.permutation(images):
        truth = {"id": 7 * int(number), "height": height, "width": width, "boxes": [], "labels": [], "crowd": [],
                 "area": [], "masks": []}  # fmt: skip
        found = {"id": truth["id"], "boxes": [], "scores": [], "labels": [], "masks": []}
        for _ in range(draw.integers(0, 8)):
            centre, side = draw.uniform(40, 230, 2), 8 * 30 ** draw.random() * draw.uniform(0.8, 1.2, 2)
            box = clipped(np.concatenate([centre - side / 2, centre + side / 2]))
            label = int(draw.integers(num_classes))
            one, area = ellipse(box, height, width)
            truth["boxes"].append(box)
            truth["labels"].append(label)
            truth["crowd"].append(bool(draw.random() < 0.25))
            truth["area"].append(float(area))
            truth["masks"].append(one)
            for _ in range(draw.integers(0, 4)):
                near = clipped(np.array(box) + draw.normal(0, 0.08, 4) * np.tile(side, 2))
                found["boxes"].append(near)
                found["labels"].append(label if draw.random() < 0.9 else int(draw.integers(num_classes)))
        for _ in range(draw.integers(0, 3)):
            found["boxes"].append(clipped(draw.uniform(0, 270, 4)))
            found["labels"].append(int(draw.integers(num_classes)))
        found["scores"] = draw.random(len(found["boxes"])).round(1 if seed % 2 else 9).tolist()  # odd: many are equal
        found["masks"] = [ellipse(box, height, width)[0] for box in found["boxes"]]
        truths.append(truth)
        if found["boxes"]:
            detections.append(found)
    return truths, detections


def close(scores, expected):
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name] == (value if value is None else pytest.approx(value, abs=1e-9)), name


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_cocos_rules(seed):
    truths, detections = random_scenes(seed)
    scores = average_precision(truths, detections, 4, masks=True)  # one class more than there are
    close(scores, reference(truths, detections, 4, masks=True))
    assert scores["ap_per_class"][3] is None and scores["ap_per_class"][0] > 0
    assert any(any(image["crowd"]) for image in truths)
    names = [f"{prefix}ap{name}" for prefix in ("", "mask_") for name in ("", "50", "75", *filter(None, RANGES))]
    assert {*names, "ap_per_class"} == scores.keys() and all(0 < scores[name] < 100 for name in names)
    assert scores["ap50"] > scores["ap75"] and scores["ap"] != scores["mask_ap"]
    boxes = average_precision(truths, detections, 4)
    assert boxes == {name: value for name, value in scores.items() if not name.startswith("mask_")}


def test_nothing_depends_on_the_order_of_images_or_is_changed():
    truths, detections = random_scenes(0)
    before = copy.deepcopy((truths, detections))
    scores = average_precision(truths, detections, 3, masks=True)
    assert average_precision(truths[::-1], detections[::-1], 3, masks=True) == scores
    assert (truths, detections) == before


def test_tensors_and_lists_are_alike():
    truths, detections = random_scenes(1)
    scores = average_precision(truths, detections, 3)
    for image in truths:
        image |= {key: torch.tensor(image[key]) for key in ("labels", "crowd", "area")}
        image["boxes"] = torch.tensor(image["boxes"], dtype=torch.float64).reshape(-1, 4)
    for image in detections:
        image |= {key: torch.tensor(image[key], dtype=torch.float64) for key in ("boxes", "scores")}
        image["labels"] = torch.tensor(image["labels"])
    assert average_precision(truths, detections, 3) == scores


def copies(truths, score=0.9):
    """The detections of somebody who sees everything; crowds are found as well."""
    return [{key: image[key] for key in ("id", "boxes", "labels", "masks")} | {"scores": [score] * len(image["boxes"])}
            for image in truths]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_a_perfect_prediction(seed):
    truths, _ = random_scenes(seed)
    scores = average_precision(truths, copies(truths), 3, masks=True)
    assert scores.pop("ap_per_class") == [pytest.approx(100, abs=1e-9)] * 3
    assert list(scores.values()) == [pytest.approx(100, abs=1e-9)] * 12


# By hand. One image of 200 x 200 pixels, boxes only.


def truth(*objects, number=1):
    """(box, label) or (box, label, "crowd")."""
    boxes = [list(row[0]) for row in objects]
    return {"id": number, "height": 200, "width": 200, "boxes": boxes, "labels": [row[1] for row in objects],
            "crowd": ["crowd" in row for row in objects], "area": [(c - a) * (d - b) for a, b, c, d in boxes],
            "masks": None}  # fmt: skip


def found(*objects, number=1):
    """(box, label, score)."""
    return {"id": number, "boxes": [list(row[0]) for row in objects], "labels": [row[1] for row in objects],
            "scores": [row[2] for row in objects], "masks": None}  # fmt: skip


A, B, SMALL, LARGE = (0, 0, 40, 40), (100, 100, 150, 150), (60, 60, 70, 70), (0, 0, 150, 150)


def test_half_of_a_match():
    """IoU 0.75 passes six of the ten thresholds."""
    scores = average_precision([truth((A, 0))], [found(((0, 0, 40, 30), 0, 0.5))], 1)
    assert scores["ap"] == pytest.approx(60) and scores["ap50"] == scores["ap75"] == pytest.approx(100)
    assert scores["ap_medium"] == pytest.approx(60) and scores["ap_small"] is scores["ap_large"] is None


def test_one_of_two_objects():
    """Recall 0.5 is reached by 51 of the 101 points: 0, 0.01, ..., 0.5."""
    scores = average_precision([truth((A, 0), (B, 0))], [found((A, 0, 0.5))], 1)
    assert scores["ap"] == pytest.approx(5100 / 101)


def test_a_false_alarm_before_the_hit_and_one_behind_it():
    nowhere = (160, 0, 200, 40)
    before = average_precision([truth((A, 0))], [found((nowhere, 0, 0.9), (A, 0, 0.5))], 1)
    behind = average_precision([truth((A, 0))], [found((nowhere, 0, 0.1), (A, 0, 0.5))], 1)
    assert before["ap"] == pytest.approx(50) and behind["ap"] == pytest.approx(100)


def test_the_second_detection_of_an_object_is_wrong():
    scores = average_precision([truth((A, 0), (B, 0))], [found((A, 0, 0.9), (A, 0, 0.8), (B, 0, 0.7))], 1)
    assert scores["ap"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_a_crowd_takes_any_number_of_detections():
    """What lies in it is no false alarm; what lies in it by a third is."""
    scene = truth((A, 0), ((50, 50, 200, 200), 0, "crowd"))
    inside = [((x, 60, x + 30, 90), 0, 0.9) for x in (60, 100, 140)]
    assert average_precision([scene], [found(*inside, (A, 0, 0.5))], 1)["ap"] == pytest.approx(100)
    outside = ((20, 60, 65, 90), 0, 0.9)
    assert average_precision([scene], [found(*inside, outside, (A, 0, 0.5))], 1)["ap"] == pytest.approx(50)
    other_class = [(box, 1, score) for box, _, score in inside]  # a crowd of class 0 excuses nothing of class 1
    scores = average_precision([scene | truth(*[((A, 0)), ((50, 50, 200, 200), 0, "crowd"), (B, 1)])],
                               [found(*other_class, (B, 1, 0.5))], 2)  # fmt: skip
    assert scores["ap_per_class"] == [0, pytest.approx(25)]


def test_detections_of_another_size_are_ignored():
    """A large false alarm costs nothing among small objects, and a large object's detection is none there."""
    scene, detections = truth((SMALL, 0), (LARGE, 0)), [found((LARGE, 0, 0.9), ((20, 20, 190, 190), 0, 0.8),
                                                              (SMALL, 0, 0.7))]  # fmt: skip
    scores = average_precision([scene], detections, 1)
    assert scores["ap_small"] == pytest.approx(100) and scores["ap_medium"] is None
    assert scores["ap_large"] == pytest.approx(100)
    # 0.5 of the points at precision 1, the rest at 2/3; where the alarm is near enough it is a double and wrong too
    assert scores["ap"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_the_area_that_decides_is_the_one_given():
    scene = truth((A, 0)) | {"area": [10.0]}  # of a thin mask in a box of 40 x 40
    scores = average_precision([scene], [found((A, 0, 0.5))], 1)
    assert scores["ap_small"] == pytest.approx(100) and scores["ap_medium"] is None
    edge = average_precision([truth((A, 0)) | {"area": [32.0**2]}], [found((A, 0, 0.5))], 1)
    assert edge["ap_small"] == edge["ap_medium"] == pytest.approx(100)  # COCO counts it in both


def test_the_area_of_a_found_mask_is_its_pixels():
    """Four corners in a box of 40 x 40 are a small mask: a false alarm among small objects alone."""
    corners = np.zeros((200, 200), np.uint8)
    corners[100:140:39, 100:140:39] = 1
    thin = {"size": [200, 200], "counts": rle.encode(np.asfortranarray(corners))["counts"].decode()}
    scene = truth((SMALL, 0), (B, 0))
    masks = [ellipse(box, 200, 200)[0] for box in scene["boxes"]]
    detection = found(((100, 100, 140, 140), 0, 0.9), (SMALL, 0, 0.5), (B, 0, 0.4)) | {"masks": [thin, *masks]}
    scores = average_precision([scene | {"masks": masks}], [detection], 1, masks=True)
    assert scores["mask_ap_small"] == pytest.approx(50) and scores["mask_ap_medium"] == pytest.approx(100)


def test_one_pixel():
    pixel = (3, 5, 4, 6)
    scores = average_precision([truth((pixel, 0))], [found((pixel, 0, 0.5))], 1)
    assert scores["ap"] == scores["ap_small"] == pytest.approx(100)
    flat = average_precision([truth((pixel, 0))], [found(((3, 5, 3, 5), 0, 0.9), (pixel, 0, 0.5))], 1)
    assert flat["ap"] == pytest.approx(50)  # a box without any area is a false alarm


def test_the_hundred_best_of_a_class_and_image():
    alarms = [((160, 0, 200, 40), 0, 0.9)] * 99
    late, later = [found(*alarms, *alarms[:extra], (A, 0, 0.5)) for extra in (0, 1)]
    assert average_precision([truth((A, 0))], [late], 1)["ap"] == pytest.approx(1)
    assert average_precision([truth((A, 0))], [later], 1)["ap"] == 0
    other_class = found(*[(box, 1, score) for box, _, score in alarms * 2], (A, 0, 0.5))
    assert average_precision([truth((A, 0))], [other_class], 2)["ap_per_class"] == [pytest.approx(100), None]


def test_scores_beyond_one_and_below_zero():
    """Logits rank as well as probabilities do."""
    detections = [found((A, 0, -3.0), ((160, 0, 200, 40), 0, -5.0), (B, 0, 7.0))]
    assert average_precision([truth((A, 0), (B, 0))], detections, 1)["ap"] == pytest.approx(100)


NOTHING = dict.fromkeys(("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"))


def test_where_nothing_is():
    full, bare = truth((A, 0), (B, 1)), truth(number=2)
    none = {**NOTHING, "ap_per_class": [None, None]}
    for detections in ([], [found()], [found(), found(number=2)]):
        scores = average_precision([full, bare], detections, 2)
        assert scores == {**NOTHING, "ap": 0, "ap50": 0, "ap75": 0, "ap_medium": 0, "ap_per_class": [0, 0]}
    assert average_precision([], [], 2) == average_precision([bare], [], 2) == none
    assert average_precision([bare], [found((A, 0, 0.5), number=2)], 2) == none
    alarm = average_precision([full, bare], [found((A, 0, 0.5), (B, 1, 0.5)), found((A, 0, 0.9), number=2)], 2)
    assert alarm["ap_per_class"] == [pytest.approx(50), pytest.approx(100)]
    crowds = truth((A, 0, "crowd"), (B, 1, "crowd"))
    assert average_precision([crowds], [found((A, 0, 0.5), (B, 0, 0.4))], 2) == none
    for empty in ([], torch.zeros(0, 4)):
        tensors = bare | {"boxes": empty, "labels": torch.zeros(0, dtype=torch.int64), "area": torch.zeros(0)}
        assert average_precision([tensors], [], 2, masks=True) == none | {f"mask_{name}": None for name in NOTHING}


def test_it_is_silent(capfd, caplog):
    truths, detections = random_scenes(2)
    with caplog.at_level(logging.INFO):
        average_precision(truths, detections, 3, masks=True)
        average_precision(truths, [], 3, masks=True)
    assert capfd.readouterr() == ("", "") and not caplog.records


def changed(image, **fields):
    return [{**image, **fields}]


def test_what_cannot_be_scored():
    there, seen = truth((A, 0), (B, 1)), found((A, 0, 0.5), (B, 1, 0.4))
    one = ellipse(A, 200, 200)[0]
    wrong = [
        ([there, there], [seen], "truth: images [1] come more than once"),
        ([there], [seen, seen], "detections: images [1] come more than once"),
        ([there], [found(number=5)], "detections: there is no truth of images [5]"),
        ([there], changed(seen, scores=[0.5]), "detections of image 1: 2 boxes, 2 labels and 1 scores"),
        (changed(there, area=[1.0] * 3), [seen], "truth of image 1: 2 boxes, 2 labels and 3 area"),
        ([there], changed(seen, scores=[0.5, math.nan]), "must be finite"),
        ([there], changed(seen, boxes=[A, (0, 0, math.inf, 1)]), "must be finite"),
        ([there], changed(seen, labels=[0, 2]), "labels must be 0 to 1"),
        (changed(there, labels=[-1, 0]), [seen], "labels must be 0 to 1"),
        (changed(there, crowd=[False]), [seen], "truth of image 1: 2 boxes and 1 crowd"),
    ]
    for truths, detections, message in wrong:
        with pytest.raises(ValueError) as error:
            average_precision(truths, detections, 2)
        assert message in str(error.value) and "\n" not in str(error.value)
    for masks in (None, [one], [one, {**one, "size": [200, 199]}]):
        for truths, detections in (
            (changed(there, masks=masks), changed(seen, masks=[one, one])),
            (changed(there, masks=[one, one]), changed(seen, masks=masks)),
        ):
            with pytest.raises(ValueError, match="of image 1: every one of its 2 boxes needs a mask"):
                average_precision(truths, detections, 2, masks=True)
