"""What did it learn? Pictures of any checkpoint and any images, and the curves of runs.

    python pictures.py reconstruct --checkpoint runs/cae-nano-demo --dataset demo
    python pictures.py attention --checkpoint openai/clip-vit-base-patch16 --images my_pictures
    python pictures.py curves runs/cae-v2-nano-demo runs/cae-nano-demo

Drawing alone: what is drawn is computed by cae.py, convert.py and engine/. Each sub-command is a function that collects
what it shows, and one that draws it. Each ends with what was measured and writes it to result.json in its run folder;
where standard output is no terminal that object is the last line, too.

Read in this order: flags; images; then masks, reconstruct, attention, embedding, targets, crops; curves and sweep.
"""

# engine comes first: it sets what has to be set before torch is imported.
from engine.arguments import (
    AutoFloat,
    AutoInt,
    AutoStr,
    DeviceArgs,
    Floats,
    ImagesArgs,
    Strs,
    as_name,
    fill,
    local_path,
    name_of_data,
    parse,
    require_crop_scale,
    require_positive,
    resolve_images,
    world_size,
)
from engine.checkpoints import config_of_run, flags_of_checkpoint, make_run_dir, newest_weights
from engine.errors import RunError, UserError, command_line, first_line, require
from engine.evaluation import psnr
from engine.files import publish
from engine.frozen import load_frozen
from engine.images import CenterCrop, RandomCrop, coverage, normalize, resize
from engine.run import make_accelerator, print_result, write_result
from engine.sources import EVALUATION_SPLITS, open_source, open_splits, with_first_classes
from engine.stream import one_pass, sample

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

from cae import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LN_EPS,
    SIZES,
    CrossAttention,
    attention_weights,
    block_mask,
    count_masked,
    patchify,
    random_mask,
    take,
    unpatchify,
)
from convert import load_encoder, load_model, weights_of

# ----------------------------------------------------------------------------------------------------------------
# Flags: one dataclass for each sub-command. Values of None follow from others.

Runs = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="")]
SizeOrRun = Annotated[str | None, tyro.conf.arg(metavar="|".join([*SIZES, "RUN"]), help_behavior_hint="")]
BlockOrRandom = Annotated[
    Literal["block", "random"] | None, tyro.conf.arg(metavar="block|random", help_behavior_hint="")
]


@dataclass
class PictureData(ImagesArgs):
    """Which images."""

    split: AutoStr = None
    """Split of the data set. Default: the one to evaluate on, where there is one."""
    images: AutoStr = None
    """Folder of pictures to show, in the order of their names, instead of a data set."""
    count: AutoInt = None
    """Pictures in the figure. Default: 8; masks and attention 4."""
    batch_size: AutoInt = None
    """Images per forward pass. Default: 64."""


@dataclass
class FileArgs:
    """Where to."""

    run_dir: AutoStr = None
    """Run folder, of result.json and the figure. Default: one in runs/, named after what is drawn."""
    output: AutoStr = None
    """File of the figure: .png, .svg or .pdf. Default: one in the run folder; curves and sweep write .png and .svg."""
    seed: int = 0
    """Seed of everything random."""


@dataclass
class DrawArgs(FileArgs, DeviceArgs):
    """Where to, and on what."""


@dataclass
class MaskArgs:
    """How patches are masked."""

    mask: BlockOrRandom = None
    """Block-wise or uniformly random masks. Default: the run's, otherwise block."""
    mask_ratio: AutoFloat = None
    """Masked share of the patches. Default: the run's, otherwise 0.5."""
    min_block: AutoInt = None
    """Smallest area of a masked block, in patches. Default: the run's, otherwise 16; 4 of up to 7 x 7 patches."""


@dataclass
class Masks:
    """Images under block-wise and random masks (CAE v2, figure 4)."""

    @dataclass
    class Grid:
        """The masks."""

        mask_ratio: Floats = (0.15, 0.25, 0.5, 0.75)
        """Masked shares of the patches, a column for each."""
        image_size: AutoInt = None
        """Side of the square crop, in pixels. Default: 224 (demo: 28)."""
        patch_size: AutoInt = None
        """Side of a patch, in pixels. Default: 16 (demo: 4)."""
        min_block: AutoInt = None
        """Smallest area of a masked block, in patches. Default: 16; 4 of up to 7 x 7 patches."""

    data: PictureData = field(default_factory=PictureData)
    model: Grid = field(default_factory=Grid)
    run: FileArgs = field(default_factory=FileArgs)


@dataclass
class Reconstruct:
    """CAE with pixels: what the decoder makes of regressed latents, and of the encoder's own (CAE, figure 4)."""

    @dataclass
    class Models:
        """The models, side by side."""

        checkpoint: Strs = ()
        """Run folders or model/ folders of train.py --method cae --target pixels, with the same grid of patches."""
        measured: int = 256
        """Images that the error is measured on."""

    encoder: Models = field(default_factory=Models)
    data: PictureData = field(default_factory=PictureData)
    target: MaskArgs = field(default_factory=MaskArgs)
    run: DrawArgs = field(default_factory=DrawArgs)


@dataclass
class Attention:
    """Where the class token looks, and an attentive probe (CAE, figure 6)."""

    @dataclass
    class Encoder:
        """The encoder, and what it sees."""

        checkpoint: AutoStr = None
        """Run folder; model/ folder; Hub id; released .pth, also owner/name::path; transformers BEiT, CLIP, ..."""
        random_init: SizeOrRun = None
        """An untrained encoder of this size, or of the shape of a run folder's, instead."""
        probe: AutoStr = None
        """Run folder of probe.py attentive on this encoder: its query's attention, too."""
        block: int = -1
        """Block of the encoder, from 0; -1 is the last."""
        image_size: AutoInt = None
        """Side of the square crop, in pixels. Default: the encoder's own. A larger one has a finer grid."""

    encoder: Encoder = field(default_factory=Encoder)
    data: PictureData = field(default_factory=PictureData)
    run: DrawArgs = field(default_factory=DrawArgs)


@dataclass
class Embedding:
    """Features of images by class, and the principal components of patches as colours."""

    @dataclass
    class Encoders:
        """The encoders, side by side."""

        checkpoint: Strs = ()
        """Run folder; model/ folder; Hub id; released .pth; transformers BEiT, CLIP, DINOv2, ...; several of them."""
        random_init: SizeOrRun = None
        """Also an untrained encoder of this size, or of the shape of a run folder's, as the first."""
        projection: Literal["tsne", "pca"] = "tsne"
        """t-SNE, or the first two principal components."""
        pool: Literal["class", "mean"] = "class"
        """Features: class token, or mean of the patches."""
        points: int = 1000
        """Images that are points."""
        classes: int = 10
        """Classes that are shown, the first that the data set names."""

    encoder: Encoders = field(default_factory=Encoders)
    data: PictureData = field(default_factory=PictureData)
    run: DrawArgs = field(default_factory=DrawArgs)


@dataclass
class Targets:
    """CAE v2: how close each patch comes to CLIP's latent, where it is seen and where it is masked."""

    @dataclass
    class Model:
        """The model, and its teacher."""

        checkpoint: AutoStr = None
        """Run folder or model/ folder of train.py, of CAE v2."""
        teacher: AutoStr = None
        """Hub id or folder. Default: the run's, otherwise openai/clip-vit-base-patch16."""
        measured: int = 256
        """Images that the mean cosines are measured on."""

    encoder: Model = field(default_factory=Model)
    data: PictureData = field(default_factory=PictureData)
    target: MaskArgs = field(default_factory=MaskArgs)
    run: DrawArgs = field(default_factory=DrawArgs)


@dataclass
class Crops:
    """How often a pixel is in a random crop, and how often a patch is masked (CAE, figure 3)."""

    @dataclass
    class Views:
        """Crops and masks."""

        height: int = 224
        """Of the image, in pixels."""
        width: int = 224
        """Of the image, in pixels."""
        crop_scale: tuple[float, float] = (0.08, 1.0)
        """Area of the random crop."""
        mask_ratio: float = 0.5
        """Masked share of the crop's patches."""
        grid: int = 14
        """Patches along a side of the crop."""
        min_block: int = 16
        """Smallest area of a masked block, in patches."""
        draws: int = 10_000
        """Crops and masks that are drawn."""

    target: Views = field(default_factory=Views)
    run: FileArgs = field(default_factory=FileArgs)


@dataclass
class Curves:
    """Losses, learning rate, speed and accuracies from the log.jsonl of runs, in one figure."""

    @dataclass
    class Which:
        """The runs."""

        runs: Runs = ()
        """Run folders; RUN=NAME gives it another name."""
        x: Literal["images", "step", "epoch"] = "images"
        """What the curves are drawn against."""

    choice: Which = field(default_factory=Which)
    run: FileArgs = field(default_factory=FileArgs)


@dataclass
class Sweep:
    """Accuracy of many runs against a flag, with its spread (CAE v2, figure 3)."""

    @dataclass
    class Which:
        """The runs."""

        runs: Runs = ()
        """Run folders of train.py, with the run folders of their probes inside; or these themselves."""
        x: str = "mask_ratio"
        """The flag along the x axis, as config.json names it."""
        line: str = "size"
        """The flag that lines differ in."""
        panel: str = "supervise"
        """The flag that panels differ in."""
        task: AutoStr = None
        """knn, linear, attentive, ep, classify, ... Default: the one that there is."""

    choice: Which = field(default_factory=Which)
    run: FileArgs = field(default_factory=FileArgs)


# ----------------------------------------------------------------------------------------------------------------
# Images, models, and what all figures have in common.


def open_pictures(data, labelled=False):
    """PictureData -> Source; with classes if it is to be `labelled` and can be. Fills in what is None. Raises
    UserError."""
    fill(data, "batch_size", 64)
    if data.images is not None:
        data.dataset, data.streaming = data.images, False
    resolve_images(data)
    if data.val_fraction is not None:  # what all scripts hold out of this one
        fill(data, "split", "train")
    if data.split is None:
        splits = list(open_splits(data.dataset, data.patience))
        data.split = next((name for name in EVALUATION_SPLITS if name in splits), splits[0])
    held_out = data.val_fraction is not None
    source = open_source(data, held_out=held_out)
    try:
        return open_source(data, labelled=True, held_out=held_out) if labelled and source.label_column else source
    except UserError:  # labels of another kind
        return source


MOST_DRAWN = 5000  # images of a stream, to find those of some classes: at 224 pixels 0.7 GB


def pictures(data, size, count, seed, classes=None):
    """uint8 images (n, 3, S, S), of which n may be less than asked for; their labels (n) or None; names of the classes
    or None. Of a data set they are drawn at random, of --images the first by name. With `classes` labels are read,
    where there are any, and images drawn at random, of the first so many classes. Raises UserError."""
    source, view = open_pictures(data, classes is not None), CenterCrop(size, 1.0)
    workers = data.workers if count > 64 else 0  # to start them would take longer
    drawn = count
    if source.classes:
        source = with_first_classes(source, classes)
        if source.streaming:  # others are passed over
            drawn = max(count, min(MOST_DRAWN, math.ceil(count * len(source.classes) / classes)))
    if data.images is None or classes is not None:
        batch = sample(source, view, drawn, seed, workers)
    else:
        batch = next(one_pass(source, view, count, workers))
    if source.classes:  # of a stream's others, too
        chosen = (batch["labels"] < classes).nonzero()[:count, 0]
        batch = {name: batch[name][chosen] for name in ("images", "labels", "ids")}
    if data.images is not None and classes is not None:
        order = batch["ids"][:, 1].argsort()
        batch = {name: batch[name][order] for name in batch.keys() & {"images", "labels"}}
    require(len(batch["images"]), f"{data.dataset} holds no picture that can be read")
    return batch["images"], batch.get("labels"), source.classes and source.classes[:classes]


def accelerator_of(args):
    """Device and autocast of a script in one process. Raises UserError."""
    return make_accelerator(args.run, args.data)[0]


def load_cae(checkpoint, method, what):
    """A CAE of this method. Raises UserError."""
    require(checkpoint, f"give --checkpoint: {what}")
    try:
        model = load_model(checkpoint)
    except (OSError, ValueError) as error:
        raise UserError(f"--checkpoint {checkpoint} cannot be loaded: {first_line(error)}") from error
    require(model.config.method == method, f"--checkpoint {checkpoint} is {model.config.method}: {what} is needed")
    return model


def resolve_masks(target, config, flags):
    """Fill in MaskArgs by the flags of a run; the number of masked patches. Raises UserError."""
    fill(target, "mask", flags.get("mask", "block"))
    fill(target, "mask_ratio", flags.get("mask_ratio", 0.5))
    fill(target, "min_block", flags.get("min_block") or smallest_block(config.grid))
    require_positive(target, "min_block")
    return masked_patches(target.mask_ratio, config.num_patches)


def masked_patches(ratio, patches):
    """How many of so many patches a --mask-ratio masks. Raises UserError."""
    masked = count_masked(ratio, patches)
    require(0 < ratio < 1 and 0 < masked < patches,
            f"--mask-ratio {ratio} masks {masked} of {patches} patches: one must be masked, one visible")  # fmt: skip
    return masked


def draw_masks(args, config, count, masked):
    """visible (count, Nv) and masked (count, Nm), by MaskArgs in which nothing is None."""
    target = args.target
    generator = torch.Generator().manual_seed(args.run.seed)
    if target.mask == "random":
        return random_mask(count, config.grid, masked, generator=generator)
    return block_mask(count, config.grid, masked, min_block=target.min_block, generator=generator)


def smallest_block(grid):
    return 4 if grid[0] * grid[1] <= 49 else 16


def short_name(checkpoint):
    return str(checkpoint).rstrip("/").removesuffix("/model").removeprefix("runs/")


# Okabe and Ito's colours, which colour-blind people can tell apart; with more lines than that, markers differ, too.
# Of classes, Tol's muted ones.
CLASS_COLOURS = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499",
                 "#aaaaaa")  # fmt: skip
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7f7f7f", "#000000")
MARKERS = "osD^vPX*<>"
MASKED = (0.35, 0.45, 0.75)  # of a masked patch: neither grey as a picture's shadow nor as its background
HEAT = "inferno"  # from dark to light, also in grey


def canvas(width, height):
    """A matplotlib Figure of so many inches; no window, no state. Its text is legible at half of its size."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "svg.hashsalt": "cae",  # names within an .svg are the same each time
    })  # fmt: skip
    return Figure(figsize=(width, height), layout="constrained")


def picture_grid(rows, columns, cell=1.15, beside=0.0, above=0.0):
    """A figure of `rows` x `columns` pictures, with so many inches for words beside and above them; and its axes."""
    figure = canvas(cell * columns + beside, cell * rows + above)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    axes = figure.subplots(rows, columns, squeeze=False)
    make_bare(axes)
    return figure, axes


def make_bare(axes):
    """Axes of pictures: without ticks and frames."""
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


def legend_of(figure, axes, **options):
    """One legend of all that is named in any of the axes, beside or above them."""
    handles = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), **options)


def as_picture(image):
    """A tensor (3, H, W), uint8 or in [0, 1] -> (H, W, 3) in [0, 1], for imshow."""
    image = image / 255 if image.dtype == torch.uint8 else image.clamp(0, 1)
    return image.float().permute(1, 2, 0).cpu().numpy()


def cover(images, masked, patch_size):
    """Images (B, 3, H, W) in [0, 1] with their masked patches (B, Nm) in one colour."""
    grid = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    patches = patchify(images, patch_size, order="p q c")                                # (B, N, 3 P^2)
    colour = torch.tensor(MASKED).repeat(patch_size**2).to(images)                       # (3 P^2)
    patches = patches.scatter(1, masked[..., None].expand(-1, -1, len(colour)), colour.expand(*masked.shape, -1))
    return unpatchify(patches, patch_size, grid)


def show_map(axis, image, values):
    """A map of patches (rows, columns) over a picture in grey, each patch a square."""
    height, width = image.shape[-2:]
    axis.imshow(as_picture(image).mean(axis=-1), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    axis.imshow(values.cpu().numpy(), cmap=HEAT, vmin=0, alpha=0.65, extent=(0, width, height, 0))


def save(figure, files):
    """Write a figure to each of the files, under a temporary name first. Raises RunError."""
    for file in files:
        temporary = file.with_name(f".{file.name}.tmp")
        # neither the date nor a version: the same figure is the same file
        metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None}}
        kind = file.suffix.removeprefix(".")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(temporary, format=kind, dpi=160, bbox_inches="tight", pad_inches=0.05,
                           metadata=metadata[kind])  # fmt: skip
            publish(temporary, file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"{file} could not be written: {first_line(error)}") from error


# ----------------------------------------------------------------------------------------------------------------
# Masks.


def masks(args):
    """-> (figure, what was measured, lines to print); so does every sub-command. Raises UserError."""
    data, model = args.data, args.model
    demo = data.dataset == "demo" and data.images is None
    fill(model, "image_size", 28 if demo else 224)
    fill(model, "patch_size", 4 if demo else 16)
    require_positive(model, "image_size", "patch_size", "min_block")
    require(model.image_size % model.patch_size == 0,
            f"--image-size {model.image_size} is not divisible by --patch-size {model.patch_size}")  # fmt: skip
    grid = (model.image_size // model.patch_size,) * 2
    fill(model, "min_block", smallest_block(grid))
    counts = {ratio: masked_patches(ratio, grid[0] * grid[1]) for ratio in model.mask_ratio}
    require(counts, "--mask-ratio is empty: 0.15 0.5")
    fill(data, "count", 4)
    images = pictures(data, model.image_size, data.count, args.run.seed)[0] / 255        # (B, 3, S, S)
    drawn = []
    for number, (draw, options) in enumerate(((block_mask, {"min_block": model.min_block}), (random_mask, {}))):
        for ratio, masked in counts.items():
            generator = torch.Generator().manual_seed(args.run.seed + number)
            index = draw(len(images), grid, masked, generator=generator, **options)[1]   # (B, Nm)
            drawn.append((("block-wise", "random")[number], ratio, index))
    found = {"grid": grid, "masked": list(counts.values()), "mask_ratio": list(counts), "images": len(images)}
    lines = [f"{ratio:.0%} of {grid[0]} x {grid[1]} patches: {masked} masked" for ratio, masked in counts.items()]
    return draw_mask_figure(images, drawn, model.patch_size), found, lines


def draw_mask_figure(images, drawn, patch_size):
    """images (B, 3, H, W) in [0, 1]; drawn: (kind, ratio, masked (B, Nm)) for every column."""
    figure, axes = picture_grid(len(images), 1 + len(drawn), above=0.35)
    columns = [images, *(cover(images, masked, patch_size) for _, _, masked in drawn)]
    titles = ["image", *(f"{kind}\n{ratio:.0%}" for kind, ratio, _ in drawn)]
    for column, (shown, title) in enumerate(zip(columns, titles, strict=True)):
        axes[0, column].set_title(title)
        for axis, image in zip(axes[:, column], shown, strict=True):
            axis.imshow(as_picture(image))
    return figure


# ----------------------------------------------------------------------------------------------------------------
# Reconstruct.


@torch.no_grad()
def reconstructed(model, images, visible, masked, normalized=False):
    """Two pictures of each image (B, 3, S, S) in [0, 1], and their mean squared errors.

    "regressed": the encoder sees the visible patches, regressor and decoder make the masked ones, the visible are
    copied. "encoded": the encoder sees all patches, the decoder takes its latents, the regressor is skipped.
    `normalized`: the model predicts patches by their own mean and deviation; those of the image put them back.
    -> {name: (B, 3, S, S)}, {name: error over the patches that were predicted}
    """
    size, grid = model.config.patch_size, model.config.grid
    inputs = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    truth = patchify(images, size, order="p q c")                                        # (B, N, 3 P^2), in [0, 1]
    mean, std = (torch.tensor(v).repeat(size**2).to(images) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def to_pixels(patches, target):
        """As predicted (B, n, 3 P^2) -> in [0, 1]; target (B, n, 3 P^2), the image's own."""
        if normalized:
            own = (target - mean) / std
            patches = patches * (own.var(dim=-1, keepdim=True) + 1e-6).sqrt() + own.mean(dim=-1, keepdim=True)
        return (patches.float() * std + mean).clamp(0, 1)

    hidden = take(truth, masked)                                                         # (B, Nm, 3 P^2)
    regressed = to_pixels(model.predict(inputs, visible, masked), hidden)                # (B, Nm, 3 P^2)
    encoded = to_pixels(model.decode_latents(inputs), truth)                             # (B, N, 3 P^2)
    whole = truth.scatter(1, masked[..., None].expand_as(regressed), regressed)          # (B, N, 3 P^2)
    shown = {"regressed": unpatchify(whole, size, grid), "encoded": unpatchify(encoded, size, grid)}
    return shown, {"regressed": F.mse_loss(regressed, hidden).item(), "encoded": F.mse_loss(encoded, truth).item()}


def reconstruct(args):
    data, choice = args.data, args.encoder
    what = "run folders of train.py --method cae --target pixels"
    require(choice.checkpoint, f"give --checkpoint: {what}")
    models = [load_cae(checkpoint, "cae", what) for checkpoint in choice.checkpoint]
    config = models[0].config
    for checkpoint, model in zip(choice.checkpoint, models, strict=True):
        require(model.config.target_dim == 3 * model.config.patch_size**2,
                f"--checkpoint {checkpoint} predicts {model.config.target_dim} codes, of which no picture can be made: "
                f"train with --target pixels")  # fmt: skip
        require((model.config.image_size, model.config.patch_size) == (config.image_size, config.patch_size),
                f"--checkpoint {checkpoint} has another grid of patches than the first: draw it by itself")
    fill(data, "count", 8)
    require_positive(choice, "measured")
    flags = [flags_of_checkpoint(checkpoint) for checkpoint in choice.checkpoint]
    masked = resolve_masks(args.target, config, flags[0])
    accelerator = accelerator_of(args)
    device = accelerator.device
    wanted = max(data.count, choice.measured)
    images = pictures(data, config.image_size, wanted, args.run.seed)[0]                 # (B, 3, S, S)
    index = draw_masks(args, config, len(images), masked)                                # (B, Nv), (B, Nm)
    weights = [model.config.align_weight for model in models]
    titles = {checkpoint: f"λ = {weight:g}" if weights.count(weight) == 1 else short_name(checkpoint)
              for checkpoint, weight in zip(choice.checkpoint, weights, strict=True)}  # fmt: skip
    columns, found, lines = [], [], [f"{'PSNR in dB, ' + str(len(images)) + ' images':44}{'masked':>8}{'encoded':>9}"]
    for checkpoint, model, flag in zip(choice.checkpoint, models, flags, strict=True):
        model, normalized = model.to(device), flag.get("normalize_pixels", False)
        if args.run.compile:
            model.encoder.compile()
        parts, errors = [], {"regressed": 0.0, "encoded": 0.0}
        for batch in zip(*(part.split(data.batch_size) for part in (images, *index)), strict=True):
            pixels, visible, masked = (part.to(device) for part in batch)
            with accelerator.autocast():
                shown, error = reconstructed(model, pixels / 255, visible, masked, normalized)
            if len(parts) * data.batch_size < data.count:  # the others are measured only
                parts.append({name: picture.cpu() for name, picture in shown.items()})
            errors = {name: total + error[name] * len(pixels) / len(images) for name, total in errors.items()}
        decibels = {name: round(psnr(error), 2) for name, error in errors.items()}
        found.append({"checkpoint": checkpoint, "align_weight": model.config.align_weight,
                      "normalize_pixels": normalized, "psnr": decibels})  # fmt: skip
        lines.append(f"{short_name(checkpoint):44}{decibels['regressed']:8.2f}{decibels['encoded']:9.2f}")
        shown = {name: torch.cat([part[name] for part in parts])[: data.count] for name in parts[0]}
        columns.append((titles[checkpoint], shown, decibels))
    few = images[: data.count] / 255
    figure = draw_reconstructions(few, index[1][: data.count], config.patch_size, columns)
    result = {"models": found, "mask": args.target.mask, "mask_ratio": args.target.mask_ratio,
              "masked": index[1].shape[1], "images": len(few), "measured": len(images)}  # fmt: skip
    return figure, result, lines


def draw_reconstructions(images, masked, patch_size, models):
    """A column for each of the images (B, 3, S, S); models: (title, {"regressed", "encoded"} pictures, their PSNR)."""
    rows = [("image", images), ("masked", cover(images, masked, patch_size))]
    for title, shown, decibels in models:
        rows.append((f"{title}\nregressed\n{decibels['regressed']:.1f} dB", shown["regressed"]))
        rows.append((f"{title}\nencoded, no\nregressor\n{decibels['encoded']:.1f} dB", shown["encoded"]))
    figure, axes = picture_grid(len(rows), len(images), cell=1.0, beside=1.0)
    for row, (title, shown) in zip(axes, rows, strict=True):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for axis, image in zip(row, shown, strict=True):
            axis.imshow(as_picture(image))
    return figure


# ----------------------------------------------------------------------------------------------------------------
# Attention.


def query_attention(weights, tokens, heads):
    """Where the query of an attentive probe looks: the parameters of its head by name, tokens (B, n, D) -> one map for
    each head, or for each query of an efficient probe: (B, maps, n)."""
    query = weights["query"]                                                             # (1, 1 or M, D)
    if "attn.q.weight" not in weights:  # the efficient probe: the tokens themselves are the keys
        return attention_weights(query[:, None], tokens[:, None])[:, 0]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], LN_EPS)

    attention = CrossAttention(query.shape[-1], heads).to(tokens)
    prefix = "attn."
    attention.load_state_dict({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)})
    q, k, _ = attention.split(norm("norm_q", query), norm("norm_k", tokens), norm("norm_v", tokens))
    return attention_weights(q.expand(len(tokens), -1, -1, -1), k)[:, :, 0]              # (B, heads, n)


@dataclass
class Query:
    """An attentive probe's first head, which is the recipe's own."""

    weights: dict
    """Its parameters by name."""
    with_class: bool
    """Whether it attends to the class token as well."""


def open_probe(folder, encoder, device):
    """The Query of a run folder of probe.py attentive on this encoder. Raises UserError."""
    flags = config_of_run(folder).get("args", {})
    require(flags.get("task") in ("attentive", "ep"), f"--probe {folder} is no run folder of probe.py attentive")
    require(flags.get("weights") == weights_of(encoder),
            f"--probe {folder} was trained on {flags.get('checkpoint') or flags.get('random_init')}, whose weights are "
            "others: pass that --checkpoint, or another probe")  # fmt: skip
    weights = {name.removeprefix("0."): w.to(device) for name, w in newest_weights(folder).items() if name[:2] == "0."}
    return Query(weights, flags.get("tokens") == "all")


@torch.no_grad()
def attention(args):
    data, choice = args.data, args.encoder
    if choice.probe and not (choice.checkpoint or choice.random_init):
        choice.checkpoint = config_of_run(choice.probe).get("args", {}).get("checkpoint")
    require(bool(choice.checkpoint) != bool(choice.random_init), "give either --checkpoint or --random-init")
    encoder = load_encoder(choice, args.run.seed)
    fill(choice, "image_size", encoder.image_size)
    size, patch = choice.image_size, encoder.patch_size
    require(size > 0 and size % patch == 0,
            f"--image-size {size} is not divisible by the encoder's patch of {patch} pixels")  # fmt: skip
    device = accelerator_of(args).device
    probe = open_probe(choice.probe, encoder, device) if choice.probe else None
    fill(data, "count", 4)
    encoder = encoder.to(device)
    if args.run.compile:
        encoder.compile()
    images = pictures(data, size, data.count, args.run.seed)[0] / 255                    # (B, 3, S, S)
    heads, looks = [], []
    for batch in images.to(device).split(min(data.batch_size, 4)):  # some models give all blocks' attention at once
        try:
            heads.append(encoder.attention(batch, choice.block))                         # (b, heads, N), in float32
        except IndexError as error:
            raise UserError(f"--block {choice.block} does not exist: blocks are counted from 0") from error
        if probe:
            tokens = encoder(batch).float()[:, 0 if probe.with_class else 1 :]           # (b, N or 1 + N, D)
            maps = query_attention(probe.weights, tokens, encoder.heads)                 # (b, maps, N or 1 + N)
            looks.append(maps[:, :, -heads[-1].shape[2] :].mean(dim=1))                  # (b, N)
    heads = torch.cat(heads)                                                             # (B, heads, N)
    columns = [("mean of\nheads", heads.mean(dim=1)), *((f"head {i}", heads[:, i]) for i in range(heads.shape[1]))]
    found = {"block": choice.block, "heads": heads.shape[1], "to_patches": round(heads.sum(dim=-1).mean().item(), 4)}
    if probe:
        columns.insert(1, ("attentive\nprobe", torch.cat(looks)))
        found["probe"] = choice.probe
    lines = [f"block {choice.block}, {heads.shape[1]} heads: {found['to_patches']:.1%} of the class token's attention "
             "goes to the patches, the rest to itself and to registers, if there are any"]  # fmt: skip
    return draw_attention(images, columns, (size // patch,) * 2), {**found, "images": len(images)}, lines


def draw_attention(images, columns, grid):
    """A row for each of the images (B, 3, S, S) in [0, 1]; columns: (title, (B, N)). Each map has a scale of its own,
    from 0 to its largest value."""
    figure, axes = picture_grid(len(images), 1 + len(columns), above=0.4)
    axes[0, 0].set_title("image")
    for axis, image in zip(axes[:, 0], images, strict=True):
        axis.imshow(as_picture(image))
    for column, (title, maps) in enumerate(columns, start=1):
        axes[0, column].set_title(title)
        for axis, image, values in zip(axes[:, column], images, maps, strict=True):
            show_map(axis, image, values.view(grid))
    return figure


# ----------------------------------------------------------------------------------------------------------------
# Embedding.


@torch.no_grad()
def encode(encoder, images, accelerator, batch_size, select):
    """select(tokens (b, 1 + N, D)), float32 on the host, of all uint8 images (B, 3, S, S), batch by batch."""
    parts = []
    for batch in images.split(batch_size):
        with accelerator.autocast():
            tokens = encoder(batch.to(accelerator.device) / 255)                         # (b, 1 + N, D)
        parts.append(select(tokens.float()).cpu())
    return torch.cat(parts)


def principal_components(x, count):
    """The first principal components of rows (n, D): (n, count). Of the two signs of each the one in which the row that
    lies farthest out is positive: the same on every machine."""
    x = x.double() - x.double().mean(dim=0)
    projected = x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -count:].flip(1)          # (n, count), the largest first
    farthest = projected.gather(0, projected.abs().argmax(dim=0, keepdim=True))          # (1, count)
    return projected * farthest.sign()


def as_colours(components):
    """Three components of patches (n, 3) -> red, green, blue in [0, 1], from the second to the 98th percentile."""
    low, high = (components.quantile(q, dim=0) for q in (0.02, 0.98))
    return ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def project(features, kind, seed):
    """Features (n, D) -> points (n, 2), by t-SNE (cosine distances, from the principal components) or "pca"."""
    if kind == "pca":
        return principal_components(features, 2)
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=seed)
    return torch.from_numpy(tsne.fit_transform(features.numpy()))


def embedding(args):
    data, choice = args.data, args.encoder
    origins = [SimpleNamespace(checkpoint=None, random_init=choice.random_init)] if choice.random_init else []
    origins += [SimpleNamespace(checkpoint=checkpoint, random_init=None) for checkpoint in choice.checkpoint]
    require(origins, "give --checkpoint or --random-init")
    require_positive(choice, "classes")
    require(choice.points >= 4, f"--points {choice.points} is too few: at least four are needed")
    fill(data, "count", 8)
    accelerator, panels, strips, found = accelerator_of(args), [], [], []
    wanted, of_size = max(choice.points, data.count), {}  # what was read for an encoder of this size before
    for origin in origins:
        encoder = load_encoder(origin, args.run.seed).to(accelerator.device)
        if args.run.compile:
            encoder.compile()
        name = short_name(origin.checkpoint or f"random weights, {short_name(origin.random_init)}")
        size = encoder.image_size
        if size not in of_size:
            of_size[size] = pictures(data, size, wanted, args.run.seed, choice.classes)
        images, labels, classes = of_size[size]
        require(len(images) >= 4, f"{data.dataset} holds {len(images)} pictures to show: at least four are needed")
        of_image = {"class": lambda tokens: tokens[:, 0], "mean": lambda tokens: tokens[:, 1:].mean(dim=1)}[choice.pool]
        features = encode(encoder, images[: choice.points], accelerator, data.batch_size, of_image)  # (n, D)
        few = images[: data.count]
        patches = encode(encoder, few, accelerator, data.batch_size, lambda tokens: tokens[:, 1:])  # (B, N, D)
        colours = as_colours(principal_components(patches.flatten(0, 1), 3))             # (B N, 3)
        grid = (size // encoder.patch_size,) * 2
        points = project(features, choice.projection, args.run.seed)                     # (n, 2)
        labels = None if labels is None else labels[: len(points)]
        panels.append((name, points, labels))
        strips.append((name, few / 255, colours.view(len(few), *grid, 3)))
        found.append({"encoder": origin.checkpoint or f"random init {origin.random_init}", "points": len(points)})
        if labels is not None:
            nearest = torch.cdist(points, points).fill_diagonal_(math.inf).argmin(dim=1)
            found[-1]["same_class"] = round(100 * (labels[nearest] == labels).double().mean().item(), 2)
    what = {"tsne": "t-SNE", "pca": "principal components"}[choice.projection]
    result = {"projection": choice.projection, "pool": choice.pool, "encoders": found, "classes": classes}
    lines = [f"{of['encoder']}: the nearest point is of the same class for {of['same_class']:.1f} % of {of['points']}"
             for of in found if "same_class" in of]  # fmt: skip
    return draw_embedding(panels, strips, classes, what), result, lines


def draw_embedding(panels, strips, classes, what):
    """Above, panels: (title, points (n, 2), labels (n) or None); below, strips: (title, pictures (B, 3, S, S), colours
    of their patches (B, rows, columns, 3))."""
    width, count = max(3.7 * len(panels) + 1.2, 7.5), len(strips[0][1])
    cell = (width - 1.2) / count
    figure = canvas(width, 3.9 + cell * (1 + len(strips)))
    above, below = figure.subfigures(2, 1, height_ratios=[3.9, cell * (1 + len(strips))])
    axes = above.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, points, labels) in zip(axes, panels, strict=True):
        axis.set(xticks=[], yticks=[], title=title)
        axis.spines[:].set_visible(False)
        groups = [(None, torch.ones(len(points), dtype=torch.bool))]
        if labels is not None:
            groups = [(name, labels == number) for number, name in enumerate(classes)]
        for number, (name, chosen) in enumerate(groups):
            axis.scatter(*points[chosen].T, s=11, color=CLASS_COLOURS[number % len(CLASS_COLOURS)], linewidths=0,
                         marker=MARKERS[(number + number // 10) % 10], label=name, alpha=0.8)  # fmt: skip
    axes[0].set_ylabel(what)
    if classes:
        above.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", markerscale=2, fontsize=9)
    axes = below.subplots(1 + len(strips), count, squeeze=False)
    make_bare(axes)
    for number, row in enumerate([strips[0][1], *(colours for _, _, colours in strips)]):
        title = strips[number - 1][0] if number else "image"
        axes[number, 0].set_ylabel(title.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=9)
        for axis, image in zip(axes[number], row, strict=True):
            axis.imshow(image.numpy() if number else as_picture(image))
    return figure


# ----------------------------------------------------------------------------------------------------------------
# Targets.


@torch.no_grad()
def cosines(model, teacher, images, visible, masked):
    """How close a CAE v2 comes to its targets: 1 - the loss of every token. images (B, 3, S, S) in [0, 1]; teacher, a
    Frozen with CLIP's projection -> class token (B), patches (B, N)."""
    grid = model.config.grid
    seen = resize(images, tuple(teacher.patch_size * side for side in grid))  # what train.py shows its teacher
    target = teacher.model.visual_projection(teacher(seen))                              # (B, 1 + N, C)
    prediction = model.predict(normalize(images, IMAGENET_MEAN, IMAGENET_STD), visible, masked)
    order = torch.cat([torch.zeros_like(visible[:, :1]), 1 + visible, 1 + masked], dim=1)
    cosine = (prediction * F.normalize(take(target, order).float(), dim=-1)).sum(dim=-1)  # (B, 1 + N), in this order
    cosine = torch.empty_like(cosine).scatter(1, order, cosine)
    return cosine[:, 0], cosine[:, 1:]


def targets(args):
    data, choice = args.data, args.encoder
    model = load_cae(choice.checkpoint, "cae-v2", "a run folder of train.py, of CAE v2,")
    config, flags = model.config, flags_of_checkpoint(choice.checkpoint)
    masked = resolve_masks(args.target, config, flags)
    fill(choice, "teacher", flags.get("teacher") or "openai/clip-vit-base-patch16")
    teacher = load_frozen(choice.teacher, "--teacher", ("clip_vision_model", "clip"), projection=True)
    width = teacher.model.visual_projection.out_features
    require(width == config.target_dim,
            f"--teacher {choice.teacher} has latents of {width} values, --checkpoint {choice.checkpoint} predicts "
            f"{config.target_dim}: pass the teacher of its training")  # fmt: skip
    fill(data, "count", 8)
    require_positive(choice, "measured")
    accelerator = accelerator_of(args)
    device = accelerator.device
    model, teacher = model.to(device), teacher.to(device)
    if args.run.compile:
        model.encoder.compile()
    images = pictures(data, config.image_size, max(data.count, choice.measured), args.run.seed)[0]
    index = draw_masks(args, config, len(images), masked)                                # (B, Nv), (B, Nm)
    of_class, of_patches = [], []
    for batch in zip(*(part.split(data.batch_size) for part in (images, *index)), strict=True):
        pixels, visible, masked = (part.to(device) for part in batch)
        with accelerator.autocast():
            one, all_patches = cosines(model, teacher, pixels / 255, visible, masked)
        of_class.append(one.cpu())
        of_patches.append(all_patches.cpu())
    of_class, of_patches = torch.cat(of_class), torch.cat(of_patches)                    # (B), (B, N)
    of_visible, of_masked = (of_patches.gather(1, part) for part in index)               # (B, Nv), (B, Nm)
    means = {name: round(of.mean().item(), 4)
             for name, of in (("class", of_class), ("visible", of_visible), ("masked", of_masked))}  # fmt: skip
    result = {"checkpoint": choice.checkpoint, "teacher": choice.teacher, "supervise": config.supervise,
              "mask": args.target.mask, "mask_ratio": args.target.mask_ratio, "masked": index[1].shape[1],
              "cosine": means, "measured": len(images)}  # fmt: skip
    lines = [f"mean cosine to CLIP's latents, {len(images)} images:  class token {means['class']:.3f}  visible patches "
             f"{means['visible']:.3f}  masked patches {means['masked']:.3f}"]  # fmt: skip
    if config.supervise == "visible":
        lines.append("(trained with --supervise visible: nothing has taught the regressor, which makes the masked)")
    if config.supervise == "masked":
        lines.append("(trained with --supervise masked: class token and visible patches have had no target)")
    few = slice(data.count)
    return draw_targets(images[few] / 255, index[1][few], of_patches[few], config, means), result, lines


def draw_targets(images, masked, values, config, means):
    """A column for each of the images (B, 3, S, S) in [0, 1]; values (B, N), cosines; masked patches have a frame."""
    figure, axes = picture_grid(3, len(images), cell=1.0, beside=2.0)
    size, low = config.patch_size, math.floor(10 * values.quantile(0.01).item()) / 10
    titles = ("image", "masked", f"cosine\nvisible {means['visible']:.2f}\nmasked {means['masked']:.2f}")
    for row, title in zip(axes, titles, strict=True):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
    for column, (image, covered) in enumerate(zip(images, cover(images, masked, size), strict=True)):
        axes[0, column].imshow(as_picture(image))
        axes[1, column].imshow(as_picture(covered))
        height, width = image.shape[-2:]
        heat = axes[2, column].imshow(values[column].view(config.grid).numpy(), cmap="cividis", vmin=low, vmax=1,
                                      extent=(0, width, height, 0))  # fmt: skip
        for patch in masked[column].tolist():
            top, left = (size * side for side in divmod(patch, config.grid[1]))
            inner = 0.12 * size
            square = [(left + inner, top + inner), (left + size - inner, top + inner),
                      (left + size - inner, top + size - inner), (left + inner, top + size - inner)]  # fmt: skip
            axes[2, column].plot(*zip(*square, square[0], strict=True), color="white", linewidth=0.7)
    figure.colorbar(heat, ax=axes, location="right", shrink=0.3, anchor=(0, 0), aspect=9, ticks=[low, (1 + low) / 2, 1])
    return figure


# ----------------------------------------------------------------------------------------------------------------
# Crops.


def frequencies(asked, seed):
    """Shares of all draws: {"crop": of pixels in the crop (H, W), "block" and "random": of patches masked in the crop's
    own frame (grid, grid), "masked": of pixels that are in the crop and masked, block-wise (H, W)}."""
    height, width, grid = asked.height, asked.width, asked.grid
    torch.manual_seed(seed)
    crop, image = RandomCrop(224, asked.crop_scale), torch.empty(3, height, width, device="meta")
    drawn = [crop.box(image) for _ in range(asked.draws)]
    boxes = torch.tensor([[box[name] for name in ("top", "left", "height", "width")] for box in drawn])
    count = count_masked(asked.mask_ratio, grid**2)
    generator = torch.Generator().manual_seed(seed)
    blocks = block_mask(asked.draws, (grid, grid), count, min_block=asked.min_block, generator=generator)[1]
    randoms = random_mask(asked.draws, (grid, grid), count, generator=generator)[1]      # (draws, Nm)

    def of_patches(masked):
        return masked.flatten().bincount(minlength=grid**2).view(grid, grid) / asked.draws

    # Each masked patch in the image's own frame, to whole pixels: edge i of the crop's grid lies at side * i / grid.
    row, column = blocks // grid, blocks % grid                                          # (draws, Nm)
    top, left, rows, columns = (side[:, None] for side in boxes.unbind(dim=1))
    edges = [start + (length * (index + more) / grid).round().long()
             for start, length, index in ((top, rows, row), (left, columns, column)) for more in (0, 1)]  # fmt: skip
    y0, y1, x0, x1 = (edge.flatten() for edge in edges)
    in_image = torch.stack([y0, x0, y1 - y0, x1 - x0], dim=1)                            # (draws Nm, 4)
    return {
        "crop": coverage(boxes, height, width) / asked.draws,
        "block": of_patches(blocks),
        "random": of_patches(randoms),
        "masked": coverage(in_image, height, width) / asked.draws,
    }


def crops(args):
    asked = args.target
    require_positive(asked, "height", "width", "grid", "min_block", "draws")
    require_crop_scale(asked)
    masked_patches(asked.mask_ratio, asked.grid**2)
    maps = frequencies(asked, args.run.seed)
    found = {}
    for name, values in maps.items():
        middle, corner = values[values.shape[0] // 2, values.shape[1] // 2], values[0, 0]
        found[name] = {"middle": round(100 * middle.item(), 2), "corner": round(100 * corner.item(), 2)}
    lines = [f"{'percent of ' + format(asked.draws, ',') + ' draws':44}{'middle':>8}{'corner':>8}"]
    lines += [f"{CROP_TITLES[name].replace(chr(10), ' '):44}{of['middle']:8.1f}{of['corner']:8.1f}"
              for name, of in found.items()]  # fmt: skip
    return draw_crops(maps), {"frequency": found, "draws": asked.draws}, lines


CROP_TITLES = {
    "crop": "a pixel is in\nthe random crop",
    "block": "a patch of the crop is\nmasked, block-wise",
    "random": "a patch of the crop is\nmasked at random",
    "masked": "a pixel is in the crop\nand masked, block-wise",
}


def draw_crops(maps):
    figure = canvas(9.2, 2.75)
    for axis, (name, values) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
        heat = axis.imshow(values.numpy(), cmap="cividis", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], title=CROP_TITLES[name])
        axis.spines[:].set_visible(False)
        for where, (y, x) in (("middle", (0.5, 0.5)), ("corner", (0.06, 0.12))):
            row, column = (int(share * side) for share, side in zip((y, x), values.shape, strict=True))
            value = values[row, column] if where == "middle" else values[0, 0]
            axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=9,
                      color="black" if value > 0.5 else "white")  # fmt: skip
    figure.colorbar(heat, ax=figure.axes, shrink=0.9, pad=0.01, ticks=[0, 0.5, 1], format=lambda x, _: f"{x:.0%}")
    return figure


# ----------------------------------------------------------------------------------------------------------------
# Curves and sweep: of runs, without a model.

PANELS = {  # by the names of log.jsonl, in this order
    "loss": "loss",
    "loss_cls": "loss, class token",
    "loss_visible": "loss, visible patches",
    "loss_masked": "loss, masked patches",
    "loss_reconstruct": "loss, reconstruction",
    "loss_align": "loss, alignment",
    "knn_top1": "kNN top-1, %",
    "top1": "top-1, %",
    "miou": "mIoU, %",
    "ap": "AP, %",
    "lr": "learning rate",
    "images_per_second": "images/s",
}


def read_log(folder):
    """The lines of a run's log.jsonl, of which the last may be cut off. Raises UserError."""
    path = Path(folder).expanduser() / "log.jsonl"
    lines = []
    try:
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # being written
                continue
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} is no run folder: its log.jsonl cannot be read: {first_line(error)}") from error
    lines = [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
    require(lines, f"{path} has no line yet: wait for the run's first steps")
    return lines


def curves_of(runs, x):
    """{quantity: {run's name: (xs, ys)}} of what the runs have logged, without what is not finite. Raises UserError."""
    found, names = {}, set()
    for run in runs:
        folder, name = (run, "") if Path(run).expanduser().is_dir() else run.rpartition("=")[::2]
        name = name or short_name(folder)
        require(name not in names, f"two runs are called {name}: give RUN=NAME")
        names.add(name)
        for line in read_log(folder):
            for quantity in PANELS:
                value = line.get(quantity)
                if isinstance(value, (int, float)) and math.isfinite(value) and line.get(x) is not None:
                    xs, ys = found.setdefault(quantity, {}).setdefault(name, ([], []))
                    xs.append(line[x])
                    ys.append(value)
    return {quantity: found[quantity] for quantity in PANELS if quantity in found}


def curves(args):
    choice = args.choice
    require(choice.runs, "name run folders: pictures.py curves runs/a runs/b")
    found = curves_of(choice.runs, choice.x)
    require(found, f"the logs of {', '.join(choice.runs)} have nothing to draw against {choice.x}: try --x step")
    parts = [quantity for quantity in found if quantity.startswith("loss_")]
    last = {quantity: {run: ys[-1] for run, (_, ys) in of.items()} for quantity, of in found.items()}
    names = list(dict.fromkeys(run for of in found.values() for run in of))
    lines = [f"{'at the end':30}" + "".join(f"{PANELS[quantity]:>24}" for quantity in last)]
    lines += [f"{run:30}" + "".join(f"{of[run]:24.4g}" if run in of else f"{'-':>24}" for of in last.values())
              for run in names]  # fmt: skip
    return draw_curves(found, names, choice.x), {"runs": list(choice.runs), "last": last, "parts": parts}, lines


def draw_curves(found, names, x):
    """A panel for each quantity, a colour for each run."""
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    figure = canvas(3.1 * columns, 2.2 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    largest = max(max(xs) for of in found.values() for xs, _ in of.values())
    unit, word = (1, x) if x != "images" or largest < 10_000 else (1000, "thousand images")
    for axis, (quantity, of) in zip(axes, found.items(), strict=False):
        for run, (xs, ys) in of.items():
            number = names.index(run)
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            needs_marker = len(xs) < 40 or len(names) > len(COLOURS)
            axis.plot([value / unit for value in xs], ys, color=colour, linewidth=1.4, label=run, markersize=3,
                      marker=marker if needs_marker else None, markevery=max(1, len(xs) // 40))  # fmt: skip
        is_lowest = axis in axes[len(found) - columns :]
        axis.set(title=PANELS[quantity], xlabel=word if is_lowest else "")
        axis.set_ylim(bottom=0 if quantity in ("lr", "images_per_second") else None)
    legend_of(figure, axes[: len(found)], loc="outside upper center", ncols=min(4, len(names)))
    return figure


def results_of(folder):
    """[({"task", "score"}, folder of the pretraining run)] of a run folder with probes in it, or of a probe's own."""
    folder = Path(folder).expanduser()
    files = [folder / "result.json"] if (folder / "result.json").exists() else sorted(folder.glob("*/result.json"))
    found = []
    for file in files:
        try:
            result = json.loads(file.read_text())
            score = next(result[name] for name in ("top1", "miou", "ap") if isinstance(result.get(name), (int, float)))
            run = folder
            if file.parent == folder:  # a probe's own
                run = Path(result["encoder"])
                run = run.parent if run.name == "model" else run
            found.append(({"task": result["task"], "score": score}, run))
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            continue  # no result of a probe
    return found


def flags_and_model(run):
    """{flag: value} of a run folder: of what nobody gave, what the model has. {} where it is none."""
    config = config_of_run(run)
    given = {name: value for name, value in config.get("args", {}).items() if value is not None}
    return {**(config.get("model") or {}), **given} if given else {}


def is_complete(run, flags):
    """Whether a pretraining run has taken all of its steps: one that was stopped may have been probed, too."""
    try:
        last = read_log(run)[-1]
    except UserError:
        return False
    if flags.get("steps"):
        return last["step"] >= flags["steps"]
    return last.get("epoch") is None or last["epoch"] >= flags["epochs"] - 1e-3


def sweep_of(runs, keys, task=None):
    """Accuracies by flags: ({(panel, line, x): [accuracy of each run]}, task, [what was left out]); `keys` are the
    names of the three flags. Raises UserError."""
    scores, left_out, tasks = {}, [], {}
    for folder in runs:
        results = [(result, run) for result, run in results_of(folder) if task in (None, result["task"])]
        if not results:
            left_out.append(f"{folder}: no result{' of ' + task if task else ''} yet")
        for result, run in results:
            flags = flags_and_model(run)
            if not flags:
                left_out.append(f"{run}: no run folder of train.py")
                continue
            missing = [key for key in keys if key not in flags]
            require(not missing, f"{run} has no flag {', '.join(missing)} in its config.json: choose others of "
                                 f"{', '.join(flags)}")  # fmt: skip
            if not is_complete(run, flags):
                left_out.append(f"{run}: not trained to its end")
                continue
            tasks.setdefault(result["task"], folder)
            values = [flags[key] for key in keys]
            values = tuple(" ".join(map(str, value)) if isinstance(value, list) else value for value in values)
            scores.setdefault(values, []).append(result["score"])
    require(len(tasks) < 2, f"the runs have results of several tasks, {', '.join(tasks)}: pass --task")
    require(scores, "; ".join(["no run has a result to draw", *left_out[:3]]))
    return scores, next(iter(tasks)), left_out


TASKS = {"knn": "kNN top-1, %", "linear": "linear probe, top-1, %", "attentive": "attentive probe, top-1, %",
         "ep": "efficient probe, top-1, %", "classify": "fine-tuned, top-1, %"}  # fmt: skip


def sweep(args):
    choice = args.choice
    require(choice.runs, "name run folders: pictures.py sweep runs/sweep/*")
    keys = (choice.panel, choice.line, choice.x)
    scores, task, left_out = sweep_of(choice.runs, keys, choice.task)
    rows, lines = [], [f"{choice.panel:14}{choice.line:14}{choice.x:>14}{'runs':>6}{'mean':>8}{'from':>8}{'to':>8}"]
    for (panel, line, x), values in sorted(scores.items(), key=lambda item: [in_order(key) for key in item[0]]):
        mean = sum(values) / len(values)
        rows.append({choice.panel: panel, choice.line: line, choice.x: x, "runs": len(values), "mean": round(mean, 3),
                     "min": min(values), "max": max(values), "values": values})  # fmt: skip
        lines.append(f"{panel!s:14}{line!s:14}{x!s:>14}{len(values):6}{mean:8.1f}{min(values):8.1f}{max(values):8.1f}")
    lines += [f"left out: {note}" for note in left_out]
    figure = draw_sweep(scores, keys, TASKS.get(task, task))
    return figure, {"of": task, "rows": rows, "left_out": left_out}, lines


def in_order(value):
    """For sorting values of a flag: sizes as SIZES has them, numbers as such, others by name."""
    if value in SIZES:
        return (0, list(SIZES).index(value), "")
    return (1, value, "") if isinstance(value, (int, float)) else (2, 0, str(value))


def draw_sweep(scores, keys, label):
    """A panel for each value of the first flag, a line through the means for each of the second; points are runs."""
    panels, names, xs = (sorted({key[i] for key in scores}, key=in_order) for i in range(3))
    numeric = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in xs)
    places = {x: x if numeric else i for i, x in enumerate(xs)}
    span = (max(places.values()) - min(places.values())) or 1
    figure = canvas(2.7 * len(panels) + 0.6, 3.1)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for number, name in enumerate(names):
            there = [x for x in xs if (panel, name, x) in scores]
            if not there:
                continue
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            values = [scores[panel, name, x] for x in there]
            means, at = [sum(v) / len(v) for v in values], [places[x] for x in there]
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.plot(at, means, color=colour, marker=marker, markersize=6, linewidth=1.6, label=str(name))
            offset = 0.012 * span * (number - (len(names) - 1) / 2)
            for place, of in zip(at, values, strict=True):
                axis.plot([place + offset] * len(of), of, ".", color=colour, markersize=4, alpha=0.7)
        title = f"{keys[0].replace('_', ' ')}: {panel}" if len(panels) > 1 else ""
        axis.set(title=title, xlabel=keys[2].replace("_", " "))
        axis.set_xticks([places[x] for x in xs], [f"{x:g}" if numeric else str(x) for x in xs])
        axis.grid(axis="y", color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
    axes[0].set_ylabel(label)
    legend_of(figure, axes, title=keys[1].replace("_", " "), loc="outside right center")
    return figure


# ----------------------------------------------------------------------------------------------------------------
# From the command line to the files.


MOST = 100  # pictures along a side of a figure


def default_folder(task, args):
    """runs/pictures-TASK, with the names of checkpoint and data where there are any."""
    names = [task]
    checkpoint = getattr(getattr(args, "encoder", None), "checkpoint", None)
    first = checkpoint[0] if isinstance(checkpoint, tuple) and checkpoint else checkpoint
    if first:
        names.append(as_name(short_name(first)))
    if hasattr(args, "data"):
        data = name_of_data(args.data.images or args.data.dataset)
        names += [data] * (data not in names[-1])
    return f"runs/pictures-{'-'.join(names)}"


KINDS = {"masks": Masks, "reconstruct": Reconstruct, "attention": Attention, "embedding": Embedding,
         "targets": Targets, "crops": Crops, "curves": Curves, "sweep": Sweep}  # fmt: skip
COMMANDS = {"masks": masks, "reconstruct": reconstruct, "attention": attention, "embedding": embedding,
            "targets": targets, "crops": crops, "curves": curves, "sweep": sweep}  # fmt: skip


def draw(task, args):
    """One sub-command. Raises UserError and RunError."""
    began, run = time.perf_counter(), args.run
    fill(run, "run_dir", default_folder(task, args))
    folder = Path(run.run_dir)
    of_runs = task in ("curves", "sweep")
    output = Path(run.output or folder / f"{task}.png").expanduser()
    require(output.suffix in (".png", ".svg", ".pdf"), f"--output {output} is no .png, .svg or .pdf")
    files = [output.with_suffix(kind) for kind in (".png", ".svg")] if of_runs and output.suffix != ".pdf" else [output]
    other = [name for name in ("checkpoints", "log.jsonl", "model") if (folder / name).exists()]
    require(not other, f"run folder {folder} holds a run of another kind: pass another --run-dir")
    require(world_size() == 1, "pictures.py draws in one process: start it with python, without a launcher")
    if hasattr(args, "data"):
        if args.data.images is None:  # a wrong name is told before anything is loaded
            local_path(args.data.dataset)
        else:
            is_folder = Path(args.data.images).expanduser().is_dir()
            require(is_folder, f"--images {args.data.images} is no folder: name one with pictures")
        require_positive(args.data, "count")
        require((args.data.count or 0) <= MOST, f"--count {args.data.count} does not fit in a figure: at most {MOST}")
    figure, found, lines = COMMANDS[task](args)
    make_run_dir(folder)  # not before: a mistake leaves nothing behind
    save(figure, files)
    result = {"task": task, **found, "output": [str(file) for file in files]}
    if hasattr(args, "data"):
        result |= {"dataset": args.data.dataset, "split": args.data.split}
    result = write_result(folder, "pictures.py", {**result, "seed": run.seed}, began)
    print_result(folder, [*lines, "", *map(str, files)], result)


ESSENTIALS = """
essentials:
  --checkpoint CHECKPOINT     run folder, model/, id of the Hub, released .pth (not masks, crops, curves, sweep)
  --dataset DATA              images: an id of the Hub, a folder, a .parquet or .tar file, or demo
  --images FOLDER             or pictures of your own, in the order of their names
  --count N                   pictures in the figure
  --seed N                    of what is drawn at random
  --output FILE               the figure: .png, .svg or .pdf
  --run-dir FOLDER            where result.json goes

examples:
  python pictures.py attention --checkpoint runs/mine --images my_pictures
  python pictures.py curves runs/mine runs/other --output curves.png
"""


def main():
    command, *flags = sys.argv[1:] or [""]

    def work():
        if command in KINDS:  # the flags of this one are enough
            kind = KINDS[command]
            args = parse(kind, flags, prog=f"pictures.py {command}", description=f"{kind.__doc__}\n{ESSENTIALS}")
            draw(command, args)
        else:
            parse(Command, description=__doc__.partition("\n\n")[0] + f"\n{ESSENTIALS}")

    command_line(work)


Command = (
    Annotated[Masks, tyro.conf.subcommand("masks")]
    | Annotated[Reconstruct, tyro.conf.subcommand("reconstruct")]
    | Annotated[Attention, tyro.conf.subcommand("attention")]
    | Annotated[Embedding, tyro.conf.subcommand("embedding")]
    | Annotated[Targets, tyro.conf.subcommand("targets")]
    | Annotated[Crops, tyro.conf.subcommand("crops")]
    | Annotated[Curves, tyro.conf.subcommand("curves")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
)

if __name__ == "__main__":
    main()
