"""Tests of convert.py and its command: every form is loaded by the library it is for and compared with CAE.encode,
which test_cae.py compares with written-out formulas and the released implementation."""

import engine.files
from engine.errors import RunError

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
import torch.nn as nn
from launch import ROOT, launch, succeeded
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from transformers import AutoImageProcessor, AutoModel, BeitModel, LwDetrViTBackbone

import cae
import convert
from cae import CAE, CAEConfig, patch_grid, patchify, sincos_positions
from convert import (
    Export,
    export,
    load_model,
    released_name,
    timm_arguments,
    to_beit,
    to_lw_detr,
    to_onnx,
    to_timm,
)

CONFIGS = {
    "nano": CAEConfig.from_size("nano"),
    "other": CAEConfig(
        image_size=32, patch_size=8, dim=32, depth=3, heads=4, regressor_dim=16, regressor_depth=1, regressor_heads=2,
        target_dim=8, layer_scale=1e-5, drop_path=0.2,
    ),
}  # fmt: skip
# (model, --image-size): their own, and another one
SIZES = [("nano", None), ("nano", 40), ("other", None), ("other", 48)]
TARGETS = ["beit", "timm", "onnx", "lw-detr"]


def perturbed(config):
    """A model in which no bias is 0, no LayerNorm trivial, no LayerScale uniform, no weight as drawn."""
    torch.manual_seed(0)
    model = CAE(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def models():
    return {name: perturbed(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """A run folder for each model: config.json of the run, and model/."""
    root = tmp_path_factory.mktemp("runs")
    for name, model in models.items():
        model.save_pretrained(root / name / "model")
        (root / name / "config.json").write_text(json.dumps({"args": {}, "model": {}}))
    return root


def images_of(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(7))


def encode(model, images):
    with torch.no_grad():
        expected = model.encode(images)
    assert expected.std() > 0.5  # or closeness would be cheap
    return expected


def close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    print(f"largest difference {difference:.1e}")  # pytest -s shows it
    assert difference < tolerance


def measured(line):
    """The difference that the command printed."""
    return float(re.search(r"differs from the checkpoint by (\S+) at most", line)[1])


def blocks_on_patches(model, images):
    """What LW-DETR runs, by our modules: positions on patches, blocks; no class token, no final norm. (B, D, r, k)."""
    patch, encoder = model.config.patch_size, model.encoder
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    with torch.no_grad():
        x = encoder.patch_embed(patchify(images, patch)) + sincos_positions(rows, columns, model.config.dim)
        for block in encoder.blocks:
            x = block(x)
    return x.transpose(1, 2).reshape(len(images), -1, rows, columns)


# -------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_beit_folder(models, runs, tmp_path, capsys, name, size):
    model, side = models[name], size or CONFIGS[name].image_size
    export(Export(str(runs / name), "beit", str(tmp_path / "beit"), size))
    assert measured(capsys.readouterr().out) < 1e-5
    beit, info = AutoModel.from_pretrained(tmp_path / "beit", output_loading_info=True)
    assert isinstance(beit, BeitModel) and not info["missing_keys"] and not info["unexpected_keys"]
    images = images_of(2, side, side)
    with torch.no_grad():
        close(beit.eval()(images).last_hidden_state, encode(model, images), 1e-5)
    # the folder is complete: pictures of any size come out as the encoder wants them
    process = AutoImageProcessor.from_pretrained(tmp_path / "beit")
    picture = Image.effect_noise((3 * side, 4 * side), 90).convert("RGB")
    pixels = process(picture, return_tensors="pt")["pixel_values"]
    resized = picture.resize((side, side), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(resized.getdata()), dtype=torch.float32).view(side, side, 3).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (expected - mean[:, None, None]) / std[:, None, None]
    assert pixels.shape == (1, 3, side, side)
    assert (pixels[0] - expected).abs().max() < 1.5 / 255 / 0.224  # one step of 8 bits: Pillow's and torchvision's


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_timm_loads_strictly(models, runs, tmp_path, capsys, name, size):
    model, side = models[name], size or CONFIGS[name].image_size
    export(Export(str(runs / name), "timm", str(tmp_path / "timm"), size))
    line = capsys.readouterr().out
    assert measured(line) < 1e-5
    arguments = json.loads((tmp_path / "timm" / "config.json").read_text())["model_args"]
    assert arguments == timm_arguments(model, size)
    network = Beit(**arguments).eval()
    network.load_state_dict(load_file(tmp_path / "timm" / "model.safetensors"), strict=True)
    images = images_of(2, side, side)
    expected = encode(model, images)
    with torch.no_grad():
        close(network.forward_features(images), expected, 1e-5)
    loaded = eval(line.partition("load it with ")[2], {"timm": timm}).eval()  # what the line says
    with torch.no_grad():
        close(loaded(images), expected[:, 0], 1e-5)  # pooled by the class token
    data = timm.data.resolve_data_config({}, model=loaded)
    assert data["input_size"] == [3, side, side] and data["interpolation"] == "bicubic"
    assert data["mean"] == [0.485, 0.456, 0.406] and data["std"] == [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def onnx_file(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(models["other"], path)
    return path


def test_onnx_takes_every_batch_and_size(models, onnx_file):
    model, patch, side = models["other"], CONFIGS["other"].patch_size, CONFIGS["other"].image_size
    assert model.encoder.positions.grid == model.config.grid  # the model itself is as it was
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    shapes = {
        "native": (2, side, side),
        "another batch": (5, side, side),
        "one image": (1, side, side),
        "another square": (2, 3 * side, 3 * side),
        "wide": (3, 2 * patch, 7 * patch),
        "high": (3, 9 * patch, side),
        "one patch": (2, patch, patch),
    }
    for shape in shapes.values():
        images = images_of(*shape)
        (tokens,) = session.run(["tokens"], {"images": images.numpy()})
        close(torch.from_numpy(tokens), encode(model, images), 1e-4)
    with pytest.raises(Exception, match="ONNXRuntimeError"):  # not some crop or stretch of it
        session.run(["tokens"], {"images": images_of(1, side, side + 1).numpy()})


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_lw_detr_backbone(models, runs, tmp_path, capsys, name, size):
    model, side = models[name], size or CONFIGS[name].image_size
    export(Export(str(runs / name), "lw-detr", str(tmp_path / "backbone"), size))
    assert measured(capsys.readouterr().out) < 1e-5
    backbone, info = LwDetrViTBackbone.from_pretrained(tmp_path / "backbone", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert backbone.config.num_windows == 1 and backbone.config.cae_init_values == CONFIGS[name].layer_scale
    images = images_of(2, side, side)
    expected = blocks_on_patches(model, images)
    assert expected.std() > 0.5
    with torch.no_grad():
        (features,) = backbone.eval()(images).feature_maps
    close(features, expected, 1e-5)


def test_lw_detr_stages_are_our_blocks(models):
    """Features of every stage, as detection takes them: the patches' embedding, then one block after the other."""
    model = models["other"]
    backbone = to_lw_detr(model)
    images = images_of(2, 32, 32)
    with torch.no_grad():
        stages = backbone(images, output_hidden_states=True).hidden_states
    assert len(stages) == 1 + model.config.depth
    for i, stage in enumerate(stages):
        blocks, model.encoder.blocks = model.encoder.blocks, model.encoder.blocks[:i]
        try:
            close(stage.transpose(1, 2).reshape(2, 32, 4, 4), blocks_on_patches(model, images), 1e-5)
        finally:
            model.encoder.blocks = blocks


@pytest.mark.parametrize("make", [to_beit, to_lw_detr, to_timm], ids=["beit", "lw-detr", "timm"])
def test_exports_are_copies(make):
    """Training what was exported must not change ours."""
    model = perturbed(CONFIGS["other"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = make(model)
    with torch.no_grad():
        for tensor in made.values() if isinstance(made, dict) else made.parameters():
            assert tensor.abs().sum() > 0
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.encoder.positions.table.abs().sum() > 0


@pytest.mark.parametrize("side", [2, 4])
def test_lw_detr_with_windows(models, tmp_path, side):
    """Detection divides the image into windows. Blocks that are not windowed see all of it, as ours do."""
    model = models["other"]
    to_lw_detr(model).save_pretrained(tmp_path)
    backbone = LwDetrViTBackbone.from_pretrained(tmp_path, num_windows=side**2, num_windows_side=side).eval()
    images = images_of(2, 32, 32)
    with torch.no_grad():
        close(backbone(images).feature_maps[-1], blocks_on_patches(model, images), 1e-5)


def test_layer_scale_that_starts_at_zero():
    """transformers and timm read an initial LayerScale of 0 as "no LayerScale"; the trained one must not be lost."""
    model = perturbed(CAEConfig(**{**vars(CONFIGS["other"]), "layer_scale": 0.0}))
    images = images_of(2, 32, 32)
    network = Beit(**timm_arguments(model)).eval()
    network.load_state_dict(to_timm(model), strict=True)
    with torch.no_grad():
        close(to_beit(model)(images).last_hidden_state, encode(model, images), 1e-5)
        close(network.forward_features(images), encode(model, images), 1e-5)
        close(to_lw_detr(model)(images).feature_maps[-1], blocks_on_patches(model, images), 1e-5)


@pytest.mark.parametrize("make", [to_beit, to_lw_detr, to_timm, timm_arguments])
@pytest.mark.parametrize("size", [30, 0, -32, (32, 64), 32.0])
def test_squares_that_the_patch_divides(models, make, size):
    with pytest.raises(ValueError, match=r"image_size is .*patch of 8"):
        make(models["other"], size)


# ---------------------------------------------------------------------------------------------------------- load_model


def released_file(model, path):
    """Save a model under the released names, as the authors' training script did."""
    state = {released_name(name): tensor for name, tensor in model.state_dict().items()}
    kernel = "encoder.patch_embed.proj.weight"
    state[kernel] = state[kernel].view(model.config.dim, 3, *(model.config.patch_size,) * 2)
    positions = sincos_positions(*model.config.grid, model.config.dim)
    state["encoder.pos_embed"] = torch.cat([torch.zeros(1, model.config.dim), positions])[None]
    torch.save({"model": state}, path)


def cached_on_the_hub(monkeypatch, tmp_path, files):
    """`owner/name` with these files, as an earlier download left it: offline, huggingface_hub looks nowhere else."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(files, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_load_model_takes_every_kind_of_checkpoint(models, runs, tmp_path, monkeypatch):
    # 64 wide, so that the heads that load_official assumes are the right ones
    model = perturbed(CAEConfig(**{**vars(CONFIGS["other"]), "dim": 64, "heads": 1}))
    images = images_of(2, 32, 32)
    model.save_pretrained(tmp_path / "files")
    released_file(model, tmp_path / "files" / "released.pth")
    cached_on_the_hub(monkeypatch, tmp_path, tmp_path / "files")
    kinds = [tmp_path / "files", str(tmp_path / "files"), "owner/name", tmp_path / "files" / "released.pth",
             "owner/name::released.pth"]  # fmt: skip
    for checkpoint in kinds:
        loaded = load_model(checkpoint)
        assert not loaded.training
        assert torch.equal(encode(loaded, images), encode(model, images)), checkpoint
    for folder in (runs / "other", runs / "other" / "model"):
        assert torch.equal(encode(load_model(folder), images), encode(models["other"], images))


def damaged(folder, runs, how):
    """A model folder with one thing wrong."""
    shutil.copytree(runs / "other" / "model", folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if how == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "weights missing":
        weights.unlink()
    elif how == "tensor missing":
        state = load_file(weights)
        del state["encoder.norm.weight"]
        save_file(state, weights)
    elif how == "tensor of another shape":
        save_file({**load_file(weights), "encoder.norm.weight": torch.zeros(3)}, weights)
    elif how == "config cut short":
        config.write_text(config.read_text()[:-5])
    elif how == "config of a number":
        config.write_text("3")
    elif how == "config of nonsense":
        config.write_text(json.dumps({**json.loads(config.read_text()), "heads": 5}))
    elif how == "config of another model":
        config.write_text(json.dumps({"model_type": "clip"}))
    elif how == "run without a model":
        config.write_text(json.dumps({"args": {}, "model": {}}))
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("weights cut short", "damaged or incomplete"),
        ("weights missing", "damaged or incomplete.*model.safetensors"),
        ("tensor missing", "damaged or incomplete.*encoder.norm.weight"),
        ("tensor of another shape", "damaged or incomplete.*encoder.norm.weight"),
        ("config cut short", "config.json is not JSON"),
        ("config of a number", "names no method"),
        ("config of nonsense", "heads 5"),
        ("config of another model", "names no method"),
        ("run without a model", "first checkpoint"),
    ],
)
def test_load_model_names_what_is_wrong(runs, tmp_path, how, message):
    folder = damaged(tmp_path / "model-of-mine", runs, how)
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder)
    assert "model-of-mine" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "nothing", "some/thing", "no.pth::", "a/b::c.pth", "a::b::c"])
def test_load_model_without_a_checkpoint(name):
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        load_model(name)


def test_load_model_of_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json.*a run folder, a model/ folder"):
        load_model(tmp_path)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("to", TARGETS)
def test_the_command(runs, onnx_file, tmp_path, monkeypatch, capsys, to):
    """One line on standard output, a whole folder and nothing beside it."""
    monkeypatch.setattr(convert, "to_onnx", lambda model, path: shutil.copy(onnx_file, path))  # as ever, but in no time
    command = ["--checkpoint", runs / "other", "--to", to, "--output", tmp_path / "made" / "here"]
    process = run_main(monkeypatch, capsys, *command)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("\n") == 1 and str(tmp_path / "made" / "here") in process.stdout
    assert measured(process.stdout) < 1e-5 and "32 x 32" in process.stdout
    assert ("timm.create_model(" in process.stdout) == (to == "timm")
    assert "Traceback" not in process.stderr and "shards" not in process.stderr
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["here"]
    files = {path.name for path in (tmp_path / "made" / "here").iterdir()}
    assert files == {
        "beit": {"config.json", "model.safetensors", "preprocessor_config.json"},
        "timm": {"config.json", "model.safetensors"},
        "onnx": {"model.onnx"},
        "lw-detr": {"config.json", "model.safetensors"},
    }[to]


def refused(process, *words, code=2):
    """This exit code, nothing on standard output, one line on standard error with these words."""
    assert process.returncode == code, process.stdout + process.stderr
    assert process.stdout == "" and process.stderr.count("\n") == 1
    assert process.stderr.startswith("error: ") and all(word in process.stderr for word in words), process.stderr


def run_main(monkeypatch, capsys, *command):
    """The command in this process: as a finished process."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, command)])
    code = 0
    try:
        convert.main()
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    return subprocess.CompletedProcess(command, code, printed.out, printed.err)


def test_a_real_process(runs, tmp_path):
    """One that succeeds and one that does not. What else can go wrong is run in this one, below."""
    command = ["convert.py", "--to", "timm", "--output", tmp_path / "out", "--checkpoint"]
    folder = damaged(tmp_path / "broken", runs, "weights cut short")
    refused(launch(*command, folder), str(folder), "damaged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
    process = succeeded(launch(*command, runs / "other", warm=True))
    assert process.stdout.count("\n") == 1 and "timm.create_model(" in process.stdout
    assert "Traceback" not in process.stderr and (tmp_path / "out" / "model.safetensors").exists()


def test_a_format_that_is_not_known(runs, tmp_path, monkeypatch, capsys):
    command = ["--checkpoint", runs / "other", "--output", tmp_path / "out", "--to", "tflite"]
    process = run_main(monkeypatch, capsys, *command)
    assert process.returncode == 2 and "tflite" in process.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", TARGETS)
def test_sizes_that_are_refused(runs, tmp_path, monkeypatch, capsys, to):
    command = ["--checkpoint", runs / "other", "--output", tmp_path / "out", "--to", to, "--image-size"]
    refused(run_main(monkeypatch, capsys, *command, "36"), "image_size is 36", "patch of 8")
    assert run_main(monkeypatch, capsys, *command, "32", "64").returncode == 2  # squares only
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("checkpoint", ["/no/such/run", "some/thing", "some/thing::a.pth", "two\nlines"])
def test_checkpoints_that_do_not_exist(tmp_path, monkeypatch, capsys, checkpoint):
    command = ["--checkpoint", checkpoint, "--output", tmp_path / "out", "--to", "beit"]
    refused(run_main(monkeypatch, capsys, *command), " ".join(checkpoint.split()))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_with_something_in_it_is_left_alone(runs, tmp_path, monkeypatch, capsys):
    command = ["--checkpoint", runs / "other", "--to", "timm", "--output"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    refused(run_main(monkeypatch, capsys, *command, tmp_path / "full"), "full", "no empty folder")
    refused(run_main(monkeypatch, capsys, *command, tmp_path / "full" / "mine.txt"), "mine.txt", "no empty folder")
    refused(run_main(monkeypatch, capsys, *command, tmp_path / "full" / "mine.txt" / "x"), "mine.txt")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(Export(str(runs / "other"), "timm", str(tmp_path / "empty")))
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_weights_that_are_not_numbers(tmp_path, monkeypatch, capsys):
    model = perturbed(CONFIGS["other"])
    with torch.no_grad():
        model.encoder.norm.bias[0] = math.nan  # one channel of many
    model.save_pretrained(tmp_path / "model")
    command = ["--checkpoint", tmp_path / "model", "--output", tmp_path / "out", "--to", "timm"]
    refused(run_main(monkeypatch, capsys, *command), str(tmp_path / "model"), "not finite")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_without_its_packages(runs, tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)  # import raises
    command = ["--checkpoint", runs / "other", "--output", tmp_path / "out", "--to", "onnx"]
    refused(run_main(monkeypatch, capsys, *command), package, "pip install onnx onnxscript")
    assert list(tmp_path.iterdir()) == []


def test_onnx_without_onnxruntime_is_written_and_not_measured(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(convert, "to_onnx", lambda model, path: path.write_bytes(b"graph"))  # as ever, but in no time
    export(Export(str(runs / "other"), "onnx", str(tmp_path / "out")))
    assert "not read back, which needs pip install onnxruntime" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.onnx").read_bytes() == b"graph"


def test_timm_without_timm_is_written_and_not_measured(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    export(Export(str(runs / "other"), "timm", str(tmp_path / "out")))
    line = capsys.readouterr().out
    assert "not read back, which needs pip install timm; load it with timm.create_model(" in line
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(("to", "name"), [("beit", "layernorm.bias"), ("timm", "norm.bias")])
def test_a_wrong_export_is_never_published(runs, tmp_path, monkeypatch, capsys, to, name):
    """The folder is read back before it gets its name."""
    right = getattr(convert, f"to_{to}")

    def wrong(model, size):
        made = right(model, size)
        with torch.no_grad():
            (made if to == "timm" else made.state_dict())[name][0] += 0.1
        return made

    monkeypatch.setattr(convert, f"to_{to}", wrong)
    with pytest.raises(RunError, match=r"1\.0e-01 off: not written"):
        export(Export(str(runs / "other"), to, str(tmp_path / "out")))
    command = ["--checkpoint", runs / "other", "--output", tmp_path / "out", "--to", to]
    refused(run_main(monkeypatch, capsys, *command), "1.0e-01 off: not written", code=1)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_on_the_disk_before_it_gets_its_name(runs, tmp_path, monkeypatch):
    events = []
    fsync, replace = engine.files.fsync, Path.replace
    monkeypatch.setattr(engine.files, "fsync", lambda path: (events.append(str(path)), fsync(path)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (events.append("replace"), replace(path, to)))
    export(Export(str(runs / "other"), "timm", str(tmp_path / "out")))
    before, after = events[: events.index("replace")], events[events.index("replace") + 1 :]
    assert {Path(path).name for path in before} == {"config.json", "model.safetensors", "out"}
    assert after == [str(tmp_path)]


# -------------------------------------------------------- encoders that somebody has changed: nothing is lost unnoticed


class WithRegisters(cae.Encoder):
    """Two register tokens behind the class token, which do not leave the encoder."""

    def __init__(self, config):
        super().__init__(config)
        self.register_tokens = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, images, index=None, stochastic=True):
        x = self.patch_embed(patchify(images, self.patch_size)) + self.positions(patch_grid(images, self.patch_size))
        tokens = [self.class_token, self.register_tokens]
        x = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in tokens), x], dim=1)
        for block in self.blocks:
            x = block(x, stochastic)
        x = self.norm(x)
        return torch.cat([x[:, :1], x[:, 3:]], dim=1)


class WithUntrainedRegisters(WithRegisters):
    """The same, and nothing of it in the state dict."""

    def __init__(self, config):
        super().__init__(config)
        del self.register_tokens
        self.register_buffer("register_tokens", torch.ones(1, 2, config.dim), persistent=False)


class OfOtherImages(cae.Encoder):
    def forward(self, images, index=None, stochastic=True):
        return super().forward(images.flip(-1), index, stochastic)


class WithAnotherToken(cae.Encoder):
    def forward(self, images, index=None, stochastic=True):
        x = super().forward(images, index, stochastic)
        return torch.cat([x, x.mean(dim=1, keepdim=True)], dim=1)


class OfNarrowMLPs(cae.Encoder):
    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(config.dim, config.dim), nn.Linear(config.dim, config.dim)


@pytest.fixture
def changed(request, monkeypatch, tmp_path):
    """A model/ folder of CAE with the encoder class that is the test's parameter, and the model."""
    monkeypatch.setattr(cae, "Encoder", request.param)
    model = perturbed(CONFIGS["nano"])
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


def exported(monkeypatch, capsys, checkpoint, to):
    """The finished command, and its folder, which only success leaves behind."""
    output = checkpoint.parent / "out"
    process = run_main(monkeypatch, capsys, "--checkpoint", checkpoint, "--output", output, "--to", to)
    others = {path.name for path in checkpoint.parent.iterdir()} - {checkpoint.name}
    assert others == ({"out"} if process.returncode == 0 else set())
    return process, output


TABLES = [("beit", to_beit), ("timm", to_timm), ("lw-detr", to_lw_detr)]


@pytest.mark.parametrize("changed", [WithRegisters], indirect=True)
@pytest.mark.parametrize(("to", "make"), TABLES)
def test_a_parameter_too_many(changed, monkeypatch, capsys, to, make):
    checkpoint, model = changed
    assert model.encoder.register_tokens.abs().sum() > 0
    with pytest.raises(ValueError, match="no room for the encoder's register_tokens") as error:
        make(model)
    assert "\n" not in str(error.value)
    refused(exported(monkeypatch, capsys, checkpoint, to)[0], "register_tokens")


@pytest.mark.parametrize(("to", "make"), TABLES)
@pytest.mark.parametrize("name", ["extra", "blocks.1.attn.relative_position_bias_table"])
def test_a_parameter_too_many_anywhere(to, make, name):
    model = perturbed(CONFIGS["nano"])
    owner, _, own = name.rpartition(".")
    model.encoder.get_submodule(owner).register_parameter(own, nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match=f"no room for the encoder's {name}:"):
        make(model)


@pytest.mark.parametrize(("to", "make"), TABLES)
@pytest.mark.parametrize("name", ["norm.bias", "class_token", "blocks.1.scale1", "blocks.3.mlp.fc2.weight"])
def test_a_parameter_too_few(to, make, name):
    model = perturbed(CONFIGS["nano"])
    owner, _, own = name.rpartition(".")
    delattr(model.encoder.get_submodule(owner), own)
    with pytest.raises(ValueError, match=f"the encoder has no {name}"):
        make(model)


@pytest.mark.parametrize("changed", [OfNarrowMLPs], indirect=True)
@pytest.mark.parametrize(("to", "make"), TABLES)
def test_a_parameter_of_another_shape(changed, monkeypatch, capsys, to, make):
    process, _ = exported(monkeypatch, capsys, changed[0], to)
    refused(process, "mlp" if to != "lw-detr" else "intermediate", code=1 if to == "timm" else 2)


@pytest.mark.parametrize("changed", [WithUntrainedRegisters, OfOtherImages, WithAnotherToken], indirect=True)
@pytest.mark.parametrize("to", ["beit", "timm", "lw-detr"])
def test_a_forward_that_no_table_tells(changed, monkeypatch, capsys, to):
    """What is read back is compared with the encoder's own forward, LW-DETR's features too."""
    refused(exported(monkeypatch, capsys, changed[0], to)[0], "read back", "not written", code=1)


@pytest.mark.parametrize("changed", [WithRegisters], indirect=True)
def test_onnx_of_a_changed_encoder(changed, monkeypatch, capsys):
    """A graph is traced from whatever the forward does."""
    checkpoint, model = changed
    process, folder = exported(monkeypatch, capsys, checkpoint, "onnx")
    assert process.returncode == 0 and measured(process.stdout) < 1e-4
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    images = images_of(3, 20, 28)
    (tokens,) = session.run(["tokens"], {"images": images.numpy()})
    close(torch.from_numpy(tokens), encode(model, images), 1e-4)


# ---------------------------------------------------------------------------------------------------------- importing


@pytest.mark.parametrize(
    ("module", "absent"), [("cae", {"engine", "convert"}), ("convert", {"engine.frozen"})]
)
def test_importing_stays_light(module, absent):
    """`python convert.py --help` and a wrong flag cost little beyond torch itself."""
    absent = absent | {"transformers", "tyro", "onnx", "onnxscript", "timm", "torchvision", "datasets", "accelerate"}
    code = f"import sys, {module}; found = {absent} & set(sys.modules); assert not found, found"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_the_environment_is_set_before_torch():
    """OMP_WAIT_POLICY has no effect on a torch that is there already."""
    code = "import os, sys\nsys.modules['torch'] = None\ntry:\n    import convert\nexcept ImportError:\n"
    code += "    print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.stdout == "PASSIVE\n", process.stderr
