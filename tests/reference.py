"""What DESIGN.md and the papers state, typed here and not read from the scripts: tests compare the scripts with it."""

import hashlib

import torch


def channels(*values):
    """(1, 3, 1, 1)."""
    return torch.tensor(values).view(1, 3, 1, 1)


# mean and standard deviation
IMAGENET = channels(0.485, 0.456, 0.406), channels(0.229, 0.224, 0.225)
OPENAI = channels(0.48145466, 0.4578275, 0.40821073), channels(0.26862954, 0.26130258, 0.27577711)


def seed_of(*parts):
    """The seed that is a function of these integers."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1
