"""finetune.py: the model against the encoder it starts from, groups, views, what transformers makes of the result."""

from engine.arguments import ImagesArgs, LabelArgs, parse
from engine.checkpoints import checkpoints
from engine.errors import ServerGoneError, UserError
from engine.images import CenterCrop, decode
from engine.log import Log
from engine.sources import names_classes, open_labelled

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from arguments import assert_documented, assert_used
from images import write_clothes, write_parquet
from launch import call, launch, log_of, refused, succeeded
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitConfig,
    BeitModel,
    ViTConfig,
    ViTModel,
    pipeline,
)

import finetune
from cae import CAE, CAEConfig, sincos_positions
from convert import to_beit
from finetune import Classify, ModelArgs, TrainView, build_model, erase, load_origin, mixing, parameter_groups

pytestmark = pytest.mark.usefixtures("seeded")


def perturbed(**config):
    """A model none of whose biases and scales is at its initial value."""
    model = CAE(CAEConfig.from_size("nano", **config)).eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model


CLASSES = ["trouser", "shirt", "bag"]


# The model.


@pytest.mark.parametrize("pooling", ["mean", "class"])
@pytest.mark.parametrize("bias", [True, False])
def test_fine_tuning_starts_from_the_encoder(pooling, bias):
    """Whatever the pooling and with tables of zeros: the features are those of CAE.encode, at any size."""
    model = perturbed()
    origin = finetune.of_cae(model, "here")
    for size in (28, 40):
        args = ModelArgs(image_size=size, pooling=pooling, relative_position_bias=bias, drop_path=0.0)
        tuned = build_model(args, origin, CLASSES).eval()
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            tokens = model.encode(images)
            before = model.encoder.norm
            model.encoder.norm = torch.nn.Identity()
            bare = model.encode(images)
            model.encoder.norm = before
            expected = before(bare[:, 1:].mean(1)) if pooling == "mean" else tokens[:, 0]
            got = tuned.beit(images).pooler_output
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        tables = [p for name, p in tuned.named_parameters() if name.endswith("relative_position_bias_table")]
        assert len(tables) == (4 if bias else 0) and not any(table.any() for table in tables)
        assert tuned.config.id2label == {0: "trouser", 1: "shirt", 2: "bag"}
    assert tuned.classifier.weight.std() < 0.001 and not tuned.classifier.bias.any()


def test_fixed_positions_stay_fixed():
    tuned = build_model(ModelArgs(image_size=40, drop_path=0.0), finetune.of_cae(perturbed(), "here"), CLASSES)
    positions = tuned.beit.embeddings.position_embeddings
    assert not positions.requires_grad and torch.equal(positions[0, 1:], sincos_positions(10, 10, 96))


def tuned_folder(path, size=28):
    """A fine-tuned folder with tables that are not zero."""
    tuned = build_model(ModelArgs(image_size=size, drop_path=0.0), finetune.of_cae(perturbed(), "here"), CLASSES).eval()
    for name, weight in tuned.named_parameters():
        if "relative" in name or "classifier" in name:
            weight.data = torch.randn_like(weight)
    tuned.save_pretrained(path)
    return tuned


def rebuilt(path, size):
    """The classifier of a fine-tuned folder at another image size."""
    origin = load_origin(ModelArgs(checkpoint=str(path)))
    return build_model(ModelArgs(image_size=size, drop_path=0.0), origin, CLASSES).eval()


def test_a_fine_tuned_folder_comes_back_as_it_was(tmp_path):
    tuned = tuned_folder(tmp_path)
    origin = load_origin(ModelArgs(checkpoint=str(tmp_path)))
    assert origin.labels == CLASSES and origin.size == "nano"
    again = build_model(ModelArgs(image_size=28, drop_path=0.0), origin, CLASSES).eval()
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(again(images).logits, tuned(images).logits)
    with pytest.raises(UserError, match=r"tells 3 classes apart .* the data set has 2 .*: pass --new-head"):
        build_model(ModelArgs(image_size=28, drop_path=0.0), origin, ["cat", "dog"])
    assert build_model(ModelArgs(image_size=28, drop_path=0.0, new_head=True), origin, ["cat", "dog"]).num_labels == 2


def test_tables_of_relative_positions_are_resized(tmp_path):
    """A constant stays one, a plane nearly one; the class token's entries stay; so does a table of the right size."""
    table = torch.randn(13 * 13 + 3, 4)
    assert finetune.resize_table(table, 13) is table
    table[:-3] = (torch.arange(13.0)[:, None] + 10 * torch.arange(13.0)).reshape(-1, 1)
    resized = finetune.resize_table(table, 19)
    assert torch.equal(resized[-3:], table[-3:]) and resized.shape == (19 * 19 + 3, 4)
    plane = (torch.linspace(0, 12, 19)[:, None] + 10 * torch.linspace(0, 12, 19)).reshape(-1, 1).expand(-1, 4)
    torch.testing.assert_close(resized[:-3][19 * 3 : -19 * 3], plane[19 * 3 : -19 * 3], rtol=0, atol=1.0)
    corners = torch.tensor([0, 18, 18 * 19, 18 * 19 + 18])
    torch.testing.assert_close(resized[corners], plane[corners], rtol=1e-5, atol=1e-4)
    tuned = tuned_folder(tmp_path)
    for layer in tuned.beit.layers:
        layer.relative_position_bias.relative_position_bias_table.data[:] = 0.7  # the same for all: no effect
    tuned.save_pretrained(tmp_path)
    bigger = rebuilt(tmp_path, 40)
    for layer in tuned.beit.layers:
        layer.relative_position_bias.relative_position_bias_table.data[:] = 0.0
    tuned.save_pretrained(tmp_path)
    none = rebuilt(tmp_path, 40)
    images = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(bigger(images).logits, none(images).logits, rtol=1e-4, atol=1e-4)


def test_learned_positions_are_interpolated_as_beit_does(tmp_path):
    tuned = tuned_folder(tmp_path)
    tuned.beit.embeddings.position_embeddings.data += 0.3 * torch.randn(1, 50, 96)
    for layer in tuned.beit.layers:
        layer.relative_position_bias.relative_position_bias_table.data.zero_()
    tuned.save_pretrained(tmp_path)
    bigger = rebuilt(tmp_path, 40)
    images = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(bigger(images).logits, tuned(images).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_mask_token": True}, {"use_mean_pooling": False}])
@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_any_beit_of_transformers_can_be_tuned(tmp_path, options, pooling):
    """Stock folders, whose last norm is in the pooler or before it; every trainable parameter gets a gradient."""
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    beit = BeitModel(BeitConfig(**shape, image_size=16, patch_size=8, use_absolute_position_embeddings=True, **options))
    for weight in beit.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    beit.save_pretrained(tmp_path)
    origin = load_origin(ModelArgs(checkpoint=str(tmp_path)))
    tuned = build_model(ModelArgs(image_size=16, drop_path=0.0, pooling=pooling), origin, CLASSES)
    tuned(torch.randn(2, 3, 16, 16)).logits.sum().backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
    assert tuned.beit.embeddings.position_embeddings.requires_grad, "learned positions are learned on"
    norm = tuned.beit.pooler.layernorm if pooling == "mean" else tuned.beit.layernorm
    theirs = beit.layernorm if "use_mean_pooling" in options else beit.pooler.layernorm
    assert torch.equal(norm.weight, theirs.weight) and torch.equal(norm.bias, theirs.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fixed_positions_are_known_in_half_precision(tmp_path, dtype):
    tuned_folder(tmp_path).to(dtype).save_pretrained(tmp_path)
    for size in (28, 40):
        table = rebuilt(tmp_path, size).beit.embeddings.position_embeddings
        assert torch.equal(table[0, 1:], sincos_positions(size // 4, size // 4, 96)) and not table.requires_grad


def test_layer_decay_of_a_model_of_twelve_blocks():
    """The table: 0.75^(13 - id), id 0 for patch embedding and class token, i + 1 for block i, 13 for the rest."""
    config = CAEConfig.from_size("tiny", image_size=32)
    tuned = build_model(ModelArgs(image_size=32, drop_path=0.0), finetune.of_cae(CAE(config), "here"), CLASSES)
    groups = parameter_groups(tuned, tuned.beit.embeddings, tuned.beit.layers, 0.75, 0.05)
    scales = {0: 0.023757, 1: 0.031676, 2: 0.042235, 3: 0.056314, 4: 0.075085, 5: 0.100113, 6: 0.133484, 7: 0.177979,
              8: 0.237305, 9: 0.316406, 10: 0.421875, 11: 0.5625, 12: 0.75, 13: 1.0}  # fmt: skip
    names = {id(parameter): name for name, parameter in tuned.named_parameters()}
    seen = {}
    for group in groups:
        assert group["scale"] == pytest.approx(scales[group["layer"]], rel=1e-4)
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen[name] = group["layer"]
            assert group["weight_decay"] == (0.0 if parameter.ndim == 1 or name.endswith("cls_token") else 0.05), name
    assert set(seen) == {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert {name for name, layer in seen.items() if layer == 0} == {
        "beit.embeddings.cls_token", "beit.embeddings.patch_embeddings.projection.weight",
        "beit.embeddings.patch_embeddings.projection.bias"}  # fmt: skip
    assert {name for name, layer in seen.items() if layer == 13} == {
        "beit.pooler.layernorm.weight", "beit.pooler.layernorm.bias", "classifier.weight", "classifier.bias"}
    for i in range(12):
        block = {name for name, layer in seen.items() if layer == i + 1}
        assert block == {name for name in seen if name.startswith(f"beit.layers.{i}.")} and len(block) > 10


# Views.


def recipe(*flags):
    args = parse(Classify, ["--checkpoint", "x", *flags])
    origin = finetune.of_cae(CAE(CAEConfig.from_size("tiny", depth=12)), "here")
    return finetune.resolve(args, origin)


def test_train_views_are_a_pure_function_of_image_and_seed():
    view = TrainView(32, recipe("--erasing", "0.5", "--randaugment", "9").recipe)
    image = (torch.rand(3, 50, 60) * 255).byte()
    first = view(image, 3)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(view(image, 3), first, strict=True))
    views = [view(image, seed) for seed in range(60)]
    assert first[0].shape == (3, 32, 32) and first[0].dtype == torch.uint8
    assert len({v[0].float().mean().item() for v in views}) > 50
    boxes = torch.stack([v[1] for v in views])
    erased = boxes[:, 2] > 0
    assert 15 < erased.sum() < 45
    i, j, h, w = boxes[erased].T
    assert (i + h <= 32).all() and (j + w <= 32).all() and ((h * w) <= 0.4 * 32 * 32).all() and (h * w >= 10).all()


def test_erasing_fills_boxes_with_noise():
    x = torch.full((3, 3, 16, 16), 5.0)
    boxes = torch.tensor([[2, 3, 8, 10], [0, 0, 0, 0], [0, 0, 16, 16]])
    out = erase(x, boxes)
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[2:10, 3:13] = True
    assert (out[0][:, inside] != 5).all() and (out[0][:, ~inside] == 5).all() and torch.equal(out[1], x[1])
    assert abs(out[2].mean()) < 0.2 and abs(out[2].std() - 1) < 0.2


def test_mixing():
    images, labels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous(), torch.tensor([0, 1, 2, 3])
    args = recipe("--mixup", "0", "--cutmix", "0").recipe
    same, plain = mixing(args, 5)(images, labels)
    assert torch.equal(same, images) and torch.equal(plain, labels)
    for mixup, cutmix in (("0.8", "0"), ("0", "1"), ("1", "1")):
        mixed, soft = mixing(recipe("--mixup", mixup, "--cutmix", cutmix).recipe, 5)(images, labels)
        assert soft.shape == (4, 5) and torch.allclose(soft.sum(1), torch.ones(4))
        share = mixed.mean(dim=(1, 2, 3))
        torch.testing.assert_close(share, soft[:, :4] @ torch.arange(4.0), rtol=1e-4, atol=1e-4)


# Arguments.


def test_every_argument_is_used():
    assert_used([Classify], finetune)


def test_every_argument_is_documented_and_grouped(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Classify, ["--help"])
    assert stop.value.code == 0
    assert_documented(Classify, capsys.readouterr().out)


@pytest.mark.parametrize(("method", "size", "expected"), [
    ("cae-v2", "tiny", (4e-3, 0.85, 100, 1024, 5, 0.0, 0.2, 0.0, 0.0)),
    ("cae-v2", "small", (4e-4, 0.75, 200, 1024, 20, 0.1, 0.8, 1.0, 0.1)),
    ("cae-v2", "base", (2e-4, 0.75, 100, 1024, 5, 0.1, 0.8, 1.0, 0.1)),
    ("cae-v2", "large", (2e-4, 0.8, 50, 1024, 5, 0.1, 0.8, 1.0, 0.2)),
    ("cae", "small", (1.6e-2 / 4, 0.75, 200, 4096, 5, 0.1, 0.8, 1.0, 0.1)),
    ("cae", "base", (8e-3 / 4, 0.65, 100, 4096, 5, 0.1, 0.8, 1.0, 0.1)),
    ("cae", "large", (2e-3 / 4, 0.75, 50, 4096, 5, 0.1, 0.8, 1.0, 0.2)),
])  # fmt: skip
def test_recipes(method, size, expected):
    class Encoder:
        config = to_beit(CAE(CAEConfig.from_size("nano"))).config

    Encoder.config.image_size, Encoder.config.patch_size = 224, 16
    origin = finetune.Origin(Encoder, None, None, method, size, "here")
    args = finetune.resolve(parse(Classify, ["--checkpoint", "x"]), origin)
    r = args.recipe
    assert (r.lr, r.layer_decay, args.run.epochs, args.data.effective_batch_size, r.warmup_epochs, r.label_smoothing,
            r.mixup, r.cutmix, args.model.drop_path) == pytest.approx(expected)  # fmt: skip
    assert (r.weight_decay, r.min_lr, r.clip_grad, r.erasing, r.randaugment) == (0.05, 1e-6, 0.0, 0.25, 9)


@pytest.mark.parametrize(("size", "ratio"), [(64, 1.0), (224, 0.875), (384, 1.0), (512, 1.0)])
def test_the_share_of_the_middle_by_size(size, ratio):
    assert recipe("--image-size", str(size)).recipe.crop_ratio == ratio
    assert recipe("--image-size", str(size), "--crop-ratio", "0.9").recipe.crop_ratio == 0.9


def test_randaugment_without_timm(monkeypatch):
    find_spec = finetune.find_spec
    monkeypatch.setattr(finetune, "find_spec", lambda name: None if name == "timm" else find_spec(name))
    with pytest.raises(UserError, match="timm's, which is not installed: pip install timm, or --randaugment 0"):
        recipe()
    assert recipe("--randaugment", "0").recipe.randaugment == 0 and recipe("--eval-only").recipe.eval_only


# Runs in this process.


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    return write_clothes(tmp_path_factory.mktemp("clothes"), train=480, test=101)


@pytest.fixture
def run(monkeypatch, capsys, clothes, tmp_path):
    """finetune.py classify in this process: its result and output."""
    def classify(*flags, run_dir=tmp_path / "run", dataset=clothes):
        return call(monkeypatch, capsys, finetune, "classify", *flags, "--dataset", dataset, run_dir=run_dir)
    return classify


SMALL = ("--random-init", "nano", "--effective-batch-size", 32, "--log-every", 1)
FULL = ("--mixup", 0.8, "--cutmix", 1, "--randaugment", 9, "--erasing", 0.5, "--drop-path", 0.3, "--ema", 0.5)


@pytest.fixture(scope="module")
def tuned(clothes, tmp_path_factory):
    """A short run, whole: folder and result."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    command = ["--random-init", "nano", "--dataset", clothes, "--steps", "150", "--effective-batch-size", "32", "--lr",
               "6e-2", "--eval-every", "3", "--workers", "0", "--run-dir", folder]  # fmt: skip
    finetune.tune(parse(Classify, [str(word) for word in command]), finetune.Classification())
    return folder, json.loads((folder / "result.json").read_text())


def test_plain_transformers_reach_the_same_accuracy(tuned, clothes, tmp_path):
    """A script that imports nothing of this project loads the folder and classifies the test images."""
    folder, result = tuned
    assert result["top1"] > 25, "150 steps learn something"
    script = tmp_path / "plain.py"
    script.write_text("""
import io, sys
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
rows = pq.read_table(sys.argv[2]).to_pylist()
images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
with torch.no_grad():
    logits = model(**processor(images, return_tensors="pt")).logits
right = sum(int(guess) == row["label"] for guess, row in zip(logits.argmax(1), rows))
print(type(model).__name__, 100 * right / len(rows))
""")
    process = succeeded(launch(script, folder / "model", clothes / "test.parquet", cwd=tmp_path, warm=True))
    kind, accuracy = process.stdout.split()
    assert kind == "BeitForImageClassification" and float(accuracy) == pytest.approx(result["top1"], abs=1e-3)


@pytest.mark.parametrize("size", [(28, 28), (100, 60), (45, 90)])
def test_the_pipeline_sees_what_our_evaluation_sees(tuned, tmp_path, size):
    """A JPEG file through pipeline("image-classification") against our own decoding, view and model."""
    folder, _ = tuned
    x = Image.linear_gradient("L").resize(size)
    image = Image.merge("RGB", (x, x.rotate(180), x.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    image.save(tmp_path / "x.jpg", quality=95)
    classify = pipeline("image-classification", str(folder / "model"), top_k=10, function_to_apply="none")
    theirs = {row["label"]: row["score"] for row in classify(str(tmp_path / "x.jpg"))}
    view = CenterCrop(28, 1.0)(decode((tmp_path / "x.jpg").read_bytes()), 0)[0]
    model = AutoModelForImageClassification.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        logits = model(finetune.to_input(view[None])).logits[0]
    assert set(theirs) == set(model.config.label2id) and "sneaker" in " ".join(theirs)
    ours = torch.stack([logits[model.config.label2id[name]] for name in theirs])
    torch.testing.assert_close(torch.tensor(list(theirs.values())), ours, rtol=0, atol=0.03)


def test_the_processor_of_large_images_is_256_to_224():
    args = recipe("--image-size", "224")
    processor = finetune.image_processor(args)
    image = Image.linear_gradient("L").resize((500, 375)).convert("RGB")
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    file = io.BytesIO()
    image.save(file, "PNG")
    view = CenterCrop(224, 0.875)(decode(file.getvalue()), 0)[0]
    ours = finetune.to_input(view[None])[0]
    assert theirs.shape == (3, 224, 224)
    assert (theirs - ours).abs().max() < 0.05, "one step of 255 is 0.018 of a standard deviation"


def test_the_folder_is_complete(tuned):
    folder, result = tuned
    names = {path.name for path in (folder / "model").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= names
    card = (folder / "model" / "README.md").read_text()
    right = round(result["top1"] * 101 / 100)  # the card rounds once, result.json to other digits
    assert f"top-1 {100 * right / 101:.2f} %" in card and "image-classification" in card
    assert f"| seed | {result['seed']} |" in card and "| layer_decay |" in card
    assert (folder / "best" / "model.safetensors").exists() and result["best_epoch_top1"] >= result["top1"]
    AutoImageProcessor.from_pretrained(folder / "model")


def test_eval_only_gives_the_same_figure(run, tuned):
    folder, result = tuned
    again, output = run("--checkpoint", folder, "--eval-only")
    assert (again["top1"], again["top5"], again["images"]) == (result["top1"], result["top5"], 101)
    assert "evaluation only" in output


def test_eval_only_reads_nothing_but_the_split_to_evaluate_on(run, tuned, clothes, tmp_path):
    (tmp_path / "alone").mkdir()
    shutil.copy(clothes / "test.parquet", tmp_path / "alone")
    again, _ = run("--checkpoint", tuned[0] / "model", "--eval-only", "--val-split", "test", dataset=tmp_path / "alone")
    assert again["top1"] == tuned[1]["top1"]


def test_eval_only_of_numbers_as_labels_of_which_the_split_has_some(run, tmp_path):
    write_parquet(tmp_path / "data", (60,), labels="numbers")
    write_parquet(tmp_path / "data", (40,), labels="numbers", split="test")
    run(*SMALL, "--steps", 1, dataset=tmp_path / "data", run_dir=tmp_path / "tuned")
    table = pq.read_table(next((tmp_path / "data").glob("test-*.parquet")))
    (tmp_path / "some").mkdir()
    pq.write_table(table.filter(pc.field("label") == 0), tmp_path / "some" / "test.parquet")
    some = ImagesArgs(dataset=str(tmp_path / "some"), workers=0)
    source = open_labelled(some, LabelArgs(val_split="test"), learn=False)[1]
    assert source.classes == ["0"] and not names_classes(source)
    run("--checkpoint", tmp_path / "tuned", "--eval-only", dataset=tmp_path / "some", run_dir=tmp_path / "e")
    assert json.loads((tmp_path / "e" / "result.json").read_text())["classes"] == 2


def test_a_finished_run_without_its_model_is_made_whole(run, tmp_path):
    flags = (*SMALL, "--steps", 1)
    run(*flags)
    before = load_file(tmp_path / "run" / "model" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "model")
    run(*flags)
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_failed_upload_loses_nothing(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        run(*SMALL, "--steps", 1, "--push-to-hub", "me/clothes")
    assert stop.value.code == 1 and "could not be uploaded to me/clothes" in capsys.readouterr().err
    assert (tmp_path / "run" / "result.json").exists() and (tmp_path / "run" / "model" / "config.json").exists()


def test_all_of_the_recipe_runs(run, tmp_path):
    result, _ = run(*SMALL, *FULL, "--batch-size", 16, "--steps", 6, "--image-size", 40, "--pooling", "class")
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6] and result["image_size"] == 40
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.image_size == 40 and not model.config.use_mean_pooling


def test_the_moving_average_is_what_is_written(run, tmp_path):
    """start, w1, w2, w3 averaged by hand; the single runs of 1, 2 and 3 steps give the w."""
    flags = (*SMALL, "--lr", 0.1, "--min-lr", 0.1 * 32 / 1024, "--warmup-epochs", 0)  # a constant rate
    run(*flags, "--ema", 0.25, "--steps", 4, run_dir=tmp_path / "average")
    name = "beit.layers.0.mlp.fc1.weight"
    expected = load_origin(ModelArgs(random_init="nano"), 0).beit.state_dict()[name.removeprefix("beit.")]
    for steps in (1, 2, 3, 4):
        run(*flags, "--steps", steps, run_dir=tmp_path / str(steps))
        w = AutoModelForImageClassification.from_pretrained(tmp_path / str(steps) / "model").state_dict()[name]
        expected = 0.25 * expected + 0.75 * w
    average = AutoModelForImageClassification.from_pretrained(tmp_path / "average" / "model").state_dict()[name]
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(average, w, atol=1e-6)


@pytest.mark.parametrize("extra", [(), FULL])
def test_resume_equals_uninterrupted(run, tmp_path, extra):
    flags = (*SMALL, *extra, "--steps", 6, "--checkpoint-every", 2, "--eval-every", 0.1, "--batch-size", 16)
    whole, _ = run(*flags, run_dir=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for lost in ("step_00000006", "step_00000004"):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / lost)
    resumed, output = run(*flags, run_dir=tmp_path / "resumed")
    assert "continuing from" in output
    assert_same_result(resumed, whole, tmp_path / "resumed", tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("resumed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_same_result(ours, theirs, folder, whole):
    for name in ("top1", "top5", "best_epoch_top1", "best_epoch"):
        assert ours[name] == theirs[name]
    for a, b in zip(log_of(folder), log_of(whole), strict=True):
        assert all(a[name] == b.get(name) for name in ("step", "loss", "grad_norm", "lr", "seen", "top1") if name in a)


def test_a_signal_leaves_a_checkpoint_and_the_result_to_the_resumed_run(run, tmp_path, monkeypatch):
    flags = (*SMALL, "--steps", 6, "--checkpoint-every", 6, "--eval-every", 0.1, "--batch-size", 16)
    whole, _ = run(*flags, run_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        write = Log.write
        patch.setattr(Log, "write", lambda log, line, shown: (
            write(log, line, shown), line["step"] == 4 and os.kill(os.getpid(), signal.SIGTERM)))  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            run(*flags, run_dir=tmp_path / "run")
    assert caught.value.code == 0 and not (tmp_path / "run" / "result.json").exists()
    assert_same_result(run(*flags, run_dir=tmp_path / "run")[0], whole, tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("nth", [1, -1])
def test_an_evaluation_that_fails_is_made_up_for(run, tmp_path, monkeypatch, capsys, nth):
    """The first of a run, or the last, whose server has gone: a checkpoint, then that evaluation, then the rest."""
    flags = (*SMALL, "--steps", 6, "--checkpoint-every", 6, "--eval-every", 0.1, "--batch-size", 16)
    whole, _ = run(*flags, run_dir=tmp_path / "whole")
    evaluations = [line["step"] for line in log_of(tmp_path / "whole") if "top1" in line]
    assert len(evaluations) > 2 and evaluations[-1] == 6
    fails_at, calls = (1 if nth == 1 else len(evaluations)), []

    def batches(*args):
        calls.append(1)
        if len(calls) == fails_at:
            raise ServerGoneError("the server has been away")
        return original(*args)

    original = finetune.evaluation_batches
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "evaluation_batches", batches)
        with pytest.raises(SystemExit) as caught:
            run(*flags, run_dir=tmp_path / "run")
    assert caught.value.code == 1 and "error: the server has been away" in capsys.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step_{evaluations[fails_at - 1]:08d}"]
    assert_same_result(run(*flags, run_dir=tmp_path / "run")[0], whole, tmp_path / "run", tmp_path / "whole")


def test_two_processes(clothes, tmp_path):
    """The same global batches, evaluation over 101 images in two parts: the same losses and accuracies."""
    flags = ["--random-init", "nano", "--dataset", clothes, "--no-streaming", "--steps", "4", "--batch-size", "16",
             "--effective-batch-size", "32", "--log-every", "1", "--workers", "0", "--drop-path", "0"]  # fmt: skip
    for name, processes in (("one", 1), ("two", 2)):
        process = launch("finetune.py", "classify", *flags, "--run-dir", tmp_path / name, processes=processes,
                         warm=name == "two")  # fmt: skip
        result = json.loads(succeeded(process).stdout.strip().splitlines()[-1])
        assert (result["images"], result["processes"]) == (101, processes)
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-4)


def test_upload_with_the_call_replaced(run, monkeypatch, tmp_path):
    """--push-to-hub with the upload call replaced: what would be uploaded, and where to."""
    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append(("create", name))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    result, _ = run(*SMALL, "--steps", 1, "--push-to-hub", "me/clothes")
    assert result["hub"] == "https://hub/me/clothes" and calls[0] == ("create", "me/clothes")
    assert calls[1][0] == "me/clothes" and {"config.json", "model.safetensors", "README.md"} <= calls[1][1]


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give either --checkpoint or --random-init"),
        ("--random-init giant", "--random-init giant does not exist"),
        ("--checkpoint no/such/thing", "--checkpoint no/such/thing cannot be loaded: no/such/thing does not exist"),
        ("--checkpoint {root}/vit", "vit is a vit: a CAE or a BEiT of transformers is needed"),
        ("--checkpoint {root}/empty", "empty"),
        ("--checkpoint {root}/torn", "torn lacks weights of a BEiT: beit.layers.1.mlp.fc1.bias, ..."),
        ("--random-init nano --size base", "--size base was asked for, but random init nano is nano (96 wide, 4"),
        ("--random-init nano --image-size 30", "--image-size 30 is not divisible by the patch of 4 pixels"),
        ("--random-init nano --batch-size 1 --mixup 0.8", "--mixup and --cutmix mix the images of a batch"),
        ("--random-init nano --eval-only", "--eval-only: random init nano has no classifier yet"),
        ("--random-init nano --ema 0.9999", "--ema 0.9999 averages over more steps than a third of the 3000"),
        ("--random-init nano --pooling max", "--pooling is max: it is mean or class"),
        ("--random-init nano --layer-decay 1.5", "--layer-decay is 1.5: it must lie between 0 and 1"),
        ("--random-init nano --randaugment 11", "--randaugment is 11: it must lie between 0 and 10"),
        ("--random-init nano --val-split dev", "has no split 'dev'"),
        ("--random-init nano --warmup-epochs 100", "--warmup-epochs 100.0 is not shorter than the run"),
        ("--random-init nano --dataset {root}/alone", "no split to evaluate on: it has train; pass --val-fraction 0.1"),
        ("--checkpoint {root}/tuned", "tells 3 classes apart (trouser, shirt, bag, ...), the data set has 10"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(tmp_path, monkeypatch, capsys, flags, message):
    shape = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20)
    root = tmp_path / "root"
    if "/vit" in flags:
        ViTModel(ViTConfig(**shape, image_size=28, patch_size=7)).save_pretrained(root / "vit")
    if "/alone" in flags:
        write_parquet(root / "alone", (8,))
    if "/tuned" in flags:
        tuned_folder(root / "tuned")
    if "/torn" in flags:
        state = tuned_folder(root / "torn").state_dict()
        del state["beit.layers.1.mlp.fc1.bias"]
        save_file(state, root / "torn" / "model.safetensors", {"format": "pt"})
    if "/empty" in flags:
        (root / "empty").mkdir(parents=True)
    flags = flags.format(root=root).split()
    flags += [] if "--dataset" in flags else ["--dataset", "demo"]
    assert message in refused(monkeypatch, capsys, finetune, "classify", *flags, run_dir=tmp_path / "run")


def test_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        finetune.main()
    output = capsys.readouterr().out
    assert stop.value.code == 0 and output.startswith(finetune.__doc__) and "usage: finetune.py classify" in output
    for argv in (["finetune.py"], ["finetune.py", "juggle"]):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            finetune.main()
        assert stop.value.code == 2 and "give classify" in capsys.readouterr().err
