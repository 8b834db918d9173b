"""A crop alone is decoded, to the same pixels: what a run sees does not depend on whether the library for it is there.
And what else was found between a file and a batch."""

import engine.images
from engine.images import Jpeg, crop_and_flip, decode
from engine.sources import read_file
from engine.stream import load_chunk
from engine.turbojpeg import TurboJPEG

import importlib.util
import io
import os
import random
from pathlib import Path

import fsspec
import pytest
import torch
import torchvision
import zoo
from images import noise_png
from PIL import Image

import finetune
import train
from finetune import TrainView
from probe import Augment

find_library = engine.images.turbojpeg.__wrapped__  # that remembers nothing


def library():
    """The one that a run would find; otherwise the one inside of the Python package turbojpeg, a beta of version 3."""
    package = importlib.util.find_spec("turbojpeg")
    beside = Path(package.origin).parent.glob("turbojpeg.libs/*turbojpeg*") if package else ()
    with pytest.MonkeyPatch.context() as patch:
        for path in (*beside, None) if "TURBOJPEG" not in os.environ else (None,):
            if path:
                patch.setenv("TURBOJPEG", str(path))
            else:
                patch.undo()
            found = find_library()
            if found:
                return found


LIBRARY = library()
with_library = pytest.mark.skipif(LIBRARY is None, reason="no libjpeg-turbo 3; pip install turbojpeg")


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.setattr(engine.images, "turbojpeg", lambda: LIBRARY)


def jpeg(height, width, mode="RGB", seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256, (height // 3 + 2, width // 3 + 2, 3), generator=generator, dtype=torch.uint8)
    file, image = io.BytesIO(), Image.fromarray(noise.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    image.convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def boxes(height, width, count, seed=0):
    """(top, left, height, width): the whole, its corners and borders, others anywhere, down to one pixel."""
    found, draw = [(0, 0, height, width)], random.Random(seed)
    for _ in range(count):
        h, w = draw.randint(1, height), draw.randint(1, width)
        top, left = draw.randint(0, height - h), draw.randint(0, width - w)
        border = draw.choice([0, height - h]), draw.choice([0, width - w])
        found += [(top, left, h, w), (border[0], left, h, w), (top, border[1], h, w)]
    return found


KINDS = {
    **{f"{kind} {quality}": dict(subsampling=kind, quality=quality)
       for kind in ("4:4:4", "4:2:2", "4:2:0", "4:1:1") for quality in (60, 95)},
    "grey": dict(mode="L"),
    "progressive": dict(subsampling="4:2:0", progressive=True),
    "progressive 4:4:4": dict(subsampling="4:4:4", progressive=True),
    "progressive grey": dict(mode="L", progressive=True),
    "restart markers": dict(subsampling="4:2:0", restart_marker_blocks=3),
    "not converted to YCbCr": dict(keep_rgb=True),
    "turned, says EXIF": dict(subsampling="4:2:0", exif=zoo.exif(6)),
}  # fmt: skip


@with_library
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_has_the_pixels_of_the_whole(kind):
    for seed, (height, width) in enumerate([(120, 161), (61, 43), (16, 32), (33, 2), (1, 50), (1, 1)]):
        data = jpeg(height, width, seed=seed, **KINDS[kind])
        whole, part = decode(data), Jpeg.of(data)
        assert part.shape == whole.shape
        for top, left, h, w in boxes(height, width, 25, seed):
            assert torch.equal(part.part(top, left, h, w), whole[:, top : top + h, left : left + w]), (top, left, h, w)


@with_library
def test_a_damaged_file_gives_the_same_part_or_none_and_spoils_no_other():
    draw, good, given = random.Random(0), jpeg(50, 70), 0
    whole = decode(good)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(draw.choice([1, 3])):
            data[draw.randrange(2, len(data) - 2)] ^= 1 << draw.randrange(8)
        data = bytes(data)
        try:
            found = Jpeg.of(data).part(8, 8, 30, 30)
        except Exception:
            assert torch.equal(Jpeg.of(good).part(9, 9, 30, 30), whole[:, 9:39, 9:39])
            continue
        assert torch.equal(found, decode(data)[:, 8:38, 8:38])
        given += 1
    assert 30 < given < 290


@pytest.mark.parametrize("data", [
    jpeg(40, 40)[:-1], jpeg(40, 40) + b"0", jpeg(40, 40)[:300], jpeg(40, 40, "CMYK"),
    zoo.claiming_jpeg(2**15, 2**13, "L"), b"\xff\xd8\xff\xd9", b"",
    jpeg(40, 40).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),  # 12 bits
])  # fmt: skip
def test_what_is_odd_is_left_to_the_whole_decoder(data, monkeypatch):
    monkeypatch.setattr(engine.images, "turbojpeg", lambda: object())
    assert Jpeg.of(jpeg(40, 40)) and Jpeg.of(data) is None


class StandIn:
    """In place of TurboJPEG, without its use."""

    def __init__(self, refuses=False):
        self.asked, self.refuses = 0, refuses

    def part(self, data, shape, top, left, height, width):
        self.asked += 1
        if self.refuses:
            raise ValueError
        return decode(data)[:, top : top + height, left : left + width]


class Files:
    """In place of engine.sources.Source."""

    name, patience, image_column, classes, targets = "files", 0, "image", None, None

    def has(self, data):
        return True


def chunk_of(monkeypatch, library, view, files, seed=5):
    monkeypatch.setattr(engine.images, "turbojpeg", lambda: library)
    wanted = [(1, i, {"image": {"bytes": data, "path": f"{i}.jpg"}}) for i, data in enumerate(files)]
    return load_chunk(Files(), view, seed, wanted)


def assert_same(a, b):
    assert a.keys() == b.keys() and a["skipped"] == b["skipped"]
    for name in a.keys() - {"skipped"}:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def pretraining(*flags):
    args = train.resolve(train.parse(train.Args, ["--size", "base", *flags]))
    return train.Crops(args, train.model_config(args))


VIEWS = {
    "pretraining": lambda: pretraining(),
    "small crops": lambda: pretraining("--method", "cae"),
    "fine-tuning": lambda: TrainView(224, finetune.RecipeArgs(crop_scale=(0.08, 1.0), randaugment=9, erasing=0.25)),
    "probes": lambda: Augment(224, (0.08, 1.0), 0.5),
    "linear probe": lambda: Augment(224, (0.08, 1.0), 0.5, True),
}


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("library", [StandIn(), pytest.param(None, marks=with_library)], ids=["stand-in", "library"])
def test_every_view_is_the_same_with_and_without_the_library(kind, library, monkeypatch):
    """224 x 224 is what a crop of the right size gives: it is not resized."""
    files = [jpeg(150, 200, seed=i) for i in range(8)] + [jpeg(224, 224, seed=9), noise_png(3)]
    view = VIEWS[kind]()
    expected = chunk_of(monkeypatch, None, view, files)
    assert_same(chunk_of(monkeypatch, library or LIBRARY, view, files), expected)


def test_the_whole_is_not_decoded_where_the_crop_is(monkeypatch):
    """Neither by torchvision nor by Pillow; nor a part where a view needs all."""
    whole = torch.zeros(3, 150, 200, dtype=torch.uint8)
    library, files = StandIn(), [jpeg(150, 200)]
    library.part = lambda data, shape, top, left, height, width: whole[:, top : top + height, left : left + width]
    monkeypatch.setattr(torchvision.io, "decode_jpeg", lambda *_, **__: pytest.fail("the whole was decoded"))
    monkeypatch.setattr(engine.images.Image, "open", lambda *_, **__: pytest.fail("the whole was decoded"))
    assert not chunk_of(monkeypatch, library, pretraining(), files)["skipped"]
    monkeypatch.undo()
    library, view = StandIn(), engine.images.CenterCrop(28, 1.0)
    assert len(chunk_of(monkeypatch, library, view, files)["ids"]) == 1 and not library.asked


def test_the_zoo_is_used_and_skipped_as_without_the_library(monkeypatch):
    files = [case.data for case in zoo.zoo() if not case.row]
    view, refusing = Augment(28, (0.4, 1.0), 0.5), StandIn(refuses=True)
    expected = chunk_of(monkeypatch, None, view, files)
    assert len(expected["skipped"]) > 5
    for library in (StandIn(), refusing, LIBRARY):
        assert_same(chunk_of(monkeypatch, library, view, files), expected)
    assert refusing.asked > 3


def test_a_view_that_asks_for_more_than_its_crop_gets_the_whole(monkeypatch):
    class Brightness(Augment):
        def __call__(self, image, seed):
            return (super().__call__(image, seed)[0] // 2 + int(image.float().mean() / 4),)

    view, files = Brightness(28, (0.4, 1.0), 0.5), [jpeg(60, 80)]
    assert_same(chunk_of(monkeypatch, StandIn(), view, files), chunk_of(monkeypatch, None, view, files))


def test_a_mistake_in_a_view_is_told_as_such(monkeypatch):
    class Wrong(Augment):
        def __call__(self, image, seed):
            raise ZeroDivisionError("in the view")

    with pytest.raises(ZeroDivisionError, match="in the view"):
        chunk_of(monkeypatch, StandIn(), Wrong(28, (0.4, 1.0), 0.5), [jpeg(60, 80)])


def test_a_library_that_is_too_old_or_gives_other_pixels_is_not_used(monkeypatch):
    monkeypatch.setattr(engine.images, "libraries", lambda: ["libc.so.6", "libnowhere.so.0"])
    assert find_library() is None
    monkeypatch.setattr(engine.images, "TurboJPEG", lambda name: StandIn())
    assert find_library() is not None
    monkeypatch.setattr(engine.images, "TurboJPEG", lambda name: StandIn(refuses=True))
    assert find_library() is None

    class Other(StandIn):
        def part(self, *where):
            part = super().part(*where)
            part[0, -1, -1] ^= 1
            return part

    monkeypatch.setattr(engine.images, "TurboJPEG", lambda name: Other())
    assert find_library() is None


@with_library
def test_another_margin_would_be_seen(monkeypatch):
    """At least where the library of this machine needs one."""
    monkeypatch.setattr("engine.turbojpeg.MARGIN", 0)
    data, wrong = jpeg(120, 161, subsampling="4:2:0"), 0
    whole, part = decode(data), Jpeg.of(data)
    for top, left, h, w in boxes(120, 161, 100):
        wrong += not torch.equal(part.part(top, left, h, w), whole[:, top : top + h, left : left + w])
    assert wrong


def test_crops_are_drawn_as_torchvision_draws_them():
    """Of a tensor and of a JPEG that waits, with the random numbers after it."""
    data = jpeg(150, 200)
    crop, library = crop_and_flip(64, (0.08, 1.0), 0.5)[0], StandIn()
    image = Jpeg(data, 150, 200)
    image.part = lambda **box: library.part(data, None, **box)
    for seed in range(20):
        found = []
        for draw in (lambda: crop(image), lambda: crop(decode(data)), lambda: crop.crop(decode(data))):
            torch.manual_seed(seed)
            found.append((draw(), torch.rand(1)))
        assert all(torch.equal(a, b) for other in found[:2] for a, b in zip(other, found[2], strict=True))


def test_the_library_is_named_by_its_own_numbers():
    """TJSAMP of turbojpeg.h, and the pixels of tjMCUWidth."""
    from engine.turbojpeg import BLOCK_WIDTH

    assert BLOCK_WIDTH == {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32}
    with pytest.raises(OSError):
        TurboJPEG("libnowhere.so.0")


def test_a_local_file_is_opened_as_one(tmp_path, monkeypatch):
    (tmp_path / "x.jpg").write_bytes(b"abc")
    assert read_file(f"file://{tmp_path / 'x.jpg'}") == b"abc"
    monkeypatch.setattr(fsspec, "open", lambda *_: pytest.fail("fsspec was asked"))
    assert read_file(str(tmp_path / "x.jpg")) == b"abc"


def test_a_loading_process_stacks_into_shared_memory(monkeypatch):
    view, files = Augment(28, (0.4, 1.0), 0.5), [jpeg(60, 80)] * 3
    expected = chunk_of(monkeypatch, None, view, files)
    assert not expected["images"].is_shared()
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a loading process")
    found = chunk_of(monkeypatch, None, view, files)
    assert found["images"].is_shared()
    assert_same(found, expected)
