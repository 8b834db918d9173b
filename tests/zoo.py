"""Bad and odd images, made as real files: `python tests/zoo.py FOLDER` writes them all as files in a class folder, as
Parquet and as a webdataset .tar, and prints each one's name, what it is and its fate.

Every case is either used, or skipped and counted. `test_zoo.py` holds train.py to it.
"""

import io
import random
import struct
import sys
import tarfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

COLOURS = [(200, 30, 60), (20, 160, 60), (30, 60, 200), (240, 200, 40)]  # of the quarters of `picture`, by rows
HUGE = 65_500  # the longest side that libjpeg accepts


@dataclass(frozen=True)
class Case:
    name: str
    """File name, with the extension that the file claims."""
    what: str
    data: bytes | None
    """The file; None for a row that holds no bytes."""
    reason: str = ""
    """Skipped: a pattern that the logged reason holds. Empty: used."""
    needs_label: bool = False
    """Skipped where labels are read: it has none that counts."""
    row: bool = False
    """A row of Parquet only: it cannot be a file."""

    @property
    def used(self):
        return not self.reason

    @property
    def fate(self):
        fate = f"skipped: {self.reason}" if self.reason else "used"
        return fate + ("; skipped where labels are read" if self.needs_label else "")


def picture(mode="RGB", size=(64, 48)):
    """Four quarters of one colour each."""
    image, (width, height) = Image.new("RGB", size), size
    for i, colour in enumerate(COLOURS):
        image.paste(colour, (i % 2 * width // 2, i // 2 * height // 2, (i % 2 + 1) * width // 2,
                             (i // 2 + 1) * height // 2))  # fmt: skip
    return image.convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(image=None, **options):
    return encoded(image or picture(), "JPEG", **{"quality": 95, "subsampling": 0, **options})


def noise(size=(64, 48)):
    """An image that no compression makes small, so that a part of the file is a part of the image."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def transparent(mode="RGBA"):
    """Black without opacity on the left, COLOURS[0] (or its grey) in full on the right."""
    image = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    image.paste((*COLOURS[0], 255), (4, 0, 8, 4))
    return image.convert(mode)


def transparent_palette():
    image = Image.new("P", (8, 4), 0)
    image.putpalette([0, 0, 0, *COLOURS[0]])
    image.paste(1, (4, 0, 8, 4))
    return encoded(image, "PNG", transparency=0)


def grey16():
    """16 x 16 greys of 16 bits: 0, 257, 514, ..., 65535."""
    return Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16))


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunk(png, name, body):
    """A PNG with one more chunk, right behind its header (8 + 25 bytes)."""
    return png[:33] + png_chunk(name, body) + png[33:]


def claiming_jpeg(width, height, mode="RGB", **options):
    """A JPEG of 16 x 16 pixels whose header claims more. The size follows the marker of the frame."""
    data = bytearray(jpeg(picture(mode, (16, 16)), **options))
    at = data.index(b"\xff\xc2" if options.get("progressive") else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def claiming_png(width, height):
    data = encoded(picture(size=(16, 16)), "PNG")
    return data[:8] + png_chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29]) + data[33:]


def claiming_gif(width, height):
    data = encoded(picture("P", (16, 16)), "GIF")
    return data[:6] + struct.pack("<HH", width, height) + data[10:]


def claiming_webp(width, height):
    """Two 14-bit numbers follow the signature of a lossless image."""
    data = bytearray(encoded(picture(size=(16, 16)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    (bits,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at, bits >> 28 << 28 | (height - 1) << 14 | (width - 1))
    return bytes(data)


def claiming_animation(width, height):
    """WebP with a canvas: 24 bits a side."""
    data = bytearray(encoded(transparent(), "WEBP", save_all=True, append_images=[transparent().rotate(180)]))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def claiming_tiff(width, height, **options):
    data = bytearray(encoded(picture(size=(16, 16)), "TIFF", **options))
    (table,) = struct.unpack_from("<I", data, 4)
    for at in range(table + 2, table + 2 + 12 * struct.unpack_from("<H", data, table)[0], 12):
        tag = struct.unpack_from("<H", data, at)[0]
        if tag in (256, 257):
            struct.pack_into("<HHII", data, at, tag, 4, 1, width if tag == 256 else height)
    return bytes(data)


def claiming_bmp(width, height):
    data = encoded(picture(size=(16, 16)), "BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@lru_cache
def zoo():
    """Every Case."""
    scan = (whole := jpeg(noise())).index(b"\xff\xda")  # where the header ends
    png, frames = encoded(noise(), "PNG"), [Image.new("P", (9, 7), i) for i in range(3)]
    for frame in frames:
        frame.putpalette([c for colour in COLOURS for c in colour])
    zeros = zlib.compress(bytes(2**26))
    unknown, bomb = "no image of a known format", "decompression bomb"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\nshowpage\n%%EOF\n"
    return (
        Case("plain.jpg", "a JPEG, nothing wrong", jpeg()),
        Case("cut-in-scan.jpg", "JPEG, half of it", whole[: len(whole) // 2]),
        Case("cut-progressive.jpg", "progressive JPEG, half of it: coarse",
             (p := jpeg(progressive=True))[: len(p) // 2]),
        Case("cut-before-pixels.jpg", "JPEG, nothing but the whole header", whole[: scan + 14]),
        Case("cut-in-header.jpg", "JPEG, cut in its tables", whole[:100], "Truncated File Read"),
        Case("cut-before-scan.jpg", "JPEG, cut between size and scan", whole[:scan],
             f"cannot load this image|{unknown}"),  # by the version of Pillow
        Case("cut-to-marker.jpg", "JPEG, its first three bytes", whole[:3], unknown),
        Case("cut.png", "PNG, half of it", png[: len(png) // 2]),
        Case("cut-in-header.png", "PNG, cut in its header", png[:20], "Truncated File Read"),
        Case("cut.gif", "GIF, cut in its palette", encoded(picture("P"), "GIF")[:40], unknown),
        Case("cut.webp", "WebP, half of it", (w := encoded(picture(), "WEBP"))[: len(w) // 2], "decoder"),
        Case("cut.bmp", "BMP, half of it", (b := encoded(picture(), "BMP"))[: len(b) // 2]),
        Case("zero.jpg", "a file of no bytes", b"", unknown),
        Case("nul.jpg", "1000 bytes of zero", bytes(1000), unknown),
        Case("page.jpg", "an HTML page called .jpg",
             b"<!DOCTYPE html><html><body>404 Not Found</body></html>", unknown),
        Case("postscript.jpg", "PostScript, which Pillow would hand to Ghostscript", postscript, unknown),
        Case("png-called.jpg", "PNG called .jpg", encoded(picture(), "PNG")),
        Case("cmyk.jpg", "JPEG, CMYK (Adobe's, inverted)", jpeg(picture("CMYK"))),
        Case("grey.jpg", "JPEG, one channel", jpeg(picture("L"))),
        Case("grey16.png", "PNG, grey of 16 bits", encoded(grey16(), "PNG")),
        Case("grey16.tif", "TIFF, grey of 16 bits", encoded(grey16(), "TIFF")),
        Case("palette.png", "PNG with a palette", encoded(picture().quantize(4), "PNG")),
        Case("palette-alpha.png", "PNG with a palette, one colour transparent", transparent_palette()),
        Case("alpha.png", "PNG, RGB with alpha", encoded(transparent(), "PNG")),
        Case("grey-alpha.png", "PNG, grey with alpha", encoded(transparent("LA"), "PNG")),
        Case("alpha.webp", "WebP with alpha", encoded(transparent(), "WEBP", lossless=True)),
        Case("one.png", "PNG of 1 x 1", encoded(Image.new("RGB", (1, 1), COLOURS[0]), "PNG")),
        Case("one.jpg", "JPEG of 1 x 1", jpeg(Image.new("RGB", (1, 1), COLOURS[0]))),
        Case("wide.jpg", "JPEG of 20,000 x 10", jpeg(Image.new("RGB", (20_000, 10), COLOURS[0]))),
        Case("tall.png", "PNG of 10 x 20,000", encoded(Image.new("RGB", (10, 20_000), COLOURS[0]), "PNG")),
        Case("line.jpg", "JPEG of 65,500 x 1", jpeg(Image.new("RGB", (HUGE, 1), COLOURS[0]))),
        Case("animated.gif", "GIF of three frames",
             encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        Case("exif-turned.jpg", "JPEG, EXIF says: turn by 90 degrees", jpeg(exif=exif(6))),
        Case("exif-wrong.jpg", "JPEG, EXIF says: orientation 77", jpeg(exif=exif(77))),
        Case("exif-broken.jpg", "JPEG, EXIF is garbage", jpeg(exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")),
        Case("text-bomb.png", "PNG with 64 MB of zipped text",
             with_chunk(encoded(picture(), "PNG"), b"zTXt", b"Comment\0\0" + zeros)),
        Case("profile-bomb.png", "PNG with a colour profile of 64 MB",
             with_chunk(encoded(picture(), "PNG"), b"iCCP", b"profile\0\0" + zeros)),
        Case("pixel-bomb.png", "PNG of 1 x 1 with 64 MB of pixels",
             png[:8] + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
             + png_chunk(b"IDAT", zeros) + png_chunk(b"IEND", b"")),
        Case("bomb.jpg", "JPEG of 600 bytes that claims 65,500 x 65,500", claiming_jpeg(HUGE, HUGE), bomb),
        Case("bomb-progressive.jpg", "the same, progressive", claiming_jpeg(HUGE, HUGE, progressive=True), bomb),
        Case("bomb-cmyk.jpg", "the same, CMYK", claiming_jpeg(HUGE, HUGE, "CMYK"), bomb),
        Case("bomb-behind.jpg", "the same, its size behind a byte of padding",
             claiming_jpeg(HUGE, HUGE).replace(b"\xff\xc0", b"\xff\xff\xc0"), bomb),
        Case("bomb-twice.jpg", "the same, behind a harmless size",
             (c := claiming_jpeg(16, 16))[: (at := c.index(b"\xff\xc0")) + 19] + claiming_jpeg(HUGE, HUGE)[at:], bomb),
        Case("bomb.png", "PNG that claims 60,000 x 60,000", claiming_png(60_000, 60_000), bomb),
        Case("bomb.gif", "GIF that claims 65,500 x 65,500", claiming_gif(HUGE, HUGE), bomb),
        Case("bomb.webp", "WebP that claims 16,383 x 16,383", claiming_webp(16_383, 16_383), bomb),
        Case("bomb-animated.webp", "animated WebP that claims 65,500 x 65,500", claiming_animation(HUGE, HUGE), bomb),
        Case("bomb.tif", "TIFF that claims 1,000,000 x 1,000,000", claiming_tiff(10**6, 10**6), bomb),
        Case("bomb-lzw.tif", "the same, compressed", claiming_tiff(10**6, 10**6, compression="tiff_lzw"), bomb),
        Case("bomb.bmp", "BMP that claims 60,000 x 60,000", claiming_bmp(60_000, 60_000), bomb),
        Case("unlabelled.jpg", "an image without a label", jpeg(), needs_label=True),
        Case("none.jpg", "a row whose image is None", None, "the row holds no image", row=True),
        Case("", "a row without bytes, with an empty path", None, "the row holds no image", row=True),
        Case("absent.jpg", "a row without bytes, with the path of no file", None, "No such file", row=True),
    )  # fmt: skip


def logged_name(case):
    """What the log calls a row of Parquet."""
    return "image" if case.name in ("none.jpg", "") else case.name


def among(cases, plain):
    """The cases, evenly among `plain` copies of a harmless file."""
    data = jpeg(picture(size=(32, 32)))
    others = [Case(f"harmless-{i:05d}.jpg", "", data) for i in range(plain)]
    every = max(1, len(others) // len(cases))
    for i, case in enumerate(random.Random(0).sample(cases, len(cases))):  # neighbours here share their fate
        others.insert(i * (every + 1), case)
    return others


def write_files(folder, cases):
    """As files of a class folder."""
    (folder / "animals").mkdir(parents=True)
    for case in cases:
        if not case.row:
            (folder / "animals" / case.name).write_bytes(case.data)
    return folder


def write_parquet(folder, cases, group=512):
    folder.mkdir(parents=True)
    rows = [None if case.name == "none.jpg" else {"bytes": case.data, "path": case.name} for case in cases]
    labels = [None if case.needs_label else i % 2 for i, case in enumerate(cases)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    raw = datasets.Features({"image": image, "label": features["label"]})
    data = datasets.Dataset.from_dict({"image": rows, "label": labels}, features=raw).cast(features)
    data.to_parquet(folder / "train-00000-of-00001.parquet", batch_size=group)
    return folder


def write_tar(folder, cases):
    """As webdataset: the extension names the column, so all are called .jpg."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "train-00000.tar", "w") as tar:
        for i, case in enumerate(cases):
            if case.row:
                continue
            name = case.name.replace(".", "-")
            for extension, data in (("jpg", case.data), ("cls", None if case.needs_label else b"%d" % (i % 2))):
                if data is not None:
                    member = tarfile.TarInfo(f"{name}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def main(folder):
    write_files(folder / "files", zoo())
    write_parquet(folder / "parquet", zoo())
    write_tar(folder / "tar", zoo())
    width = max(len(case.name) for case in zoo()), max(len(case.what) for case in zoo())
    for case in zoo():
        print(f"{case.name or '(no name)':{width[0]}}  {case.what:{width[1]}}  {case.fate}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/zoo.py FOLDER")
    main(Path(sys.argv[1]))
