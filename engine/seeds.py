"""Seeds: everything random is a pure function of a few integers. No generator state has to survive a restart."""

import hashlib

import torch


def seed_of(*parts):
    """A 63-bit integer that is a pure function of its integer parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def permutation(n, *parts):
    """A permutation of n that is a pure function of its integer parts: a tensor, of 4 bytes a number if they do."""
    kind = torch.int32 if n < 2**31 else torch.int64  # the same permutation
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(*parts)), dtype=kind)


class KeyedPermutation:
    """Another permutation of n that is a pure function of its integer parts, and takes no memory: permutation[i] is
    computed, by a Feistel network. That permutes all numbers of so many bits; from one that is not below n it goes on
    to the next of its cycle, at most four times in the mean."""

    rounds = 6

    def __init__(self, n, *parts):
        self.n, self.half = n, max(1, ((n - 1).bit_length() + 1) // 2)  # bits
        self.keys = [seed_of(*parts, number) for number in range(self.rounds)]

    def __getitem__(self, i):
        mask = 2**self.half - 1
        while True:
            left, right = i >> self.half, i & mask
            for key in self.keys:
                mixed = ((right + 1) * 0x9E3779B97F4A7C15 ^ key) * 0xD6E8FEB86659FD93 & 2**64 - 1
                left, right = right, left ^ mixed >> 32 & mask
            i = left << self.half | right
            if i < self.n:
                return i
