"""Wardrobe scenes: three to six of the demo's garments on a black canvas, with the classes of all pixels, boxes and
masks, to learn segmentation and detection from. Made when they are asked for, the same ones every time.

    python demo/scenes.py PICTURE.png        a sheet of scenes with boxes and outlines, to look at
"""

import io
import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

DEMO = Path(__file__).resolve().parent
SPLITS = ("train", "test")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SCALES = 1.0, 1.7  # of a garment of 28 x 28 pixels
# Grey values below are background: Fashion-MNIST's own is 0, but resizing spreads a faint rim around a garment. Black
# parts inside of one are holes.
THRESHOLD = 16
FEWEST = 20  # visible pixels of an object


@cache
def garments(split):
    """All garments of a split: uint8 (n, 28, 28), and their classes (n)."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(DEMO / "fashion_mnist" / f"{split}.parquet").to_pydict()
    return np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"]]), table["label"]


def scene(split, i, size=96):
    """Scene i of a split: its grey image, the class of each pixel (0 background, 1 to 10) and the number of its object
    (0 none, 1 ... from back to front), uint8 (size, size) each, and the objects' classes (0 to 9).

    Of garments that others leave fewer than FEWEST pixels of, nothing is left: neither object nor class nor image.
    """
    images, labels = garments(split)
    draw = np.random.default_rng([SPLITS.index(split), i])
    image, number = np.zeros((2, size, size), np.uint8)
    classes = []
    for n in range(1, 1 + draw.integers(3, 7)):
        chosen, side = draw.integers(len(images)), round(28 * draw.uniform(*SCALES))
        garment = np.asarray(Image.fromarray(images[chosen]).resize((side, side), Image.Resampling.BILINEAR))
        top, left = draw.integers(0, size - side + 1, 2)
        window, visible = np.s_[top : top + side, left : left + side], garment >= THRESHOLD
        np.copyto(image[window], garment, where=visible)
        np.copyto(number[window], n, where=visible)
        classes.append(labels[chosen])
    pixels = np.bincount(number.ravel(), minlength=1 + len(classes))
    kept = [n for n in range(1, 1 + len(classes)) if pixels[n] >= FEWEST]
    renumbered, kinds = np.zeros((2, 1 + len(classes)), np.uint8)
    renumbered[kept] = np.arange(1, 1 + len(kept))
    kinds[kept] = [1 + classes[n - 1] for n in kept]
    kinds, number = kinds[number], renumbered[number]
    image[number == 0] = 0
    return image, kinds, number, [classes[n - 1] for n in kept]


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class Scenes:
    """Scenes 0 to length - 1 of a split ("train" or "test"), size x size pixels, as rows of a data set:

    "image": {"bytes": an RGB PNG, "path": None}, "image_id": i;
    "annotation": the same, a grey PNG of the classes: 0 background, 1 to 10 garments;
    "objects": JSON, a list as COCO's: "id", "bbox" [x, y, width, height] in pixels, "category" 0 to 9, "iscrowd" 0,
    "area" in pixels, "segmentation" {"size": [height, width], "counts"}, a compressed RLE of what is visible.

    what="maps" leaves "objects" out, and what="objects" "annotation". Raises ValueError.
    """

    def __init__(self, split, length, size=96, what="all"):
        smallest = round(28 * SCALES[1])
        if split not in SPLITS or what not in ("all", "maps", "objects") or size < smallest or length < 0:
            raise ValueError(f"Scenes({split!r}, {length}, {size}, {what!r}): the split is one of {SPLITS}, the length "
                             f'not negative, the size {smallest} or more, what is "all", "maps" or "objects"')
        self.split, self.length, self.size, self.what = split, length, size, what

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(f"scene {i}: there are {self.length}")
        image, kinds, number, classes = scene(self.split, int(i), self.size)
        row = {"image": {"bytes": png(Image.fromarray(image).convert("RGB")), "path": None}, "image_id": int(i)}
        if self.what != "objects":
            row["annotation"] = {"bytes": png(Image.fromarray(kinds)), "path": None}
        if self.what != "maps":
            row["objects"] = json.dumps(objects(number, classes, first=10 * int(i) + 1))
        return row

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def objects(number, classes, first=1):
    """COCO's list of the objects of a scene, numbered from `first`."""
    from faster_coco_eval import mask

    numbers = np.arange(1, 1 + len(classes), dtype=np.uint8)[:, None, None]
    masks = numbers == number.T                                                          # (n, columns, rows)
    columns, rows, areas = masks.any(2), masks.any(1), np.count_nonzero(masks, axis=(1, 2)).tolist()
    x, y = columns.argmax(1), rows.argmax(1)
    boxes = np.stack([x, y, columns[:, ::-1].argmax(1), rows[:, ::-1].argmax(1)], axis=1)
    boxes[:, 2:] = number.shape[::-1] - boxes[:, 2:] - boxes[:, :2]
    rles = mask.encode(masks.view(np.uint8).T)  # which reads column by column
    return [{"id": first + n, "bbox": box, "category": label, "iscrowd": 0, "area": area,
             "segmentation": {"size": list(number.shape), "counts": rle["counts"].decode()}}
            for n, (box, label, area, rle) in enumerate(zip(boxes.tolist(), classes, areas, rles, strict=True))
            ]  # fmt: skip


def sheet(split="test", rows=4, columns=6, size=96, zoom=3):
    """A picture of the first scenes, each object with its box, class and the outline of its mask."""
    from faster_coco_eval import mask

    side = size * zoom
    picture = Image.new("RGB", (columns * side, rows * side))
    colours = [Image.new("HSV", (1, 1), (25 * k, 200, 255)).convert("RGB").getpixel((0, 0)) for k in range(10)]
    for i, row in enumerate(Scenes(split, rows * columns, size).__getitems__(range(rows * columns))):
        tile = Image.open(io.BytesIO(row["image"]["bytes"])).resize((side, side), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(tile)
        draw.rectangle((0, 0, side, side), outline="#444444")
        for thing in json.loads(row["objects"]):
            colour = colours[thing["category"]]
            visible = np.kron(255 * mask.decode(thing["segmentation"]), np.ones((zoom, zoom), np.uint8))
            inner = Image.fromarray(visible).filter(ImageFilter.MinFilter(3))
            tile.paste(colour, mask=Image.fromarray(visible - np.asarray(inner)))
            x, y, w, h = (zoom * value for value in thing["bbox"])
            draw.rectangle((x, y, x + w - 1, y + h - 1), outline=colour)
            draw.text((x + 2, y + 1), CLASSES[thing["category"]], fill=colour)
        picture.paste(tile, (i % columns * side, i // columns * side))
    return picture


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sheet().save(sys.argv[1])
