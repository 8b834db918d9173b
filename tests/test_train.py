"""The parts of train.py: images, teachers, schedules, arguments, and every mistake that is caught before the work."""

import engine.arguments
import engine.files
from engine.arguments import DataArgs, RunArgs, flat, marks_of, parse
from engine.checkpoints import make_run_dir, plan_resume
from engine.errors import RunError, UserError
from engine.files import publish, replace_files, write_text
from engine.frozen import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, compiled_if_possible
from engine.images import ColorJitter, decode, normalize
from engine.run import Length, length_of_run
from engine.seeds import seed_of
from engine.sources import Source, open_source

import dataclasses
import io
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from arguments import assert_documented, assert_used
from images import write_folder
from launch import ROOT, refused
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as TF
from transformers import (
    CLIPVisionModelWithProjection,
    FlavaImageCodebook,
    FlavaImageCodebookConfig,
    ViTConfig,
    ViTModel,
)

import finetune
import train
from cae import CAE, CAEConfig
from train import Args, CLIPTeacher, Crops, DALLETeacher, PixelTeacher, TargetArgs, resolve

GOLDEN = ROOT / "tests" / "golden"


def arguments(*flags):
    return resolve(parse(Args, list(flags)))


def clip_teacher(patch_size):
    return CLIPTeacher(TargetArgs(teacher=str(GOLDEN / "clip_tiny")), patch_size).eval()


def dalle_teacher(folder):
    return DALLETeacher(TargetArgs(teacher=str(folder)), 16).eval()


def pixel_teacher(**options):
    return PixelTeacher(TargetArgs(teacher="", **options), 4)


# Images.


def picture(mode="RGB", size=(40, 30)):
    """Noise, which is neither its own mirror image nor the same at another size."""
    noise = torch.rand(size[1], size[0], 3, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray((255 * noise).byte().numpy())
    return image if mode == "RGB" else image.convert(mode)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image):
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [("PNG", "RGB", {}), ("PNG", "L", {}), ("PNG", "P", {}), ("PNG", "1", {}), ("WEBP", "RGB", {"lossless": True}),
     ("BMP", "RGB", {}), ("GIF", "P", {}), ("TIFF", "RGB", {}), ("JPEG", "RGB", {"quality": 95}),
     ("JPEG", "L", {"quality": 95}), ("JPEG", "CMYK", {"quality": 95}),
     ("JPEG", "RGB", {"quality": 95, "progressive": True})],
)  # fmt: skip
def test_decode_gives_what_pillow_gives(kind, mode, options):
    data = encoded(picture(mode), kind, **options)
    expected = pixels(Image.open(io.BytesIO(data)).convert("RGB"))
    got = decode(data)
    assert got.dtype == torch.uint8 and got.shape == expected.shape
    # two JPEG decoders may round differently; every other format is exact
    assert (got.int() - expected.int()).abs().max() <= (3 if kind == "JPEG" else 0)


def test_decode_scales_16_bits():
    ramp = torch.arange(0, 65536, 257, dtype=torch.int32)  # 256 greys
    image = Image.frombytes("I;16", (16, 16), ramp.to(torch.uint16).numpy().tobytes())
    got = decode(encoded(image, "PNG"))
    assert (got[0].flatten().int() - torch.arange(256)).abs().max() <= 1
    assert (got == got[:1]).all()


def test_decode_puts_transparency_on_white():
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.putpixel((1, 2), (10, 20, 30, 255))
    got = decode(encoded(image, "PNG"))
    assert got[:, 0, 0].tolist() == [255, 255, 255] and got[:, 2, 1].tolist() == [10, 20, 30]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert decode(encoded(palette, "PNG", transparency=0))[:, 0, 0].tolist() == [9, 8, 7]


def test_decode_uses_what_is_there_of_a_truncated_file():
    whole = encoded(picture(size=(256, 256)), "JPEG", quality=90)
    got = decode(whole[: len(whole) * 2 // 3])
    assert got.shape == (3, 256, 256)
    assert (got[:, :64].int() - decode(whole)[:, :64].int()).abs().float().mean() < 3


def test_decode_goes_by_content_not_by_name_and_reads_the_first_frame():
    frames = [Image.new("RGB", (5, 5), c) for c in ("red", "blue")]
    got = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert got[:, 0, 0].tolist() == [255, 0, 0]
    assert decode(encoded(Image.new("RGB", (1, 1), "red"), "PNG")).shape == (3, 1, 1)


@pytest.mark.parametrize("data", [b"", b"<html></html>", b"\xff\xd8\xff", encoded(picture(), "PNG")[:30]])
def test_decode_refuses_what_is_no_image(data):
    with pytest.raises(Exception):  # noqa: B017  decoders raise whatever they like; load_chunk catches it all
        decode(data)


def test_crops_are_a_pure_function_of_image_and_seed():
    args = arguments("--dataset", "demo", "--color-jitter", "0.4", "--crop-scale", "0.4", "1")
    crops = Crops(args, train.model_config(args))
    image = pixels(picture())
    first = crops(image, 5)
    torch.rand(7)
    again = crops(image, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    others = [crops(image, seed) for seed in range(20)]
    assert len({o[0].numpy().tobytes() for o in others}) == 20
    assert len({tuple(o[2].tolist()) for o in others}) > 15
    view, visible, masked = first
    assert view.shape == (3, 28, 28) and view.dtype == torch.uint8
    assert len(masked) == 13 and sorted(visible.tolist() + masked.tolist()) == list(range(49))


def test_crops_without_augmentation_resize():
    args = arguments("--dataset", "demo", "--crop-scale", "1", "1", "--color-jitter", "0", "--flip", "0")
    crops = Crops(args, train.model_config(args))
    image = pixels(picture(size=(28, 28)))
    assert torch.equal(crops(image, 1)[0], image)
    args.recipe.flip = 1.0
    assert torch.equal(Crops(args, train.model_config(args))(image, 1)[0], image.flip(-1))


# Teachers.


def test_clip_teacher_reproduces_the_golden_tokens():
    golden = load_file(GOLDEN / "clip_tokens.safetensors")
    teacher = clip_teacher(16)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        got = teacher(golden["pixel_values"] * std + mean)
    assert teacher.target_dim == 24
    assert (got - golden["tokens"]).abs().max() < 1e-5


@pytest.mark.parametrize(("image_size", "patch_size", "grid"), [(32, 8, 4), (96, 16, 6), (28, 4, 7)])
def test_clip_teacher_sees_the_students_grid(image_size, patch_size, grid):
    """The crop resized to grid * teacher_patch, positions interpolated where that is not the native size."""
    teacher = clip_teacher(patch_size)
    view = torch.rand(2, 3, image_size, image_size)
    model = CLIPVisionModelWithProjection.from_pretrained(GOLDEN / "clip_tiny")
    x = view
    if image_size != 16 * grid:
        x = torch.nn.functional.interpolate(view, (16 * grid, 16 * grid), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        got = teacher(view)
        out = model(normalize(x, CLIP_MEAN, CLIP_STD), interpolate_pos_encoding=True)
    assert got.shape == (2, 1 + grid * grid, 24)
    assert torch.allclose(got[:, 0], out.image_embeds, atol=1e-5)


def test_dalle_teacher(tmp_path):
    torch.manual_seed(0)
    model = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=50, num_blocks_per_group=1)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
        else:
            torch.nn.init.zeros_(parameter)
    model.save_pretrained(tmp_path)
    teacher = dalle_teacher(tmp_path)
    view = torch.rand(2, 3, 4, 4).round().repeat_interleave(16, dim=2).repeat_interleave(16, dim=3)
    small = torch.nn.functional.interpolate(view, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        codes, expected = teacher(view), model.blocks(0.8 * small + 0.1).argmax(dim=1)
    assert teacher.target_dim == 50 and codes.dtype == torch.int64 and codes.shape == (2, 16)
    assert torch.equal(codes.view(2, 4, 4), expected)
    assert 8 < codes.flatten().bincount().max() < 32, "the codes differ, so that their order was compared too"


@pytest.mark.parametrize("size", [32, 96])
def test_a_compiled_teacher_gives_the_same_targets(tmp_path, graphs, size):
    """At its own size, and with positions interpolated."""
    FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=50)).save_pretrained(tmp_path)
    for teacher in (clip_teacher(16), dalle_teacher(tmp_path)):
        views = [torch.rand(batch, 3, size, size) for batch in (2, 3)]
        with torch.no_grad():
            expected = [teacher(view) for view in views]
            teacher.compile_network()
            for view, target in zip(views, expected, strict=True):
                torch.testing.assert_close(teacher(view), target, rtol=0, atol=1e-5)
    assert len(graphs) == 2
    pixel_teacher().compile_network()
    assert len(graphs) == 2


def test_a_teacher_is_compiled_where_that_is_possible(graphs, monkeypatch, capsys):
    """On a GPU by default. Where it is not, the run goes on with the teacher as it was."""
    teacher, pixels, cpu = clip_teacher(16), torch.rand(2, 3, 32, 32), torch.device("cpu")
    compiled = compiled_if_possible(teacher, (2, 3, 32, 32), cpu)
    assert len(graphs) == 1 and compiled is not teacher and not capsys.readouterr().err
    torch.testing.assert_close(compiled(pixels), teacher(pixels), rtol=0, atol=1e-5)
    runs = [module for module in compiled.modules() if module._compiled_call_impl is not None]
    assert len(runs) == 1 and not any(module._compiled_call_impl for module in teacher.modules())

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: (_ for _ in ()).throw(RuntimeError("no")))
    assert compiled_if_possible(teacher, (2, 3, 32, 32), cpu) is teacher
    told = capsys.readouterr().err
    assert told.startswith("note: the teacher cannot be compiled (no) and runs as it is") and told.count("\n") == 1


@pytest.mark.parametrize(("device", "flags", "tried"), [
    ("cpu", [], 0), ("cuda", [], 1), ("cuda", ["--no-compile-teacher"], 0), ("cuda", ["--compile"], 0),
])  # fmt: skip
def test_who_compiles_the_teacher(device, flags, tried, graphs, monkeypatch, tmp_path):
    """By default that on a GPU, tried on one batch; --compile that on any device, and the model."""
    calls = []

    class Tried(Exception):  # noqa: N818 (no error)
        """As far as this goes."""

    class Elsewhere(train.Run):
        device = property(lambda run: torch.device(device), lambda run, value: None)

        def header(self, *args):
            raise Tried

    monkeypatch.setattr(train, "Run", Elsewhere)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *args: module)
    monkeypatch.setattr(train, "compiled_if_possible", lambda *args: calls.append(args) or args[0])
    command = ["--dataset", "demo", "--workers", "0", "--batch-size", "6", "--effective-batch-size", "6", *flags]
    with pytest.raises(Tried):
        train.train(parse(train.Args, [*command, "--run-dir", str(tmp_path / "run")]))
    assert [(shape, str(on)) for _, shape, on in calls] == [((6, 3, 28, 28), device)] * tried
    assert len(graphs) == 2 * ("--compile" in flags)


def test_pixel_teacher_orders_as_mae():
    view = torch.rand(1, 3, 12, 8)
    got = pixel_teacher()(view)
    x = normalize(view, IMAGENET_MEAN, IMAGENET_STD)
    for patch in range(6):
        r, c = divmod(patch, 2)
        values = [x[0, k, 4 * r + i, 4 * c + j] for i in range(4) for j in range(4) for k in range(3)]
        assert torch.equal(got[0, patch], torch.stack(values))
    normal = pixel_teacher(normalize_pixels=True)(view)
    assert torch.allclose(normal.mean(-1), torch.zeros(1, 6), atol=1e-5)
    assert torch.allclose(normal.var(-1), torch.ones(1, 6), atol=1e-3)


def test_teacher_mistakes(tmp_path):
    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path / "vit")
    args = arguments("--dataset", "demo", "--teacher", str(tmp_path / "vit"))
    with pytest.raises(UserError, match="is a vit: a CLIP vision model with projection is needed"):
        train.build_teacher(args, train.model_config(args))
    args.target.teacher = str(tmp_path / "absent")
    with pytest.raises(UserError, match="does not exist"):
        train.build_teacher(args, train.model_config(args))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text((GOLDEN / "clip_tiny" / "config.json").read_text())
    whole = (GOLDEN / "clip_tiny" / "model.safetensors").read_bytes()
    (tmp_path / "damaged" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    args.target.teacher = str(tmp_path / "damaged")
    with pytest.raises(UserError, match="cannot be loaded"):
        train.build_teacher(args, train.model_config(args))


def test_a_teacher_without_projection_is_refused(tmp_path):
    """transformers would start the missing matrix at random, and the student would learn it."""
    model = CLIPVisionModelWithProjection.from_pretrained(GOLDEN / "clip_tiny")
    weights = {k: v for k, v in model.state_dict().items() if "projection" not in k}
    model.save_pretrained(tmp_path, state_dict=weights)
    args = arguments("--dataset", "demo", "--teacher", str(tmp_path))
    with pytest.raises(UserError, match=r"lacks weights of a CLIP vision .*: visual_projection.weight"):
        train.build_teacher(args, train.model_config(args))


def test_a_teacher_whose_grid_cannot_match(tmp_path):
    """40 pixels in patches of 16: CLIP's convolution drops the rest, and 2 x 2 positions cannot be told apart."""
    config = CLIPVisionModelWithProjection.config_class.from_pretrained(GOLDEN / "clip_tiny", num_channels=1)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    args = arguments("--dataset", "demo", "--teacher", str(tmp_path))
    with pytest.raises(UserError, match=r"the grid of --teacher .* cannot match the student's 7 x 7 patches: 50"):
        train.build_teacher(args, train.model_config(args))


# Schedules.


@pytest.mark.parametrize("script", [train, finetune])
@pytest.mark.parametrize(("total", "warmup"), [(1000, 100), (80, 8), (40, 2), (40, 1), (40, 0), (5, 5)])
def test_the_learning_rates_are_the_released_table(script, total, warmup):
    """numpy's linspace, both ends of which count, then a cosine over the rest, whose end does not."""
    rest = 0.1 + (2.0 - 0.1) * (1 + np.cos(np.pi * np.arange(total - warmup) / max(total - warmup, 1))) / 2
    table = np.concatenate([np.linspace(0, 2.0, warmup), rest])
    rates = [script.learning_rate(step, total, warmup, 2.0, 0.1) for step in range(total)]
    np.testing.assert_allclose(rates, table, rtol=1e-15, atol=1e-15)


def test_a_cosine_begins_at_its_start_and_its_end_would_follow_the_last_step():
    assert [train.cosine(s, 2, 0.05, 0.2) for s in range(2)] == pytest.approx([0.05, 0.125])
    assert [train.cosine(s, 7, 0.05, 0.05) for s in range(7)] == [0.05] * 7


@pytest.mark.parametrize(("epochs", "warm"), [(300, 10), (800, 20), (1600, 40), (30, 1), (100, 10 / 3)])
def test_warmup(epochs, warm):
    """ImageNet's passes are no whole number of steps, and a run is rounded up to one."""
    source = Source(None, "image", None, 1281167, "here")
    run, data = RunArgs(epochs=float(epochs)), DataArgs(effective_batch_size=2048)
    length = length_of_run(run, data, source)
    assert length.steps_per_pass == 1281167 / 2048 and length.steps == math.ceil(epochs * length.steps_per_pass)
    assert train.warmup_steps(length) == pytest.approx(warm * length.steps_per_pass, abs=1)
    assert train.warmup_steps(length, 5.0) == length.warmup(5.0, 9) == round(5 * length.steps_per_pass)
    assert length.warmup(None, 9) == length.steps // 9 and length.epochs == pytest.approx(epochs, abs=0.01)
    unknown = Source(None, "image", None, None, "here")
    short = length_of_run(RunArgs(steps=90), data, unknown)
    assert short == Length(90, None, "here") and train.warmup_steps(short) == 3 and short.epochs is None
    for mistake in (lambda: length_of_run(run, data, unknown), lambda: train.warmup_steps(short, 5.0)):
        with pytest.raises(UserError, match="the number of images in here is unknown"):
            mistake()


def test_parameter_groups():
    model = CAE(CAEConfig.from_size("nano"))
    decayed, plain = train.parameter_groups(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["decay"] and not plain["decay"]
    assert {names[id(p)] for p in decayed["params"]} == {
        n for n, p in model.named_parameters() if n.endswith("weight") and "norm" not in n
    }
    assert {"encoder.class_token", "regressor.mask_token"} < {names[id(p)] for p in plain["params"]}
    assert len(names) == len(decayed["params"]) + len(plain["params"])
    frozen = CAE(CAEConfig.from_size("nano", supervise="visible"))
    trained = [p for group in train.parameter_groups(frozen) for p in group["params"]]
    assert not {id(p) for p in frozen.regressor.parameters()} & {id(p) for p in trained}


def test_images_can_be_learned():
    """Forty steps on one batch of real images and their pixels at least halve the loss. (CAE v2: test_scripts.py.)"""
    args = arguments("--dataset", "demo", "--method", "cae")
    config = train.model_config(args)
    teacher = train.build_teacher(args, config)
    source, crops = open_source(args.data), Crops(args, config)
    rows = [row["image"]["bytes"] for row in itertools.islice(source.data, 16)]
    views = [crops(decode(data), i) for i, data in enumerate(rows)]
    images, visible, masked = (torch.stack(tensors) for tensors in zip(*views, strict=True))
    pixels = images.float() / 255
    with torch.no_grad():
        target = teacher(pixels)
    torch.manual_seed(0)
    model = CAE(train.model_config(args, target_dim=teacher.target_dim)).train()
    optimizer = torch.optim.AdamW(train.parameter_groups(model), lr=2e-3)
    losses = []
    for _ in range(40):
        x = normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)
        losses.append(model(x, visible, masked, target)["loss"])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2


# Arguments.


def test_every_argument_is_used():
    assert_used([Args], train, elsewhere={f.name for f in dataclasses.fields(CAEConfig)})


def test_every_argument_is_documented_and_grouped(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Args, ["--help"])
    assert stop.value.code == 0
    assert_documented(Args, capsys.readouterr().out)


def test_the_command_of_the_paper():
    """accelerate launch train.py --size base --mask-ratio 0.5"""
    args = arguments("--size", "base", "--mask-ratio", "0.5")
    assert (args.data.dataset, args.data.streaming, args.target.teacher) == (
        "ILSVRC/imagenet-1k", True, "openai/clip-vit-base-patch16")  # fmt: skip
    assert args.model.method == "cae-v2" and args.target.supervise == "both" and args.target.mask == "block"
    assert args.run.epochs == 300 and args.data.effective_batch_size == 2048 and args.recipe.lr == 1.5e-3
    assert args.recipe.weight_decay == 0.05 and args.recipe.clip_grad == 3.0 and args.recipe.min_lr == 1e-5
    assert args.recipe.crop_scale == (0.4, 1.0) and args.recipe.color_jitter == 0.4
    config = train.model_config(args)
    assert config == CAEConfig.from_size("base") and train.num_masked(args, config) == 98


@pytest.mark.parametrize(
    ("method", "size", "masked"),
    [("cae-v2", "tiny", 30), ("cae-v2", "small", 49), ("cae-v2", "base", 98), ("cae-v2", "large", 98),
     ("cae-v2", "huge", 98), ("cae", "tiny", 98), ("cae", "small", 98), ("cae", "base", 98), ("cae", "large", 98)],
)  # fmt: skip
def test_recipes(method, size, masked):
    args = arguments("--size", size, "--method", method)
    assert train.num_masked(args, train.model_config(args)) == masked
    if method == "cae":
        assert args.target.target == "dalle" and args.recipe.crop_scale == (0.08, 1.0) and args.recipe.color_jitter == 0


def test_num_masked_is_a_true_ceiling():
    args = arguments("--dataset", "demo", "--image-size", "40", "--mask-ratio", "0.28")
    assert train.num_masked(args, CAEConfig.from_size("nano", image_size=40)) == 28, "not 29, as 0.28 * 100 rounds"


def test_effective_batch_size():
    args = parse(Args, ["--size", "base"])
    assert resolve(args, world=8).data.batch_size == 256
    assert resolve(args, world=16).data.batch_size == 128
    assert resolve(args, world=6).data.effective_batch_size == 1536, "the nearest multiple, unless it was asked for"
    args = parse(Args, ["--size", "base", "--effective-batch-size", "2048", "--batch-size", "256"])
    with pytest.raises(UserError, match="not a multiple of --batch-size 256 times 6 processes: try 1536"):
        resolve(args, world=6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mask-ratio 1.5", "--mask-ratio is 1.5: it must lie between 0 and 1"),
        ("--mask-ratio 0", "--mask-ratio is 0.0"),
        ("--mask-ratio 0.999", "masks 196 of 196 patches: at least one must be masked and one visible"),
        ("--image-size 225", "image_size 225 is not divisible by patch_size 16"),
        ("--patch-size 0", "patch_size is 0: it must be positive"),
        ("--target pixels", "--method cae-v2 cannot predict --target pixels"),
        ("--method cae --target clip", "--method cae cannot predict --target clip"),
        ("--method cae --target pixels --teacher x/y", "--teacher has no use with --target pixels"),
        ("--epochs 1 --steps 1", "--epochs and --steps are both given"),
        ("--epochs 0", "--epochs is 0.0: it must be positive"),
        ("--batch-size 0", "--batch-size is 0: it must be positive"),
        ("--batch-size 7 --effective-batch-size 16", "try 14"),
        ("--workers -1", "--workers is -1"),
        ("--size giant", "--size giant does not exist: choose from nano, tiny, small, base, large, huge"),
        ("--lr -1", "--lr is -1.0: it must be positive"),
        ("--clip-grad -1", "--clip-grad is -1.0: it must not be negative"),
        ("--beta2 1", "--beta2 is 1.0"),
        ("--crop-scale 0.5 0.2", "--crop-scale is 0.5 0.2"),
        ("--regressor-heads 7", "regressor_dim 768 is not divisible by regressor_heads 7"),
        ("--method cae --align-weight 0 --reconstruct-weight 0", "no loss is left"),
        ("--tracker trackio", "--tracker trackio is not installed: pip install trackio"),
        ("--dataset no/such/folder", "data set no/such/folder does not exist"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(flags, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(engine.arguments, "find_spec", lambda name: None)  # no tracker installed
    assert message in refused(monkeypatch, capsys, train, *flags.split(), run_dir=tmp_path / "run")


def test_unknown_flags_and_choices_end_with_code_2(monkeypatch, capsys):
    for flags, named in ((["--method", "giant"], "cae-v2"), (["--colour"], "--colour")):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        with pytest.raises(SystemExit) as stop:
            train.main()
        assert stop.value.code == 2
        assert named in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(12))
def test_color_jitter_is_that_of_torchvision(seed):
    """The same operations in the same order, on floats that are not rounded in between."""
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    got = ColorJitter(0.4)(image)
    torch.manual_seed(seed)
    order, factors = torch.randperm(3).tolist(), torch.empty(3).uniform_(0.6, 1.4).tolist()
    expected = image.double() / 255
    for kind in order:
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[kind]
        expected = adjust(expected, factors[kind])
    assert (got.double() - 255 * expected).abs().max() < 0.51


def test_color_jitter_of_full_strength_stays_in_range(seeded):
    for value in (0, 255):
        image = torch.full((3, 4, 4), value, dtype=torch.uint8)
        for _ in range(20):
            out = ColorJitter(1.0)(image)
            assert out.dtype == torch.uint8 and (out == out[0, 0, 0]).all()
    factors = torch.stack([ColorJitter(0.4)(torch.full((3, 1, 1), 100, dtype=torch.uint8)).float().mean()
                           for _ in range(500)])  # fmt: skip
    assert 58 < factors.min() < 66 and 134 < factors.max() < 142, "of one grey, brightness alone is seen"


# The run folder.


def prepared(path, *flags):
    """The checkpoint that a run in this folder would start from, or None."""
    args = arguments("--dataset", "demo", "--run-dir", str(path), *flags)
    resume = plan_resume(args.run, flat(args), marks_of(args))
    make_run_dir(path / "checkpoints")
    return next(iter(resume.candidates), None)


def test_a_run_folder_of_another_configuration_is_refused(tmp_path):
    args = arguments("--dataset", "demo", "--run-dir", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"args": flat(args), "model": {}}))
    assert prepared(tmp_path, "--seed", "1") is None, "a start that failed before its first step binds nobody"
    (tmp_path / "log.jsonl").touch()
    assert prepared(tmp_path) is None
    assert prepared(tmp_path, "--log-every", "7", "--tracker", "tensorboard") is None, "these may change"
    with pytest.raises(UserError, match=r"another configuration \(mask_ratio 0.25 -> 0.5; seed 0 -> 1\)"):
        prepared(tmp_path, "--mask-ratio", "0.5", "--seed", "1")
    for step in (10, 9):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir()
    (tmp_path / "checkpoints" / "step_00000011.tmp").mkdir()
    assert prepared(tmp_path).name == "step_00000010"
    with pytest.raises(UserError, match="already holds a run"):
        prepared(tmp_path, "--resume", "never")
    with pytest.raises(UserError, match="neither a checkpoint nor a run folder"):
        prepared(tmp_path / "other", "--resume", str(tmp_path / "absent"))
    assert prepared(tmp_path / "other", "--resume", str(tmp_path)).name == "step_00000010"
    with pytest.raises(UserError, match=r"another configuration \(seed 0 -> 1\)"):
        prepared(tmp_path / "another", "--resume", str(tmp_path), "--seed", "1")
    earlier = tmp_path / "checkpoints" / "step_00000009"
    (earlier / "trainer.json").write_text("{}")
    with pytest.raises(UserError, match="goes on to step_00000010"):
        prepared(tmp_path, "--resume", str(earlier))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        prepared(tmp_path)


def test_an_unwritable_run_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not writable: Not a directory"):
        prepared(tmp_path / "file" / "run")


def test_write_text_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "old")
    monkeypatch.setattr(engine.files, "fsync", lambda p: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RunError, match=r"x\.json could not be written: disk full; make room, and start again"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_publish_names_a_folder_and_replaces_files(tmp_path):
    (tmp_path / "step.tmp").mkdir()
    (tmp_path / "step.tmp" / "x").write_text("whole")
    publish(tmp_path / "step.tmp", tmp_path / "step")
    for text in ("old", "new"):
        replace_files(tmp_path / "model", lambda folder: (folder / "x").write_text(text))  # noqa: B023
    assert (tmp_path / "step" / "x").read_text() == "whole" and (tmp_path / "model" / "x").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "step"]


def test_seeds_are_stable():
    """Seeds must not change with Python's version or hash seed: every resume depends on them."""
    assert seed_of(0, 1, 2) == seed_of(0, 1, 2) != seed_of(0, 2, 1)
    assert 0 <= seed_of(0) < 2**63
    import hashlib

    digest = hashlib.blake2b(b"(0, 1, 2)", digest_size=8).digest()
    assert seed_of(0, 1, 2) == int.from_bytes(digest, "little") >> 1
    assert math.isclose(sum(seed_of(i) / 2**63 for i in range(4000)) / 4000, 0.5, abs_tol=0.03)


def test_image_folders_are_read_from_files(tmp_path):
    write_folder(tmp_path / "pictures", 6)
    source = open_source(DataArgs(dataset=str(tmp_path / "pictures")))
    assert source.num_images == 6 and source.label_column == "label"
    assert source.data[0]["image"]["bytes"] is None and source.data.features["label"].names == ["even", "odd"]
