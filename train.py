"""Pretrain a context autoencoder (CAE, CAE v2) on images, with Hugging Face Accelerate.

    accelerate launch train.py --size base --mask-ratio 0.5      CAE v2-B on streamed ImageNet-1K, CLIP ViT-B/16
    accelerate launch train.py --dataset demo                    minutes on two CPU cores, offline

Everything random about an image (its place in the pass, crop, flip, colours, mask) is a pure function of the seed, the
pass and the image's place in the data; everything random in a step (stochastic depth) one of the seed and the step.
No generator state has to survive a restart.

Read in this order: arguments and recipes, images, the network, data sets, data streams, teachers, schedules,
evaluation, the run folder, the loop.
"""

import atexit
import copy
import dataclasses
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

# Before torch starts its threads: idle ones that spin would take the cores from the loading workers (on two cores the
# demo then runs at less than half its speed).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import datasets
import fsspec
import pyarrow.parquet as pq
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from accelerate.utils import load as load_pickle
from fsspec.spec import AbstractBufferedFile
from huggingface_hub import HfFileSystem, get_session, hf_hub_download
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
from PIL import Image, ImageFile, UnidentifiedImageError
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm.auto import tqdm

from cae import (
    BAD_PICKLE,
    CAE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZES,
    CAEConfig,
    block_mask,
    fsync,
    load_model,
    patch_grid,
    patchify,
    random_mask,
)

DEMO = Path(__file__).resolve().parent / "demo"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class UserError(Exception):
    """What the user gave cannot work: one line that names the thing and the remedy; exit code 2."""


class BadFilesError(UserError):
    """Too many undecodable files: one rank may see it alone, and says so itself."""


class RunError(Exception):
    """The run itself went wrong: one line; exit code 1."""


class ServerGoneError(RunError):
    """A data server stayed away for too long: one rank may see it alone, and says so itself."""


class PeerError(RunError):
    """Another process of this run died or does not answer: nothing that waits for it may follow."""


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # a preempted machine, Slurm, Ctrl-C


# ----------------------------------------------------------------------------------------------------------------
# Arguments. Values of None follow from others; `resolve` fills them in.


# None: by the recipe, or read from the data. --help then shows the docstring's "Default: ..." alone.
AutoInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
AutoFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
AutoStr = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]


@dataclass
class ImagesArgs:
    """Which images, and who reads them. All scripts have these."""

    dataset: str = "ILSVRC/imagenet-1k"
    """Hub id; local folder (class subfolders, Parquet or webdataset .tar) or file; or `demo`."""
    split: str = "train"
    """Split of the data set."""
    image_column: AutoStr = None
    """Column with the images. Default: `image`, or the first column of images."""
    label_column: AutoStr = None
    """Column with the labels; pretraining only checks that it exists. Default: `label` or `cls`, where there is one."""
    streaming: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Read shards as a stream instead of downloading them first (Parquet, tar). Default: on for Hub ids and `demo`."""
    num_images: AutoInt = None
    """Images in the split. Default: read from the data; needed for remote tar shards only."""
    batch_size: AutoInt = None
    """Images per process and forward pass. Default: 256, or the effective batch size's share if that is less."""
    workers: AutoInt = None
    """Data loading processes per training process; 0 loads in the training process. Default: one a core, at most 8."""
    patience: float = 30.0
    """Minutes that a data server may stay away before the run ends, with a checkpoint."""


@dataclass
class DataArgs(ImagesArgs):
    """Which images, and how they reach the model."""

    effective_batch_size: AutoInt = None
    """Images per optimizer step over all processes, reached by accumulation. Default: 2048 (nano and demo: 64)."""
    parts: AutoInt = None
    """Parts that every pass is divided into, each with an order of its own; a multiple of the number of processes. A
    resumed run keeps them, on fewer processes too. Default: the number of processes."""
    shuffle_window: int = 512
    """Streams: images of a worker that are shuffled among each other."""
    interleave: int = 4
    """Streams: shards that a worker reads in turn, one image each."""


@dataclass
class LabelArgs:
    """The split to evaluate on, and the classes."""

    val_split: AutoStr = None
    """Split to evaluate on. Default: the first that exists of validation, val, valid and test."""
    num_classes: AutoInt = None
    """Number of classes. Default: read from the data; needed for tar shards only."""


@dataclass
class DeviceArgs:
    """Where to, and on what. All scripts have these."""

    run_dir: AutoStr = None
    """Run folder. Default: one in runs/, named after what is run."""
    seed: int = 0
    """Seed of everything random."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast. auto: bf16 on a GPU that has it, otherwise fp32."""
    compile: bool = False
    """Compile model and teacher, or the frozen encoder, with torch.compile."""
    timeout: float = 10.0
    """Minutes that a process waits for another one, beyond --patience, before the run ends; also while the first one
    downloads data that are not streamed."""


@dataclass
class RunArgs(DeviceArgs):
    """How long, where to, and on what."""

    epochs: AutoFloat = None
    """Passes over the data. Default: 300 (nano and demo: 10)."""
    steps: AutoInt = None
    """Optimizer steps, instead of epochs."""
    log_every: int = 20
    """Steps between log lines. Only there, in evaluations and in checkpoints does the host wait for the device."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep: int = 3
    """Last checkpoints that are kept."""
    milestone_every: int = 0
    """Steps between checkpoints that are kept for good; 0: none."""
    resume: str = "auto"
    """auto: continue the run folder; never: refuse one with checkpoints; PATH: start from this checkpoint or run."""
    resume_changed: bool = False
    """Continue with other values than the run began with; they are listed in config.json."""
    max_bad_steps: int = 10
    """A step whose loss or gradient is not finite is skipped; so many in a row end the run."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Accelerate tracker that receives every logged value, beside log.jsonl."""


@dataclass
class ModelArgs:
    """The model. Defaults are the size's and the method's (SIZES in cae.py)."""

    size: Annotated[str | None, tyro.conf.arg(metavar="|".join(SIZES), help_behavior_hint="")] = None
    """Encoder size. Default: base (demo: nano)."""
    method: Literal["cae-v2", "cae"] = "cae-v2"
    """CAE v2 (CLIP latents) or CAE (codes or pixels, with a decoder)."""
    image_size: AutoInt = None
    """Side of the square crop, in pixels. Default: 224 (nano and demo: 28)."""
    patch_size: AutoInt = None
    """Side of a patch, in pixels. Default: 16 (nano and demo: 4)."""
    regressor_dim: AutoInt = None
    """Width of regressor and decoder."""
    regressor_depth: AutoInt = None
    """Blocks of the regressor."""
    regressor_heads: AutoInt = None
    """Attention heads of regressor and decoder."""
    decoder_depth: AutoInt = None
    """Blocks of the decoder (cae)."""
    layer_scale: AutoFloat = None
    """Initial LayerScale."""
    drop_path: AutoFloat = None
    """Stochastic depth of the last block."""


@dataclass
class TargetArgs:
    """What is masked and what is predicted."""

    mask: Literal["block", "random"] = "block"
    """Block-wise or uniformly random masks."""
    mask_ratio: AutoFloat = None
    """Masked share of the patches. Default: 0.5; with cae-v2 tiny 0.15, nano and small 0.25."""
    min_block: AutoInt = None
    """Smallest area of a masked block, in patches. Default: 16 (nano and demo: 4)."""
    target: Annotated[str | None, tyro.conf.arg(metavar="clip|dalle|pixels", help_behavior_hint="")] = None
    """clip (cae-v2); DALL-E's codes or pixels (cae). Default: clip; dalle, with the demo pixels."""
    teacher: AutoStr = None
    """Hub id or folder. Default: openai/clip-vit-base-patch16 (demo/clip_teacher), facebook/flava-image-codebook."""
    normalize_pixels: bool = False
    """Pixels: normalise every patch by its own mean and variance, as MAE does."""
    supervise: Literal["visible", "masked", "both"] = "both"
    """Tokens in the loss of cae-v2. `visible` does not run the regressor."""
    align_weight: float = 2.0
    """Weight of the latent alignment, the paper's lambda (cae)."""
    reconstruct_weight: float = 1.0
    """Weight of the reconstruction (cae)."""


@dataclass
class RecipeArgs:
    """Optimisation and augmentation."""

    lr: AutoFloat = None
    """Peak at an effective batch of 2048; scaled linearly to the one in use. Default: 1.5e-3 (nano, demo: 8e-2)."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_epochs: AutoFloat = None
    """Linear warm-up from 0. Default: 1/30 of a run up to 300 epochs, 1/40 of a longer one."""
    weight_decay: float = 0.05
    """Weight decay; none on parameters of one dimension, nor on class and mask tokens."""
    weight_decay_end: AutoFloat = None
    """Weight decay at the end, reached by a cosine. Default: constant."""
    beta1: float = 0.9
    """AdamW, first moment."""
    beta2: float = 0.999
    """AdamW, second moment."""
    adam_eps: float = 1e-8
    """AdamW, epsilon."""
    clip_grad: float = 3.0
    """Largest norm of the gradient; 0 does not clip."""
    crop_scale: Annotated[
        tuple[float, float] | None, tyro.conf.arg(metavar="FLOAT FLOAT", help_behavior_hint="")
    ] = None
    """Area of the random crop. Default: 0.4 1.0 (cae-v2), 0.08 1.0 (cae); nano and demo 0.6 1.0."""
    color_jitter: AutoFloat = None
    """Strength of brightness, contrast and saturation jitter. Default: 0.4 (cae-v2), 0 (cae, nano, demo)."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    checkpoint_blocks: bool = False
    """Run the encoder's blocks again in the backward pass instead of keeping what they computed: less memory."""


@dataclass
class Args:
    """Pretrain CAE v2 or CAE. Run with `accelerate launch train.py`, on one device or many."""

    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    target: TargetArgs = field(default_factory=TargetArgs)
    recipe: RecipeArgs = field(default_factory=RecipeArgs)
    run: RunArgs = field(default_factory=RunArgs)


MASK_RATIO = {"nano": 0.25, "tiny": 0.15, "small": 0.25, "base": 0.5, "large": 0.5, "huge": 0.5}  # of CAE v2


def parse(argv=None, kind=Args, **options):
    """Command line -> Args (or another dataclass, or a choice of them). The default of --streaming depends on the data
    set, hence the second reading."""
    first = tyro.cli(kind, args=argv, config=(tyro.conf.OmitArgPrefixes,), **options)
    default = type(first)()
    default.data.streaming = local_path(first.data.dataset) is None or first.data.dataset == "demo"
    return tyro.cli(kind, args=argv, default=default, config=(tyro.conf.OmitArgPrefixes,), **options)


def default(group, name, value):
    if getattr(group, name) is None:
        setattr(group, name, value)


def require(condition, message):
    if not condition:
        raise UserError(message)


def require_positive(group, *names):
    for name in names:
        value = getattr(group, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} is {value}: it must be positive")


def require_not_negative(group, *names):
    for name in names:
        value = getattr(group, name) or 0
        require(value >= 0, f"--{name.replace('_', '-')} is {value}: it must not be negative")


def require_views(group):
    """The two values that crop_and_flip takes."""
    low, high = group.crop_scale
    require(0 < low <= high <= 1, f"--crop-scale is {low} {high}: two areas with 0 < first <= second <= 1")
    require(0 <= group.flip <= 1, f"--flip is {group.flip}: it must lie between 0 and 1")


def resolve(args, world=1):
    """Args with every None filled in from the recipe of its size, method and data set. Raises UserError.

    The result has numbers throughout (but for what only the data know), and is what config.json holds.
    """
    args = copy.deepcopy(args)
    model, data, target, recipe, run = args.model, args.data, args.target, args.recipe, args.run
    demo, v2_method = data.dataset == "demo", model.method == "cae-v2"
    default(model, "size", "nano" if demo else "base")
    require(model.size in SIZES, f"--size {model.size} does not exist: choose from {', '.join(SIZES)}")
    small = demo or model.size == "nano"  # small images, short runs
    default(model, "image_size", 28 if small else 224)
    default(model, "patch_size", 4 if small else 16)
    default(target, "mask_ratio", MASK_RATIO[model.size] if v2_method else 0.5)
    default(target, "min_block", 4 if small else 16)
    default(target, "target", "clip" if v2_method else "pixels" if demo else "dalle")
    require(
        target.target in (("clip",) if v2_method else ("dalle", "pixels")),
        f"--method {model.method} cannot predict --target {target.target}: cae-v2 takes clip, cae dalle or pixels",
    )
    clip = str(DEMO / "clip_teacher") if demo else "openai/clip-vit-base-patch16"
    require(target.teacher is None or target.target != "pixels", "--teacher has no use with --target pixels: drop one")
    default(target, "teacher", {"clip": clip, "dalle": "facebook/flava-image-codebook", "pixels": ""}[target.target])
    default(recipe, "lr", 8e-2 if small else 1.5e-3)
    default(recipe, "crop_scale", (0.6, 1.0) if small else (0.4, 1.0) if v2_method else (0.08, 1.0))
    default(recipe, "color_jitter", 0.4 if v2_method and not small else 0.0)
    default(recipe, "weight_decay_end", recipe.weight_decay)
    default(run, "run_dir", f"runs/{model.method}-{model.size}{'-demo' if demo else ''}")
    resolve_run(data, run, world, batch=256, effective=64 if small else 2048, epochs=10.0 if small else 300.0)
    require(0 < target.mask_ratio < 1, f"--mask-ratio is {target.mask_ratio}: it must lie between 0 and 1")
    require_positive(target, "min_block")
    require_positive(recipe, "lr", "adam_eps")
    require_not_negative(recipe, "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip_grad")
    for name in ("beta1", "beta2"):
        require(0 <= getattr(recipe, name) < 1, f"--{name} is {getattr(recipe, name)}: it must lie in [0, 1)")
    require_views(recipe)
    require(0 <= recipe.color_jitter <= 1, f"--color-jitter is {recipe.color_jitter}: it must lie between 0 and 1")
    config = model_config(args)
    masked = num_masked(args, config)
    require(
        0 < masked < config.num_patches,
        f"--mask-ratio {target.mask_ratio} masks {masked} of {config.num_patches} patches: "
        "at least one must be masked and one visible",
    )
    return args


def resolve_run(data, run, world, batch, effective, epochs):
    """Batch sizes and length of a training run, in place, from the recipe's where None. Raises UserError."""
    require(run.epochs is None or run.steps is None, "--epochs and --steps are both given: give one")
    if run.steps is None:
        default(run, "epochs", epochs)
    resolve_images(data)
    given, old = data.effective_batch_size is not None, values_of_run(run)
    default(data, "parts", old.get("parts", world))
    fits = [str(n) for n in range(1, data.parts + 1) if data.parts % n == 0]
    require(
        data.parts > 0 and data.parts % world == 0,
        f"--parts {data.parts}{' of the run that is resumed' if old.get('parts') == data.parts else ''} cannot be "
        f"shared by {world} processes: use {' or '.join(fits) or 'a positive number'}",
    )
    default(data, "batch_size", old.get("batch_size"))
    default(data, "effective_batch_size", effective)
    default(data, "batch_size", max(1, min(batch, data.effective_batch_size // data.parts)))
    together = data.batch_size * data.parts
    nearest = together * max(1, round(data.effective_batch_size / together))
    if not given:  # the recipe's, as near as this number of processes comes to it
        data.effective_batch_size = nearest
    require_positive(data, "effective_batch_size", "shuffle_window", "interleave")
    require_positive(run, "log_every", "checkpoint_every", "keep", "max_bad_steps", "timeout", "steps", "epochs")
    require_not_negative(run, "milestone_every")
    require(
        data.effective_batch_size % together == 0,
        f"--effective-batch-size {data.effective_batch_size} is not a multiple of --batch-size {data.batch_size} times "
        f"{data.parts} {'processes' if data.parts == world else 'parts'}: try {nearest}",
    )
    require(
        run.tracker == "none" or find_spec(run.tracker) is not None,
        f"--tracker {run.tracker} is not installed: pip install {run.tracker}",
    )


def resolve_images(data):
    """What every script asks of its ImagesArgs. Raises UserError."""
    default(data, "workers", min(8, cores_per_process()))
    require_not_negative(data, "workers")
    require_positive(data, "patience", "batch_size")


def model_config(args, **overrides):
    """The CAEConfig of these arguments. Raises UserError."""
    names = [f.name for f in dataclasses.fields(ModelArgs) if f.name not in ("size", "method")]
    fields = {n: getattr(args.model, n) for n in names if getattr(args.model, n) is not None}
    if args.model.method == "cae-v2":
        fields["supervise"] = args.target.supervise
    else:
        fields |= {"align_weight": args.target.align_weight, "reconstruct_weight": args.target.reconstruct_weight}
    try:
        return CAEConfig.from_size(args.model.size, args.model.method, **fields, **overrides)
    except ValueError as error:
        raise UserError(str(error)) from error


def num_masked(args, config):
    """ceil(mask ratio * N), so 0.15 of 196 is 30."""
    return math.ceil(args.target.mask_ratio * config.num_patches - 1e-9)


def cores_per_process():
    """This process's share of the cores that may be used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def flat(args):
    """{flag name: value} of all groups."""
    return {k: v for group in dataclasses.asdict(args).values() for k, v in group.items()}


def name_run(task, origin, data):
    """Default run folder of probe.py and finetune.py, runs/TASK-ORIGIN-DATA; `origin` is the group of --checkpoint and
    --random-init. Raises UserError."""
    require((origin.checkpoint is None) != (origin.random_init is None), "give either --checkpoint or --random-init")
    name, data = origin.checkpoint or f"random-{origin.random_init}", Path(data.dataset).stem
    name = re.sub(r"[^\w.-]+", "-", name.removeprefix("runs/")).strip("-.")
    return f"runs/{task}-{name}" + f"-{data}" * (data not in name)


def key(*parts):
    """A 63-bit seed that is a pure function of its integer parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def permutation(n, *parts):
    """A permutation of n that is a pure function of its integer parts, as a list."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(key(*parts))).tolist()


# ----------------------------------------------------------------------------------------------------------------
# Images: bytes -> uint8 RGB -> crop.

ImageFile.LOAD_TRUNCATED_IMAGES = True  # what is there of a cut-off file is used, the rest is grey or black
# A JPEG of 600 bytes may claim 65,500 x 65,500 pixels, which would be 12 GB. A camera's 100 megapixels are 0.3 GB.
MAX_PIXELS = 2**27
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Image.open refuses more than twice as many, before any of them is decoded
# Not all that Pillow knows: for EPS it would start Ghostscript, which executes what the file says.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
# Segments that may stand before the size of a JPEG: tables, comments, application data.
BEFORE_SIZE = {bytes((0xFF, kind)) for kind in (0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0))}


def jpeg_pixels(data):
    """The number of pixels that a JPEG claims to have, infinite where its header is out of order. Pillow's way to it
    would cost up to 8 % of the decoding, this one 0.3 %."""
    at = 2
    while data[at : at + 2] in BEFORE_SIZE:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if data[at : at + 2] not in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"):  # baseline, extended, progressive
        return math.inf
    return int.from_bytes(data[at + 5 : at + 7], "big") * int.from_bytes(data[at + 7 : at + 9], "big")


def decode(data):
    """Encoded bytes of any common format -> uint8 (3, H, W). Raises an exception of any kind for what is no image, or
    claims more than MAX_PIXELS.

    torchvision's decoder for JPEG; Pillow for all else and for what that decoder refuses (truncated or odd files).
    """
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
        return TF.pil_to_tensor(image.convert("RGB"))


def crop_and_flip(size, scale, flip):
    """What every view to learn from begins with: random resized crop, bicubic, and horizontal flip."""
    bicubic = v2.InterpolationMode.BICUBIC
    return [v2.RandomResizedCrop(size, scale, interpolation=bicubic, antialias=True), v2.RandomHorizontalFlip(flip)]


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


class Crops:
    """The student's view: one random crop of an image, and its mask. A pure function of the image and a seed.

    The released code jitters colours before it crops. Here the crop is jittered, at a fifth of the cost for an image
    of 500 x 375: contrast is then relative to the crop's mean grey instead of the whole image's.
    """

    names = ("images", "visible", "masked")

    def __init__(self, args, config):
        self.grid, self.num_masked = config.grid, num_masked(args, config)
        self.mask, self.min_block = args.target.mask, args.target.min_block
        jitter = [ColorJitter(args.recipe.color_jitter)] if args.recipe.color_jitter else []
        crop = crop_and_flip(config.image_size, args.recipe.crop_scale, args.recipe.flip)
        self.transform = v2.Compose([*crop, *jitter])

    def __call__(self, image, seed):
        """uint8 (3, H, W) -> uint8 (3, S, S), visible (Nv), masked (Nm)."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also queue a call for a GPU, each time
        image = self.transform(image)
        if self.mask == "block":
            visible, masked = block_mask(1, self.grid, self.num_masked, min_block=self.min_block)
        else:
            visible, masked = random_mask(1, self.grid, self.num_masked)
        return image, visible[0], masked[0]


class CenterCrop:
    """The view for evaluation: the shorter side to size / ratio, bicubic, then the centre. Ratio 0.875 is the 256 for
    224 of ImageNet; 1 cuts off nothing but what is not square."""

    names = ("images",)

    def __init__(self, size, ratio):
        self.transform = v2.Compose([
            v2.Resize(round(size / ratio), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
        ])  # fmt: skip

    def __call__(self, image, seed):
        """uint8 (3, H, W) -> (uint8 (3, S, S),). The seed has no use."""
        longest = 8 * min(image.shape[-2:])  # of 65,500 x 1 pixels the middle alone: resized, the whole were 13 GB
        return (self.transform(TF.center_crop(image, [min(side, longest) for side in image.shape[-2:]])),)


# ----------------------------------------------------------------------------------------------------------------
# The network: what may pass is tried again, by those who know where to go on (Shards, single files, opening).

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts
TAR_BLOCK = 16 << 20


def growing_pauses(minutes=math.inf):
    """Seconds to wait between attempts, each twice the one before: 1, 2, 4, ... 60, 60, for so many minutes."""
    pause, total = FIRST_PAUSE, 0.0
    while total < 60 * minutes:
        yield pause
        pause, total = min(2 * pause, LONGEST_PAUSE), total + pause


class NetworkError(ConnectionError):
    """A failure that may pass: no connection, silence, an answer cut off, a server that is busy (408, 429, 5xx)."""

    def __init__(self, message, after=0):
        super().__init__(message)
        self.after = after  # seconds that the server asked to be left alone


@contextmanager
def network_errors(what):
    """Failures of the network that may pass become NetworkErrors that say what was asked for."""
    try:
        yield
    except HTTPError as error:
        answer = getattr(error, "response", None)
        if answer is not None and answer.status_code not in (408, 429) and answer.status_code < 500:
            raise
        text = f"{type(error).__name__}: {error}" if answer is None else f"HTTP {answer.status_code}"
        after = "" if answer is None else answer.headers.get("Retry-After", "")
        raise NetworkError(f"{text} ({what})", int(after) if after.isdigit() else 0) from error


class HubFile(AbstractBufferedFile):
    """A file of the Hub, read by ranges. Each must come whole: where an answer is cut off without a word on its length,
    tarfile takes that for the end of the shard, and its other images are never seen.

    One attempt for each range: huggingface_hub's own files pause up to 23 seconds in each call, those of datasets up to
    20 minutes, unseen by whoever counts for how long a server has been away.
    """

    def _fetch_range(self, start, end):
        with network_errors(self.path.split("/")[-1]):
            headers = {"Range": f"bytes={start}-{end - 1}", **build_hf_headers(token=self.fs.token)}
            silence = hub_constants.HF_HUB_DOWNLOAD_TIMEOUT  # 10 seconds, or the environment variable of that name
            answer = get_session().get(self.fs.url(self.path), headers=headers, timeout=silence)
            hf_raise_for_status(answer)
            data = answer.content if answer.status_code == 206 else answer.content[start:end]
            if len(data) != end - start:
                raise NetworkError(f"{len(data)} bytes came instead of {end - start} ({self.path.split('/')[-1]})")
            return data


class HubFiles(HfFileSystem):
    """What fsspec opens for hf://, and so datasets too.

    All instances share what they know of repositories and sizes, so that no worker has to list files again:
    huggingface_hub sets no limit on silence there.
    """

    known = {}  # noqa: RUF012

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        place = self.endpoint, self.token
        self.dircache, self._repo_and_revision_exists_cache = self.known.setdefault(place, ({}, {}))

    def _open(self, path, mode="rb", block_size=None, revision=None, **options):
        if mode != "rb":
            return super()._open(path, mode, block_size=block_size, revision=revision, **options)
        # datasets asks for 0, one long answer, where it reads from beginning to end (tar). Large blocks cost few more
        # requests, and can be checked and asked for again.
        block_size = self.block_size if block_size is None else block_size
        with network_errors(path.split("/")[-1]):
            path = self.resolve_path(path, revision=revision).unresolve()
            return HubFile(self, path, mode, TAR_BLOCK if block_size == 0 else block_size, **options)


fsspec.register_implementation("hf", HubFiles, clobber=True)


class Outage:
    """Waits for a data server: growing pauses, until it has given nothing for `minutes`."""

    def __init__(self, name, minutes):
        self.name, self.minutes, self.since = name, minutes, None

    def wait(self, error):
        """Pause before the next attempt. Raises the error if it will not pass, ServerGoneError after the limit."""
        if not isinstance(error, NetworkError):
            raise error
        now, first = time.monotonic(), self.since is None
        if first:
            self.since, self.pauses = now, growing_pauses()
        left = self.since + 60 * self.minutes - now
        if left <= 0:
            raise ServerGoneError(
                f"the server of data set {self.name} has been away for {self.minutes:g} minutes (--patience): {error}; "
                "give the same command again when it is back"
            ) from error
        pause = min(max(next(self.pauses), error.after), left)
        if first:
            print(f"waiting for the server of data set {self.name}, {pause:.0f} s at first: {error}",
                  file=sys.stderr, flush=True)  # fmt: skip
        time.sleep(pause)
        trainer = multiprocessing.parent_process()
        if trainer is not None and not trainer.is_alive():
            os._exit(1)  # nobody waits for this loading process any more

    def over(self):
        """Data have come."""
        if self.since is not None:
            seconds = time.monotonic() - self.since
            print(f"data set {self.name} comes again, after {seconds:.0f} s", file=sys.stderr, flush=True)
            self.since = None


def patiently(work, name, minutes):
    """work(), again and again while the network fails. Raises ServerGoneError."""
    outage = Outage(name, minutes)
    while True:
        try:
            with network_errors(name):
                result = work()
            outage.over()
            return result
        except Exception as error:
            outage.wait(error)


# ----------------------------------------------------------------------------------------------------------------
# Data sets: opening one, with every mistake named.


@dataclass
class Source:
    """An opened data set. `data` yields {image_column: {"bytes", "path"}, ...}; decoding is ours, so that one bad file
    does not end an iterator."""

    data: datasets.Dataset | datasets.IterableDataset
    image_column: str
    label_column: str | None
    num_images: int | None
    name: str
    classes: list | None = None
    """Class names, in the order of their numbers; None where labels are not read."""
    patience: float = 30.0
    """Minutes to wait for a server that is away."""
    files: list = field(default_factory=list)
    """The Parquet files of a stream that is dealt by file."""

    @property
    def streaming(self):
        return isinstance(self.data, datasets.IterableDataset)

    def label(self, row):
        """The number of a row's class. Raises ValueError."""
        value = row[self.label_column]
        number = self.classes.index(value) if isinstance(value, str) and value in self.classes else value
        if not isinstance(number, int) or not 0 <= number < len(self.classes):
            raise ValueError(f"label {value!r} is none of the {len(self.classes)} classes")
        return int(number)


def local_path(dataset):
    """Path of a local data set; None for a Hub id. Raises UserError for a path that does not exist."""
    if dataset == "demo":
        return DEMO / "fashion_mnist"
    if not dataset:
        raise UserError("--dataset is empty: give a Hub id, a folder, a file, or demo")
    path = Path(dataset).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", dataset):
        raise UserError(f"data set {dataset} does not exist: no such folder or file, and not an id of the Hub")
    return None


def open_builder(dataset, patience=30.0):
    """The datasets builder of a Hub id, folder or file. Raises UserError."""
    path = local_path(dataset)
    try:
        if path is None:
            # no connection at all, the first time, is a mistake: datasets' ConnectionError is not waited for
            return patiently(partial(datasets.load_dataset_builder, dataset), dataset, patience)
        if path.is_dir():
            return datasets.load_dataset_builder(str(path))
        kind = {".parquet": "parquet", ".tar": "webdataset"}.get(path.suffix)
        if kind is None:
            raise UserError(f"data set {path} is neither a folder nor a .parquet or .tar file")
        return datasets.load_dataset_builder(kind, data_files={"train": str(path)})
    except (GatedRepoError, datasets.exceptions.DatasetNotFoundError) as error:
        if isinstance(error, GatedRepoError) or "gated" in str(error):
            raise UserError(
                f"data set {dataset} is gated: accept its terms at https://huggingface.co/datasets/{dataset} "
                "and log in with `hf auth login` (or set HF_TOKEN)"
            ) from error
        raise UserError(
            f"data set {dataset} was not found on the Hub (nor as a local folder): check the id; "
            "a private one needs `hf auth login`"
        ) from error
    except (datasets.exceptions.DatasetsError, FileNotFoundError) as error:
        if path is None:
            raise UserError(f"data set {dataset} cannot be read: {first_line(error)}") from error
        raise UserError(f"data set folder {path} holds no images, Parquet or .tar files") from error
    except (ServerGoneError, HTTPError, OSError) as error:
        raise UserError(f"data set {dataset} cannot be reached: {first_line(error)}") from error
    except RuntimeError as error:  # a script of its own, which datasets no longer executes
        raise UserError(f"data set {dataset} cannot be read: {first_line(error)}") from error


def choose_columns(args, features):
    """(image column, label column or None) of the data set's features. Raises UserError, listing what there is."""
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image_column = args.image_column or ("image" if "image" in features else images[0] if images else None)
    label_column = args.label_column or next((name for name in ("label", "cls") if name in features), None)
    there_are = f"the columns of {args.dataset} are {', '.join(features)}"
    if image_column is None:
        raise UserError(f"no column holds images; pass --image-column if one holds encoded bytes: {there_are}")
    for flag, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column is not None and column not in features:
            raise UserError(f"{flag} {column} does not exist: {there_are}")
    feature = features[image_column]
    is_struct = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
    if not isinstance(feature, datasets.Image) and not is_struct and getattr(feature, "dtype", "") not in BYTES:
        raise UserError(f"--image-column {image_column} holds no images but {feature}: {there_are}")
    return image_column, label_column


BYTES = ("binary", "large_binary", "binary_view")  # encoded images without the metadata that says so


def read_classes(args, data, column, features, num_classes=None):
    """Class names of an opened split: of its features or, where these name none, of the labels themselves (numbers name
    themselves). Raises UserError."""
    if column is None:
        raise UserError(
            f"data set {args.dataset} has no labels: pass --label-column, or a folder of class subfolders; "
            f"its columns are {', '.join(data.features)}"
        )
    feature = features[column]
    kind = getattr(feature, "dtype", "")
    if isinstance(feature, datasets.ClassLabel):
        require(
            num_classes in (None, feature.num_classes),
            f"--num-classes is {num_classes}, data set {args.dataset} has {feature.num_classes} classes",
        )
        return list(feature.names)
    if not kind.startswith(("int", "uint", "string", "large_string")):
        raise UserError(f"--label-column {column} holds no class labels but {feature}")
    if num_classes is not None and "string" not in kind:
        return [str(number) for number in range(num_classes)]
    if isinstance(data, datasets.Dataset):
        labels = data.unique(column)
    elif "__url__" in data.features:  # a tar has to be read whole for its labels
        raise UserError(f"the tar shards of {args.dataset} do not name their classes: pass --num-classes"
                        + (", and numbers as labels" if "string" in kind else ""))  # fmt: skip
    else:  # Parquet: the one column
        labels = [row[column] for row in data.select_columns(column)]
    labels = {label for label in labels if label is not None}
    return sorted(labels) if "string" in kind else [str(number) for number in range(max(labels, default=-1) + 1)]


def open_labelled(data, labels, world=1, learn=True):
    """ImagesArgs, LabelArgs -> the Source to learn from (None if not to `learn`) and the one to evaluate on; they agree
    on their classes. Raises UserError."""
    if labels.val_split is None:
        splits = list(open_splits(data.dataset, data.patience))
        others = [name for name in ("validation", "val", "valid", "test") if name in splits and name != data.split]
        if not others:
            raise UserError(f"data set {data.dataset} has no split to evaluate on: it has {', '.join(splits)}; "
                            "pass --val-split")  # fmt: skip
        labels.val_split = others[0]
    val = open_source(dataclasses.replace(data, split=labels.val_split, num_images=None), 1, True, labels.num_classes)
    if not learn:
        return None, val
    train = open_source(data, world, True, labels.num_classes)
    named = isinstance(val.data.features[val.label_column], datasets.ClassLabel)
    if set(val.classes) - set(train.classes) or (named and train.classes != val.classes):
        raise UserError(
            f"the splits of data set {data.dataset} disagree on their classes: {data.split} has {len(train.classes)} "
            f"({', '.join(train.classes[:3])}, ...), {labels.val_split} has {len(val.classes)} "
            f"({', '.join(val.classes[:3])}, ...)"
        )
    if not (train.streaming or val.streaming):  # what is really there
        surplus = set(val.data.unique(val.label_column)) - set(train.data.unique(train.label_column)) - {None}
        names = [val.classes[n] if isinstance(n, int) and 0 <= n < len(val.classes) else str(n) for n in surplus]
        require(
            not names,
            f"split {labels.val_split} of data set {data.dataset} has {len(names)} classes of which split {data.split} "
            f"has no image: {', '.join(sorted(names)[:5])}",
        )
    return train, dataclasses.replace(val, classes=train.classes)


def open_splits(dataset, patience=30.0):
    """{split: stream} of a data set. Raises UserError."""
    builder = open_builder(dataset, patience)
    try:
        return patiently(builder.as_streaming_dataset, dataset, patience)
    except Exception as error:  # every reader has its own way to refuse a file
        raise UserError(f"data set {dataset} cannot be read: {first_line(error)}") from error


def open_source(args, slots=1, labelled=False, num_classes=None):
    """ImagesArgs -> Source. `slots` is how many processes share a stream; `labelled` asks for classes. Raises
    UserError."""
    builder, local = open_builder(args.dataset, args.patience), local_path(args.dataset) is not None
    streams = args.streaming and (not local or builder.name in ("parquet", "webdataset"))  # local images: in place

    def look():
        splits = builder.as_streaming_dataset()  # for a look at schema and first row before any download
        if args.split not in splits:
            raise UserError(f"data set {args.dataset} has no split {args.split!r}: it has {', '.join(splits)}")
        data = splits[args.split]
        image_column, label_column = choose_columns(args, data.features or {})
        if isinstance(data.features[image_column], datasets.Image):
            data = data.decode(False)
        data = data.cast_column(image_column, datasets.Image(decode=False))
        first = next(iter(data), None)
        if first is None:
            raise UserError(f"split {args.split} of data set {args.dataset} holds no images")
        if first[image_column] is not None:
            first[image_column]["bytes"]
        files = list(builder.config.data_files[args.split]) if streams and builder.name == "parquet" else []
        if not streams:
            builder.download_and_prepare()
            data = builder.as_dataset(split=args.split).cast_column(image_column, datasets.Image(decode=False))
        # Parquet is dealt by row group: always on disk; on the Hub, where a footer costs a request, if files are few.
        elif local or data.num_shards < slots * max(args.workers or 1, 1):
            data, files = data.reshard(), []
        return data, image_column, label_column, files

    try:
        data, image_column, label_column, files = patiently(look, args.dataset, args.patience)
    except UserError:
        raise
    except Exception as error:  # every reader has its own way to refuse a file
        raise UserError(f"data set {args.dataset} cannot be read: {first_line(error)}") from error
    count = (args.num_images or count_images(builder, args.split)) if streams else len(data)
    parts, kind = (data.num_shards, "shards") if streams else (len(data), "images")
    if parts < slots:
        raise UserError(
            f"data set {args.dataset} has {parts} {kind}, fewer than the {slots} processes that share them: "
            "use fewer processes" + (", more or smaller shards, or --no-streaming" if streams else "")
        )
    features = data.features
    if labelled and builder.name == "parquet" and local:  # datasets takes the first split's features for all
        features = datasets.Features.from_arrow_schema(pq.read_schema(builder.config.data_files[args.split][0]))
    read = partial(read_classes, args, data, label_column, features, num_classes)
    try:
        classes = patiently(read, args.dataset, args.patience) if labelled else None
    except ServerGoneError as error:
        raise UserError(str(error)) from error
    return Source(data, image_column, label_column, count, args.dataset, classes, args.patience, files)


def count_images(builder, split):
    """Images of a streamed split: from its metadata, from Parquet footers or tar headers on disk; None if unknown."""
    info = (builder.info.splits or {}).get(split)
    if info is not None and info.num_examples:
        return info.num_examples
    files = [str(f) for f in (builder.config.data_files or {}).get(split, ["unknown"])]
    if not all(Path(f).is_file() for f in files):
        return None
    if builder.name == "parquet":
        return sum(pq.read_metadata(f).num_rows for f in files)
    count = 0
    for name in files:
        with tarfile.open(name) as tar:  # one sample is a run of members that share their path up to the first dot
            keys = [re.match(r"((?:.*/|)[^.]+)[.]", m.name) for m in tar if m.isfile()]
        count += sum(1 for _ in itertools.groupby(k.group(1) for k in keys if k))
    return count


def first_line(error):
    if isinstance(error, (pickle.UnpicklingError, EOFError)):  # PyTorch's own would recommend to switch safety off
        return BAD_PICKLE
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


# ----------------------------------------------------------------------------------------------------------------
# Data streams. A rank's stream is its part of pass 0, then of pass 1, and so on; it never ends and drops nothing.
# Workers send chunks: up to a batch of prepared images, fewer where a file could not be decoded or a pass ends. The
# training process joins chunks to batches. Every chunk says at which place its worker stands "after" it.


def read_file(path):
    with fsspec.open(path, "rb") as file:
        return file.read()


def load_chunk(source, prepare, seed, wanted):
    """Read, decode and prepare images. wanted: (pass, image id, row) triples -> chunk.

    A chunk has one list for each of prepare.names, "ids" [(pass, image id)], "labels" where the source has classes, and
    "skipped": what could not be decoded or has no label.
    """
    labelled = ("labels",) if source.classes else ()
    chunk = {name: [] for name in (*prepare.names, "ids", *labelled, "skipped")}
    for epoch, image_id, row in wanted:
        path = None
        try:
            image = row[source.image_column] or {}
            data, path = image.get("bytes"), image.get("path")
            require(data is not None or path, "the row holds no image")
            if data is None:  # a file of its own, here or on the Hub
                data = patiently(partial(read_file, path), source.name, source.patience)
            tensor = decode(data)
            label = torch.tensor(source.label(row)) if labelled else None
        except ServerGoneError:
            raise
        except Exception as error:  # decoders raise whatever they like
            chunk["skipped"].append(f"{path or 'image'} (id {image_id}): {first_line(error)}")
            continue
        for name, value in zip(prepare.names, prepare(tensor, key(seed, epoch, image_id)), strict=True):
            chunk[name].append(value)
        if labelled:
            chunk["labels"].append(label)
        chunk["ids"].append(torch.tensor([epoch, image_id]))
    return {name: torch.stack(values) if values and name != "skipped" else values for name, values in chunk.items()}


class RowChunks(torch.utils.data.Dataset):
    """Data on disk: chunk j of a rank's stream. A pass is a permutation keyed by (seed, pass), of which rank r takes
    every world-th image from the r-th on: the parts differ by at most one image."""

    def __init__(self, source, prepare, size, seed, rank, world, first_pass):
        self.source, self.prepare, self.size, self.seed = source, prepare, size, seed
        self.rank, self.world, self.first_pass = rank, world, first_pass
        self.part = len(range(rank, source.num_images, world))
        self.orders = {}

    def order(self, epoch):
        if epoch not in self.orders:  # two are kept: a chunk may lie in two passes
            kept = {e: order for e, order in self.orders.items() if e == epoch - 1}
            order = permutation(self.source.num_images, self.seed, epoch)[self.rank :: self.world]
            self.orders = {**kept, epoch: order}
        return self.orders[epoch]

    def __getitem__(self, j):
        places = [divmod(i, self.part) for i in range(j * self.size, (j + 1) * self.size)]
        rows = [(self.first_pass + epoch, self.order(self.first_pass + epoch)[i]) for epoch, i in places]
        wanted = ((epoch, row, self.source.data[row]) for epoch, row in rows)
        return {**load_chunk(self.source, self.prepare, self.seed, wanted), "after": j + 1}


class ShardChunks(torch.utils.data.IterableDataset):
    """Streams: the chunks of one worker, pass after pass; an empty chunk marked "end" closes each pass.

    Shards are dealt anew for every pass: of a permutation keyed by (seed, pass), rank r takes every world-th shard
    from the r-th on, and worker w of them every workers-th. A worker reads `interleave` shards in turn and shuffles
    within windows, by a permutation keyed by (seed, pass, first image of the window): the whole state is a position.
    """

    def __init__(self, source, prepare, size, seed, rank, world, worker, workers, window, interleave):
        self.source, self.prepare, self.size, self.seed = source, prepare, size, seed
        self.rank, self.world, self.worker, self.workers = rank, world, worker, workers
        self.window, self.interleave = window, interleave
        self.start = self.beginning(0)

    def beginning(self, epoch):
        return {"epoch": epoch, "open": [], "next": 0, "turn": 0, "offset": 0}

    def shards(self, epoch):
        """Numbers of the shards that this worker reads in a pass, in order."""
        order = permutation(self.source.data.num_shards, self.seed, epoch)
        return order[self.rank :: self.world][self.worker :: self.workers]

    def rows(self, shard, row):
        """The rows of a shard from `row` on; where the network fails, the shard is opened anew at the row that comes
        next. Raises ServerGoneError, and BadFilesError for a shard that cannot be read."""
        outage = Outage(self.source.name, self.source.patience)
        while True:
            try:
                for example in self.read(shard, row):
                    outage.over()
                    yield example
                    row += 1
                return
            except NetworkError as error:
                outage.wait(error)
            except Exception as error:  # every reader has its own way to refuse a file
                raise BadFilesError(
                    f"shard {shard} of data set {self.source.name} cannot be read beyond its row {row}: "
                    f"{first_line(error)}"
                ) from error

    def read(self, shard, row):
        """A Parquet file is read from the row group of `row` on, anything else from its beginning."""
        data = self.source.data.shard(num_shards=self.source.data.num_shards, index=shard)
        if not row or not self.source.files:
            return iter(data.skip(row) if row else data)
        with fsspec.open(self.source.files[shard], "rb") as file:
            footer = pq.read_metadata(file)
        group = 0
        while group < footer.num_row_groups and footer.row_group(group).num_rows <= row:
            row -= footer.row_group(group).num_rows
            group += 1
        groups = data.reshard()
        rest = [groups.shard(num_shards=groups.num_shards, index=i) for i in range(group, groups.num_shards)]
        return itertools.islice(itertools.chain.from_iterable(rest), row, None)

    def windows(self, epoch, start):
        """The rest of a pass: (place of the window, [(image id, row)]), where an image's id is shard << 32 | row."""
        shards, turn, following = self.shards(epoch), start["turn"], start["next"]
        opened = [[k, row, self.rows(shards[k], row)] for k, row in start["open"]]
        while True:
            place = {"epoch": epoch, "open": [[k, row] for k, row, _ in opened], "next": following, "turn": turn}
            window = []
            while len(window) < self.window and (opened or following < len(shards)):
                while len(opened) < self.interleave and following < len(shards):
                    opened.append([following, 0, self.rows(shards[following], 0)])
                    following += 1
                turn %= len(opened)
                k, row, rows = opened[turn]
                example = next(rows, None)
                if example is None:
                    del opened[turn]
                else:
                    window.append((shards[k] << 32 | row, example))
                    opened[turn][1] += 1
                    turn += 1
            if not window:
                return
            yield place, window

    def __iter__(self):
        try:
            yield from self.chunks()
        except (ServerGoneError, BadFilesError) as error:  # raised by whoever takes it, without a worker's traceback
            yield {"failed": error}

    def chunks(self):
        start = self.start
        for epoch in itertools.count(start["epoch"]):
            wanted, after, offset = [], start, start["offset"]
            for place, window in self.windows(epoch, start):
                order = permutation(len(window), self.seed, epoch, window[0][0])
                for i in range(offset, len(window)):
                    wanted.append((epoch, *window[order[i]]))
                    after = {**place, "offset": i + 1}
                    if len(wanted) == self.size:
                        yield {**load_chunk(self.source, self.prepare, self.seed, wanted), "after": after}
                        wanted = []
                offset = 0
            if wanted:
                yield {**load_chunk(self.source, self.prepare, self.seed, wanted), "after": after}
            start = self.beginning(epoch + 1)
            yield {"end": True, "after": start}


class Stream:
    """A rank's endless stream of batches: `next(stream)` -> {"images": uint8 (b, 3, S, S), ..., "ids": (b, 2)}.

    Data on disk: one DataLoader, whose chunks arrive in order whatever the number of its workers. Streams: a DataLoader
    for each worker; they are asked in turn, without those whose part of the pass has ended, until it has ended for
    all. (One DataLoader over several workers would let those with fewer shards run ahead into the next pass.)
    `state_dict()` is a place from which another Stream continues with the very next image, in the division that the
    first one had.
    """

    def __init__(self, source, prepare, data, seed, rank=0, world=1, state=None, first_pass=0):
        self.size = data.batch_size
        self.part = max(1, (source.num_images or 1000) // world)  # images of a rank's pass
        was = state["layout"] if state else {}
        first_pass = was.get("first_pass", first_pass)
        self.layout = {"streaming": source.streaming, "parts": world, "batch_size": self.size, "first_pass": first_pass}
        self.layout |= {"shards": source.data.num_shards} if source.streaming else {"images": source.num_images}
        self.in_process = not data.workers
        if source.streaming:
            # A worker without a shard would idle, so there are never more workers than the poorest rank has shards.
            readers = min(max(data.workers, 1), source.data.num_shards // world)
            readers = was.get("workers", readers)
            if rank == 0 and readers != data.workers and data.workers:
                why = "as the run began" if was else f"shards: {source.data.num_shards}, processes: {world}"
                print(f"{why}; loading workers of each process: {readers} instead of {data.workers}", file=sys.stderr)
            self.layout["workers"] = readers
            shares = [
                ShardChunks(
                    source, prepare, self.size, seed, rank, world, w, readers, data.shuffle_window, data.interleave
                )
                for w in range(readers)
            ]
            beginning = [share.beginning(first_pass) for share in shares]
        else:
            beginning = [0]
        state = state or {"layout": self.layout, "taken": 0, "places": beginning, "ended": [], "turn": 0, "read": 0,
                          "skipped": 0, "pass": first_pass, "seen": 0}  # fmt: skip
        if state["layout"] != self.layout:
            changes = [f"{k} {was.get(k)} -> {v}" for k, v in self.layout.items() if was.get(k) != v]
            raise UserError(
                f"the checkpoint divides the data otherwise ({', '.join(changes)}): keep the old values and --workers; "
                "if the data are others now, another --seed with --resume-changed begins them anew"
            )
        self.place = {k: state[k] for k in ("places", "ended", "turn", "read", "skipped")}
        self.epoch, self.seen = state["pass"], state["seen"]  # of the last image; a fingerprint of all so far, in order
        options = dict(batch_size=None, prefetch_factor=2 if data.workers else None, worker_init_fn=ignore_signals)
        if source.streaming:
            for share, place in zip(shares, self.place["places"], strict=True):
                share.start = place
            self.loaders = [iter(DataLoader(s, num_workers=min(data.workers, 1), **options)) for s in shares]
        else:
            rows = RowChunks(source, prepare, self.size, seed, rank, world, first_pass)
            first = self.place["places"][0]
            self.loaders = [iter(DataLoader(rows, sampler=itertools.count(first), num_workers=data.workers, **options))]
        self.buffer, self.buffered, self.taken, self.skipped_names = [], 0, 0, []
        while self.buffered < state["taken"]:
            self._pull()
        self.taken, self.buffered = state["taken"], self.buffered - state["taken"]
        self.skipped_names = []  # named before the checkpoint

    @property
    def skipped(self):
        """Files that could not be used, so far."""
        return self.place["skipped"]

    def state_dict(self):
        """The place before the next image: plain numbers, fit for JSON."""
        place = self.buffer[0][0] if self.buffer else self.place
        more = {"layout": self.layout, "taken": self.taken, "pass": self.epoch, "seen": self.seen}
        return copy.deepcopy({**more, **place})

    def _pull(self):
        """Append the next chunk to the buffer, with the place before it. Raises BadFilesError for too many bad
        files, ServerGoneError."""
        before, place = copy.deepcopy(self.place), self.place
        while place["turn"] in place["ended"]:
            place["turn"] = (place["turn"] + 1) % len(self.loaders)
        turn = place["turn"]
        try:
            chunk = next(self.loaders[turn])
        except (RuntimeError, OSError, EOFError) as error:
            if self.in_process or str(error).startswith("Caught "):  # raised by what a loading process does
                raise
            raise RunError(f"a loading process was killed; is there enough memory? {first_line(error)}") from error
        if "failed" in chunk:
            raise chunk["failed"]
        place["places"][turn] = chunk.pop("after")
        place["turn"] = (turn + 1) % len(self.loaders)
        if "end" in chunk:
            place["ended"] = place["ended"] + [turn] if len(place["ended"]) + 1 < len(self.loaders) else []
            if not place["ended"] and not place["read"]:
                raise BadFilesError("the shards of this process hold no images at all")
            return
        skipped = chunk.pop("skipped")
        self.skipped_names += skipped
        place["read"] += len(chunk["ids"]) + len(skipped)
        place["skipped"] += len(skipped)
        # of small data whole passes count, since each meets the same bad files
        read = math.ceil(place["read"] / self.part) * self.part if self.part < 1000 else max(place["read"], 1000)
        if place["skipped"] > 0.01 * read:
            raise BadFilesError(
                f"{place['skipped']} of the {place['read']} files that this process read could not be used, "
                f"more than 1 %: repair or remove them; the last was {self.skipped_names[-1]}"
            )
        if len(chunk["ids"]):
            self.buffer.append((before, chunk))
            self.buffered += len(chunk["ids"])

    def __next__(self):
        while self.buffered < self.size:
            self._pull()
        parts, missing = [], self.size
        while missing:
            chunk = self.buffer[0][1]
            part = {name: values[self.taken : self.taken + missing] for name, values in chunk.items()}
            parts.append(part)
            missing -= len(part["ids"])
            self.taken += len(part["ids"])
            if self.taken == len(chunk["ids"]):
                self.buffer.pop(0)
                self.taken = 0
        self.buffered -= self.size
        batch = parts[0] if len(parts) == 1 else {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
        self.epoch = int(batch["ids"][-1, 0])
        self.seen = key(self.seen, batch["ids"].numpy().tobytes())
        return batch


def ignore_signals(worker):
    """Loading processes leave signals to the process that they load for, until it ends them; and say nothing if that
    one stops in the middle of taking a batch from them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    told = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, ConnectionError) else told(kind, *rest)


class PassRows(torch.utils.data.Dataset):
    """Data on disk: chunk j of this rank's part of one pass, in the order of the data."""

    def __init__(self, source, prepare, size, rank, world):
        self.source, self.prepare, self.size = source, prepare, size
        self.part = range(rank, len(source.data), world)

    def __len__(self):
        return math.ceil(len(self.part) / self.size)

    def __getitem__(self, j):
        rows = self.part[j * self.size : (j + 1) * self.size]
        return load_chunk(self.source, self.prepare, 0, ((0, row, self.source.data[row]) for row in rows))


def one_pass(source, prepare, batch_size, workers, rank=0, world=1):
    """The chunks of one pass over this rank's part, for evaluation: every image once, nothing added to fill a batch.
    Parts may differ in size or be empty, so nothing in such a pass may wait for another rank. Raises BadFilesError."""
    read, skipped = 0, 0
    for chunk in pass_chunks(source, prepare, batch_size, workers, rank, world):
        read, skipped = read + len(chunk["ids"]) + len(chunk["skipped"]), skipped + len(chunk["skipped"])
        if skipped > 0.01 * max(read, min(1000, source.num_images or 1000)):
            raise BadFilesError(
                f"{skipped} of the {read} files that this process read of {source.name} could not be used, more than "
                f"1 %: repair or remove them; the last was {chunk['skipped'][-1]}"
            )
        yield chunk


def pass_chunks(source, prepare, size, workers, rank, world):
    options = dict(batch_size=None, prefetch_factor=2 if workers else None, worker_init_fn=ignore_signals)
    if not source.streaming:
        yield from DataLoader(PassRows(source, prepare, size, rank, world), num_workers=workers, **options)
        return
    # As in Stream: a DataLoader for each worker, asked in turn.
    readers = max(1, min(workers, source.data.num_shards // world))
    shares = [ShardChunks(source, prepare, size, 0, rank, world, w, readers, size, 1) for w in range(readers)]
    loaders = [iter(DataLoader(share, num_workers=min(workers, 1), **options)) for share in shares]
    while loaders:
        for loader in list(loaders):
            chunk = next(loader)
            if "failed" in chunk:
                raise chunk["failed"]
            if "end" in chunk:
                loaders.remove(loader)
            else:
                yield chunk


# ----------------------------------------------------------------------------------------------------------------
# Teachers: where the targets come from. Each maps pixels (B, 3, H, W) in [0, 1], exactly the student's crop, to the
# target; frozen, in evaluation mode, outside DDP and the checkpoints. `target_dim` is what CAEConfig calls so.


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


class CLIPTeacher(nn.Module):
    """CLIP's latents of every token (CAE v2), from any CLIPVisionModelWithProjection: (B, 1 + N, C), class token first.

    The crop is resized so that teacher and student see the same grid of patches, with the teacher's positions
    interpolated where that is not its own size.
    """

    def __init__(self, name, patch_size):
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        kinds = ("clip_vision_model", "clip")
        self.model = load_pretrained(name, CLIPVisionModelWithProjection, kinds, "a CLIP vision model with projection")
        self.target_dim = self.model.visual_projection.out_features
        config = self.model.config
        self.student_patch, self.teacher_patch, self.native_size = patch_size, config.patch_size, config.image_size

    def forward(self, pixels):
        rows, columns = patch_grid(pixels, self.student_patch)
        size = (rows * self.teacher_patch, columns * self.teacher_patch)
        x = normalize(resize(pixels, size), CLIP_MEAN, CLIP_STD).to(self.model.dtype)
        tower = self.model.vision_model
        foreign = size != (self.native_size, self.native_size)
        # last_hidden_state is before post_layernorm, which transformers applies to the class token alone
        x = tower(x, interpolate_pos_encoding=foreign).last_hidden_state                 # (B, 1 + N, width)
        return self.model.visual_projection(tower.post_layernorm(x))                     # (B, 1 + N, C)

    def compile(self):
        """With torch.compile; resizing stays as it is."""
        self.model.vision_model.compile(fullgraph=True)


class DALLETeacher(nn.Module):
    """DALL-E's code of every patch (CAE), from transformers' FlavaImageCodebook: int64 (B, N).

    It sees the crop at 8 pixels a patch (112 x 112 for 14 x 14 patches). The released code resizes with Lanczos;
    antialiased bicubic is near enough.
    """

    def __init__(self, name, patch_size):
        super().__init__()
        from transformers import FlavaImageCodebook

        kinds = ("flava_image_codebook",)
        self.model = load_pretrained(name, FlavaImageCodebook, kinds, "a FLAVA image codebook")
        self.patch_size, self.target_dim = patch_size, self.model.config.vocab_size

    def forward(self, pixels):
        rows, columns = patch_grid(pixels, self.patch_size)
        x = 0.8 * resize(pixels, (8 * rows, 8 * columns)) + 0.1                          # DALL-E's own squeezing
        return self.model.get_codebook_indices(x.to(self.model.dtype)).flatten(1)        # (B, N)

    def compile(self):
        """As CLIPTeacher's."""
        self.model.blocks.compile(fullgraph=True)


class PixelTeacher(nn.Module):
    """The patches themselves, as the student sees them: (B, N, 3 P^2), ordered (row, column, channel) as in MAE."""

    def __init__(self, patch_size, normalize_patches=False):
        super().__init__()
        self.patch_size, self.normalize_patches = patch_size, normalize_patches
        self.target_dim = 3 * patch_size**2

    def forward(self, pixels):
        patches = patchify(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), self.patch_size, order="p q c")
        if self.normalize_patches:
            mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
            patches = (patches - mean) / (var + 1e-6).sqrt()
        return patches                                                                   # (B, N, 3 P^2)

    def compile(self):
        """Nothing: no network."""


def load_pretrained(name, model_class, kinds, description, flag="--teacher"):
    """A transformers model from a folder or the Hub, after a look at what it is. Raises UserError, naming the flag."""
    from transformers import PretrainedConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not Path(name).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"{flag} {name} does not exist: no such folder, and not an id of the Hub")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report on heads that are not used; what is missing is ours to say
    try:
        kind = PretrainedConfig.get_config_dict(name)[0].get("model_type")
        if kind and kind not in kinds:
            raise UserError(f"{flag} {name} is a {kind}: {description} is needed")
        model, info = model_class.from_pretrained(name, output_loading_info=True)
        # nobody uses a pooler, but for BEiT's norm after mean pooling, which its own fine-tuning also starts anew
        missing = [key for key in sorted(info["missing_keys"]) if not key.startswith("pooler.")]
        if missing:
            raise UserError(f"{flag} {name} lacks weights of {description}: {', '.join(missing[:3])}, ...")
        return model
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{flag} {name} cannot be loaded: {first_line(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def transformers_config(checkpoint):
    """(folder or Hub id, its config.json) if the checkpoint of probe.py or finetune.py is a model of transformers, else
    (checkpoint, None), which may still be a CAE. A run folder stands for its model/."""
    path = Path(checkpoint).expanduser()
    folder = path / "model" if (path / "model").is_dir() else path
    if folder.is_dir():
        file, name = folder / "config.json", str(folder)
        if not file.is_file():
            return checkpoint, None
    elif path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", checkpoint):
        return checkpoint, None
    else:
        try:
            file, name = hf_hub_download(checkpoint, "config.json"), checkpoint
        except (HfHubHTTPError, OSError, ValueError):
            return checkpoint, None  # load_model says why
    config = json.loads(Path(file).read_text())
    return (name, config) if isinstance(config, dict) and "model_type" in config else (checkpoint, None)


def open_encoder(origin, seed, of_cae, of_transformers):
    """What probe.py and finetune.py start from: of_cae(model) of a CAE, trained or at random, or of_transformers(folder
    or Hub id, its config.json). `origin` is the group of --checkpoint and --random-init. Raises UserError."""
    name, size = origin.checkpoint, origin.random_init
    if name is None:
        require(size in SIZES, f"--random-init {size} does not exist: {', '.join(SIZES)}")
        torch.manual_seed(seed)
        return of_cae(CAE(CAEConfig.from_size(size)))
    try:
        folder, config = transformers_config(name)
        return of_transformers(folder, config) if config else of_cae(load_model(name))
    except (OSError, ValueError, RuntimeError, SafetensorError, HfHubHTTPError) as error:
        raise UserError(f"--checkpoint {name} cannot be loaded: {first_line(error)}") from error


def build_teacher(args, config):
    """The teacher of these arguments, shown to give one target for every token of the student. Raises UserError."""
    if args.target.target == "pixels":
        return PixelTeacher(config.patch_size, args.target.normalize_pixels)
    kind = CLIPTeacher if args.target.target == "clip" else DALLETeacher
    teacher = kind(args.target.teacher, config.patch_size).eval().requires_grad_(False)
    tokens = config.num_patches + (args.target.target == "clip")
    try:
        got = teacher(torch.rand(1, 3, config.image_size, config.image_size)).shape[1]
    except (RuntimeError, ValueError) as error:
        got = first_line(error)
    if got != tokens:
        raise UserError(
            f"the grid of --teacher {args.target.teacher} cannot match the student's {config.grid[0]} x "
            f"{config.grid[1]} patches: {tokens} tokens are needed, it gives {got}"
        )
    return teacher


# ----------------------------------------------------------------------------------------------------------------
# Schedules: pure functions of the step.


def cosine(step, total, start, end):
    """From start at step 0 to end at step total - 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / max(total - 1, 1)))


def learning_rate(step, total, warmup, peak, final):
    """Linear from 0 over `warmup` steps, then a cosine from peak to final at the last step."""
    if step < warmup:
        return peak * step / warmup
    return cosine(step - warmup, total - warmup, peak, final)


def length_of_run(run, data, source, warmup_epochs=None, share=None):
    """Steps of the run, of a pass (None if the number of images is unknown) and of the warm-up. Raises UserError.

    Warm-up where None is given: one of `share` parts of the run; for pretraining 10, 20, 40 epochs of 300, 800, 1600,
    and a thirtieth of a shorter run.
    """
    known = source.num_images is not None
    require(known or run.steps is not None,
            f"the number of images in {source.name} is unknown: pass --num-images, or --steps for --epochs")
    require(known or warmup_epochs is None,
            f"the number of images in {source.name} is unknown: --warmup-epochs needs --num-images")
    steps_per_pass = source.num_images / data.effective_batch_size if known else None
    total = run.steps or max(1, math.ceil(run.epochs * steps_per_pass - 1e-9))
    if warmup_epochs is not None:
        warmup = round(warmup_epochs * steps_per_pass)
    else:
        warmup = total // (share or (40 if known and round(total / steps_per_pass) > 300 else 30))
    require(warmup < total, f"--warmup-epochs {warmup_epochs} is not shorter than the run")
    return total, steps_per_pass, warmup


def parameter_groups(model):
    """Trainable parameters, with and without weight decay. The released code also decays the class and mask tokens,
    by oversight; here they count with the parameters of one dimension."""
    groups = [{"params": [], "decay": True}, {"params": [], "decay": False}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim < 2 or name.endswith("token")]["params"].append(parameter)
    return groups


# ----------------------------------------------------------------------------------------------------------------
# Evaluation, for probe.py and finetune.py.

# ImageNet-1K top-1 of published models, to print beside ours: name, kind, size (all with patches of 16 pixels),
# fine-tuned, frozen. "EP bench" is as the efficient probe's benchmark has it; the others are from the released README
# of CAE and later papers' tables.
REFERENCE = [
    ("CAE-B, 300 epochs", "cae", "base", 83.6, {"linear": 64.5, "attentive": 74.0}),
    ("CAE-B, 800 epochs", "cae", "base", 83.8, {"linear": 68.9, "attentive": 75.9}),
    ("CAE-B, 1600 epochs", "cae", "base", 83.9, {"linear": 70.3, "attentive": 77.2}),
    ("CAE-L, 1600 epochs", "cae", "large", 86.2, {"linear": 77.8, "attentive": 81.2}),
    ("CAE v2-B, 300 epochs", "cae-v2", "base", 85.3, {"linear": 80.5}),
    ("CAE v2-L, 300 epochs", "cae-v2", "large", 86.7, {"linear": 81.7}),
    ("MAE-B, 1600 epochs", "mae", "base", 83.6, {"linear": 67.8, "attentive": 74.2}),
    ("MAE-L, 1600 epochs", "mae", "large", 86.0, {"linear": 76.0, "attentive": 78.8}),
    ("MVP-B, 300 epochs", "mvp", "base", 84.4, {"linear": 75.4}),
    ("BEiT v2-B, 300 epochs", "beit-v2", "base", 85.0, {"linear": 80.1}),
    ("MAE-B, EP bench", "mae", "base", None, {"knn": 35.6, "linear": 67.8, "ep": 75.5}),
    ("BEiT v2-B, EP bench", "beit-v2", "base", None, {"knn": 70.1, "linear": 79.0, "ep": 81.4}),
    ("CLIP-B/16, EP bench", "clip", "base", None, {"knn": 65.7, "linear": 77.9, "ep": 77.9}),
]


def hits(scores, labels, above=-math.inf):
    """How many of scores (..., B, C) have the label (B) first, and among the first five: (..., 2). Scores that are not
    above a bound do not count."""
    first = scores.topk(min(5, scores.shape[-1]), dim=-1)                                # (..., B, 5)
    right = (first.indices == labels[:, None]) & (first.values > above)
    return torch.stack([right[..., :1].any(-1).sum(-1), right.any(-1).sum(-1)], dim=-1)


def raise_together(error):
    """A UserError or RunError of one rank (None on the others) becomes one on all of them, so that all end."""
    found = [e for e in gather_object([error and (isinstance(error, UserError), str(error))]) if e]
    if found:
        raise (UserError if found[0][0] else RunError)(found[0][1]) from error


@torch.no_grad()
def evaluate(accelerator, model, batches, shape=()):
    """Top-1 and top-5 accuracy in percent, (*shape, 2) as lists, and the number of images.

    batches: (inputs, labels (B)) of this rank's part of a pass; model(inputs) gives scores (*shape, B, C). Every image
    counts once; ranks may have different numbers of batches, or none. Raises UserError and RunError, on all ranks.
    """
    total = torch.zeros(*shape, 2, dtype=torch.int64, device=accelerator.device)
    images = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    trouble = None
    try:
        for inputs, labels in batches:
            with accelerator.autocast():
                total += hits(model(inputs), labels)
            images += len(labels)
    except (BadFilesError, ServerGoneError) as error:  # other ranks may have all of their images
        trouble = error
    raise_together(trouble)
    total, images = accelerator.reduce(total, "sum"), accelerator.reduce(images, "sum").item()
    return (100 * total.double() / max(images, 1)).tolist(), images


def images_of(accelerator, source, view, data, what, skipped):
    """uint8 images (B, 3, S, S) and labels (B) of this rank's part of one pass, on the device, with a bar. `skipped` is
    emptied, then collects the files that cannot be used. Raises BadFilesError."""
    rank, world = accelerator.process_index, accelerator.num_processes
    total = source.num_images and len(range(rank, source.num_images, world))
    chunks = one_pass(source, view, data.batch_size, data.workers, rank, world)
    skipped.clear()
    for chunk in watch(chunks, total, what, accelerator.is_main_process):
        skipped += chunk["skipped"]
        for name in chunk["skipped"]:
            tqdm.write(f"skipped {name}", file=sys.stderr)
        if len(chunk["ids"]):
            yield to_device(chunk["images"], accelerator.device), to_device(chunk["labels"], accelerator.device)


def evaluates_at(step, total, steps_per_pass, every):
    """Whether the step that ends at `step` completes another `every` passes, or the run."""
    passed = (steps_per_pass or math.inf) * every
    return step == total or int(step / passed + 1e-9) > int((step - 1) / passed + 1e-9)


def watch(chunks, total, what, shown):
    """Pass chunks on, with a bar of images, images/s, the share of time waiting for data and the time left; outside a
    terminal a line every ten seconds."""
    bar = tqdm(total=total, desc=what, unit="image", disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True)
    began, waited, done, last = time.perf_counter(), 0.0, 0, time.perf_counter()
    chunks = iter(chunks)
    while True:
        asked = time.perf_counter()
        chunk = next(chunks, None)
        now = time.perf_counter()
        waited += now - asked
        if chunk is None:
            break
        yield chunk
        done += len(chunk["ids"])
        bar.update(len(chunk["ids"]))
        bar.set_postfix_str(f"waiting for data {waited / (now - began):.0%}", refresh=False)
        if shown and bar.disable and now - last > 10:
            last, rate = now, done / (now - began)
            left = tqdm.format_interval((total - done) / rate) if total else "?"
            print(f"{what}: {done}/{total or '?'} images  {rate:.0f} images/s  waiting for data "
                  f"{waited / (now - began):.0%}  {left} left", flush=True)  # fmt: skip
    bar.close()


# ----------------------------------------------------------------------------------------------------------------
# Run folder: config.json, log.jsonl, checkpoints/step_00000123/, model/. Nothing is ever seen half-written.


def write_aside(path, text):
    """Replace a file: written under a temporary name, synced, renamed. Raises RunError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        fsync(temporary)
        temporary.rename(path)
        fsync(path.parent)
    except OSError as error:
        raise RunError(f"{path} could not be written: {first_line(error)}; make room, and start again") from error


def publish(temporary, folder):
    """Give a finished folder its name."""
    for file in sorted(temporary.rglob("*")) + [temporary]:
        fsync(file)
    temporary.rename(folder)
    fsync(folder.parent)


NOT_WRITTEN = (OSError, RuntimeError, SafetensorError)  # what a full disk raises: Python, torch, safetensors


def publish_files(folder, write):
    """Let write(temporary folder) write files, and move them into `folder`, each replacing its older self in one go: a
    reader finds a whole model at any moment."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        folder.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            fsync(file)
            file.replace(folder / file.name)
        fsync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def checkpoints(run_dir):
    """Finished checkpoints of a run folder, oldest first."""
    return sorted(p for p in (Path(run_dir) / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8,}", p.name))


SUMS = "SHA256SUMS"  # of a checkpoint's files, as `sha256sum --check` reads it


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(checkpoint):
    """What is wrong with a checkpoint's files, or None."""
    try:
        lines = (checkpoint / SUMS).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
        if "trainer.json" not in sums:
            return f"{SUMS} is cut short"
        for name, digest in sums.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if sha256(checkpoint / name) != digest:
                return f"{name} is not what was written"
        return None
    except (OSError, ValueError) as error:
        return f"{SUMS} cannot be read: {first_line(error)}"


def save_checkpoint(accelerator, run_dir, step, places, run, write_model=None, **more):
    """checkpoints/step_..., with the place of every part of the data and whatever JSON can hold `more`; then model/, by
    write_model(folder, step). Called on all ranks. Returns what went wrong (a full disk), or None; if it did, the
    checkpoints of before are as they were."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    temporary = folder.with_name(folder.name + ".tmp")
    rank, world = accelerator.process_index, accelerator.num_processes

    def attempt(work):
        """work() on this rank; the first problem of any rank."""
        problem = None
        try:
            work()
        except NOT_WRITTEN as error:
            problem = first_line(error)
        return next((problem for problem in gather_object([problem]) if problem), None)

    def begin():
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write():
        accelerator.save_state(str(temporary))
        for turn, place in enumerate(places):
            (temporary / f"data_{rank + world * turn}.json").write_text(json.dumps(place))

    def finish():
        if rank == 0:
            (temporary / "trainer.json").write_text(json.dumps({"step": step, **more}))
            files = sorted(file for file in temporary.rglob("*") if file.is_file())  # FSDP may write folders
            lines = [f"{sha256(file)}  {file.relative_to(temporary)}\n" for file in files]
            (temporary / SUMS).write_text("".join(lines))
            if folder.exists():  # whole since an earlier attempt, of which only what follows failed
                shutil.rmtree(temporary)
            else:
                publish(temporary, folder)
            every = run.milestone_every
            for old in checkpoints(run_dir)[: -run.keep]:
                if not every or int(old.name.removeprefix("step_")) % every:
                    gone = old.rename(old.with_name(old.name + ".tmp"))  # a kill leaves no half of a checkpoint
                    shutil.rmtree(gone, ignore_errors=True)  # what a reader holds open goes with the next start
            if write_model:  # last: old checkpoints make room for it on a full disk
                publish_files(run_dir / "model", lambda folder: write_model(folder, step))

    problem = attempt(begin) or attempt(write) or attempt(finish)
    if problem and rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    return problem


# What may differ between a run and its continuation.
VOLATILE = {"run_dir", "resume", "resume_changed", "log_every", "checkpoint_every", "keep", "milestone_every"}
VOLATILE |= {"tracker", "compile", "checkpoint_blocks", "workers", "timeout", "patience", "max_bad_steps"}
VOLATILE |= {"checkpoint", "beside", "push_to_hub"}  # of probe.py and finetune.py, which know an encoder by its weights
# What decides which image comes when. With other values the data begin anew.
ORDER = {"dataset", "split", "image_column", "streaming", "num_images", "seed", "batch_size", "parts", "shuffle_window",
         "interleave"}  # fmt: skip


def digest(module):
    """A short name of a module's weights."""
    hasher = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        hasher.update(f"{name} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


@dataclass
class Resume:
    """Where a run goes on, or begins."""

    candidates: list = field(default_factory=list)
    """Checkpoints to start from, the best first."""
    changed: dict = field(default_factory=dict)
    """{name: [old value, new value]} of what --resume-changed allows."""
    history: list = field(default_factory=list)
    """Changes of before, as config.json lists them."""


def config_of_run(folder):
    """config.json of a run folder in which something has begun, or {}. Raises UserError."""
    written = Path(folder) / "config.json"
    if not written.exists() or not (checkpoints(folder) or (Path(folder) / "log.jsonl").exists()):
        return {}
    try:
        config = json.loads(written.read_text())
        return {**config, "args": dict(config["args"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{written} is damaged: {first_line(error)}; choose another --run-dir") from error


def run_to_resume(run):
    """(run folder, checkpoint or None) that --resume names. Raises UserError."""
    if run.resume in ("auto", "never"):
        return Path(run.run_dir), None
    path = Path(run.resume)
    if (path / "trainer.json").exists():
        return path.resolve().parent.parent, path
    if not checkpoints(path):
        raise UserError(f"--resume {path} is neither a checkpoint nor a run folder with one")
    return path, None


def values_of_run(run):
    """The arguments of the run that is resumed, or {}. Raises UserError."""
    return config_of_run(run_to_resume(run)[0]).get("args", {}) if run.run_dir else {}


def compare_runs(values, folder, config, allowed):
    """{name: [old, new]} of what differs from a run's config.json. Raises UserError if there is any, unless allowed."""
    old, new = config.get("args", {}), json.loads(json.dumps(values))
    names = [name for name in {**old, **new} if name not in VOLATILE and old.get(name) != new.get(name)] if old else []
    if names and not allowed:
        changes = "; ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in names)
        raise UserError(
            f"run folder {folder} holds a run of another configuration ({changes}): "
            "pass its values, or another --run-dir, or --resume-changed to go on with the new ones"
        )
    return {name: [old.get(name), new.get(name)] for name in names}


def prepare_run_dir(run, values):
    """Check the run folder, and find what to start from: a Resume. Raises UserError.

    Order: --resume PATH; then, with auto, the last checkpoint of the run folder; else from scratch.
    """
    run_dir = Path(run.run_dir)
    own = config_of_run(run_dir)
    compare_runs(values, run_dir, own, run.resume_changed)
    found = checkpoints(run_dir)
    if run.resume == "never" and found:
        raise UserError(f"run folder {run_dir} already holds a run: pass --resume auto, or another --run-dir")
    folder, checkpoint = run_to_resume(run)
    candidates = [checkpoint] if checkpoint else checkpoints(folder)[::-1]
    if run.resume not in ("auto", "never") and found and found[-1].name > candidates[0].name:
        raise UserError(
            f"run folder {run_dir} goes on to {found[-1].name}: pass --resume auto, or to branch off another --run-dir"
        )
    config = config_of_run(folder)
    changed = compare_runs(values, folder, config, run.resume_changed) if candidates else {}
    make_run_dir(run_dir / "checkpoints")
    return Resume(candidates, changed, config.get("changed", []))


def make_run_dir(folder):
    """Make a folder and see that it can be written to. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        test = folder / f".write_test_{os.getpid()}"
        test.touch()
        test.unlink(missing_ok=True)  # another machine's process may have the same number
    except OSError as error:
        raise UserError(f"run folder {folder} is not writable: {error.strerror}; choose another --run-dir") from error


def tidy(run_dir):
    """Take away what an earlier process left behind in the middle of a write."""
    for left in [*Path(run_dir).glob("*.tmp"), *Path(run_dir, "checkpoints").glob("step_*.tmp")]:
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def sound_checkpoint(accelerator, candidates, run_dir):
    """The first candidate whose files are what was written, None if there are none. A damaged one is named; in the
    run's own folder it is set aside. Raises UserError if all are damaged. Called on all ranks."""
    found, problems = None, {}
    if accelerator.is_main_process:
        tidy(run_dir)
        for path in candidates:
            problem = damage(path)
            if problem is None:
                found = path
                break
            problems[path] = f"checkpoint {path} is damaged: {problem}"
        for path, problem in problems.items() if found else ():
            print(f"warning: {problem}; the one before is used", file=sys.stderr)
            if path.parent == Path(run_dir) / "checkpoints":
                aside = path.with_name(path.name + ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    found, problem = broadcast_object_list([found, next(iter(problems.values()), None)])
    if candidates and found is None:
        raise UserError(f"{problem}; there is no other one: pass another --run-dir, or --resume PATH")
    return found


def check_pickles(folder):
    """Raises UserError for a pickled file that is damaged, or holds more than tensors and plain data.

    Nothing in it is executed. Accelerate itself would: what is registered with it (finetune.py's average) it reads
    without this care, and of a bad file of generator states it says nothing.
    """
    for file in sorted(f for f in folder.glob("*") if f.suffix in (".bin", ".pkl", ".pt")):
        try:
            load_pickle(file, map_location="cpu", weights_only=True, mmap=True)  # mmap: no tensor is read
        except Exception as error:  # a damaged pickle can fail in any way
            raise UserError(
                f"checkpoint {folder} does not fit or is damaged: {file.name} cannot be read: {BAD_PICKLE}"
            ) from error


def load_checkpoint(accelerator, resume, run_dir, parts):
    """Model and optimizer in place; returns trainer.json's object and the places of this rank's parts of the data, None
    each where there is no checkpoint or the data begin anew (then trainer["first_pass"] says where). Raises UserError.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    path = sound_checkpoint(accelerator, resume.candidates, run_dir)
    if path is None:
        return {"step": 0, "first_pass": 0, "changed": []}, [None] * (parts // world)
    check_pickles(path)
    try:
        accelerator.load_state(str(path))
        trainer = json.loads((path / "trainer.json").read_text())
        places = [json.loads(file.read_text()) for file in sorted(path.glob("data_*.json"))]
        changed = resume.history + ([{"step": trainer["step"], "values": resume.changed}] if resume.changed else [])
        trainer |= {"path": str(path), "first_pass": 0, "changed": changed}
        # config.json holds a change from the start, a checkpoint only once it is written: until then it is of before
        if any(ORDER & set(change["values"]) for change in changed if change["step"] >= trainer["step"]):
            trainer["first_pass"] = 1 + max(place["pass"] for place in places)
            return trainer, [None] * (parts // world)
        return trainer, [json.loads((path / f"data_{i}.json").read_text()) for i in range(rank, parts, world)]
    except (OSError, RuntimeError, ValueError, SafetensorError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {path} does not fit: {first_line(error)}") from error


def report_resume(resume, trainer, total, run_dir):
    """Say where the run goes on."""
    if "path" in trainer:
        done = trainer["step"] >= total
        print(f"{run_dir} is complete: {trainer['step']} steps" if done else f"continuing from {trainer['path']}")
    for name, (old, new) in resume.changed.items():
        print(f"  changed: {name} {old} -> {new}")
    if trainer["first_pass"]:
        print(f"  the data begin anew, with pass {trainer['first_pass']}")
    sys.stdout.flush()


def write_config(run_dir, values, model, changed=()):
    """config.json: the arguments in use, the model, and what --resume-changed let differ, from which step on."""
    config = {"args": values, "model": model, **({"changed": changed} if changed else {})}
    write_aside(Path(run_dir) / "config.json", json.dumps(config, indent=2))


def step_of(line):
    """The step of a line of log.jsonl; infinite for what a lost machine left of one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Log:
    """log.jsonl, the terminal and the tracker. Main process only; the others call it in vain."""

    def __init__(self, accelerator, run_dir, start, total):
        self.accelerator, self.path, self.total, self.start = accelerator, run_dir / "log.jsonl", total, start
        self.main = accelerator.is_main_process
        if self.main and self.path.exists():  # lines beyond the checkpoint are written again
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if step_of(line) <= start]
            write_aside(self.path, "".join(line + "\n" for line in kept))
        # a full disk may cut a line off: it is written again, after the last whole one
        self.size, self.pending = self.path.stat().st_size if self.main and self.path.exists() else 0, ""
        bar = self.main and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not bar, dynamic_ncols=True, smoothing=0.05)
        self.began, self.top1 = time.perf_counter(), ""

    def write(self, values, shown=True):
        """One line of the log; in the terminal too, if shown."""
        if not self.main:
            return
        values = json.loads(json.dumps(values), parse_constant=lambda _: None)  # JSON has no number for nan
        self.pending += json.dumps(values) + "\n"
        try:
            with self.path.open("ab") as file:
                file.truncate(self.size)
                file.write(self.pending.encode())
            self.size, self.pending = self.size + len(self.pending.encode()), ""
        except OSError as error:
            tqdm.write(f"warning: {self.path} cannot be written: {first_line(error)}", file=sys.stderr)
        try:
            tracked = {name: value for name, value in values.items() if isinstance(value, (int, float))}
            self.accelerator.log(tracked, step=values["step"])
        except (OSError, RuntimeError) as error:  # the run is worth more than its curves
            tqdm.write(f"warning: the tracker failed: {first_line(error)}", file=sys.stderr)
        loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
        line = (f"loss {loss}  {values['images_per_second']:.0f} images/s  "
                f"waiting for data {values['data_wait']:.0%}")  # fmt: skip
        if "top1" in values:
            self.top1 = f"  top-1 {values['top1']:.1f}"
        line += self.top1
        if self.bar.disable and shown:
            step = values["step"]
            eta = (time.perf_counter() - self.began) / max(step - self.start, 1) * (self.total - step)
            left = tqdm.format_interval(eta)
            print(f"step {step}/{self.total}  {line}  {left} left", flush=True)
        elif not self.bar.disable:
            self.bar.set_postfix_str(line)
        for name in values.get("skipped_files", []):
            tqdm.write(f"skipped {name}", file=sys.stderr)

    def sync(self):
        """See that a line is there whenever the checkpoint of its step is."""
        if self.main and self.path.exists() and not self.pending:
            try:
                fsync(self.path)
            except OSError as error:  # on this rank alone: the others wait for it in the checkpoint
                tqdm.write(f"warning: {self.path} cannot be written: {first_line(error)}", file=sys.stderr)

    def close(self):
        self.bar.close()


# ----------------------------------------------------------------------------------------------------------------
# The loop.


def to_device(tensor, device):
    """Copy to the device; to a GPU from pinned memory, so that the host does not wait."""
    pin = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True)


def make_accelerator(run, data, tracker="none"):
    """DeviceArgs, ImagesArgs -> Accelerator and the name of its autocast ("no", "bf16", "fp16")."""
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = {"auto": "bf16" if has_bf16 else "no", "fp32": "no"}.get(run.precision, run.precision)
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=run.run_dir,
        # the buffers are fixed positions, or statistics that are joined where they are used: nothing to broadcast
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(minutes=run.timeout + data.patience)),
        ],
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(cores_per_process())  # accelerate launch leaves one
    return accelerator, precision


def attention_for(device, precision):
    """A context for what is trained: fused attention, but for bf16 on a CPU, where its backward pass takes longer than
    plain products do."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and precision == "bf16" else nullcontext()


def prepare(accelerator, model, optimizer):
    """accelerator.prepare, without a warning about which the user can do nothing."""
    with warnings.catch_warnings():  # newer versions of torch rename broadcast_buffers, accelerate does not yet
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return accelerator.prepare(model, optimizer)


@contextmanager
def all_or_none(accelerator):
    """Work that downloads and checks, on the main process first. A UserError on one rank becomes one on all of them, so
    that all end."""
    mistake = None
    with accelerator.main_process_first():
        try:
            yield
        except UserError as error:
            mistake = error
    raise_together(mistake)


def start_tracker(accelerator, project, args):
    """The tracker of --tracker, on the main process. Raises UserError, on all ranks."""
    mistake, name = None, args.run.tracker
    try:
        if name != "none":
            accelerator.init_trackers(project, config={k: str(v) for k, v in flat(args).items()})
    except Exception as error:  # each tracker has its own
        mistake = UserError(f"--tracker {name} cannot be started: {first_line(error)}; log in, or use another")
    raise_together(mistake)


class Peers:
    """What the processes of a run tell each other between steps, from host to host: no device is waited for.

    From here on SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop (unless they are ignored, as in the background of
    a script); a second Ctrl-C ends the process at once.
    """

    def __init__(self, processes, minutes):
        self.signal, self.group, self.waits = None, None, False
        if processes > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heard}
        # torch reports the death of a loading process wherever the program is; here, when its data are asked for
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def note(self, number, frame):
        self.signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.waits:  # for data, which a server may not give for a long time
            raise Stop

    def most(self, value):
        """The largest value of all processes."""
        if self.group is None:
            return value
        value = torch.tensor(int(value))
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, self.group)
        return value.item()

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def dead_peers():
    """Errors of the connection to other processes become a PeerError."""
    try:
        yield
    except RuntimeError as error:  # gloo's have no class of their own
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise PeerError(
            f"another process of this run has died or does not answer ({first_line(error)[:200]}); "
            "the same command continues from the last checkpoint"
        ) from error


class Stop(BaseException):
    """A signal while waiting for data; no Exception, which would be taken for a bad file."""


class Interruption(Exception):  # noqa: N818 (no error)
    """No further step: a stop was asked for or, in __cause__, this process has no data."""


def fit(accelerator, run, data, source, streams, learn, total, trainer, *, state=dict, write_model=None,
        evaluate=None, eval_every=1.0):  # fmt: skip
    """Take the steps from trainer["step"] to `total`, whatever happens on the way; all scripts train by this loop.

    learn(step, batches) -> dict takes one optimizer step on this process's micro-batches. Of what it returns tensors
    are averaged over steps and processes and logged, numbers logged as they are, and "bad", a boolean tensor, says
    that the step was skipped. evaluate(line) -> dict is called every `eval_every` passes and at the end, on all ranks,
    with the line of the log that what it returns is added to. state() -> dict, also on all ranks, is what a checkpoint
    has to hold besides the model; write_model(folder, step) writes model/.

    Raises RunError, UserError, and SystemExit(0) when a signal stopped the run after a checkpoint.
    """
    rank, world, device, run_dir = accelerator.process_index, accelerator.num_processes, accelerator.device, run.run_dir
    run_dir, start, effective = Path(run_dir), trainer["step"], data.effective_batch_size
    accumulation, scaled = effective // (data.batch_size * world), accelerator.scaler is not None
    steps_per_pass = source.num_images / effective if source.num_images else None
    unjudged = trainer.get("unjudged")  # the line of the log of a step whose evaluation failed
    log = Log(accelerator, run_dir, start - bool(unjudged), total)
    peers = Peers(world, run.timeout + data.patience)
    # skipped steps: the row that is not over yet, the longest row since the last look, all
    bad = torch.tensor([0, 0, trainer.get("bad_steps", 0)], device=device)
    sums, numbers, good, steps, waited, since = {}, {}, 0, 0, 0.0, time.perf_counter()
    saved, due, open_row = start, False, 0

    def micro_batches(step):
        """This process's batches of one step, each when all processes have theirs."""
        nonlocal waited
        for micro in range(accumulation):
            asked, turn, batch, trouble = time.perf_counter(), micro % len(streams), None, None
            try:
                peers.waits = True
                batch = next(streams[turn])
            except Stop:
                pass
            except Exception as error:  # a server that stays away, bad files, a loading process that died
                trouble = error
            finally:
                peers.waits = False
            if peers.most(batch is None or bool(peers.signal and micro == 0)):
                raise Interruption from trouble
            waited += time.perf_counter() - asked
            # stochastic depth and the like: a function of the seed, the step and the part of the data
            torch.manual_seed(key(run.seed, step, micro // len(streams), rank + world * turn))
            yield batch

    def report(step, places, evaluates, shown):
        """One line of the log; the number of skipped steps that it ends with. Here and in save the host waits for the
        device."""
        nonlocal sums, numbers, good, steps, waited, since, open_row
        counts = [sum(stream.skipped for stream in streams), sum(len(stream.skipped_names) for stream in streams)]
        means = torch.cat([(value / good).flatten() for value in sums.values()])
        means = torch.cat([means / world, torch.tensor(counts, dtype=means.dtype, device=device)])
        *means, unusable, news = accelerator.reduce(means, "sum").tolist()
        means = {name: [means.pop(0) for _ in range(value.numel())] for name, value in sums.items()}
        means = {name: value if sums[name].ndim else value[0] for name, value in means.items()}
        facts = torch.tensor([place["seen"] for place in places], device=device)
        facts = accelerator.gather(torch.cat([bad, facts])[None])                        # (world, 3 + streams)
        row, longest, all_bad = facts[:, :3].amax(dim=0).tolist()
        bad[1] = row
        if longest >= run.max_bad_steps or (step == total and row and not scaled):
            last = next(reversed(checkpoints(run_dir)), None)
            raise RunError(
                f"loss or gradient was not finite in {longest} steps in a row, up to step {step}; the last good "
                f"checkpoint is {last or 'none: none was written yet'}"
            )
        names = gather_object([name for stream in streams for name in stream.skipped_names]) if news else []
        for stream in streams:
            stream.skipped_names = []
        seconds, epoch = time.perf_counter() - since, round(step / steps_per_pass, 4) if steps_per_pass else None
        line = {
            "step": step,
            "epoch": epoch,
            **means,
            **numbers,
            "images": step * effective,
            "images_per_second": round(steps * effective / seconds, 1),
            "data_wait": round(waited / seconds, 4),
            "skipped": round(unusable),
            "bad_steps": all_bad,
            # a fingerprint of all images so far, in their order: equal for runs that have seen the same
            "seen": f"{key(*facts[:, 3:].T.flatten().tolist()):016x}",
            **({"skipped_files": names} if names else {}),
        }
        if evaluates:
            try:
                line |= evaluate(line)
            except (UserError, RunError):  # images to evaluate on that cannot be had: a resumed run tries them again
                save(step, places, unjudged=line)
                raise
        log.write(line, shown)
        sums, numbers, good, steps, waited, since = {}, {}, 0, 0, 0.0, time.perf_counter()
        open_row = 0 if scaled else row  # fp16's scaler skips steps in health
        return open_row

    def save(step, places, **more):
        """Write a checkpoint; False if that was not possible, which is reported."""
        nonlocal saved, since
        log.sync()
        problem = save_checkpoint(accelerator, run_dir, step, places, run, write_model,
                                  bad_steps=bad[2].item(), **state(), **more)  # fmt: skip
        saved, since = saved if problem else step, time.perf_counter()
        if problem and rank == 0:
            last = next(reversed(checkpoints(run_dir)), "none")
            tqdm.write(f"warning: the checkpoint of step {step} could not be written: {problem}; the run goes on and "
                       f"tries again; the last checkpoint is {last}", file=sys.stderr)  # fmt: skip
        return problem is None

    def leave(step, places, trouble):
        """Out of the loop before `step`, with a checkpoint."""
        row = report(step, places, evaluates=False, shown=True) if steps else open_row
        if saved != step and not row:
            save(step, places)
        log.close()
        peers.close()
        found = [peers.signal, trouble and (isinstance(trouble, UserError), first_line(trouble))]
        signals, troubles = zip(*gather_object([found]), strict=True)
        first = next((t for t in troubles if t), None)
        last = next(reversed(checkpoints(run_dir)), None)
        command = "the same command" if run.resume == "auto" else "the same command with --resume auto"
        going_on = f"{command} continues from {last}" if last else "there is no checkpoint yet"
        if first is None:
            if rank == 0:
                print(f"stopped by {next(filter(None, signals))} after step {step}: {going_on}", flush=True)
            accelerator.end_training()
            raise SystemExit(0)
        if trouble and not isinstance(trouble, (UserError, RunError)):
            raise trouble
        raise (UserError if first[0] else RunError)(f"{first[1]}; {going_on}") from trouble

    if unjudged:
        log.write({**unjudged, **evaluate(unjudged)})
    for step in range(start, total):
        places = [stream.state_dict() for stream in streams]
        try:
            values = learn(step, micro_batches(step))
        except Interruption as interruption:
            leave(step, places, interruption.__cause__)
        skipped = values.pop("bad")
        row = torch.where(skipped, bad[0] + 1, 0)
        bad = torch.stack([row, torch.maximum(bad[1], row), bad[2] + skipped])
        good, steps, done = good + ~skipped, steps + 1, step + 1
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                sums[name] = sums.get(name, 0) + torch.where(skipped, 0, value.detach())
            else:
                numbers[name] = value
        log.bar.update()

        evaluates = evaluate is not None and evaluates_at(done, total, steps_per_pass, eval_every)
        writes = done == total or done % run.checkpoint_every == 0
        writes = writes or (run.milestone_every and done % run.milestone_every == 0)
        logs = done % run.log_every == 0
        if not (logs or evaluates or writes):
            continue
        places = [stream.state_dict() for stream in streams]
        row = report(done, places, evaluates, shown=logs or done == total)
        if writes or due:
            due = bool(row) or not save(done, places)  # while the weights may be ruined, none are written
            for pause in growing_pauses(data.patience):
                if not due or done < total or peers.most(peers.signal is not None):
                    break
                time.sleep(pause)
                due = not save(done, places)
            if due and done == total:
                raise RunError(f"the last checkpoint could not be written: make room in {run_dir}, and start again")
    log.close()
    peers.close()
    if start >= total:  # a finished run: resumed by its path into a new folder, or cut off before model/ was written
        state()
        try:
            if rank == 0 and write_model and checkpoints(run_dir):
                publish_files(run_dir / "model", lambda folder: write_model(folder, start))
        except NOT_WRITTEN as error:
            raise RunError(f"{run_dir / 'model'} could not be written: {first_line(error)}") from error
        if not checkpoints(run_dir) and not save(start, [stream.state_dict() for stream in streams]):
            raise RunError(f"the checkpoint could not be written: make room in {run_dir}, and start again")


def finite(loss):
    """A factor for the loss: 1, or nan where it is not finite, so that then every gradient of every process is nan."""
    return 1 + 0 * loss.detach()


def skip_if(bad, accelerator, optimizer):
    """Let the next optimizer.step() do nothing if the device finds `bad` true, without the host knowing. With fp16 the
    scaler does so itself."""
    if accelerator.scaler is None:
        optimizer.optimizer.found_inf = bad.float()  # what the scaler sets, too: fused AdamW looks at it


def take_step(accelerator, model, optimizer, clip):
    """Clip the gradient and step, but for a gradient that is not finite: its norm, and whether the step was skipped,
    both on the device."""
    norm = accelerator.clip_grad_norm_(model.parameters(), clip or math.inf)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of FSDP
    bad = ~torch.isfinite(norm)
    skip_if(bad, accelerator, optimizer)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, bad


def whole_weights(model):
    """The state_dict of a model that DDP, FSDP or compilation wraps, under its own names and whole, in memory of the
    host: on the main process at least. Called on all ranks."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def train(args):
    """Pretrain as `args` say. Raises UserError and RunError."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    args = resolve(args, world)
    resume = prepare_run_dir(args.run, flat(args))
    accelerator, precision = make_accelerator(args.run, args.data, args.run.tracker)
    rank, device, data = accelerator.process_index, accelerator.device, args.data
    run_dir = Path(args.run.run_dir)
    with all_or_none(accelerator):
        source, teacher = open_source(data, data.parts), build_teacher(args, model_config(args))
    config = model_config(args, target_dim=teacher.target_dim)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16 if device.type != "cpu" else None}  # slow on CPUs
    teacher.to(device, half.get(precision))

    accumulation = data.effective_batch_size // (data.batch_size * world)
    total, steps_per_pass, warmup = length_of_run(args.run, data, source, args.recipe.warmup_epochs)
    peak = args.recipe.lr * data.effective_batch_size / 2048

    torch.manual_seed(args.run.seed)
    model = CAE(config)
    model.encoder.checkpoint_blocks = args.recipe.checkpoint_blocks
    betas = (args.recipe.beta1, args.recipe.beta2)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=0.0, betas=betas, eps=args.recipe.adam_eps, fused=True)
    if args.run.compile:
        model.compile(fullgraph=True)
        teacher.compile()
    if accelerator.is_main_process:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        epochs = round(total / steps_per_pass, 1) if steps_per_pass else "?"
        print(f"{config.method} {args.model.size}, {millions:.1f} M parameters, {num_masked(args, config)} of "
              f"{config.num_patches} patches masked; {world} process{'es' * (world > 1)} x {data.batch_size} images x "
              f"{accumulation} = {data.effective_batch_size} images a step; {total} steps, {epochs} epochs; "
              f"{'fp32' if precision == 'no' else precision} on {device}; {run_dir}", flush=True)  # fmt: skip
    model, optimizer = prepare(accelerator, model, optimizer)
    model.train()
    trainer, places = load_checkpoint(accelerator, resume, run_dir, data.parts)
    if accelerator.is_main_process:
        write_config(run_dir, flat(args), dataclasses.asdict(config), trainer["changed"])
        report_resume(resume, trainer, total, run_dir)
    view = Crops(args, config)
    streams = [Stream(source, view, data, args.run.seed, part, data.parts, place, trainer["first_pass"])
               for part, place in zip(range(rank, data.parts, world), places, strict=True)]  # fmt: skip
    start_tracker(accelerator, "cae", args)

    def learn(step, batches):
        """One optimizer step."""
        lr = learning_rate(step, total, warmup, peak, args.recipe.min_lr)
        decay = cosine(step, total, args.recipe.weight_decay, args.recipe.weight_decay_end)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay if group["decay"] else 0.0
        sums = {}
        for micro, batch in enumerate(batches):
            pixels, visible, masked = (to_device(batch[name], device) for name in ("images", "visible", "masked"))
            pixels = pixels.float() / 255                                                # (B, 3, S, S)
            with torch.no_grad():
                target = teacher(pixels)  # the one line in which targets are made
            whole = micro == accumulation - 1
            with nullcontext() if whole else accelerator.no_sync(model), attention_for(device, precision):
                losses = model(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), visible, masked, target)
                accelerator.backward(losses["loss"] * finite(losses["loss"]) / accumulation)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / accumulation
        norm, bad = take_step(accelerator, model, optimizer, args.recipe.clip_grad)
        return {**sums, "grad_norm": norm, "bad": bad, "lr": lr, "weight_decay": decay}

    weights = {}

    def state():
        weights.update(whole_weights(model))
        return {}

    def write_model(folder, step):
        whole = CAE(config)
        whole.load_state_dict(weights)
        whole.save_pretrained(folder)

    fit(accelerator, args.run, data, source, streams, learn, total, trainer, state=state, write_model=write_model)
    if accelerator.is_main_process:
        print(f"done: {run_dir / 'model'} holds the model, {run_dir / 'log.jsonl'} the log")
    accelerator.end_training()


def command_line(work):
    """Call work(): exit code 2 for what the user gave, 1 for a run that failed."""
    try:
        with dead_peers():
            work()
    except (UserError, RunError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, (BadFilesError, ServerGoneError, PeerError)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, PeerError):
            stop_workers()
            os._exit(1)  # a proper end would wait for the dead
        sys.exit(1 if isinstance(error, RunError) else 2)
    finally:
        stop_workers()


def stop_workers():
    """End the loading processes, of which one may be waiting for a server."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take it for an accident
    for child in children:
        child.kill()


atexit.register(stop_workers)  # Python ends daemons with SIGTERM, which these ignore, and would wait for ever


def main():
    command_line(lambda: train(parse()))


if __name__ == "__main__":
    main()
