"""Small data sets for the tests, in the formats that train.py reads. Images hold their own number as a colour, are
noise or, for accuracies that tell something, four squares of any colour."""

import io
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow


def png(number, size=(8, 8)):
    """A lossless image of one colour that spells `number`."""
    file = io.BytesIO()
    Pillow.new("RGB", size, (number // 256, number % 256, 77)).save(file, "PNG")
    return file.getvalue()


def noise_png(number, size=(28, 28)):
    """A lossless image of noise, brighter where `number` is odd."""
    noise = torch.rand(3, *size, generator=torch.Generator().manual_seed(number)) * (0.8 + 0.05 * (number % 2))
    file = io.BytesIO()
    Pillow.fromarray((255 * noise).byte().permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def number_of(image):
    """uint8 (3, H, W) -> the number that it spells."""
    assert (image == image[:, :1, :1]).all() and image[2, 0, 0] == 77
    return int(image[0, 0, 0]) * 256 + int(image[1, 0, 0])


class Numbers:
    """In place of train.Crops: the number of an image and the seed that it was given."""

    names = ("numbers", "seeds")

    def __call__(self, image, seed):
        return torch.tensor(number_of(image)), torch.tensor(seed)


def write_parquet(folder, counts, group=1000, first=0, encode=png, split="train", labels="names",
                  names=("even", "odd"), missing=(), offset=0):  # fmt: skip
    """One Parquet file for each count, with row groups of `group` rows. The label is number % 2 + offset: a class with
    a name, a number, a word, or nothing (labels=None, or for the numbers in `missing`)."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"names": ClassLabel(names=list(names)), "numbers": Value("int64"), "words": Value("string")}
    features = Features({"image": Image(), **({"label": kinds[labels]} if labels else {})})
    for i, count in enumerate(counts):
        numbers = range(first, first + count)
        rows = {"image": [{"bytes": encode(n), "path": f"{n}.png"} for n in numbers]}
        if labels:
            found = [n % 2 + offset for n in numbers]
            found = [names[y] for y in found] if labels == "words" else found
            rows["label"] = [None if n in missing else y for n, y in zip(numbers, found, strict=True)]
        data = Dataset.from_dict(rows, features=features)
        data.to_parquet(folder / f"{split}-{i:05d}-of-{len(counts):05d}.parquet", batch_size=group)
        first += count
    return folder


def write_tars(folder, counts, encode=png, split="train"):
    """One webdataset shard for each count: NUMBER.png beside NUMBER.cls."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for i, count in enumerate(counts):
        with tarfile.open(folder / f"{split}-{i:05d}.tar", "w") as tar:
            for _ in range(count):
                for name, data in ((f"{number:06d}.png", encode(number)), (f"{number:06d}.cls", b"%d" % (number % 2))):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                number += 1
    return folder


def write_folder(folder, count, encode=png):
    """Class subfolders even/ and odd/."""
    for number in range(count):
        file = folder / ("odd" if number % 2 else "even") / f"{number:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(number))
    return folder


def write_clothes(folder, **counts):
    """The first images of the demo's splits, train=COUNT, test=COUNT, in uneven row groups."""
    demo = Path(__file__).resolve().parent.parent / "demo" / "fashion_mnist"
    for split, count in counts.items():
        pq.write_table(pq.read_table(demo / f"{split}.parquet")[:count], folder / f"{split}.parquet", row_group_size=70)
    return folder


CLASSES = tuple("abcdefg")  # of which a top-5 leaves two out


def squares(number):
    """uint8 (3, 40, 40): four squares, which even an untrained encoder tells apart; its class is number % 7."""
    colours = torch.randint(256, (3, 2, 2), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return colours.repeat_interleave(20, 1).repeat_interleave(20, 2)


def write_squares(folder, **numbers):
    """Squares with these splits: train=range(...), test=range(...)."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES))})
    for split, wanted in numbers.items():
        pictures = [Pillow.fromarray(squares(n).permute(1, 2, 0).numpy()) for n in wanted]
        rows = {"image": pictures, "label": [n % 7 for n in wanted]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder
