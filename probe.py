"""How good is a frozen encoder? kNN, linear and attentive probes, for any checkpoint and any labelled data set.

    python probe.py knn --checkpoint runs/cae-v2-base --dataset ILSVRC/imagenet-1k
    accelerate launch probe.py linear --checkpoint runs/cae-v2-base
    accelerate launch probe.py attentive --kind ep --checkpoint openai/clip-vit-base-patch16

Each ends with a table and writes result.json into its run folder; where standard output is no terminal that object is
the last line, too.

Read in this order: flags, the encoder, features, heads and their optimizer, the loop, results.
"""

# engine comes first: it sets what has to be set before torch is imported.
from engine.arguments import (
    AutoFloat,
    AutoInt,
    AutoStr,
    DataArgs,
    DeviceArgs,
    Floats,
    ImagesArgs,
    Ints,
    LabelArgs,
    Mark,
    RunArgs,
    Strs,
    default_run_dir,
    fill,
    fitting_batch,
    flat,
    parse,
    require_not_negative,
    require_positive,
    require_views,
    resolve_images,
    resolve_run,
)
from engine.checkpoints import args_of_run, make_run_dir, write_config
from engine.errors import UserError, command_line, first_line, require
from engine.evaluation import KS, PUBLISHED, accuracy, evaluation_batches, knn, warn_if_seen
from engine.images import CenterCrop, crop_and_flip, crop_ratio, to_device
from engine.run import Run, join_statistics, length_of_run
from engine.seeds import permutation, seed_of
from engine.sources import open_labelled

import copy
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from einops import rearrange

from cae import LN_EPS, SIZES, CrossAttention
from convert import load_encoder, weights_of

# ----------------------------------------------------------------------------------------------------------------
# Flags: one dataclass for each sub-command, of groups that share fields. Values of None follow from others.

Scale = Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="FLOAT FLOAT", help_behavior_hint="")]
Channels = Annotated[
    tuple[float, float, float] | None, tyro.conf.arg(metavar="FLOAT FLOAT FLOAT", help_behavior_hint="")
]


@dataclass
class EncoderArgs:
    """The encoder, and what it sees."""

    checkpoint: Annotated[AutoStr, Mark.FREE] = None
    """Run folder; model/ folder; Hub id; released .pth, also owner/name::path; transformers BEiT, CLIP, DINOv2, ..."""
    random_init: Annotated[str | None, tyro.conf.arg(metavar="|".join([*SIZES, "RUN"]), help_behavior_hint="")] = None
    """An untrained encoder of this size, or of the shape of a run folder's, instead: the baseline."""
    image_size: AutoInt = None
    """Side of the square crop, in pixels. Default: the encoder's own."""
    crop_ratio: AutoFloat = None
    """Evaluation: the crop's share of the resized shorter side. Default: 0.875 (224 of 256); 1 up to 64 pixels and from
    384 on."""
    pixel_mean: Channels = None
    """Mean of the encoder's input. Default: ImageNet's, or what preprocessor_config.json says; CLIP's own for CLIP."""
    pixel_std: Channels = None
    """Standard deviation likewise."""
    beside: Annotated[Strs, Mark.FREE] = ()
    """Run folders of other results, to show as rows of the table at the end."""


@dataclass
class KNNArgs:
    """Weighted k nearest neighbours."""

    k: Ints = ()
    """Numbers of neighbours; the first is the headline. Default: 20 5 10 15 50 100 200, as far as there are images."""
    temperature: tuple[float, ...] = (0.07, 0.1, 0.2)
    """A neighbour's vote is exp(cosine / temperature). The first is the headline."""


@dataclass
class HeadArgs:
    """Training of the heads."""

    lr: Floats = ()
    """Base learning rates per 256 images. Each trains a head of its own beside the recipe's: linear and ep 0.1 (demo:
    10 and 3; data too small for the recipe's batch: the peak that it has there, at any batch), attentive 0.0125, which
    is the paper's 0.4 at 8192."""
    warmup_epochs: AutoFloat = None
    """Linear warm-up from 0. Default: a ninth of the run, 10 of 90 epochs."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 0.0
    """Weight decay."""
    trust_coefficient: float = 0.001
    """LARS (linear, ep): length of a step over length of the weights, per unit of learning rate."""
    crop_scale: Scale = None
    """Area of the random crop. Default: 0.08 1.0; up to 64 pixels 0.4 1.0."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    cache_features: bool = False
    """Extract features once, without augmentation, and train on them: a quick answer, and another recipe."""
    knn: bool = False
    """Also kNN, on features without augmentation. Always with --cache-features and --kind ep."""
    recipe_lr: float = field(default=0.0, init=False)  # no flag: the base learning rate of the recipe's own head
    eval_every: float = 1.0
    """Epochs between evaluations; there is always one at the end."""


@dataclass
class LinearArgs(HeadArgs):
    """Linear probe and its training."""

    pool: tuple[Literal["class", "mean", "both"], ...] = ("class",)
    """Features: class token, mean of the patches, or both side by side; every one with every --lr."""


@dataclass
class AttentiveArgs(HeadArgs):
    """Attentive probe and its training."""

    kind: Literal["cae", "ep"] = "cae"
    """cae: one query, cross-attention, SGD, as in the paper. ep: the efficient probe, with LARS."""
    tokens: Literal["patches", "all"] = "patches"
    """Attend to the patches, or to the class token as well (as the released code does)."""
    queries: int = 32
    """Queries of the efficient probe."""


@dataclass
class ProbeData(DataArgs):
    """Which images, and how they reach the encoder."""

    batch_size: AutoInt = None
    """Images per process and forward pass. Default: 512, or the effective batch size's share if that is less."""
    effective_batch_size: AutoInt = None
    """Images per step over all processes: features of several forward passes are joined. Default: linear 16384 (cae-v2
    base and small 8192), attentive 8192, ep 4096 (demo: 256); where a pass would be shorter than eight steps half of
    it, ... down to 32."""


@dataclass
class ProbeRun(RunArgs):
    """How long, where to, and on what."""

    epochs: AutoFloat = None
    """Passes over the data. Default: 90."""
    log_every: int = 100
    """Steps between log lines. Only there and in evaluations does the host wait for the device."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step always writes one."""


@dataclass
class KNN:
    """Weighted kNN on class token and mean of patches: no training, a first answer."""

    encoder: EncoderArgs = field(default_factory=EncoderArgs)
    data: ImagesArgs = field(default_factory=ImagesArgs)
    labels: LabelArgs = field(default_factory=LabelArgs)
    probe: KNNArgs = field(default_factory=KNNArgs)
    run: DeviceArgs = field(default_factory=DeviceArgs)


@dataclass
class Linear:
    """Linear probe, by the paper's recipe."""

    encoder: EncoderArgs = field(default_factory=EncoderArgs)
    data: ProbeData = field(default_factory=ProbeData)
    labels: LabelArgs = field(default_factory=LabelArgs)
    probe: LinearArgs = field(default_factory=LinearArgs)
    run: ProbeRun = field(default_factory=ProbeRun)


@dataclass
class Attentive:
    """Attentive probe, by the paper's recipe or as the efficient probe."""

    encoder: EncoderArgs = field(default_factory=EncoderArgs)
    data: ProbeData = field(default_factory=ProbeData)
    labels: LabelArgs = field(default_factory=LabelArgs)
    probe: AttentiveArgs = field(default_factory=AttentiveArgs)
    run: ProbeRun = field(default_factory=ProbeRun)


Command = (
    Annotated[KNN, tyro.conf.subcommand("knn")]
    | Annotated[Linear, tyro.conf.subcommand("linear")]
    | Annotated[Attentive, tyro.conf.subcommand("attentive")]
)


def resolve(args, encoder, world=1, images=None):
    """The arguments of a sub-command with every None filled in; `images` is the number of images to learn from, once it
    is known. Raises UserError."""
    args = copy.deepcopy(args)
    data, probe, run, choice = args.data, args.probe, args.run, args.encoder
    fill(choice, "image_size", encoder.image_size)
    small = choice.image_size <= 64
    size, patch = choice.image_size, encoder.patch_size
    require(size > 0 and size % patch == 0,
            f"--image-size {size} is not divisible by the encoder's patch of {patch} pixels")  # fmt: skip
    fill(choice, "crop_ratio", crop_ratio(size))
    require(0 < choice.crop_ratio <= 1, f"--crop-ratio is {choice.crop_ratio}: it must lie in (0, 1]")
    fill(choice, "pixel_mean", encoder.mean)
    fill(choice, "pixel_std", encoder.std)
    require(min(choice.pixel_std) > 0, f"--pixel-std is {choice.pixel_std}: it must be positive")
    read_results(choice.beside)
    require(args.labels.num_classes is None or args.labels.num_classes > 1, "--num-classes must be 2 or more")
    if isinstance(args, KNN):
        resolve_images(data)
        fill(data, "batch_size", 512)
        require(all(k > 0 for k in probe.k), f"--k is {probe.k}: they must be positive")
        require(probe.temperature and min(probe.temperature) > 0, "--temperature must be positive")
        return args
    task, demo = task_of(args), data.dataset == "demo"
    effective = 256 if demo else recipe_batch(task, encoder)
    resolve_run(data, run, world, args_of_run(run), batch=512, effective=effective, epochs=90.0, images=images)
    probe.recipe_lr = (DEMO_LR if demo else RECIPE_LR)[task]
    if task != "attentive" and fitting_batch(effective, images) < effective:
        # A step of LARS is a share of the weights' length, whatever the batch: few small ones would lead nowhere.
        probe.recipe_lr *= effective / data.effective_batch_size
    require(data.parts == world, f"--parts {data.parts}: BatchNorm sees the batch of a process, so that the number of "
                                 f"processes matters: use {data.parts} processes, or another --run-dir")  # fmt: skip
    require(data.effective_batch_size // world > 1,
            f"--effective-batch-size {data.effective_batch_size}: BatchNorm needs two images in every process")
    fill(probe, "crop_scale", (0.4, 1.0) if small else (0.08, 1.0))
    require_views(probe)
    require(all(lr > 0 for lr in probe.lr), f"--lr is {probe.lr}: they must be positive")
    require(0 <= probe.momentum < 1, f"--momentum is {probe.momentum}: it must lie in [0, 1)")
    require_positive(probe, "eval_every")
    require_not_negative(probe, "warmup_epochs", "weight_decay", "trust_coefficient")
    if isinstance(args, Linear):
        require(probe.pool, "--pool is empty: class, mean, both")
    elif probe.kind == "ep":
        require(probe.queries > 0 and encoder.dim % probe.queries == 0,
                f"--queries {probe.queries} does not divide the encoder's width of {encoder.dim}")  # fmt: skip
    probe.knn = probe.knn or probe.cache_features or task == "ep"
    return args


def task_of(args):
    """knn, linear, attentive or ep."""
    return "ep" if isinstance(args, Attentive) and args.probe.kind == "ep" else type(args).__name__.lower()


# ----------------------------------------------------------------------------------------------------------------
# The encoder: pixels in [0, 1] (B, 3, H, W) -> tokens (B, 1 + N, D), class token first, after its last norm.


# ----------------------------------------------------------------------------------------------------------------
# Features.


class Augment:
    """The view to train on: random resized crop and flip, nothing else. A pure function of the image and a seed.

    The released linear probe draws a crop's area and ratio once and cuts its sides to the image's: 0.518 of an image of
    500 x 375 in the mean, where the usual crop, which all others have, is 0.435.
    """

    names = ("images",)

    def __init__(self, size, scale, flip, once=False):
        from torchvision.transforms import v2

        self.transform = v2.Compose(crop_and_flip(size, scale, flip, once))

    def __call__(self, image, seed):
        """uint8 (3, H, W) -> (uint8 (3, S, S),)."""
        torch.default_generator.manual_seed(seed)
        return (self.transform(image),)


def pooled(tokens):
    """Tokens (B, 1 + N, D) -> class token and mean of the patches (B, 2, D)."""
    return torch.stack([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)


class Extractor:
    """Frozen features of images, for all sub-commands: pooled (B, 2, D), or all tokens (B, 1 + N, D) for an attentive
    probe."""

    def __init__(self, args, encoder, run):
        self.args, self.run, self.device = args, run, run.device
        self.encoder = encoder.to(run.device)
        self.encoder.mean, self.encoder.std = args.encoder.pixel_mean, args.encoder.pixel_std
        self.view = CenterCrop(args.encoder.image_size, args.encoder.crop_ratio)
        self.skipped = {"train": 0, "val": 0}  # files of this rank's part that could not be used
        if args.run.compile:
            self.encoder.compile()

    def features(self, tokens):
        """Tokens (B, 1 + N, D) -> what is kept of them."""
        return tokens if isinstance(self.args, Attentive) else pooled(tokens)

    def head_input(self, features):
        """What the heads take of it: an attentive probe the patches alone, unless --tokens says otherwise."""
        patches_only = isinstance(self.args, Attentive) and self.args.probe.tokens == "patches"
        return features[:, 1:] if patches_only else features

    def encode(self, images, select):
        """uint8 images (B, 3, S, S) on the device -> select(tokens), float32."""
        with self.run.accelerator.autocast():
            tokens = self.encoder(images.float() / 255)                                  # (B, 1 + N, D)
        return select(tokens.float())

    def batches(self, source, select, split):
        """(features, labels) of this rank's part of one pass over "train" or "val" without augmentation, with a bar."""
        what, skipped = {"train": "images to learn from", "val": "images to evaluate on"}[split], []
        batches = evaluation_batches(self.run.accelerator, source, self.view, self.args.data, what, skipped)
        for images, labels in batches:
            yield self.encode(images, select), labels
        self.skipped[split] = len(skipped)

    def extract(self, source, select, split):
        """Features (n, t, D) and labels (n) of this rank's part of a pass; n may be 0. Raises UserError."""
        tokens = 1 + (self.args.encoder.image_size // self.encoder.patch_size) ** 2
        features = select(torch.zeros(0, tokens, self.encoder.dim, device=self.device))
        labels, filled = torch.zeros(0, dtype=torch.int64, device=self.device), 0
        for x, y in self.batches(source, select, split):
            if not filled:
                room = math.ceil(source.num_images / self.run.world) if source.num_images else 2**16
                needed, free = room * x[0].numel() * 4 / 2**30, free_memory(self.device) / 2**30
                if needed > 0.9 * free:
                    raise UserError(
                        f"the features of {room} images take {needed:.1f} GiB in each process, {free:.1f} are free: "
                        "use more processes, or no --cache-features"
                    )
                features, labels = x.new_empty(room, *x.shape[1:]), y.new_empty(room)
            while filled + len(x) > len(features):  # a stream's parts are not equal
                features = torch.cat([features, torch.empty_like(features[: len(features) // 4 + 1])])
                labels = torch.cat([labels, torch.empty_like(labels[: len(labels) // 4 + 1])])
            features[filled : filled + len(x)], labels[filled : filled + len(y)] = x, y
            filled += len(x)
        return features[:filled], labels[:filled]


def free_memory(device):
    """Bytes for this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def knn_rows(extractor, bank, val, num_classes):
    """Rows of the result: weighted kNN of (features, labels) `val` in `bank`, with the arguments of the sub-command or
    its defaults. Raises UserError."""
    args, run = extractor.args, extractor.run
    asked = isinstance(args, KNN) and args.probe.k
    total = sum(run.gather([len(bank[0])]))
    ks = asked or [k for k in KS if k <= total]
    require(ks and max(ks) <= total, f"--k {max(ks or KS)} is more than the {total} images to learn from")
    temperatures = args.probe.temperature if isinstance(args, KNN) else KNNArgs.temperature
    return knn(run.accelerator, *bank, *val, num_classes, ks, temperatures)


# ----------------------------------------------------------------------------------------------------------------
# Heads and their optimizer. All train side by side on the same features; none sees another's gradient.


class LinearHead(nn.Module):
    """BatchNorm without affine, then a linear layer (CAE section "Linear probing"), on features (B, 2, D)."""

    def __init__(self, pool, dim, num_classes):
        super().__init__()
        self.pool = pool
        width = 2 * dim if pool == "both" else dim
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.linear = classifier(width, num_classes)

    def forward(self, features):
        x = {"class": features[:, 0], "mean": features[:, 1], "both": features.flatten(1)}[self.pool]
        return self.linear(self.norm(x))                                                 # (B, C)


class AttentiveHead(nn.Module):
    """CAE section "Attentive probing": one learned query attends to the tokens; no MLP, no skip; BatchNorm; linear.

    The released attentive probe cannot run: it passes arguments that its block does not take. Its projections are
    initialised here as the model's are (Xavier), the query is zero.
    """

    def __init__(self, dim, heads, num_classes):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm_q = nn.LayerNorm(dim, eps=LN_EPS)
        self.norm_k = nn.LayerNorm(dim, eps=LN_EPS)
        self.norm_v = nn.LayerNorm(dim, eps=LN_EPS)
        self.attn = CrossAttention(dim, heads)
        for linear in self.attn.children():
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.norm = nn.BatchNorm1d(dim, eps=1e-5, affine=False)
        self.linear = classifier(dim, num_classes)

    def forward(self, tokens):
        query = self.norm_q(self.query).expand(len(tokens), -1, -1)                      # (B, 1, D)
        x = self.attn(query, self.norm_k(tokens), self.norm_v(tokens))                   # (B, 1, D)
        return self.linear(self.norm(x[:, 0]))                                           # (B, C)


class EfficientHead(nn.Module):
    """The efficient probe of "Attention, Please! Revisiting Attentive Probing" (arXiv 2506.10178).

    M queries of width D score the tokens themselves, q . x / sqrt(D), without a projection of keys. Values are one
    bias-free Linear(D -> D), its channels in M groups; query m pools group m. The values are linear in the tokens, so
    the tokens are pooled first and the layer is applied to M pooled tokens instead of N.
    """

    def __init__(self, dim, queries, num_classes):
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, queries, dim))
        self.value = nn.Linear(dim, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        self.linear = classifier(dim, num_classes)

    def forward(self, tokens):
        query = self.query.expand(len(tokens), -1, -1)                                   # (B, M, D)
        x = F.scaled_dot_product_attention(query, tokens, tokens)                        # (B, M, D)
        groups = rearrange(self.value.weight, "(m c) d -> m c d", m=query.shape[1])      # (M, D / M, D)
        x = torch.einsum("bmd,mcd->bmc", x, groups).flatten(1)                           # (B, D)
        return self.linear(self.norm(x))                                                 # (B, C)


def classifier(dim, num_classes):
    """Weights normal with std 0.01, bias 0."""
    linear = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return linear


class Heads(nn.ModuleList):
    """Heads side by side: features -> logits (heads, B, C)."""

    def forward(self, features):
        return torch.stack([head(features).float() for head in self])


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates (You et al., arXiv 1708.03888), as linear probes use them.

    The gradient with its weight decay is scaled by trust_coefficient * |w| / |g|, except for parameters of one
    dimension (and where either length is 0), then enters the momentum buffer; the step is lr times the buffer.
    """

    def __init__(self, params, lr=0.0, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                  "trust_coefficient": trust_coefficient})  # fmt: skip

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad
                if w.ndim > 1:  # the others are not decayed either
                    g = g + group["weight_decay"] * w
                    trust = group["trust_coefficient"] * w.norm() / g.norm()
                    g = g * torch.where(torch.isfinite(trust) & (trust > 0), trust, 1.0)
                buffer = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                buffer.mul_(group["momentum"]).add_(g)
                w.sub_(group["lr"] * buffer)
        return loss


# Base learning rates per 256 images: 6.4 at 16384 (3.2 at 8192), 0.4 at 8192, 1.6 at 4096. LARS moves by a share of the
# weights' length, so the demo's 2,110 small steps need a larger one, chosen on 1,000 images held out of its training
# split.
RECIPE_BATCH = {"linear": 16384, "attentive": 8192, "ep": 4096}
RECIPE_LR = {"linear": 0.1, "attentive": 0.4 / 32, "ep": 0.1}
DEMO_LR = {"linear": 10.0, "attentive": 0.4 / 32, "ep": 3.0}


def recipe_batch(task, encoder):
    """RECIPE_BATCH, but for the linear probe of CAE v2 base and small, which is released with 8192 (lr 3.2)."""
    halved = encoder.kind == "cae-v2" and encoder.dim in [SIZES[s]["encoder"]["dim"] for s in ("small", "base")]
    return 8192 if task == "linear" and halved else RECIPE_BATCH[task]


def make_heads(args, encoder, num_classes):
    """Heads, their descriptions and their optimizer. The first is the recipe's own setting; the others are every
    combination of --lr (and --pool) beyond it."""
    probe, task = args.probe, task_of(args)
    rates = sorted(set(probe.lr) | {probe.recipe_lr})
    settings = [{"lr": lr} for lr in rates]
    recipe = {"lr": probe.recipe_lr}
    if task == "linear":
        pools = [pool for pool in ("class", "mean", "both") if pool in probe.pool]
        settings = [{"pool": pool, "lr": lr} for pool in pools for lr in rates]
        recipe = {"pool": "class", "lr": probe.recipe_lr}
    settings = [recipe] + [setting for setting in settings if setting != recipe]
    torch.manual_seed(args.run.seed)
    heads = Heads()
    for setting in settings:
        if task == "linear":
            head = LinearHead(setting["pool"], encoder.dim, num_classes)
        elif task == "attentive":
            head = AttentiveHead(encoder.dim, encoder.heads, num_classes)
        else:
            head = EfficientHead(encoder.dim, probe.queries, num_classes)
        heads.append(head)
    scale = args.data.effective_batch_size / 256
    groups = [{"params": list(head.parameters()), "peak": setting["lr"] * scale}
              for head, setting in zip(heads, settings, strict=True)]  # fmt: skip
    if task == "attentive":
        nesterov = probe.momentum > 0
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=probe.momentum, nesterov=nesterov,
                                    weight_decay=probe.weight_decay)  # fmt: skip
    else:
        optimizer = LARS(groups, 0.0, probe.momentum, probe.weight_decay, probe.trust_coefficient)
    return heads, settings, optimizer


class CachedStream:
    """A rank's endless stream of batches from its extracted features; the order is a pure function of (seed, pass)."""

    names = ("features", "labels")
    skipped, skipped_names = 0, ()  # reported when they were extracted

    def __init__(self, features, labels, size, seed, rank=0, world=1, state=None, first_pass=0):
        self.features, self.labels, self.size, self.seed, self.part = features, labels, size, seed, rank
        digest = hashlib.blake2b(labels.cpu().numpy(), digest_size=8).hexdigest()  # tells the images and their order
        self.layout = {"processes": world, "batch_size": size, "labels": digest}
        state = (state or {}).get(rank)
        if state and state["layout"] != self.layout:
            raise UserError(f"the checkpoint divides the data otherwise ({state['layout']} -> {self.layout}): keep the "
                            "old number of processes and --workers, or pass another --run-dir")  # fmt: skip
        self.taken = state["taken"] if state else first_pass * len(labels)
        self.seen = state["seen"] if state else 0
        self.epoch, self.order = state["pass"] if state else first_pass, None

    def state_dict(self):
        return {self.part: {"taken": self.taken, "pass": self.epoch, "seen": self.seen, "layout": self.layout}}

    def reported(self):
        """Nothing is left to report."""

    def __next__(self):
        rows, size = [], self.size
        while size:
            epoch, first = divmod(self.taken, len(self.labels))
            if epoch != self.epoch or self.order is None:
                self.epoch, self.order = epoch, permutation(len(self.labels), self.seed, epoch, self.part).long()
            piece = self.order[first : first + size]
            rows.append(piece)
            size, self.taken = size - len(piece), self.taken + len(piece)
        rows = torch.cat(rows)
        self.seen = seed_of(self.seen, rows.numpy().tobytes())
        rows = to_device(rows, self.features.device)
        return {"features": self.features[rows], "labels": self.labels[rows]}


def extract_once(extractor, train_source, val_source):
    """What is extracted once for a linear or attentive probe: (stream, features to evaluate on), each None where there
    is no need. The images to learn from are extracted if asked to, those to evaluate on unless all their tokens are
    wanted, pooled features of both for kNN, whose rows go into run.memory["knn"]."""
    args, run = extractor.args, extractor.run
    cached, attentive = args.probe.cache_features, isinstance(args, Attentive)
    needs_knn = args.probe.knn and not run.memory.get("knn")
    run.memory.setdefault("knn", None)
    stream = val = None
    if cached or needs_knn or not attentive:
        select = extractor.features if cached else pooled
        val = extractor.extract(val_source, select, "val")
        bank = extractor.extract(train_source, select, "train") if cached or needs_knn else None
        if needs_knn:
            pool = pooled if select is not pooled and attentive else (lambda x: x)
            pairs = ((pool(x), y) for x, y in (bank, val))
            run.memory["knn"] = knn_rows(extractor, *pairs, len(train_source.classes))
        if cached:
            stream = CachedStream(extractor.head_input(bank[0]), bank[1], args.data.batch_size, args.run.seed, run.rank,
                                  run.world, run.progress.data_states, run.progress.first_pass)  # fmt: skip
            val = extractor.head_input(val[0]), val[1]
        elif attentive:
            val = None
    return stream, val


# ----------------------------------------------------------------------------------------------------------------
# The loop.


def learning_rate(step, total, warmup, peak, attentive):
    """Linear from 0 over `warmup` steps, then a cosine whose last step is one short of its end. As released:
    attentive     the peak in the last step of the warm-up, towards 1e-6 (a smaller peak must not rise to it)
    linear        the peak in the first step after the warm-up, towards 0; as in MAE, and here for the efficient probe
    """
    rise, final = (warmup - 1, min(1e-6, peak)) if attentive else (warmup, 0.0)
    if step < warmup:
        return peak * step / max(rise, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def train_heads(run, extractor, train_source, val_source, length, warmup, description):
    """Train the heads of a linear or attentive probe: (settings, evaluations, kNN rows or None), or None if this run is
    complete already. Raises UserError and RunError."""
    args, asked, num_classes = extractor.args, extractor.args.probe, len(train_source.classes)
    task = task_of(args)
    heads, settings, optimizer = make_heads(args, extractor.encoder, num_classes)
    per_image = "features cached" if asked.cache_features else "random crops and flips"
    run.header(f"{task}: {len(settings)} head{'s' * (len(settings) > 1)}, {args.encoder.image_size} pixels, "
               f"{num_classes} classes, {per_image}", length)  # fmt: skip
    heads, optimizer = run.prepare(heads, optimizer)  # DDP; forward under autocast
    unwrapped = run.accelerator.unwrap_model(heads)
    # Restores what a checkpoint holds, if there is one: the heads, optimizer state, the evaluations so far and kNN, the
    # number of steps, the position in the data.
    run.resume(length, description)
    if run.progress.step >= length.steps and (run.folder / "result.json").exists():
        return None
    evaluations = run.memory.setdefault("evaluations", [])
    stream, val = extract_once(extractor, train_source, val_source)
    if stream is None:
        view = Augment(args.encoder.image_size, asked.crop_scale, asked.flip, task == "linear")
        stream = run.stream(train_source, view)
    heads.train()

    def select(tokens):
        return extractor.head_input(extractor.features(tokens))

    def evaluate(line):
        """Every head, after an epoch."""
        join_statistics(run.accelerator, unwrapped)
        heads.eval()
        if val is None:
            batches = extractor.batches(val_source, select, "val")
        else:
            batches = zip(*(x.split(args.data.batch_size) for x in val), strict=True) if len(val[1]) else []
        tops, images = accuracy(run.accelerator, unwrapped, batches, (len(settings),))
        heads.train()
        require(images, f"split {args.labels.val_split} of {val_source.name} holds no image with a label")
        losses = [loss if loss is not None and math.isfinite(loss) else None for loss in line["loss_heads"]]
        evaluations.append({"step": line["step"], "epoch": line["epoch"], "images": images, "loss": losses,
                            "accuracy": tops})  # fmt: skip
        return {"top1": tops[0][0], "top5": tops[0][1], "top1_heads": [top1 for top1, _ in tops]}

    def before_checkpoint():
        join_statistics(run.accelerator, unwrapped)  # a checkpoint holds one rank's statistics for all

    for step in run.steps(stream, evaluate=evaluate, evaluate_every=asked.eval_every,
                          before_checkpoint=before_checkpoint):  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, length.steps, warmup, group["peak"], task == "attentive")
        run.log({"lr": optimizer.param_groups[0]["lr"]})

        # The features of run.accumulation forward passes make one batch: BatchNorm sees it whole.
        features, labels = [], []
        for images, numbers in run.micro_batches():
            features.append(images if asked.cache_features else extractor.encode(images, select))
            labels.append(numbers)
        logits = heads(torch.cat(features))                                              # (heads, B, C)
        target = torch.cat(labels).expand(len(settings), -1)                             # (heads, B)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).mean(dim=1)
        run.accelerator.backward(loss.sum())  # no head's loss depends on another's weights
        optimizer.step()  # not run.update: a head may diverge by itself, for good; when all have, the run ends
        optimizer.zero_grad(set_to_none=True)
        run.record({"loss": loss[0], "loss_heads": loss}, not_finite=~torch.isfinite(loss).any())

    if not asked.cache_features:
        extractor.skipped["train"] = stream.skipped
    return settings, evaluations, run.memory["knn"]


# ----------------------------------------------------------------------------------------------------------------
# Results.


def references(task, encoder):
    """Rows of PUBLISHED: models of this width and patch with a number for the task, the same model first."""
    shape = (encoder.dim, encoder.patch_size)
    rows = [row for row in PUBLISHED if (SIZES[row[2]]["encoder"]["dim"], 16) == shape and task in row[4]]
    return [{"model": row[0], **row[4]} for row in sorted(rows, key=lambda row: row[1] != encoder.kind)]


def summary(args, settings, evaluations):
    """The trained heads' part of result.json: the recipe's own setting by itself, every head, and the best of them."""
    last = evaluations[-1]
    heads = []
    for i, setting in enumerate(settings):
        best = max(evaluations, key=lambda e: e["accuracy"][i][0])  # the first of equals
        heads.append({
            **setting,
            "top1": round(last["accuracy"][i][0], 3),
            "top5": round(last["accuracy"][i][1], 3),
            "best_top1": round(best["accuracy"][i][0], 3),
            "best_epoch": best["epoch"],
            "loss": last["loss"][i],  # None: it diverged
        })  # fmt: skip
    own, best = heads[0], max(heads, key=lambda head: head["top1"])
    augmentation = f"random crop {args.probe.crop_scale[0]} to {args.probe.crop_scale[1]}, flip {args.probe.flip}"
    return {
        "top1": own["top1"],
        "top5": own["top5"],
        "best_epoch_top1": own["best_top1"],
        "best_epoch": own["best_epoch"],
        "setting": settings[0],
        "best_of": len(heads),
        "best": best,
        "heads": heads,
        "augmentation": "none: features cached" if args.probe.cache_features else augmentation,
        "epochs": last["epoch"],
        "steps": last["step"],
        "batch": args.data.effective_batch_size,
        "images": last["images"],
    }


def headline(rows, pool="class"):
    """The first row of kNN results with this pooling: its first k and temperature are the headline."""
    return next(row for row in rows if row["pool"] == pool)


def table(result, beside):
    """The lines of the table at the end. `beside` are other results of any task."""
    def cell(value):
        return f"{value:.1f}" if isinstance(value, (int, float)) else "-"

    lines = []
    if "heads" in result:
        lines += ["", f"{'head, after the last epoch':34}{'top-1':>8}{'top-5':>8}{'best':>8}{'at epoch':>10}"]
        for i, head in enumerate(result["heads"]):
            pool = {"class": "class token, ", "mean": "mean of patches, ", "both": "both, "}.get(head.get("pool"), "")
            name = f"{pool}lr {head['lr']:g}{' (recipe)' if i == 0 else ''}{' diverged' * (head['loss'] is None)}"
            lines.append(f"{name:34}{head['top1']:8.1f}{head['top5']:8.1f}{head['best_top1']:8.1f}"
                         f"{cell(head['best_epoch']):>10}")  # fmt: skip
        if result["best_of"] > 1:
            best = result["best"]
            lines.append(f"{'best of ' + str(result['best_of']) + ', chosen on these images':34}{best['top1']:8.1f}")
    if "knn" in result:
        t = result["knn"][0]["temperature"]
        lines += ["", f"{f'kNN, temperature {t:g}':34}{'class':>8}{'mean':>8}"]
        for row in result["knn"]:
            if row["pool"] == "class" and row["temperature"] == t:
                mean = next(r for r in result["knn"] if (r["pool"], r["k"], r["temperature"]) == ("mean", row["k"], t))
                lines.append(f"{'k = ' + str(row['k']):34}{row['top1']:8.1f}{mean['top1']:8.1f}")
    columns = ["knn", "linear", "attentive", "ep"]
    named = {"knn": "kNN", "linear": "linear", "attentive": "attentive", "ep": "EP"}
    rows = [(other["encoder"], figures(other)) for other in [*beside, result]]
    rows += [(r["model"] + (" (ImageNet-1K)" if result["classes"] == 1000 else " (on ImageNet-1K)"), r)
             for r in result["reference"]]  # fmt: skip
    shown = [c for c in columns if any(c in numbers for _, numbers in rows)]
    width = max(34, *(len(name) + 2 for name, _ in rows))
    lines += ["", f"{'top-1':{width}}" + "".join(f"{named[c]:>10}" for c in shown)]
    lines += [f"{name:{width}}" + "".join(f"{cell(numbers.get(c)):>10}" for c in shown) for name, numbers in rows]
    return lines


def read_results(folders):
    """The result.json of each folder. Raises UserError."""
    results = []
    for folder in folders:
        try:
            results.append(json.loads((Path(folder) / "result.json").read_text()))
            figures(results[-1]), results[-1]["encoder"]
        except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise UserError(f"--beside {folder} holds no result.json of a probe: {first_line(error)}") from error
    return results


def figures(result):
    """{task: top-1} that a result.json holds; kNN with the class token."""
    found = {result["task"]: result["top1"]}
    if "knn" in result:
        found["knn"] = headline(result["knn"])["top1"]
    return found


def evaluate_encoder(asked):
    """One sub-command. Raises UserError and RunError."""
    fill(asked.run, "run_dir", default_run_dir(task_of(asked), asked.encoder, asked.data))
    trains = not isinstance(asked, KNN)
    with Run(asked, "cae-probe") as run:
        with run.main_process_first():
            encoder = load_encoder(asked.encoder, asked.run.seed)
            args = resolve(asked, encoder, run.world)
            require_tokens(encoder, args.encoder.image_size)
            train_source, val_source = open_labelled(args.data, args.labels, run.world if trains else 1)
            asked.labels = args.labels  # now with the split to evaluate on
            args = resolve(asked, encoder, run.world, train_source.num_images)  # a batch that fits the data
            identity = {"task": task_of(args), "weights": weights_of(encoder)}
            if trains:
                length = length_of_run(args.run, args.data, train_source)
                warmup = length.warmup(args.probe.warmup_epochs, share=9)
                run.open_folder(args, **identity)
            else:
                names = ("checkpoints", "log.jsonl", "model")
                require(not any((run.folder / name).exists() for name in names),
                        f"run folder {run.folder} holds a run of another kind: pass another --run-dir")
                make_run_dir(run.folder)
                run.lock_folder()
        if run.is_main:
            warn_if_seen(args.encoder.checkpoint, args.data)
        description = {name: getattr(encoder, name) for name in ("kind", "dim", "patch_size")}
        extractor, num_classes, found = Extractor(args, encoder, run), len(train_source.classes), None
        if trains:
            trained = train_heads(run, extractor, train_source, val_source, length, warmup, description)
            if trained:
                settings, evaluations, rows = trained
                found = {**summary(args, settings, evaluations), **({"knn": rows} if rows else {})}
        else:
            if run.is_main:
                write_config(run.folder, {**flat(args), **identity}, description)
            bank = extractor.extract(train_source, pooled, "train")
            val = extractor.extract(val_source, pooled, "val")
            rows = knn_rows(extractor, bank, val, num_classes)
            images = sum(run.gather([len(val[1])]))
            found = {"top1": rows[0]["top1"], "top5": rows[0]["top5"], "knn": rows, "images": images}
        skipped = run.gather([extractor.skipped])
        run.end()
        if not run.is_main:
            return
        if found is None:  # the run was complete before
            result = json.loads((run.folder / "result.json").read_text())
        else:
            result = run.write_result("probe.py", {
                "task": task_of(args),
                **found,
                "encoder": args.encoder.checkpoint or f"random init {args.encoder.random_init}",
                **description,
                "weights": identity["weights"],
                "image_size": args.encoder.image_size,
                "dataset": args.data.dataset,
                "split": args.data.split,
                "val_split": args.labels.val_split,
                "classes": num_classes,
                "skipped": sum(part["val"] for part in skipped),
                "train_skipped": sum(part["train"] for part in skipped),
                "seed": args.run.seed,
                "reference": references(task_of(args), encoder),
            })  # fmt: skip
        run.print_result(table(result, read_results(args.encoder.beside)), result)


def require_tokens(encoder, size):
    """The encoder must give a class token and the patches of images of this size. Raises UserError."""
    try:
        tokens = encoder(torch.zeros(1, 3, size, size)).shape
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the encoder cannot take --image-size {size}: {first_line(error)}") from error
    wanted = (1, 1 + (size // encoder.patch_size) ** 2, encoder.dim)
    require(tokens == wanted, f"the encoder's output at --image-size {size} is {tuple(tokens)}: {wanted}, a class "
                              "token and the patches, is needed")  # fmt: skip


ESSENTIALS = """
essentials:
  --checkpoint CHECKPOINT     run folder, model/ folder, id of the Hub, released .pth; or --random-init SIZE
  --dataset DATA              labelled images: an id of the Hub, a folder, a .parquet or .tar file, or demo
  --val-fraction 0.1          a tenth to evaluate on, where the data have no validation split
  --image-size PIXELS         side of the square crop
  --effective-batch-size N    images per step, over all processes (linear, attentive)
  --epochs N                  passes over the data (linear, attentive)
  --run-dir FOLDER            where the result goes

examples:
  python probe.py knn --checkpoint runs/mine --dataset my_images --val-fraction 0.1
  accelerate launch probe.py linear --checkpoint runs/cae-v2-base --lr 0.05 0.2
"""


def main():
    command, *flags = sys.argv[1:] or [""]
    kinds = {"knn": KNN, "linear": Linear, "attentive": Attentive}

    def work():
        if command in kinds:  # the flags of this one are enough
            kind = kinds[command]
            args = parse(kind, flags, prog=f"probe.py {command}", description=f"{kind.__doc__}\n{ESSENTIALS}")
        else:
            args = parse(Command, description=__doc__.partition("\n\n")[0] + f"\n{ESSENTIALS}")
        evaluate_encoder(args)

    command_line(work)


if __name__ == "__main__":
    main()
