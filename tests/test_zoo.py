"""The fate of bad and odd images (zoo.py): used, with the right pixels, or skipped, counted and named."""

from engine.arguments import DataArgs, parse
from engine.errors import BadFilesError
from engine.images import MAX_PIXELS, CenterCrop, decode, jpeg_pixels
from engine.sources import open_source
from engine.stream import Stream, load_chunk, one_pass

import io
import math
import re
import sys
from collections import Counter

import pytest
import torch
import torchvision
import zoo
from launch import ROOT, launch, log_of, succeeded
from PIL import Image
from zoo import COLOURS

from train import Args, Crops, model_config, resolve

CASES = {case.name: case for case in zoo.zoo()}
FILES = [case for case in CASES.values() if not case.row]
USED = [case for case in FILES if case.used]
BASE = resolve(parse(Args, ["--size", "base"]))
VIEWS = [Crops(BASE, model_config(BASE)), CenterCrop(224, 0.875), CenterCrop(224, 1.0)]
GREYS = [round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in COLOURS]


def decoded(name):
    """The decoded image, as integers (3, H, W)."""
    return decode(CASES[name].data).int()


def near(image, colours, tolerance=0):
    """The centres of the four quarters have these colours."""
    height, width = image.shape[1:]
    got = torch.stack([image[:, y * height // 4, x * width // 4] for y in (1, 3) for x in (1, 3)])
    return (got - torch.tensor(colours)).abs().max() <= tolerance


def test_every_file_is_used_or_raises_the_stated_reason():
    for case in FILES:
        if case.used:
            image = decode(case.data)
            assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3 and image.numel(), case.name
        else:
            with pytest.raises(Exception, match=case.reason):
                decode(case.data)
                pytest.fail(f"{case.name} was used")


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("plain.jpg", 4), ("png-called.jpg", 0), ("palette.png", 0), ("cmyk.jpg", 6), ("exif-wrong.jpg", 4),
     ("exif-broken.jpg", 4), ("text-bomb.png", 0), ("profile-bomb.png", 0), ("cut-progressive.jpg", 32),
     ("unlabelled.jpg", 4)],
)  # fmt: skip
def test_colours_are_right(name, tolerance):
    assert decoded(name).shape == (3, 48, 64)
    assert near(decoded(name), COLOURS, tolerance)


def test_grey_has_three_channels():
    image = decoded("grey.jpg")
    assert near(image, [[grey] * 3 for grey in GREYS], 4) and (image == image[:1]).all()


def test_16_bits_are_scaled_not_clipped():
    for name in ("grey16.png", "grey16.tif"):
        assert (decoded(name).flatten(1) - torch.arange(256)).abs().max() <= 1, name


def test_what_is_transparent_is_white():
    for name in ("palette-alpha.png", "alpha.png", "alpha.webp", "grey-alpha.png"):
        image = decoded(name)
        assert (image[:, :, :4] == 255).all(), name
        colour = [GREYS[0]] * 3 if name == "grey-alpha.png" else COLOURS[0]
        assert (image[:, :, 4:] == torch.tensor(colour)[:, None, None]).all(), name


def test_of_a_cut_off_file_what_is_there_is_used():
    noise = torch.frombuffer(bytearray(zoo.noise().tobytes()), dtype=torch.uint8).view(48, 64, 3).permute(2, 0, 1)
    assert torch.equal(decoded("cut.png")[:, :22], noise[:, :22].int())
    assert (decoded("cut.png")[:, -20:] == 0).all()
    whole = decode(zoo.jpeg(zoo.noise())).int()
    image = decoded("cut-in-scan.jpg")
    assert torch.equal(image[:, :16], whole[:, :16]) and (image[:, -8:] - 128).abs().max() <= 1
    assert (decoded("cut-before-pixels.jpg")[:, 16:] == 128).all()
    image = decoded("cut.bmp")  # from the bottom up
    assert image[:, 36, 16].tolist() == list(COLOURS[2]) and (image[:, :20] == 0).all()


def test_the_first_frame_is_the_image():
    image = decoded("animated.gif")
    assert image.shape == (3, 7, 9) and (image == torch.tensor(COLOURS[0])[:, None, None]).all()
    with Image.open(io.BytesIO(CASES["animated.gif"].data)) as gif:
        assert gif.n_frames == 3


def test_the_orientation_of_exif_is_ignored_as_in_the_released_code():
    """torchvision's ImageFolder, which it reads with, opens a file by Pillow and converts it, nothing else."""
    data = CASES["exif-turned.jpg"].data
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif()[0x0112] == 6
    assert torch.equal(decoded("exif-turned.jpg"), decoded("plain.jpg"))


@pytest.mark.parametrize("name", [case.name for case in USED])
def test_every_used_image_gives_every_view(name):
    """At 224 pixels. Of one colour before, of one colour after: nothing is read from outside the image."""
    image = decode(CASES[name].data)
    plain = name in ("one.png", "one.jpg", "wide.jpg", "tall.png", "line.jpg")
    for view in VIEWS:
        got = view(image, 3)[0]
        assert got.shape == (3, 224, 224) and got.dtype == torch.uint8
        if plain:
            assert (got == got[:, :1, :1]).all()
    if plain:
        assert (got[:, 0, 0].int() - torch.tensor(COLOURS[0])).abs().max() <= 4


def most_memory():
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, otherwise KiB
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def test_the_middle_alone_of_a_long_image_is_resized():
    view, before = CenterCrop(224, 0.875), most_memory()
    long = torch.zeros(3, 1, 65_500, dtype=torch.uint8)
    long[:, :, 32_750:] = 255
    got = view(long, 0)[0]  # the whole would be 256 x 16,768,000 pixels
    assert most_memory() - before < 200
    assert got[..., 0].max() < 32 and got[..., -1].min() > 223, "less than a pixel, from one to the next"
    assert (got[0].float().mean() - 127.5).abs() < 10
    assert torch.equal(view(long.transpose(1, 2), 0)[0], got.transpose(1, 2))


def test_of_other_images_the_centre_is_what_it_was():
    image = torch.randint(0, 256, (3, 40, 320), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for same in (image, image.transpose(1, 2), image[:, :, :61]):
        assert torch.equal(CenterCrop(28, 0.875)(same, 0)[0], CenterCrop(28, 0.875).transform(same))


@pytest.mark.parametrize("name", [case.name for case in FILES if "bomb" in case.name])
def test_a_bomb_costs_nothing(name, monkeypatch):
    def asked(*_, **__):
        pytest.fail("the decoder was asked")

    if name != "bomb-twice.jpg":  # torchvision's decoder refuses a second size by itself
        monkeypatch.setattr(torchvision.io, "decode_jpeg", asked)
    case, before = CASES[name], most_memory()
    assert len(case.data) < 70_000
    if case.used:
        decode(case.data)
    else:
        with pytest.raises(Image.DecompressionBombError):
            decode(case.data)
    assert most_memory() - before < 50


def test_the_limit_lies_where_it_says():
    """One line more than the limit is refused, the limit itself is not: a file without pixels is all grey."""
    assert MAX_PIXELS == 2**27
    with pytest.raises(Image.DecompressionBombError):
        decode(zoo.claiming_jpeg(2**15, 2**12 + 1, "L"))
    assert decode(zoo.claiming_jpeg(2**15, 2**12, "L")).shape == (3, 2**12, 2**15)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": zoo.exif(6)}, {"comment": b"x" * 999},
                                     {"icc_profile": bytes(200_000)}])  # fmt: skip
def test_the_size_of_a_jpeg_is_read_from_its_header(options):
    data = zoo.jpeg(zoo.picture(size=(500, 375)), **options)
    assert jpeg_pixels(data) == 500 * 375
    before = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0")
    assert all(jpeg_pixels(data[:end]) == math.inf for end in range(min(before + 2, 1500)))
    assert jpeg_pixels(data[:before] + b"\xff" + data[before:]) == math.inf


class Rows:
    """In place of engine.sources.Source, for rows that no format could hold."""

    name, patience, image_column, classes, targets = "rows", 0, "image", None, None

    def has(self, data):
        return True


def test_rows_of_any_kind_are_skipped():
    images = [None, {}, {"bytes": None, "path": None}, {"bytes": None, "path": ""}, {"bytes": "text", "path": "a.jpg"},
              {"bytes": 5, "path": None}, {"bytes": [1, 2], "path": "b.jpg"}, "c.jpg", b"\xff\xd8", 7,
              {"bytes": None, "path": "/"}, {"bytes": None, "path": "no://where"}]  # fmt: skip
    wanted = [(0, i, {"image": image}) for i, image in enumerate([*images, {"bytes": CASES["plain.jpg"].data}])]
    chunk = load_chunk(Rows(), CenterCrop(8, 1.0), 0, wanted)
    assert chunk["ids"].tolist() == [[0, len(images)]] and chunk["images"].shape == (1, 3, 8, 8)
    found = [re.search(r"\(id (\d+)\): .", line) for line in chunk["skipped"]]
    assert [int(match[1]) for match in found] == list(range(len(images)))


# --------------------------------------------------------------------------------------------------------- data sets

BAD = [case for case in CASES.values() if not case.used]
BATCH, STEPS = 128, 36
PLAIN = BATCH * STEPS - (len(CASES) - len(BAD))  # so that a pass is a whole number of steps


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("zoo")
    cases = zoo.among(zoo.zoo(), PLAIN)
    return {"parquet": zoo.write_parquet(root / "parquet", cases), "tar": zoo.write_tar(root / "tar", cases),
            "files": zoo.write_files(root / "files", zoo.among(zoo.zoo(), 3 * len(CASES)))}  # fmt: skip


def split_line(line):
    """A line of what was skipped: (name, reason)."""
    return re.fullmatch(r"(.*) \(id \d+\): (.+)", line).groups()


def assert_skipped(lines, expected, name=zoo.logged_name):
    """Exactly these cases, each with its stated reason."""
    found = [split_line(line) for line in lines]
    assert Counter(name for name, _ in found) == Counter(name(case) for case in expected)
    for case in expected:
        assert any(re.search(case.reason, reason) for other, reason in found if other == name(case)), case.name


def test_the_zoo_is_skipped_in_files(data_sets):
    source = open_source(DataArgs(dataset=str(data_sets["files"]), workers=0))
    chunk = load_chunk(source, CenterCrop(8, 1.0), 0, ((0, i, source.data[i]) for i in range(len(source.data))))
    folder = data_sets["files"] / "animals"
    assert_skipped(chunk["skipped"], [c for c in FILES if not c.used], lambda case: str(folder / case.name))
    assert len(chunk["ids"]) == len(USED) + 3 * len(CASES)


def test_the_zoo_is_skipped_in_tar_shards(data_sets):
    args = DataArgs(dataset=str(data_sets["tar"]), streaming=True, workers=0, batch_size=32)
    source = open_source(args)
    assert source.num_images == PLAIN + len(FILES)
    lines, used = [], 0
    for chunk in one_pass(source, CenterCrop(8, 1.0), 32, 0):
        lines, used = lines + chunk["skipped"], used + len(chunk["ids"])
    assert used == PLAIN + len(USED)
    bad = [case for case in FILES if not case.used]
    names = Counter(split_line(line)[0].rpartition("/")[2] for line in lines)
    assert names == Counter(case.name.replace(".", "-") + ".jpg" for case in bad)


def test_what_has_no_label_is_skipped_where_labels_are_read(data_sets):
    args = DataArgs(dataset=str(data_sets["parquet"]), streaming=True, workers=0, batch_size=32)
    expected = [case for case in CASES.values() if not case.used or case.needs_label]
    lines, used = [], 0
    for chunk in one_pass(open_source(args, labelled=True), CenterCrop(8, 1.0), 32, 0):
        lines, used = lines + chunk["skipped"], used + len(chunk["ids"])
        assert len(chunk["labels"]) == len(chunk["ids"])
    assert_skipped(lines, expected)
    assert [line for line in lines if "label None is none of the 2 classes" in line]
    assert used == PLAIN + len(CASES) - len(expected)


def test_pretraining_skips_counts_and_names_the_zoo(data_sets, tmp_path):
    """The script itself, for one pass exactly."""
    assert len(BAD) < 0.01 * (PLAIN + len(CASES))
    process = launch(
        ROOT / "train.py", "--dataset", data_sets["parquet"], "--streaming", "--run-dir", tmp_path / "run", "--size",
        "nano", "--method", "cae", "--target", "pixels", "--mask-ratio", 0.9, "--align-weight", 0, "--decoder-depth", 0,
        "--workers", 1, "--interleave", 1, "--effective-batch-size", BATCH, "--steps", STEPS,
        warm=True,
    )  # fmt: skip
    succeeded(process)
    lines = log_of(tmp_path / "run")
    assert lines[-1]["images"] == BATCH * STEPS and lines[-1]["skipped"] == len(BAD)
    assert all(line["loss"] is not None for line in lines)
    names = [name for line in lines for name in line.get("skipped_files", [])]
    assert_skipped(names, BAD)
    assert all(f"skipped {name}" in process.stderr for name in names)


def test_a_stream_uses_what_has_no_label_in_pretraining(data_sets):
    """The rest of the zoo is used: every id of a pass but those of the skipped."""
    args = DataArgs(dataset=str(data_sets["files"]), workers=0, batch_size=16)
    rows = open_source(DataArgs(dataset=str(data_sets["parquet"]), workers=0, batch_size=16))
    names = [path and path["path"] for path in rows.data["image"]]
    at = names.index("unlabelled.jpg")
    chunk = load_chunk(rows, CenterCrop(8, 1.0), 0, [(0, at, rows.data[at])])
    assert chunk["ids"].tolist() == [[0, at]] and not chunk["skipped"]
    with pytest.raises(BadFilesError, match="more than 1 %: repair or remove them"):
        for stream in [Stream(open_source(args), CenterCrop(8, 1.0), args, 0)]:
            for _ in range(50):
                next(stream)
