"""Annotated images as data sets hold them: pictures of class numbers (segmentation), objects with boxes and masks
(detection). Both kinds of folder answer as folders.ImageFolder does, and leave to others what has another layout.

The libraries that read them are imported where they are used: a wrong flag is answered without them.
"""

from engine.errors import UserError, first_line, require
from engine.folders import IMAGES, NotCoveredError
from engine.images import FORMATS  # and the limit on pixels

import io
import json
import math
import operator
import os
import posixpath
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

IGNORE = 255  # the class number of pixels that do not count, up to 255 classes
IGNORE_OF_MANY = 65535  # the same with more
FURTHEST = 1e6  # pixels from the origin: of a polygon's corners beyond, the drawing would take for ever
SPLIT_OF = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation", "testing": "test"}
ANNOTATIONS = ("annotations", "labels", "masks")  # folders beside images/
ROBOFLOW = "_annotations.coco.json"

CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Pictures of class numbers.


def decode_annotation(data):
    """Encoded bytes of a picture with one class number per pixel -> int32 (H, W): the indices of a palette, not its
    colours; grey of 1 to 16 bits as the file has it; of colours with equal channels the value.

    Raises ValueError for a picture that cannot hold class numbers, and an exception of any kind for what is no image,
    is cut short or damaged (PNG), or claims more than MAX_PIXELS.
    """
    import numpy as np

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken EXIF and the like; the pixels decide
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:  # whose message holds an address in memory
            raise ValueError("it is no image of a known format") from None
        if image.format in ("JPEG", "PPM"):  # lossy; Pillow scales the values of some PPM
            raise ValueError(f"it is a {image.format}, which does not keep class numbers: save annotations as PNG")
        bits = 8
        if image.format == "PNG":
            bits = data[24]
            if bits == 16 and image.mode != "I;16":  # Pillow has no colours of 16 bits: it drops the lower 8
                raise ValueError("it is a colour picture of 16 bits: save annotations as grey PNG")
            image.verify()  # half a picture would be class 0 below; images.py lets Pillow fill up what is missing
            image = Image.open(io.BytesIO(data), formats=("PNG",))
        pixels = np.array(image)
    if image.mode in ("LA", "PA"):  # without opacity
        pixels = pixels[..., 0]
    elif image.mode in ("RGB", "RGBA"):
        if (pixels[..., :1] != pixels[..., 1:3]).any():
            raise ValueError("it is a colour picture: an annotation has one class number per pixel")
        pixels = pixels[..., 0]
    elif image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise ValueError(f"it is a picture of mode {image.mode}: an annotation has one class number per pixel")
    if bits < 8 and image.mode == "L":
        pixels = pixels // (255 // (2**bits - 1))  # Pillow spreads grey of 2 and 4 bits over 0..255
    return torch.from_numpy(pixels.astype(np.int32))


@lru_cache(maxsize=16)
def class_table(num_classes, reduce_zero_label, ignore_index, numbers):
    """int32 (65537): the class number of every value of a pixel, -1 for none; the last entry is the ignored one.
    `numbers` is a tuple of pairs, or None. Raises ValueError."""
    if not 0 < num_classes < IGNORE_OF_MANY:
        raise ValueError(f"--num-classes is {num_classes}: annotations have 1 to {IGNORE_OF_MANY - 1} classes")
    ignored = IGNORE if num_classes <= IGNORE else IGNORE_OF_MANY
    if numbers is not None:
        table = torch.full((2**16 + 1,), ignored, dtype=torch.int32)
        for value, number in numbers:
            if not (0 <= value < 2**16 and 0 <= number < num_classes):
                raise ValueError(f"pixel value {value} cannot stand for class {number} of {num_classes}")
            table[value] = number
        return table
    table = torch.full((2**16 + 1,), -1, dtype=torch.int32)
    first = int(reduce_zero_label)
    table[first : first + num_classes] = torch.arange(num_classes, dtype=torch.int32)
    table[:first] = ignored
    if 0 <= ignore_index < 2**16:
        table[ignore_index] = ignored
    table[-1] = ignored
    return table


def map_numbers(annotation, num_classes, *, reduce_zero_label=False, ignore_index=IGNORE, numbers=None):
    """An annotation int32 (H, W) -> class numbers 0..C-1, 255 where a pixel is ignored: uint8 (H, W). With more than
    255 classes int32, and 65535 for ignored.

    numbers: {value of a pixel: class number}, all other values are ignored. Without it, pixels equal to `ignore_index`
    are ignored; with `reduce_zero_label` 0 is ignored too, and all others go down by one. Raises ValueError for a
    value that is neither.
    """
    pairs = None if numbers is None else tuple(numbers.items())
    table, values = class_table(num_classes, reduce_zero_label, ignore_index, pairs), annotation
    low, high = (bound.item() for bound in annotation.aminmax())
    if low < 0 or high >= 2**16:
        outside = (annotation < 0) | (annotation >= 2**16)
        unknown = annotation[outside & (annotation != ignore_index)]
        if len(unknown) and numbers is None:
            raise ValueError(no_class(unknown[0].item(), num_classes))
        values = annotation.masked_fill(outside, 2**16)
    mapped = table.index_select(0, values.flatten()).view(annotation.shape)
    if mapped.min() < 0:
        raise ValueError(no_class(annotation[mapped < 0][0].item(), num_classes))
    return mapped.to(torch.uint8) if num_classes <= IGNORE else mapped


def no_class(value, num_classes):
    return (f"pixel value {value} is none of the {num_classes} classes: pass --num-classes if there are more, "
            f"--ignore-index {value} if it stands for no class, or --reduce-zero-label if 0 does")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Folders.


class OnDemand(Mapping):
    """{split: its data}, which is read when it is asked for."""

    def __init__(self, splits, read):
        self.splits, self.read = splits, read

    def __getitem__(self, split):
        return self.read(split)

    def __contains__(self, split):
        return split in self.splits

    def __iter__(self):
        return iter(self.splits)

    def __len__(self):
        return len(self.splits)


def in_order(splits):
    """{split: ...} with train, validation and test first, the others sorted."""
    usual = {"train": 0, "validation": 1, "test": 2}
    return dict(sorted(splits.items(), key=lambda item: (usual.get(item[0], 3), item[0])))


def by_split(folders):
    """{name of a folder or file: ...} -> the same by the names of splits; what two would have is left to none."""
    names = {name: SPLIT_OF.get(name, name) for name in folders}
    times = Counter(names.values())
    return in_order({names[name] if times[names[name]] == 1 else name: folders[name] for name in folders})


def folders_in(folder):
    """Sorted names; [] where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._")


def pictures(folder, ending="", deep=True):
    """Yields the images in a folder, and with `deep` below it, as "a/b.png". Raises OSError."""

    def fail(error):
        raise error

    for path, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != "." and deep)
        at = Path(path).relative_to(folder).as_posix()
        for name in names:
            if name[0] != "." and name.endswith(ending) and os.path.splitext(name)[1].lower() in IMAGES:
                yield name if at == "." else f"{at}/{name}"


def has_pictures(folder, ending="", deep=True):
    return folder.is_dir() and next(pictures(folder, ending, deep), None) is not None


class PairedFolders:
    """Images and their annotations in paired folders. Raises NotCoveredError, UserError, and OSError for what cannot
    be listed.

    Layouts: ADE20K's (images/training, annotations/training; also without folders for splits), split first
    (train/images, train/masks), Cityscapes'.
    """

    name = "pairedfolders"

    def __init__(self, root):
        root = Path(root).expanduser().resolve()
        self.classes = None
        """Class names, in the order of their numbers; None where the folder does not name them."""
        self.reduce_zero_label = False
        """Whether 0 stands for no class, and 1 for the first."""
        self.numbers = None
        """{value of a pixel: class number}, all others are ignored; None where the values are the numbers."""
        self.endings = "", ""  # of images and annotations, where not all images of a folder are meant
        self.data = {}  # {split: datasets.Dataset}
        self.splits = self.cityscapes(root) or images_first(root) or split_first(root)
        """{split: (folder of images, folder of annotations)}"""
        if not self.splits:
            raise NotCoveredError
        names = root / "objectInfo150.txt"
        if self.classes is None and names.is_file():
            self.classes, self.reduce_zero_label = read_object_info(names), True

    def cityscapes(self, root):
        """Its splits; {} where there is another layout. Sets what is told by the layout."""
        images, annotations = root / "leftImg8bit", root / "gtFine"
        found = {}
        for kind in ("labelTrainIds", "labelIds"):
            ending = f"_gtFine_{kind}.png"
            found[ending] = {name: (images / name, annotations / name) for name in folders_in(images)
                             if has_pictures(annotations / name, ending)}  # fmt: skip
        ending = max(found, key=lambda ending: len(found[ending]))  # train numbers, if they are there for all splits
        if found[ending]:
            self.endings, self.classes = ("_leftImg8bit.png", ending), list(CITYSCAPES.values())
            if ending == "_gtFine_labelIds.png":
                self.numbers = {value: number for number, value in enumerate(CITYSCAPES)}
        return by_split(found[ending])

    def as_dataset(self, split):
        """datasets.Dataset with columns image and annotation, each {"bytes": None, "path"}. Raises UserError."""
        if split not in self.data:  # of 20,000 files, listed once
            self.data[split] = self.list_split(*self.splits[split])
        return self.data[split]

    def list_split(self, images, annotations):
        """The same, of a folder of images and one of annotations."""
        import datasets

        def stem(path, ending):
            return path.removesuffix(ending or os.path.splitext(path)[1])

        names = sorted(pictures(images, self.endings[0]))
        stems = [stem(path, self.endings[0]) for path in names]
        # of several with one stem the PNG, which comes last
        there = sorted(pictures(annotations, self.endings[1]), key=lambda path: (path.lower().endswith(".png"), path))
        annotation_of = {stem(path, self.endings[1]): path for path in there}
        missing = [i for i, key in enumerate(stems) if key not in annotation_of]
        if missing:
            expected = annotations / (stems[missing[0]] + (self.endings[1] or ".png"))
            raise UserError(f"image {images / names[missing[0]]} has no annotation {expected} ({len(missing)} of "
                            f"{len(names)} images have none): add them, or move these images away")  # fmt: skip
        rows = {
            "image": [{"bytes": None, "path": f"{images}/{path}"} for path in names],
            "annotation": [{"bytes": None, "path": f"{annotations}/{annotation_of[key]}"} for key in stems],
        }
        image = datasets.Image(decode=False)
        return datasets.Dataset.from_dict(rows, datasets.Features({"image": image, "annotation": image}))

    def as_streaming_dataset(self):
        return OnDemand(self.splits, lambda split: self.as_dataset(split).to_iterable_dataset())

    def download_and_prepare(self):
        """Everything is there."""


def images_first(root):
    """{split: (folder of images, folder of annotations)} of images/ and annotations/ with the same folders in them, or
    none. Raises UserError."""
    images = root / "images"
    annotations = next((root / name for name in ANNOTATIONS if has_pictures(root / name)), None)
    if annotations is None or not images.is_dir():
        return {}
    splits = {name: (images / name, annotations / name) for name in folders_in(images)
              if has_pictures(annotations / name)}  # fmt: skip
    if not has_pictures(images, deep=False) or not has_pictures(annotations, deep=False):
        return by_split(splits)
    if splits:
        raise UserError(f"{images} holds images and the folder {next(iter(splits))}: move the images into a folder for "
                        f"their split, and their annotations in {annotations} too")  # fmt: skip
    return {"train": (images, annotations)}


def split_first(root):
    """The same of train/images and train/annotations."""
    splits = {}
    for split in folders_in(root):
        annotations = next((root / split / name for name in ANNOTATIONS if has_pictures(root / split / name)), None)
        if annotations is not None and (root / split / "images").is_dir():
            splits[split] = root / split / "images", annotations
    return by_split(splits)


def read_object_info(file):
    """Class names of ADE20K's table. Raises UserError."""
    try:
        head, *rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        head = [title.strip() for title in head]
        names = [row[head.index("Name")].strip() for row in rows]
        assert [int(row[head.index("Idx")]) for row in rows] == list(range(1, len(rows) + 1))
    except (ValueError, IndexError, AssertionError):
        raise UserError(f"{file} is not ADE20K's table of classes, with tabs between Idx (1, 2, ...) and Name: mend "
                        "it, or move it away") from None  # fmt: skip
    short = [name.split(",")[0] for name in names]
    return [name if short.count(first) > 1 else first for name, first in zip(names, short, strict=True)]


class CocoFolder:
    """COCO's JSON files and their folders of images. Raises NotCoveredError and UserError.

    Layouts: COCO's (annotations/instances_train2017.json, with train2017, images/train2017 or images), the same with
    plain names (annotations/train.json), JSON beside the folders of images, Roboflow's (train/_annotations.coco.json).
    A split's file is read when the split, or a name of a class, is first asked for.
    """

    name = "cocofolder"

    def __init__(self, root):
        found = coco_files(Path(root).expanduser().resolve())
        if not found:
            raise NotCoveredError
        plain = {name: re.sub(r"[-_]?(19|20)\d\d$", "", name) for name in found}
        plain = {name: SPLIT_OF.get(split, split) for name, split in plain.items()}
        if len(found) == 1 and not set(plain.values()) & {"train", "validation", "test"}:
            plain = dict.fromkeys(plain, "train")
        times = Counter(plain.values())  # train2014 and train2017: which would be train?
        once = {split: found[name] for name, split in plain.items() if times[split] == 1}
        self.splits = {**in_order(once), **{name: at for name, at in sorted(found.items()) if name not in once}}
        """{split: (JSON file, folder of images)}, by plain names and those of the files."""
        self.categories = None  # [(id, name)], once a file has been read
        self.data = {}  # {file: datasets.Dataset}

    @property
    def classes(self):
        """Class names, in the order of their categories' ids. Raises UserError."""
        return [name for _, name in self.read_categories()]

    @property
    def category_ids(self):
        """The ids in the files, in the same order. Raises UserError."""
        return [number for number, _ in self.read_categories()]

    def read_categories(self):
        if self.categories is None:
            self.as_dataset(next(iter(self.splits)))
        return self.categories

    def as_dataset(self, split):
        """datasets.Dataset with columns image {"bytes": None, "path"}, image_id (int) and objects, a JSON string for
        read_objects: Arrow has no type for polygons and RLE. Raises UserError."""
        import datasets
        import pyarrow as pa

        file, folder = self.splits[split]
        if file not in self.data:
            categories, paths, ids, objects = read_coco(file, folder)
            if self.categories not in (None, categories):
                other = next(iter(self.data))
                raise UserError(f"{file} and {other} disagree on their categories ({len(categories)} and "
                                f"{len(self.categories)}): all splits need the same ids and names")  # fmt: skip
            features = datasets.Features({"image": datasets.Image(decode=False), "image_id": datasets.Value("int64"),
                                          "objects": datasets.Value("large_string")})  # fmt: skip
            images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())],
                                                ["bytes", "path"])  # fmt: skip
            columns = [images, pa.array(ids, pa.int64()), pa.array(objects, pa.large_string())]  # may pass 2 GB
            table = pa.table(columns, features.arrow_schema)
            self.categories = categories
            self.data[file] = datasets.Dataset(datasets.table.InMemoryTable(table))
        return self.data[file]

    def as_streaming_dataset(self):
        return OnDemand(self.splits, lambda split: self.as_dataset(split).to_iterable_dataset())

    def download_and_prepare(self):
        """Everything is there."""


def coco_files(root):
    """{split as the file or folder names it: (JSON file, folder of images)}. Raises UserError."""
    found = {name: (root / name / ROBOFLOW, root / name) for name in folders_in(root)
             if (root / name / ROBOFLOW).is_file()}  # fmt: skip
    if found:
        return found
    if (root / ROBOFLOW).is_file():
        return {"train": (root / ROBOFLOW, root)}
    files = {}
    for folder in (root / "annotations", root):
        if not files and folder.is_dir():
            files = {path.stem: path for path in sorted(folder.glob("*.json")) if path.name[0] != "."}
    instances = {name.removeprefix("instances_"): path for name, path in files.items()
                 if name.startswith("instances_")}  # fmt: skip
    files = instances or files
    shared = not any((root / "images" / name).is_dir() for name in files)  # images/ holds those of all files
    for name, path in files.items():
        folders = [root / name, root / "images" / name, *[root / "images"] * shared]
        at = next((folder for folder in folders if folder.is_dir()), None)
        if at is not None:
            found[name] = path, at
    if instances and not found:
        first = next(iter(instances))
        raise UserError(f"{instances[first]} has no folder of images: put them into {root / first}, or into "
                        f"{root / 'images' / first}")  # fmt: skip
    return found


def read_coco(file, folder):
    """A COCO file -> categories [(id, name)] in the order of ids, and of every image its path, id and objects, a JSON
    string. Raises UserError."""
    try:
        content = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is no JSON (line {error.lineno}, column {error.colno}: {error.msg}): get it anew, or "
                        "move it away") from None  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({first_line(error)}): get it anew, or move it away") from None
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise UserError(f"{file} has no list of {part}: it is no COCO file of objects; mend it, or move it away")
    try:
        categories = sorted((category["id"], category["name"]) for category in content["categories"])
        number_of = {key: number for number, (key, _) in enumerate(categories)}
        names = {image["id"]: posixpath.normpath(image["file_name"]) for image in content["images"]}
        for what, unique in (("categories", number_of), ("images", names)):
            require(len(unique) == len(content[what]), f"{file} has {what} that share an id: mend it")
        of_image, strangers = {key: [] for key in names}, []
        for i, annotation in enumerate(content["annotations"]):
            number, objects = number_of.get(annotation["category_id"]), of_image.get(annotation["image_id"])
            if number is None or objects is None:
                strangers.append(annotation)
            else:
                objects.append({"bbox": annotation["bbox"], "category": number,
                                "iscrowd": annotation.get("iscrowd", 0), "area": annotation.get("area"),
                                "segmentation": annotation.get("segmentation"),
                                "id": annotation.get("id", i)})  # fmt: skip
        if strangers:
            key = "image" if strangers[0]["image_id"] not in of_image else "category"
            raise UserError(f"{file} has an annotation of {key} {strangers[0][f'{key}_id']!r}, which it does not list "
                            f"({len(strangers)} of {len(content['annotations'])} annotations are of unknown images or "
                            "categories): mend it")  # fmt: skip
        require(all(type(key) is int for key in names), f"{file} has images whose id is no whole number: mend it")
    except (KeyError, TypeError, AttributeError) as error:
        key = f"an entry has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{file} is no COCO file of objects ({key}): mend it, or move it away") from None
    missing = missing_files(folder, names.values())
    if missing:
        raise UserError(f"image {folder / missing[0]}, which {file} lists, is missing ({len(missing)} of {len(names)} "
                        "are): add them, or take them out of the file")  # fmt: skip
    objects = [json.dumps(entries, separators=(",", ":")) for entries in of_image.values()]
    return categories, [f"{folder.as_posix()}/{name}" for name in names.values()], list(names), objects


def missing_files(folder, names):
    """Which of the names are no files in a folder; it and those in it are listed once: 100,000 questions would take
    minutes over a network. What lies outside counts as missing."""
    listed, missing = {}, []
    for name in names:
        inner = posixpath.dirname(name)
        if inner not in listed:
            outside = inner.startswith("/") or inner.split("/")[0] == ".."
            try:
                listed[inner] = set() if outside else set(os.listdir(folder / inner))
            except OSError:
                listed[inner] = set()
        if posixpath.basename(name) not in listed[inner]:
            missing.append(name)
    return missing


# ----------------------------------------------------------------------------------------------------------------
# Objects.


@dataclass
class Objects:
    """The n objects of an image."""

    boxes: torch.Tensor
    """float32 (n, 4): x1 y1 x2 y2 in pixels, as given: not cut to the image."""
    labels: torch.Tensor
    """int64 (n): class numbers 0..C-1."""
    crowd: torch.Tensor
    """bool (n): a region with many objects, which no detection has to find."""
    area: torch.Tensor
    """float32 (n), pixels."""
    segmentations: list | None
    """Of each object its polygons [[x, y, x, y, ...], ...] or its RLE {"size", "counts"}, [] where it has none; None
    where the data has none at all."""


KEYS = {
    "boxes": ("bbox", "boxes", "bboxes"),
    "labels": ("category", "categories", "category_id", "label", "labels"),
    "crowd": ("iscrowd", "is_crowd"),
    "area": ("area",),
    "segmentations": ("segmentation", "segmentations"),
}


def read_objects(value, classes, box_format="xywh"):
    """The objects of an image, as a JSON string, a list of dicts or a dict of lists (None: no objects) -> Objects.

    Keys: bbox, boxes or bboxes; category, categories, category_id, label or labels (a class number 0..C-1, or one of
    the names `classes`); if they are there iscrowd or is_crowd, area, segmentation or segmentations; others are passed
    over. box_format: "xywh" or "xyxy". An area that is not given is the mask's, else the box's. Raises ValueError.
    """
    if box_format not in ("xywh", "xyxy"):
        raise ValueError(f"box format {box_format!r} is neither xywh nor xyxy")
    if isinstance(value, (str, bytes)):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"objects are no JSON ({first_line(error)})") from None
    columns = object_columns([] if value is None else value)
    boxes, segmentations = [read_box(box) for box in columns["boxes"]], columns["segmentations"]
    if box_format == "xywh":
        boxes = [[x, y, x + width, y + height] for x, y, width, height in boxes]
    if segmentations is not None:
        segmentations = [check_segmentation(segmentation) for segmentation in segmentations]
        segmentations = segmentations if any(segmentations) else None
    areas = []
    for i, area in enumerate(columns["area"] or [None] * len(boxes)):
        try:
            area = math.nan if area is None else float(area)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"an area is no number but {area!r}") from None
        if math.isfinite(area):
            areas.append(area)
        elif segmentations and segmentations[i]:
            areas.append(segmentation_area(segmentations[i]))
        else:
            x1, y1, x2, y2 = boxes[i]
            areas.append((x2 - x1) * (y2 - y1))
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    if not boxes.isfinite().all():
        raise ValueError("a box goes beyond the numbers of 32 bits")
    return Objects(
        boxes,
        torch.tensor([class_number(label, classes) for label in columns["labels"]], dtype=torch.int64),
        torch.tensor([bool(crowd) for crowd in columns["crowd"] or [0] * len(boxes)], dtype=torch.bool),
        torch.tensor(areas, dtype=torch.float32),
        segmentations,
    )


def object_columns(value):
    """A list of dicts or a dict of lists -> {field of KEYS: list, or None where the data has none}. Raises
    ValueError."""
    if not isinstance(value, dict):
        value = list(value) if hasattr(value, "__iter__") else [value]
        if not all(isinstance(entry, dict) for entry in value):
            raise ValueError("objects are neither a list of dicts nor a dict of lists")
        keys = {key for entry in value for key in entry}
        value = {key: [entry.get(key) for entry in value] for key in keys} if value else {"bbox": [], "label": []}
    columns = {}
    for field, keys in KEYS.items():
        column = next((value[key] for key in keys if value.get(key) is not None), None)
        if column is not None and (isinstance(column, (str, bytes)) or not hasattr(column, "__iter__")):
            raise ValueError(f"objects have no list of {field} but {column!r}")
        columns[field] = column if column is None else list(column)
        if column is None and field in ("boxes", "labels"):
            there = ", ".join(map(str, value)) or "nothing"
            raise ValueError(f"objects have no {' or '.join(keys)}: they have {there}")
    lengths = {field: len(column) for field, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"objects have {', '.join(f'{length} {field}' for field, length in lengths.items())}")
    return columns


def read_box(box):
    """Four finite numbers. Raises ValueError."""
    try:
        numbers = [float(number) for number in box if not isinstance(number, str)]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a box is not four finite numbers but {box!r}")
    return numbers


def class_number(value, classes):
    """Of a category, which is a number or a name. Raises ValueError."""
    if isinstance(value, str) and value in classes:
        return classes.index(value)
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < len(classes):
        raise ValueError(f"category {value!r} is none of the {len(classes)} classes")
    return number


def object_classes(feature):
    """The class names of a column of objects, by its feature of datasets: a list of dicts, or a dict of lists, as also
    Sequence makes it. None where they are not named."""
    import datasets

    def element(feature):
        if isinstance(feature, list):
            return feature[0]
        return feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature

    feature = element(feature)
    columns = [element(feature[key]) for key in KEYS["labels"] if isinstance(feature, dict) and key in feature]
    return next((list(column.names) for column in columns if isinstance(column, datasets.ClassLabel)), None)


# ----------------------------------------------------------------------------------------------------------------
# Masks.


def check_segmentation(segmentation):
    """Polygons or RLE as masks_of wants them: a lone polygon becomes a list of one, None one of none, and what has
    less than three corners is left out (four numbers would be drawn as a box). Raises ValueError."""
    if isinstance(segmentation, dict):
        if not isinstance(segmentation.get("counts"), (list, str, bytes)) or len(segmentation.get("size") or ()) != 2:
            raise ValueError("a mask's RLE needs counts, and size [height, width]")
        return segmentation
    if segmentation is None or isinstance(segmentation, (str, bytes)) or not hasattr(segmentation, "__iter__"):
        if segmentation is None:
            return []
        raise ValueError(f"a mask is neither polygons nor RLE but {segmentation!r}")
    polygons = list(segmentation)
    if polygons and not hasattr(polygons[0], "__iter__"):
        polygons = [polygons]
    try:
        polygons = [[float(number) for number in polygon] for polygon in polygons]
    except (TypeError, ValueError, OverflowError):
        raise ValueError("a mask's polygon is no list of numbers") from None
    for polygon in polygons:
        if len(polygon) % 2 or not all(abs(number) <= FURTHEST for number in polygon):  # nor is NaN
            raise ValueError(f"a mask's polygon is not pairs of numbers up to {FURTHEST:g}")
    return [polygon for polygon in polygons if len(polygon) >= 6]


def segmentation_area(segmentation):
    """Pixels; polygons' as geometry has it. Raises ValueError."""
    from faster_coco_eval.core import mask

    if isinstance(segmentation, dict):
        try:
            counts = segmentation["counts"]
            return float(sum(counts[1::2]) if isinstance(counts, list) else mask.area(segmentation))
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"a mask is damaged: {first_line(error)}") from None
    doubled = 0.0
    for polygon in segmentation:
        xs, ys = polygon[::2], polygon[1::2]
        doubled += abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs))))
    return doubled / 2


def masks_of(segmentations, height, width):
    """The masks of objects: uint8 (n, H, W), 0 or 1. Of each its polygons [[x, y, ...], ...] in pixels, together one
    mask, or RLE {"size": [H, W], "counts"} with a list of counts or the compressed str or bytes; none is an empty mask.
    Raises ValueError."""
    from faster_coco_eval.core import mask

    masks = torch.zeros(len(segmentations), height, width, dtype=torch.uint8)
    for i, segmentation in enumerate(segmentations):
        segmentation = check_segmentation(segmentation)
        if isinstance(segmentation, dict) and list(segmentation["size"]) != [height, width]:
            rows, columns = segmentation["size"]
            raise ValueError(f"the mask of object {i} is of {rows} x {columns} pixels, the image of {height} x {width}")
        if not segmentation:
            continue
        try:
            if isinstance(segmentation, list):
                runs = mask.merge(mask.frPyObjects(segmentation, height, width))
            elif isinstance(segmentation["counts"], list):
                runs = mask.frPyObjects({"size": [height, width], "counts": segmentation["counts"]}, height, width)
            else:
                runs = {"size": [height, width], "counts": segmentation["counts"]}
            masks[i] = torch.from_numpy(mask.decode(runs))
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"the mask of object {i} is damaged: {first_line(error)}") from None
    return masks


def encode_masks(masks):
    """uint8 or bool (n, H, W) -> n compressed RLE {"size": [H, W], "counts": str}, fit for JSON."""
    from faster_coco_eval.core import mask

    columns_first = (masks != 0).to(torch.uint8).cpu().permute(0, 2, 1).contiguous()  # as RLE counts
    runs = mask.encode(columns_first.numpy().transpose(2, 1, 0))  # (H, W, n), not copied
    return [{"size": list(masks.shape[1:]), "counts": run["counts"].decode()} for run in runs]
