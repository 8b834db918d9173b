"""How fast training is, part by part, beside a plain baseline that computes the same.

    python tests/bench.py                             CAE v2-S, batch 8, float32, on the CPU: three minutes on two cores
    python tests/bench.py --method cae                CAE, also the cost of its alignment and decoder
    python tests/bench.py --device cuda               CAE v2-B, batch 256, bf16
    python tests/bench.py --only masks decode data    these rows alone

The baseline does what straightforward public code does: softmax attention written out, with q, k and v apart; all
patches embedded, then picked with boolean masks; masks drawn in a Python loop for each image; a float32 teacher; AdamW
parameter by parameter; `.item()` in each step; Pillow and transforms of its images. It is here to be compared with, and
for nothing else. Before anything is measured it is shown to give the same losses and gradients from the same weights.

Every row: the median over repeats in which ours and the baseline take turns; `ratio`, the headline, is the median of
the baseline's time by ours in the same turn; `spread`, the distance between the quartiles of that ratio by its median.
`cpu ratio` is the same of processor time, which other work on the machine hardly changes.
FLOPs are counted by torch, a multiplication and an addition as two: those that the mathematics has, without what a
fused kernel computes again in the backward pass. MFU is by the rate of a large matrix product of the same dtype in this
run. Memory is the row's own: the peak above what was there before; on the CPU resident memory, the model and its
gradients included. Teachers have random weights.
The last line printed is a JSON object with everything.
"""

import argparse
import copy
import ctypes
import dataclasses
import gc
import io
import itertools
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402  (before torch, whose threads it tells how to wait)

# isort: split
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from torchvision import transforms as T  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402
from torchvision.transforms import functional as TF  # noqa: E402

from cae import (  # noqa: E402
    CAE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LN_EPS,
    SIZES,
    CAEConfig,
    block_mask,
    depth_rates,
    random_mask,
    sincos_positions,
)
from train import normalize  # noqa: E402

DATA_ROWS = ("masks", "decode", "transform", "data", "data-released")
ROWS = (*DATA_ROWS, "teacher", "encoder", "regressor", "alignment", "optimizer", "step", "teacher-bf16", "step-bf16",
        "train", "cost")  # fmt: skip
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAMW = dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-8)


# ----------------------------------------------------------------------------------------------------------------
# The baseline. Parameters are named as ours, but for q, k and v.


def plain_mask(rows, columns, num_masked, min_block):
    """Block-wise masking patch by patch: bool (rows, columns), True where masked."""
    mask = np.zeros((rows, columns), dtype=bool)
    done = 0
    while done < num_masked:
        remaining = num_masked - done
        area = random.uniform(min_block, remaining)
        ratio = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h >= rows or w >= columns:
            continue
        top, left = random.randint(0, rows - h), random.randint(0, columns - w)
        new = h * w - mask[top : top + h, left : left + w].sum()
        if 0 < new <= remaining:
            for r in range(top, top + h):
                for c in range(left, left + w):
                    if not mask[r, c]:
                        mask[r, c] = True
                        done += 1
    return mask


class PlainView:
    """Pillow image -> float (3, S, S) in [0, 1], bool (N): crop, flip, jitter and mask as train.Crops does them."""

    def __init__(self, args, config):
        crop = T.RandomResizedCrop(config.image_size, args.recipe.crop_scale, interpolation=Image.Resampling.BICUBIC)
        self.transform = T.Compose([crop, T.RandomHorizontalFlip(args.recipe.flip), *plain_jitter(args), T.ToTensor()])
        self.mask = partial(plain_mask, *config.grid, train.num_masked(args, config), args.target.min_block)

    def __call__(self, image):
        return self.transform(image), torch.from_numpy(self.mask().flatten())


class ReleasedView(PlainView):
    """As the released code does it: the whole image is jittered and flipped, then cropped; the crop is normalised, and
    for DALL-E's tokenizer made a second time, at half the size with Lanczos."""

    def __init__(self, args, config):
        super().__init__(args, config)
        self.size, self.scale = config.image_size, args.recipe.crop_scale
        self.before = T.Compose([*plain_jitter(args), T.RandomHorizontalFlip(args.recipe.flip)])
        self.student = T.Compose([T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
        self.second = args.target.target == "dalle"

    def __call__(self, image):
        image = self.before(image)
        box = T.RandomResizedCrop.get_params(image, self.scale, (3 / 4, 4 / 3))
        crops = [self.student(TF.resized_crop(image, *box, [self.size] * 2, T.InterpolationMode.BICUBIC))]
        if self.second:
            small = TF.resized_crop(image, *box, [self.size // 2] * 2, T.InterpolationMode.LANCZOS)
            crops.append(0.8 * TF.to_tensor(small) + 0.1)
        return torch.cat([crop.flatten() for crop in crops]), torch.from_numpy(self.mask().flatten())


def plain_jitter(args):
    strength = args.recipe.color_jitter
    return [T.ColorJitter(strength, strength, strength)] if strength else []


def plain_decode(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def plain_drop_path(x, rate, training):
    if rate == 0 or not training:
        return x
    return x / (1 - rate) * (1 - rate + torch.rand(x.shape[0], 1, 1, device=x.device, dtype=x.dtype)).floor()


class PlainAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, q, k, v):
        b, n, d = q.shape
        q = self.q(q).reshape(b, n, self.heads, d // self.heads).permute(0, 2, 1, 3)
        k = self.k(k).reshape(b, -1, self.heads, d // self.heads).permute(0, 2, 1, 3)
        v = self.v(v).reshape(b, -1, self.heads, d // self.heads).permute(0, 2, 1, 3)
        scores = (q * (d // self.heads) ** -0.5) @ k.transpose(-2, -1)
        x = scores.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(b, n, d))


class PlainMLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class PlainBlock(nn.Module):
    def __init__(self, dim, heads, scale, rate, norms=("norm1", "norm2")):
        super().__init__()
        self.rate = rate
        for name in norms:
            self.add_module(name, nn.LayerNorm(dim, eps=LN_EPS))
        self.attn, self.mlp = PlainAttention(dim, heads), PlainMLP(dim)
        self.scale1, self.scale2 = (nn.Parameter(scale * torch.ones(dim)) for _ in range(2))

    def forward(self, x, stochastic=True):
        training = self.training and stochastic
        y = self.norm1(x)
        x = x + plain_drop_path(self.scale1 * self.attn(y, y, y), self.rate, training)
        return x + plain_drop_path(self.scale2 * self.mlp(self.norm2(x)), self.rate, training)


class PlainRegressorBlock(PlainBlock):
    def __init__(self, *shape):
        super().__init__(*shape, norms=("norm_q", "norm_k", "norm_v", "norm2"))

    def forward(self, q, z_visible, p_visible, p_masked):
        memory = torch.cat([z_visible, q], dim=1)
        keys = self.norm_k(memory + torch.cat([p_visible, p_masked], dim=1))
        x = self.attn(self.norm_q(q + p_masked), keys, self.norm_v(memory))
        x = self.norm2(q + plain_drop_path(self.scale1 * x, self.rate, self.training))
        return x + plain_drop_path(self.scale2 * self.mlp(x), self.rate, self.training)


def plain_blocks(kind, dim, heads, depth, config):
    rates = depth_rates(config.drop_path, depth)
    return nn.ModuleList(kind(dim, heads, config.layer_scale, rate) for rate in rates)


def pick(tokens, mask):
    """tokens (B, N, K) where mask (B, N) is True, as many in each row -> (B, n, K)."""
    return tokens[mask].reshape(tokens.shape[0], -1, tokens.shape[-1])


class PlainEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, config.dim, config.patch_size, config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.register_buffer("positions", sincos_positions(*config.grid, config.dim), persistent=False)
        self.blocks = plain_blocks(PlainBlock, config.dim, config.heads, config.depth, config)
        self.norm = nn.LayerNorm(config.dim, eps=LN_EPS)

    def forward(self, images, mask, stochastic=True):
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.class_token.expand(len(x), -1, -1), pick(x, ~mask)], dim=1)
        for block in self.blocks:
            x = block(x, stochastic)
        return self.norm(x)


class PlainRegressor(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.regressor_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_positions(*config.grid, width), persistent=False)
        self.blocks = plain_blocks(PlainRegressorBlock, width, config.regressor_heads, config.regressor_depth, config)
        self.norm = nn.LayerNorm(width, eps=LN_EPS) if config.method == "cae" else nn.Identity()

    def forward(self, z_visible, mask):
        positions = self.positions.expand(len(mask), -1, -1)
        p_visible, p_masked = pick(positions, ~mask), pick(positions, mask)
        q = self.mask_token.expand(p_masked.shape)
        for block in self.blocks:
            q = block(q, z_visible, p_visible, p_masked)
        return self.norm(q)


class PlainObjective(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.regressor_dim
        self.register_buffer("positions", sincos_positions(*config.grid, width), persistent=False)
        depth = config.decoder_depth if config.method == "cae" else 0
        self.blocks = plain_blocks(PlainBlock, width, config.regressor_heads, depth, config)
        self.norm, self.head = nn.LayerNorm(width, eps=LN_EPS), nn.Linear(width, config.target_dim)

    def forward(self, z_visible, z_masked, z_target, mask, target):
        method = self.clip_losses if self.config.method == "cae-v2" else self.reconstruction_losses
        return method(z_visible, z_masked, z_target, mask, target)

    def clip_losses(self, z_visible, z_masked, z_target, mask, target):
        z, t, supervise = [], [], self.config.supervise
        if supervise != "masked":
            z, t = [z_visible], [target[:, :1], pick(target[:, 1:], ~mask)]
        if supervise != "visible":
            z, t = [*z, z_masked], [*t, pick(target[:, 1:], mask)]
        prediction = self.head(self.norm(torch.cat(z, dim=1))).float()
        prediction = prediction / prediction.norm(dim=-1, keepdim=True)
        target = torch.cat(t, dim=1).float()
        distance = 1 - (prediction * target / target.norm(dim=-1, keepdim=True)).sum(dim=-1)
        losses = {"loss": distance.mean()}
        if supervise != "masked":
            losses["loss_cls"] = distance[:, 0].mean()
            losses["loss_visible"] = distance[:, 1 : z_visible.shape[1]].mean()
        if supervise != "visible":
            losses["loss_masked"] = distance[:, -z_masked.shape[1] :].mean()
        return losses

    def reconstruction_losses(self, z_visible, z_masked, z_target, mask, target):
        losses, config = {}, self.config
        if config.reconstruct_weight > 0:
            x = z_masked + pick(self.positions.expand(len(mask), -1, -1), mask)
            for block in self.blocks:
                x = block(x)
            prediction, target = self.head(self.norm(x)).float(), target[mask]
            distance = F.cross_entropy if target.dtype == torch.int64 else F.mse_loss
            losses["loss_reconstruct"] = config.reconstruct_weight * distance(prediction.flatten(0, 1), target)
        if config.align_weight > 0:
            losses["loss_align"] = config.align_weight * F.mse_loss(z_masked.float(), z_target.float())
        return {"loss": sum(losses.values()), **losses}


class PlainCAE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.regressor_dim
        self.encoder, self.regressor = PlainEncoder(config), PlainRegressor(config)
        self.objective = PlainObjective(config)
        narrow = [nn.Linear(config.dim, width), nn.LayerNorm(width, eps=LN_EPS)] if width != config.dim else []
        self.to_regressor = nn.Sequential(*narrow)

    def forward(self, images, mask, target):
        config, z_masked, z_target = self.config, None, None
        z_visible = self.to_regressor(self.encoder(images, mask))
        if config.method == "cae" or config.supervise != "visible":
            z_masked = self.regressor(z_visible[:, 1:], mask)
        if config.method == "cae" and config.align_weight > 0:
            z_target = self.alignment_target(images, mask)
        return self.objective(z_visible, z_masked, z_target, mask, target)

    @torch.no_grad()
    def alignment_target(self, images, mask):
        return self.to_regressor(self.encoder(images, ~mask, stochastic=False))[:, 1:]


def plain_names(tensors, patch):
    """Our state dict, or gradients by name, as the baseline has them."""
    plain = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if last in ("q_bias", "v_bias"):
            plain[f"{stem}.{last[0]}.bias"] = tensor
        elif stem.endswith(".qkv"):
            plain |= {f"{stem[:-4]}.{part}.weight": rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
        elif name == "encoder.patch_embed.weight":
            plain[name] = tensor.view(len(tensor), 3, patch, patch)
        else:
            plain[name] = tensor
    return plain


def plain_twin(model):
    """A PlainCAE with the weights of a CAE."""
    twin = PlainCAE(model.config)
    twin.load_state_dict(plain_names(model.state_dict(), model.config.patch_size))
    for ours, theirs in ((model.regressor, twin.regressor), (model.objective, twin.objective)):
        theirs.requires_grad_(next(ours.parameters()).requires_grad)  # what no loss reaches takes no gradient
    return twin


def boolean(masked, patches):
    """Indices (B, Nm) -> bool (B, N)."""
    return torch.zeros(len(masked), patches, dtype=torch.bool).scatter_(1, masked, True)


def check_equal(tolerance=1e-5):
    """Assert that the baseline computes what we do: teacher, every loss and every gradient, at a small size in float32
    with weights far from their initialisation. Returns the largest difference, relative where values exceed 1."""
    worst = 0.0

    def compare(name, ours, theirs):
        nonlocal worst
        difference = ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1)).item()
        assert difference <= tolerance, f"the baseline is off by {difference:.1e} in {name}"
        worst = max(worst, difference)

    cases = [("cae-v2", dict(supervise=supervise, target_dim=24)) for supervise in ("both", "visible", "masked")]
    cases += [("cae-v2", dict(regressor_dim=48, target_dim=24))]
    cases += [("cae", dict(target_dim=target_dim)) for target_dim in (50, 48)]  # codes; pixels of 4 x 4
    cases += [("cae", dict(target_dim=50, align_weight=0.0, decoder_depth=0))]
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    for method, fields in cases:
        model = CAE(CAEConfig.from_size("nano", method, **fields)).train()
        for parameter in model.parameters():
            parameter.data += 0.1 * draw(parameter.shape)
        twin, config, images = plain_twin(model).train(), model.config, draw(2, 3, 28, 28)
        visible, masked = block_mask(2, config.grid, 20, min_block=4, generator=generator)
        if method == "cae-v2":
            target = draw(2, 1 + config.num_patches, 24)
        elif config.target_dim == 48:
            target = draw(2, config.num_patches, 48)
        else:
            target = torch.randint(50, (2, config.num_patches), generator=generator)
        ours, theirs = model(images, visible, masked, target), twin(images, boolean(masked, config.num_patches), target)
        assert list(ours) == list(theirs)
        for name in ours:
            compare(f"{method} {fields} {name}", ours[name], theirs[name])
        ours["loss"].backward()
        theirs["loss"].backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found = plain_names(found, config.patch_size)
        assert found.keys() == {name for name, p in twin.named_parameters() if p.grad is not None}
        for name, parameter in twin.named_parameters():
            if name in found:
                compare(f"{method} {fields} d {name}", found[name], parameter.grad)
    teacher, pixels = train.CLIPTeacher(str(train.DEMO / "clip_teacher"), 4).eval(), torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        compare("the teacher", teacher(pixels), plain_teacher(teacher)(pixels))
    return worst


def plain_teacher(teacher):
    """The same weights in float32, attention written out."""
    teacher = copy.deepcopy(teacher).float()
    if isinstance(teacher, train.CLIPTeacher):
        teacher.model.set_attn_implementation("eager")
    return teacher


# ----------------------------------------------------------------------------------------------------------------
# Measuring.


def resident(what):
    """VmRSS or VmHWM (its peak) of this process in bytes; 0 where there is no /proc."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024
    return 0


class Memory:
    """The peak of memory in the block above what was in use before: `.bytes`."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def __enter__(self):
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()
        else:
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # or what earlier rows have freed would be taken for memory in use
            self.before = resident("VmRSS")
        self.restart()
        return self

    def restart(self):
        """The peak is what follows."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def __exit__(self, *error):
        self.bytes = (torch.cuda.max_memory_allocated() if self.cuda else resident("VmHWM")) - self.before


def seconds_of(work, device, calls=1):
    """Seconds of one call, and processor seconds of all threads in it. On CUDA by device events, with several calls
    after each other without a wait; the processor's are then what it takes to start them."""
    processor, start = time.process_time(), time.perf_counter()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
    for _ in range(calls):
        work()
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    if device.type == "cuda":
        events[1].record()
        events[1].synchronize()
        seconds = events[0].elapsed_time(events[1]) / 1000
    return seconds / calls, processor / calls


def peak_rate(device, dtype):
    """FLOP/s of a large matrix product: the fastest of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / min(seconds_of(lambda: a @ b, device)[0] for _ in range(10))


@contextmanager
def counting():
    """A counter of FLOPs. Attention is plain products meanwhile: what torch counts for a fused kernel depends on the
    kernel, and for some versions is nothing; of what is compiled it counts nothing either."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"), counter:
        yield counter


def check_flops():
    """Assert that a linear layer and attention, forward and backward, are counted as one does by hand."""
    b, n, d = 2, 50, 96
    x = torch.randn(b, n, d, requires_grad=True)
    linear, attention = 2 * b * n * d * d, 2 * (2 * b * n * n * d)  # attention: scores, then their sum of values
    with counting() as counter:
        F.linear(x, torch.randn(d, d, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * linear  # backward: to the input and to the weights
    heads = x.view(b, n, 4, d // 4).transpose(1, 2)
    with counting() as counter:
        F.scaled_dot_product_attention(heads, heads, heads).sum().backward()
    assert counter.get_total_flops() == 3 * attention  # backward: two products for each of the two


def ratio_of(values):
    """The median, and the distance between the quartiles by the median."""
    if len(values) == 1:
        return values[0], 0.0
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, (high - low) / median


def measure(bench, make_ours, make_plain, images, flops=True, dtype=None, plain_dtype=None, device=None):
    """One row as a dict. make_*() -> the work; each side is made and called alone first, for FLOPs and memory."""
    device, sides, works = device or bench.device, {}, {}
    dtypes = {"ours": dtype or bench.dtype, "plain": plain_dtype or dtype or bench.dtype}
    for side, make in (("ours", make_ours), ("plain", make_plain)):
        with Memory(device) as memory:
            works[side] = make()
            with counting() if flops else nullcontext() as counter:
                works[side]()
            for _ in range(3 if device.type == "cuda" or bench.compile else 0):
                works[side]()
            memory.restart()  # of a call like all others, with the optimizer's moments there
            works[side]()
        sides[side] = {"memory_mb": max(memory.bytes, 1) / 2**20}
        if flops and counter.get_total_flops():  # a teacher of pixels has none
            sides[side]["gflop_per_image"] = counter.get_total_flops() / images / 1e9
    calls = 4 if device.type == "cuda" else 1
    turns, start = [], time.perf_counter()
    while len(turns) < bench.repeats or (time.perf_counter() - start < bench.seconds and len(turns) < 100):
        turns.append({side: seconds_of(work, device, calls) for side, work in works.items()})
    for side, found in sides.items():
        seconds, processor = (statistics.median(turn[side][i] for turn in turns) for i in range(2))
        found |= {"ms": 1000 * seconds, "images_per_second": images / seconds, "cpu_ms": 1000 * processor}
        if "gflop_per_image" in found:
            found["tflops"] = found["gflop_per_image"] * images / seconds / 1e3
            found["mfu"] = found["tflops"] * 1e12 / bench.peak(dtypes[side])
    ratio, spread = ratio_of([turn["plain"][0] / turn["ours"][0] for turn in turns])
    cpu_ratio, cpu_spread = ratio_of([turn["plain"][1] / turn["ours"][1] for turn in turns])
    works.clear()
    bench.accelerator.free_memory()
    return {**sides["ours"], "ratio": ratio, "spread": spread, "cpu_ratio": cpu_ratio, "cpu_spread": cpu_spread,
            "repeats": len(turns), "baseline": sides["plain"]}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Random images, teachers and batches.


def jpeg(number, height=375, width=500):
    """A JPEG of noise on five scales, the coarse ones stronger, as in photographs: 60 to 100 KB."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(number))
    image = torch.full((1, 3, height, width), 0.5)
    for rows, strength in ((4, 0.25), (16, 0.15), (64, 0.08), (190, 0.05), (height, 0.03)):
        size = (rows, rows * width // height)
        noise = 0.8 * draw(1, 1, *size) + 0.3 * draw(1, 3, *size)  # grey, and a little colour
        image += strength * F.interpolate(noise, (height, width), mode="bicubic")
    file = io.BytesIO()
    pixels = (255 * image[0].clamp(0, 1)).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, "JPEG", quality=86 + number % 8)
    return file.getvalue()


def write_teacher(folder, target, config):
    """A teacher of the usual shape with random weights: CLIP's ViT-B/16, or DALL-E's tokenizer. Its name."""
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
        FlavaImageCodebook,
        FlavaImageCodebookConfig,
    )

    if target == "pixels":
        return None
    if target == "clip":
        shape = dict(hidden_size=768, intermediate_size=3072)
        if config.image_size < 64:  # as the demo's
            shape = dict(num_hidden_layers=4, hidden_size=128, intermediate_size=256, num_attention_heads=4)
        shape |= dict(image_size=config.image_size, patch_size=config.patch_size, projection_dim=config.target_dim)
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape))
    else:
        model = FlavaImageCodebook(FlavaImageCodebookConfig())
    model.save_pretrained(folder)
    return str(folder)


class Bench:
    """What all rows share."""

    def __init__(self, flags, folder):
        self.folder, self.compile, self.repeats, self.seconds = folder, flags.compile, flags.repeats, flags.seconds
        self.device, self.dtype = torch.device(flags.device), DTYPES[flags.dtype]
        args = train.Args()
        args.model.size, args.model.method, args.model.image_size = flags.size, flags.method, flags.image_size
        args.target.supervise, args.target.target, args.run.run_dir = flags.supervise, flags.target, str(folder / "run")
        args.data.batch_size = args.data.effective_batch_size = flags.batch_size
        self.args = args = train.resolve(args)
        config = train.model_config(args)
        args.target.teacher = write_teacher(folder / "teacher", args.target.target, config)
        self.teacher = train.build_teacher(args, config)
        self.config = train.model_config(args, target_dim=self.teacher.target_dim)
        self.teacher_dtype = self.dtype
        self.plain_teacher = plain_teacher(self.teacher).to(self.device)
        self.teacher.to(self.device, self.teacher_dtype)
        self.accelerator, _ = train.make_accelerator(train.DeviceArgs(run_dir=str(folder), precision="fp32"), args.data)
        self.threads = torch.get_num_threads()
        self.num_masked = train.num_masked(args, self.config)
        self.jpegs = [jpeg(number) for number in range(flags.images)]
        self.peaks = {}

        batch, size = args.data.batch_size, self.config.image_size
        draw = block_mask if args.target.mask == "block" else random_mask
        visible, masked = draw(batch, self.config.grid, self.num_masked, min_block=args.target.min_block)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)
        self.host_batch = images, visible, masked
        self.plain_batch = images / 255, boolean(masked, self.config.num_patches)
        self.visible, self.masked, self.mask, self.pixels = (
            tensor.to(self.device) for tensor in (visible, masked, self.plain_batch[1], self.plain_batch[0])
        )
        self.images = normalize(self.pixels, IMAGENET_MEAN, IMAGENET_STD)
        with torch.no_grad():
            self.target = self.teacher(self.pixels)

    @property
    def batch(self):
        return self.args.data.batch_size

    def peak(self, dtype):
        if dtype not in self.peaks:
            self.peaks[dtype] = peak_rate(self.device, dtype)
        return self.peaks[dtype]

    def our_teacher(self, dtype):
        teacher = copy.deepcopy(self.teacher).to(dtype)
        if self.compile:
            teacher.compile()
        return teacher

    @contextmanager
    def autocast(self, dtype):
        """As train.py trains; the baseline has no use for the choice of attention."""
        half = dtype == torch.bfloat16
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=half)
        with autocast, train.attention_for(self.device, "bf16" if half else "no"):
            yield

    def model(self, config=None):
        torch.manual_seed(0)
        return CAE(config or self.config).to(self.device).train()

    def plain(self):
        return plain_twin(self.model().cpu()).to(self.device).train()

    def compiled(self, module):
        if self.compile:
            module.compile(fullgraph=True)
        return module


# ----------------------------------------------------------------------------------------------------------------
# The rows: name -> measurement.


def masks(bench, images=64):
    grid, count, smallest = bench.config.grid, bench.num_masked, bench.args.target.min_block

    def ours():
        return [block_mask(1, grid, count, min_block=smallest) for _ in range(images)]

    def plain():
        return [torch.from_numpy(plain_mask(*grid, count, smallest)) for _ in range(images)]

    assert all(int(mask.sum()) == count for mask in plain())
    return measure(bench, lambda: ours, lambda: plain, images, flops=False, device=CPU)


def decode(bench):
    def ours():
        return [train.decode(data) for data in bench.jpegs]

    def plain():
        return [plain_decode(data) for data in bench.jpegs]

    return measure(bench, lambda: ours, lambda: plain, len(bench.jpegs), flops=False, device=CPU)


def transform(bench):
    view, plain_view = train.Crops(bench.args, bench.config), PlainView(bench.args, bench.config)
    tensors, pictures = [train.decode(data) for data in bench.jpegs], [plain_decode(data) for data in bench.jpegs]

    def ours():
        return [view(tensor, seed) for seed, tensor in enumerate(tensors)]

    def plain():
        return [plain_view(picture) for picture in pictures]

    return measure(bench, lambda: ours, lambda: plain, len(tensors), flops=False, device=CPU)


def data(bench, plain_kind=PlainView):
    """Bytes to what a loading process hands on: uint8 and indices; the baseline's floats and boolean masks. (What the
    released code does there beyond, we do on the device, within `step`.)"""
    view, plain_view = train.Crops(bench.args, bench.config), plain_kind(bench.args, bench.config)
    source = train.Source(None, "image", None, len(bench.jpegs), "noise")
    rows = [(0, number, {"image": {"bytes": data}}) for number, data in enumerate(bench.jpegs)]

    def plain():
        images, masks = zip(*[plain_view(plain_decode(data)) for data in bench.jpegs], strict=True)
        return torch.stack(images), torch.stack(masks)

    ours = partial(train.load_chunk, source, view, 0, rows)
    return measure(bench, lambda: ours, lambda: plain, len(rows), flops=False, device=CPU)


def teacher(bench, dtype=None):
    dtype = dtype or bench.teacher_dtype

    def forward_of(model):
        @torch.no_grad()
        def forward():
            model(bench.pixels)

        return forward

    return measure(bench, lambda: forward_of(bench.our_teacher(dtype)), lambda: forward_of(bench.plain_teacher),
                   bench.batch, dtype=dtype, plain_dtype=torch.float32)  # fmt: skip


def encoder(bench):
    """Forward and backward over the visible patches."""
    gradient = torch.randn(bench.batch, 1 + bench.visible.shape[1], bench.config.dim, device=bench.device)

    def pass_of(encoder, index):
        def work():
            with bench.autocast(bench.dtype):
                z = encoder(bench.images, index)
            z.backward(gradient.to(z.dtype))

        return work

    return measure(bench, lambda: pass_of(bench.compiled(bench.model().encoder), bench.visible),
                   lambda: pass_of(bench.plain().encoder, bench.mask), bench.batch)  # fmt: skip


def regressor(bench):
    """Forward and backward of all that follows the encoder: regressor, head or decoder, loss."""
    config, wide = bench.config, bench.config.regressor_dim
    latents = torch.randn(bench.batch, 1 + bench.visible.shape[1], wide, device=bench.device, requires_grad=True)
    goal = torch.randn(bench.batch, bench.num_masked, wide, device=bench.device)  # of the alignment

    def ours():
        model = bench.model()
        bench.compiled(model.regressor), bench.compiled(model.objective)

        def work():
            with bench.autocast(bench.dtype):
                z = None
                if model.objective.needs_regressor:
                    z = model.regressor(latents[:, 1:], bench.visible, bench.masked, config.grid)
                losses = model.objective(latents, z, goal, bench.visible, bench.masked, bench.target, config.grid)
            losses["loss"].backward()

        return work

    def plain():
        model = bench.plain()

        def work():
            with bench.autocast(bench.dtype):
                z = None
                if config.method == "cae" or config.supervise != "visible":
                    z = model.regressor(latents[:, 1:], bench.mask)
                losses = model.objective(latents, z, goal, bench.mask, bench.target)
            losses["loss"].backward()

        return work

    return measure(bench, ours, plain, bench.batch)


def alignment(bench):
    """CAE: the encoder's latents of the masked patches, without gradient."""

    def forward_of(model, index):
        def work():
            with bench.autocast(bench.dtype):
                model.alignment_target(bench.images, index)

        return work

    def ours():
        model = bench.model()
        bench.compiled(model.encoder)
        return forward_of(model, bench.masked)

    return measure(bench, ours, lambda: forward_of(bench.plain(), bench.mask), bench.batch)


def optimizer(bench):
    """Clipping and AdamW."""

    def with_gradients(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = 1e-3 * torch.randn_like(parameter)
        return model

    def ours():
        model = with_gradients(bench.model())
        return update_of(bench, *train.prepare(bench.accelerator, model, fused_adamw(model)))

    def plain():
        model = with_gradients(bench.plain())
        adamw = looped_adamw(model)

        def work():
            nn.utils.clip_grad_norm_(model.parameters(), 3.0, foreach=False).item()
            adamw.step()

        return work

    return measure(bench, ours, plain, bench.batch, flops=False)


def fused_adamw(model):
    return torch.optim.AdamW(train.parameter_groups(model), fused=True, **ADAMW)


def looped_adamw(model):
    return torch.optim.AdamW(train.parameter_groups(model), foreach=False, fused=False, **ADAMW)


def update_of(bench, model, adamw):
    """train.take_step, but the gradient stays for the next call."""

    def update():
        norm = bench.accelerator.clip_grad_norm_(model.parameters(), bench.args.recipe.clip_grad)
        train.skip_if(~torch.isfinite(norm), bench.accelerator, adamw)
        adamw.step()

    return update


def our_step(bench, dtype, config=None, target=None):
    """A training step in the manner of `learn` in train.py, without accumulation. With a target no teacher runs."""
    model = bench.compiled(bench.model(config))
    model, adamw = train.prepare(bench.accelerator, model, fused_adamw(model))
    sums, teacher = {}, bench.our_teacher(dtype)

    def step():
        pixels, visible, masked = (train.to_device(tensor, bench.device) for tensor in bench.host_batch)
        pixels = pixels.float() / 255
        with torch.no_grad():
            goal = teacher(pixels) if target is None else target
        with bench.autocast(dtype):
            losses = model(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), visible, masked, goal)
        bench.accelerator.backward(losses["loss"] * train.finite(losses["loss"]))
        norm, bad = train.take_step(bench.accelerator, model, adamw, bench.args.recipe.clip_grad)
        for name, value in {**losses, "grad_norm": norm, "bad": bad}.items():
            sums[name] = sums.get(name, 0.0) + value.detach()

    return step


def plain_step(bench, dtype):
    """The baseline's, as a function of a batch."""
    model = bench.plain()
    adamw, sums = looped_adamw(model), {}

    def step(images, mask):
        images, mask = images.to(bench.device), mask.to(bench.device)
        with torch.no_grad():
            target = bench.plain_teacher(images)
        with bench.autocast(dtype):
            losses = model(normalize(images, IMAGENET_MEAN, IMAGENET_STD), mask, target)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.item()
        if not math.isfinite(losses["loss"].item()):
            raise RuntimeError("the baseline's loss is not finite")
        adamw.zero_grad()
        losses["loss"].backward()
        sums["norm"] = nn.utils.clip_grad_norm_(model.parameters(), bench.args.recipe.clip_grad, foreach=False).item()
        adamw.step()

    return step


def step(bench, dtype=None):
    """A whole training step, the teacher in it."""
    dtype = dtype or bench.dtype
    return measure(bench, lambda: our_step(bench, dtype), lambda: partial(plain_step(bench, dtype), *bench.plain_batch),
                   bench.batch, dtype=dtype)  # fmt: skip


def train_script(bench, lines=10, left_out=3):
    """train.py as a process of its own on JPEGs on disk, by the rates in its log; the first lines are left out. The
    baseline is a loop over a DataLoader with as many loading processes."""
    every, args = 10 if bench.device.type == "cuda" else 1, bench.args
    files = bench.folder / "data"
    for number in range(max(bench.batch, min(lines * every * bench.batch, 4096))):
        file = files / f"class{number % 2}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bench.jpegs[number % len(bench.jpegs)])
    command = {
        "dataset": files, "run-dir": bench.folder / "run", "size": args.model.size, "method": args.model.method,
        "image-size": args.model.image_size, "supervise": args.target.supervise, "target": args.target.target,
        **({"teacher": args.target.teacher} if args.target.teacher else {}),
        "batch-size": bench.batch, "effective-batch-size": bench.batch, "workers": args.data.workers,
        "precision": next(name for name, dtype in DTYPES.items() if dtype == bench.dtype), "steps": lines * every,
        "log-every": every, "checkpoint-every": 10**6,
    }  # fmt: skip
    command = list(itertools.chain(*((f"--{name}", str(value)) for name, value in command.items())))
    command = [sys.executable, str(ROOT / "train.py"), *command, *["--compile"] * bench.compile]
    environment = {**os.environ, "HF_HOME": str(bench.folder / "cache")}
    memory = run_and_watch(command, bench.folder, environment, bench.device)
    log = [json.loads(line) for line in (bench.folder / "run" / "log.jsonl").read_text().splitlines()][left_out:]
    rate = statistics.harmonic_mean([line["images_per_second"] for line in log])

    view = PlainView(args, bench.config)
    folder = ImageFolder(files, transform=view, loader=lambda path: plain_decode(Path(path).read_bytes()))
    workers = dict(num_workers=args.data.workers, persistent_workers=args.data.workers > 0)
    loader = DataLoader(folder, bench.batch, shuffle=True, drop_last=True, **workers)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    work, start = plain_step(bench, bench.dtype), None
    for number, ((images, mask), _) in enumerate(itertools.islice(batches, lines * every)):
        work(images, mask)
        if number + 1 == left_out * every:
            start = time.perf_counter()
    plain_rate = (lines - left_out) * every * bench.batch / (time.perf_counter() - start)
    with counting() as counter:
        our_step(bench, bench.dtype)()
    tflops = counter.get_total_flops() / bench.batch * rate / 1e12
    return {
        "ms": 1000 * bench.batch / rate,
        "images_per_second": rate,
        "gflop_per_image": counter.get_total_flops() / bench.batch / 1e9,
        "tflops": tflops,
        "mfu": tflops * 1e12 / bench.peak(bench.dtype),
        "memory_mb": memory / 2**20,
        "ratio": rate / plain_rate,
        "data_wait": statistics.mean(line["data_wait"] for line in log),
        "baseline": {"ms": 1000 * bench.batch / plain_rate, "images_per_second": plain_rate},
    }


def run_and_watch(command, folder, environment, device):
    """Run train.py to its end. The most memory that was seen in use, twice a second: on CUDA of the device, its context
    included; on the CPU of the process and its loading processes (what they share counts once)."""
    before, most = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0, 0
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
    while process.poll() is None:
        with suppress(psutil.Error):
            main = psutil.Process(process.pid)
            everyone = [] if device.type == "cuda" else [main, *main.children()]
            used = before - torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0
            most = max(most, used + sum(p.memory_full_info().pss for p in everyone))
        time.sleep(0.5)
    if process.returncode:
        raise RuntimeError(f"train.py failed: {(folder / 'output').read_text().strip().splitlines()[-1]}")
    return most


def cost(bench):
    """CAE by itself without alignment and decoder, as the paper states their cost; time without the teacher."""
    bare = dataclasses.replace(bench.config, align_weight=0.0, decoder_depth=0)
    row = measure(bench, lambda: our_step(bench, bench.dtype, bare, bench.target),
                  lambda: our_step(bench, bench.dtype, None, bench.target), bench.batch)  # fmt: skip
    sizes = [sum(p.numel() for p in CAE(config).parameters()) for config in (bench.config, bare)]
    return {
        "parameters_ratio": sizes[0] / sizes[1],
        "time_ratio": row.pop("ratio"), "spread": row.pop("spread"),
        "cpu_time_ratio": row.pop("cpu_ratio"), "cpu_spread": row.pop("cpu_spread"),
        "with": row.pop("baseline"), "without": row,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# The command.


def has_bf16():
    """Names of the instructions for bf16 that this CPU has."""
    with suppress(OSError):
        words = Path("/proc/cpuinfo").read_text().split()
        return [name for name in ("avx512_bf16", "amx_bf16") if name in words]
    return []


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="default: small on the CPU, base on cuda")
    parser.add_argument("--method", choices=("cae-v2", "cae"), default="cae-v2")
    parser.add_argument("--supervise", choices=("visible", "masked", "both"), default="both")
    parser.add_argument("--target", choices=("clip", "dalle", "pixels"), help="default: clip, with cae dalle")
    parser.add_argument("--image-size", type=int, help="default: the size's")
    parser.add_argument("--batch-size", type=int, help="default: 8 on the CPU, 256 on cuda")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of autocast; default: fp32 on the CPU, bf16 on cuda")
    parser.add_argument("--compile", action="store_true", help="compile ours, as train.py --compile does")
    parser.add_argument("--images", type=int, default=64, help="different JPEGs")
    parser.add_argument("--repeats", type=int, default=3, help="of each row, at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each row, at least")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW",
                        help=f"of {', '.join(ROWS)}; default: all that apply")  # fmt: skip
    flags = parser.parse_args()
    cuda = flags.device == "cuda"
    for name, value in dict(size="base" if cuda else "small", batch_size=256 if cuda else 8,
                            dtype="bf16" if cuda else "fp32").items():  # fmt: skip
        setattr(flags, name, getattr(flags, name) or value)
    for name in ("batch_size", "images", "repeats"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return flags


def rows_of(bench, flags):
    """{name: measurement} of what was asked for and applies."""
    rows = {"masks": masks, "decode": decode, "transform": transform, "data": data}
    rows["data-released"] = partial(data, plain_kind=ReleasedView)
    rows |= {"teacher": teacher, "encoder": encoder, "regressor": regressor}
    if flags.method == "cae":
        rows["alignment"] = alignment
    rows |= {"optimizer": optimizer, "step": step}
    if flags.device == "cpu" and flags.dtype == "fp32" and has_bf16():
        if bench.args.target.target != "pixels":
            rows["teacher-bf16"] = partial(teacher, dtype=torch.bfloat16)
        rows["step-bf16"] = partial(step, dtype=torch.bfloat16)
    rows["train"] = train_script
    if flags.method == "cae":
        rows["cost"] = cost
    return {name: row for name, row in rows.items() if not flags.only or name in flags.only}


COLUMNS = (("ms", "ms", ".2f"), ("images_per_second", "images/s", ".1f"), ("gflop_per_image", "GFLOP/image", ".2f"),
           ("tflops", "TFLOP/s", ".3f"), ("mfu", "MFU", ".0%"), ("memory_mb", "MB", ".0f"))  # fmt: skip


def line_of(name, row):
    """A row of the table: ours, the baseline's time, rate and memory, the ratio."""
    cells = [format(row[key], form) if key in row else "" for key, _, form in COLUMNS]
    plain = row["baseline"]
    cells += [f"{plain['ms']:.2f}", f"{plain['images_per_second']:.1f}"]
    cells += [f"{plain['memory_mb']:.0f}" if "memory_mb" in plain else "", f"{row['ratio']:.2f}"]
    cells += [f"{row['spread']:.0%}" if "spread" in row else ""]
    cells += [f"{row['cpu_ratio']:.2f}" if "cpu_ratio" in row else ""]
    return name.ljust(13) + aligned(cells)


def aligned(cells):
    return "".join(f"{cell:>12}" for cell in cells)


def main():
    flags, start = parse(), time.perf_counter()
    if flags.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # also for train.py
    check_flops()
    worst = check_equal()
    print(f"the baseline computes the same: losses and gradients differ by {worst:.0e} at most, in float32")
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench = Bench(flags, Path(folder))
        except train.UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        config, rows = bench.config, {}
        result = {
            **vars(flags), "target": bench.args.target.target, "image_size": config.image_size,
            "device_name": device_name(bench.device), "threads": bench.threads, "torch": torch.__version__,
            "cpu_bf16": has_bf16(),
            "masked": bench.num_masked, "patches": config.num_patches, "loading_processes": bench.args.data.workers,
            "jpeg_kb": statistics.mean(map(len, bench.jpegs)) / 1000, "jpegs": flags.images, "rows": rows,
        }  # fmt: skip
        print(f"{config.method} {flags.size}, {bench.num_masked} of {config.num_patches} patches masked, batch "
              f"{bench.batch}, {flags.dtype}, target {result['target']}; {result['device_name']}, {bench.threads} "
              f"threads, torch {torch.__version__}; CPU instructions for bf16: {', '.join(has_bf16()) or 'none'}\n"
              f"{', '.join(DATA_ROWS)}: on one core, JPEGs of {result['jpeg_kb']:.0f} kB")  # fmt: skip
        titles = [*(title for _, title, _ in COLUMNS), "baseline ms", "images/s", "MB", "ratio", "spread", "cpu ratio"]
        print(13 * " " + aligned(titles), flush=True)
        wanted = rows_of(bench, flags)
        if not wanted:
            print(f"error: --only {' '.join(flags.only)}: no such row with this method, device and dtype",
                  file=sys.stderr)  # fmt: skip
            sys.exit(2)
        for name, work in wanted.items():
            alone = name in DATA_ROWS  # as in a loading process
            torch.set_num_threads(1 if alone else bench.threads)
            try:
                row = work(bench)
            except Exception as error:  # out of memory, say: the other rows are worth having
                rows[name] = {"error": f"{type(error).__name__}: {train.first_line(error)}"}
                print(f"{name:13}{rows[name]['error']}", flush=True)
                bench.accelerator.free_memory()
                continue
            if name == "cost":
                result["cost"] = row
                print(f"cost of alignment and decoder: parameters x {row['parameters_ratio']:.2f} (paper: 1.23), time "
                      f"without teacher x {row['time_ratio']:.2f} (paper: 1.24), processor time "
                      f"x {row['cpu_time_ratio']:.2f}")  # fmt: skip
                continue
            rows[name] = row
            print(line_of(name, row), flush=True)
    result["peak_tflops"] = {str(dtype).removeprefix("torch."): rate / 1e12 for dtype, rate in bench.peaks.items()}
    result["max_resident_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result["seconds"] = time.perf_counter() - start
    for name, rate in result["peak_tflops"].items():
        print(f"a large matrix product in {name}: {rate:.3f} TFLOP/s")
    print(json.dumps(result))
    sys.exit(any("error" in row for row in rows.values()))


if __name__ == "__main__":
    main()
