"""How fast training is, part by part, beside a plain baseline that computes the same.

    python bench/bench.py                             CAE v2-S, batch 8, float32, on the CPU: three minutes on two cores
    python bench/bench.py --method cae                CAE, also the cost of its alignment and decoder
    python bench/bench.py --device cuda               CAE v2-B, batch 256, bf16
    python bench/bench.py --only masks decode data    these rows alone
    python bench/bench.py --only scale                data sets of a million images and more: see scale.py

The baseline (baseline.py) does what straightforward public code does. Before anything is measured it is shown to give
the same losses and gradients from the same weights. The step that is measured is the one that train.py takes: Run's.

Every row: the median over repeats in which ours and the baseline take turns; `ratio`, the headline, is the median of
the baseline's time by ours in the same turn; `spread`, the distance between the quartiles of that ratio by its median.
`cpu ratio` is the same of processor time, which other work on the machine hardly changes.
FLOPs are counted by torch, a multiplication and an addition as two: those that the mathematics has, without what a
fused kernel computes again in the backward pass. MFU is by the rate of a large matrix product of the same dtype in this
run. Memory is the row's own: the peak above what was there before; on the CPU resident memory, the model and its
gradients included. Teachers have random weights.
The last line printed is a JSON object with everything.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the project's files are

from engine.arguments import DataArgs, cores_per_process
from engine.errors import UserError, first_line
from engine.images import RandomCrop, decode, normalize, turbojpeg
from engine.run import Length, Run, attention_for
from engine.sources import Source, open_source
from engine.stream import Stream, load_chunk

import argparse
import copy
import ctypes
import dataclasses
import gc
import io
import itertools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import tempfile
import time
import unittest.mock
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from functools import partial

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import finetune
import train
from bench import scale
from bench.baseline import (
    PlainTraining,
    PlainView,
    ReleasedView,
    TimmView,
    boolean,
    check_equal,
    plain_adamw,
    plain_batches,
    plain_decode,
    plain_mask,
    plain_teacher,
    plain_twin,
    plain_update,
    same_view_batches,
)
from cae import CAE, IMAGENET_MEAN, IMAGENET_STD, SIZES, block_mask

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}

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


def processor_seconds():
    """Of this process, and of those that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def seconds_of(work, device, calls=1):
    """Seconds of one call, and processor seconds of all threads in it. On CUDA by device events, with several calls
    after each other without a wait; the processor's are then what it takes to start them."""
    processor, start = processor_seconds(), time.perf_counter()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
    for _ in range(calls):
        work()
    seconds, processor = time.perf_counter() - start, processor_seconds() - processor
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


def free_memory():
    """Of what a row has left behind."""
    gc.collect()
    torch.cuda.empty_cache()


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
    free_memory()
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
        self.plain_teacher = plain_teacher(self.teacher).to(self.device)
        self.teacher.to(self.device, self.dtype)
        self.threads = cores_per_process() if self.device.type == "cpu" else torch.get_num_threads()  # as Run sets them
        torch.set_num_threads(self.threads)
        self.num_masked = train.num_masked(args, self.config)
        self.jpegs = [jpeg(number) for number in range(flags.images)]
        self.peaks = {}

        batch, size = args.data.batch_size, self.config.image_size
        visible, masked = block_mask(batch, self.config.grid, self.num_masked, min_block=args.target.min_block)
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
        if self.compile or self.device.type == "cuda":  # train.py's default there
            teacher.compile_network()
        return teacher

    @contextmanager
    def autocast(self):
        """As train.py trains; the baseline has no use for the choice of attention."""
        half = self.dtype == torch.bfloat16
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=half)
        with autocast, attention_for(self.device, "bf16" if half else "no"):
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
# Training: ours and the baseline's, on the same batch again and again.

ADAMW = dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-8)


class SameBatch:
    """A stream of one batch, as far as Run asks where nothing is logged."""

    names, part = train.Crops.names, 0

    def __init__(self, batch):
        self.batch = dict(zip(self.names, batch, strict=True))

    def __next__(self):
        return self.batch

    def state_dict(self):
        return {}


class OurTraining:
    """The loop of train.py on one batch, which never ends: Run does here what it does there, `step` is the body of the
    loop but for the schedule. With a target no teacher runs. Neither log nor checkpoint is ever written."""

    def __init__(self, bench, model, dtype, target=None):
        AcceleratorState._reset_state(True)  # which would keep the precision of another row
        args, endless = copy.deepcopy(bench.args), 10**9
        args.run.precision, args.run.run_dir = PRECISIONS[dtype], tempfile.mkdtemp(dir=bench.folder)
        args.run.log_every = args.run.checkpoint_every = endless
        self.target, self.teacher = target, bench.our_teacher(dtype)
        self.clip_grad = args.recipe.clip_grad
        self.run = Run(args)
        self.run.open_folder(args)
        adamw = torch.optim.AdamW(train.parameter_groups(model), fused=True, **ADAMW)
        self.model, self.adamw = self.run.prepare(model, adamw)
        self.run.resume(Length(endless, None), dataclasses.asdict(model.config))
        self.steps = self.run.steps(SameBatch(bench.host_batch))
        with redirect_stderr(io.StringIO()):  # a terminal would get a bar
            next(self.steps)
        self.run.peers.close()  # Ctrl-C ends the benchmark
        self.run.log_file.close()  # it tells nothing

    def step(self):
        for images, visible, masked in self.run.micro_batches():
            pixels = images.float() / 255
            with torch.no_grad():
                target = self.teacher(pixels) if self.target is None else self.target
            with self.run.accumulate(self.model):
                losses = self.model(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), visible, masked, target)
                self.run.backward(losses["loss"])
            self.run.log(losses)
        self.update()

    def update(self):
        self.run.update(self.adamw, clip_grad=self.clip_grad)
        next(self.steps)


def our_step(bench, dtype, config=None, target=None):
    """A function that takes a step."""
    return OurTraining(bench, bench.compiled(bench.model(config)), dtype, target).step


def plain_step(bench, dtype):
    """The same of the baseline, as a function of a batch."""
    model = bench.plain()
    adamw = plain_adamw(model, **ADAMW)
    return PlainTraining(model, bench.plain_teacher, adamw, bench.args.recipe.clip_grad, bench.device, dtype).step


# ----------------------------------------------------------------------------------------------------------------
# The rows of the data, on one core of the host: Bench -> measurement.

CPU = torch.device("cpu")
SMALL_CROPS = (0.08, 1.0)  # areas in the recipe of CAE and in most others


def masks_row(bench, images=64):
    grid, count, smallest = bench.config.grid, bench.num_masked, bench.args.target.min_block

    def ours():
        return [block_mask(1, grid, count, min_block=smallest) for _ in range(images)]

    def plain():
        return [torch.from_numpy(plain_mask(*grid, count, smallest)) for _ in range(images)]

    assert all(int(mask.sum()) == count for mask in plain())
    return measure(bench, lambda: ours, lambda: plain, images, flops=False, device=CPU)


def decode_row(bench):
    def ours():
        return [decode(data) for data in bench.jpegs]

    def plain():
        return [plain_decode(data) for data in bench.jpegs]

    return measure(bench, lambda: ours, lambda: plain, len(bench.jpegs), flops=False, device=CPU)


def transform_row(bench):
    view, plain_view = train.Crops(bench.args, bench.config), PlainView(bench.args, bench.config)
    tensors, pictures = [decode(data) for data in bench.jpegs], [plain_decode(data) for data in bench.jpegs]

    def ours():
        return [view(tensor, seed) for seed, tensor in enumerate(tensors)]

    def plain():
        return [plain_view(picture) for picture in pictures]

    return measure(bench, lambda: ours, lambda: plain, len(tensors), flops=False, device=CPU)


def randaugment_row(bench):
    """Fine-tuning's RandAugment on tensors beside the same on Pillow's images: what conversion and seeding cost."""
    from torchvision.transforms.v2.functional import to_pil_image

    size = bench.config.image_size
    augment, crop = finetune.RandAugment(9, size), RandomCrop(size, (0.08, 1.0))
    images = [crop(decode(data)) for data in bench.jpegs]
    pictures, seeds = [to_pil_image(image) for image in images], []
    for number in range(len(images)):
        torch.manual_seed(number)
        seeds.append(torch.randint(2**32, ()).item())  # as it will be drawn

    def ours():
        for number, image in enumerate(images):
            torch.default_generator.manual_seed(number)
            augment(image)

    def plain():
        for seed, picture in zip(seeds, pictures, strict=True):
            random.seed(seed)
            np.random.seed(seed)
            augment.augment(picture)

    return measure(bench, lambda: ours, lambda: plain, len(images), flops=False, device=CPU)


def loading(bench, args):
    """A function that does what a loading process does for all JPEGs: bytes to uint8 and indices."""
    source = Source(None, "image", None, len(bench.jpegs), "noise")
    rows = [(0, number, {"image": {"bytes": data}}) for number, data in enumerate(bench.jpegs)]
    return partial(load_chunk, source, train.Crops(args, bench.config), 0, rows)


def with_crops(bench, crop_scale):
    """The arguments with crops of this area, or of the recipe's."""
    args = copy.deepcopy(bench.args)
    args.recipe.crop_scale = crop_scale or args.recipe.crop_scale
    return args


def data_row(bench, plain_kind=PlainView, crop_scale=None):
    """Bytes to what a loading process hands on; the baseline's boolean masks and, but for timm, floats. (What the
    released code does there beyond, we do on the device, within `step`.)"""
    args = with_crops(bench, crop_scale)
    plain_view = plain_kind(args, bench.config)

    def plain():
        images, masks = zip(*[plain_view(plain_decode(data)) for data in bench.jpegs], strict=True)
        return torch.stack(images), torch.stack(masks)

    return measure(bench, lambda: loading(bench, args), lambda: plain, len(bench.jpegs), flops=False, device=CPU)


def crop_row(bench, crop_scale=None):
    """The same beside itself with whole images decoded: what TurboJPEG brings."""
    ours = loading(bench, with_crops(bench, crop_scale))

    def plain():
        with unittest.mock.patch("engine.images.turbojpeg", lambda: None):
            ours()

    return measure(bench, lambda: ours, lambda: plain, len(bench.jpegs), flops=False, device=CPU)


def stream_row(bench, batches=12):
    """Stream on a folder with one loading process, from its start, beside a plain DataLoader that does the same."""
    files, view = write_files(bench, max(64, len(bench.jpegs))), train.Crops(bench.args, bench.config)
    data = DataArgs(dataset=str(files), workers=1, batch_size=bench.batch)
    source = open_source(data)

    def ours():
        stream = Stream(source, view, data, 0)
        for _ in range(batches):
            next(stream)

    def plain():
        for _ in itertools.islice(same_view_batches(files, view, bench.batch, 1), batches):
            pass

    return measure(bench, lambda: ours, lambda: plain, batches * bench.batch, flops=False, device=CPU)


# ----------------------------------------------------------------------------------------------------------------
# The rows of the device: Bench -> measurement.


def teacher_row(bench, dtype=None):
    dtype = dtype or bench.dtype

    def forward_of(model):
        @torch.no_grad()
        def forward():
            model(bench.pixels)

        return forward

    return measure(bench, lambda: forward_of(bench.our_teacher(dtype)), lambda: forward_of(bench.plain_teacher),
                   bench.batch, dtype=dtype, plain_dtype=torch.float32)  # fmt: skip


def encoder_row(bench):
    """Forward and backward over the visible patches."""
    gradient = torch.randn(bench.batch, 1 + bench.visible.shape[1], bench.config.dim, device=bench.device)

    def pass_of(encoder, index):
        def work():
            with bench.autocast():
                z = encoder(bench.images, index)
            z.backward(gradient.to(z.dtype))

        return work

    return measure(bench, lambda: pass_of(bench.compiled(bench.model().encoder), bench.visible),
                   lambda: pass_of(bench.plain().encoder, bench.mask), bench.batch)  # fmt: skip


def regressor_row(bench):
    """Forward and backward of all that follows the encoder: regressor, head or decoder, loss."""
    width = bench.config.regressor_dim
    latents = torch.randn(bench.batch, 1 + bench.visible.shape[1], width, device=bench.device, requires_grad=True)
    goal = torch.randn(bench.batch, bench.num_masked, width, device=bench.device)  # of the alignment

    def pass_of(model, *index):
        model.latents = lambda *_: latents  # instead of what the encoder would give
        model.alignment_target = lambda *_: goal

        def work():
            with bench.autocast():
                losses = model(bench.images, *index, bench.target)
            losses["loss"].backward()

        return work

    return measure(bench, lambda: pass_of(bench.compiled(bench.model()), bench.visible, bench.masked),
                   lambda: pass_of(bench.plain(), bench.mask), bench.batch)  # fmt: skip


def alignment_row(bench):
    """CAE: the encoder's latents of the masked patches, without gradient."""

    def forward_of(model, index):
        def work():
            with bench.autocast():
                model.alignment_target(bench.images, index)

        return work

    def ours():
        model = bench.model()
        bench.compiled(model.encoder)
        return forward_of(model, bench.masked)

    return measure(bench, ours, lambda: forward_of(bench.plain(), bench.mask), bench.batch)


def optimizer_row(bench):
    """Clipping and AdamW."""

    def with_gradients(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = 1e-3 * torch.randn_like(parameter)
        return model

    def ours():
        training = OurTraining(bench, with_gradients(bench.model()), bench.dtype)
        gradients = [(parameter, parameter.grad) for parameter in training.model.parameters()]

        def work():
            for parameter, gradient in gradients:  # which an update drops
                parameter.grad = gradient
            training.update()

        return work

    def plain():
        model = with_gradients(bench.plain())
        return partial(plain_update, model, plain_adamw(model, **ADAMW), bench.args.recipe.clip_grad)

    return measure(bench, ours, plain, bench.batch, flops=False)


def step_row(bench, dtype=None):
    """A whole training step, the teacher in it."""
    dtype = dtype or bench.dtype
    return measure(bench, lambda: our_step(bench, dtype), lambda: partial(plain_step(bench, dtype), *bench.plain_batch),
                   bench.batch, dtype=dtype)  # fmt: skip


def write_files(bench, count):
    """A folder of class subfolders with so many JPEGs."""
    files = bench.folder / f"{count}-files"
    for number in range(count):
        file = files / f"class{number % 2}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bench.jpegs[number % len(bench.jpegs)])
    return files


def train_row(bench, lines=10, left_out=3):
    """train.py as a process of its own on JPEGs on disk, by the rates in its log; the first lines are left out. The
    baseline is a loop over a DataLoader with as many loading processes."""
    every, args = 10 if bench.device.type == "cuda" else 1, bench.args
    files = write_files(bench, max(bench.batch, min(lines * every * bench.batch, 4096)))
    command = {
        "dataset": files, "run-dir": bench.folder / "run", "size": args.model.size, "method": args.model.method,
        "image-size": args.model.image_size, "supervise": args.target.supervise, "target": args.target.target,
        **({"teacher": args.target.teacher} if args.target.teacher else {}),
        "batch-size": bench.batch, "effective-batch-size": bench.batch, "workers": args.data.workers,
        "precision": PRECISIONS[bench.dtype], "steps": lines * every, "log-every": every, "checkpoint-every": 10**6,
    }  # fmt: skip
    command = list(itertools.chain(*((f"--{name}", str(value)) for name, value in command.items())))
    command = [sys.executable, train.__file__, *command, *["--compile"] * bench.compile]
    environment = {**os.environ, "HF_HOME": str(bench.folder / "cache")}
    memory = run_and_watch(command, bench.folder, environment, bench.device)
    log = [json.loads(line) for line in (bench.folder / "run" / "log.jsonl").read_text().splitlines()][left_out:]
    rate = statistics.harmonic_mean([line["images_per_second"] for line in log])

    batches = plain_batches(files, PlainView(args, bench.config), bench.batch, args.data.workers)
    work, start = plain_step(bench, bench.dtype), None
    for number, (images, mask) in enumerate(itertools.islice(batches, lines * every)):
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
    before, peak = torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0, 0
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=output)
    while process.poll() is None:
        with suppress(psutil.Error):
            main = psutil.Process(process.pid)
            everyone = [] if device.type == "cuda" else [main, *main.children()]
            used = before - torch.cuda.mem_get_info()[0] if device.type == "cuda" else 0
            peak = max(peak, used + sum(p.memory_full_info().pss for p in everyone))
        time.sleep(0.5)
    if process.returncode:
        raise RuntimeError(f"train.py failed: {(folder / 'output').read_text().strip().splitlines()[-1]}")
    return peak


def cost_row(bench):
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

DATA_ROWS = ("masks", "decode", "transform", "data", "data-timm", "data-released", "small", "small-timm",
             "small-released", "crop", "small-crop", "stream", "randaugment")  # fmt: skip
ROWS = (*DATA_ROWS, "teacher", "encoder", "regressor", "alignment", "optimizer", "step", "teacher-bf16", "step-bf16",
        "train", "cost")  # fmt: skip
COLUMNS = (("ms", "ms", ".2f"), ("images_per_second", "images/s", ".1f"), ("gflop_per_image", "GFLOP/image", ".2f"),
           ("tflops", "TFLOP/s", ".3f"), ("mfu", "MFU", ".0%"), ("memory_mb", "MB", ".0f"))  # fmt: skip


def cpu_bf16():
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
    parser.add_argument("--only", nargs="+", choices=(*ROWS, "scale"), metavar="ROW",
                        help=f"of {', '.join(ROWS)}, default: all that apply; or scale")  # fmt: skip
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
    rows = {"masks": masks_row, "decode": decode_row, "transform": transform_row}
    for name, areas in (("data", None), ("small", SMALL_CROPS)):
        for suffix, plain_kind in (("", PlainView), ("-timm", TimmView), ("-released", ReleasedView)):
            rows[name + suffix] = partial(data_row, plain_kind=plain_kind, crop_scale=areas)
    if turbojpeg():
        rows |= {"crop": crop_row, "small-crop": partial(crop_row, crop_scale=SMALL_CROPS)}
    rows |= {"stream": stream_row, "randaugment": randaugment_row}
    rows |= {"teacher": teacher_row, "encoder": encoder_row, "regressor": regressor_row}
    if flags.method == "cae":
        rows["alignment"] = alignment_row
    rows |= {"optimizer": optimizer_row, "step": step_row}
    if flags.device == "cpu" and flags.dtype == "fp32" and cpu_bf16():
        if bench.args.target.target != "pixels":
            rows["teacher-bf16"] = partial(teacher_row, dtype=torch.bfloat16)
        rows["step-bf16"] = partial(step_row, dtype=torch.bfloat16)
    rows["train"] = train_row
    if flags.method == "cae":
        rows["cost"] = cost_row
    return {name: row for name, row in rows.items() if not flags.only or name in flags.only}


def line_of(name, row):
    """A row of the table: ours, the baseline's time, rate and memory, the ratio."""
    cells = [format(row[key], form) if key in row else "" for key, _, form in COLUMNS]
    plain = row["baseline"]
    cells += [f"{plain['ms']:.2f}", f"{plain['images_per_second']:.1f}"]
    cells += [f"{plain['memory_mb']:.0f}" if "memory_mb" in plain else "", f"{row['ratio']:.2f}"]
    cells += [f"{row['spread']:.0%}" if "spread" in row else ""]
    cells += [f"{row['cpu_ratio']:.2f}" if "cpu_ratio" in row else ""]
    return name.ljust(15) + aligned(cells)


def aligned(cells):
    return "".join(f"{cell:>12}" for cell in cells)


def main():
    flags, start = parse(), time.perf_counter()
    if "scale" in (flags.only or ()):
        found = scale.measure_all()
        print(json.dumps({"device_name": device_name(torch.device("cpu")), "seconds": time.perf_counter() - start,
                          "scale": found}))  # fmt: skip
        sys.exit(any("error" in row for row in found.values()))
    if flags.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # also for train.py
    check_flops()
    worst = check_equal()
    print(f"the baseline computes the same: losses and gradients differ by {worst:.0e} at most, in float32")
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench = Bench(flags, Path(folder))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        config, rows = bench.config, {}
        result = {
            **vars(flags), "target": bench.args.target.target, "image_size": config.image_size,
            "device_name": device_name(bench.device), "threads": bench.threads, "torch": torch.__version__,
            "cpu_bf16": cpu_bf16(), "turbojpeg": turbojpeg() is not None,
            "masked": bench.num_masked, "patches": config.num_patches, "loading_processes": bench.args.data.workers,
            "jpeg_kb": statistics.mean(map(len, bench.jpegs)) / 1000, "jpegs": flags.images, "rows": rows,
        }  # fmt: skip
        print(f"{config.method} {flags.size}, {bench.num_masked} of {config.num_patches} patches masked, batch "
              f"{bench.batch}, {flags.dtype}, target {result['target']}; {result['device_name']}, {bench.threads} "
              f"threads, torch {torch.__version__}; CPU instructions for bf16: {', '.join(cpu_bf16()) or 'none'}\n"
              f"rows of the data: on one core, JPEGs of {result['jpeg_kb']:.0f} kB; parts of JPEGs are decoded alone: "
              f"{'yes' if turbojpeg() else 'no, without libjpeg-turbo 3'}")  # fmt: skip
        titles = [*(title for _, title, _ in COLUMNS), "baseline ms", "images/s", "MB", "ratio", "spread", "cpu ratio"]
        print(15 * " " + aligned(titles), flush=True)
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
                rows[name] = {"error": f"{type(error).__name__}: {first_line(error)}"}
                print(f"{name:15}{rows[name]['error']}", flush=True)
                free_memory()
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
