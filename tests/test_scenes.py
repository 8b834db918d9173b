"""Wardrobe scenes: the same ones every time, and three descriptions of each that agree to the pixel."""

import io
import json

import numpy as np
import pyarrow.parquet
import pytest
from faster_coco_eval import mask
from launch import ROOT
from PIL import Image

from demo import scenes
from demo.scenes import CLASSES, FEWEST, SPLITS, THRESHOLD, Scenes

COUNT = 60


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded["bytes"])))


@pytest.fixture(scope="module", params=SPLITS)
def split(request):
    return request.param


@pytest.fixture(scope="module")
def rows(split):
    return Scenes(split, COUNT).__getitems__(list(range(COUNT)))


def test_a_scene_is_a_function_of_its_split_and_number(split, rows):
    """Whatever was asked for before, and however long the data set is."""
    longer = Scenes(split, 10**9)
    for i in (COUNT - 1, 3, 3, 0):
        assert longer[i] == rows[i]
    assert len({row["image"]["bytes"] for row in rows}) == COUNT
    assert longer[10**9 - 1]["image_id"] == 10**9 - 1


def test_splits_share_neither_scenes_nor_garments():
    of_train, of_test = ({row["image"]["bytes"] for row in Scenes(split, COUNT)} for split in SPLITS)
    assert len(of_train) == len(of_test) == COUNT and not of_train & of_test
    (train, _), (test, _) = map(scenes.garments, SPLITS)
    assert len(train) == 6000 and len(test) == 1000
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_splits_are_laid_out_differently(monkeypatch):
    monkeypatch.setattr(scenes, "garments", lambda split: (np.full((1, 28, 28), 200, np.uint8), [0]))
    assert any((scenes.scene("train", i)[1] != scenes.scene("test", i)[1]).any() for i in range(3))


def test_maps_and_objects_agree_to_the_pixel(rows):
    for row in rows:
        image, kinds = pixels(row["image"]), pixels(row["annotation"])
        assert image.shape == (96, 96, 3) and image.dtype == kinds.dtype == np.uint8 and kinds.shape == (96, 96)
        assert (image == image[:, :, :1]).all()
        assert ((image[:, :, 0] >= THRESHOLD) == (kinds > 0)).all() and (image[kinds == 0] == 0).all()
        drawn = np.zeros((96, 96), np.int64)
        for thing in json.loads(row["objects"]):
            visible = mask.decode(thing["segmentation"])
            assert not drawn[visible > 0].any(), "masks overlap"
            drawn += visible.astype(np.int64) * (1 + thing["category"])
        assert (drawn == kinds).all()


def test_boxes_and_areas_are_those_of_the_masks(rows):
    for row in rows:
        for thing in json.loads(row["objects"]):
            visible = mask.decode(thing["segmentation"])
            ys, xs = visible.nonzero()
            box = [xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()]
            assert thing["bbox"] == box == list(mask.toBbox(thing["segmentation"]))
            assert thing["area"] == visible.sum() >= FEWEST
            assert thing["iscrowd"] == 0 and isinstance(thing["segmentation"]["counts"], str)
    ids = [thing["id"] for row in rows for thing in json.loads(row["objects"])]
    assert len(set(ids)) == len(ids) and min(ids) > 0


def test_what_scenes_are_made_of(monkeypatch):
    """Bright squares instead of garments, each of a grey value of its own: nothing can hide by its shape."""
    garments = np.repeat(np.arange(20, 240, dtype=np.uint8), 28 * 28).reshape(-1, 28, 28)
    labels = [k % 10 for k in range(len(garments))]
    monkeypatch.setattr(scenes, "garments", lambda split: (garments, labels))
    monkeypatch.setattr(scenes, "FEWEST", 1)
    counts, sides, corners, seen = [], [], [], set()
    for i in range(300):
        image, kinds, number, classes = scenes.scene("train", i)
        counts.append(len(classes))
        for n, label in enumerate(classes, start=1):
            (grey,) = set(image[number == n].tolist())
            assert label == (grey - 20) % 10 and set(kinds[number == n].tolist()) == {1 + label}
            seen.add(label)
        ys, xs = (number == len(classes)).nonzero()  # the last one is in front of all others
        side = xs.max() + 1 - xs.min()
        assert ys.max() + 1 - ys.min() == side and len(xs) == side**2
        sides.append(side)
        corners += [xs.min() / (96 - side), ys.min() / (96 - side)]
    assert set(counts) <= {1, 2, 3, 4, 5, 6} and max(counts) == 6 and seen == set(range(10))
    assert min(sides) == 28 and 47 <= max(sides) <= 48 and abs(np.mean(sides) - 28 * 1.35) < 1
    assert min(corners) == 0 and max(corners) == 1 and abs(np.mean(corners) - 0.5) < 0.05


def test_three_to_six_garments_before_any_is_hidden(monkeypatch):
    """On a canvas so large that none hides another whole."""
    garments = np.zeros((10, 28, 28), np.uint8)
    garments[:, 10:18, 10:18] = 200
    monkeypatch.setattr(scenes, "garments", lambda split: (garments, list(range(10))))
    monkeypatch.setattr(scenes, "FEWEST", 1)
    counts = [len(scenes.scene("test", i, size=800)[3]) for i in range(80)]
    assert set(counts) == {3, 4, 5, 6} and abs(np.mean(counts) - 4.5) < 0.4


def test_hardly_visible_garments_leave_nothing():
    """In the same scenes, with and without the rule."""
    dropped = 0
    for i in range(400):
        image, kinds, number, classes = scenes.scene("train", i)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scenes, "FEWEST", 1)
            before = scenes.scene("train", i)
        gone = (before[2] > 0) & (number == 0)
        for n in range(1, 1 + len(before[3])):
            part = before[2] == n
            assert gone[part].all() if part.sum() < FEWEST else not gone[part].any()
        assert not image[gone].any() and not kinds[gone].any()
        assert (image[~gone] == before[0][~gone]).all() and (kinds[~gone] == before[1][~gone]).all()
        assert len(classes) == number.max() and set(np.unique(number)) >= set(range(1, 1 + len(classes)))
        dropped += len(before[3]) - len(classes)
    assert dropped > 3


def test_the_fewest_pixels_are_just_enough(monkeypatch):
    _, _, number, classes = scenes.scene("train", 0)
    least = int(np.bincount(number.ravel())[1:].min())
    monkeypatch.setattr(scenes, "FEWEST", least)
    assert len(scenes.scene("train", 0)[3]) == len(classes)
    monkeypatch.setattr(scenes, "FEWEST", least + 1)
    assert len(scenes.scene("train", 0)[3]) == len(classes) - 1


def test_a_scene_of_nothing(monkeypatch):
    monkeypatch.setattr(scenes, "garments", lambda split: (np.zeros((1, 28, 28), np.uint8), [0]))
    row = Scenes("test", 1)[0]
    assert json.loads(row["objects"]) == [] and not pixels(row["annotation"]).any()


def test_only_what_is_asked_for(monkeypatch):
    full = Scenes("test", 5, size=64)[2]
    assert pixels(full["image"]).shape == (64, 64, 3)
    maps, things = Scenes("test", 5, size=64, what="maps")[2], Scenes("test", 5, size=64, what="objects")[2]
    assert maps == {key: full[key] for key in ("image", "image_id", "annotation")}
    assert things == {key: full[key] for key in ("image", "image_id", "objects")}
    assert len(Scenes("test", 5)) == 5
    for i in (-1, 5):
        with pytest.raises(IndexError, match="there are 5"):
            Scenes("test", 5)[i]
    assert len(list(Scenes("test", 2))) == 2  # a plain for loop ends
    for wrong in (("val", 5), ("test", -1), ("test", 5, 47), ("test", 5, 96, "boxes")):
        with pytest.raises(ValueError, match="the split is one of"):
            Scenes(*wrong)


def test_class_names_are_the_files_own():
    for split in SPLITS:
        schema = pyarrow.parquet.read_schema(ROOT / "demo" / "fashion_mnist" / f"{split}.parquet")
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert tuple(features["label"]["names"]) == CLASSES


def test_the_sheet_to_look_at():
    plain = pixels(Scenes("test", 6)[4]["image"])
    sheet = np.asarray(scenes.sheet(rows=2, columns=3, zoom=2))
    assert sheet.shape == (2 * 192, 3 * 192, 3)
    tile = sheet[192:, 192:384]
    grey = (tile == tile[:, :, :1]).all(2)
    assert 0.5 < grey.mean() < 0.99, "boxes and outlines have colours"
    assert (tile[grey] == np.kron(plain, np.ones((2, 2, 1), np.uint8))[grey]).mean() > 0.95
