"""Views and targets, by pictures of noise: of a smooth or symmetrical one, a mirror image or another interpolation is
the same. And in which order files are written and named."""

from engine.arguments import parse
from engine.files import publish, replace_files, write_text
from engine.frozen import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Frozen
from engine.images import CenterCrop, RandomCrop, crop_ratio, decode

import io
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from images import write_parquet
from launch import ROOT, call
from PIL import Image
from timm.data import auto_augment, create_transform
from torch.nn.modules.module import register_module_forward_pre_hook
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from transformers import BeitForImageClassification, FlavaImageCodebook, FlavaImageCodebookConfig
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

import cae
import convert
import finetune
import probe
import train
from cae import CAE, block_mask
from finetune import TrainView
from probe import Augment
from train import CLIPTeacher, Crops, DALLETeacher, PixelTeacher, TargetArgs

CLIP_TINY = str(ROOT / "tests" / "golden" / "clip_tiny")


def noise(height, width, seed=0):
    """uint8 (3, H, W), of so little contrast that no resize runs into 0 or 255; the right half is brighter."""
    x = torch.randint(60, 160, (3, height, width), generator=torch.Generator().manual_seed(seed))
    x[..., width // 2 :] += 30
    return x.byte()


def encoded(image):
    file = io.BytesIO()
    TF.to_pil_image(image).save(file, "PNG")
    return file.getvalue()


def crops(*flags):
    args = train.resolve(parse(train.Args, ["--dataset", "demo", *flags]))
    return Crops(args, train.model_config(args))


def pillows_center_crop(image, size, shorter):
    """The evaluation's view by Pillow: the shorter side resized, bicubic, then the middle."""
    height, width = (int(shorter * side / min(image.shape[1:])) for side in image.shape[1:])
    resized = np.array(TF.to_pil_image(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return torch.from_numpy(resized[top : top + size, left : left + size]).permute(2, 0, 1)


def assert_near(a, b, levels):
    """Two images of 256 levels."""
    assert a.shape == b.shape and (a.double() - b.double()).abs().max() <= levels


# Views to learn from.

VIEWS = {
    "pretraining": lambda scale, flip: crops("--crop-scale", *map(str, scale), "--flip", str(flip)),
    "fine-tuning": lambda scale, flip: TrainView(28, finetune.RecipeArgs(crop_scale=scale, flip=flip, randaugment=0,
                                                                         erasing=0.0)),
    "probes": lambda scale, flip: Augment(28, scale, flip),
}  # fmt: skip


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize(("flip", "views", "least", "most"), [(0.0, 30, 0, 0), (0.25, 200, 31, 69), (1.0, 30, 30, 30)])
def test_views_are_mirrored_as_often_as_asked(kind, flip, views, least, most):
    """Of 200, 50 with a standard deviation of 6."""
    view, image = VIEWS[kind]((1.0, 1.0), flip), noise(28, 28)
    got = [view(image, seed)[0] for seed in range(views)]
    mirrored = sum(torch.equal(x, image.flip(-1)) for x in got)
    assert least <= mirrored <= most
    assert sum(torch.equal(x, image) for x in got) == views - mirrored


def drawn_box(image, scale):
    """The next random crop of torchvision, with the usual aspect ratios."""
    box = v2.RandomResizedCrop(28, scale, (3 / 4, 4 / 3)).make_params([image])
    rows, columns = (slice(box[a], box[a] + box[b]) for a, b in (("top", "height"), ("left", "width")))
    return image[:, rows, columns]


def resized(image):
    x = F.interpolate(image[None].double(), (28, 28), mode="bicubic", antialias=True)
    return x[0].clamp(0, 255)


@pytest.mark.parametrize("kind", VIEWS)
def test_views_are_bicubic_crops_of_the_area_asked_for(kind):
    """Each of the two passes of a resize is rounded, so that two levels of 255 are the most."""
    view, image = VIEWS[kind]((0.2, 0.5), 0.0), noise(60, 45)
    for seed in range(20):
        got = view(image, seed)[0]
        torch.manual_seed(seed)
        assert_near(got, resized(drawn_box(image, (0.2, 0.5))), 2)


def test_the_students_view_is_crop_flip_jitter_and_mask():
    """Written out: the jitter is relative to the crop, each draw follows the one before."""
    view = crops("--crop-scale", "0.2", "0.5", "--flip", "0.25", "--color-jitter", "0.3", "--mask-ratio", "0.39",
                 "--min-block", "6")  # fmt: skip
    image = noise(60, 45)
    for seed in range(20):
        got, visible, masked = view(image, seed)
        torch.manual_seed(seed)
        x = resized(drawn_box(image, (0.2, 0.5))) / 255
        x = x.flip(-1) if torch.rand(1) < 0.25 else x
        order, factors = torch.randperm(3).tolist(), torch.empty(3).uniform_(0.7, 1.3).tolist()
        for kind in order:
            x = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[kind](x, factors[kind])
        assert_near(got, 255 * x, 2 * 1.3**3 + 1)
        expected = block_mask(1, (7, 7), 20, min_block=6)  # ceil(0.39 * 49)
        assert torch.equal(visible, expected[0][0]) and torch.equal(masked, expected[1][0])


def test_random_masks_are_uniform_and_blocks_are_not():
    """13 of 49 patches: with uniform masks each of the 84 pairs of neighbours is masked with 13 * 12 / (49 * 48)."""
    means = {}
    for kind in ("random", "block"):
        view, image, pairs = crops("--mask", kind), noise(28, 28), 0
        for seed in range(300):
            mask = torch.zeros(49, dtype=torch.bool)
            mask[view(image, seed)[2]] = True
            mask = mask.view(7, 7)
            pairs += (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()
        means[kind] = pairs.item() / 300
    assert means["random"] == pytest.approx(84 * 13 * 12 / (49 * 48), abs=0.4) and means["block"] > 10


@pytest.mark.parametrize(("method", "jitters"), [("cae-v2", True), ("cae", False)])
def test_colours_are_jittered_by_default_in_the_recipe_of_cae_v2_alone(method, jitters):
    flags = ["--size", "base", "--method", method, "--crop-scale", "1", "1", "--flip", "0"]
    args = train.resolve(parse(train.Args, flags))
    image = noise(224, 224)
    got = Crops(args, train.model_config(args))(image, 0)[0]
    assert torch.equal(got, image) != jitters


@pytest.mark.parametrize("size", [(60, 45), (45, 60), (1, 90), (1, 1)])
def test_a_linear_probes_crop_is_drawn_once_and_cut_to_the_image(size):
    view, image, (rows, columns), cut = Augment(28, (0.08, 1.0), 0.25, True), noise(*size), size, 0
    for seed in range(40):
        got = view(image, seed)[0]
        torch.manual_seed(seed)
        area = rows * columns * torch.empty(1).uniform_(0.08, 1.0).item()
        ratio = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
        height, width = (max(1, round(math.sqrt(x))) for x in (area / ratio, area * ratio))
        cut += height > rows or width > columns
        height, width = min(height, rows), min(width, columns)
        top = torch.randint(0, rows - height + 1, (1,)).item()
        left = torch.randint(0, columns - width + 1, (1,)).item()
        x = resized(image[:, top : top + height, left : left + width])
        assert_near(got, x.flip(-1) if torch.rand(1) < 0.25 else x, 2)
    assert cut > 3 or size == (1, 1)


def test_crops_that_are_drawn_once_are_larger():
    """Their mean area in an image of 500 x 375, beside that of the formula: 0.518. torchvision's is 0.435."""
    area, ratio = np.meshgrid(np.linspace(0.08, 1, 401), np.exp(np.linspace(-1, 1, 401) * math.log(4 / 3)))
    sides = np.sqrt(375 * 500 * area / ratio), np.sqrt(375 * 500 * area * ratio)
    expected = np.mean(np.minimum(sides[0], 375) * np.minimum(sides[1], 500)) / 375 / 500
    torch.manual_seed(0)
    means = []
    for once in (True, False):
        crop, image = RandomCrop(224, (0.08, 1.0), once), torch.empty(3, 375, 500, dtype=torch.uint8)
        boxes = [crop.box(image) for _ in range(20_000)]
        means.append(sum(box["height"] * box["width"] for box in boxes) / len(boxes) / 375 / 500)
    assert means[0] == pytest.approx(expected, abs=0.008) and expected == pytest.approx(0.518, abs=5e-4)
    assert means[1] == pytest.approx(0.435, abs=0.008)


def test_only_the_linear_probe_draws_its_crop_once(tmp_path, monkeypatch, capsys):
    write_parquet(tmp_path / "data", (40,), encode=lambda n: encoded(noise(60, 45, n)))
    write_parquet(tmp_path / "data", (3,), encode=lambda n: encoded(noise(60, 45, n)), split="test")
    once = []
    monkeypatch.setattr(probe, "Augment", lambda *values: once.append(values[-1]) or Augment(*values))
    for flags in (["linear"], ["attentive"], ["attentive", "--kind", "ep"]):
        call(monkeypatch, capsys, probe, *flags, "--random-init", "nano", "--dataset", tmp_path / "data", "--steps", 1,
             run_dir=tmp_path / "-".join(flags))  # fmt: skip
    assert once == [True, False, False]


def timms_view(size, magnitude):
    """The transform that timm makes of the recipe's name, as its trainers do, without crop, flip and tensor."""
    steps = create_transform(size, is_training=True, auto_augment=f"rand-m{magnitude}-mstd0.5-inc1", color_jitter=0.4,
                             interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN).transforms  # fmt: skip
    (augment,) = (step for step in steps if isinstance(step, auto_augment.RandAugment))
    return augment


def test_fine_tunings_view_is_crop_flip_randaugment_and_a_box():
    """RandAugment and boxes are timm's: a fiftieth to a third of the image, at most 10 / 3 times as long."""
    view = TrainView(28, finetune.RecipeArgs(crop_scale=(0.2, 0.5), flip=0.25, randaugment=7, erasing=0.6))
    image, boxes, augmented, augment = noise(60, 45), 0, 0, timms_view(28, 7)
    bicubic = v2.InterpolationMode.BICUBIC
    steps = [
        v2.RandomResizedCrop(28, (0.2, 0.5), (3 / 4, 4 / 3), interpolation=bicubic, antialias=True),
        v2.RandomHorizontalFlip(0.25),
    ]
    for seed in range(60):
        got, box = view(image, seed)
        torch.manual_seed(seed)
        x = image
        for step in steps:
            x = step(x)
        number = torch.randint(2**32, ()).item()
        random.seed(number)
        np.random.seed(number)
        before, x = x, TF.pil_to_tensor(augment(TF.to_pil_image(x)))
        augmented += not torch.equal(x, before)
        assert torch.equal(got, x)
        expected = [0, 0, 0, 0]
        if torch.rand(()) < 0.6:
            found = v2.RandomErasing(1.0, (0.02, 1 / 3), (0.3, 10 / 3)).make_params([x])
            expected = [found[side] for side in "ijhw"]
        assert box.tolist() == expected
        boxes += box[2].item() > 0
    assert 25 < boxes < 48 and 30 < augmented < 55


def test_randaugment_is_timms_to_the_last_pixel_and_leaves_generators_alone():
    """Every operation of the recipe's set, also the one that Pillow 13 refuses: all bits taken away are black."""
    ours, theirs, image = finetune.RandAugment(9, 224), timms_view(224, 9), smooth(224)
    assert [str(op) for op in ours.augment.ops] == [str(op) for op in theirs.ops] and len(theirs.ops) == 15
    for a, b in zip(ours.augment.ops, theirs.ops, strict=True):
        assert (a.level_fn, a.hparams, a.kwargs) == (b.level_fn, b.hparams, b.kwargs)
        assert a.aug_fn is b.aug_fn or a.name == "PosterizeIncreasing"
    posterize, picture = theirs.ops[[op.name for op in theirs.ops].index("PosterizeIncreasing")], TF.to_pil_image(image)
    for bits in range(1, 5):
        assert finetune.posterize(picture, bits).tobytes() == posterize.aug_fn(picture, bits).tobytes()
    assert not TF.pil_to_tensor(finetune.posterize(picture, 0)).any()
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    ours(image)
    ours.augment = lambda image: [][0]
    with pytest.raises(IndexError):
        ours(image)
    assert (random.random(), np.random.rand()) == expected


def test_fine_tunings_view_never_fails():
    """It would end the run. At magnitude 10 every second operation goes to its end: colours lose all of their bits."""
    view = TrainView(28, finetune.RecipeArgs(crop_scale=(0.5, 1.0), randaugment=10, erasing=0.0))
    black = sum(not view(noise(33, 33), seed)[0].any() for seed in range(1200))
    assert black > 10


def test_randaugment_leaves_a_quarter_of_the_images_alone():
    """Each of two operations with probability 0.5; a few of them change nothing. torchvision's changes nearly all."""
    augment, image = finetune.RandAugment(9, 56), smooth(56)
    torch.manual_seed(0)
    same = sum(torch.equal(augment(image), image) for _ in range(600)) / 600
    assert 0.22 < same < 0.36


def smooth(size):
    generator = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(1, 3, 9, 9, generator=generator), (size, size), mode="bicubic").clamp(0, 1)
    return (255 * x[0]).to(torch.uint8)


# Views to evaluate on.


@pytest.mark.parametrize(("size", "ratio"), [(28, 1.0), (64, 1.0), (65, 0.875), (224, 0.875), (383, 0.875), (384, 1.0),
                                             (512, 1.0)])  # fmt: skip
def test_the_share_of_the_middle_by_size(size, ratio):
    assert crop_ratio(size) == ratio


@pytest.mark.parametrize("size", [(60, 45), (45, 60), (33, 33)])
@pytest.mark.parametrize(("ratio", "shorter"), [(0.7, 40), (0.72, 38), (0.875, 32), (1.0, 28)])
def test_an_evaluations_view_and_the_image_processor_are_pillows(size, ratio, shorter):
    image = noise(*size)
    expected = pillows_center_crop(image, 28, shorter)
    assert_near(CenterCrop(28, ratio)(image, 0)[0], expected, 1)
    args = finetune.Classify(finetune.ModelArgs(image_size=28), recipe=finetune.RecipeArgs(crop_ratio=ratio))
    got = finetune.image_processor(args)(TF.to_pil_image(image), return_tensors="pt")["pixel_values"][0]
    assert_near(255 * denormalized(got), expected, 1.01)


def denormalized(x):
    """Pixels in [0, 1] of what a network takes."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return x * std + mean


def shown(kind, work):
    """The images (float, 3 x S x S) that modules of this class are given while work() runs, to learn from or not."""
    notes = []

    def note(module, inputs):
        if isinstance(module, kind):
            notes.extend((module.training, image.clone()) for image in inputs[0])

    handle = register_module_forward_pre_hook(note)
    try:
        work()
    finally:
        handle.remove()
    return [image for training, image in notes if training], [image for training, image in notes if not training]


@pytest.mark.parametrize("script", ["train", "finetune", "probe"])
def test_the_flags_of_views_reach_the_images(tmp_path, monkeypatch, capsys, script):
    """--crop-scale 1 1 --flip 1 mirrors all of the images to learn from; --crop-ratio cuts those to evaluate on."""
    images = [noise(28, 28, n) for n in range(8)]
    wide = [noise(60, 45, n) for n in range(3)]
    write_parquet(tmp_path / "data", (8,), encode=lambda n: encoded(images[n]))
    write_parquet(tmp_path / "data", (3,), encode=lambda n: encoded(wide[n]), split="test")
    flags = ["--dataset", str(tmp_path / "data"), "--effective-batch-size", "8", "--steps", "1", "--flip", "1",
             "--crop-scale", "1", "1"]  # fmt: skip
    if script == "train":
        flags += ["--size", "nano", "--teacher", str(ROOT / "demo" / "clip_teacher"), "--workers", "0"]
        args = parse(train.Args, [*flags, "--run-dir", str(tmp_path / "run")])
        learned, judged = shown(CAE, lambda: train.train(args))
    else:
        module, command, kind = {"finetune": (finetune, "classify", BeitForImageClassification),
                                 "probe": (probe, "attentive", Frozen)}[script]  # fmt: skip
        learned, judged = shown(kind, lambda: call(
            monkeypatch, capsys, module, command, *flags, "--random-init", "nano", "--crop-ratio", 0.7,
            run_dir=tmp_path / "run"))  # fmt: skip
    if script == "probe":  # never in training mode; normalises by itself; first black, for the shape of what it gives
        learned, judged = judged[1:9], judged[9:12]
    else:
        learned, judged = ([denormalized(x) for x in found] for found in (learned, judged))
    assert len(learned) == 8 and len(judged) == (0 if script == "train" else 3)
    seen = {(255 * x).round().byte().numpy().tobytes() for x in learned}
    assert seen == {x.flip(-1).contiguous().numpy().tobytes() for x in images}
    for got, image in zip(judged, wide, strict=script != "train"):
        assert_near(255 * got, pillows_center_crop(image, 28, 40), 1.01)


def test_transparency_is_a_share_of_white():
    half = Image.new("RGBA", (2, 2), (10, 20, 30, 51))  # a fifth
    grey = Image.new("LA", (2, 2), (100, 51))
    key = Image.new("RGB", (2, 2), (10, 20, 30))
    for image, options, expected in [(half, {}, [206, 208, 210]), (grey, {}, [224] * 3),
                                     (key, {"transparency": (10, 20, 30)}, [255] * 3)]:  # fmt: skip
        file = io.BytesIO()
        image.save(file, "PNG", **options)
        assert decode(file.getvalue())[:, 0, 0].tolist() == pytest.approx(expected, abs=1)


# Teachers.


def test_means_and_deviations_are_those_of_transformers():
    assert list(CLIP_MEAN) == list(OPENAI_CLIP_MEAN) and list(CLIP_STD) == list(OPENAI_CLIP_STD)
    for means, deviations in ((cae.IMAGENET_MEAN, cae.IMAGENET_STD), (IMAGENET_MEAN, IMAGENET_STD)):
        assert list(means) == list(IMAGENET_DEFAULT_MEAN) and list(deviations) == list(IMAGENET_DEFAULT_STD)


@pytest.fixture(scope="module")
def codebook(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codebook")
    torch.manual_seed(0)
    config = FlavaImageCodebookConfig(hidden_size=8, vocab_size=50, num_blocks_per_group=1)
    FlavaImageCodebook(config).save_pretrained(folder)
    return str(folder)


def first_convolution(work):
    """What the first convolution that work() runs is given: the teacher's input. The student has none."""
    inputs = []
    handle = register_module_forward_pre_hook(
        lambda module, x: inputs.append((x[0], module)) if isinstance(module, torch.nn.Conv2d) else None)  # fmt: skip
    try:
        with torch.no_grad():
            work()
    finally:
        handle.remove()
    return inputs[0]


def pillows_resize(pixels, rows, columns):
    """Float pixels (3, H, W), bicubic by Pillow, back in [0, 1]."""
    planes = [Image.fromarray(plane.numpy()).resize((columns, rows), Image.Resampling.BICUBIC) for plane in pixels]
    return torch.stack([torch.from_numpy(np.array(plane)) for plane in planes]).clamp(0, 1)


@pytest.mark.parametrize("patch", [8, 16, 20])
def test_clip_sees_the_crop_with_its_own_mean_and_deviation(patch):
    """4 x 4 patches, at 16 pixels a patch. Black and white, which overshoot where they are resized."""
    view = torch.rand(1, 3, 4 * patch, 4 * patch, generator=torch.Generator().manual_seed(0)).round()
    got, _ = first_convolution(lambda: CLIPTeacher(TargetArgs(teacher=CLIP_TINY), patch).eval()(view))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    torch.testing.assert_close(got[0], (pillows_resize(view[0], 64, 64) - mean) / std, rtol=0, atol=1e-4)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_dalle_sees_eight_pixels_a_patch_between_a_tenth_and_nine_tenths(codebook, patch):
    """3 x 5 patches."""
    view = torch.rand(1, 3, 3 * patch, 5 * patch, generator=torch.Generator().manual_seed(0)).round()
    teacher = DALLETeacher(TargetArgs(teacher=codebook), patch).eval()
    got, _ = first_convolution(lambda: teacher(view))
    expected = 0.1 + 0.8 * pillows_resize(view[0], 24, 40)
    torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-5)
    assert got.min() == pytest.approx(0.1, abs=1e-6) and got.max() == pytest.approx(0.9, abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("target", ["clip", "dalle"])
def test_a_teacher_runs_in_the_precision_of_the_run(tmp_path, codebook, target, precision):
    flags = ["--dataset", "demo", "--batch-size", "4", "--effective-batch-size", "4", "--steps", "1", "--workers", "0"]
    more = ["--method", "cae", "--target", "dalle", "--teacher", codebook] if target == "dalle" else []
    args = parse(train.Args, [*flags, *more, "--precision", precision, "--run-dir", str(tmp_path)])
    notes = []

    def note(module, inputs):
        if isinstance(module, torch.nn.Conv2d):
            notes.append((len(inputs[0]), inputs[0].dtype, module.weight.dtype, module.training,
                          module.weight.requires_grad))  # fmt: skip

    handle = register_module_forward_pre_hook(note)
    try:
        AcceleratorState._reset_state(True)  # which would keep the precision of another run in this process
        train.train(args)
    finally:
        AcceleratorState._reset_state(True)
        handle.remove()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {found for found in notes if found[0] == 4} == {(4, dtype, dtype, False, False)}


def test_what_teachers_give(codebook):
    """In half precision: CLIP its own, DALL-E codes, pixels whole numbers of 255."""
    view = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert CLIPTeacher(TargetArgs(teacher=CLIP_TINY), 16).eval().bfloat16()(view).dtype == torch.bfloat16
        dalle = DALLETeacher(TargetArgs(teacher=codebook), 16).eval()
        whole, codes = dalle(view), dalle.bfloat16()(view)
    assert codes.dtype == whole.dtype == torch.int64 and codes.shape == (2, 16)
    assert PixelTeacher(TargetArgs(), 16).bfloat16()(view).dtype == torch.float32


def test_normalised_pixels_are_those_of_mae():
    """(x - mean) / sqrt(variance + 1e-6), with n - 1 in the variance; of so little contrast that both tell."""
    view = denormalized(1e-3 * torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    got = PixelTeacher(TargetArgs(normalize_pixels=True), 4)(view)
    x = [[(view[0, k, i, j].item() - IMAGENET_DEFAULT_MEAN[k]) / IMAGENET_DEFAULT_STD[k]
          for i in range(4) for j in range(4, 8) for k in range(3)]]  # fmt: skip
    x = torch.tensor(x[0], dtype=torch.float64)
    mean = x.sum() / 48
    expected = (x - mean) / (((x - mean) ** 2).sum() / 47 + 1e-6).sqrt()
    torch.testing.assert_close(got[0, 1].double(), expected, rtol=1e-3, atol=1e-3)


# Files: on the disk before they get their name, and their name on the disk after that.


@pytest.fixture
def events(monkeypatch):
    """("sync", path) and ("name", from, to, what of it was not synced before) in their order."""
    found, synced, fsync = [], set(), os.fsync

    def sync(number):
        fsync(number)
        synced.add(Path(os.readlink(f"/proc/self/fd/{number}")))
        found.append(("sync", Path(os.readlink(f"/proc/self/fd/{number}"))))

    def naming(rename):
        def named(source, target, **options):
            whole = {Path(source), *Path(source).rglob("*")}
            found.append(("name", Path(source), Path(target), whole - synced))
            synced.difference_update(whole)
            return rename(source, target, **options)
        return named

    monkeypatch.setattr(os, "fsync", sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, naming(getattr(os, name)))
    return found


def safely_named(events, folder):
    """What got a name in a folder, after seeing that it was synced before, and the folder of its name after that."""
    names = [(i, *event[1:]) for i, event in enumerate(events) if event[0] == "name" and folder in event[1].parents]
    for i, _, target, unsynced in names:
        assert not unsynced, f"{target} was named before these were synced: {unsynced}"
        assert ("sync", target.parent) in events[i:], f"the name of {target} was not synced"
    return sorted(str(target.relative_to(folder)) for _, _, target, _ in names)


def test_files_are_synced_before_they_get_their_name(tmp_path, events):
    write_text(tmp_path / "x.json", "text")
    assert safely_named(events, tmp_path) == ["x.json"]
    events.clear()
    (tmp_path / "step.tmp" / "inner").mkdir(parents=True)
    (tmp_path / "step.tmp" / "inner" / "y").write_text("whole")
    publish(tmp_path / "step.tmp", tmp_path / "step")
    assert safely_named(events, tmp_path) == ["step"]
    events.clear()
    replace_files(tmp_path / "model", lambda folder: [(folder / name).write_text("z") for name in "abc"])
    assert safely_named(events, tmp_path) == ["model/a", "model/b", "model/c"]


def test_a_run_and_an_export_sync_files_before_they_get_their_name(tmp_path, events):
    """And the log before the checkpoint that it belongs to."""
    flags = ["--dataset", "demo", "--batch-size", "4", "--effective-batch-size", "4", "--steps", "1", "--workers", "0"]
    train.train(parse(train.Args, [*flags, "--run-dir", str(tmp_path / "run")]))
    files = [f"model/{path.name}" for path in (tmp_path / "run" / "model").iterdir()]
    assert safely_named(events, tmp_path / "run") == sorted(["config.json", "checkpoints/step_00000001", *files])
    (at,) = [i for i, event in enumerate(events) if event[0] == "name" and event[2].name == "step_00000001"]
    assert ("sync", tmp_path / "run" / "log.jsonl") in events[:at]
    convert.export(convert.Export(str(tmp_path / "run"), "timm", str(tmp_path / "timm")))
    assert "timm" in safely_named(events, tmp_path)
