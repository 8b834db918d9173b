"""Images: encoded bytes -> uint8 RGB -> crop -> device -> normalised pixels.

What is random draws from torch's global generator, which a view seeds for each image. torchvision is imported where it
is used: a wrong flag is answered without it.
"""

from engine.turbojpeg import TurboJPEG, libraries

import io
import math
import warnings
from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, UnidentifiedImageError

ImageFile.LOAD_TRUNCATED_IMAGES = True  # what is there of a cut-off file is used, the rest is grey or black
# A JPEG of 600 bytes may claim 65,500 x 65,500 pixels, which would be 12 GB. A camera's 100 megapixels are 0.3 GB.
MAX_PIXELS = 2**27
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Image.open refuses more than twice as many, before any of them is decoded
# Not all that Pillow knows: for EPS it would start Ghostscript, which executes what the file says.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Segments that may stand before the size of a JPEG: tables, comments, application data.
BEFORE_SIZE = {bytes((0xFF, kind)) for kind in (0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0))}
CORNERS = (0, 0), (17, 5), (37, 39)  # top and left of three parts of a JPEG


def jpeg_frame(data):
    """(height, width, planes of colour, bits) that a JPEG claims to have, infinite where its header is out of order.
    Pillow's way to it would cost up to 8 % of the decoding, this one 0.3 %."""
    at = 2
    while data[at : at + 2] in BEFORE_SIZE:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if data[at : at + 2] not in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"):  # baseline, extended, progressive
        return math.inf, math.inf, 0, 0
    return tuple(int.from_bytes(data[at + i : at + j], "big") for i, j in ((5, 7), (7, 9), (9, 10), (4, 5)))


def jpeg_pixels(data):
    """The number of pixels that a JPEG claims to have, infinite where its header is out of order."""
    height, width, *_ = jpeg_frame(data)
    return height * width


def decode(data):
    """Encoded bytes of any common format -> uint8 (3, H, W). Raises an exception of any kind for what is no image, or
    claims more than MAX_PIXELS.

    torchvision's decoder for JPEG; Pillow for all else and for what that decoder refuses (truncated or odd files).
    """
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2.functional import pil_to_tensor

    if data[:2] == b"\xff\xd8" and jpeg_pixels(data) <= MAX_PIXELS:  # torchvision itself has no limit
        try:
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            data += b"\xff\xd9"  # an end; of a progressive file without one, Pillow makes black
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # broken EXIF and the like; the pixels decide
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:  # whose message holds an address in memory
            raise ValueError("no image of a known format") from None
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip to 255
            image = image.convert("I").point(lambda value: value / 256).convert("L")
        if image.mode in ("PA", "LA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return pil_to_tensor(image.convert("RGB"))


@cache
def turbojpeg():
    """The library that decodes parts of a JPEG; None where it is not there, or gives other pixels than decode(): what a
    run sees does not depend on it."""
    file, shape = io.BytesIO(), (3, 61, 67)
    noise = torch.randint(256, (*shape[1:], 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(file, "JPEG", subsampling="4:2:0")
    whole = decode(file.getvalue())
    for name in libraries():
        try:
            library = TurboJPEG(name)
            parts = [(*corner, library.part(file.getvalue(), shape, *corner, 24, 28)) for corner in CORNERS]
        except Exception:  # not there, too old, without something of the system's
            continue
        if all(torch.equal(part, whole[:, top : top + 24, left : left + 28]) for top, left, part in parts):
            return library
    return None


class Jpeg:
    """A JPEG of `shape` (3, H, W) that is not decoded before it is known which part is wanted."""

    def __init__(self, data, height, width):
        self.data, self.shape = data, (3, height, width)

    @classmethod
    def of(cls, data):
        """Of encoded bytes; None for other formats, for what is cut short or odd, and where there is no library."""
        if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9" or turbojpeg() is None:  # how a JPEG begins and ends
            return None
        height, width, planes, bits = jpeg_frame(data)
        usual = 0 < height * width <= MAX_PIXELS and planes in (1, 3) and bits == 8
        return cls(data, height, width) if usual else None

    def part(self, top, left, height, width):
        """uint8 (3, height, width). Raises an exception of any kind."""
        return turbojpeg().part(self.data, self.shape, top, left, height, width)


class RandomCrop:
    """Random resized crop, bicubic. uint8 (3, H, W), or a Jpeg, -> uint8 (3, S, S).

    torchvision's, which draws area and aspect ratio up to ten times, until they fit into the image. With `once`, as in
    MAE's linear probe, they are drawn once and the sides cut to the image's: crops are larger, of long images most.
    """

    def __init__(self, size, scale, once=False):
        from torchvision.transforms import v2

        bicubic = v2.InterpolationMode.BICUBIC
        self.crop, self.once = v2.RandomResizedCrop(size, scale, interpolation=bicubic, antialias=True), once

    def box(self, image):
        """top, left, height, width."""
        if not self.once:
            of_size = image if isinstance(image, torch.Tensor) else torch.empty(image.shape, device="meta")  # no pixels
            return self.crop.make_params([of_size])
        rows, columns = image.shape[-2:]
        area = rows * columns * torch.empty(()).uniform_(*self.crop.scale).item()
        ratio = math.exp(torch.empty(()).uniform_(*map(math.log, self.crop.ratio)).item())
        height = min(max(round(math.sqrt(area / ratio)), 1), rows)
        width = min(max(round(math.sqrt(area * ratio)), 1), columns)
        top, left = torch.randint(rows - height + 1, ()).item(), torch.randint(columns - width + 1, ()).item()
        return {"top": top, "left": left, "height": height, "width": width}

    def __call__(self, image):
        box = self.box(image)
        if isinstance(image, Jpeg):
            image, box = image.part(**box), {**box, "top": 0, "left": 0}
        return self.crop.transform(image, box)


def coverage(boxes, height, width):
    """How many of the boxes (n, 4), integers top, left, height, width within the image, each pixel lies in: (H, W)."""
    top, left, rows, columns = boxes.long().unbind(dim=1)
    steps = torch.zeros(height + 1, width + 1, dtype=torch.int64)  # whose sums along both axes are the counts
    bottom, right = top + rows, left + columns
    for y, x, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        steps.index_put_((y, x), torch.full_like(y, sign), accumulate=True)
    return steps.cumsum(dim=0).cumsum(dim=1)[:height, :width]


def crop_and_flip(size, scale, flip, once=False):
    """What every view to learn from begins with: random resized crop and horizontal flip."""
    from torchvision.transforms import v2

    return [RandomCrop(size, scale, once), v2.RandomHorizontalFlip(flip)]


def view_of_part(view, data, seed):
    """What view(decode(data), seed) gives, for a view that begins with crop_and_flip: no more than the crop is decoded.
    None where that cannot be, and nothing is said about why: the whole image will tell."""
    steps = getattr(getattr(view, "transform", None), "transforms", [None])
    image = Jpeg.of(data) if isinstance(steps[0], RandomCrop) else None
    try:
        return image and view(image, seed)
    except Exception:  # the decoder refuses the file, or the view asks for more than the crop
        return None


class ColorJitter:
    """Brightness, contrast and saturation by factors in [1 - strength, 1 + strength], in random order: torchvision's
    ColorJitter (without hue), but rounded once at the end, in 40 % of its time. uint8 (3, H, W) -> uint8 (3, H, W)."""

    def __init__(self, strength):
        self.strength = strength

    def __call__(self, image):
        order = torch.randperm(3).tolist()
        factors = torch.empty(3).uniform_(1 - self.strength, 1 + self.strength).tolist()
        x = image.contiguous().float()
        for kind in order:
            if kind == 0:
                x.mul_(factors[kind])
            else:  # away from the mean grey (contrast), or from the grey of each pixel (saturation)
                grey = (0.2989 * x[0]).add_(x[1], alpha=0.587).add_(x[2], alpha=0.114)
                x.mul_(factors[kind]).add_(grey.mean() if kind == 1 else grey, alpha=1 - factors[kind])
            x.clamp_(0, 255)
        return x.round_().to(torch.uint8)


def crop_ratio(size):
    """The usual one for evaluation: 1 up to 64 pixels, which have nothing to spare, and from 384 on, as released."""
    return 0.875 if 64 < size < 384 else 1.0


class CenterCrop:
    """The view for evaluation: the shorter side to size / ratio, bicubic, then the centre. Ratio 0.875 is the 256 for
    224 of ImageNet; 1 cuts off nothing but what is not square."""

    names = ("images",)

    def __init__(self, size, ratio):
        from torchvision.transforms import v2

        self.transform = v2.Compose([
            v2.Resize(int(size / ratio), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
        ])  # fmt: skip

    def __call__(self, image, seed):
        """uint8 (3, H, W) -> (uint8 (3, S, S),). The seed has no use."""
        from torchvision.transforms.v2.functional import center_crop

        longest = 8 * min(image.shape[-2:])  # of 65,500 x 1 pixels the middle alone: resized, the whole were 13 GB
        return (self.transform(center_crop(image, [min(side, longest) for side in image.shape[-2:]])),)


@lru_cache
def per_channel(values, device):
    """A tuple of three as (1, 3, 1, 1), made once: a copy to a GPU in each step would make the host wait."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1)


def normalize(pixels, mean, std):
    """Pixels in [0, 1] (B, 3, H, W) -> (x - mean) / std per channel."""
    return (pixels - per_channel(mean, pixels.device)) / per_channel(std, pixels.device)


def resize(pixels, size):
    """Antialiased bicubic, back into [0, 1]; nothing to do at the right size."""
    if pixels.shape[-2:] == size:
        return pixels
    return F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)


def to_device(tensor, device):
    """Copy to the device; to a GPU from pinned memory, so that the host does not wait. Of lists and dicts what is in
    them; numpy's arrays become tensors, what is no array stays as it is."""
    if isinstance(tensor, (list, dict)):
        keys = tensor if isinstance(tensor, dict) else range(len(tensor))
        moved = {key: to_device(tensor[key], device) for key in keys}
        return moved if isinstance(tensor, dict) else list(moved.values())
    if isinstance(tensor, np.ndarray):
        tensor = torch.from_numpy(tensor)
    if not isinstance(tensor, torch.Tensor):
        return tensor
    pin = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True)
