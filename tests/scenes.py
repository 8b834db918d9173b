"""Small annotated data sets for the tests, in the formats that finetune.py segment and detect read: coloured rectangles
on grey, 40 to 64 pixels high and wide, and no size as the one before."""

import io
import json
import tarfile

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from faster_coco_eval.core import mask
from PIL import Image as Pillow

THINGS = ("red", "green", "blue")
CLASSES = ("background", *THINGS)
COLOURS = ((220, 30, 30), (30, 200, 40), (40, 60, 230))
CITYSCAPES = (7, 26, 23)  # of labelIds: road, car, sky


def scene(number, side=None):
    """uint8 (H, W, 3); uint8 (H, W), 0 background, 1 to 3 things; and objects ((x, y, width, height), thing from 0).
    side: of a square one."""
    draw = np.random.default_rng(number)
    height, width = 40 + 5 * number % 25, 40 + (7 * number + 11) % 25
    height, width = (side, side) if side else (height, width)
    image = draw.integers(100, 140, (height, width, 3)).astype(np.uint8)
    kinds, objects = np.zeros((height, width), np.uint8), []
    for thing in draw.permutation(3)[: 1 + number % 3]:
        (w, h), thing = draw.integers(14, 26, 2).tolist(), int(thing)
        x, y = int(draw.integers(0, width - w)), int(draw.integers(0, height - h))
        image[y : y + h, x : x + w] = COLOURS[thing]
        kinds[y : y + h, x : x + w] = 1 + thing
        objects.append(((x, y, w, h), thing))
    return image, kinds, objects


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def numbers_of(splits):
    """{split: how many} -> {split: the numbers of its scenes}, of which no two splits have the same."""
    first = 0
    for split, count in splits.items():
        yield split, range(first, first + count)
        first += count


# Segmentation.


def write_ade(folder, **splits):
    """ADE20K's: 0 is no class, and a table names the others."""
    for split, numbers in numbers_of(splits):
        for n in numbers:
            image, kinds, _ = scene(n)
            put(folder / "images" / split / f"ADE_{n:08d}.jpg", encoded(image, "JPEG"))
            put(folder / "annotations" / split / f"ADE_{n:08d}.png", encoded(kinds))
    rows = [f"{i}\t0.1\t10\t2\t1\t{name}, {name} thing" for i, name in enumerate(THINGS, 1)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n")
    return folder


def write_pairs(folder, **splits):
    """images/SPLIT and annotations/SPLIT, which name no classes."""
    for split, numbers in numbers_of(splits):
        for n in numbers:
            image, kinds, _ = scene(n)
            put(folder / "images" / split / f"{n:03d}.png", encoded(image))
            put(folder / "annotations" / split / f"{n:03d}.png", encoded(kinds))
    return folder


def write_cityscapes(folder, **splits):
    """Cityscapes' with labelIds; the background is one that does not count."""
    value = np.array((3, *CITYSCAPES), np.uint8)
    for split, numbers in numbers_of(splits):
        for n in numbers:
            image, kinds, _ = scene(n)
            name = f"{split}/{('aachen', 'ulm')[n % 2]}/city_{n:06d}_000019"
            put(folder / "leftImg8bit" / f"{name}_leftImg8bit.png", encoded(image))
            put(folder / "gtFine" / f"{name}_gtFine_labelIds.png", encoded(value[kinds]))
            put(folder / "gtFine" / f"{name}_gtFine_color.png", encoded(image))
    return folder


def map_rows(numbers, side=None):
    pairs = [scene(n, side)[:2] for n in numbers]
    return {"image": [{"bytes": encoded(image), "path": f"{n}.png"} for n, (image, _) in zip(numbers, pairs,
                                                                                           strict=True)],
            "annotation": [{"bytes": encoded(kinds), "path": None} for _, kinds in pairs]}  # fmt: skip


def write_maps(folder, group=1000, side=None, **splits):
    """Parquet with two columns of pictures, in row groups of `group` rows."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "annotation": Image()})
    for split, numbers in numbers_of(splits):
        Dataset.from_dict(map_rows(numbers, side), features).to_parquet(folder / f"{split}.parquet", batch_size=group)
    return folder


def write_map_tars(folder, ending="jpg", **splits):
    """webdataset: NUMBER.jpg (or .png) beside NUMBER.seg.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, numbers in numbers_of(splits):
        with tarfile.open(folder / f"{split}-00000.tar", "w") as tar:
            for n in numbers:
                image, kinds, _ = scene(n)
                for name, data in ((f"{n:06d}.{ending}", encoded(image, "JPEG" if ending == "jpg" else "PNG")),
                                   (f"{n:06d}.seg.png", encoded(kinds))):  # fmt: skip
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


# Detection.


def corners(box):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def runs(box, height, width, compressed):
    """A rectangle as RLE."""
    x, y, w, h = box
    pixels = np.zeros((height, width, 1), np.uint8, order="F")
    pixels[y : y + h, x : x + w] = 1
    if compressed:
        (run,) = mask.encode(pixels)
        return {"size": [height, width], "counts": run["counts"].decode()}
    flat = pixels.ravel(order="F")
    ends = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), len(flat)]
    lengths = np.diff(ends).tolist()
    return {"size": [height, width], "counts": [0, *lengths] if flat[0] else lengths}


def coco_annotations(number, masks=True, side=None):
    """Of a scene: polygons and both kinds of RLE in turn. Number 3 has a crowd, 4 nothing, 5 a box without width, 6 one
    of a single pixel."""
    image, _, objects = scene(number, side)
    height, width = image.shape[:2]
    entries = []
    for i, (box, thing) in enumerate([] if number == 4 else objects):
        kinds = [[corners(box)], runs(box, height, width, True), runs(box, height, width, False)]
        entries.append({"bbox": box, "category_id": 10 * (thing + 1), "iscrowd": int(number == 3 and i == 0),
                        "area": box[2] * box[3], "segmentation": kinds[(number + i) % 3]})  # fmt: skip
    odd = {5: (7, 7, 0, 9), 6: (20, 20, 1, 1)}.get(number)
    if odd:
        entries.append({"bbox": odd, "category_id": 20, "iscrowd": 0, "area": odd[2] * odd[3],
                        "segmentation": [corners(odd)]})  # fmt: skip
    for entry in entries:
        if not masks:
            del entry["segmentation"]
    return entries


def write_coco(folder, masks=True, side=None, **splits):
    """COCO's: annotations/instances_SPLIT2017.json, SPLIT2017/; categories 10, 20 and 30."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, numbers in numbers_of(splits):
        content = {"images": [], "annotations": [],
                   "categories": [{"id": 10 * i, "name": name} for i, name in enumerate(THINGS, 1)]}  # fmt: skip
        for n in numbers:
            pixels = scene(n, side)[0]
            name = f"{n:012d}.jpg"
            put(folder / f"{split}2017" / name, encoded(pixels, "JPEG"))
            content["images"].append({"id": n, "file_name": name, "height": len(pixels), "width": len(pixels[0])})
            for entry in coco_annotations(n, masks, side):
                content["annotations"].append({**entry, "id": len(content["annotations"]) + 1, "image_id": n})
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return folder


def write_objects(folder, group=1000, **splits):
    """Parquet as detection sets on the Hub: a column with a dict of lists, boxes only."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "objects": {
        "bbox": List(List(Value("float32"), length=4)), "category": List(ClassLabel(names=list(THINGS))),
        "area": List(Value("int64")),
    }})  # fmt: skip
    for split, numbers in numbers_of(splits):
        scenes = [scene(n) for n in numbers]
        rows = {
            "image": [{"bytes": encoded(image), "path": f"{n}.png"} for n, (image, _, _) in zip(numbers, scenes,
                                                                                             strict=True)],
            "objects": [{"bbox": [box for box, _ in objects], "category": [thing for _, thing in objects],
                         "area": [w * h for (_, _, w, h), _ in objects]} for _, _, objects in scenes],
        }  # fmt: skip
        Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet", batch_size=group)
    return folder
