"""Fine-tune a pretrained encoder end to end. The result is a plain BEiT that transformers loads with one line.

    accelerate launch finetune.py classify --checkpoint runs/cae-v2-base --dataset ILSVRC/imagenet-1k
    python finetune.py classify --checkpoint runs/cae-v2-nano-demo --dataset demo

    AutoModelForImageClassification.from_pretrained("runs/classify-cae-v2-base-imagenet-1k/model")

Read in this order: flags and recipes, the model, the views, the optimizer's groups, the loop, what is written.
"""

# engine comes first: it sets what has to be set before torch is imported.
from engine.arguments import (
    AutoFloat,
    AutoInt,
    AutoStr,
    DataArgs,
    LabelArgs,
    Mark,
    RunArgs,
    default_run_dir,
    fill,
    fitting_batch,
    flat,
    parse,
    require_not_negative,
    require_positive,
    require_views,
    resolve_run,
)
from engine.checkpoints import args_of_run, fingerprint, write_config, write_model_folder
from engine.errors import RunError, command_line, first_line, markdown, printable, require
from engine.evaluation import PUBLISHED, accuracy, evaluation_batches, warn_if_seen
from engine.files import write_text
from engine.frozen import load_pretrained
from engine.images import CenterCrop, crop_and_flip, crop_ratio, normalize
from engine.run import Run, length_of_run
from engine.sources import names_classes, open_labelled

import copy
import json
import math
import random
import re
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image, ImageOps
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cae import IMAGENET_MEAN, IMAGENET_STD, SIZES, sincos_positions
from convert import open_encoder, to_beit

# ----------------------------------------------------------------------------------------------------------------
# Flags and recipes. Values of None follow from others.


@dataclass
class ModelArgs:
    """The encoder, and what is put on it."""

    checkpoint: Annotated[AutoStr, Mark.FREE] = None
    """Run folder; model/ folder; Hub id; released .pth; a BEiT folder, such as an earlier result of this script."""
    random_init: Annotated[str | None, tyro.conf.arg(metavar="|".join([*SIZES, "RUN"]), help_behavior_hint="")] = None
    """An untrained encoder of this size, or of a run folder's shape, instead: training from scratch."""
    size: Annotated[str | None, tyro.conf.arg(metavar="|".join(SIZES), help_behavior_hint="")] = None
    """Size that the checkpoint is to have. Default: whatever it has."""
    image_size: AutoInt = None
    """Side of the square crop, in pixels. Default: the checkpoint's own."""
    pooling: Annotated[str | None, tyro.conf.arg(metavar="mean|class", help_behavior_hint="")] = None
    """What is classified: the mean of the patch tokens, or the class token. Default: mean, or as fine-tuned before."""
    relative_position_bias: bool = True
    """A bias for every distance of two patches in every block and head, from zero, beside the fixed positions."""
    drop_path: AutoFloat = None
    """Stochastic depth of the last block. Default: 0.1; tiny and nano 0, large and huge 0.2."""
    init_scale: float = 0.001
    """Factor on the initial weights of the classifier."""
    new_head: bool = False
    """Replace the classifier of a checkpoint that has one for other classes."""


@dataclass
class RecipeArgs:
    """Optimisation and augmentation."""

    lr: AutoFloat = None
    """Peak at an effective batch of 1024; scaled linearly to the one in use. Default: by method and size; on data too
    small for the recipe's batch so large that the peak is the recipe's."""
    layer_decay: AutoFloat = None
    """Factor on the learning rate from each block to the one below. Default: by method and size."""
    min_lr: float = 1e-6
    """Learning rate of the last layer that the cosine would reach one step after the run's end."""
    warmup_epochs: AutoFloat = None
    """Linear warm-up from 0. Default: 5 epochs (cae-v2 small 20), at most a tenth of the run."""
    weight_decay: float = 0.05
    """Weight decay; none on parameters of one dimension, nor on the class token."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    label_smoothing: AutoFloat = None
    """Label smoothing. Default: 0.1; tiny 0."""
    mixup: AutoFloat = None
    """Beta distribution of mixup. Default: 0.8; tiny 0.2, nano 0. With cutmix, each batch has one of the two."""
    cutmix: AutoFloat = None
    """Beta distribution of cutmix. Default: 1; tiny and nano 0."""
    randaugment: AutoInt = None
    """Magnitude M of RandAugment, 0 to 10, timm's rand-mM-mstd0.5-inc1; 0 for none. Default: 9; nano 0."""
    erasing: AutoFloat = None
    """Probability of random erasing, with noise. Default: 0.25; nano 0."""
    crop_scale: Annotated[
        tuple[float, float] | None, tyro.conf.arg(metavar="FLOAT FLOAT", help_behavior_hint="")
    ] = None
    """Area of the random crop. Default: 0.08 1.0; nano 0.8 1.0."""
    crop_ratio: AutoFloat = None
    """Evaluation: the crop's share of the resized shorter side. Default: 0.875 (224 of 256); 1 up to 64 pixels and from
    384 on."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then evaluated and written; 0 for none."""
    eval_every: float = 1.0
    """Epochs between evaluations; there is always one at the end."""
    eval_only: bool = False
    """Evaluate the checkpoint, and do nothing else."""


@dataclass
class TuneData(DataArgs):
    """Which images, and how they reach the model."""

    batch_size: AutoInt = None
    """Images per process and forward pass. Default: 128, or the effective batch size's share if that is less."""
    effective_batch_size: AutoInt = None
    """Images per optimizer step over all processes, reached by accumulation. Default: 1024, cae 4096 (nano: 32); where
    a pass would be shorter than eight steps half of it, a quarter, ... down to 32."""


@dataclass
class TuneRun(RunArgs):
    """How long, where to, and on what."""

    epochs: AutoFloat = None
    """Passes over the data. Default: tiny and base 100, small 200, large and huge 50, nano 16."""
    push_to_hub: Annotated[AutoStr, Mark.FREE] = None
    """Hub id to upload model/ to, at the end."""


@dataclass
class Classify:
    """Image classification, end to end.

    essentials:
      --checkpoint CHECKPOINT     run folder, model/ folder, id of the Hub, released .pth, BEiT; or --random-init SIZE
      --dataset DATA              labelled images: an id of the Hub, a folder, a .parquet or .tar file, or demo
      --val-fraction 0.1          a tenth to evaluate on, where the data have no validation split
      --image-size PIXELS         side of the square crop
      --effective-batch-size N    images per step, over all processes; the learning rate follows
      --epochs N                  passes over the data
      --run-dir FOLDER            where everything goes; the same command continues what is there

    examples:
      python finetune.py classify --checkpoint runs/mine --dataset my_images --val-fraction 0.1
      accelerate launch finetune.py classify --checkpoint runs/cae-v2-base
    """

    model: ModelArgs = field(default_factory=ModelArgs)
    data: TuneData = field(default_factory=TuneData)
    labels: LabelArgs = field(default_factory=LabelArgs)
    recipe: RecipeArgs = field(default_factory=RecipeArgs)
    run: TuneRun = field(default_factory=TuneRun)


# Peak learning rate per 1024 images, layer decay, epochs, warm-up epochs. The paper's and the released scripts' (v1's
# 8e-3 at 4096 is 2e-3 here). Never released, so ours, after their neighbours: nano, cae tiny, cae-v2 large, huge.
RECIPES = {
    ("cae-v2", "nano"): (4e-2, 0.9, 16, 1), ("cae", "nano"): (4e-2, 0.9, 16, 1),
    ("cae-v2", "tiny"): (4e-3, 0.85, 100, 5), ("cae", "tiny"): (4e-3, 0.85, 100, 5),
    ("cae-v2", "small"): (4e-4, 0.75, 200, 20), ("cae", "small"): (4e-3, 0.75, 200, 5),
    ("cae-v2", "base"): (2e-4, 0.75, 100, 5), ("cae", "base"): (2e-3, 0.65, 100, 5),
    ("cae-v2", "large"): (2e-4, 0.8, 50, 5), ("cae", "large"): (5e-4, 0.75, 50, 5),
    ("cae-v2", "huge"): (2e-4, 0.8, 50, 5), ("cae", "huge"): (5e-4, 0.75, 50, 5),
}  # fmt: skip


def resolve(args, origin, world=1, images=None):
    """Arguments with every None filled in from the recipe of the checkpoint's method and size; `images` is the number
    of images to learn from, once it is known. Raises UserError."""
    args = copy.deepcopy(args)
    model, data, recipe, run = args.model, args.data, args.recipe, args.run
    method, size, config = origin.method, origin.size, origin.beit.config
    require(model.size in (None, *SIZES), f"--size {model.size} does not exist: choose from {', '.join(SIZES)}")
    require(model.size in (None, size),
            f"--size {model.size} was asked for, but {origin.name} is {size or 'of no known size'} "
            f"({config.hidden_size} wide, {config.num_hidden_layers} blocks)")
    own = None if origin.classifier is None else "mean" if config.use_mean_pooling else "class"
    fill(model, "pooling", own or "mean")
    require(model.pooling in ("mean", "class"), f"--pooling is {model.pooling}: it is mean or class")
    require(model.new_head or own in (None, model.pooling),
            f"--pooling {model.pooling}: the classifier of {origin.name} was tuned with {own}: pass --new-head")
    lr, decay, epochs, warmup = RECIPES[method, size or "base"]
    nano, tiny, large = size == "nano", size == "tiny", size in ("large", "huge")
    fill(model, "image_size", config.image_size)
    require(model.image_size > 0 and model.image_size % config.patch_size == 0,
            f"--image-size {model.image_size} is not divisible by the patch of {config.patch_size} pixels")
    fill(model, "drop_path", 0.0 if nano or tiny else 0.2 if large else 0.1)
    fill(recipe, "layer_decay", decay)
    fill(recipe, "label_smoothing", 0.0 if tiny else 0.1)
    fill(recipe, "mixup", 0.0 if nano else 0.2 if tiny else 0.8)
    fill(recipe, "cutmix", 0.0 if nano or tiny else 1.0)
    fill(recipe, "randaugment", 0 if nano else 9)
    fill(recipe, "erasing", 0.0 if nano else 0.25)
    fill(recipe, "crop_scale", (0.8, 1.0) if nano else (0.08, 1.0))
    fill(recipe, "crop_ratio", crop_ratio(model.image_size))
    effective, old = 32 if nano else 1024 if method == "cae-v2" else 4096, args_of_run(run)
    resolve_run(data, run, world, old, batch=128, effective=effective, epochs=float(epochs), images=images)
    if fitting_batch(effective, images) < effective:
        # A step of AdamW is as long as its rate, whatever the batch: scaled down, few small ones lead nowhere.
        lr *= max(1.0, 1024 / data.effective_batch_size)
    fill(recipe, "lr", lr)
    fill(recipe, "warmup_epochs", old.get("warmup_epochs"))  # that of the resumed run, also if it is to be longer now
    if run.epochs is not None:
        fill(recipe, "warmup_epochs", min(float(warmup), run.epochs / 10))
    for name in ("layer_decay", "label_smoothing", "erasing", "crop_ratio", "ema"):
        value = getattr(recipe, name)
        require(0 <= value <= 1, f"--{name.replace('_', '-')} is {value}: it must lie between 0 and 1")
    require(recipe.crop_ratio > 0 and recipe.layer_decay > 0, "--crop-ratio and --layer-decay must be positive")
    require_not_negative(recipe, "min_lr", "warmup_epochs", "weight_decay", "clip_grad", "mixup", "cutmix")
    require_views(recipe)
    require_positive(recipe, "lr", "eval_every")
    require(0 <= recipe.randaugment <= 10, f"--randaugment is {recipe.randaugment}: it must lie between 0 and 10")
    require(recipe.eval_only or not recipe.randaugment or find_spec("timm"),
            "--randaugment is timm's, which is not installed: pip install timm, or --randaugment 0")
    require(0 <= model.drop_path < 1, f"--drop-path is {model.drop_path}: it must lie in [0, 1)")
    mixes = recipe.mixup > 0 or recipe.cutmix > 0
    require(not mixes or data.batch_size > 1,
            "--mixup and --cutmix mix the images of a batch, and --batch-size is 1: make it larger, or both of them 0")
    return args


# ----------------------------------------------------------------------------------------------------------------
# The model. The encoder is exactly a BEiT, so what is trained is transformers' BeitForImageClassification.


@dataclass
class Origin:
    """What fine-tuning starts from."""

    beit: nn.Module
    """The encoder, a BeitModel of transformers. Its last norm is in its pooler if it pools by the mean, else before."""
    classifier: nn.Linear | None
    """That of a fine-tuned checkpoint."""
    labels: list | None
    """Its class names."""
    method: str
    size: str | None
    name: str


def load_origin(args, seed=0):
    """ModelArgs -> Origin. Raises UserError."""
    name = args.checkpoint or f"random init {args.random_init}"
    return open_encoder(args, seed, lambda model: of_cae(model, name), of_beit)


def size_of(width, depth):
    """The row of SIZES with this width and depth, or None."""
    shape = {"dim": width, "depth": depth}
    return next((name for name, row in SIZES.items() if shape.items() <= row["encoder"].items()), None)


def of_cae(model, name):
    config = model.config
    return Origin(to_beit(model), None, None, config.method, size_of(config.dim, config.depth), name)


def of_beit(name, config):
    """Origin of a transformers folder or Hub id; `config` is its config.json. Raises UserError."""
    from transformers import BeitForImageClassification, BeitModel

    kind = config["model_type"]
    require(kind == "beit", f"--checkpoint {name} is a {kind}: a CAE or a BEiT of transformers is needed")
    tuned = "BeitForImageClassification" in (config.get("architectures") or [])
    model_class = BeitForImageClassification if tuned else BeitModel
    model = load_pretrained(name, model_class, ("beit",), "a BEiT", "--checkpoint", config)
    beit, classifier = (model.beit, model.classifier) if tuned else (model, None)
    names = model.config.id2label if tuned else {}
    shape = beit.config
    require(isinstance(shape.image_size, int), f"--checkpoint {name} is not square: {shape.image_size}")
    method = config.get("cae_method", "cae-v2")
    return Origin(beit.float(), classifier, [names[i] for i in range(len(names))] if tuned else None, method,
                  size_of(shape.hidden_size, shape.num_hidden_layers), name)  # fmt: skip


def build_model(args, origin, classes):
    """ModelArgs, Origin -> BeitForImageClassification in training mode at --image-size. Raises UserError.

    The encoder's final LayerNorm becomes the one after mean pooling. Fixed positions are computed for the grid in use
    and stay fixed; tables of relative positions are resized.
    """
    from transformers import BeitForImageClassification

    old = origin.beit.config
    tuned = origin.classifier is not None
    config = copy.deepcopy(old)
    config.image_size, config.drop_path_rate = args.image_size, args.drop_path
    config.id2label, config.label2id = dict(enumerate(classes)), {name: i for i, name in enumerate(classes)}
    config.num_labels = len(classes)
    config.use_mean_pooling = args.pooling != "class"
    config.use_relative_position_bias = old.use_relative_position_bias or args.relative_position_bias
    config.use_mask_token = False  # nothing is masked
    config.cae_method = origin.method  # for the recipe, should it be tuned further
    config.architectures = ["BeitForImageClassification"]
    model = BeitForImageClassification(config)
    state = {f"beit.{name}": value for name, value in origin.beit.state_dict().items()}
    state.pop("beit.embeddings.mask_token", None)
    if config.use_mean_pooling != old.use_mean_pooling:  # the last norm is before the pooling or after it
        norms = ["beit.layernorm", "beit.pooler.layernorm"]
        source, target = norms if config.use_mean_pooling else reversed(norms)
        for part in ("weight", "bias"):
            state[f"{target}.{part}"] = state.pop(f"{source}.{part}")
    if old.use_absolute_position_embeddings:
        state["beit.embeddings.position_embeddings"] = resize_positions(origin.beit, args.image_size)
    for name, value in list(state.items()):
        if name.endswith("relative_position_bias_table"):
            state[name] = resize_table(value, 2 * args.image_size // old.patch_size - 1)
    head = {"classifier.weight": model.classifier.weight, "classifier.bias": model.classifier.bias}
    if tuned and not args.new_head:
        require(list(origin.labels) == list(classes),
                f"{origin.name} tells {len(origin.labels)} classes apart ({', '.join(origin.labels[:3])}, ...), the "
                f"data set has {len(classes)} ({', '.join(classes[:3])}, ...): pass --new-head for a new classifier")
        head = {"classifier.weight": origin.classifier.weight, "classifier.bias": origin.classifier.bias}
    else:
        nn.init.trunc_normal_(model.classifier.weight, std=0.02)
        model.classifier.weight.data *= args.init_scale
        nn.init.zeros_(model.classifier.bias)
    missing, surplus = model.load_state_dict({**state, **head}, strict=False)
    missing = [name for name in missing if not name.endswith("relative_position_bias_table")]  # those start from zero
    assert not missing and not surplus, (missing, surplus)
    if old.use_absolute_position_embeddings:
        model.beit.embeddings.position_embeddings.requires_grad_(not is_fixed(origin.beit))
    return model.train()


def is_fixed(beit):
    """Whether the positions are the sine-cosine ones, up to the rounding of half precision."""
    table, config = beit.embeddings.position_embeddings, beit.config
    grid = config.image_size // config.patch_size
    return torch.allclose(table[0, 1:], sincos_positions(grid, grid, config.hidden_size), rtol=0, atol=4e-3)


def resize_positions(beit, image_size):
    """Absolute positions (1, 1 + N, D) of a BEiT for another image size: computed anew where they are the fixed
    sine-cosine ones, else interpolated (bicubic), as BEiT itself would in every forward."""
    table, config = beit.embeddings.position_embeddings, beit.config
    old, new = config.image_size // config.patch_size, image_size // config.patch_size
    if is_fixed(beit):
        return F.pad(sincos_positions(new, new, config.hidden_size), (0, 0, 1, 0))[None]
    if old == new:
        return table
    grid = table[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)                     # (1, D, old, old)
    grid = F.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)             # (1, 1 + N, D)


def resize_table(table, side):
    """A table of relative positions ((2g - 1)^2 + 3, heads) for another grid: distances of patches interpolated over
    (side, side), the three entries of the class token kept."""
    old = math.isqrt(len(table) - 3)
    if old == side:
        return table
    grid = table[:-3].view(1, old, old, -1).permute(0, 3, 1, 2)                          # (1, heads, old, old)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=True)
    return torch.cat([grid.flatten(2)[0].T, table[-3:]])                                 # (side^2 + 3, heads)


def parameter_groups(model, layer_decay, weight_decay):
    """Groups of trainable parameters for layer-wise decay of the learning rate: scale = decay^(depth + 1 - id), where
    id is 0 for patch embedding and class token, i + 1 for block i, depth + 1 for the rest."""
    depth, groups = model.config.num_hidden_layers, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        block = re.match(r"beit\.layers\.(\d+)\.", name)
        layer = int(block.group(1)) + 1 if block else 0 if name.startswith("beit.embeddings.") else depth + 1
        decays = parameter.ndim > 1 and not name.endswith("cls_token")
        group = {"params": [], "scale": layer_decay ** (depth + 1 - layer), "layer": layer,
                 "weight_decay": weight_decay if decays else 0.0}  # fmt: skip
        groups.setdefault((layer, decays), group)["params"].append(parameter)
    return list(groups.values())


# ----------------------------------------------------------------------------------------------------------------
# Views.


def posterize(image, bits, **_):
    """timm's, and black where no bit is kept, in one image of 660: so it was until Pillow 13, which raises an error."""
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


class RandAugment:
    """timm's, by the recipe's own name: each of two operations with probability 0.5. uint8 (3, S, S) -> the same."""

    def __init__(self, magnitude, size):
        from timm.data.auto_augment import rand_augment_transform

        grey = tuple(round(255 * channel) for channel in IMAGENET_MEAN)
        self.augment = rand_augment_transform(f"rand-m{magnitude}-mstd0.5-inc1", {
            "translate_const": int(0.45 * size), "img_mean": grey, "interpolation": Image.Resampling.BICUBIC,
        })  # fmt: skip
        for operation in self.augment.ops:
            if operation.name == "PosterizeIncreasing":
                operation.aug_fn = posterize

    def __call__(self, image):
        # Channel by channel: in a third of the time of torchvision's to_pil_image and pil_to_tensor.
        image = Image.merge("RGB", [Image.fromarray(channel) for channel in image.numpy()])
        # timm draws from Python's and numpy's generators. Here they are seeded from torch's, so that the view is a
        # function of its seed alone, and then put back.
        python_state, numpy_state = random.getstate(), np.random.get_state()
        seed = torch.randint(2**32, ()).item()
        random.seed(seed)
        np.random.seed(seed)
        try:
            image = self.augment(image)
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
        return torch.from_numpy(np.stack([np.asarray(channel) for channel in image.split()]))


class TrainView:
    """Random resized crop, flip, RandAugment; and where to erase. A pure function of the image and a seed."""

    names = ("images", "erase")

    def __init__(self, size, recipe):
        from torchvision.transforms import v2

        steps = crop_and_flip(size, recipe.crop_scale, recipe.flip)
        if recipe.randaugment:
            steps.append(RandAugment(recipe.randaugment, size))
        self.transform, self.erasing = v2.Compose(steps), recipe.erasing
        self.box = v2.RandomErasing(1.0, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=0)

    def __call__(self, image, seed):
        """uint8 (3, H, W) -> uint8 (3, S, S) and the box (4): first row, first column, height, width; 0 for none."""
        torch.default_generator.manual_seed(seed)
        image, box = self.transform(image), torch.zeros(4, dtype=torch.int64)
        if torch.rand(()) < self.erasing:
            found = self.box.make_params([image])
            if found["v"] is not None:
                box = torch.tensor([found[side] for side in "ijhw"])
        return image, box


def erase(x, boxes):
    """Fill the boxes (B, 4) of normalised images (B, 3, S, S) with normal noise, on the device."""
    i, j, h, w = boxes.T[:, :, None]                                                     # (B, 1) each
    rows, columns = (torch.arange(side, device=x.device) for side in x.shape[-2:])
    inside = ((rows >= i) & (rows < i + h))[:, :, None] & ((columns >= j) & (columns < j + w))[:, None]
    return torch.where(inside[:, None], torch.randn_like(x), x)


def mixing(recipe, num_classes):
    """Images (B, 3, S, S), labels (B) -> the same with mixup or cutmix, and labels (B, C) if either is on."""
    from torchvision.transforms import v2

    kinds = [v2.MixUp(alpha=recipe.mixup, num_classes=num_classes)] if recipe.mixup else []
    kinds += [v2.CutMix(alpha=recipe.cutmix, num_classes=num_classes)] if recipe.cutmix else []
    return v2.RandomChoice(kinds) if kinds else lambda images, labels: (images, labels)


# ----------------------------------------------------------------------------------------------------------------
# The loop.


def learning_rate(step, total, warmup, peak, final):
    """Linear from 0 to the peak, which is that of the last of `warmup` steps, then a cosine, whose last step is one
    short of the final rate. (The released table.)"""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def classify(asked):
    """Fine-tune or evaluate a classifier. Raises UserError and RunError."""
    task = "evaluate" if asked.recipe.eval_only else "classify"
    fill(asked.run, "run_dir", default_run_dir(task, asked.model, asked.data))
    with Run(asked, "cae-finetune") as run:
        with run.main_process_first():
            origin = load_origin(asked.model, asked.run.seed)
            args = resolve(asked, origin, run.world)  # the recipe depends on the checkpoint's method and size
            train_source, val_source, classes = open_data(args, origin, run.world)
            asked.labels = args.labels  # now with the split to evaluate on
            args = resolve(asked, origin, run.world, train_source and train_source.num_images)  # a batch that fits
            recipe, data = args.recipe, args.data
            torch.manual_seed(args.run.seed)
            model = build_model(args.model, origin, classes)
            length = None if recipe.eval_only else length_of_run(args.run, data, train_source)
            warmup = length and length.warmup(recipe.warmup_epochs, share=20)
            require(recipe.ema == 0 or recipe.eval_only or length.steps * (1 - recipe.ema) >= 3,
                    f"--ema {recipe.ema} averages over more steps than a third of the {length and length.steps} of the "
                    "run: lower it")
            run.open_folder(args, task="classify", weights=fingerprint(origin.beit.state_dict()))
        if run.is_main:
            warn_if_seen(args.model.checkpoint, data)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        run.header(f"classify: {origin.name}, {millions:.1f} M parameters, {args.model.image_size} pixels, "
                   f"{len(classes)} classes", length)  # fmt: skip
        about = {"origin": origin.name, "method": origin.method, "size": origin.size, "classes": len(classes)}
        skipped = []  # files of this process's part of the split to evaluate on that could not be used
        measure = partial(accuracy_of, run, args, val_source, skipped)

        if recipe.eval_only:
            if run.is_main:
                write_config(run.folder, run.values, model.config.to_dict())
            tops, images = measure(model.to(run.device).eval())
            evaluations = [{"step": 0, "epoch": None, "images": images, "accuracy": tops}]
            return finish(args, run, evaluations, about, len(skipped))

        groups = parameter_groups(model, recipe.layer_decay, recipe.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
        ema = None
        if recipe.ema:
            ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)).to(run.device)
        if args.run.compile:
            model.compile()
        model, optimizer = run.prepare(model, optimizer)  # DDP; forward under autocast
        unwrapped = run.accelerator.unwrap_model(model)
        if ema is not None:
            ema.eval().requires_grad_(False).update_parameters(unwrapped)  # the first call copies: it starts from here
            run.accelerator.register_for_checkpointing(ema)
        eval_model = unwrapped if ema is None else ema  # what is evaluated and written
        # Restores what a checkpoint holds, if there is one: weights, optimizer state, EMA, the evaluations so far, the
        # number of steps and of skipped ones, the position in the data.
        run.resume(length, unwrapped.config.to_dict())
        evaluations = run.memory.setdefault("evaluations", [])
        stream = run.stream(train_source, TrainView(args.model.image_size, recipe))
        mix = mixing(recipe, len(classes))
        model.train()

        def write_model(folder, step, weights=None):
            """model/ beside each checkpoint, and best/."""
            evaluation = next((e for e in evaluations if e["step"] == step), None)
            write_classifier(folder, eval_model, args, about, step, evaluation)

        def evaluate(line):
            """After an epoch; best/ is written if there was nothing better."""
            eval_model.eval()
            tops, images = measure(eval_model)
            model.train()
            evaluations.append({"step": line["step"], "epoch": line["epoch"], "images": images, "accuracy": tops})
            is_best = evaluations[-1] is best_of(evaluations) or not (run.folder / "best").exists()
            if run.is_main and is_best:
                problem = write_model_folder(run.folder / "best", partial(write_model, step=line["step"]))
                if problem:
                    print(printable(f"warning: {run.folder / 'best'} could not be written: {problem}"), file=sys.stderr)
            return {"top1": tops[0], "top5": tops[1]}

        peak = recipe.lr * data.effective_batch_size / 1024
        # From the checkpoint's step on; in between it logs (--log-every), evaluates (--eval-every) and saves.
        for step in run.steps(stream, evaluate=evaluate, evaluate_every=recipe.eval_every, write_model=write_model):
            lr = learning_rate(step, length.steps, warmup, peak, recipe.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]  # layer-wise decay
            run.log({"lr": lr})

            # Gradients add up over run.accumulation micro-batches: effective batch / (batch of a process * processes).
            for images, boxes, labels in run.micro_batches():
                images = to_input(images)                                                # (B, 3, S, S)
                if recipe.erasing:
                    images = erase(images, boxes)
                images, labels = mix(images, labels)
                with run.accumulate(model):  # DDP joins gradients in the last micro-batch only
                    logits = model(images).logits.float()                                # (B, C)
                    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
                    run.backward(loss)  # (loss / run.accumulation).backward()
                run.log({"loss": loss})
            # Clips the gradient, optimizer.step(), optimizer.zero_grad(); skipped if the gradient is not finite.
            run.update(optimizer, clip_grad=recipe.clip_grad)
            if ema is not None:
                with torch.no_grad():  # update_parameters would ask the device for its count, and wait
                    ema.multi_avg_fn(list(ema.module.parameters()), list(unwrapped.parameters()), None)

        finish(args, run, evaluations, about, len(skipped))


def accuracy_of(run, args, source, skipped, model):
    """Top-1 and top-5 accuracy of a model in percent, and on how many images; `skipped` collects files that could not
    be used. Called on all ranks. Raises UserError and RunError."""
    view = CenterCrop(args.model.image_size, args.recipe.crop_ratio)
    batches = evaluation_batches(run.accelerator, source, view, args.data, "images to evaluate on", skipped)
    batches = ((to_input(images), labels) for images, labels in batches)
    tops, images = accuracy(run.accelerator, lambda x: model(x).logits, batches)
    require(images, f"split {args.labels.val_split} of {source.name} holds no image with a label")
    return tops, images


def open_data(args, origin, world):
    """The Source to learn from (None with --eval-only), the one to evaluate on, and the classes. Raises UserError."""
    eval_only = args.recipe.eval_only
    require(not eval_only or (origin.classifier is not None and not args.model.new_head),
            f"--eval-only: {origin.name} has no classifier yet; give the run folder of a finetune.py classify")
    train_source, val_source = open_labelled(args.data, args.labels, world, learn=not eval_only)
    classes = val_source.classes
    if eval_only and set(classes) < set(origin.labels) and not names_classes(val_source):
        classes = origin.labels  # numbers or words, of which this split does not have all
        val_source = replace(val_source, classes=classes)
    return train_source, val_source, classes


def to_input(images):
    """uint8 (B, 3, S, S) -> what the model takes, on the same device."""
    return normalize(images.float() / 255, IMAGENET_MEAN, IMAGENET_STD)


def best_of(evaluations):
    """The evaluation with the highest top-1; the first of equals."""
    return max(evaluations, key=lambda evaluation: evaluation["accuracy"][0])


# ----------------------------------------------------------------------------------------------------------------
# What is written.


def image_processor(args):
    """The evaluation's view as an image processor of transformers: shorter side, bicubic, centre crop, ImageNet's mean
    and standard deviation."""
    from transformers import CLIPImageProcessor

    size = args.model.image_size
    return CLIPImageProcessor(
        do_resize=True, size={"shortest_edge": int(size / args.recipe.crop_ratio)}, resample=3,
        do_center_crop=True, crop_size={"height": size, "width": size}, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD), do_convert_rgb=True,
    )  # fmt: skip


def write_classifier(folder, model, args, about, step, evaluation):
    """model/: what transformers loads, with image processor and model card."""
    from transformers.utils import logging as transformers_logging

    unwrapped = model.module if isinstance(model, AveragedModel) else model
    transformers_logging.disable_progress_bar()  # of a single file
    unwrapped.save_pretrained(folder)
    image_processor(args).save_pretrained(folder)
    model_card(args, about, step, evaluation).save(folder / "README.md")


def model_card(args, about, step, evaluation):
    """What was trained, on what, how, and how good it is."""
    from huggingface_hub import ModelCard, ModelCardData

    data, recipe = args.data, args.recipe
    is_hub = "/" in data.dataset and not Path(data.dataset).exists()
    header = ModelCardData(library_name="transformers", pipeline_tag="image-classification", license="apache-2.0",
                         tags=["image-classification", "beit", "cae"], datasets=[data.dataset] if is_hub else None)
    accuracy = "not measured yet"
    if evaluation:
        top1, top5 = evaluation["accuracy"]
        accuracy = (f"top-1 {top1:.2f} %, top-5 {top5:.2f} % on the {evaluation['images']} images of split "
                    f"{markdown(args.labels.val_split)}")  # fmt: skip
    values = {**flat(args), "steps done": step}
    lines = "\n".join(f"| {name} | {markdown(value)} |" for name, value in values.items())
    return ModelCard(f"""---
{header.to_yaml()}
---

# Image classifier, fine-tuned from a context autoencoder

A `BeitForImageClassification` of transformers: {markdown(about['origin'])} (method {markdown(about['method'])}, size
{about['size']}), fine-tuned end to end on {markdown(data.dataset)}, split {markdown(data.split)}, {about['classes']}
classes, at {args.model.image_size} pixels.

Accuracy: {accuracy}.

```python
from transformers import pipeline

classify = pipeline("image-classification", "PATH OR ID OF THIS FOLDER")
classify("image.jpg")
```

## Recipe

AdamW (0.9, 0.999), learning rate {recipe.lr:g} per 1024 images, layer-wise decay {recipe.layer_decay:g}, cosine per
step. Every value:

| | |
|---|---|
{lines}
""")


def finish(args, run, evaluations, about, skipped):
    """Table, result.json, upload; called on all ranks."""
    last, top = evaluations[-1], best_of(evaluations)
    skipped = sum(run.gather([skipped]))
    run.end()
    if not run.is_main:
        return
    same = [row for row in PUBLISHED if row[2] == about["size"] and row[3]]
    result = run.write_result("finetune.py", {
        "task": "classify",
        "top1": round(last["accuracy"][0], 3),
        "top5": round(last["accuracy"][1], 3),
        "best_epoch_top1": round(top["accuracy"][0], 3),
        "best_epoch": top["epoch"],
        "epochs": last["epoch"],
        "steps": last["step"],
        "images": last["images"],
        "skipped": skipped,
        "encoder": about["origin"],
        **about,
        "image_size": args.model.image_size,
        "dataset": args.data.dataset,
        "split": args.data.split,
        "val_split": args.labels.val_split,
        "batch": args.data.effective_batch_size,
        "seed": args.run.seed,
        "reference": [{"model": name, "top1": top1} for name, _, _, top1, _ in
                      sorted(same, key=lambda row: row[1] != about["method"])],
    })  # fmt: skip
    if args.run.push_to_hub and not args.recipe.eval_only:
        result["hub"] = push(run.folder / "model", args.run.push_to_hub)
        write_text(run.folder / "result.json", json.dumps(result, indent=2))
    rows = [(about["origin"], result["top1"], result["top5"])]
    rows += [(f"{row['model']} ({'' if about['classes'] == 1000 else 'on '}ImageNet-1K)", row["top1"], None)
             for row in result["reference"]]  # fmt: skip
    width = max(34, *(len(name) + 2 for name, _, _ in rows))
    lines = [f"{name:{width}}{top1:8.1f}" + (f"{top5:8.1f}" if top5 is not None else "") for name, top1, top5 in rows]
    lines = ["", f"{'fine-tuned':{width}}{'top-1':>8}{'top-5':>8}", *lines]
    if not args.recipe.eval_only:
        lines += [f"best epoch: top-1 {result['best_epoch_top1']:.1f}, chosen on these images",
                  "", f'the classifier: transformers.pipeline("image-classification", "{run.folder / "model"}")']
    run.print_result(lines, result)


def push(folder, hub_id):
    """Upload model/ to the Hub; its address. Raises RunError."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(hub_id, exist_ok=True)
        return str(api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Fine-tuned classifier"))
    except Exception as error:  # the Hub's client has errors of its own for every way in which a network fails
        raise RunError(f"{folder} could not be uploaded to {hub_id}: {first_line(error)}; it is whole, try again "
                       f"with `hf upload {hub_id} {folder}`") from error  # fmt: skip


def main():
    command, *flags = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print(__doc__)
        command, flags = "classify", ["--help"]

    def work():
        require(command == "classify", f"finetune.py {command}: there is no such command; give classify")
        classify(parse(Classify, flags, prog="finetune.py classify"))

    command_line(work)


if __name__ == "__main__":
    main()
