"""Pretrain a context autoencoder (CAE, CAE v2) on images, with Hugging Face Accelerate.

    accelerate launch train.py --size base --mask-ratio 0.5      CAE v2-B on streamed ImageNet-1K, CLIP ViT-B/16
    accelerate launch train.py --dataset demo                    minutes on two CPU cores, offline

Pretraining from the first line to the last: the targets, the student's view with its mask, the flags and the recipe,
the schedule, the loop. The model and its losses are in cae.py; engine/ is what every run needs and no paper mentions.

Everything random about an image (its position in the shuffled epoch, crop, flip, colours, mask) is a pure function of
seed, epoch and the image's index in the data; stochastic depth is one of seed, step, micro-batch and part of the data.
"""

# engine comes first: it sets what has to be set before torch is imported.
from engine.arguments import (
    DEMO,
    AutoFloat,
    AutoInt,
    AutoStr,
    DataArgs,
    Mark,
    RunArgs,
    WatchArgs,
    fill,
    name_of_data,
    parse,
    require_not_negative,
    require_positive,
    require_views,
    resolve_run,
    world_size,
)
from engine.checkpoints import args_of_run
from engine.errors import HubAwayError, UserError, command_line, first_line, printable, require
from engine.frozen import compiled_if_possible, load_frozen, load_pretrained
from engine.images import ColorJitter, crop_and_flip, normalize, resize
from engine.run import Run, length_of_run
from engine.sources import open_source
from engine.watching import KNNProbe, open_labelled_part

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn as nn
import tyro

from cae import (
    CAE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZES,
    CAEConfig,
    block_mask,
    count_masked,
    patch_grid,
    patchify,
    random_mask,
)

# ----------------------------------------------------------------------------------------------------------------
# Targets: what is predicted. Each teacher maps pixels (B, 3, H, W) in [0, 1], exactly the student's crop, to the
# target; frozen, in evaluation mode, outside DDP and the checkpoints. A new one is a class here and a line in TARGETS:
#
#     method           whose loss takes the target: cae-v2 float (B, 1 + N, C), class token first; cae int64 codes
#                      (B, N), which mean cross-entropy, or float (B, N, C), which mean MSE
#     hub_id           default of --teacher; "" where nothing is loaded
#     demo_folder      the same with --dataset demo; None: not with the demo
#     target_dim       C, or the number of codes
#     patch_pixels     side of a patch in what the teacher sees
#     compile_network  for torch.compile


class CLIPTeacher(nn.Module):
    """CLIP's latents of every token (CAE v2), from any CLIPVisionModelWithProjection: (B, 1 + N, C), class token first.

    The crop is resized so that teacher and student see the same grid of patches, with the teacher's positions
    interpolated where that is not its own size.
    """

    method = "cae-v2"
    hub_id, demo_folder = "openai/clip-vit-base-patch16", str(DEMO / "clip_teacher")

    def __init__(self, args, patch_size):
        super().__init__()
        self.clip = load_frozen(args.teacher, "--teacher", ("clip_vision_model", "clip"), projection=True)
        self.patch_size, self.patch_pixels = patch_size, self.clip.patch_size
        self.target_dim = self.clip.model.visual_projection.out_features

    def forward(self, pixels):
        grid = patch_grid(pixels, self.patch_size)
        pixels = resize(pixels, tuple(self.patch_pixels * side for side in grid))
        return self.clip.model.visual_projection(self.clip(pixels))                      # (B, 1 + N, C)

    def compile_network(self):
        self.clip.model.vision_model.compile(fullgraph=True)


class DALLETeacher(nn.Module):
    """DALL-E's code of every patch (CAE), from transformers' FlavaImageCodebook: int64 (B, N).

    It sees the crop at 8 pixels a patch (112 x 112 for 14 x 14 patches), antialiased bicubic. The released code makes a
    second crop of the original, with Lanczos: 0.55 levels of 255 away, and a little sharper (edges by a fourteenth).
    """

    method = "cae"
    hub_id, demo_folder = "facebook/flava-image-codebook", None

    def __init__(self, args, patch_size):
        super().__init__()
        from transformers import FlavaImageCodebook

        kinds = ("flava_image_codebook",)
        self.codebook = load_pretrained(args.teacher, FlavaImageCodebook, kinds, "a FLAVA image codebook", "--teacher")
        self.patch_size, self.patch_pixels, self.target_dim = patch_size, 8, self.codebook.config.vocab_size

    def forward(self, pixels):
        rows, columns = patch_grid(pixels, self.patch_size)
        x = 0.8 * resize(pixels, (8 * rows, 8 * columns)) + 0.1                          # DALL-E's own squeezing
        return self.codebook.get_codebook_indices(x.to(self.codebook.dtype)).flatten(1)  # (B, N)

    def compile_network(self):
        self.codebook.blocks.compile(fullgraph=True)


class PixelTeacher(nn.Module):
    """The patches themselves, as the student sees them: (B, N, 3 P^2), ordered (row, column, channel) as in MAE."""

    method = "cae"
    hub_id = demo_folder = ""

    def __init__(self, args, patch_size):
        super().__init__()
        self.patch_size = self.patch_pixels = patch_size
        self.normalize_patches = args.normalize_pixels
        self.target_dim = 3 * patch_size**2

    def forward(self, pixels):
        patches = patchify(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), self.patch_size, order="p q c")
        if self.normalize_patches:
            mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
            patches = (patches - mean) / (var + 1e-6).sqrt()
        return patches                                                                   # (B, N, 3 P^2)

    def compile_network(self):
        """There is none."""


TARGETS = {  # by --target; the first of a method is its default
    "clip": CLIPTeacher,
    "dalle": DALLETeacher,
    "pixels": PixelTeacher,
}


def build_teacher(args, config):
    """The teacher of these arguments, shown to give one target for every token of the student. Raises UserError."""
    try:
        teacher = TARGETS[args.target.target](args.target, config.patch_size).eval().requires_grad_(False)
    except HubAwayError as error:
        raise UserError(f"{error}, or --method cae --target pixels, which needs none, or --dataset demo") from error
    tokens = config.num_patches + (teacher.method == "cae-v2")  # with the class token
    try:
        found = teacher(torch.rand(1, 3, config.image_size, config.image_size)).shape[1]
    except (RuntimeError, ValueError) as error:
        found = first_line(error)  # for the message
    require(found == tokens,
            f"the grid of --teacher {args.target.teacher} cannot match the student's {config.grid[0]} x "
            f"{config.grid[1]} patches: {tokens} tokens are needed, it gives {found}")  # fmt: skip
    return teacher


# ----------------------------------------------------------------------------------------------------------------
# The student's view: one random crop of an image, and its mask. Drawn in the loading processes.


def num_masked(args, config):
    """The number of masked patches, for --mask-ratio."""
    return count_masked(args.target.mask_ratio, config.num_patches)


class Crops:
    """A pure function of the image and a seed, which follows from the run's seed, the epoch and the image.

    The released code jitters colours before it crops. Here the crop is jittered, at a fifth of the cost for an image
    of 500 x 375: contrast is then relative to the crop's mean grey instead of the whole image's.
    """

    names = ("images", "visible", "masked")  # what __call__ returns, in the order in which the loop gets it

    def __init__(self, args, config):
        from torchvision.transforms import v2

        self.grid, self.num_masked = config.grid, num_masked(args, config)
        self.mask, self.min_block = args.target.mask, args.target.min_block
        jitter = [ColorJitter(args.recipe.color_jitter)] if args.recipe.color_jitter else []
        crop = crop_and_flip(config.image_size, args.recipe.crop_scale, args.recipe.flip)
        self.transform = v2.Compose([*crop, *jitter])

    def __call__(self, image, seed):
        """uint8 (3, H, W) -> uint8 (3, S, S), visible (Nv), masked (Nm): indices of patches, int64."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also queue a call for a GPU, each time
        image = self.transform(image)
        if self.mask == "block":
            visible, masked = block_mask(1, self.grid, self.num_masked, min_block=self.min_block)
        else:
            visible, masked = random_mask(1, self.grid, self.num_masked)
        return image, visible[0], masked[0]


# ----------------------------------------------------------------------------------------------------------------
# Flags and recipe. Values of None follow from others: `resolve` fills them in.


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
    target: Annotated[str | None, tyro.conf.arg(metavar="|".join(TARGETS), help_behavior_hint="")] = None
    """clip (cae-v2); DALL-E's codes or pixels (cae). Default: clip; dalle, with the demo pixels."""
    teacher: AutoStr = None
    """Hub id or folder. Default: openai/clip-vit-base-patch16 (demo/clip_teacher), facebook/flava-image-codebook."""
    compile_teacher: Annotated[bool, Mark.FREE] = True
    """On a GPU, compile the frozen teacher. (--compile compiles it on any device, and the model too.)"""
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
    """Learning rate that the cosine would reach one step after the run's end."""
    warmup_epochs: AutoFloat = None
    """Linear warm-up from 0. Default: 1/30 of a run up to 300 epochs, 1/40 of a longer one."""
    weight_decay: float = 0.05
    """Weight decay; none on parameters of one dimension, nor on class and mask tokens."""
    weight_decay_end: AutoFloat = None
    """Weight decay that a cosine would reach one step after the run's end. Default: constant."""
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
    checkpoint_blocks: Annotated[bool, Mark.FREE] = False  # FREE: a resumed run may have another value
    """Run the encoder's blocks again in the backward pass instead of keeping what they computed: less memory."""


@dataclass
class Args:
    """Pretrain CAE v2 or CAE, on one device or many.

    essentials:
      --dataset DATA              images: an id of the Hub, a folder, a .parquet or .tar file, or demo
      --size SIZE                 nano, tiny, small, base, large or huge
      --image-size PIXELS         side of the square crop
      --teacher CLIP              the model whose latents are predicted: an id of the Hub, or a folder
      --effective-batch-size N    images per step, over all processes; the learning rate follows
      --epochs N                  passes over the data; more than before: the run goes on
      --run-dir FOLDER            where everything goes; the same command continues what is there

    examples:
      accelerate launch train.py --dataset my_images --size small --run-dir runs/mine
      accelerate launch train.py --size base --mask-ratio 0.5
    """

    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    target: TargetArgs = field(default_factory=TargetArgs)
    recipe: RecipeArgs = field(default_factory=RecipeArgs)
    probe: WatchArgs = field(default_factory=WatchArgs)
    run: RunArgs = field(default_factory=RunArgs)


MASK_RATIO = {"nano": 0.25, "tiny": 0.15, "small": 0.25, "base": 0.5, "large": 0.5, "huge": 0.5}  # of CAE v2


def resolve(args, world=1, images=None):
    """Args with every None filled in from the recipe of its size, method and data set, whose batch is made smaller for
    a small number of `images`. Raises UserError.

    The result is what config.json holds. It has numbers throughout, but for what only model or data know.
    """
    args = copy.deepcopy(args)
    model, data, target, recipe, run = args.model, args.data, args.target, args.recipe, args.run
    demo, is_v2 = data.dataset == "demo", model.method == "cae-v2"
    fill(model, "size", "nano" if demo else "base")
    require(model.size in SIZES, f"--size {model.size} does not exist: choose from {', '.join(SIZES)}")
    short = demo or model.size == "nano"  # a short run on small images
    fill(model, "image_size", 28 if short else 224)
    fill(model, "patch_size", 4 if short else 16)
    fill(target, "mask_ratio", MASK_RATIO[model.size] if is_v2 else 0.5)
    fill(target, "min_block", 4 if short else 16)
    possible = {name: teacher for name, teacher in TARGETS.items() if teacher.method == model.method}
    with_demo = [name for name, teacher in possible.items() if teacher.demo_folder is not None]
    fill(target, "target", with_demo[0] if demo else next(iter(possible)))
    require(target.target in possible,
            f"--method {model.method} cannot predict --target {target.target}: it takes {' or '.join(possible)}")
    default = (demo and possible[target.target].demo_folder) or possible[target.target].hub_id
    require(default or not target.teacher, f"--teacher has no use with --target {target.target}: drop one")
    fill(target, "teacher", default)
    fill(recipe, "lr", 8e-2 if short else 1.5e-3)
    fill(recipe, "crop_scale", (0.6, 1.0) if short else (0.4, 1.0) if is_v2 else (0.08, 1.0))
    fill(recipe, "color_jitter", 0.4 if is_v2 and not short else 0.0)
    fill(recipe, "weight_decay_end", recipe.weight_decay)
    of_data = "" if data.dataset == DataArgs.dataset else f"-{name_of_data(data.dataset)}"
    fill(run, "run_dir", f"runs/{model.method}-{model.size}{of_data}")
    old_args = args_of_run(run)  # a resumed run keeps its --parts and batch sizes
    resolve_run(data, run, world, old_args, batch=256, effective=64 if short else 2048, epochs=10.0 if short else 300.0,
                images=images)  # fmt: skip
    require(0 < target.mask_ratio < 1, f"--mask-ratio is {target.mask_ratio}: it must lie between 0 and 1")
    require_positive(target, "min_block")
    require_positive(recipe, "lr", "adam_eps")
    require_not_negative(args.probe, "probe_every")
    require_not_negative(recipe, "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end", "clip_grad")
    for name in ("beta1", "beta2"):
        require(0 <= getattr(recipe, name) < 1, f"--{name} is {getattr(recipe, name)}: it must lie in [0, 1)")
    require_views(recipe)
    require(0 <= recipe.color_jitter <= 1, f"--color-jitter is {recipe.color_jitter}: it must lie between 0 and 1")
    config = model_config(args)
    masked = num_masked(args, config)
    require(0 < masked < config.num_patches,
            f"--mask-ratio {target.mask_ratio} masks {masked} of {config.num_patches} patches: "
            "at least one must be masked and one visible")
    return args


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


# ----------------------------------------------------------------------------------------------------------------
# The optimizer's groups, and schedules: pure functions of the step.


def parameter_groups(model):
    """Trainable parameters, with and without weight decay. The released code also decays the class and mask tokens,
    by oversight; here they count with the parameters of one dimension."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim < 2 or name.endswith("token") else decayed).append(parameter)
    return [{"params": decayed, "decay": True}, {"params": others, "decay": False}]


def warmup_steps(length, epochs=None):
    """So many epochs, or for None 10 of 300, 20 of 800, 40 of 1600, and a thirtieth of a shorter run."""
    return length.warmup(epochs, share=40 if round(length.epochs or 0) > 300 else 30)


def learning_rate(step, total, warmup, peak, final):
    """Linear from 0 to the peak, which is that of the last of `warmup` steps, then a cosine. (The released table.)"""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    return cosine(step - warmup, total - warmup, peak, final)


def cosine(step, total, start, end):
    """From start at step 0; the last step, total - 1, is one short of the end."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / total))


# ----------------------------------------------------------------------------------------------------------------
# The loop.


def train(asked):
    """Pretrain as `asked`. Raises UserError and RunError."""
    args = resolve(asked, world_size())  # mistakes are told before anything is loaded
    with Run(args) as run:
        with run.main_process_first():
            source = open_source(args.data, args.data.parts)
            args = resolve(asked, run.world, source.num_images)  # now with a batch that fits the data
            labelled = open_labelled_part(args.probe, args.data, source)
            run.open_folder(args)  # is it the same run as the one there? run.resume below continues it
            teacher = build_teacher(args, model_config(args)).to(run.device, run.frozen_dtype)
        recipe, config = args.recipe, model_config(args, target_dim=teacher.target_dim)
        length = length_of_run(args.run, args.data, source)
        warmup = warmup_steps(length, recipe.warmup_epochs)

        torch.manual_seed(args.run.seed)  # of the initial weights
        model = CAE(config)
        model.encoder.checkpoint_blocks = recipe.checkpoint_blocks
        betas = (recipe.beta1, recipe.beta2)  # the learning rate is set in every step
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=0.0, betas=betas, eps=recipe.adam_eps, fused=True)
        if args.run.compile:
            model.compile(fullgraph=True)
            teacher.compile_network()
        elif args.target.compile_teacher and run.device.type == "cuda":
            batch_shape = args.data.batch_size, 3, config.image_size, config.image_size
            teacher = compiled_if_possible(teacher, batch_shape, run.device)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        seen = teacher.patch_pixels * config.grid[0]
        seen = f" ({seen} for the teacher)" if args.target.teacher else ""
        run.header(f"{config.method} {args.model.size}, {millions:.1f} M parameters, {num_masked(args, config)} of "
                   f"{config.num_patches} patches masked, {config.image_size} pixels{seen}", length)  # fmt: skip

        model, optimizer = run.prepare(model, optimizer)  # DDP; forward under autocast
        # Restores what a checkpoint holds, if there is one: weights, optimizer state (with fp16 the scaler's, too), the
        # number of steps and of skipped ones, the position in the data. Random numbers follow from these and the seed.
        run.resume(length, dataclasses.asdict(config))
        stream = run.stream(source, Crops(args, config))  # batches of images and masks
        model.train()

        def write_model(folder, step, weights):
            """RUN/model/, replaced at each checkpoint, for CAE.from_pretrained; `weights` are whole, on the host."""
            unwrapped = CAE(config)
            unwrapped.load_state_dict(weights)
            unwrapped.save_pretrained(folder)

        def class_tokens(model, images):
            """What the encoder makes of whole images, by which kNN compares them: uint8 (B, 3, S, S) -> (B, D)."""
            return model.encode(normalize(images.float() / 255, IMAGENET_MEAN, IMAGENET_STD))[:, 0]

        probe = KNNProbe(run, class_tokens, config.image_size, labelled, args.probe.probe_every, length)
        peak = recipe.lr * args.data.effective_batch_size / 2048
        # From the checkpoint's step on. After each step's body: a line of the log every --log-every steps, a checkpoint
        # every --checkpoint-every, both at the end and on a signal; kNN every --probe-every epochs.
        for step in run.steps(stream, evaluate=probe.evaluate, evaluate_every=probe.passes, evaluate_steps=probe.steps,
                              write_model=write_model):  # fmt: skip
            lr = learning_rate(step, length.steps, warmup, peak, recipe.min_lr)
            weight_decay = cosine(step, length.steps, recipe.weight_decay, recipe.weight_decay_end)
            for group in optimizer.param_groups:
                group["lr"] = lr
                group["weight_decay"] = weight_decay if group["decay"] else 0.0
            run.log({"lr": lr, "weight_decay": weight_decay})  # numbers: of the line's last step

            # Gradients add up over run.accumulation micro-batches: effective batch / (batch of a process * processes).
            for images, visible, masked in run.micro_batches():  # on the device; each has a seed of its own
                pixels = images.float() / 255                                            # (B, 3, S, S)
                with torch.no_grad():
                    target = teacher(pixels)  # the one line in which it is made; CAE's alignment has its own, in cae.py
                with run.accumulate(model):  # DDP joins gradients in the last micro-batch only
                    losses = model(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), visible, masked, target)
                    run.backward(losses["loss"])  # (loss / run.accumulation).backward(); not finite: all gradients nan
                run.log(losses)  # tensors: means over micro-batches, steps and processes
            # Clips the gradient, optimizer.step(), optimizer.zero_grad(); skipped if the gradient is not finite.
            run.update(optimizer, clip_grad=recipe.clip_grad)

        if run.is_main:
            print(printable(f"done: {run.folder / 'model'} holds the model, {run.folder / 'log.jsonl'} the log"))
        run.end()


def main():
    command_line(lambda: train(parse(Args)))


if __name__ == "__main__":
    main()
