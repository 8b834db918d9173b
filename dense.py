"""Segmentation and detection: the papers' two dense tasks, for the loop of finetune.py.

    accelerate launch finetune.py segment --checkpoint runs/cae-v2-base --dataset ADEChallengeData2016
    accelerate launch finetune.py detect  --checkpoint runs/cae-v2-base --dataset coco
    python finetune.py segment --checkpoint runs/cae-v2-nano-demo --dataset demo

Segmentation is transformers' UperNet on a BeitBackbone; detection torchvision's Mask R-CNN on the same, a cascade of
it, or transformers' LW-DETR. Read in this order: flags, what both tasks share, `Segmentation`, `Detection`, pictures.
What a task answers to the loop is told at `Classification` in finetune.py.
"""

# engine comes first: it sets what has to be set before torch is imported.
from engine.annotations import (
    IGNORE,
    IGNORE_OF_MANY,
    CocoFolder,
    PairedFolders,
    decode_annotation,
    encode_masks,
    map_numbers,
    masks_of,
    object_classes,
    read_objects,
)
from engine.arguments import (
    AutoFloat,
    AutoInt,
    AutoStr,
    LabelArgs,
    Mark,
    fill,
    require_not_negative,
    require_positive,
    resolve_run,
)
from engine.checkpoints import args_of_run
from engine.errors import UserError, first_line, markdown, require
from engine.evaluation import average_precision, confusion, evaluation_batches, segmentation_scores, together
from engine.frozen import load_pretrained
from engine.images import decode, to_device
from engine.network import hub_file
from engine.run import total_steps
from engine.sources import LabelKind, Source, open_annotated, read_image
from engine.stream import one_pass

import copy
import itertools
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

from cae import IMAGENET_MEAN, IMAGENET_STD
from convert import open_encoder, to_lw_detr
from finetune import (
    EncoderArgs,
    OptimizerArgs,
    Origin,
    TuneData,
    TuneRun,
    encoder_state,
    is_fixed,
    of_beit,
    of_cae,
    require_optimizer,
    require_shares,
    resolve_encoder,
    size_of,
    to_input,
)

GREY = tuple(round(255 * channel) for channel in IMAGENET_MEAN)  # around an image, and 0 once it is normalised

# ----------------------------------------------------------------------------------------------------------------
# Flags and recipes. Values of None follow from others. "nano" is the demo's encoder, with patches of 4 pixels.


@dataclass
class DenseData(TuneData):
    """Which images, and how they reach the model."""

    dataset: Annotated[str, tyro.conf.arg(help_behavior_hint=""), Mark.DATA] = ""
    """Folder of images/ and annotations/ (ADE20K), of leftImg8bit/ and gtFine/ (Cityscapes), of images and COCO's JSON;
    Parquet, tar; Hub id; or `demo`."""
    label_column: AutoStr = None
    """Column with the annotations: a picture of class numbers, or objects. Default: `annotation`, `objects`, ..."""
    batch_size: AutoInt = None
    """Images per process and forward pass. Default: the effective batch size's share, at most 16; detection at most
    4."""
    effective_batch_size: AutoInt = None
    """Images per optimizer step over all processes, reached by accumulation. Default: segmentation 16, detection 32
    (nano: 8 and 4)."""


@dataclass
class DenseLabels(LabelArgs):
    """The split to evaluate on, and the classes."""

    num_classes: AutoInt = None
    """Number of classes. Default: read from the data, or from --class-names."""
    class_names: AutoStr = None
    """File with the names of the classes: one a line, or JSON, a list or {number: name}. Default: read from the data,
    else numbers."""


@dataclass
class DenseRun(TuneRun):
    """How long, where to, and on what."""

    epochs: AutoFloat = None
    """Passes over the data. Default: detection 12, lw-detr 60; segmentation and nano have a number of steps."""
    steps: AutoInt = None
    """Optimizer steps, instead of epochs. Default: segmentation 160,000, nano 300; nano's mask-rcnn 280,
    cascade 240, lw-detr 300."""
    save_pictures: Annotated[int, Mark.FREE] = 0
    """At the end: predictions over so many images to evaluate on, beside the truth, in pictures/."""


@dataclass
class SegmentModel(EncoderArgs):
    """The encoder, and UperNet on it."""

    image_size: AutoInt = None
    """Side of the square crops, in pixels. Default: 32 patches, which is 512 for patches of 16; nano 64."""
    pyramid: Literal["auto", "on", "off"] = "auto"
    """Maps of a fourth, half, one and two patches a pixel, instead of one for all. auto: on; off for patches of 4
    pixels and less."""
    head_dim: AutoInt = None
    """Width of UperNet's head. Default: the encoder's; nano 48."""
    auxiliary_weight: float = 0.4
    """Part of the auxiliary head, on the third map, in the loss; 0 for none."""
    dropout: AutoFloat = None
    """Of channels, before the classifiers. Default: 0.1; nano 0."""
    checkpoint_blocks: bool = False
    """Compute the encoder's activations twice instead of keeping them."""


@dataclass
class SegmentLabels(DenseLabels):
    """The split to evaluate on, and the classes."""

    ignore_index: AutoInt = None
    """Value of pixels that do not count. Default: 255; of more than 255 classes 65535."""
    reduce_zero_label: bool = False
    """0 does not count, and all other values are one lower, as in ADE20K (where it is on by itself if its
    objectInfo150.txt is there)."""


@dataclass
class SegmentRecipe(OptimizerArgs):
    """Optimisation, augmentation and evaluation."""

    lr: AutoFloat = None
    """Peak at an effective batch of 16; scaled linearly to the one in use. Default: 4e-4, large and huge 4e-5, nano
    6e-3; the papers take the best of 1, 2, 3, 4e-4 or of 3, 4, 5e-5."""
    warmup_steps: AutoInt = None
    """Linear warm-up from 0. Default: 1,500, at most a tenth of the run. Then the rate falls linearly to 0."""
    random_scale: Annotated[
        tuple[float, float] | None, tyro.conf.arg(metavar="FLOAT FLOAT", help_behavior_hint="")
    ] = None
    """Factors on the size of images to learn from, before the crop. Default: 0.5 2.0; nano 1 1."""
    class_share: float = 0.75
    """A crop is drawn anew, up to ten times, if one class has more of it."""
    jitter: AutoFloat = None
    """Probability of each of brightness, contrast, saturation and hue to be changed. Default: 0.5; nano 0."""
    eval_every: AutoFloat = None
    """Epochs between evaluations; there is always one at the end. Default: as --eval-steps says."""
    eval_steps: AutoInt = None
    """Steps between evaluations, instead of epochs. Default: a twentieth of the run; nano all of it."""
    short_side: AutoInt = None
    """Shorter side that images are brought to at scale 1, and for evaluation, in pixels. Default: the crop's; nano
    96."""
    window: Literal["slide", "whole"] = "slide"
    """Evaluation: windows of the crop's size, whose scores are averaged, or the whole image at once."""
    stride: AutoInt = None
    """Evaluation: from window to window, in pixels. Default: two thirds of the crop, which is 341 of 512."""


@dataclass
class Segment:
    """Semantic segmentation with UperNet, end to end.

    essentials:
      --checkpoint CHECKPOINT     run folder, model/ folder, id of the Hub, released .pth, BEiT; or --random-init SIZE
      --dataset DATA              images and annotations: paired folders (ADE20K, Cityscapes), an id of the Hub, demo
      --val-split SPLIT           the split to evaluate on, if it is not called validation or test
      --num-classes N             where the data set does not name its classes
      --image-size PIXELS         side of the square crops
      --steps N                   optimizer steps
      --run-dir FOLDER            where everything goes; the same command continues what is there

    examples:
      accelerate launch finetune.py segment --checkpoint runs/cae-v2-base --dataset ADEChallengeData2016
      python finetune.py segment --checkpoint runs/mine --dataset my_scenes --num-classes 12 --steps 20000
    """

    model: SegmentModel = field(default_factory=SegmentModel)
    data: DenseData = field(default_factory=DenseData)
    labels: SegmentLabels = field(default_factory=SegmentLabels)
    recipe: SegmentRecipe = field(default_factory=SegmentRecipe)
    run: DenseRun = field(default_factory=DenseRun)


@dataclass
class DetectModel(EncoderArgs):
    """The encoder, and the detector on it."""

    image_size: AutoInt = None
    """Side of the square that the table of positions is written for, in pixels (at others it is interpolated); of
    lw-detr's input. Default: 50 patches, 800 for patches of 16; lw-detr 40; nano 24."""
    relative_position_bias: bool = False
    """A bias for every distance of two patches in every block and head, from zero, beside the fixed positions."""
    detector: Literal["mask-rcnn", "cascade", "lw-detr"] = "mask-rcnn"
    """Mask R-CNN, Cascade Mask R-CNN, or LW-DETR (boxes only)."""
    masks: bool = True
    """Instance masks beside boxes; without: Faster R-CNN."""
    checkpoint_blocks: bool = False
    """Compute the encoder's activations twice instead of keeping them."""
    channels: AutoInt = None
    """Width of pyramid and mask head, or of lw-detr's decoder. Default: 256; nano 64."""
    box_channels: AutoInt = None
    """Width of the box head. Default: 1,024; nano 256."""
    anchors: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT ...", help_behavior_hint="")] = None
    """Sides of the anchors, in pixels, one for each map of the pyramid. Default: 32 64 128 256 512; nano 16 32 48."""
    canonical_scale: AutoInt = None
    """Side of the regions that are pooled from the map of stride 16, in pixels. Default: 224; nano 128."""
    proposals: AutoInt = None
    """Proposals of a map in training; in evaluation half of them. Default: 2,000; nano 200."""
    rois: AutoInt = None
    """Proposals of an image that the heads learn from. Default: 512; nano 32."""
    detections: AutoInt = None
    """Most detections of an image. Default: 100, lw-detr 300; nano 30. (COCO counts the best 100 of each class.)"""
    queries: AutoInt = None
    """lw-detr: boxes that an image begins with. Default: 300; nano 20."""
    groups: AutoInt = None
    """lw-detr: sets of queries that learn side by side. Default: 13; nano 4."""
    decoder_depth: AutoInt = None
    """lw-detr: layers of the decoder. Default: 3; nano 2."""
    windows: AutoInt = None
    """lw-detr: windows of attention in the encoder, a square number. Default: 16; nano 4."""


@dataclass
class DetectLabels(DenseLabels):
    """The split to evaluate on, and the classes."""

    box_format: Literal["xywh", "xyxy"] = "xywh"
    """Of a column with objects: corner and size, or two corners, in pixels."""


@dataclass
class DetectRecipe(OptimizerArgs):
    """Optimisation, augmentation and evaluation."""

    lr: AutoFloat = None
    """Peak at an effective batch of 32; scaled linearly to the one in use. Default: 3e-4, large and huge 2e-4, lw-detr
    1e-4; nano 1.6e-2, lw-detr 8e-3."""
    encoder_factor: AutoFloat = None
    """Factor on the encoder's learning rate, beside the layer-wise decay. Default: 1; lw-detr 1.5."""
    weight_decay: AutoFloat = None
    """Weight decay; none on parameters of one dimension, nor on the class token. Default: 0.05; lw-detr 1e-4."""
    clip_grad: AutoFloat = None
    """Largest norm of the gradient; 0 does not clip. Default: 0; lw-detr 0.1, nano 0.5."""
    ema: AutoFloat = None
    """Decay of a moving average of the weights, which is then evaluated and written; 0 for none. Default: 0; lw-detr
    0.9997, shorter in runs of less than 33,333 steps; nano 0."""
    warmup_steps: AutoInt = None
    """Linear warm-up from 0. Default: 500, at most a tenth of the run; lw-detr 0."""
    drops: Annotated[tuple[float, ...] | None, tyro.conf.arg(metavar="SHARE ...", help_behavior_hint="")] = None
    """Parts of the run after which the learning rate falls to a tenth. Default: 0.75 0.9167, which is after 9 and 11
    of 12 epochs; lw-detr none."""
    short_sides: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT ...", help_behavior_hint="")] = None
    """Shorter sides of images to learn from, of which one is drawn for each; the last for evaluation. Default: 480 512
    ... 800; nano 96."""
    long_side: AutoInt = None
    """Longest side that an image may have, in pixels. Default: 1,333."""


@dataclass
class Detect:
    """Detection and instance segmentation, end to end.

    essentials:
      --checkpoint CHECKPOINT     run folder, model/ folder, id of the Hub, released .pth, BEiT; or --random-init SIZE
      --dataset DATA              images and objects: a folder with COCO's JSON, an id of the Hub, or demo
      --val-split SPLIT           the split to evaluate on, if it is not called validation or test
      --detector DETECTOR         mask-rcnn, cascade or lw-detr
      --effective-batch-size N    images per step, over all processes; the learning rate follows
      --epochs N                  passes over the data
      --run-dir FOLDER            where everything goes; the same command continues what is there

    examples:
      accelerate launch finetune.py detect --checkpoint runs/cae-v2-base --dataset coco --checkpoint-blocks
      python finetune.py detect --checkpoint runs/mine --dataset my_objects --detector lw-detr
    """

    model: DetectModel = field(default_factory=DetectModel)
    data: DenseData = field(default_factory=DenseData)
    labels: DetectLabels = field(default_factory=DetectLabels)
    recipe: DetectRecipe = field(default_factory=DetectRecipe)
    run: DenseRun = field(default_factory=DenseRun)


def steps_of(run, data, images):
    """Optimizer steps of a run; None as long as the number of images, and nothing else, is to tell."""
    known = run.steps is not None or images is not None
    return total_steps(run, images and images / data.effective_batch_size) if known else None


def settings_of(tuned):
    """What an earlier result was built with, by the names of flags: what is tuned on, or evaluated, is as it was."""
    if tuned is None:
        return {}
    config = tuned.config
    if isinstance(config, RcnnConfig):
        its = config.detector
        return {"image_size": config.backbone.image_size, "channels": its["channels"],
                "box_channels": its["box_channels"], "anchors": tuple(its["anchor_sizes"]),
                "canonical_scale": its["canonical_scale"], "proposals": its["proposals_train"],
                "rois": its["rois_per_image"], "detections": its["detections"],
                "short_sides": tuple(its["min_sizes"]), "long_side": its["max_size"]}  # fmt: skip
    if config.model_type == "lw_detr":
        return {"image_size": config.backbone_config.image_size, "channels": config.d_model,
                "queries": config.num_queries, "groups": config.group_detr, "decoder_depth": config.decoder_layers,
                "windows": config.backbone_config.num_windows}  # fmt: skip
    return {"image_size": config.backbone_config.image_size, "head_dim": config.hidden_size,
            "pyramid": "on" if config.backbone_config.add_fpn else "off"}  # fmt: skip


def fill_known(args, settings):
    """Give fields that were left out the values of an earlier result."""
    for name, value in settings.items():
        for group in (args.model, args.recipe):
            if getattr(group, name, "") in (None, "auto"):
                setattr(group, name, value)


def layer_decay_of(size, large, other):
    return large if size in ("large", "huge") else 1.0 if size == "nano" else other


def resolve_segment(args, origin, world=1, images=None):
    """Arguments with every None filled in; `images` to learn from, once it is known. Raises UserError."""
    args = copy.deepcopy(args)
    model, data, recipe, run = args.model, args.data, args.recipe, args.run
    config, size = origin.beit.config, origin.size
    nano, large = size == "nano", size in ("large", "huge")
    fill_known(args, settings_of(origin.tuned))
    fill(model, "drop_path", 0.15 if large else None)
    resolve_encoder(model, origin, 64 if nano else 32 * config.patch_size)
    if model.pyramid == "auto":
        model.pyramid = "on" if config.patch_size > 4 else "off"
    fill(model, "head_dim", 48 if nano else config.hidden_size)
    fill(model, "dropout", 0.0 if nano else 0.1)
    fill(recipe, "random_scale", (1.0, 1.0) if nano else (0.5, 2.0))
    fill(recipe, "jitter", 0.0 if nano else 0.5)
    fill(recipe, "lr", 6e-3 if nano else 4e-5 if large else 4e-4)
    fill(recipe, "layer_decay", layer_decay_of(size, 0.95, 0.65))
    fill(recipe, "short_side", model.image_size if not nano else 96)
    fill(recipe, "stride", max(1, 2 * model.image_size // 3))
    old = args_of_run(run)
    if run.epochs is None:
        fill(run, "steps", old.get("steps") or (300 if nano else 160_000))
    resolve_run(data, run, world, old, batch=16, effective=8 if nano else 16, epochs=None)
    steps = steps_of(run, data, images)
    if recipe.eval_every is None:
        fill(recipe, "eval_steps", old.get("eval_steps"))  # those of the resumed run, also if it is to be longer now
    fill(recipe, "warmup_steps", old.get("warmup_steps"))
    if steps is not None:
        fill(recipe, "warmup_steps", min(1500, steps // 10))
        if recipe.eval_every is None:
            fill(recipe, "eval_steps", steps if nano else max(steps // 20, 1))
    fill(recipe, "eval_every", 1.0)
    require_optimizer(recipe)
    require_shares(recipe, "class_share", "jitter")
    require_positive(recipe, "short_side", "stride")
    require_positive(model, "head_dim")
    require_not_negative(recipe, "warmup_steps")
    require_not_negative(model, "auxiliary_weight")
    require(0 <= model.dropout < 1, f"--dropout is {model.dropout}: it must lie in [0, 1)")
    require(recipe.stride <= model.image_size, f"--stride {recipe.stride} is longer than the window of "
            f"{model.image_size} pixels: what lies between them would have no class")  # fmt: skip
    low, high = recipe.random_scale
    require(0 < low <= high <= 100, f"--random-scale is {low} {high}: two factors with 0 < first <= second <= 100")
    require(recipe.eval_only or data.batch_size > 1, "UperNet normalises over a batch, and pools one of its maps to a "
            "single value: --batch-size must be 2 or more")  # fmt: skip
    require(model.pyramid == "off" or config.patch_size % 4 == 0,
            f"--pyramid on: a patch of {config.patch_size} pixels has no fourth; pass --pyramid off")
    return args


def resolve_detect(args, origin, world=1, images=None):
    """Arguments with every None filled in; `images` to learn from, once it is known. Raises UserError."""
    args = copy.deepcopy(args)
    model, data, recipe, run = args.model, args.data, args.recipe, args.run
    config, size, is_detr = origin.beit.config, origin.size, args.model.detector == "lw-detr"
    nano, large = size == "nano", size in ("large", "huge")
    fill_known(args, settings_of(origin.tuned))
    fill(model, "drop_path", 0.0 if is_detr else 0.2 if size == "base" else None)  # LW-DETR has none
    resolve_encoder(model, origin, (24 if nano else 40 if is_detr else 50) * config.patch_size)
    fill(model, "channels", 64 if nano else 256)
    fill(model, "box_channels", 256 if nano else 1024)
    fill(model, "anchors", (16, 32, 48) if nano else tuple(2 * config.patch_size * 2**i for i in range(5)))
    fill(model, "canonical_scale", 128 if nano else 224)
    fill(model, "proposals", 200 if nano else 2000)
    fill(model, "rois", 32 if nano else 512)
    fill(model, "detections", 30 if nano else 300 if is_detr else 100)
    fill(model, "queries", 20 if nano else 300)
    fill(model, "groups", 4 if nano else 13)
    fill(model, "decoder_depth", 2 if nano else 3)
    fill(model, "windows", 4 if nano else 16)
    fill(recipe, "lr", (8e-3 if nano else 1e-4) if is_detr else 1.6e-2 if nano else 2e-4 if large else 3e-4)
    fill(recipe, "encoder_factor", 1.5 if is_detr and not nano else 1.0)
    fill(recipe, "layer_decay", 0.8 if is_detr and not nano else layer_decay_of(size, 0.8, 0.75))
    fill(recipe, "weight_decay", 1e-4 if is_detr else 0.05)
    fill(recipe, "clip_grad", (0.5 if nano else 0.1) if is_detr else 0.0)
    fill(recipe, "drops", () if is_detr else (0.75, 0.9167))
    fill(recipe, "short_sides", (96,) if nano else tuple(range(480, 801, 32)))
    fill(recipe, "long_side", 1333)
    old = args_of_run(run)
    if nano and run.epochs is None:
        steps = {"mask-rcnn": 280, "cascade": 240, "lw-detr": 300}[model.detector]
        fill(run, "steps", old.get("steps") or steps)
    effective, epochs = 4 if nano else 32, 60.0 if is_detr else 12.0
    resolve_run(data, run, world, old, batch=4, effective=effective, epochs=epochs)
    steps = steps_of(run, data, images)
    for name in ("warmup_steps", "ema"):
        fill(recipe, name, old.get(name))  # those of the resumed run, also if it is to be longer now
    fill(recipe, "warmup_steps", 0 if is_detr else steps and min(500, steps // 10))
    # over a tenth of a short run: what it averages at the end must not be of the beginning
    fill(recipe, "ema", min(0.9997, 1 - 10 / max(steps or 1, 20)) if is_detr and not nano else 0.0)
    require_optimizer(recipe)
    require_positive(recipe, "encoder_factor", "long_side")
    require_not_negative(recipe, "warmup_steps")
    require_positive(model, "channels", "box_channels", "canonical_scale", "proposals", "rois", "detections",
                     "queries", "groups", "decoder_depth", "windows")  # fmt: skip
    require(recipe.short_sides and min(recipe.short_sides) > 0, "--short-sides must be one positive number or more")
    require(min(model.anchors, default=0) > 0, "--anchors must be positive numbers, one for each map of the pyramid")
    require(all(0 < share < 1 for share in recipe.drops), "--drops must be parts of the run, between 0 and 1")
    if is_detr:
        require(origin.tuned is not None or origin.cae is not None,
                f"--detector lw-detr takes the encoder of a CAE, and {origin.name} is a BEiT: give a run folder, a "
                "model/ folder, or a released .pth")
        require(not model.relative_position_bias and not model.drop_path,
                "--relative-position-bias and --drop-path: LW-DETR has neither")
        model.masks = False
    return args


# ----------------------------------------------------------------------------------------------------------------
# What both tasks share: where they start from, the backbone, classes, schedules.


def open_origin(model, seed, tuned_type, load_tuned):
    """EncoderArgs -> Origin, whose `tuned` is an earlier result of the same task: of model_type `tuned_type`, loaded by
    load_tuned(name, config). Raises UserError."""
    name = model.checkpoint or f"random init {model.random_init}"

    def of_transformers(folder, config):
        return load_tuned(folder, config) if config["model_type"] in tuned_type else of_beit(folder, config)

    return open_encoder(model, seed, lambda cae: of_cae(cae, name), of_transformers)


def of_tuned(model, beit, name):
    """Origin of an earlier result: its model, the BeitModel or LwDetrViTBackbone in it."""
    labels = [model.config.id2label[i] for i in range(len(model.config.id2label))]
    config = beit.config
    method = getattr(config, "cae_method", "cae-v2")
    return Origin(beit, None, labels, method, size_of(config.hidden_size, config.num_hidden_layers), name, None, model)


def keeps_heads(args, origin, classes, verb, command):
    """Whether an earlier result of the same task has the same classes, as --eval-only demands. Raises UserError."""
    same = origin.tuned is not None and list(origin.labels) == classes
    if args.recipe.eval_only:
        require(origin.tuned is not None, f"--eval-only: {origin.name} {verb} nothing yet; give the run folder of a "
                f"finetune.py {command}")  # fmt: skip
        require(same, f"{origin.name} tells {len(origin.labels)} classes apart, the data set has {len(classes)}")
    return same


def out_indices(depth):
    """After which blocks UperNet and the pyramid take their maps, 1 for the first: 4, 6, 8 and 12 of 12."""
    return [max(1, round(depth * block / 12)) for block in (4, 6, 8, 12)]


def build_backbone(args, origin, pyramid):
    """EncoderArgs, Origin -> transformers' BeitBackbone with the encoder's weights, its positions for --image-size."""
    from transformers import BeitBackbone, BeitConfig

    old = origin.beit.config
    settings = {name: value for name, value in old.to_dict().items()
                if name not in ("stage_names", "out_features", "out_indices", "id2label", "label2id")}  # fmt: skip
    settings |= {
        "image_size": args.image_size, "drop_path_rate": args.drop_path, "use_mask_token": False,
        "use_mean_pooling": True,  # no norm that nobody uses
        "use_relative_position_bias": old.use_relative_position_bias or args.relative_position_bias,
        "out_indices": out_indices(old.num_hidden_layers), "add_fpn": pyramid, "cae_method": origin.method,
    }  # fmt: skip
    backbone = BeitBackbone(BeitConfig(**settings))
    state = {name: value for name, value in encoder_state(origin.beit, args.image_size).items()
             if not name.startswith(("beit.layernorm.", "beit.pooler."))}  # fmt: skip
    missing, surplus = backbone.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.startswith("fpn.") and "relative_position_bias" not in name]
    assert not missing and not surplus, (missing, surplus)
    if old.use_absolute_position_embeddings:
        backbone.beit.embeddings.position_embeddings.requires_grad_(not is_fixed(origin.beit))
    if args.checkpoint_blocks:  # of the backbone: a whole UperNet refuses
        recompute(backbone)
    return backbone


def recompute(module):
    """Activations of a transformers model are computed twice instead of kept."""
    if hasattr(module, "activation_checkpointing_enable"):  # the name from 5.24 on
        module.activation_checkpointing_enable({"use_reentrant": False})
    else:
        module.gradient_checkpointing_enable({"use_reentrant": False})


def choose_classes(labels, known, dataset):
    """Names of the classes: of --class-names, else those that the data set has, else --num-classes numbers. Raises
    UserError."""
    names, file = known, labels.class_names
    if file:
        try:
            text = Path(file).expanduser().read_text()
            names = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
            names = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else names
            names = [str(name).strip() for name in names if str(name).strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"--class-names {file} cannot be read: {first_line(error)}") from error
    require(names or labels.num_classes, f"data set {dataset} does not name its classes: pass --num-classes, or "
            "--class-names")  # fmt: skip
    require_positive(labels, "num_classes")
    names = list(names or map(str, range(labels.num_classes)))
    require(labels.num_classes in (None, len(names)),
            f"--num-classes is {labels.num_classes}, {file or f'data set {dataset}'} has {len(names)} classes")
    return names


def open_dense(args, world, kind, demo):
    """The Source to learn from (None with --eval-only) and the one to evaluate on; `demo` makes scenes of a split, for
    `--dataset demo`. Raises UserError."""
    data, labels, learn = args.data, args.labels, not args.recipe.eval_only
    if data.dataset == "demo":
        require(data.val_fraction is None, "--val-fraction: the demo has a split to evaluate on")
        fill(labels, "val_split", "test")
        for flag, split in (("--split", data.split), ("--val-split", labels.val_split)):
            require(split in demo, f"{flag} {split}: the demo has {', '.join(demo)}")
        sources = [Source(scenes, "image", kind.columns[0], len(scenes), "demo (wardrobe scenes)")
                   for scenes in (demo[data.split], demo[labels.val_split])]  # fmt: skip
        return sources[0] if learn else None, sources[1]
    train, val = open_annotated(data, labels, kind, world, learn)
    for source in filter(None, (train, val)):
        columns = ", ".join(source.data.features)
        require(source.label_column, f"no column of {data.dataset} holds annotations: pass --label-column; its columns "
                f"are {columns}")  # fmt: skip
        require(source.label_column != source.image_column, f"--label-column {source.label_column} is the images' own")
    return train, val


def check_rows(source, count=16):
    """A few rows, evenly over data on disk, the first ones of a stream: what is wrong with all of them should be told
    before any expensive work. Raises UserError."""
    if source.streaming:
        rows = itertools.islice(source.row_groups or source.data, 4)
    else:
        rows = (source.data[i] for i in range(0, len(source.data), max(1, len(source.data) // count)))
    for row in rows:
        image = row[source.image_column]
        try:
            picture = decode(read_image(image, source.name, source.patience))
        except Exception:  # a bad image is skipped, and counted, later
            continue
        try:
            source.targets(row, picture)
        except (OSError, SyntaxError):  # a damaged annotation likewise
            continue
        except (ValueError, UserError) as error:
            name = (image or {}).get("path") or f"a row of {source.name}"
            raise UserError(f"annotation of {name}: {first_line(error)}") from error


def warmup_of(recipe, length):
    """--warmup-steps. Raises UserError."""
    require(recipe.warmup_steps < length.steps, f"--warmup-steps {recipe.warmup_steps} is not shorter than the run")
    return recipe.warmup_steps


def linear_decay(step, total, warmup, peak):
    """Linear to 0, times a linear warm-up. (Released: `poly` with power 1.)"""
    return peak * (1 - step / total) * min(1.0, step / warmup if warmup else 1.0)


def stepped(step, total, warmup, peak, drops):
    """A tenth after each of `drops`, parts of the run; and a linear warm-up."""
    passed = sum(step >= round(share * total) for share in drops)
    return peak * 0.1**passed * min(1.0, step / warmup if warmup else 1.0)


def published_rows(task, size):
    """Published results of this size: [(name, {score: percent})]."""
    columns = ("miou",) if task == "segment" else ("ap", "mask_ap")
    rows = [(name, ade if task == "segment" else coco) for name, its, ade, coco in PUBLISHED if its == size]
    return [(name, dict(zip(columns, figures, strict=True))) for name, figures in rows if figures]


# mIoU on ADE20K with UperNet; box and mask AP on COCO with Mask R-CNN. The CAE rows are the released README's.
PUBLISHED = [
    ("CAE-B, 300 epochs", "base", (48.1,), (48.3, 42.7)),
    ("CAE-B, 800 epochs", "base", (49.7,), (49.9, 43.9)),
    ("CAE-B, 1600 epochs", "base", (50.3,), (50.3, 44.2)),
    ("CAE v2-B, 300 epochs", "base", (52.9,), None),
    ("MAE-B, 1600 epochs", "base", (48.1,), (48.4, 42.6)),
    ("MVP-B, 300 epochs", "base", (52.4,), None),
    ("BEiT v2-B, 300 epochs", "base", (52.7,), None),
    ("CAE-L, 1600 epochs", "large", (54.9,), (54.5, 47.5)),
    ("CAE v2-L, 300 epochs", "large", (55.9,), None),
    ("MAE-L, 1600 epochs", "large", (53.6,), (54.0, 47.1)),
]


# ----------------------------------------------------------------------------------------------------------------
# Segmentation.

MAPS = LabelKind(("annotation", "label", "mask", "segmentation_mask", "labels", "png", "seg.png"), PairedFolders, True)


@dataclass
class ReadMap:
    """A row's annotation as class numbers (H, W) of the image's size."""

    source: Source
    num_classes: int
    settings: dict
    """Of map_numbers."""

    def __call__(self, row, image):
        data = read_image(row[self.source.label_column], self.source.name, self.source.patience)
        annotation = decode_annotation(data)
        if annotation.shape != image.shape[1:]:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (annotation.shape, image.shape[1:])]
            raise ValueError(f"it has {sizes[0]} pixels, its image {sizes[1]}: they must have the same size")
        return map_numbers(annotation, self.num_classes, **self.settings)


class SegmentView:
    """Random scale, crop, flip and colours, of image and annotation together: a pure function of them and a seed."""

    names = ("images", "annotations")

    def __init__(self, size, recipe, ignore):
        from torchvision.transforms import v2

        self.size, self.recipe, self.ignore = size, recipe, ignore
        self.flip = v2.RandomHorizontalFlip(recipe.flip)
        self.jitter = v2.RandomPhotometricDistort(p=recipe.jitter)

    def __call__(self, image, annotation, seed):
        """uint8 (3, H, W), class numbers (H, W) -> uint8 (3, S, S), class numbers (S, S)."""
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional

        torch.default_generator.manual_seed(seed)
        pair = tv_tensors.Image(image), tv_tensors.Mask(annotation)
        factor = torch.empty(()).uniform_(*self.recipe.random_scale).item()
        pair = [functional.resize(x, scaled(image, self.recipe.short_side * factor)) for x in pair]
        bottom, right = (max(0, self.size - side) for side in pair[0].shape[-2:])
        pair = [functional.pad(x, [0, 0, right, bottom], fill=fill) for x, fill in zip(pair, (GREY, self.ignore),
                                                                                     strict=True)]  # fmt: skip
        rows, columns = pair[0].shape[-2:]
        for _ in range(10):
            top = torch.randint(rows - self.size + 1, ()).item()
            left = torch.randint(columns - self.size + 1, ()).item()
            part = pair[1][top : top + self.size, left : left + self.size]
            counts = part[part != self.ignore].unique(return_counts=True)[1]
            if self.recipe.class_share == 1 or (
                    len(counts) > 1 and counts.max() < self.recipe.class_share * counts.sum()):  # fmt: skip
                break
        image, annotation = self.flip(*(functional.crop(x, top, left, self.size, self.size) for x in pair))
        colours = self.jitter.make_params([image]) | {"channel_permutation": None}  # torchvision exchanges them as well
        return self.jitter.transform(image, colours).as_subclass(torch.Tensor), annotation.as_subclass(torch.Tensor)


def scaled(image, short):
    """Height and width whose shorter side is `short`, the longer at most four times that. image (3, H, W)."""
    sides = image.shape[-2:]
    factor = min(short / min(sides), 4 * short / max(sides))
    return [max(1, round(side * factor)) for side in sides]


class WholeView:
    """Of images to evaluate on: brought to a shorter side; the annotation stays as large as it is."""

    names = lists = ("images", "annotations")

    def __init__(self, short):
        self.short = short

    def __call__(self, image, annotation, seed):
        """uint8 (3, H, W), class numbers (H, W) -> uint8 (3, h, w), class numbers (H, W). The seed has no use."""
        from torchvision.transforms.v2 import functional

        return functional.resize(image, scaled(image, self.short)), annotation


def windows(rows, columns, size, stride):
    """Top and left corners of the windows that cover an image: the last ones end where it does."""
    tops, lefts = ([min(start, max(side - size, 0)) for start in range(0, max(side - size, 0) + stride, stride)]
                   for side in (rows, columns))  # fmt: skip
    return [(top, left) for top in dict.fromkeys(tops) for left in dict.fromkeys(lefts)]


class Segmentation:
    """Images -> a class for each pixel, by UperNet. (Its methods: see finetune.py's Classification.)"""

    name, metric = "segment", "miou"
    title = "Semantic segmenter, fine-tuned from a context autoencoder"
    pipeline, tags = "image-segmentation", ["image-segmentation", "upernet", "beit", "cae"]

    def load(self, model, seed):
        def load_tuned(name, config):
            from transformers import UperNetForSemanticSegmentation

            tuned = load_pretrained(name, UperNetForSemanticSegmentation, ("upernet",), "a UperNet", "--checkpoint",
                                    config).float()  # fmt: skip
            kind = tuned.backbone.config.model_type
            require(kind == "beit", f"--checkpoint {name} is a UperNet on a {kind}: a BEiT is needed")
            return of_tuned(tuned, tuned.backbone.beit, name)

        return open_origin(model, seed, ("upernet",), load_tuned)

    def resolve(self, args, origin, world, images=None):
        return resolve_segment(args, origin, world, images)

    def open(self, args, origin, world):
        demo = {}
        if args.data.dataset == "demo":
            from demo.scenes import CLASSES, Scenes

            demo = {"train": Scenes("train", 4000, what="maps"), "test": Scenes("test", 200, what="maps")}
            known = ["background", *CLASSES]
        self.train_source, self.val_source = open_dense(args, world, MAPS, demo)
        folder, labels = self.val_source.folder, args.labels
        if not demo:
            known = folder and folder.classes
        self.classes = choose_classes(labels, known, args.data.dataset)
        require(len(self.classes) > 1, "--num-classes is 1: segmentation tells two classes or more apart")  # UperNet's
        labels.reduce_zero_label |= bool(folder and folder.reduce_zero_label)
        self.ignore = IGNORE if len(self.classes) <= IGNORE else IGNORE_OF_MANY
        fill(labels, "ignore_index", self.ignore)
        settings = {"reduce_zero_label": labels.reduce_zero_label, "ignore_index": labels.ignore_index,
                    "numbers": folder and folder.numbers}  # fmt: skip
        for source in filter(None, (self.train_source, self.val_source)):
            source.targets = ReadMap(source, len(self.classes), settings)
            check_rows(source)

    def build(self, args, origin):
        from transformers import UperNetConfig, UperNetForSemanticSegmentation

        self.args, self.origin, self.skipped = args, origin, []
        same = keeps_heads(args, origin, self.classes, "segments", self.name)
        backbone = build_backbone(args.model, origin, args.model.pyramid == "on")
        config = UperNetConfig(
            backbone_config=backbone.config, hidden_size=args.model.head_dim, num_labels=len(self.classes),
            use_auxiliary_head=args.model.auxiliary_weight > 0, auxiliary_channels=min(256, 2 * args.model.head_dim),
            auxiliary_loss_weight=args.model.auxiliary_weight, loss_ignore_index=self.ignore,
            id2label=dict(enumerate(self.classes)), label2id={name: i for i, name in enumerate(self.classes)},
        )  # fmt: skip
        model = UperNetForSemanticSegmentation(config)
        model.backbone = backbone
        if same:
            try:
                heads = {name: value for name, value in origin.tuned.state_dict().items() if "head." in name}
                fpn = {name: value for name, value in origin.tuned.state_dict().items() if ".fpn." in name}
                _, surplus = model.load_state_dict({**heads, **fpn}, strict=False)
            except RuntimeError as error:
                raise UserError(f"{origin.name} has another head: {first_line(error)}; keep its --head-dim") from error
            require(not surplus, f"{origin.name} was tuned with another --pyramid or --auxiliary-weight: keep them")
        for head in filter(None, (model.decode_head, model.auxiliary_head)):  # the recipe's; transformers has none
            head.classifier.register_forward_pre_hook(partial(drop_channels, args.model.dropout))
        return model.train()

    def encoder(self, model):
        return model.backbone.beit.embeddings, model.backbone.beit.layers, model.backbone

    def peak(self):
        return self.args.recipe.lr * self.args.data.effective_batch_size / 16

    def warmup(self, length):
        return warmup_of(self.args.recipe, length)

    def learning_rate(self, step, length, warmup):
        return linear_decay(step, length.steps, warmup, self.peak())

    def train_view(self):
        return SegmentView(self.args.model.image_size, self.args.recipe, self.ignore)

    def losses(self, model, images, annotations):
        """uint8 (B, 3, S, S), class numbers (B, S, S)."""
        annotations = annotations.long()
        counts = (annotations != self.ignore).any()
        # The mean over no pixel at all is NaN, in every gradient; of such a batch, which must not count, it is 0.
        annotations = torch.where(counts, annotations, 0)
        return {"loss": model(to_input(images), labels=annotations).loss.float() * counts}

    def evaluate(self, run, model):
        matrix = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64, device=run.device)
        seen = torch.zeros((), dtype=torch.int64, device=run.device)
        view = WholeView(self.args.recipe.short_side)
        with together():
            for images, annotations in evaluation_batches(run.accelerator, self.val_source, view, self.args.data,
                                                          "images to evaluate on", self.skipped):  # fmt: skip
                for image, annotation in zip(images, annotations, strict=True):
                    with run.accelerator.autocast():
                        predicted = self.predict(model, image, annotation.shape)
                    matrix += confusion(predicted, annotation, len(self.classes), self.ignore)
                seen += len(images)
        matrix, seen = run.accelerator.reduce(matrix, "sum"), run.accelerator.reduce(seen, "sum").item()
        return segmentation_scores(matrix), seen

    def predict(self, model, image, shape):
        """uint8 (3, h, w) -> the class of each pixel at another size, (H, W)."""
        scores = self.scores(model, to_input(image[None]))
        return F.interpolate(scores, list(shape), mode="bilinear", align_corners=False)[0].argmax(0)

    def scores(self, model, x):
        """Normalised (1, 3, h, w) -> logits (1, C, h, w): of the whole image, or the mean over windows of the crop's
        size."""
        size, (rows, columns) = self.args.model.image_size, x.shape[-2:]
        patch = model.config.backbone_config.patch_size
        slide = self.args.recipe.window == "slide"
        bottom, right = (max(0, size - side) if slide else -side % (2 * patch) for side in (rows, columns))
        x = F.pad(x, (0, right, 0, bottom))
        if not slide:
            return model(x).logits.float()[..., :rows, :columns]
        corners = windows(*x.shape[-2:], size, self.args.recipe.stride)
        parts = torch.cat([x[..., top : top + size, left : left + size] for top, left in corners])
        total = x.new_zeros(1, len(self.classes), *x.shape[-2:])
        count = x.new_zeros(1, 1, *x.shape[-2:])
        logits = torch.cat([model(some).logits.float() for some in parts.split(self.args.data.batch_size)])
        for (top, left), part in zip(corners, logits, strict=True):                      # part (C, S, S)
            total[..., top : top + size, left : left + size] += part
            count[..., top : top + size, left : left + size] += 1
        return (total / count)[..., :rows, :columns]

    def write(self, folder, model):
        from transformers import SegformerImageProcessor

        model.save_pretrained(folder)
        side = self.args.model.image_size
        SegformerImageProcessor(size={"height": side, "width": side}, resample=2, image_mean=list(IMAGENET_MEAN),
                                image_std=list(IMAGENET_STD)).save_pretrained(folder)  # fmt: skip

    def card(self, scores, images):
        side, how = self.args.model.image_size, self.args.recipe.window
        how = f"windows of {side} pixels, {self.args.recipe.stride} apart" if how == "slide" else "whole images"
        found = "not measured yet"
        if scores:
            figures = [f"{word} {scores[name] or 0:.2f} %" for word, name in
                       (("mIoU", "miou"), ("mean accuracy", "mean_accuracy"), ("pixel accuracy", "pixel_accuracy"))]
            found = (f"{', '.join(figures)} on the {images} images of split {markdown(self.args.labels.val_split)} "
                     f"({how}, shorter side {self.args.recipe.short_side})")  # fmt: skip
        usage = f"""from transformers import pipeline

segment = pipeline("image-segmentation", "PATH OR ID OF THIS FOLDER")
segment("image.jpg")    # the image as a square of {side} pixels
"""
        note = (f"The positions in it are for {side} x {side} pixels. At other sizes transformers interpolates them "
                "(bicubic), where the encoder that it came from computes them anew: whole images of other sizes are "
                "segmented with interpolated ones, here as there.")  # fmt: skip
        return "A `UperNetForSemanticSegmentation` of transformers", f"Accuracy: {found}.\n\n{note}", usage.rstrip()

    def table(self, scores, size):
        per_class = [(name, iou, accuracy) for name, iou, accuracy in
                     zip(self.classes, scores["iou"], scores["accuracy"], strict=True)]  # fmt: skip
        return ({"mIoU": "miou", "mAcc": "mean_accuracy", "aAcc": "pixel_accuracy"}, published_rows("segment", size),
                "ADE20K", ("class", "IoU", "Acc"), per_class)  # fmt: skip

    def last_line(self, folder):
        return f'the segmenter: transformers.pipeline("image-segmentation", "{folder}")'

    def save_pictures(self, run, model):
        colours = palette(len(self.classes))
        colours = [(0, 0, 0) if name == "background" else colour
                   for name, colour in zip(self.classes, colours, strict=True)]  # fmt: skip

        def draw(image, annotation):
            from torchvision.utils import draw_segmentation_masks

            predicted = self.predict(model, to_device(image, run.device), annotation.shape).cpu()
            image = F.interpolate(image[None].float(), annotation.shape, mode="bilinear")[0].round().to(torch.uint8)
            sides, present = [image], set()
            for classes in (annotation.long(), predicted):
                there = [c for c in classes.unique().tolist() if c != self.ignore]
                present |= set(there)
                masks = torch.stack([classes == c for c in there]) if there else torch.zeros(0, *classes.shape).bool()
                sides.append(draw_segmentation_masks(image, masks, alpha=0.6, colors=[colours[c] for c in there]))
            return sides, [(self.classes[c], colours[c]) for c in sorted(present)]

        return write_pictures(run, self.val_source, WholeView(self.args.recipe.short_side), draw,
                              ("image", "annotation", "prediction"))  # fmt: skip


def drop_channels(share, module, inputs):
    """A hook before a classifier (B, C, H, W): whole channels are dropped, in training."""
    return F.dropout2d(inputs[0], share, module.training)


# ----------------------------------------------------------------------------------------------------------------
# Detection.

OBJECTS = LabelKind(("objects", "annotations", "annotation"), CocoFolder)


@dataclass
class ReadObjects:
    """A row's objects, and masks of them if there are to be any."""

    source: Source
    classes: list
    box_format: str
    masks: bool

    def __call__(self, row, image):
        objects = read_objects(row[self.source.label_column], self.classes, self.box_format)
        if self.masks and objects.segmentations is None and len(objects.boxes):
            raise ValueError("its objects have no masks: pass --no-masks")
        return objects


def class_names(source):
    """Of a source of objects; None where it does not name its classes. Raises UserError."""
    if source.folder:
        return source.folder.classes
    return object_classes(source.data.features[source.label_column])


def usable(objects, image):
    """Which objects are learned from: no crowds; boxes, cut to the image, of a pixel at least. (n) bool, boxes (n, 4)
    x1 y1 x2 y2."""
    height, width = image.shape[-2:]
    boxes = objects.boxes.clamp(min=0)
    boxes = torch.minimum(boxes, boxes.new_tensor([width, height, width, height]))
    sides = boxes[:, 2:] - boxes[:, :2]
    return ~objects.crowd & (sides >= 1).all(dim=1), boxes


class DetectView:
    """Flip, of image and objects together; sizes are drawn in the model. A pure function of them and a seed."""

    names = lists = ("images", "targets")

    def __init__(self, flip, masks):
        self.flip, self.masks = flip, masks

    def __call__(self, image, objects, seed):
        """uint8 (3, H, W) -> the same, and {"boxes": (n, 4) x1 y1 x2 y2 in pixels, "labels": (n), "masks": uint8
        (n, H, W)}; torchvision counts classes from 1."""
        torch.default_generator.manual_seed(seed)
        keep, boxes = usable(objects, image)
        height, width = image.shape[-2:]
        target = {"boxes": boxes[keep], "labels": objects.labels[keep] + 1}
        if self.masks:
            kept = [objects.segmentations[i] for i in keep.nonzero()[:, 0].tolist()] if len(keep) else []
            target["masks"] = masks_of(kept, height, width)
        if torch.rand(()) < self.flip:
            image = image.flip(-1)
            left, top, right, bottom = target["boxes"].T
            target["boxes"] = torch.stack([width - right, top, width - left, bottom], dim=1)
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        return image, target


class SquareView:
    """For LW-DETR: a random part, in half of the images; flip; then a square. A pure function of image, objects and a
    seed."""

    names, lists = ("images", "targets"), ("targets",)

    def __init__(self, size, flip):
        self.size, self.flip = size, flip

    def __call__(self, image, objects, seed):
        """uint8 (3, H, W) -> uint8 (3, S, S), {"boxes": (n, 4) cx cy w h relative to it, "class_labels": (n)}."""
        torch.default_generator.manual_seed(seed)
        keep, boxes = usable(objects, image)
        boxes, labels = boxes[keep], objects.labels[keep]
        if torch.rand(()) < 0.5:  # 0.6 to 1 of each side, which is DETR's 384 to 600 of 600
            (top, height), (left, width) = (random_part(side) for side in image.shape[-2:])
            image = image[:, top : top + height, left : left + width]
            boxes = boxes - boxes.new_tensor([left, top, left, top])
            boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
            seen = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
            boxes, labels = boxes[seen], labels[seen]
        height, width = image.shape[-2:]
        (corner, far) = (boxes / boxes.new_tensor([width, height, width, height])).split(2, dim=1)
        if torch.rand(()) < self.flip:
            image = image.flip(-1)
            corner, far = (torch.stack([1 - x, y], dim=1) for x, y in ((far[:, 0], corner[:, 1]),
                                                                      (corner[:, 0], far[:, 1])))  # fmt: skip
        boxes = torch.cat([(corner + far) / 2, far - corner], dim=1)
        return as_size(image, self.size, self.size), {"boxes": boxes, "class_labels": labels}


def random_part(side):
    """Start and length of 0.6 to 1 of a side."""
    length = torch.randint(max(1, round(0.6 * side)), side + 1, ()).item()
    return torch.randint(side - length + 1, ()).item(), length


def as_size(image, height, width):
    from torchvision.transforms.v2 import functional

    return functional.resize(image, [height, width])


class TruthView:
    """Of images to evaluate on: as it is, or a square; and what there is to be found, as COCO's tools count it."""

    names = lists = ("images", "truths")

    def __init__(self, square, masks):
        self.square, self.masks = square, masks

    def __call__(self, image, objects, seed):
        """uint8 (3, H, W) -> uint8 (3, h, w) and a truth of engine.evaluation.average_precision, without its "id". The
        seed has no use."""
        height, width = image.shape[-2:]
        truth = {"height": height, "width": width, "boxes": objects.boxes, "labels": objects.labels,
                 "crowd": objects.crowd, "area": objects.area, "masks": None}  # fmt: skip
        if self.masks:
            truth["masks"] = encode_masks(masks_of(objects.segmentations or [], height, width))
        return as_size(image, self.square, self.square) if self.square else image, truth


class Detection:
    """Images -> boxes, classes and masks of objects. (Its methods: see finetune.py's Classification.)"""

    name, metric = "detect", "ap"
    title = "Object detector, fine-tuned from a context autoencoder"
    pipeline, tags = "object-detection", ["object-detection", "beit", "cae"]

    def load(self, model, seed):
        def load_tuned(name, config):
            if config["model_type"] == "lw_detr":
                from transformers import LwDetrForObjectDetection

                tuned = load_pretrained(name, LwDetrForObjectDetection, ("lw_detr",), "an LW-DETR", "--checkpoint",
                                        config).float()  # fmt: skip
                return of_tuned(tuned, tuned.model.backbone.backbone, name)
            tuned = load_rcnn(name)
            return of_tuned(tuned, tuned.backbone.beit.beit, name)

        return open_origin(model, seed, ("lw_detr", RCNN_TYPE), load_tuned)

    def resolve(self, args, origin, world, images=None):
        return resolve_detect(args, origin, world, images)

    def open(self, args, origin, world):
        demo, known = {}, None
        if args.data.dataset == "demo":
            from demo.scenes import CLASSES, Scenes

            demo = {"train": Scenes("train", 4000, what="objects"), "test": Scenes("test", 200, what="objects")}
            known = list(CLASSES)
        self.train_source, self.val_source = open_dense(args, world, OBJECTS, demo)
        if not demo:
            names = [class_names(source) for source in (self.train_source, self.val_source) if source]
            known = names[-1]
            require(all(others == known for others in names), f"the splits of data set {args.data.dataset} disagree on "
                    f"their classes ({len(names[0] or ())} and {len(known or ())}): all need the same, in one order")
        self.classes, self.masks = choose_classes(args.labels, known, args.data.dataset), args.model.masks
        for source in filter(None, (self.train_source, self.val_source)):
            box_format = "xywh" if demo or source.folder else args.labels.box_format
            source.targets = ReadObjects(source, self.classes, box_format, self.masks)
            check_rows(source)

    def build(self, args, origin):
        self.args, self.origin, self.skipped = args, origin, []
        self.is_detr = args.model.detector == "lw-detr"
        same = keeps_heads(args, origin, self.classes, "detects", self.name)
        try:
            built = self.build_detr(args, origin) if self.is_detr else self.build_rcnn(args, origin)
        except ValueError as error:
            raise UserError(first_line(error)) from error
        if same:
            try:
                built.load_state_dict(origin.tuned.state_dict())
            except RuntimeError as error:
                raise UserError(f"{origin.name} is another detector than asked for ({first_line(error)}): keep its "
                                "--detector, --masks, --image-size and widths") from error  # fmt: skip
        return built.train()

    def build_rcnn(self, args, origin):
        from engine.detectors import FeaturePyramid, mask_rcnn

        model, patch = args.model, origin.beit.config.patch_size
        require(hasattr(origin.beit, "embeddings") and hasattr(origin.beit, "layers"),
                f"{origin.name} is an LW-DETR: pass --detector lw-detr")
        backbone = build_backbone(model, origin, pyramid=True)
        # of patches of 4 pixels a fourth is the image itself: its map would take all the time
        maps = [2, 3] if patch <= 4 else [0, 1, 2, 3]
        require(len(model.anchors) == len(maps) + 1, f"--anchors has {len(model.anchors)} values: it must be "
                f"{len(maps) + 1}, one for each map of the pyramid")  # fmt: skip
        self.settings = {
            "num_classes": len(self.classes), "masks": model.masks, "cascade": model.detector == "cascade",
            "channels": model.channels, "box_channels": model.box_channels, "anchor_sizes": list(model.anchors),
            "canonical_scale": model.canonical_scale, "min_sizes": list(args.recipe.short_sides),
            "max_size": args.recipe.long_side, "proposals_train": model.proposals,
            "proposals_test": max(1, model.proposals // 2), "rois_per_image": model.rois,
            "detections": model.detections,
        }  # fmt: skip
        built = mask_rcnn(FeaturePyramid(backbone, model.channels, maps), **self.settings)
        built.config = RcnnConfig(backbone.config, maps, self.settings, self.classes)
        return built

    def build_detr(self, args, origin):
        from engine.detectors import lw_detr

        model = args.model
        require(origin.tuned is None or not hasattr(origin.beit, "layers"),
                f"{origin.name} is an R-CNN: pass its --detector, mask-rcnn or cascade")
        vit = to_lw_detr(origin.cae, model.image_size) if origin.tuned is None else origin.beit
        built = lw_detr(vit, len(self.classes), image_size=model.image_size, d_model=model.channels,
                        decoder_layers=model.decoder_depth, groups=model.groups, queries=model.queries,
                        windows=model.windows)  # fmt: skip
        built.config.id2label = dict(enumerate(self.classes))
        built.config.label2id = {name: i for i, name in enumerate(self.classes)}
        built.config.backbone_config.cae_method = origin.method
        inner = built.model.backbone.backbone
        inner.embeddings.position_embeddings.requires_grad_(False)  # the fixed ones
        if model.checkpoint_blocks:
            recompute(inner)  # as above: the whole refuses
        return built

    def encoder(self, model):
        if self.is_detr:
            vit = model.model.backbone.backbone
            return vit.embeddings, vit.encoder.layer, vit
        beit = model.backbone.beit.beit
        return beit.embeddings, beit.layers, beit

    def peak(self):
        return self.args.recipe.lr * self.args.data.effective_batch_size / 32

    def warmup(self, length):
        return warmup_of(self.args.recipe, length)

    def learning_rate(self, step, length, warmup):
        return stepped(step, length.steps, warmup, self.peak(), self.args.recipe.drops)

    def train_view(self):
        flip = self.args.recipe.flip
        return SquareView(self.args.model.image_size, flip) if self.is_detr else DetectView(flip, self.masks)

    def eval_view(self):
        return TruthView(self.args.model.image_size if self.is_detr else None, self.masks)

    def losses(self, model, images, targets):
        """What DetectView or SquareView gives."""
        if self.is_detr:
            from engine.detectors import lw_detr_losses

            unwrapped = getattr(model, "module", model)  # of DDP
            return lw_detr_losses(unwrapped, model(pixel_values=to_input(images)), targets)
        losses = model([image.float() / 255 for image in images], targets)
        return {"loss": sum(loss.float() for loss in losses.values()), **losses}

    def evaluate(self, run, model):
        truths, found = [], []
        with together():
            for images, targets in evaluation_batches(run.accelerator, self.val_source, self.eval_view(),
                                                      self.args.data, "images to evaluate on",
                                                      self.skipped):  # fmt: skip
                with run.accelerator.autocast():
                    detections = self.predict(model, images, targets)
                truths += [{name: to_host(value) for name, value in target.items()} for target in targets]
                found += [packed(one) for one in detections]
        pairs = run.gather([list(zip(truths, found, strict=True))])
        # in the data's order, of which every rank had each world-th image: it decides between equal scores
        pairs = [pair for row in itertools.zip_longest(*pairs) for pair in row if pair]
        for number, (truth, one) in enumerate(pairs):
            truth["id"] = one["id"] = number
        truths, found = ([pair[side] for pair in pairs] for side in (0, 1))
        # the same on all ranks: nothing to send around
        return average_precision(truths, found, len(self.classes), self.masks), len(truths)

    def predict(self, model, images, targets):
        """Images -> for each {"boxes": (n, 4) x1 y1 x2 y2 in pixels, "scores", "labels" from 0, "masks": (n, H, W)}."""
        if self.is_detr:
            from engine.detectors import lw_detr_detections

            outputs = model(pixel_values=to_input(torch.stack(images)))
            return lw_detr_detections(outputs, [(target["height"], target["width"]) for target in targets],
                                      self.args.model.detections)  # fmt: skip
        # One at a time: others of a batch would pad it, and attention knows no padding.
        found = [model([image.float() / 255])[0] for image in images]
        for one in found:
            one["labels"] = one["labels"] - 1
            if "masks" in one:
                one["masks"] = one["masks"][:, 0] > 0.5
        return found

    def write(self, folder, model):
        if self.is_detr:
            from transformers import DeformableDetrImageProcessor

            model.save_pretrained(folder)
            side = self.args.model.image_size
            DeformableDetrImageProcessor(size={"height": side, "width": side}, do_pad=False,
                                         image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD),
                                         ).save_pretrained(folder)  # fmt: skip
            return
        from safetensors.torch import save_file

        state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        (Path(folder) / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2))

    def card(self, scores, images):
        found = "not measured yet"
        if scores:
            kinds = [("box", "")] + [("mask", "mask_")] * self.masks
            found = ", ".join(f"{kind} {word} {scores[prefix + word.lower()] or 0:.2f} %"
                              for kind, prefix in kinds for word in ("AP", "AP50", "AP75"))  # fmt: skip
            found += f" on the {images} images of split {markdown(self.args.labels.val_split)}"
        side = self.args.model.image_size
        note = (f"The positions in it are for {side} x {side} pixels. At other sizes transformers interpolates them "
                "(bicubic), where the encoder that it came from computes them anew.")  # fmt: skip
        if self.is_detr:
            usage = """from transformers import pipeline

detect = pipeline("object-detection", "PATH OR ID OF THIS FOLDER")
detect("image.jpg")"""
            return "An `LwDetrForObjectDetection` of transformers", f"Accuracy: {found}.\n\n{note}", usage
        kind = "Cascade R-CNN" if self.settings["cascade"] else "R-CNN"
        kind = f"{'Mask ' if self.masks and not self.settings['cascade'] else ''}{kind}"
        return f"torchvision's {kind} on a BEiT of transformers", f"Accuracy: {found}.\n\n{note}", REBUILD

    def table(self, scores, size):
        columns = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "small": "ap_small", "medium": "ap_medium",
                   "large": "ap_large"}  # fmt: skip
        if self.masks:
            columns |= {"mask AP": "mask_ap", "mAP50": "mask_ap50", "mAP75": "mask_ap75"}
        per_class = list(zip(self.classes, scores["ap_per_class"], strict=True))
        return columns, [] if self.is_detr else published_rows("detect", size), "COCO", ("class", "AP"), per_class

    def last_line(self, folder):
        if self.is_detr:
            return f'the detector: transformers.pipeline("object-detection", "{folder}")'
        return f"the detector: {folder}, whose README.md has the lines that load it"

    def save_pictures(self, run, model):
        colours = palette(len(self.classes))

        def draw(image, truth):
            from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

            (one,) = self.predict(model, [to_device(image, run.device)], [truth])
            best = one["scores"] > 0.3
            true_masks = masks_of(truth["masks"], truth["height"], truth["width"]) if self.masks else None
            picture = as_size(image, truth["height"], truth["width"])
            sides = [picture]
            for boxes, labels, masks in (
                (truth["boxes"], truth["labels"], true_masks),
                (one["boxes"][best].cpu(), one["labels"][best].cpu(), one["masks"][best].cpu() if self.masks else None),
            ):
                shades, drawn = [colours[label] for label in labels.tolist()], picture
                if masks is not None and len(masks):
                    drawn = draw_segmentation_masks(drawn, masks.bool(), alpha=0.5, colors=shades)
                wide = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # others cannot be drawn
                if wide.any():
                    shades = [shade for shade, is_wide in zip(shades, wide.tolist(), strict=True) if is_wide]
                    drawn = draw_bounding_boxes(drawn, boxes[wide], colors=shades)
                sides.append(drawn)
            there = sorted({*truth["labels"].tolist(), *one["labels"][best].tolist()})
            return sides, [(self.classes[c], colours[c]) for c in there]

        return write_pictures(run, self.val_source, self.eval_view(), draw, ("image", "truth", "score above 0.3"))


RCNN_TYPE = "beit_rcnn"  # model_type of config.json, by which a folder is known

REBUILD = """import json
from engine.detectors import FeaturePyramid, mask_rcnn    # of this project
from safetensors.torch import load_file
from transformers import BeitBackbone, BeitConfig

config = json.load(open("PATH OF THIS FOLDER/config.json"))
backbone = BeitBackbone(BeitConfig.from_dict(config["backbone"]))
settings = config["detector"]
model = mask_rcnn(FeaturePyramid(backbone, settings["channels"], config["maps"]), **settings)
model.load_state_dict(load_file("PATH OF THIS FOLDER/model.safetensors"))
model.eval()    # a list of images (3, H, W) in [0, 1] -> boxes, labels (1 is the first of config["classes"]), masks"""


@dataclass
class RcnnConfig:
    """What rebuilds a detector of torchvision."""

    backbone: object
    """BeitConfig."""
    maps: list
    detector: dict
    """Keywords of mask_rcnn."""
    classes: list

    @property
    def id2label(self):
        return dict(enumerate(self.classes))

    def to_dict(self):
        return {"model_type": RCNN_TYPE, "classes": self.classes, "maps": self.maps, "detector": self.detector,
                "backbone": self.backbone.to_dict()}  # fmt: skip


def load_rcnn(folder):
    """A detector from its folder, by the lines of its README. Raises UserError."""
    from engine.detectors import FeaturePyramid, mask_rcnn

    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import BeitBackbone, BeitConfig

    def file(name):
        return Path(folder) / name if Path(folder).is_dir() else hub_file(folder, name)

    try:
        config = json.loads(Path(file("config.json")).read_text())
        backbone, settings = BeitBackbone(BeitConfig.from_dict(config["backbone"])), config["detector"]
        model = mask_rcnn(FeaturePyramid(backbone, settings["channels"], config["maps"]), **settings)
        model.load_state_dict(load_file(file("model.safetensors")))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--checkpoint {folder} cannot be loaded: it is damaged or incomplete "
                        f"({first_line(error)})") from error  # fmt: skip
    model.config = RcnnConfig(backbone.config, config["maps"], settings, config["classes"])
    return model


def to_host(value):
    return value.cpu() if isinstance(value, torch.Tensor) else value


def packed(one):
    """Detections of an image on the host, their masks encoded."""
    masks = one.pop("masks", None)
    return {**{name: value.float().cpu() if value.is_floating_point() else value.cpu() for name, value in one.items()},
            "masks": None if masks is None else encode_masks(masks.cpu())}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------
# Pictures.


def palette(count):
    """So many colours that differ from their neighbours: steps of the golden ratio around the circle of hues."""
    from PIL import Image

    shades = [(int(255 * (i * 0.618 % 1)), 200 if i % 2 else 255, 255 if i % 3 else 200) for i in range(count)]
    return [Image.new("HSV", (1, 1), shade).convert("RGB").getpixel((0, 0)) for shade in shades]


@torch.no_grad()
def write_pictures(run, source, view, draw, titles):
    """--save-pictures images in a folder, each row of pictures that draw(what the view gives) makes under its titles,
    enlarged to 192 pixels at least, with the classes' colours below. Returns the folder."""
    from PIL import Image, ImageDraw
    from torchvision.transforms.v2.functional import to_pil_image

    folder, count = run.folder / "pictures", run.args.run.save_pictures
    folder.mkdir(exist_ok=True)
    chunks = one_pass(source, view, 1, 0)
    examples = ((chunk[name][0] for name in view.names) for chunk in chunks if len(chunk["ids"]))
    for number, example in enumerate(itertools.islice(examples, count)):
        sides, legend = draw(*(to_device(value, torch.device("cpu")) for value in example))
        pictures = [to_pil_image(side) for side in sides]
        width, height = pictures[0].size
        factor = max(1, -(-192 // min(width, height)))
        pictures = [p.resize((width * factor, height * factor), Image.Resampling.NEAREST) for p in pictures]
        width, height = pictures[0].size
        lines = -(-len(legend) // 4)
        sheet = Image.new("RGB", (len(pictures) * (width + 8) - 8, height + 18 + 16 * lines), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
            sheet.paste(picture, (i * (width + 8), 18))
            pen.text((i * (width + 8) + 2, 2), title, fill="black")
        for i, (name, colour) in enumerate(legend):
            x, y = (i % 4) * (sheet.width // 4), height + 20 + 16 * (i // 4)
            pen.rectangle((x + 2, y + 1, x + 12, y + 11), fill=colour)
            pen.text((x + 16, y), name, fill="black")
        sheet.save(folder / f"{number:04d}.png")
    return folder
