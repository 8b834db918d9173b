"""A part of a JPEG without the rest: TurboJPEG, the C library of libjpeg-turbo, from its version 3 on.

It is optional: the system's or conda's, where that is new enough, or the one that the environment variable TURBOJPEG
names.
"""

import ctypes
import os

import torch

DECOMPRESS, SUBSAMPLING, RGB = 1, 4, 0  # TJINIT_DECOMPRESS, TJPARAM_SUBSAMP, TJPF_RGB
# Pixels of a block from left to right, by TJSAMP: 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1. A part begins with a block.
BLOCK_WIDTH = {0: 8, 1: 16, 2: 16, 3: 8, 4: 8, 5: 32}
# Pixels around a part that are decoded with it: colour, of which there are fewer pixels, is interpolated.
MARGIN = 2


class Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "width", "height")]


def libraries():
    named = os.environ.get("TURBOJPEG")
    return [named] if named else ["libturbojpeg.so.0", "libturbojpeg.dylib"]


class TurboJPEG:
    """Raises OSError or AttributeError where the library is not there, or too old."""

    def __init__(self, name):
        self.library = library = ctypes.CDLL(name)
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        library.tj3Init.restype = pointer
        library.tj3Destroy.argtypes = [pointer]
        library.tj3Get.argtypes = [pointer, number]
        library.tj3DecompressHeader.argtypes = [pointer, ctypes.c_char_p, size]
        library.tj3SetCroppingRegion.argtypes = [pointer, Region]
        library.tj3Decompress8.argtypes = [pointer, ctypes.c_char_p, size, pointer, number, number]

    def part(self, data, shape, top, left, height, width):
        """uint8 (3, height, width) of a JPEG of this shape (3, H, W). Raises an exception of any kind, also for a file
        that is damaged."""
        decoder, check = self.library.tj3Init(DECOMPRESS), self.check  # a damaged file may leave one unusable
        try:
            y, x = max(top - MARGIN, 0), max(left - MARGIN, 0)
            check(self.library.tj3DecompressHeader(decoder, data, len(data)))
            x -= x % BLOCK_WIDTH[self.library.tj3Get(decoder, SUBSAMPLING)]
            rows, columns = min(top + height + MARGIN, shape[1]) - y, min(left + width + MARGIN, shape[2]) - x
            check(self.library.tj3SetCroppingRegion(decoder, Region(x, y, columns, rows)))
            pixels = torch.empty(rows, columns, 3, dtype=torch.uint8)
            check(self.library.tj3Decompress8(decoder, data, len(data), pixels.data_ptr(), 0, RGB))
        finally:
            self.library.tj3Destroy(decoder)
        return pixels.permute(2, 0, 1)[:, top - y : top - y + height, left - x : left - x + width]

    def check(self, result):
        if result:
            raise ValueError("no JPEG that can be decoded in parts")
