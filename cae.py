"""Context autoencoders for masked image modelling, in one file.

CAE     "Context Autoencoder for Self-Supervised Representation Learning", arXiv 2202.03026
CAE v2  "CAE v2: Context Autoencoder with CLIP Latent Alignment", arXiv 2211.09799, TMLR 2023

Read from top to bottom: masks, positions, attention, blocks, config and size table, encoder, regressor, the two
objectives, the model that joins them, and at the end the bridges to other people's checkpoints and libraries.

    python cae.py export --checkpoint runs/cae-v2-base --to beit --output runs/beit

is the last of these bridges as a command.

Letters in shape comments: B images, N patches, Nv visible, Nm masked (N = Nv + Nm), P pixels along a patch's side,
D encoder width, R regressor width, C target width. "Released code" is the authors' own implementation; every
deviation from it is named where it happens.
"""

import argparse
import copy
import dataclasses
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import sys
import tempfile
import textwrap
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger("cae")
LN_EPS = 1e-6

# ----------------------------------------------------------------------------------------------------------------
# Masks: which patches the encoder sees. Indices, sorted, are the currency of this file; there are no boolean masks.


def block_mask(batch, grid, num_masked, *, min_block=16, generator=None):
    """Block-wise masking (CAE section "Masking", after BEiT).

    Rectangles of random area and shape are laid on the grid until exactly `num_masked` patches are covered. The area
    is uniform between `min_block` and the number of patches still to be masked, the aspect ratio log-uniform between
    0.3 and 1 / 0.3. A rectangle counts if it is smaller than the grid in both directions and masks between one and
    that number of new patches. Where 100 in a row do not (in a grid of 2 x 2 or 1 x 10 none can), single patches drawn
    at random complete the mask.

    Args: batch, number of images; grid, (rows, columns); generator, a CPU torch.Generator (None: the global one).
    Returns: visible (batch, N - num_masked) and masked (batch, num_masked), int64 on the CPU, each row ascending.
    Raises: ValueError unless 0 < num_masked < rows * columns.
    """
    rows, columns = _check_mask(grid, num_masked)
    masks = [_draw_blocks(rows, columns, num_masked, min_block, generator) for _ in range(batch)]
    # A mask is one integer with bit r * columns + c for the patch in row r, column c: bytes, then bits, then indices.
    size = (rows * columns + 7) // 8
    bits = torch.tensor([byte for mask in masks for byte in mask.to_bytes(size, "little")], dtype=torch.uint8)
    bits = (bits.view(batch, size, 1) >> torch.arange(8, dtype=torch.uint8)).view(batch, 8 * size)[:, : rows * columns]
    bits = (bits & 1).bool()
    return (~bits).nonzero()[:, 1].view(batch, -1), bits.nonzero()[:, 1].view(batch, num_masked)


def random_mask(batch, grid, num_masked, *, generator=None):
    """Uniformly random masking; arguments, result and errors as `block_mask`'s."""
    rows, columns = _check_mask(grid, num_masked)
    order = torch.rand(batch, rows * columns, generator=generator).argsort(dim=1)
    return order[:, num_masked:].sort(dim=1).values, order[:, :num_masked].sort(dim=1).values


def _check_mask(grid, num_masked):
    rows, columns = grid
    if not 0 < num_masked < rows * columns:
        raise ValueError(
            f"num_masked is {num_masked}: of {rows} x {columns} patches, 1 to {rows * columns - 1} can be masked, "
            "so that at least one stays visible"
        )
    return rows, columns


def _draw_blocks(rows, columns, num_masked, min_block, generator, tries=100):
    """One block-wise mask as an integer of rows * columns bits."""
    draws, used = [], 0
    log_ratio = math.log(1 / 0.3)
    # column_of_ones[h]: one bit in each of h successive rows; times a row of w ones, it is an h x w block.
    column_of_ones = [0]
    for row in range(rows):
        column_of_ones.append(column_of_ones[-1] | 1 << row * columns)
    mask, remaining, failed = 0, num_masked, 0
    while remaining > 0 and failed < tries:
        if used + 4 > len(draws):
            draws, used = torch.rand(64, generator=generator).tolist(), 0
        u_area, u_ratio, u_top, u_left = draws[used : used + 4]
        used += 4
        area = min_block + u_area * (remaining - min_block)
        ratio = math.exp(log_ratio * (2 * u_ratio - 1))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        failed += 1
        if h < rows and w < columns:
            top, left = int(u_top * (rows - h + 1)), int(u_left * (columns - w + 1))
            block = ((1 << w) - 1) * column_of_ones[h] << (top * columns + left)
            new = (block & ~mask).bit_count()
            if 0 < new <= remaining:
                mask, remaining, failed = mask | block, remaining - new, 0
    if remaining > 0:
        free = [i for i in range(rows * columns) if not mask >> i & 1]
        for i in torch.randperm(len(free), generator=generator)[:remaining].tolist():
            mask |= 1 << free[i]
    return mask


# ----------------------------------------------------------------------------------------------------------------
# Patches and positions.


def patchify(images, patch_size, order="c p q"):
    """(B, 3, H, W) -> (B, N, 3 P^2), patches row by row; `order` of a patch's values: channel c, row p, column q."""
    rows, columns = patch_grid(images, patch_size)
    pattern = f"b c (r p) (k q) -> b (r k) ({order})"
    return rearrange(images, pattern, r=rows, k=columns, p=patch_size, q=patch_size)


def patch_grid(images, patch_size):
    """(rows, columns) of patches in images (B, 3, H, W). Raises ValueError where the patch does not divide them."""
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"the patch of {patch_size} pixels does not divide the image of {height} x {width}")
    return height // patch_size, width // patch_size


def sincos_positions(rows, columns, dim):
    """Fixed 2-D sine-cosine positions, (rows * columns, dim), float32.

    For the patch in row r and column c, with w_i = 10000^(-i / (dim / 4)): [sin(r w), cos(r w), sin(c w), cos(c w)].
    """
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    r = torch.arange(rows, dtype=torch.float64)[:, None, None].expand(-1, columns, -1) * omega
    c = torch.arange(columns, dtype=torch.float64)[None, :, None].expand(rows, -1, -1) * omega
    return torch.cat([r.sin(), r.cos(), c.sin(), c.cos()], dim=-1).flatten(0, 1).float()


class Positions(nn.Module):
    """sincos_positions of a grid: a table for the trained grid, computed anew for any other.

    The released segmentation and detection code interpolates its 14 x 14 table instead; the two differ by 0.26 on
    average at 32 x 32. A sine is known everywhere, so nothing needs to be interpolated.
    """

    def __init__(self, grid, dim):
        super().__init__()
        self.grid, self.dim = tuple(grid), dim
        self.register_buffer("table", sincos_positions(*grid, dim), persistent=False)

    def forward(self, grid):
        return self.table if grid == self.grid else sincos_positions(*grid, self.dim).to(self.table)


def take(tokens, index):
    """tokens (B, N, K), index (B, n) -> (B, n, K): the tokens at these indices."""
    return torch.take_along_dim(tokens, index[..., None], dim=1)


# ----------------------------------------------------------------------------------------------------------------
# Attention and blocks. q and v have a bias, k has none: a shift common to all keys cancels in the softmax.


class Attention(nn.Module):
    """Multi-head self-attention. q, k and v are one (3D x D) matrix."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)                                         # (B, n, 3D)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)                                      # (B, heads, n, D / heads)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))                           # (B, n, D)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a memory whose keys and values are not the same tokens."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, q, k, v):
        q, k, v = self.q(q), self.k(k), self.v(v)                                        # (B, n, R), (B, m, R) twice
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)                                      # (B, heads, n, R / heads)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))                           # (B, n, R)


class MLP(nn.Module):
    """Linear, exact GELU, Linear; ratio 4."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(x, rate):
    """Stochastic depth: zero the whole branch of an image with probability `rate`, scale the others up."""
    if rate == 0:
        return x
    keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - rate)
    return x * (keep / (1 - rate))


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale: x += g1 attn(LN(x)); x += g2 mlp(LN(x))."""

    def __init__(self, dim, heads, layer_scale, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=LN_EPS)
        self.attn = Attention(dim, heads)
        self.scale1 = nn.Parameter(layer_scale * torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim, eps=LN_EPS)
        self.mlp = MLP(dim)
        self.scale2 = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x, stochastic=True):
        rate = self.drop_path if self.training and stochastic else 0.0
        x = x + drop_path(self.scale1 * self.attn(self.norm1(x)), rate)                  # (B, n, D)
        x = x + drop_path(self.scale2 * self.mlp(self.norm2(x)), rate)                   # (B, n, D)
        return x


class RegressorBlock(nn.Module):
    """Cross-attention block of the latent contextual regressor (CAE section "Regressor").

    Q'  = Q + g1 attn(LNq(Q + pm), LNk(M + [pv; pm]), LNv(M)), with the memory M = [Zv; Q]
    Q'' = LN(Q');  Q <- Q'' + g2 mlp(Q'')

    The residual stream is replaced by its normalised value before the MLP, as in the released code, whose weights
    need it. Zv is never updated.
    """

    def __init__(self, dim, heads, layer_scale, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm_q = nn.LayerNorm(dim, eps=LN_EPS)
        self.norm_k = nn.LayerNorm(dim, eps=LN_EPS)
        self.norm_v = nn.LayerNorm(dim, eps=LN_EPS)
        self.attn = CrossAttention(dim, heads)
        self.scale1 = nn.Parameter(layer_scale * torch.ones(dim))
        self.norm2 = nn.LayerNorm(dim, eps=LN_EPS)
        self.mlp = MLP(dim)
        self.scale2 = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, q, z_visible, p_visible, p_masked):
        rate = self.drop_path if self.training else 0.0
        memory = torch.cat([z_visible, q], dim=1)                                        # (B, Nv + Nm, R)
        positions = torch.cat([p_visible, p_masked], dim=1)                              # (B, Nv + Nm, R)
        attended = self.attn(self.norm_q(q + p_masked), self.norm_k(memory + positions), self.norm_v(memory))
        q = self.norm2(q + drop_path(self.scale1 * attended, rate))                      # (B, Nm, R)
        return q + drop_path(self.scale2 * self.mlp(q), rate)                            # (B, Nm, R)


def depth_rates(rate, depth):
    """Stochastic depth of each block: from 0 for the first to `rate` for the last, linearly."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


# ----------------------------------------------------------------------------------------------------------------
# Configuration and sizes.


@dataclass
class CAEConfig:
    """Everything that decides the shape of a model and its loss. Raises ValueError for what cannot work."""

    method: Literal["cae-v2", "cae"] = "cae-v2"
    """The objective: CLIP latents (cae-v2), or codes or pixels behind a decoder (cae)."""
    image_size: int = 224
    """Side of the square training images, in pixels."""
    patch_size: int = 16
    """Side of a patch, in pixels (P)."""
    dim: int = 768
    """Encoder width (D)."""
    depth: int = 12
    """Encoder blocks."""
    heads: int = 12
    """Encoder attention heads."""
    regressor_dim: int = 768
    """Width of regressor and decoder (R)."""
    regressor_depth: int = 4
    """Regressor blocks."""
    regressor_heads: int = 12
    """Attention heads of regressor and decoder."""
    decoder_depth: int = 0
    """Decoder blocks; cae only. 0 leaves a LayerNorm and a linear layer."""
    target_dim: int = 512
    """Width of the target (C): of CLIP's latents (cae-v2); number of codes, or 3 P^2 for pixels (cae)."""
    layer_scale: float = 0.1
    """Initial LayerScale."""
    drop_path: float = 0.1
    """Stochastic depth of the last block of encoder, regressor and decoder."""
    supervise: Literal["visible", "masked", "both"] = "both"
    """Tokens in the loss of cae-v2."""
    align_weight: float = 2.0
    """Weight of the latent alignment, lambda of the paper; cae only."""
    reconstruct_weight: float = 1.0
    """Weight of the reconstruction; cae only."""

    def __post_init__(self):
        def require(condition, message):
            if not condition:
                raise ValueError(message)

        require(self.method in ("cae-v2", "cae"), f"method is {self.method!r}: it is cae-v2 or cae")
        require(
            self.supervise in ("visible", "masked", "both"),
            f"supervise is {self.supervise!r}: it is visible, masked or both",
        )
        positive = ["image_size", "patch_size", "dim", "depth", "heads", "target_dim"]
        for name in positive + ["regressor_dim", "regressor_depth", "regressor_heads"]:
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be positive")
        require(self.decoder_depth >= 0, f"decoder_depth is {self.decoder_depth}: it must not be negative")
        require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}",
        )
        for width, heads in (("dim", "heads"), ("regressor_dim", "regressor_heads")):
            w, h = getattr(self, width), getattr(self, heads)
            require(w % h == 0, f"{width} {w} is not divisible by {heads} {h}")
            require(w % 4 == 0, f"{width} {w} is not divisible by 4, which the sine-cosine positions need")
        require(0 <= self.drop_path < 1, f"drop_path is {self.drop_path}: it must be in [0, 1)")
        require(
            self.align_weight >= 0 and self.reconstruct_weight >= 0,
            f"align_weight {self.align_weight} and reconstruct_weight {self.reconstruct_weight} must not be negative",
        )
        require(
            self.method == "cae-v2" or self.align_weight + self.reconstruct_weight > 0,
            "align_weight and reconstruct_weight are both 0: no loss is left",
        )

    @property
    def grid(self):
        """(rows, columns) of patches at the training size."""
        return (self.image_size // self.patch_size,) * 2

    @property
    def num_patches(self):
        return self.grid[0] * self.grid[1]

    @classmethod
    def from_size(cls, size, method="cae-v2", **overrides):
        """The configuration of a row of SIZES for one method; `overrides` are fields. Raises ValueError."""
        if size not in SIZES:
            raise ValueError(f"size {size!r} does not exist: choose from {', '.join(SIZES)}")
        return cls(**{"method": method, **SIZES[size]["encoder"], **SIZES[size].get(method, {}), **overrides})


def _size(dim, depth, heads, v2, v1, layer_scale=0.1, clip_dim=512, **encoder):
    """A row of SIZES; v2 and v1 are (R, heads, depth) of the regressor, and v1's also of the decoder."""

    def regressor(r, h, d, decoder_depth, target_dim):
        return dict(
            regressor_dim=r, regressor_heads=h, regressor_depth=d, decoder_depth=decoder_depth, target_dim=target_dim
        )

    return {
        "encoder": dict(dim=dim, depth=depth, heads=heads, layer_scale=layer_scale, **encoder),
        "cae-v2": regressor(*v2, 0, clip_dim),
        "cae": regressor(*v1, v1[2], 8192),
    }


# tiny really has 12 heads of 16, and a v2 regressor of 12 heads of 8. nano is ours, for the demo: 7 x 7 patches of 4.
SIZES = {
    "nano": _size(96, 4, 4, (96, 4, 1), (96, 4, 2), clip_dim=64, image_size=28, patch_size=4, drop_path=0.0),
    "tiny": _size(192, 12, 12, (96, 12, 1), (192, 12, 4)),
    "small": _size(384, 12, 12, (384, 12, 1), (384, 12, 4)),
    "base": _size(768, 12, 12, (768, 12, 4), (768, 12, 4)),
    "large": _size(1024, 24, 16, (1024, 16, 4), (1024, 16, 4), 1e-5),
    "huge": _size(1280, 32, 16, (1280, 16, 4), (1280, 16, 4), 1e-5),
}


# ----------------------------------------------------------------------------------------------------------------
# Encoder, regressor, and the two objectives.


class Encoder(nn.Module):
    """The ViT encoder F (CAE section "Encoder"). It embeds and sees only the patches that it is given."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_embed = nn.Linear(3 * config.patch_size**2, config.dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.positions = Positions(config.grid, config.dim)
        rates = depth_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.layer_scale, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)
        self.checkpoint_blocks = False  # True: each block is run again in the backward pass, instead of kept in memory

    def forward(self, images, index=None, stochastic=True):
        """images (B, 3, H, W), index (B, n) or None for all N patches -> (B, 1 + n, D), class token first."""
        positions = self.positions(patch_grid(images, self.patch_size))                  # (N, D)
        patches = patchify(images, self.patch_size)                                      # (B, N, 3 P^2)
        if index is not None:
            patches, positions = take(patches, index), positions[index]                  # (B, n, 3 P^2), (B, n, D)
        x = self.patch_embed(patches) + positions                                        # (B, n, D)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)           # (B, 1 + n, D)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, stochastic, use_reentrant=False)                # (B, 1 + n, D)
            else:
                x = block(x, stochastic)                                                 # (B, 1 + n, D)
        return self.norm(x)                                                              # (B, 1 + n, D)


class Regressor(nn.Module):
    """The latent contextual regressor H (CAE section "Regressor"; CAE v2 calls it the decoder).

    It predicts the latents of the masked patches from those of the visible ones and from positions. Its queries
    start as one learned mask token. CAE ends it with a LayerNorm, CAE v2 does not.
    """

    def __init__(self, config):
        super().__init__()
        width = config.regressor_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = Positions(config.grid, width)
        self.blocks = nn.ModuleList(
            RegressorBlock(width, config.regressor_heads, config.layer_scale, rate)
            for rate in depth_rates(config.drop_path, config.regressor_depth)
        )
        self.norm = nn.LayerNorm(width, eps=LN_EPS) if config.method == "cae" else nn.Identity()

    def forward(self, z_visible, visible, masked, grid):
        """z_visible (B, Nv, R) without the class token, visible (B, Nv), masked (B, Nm) -> (B, Nm, R)."""
        positions = self.positions(grid)                                                 # (N, R)
        p_visible, p_masked = positions[visible], positions[masked]                      # (B, Nv, R), (B, Nm, R)
        q = self.mask_token.expand(*masked.shape, -1)                                    # (B, Nm, R)
        for block in self.blocks:
            q = block(q, z_visible, p_visible, p_masked)
        return self.norm(q)                                                              # (B, Nm, R)


class CLIPObjective(nn.Module):
    """CAE v2: one shared head maps tokens to CLIP's space; the loss is 1 - cosine to CLIP's latent of the same token.

    `supervise` says which tokens count: both (released: one mean over the class token, visible and masked patches),
    visible (class token and visible patches; the regressor is not run), or masked.
    """

    needs_alignment = False

    def __init__(self, config):
        super().__init__()
        self.needs_visible = config.supervise != "masked"
        self.needs_regressor = config.supervise != "visible"
        self.norm = nn.LayerNorm(config.regressor_dim, eps=LN_EPS)
        self.head = nn.Linear(config.regressor_dim, config.target_dim)

    def predict(self, z):
        """Latents (B, n, R) -> predictions in CLIP's space (B, n, C), of length 1."""
        return F.normalize(self.head(self.norm(z)).float(), dim=-1)

    def forward(self, z_visible, z_masked, z_target, visible, masked, target, grid):
        parts, index = [], []
        if self.needs_visible:
            parts += [z_visible]                                                         # (B, 1 + Nv, R)
            index += [torch.zeros_like(visible[:, :1]), 1 + visible]                     # the target's class token is 0
        if self.needs_regressor:
            parts += [z_masked]                                                          # (B, Nm, R)
            index += [1 + masked]
        prediction = self.predict(torch.cat(parts, dim=1))                               # (B, n, C)
        target = F.normalize(take(target, torch.cat(index, dim=1)).float(), dim=-1)      # (B, n, C)
        distance = 1 - (prediction * target).sum(dim=-1)                                 # (B, n)
        losses = {"loss": distance.mean()}
        if self.needs_visible:
            losses["loss_cls"] = distance[:, 0].mean()
            losses["loss_visible"] = distance[:, 1 : 1 + visible.shape[1]].mean()
        if self.needs_regressor:
            losses["loss_masked"] = distance[:, -masked.shape[1] :].mean()
        return losses


class ReconstructionObjective(nn.Module):
    """CAE, equation 1: reconstruct_weight * reconstruction + lambda * alignment of the regressed latents.

    The decoder G sees the latents of the masked patches only. int64 targets are codes (cross-entropy), floats are
    pixels (mean squared error). Alignment: MSE to the encoder's own latents of the masked patches, without gradient.
    """

    needs_visible = False
    needs_regressor = True

    def __init__(self, config):
        super().__init__()
        self.align_weight, self.reconstruct_weight = config.align_weight, config.reconstruct_weight
        self.needs_alignment = config.align_weight > 0
        width = config.regressor_dim
        self.positions = Positions(config.grid, width)
        self.blocks = nn.ModuleList(
            Block(width, config.regressor_heads, config.layer_scale, rate)
            for rate in depth_rates(config.drop_path, config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.head = nn.Linear(width, config.target_dim)

    def decode(self, z, index, grid):
        """Latents (B, n, R) of the patches at index (B, n) -> logits or pixels (B, n, C)."""
        x = z + self.positions(grid)[index]                                              # (B, n, R)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))                                                   # (B, n, C)

    def forward(self, z_visible, z_masked, z_target, visible, masked, target, grid):
        losses = {}
        if self.reconstruct_weight > 0:
            prediction = self.decode(z_masked, masked, grid).float()                     # (B, Nm, C)
            if target.dtype == torch.int64:
                codes = target.gather(1, masked)                                         # (B, Nm)
                loss = F.cross_entropy(prediction.flatten(0, 1), codes.flatten())
            else:
                loss = F.mse_loss(prediction, take(target, masked).float())
            losses["loss_reconstruct"] = self.reconstruct_weight * loss
        if self.align_weight > 0:
            losses["loss_align"] = self.align_weight * F.mse_loss(z_masked.float(), z_target.float())
        return {"loss": sum(losses.values()), **losses}


# ----------------------------------------------------------------------------------------------------------------
# The model.


class CAE(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="cae",
    license="apache-2.0",
    tags=["masked-image-modeling", "self-supervised-learning", "vision-transformer"],
    pipeline_tag="image-feature-extraction",
):
    """Context autoencoder: encoder -> regressor -> objective. `config` is a CAEConfig.

    from_pretrained, save_pretrained and push_to_hub are huggingface_hub's: config.json beside model.safetensors.
    """

    def __init__(self, config: CAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        # CAE v2 narrows the encoder's output for a narrower regressor; the same tokens also reach the head.
        self.to_regressor = nn.Sequential()
        if config.regressor_dim != config.dim:
            self.to_regressor.append(nn.Linear(config.dim, config.regressor_dim))
            self.to_regressor.append(nn.LayerNorm(config.regressor_dim, eps=LN_EPS))
        self.regressor = Regressor(config)
        self.objective = CLIPObjective(config) if config.method == "cae-v2" else ReconstructionObjective(config)
        init_weights(self)
        # What no loss reaches takes no gradient, so that neither DDP nor the optimizer waits for it.
        if not self.objective.needs_regressor:
            self.regressor.requires_grad_(False)
        if config.method == "cae" and config.reconstruct_weight == 0:
            self.objective.requires_grad_(False)

    def forward(self, images, visible, masked, target):
        """The losses of one batch, as scalar tensors: "loss" and its parts.

        images (B, 3, H, W), normalised; visible (B, Nv) and masked (B, Nm), int64; target: cae-v2 float (B, 1 + N, C),
        class token first; cae int64 codes (B, N) or float pixels (B, N, 3 P^2).
        cae-v2: loss_cls, loss_visible, loss_masked, each the mean over its own tokens. cae: loss_reconstruct and
        loss_align, as weighted in the sum. A part that `supervise` or a zero weight excludes is not computed.
        """
        objective, grid = self.objective, patch_grid(images, self.config.patch_size)
        z_visible = self.latents(images, visible)                                        # (B, 1 + Nv, R)
        z_masked = z_target = None
        if objective.needs_regressor:
            z_masked = self.regressor(z_visible[:, 1:], visible, masked, grid)           # (B, Nm, R)
        if objective.needs_alignment:
            z_target = self.alignment_target(images, masked)                             # (B, Nm, R)
        return objective(z_visible, z_masked, z_target, visible, masked, target, grid)

    def latents(self, images, index, stochastic=True):
        """The encoder's latents of the patches at index (B, n), as wide as the regressor: (B, 1 + n, R)."""
        return self.to_regressor(self.encoder(images, index, stochastic))

    @torch.no_grad()
    def alignment_target(self, images, masked):
        """Latents of the masked patches from the encoder itself (CAE section "Targets"): (B, Nm, R).

        The released code keeps an aliased copy of the encoder in train mode, so that stochastic depth perturbs its
        targets. Here it is the same encoder, run as in evaluation.
        """
        return self.latents(images, masked, stochastic=False)[:, 1:]

    def encode(self, images):
        """images (B, 3, H, W) of any size that the patch divides -> (B, 1 + N, D), class token first, final LN."""
        return self.encoder(images)

    @classmethod
    def _from_pretrained(cls, *, strict=True, **kwargs):  # the hub's default, strict=False, would hide missing weights
        return super()._from_pretrained(strict=strict, **kwargs)


def init_weights(model):
    """Initialise a CAE as the released code does.

    Linear       weights Xavier-uniform, biases 0. q, k and v of a self-attention count as one (3D x D) matrix, those
                 of the regressor's cross-attention as three.
    LayerNorm    weights 1, biases 0 (PyTorch's own)
    patch embedding, class token, mask token   normal, std 0.02, truncated at +-0.02
    LayerScale   `layer_scale`: 0.1 up to base, 1e-5 for large and huge (set where the parameter is made)
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for weight in (model.encoder.patch_embed.weight, model.encoder.class_token, model.regressor.mask_token):
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)


# ----------------------------------------------------------------------------------------------------------------
# Import: checkpoints of the released code.

# Our name -> the released one, applied in this order.
_RENAME = [
    (r"^encoder\.patch_embed\.", "encoder.patch_embed.proj."),
    (r"^encoder\.class_token$", "encoder.cls_token"),
    (r"^to_regressor\.0\.", "encoder_to_regresser."),
    (r"^to_regressor\.1\.", "encoder_to_regresser_norm."),
    (r"^regressor\.mask_token$", "mask_token"),
    (r"^regressor\.(.*)\.norm_([qkv])\.", r"regressor.\1.norm1_\2."),
    (r"^regressor\.(.*)\.norm2\.", r"regressor.\1.norm2_cross."),
    (r"^regressor\.(.*)\.attn\.([qv])\.bias$", r"regressor.\1.cross_attn.\2_bias"),
    (r"^regressor\.(.*)\.attn\.", r"regressor.\1.cross_attn."),
    (r"^regressor\.(.*)\.mlp\.", r"regressor.\1.mlp_cross."),
    (r"^regressor\.(.*)\.scale([12])$", r"regressor.\1.gamma_\2_cross"),
    (r"^regressor\.blocks\.", "regressor.regressor_blocks."),
    (r"^regressor\.", "regresser."),
    (r"^objective\.blocks\.", "decoder.decoder_blocks."),
    (r"^objective\.", "decoder."),
    (r"\.scale([12])$", r".gamma_\1"),
]


def released_name(name):
    """The name of a parameter here -> its name in the released code."""
    for pattern, replacement in _RENAME:
        name = re.sub(pattern, replacement, name)
    return name


def load_official(path_or_state_dict, **overrides):
    """A CAE from a checkpoint of the released code, v1 or v2.

    Args: path_or_state_dict, a .pth or .safetensors file, `owner/name::path/in/repo` on the Hub, or the dict itself,
    bare or as {"model": ...}; overrides, CAEConfig fields that the tensors cannot tell (heads, regressor_heads,
    align_weight, ...). Method, widths and depths are read from the tensors; heads default by SIZES.
    A file with nothing but the encoder, or without class token and final LayerNorm, gives a model whose other parts
    are freshly initialised. What was assumed or freshly initialised is logged as a warning.
    Pickles are read with weights_only=True: nothing in them is executed.
    Raises: ValueError naming the missing, surplus or ill-shaped tensors of a damaged or unrelated file;
    FileNotFoundError.
    """
    source = path_or_state_dict if isinstance(path_or_state_dict, (str, Path)) else "the state dict"
    released = {name.removeprefix("module."): tensor for name, tensor in _read_official(path_or_state_dict).items()}
    config, assumed = _config_of(released, source, overrides)
    model = CAE(config)
    state = model.state_dict()
    names = {released_name(name): name for name in state}
    # A part may be absent as a whole, never in pieces.
    fresh = {
        "class token and final LayerNorm": ("encoder.cls_token", "encoder.norm."),
        "regressor and objective": ("encoder_to_regresser", "mask_token", "regresser.", "decoder."),
    }
    fresh = {part: start for part, start in fresh.items() if not any(name.startswith(start) for name in released)}
    expected = [name for name in names if not name.startswith(tuple(itertools.chain(*fresh.values())))]
    # In released files, but nothing to load: the encoder's aliased copy, the fixed positions, and in v2 a LayerNorm
    # that is never applied.
    idle = r"alignment_encoder\..*|encoder\.pos_embed|rd_pos_embed"
    idle += r"|regresser\.norm\..*" if config.method == "cae-v2" else ""
    shapes = {name: state[names[name]].shape for name in expected}
    shapes["encoder.patch_embed.proj.weight"] = (config.dim, 3, config.patch_size, config.patch_size)
    problems = {
        "missing": [name for name in expected if name not in released],
        "surplus": [name for name in released if name not in names and not re.fullmatch(idle, name)],
        "of another shape": [
            f"{name} {tuple(released[name].shape)} instead of {tuple(shape)}"
            for name, shape in shapes.items()
            if name in released and released[name].shape != shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {', '.join(sorted(found))}" for kind, found in problems.items() if found)
        raise ValueError(f"{source} is not a whole checkpoint of {config.method}: {listed}")
    loaded = {names[name]: released[name].reshape(state[names[name]].shape) for name in expected}
    model.load_state_dict({**state, **loaded})
    if assumed:
        logger.warning("%s: assumed %s; pass them as keywords if they are others", source, ", ".join(assumed))
    if fresh:
        logger.warning("%s has no %s: freshly initialised", source, " and no ".join(fresh))
    return model.eval()


BAD_PICKLE = "it is damaged, or holds more than tensors and plain data; nothing in it was executed"


def _read_official(source):
    """Path, Hub path or dict -> {released name: tensor}. Raises ValueError or FileNotFoundError."""
    state, path = source, str(source)
    if isinstance(source, (str, Path)):
        if "::" in path:
            try:
                path = hf_hub_download(*path.split("::", 1))
            except (HfHubHTTPError, OSError, ValueError) as error:
                raise FileNotFoundError(f"{source} cannot be had from the Hub: {error}") from error
        if not Path(path).is_file():
            raise FileNotFoundError(f"checkpoint {path} does not exist")
        try:
            if path.endswith(".safetensors"):
                state = load_file(path)
            else:  # released training checkpoints also pickle their argparse.Namespace, which is plain data
                with torch.serialization.safe_globals([argparse.Namespace]):
                    state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can fail in any way, down to struct.error and IndexError
            raise ValueError(f"{path} cannot be read as a checkpoint: {BAD_PICKLE}") from error
    state = state.get("model", state) if isinstance(state, dict) else state
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path if state is not source else 'the argument'} holds no state dict of tensors")
    return state


def _config_of(released, source, overrides):
    """CAEConfig read from the shapes of the released tensors, and the list of what had to be assumed."""
    ranks = {"encoder.patch_embed.proj.weight": 4, "encoder.pos_embed": 3, "mask_token": 3, "decoder.head.weight": 2}
    for name, rank in ranks.items():
        if name in released and released[name].ndim != rank:
            raise ValueError(f"{source}: {name} is {tuple(released[name].shape)}, it must have {rank} dimensions")
    if "encoder.patch_embed.proj.weight" not in released:
        raise ValueError(
            f"{source} is not a checkpoint of CAE or CAE v2: encoder.patch_embed.proj.weight is missing; "
            f"it holds {', '.join(list(released)[:5]) or 'nothing'}{', ...' if len(released) > 5 else ''}"
        )

    def depth(prefix):
        numbers = [name[len(prefix) :].split(".")[0] for name in released if name.startswith(prefix)]
        return max((int(n) for n in numbers if n.isdigit()), default=-1) + 1

    dim, _, patch_size, _ = released["encoder.patch_embed.proj.weight"].shape
    head, decoder_depth = released.get("decoder.head.weight"), depth("decoder.decoder_blocks.")
    # Without decoder blocks (the ablation of the paper), v1 is told by its alignment encoder or its 8192 codes.
    aliased = any(name.startswith("alignment_encoder.") for name in released)
    is_v1 = decoder_depth > 0 or aliased or (head is not None and len(head) == 8192)
    read = {"method": "cae" if is_v1 else "cae-v2"}
    # The table's row of this width gives what shapes cannot.
    size = next((name for name in SIZES if SIZES[name]["encoder"]["dim"] == dim), None)
    table = dataclasses.asdict(CAEConfig.from_size(size, overrides.get("method", read["method"]))) if size else {}
    read |= {"dim": dim, "patch_size": patch_size, "depth": depth("encoder.blocks.")}
    guessed = {"heads": table.get("heads", max(dim // 64, 1))}
    if table and table["depth"] != read["depth"]:  # LW-DETR's encoders are cut short, a damaged file may be too
        logger.warning("%s has %d encoder blocks, %s has %d", source, read["depth"], size, table["depth"])
    if "encoder.pos_embed" in released:
        read["image_size"] = math.isqrt(max(released["encoder.pos_embed"].shape[1] - 1, 0)) * patch_size
    else:
        guessed["image_size"] = 14 * patch_size
    if "mask_token" in released:
        width = released["mask_token"].shape[-1]
        read |= {"regressor_dim": width, "decoder_depth": decoder_depth}
        read["regressor_depth"] = depth("regresser.regressor_blocks.")
        same = table.get("regressor_dim") == width
        guessed["regressor_heads"] = table["regressor_heads"] if same else max(width // 64, 1)
        if head is not None:
            read["target_dim"] = len(head)
    else:  # nothing of the pretraining side is in the file: the table's, or as wide as the encoder
        guessed |= {"method": read.pop("method")}
        read |= {"regressor_dim": dim, "regressor_heads": overrides.get("heads", guessed["heads"])}
        names = ("regressor_dim", "regressor_depth", "regressor_heads", "decoder_depth", "target_dim")
        read |= {name: table[name] for name in names if name in table}
    if "layer_scale" in table:
        read["layer_scale"] = table["layer_scale"]
    assumed = [f"{name}={value}" for name, value in guessed.items() if name not in overrides]
    return CAEConfig(**{**read, **guessed, **overrides}), assumed


def load_model(checkpoint):
    """A CAE in eval mode from whatever holds one.

    Args: checkpoint, a run folder, its model/ folder, an id on the Hub, or for `load_official` a file of the released
    code, also as `owner/name::path/in/repo`.
    Raises: FileNotFoundError for what does not exist, ValueError for what is damaged or no CAE.
    """
    name, path = str(checkpoint), Path(checkpoint).expanduser()
    if "::" in name or path.is_file():
        return load_official(name if "::" in name else path)
    accepted = "a run folder, a model/ folder, an id on the Hub or a released .pth"
    if path.is_dir():
        path = path / "model" if (path / "model").is_dir() else path
        config = path / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{path} holds no config.json: it is no model; give {accepted}")
    else:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise FileNotFoundError(f"{name} does not exist: give {accepted}")
        try:
            path, config = name, hf_hub_download(name, "config.json")
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = textwrap.shorten(str(error), 200)
            raise FileNotFoundError(f"{name} is no file or folder, nor to be had from the Hub: {reason}") from error
    try:
        fields = json.loads(Path(config).read_text())
    except ValueError as error:
        raise ValueError(f"{name} is damaged: its config.json is not JSON") from error
    fields = fields if isinstance(fields, dict) else {}
    if "args" in fields:
        raise ValueError(f"{name} is a run folder without a model/ yet: it appears with the run's first checkpoint")
    if "method" not in fields:
        raise ValueError(f"{name} is no CAE: its config.json names no method; give {accepted}")
    try:
        with redirect_stdout(io.StringIO()):  # huggingface_hub prints
            return CAE.from_pretrained(path)  # in eval mode
    except (pickle.UnpicklingError, EOFError) as error:  # of the Hub, where no model.safetensors is
        raise ValueError(f"{name} cannot be loaded: {BAD_PICKLE}") from error
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, HfHubHTTPError) as error:
        reason = textwrap.shorten(str(error), 400)
        raise ValueError(f"{name} cannot be loaded: it is damaged or incomplete ({reason})") from error


# ----------------------------------------------------------------------------------------------------------------
# Export: the encoder in other libraries. BEiT, timm and LW-DETR keep positions as a table, hence for one square size.

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def to_beit(model, image_size=None):
    """The encoder as a transformers.BeitModel, in eval mode, with identical outputs at this image size.

    The encoder is exactly a BEiT with absolute positions, no relative bias, LayerScale, no mean pooling and a
    LayerNorm eps of 1e-6. Square sizes only: BEiT's configuration knows no other.
    Args: image_size, in pixels (None: the model's own). Raises: ValueError for a size that the patch does not divide.
    """
    from transformers import BeitConfig, BeitModel

    config, encoder = model.config, model.encoder
    size = square_size(model, image_size)
    beit = BeitModel(
        BeitConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.dim,
            hidden_act="gelu",
            layer_norm_eps=LN_EPS,
            image_size=size,
            patch_size=config.patch_size,
            use_absolute_position_embeddings=True,
            use_relative_position_bias=False,
            use_shared_relative_position_bias=False,
            use_mask_token=False,
            use_mean_pooling=False,
            layer_scale_init_value=config.layer_scale or 1.0,  # with 0, BEiT has none
            drop_path_rate=config.drop_path,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )
    state = {
        "embeddings.cls_token": encoder.class_token,
        "embeddings.position_embeddings": position_table(encoder, size),
        "embeddings.patch_embeddings.projection.weight": patch_kernel(encoder),
        "embeddings.patch_embeddings.projection.bias": encoder.patch_embed.bias,
        "layernorm.weight": encoder.norm.weight,
        "layernorm.bias": encoder.norm.bias,
    }
    for i, block in enumerate(encoder.blocks):
        state.update({f"layers.{i}.{name}": tensor for name, tensor in block_state(block, "lambda", "mlp").items()})
    beit.load_state_dict(state)
    return beit.eval()


def to_timm(model, image_size=None):
    """The encoder as a state dict for timm's `Beit`, built with `timm_arguments` of the same size.

    Its `forward_features` is then `encode`; qkv and its two biases lie there as they do here. Arguments and errors as
    `to_beit`'s.
    """
    # timm's BEiT and the released code go back to the same one, and have its names in common.
    state = {released_name(f"encoder.{name}"): tensor for name, tensor in model.encoder.state_dict().items()}
    state = {name.removeprefix("encoder."): tensor.clone() for name, tensor in state.items()}
    state["patch_embed.proj.weight"] = patch_kernel(model.encoder).detach().clone()
    state["pos_embed"] = position_table(model.encoder, square_size(model, image_size))
    return state


def timm_arguments(model, image_size=None):
    """Keywords of `timm.models.beit.Beit` that `to_timm` needs; all others are timm's defaults."""
    config = model.config
    return {
        "img_size": square_size(model, image_size),
        "patch_size": config.patch_size,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.heads,
        "qkv_bias": True,
        "mlp_ratio": 4.0,
        "init_values": config.layer_scale or 1.0,  # with 0, timm has no LayerScale
        "use_abs_pos_emb": True,
        "use_rel_pos_bias": False,
        "num_classes": 0,
        "global_pool": "token",  # with "avg" the final LayerNorm would move behind the pooling
    }


def to_onnx(model, path):
    """Write the encoder as an ONNX graph: "images" (B, 3, H, W), float32 -> "tokens" (B, 1 + N, D), as `encode`.

    B, H and W are free, but for H and W being multiples of the patch: positions are computed in the graph. It is one
    file up to 2 GB; larger weights lie beside it. Raises: ImportError without the packages onnx and onnxscript.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed, and ONNX needs it: pip install onnx onnxscript") from error

    encoder = copy.deepcopy(model.encoder).cpu().eval()
    encoder.positions.grid = None  # no grid has a table, or tracing would exclude the one that has
    patch = model.config.patch_size
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    program = torch.onnx.export(
        encoder,
        (torch.zeros(2, 3, 3 * patch, 5 * patch),),  # any numbers but 1, which would be taken as fixed
        dynamic_shapes=({0: torch.export.Dim("batch"), 2: patch * rows, 3: patch * columns},),
        input_names=["images"],
        output_names=["tokens"],
        dynamo=True,
        verbose=False,
    )
    program.save(path)


def to_lw_detr(model, image_size=None):
    """The encoder as the backbone of LW-DETR, a transformers.LwDetrViTBackbone in eval mode.

    LW-DETR has no class token and no final LayerNorm; its feature map (B, D, H / P, W / P) is the last block's output
    with the patches alone as input. Attention is global: one window. (Windows are for who loads it, with the keywords
    num_windows=16, num_windows_side=4, window_block_indices=[...].) At other sizes than this one it interpolates its
    table of positions, where `encode` computes them anew. Arguments and errors as `to_beit`'s.
    """
    from transformers import LwDetrViTBackbone, LwDetrViTConfig

    config, encoder = model.config, model.encoder
    size = square_size(model, image_size)
    backbone = LwDetrViTBackbone(
        LwDetrViTConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            mlp_ratio=4,
            hidden_act="gelu",
            layer_norm_eps=LN_EPS,
            image_size=size,
            pretrain_image_size=size,  # the table's
            patch_size=config.patch_size,
            qkv_bias=True,  # of q and v: its keys never have one
            use_absolute_position_embeddings=True,
            cae_init_values=config.layer_scale,
            dropout_prob=0.0,
            num_windows=1,
        )
    )
    state = {
        "embeddings.position_embeddings": position_table(encoder, size),
        "embeddings.projection.weight": patch_kernel(encoder),
        "embeddings.projection.bias": encoder.patch_embed.bias,
    }
    for i, block in enumerate(encoder.blocks):
        layer = block_state(block, "gamma", "intermediate")
        state.update({f"encoder.layer.{i}.{name}": tensor for name, tensor in layer.items()})
    backbone.load_state_dict(state)
    return backbone.eval()


def square_size(model, image_size=None):
    """Side of a square image in pixels (None: the model's own). Raises ValueError unless the patch divides it."""
    patch, size = model.config.patch_size, model.config.image_size if image_size is None else image_size
    if not isinstance(size, int) or size <= 0 or size % patch:
        raise ValueError(f"image_size is {size}: it must be one number, a side that the patch of {patch} divides")
    return size


def position_table(encoder, size):
    """Positions of a square image of `size` pixels, (1, 1 + N, D), zero for the class token."""
    return F.pad(encoder.positions((size // encoder.patch_size,) * 2), (0, 0, 1, 0))[None]


def patch_kernel(encoder):
    """The patch embedding as the kernel of a convolution, (D, 3, P, P)."""
    return rearrange(encoder.patch_embed.weight, "d (c p q) -> d c p q", c=3, p=encoder.patch_size).contiguous()


def block_state(block, scale, mlp):
    """A block's state dict by transformers' names; `scale` and `mlp`: what the model there calls LayerScale and MLP."""
    q, k, v = block.attn.qkv.weight.chunk(3)
    state = {
        "attention.q_proj.weight": q,
        "attention.q_proj.bias": block.attn.q_bias,
        "attention.k_proj.weight": k,
        "attention.v_proj.weight": v,
        "attention.v_proj.bias": block.attn.v_bias,
        f"{scale}_1": block.scale1,
        f"{scale}_2": block.scale2,
    }
    for theirs, ours in {
        "attention.o_proj": block.attn.proj,
        "layernorm_before": block.norm1,
        "layernorm_after": block.norm2,
        f"{mlp}.fc1": block.mlp.fc1,
        f"{mlp}.fc2": block.mlp.fc2,
    }.items():
        state[f"{theirs}.weight"], state[f"{theirs}.bias"] = ours.weight, ours.bias
    return state


# ----------------------------------------------------------------------------------------------------------------
# python cae.py export. Each function that writes a folder reads it back and returns pairs of what it computes and what
# the CAE computes from the same random images: none where the library to read it is not installed.


@dataclass
class Export:
    """Write the encoder of a checkpoint in the form of another library, and measure how exact it is."""

    checkpoint: str
    """Run folder; model/ folder; Hub id; released .pth, also owner/name::path."""
    to: Literal["beit", "timm", "onnx", "lw-detr"]
    """transformers' BEiT; timm's Beit; an ONNX graph for any image size; the backbone of transformers' LW-DETR."""
    output: str
    """Folder to write: a new one, or an empty one."""
    image_size: int | None = None
    """Side of the square images that the positions are for, in pixels; an ONNX graph is only measured at it. Left out:
    the checkpoint's own."""


def write_beit(model, folder, size):
    from transformers import BeitImageProcessor

    beit = save_and_read_back(to_beit(model, size), folder)
    side = {"height": size, "width": size}
    BeitImageProcessor(
        size=side, crop_size=side, resample=3, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD  # 3: bicubic
    ).save_pretrained(folder)
    images = random_images(2, size, size)
    return [(beit(images).last_hidden_state, model.encode(images))]


def write_timm(model, folder, size):
    save_file(to_timm(model, size), folder / "model.safetensors")
    config = {
        "architecture": "beit_base_patch16_224",  # timm's name for the class: model_args has the last word
        "num_classes": 0,
        "model_args": timm_arguments(model, size),
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": (3, size, size),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return []


def write_onnx(model, folder, size):
    to_onnx(model, folder / "model.onnx")
    try:
        import onnxruntime
    except ImportError:
        return []
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    pairs = []
    for images in (random_images(2, size, size), random_images(1, size, size + model.config.patch_size)):
        (tokens,) = session.run(["tokens"], {"images": images.numpy()})
        pairs.append((torch.from_numpy(tokens), model.encode(images)))
    return pairs


def write_lw_detr(model, folder, size):
    backbone, encoder = save_and_read_back(to_lw_detr(model, size), folder), model.encoder
    images = random_images(2, size, size)
    x = encoder.patch_embed(patchify(images, encoder.patch_size)) + position_table(encoder, size)[:, 1:]
    for block in encoder.blocks:
        x = block(x)
    (features,) = backbone(images).feature_maps                                          # (B, D, rows, columns)
    return [(features.flatten(2).mT, x)]


def save_and_read_back(network, folder):
    """save_pretrained, then from_pretrained, without progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    network.save_pretrained(folder)
    return type(network).from_pretrained(folder).eval()


def random_images(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def export(args):
    """Write the folder that `args`, an Export, asks for, and print one line about it.

    The folder gets its name when it is complete and measured, or never.
    Raises: ValueError, OSError, ImportError, with one line, for what `args` ask for; RuntimeError if the folder, read
    back, computes something else than the checkpoint.
    """
    output = Path(args.output).expanduser().resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"--output {args.output} exists and is no empty folder: name another, or remove it")
    model = load_model(args.checkpoint)
    size = square_size(model, args.image_size)
    if not model.encode(random_images(1, size, size)).isfinite().all():
        raise ValueError(f"--checkpoint {args.checkpoint} is damaged: what it computes is not finite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent)
    except OSError as error:
        raise OSError(f"--output {args.output} cannot be written: {error.strerror}") from error
    with aside:
        folder = Path(aside.name) / output.name
        folder.mkdir()
        write = {"beit": write_beit, "timm": write_timm, "onnx": write_onnx, "lw-detr": write_lw_detr}[args.to]
        pairs = write(model, folder, size)
        difference = max(((theirs - ours).abs().max().item() for theirs, ours in pairs), default=0.0)
        scale = max((ours.abs().max().item() for _, ours in pairs), default=0.0)
        if not difference <= 1e-3 * max(scale, 1.0):  # rounding is a thousandth of this
            raise RuntimeError(f"read back, the {args.to} of {args.checkpoint} is {difference:.1e} off: not written")
        for path in (*folder.rglob("*"), folder):
            fsync(path)
        folder.rename(output)
        fsync(output.parent)
    wrote = {"beit": "a transformers BeitModel", "timm": "weights and arguments of timm's Beit",
             "onnx": "an ONNX graph, model.onnx", "lw-detr": "a transformers LwDetrViTBackbone"}[args.to]  # fmt: skip
    if args.to == "timm":
        found = f'load it with timm.create_model("local-dir:{args.output}", pretrained=True)'
    elif not pairs:
        found = "not read back, which needs pip install onnxruntime"
    else:
        found = (f"read back, it differs from the checkpoint by {difference:.1e} at most (random images of "
                 f"{size} x {size} pixels, outputs up to {scale:.1f})")  # fmt: skip
    print(f"wrote {args.output}, {wrote}: {found}")


def fsync(path):
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def main():
    """Exit code 0: written; 2, with one line: what was asked for cannot be done."""
    import tyro

    args = tyro.extras.subcommand_cli_from_dict({"export": Export}, description=__doc__.partition("\n\n")[0])
    try:
        export(args)
    except (ValueError, OSError, ImportError) as error:
        print("error:", *str(error).split(), file=sys.stderr)  # one line, also of a library's error
        sys.exit(2)


if __name__ == "__main__":
    main()
