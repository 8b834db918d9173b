"""Seeds: everything random is a pure function of a few integers. No generator state has to survive a restart."""

import hashlib

import torch


def seed_of(*parts):
    """A 63-bit integer that is a pure function of its integer parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def permutation(n, *parts):
    """A permutation of n that is a pure function of its integer parts, as a list."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(*parts))).tolist()
