"""Context autoencoders for masked image modelling, in one file.

CAE     "Context Autoencoder for Self-Supervised Representation Learning", arXiv 2202.03026
CAE v2  "CAE v2: Context Autoencoder with CLIP Latent Alignment", arXiv 2211.09799, TMLR 2023

Read from top to bottom: masks, positions, attention, blocks, config and size table, encoder, regressor,
decoder and head, the two losses, the model that joins them, and how it is initialised.

Letters in shape comments: B images, N patches, Nv visible, Nm masked (N = Nv + Nm), P pixels along a patch's side,
D encoder width, R regressor width, C target width. "Released code" is the authors' own implementation; every
deviation from it is named where it happens.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch.utils.checkpoint import checkpoint

LN_EPS = 1e-6
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of what the student sees

# ----------------------------------------------------------------------------------------------------------------
# Masks: which patches the encoder sees, as sorted indices. Boolean arrays do not leave this section.


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
    masks = np.zeros((batch, rows, columns), dtype=bool)
    for mask in masks:
        _draw_blocks(mask, num_masked, min_block, generator)
    masks = torch.from_numpy(masks).flatten(1)
    return (~masks).nonzero()[:, 1].view(batch, -1), masks.nonzero()[:, 1].view(batch, num_masked)


def random_mask(batch, grid, num_masked, *, generator=None):
    """Uniformly random masking; arguments, result and errors as `block_mask`'s."""
    rows, columns = _check_mask(grid, num_masked)
    order = torch.rand(batch, rows * columns, generator=generator).argsort(dim=1)
    return order[:, num_masked:].sort(dim=1).values, order[:, :num_masked].sort(dim=1).values


def count_masked(ratio, num_patches):
    """ceil(ratio * N), so 0.15 of 196 is 30."""
    return math.ceil(ratio * num_patches - 1e-9)


def _check_mask(grid, num_masked):
    rows, columns = grid
    if not 0 < num_masked < rows * columns:
        raise ValueError(
            f"num_masked is {num_masked}: of {rows} x {columns} patches, 1 to {rows * columns - 1} can be masked, "
            "so that at least one stays visible"
        )
    return rows, columns


def _draw_blocks(mask, num_masked, min_block, generator, tries=100):
    """Set num_masked entries of mask, boolean (rows, columns) and all False, block by block."""
    rows, columns = mask.shape
    draws, used = [], 0
    log_ratio = math.log(1 / 0.3)
    remaining, failed = num_masked, 0
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
            block = mask[top : top + h, left : left + w]
            new = h * w - int(np.count_nonzero(block))  # a scalar of numpy would be slow
            if 0 < new <= remaining:
                block[:] = True
                remaining, failed = remaining - new, 0
    if remaining > 0:
        free = np.flatnonzero(~mask)
        mask.flat[free[torch.randperm(len(free), generator=generator)[:remaining].numpy()]] = True


# ----------------------------------------------------------------------------------------------------------------
# Patches and positions.


def patchify(images, patch_size, order="c p q"):
    """(B, 3, H, W) -> (B, N, 3 P^2), patches row by row; `order` of a patch's values: channel c, row p, column q."""
    rows, columns = patch_grid(images, patch_size)
    pattern = f"b c (r p) (k q) -> b (r k) ({order})"
    return rearrange(images, pattern, r=rows, k=columns, p=patch_size, q=patch_size)


def unpatchify(patches, patch_size, grid, order="p q c"):
    """(B, N, 3 P^2), as in MAE in the order (row, column, channel) -> (B, 3, H, W): what patchify undoes."""
    rows, columns = grid
    pattern = f"b (r k) ({order}) -> b c (r p) (k q)"
    return rearrange(patches, pattern, r=rows, k=columns, p=patch_size, q=patch_size)


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


def attention_weights(q, k):
    """softmax(q k^T / sqrt(d)) written out, for pictures: the fused kernel of the forward passes never has it.

    q (B, heads, n, d), k (B, heads, m, d) -> (B, heads, n, m), each row with a sum of 1.
    """
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention. q, k and v are one (3D x D) matrix."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def split(self, x):
        """x (B, n, D) -> q, k, v, each (B, heads, n, D / heads)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)                                         # (B, n, 3D)
        return rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)

    def forward(self, x):
        x = F.scaled_dot_product_attention(*self.split(x))                               # (B, heads, n, D / heads)
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

    def split(self, q, k, v):
        """q (B, n, R), k and v (B, m, R) -> the same, projected: (B, heads, n, R / heads), (B, heads, m, R / heads)."""
        return (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (self.q(q), self.k(k), self.v(v)))

    def forward(self, q, k, v):
        x = F.scaled_dot_product_attention(*self.split(q, k, v))                         # (B, heads, n, R / heads)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))                           # (B, n, R)


class MLP(nn.Module):
    """Linear, exact GELU, Linear; ratio 4."""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def stochastic_depth(x, rate):
    """Zero the whole branch of an image with probability `rate`, scale the others up."""
    if rate == 0:
        return x
    survives = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - rate)
    return x * (survives / (1 - rate))


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
        x = x + stochastic_depth(self.scale1 * self.attn(self.norm1(x)), rate)                  # (B, n, D)
        x = x + stochastic_depth(self.scale2 * self.mlp(self.norm2(x)), rate)                   # (B, n, D)
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
        q = self.norm2(q + stochastic_depth(self.scale1 * attended, rate))                      # (B, Nm, R)
        return q + stochastic_depth(self.scale2 * self.mlp(q), rate)                            # (B, Nm, R)


def depth_rates(rate, depth):
    """Stochastic depth of each block: from 0 for the first to `rate` for the last, linearly."""
    return [rate * i / max(depth - 1, 1) for i in range(depth)]


# ----------------------------------------------------------------------------------------------------------------
# Configuration and sizes.


@dataclass
class CAEConfig:
    """Everything that decides the shape of a model and its loss. Raises ValueError for what cannot work."""

    method: Literal["cae-v2", "cae"] = "cae-v2"
    """What is predicted: CLIP latents (cae-v2), or codes or pixels behind a decoder (cae)."""
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
# v1's released large has a regressor and decoder of 768, because its script loses its last flags (which would have made
# attention of 12 * 85 = 1020 in 1024): these are the paper's. v1 tiny, small and huge have no released script (the
# code's defaults would give 768).
SIZES = {
    "nano": _size(96, 4, 4, (96, 4, 1), (96, 4, 2), clip_dim=64, image_size=28, patch_size=4, drop_path=0.0),
    "tiny": _size(192, 12, 12, (96, 12, 1), (192, 12, 4)),
    "small": _size(384, 12, 12, (384, 12, 1), (384, 12, 4)),
    "base": _size(768, 12, 12, (768, 12, 4), (768, 12, 4)),
    "large": _size(1024, 24, 16, (1024, 16, 4), (1024, 16, 4), 1e-5),
    "huge": _size(1280, 32, 16, (1280, 16, 4), (1280, 16, 4), 1e-5),
}


# ----------------------------------------------------------------------------------------------------------------
# The parts of the papers: encoder, regressor, decoder (CAE) or head (CAE v2), and the two losses.


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

    def embed(self, images, index=None):
        """What the first block gets of images (B, 3, H, W), index (B, n) or None for all N patches: (B, 1 + n, D)."""
        positions = self.positions(patch_grid(images, self.patch_size))                  # (N, D)
        patches = patchify(images, self.patch_size)                                      # (B, N, 3 P^2)
        if index is not None:
            patches, positions = take(patches, index), positions[index]                  # (B, n, 3 P^2), (B, n, D)
        x = self.patch_embed(patches) + positions                                        # (B, n, D)
        return torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)        # (B, 1 + n, D)

    def forward(self, images, index=None, stochastic=True):
        """images (B, 3, H, W), index (B, n) or None for all N patches -> (B, 1 + n, D), class token first."""
        x = self.embed(images, index)                                                    # (B, 1 + n, D)
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, stochastic, use_reentrant=False)                # (B, 1 + n, D)
            else:
                x = block(x, stochastic)                                                 # (B, 1 + n, D)
        return self.norm(x)                                                              # (B, 1 + n, D)

    def attention(self, images, block=-1):
        """Who attends to whom in one of the blocks, without stochastic depth: (B, heads, 1 + N, 1 + N), rows attend to
        columns."""
        *before, last = self.blocks[: range(len(self.blocks))[block] + 1]
        x = self.embed(images)                                                           # (B, 1 + N, D)
        for earlier in before:
            x = earlier(x, stochastic=False)                                             # (B, 1 + N, D)
        q, k, _ = last.attn.split(last.norm1(x))                                         # (B, heads, 1 + N, D / heads)
        return attention_weights(q, k)


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


class Decoder(nn.Module):
    """The decoder G of CAE (CAE section "Decoder"): targets of the masked patches, from their regressed latents alone.

    Without blocks (an ablation of the paper) the LayerNorm and the linear layer remain.
    """

    def __init__(self, config):
        super().__init__()
        width = config.regressor_dim
        self.positions = Positions(config.grid, width)
        self.blocks = nn.ModuleList(
            Block(width, config.regressor_heads, config.layer_scale, rate)
            for rate in depth_rates(config.drop_path, config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.head = nn.Linear(width, config.target_dim)

    def forward(self, z, index, grid):
        """z (B, n, R) of the patches at index (B, n) -> logits of codes, or pixels, (B, n, C)."""
        x = z + self.positions(grid)[index]                                              # (B, n, R)
        for block in self.blocks:
            x = block(x)                                                                 # (B, n, R)
        return self.head(self.norm(x))                                                   # (B, n, C)


class CLIPHead(nn.Module):
    """The head of CAE v2, the same for the class token, visible and masked patches: from latents to CLIP's space."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.regressor_dim, eps=LN_EPS)
        self.linear = nn.Linear(config.regressor_dim, config.target_dim)

    def forward(self, z):
        """z (B, n, R) -> (B, n, C), float32, of length 1."""
        return F.normalize(self.linear(self.norm(z)).float(), dim=-1)                    # (B, n, C)


class CAELoss(nn.Module):
    """CAE, equation 1: reconstruct_weight * reconstruction + lambda * alignment of the regressed latents.

    Reconstruction: int64 targets are codes (cross-entropy), floats are pixels (mean squared error). Alignment: mean
    squared error to the encoder's own latents of the masked patches. A part of weight 0 is not computed.
    """

    def __init__(self, config):
        super().__init__()
        self.reconstruct_weight, self.align_weight = config.reconstruct_weight, config.align_weight

    def forward(self, prediction, z_masked, z_target, target, masked):
        """prediction (B, Nm, C), z_masked and z_target (B, Nm, R), target (B, N) or (B, N, C), masked (B, Nm)."""
        losses = {}
        if self.reconstruct_weight > 0:
            prediction = prediction.float()                                              # (B, Nm, C)
            if target.dtype == torch.int64:
                codes = target.gather(1, masked)                                         # (B, Nm)
                loss = F.cross_entropy(prediction.flatten(0, 1), codes.flatten())
            else:
                loss = F.mse_loss(prediction, take(target, masked).float())
            losses["loss_reconstruct"] = self.reconstruct_weight * loss
        if self.align_weight > 0:
            losses["loss_align"] = self.align_weight * F.mse_loss(z_masked.float(), z_target.float())
        return {"loss": sum(losses.values()), **losses}


class CAEv2Loss(nn.Module):
    """CAE v2: 1 - cosine to CLIP's latent of the same token.

    `supervise` says which tokens count: both (released: one mean over the class token, visible and masked patches),
    visible (class token and visible patches), or masked.
    """

    def __init__(self, config):
        super().__init__()
        self.supervise = config.supervise

    def forward(self, prediction, target, visible, masked):
        """prediction (B, n, C) of length 1, of the tokens that count; target (B, 1 + N, C), class token first."""
        index = []
        if self.supervise != "masked":
            index += [torch.zeros_like(visible[:, :1]), 1 + visible]                     # the target's class token is 0
        if self.supervise != "visible":
            index += [1 + masked]
        target = F.normalize(take(target, torch.cat(index, dim=1)).float(), dim=-1)      # (B, n, C)
        distance = 1 - (prediction * target).sum(dim=-1)                                 # (B, n)
        losses = {"loss": distance.mean()}
        if self.supervise != "masked":
            losses["loss_cls"] = distance[:, 0].mean()
            losses["loss_visible"] = distance[:, 1 : 1 + visible.shape[1]].mean()
        if self.supervise != "visible":
            losses["loss_masked"] = distance[:, -masked.shape[1] :].mean()
        return losses


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
    """Context autoencoder: encoder -> regressor -> decoder (CAE) or head (CAE v2) -> loss. `config` is a CAEConfig.

    from_pretrained, save_pretrained and push_to_hub are huggingface_hub's: config.json beside model.safetensors.
    """

    def __init__(self, config: CAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        # Nothing, or where the regressor is narrower than the encoder (CAE v2 tiny) what leads to it, and to the head.
        self.to_regressor = nn.Sequential()
        if config.regressor_dim != config.dim:
            self.to_regressor.append(nn.Linear(config.dim, config.regressor_dim))
            self.to_regressor.append(nn.LayerNorm(config.regressor_dim, eps=LN_EPS))
        self.regressor = Regressor(config)
        if config.method == "cae":
            self.decoder, self.loss = Decoder(config), CAELoss(config)
        else:
            self.head, self.loss = CLIPHead(config), CAEv2Loss(config)
        init_weights(self)
        # What no loss reaches takes no gradient, so that neither DDP nor the optimizer waits for it.
        if config.method == "cae-v2" and config.supervise == "visible":
            self.regressor.requires_grad_(False)
        if config.method == "cae" and config.reconstruct_weight == 0:
            self.decoder.requires_grad_(False)
        self.register_load_state_dict_pre_hook(_rename_former)

    def forward(self, images, visible, masked, target):
        """The losses of one batch, as scalar tensors: "loss" and its parts.

        images (B, 3, H, W), normalised; visible (B, Nv) and masked (B, Nm), int64; target: cae-v2 float (B, 1 + N, C),
        class token first; cae int64 codes (B, N) or float pixels (B, N, 3 P^2).
        cae-v2: loss_cls, loss_visible, loss_masked, each the mean over its own tokens. cae: loss_reconstruct and
        loss_align, as weighted in the sum. A part that `supervise` or a zero weight excludes is not computed.
        """
        config, grid = self.config, patch_grid(images, self.config.patch_size)
        z = self.latents(images, visible)                                                # (B, 1 + Nv, R)
        z_masked = z_target = prediction = None
        if config.method == "cae" or config.supervise != "visible":
            z_masked = self.regressor(z[:, 1:], visible, masked, grid)                   # (B, Nm, R)

        if config.method == "cae":
            if config.align_weight > 0:
                z_target = self.alignment_target(images, masked)                         # (B, Nm, R)
            if config.reconstruct_weight > 0:
                prediction = self.decoder(z_masked, masked, grid)                        # (B, Nm, C)
            return self.loss(prediction, z_masked, z_target, target, masked)

        supervised = {"visible": [z], "masked": [z_masked], "both": [z, z_masked]}[config.supervise]
        prediction = self.head(torch.cat(supervised, dim=1))                             # (B, n, C)
        return self.loss(prediction, target, visible, masked)

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

    def predict(self, images, visible, masked):
        """What the model makes of the visible patches, whatever its loss looks at; arguments as forward's.

        cae: codes' logits or pixels of the masked patches, (B, Nm, C). cae-v2: CLIP's latents, of length 1, of class
        token, visible and masked patches, (B, 1 + Nv + Nm, C).
        """
        grid = patch_grid(images, self.config.patch_size)
        z = self.latents(images, visible)                                                # (B, 1 + Nv, R)
        z_masked = self.regressor(z[:, 1:], visible, masked, grid)                       # (B, Nm, R)
        if self.config.method == "cae":
            return self.decoder(z_masked, masked, grid)                                  # (B, Nm, C)
        return self.head(torch.cat([z, z_masked], dim=1))                                # (B, 1 + Nv + Nm, C)

    def decode_latents(self, images):
        """cae: the encoder sees ALL patches, and the decoder takes its latents, without the regressor: (B, N, C).

        In training it sees regressed latents alone: if pictures come out here, both lie in one space, which is what the
        alignment is for (CAE section "Predictions are made in the encoded representation space", figure 4).
        """
        grid = patch_grid(images, self.config.patch_size)
        everything = torch.arange(grid[0] * grid[1], device=images.device).expand(len(images), -1)
        return self.decoder(self.latents(images, everything)[:, 1:], everything, grid)   # (B, N, C)

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


# Weights saved when decoder (CAE) and head (CAE v2) were both called "objective" load as ever.
_FORMER = {"decoder.": "objective.", "head.norm.": "objective.norm.", "head.linear.": "objective.head."}


def former_name(name):
    """The name of a parameter -> the one under which older files hold it; most have the same."""
    for start, former in _FORMER.items():
        if name.startswith(start):
            return former + name.removeprefix(start)
    return name


def _rename_former(model, state_dict, prefix, *_):
    """Hook of CAE that load_state_dict calls first."""
    for name, _ in model.named_parameters():
        former = former_name(name)
        if former != name and prefix + former in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + former)
