"""Fine-tune a pretrained encoder end to end: classify, segment, detect. What comes out loads without this code.

    accelerate launch finetune.py classify --checkpoint runs/cae-v2-base --dataset ILSVRC/imagenet-1k
    accelerate launch finetune.py segment  --checkpoint runs/cae-v2-base --dataset ADEChallengeData2016
    accelerate launch finetune.py detect   --checkpoint runs/cae-v2-base --dataset coco
    python finetune.py classify --checkpoint runs/cae-v2-nano-demo --dataset demo

    AutoModelForImageClassification.from_pretrained("runs/classify-cae-v2-base-imagenet-1k/model")

Read in this order: flags and recipes, the model, the views, `Classification`, the loop in `tune`, what is written.
Segmentation and detection, two tasks more for the same loop, are in dense.py.
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
from engine.run import Run, join_statistics, length_of_run
from engine.sources import names_classes, open_labelled

import copy
import json
import math
import random
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
class EncoderArgs:
    """The encoder."""

    checkpoint: Annotated[AutoStr, Mark.FREE] = None
    """Run folder; model/ folder; Hub id; released .pth; a BEiT folder, such as an earlier result of this script."""
    random_init: Annotated[str | None, tyro.conf.arg(metavar="|".join([*SIZES, "RUN"]), help_behavior_hint="")] = None
    """An untrained encoder of this size, or of a run folder's shape, instead: training from scratch."""
    size: Annotated[str | None, tyro.conf.arg(metavar="|".join(SIZES), help_behavior_hint="")] = None
    """Size that the checkpoint is to have. Default: whatever it has."""
    image_size: AutoInt = None
    """Side of the square crop, in pixels. Default: the checkpoint's own."""
    relative_position_bias: bool = True
    """A bias for every distance of two patches in every block and head, from zero, beside the fixed positions."""
    drop_path: AutoFloat = None
    """Stochastic depth of the last block. Default: 0.1; tiny and nano 0, large and huge 0.2."""


@dataclass
class ModelArgs(EncoderArgs):
    """The encoder, and what is put on it."""

    pooling: Annotated[str | None, tyro.conf.arg(metavar="mean|class", help_behavior_hint="")] = None
    """What is classified: the mean of the patch tokens, or the class token. Default: mean, or as fine-tuned before."""
    init_scale: float = 0.001
    """Factor on the initial weights of the classifier."""
    new_head: bool = False
    """Replace the classifier of a checkpoint that has one for other classes."""


@dataclass
class OptimizerArgs:
    """Optimisation, and when it is evaluated."""

    layer_decay: AutoFloat = None
    """Factor on the learning rate from each block to the one below. Default: by method and size."""
    weight_decay: float = 0.05
    """Weight decay; none on parameters of one dimension, nor on the class token."""
    clip_grad: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is then evaluated and written; 0 for none."""
    eval_every: float = 1.0
    """Epochs between evaluations; there is always one at the end."""
    eval_steps: AutoInt = None
    """Steps between evaluations, instead of epochs."""
    eval_only: bool = False
    """Evaluate the checkpoint, and do nothing else."""


@dataclass
class RecipeArgs(OptimizerArgs):
    """Optimisation and augmentation."""

    lr: AutoFloat = None
    """Peak at an effective batch of 1024; scaled linearly to the one in use. Default: by method and size; on data too
    small for the recipe's batch so large that the peak is the recipe's."""
    min_lr: float = 1e-6
    """Learning rate of the last layer that the cosine would reach one step after the run's end."""
    warmup_epochs: AutoFloat = None
    """Linear warm-up from 0. Default: 5 epochs (cae-v2 small 20), at most a tenth of the run."""
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
    resolve_encoder(model, origin)
    own = None if origin.classifier is None else "mean" if config.use_mean_pooling else "class"
    fill(model, "pooling", own or "mean")
    require(model.pooling in ("mean", "class"), f"--pooling is {model.pooling}: it is mean or class")
    require(model.new_head or own in (None, model.pooling),
            f"--pooling {model.pooling}: the classifier of {origin.name} was tuned with {own}: pass --new-head")
    lr, decay, epochs, warmup = RECIPES[method, size or "base"]
    nano, tiny = size == "nano", size == "tiny"
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
    require_shares(recipe, "label_smoothing", "erasing", "crop_ratio")
    require_positive(recipe, "crop_ratio")
    require_not_negative(recipe, "min_lr", "warmup_epochs", "mixup", "cutmix")
    require_views(recipe)
    require_optimizer(recipe)
    require(0 <= recipe.randaugment <= 10, f"--randaugment is {recipe.randaugment}: it must lie between 0 and 10")
    require(recipe.eval_only or not recipe.randaugment or find_spec("timm"),
            "--randaugment is timm's, which is not installed: pip install timm, or --randaugment 0")
    mixes = recipe.mixup > 0 or recipe.cutmix > 0
    require(not mixes or data.batch_size > 1,
            "--mixup and --cutmix mix the images of a batch, and --batch-size is 1: make it larger, or both of them 0")
    return args


def resolve_encoder(model, origin, image_size=None):
    """EncoderArgs filled in, for any task; `image_size` is the recipe's, None: the checkpoint's. Raises UserError."""
    config, size = origin.beit.config, origin.size
    require(model.size in (None, *SIZES), f"--size {model.size} does not exist: choose from {', '.join(SIZES)}")
    require(model.size in (None, size),
            f"--size {model.size} was asked for, but {origin.name} is {size or 'of no known size'} "
            f"({config.hidden_size} wide, {config.num_hidden_layers} blocks)")
    fill(model, "image_size", image_size or config.image_size)
    require(model.image_size > 0 and model.image_size % config.patch_size == 0,
            f"--image-size {model.image_size} is not divisible by the patch of {config.patch_size} pixels")
    fill(model, "drop_path", 0.0 if size in ("nano", "tiny") else 0.2 if size in ("large", "huge") else 0.1)
    require(0 <= model.drop_path < 1, f"--drop-path is {model.drop_path}: it must lie in [0, 1)")


def require_optimizer(recipe):
    """What every task asks of its OptimizerArgs. Raises UserError."""
    require_shares(recipe, "layer_decay", "ema", "flip")
    require_not_negative(recipe, "weight_decay", "clip_grad")
    require_positive(recipe, "lr", "layer_decay", "eval_every", "eval_steps")


def require_shares(group, *names):
    for name in names:
        value = getattr(group, name)
        require(0 <= value <= 1, f"--{name.replace('_', '-')} is {value}: it must lie between 0 and 1")


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
    cae: nn.Module | None = None
    """The CAE that it came from, if it is one."""
    tuned: nn.Module | None = None
    """The whole model that segments or detects, if it is one; `labels` are its classes."""


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
    return Origin(to_beit(model), None, None, config.method, size_of(config.dim, config.depth), name, model)


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
    state = encoder_state(origin.beit, args.image_size)
    if config.use_mean_pooling != old.use_mean_pooling:  # the last norm is before the pooling or after it
        norms = ["beit.layernorm", "beit.pooler.layernorm"]
        source, target = norms if config.use_mean_pooling else reversed(norms)
        for part in ("weight", "bias"):
            state[f"{target}.{part}"] = state.pop(f"{source}.{part}")
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


def encoder_state(beit, image_size):
    """State dict of an encoder for another image size, by the names that transformers' models have it under."""
    state = {f"beit.{name}": value for name, value in beit.state_dict().items()}
    state.pop("beit.embeddings.mask_token", None)
    if beit.config.use_absolute_position_embeddings:
        state["beit.embeddings.position_embeddings"] = resize_positions(beit, image_size)
    for name, value in list(state.items()):
        if name.endswith("relative_position_bias_table"):
            state[name] = resize_table(value, 2 * image_size // beit.config.patch_size - 1)
    return state


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


def parameter_groups(model, embeddings, blocks, layer_decay, weight_decay, encoder_factor=1.0):
    """Groups of trainable parameters for layer-wise decay of the learning rate: scale = decay^(depth + 1 - id), where
    id is 0 for the encoder's `embeddings`, i + 1 for its i-th of `blocks`, depth + 1 for the rest of the model.
    `encoder_factor` is one more on the encoder's. (The blocks are told by what they are: a decoder has `layers`, too.)
    """
    layers = [embeddings, *blocks]
    depth, groups = len(blocks), {}
    layer_of = {parameter: i for i, layer in enumerate(layers) for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of.get(parameter, depth + 1)
        decays = parameter.ndim > 1 and not name.endswith("cls_token")
        scale = layer_decay ** (depth + 1 - layer) * (encoder_factor if layer <= depth else 1.0)
        group = {"params": [], "scale": scale, "layer": layer, "weight_decay": weight_decay if decays else 0.0}
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
# The task. `tune` asks these things of it; dense.py has two more that answer them.


class Classification:
    """Images -> one class each. The order of the methods is that in which they are called.

    Fields for the loop: name; metric, the score by which the best evaluation is chosen; title, pipeline, tags, of the
    model card; from open() on train_source (None with --eval-only), val_source, classes; from build() on args, origin,
    and skipped, files to evaluate on that could not be used.
    """

    name, metric = "classify", "top1"
    title = "Image classifier, fine-tuned from a context autoencoder"
    pipeline, tags = "image-classification", ["image-classification", "beit", "cae"]

    def load(self, model, seed):
        """EncoderArgs -> Origin. Raises UserError."""
        return load_origin(model, seed)

    def resolve(self, args, origin, world, images=None):
        """Arguments with every None filled in; `images` to learn from, once it is known. Raises UserError."""
        return resolve(args, origin, world, images)

    def open(self, args, origin, world):
        """The data, and the classes. Raises UserError."""
        self.train_source, self.val_source, self.classes = open_data(args, origin, world)

    def build(self, args, origin):
        """The model in training mode. Raises UserError."""
        self.args, self.origin, self.skipped = args, origin, []
        return build_model(args.model, origin, self.classes)

    def encoder(self, model):
        """The encoder's embeddings and its blocks, for layer-wise decay; and what --compile compiles."""
        return model.beit.embeddings, model.beit.layers, model

    def peak(self):
        """The highest learning rate."""
        return self.args.recipe.lr * self.args.data.effective_batch_size / 1024

    def warmup(self, length):
        """Steps in which the learning rate rises. Raises UserError."""
        return length.warmup(self.args.recipe.warmup_epochs, share=20)

    def learning_rate(self, step, length, warmup):
        return learning_rate(step, length.steps, warmup, self.peak(), self.args.recipe.min_lr)

    def train_view(self):
        """Of images to learn from: a pure function of the image and a seed."""
        self.mix = mixing(self.args.recipe, len(self.classes))
        return TrainView(self.args.model.image_size, self.args.recipe)

    def losses(self, model, images, boxes, labels):
        """What the view gives, and labels (B) -> {"loss": a scalar, ...}."""
        images = to_input(images)                                                        # (B, 3, S, S)
        if self.args.recipe.erasing:
            images = erase(images, boxes)
        images, labels = self.mix(images, labels)
        logits = model(images).logits.float()                                            # (B, C)
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=self.args.recipe.label_smoothing)}

    def evaluate(self, run, model):
        """{score: percent} of a model, and on how many images. Called on all ranks. Raises UserError and RunError."""
        view = CenterCrop(self.args.model.image_size, self.args.recipe.crop_ratio)
        batches = evaluation_batches(run.accelerator, self.val_source, view, self.args.data, "images to evaluate on",
                                     self.skipped)  # fmt: skip
        batches = ((to_input(images), labels) for images, labels in batches)
        (top1, top5), images = accuracy(run.accelerator, lambda x: model(x).logits, batches)
        return {"top1": top1, "top5": top5}, images

    def write(self, folder, model):
        """model/, but for the card."""
        model.save_pretrained(folder)
        image_processor(self.args).save_pretrained(folder)

    def card(self, scores, images):
        """(the model in a sentence, how good it is, how to use it), for the model card."""
        found = (f"top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} % on the {images} images of split "
                 f"{markdown(self.args.labels.val_split)}") if scores else "not measured yet"  # fmt: skip
        usage = """from transformers import pipeline

classify = pipeline("image-classification", "PATH OR ID OF THIS FOLDER")
classify("image.jpg")"""
        return "A `BeitForImageClassification` of transformers", f"Accuracy: {found}.", usage

    def table(self, scores, size):
        """Its last lines: {column: score}, published rows [(name, {score: percent})] and where they were measured;
        then, for dense tasks, the header and the rows of a table per class."""
        same = [row for row in PUBLISHED if row[2] == size and row[3]]
        same.sort(key=lambda row: row[1] != self.origin.method)
        published = [(name, {"top1": top1}) for name, _, _, top1, _ in same]
        where = "ImageNet-1K" if len(self.classes) == 1000 else "on ImageNet-1K"
        return {"top-1": "top1", "top-5": "top5"}, published, where

    def last_line(self, folder):
        return f'the classifier: transformers.pipeline("image-classification", "{folder}")'


def learning_rate(step, total, warmup, peak, final):
    """Linear from 0 to the peak, which is that of the last of `warmup` steps, then a cosine, whose last step is one
    short of the final rate. (The released table.)"""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


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


# ----------------------------------------------------------------------------------------------------------------
# The loop.


def tune(asked, task):
    """Fine-tune or evaluate a model of this task. Raises UserError and RunError."""
    eval_only = asked.recipe.eval_only
    fill(asked.run, "run_dir", default_run_dir("evaluate" if eval_only else task.name, asked.model, asked.data))
    with Run(asked, "cae-finetune") as run:
        with run.main_process_first():
            origin = task.load(asked.model, asked.run.seed)
            # Twice: the recipe depends on the checkpoint's method and size, and then on the number of images as well.
            args = task.resolve(asked, origin, run.world)
            task.open(args, origin, run.world)
            asked.labels = args.labels  # now with the split to evaluate on
            args = task.resolve(asked, origin, run.world, task.train_source and task.train_source.num_images)
            recipe, data = args.recipe, args.data
            torch.manual_seed(args.run.seed)
            model = task.build(args, origin)
            length = None if eval_only else length_of_run(args.run, data, task.train_source)
            warmup = length and task.warmup(length)
            require(recipe.ema == 0 or eval_only or length.steps * (1 - recipe.ema) >= 3,
                    f"--ema {recipe.ema} averages over more steps than a third of the {length and length.steps} of the "
                    "run: lower it")
            run.open_folder(args, task=task.name, weights=fingerprint(origin.beit.state_dict()))
        if run.is_main:
            warn_if_seen(args.model.checkpoint, data)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        run.header(f"{task.name}: {origin.name}, {millions:.1f} M parameters, {args.model.image_size} pixels, "
                   f"{len(task.classes)} classes", length)  # fmt: skip

        if eval_only:
            if run.is_main:
                write_config(run.folder, run.values, model.config.to_dict())
            scores, images = measure(run, task, model.to(run.device).eval())
            return finish(run, task, model, [{"step": 0, "epoch": None, "images": images, "scores": scores}])

        embeddings, blocks, compiled = task.encoder(model)
        factor = getattr(recipe, "encoder_factor", 1.0)
        groups = parameter_groups(model, embeddings, blocks, recipe.layer_decay, recipe.weight_decay, factor)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
        if run.world > 1 and run.device.type == "cuda":  # gloo has none: on CPUs each process normalises by its batch
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        ema = None
        if recipe.ema:
            ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)).to(run.device)
        if args.run.compile:
            compiled.compile()
        model, optimizer = run.prepare(model, optimizer)  # DDP; forward under autocast
        unwrapped = run.accelerator.unwrap_model(model)
        if ema is not None:
            ema.eval().requires_grad_(False).update_parameters(unwrapped)  # the first call copies: it starts from here
            run.accelerator.register_for_checkpointing(ema)
        eval_model = unwrapped if ema is None else ema.module  # what is evaluated and written
        # Restores what a checkpoint holds, if there is one: weights, optimizer state, EMA, the evaluations so far, the
        # number of steps and of skipped ones, the position in the data.
        run.resume(length, unwrapped.config.to_dict())
        evaluations = run.memory.setdefault("evaluations", [])
        for evaluation in evaluations:
            if "accuracy" in evaluation:  # of runs from before there were other tasks
                evaluation["scores"] = dict(zip(("top1", "top5"), evaluation.pop("accuracy"), strict=True))
        stream = run.stream(task.train_source, task.train_view())
        model.train()

        def settle():
            """Before anybody looks at the model: BatchNorm's running statistics, which are averages over steps, become
            those of all processes, and of the moving average as well."""
            join_statistics(run.accelerator, unwrapped)
            if ema is not None:
                for average, buffer in zip(ema.module.buffers(), unwrapped.buffers(), strict=True):
                    average.copy_(buffer)

        def write_model(folder, step, weights=None):
            """model/ beside each checkpoint, and best/."""
            write_tuned(folder, eval_model, task, step, evaluations)

        def evaluate(line):
            """After an epoch; best/ is written if there was nothing better."""
            settle()
            eval_model.eval()
            scores, images = measure(run, task, eval_model)
            model.train()
            evaluations.append({"step": line["step"], "epoch": line["epoch"], "images": images, "scores": scores})
            is_best = evaluations[-1] is best_of(evaluations, task.metric) or not (run.folder / "best").exists()
            if run.is_main and is_best:
                problem = write_model_folder(run.folder / "best", partial(write_model, step=line["step"]))
                if problem:
                    print(printable(f"warning: {run.folder / 'best'} could not be written: {problem}"), file=sys.stderr)
            return numbers_of(scores)

        # From the checkpoint's step on; in between it logs (--log-every), evaluates (--eval-every) and saves.
        for step in run.steps(stream, evaluate=evaluate, evaluate_every=recipe.eval_every,
                              evaluate_steps=recipe.eval_steps, write_model=write_model,
                              before_checkpoint=settle):  # fmt: skip
            lr = task.learning_rate(step, length, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]  # layer-wise decay
            run.log({"lr": lr})

            # Gradients add up over run.accumulation micro-batches: effective batch / (batch of a process * processes).
            for batch in run.micro_batches():
                with run.accumulate(model):  # DDP joins gradients in the last micro-batch only
                    losses = task.losses(model, *batch)
                    run.backward(losses["loss"])  # (loss / run.accumulation).backward()
                run.log(losses)
            # Clips the gradient, optimizer.step(), optimizer.zero_grad(); skipped if the gradient is not finite.
            run.update(optimizer, clip_grad=recipe.clip_grad)
            if ema is not None:
                with torch.no_grad():  # update_parameters would ask the device for its count, and wait
                    ema.multi_avg_fn(list(ema.module.parameters()), list(unwrapped.parameters()), None)

        finish(run, task, eval_model, evaluations)


def measure(run, task, model):
    """task.evaluate, without gradients and for images that there are. Raises UserError and RunError."""
    with torch.no_grad():
        scores, images = task.evaluate(run, model)
    require(images, f"split {task.args.labels.val_split} of {task.val_source.name} holds no image with a label")
    return scores, images


def numbers_of(scores):
    """Of the scores those that are one number."""
    return {name: value for name, value in scores.items() if value is None or isinstance(value, (int, float))}


def best_of(evaluations, metric):
    """The evaluation with the highest score; the first of equals."""
    return max(evaluations, key=lambda evaluation: evaluation["scores"][metric] or 0.0)


# ----------------------------------------------------------------------------------------------------------------
# What is written.


def write_tuned(folder, model, task, step, evaluations):
    """model/: what transformers loads, with its processor and a model card."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # of a single file
    task.write(folder, model)
    evaluation = next((e for e in evaluations if e["step"] == step), None)
    model_card(task, step, evaluation).save(folder / "README.md")


def model_card(task, step, evaluation):
    """What was trained, on what, how, and how good it is."""
    from huggingface_hub import ModelCard, ModelCardData

    args, origin = task.args, task.origin
    data = args.data
    is_hub = "/" in data.dataset and not Path(data.dataset).exists()
    header = ModelCardData(library_name="transformers", pipeline_tag=task.pipeline, license="apache-2.0",
                         tags=task.tags, datasets=[data.dataset] if is_hub else None)
    model, accuracy, usage = task.card(*((evaluation["scores"], evaluation["images"]) if evaluation else (None, 0)))
    values = {**flat(args), "steps done": step}
    lines = "\n".join(f"| {name} | {markdown(value)} |" for name, value in values.items())
    return ModelCard(f"""---
{header.to_yaml()}
---

# {task.title}

{model}: {markdown(origin.name)} (method {markdown(origin.method)}, size {origin.size}), fine-tuned end to end on
{markdown(data.dataset)}, split {markdown(data.split)}, {len(task.classes)} classes, at {args.model.image_size} pixels.

{accuracy}

```python
{usage}
```

## Recipe

AdamW (0.9, 0.999), highest learning rate {task.peak():g}, layer-wise decay {args.recipe.layer_decay:g}. Every value:

| | |
|---|---|
{lines}
""")


def finish(run, task, model, evaluations):
    """Table, result.json, pictures, upload; called on all ranks."""
    args, origin, last, top = task.args, task.origin, evaluations[-1], best_of(evaluations, task.metric)
    skipped = sum(run.gather([len(task.skipped)]))
    run.end()
    if not run.is_main:
        return
    scores, best = last["scores"], top["scores"][task.metric]
    columns, published, where, *per_class = task.table(scores, origin.size)
    rounded = {name: None if value is None else round(value, 3) for name, value in numbers_of(scores).items()}
    result = {
        "task": task.name,
        **rounded,
        **{name: value for name, value in scores.items() if name not in rounded},
        f"best_epoch_{task.metric}": best and round(best, 3),
        "best_epoch": top["epoch"],
        "epochs": last["epoch"],
        "steps": last["step"],
        "images": last["images"],
        "skipped": skipped,
        "encoder": origin.name,
        "origin": origin.name,
        "method": origin.method,
        "size": origin.size,
        "classes": len(task.classes),
        "image_size": args.model.image_size,
        "dataset": args.data.dataset,
        "split": args.data.split,
        "val_split": args.labels.val_split,
        "batch": args.data.effective_batch_size,
        "seed": args.run.seed,
        "reference": [{"model": name, **figures} for name, figures in published],
    }  # fmt: skip
    saves_pictures = getattr(args.run, "save_pictures", 0)
    if saves_pictures:
        result["pictures"] = str(run.folder / "pictures")
    result = run.write_result("finetune.py", result)
    if saves_pictures:
        task.save_pictures(run, model.eval())
    if args.run.push_to_hub and not args.recipe.eval_only:
        result["hub"] = push(run.folder / "model", args.run.push_to_hub)
        write_text(run.folder / "result.json", json.dumps(result, indent=2))
    rows = [(origin.name, rounded), *((f"{name} ({where})", figures) for name, figures in published)]
    rows = [(name, *(figures.get(score) for score in columns.values())) for name, figures in rows]
    lines = [line for header, table in [*zip(per_class[::2], per_class[1::2], strict=True),
                                        (("fine-tuned", *columns), rows)] for line in table_lines(header, table)]
    if not args.recipe.eval_only:
        column = next(column for column, score in columns.items() if score == task.metric)
        lines += [f"best epoch: {column} {best or 0:.1f}, chosen on these images", "",
                  task.last_line(run.folder / "model")]  # fmt: skip
    run.print_result(lines, result)


def table_lines(header, rows):
    """A table for the terminal: names, and figures of one decimal or None."""
    width = max(34, *(len(name) + 2 for name, *_ in rows))
    lines = ["", f"{header[0]:{width}}" + "".join(f"{column:>8}" for column in header[1:])]
    for name, *figures in rows:
        lines.append((f"{name:{width}}" + "".join(" " * 8 if v is None else f"{v:8.1f}" for v in figures)).rstrip())
    return lines


def push(folder, hub_id):
    """Upload model/ to the Hub; its address. Raises RunError."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(hub_id, exist_ok=True)
        return str(api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Fine-tuned model"))
    except Exception as error:  # the Hub's client has errors of its own for every way in which a network fails
        raise RunError(f"{folder} could not be uploaded to {hub_id}: {first_line(error)}; it is whole, try again "
                       f"with `hf upload {hub_id} {folder}`") from error  # fmt: skip


def kinds_of(command):
    """A sub-command's arguments and its task. Raises UserError."""
    require(command in ("classify", "segment", "detect"),
            f"finetune.py {command}: there is no such command; give classify, segment or detect")
    if command == "classify":
        return Classify, Classification
    sys.modules.setdefault("finetune", sys.modules[__name__])  # dense.py imports this file by its name
    import dense

    return (dense.Segment, dense.Segmentation) if command == "segment" else (dense.Detect, dense.Detection)


def main():
    command, *flags = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print(__doc__)
        command, flags = "classify", ["--help"]

    def work():
        arguments, task = kinds_of(command)
        tune(parse(arguments, flags, prog=f"finetune.py {command}"), task())

    command_line(work)


if __name__ == "__main__":
    main()
