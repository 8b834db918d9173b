"""The plain twin: CAE and CAE v2 as straightforward public code trains them, here to be compared with and for nothing
else.

Softmax attention is written out, with q, k and v apart; all patches are embedded, then picked with boolean masks; masks
are drawn in a Python loop for each image; the teacher is float32; AdamW goes parameter by parameter; each step has
`.item()`; images are read by Pillow and torchvision's transforms of its images.

Read from top to bottom: data, model, training, and at the end the proof that all of it gives the same losses and
gradients from the same weights. Parameters are named as ours, but for q, k and v.
"""

from engine.arguments import DEMO
from engine.images import decode, normalize, view_of_part

import copy
import io
import itertools
import math
import random
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF

from cae import CAE, IMAGENET_MEAN, IMAGENET_STD, LN_EPS, CAEConfig, block_mask, depth_rates, sincos_positions
from train import CLIPTeacher, TargetArgs, num_masked, parameter_groups

# ----------------------------------------------------------------------------------------------------------------
# Data: masks, views, files.


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


def plain_decode(data):
    """Encoded bytes -> Pillow image."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def plain_jitter(args):
    strength = args.recipe.color_jitter
    return [T.ColorJitter(strength, strength, strength)] if strength else []


class PlainView:
    """Pillow image -> float (3, S, S) in [0, 1], bool (N): crop, flip, jitter and mask as train.Crops does them."""

    def __init__(self, args, config):
        crop = T.RandomResizedCrop(config.image_size, args.recipe.crop_scale, interpolation=Image.Resampling.BICUBIC)
        self.transform = T.Compose([crop, T.RandomHorizontalFlip(args.recipe.flip), *plain_jitter(args), T.ToTensor()])
        self.mask = partial(plain_mask, *config.grid, num_masked(args, config), args.target.min_block)

    def __call__(self, image):
        return self.transform(image), torch.from_numpy(self.mask().flatten())


class TimmView(PlainView):
    """As timm's loader does it: its transform of Pillow images, uint8 until they are on the device."""

    def __init__(self, args, config):
        from timm.data import create_transform

        super().__init__(args, config)
        self.transform = create_transform(
            config.image_size, is_training=True, use_prefetcher=True, scale=args.recipe.crop_scale,
            interpolation="bicubic", hflip=args.recipe.flip, color_jitter=args.recipe.color_jitter or None,
        )  # fmt: skip


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


def plain_batches(folder, view, batch_size, workers):
    """(images, masks) of a folder of class subfolders, for ever."""
    images = ImageFolder(folder, transform=view, loader=lambda path: plain_decode(Path(path).read_bytes()))
    loader = DataLoader(
        images, batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    for batches in itertools.repeat(loader):
        for (pixels, masks), _ in batches:
            yield pixels, masks


class SameView(torch.utils.data.Dataset):
    """The files of a folder of class subfolders again and again, with the decoder and the view of ours."""

    def __init__(self, folder, view):
        self.files, self.view = [path for path, _ in ImageFolder(folder).samples], view

    def __getitem__(self, i):
        data = Path(self.files[i % len(self.files)]).read_bytes()
        return view_of_part(self.view, data, i) or self.view(decode(data), i)


def same_view_batches(folder, view, batch_size, workers):
    """What Stream gives, by a plain DataLoader that keeps no place and skips no bad file."""
    return iter(DataLoader(SameView(folder, view), batch_size, sampler=itertools.count(), num_workers=workers))


# ----------------------------------------------------------------------------------------------------------------
# The model.


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
        """Of the patches where mask (B, N) is False."""
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
        self.norm = nn.Identity() if config.method == "cae-v2" else nn.LayerNorm(width, eps=LN_EPS)

    def forward(self, z_visible, mask):
        positions = self.positions.expand(len(mask), -1, -1)
        p_visible, p_masked = pick(positions, ~mask), pick(positions, mask)
        q = self.mask_token.expand(p_masked.shape)
        for block in self.blocks:
            q = block(q, z_visible, p_visible, p_masked)
        return self.norm(q)


class PlainDecoder(nn.Module):
    """Of CAE."""

    def __init__(self, config):
        super().__init__()
        width = config.regressor_dim
        self.register_buffer("positions", sincos_positions(*config.grid, width), persistent=False)
        self.blocks = plain_blocks(PlainBlock, width, config.regressor_heads, config.decoder_depth, config)
        self.norm, self.head = nn.LayerNorm(width, eps=LN_EPS), nn.Linear(width, config.target_dim)

    def forward(self, z_masked, mask):
        x = z_masked + pick(self.positions.expand(len(mask), -1, -1), mask)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PlainHead(nn.Module):
    """Of CAE v2."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.regressor_dim, eps=LN_EPS)
        self.linear = nn.Linear(config.regressor_dim, config.target_dim)

    def forward(self, z):
        return self.linear(self.norm(z))


class PlainCAE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.regressor_dim
        self.encoder, self.regressor = PlainEncoder(config), PlainRegressor(config)
        if config.method == "cae":
            self.decoder = PlainDecoder(config)
        else:
            self.head = PlainHead(config)
        narrow = [nn.Linear(config.dim, width), nn.LayerNorm(width, eps=LN_EPS)] if width != config.dim else []
        self.to_regressor = nn.Sequential(*narrow)

    def forward(self, images, mask, target):
        losses_of = self.cae_losses if self.config.method == "cae" else self.cae_v2_losses
        return losses_of(images, self.latents(images, mask), mask, target)

    def latents(self, images, mask, stochastic=True):
        return self.to_regressor(self.encoder(images, mask, stochastic))

    def alignment_target(self, images, mask):
        with torch.no_grad():
            return self.latents(images, ~mask, stochastic=False)[:, 1:]

    def cae_losses(self, images, z_visible, mask, target):
        losses, config = {}, self.config
        z_masked = self.regressor(z_visible[:, 1:], mask)
        if config.reconstruct_weight > 0:
            prediction, target = self.decoder(z_masked, mask).float(), target[mask]
            distance = F.cross_entropy if target.dtype == torch.int64 else F.mse_loss
            losses["loss_reconstruct"] = config.reconstruct_weight * distance(prediction.flatten(0, 1), target)
        if config.align_weight > 0:
            z_target = self.alignment_target(images, mask)
            losses["loss_align"] = config.align_weight * F.mse_loss(z_masked.float(), z_target.float())
        return dict(loss=sum(losses.values()), **losses)

    def cae_v2_losses(self, images, z_visible, mask, target):
        z, t, supervise = [], [], self.config.supervise
        if supervise != "masked":
            z, t = [z_visible], [target[:, :1], pick(target[:, 1:], ~mask)]
        if supervise != "visible":
            z, t = [*z, self.regressor(z_visible[:, 1:], mask)], [*t, pick(target[:, 1:], mask)]
        prediction = self.head(torch.cat(z, dim=1)).float()
        prediction = prediction / prediction.norm(dim=-1, keepdim=True)
        target = torch.cat(t, dim=1).float()
        distance = 1 - (prediction * target / target.norm(dim=-1, keepdim=True)).sum(dim=-1)
        losses = dict(loss=distance.mean())
        if supervise != "masked":
            losses["loss_cls"] = distance[:, 0].mean()
            losses["loss_visible"] = distance[:, 1 : z_visible.shape[1]].mean()
        if supervise != "visible":
            losses["loss_masked"] = distance[:, -z[-1].shape[1] :].mean()
        return losses


# ----------------------------------------------------------------------------------------------------------------
# Training.


def plain_teacher(teacher):
    """The same weights in float32, attention written out."""
    teacher = copy.deepcopy(teacher).float()
    if isinstance(teacher, CLIPTeacher):
        teacher.clip.model.set_attn_implementation("eager")
    return teacher


def plain_adamw(model, **options):
    """Parameter by parameter."""
    return torch.optim.AdamW(parameter_groups(model), foreach=False, fused=False, **options)


def plain_update(model, adamw, clip_grad):
    """Clipping and AdamW. The gradient's norm before it."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad, foreach=False).item()
    adamw.step()
    return norm


class PlainTraining:
    """`step(images, mask)` takes a step. The model and the teacher are on the device; dtype is autocast's."""

    def __init__(self, model, teacher, adamw, clip_grad, device, dtype):
        self.model, self.teacher, self.adamw, self.clip_grad = model, teacher, adamw, clip_grad
        self.device, self.sums = device, {}
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def step(self, images, mask):
        images, mask = images.to(self.device), mask.to(self.device)
        with torch.no_grad():
            target = self.teacher(images)
        with self.autocast:
            losses = self.model(normalize(images, IMAGENET_MEAN, IMAGENET_STD), mask, target)
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss.item()
        if not math.isfinite(losses["loss"].item()):
            raise RuntimeError("the baseline's loss is not finite")
        self.adamw.zero_grad()
        losses["loss"].backward()
        self.sums["norm"] = plain_update(self.model, self.adamw, self.clip_grad)


# ----------------------------------------------------------------------------------------------------------------
# The same weights, the same losses, the same gradients.


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
    for name, part in model.named_children():  # what no loss reaches takes no gradient
        if not all(parameter.requires_grad for parameter in part.parameters()):
            twin.get_submodule(name).requires_grad_(False)
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
    teacher = CLIPTeacher(TargetArgs(teacher=str(DEMO / "clip_teacher")), 4).eval()
    pixels = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        compare("the teacher", teacher(pixels), plain_teacher(teacher)(pixels))
    return worst
