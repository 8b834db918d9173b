"""Annotated images: pictures of class numbers, paired folders, COCO's files, objects and their masks."""

from engine.annotations import (
    CITYSCAPES,
    CocoFolder,
    PairedFolders,
    decode_annotation,
    encode_masks,
    map_numbers,
    masks_of,
    object_classes,
    read_objects,
)
from engine.errors import UserError
from engine.folders import NotCoveredError

import io
import json
import math
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

NUMBERS = [[0, 1, 2], [3, 254, 255]]


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey_png(rows, bits):
    """A grey PNG of few bits, which Pillow does not write. rows: bytes of each row."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 8 * len(rows[0]) // bits, len(rows), bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def palette(numbers, **options):
    image = Image.fromarray(np.array(numbers, np.uint8), "P")
    image.putpalette([255 - i // 3 if i % 3 else 7 for i in range(768)])
    return encoded(image, **options)


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------------
# Pictures.


def test_annotations_are_read_as_the_file_has_them():
    array = np.array(NUMBERS, np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: the annotation would not lie on its image any more
    for data in (palette(NUMBERS), palette(NUMBERS, transparency=0), encoded(Image.fromarray(array)),
                 encoded(Image.fromarray(array), exif=exif), encoded(Image.fromarray(array), "TIFF"),
                 encoded(Image.fromarray(np.stack([array] * 3, -1))), encoded(Image.fromarray(array).convert("LA")),
                 encoded(Image.fromarray(np.stack([array] * 3 + [255 - array], -1)))):  # fmt: skip
        numbers = decode_annotation(data)
        assert numbers.dtype == torch.int32 and numbers.tolist() == NUMBERS
    large = [[0, 255, 256], [1000, 32768, 65535]]
    sixteen = encoded(Image.fromarray(np.array(large, np.uint16)))
    assert sixteen[24:26] == b"\x10\0" and decode_annotation(sixteen).tolist() == large
    assert decode_annotation(encoded(Image.fromarray(np.array(large, np.int32)), "TIFF")).tolist() == large
    assert decode_annotation(encoded(Image.fromarray(np.array([[True, False]])))).tolist() == [[1, 0]]
    assert decode_annotation(grey_png([b"\x1b", b"\xe4"], 2)).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert decode_annotation(grey_png([b"\x0f", b"\x7a"], 4)).tolist() == [[0, 15], [7, 10]]
    two = Image.fromarray(np.array([[0, 1, 3, 2]], np.uint8), "P")
    two.putpalette([9, 9, 9] * 4)
    assert decode_annotation(encoded(two, bits=2)).tolist() == [[0, 1, 3, 2]]


def test_pictures_that_hold_no_class_numbers_are_refused():
    grey = Image.fromarray(np.zeros((40, 40), np.uint8))
    red = grey.convert("RGB")
    red.putpixel((39, 39), (1, 0, 0))
    with pytest.raises(ValueError, match="is a colour picture: an annotation has one class number per pixel") as error:
        decode_annotation(encoded(red))
    one_line(error)
    with pytest.raises(ValueError, match="is a JPEG, which does not keep class numbers: save annotations as PNG"):
        decode_annotation(encoded(grey, "JPEG"))
    with pytest.raises(ValueError, match="is a PPM"):
        decode_annotation(encoded(grey, "PPM"))
    with pytest.raises(ValueError, match="mode F"):
        decode_annotation(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))
    with pytest.raises(ValueError, match="mode CMYK"):
        decode_annotation(encoded(grey.convert("CMYK"), "TIFF"))
    with pytest.raises(ValueError, match="no image of a known format"):
        decode_annotation(b"GIF, or so")
    colours_of_16 = bytearray(grey_png([b"\0" * 12], 8))
    colours_of_16[16:26] = struct.pack(">IIBB", 2, 1, 16, 2)
    colours_of_16[29:33] = struct.pack(">I", zlib.crc32(colours_of_16[12:29]))
    with pytest.raises(ValueError, match="colour picture of 16 bits"):
        decode_annotation(bytes(colours_of_16))


def test_half_an_annotation_is_not_filled_up():
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(1, 255, (60, 60), np.uint8)))
    assert decode_annotation(whole).min() > 0
    for data in (whole[: len(whole) // 2], whole[:-12], whole[:1000] + b"\0\1\2\3" + whole[1004:]):
        with pytest.raises((OSError, SyntaxError)):
            decode_annotation(data)


def test_numbers_of_pixels_become_class_numbers():
    pixels = torch.tensor([[0, 1, 2], [150, 255, 0]], dtype=torch.int32)
    mapped = map_numbers(pixels, 150, reduce_zero_label=True)
    assert mapped.dtype == torch.uint8 and mapped.tolist() == [[255, 0, 1], [149, 255, 255]]
    assert map_numbers(pixels, 151).tolist() == [[0, 1, 2], [150, 255, 0]]
    assert map_numbers(pixels.clamp(max=2), 3, ignore_index=0).tolist() == [[255, 1, 2], [2, 2, 255]]
    both = torch.tensor([[3, 1, 2, 0]], dtype=torch.int32)
    assert map_numbers(both, 2, reduce_zero_label=True, ignore_index=3).tolist() == [[255, 0, 1, 255]]
    numbers = {value: number for number, value in enumerate(CITYSCAPES)}
    street = torch.tensor([[7, 8, 33, 0, 9], [255, 26, -1, 70000, 34]], dtype=torch.int32)
    assert map_numbers(street, 19, numbers=numbers).tolist() == [[0, 1, 18, 255, 255], [255, 13, 255, 255, 255]]
    many = torch.tensor([[0, 300, 65535, 299]], dtype=torch.int32)
    mapped = map_numbers(many, 301, ignore_index=65535)
    assert mapped.dtype == torch.int32 and mapped.tolist() == [[0, 300, 65535, 299]]
    assert map_numbers(torch.tensor([[-1, 1]], dtype=torch.int32), 2, ignore_index=-1).tolist() == [[255, 1]]
    assert map_numbers(torch.tensor([[254, 255]]).int(), 255).tolist() == [[254, 255]]
    random = torch.randint(0, 21, (50, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    slow = [[255 if value == 0 else value - 1 for value in row] for row in random.tolist()]
    assert map_numbers(random, 20, reduce_zero_label=True).tolist() == slow


def test_a_number_of_no_class_is_an_error_with_its_remedies():
    for pixels, classes, options in (
        ([[0, 3]], 3, {}), ([[0, 3]], 2, {"reduce_zero_label": True}), ([[0, 3]], 3, {"ignore_index": 1}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"pixel value 3 is none of the {classes} classes") as error:
            map_numbers(torch.tensor(pixels, dtype=torch.int32), classes, **options)
        assert all(flag in one_line(error) for flag in ("--num-classes", "--ignore-index 3", "--reduce-zero-label"))
    with pytest.raises(ValueError, match="pixel value 70000 is none"):
        map_numbers(torch.tensor([[0, 70000]], dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="pixel value -2 is none"):
        map_numbers(torch.tensor([[-1, -2]], dtype=torch.int32), 3, ignore_index=-1)
    with pytest.raises(ValueError, match="--num-classes is 0"):
        map_numbers(torch.zeros(1, 1, dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="pixel value 7 cannot stand for class 3 of 3"):
        map_numbers(torch.zeros(1, 1, dtype=torch.int32), 3, numbers={7: 3})


# ----------------------------------------------------------------------------------------------------------------
# Paired folders.


def write(root, *paths, data=b""):
    for path in paths:
        file = Path(root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return root


def pairs(builder, split):
    """[(image, annotation)] from the root on, the same from both kinds of data set."""
    data = builder.as_dataset(split)
    rows = list(data)
    assert isinstance(data, datasets.Dataset) and rows == list(builder.as_streaming_dataset()[split])
    assert all(isinstance(data.features[name], datasets.Image) for name in ("image", "annotation"))
    assert all(row[name]["bytes"] is None and Path(row[name]["path"]).is_file() for row in rows for name in row)
    return [(row["image"]["path"], row["annotation"]["path"]) for row in rows]


def under(root, *paths):
    return [tuple(f"{root}/{path}" for path in pair) for pair in paths]


def test_ade20k(tmp_path):
    write(tmp_path, "images/training/b.jpg", "images/training/a/c.JPG", "annotations/training/b.png",
          "annotations/training/a/c.png", "images/validation/v.jpg", "annotations/validation/v.png",
          "images/testing/t.jpg", "images/training/._b.jpg", "images/training/notes.txt")  # fmt: skip
    table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t9\t9\t1\twall\n2\t0.1\t9\t9\t1\tbuilding, edifice\n"
    info = tmp_path / "objectInfo150.txt"
    info.write_text(table + "3\t0\t9\t9\t0\tscreen, silver screen\n4\t0\t9\t9\t0\tscreen, CRT screen\n")
    folder = PairedFolders(tmp_path)
    assert list(folder.splits) == list(folder.as_streaming_dataset()) == ["train", "validation"]
    assert pairs(folder, "train") == under(
        tmp_path, ("images/training/a/c.JPG", "annotations/training/a/c.png"),
        ("images/training/b.jpg", "annotations/training/b.png"),
    )  # fmt: skip
    assert folder.classes == ["wall", "building", "screen, silver screen", "screen, CRT screen"]
    assert folder.reduce_zero_label and folder.numbers is None
    for damaged in (table.replace("\t", " "), table.replace("2\t0", "7\t0"), table.replace("Name", "X"), "\n"):
        info.write_text(damaged)
        with pytest.raises(UserError, match="not ADE20K's table") as error:
            PairedFolders(tmp_path)
        one_line(error)
    info.unlink()
    folder = PairedFolders(tmp_path)
    assert folder.classes is None and not folder.reduce_zero_label


def test_plain_pairs_and_split_first(tmp_path):
    for i, name in enumerate(("annotations", "labels", "masks")):
        root = write(tmp_path / str(i), "images/b.png", "images/a.jpg", f"{name}/a.png", f"{name}/b.tif",
                     f"{name}/b.png")  # fmt: skip
        folder = PairedFolders(str(root))
        assert list(folder.splits) == ["train"] and folder.classes is None
        assert pairs(folder, "train") == under(root, ("images/a.jpg", f"{name}/a.png"),
                                               ("images/b.png", f"{name}/b.png"))  # fmt: skip
    root = write(tmp_path / "first", "val/images/v.jpg", "val/masks/v.png", "train/images/t.jpg", "train/masks/t.png",
                 "test/images/x.jpg", "extra/images/x.jpg", "extra/labels/x.png")  # fmt: skip
    folder = PairedFolders(root)
    assert list(folder.splits) == ["train", "validation", "extra"]
    assert pairs(folder, "validation") == under(root, ("val/images/v.jpg", "val/masks/v.png"))
    write(root, "valid/images/v.jpg", "valid/masks/v.png")  # which of the two would be validation?
    assert list(PairedFolders(root).splits) == ["train", "extra", "val", "valid"]


def test_cityscapes(tmp_path):
    stems = "train/aachen/a_1", "train/bonn/b_1", "val/ulm/u_1"
    for stem in stems:
        write(tmp_path, f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png",
              f"gtFine/{stem}_gtFine_color.png", f"gtFine/{stem}_gtFine_instanceIds.png")  # fmt: skip
    write(tmp_path, "leftImg8bit/train_extra/x/x_leftImg8bit.png")
    folder = PairedFolders(tmp_path)
    assert list(folder.splits) == ["train", "validation"] and not folder.reduce_zero_label
    assert len(folder.classes) == 19 and folder.classes[0] == "road" and folder.classes[18] == "bicycle"
    assert folder.numbers[7] == 0 and folder.numbers[17] == 5 and folder.numbers[26] == 13 and folder.numbers[33] == 18
    assert pairs(folder, "train") == under(tmp_path, *(
        (f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png") for stem in stems[:2]
    ))  # fmt: skip
    for stem in stems:
        write(tmp_path, f"gtFine/{stem}_gtFine_labelTrainIds.png")
    folder = PairedFolders(tmp_path)
    assert folder.numbers is None and len(folder.classes) == 19
    assert pairs(folder, "validation")[0][1].endswith("gtFine/val/ulm/u_1_gtFine_labelTrainIds.png")
    (tmp_path / "gtFine/train/bonn/b_1_gtFine_labelTrainIds.png").unlink()
    with pytest.raises(UserError, match=r"b_1_leftImg8bit.png has no annotation .*/gtFine/train/bonn/b_1_gtFine_label"):
        folder.as_dataset("train")


def test_images_without_annotation_are_named(tmp_path):
    write(tmp_path, "images/a.jpg", "images/b.jpg", "images/c.jpg", "masks/b.png")
    with pytest.raises(UserError) as error:
        PairedFolders(tmp_path).as_dataset("train")
    assert one_line(error) == (f"image {tmp_path}/images/a.jpg has no annotation {tmp_path}/masks/a.png (2 of 3 images "
                               "have none): add them, or move these images away")  # fmt: skip
    write(tmp_path, "images/train/a.jpg", "masks/train/a.png")
    with pytest.raises(UserError, match="holds images and the folder train"):
        PairedFolders(tmp_path)


@pytest.mark.parametrize("paths", [
    ["a.jpg"], ["images/a.jpg"], ["images/train/a.jpg", "labels/train/a.txt"],  # YOLO's
    ["images/a.jpg", "annotations/instances_train.json"], ["train/cat/a.jpg"], ["images/x/a.jpg", "masks/y/a.png"],
    ["train2017/a.jpg", "annotations/instances_train2017.json", "annotations/panoptic_train2017/a.png"],
])  # fmt: skip
def test_other_layouts_are_left_to_others(tmp_path, paths):
    with pytest.raises(NotCoveredError):
        PairedFolders(write(tmp_path, *paths))
    with pytest.raises(NotCoveredError):
        PairedFolders(tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------------------------------
# COCO's files.

CATEGORIES = [{"id": 90, "name": "dog"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"}]
POLYGON = [1, 1, 3, 1, 3, 3, 1, 3]


def coco(**changes):
    return {
        "images": [{"id": 7, "file_name": "b.jpg", "width": 4, "height": 4}, {"id": 3, "file_name": "a.jpg"},
                   {"id": 5, "file_name": "./sub/c.jpg"}],
        "annotations": [
            {"id": 11, "image_id": 3, "category_id": 90, "bbox": [1, 1, 2, 2], "area": 4.0, "iscrowd": 0,
             "segmentation": [POLYGON]},
            {"id": 12, "image_id": 7, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 9, "iscrowd": 1,
             "segmentation": {"size": [4, 4], "counts": [7, 9]}},
            {"id": 13, "image_id": 3, "category_id": 13, "bbox": [0, 0, 1, 2]},
        ],
        "categories": CATEGORIES,
    } | changes  # fmt: skip


def write_coco(root, file="annotations/instances_train2017.json", folder="train2017", content=None):
    write(root, *(f"{folder}/{name}" for name in ("a.jpg", "b.jpg", "sub/c.jpg")))
    content = coco() if content is None else content
    return write(root, file, data=content if isinstance(content, bytes) else json.dumps(content).encode())


def test_cocos_own_layout(tmp_path):
    write_coco(tmp_path)
    write_coco(tmp_path, "annotations/instances_val2017.json", "val2017", coco(annotations=[]))
    write(tmp_path, "annotations/captions_train2017.json", "annotations/person_keypoints_val2017.json", data=b"no JSON")
    folder = CocoFolder(tmp_path)
    assert list(folder.splits) == ["train", "validation", "train2017", "val2017"]
    streams = folder.as_streaming_dataset()
    assert list(streams) == list(folder.splits) and "val2017" in streams and "val" not in streams
    assert folder.classes == ["person", "stop sign", "dog"] and folder.category_ids == [1, 13, 90]
    data = folder.as_dataset("train")
    assert data is folder.as_dataset("train2017") and list(data) == list(streams["train"])
    assert isinstance(data.features["image"], datasets.Image)
    assert [row["image"] for row in data] == [{"bytes": None, "path": f"{tmp_path}/train2017/{name}"}
                                              for name in ("b.jpg", "a.jpg", "sub/c.jpg")]  # fmt: skip
    assert data["image_id"][:] == [7, 3, 5] and data["objects"][2] == "[]"
    assert json.loads(data["objects"][1])[0] == {"bbox": [1, 1, 2, 2], "category": 2, "iscrowd": 0, "area": 4.0,
                                                 "segmentation": [POLYGON], "id": 11}  # fmt: skip
    objects = read_objects(data["objects"][1], folder.classes)
    assert objects.boxes.tolist() == [[1, 1, 3, 3], [0, 0, 1, 2]] and objects.labels.tolist() == [2, 1]
    assert objects.area.tolist() == [4, 2] and objects.segmentations == [[POLYGON], []]
    crowd = read_objects(data["objects"][0], folder.classes)
    assert crowd.crowd.tolist() == [True] and masks_of(crowd.segmentations, 4, 4).sum() == 9
    assert folder.as_dataset("validation")["objects"][:] == ["[]"] * 3


@pytest.mark.parametrize(("file", "folder", "splits"), [
    ("annotations/instances_train2017.json", "images/train2017", ["train", "train2017"]),
    ("annotations/instances_train2017.json", "images", ["train", "train2017"]),
    ("annotations/train.json", "train", ["train"]), ("annotations/val.json", "images/val", ["validation", "val"]),
    ("annotations/instances_default.json", "images/default", ["train", "default"]),
    ("annotations.json", "images", ["train", "annotations"]), ("valid.json", "valid", ["validation", "valid"]),
    ("test/_annotations.coco.json", "test", ["test"]), ("_annotations.coco.json", ".", ["train"]),
])  # fmt: skip
def test_other_layouts_of_coco(tmp_path, file, folder, splits):
    builder = CocoFolder(write_coco(tmp_path, file, folder))
    assert list(builder.splits) == splits
    paths = [row["image"]["path"] for row in builder.as_dataset(splits[-1])]
    assert len(paths) == 3 and all(Path(path).is_file() for path in paths)


def test_files_are_read_when_they_are_asked_for(tmp_path):
    write_coco(tmp_path)
    write_coco(tmp_path, "annotations/instances_val2017.json", "val2017", b"{")
    one_more = coco(categories=[*CATEGORIES, {"id": 2, "name": "x"}])
    write_coco(tmp_path, "annotations/instances_test.json", "test", one_more)
    write_coco(tmp_path, "annotations/instances_away.json", "away")
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        (tmp_path / "away" / name).unlink()
    folder = CocoFolder(tmp_path)
    assert len(folder.as_dataset("train")) == 3
    with pytest.raises(UserError, match=r"disagree on their categories \(4 and 3\)") as error:
        folder.as_dataset("test")
    one_line(error)
    with pytest.raises(UserError, match=r"val2017.json is no JSON \(line 1"):
        folder.as_dataset("validation")
    write_coco(tmp_path, "annotations/instances_train2014.json", "train2014")
    assert list(CocoFolder(tmp_path).splits)[:2] == ["validation", "test"]  # no train: there are two
    assert {"train2014", "train2017"} < set(CocoFolder(tmp_path).splits)


def test_only_splits_whose_images_are_there(tmp_path):
    write_coco(tmp_path, folder="images/train2017")
    write_coco(tmp_path, "annotations/instances_val2017.json", "elsewhere")
    assert list(CocoFolder(tmp_path).splits) == ["train", "train2017"]
    write_coco(tmp_path / "none", folder="elsewhere")
    with pytest.raises(UserError, match=r"has no folder of images: put them into .*/none/train2017, or into"):
        CocoFolder(tmp_path / "none")
    for paths in (["a.jpg"], ["train/a.jpg", "train/b.png"], ["images/a.jpg", "masks/a.png"], ["annotations/a.png"]):
        with pytest.raises(NotCoveredError):
            CocoFolder(write(tmp_path / f"other{len(paths)}{paths[0][0]}", *paths))


def changed(i, **changes):
    annotations = coco()["annotations"]
    annotations[i] |= changes
    return annotations


@pytest.mark.parametrize(("content", "message"), [
    (b'{"images": [],\n "annotations" []}', r"is no JSON \(line 2, column 16: "),
    (b"\xff\xff", "is no JSON"), (b"[" * 100_000, "is no JSON"), (b"[]", "has no list of images"),
    ({"images": [], "annotations": []}, "has no list of categories"), (coco(annotations={}), "no list of annotations"),
    (coco(annotations=changed(2, image_id=99)), r"annotation of image 99, .* \(1 of 3 annotations"),
    (coco(annotations=[*changed(1, category_id=2), {**changed(1)[1], "image_id": 0}]),
     r"annotation of category 2, .* \(2 of 4"),
    (coco(images=[*coco()["images"], {"id": 9, "file_name": "d.jpg"}, {"id": 10, "file_name": "sub2/e.jpg"}]),
     r"image .*/train2017/d.jpg, which .* lists, is missing \(2 of 5 are\)"),
    (coco(images=[*coco()["images"], {"id": 9, "file_name": "../train2017/../../x.jpg"}]), r"missing \(1 of 4"),
    (coco(images=[*coco()["images"], {"id": 9, "file_name": "/etc/passwd"}]), r"missing \(1 of 4"),
    (coco(images=[{"id": 9}]), "an entry has no 'file_name'"), (coco(images=["a.jpg"]), "is no COCO file of objects"),
    (coco(annotations=[{"image_id": 3, "category_id": 1}]), "an entry has no 'bbox'"),
    (coco(annotations=changed(0, image_id=[3])), "is no COCO file of objects"),
    (coco(images=[*coco()["images"], {"id": 7, "file_name": "a.jpg"}]), "images that share an id"),
    (coco(categories=[*CATEGORIES, {"id": 1, "name": "x"}]), "categories that share an id"),
    (coco(images=[{"id": "a", "file_name": "a.jpg"}], annotations=[]), "id is no whole number"),
])  # fmt: skip
def test_mistakes_in_cocos_files(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        CocoFolder(write_coco(tmp_path, content=content)).as_dataset("train")
    assert str(tmp_path) in one_line(error)


# ----------------------------------------------------------------------------------------------------------------
# Objects and masks.


def test_objects_in_any_form_are_the_same():
    names = ["cat", "dog", "cow"]
    lists = {"id": [1, 2], "bbox": [[0.5, 1, 2, 3], [4, 5, 6, 7]], "category": [2, 0], "area": [5.0, 40]}
    dicts = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    named = {"bboxes": np.array(lists["bbox"]), "labels": ["cow", "cat"], "area": lists["area"], "is_crowd": [False, 0]}
    corners = {"boxes": [[0.5, 1, 2.5, 4], [4, 5, 10, 12]], "categories": np.array([2, 0]), "area": [5, 40.0]}
    for value, kind in ((lists, "xywh"), (dicts, "xywh"), (json.dumps(dicts), "xywh"), (named, "xywh"),
                        (json.dumps(lists), "xywh"), (corners, "xyxy")):  # fmt: skip
        objects = read_objects(value, names, kind)
        assert objects.boxes.tolist() == [[0.5, 1, 2.5, 4], [4, 5, 10, 12]] and objects.boxes.dtype == torch.float32
        assert objects.labels.tolist() == [2, 0] and objects.labels.dtype == torch.int64
        assert objects.crowd.tolist() == [False, False] and objects.crowd.dtype == torch.bool
        assert objects.area.tolist() == [5, 40] and objects.area.dtype == torch.float32
        assert objects.segmentations is None
    for nothing in ("[]", [], None, {"bbox": [], "category": []}):
        objects = read_objects(nothing, names)
        assert objects.boxes.shape == (0, 4) and len(objects.labels) == len(objects.crowd) == len(objects.area) == 0


def test_areas_that_are_not_given():
    boxes, square = [[-1, 0, 4, 3]] * 6, [0, 0, 2, 0, 2, 2, 0, 2]
    whole = encode_masks(torch.ones(1, 3, 5))[0]
    masks = [[square, [3, 3, 3, 6, 7, 3]], {"size": [2, 3], "counts": [1, 2, 3]}, whole, None, square, [[0, 0, 1, 1]]]
    objects = read_objects({"bbox": boxes, "label": [0] * 6, "area": [None] * 6, "segmentation": masks}, ["a"])
    assert objects.area.tolist() == [4 + 6, 2, 15, 12, 4, 12]
    assert objects.boxes[0].tolist() == [-1, 0, 3, 3]  # not cut to the image
    assert objects.segmentations[3:] == [[], [square], []]
    assert read_objects({"bbox": boxes, "label": [0] * 6}, ["a"]).area.tolist() == [12] * 6


@pytest.mark.parametrize(("value", "message"), [
    ("{", "no JSON"), ("3", "neither a list of dicts nor"), ("[3]", "neither"),
    ({"category": [0]}, "no bbox or boxes or bboxes: they have category"), ([{"bbox": [0, 0, 1, 1]}], "no category or"),
    ({"bbox": [[0, 0, 1, 1]], "category": [0, 0]}, "1 boxes, 2 labels"), ({"bbox": 3, "category": [0]}, "no list of"),
    ({"bbox": [[0, 0, 1, 1]], "category": [0], "area": []}, "0 area"),
    ({"bbox": [[0, 0, 1, 1]], "category": [0], "area": [[1]]}, "an area is no number"),
    ({"bbox": [[0, 0, 1, 1]], "category": [0], "area": ["a"]}, "an area is no number"),
    *(({"bbox": [box], "category": [0]}, "not four finite numbers")
      for box in ([0, 0, 1], [0, 0, 1, math.nan], [0, math.inf, 1, 1], None, 3, "1234", [0, 0, None, 1], ["1"] * 4)),
    ({"bbox": [[0, 0, 1e300, 1]], "category": [0]}, "beyond the numbers of 32 bits"),
    *(({"bbox": [[0, 0, 1, 1]], "category": [value]}, "is none of the 2 classes")
      for value in (2, -1, "cow", None, 0.5, "0")),
    *(({"bbox": [[0, 0, 1, 1]], "category": [0], "segmentation": [mask]}, "mask")
      for mask in ([[0, 0, math.nan, 1, 1, 1]], [[0, 0, 1e9, 1, 1, 1]], [[0, 0, 1, 1, 2, 2, 3]], "x", 3, [["a"] * 6],
                   {"size": [1, 1]}, {"counts": [1]}, {"size": [1, 1], "counts": "0PPPPPPPPPPPPPPPPPP"})),
])  # fmt: skip
def test_objects_that_cannot_be(value, message):
    with pytest.raises(ValueError, match=message) as error:
        read_objects(value, ["cat", "dog"])
    one_line(error)


def test_unknown_box_format():
    with pytest.raises(ValueError, match="'cxcywh' is neither xywh nor xyxy"):
        read_objects([], ["cat"], "cxcywh")


def test_class_names_of_a_column_of_objects():
    label, box = datasets.ClassLabel(names=["cat", "dog"]), datasets.List(datasets.Value("float32"), length=4)
    old = {"_type": "Sequence", "feature": {"category": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}
    for feature in (
        datasets.List({"bbox": box, "category": label}), datasets.LargeList({"label": label}),
        {"bbox": datasets.List(box), "category": datasets.List(label)}, [{"categories": label}],
        datasets.Sequence({"bbox": box, "labels": label}), datasets.Features.from_dict({"objects": old})["objects"],
        {"category": datasets.List(datasets.Value("string")), "category_id": datasets.List(label)},
    ):  # fmt: skip
        assert object_classes(feature) == ["cat", "dog"]
    for feature in (datasets.Value("string"), datasets.List({"category": datasets.Value("int64")}), label):
        assert object_classes(feature) is None


def test_masks_are_what_their_runs_say():
    """RLE counts pixels column by column, zeros first."""
    counts = [3, 4, 2, 1, 10]
    flat = [i % 2 for i, count in enumerate(counts) for _ in range(count)]
    expected = [[flat[column * 4 + row] for column in range(5)] for row in range(4)]
    masks = masks_of([{"size": [4, 5], "counts": counts}], 4, 5)
    assert masks.dtype == torch.uint8 and masks.shape == (1, 4, 5) and masks[0].tolist() == expected
    compressed = encode_masks(masks)[0]
    assert compressed["size"] == [4, 5] and isinstance(compressed["counts"], str)
    for form in (compressed["counts"], compressed["counts"].encode()):
        assert masks_of([{"size": (4, 5), "counts": form}], 4, 5)[0].tolist() == expected
    known = {"size": [2, 3], "counts": "06"}  # of pycocotools: no zeros, six ones
    assert masks_of([known], 2, 3).tolist() == [[[1] * 3] * 2]
    assert masks_of([], 2, 3).shape == (0, 2, 3) and encode_masks(torch.zeros(0, 2, 3)) == []


def test_masks_of_polygons():
    pieces = [[1, 1, 3, 1, 3, 3, 1, 3], [5, 0, 7, 0, 7, 6, 5, 6], [0, 0, 8, 8]]  # the last has no area
    expected = torch.zeros(8, 10, dtype=torch.uint8)
    expected[1:3, 1:3] = 1
    expected[0:6, 5:7] = 1
    masks = masks_of([pieces, None, [], [pieces[2]], pieces[0], [[-50, -50, 50, -50, 50, 50, -50, 50]]], 8, 10)
    assert torch.equal(masks[0], expected) and not masks[1:4].any() and masks[5].all()
    assert masks[4].sum() == 4 and masks[4, 1:3, 1:3].all()


def test_masks_there_and_back():
    masks = torch.rand(7, 13, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    for form in (masks, masks.to(torch.uint8), masks.to(torch.uint8) * 3):
        there = json.loads(json.dumps(encode_masks(form)))
        assert torch.equal(masks_of(there, 13, 11), masks.to(torch.uint8))


@pytest.mark.parametrize(("mask", "message"), [
    ({"size": [3, 2], "counts": "06"}, "the mask of object 1 is of 3 x 2 pixels, the image of 2 x 3"),
    *(({"size": [2, 3], "counts": counts}, "the mask of object 1 is damaged")
      for counts in ("0PPPP0", "", "07", b"\xff", [1, 2], [1, 20, 3], [-1, 7], ["a"], "0PPPPPPPPPPPPPPPPPP")),
    ([[0, 0, math.nan, 1, 1, 1]], "not pairs of numbers"), ([[0, 0, 1e12, 1, 1, 1]], "not pairs of numbers"),
])  # fmt: skip
def test_masks_that_cannot_be(mask, message):
    with pytest.raises(ValueError, match=message) as error:
        masks_of([None, mask], 2, 3)
    one_line(error)
