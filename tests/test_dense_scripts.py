"""finetune.py segment and detect as their users run them: formats of data, what others load, going on, mistakes.

Most tests look at one of four short runs, which are made once.
"""

from engine.annotations import encode_masks
from engine.arguments import parse
from engine.evaluation import average_precision
from engine.images import decode

import json
import math
import re
import shutil
import sys

import pytest
import scenes
import torch
from accelerate.state import AcceleratorState
from launch import ROOT, call, launch, log_of, refused, succeeded
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    BeitConfig,
    BeitModel,
    pipeline,
)

import dense
import finetune

COMMON = ("--batch-size", 2, "--effective-batch-size", 2, "--log-every", 1)
SEGMENT = (*COMMON, "--image-size", 32, "--short-side", 40)
DETECT = (*COMMON, "--image-size", 48)
RCNN = (*DETECT, "--short-sides", 48)
NANO = ("--random-init", "nano")
LONG = ("--steps", 6, "--checkpoint-every", 3, "--eval-every", 0.5, "--save-pictures", 3)
SEGMENTATION_SCORES = ("miou", "mean_accuracy", "pixel_accuracy", "iou", "accuracy")
BOX_SCORES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
MASK_SCORES = tuple(f"mask_{name}" for name in BOX_SCORES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a data set in each format."""
    root = tmp_path_factory.mktemp("data")
    scenes.write_ade(root / "ade", training=8, validation=3)
    scenes.write_pairs(root / "pairs", train=8, val=3)
    scenes.write_cityscapes(root / "cityscapes", train=8, val=3)
    scenes.write_maps(root / "maps", train=12, test=5)
    scenes.write_maps(root / "groups", group=3, train=14, test=4)
    scenes.write_map_tars(root / "tar", train=8, test=3)
    scenes.write_map_tars(root / "tar-of-png", "png", train=8, test=3)
    scenes.write_coco(root / "coco", val=7, train=12)
    scenes.write_objects(root / "objects", group=3, train=10, test=4)
    return root


class Tuned:
    """A run: its folder, result, output; and the model that was evaluated last."""

    def __init__(self, folder, task, *flags):
        self.folder, self.task, self.flags = folder, task, tuple(map(str, flags))
        arguments, kind = finetune.kinds_of(task)

        def measure(run, task, model):
            self.model = model
            return original(run, task, model)

        original = finetune.measure
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune, "measure", measure)
            patch.setattr(sys, "argv", ["finetune.py", task, *self.flags])
            finetune.tune(parse(arguments, [*self.flags, "--workers", "0", "--run-dir", str(folder)]), kind())
        self.result = json.loads((folder / "result.json").read_text())
        self.model.eval()  # as it was evaluated

    def weights(self, part="model"):
        return load_file(self.folder / part / "model.safetensors")


@pytest.fixture(scope="module")
def segmenter(data, tmp_path_factory):
    return Tuned(tmp_path_factory.mktemp("segmenter") / "run", "segment", *NANO, *SEGMENT, *LONG, "--ema", 0.5,
                 "--dataset", data / "maps", "--num-classes", 4)  # fmt: skip


@pytest.fixture(scope="module")
def mask_rcnn(data, tmp_path_factory):
    return Tuned(tmp_path_factory.mktemp("rcnn") / "run", "detect", *NANO, *RCNN, *LONG, "--ema", 0.5,
                 "--dataset", data / "coco")  # fmt: skip


@pytest.fixture(scope="module")
def cascade(data, tmp_path_factory):
    return Tuned(tmp_path_factory.mktemp("cascade") / "run", "detect", *NANO, *RCNN, "--detector", "cascade",
                 "--steps", 2, "--dataset", data / "coco")  # fmt: skip


@pytest.fixture(scope="module")
def lw_detr(data, tmp_path_factory):
    return Tuned(tmp_path_factory.mktemp("detr") / "run", "detect", *NANO, *DETECT, *LONG, "--detector", "lw-detr",
                 "--dataset", data / "coco")  # fmt: skip


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """finetune.py in this process: its result and output."""
    def finetuned(*command, run_dir=tmp_path / "run"):
        return call(monkeypatch, capsys, finetune, *command, run_dir=run_dir)
    return finetuned


def assert_percentages(result, names):
    for name in names:
        values = result[name] if isinstance(result[name], list) else [result[name]]
        assert all(value is None or 0 <= value <= 100 for value in values), (name, values)


# Formats.


@pytest.mark.parametrize(
    ("name", "flags", "classes", "val"),
    [
        ("ade", (), scenes.THINGS, ("validation", 3)),
        ("pairs", ("--num-classes", 4), "0123", ("validation", 3)),
        ("cityscapes", (), ("road", "car", "sky"), ("validation", 3)),
        ("groups", ("--num-classes", 4, "--streaming"), "0123", ("test", 4)),
        ("groups", ("--num-classes", 4, "--streaming", "--val-fraction", 0.4), "0123", ("0.4 of train", None)),
        ("groups", ("--num-classes", 4, "--val-fraction", 0.4), "0123", ("0.4 of train", None)),
        ("tar", ("--num-classes", 4), "0123", ("test", 3)),
        ("tar-of-png", ("--num-classes", 4, "--streaming"), "0123", ("test", 3)),
    ],
)
def test_segmentation_of_every_format(run, data, tmp_path, name, flags, classes, val):
    result, output = run("segment", *NANO, *SEGMENT, "--steps", 2, "--dataset", data / name, *flags)
    split, images = val
    assert (result["task"], result["val_split"], result["steps"]) == ("segment", split, 2)
    assert (result["images"] == images) if images else 0 < result["images"] < 14
    assert result["skipped"] == 0 and result["classes"] == len(result["iou"]) >= len(classes)
    assert_percentages(result, SEGMENTATION_SCORES)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    names = [config["id2label"][str(i)] for i in range(result["classes"])]
    assert set(classes) <= set(names) and len(names) == (19 if name == "cityscapes" else len(classes))
    # of classes that the labels have, there is an accuracy; background counts in none of these two
    there = [name for name, accuracy in zip(names, result["accuracy"], strict=True) if accuracy is not None]
    assert set(there) <= set(classes) and len(there) > 1
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / "run"))
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"model", "best", "log.jsonl", "checkpoints"}
    assert f"{len(names)} classes" in output and "mIoU" in output


@pytest.mark.parametrize("flags", [(), ("--streaming",), ("--streaming", "--val-fraction", 0.4)])
def test_detection_of_a_column_with_boxes(run, data, tmp_path, flags):
    result, output = run("detect", *NANO, *RCNN, "--no-masks", "--steps", 2, "--dataset", data / "objects", *flags)
    assert (result["task"], result["classes"], result["skipped"]) == ("detect", 3, 0)
    assert (result["images"] == 4) if len(flags) < 2 else 0 < result["images"] < 10
    assert_percentages(result, (*BOX_SCORES, "ap_per_class"))
    assert not any(name.startswith("mask") for name in result) and "red" in output
    assert not any("mask" in name for name in load_file(tmp_path / "run" / "model" / "model.safetensors"))


def test_detection_of_coco(mask_rcnn, cascade, lw_detr):
    """Polygons, RLE, a crowd, an image without objects, a box without width, one of a pixel."""
    for tuned in (mask_rcnn, cascade, lw_detr):
        result, masks = tuned.result, tuned is not lw_detr
        assert (result["images"], result["classes"], result["val_split"], result["skipped"]) == (7, 3, "validation", 0)
        assert_percentages(result, (*BOX_SCORES, *MASK_SCORES * masks, "ap_per_class"))
        assert len(result["ap_per_class"]) == 3 and ("mask_ap" in result) == masks
        for line in log_of(tuned.folder):
            assert all(math.isfinite(value) for name, value in line.items() if "loss" in name), line
        config = json.loads((tuned.folder / "model" / "config.json").read_text())
        names = config["classes"] if masks else [config["id2label"][str(i)] for i in range(3)]
        assert tuple(names) == scenes.THINGS
    assert {"loss_classifier", "loss_mask"} <= set(log_of(mask_rcnn.folder)[0])


# What others load.


def picture(path, number=2):
    """A scene as a file, and as our own decoder has it."""
    path.write_bytes(scenes.encoded(scenes.scene(number)[0]))
    return decode(path.read_bytes())


def test_transformers_load_the_segmenter(segmenter, tmp_path):
    model = AutoModelForSemanticSegmentation.from_pretrained(segmenter.folder / "model").eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x).logits, segmenter.model(x).logits)
    assert type(model).__name__ == "UperNetForSemanticSegmentation"
    image = picture(tmp_path / "x.png")
    segment = pipeline("image-segmentation", str(segmenter.folder / "model"))
    parts = segment(str(tmp_path / "x.png"))
    assert parts and all(part["mask"].size == (image.shape[2], image.shape[1]) for part in parts)
    assert {part["label"] for part in parts} <= set("0123")
    # together they are the image, each pixel once
    areas = [torch.tensor(list(part["mask"].tobytes())).bool() for part in parts]
    assert (torch.stack(areas).sum(0) == 1).all()
    card = (segmenter.folder / "model" / "README.md").read_text()
    assert f"mIoU {segmenter.result['miou']:.2f} %" in card and "image-segmentation" in card


def test_transformers_load_lw_detr(lw_detr, tmp_path):
    folder = lw_detr.folder / "model"
    model, image = AutoModelForObjectDetection.from_pretrained(folder).eval(), picture(tmp_path / "x.png")
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        ours, theirs = lw_detr.model(pixel_values=x), model(pixel_values=x)
        assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.pred_boxes, theirs.pred_boxes)
        processor = AutoImageProcessor.from_pretrained(folder)
        inputs = processor(Image.open(tmp_path / "x.png"), return_tensors="pt")["pixel_values"]
        view = finetune.to_input(dense.as_size(image, 48, 48)[None])
    assert inputs.shape == view.shape and (inputs - view).abs().max() < 0.05, "one step of 255 is 0.018"
    found = pipeline("object-detection", str(folder), threshold=0.0)(str(tmp_path / "x.png"))
    assert len(found) > 3 and {one["label"] for one in found} <= set(scenes.THINGS)


def rebuilt(folder):
    """The detector, by the lines of its own README."""
    card = (folder / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "PATH OF THIS FOLDER" in block
    names = {}
    exec(block.replace("PATH OF THIS FOLDER", str(folder)), names)
    return names["model"], names["config"]["classes"], card


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade"])
def test_the_lines_of_the_card_rebuild_a_detector(request, name):
    """It detects what the run's model detects, and its average precision, counted here, is that of result.json."""
    tuned = request.getfixturevalue(name)
    model, classes, card = rebuilt(tuned.folder / "model")
    assert tuple(classes) == scenes.THINGS and f"box AP {tuned.result['ap']:.2f} %" in card
    truths, found = [], []
    for n in range(7):
        pixels, _, _ = scenes.scene(n)
        height, width = pixels.shape[:2]
        image = decode(scenes.encoded(pixels, "JPEG")).float() / 255
        objects = scenes.coco_annotations(n)
        boxes = torch.tensor([one["bbox"] for one in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = dense.masks_of([one["segmentation"] for one in objects], height, width)
        truths.append({"id": n, "height": height, "width": width, "boxes": boxes, "masks": encode_masks(masks),
                       "labels": [one["category_id"] // 10 - 1 for one in objects],
                       "crowd": [one["iscrowd"] for one in objects],
                       "area": [one["area"] for one in objects]})  # fmt: skip
        with torch.no_grad():  # alone: others of a batch would pad it
            (a,), (b,) = tuned.model([image]), model([image])
        assert set(a) == {"boxes", "labels", "scores", "masks"} and all(torch.equal(a[key], b[key]) for key in a)
        found.append({"id": n, "boxes": b["boxes"], "labels": b["labels"] - 1, "scores": b["scores"],
                      "masks": encode_masks(b["masks"][:, 0] > 0.5)})  # fmt: skip
    assert sum(len(one["boxes"]) for one in found) > 10
    scores = average_precision(truths, found, 3, masks=True)
    for key in (*BOX_SCORES, *MASK_SCORES):
        assert scores[key] is None or round(scores[key], 3) == tuned.result[key], key


# Going on from a result.


def scores_of(result):
    names = (*SEGMENTATION_SCORES, *BOX_SCORES, *MASK_SCORES, "ap_per_class", "images", "skipped")
    return {name: result[name] for name in names if name in result}


EVALUATE = {"segmenter": ("segment", *SEGMENT, "--num-classes", 4), "mask_rcnn": ("detect", *RCNN),
            "cascade": ("detect", *RCNN, "--detector", "cascade"),
            "lw_detr": ("detect", *DETECT, "--detector", "lw-detr")}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATE)
def test_eval_only_gives_the_same_scores(request, run, data, name):
    tuned, dataset = request.getfixturevalue(name), data / ("maps" if name == "segmenter" else "coco")
    again, output = run(*EVALUATE[name], "--checkpoint", tuned.folder, "--eval-only", "--dataset", dataset)
    assert scores_of(again) == scores_of(tuned.result) and "evaluation only" in output


def test_whole_images_at_once(run, data, segmenter):
    again, _ = run(*EVALUATE["segmenter"], "--checkpoint", segmenter.folder, "--eval-only", "--window", "whole",
                   "--dataset", data / "maps")  # fmt: skip
    assert_percentages(again, SEGMENTATION_SCORES)
    assert again["images"] == 5 and again["iou"] != segmenter.result["iou"]


HEADS = {"segmenter": "decode_head.classifier.weight", "mask_rcnn": "roi_heads.mask_predictor.conv5_mask.weight",
         "lw_detr": "model.decoder.layers.0.mlp.fc1.weight"}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_training_goes_on_from_a_result(request, run, data, tmp_path, name):
    """With a rate of nearly nothing: for the same classes the model is as it was, for others its heads are new."""
    tuned, dataset = request.getfixturevalue(name), data / ("maps" if name == "segmenter" else "coco")
    flags = (*EVALUATE[name], "--checkpoint", tuned.folder, "--steps", 2, "--lr", 1e-12, "--weight-decay", 0)
    run(*flags, "--dataset", dataset)
    before, after = tuned.weights(), load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert set(before) == set(after)
    for key, value in before.items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(after[key], value, rtol=0, atol=1e-6, msg=key)
    (tmp_path / "names").write_text("\n".join("abcd" if name == "segmenter" else "abc"))
    others = [word for word in flags if word not in ("--num-classes", 4)]
    run(*others, "--dataset", dataset, "--class-names", tmp_path / "names", run_dir=tmp_path / "other")
    other = load_file(tmp_path / "other" / "model" / "model.safetensors")
    encoder = next(key for key in before if "layer.0.attention" in key.replace("layers", "layer"))
    torch.testing.assert_close(other[encoder], before[encoder], rtol=0, atol=1e-6)
    assert not torch.allclose(other[HEADS[name]], before[HEADS[name]], atol=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_resume_equals_uninterrupted(request, run, tmp_path, name):
    """Weights, buffers, the moving average, and every line of the log."""
    whole = request.getfixturevalue(name)
    shutil.copytree(whole.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006")
    shutil.rmtree(tmp_path / "run" / "model")
    resumed, output = run(whole.task, *whole.flags)
    assert "continuing from" in output and scores_of(resumed) == scores_of(whole.result)
    for part in ("model", "best", "checkpoints/step_00000006"):
        ours, theirs = (load_file(folder / part / "model.safetensors") for folder in (tmp_path / "run", whole.folder))
        assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs), part
    ours, theirs = log_of(tmp_path / "run"), log_of(whole.folder)
    for lines in (ours, theirs):
        for line in lines:
            line.pop("images_per_second"), line.pop("data_wait")
    assert ours == theirs and len(ours) == 6


# Two processes.


@pytest.mark.parametrize("name", ["segmenter", "mask_rcnn"])
def test_two_processes_give_the_scores_of_one(request, run, data, tmp_path, name):
    """An odd number of images. (One at a time: a detector's images are padded to the largest of their batch.)"""
    tuned, dataset = request.getfixturevalue(name), data / ("maps" if name == "segmenter" else "coco")
    flags = [*EVALUATE[name], "--checkpoint", tuned.folder, "--eval-only", "--dataset", dataset]
    flags[flags.index("--batch-size") + 1] = 1
    one, _ = run(*flags, run_dir=tmp_path / "one")
    process = launch("finetune.py", *flags, "--workers", 0, "--run-dir", tmp_path / "two", processes=2, warm=True)
    two = json.loads(succeeded(process).stdout.strip().splitlines()[-1])
    assert (one["processes"], two["processes"]) == (1, 2) and one["images"] % 2
    assert scores_of(two) == scores_of(one)


RECORD = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import finetune, torch

join, calls = finetune.join_statistics, []

def recorded(accelerator, model):
    def statistics():
        return {{name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}}
    before = statistics()
    join(accelerator, model)
    calls.append({{"before": before, "after": statistics(),
                  "weights": {{name: value.detach().clone() for name, value in model.named_parameters()}}}})

finetune.join_statistics = recorded
finetune.main()
torch.save(calls, Path(__file__).with_name(f"rank{{os.environ['RANK']}}.pt"))
"""


@pytest.mark.parametrize("name", HEADS)
def test_training_in_two_processes(data, tmp_path, name):
    """Weights are the same in both, and so are BatchNorm's statistics when the model is evaluated: the mean of theirs.
    """
    (tmp_path / "record.py").write_text(RECORD)
    dataset = data / ("maps" if name == "segmenter" else "coco")
    flags = [*EVALUATE[name], *NANO, "--dataset", dataset, "--steps", 2, "--workers", 0, "--run-dir", tmp_path / "run"]
    flags[flags.index("--effective-batch-size") + 1] = 4
    process = launch(tmp_path / "record.py", *flags, processes=2, warm=True)
    result = json.loads(succeeded(process).stdout.strip().splitlines()[-1])
    assert (result["processes"], result["steps"], result["batch"]) == (2, 2, 4)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    (one, *_), (two, *_) = ranks
    assert all(torch.equal(value, two["weights"][name]) for name, value in one["weights"].items())
    assert bool(one["before"]) == (name != "mask_rcnn")  # which has no BatchNorm
    for name, before in one["before"].items():
        assert not torch.equal(before, two["before"][name]), "each has images of its own"
        assert torch.equal(one["after"][name], two["after"][name])
        torch.testing.assert_close(one["after"][name], (before + two["before"][name]) / 2)
    written = load_file(tmp_path / "run" / "checkpoints" / "step_00000002" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in one["after"].items())


# Bad annotations among good ones.


@pytest.mark.parametrize("bad", [1, 3])
def test_bad_annotations(run, tmp_path, capsys, segmenter, bad):
    """One of 101 is passed over and counted, in training as in evaluation; three are too many."""
    rows = scenes.map_rows(range(101))
    for i in range(1, 1 + bad):  # not among those that are looked at before a run
        rows["annotation"][i]["bytes"] = scenes.encoded(scenes.scene(i)[1][:-1])
    features = scenes.Features({"image": scenes.Image(), "annotation": scenes.Image()})
    (tmp_path / "data").mkdir()
    scenes.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / "train.parquet")
    scenes.Dataset.from_dict(scenes.map_rows(range(2)), features).to_parquet(tmp_path / "data" / "test.parquet")
    train = ["segment", *NANO, *SEGMENT, "--num-classes", 4, "--steps", 13, "--dataset", tmp_path / "data"]
    for flag in ("--batch-size", "--effective-batch-size"):
        train[train.index(flag) + 1] = 8
    evaluate = [*EVALUATE["segmenter"], "--checkpoint", segmenter.folder, "--eval-only", "--val-split", "train",
                "--dataset", tmp_path / "data"]  # fmt: skip
    for command in (train, evaluate):
        for flag in ("--image-size", "--short-side"):
            command[command.index(flag) + 1] = 16  # which is sooner done
    if bad == 1:
        run(*train)
        assert log_of(tmp_path / "run")[-1]["skipped"] == 1
        result, _ = run(*evaluate, run_dir=tmp_path / "evaluated")
        assert (result["images"], result["skipped"]) == (100, 1)
        return
    for command, name in ((train, "trained"), (evaluate, "evaluated")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(*command, run_dir=tmp_path / name)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and "could not be used, more than 1 %" in error and "the same size" in error


# Pictures, and ways to compute.


@pytest.mark.parametrize("name", HEADS)
def test_pictures_are_saved(request, name):
    tuned = request.getfixturevalue(name)
    files = sorted((tuned.folder / "pictures").iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png", "0002.png"]
    assert tuned.result["pictures"] == str(tuned.folder / "pictures")
    for number, file in enumerate(files):
        first = 12 if name == "segmenter" else 0  # of the split to evaluate on
        sheet, (height, width) = Image.open(file).convert("RGB"), scenes.scene(first + number)[1].shape
        factor = math.ceil(192 / min(width, height))
        assert sheet.width == 3 * (factor * width + 8) - 8 and sheet.height >= factor * height + 18
        first, second = (sheet.crop((i * (factor * width + 8), 18, i * (factor * width + 8) + factor * width,
                                     18 + factor * height)) for i in (0, 1))  # fmt: skip
        assert first.tobytes() != second.tobytes(), "the truth is drawn over the image"


@pytest.fixture
def any_precision():
    """Of a run in this process, where others had another one."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("name", ["segmenter", "mask_rcnn", "lw_detr"])
@pytest.mark.parametrize("flag", ["--checkpoint-blocks", "--precision"])
def test_ways_to_compute_the_same(request, run, data, tmp_path, any_precision, name, flag):
    """The first step's losses and gradient are those of the plain run; nothing is infinite."""
    tuned, dataset = request.getfixturevalue(name), data / ("maps" if name == "segmenter" else "coco")
    value = ("bf16",) if flag == "--precision" else ()
    run(*EVALUATE[name], *NANO, "--steps", 1, "--dataset", dataset, flag, *value)
    (line,), (plain, *_) = log_of(tmp_path / "run"), log_of(tuned.folder)
    assert all(math.isfinite(value) for key, value in line.items() if "loss" in key)
    assert line["loss"] == pytest.approx(plain["loss"], rel=0.05 if value else 1e-5)
    assert line["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.3 if value else 1e-4)
    assert not value or line["loss"] != plain["loss"]


@pytest.mark.parametrize("name", ["segmenter", "mask_rcnn"])
def test_compiled(request, run, monkeypatch, tmp_path, graphs, name):
    """Images of one size, and no evaluation: for each the graph would be made anew."""
    scores = scores_of(request.getfixturevalue(name).result)
    monkeypatch.setattr(finetune, "measure", lambda *_: (scores, 1))
    kind, square = ("maps", scenes.write_maps) if name == "segmenter" else ("coco", scenes.write_coco)
    square(tmp_path / kind, side=48, train=2, val=1)
    flags = (*EVALUATE[name], *NANO, "--steps", 1, "--dataset", tmp_path / kind)
    run(*flags, "--compile")
    run(*flags, run_dir=tmp_path / "plain")
    (line,), (plain,) = log_of(tmp_path / "run"), log_of(tmp_path / "plain")
    assert len(graphs) == 1
    for key in ("loss", "grad_norm"):
        assert line[key] == pytest.approx(plain[key], rel=1e-4)


# Mistakes.


def broken(root, kind):
    """A data set or a checkpoint with something wrong in it."""
    path = root / kind
    if kind in ("size", "range", "missing", "colour", "jpeg", "pairs"):
        scenes.write_pairs(path, train=3, val=2)
        file, (image, kinds, _) = path / "annotations" / "train" / "001.png", scenes.scene(1)
        if kind == "missing":
            file.unlink()
        elif kind == "jpeg":
            file.unlink()
            file.with_suffix(".jpg").write_bytes(scenes.encoded(kinds, "JPEG"))
        elif kind != "pairs":
            file.write_bytes(scenes.encoded({"size": kinds[1:], "range": kinds + 9, "colour": image}[kind]))
    if kind in ("json", "category", "image", "maskless", "coco"):
        scenes.write_coco(path, masks=kind != "maskless", train=3, val=2)
        file = path / "annotations" / "instances_train2017.json"
        if kind == "json":
            file.write_text(file.read_text()[:-9])
        if kind == "category":
            file.write_text(file.read_text().replace('"category_id": 10', '"category_id": 11'))
        if kind == "image":
            (path / "train2017" / f"{1:012d}.jpg").unlink()
    if kind == "beit":
        BeitModel(BeitConfig(hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=20,
                             image_size=48, patch_size=4)).save_pretrained(path)  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("segment", "--dataset {size} --num-classes 4", "they must have the same size"),
        ("segment", "--dataset {range} --num-classes 4", "is none of the 4 classes: pass --num-classes"),
        ("segment", "--dataset {missing} --num-classes 4", "has no annotation"),
        ("segment", "--dataset {colour} --num-classes 4", "it is a colour picture"),
        ("segment", "--dataset {jpeg} --num-classes 4", "it is a JPEG, which does not keep class numbers"),
        ("segment", "--dataset {pairs}", "does not name its classes: pass --num-classes, or --class-names"),
        ("segment", "--dataset {pairs} --num-classes 4 --batch-size 1", "--batch-size must be 2 or more"),
        ("segment", "--dataset {pairs} --num-classes 4 --stride 33", "--stride 33 is longer than the window of 32"),
        ("segment", "--dataset {pairs} --num-classes 4 --eval-only", "random init nano segments nothing yet"),
        ("segment", "--dataset {pairs} --num-classes 4 --checkpoint {mask_rcnn}", "is a beit_rcnn"),
        ("segment", "--dataset {pairs} --num-classes 4 --checkpoint {lw_detr}", "is a lw_detr"),
        ("detect", "--dataset {json}", "is no JSON (line 1, column"),
        ("detect", "--dataset {category}", "has an annotation of category 11, which it does not list"),
        ("detect", "--dataset {image}", "000000000001.jpg, which"),
        ("detect", "--dataset {maskless}", "its objects have no masks: pass --no-masks"),
        ("detect", "--dataset {coco} --anchors 16 32", "--anchors has 2 values: it must be 3"),
        ("detect", "--dataset {coco} --detector lw-detr --windows 25", "windows"),
        ("detect", "--dataset {coco} --detector lw-detr --windows 5", "windows"),
        ("detect", "--dataset {coco} --eval-only", "random init nano detects nothing yet"),
        ("detect", "--dataset {coco} --detector lw-detr --checkpoint {beit}", "takes the encoder of a CAE"),
        ("detect", "--dataset {coco} --checkpoint {segmenter}", "is a upernet"),
        ("detect", "--dataset {coco} --checkpoint {torn}", "it is damaged or incomplete"),
        ("detect", "--dataset {coco} --checkpoint {emptied}", "it is damaged or incomplete"),
        ("detect", "--dataset {coco} --checkpoint {mask_rcnn} --detector lw-detr", "--detector"),
        ("detect", "--dataset {coco} --checkpoint {lw_detr}", "is an LW-DETR: pass --detector lw-detr"),
        ("detect", "--dataset {coco} --checkpoint {mask_rcnn} --no-masks", "is another detector than asked for"),
        ("detect", "--dataset {coco} --checkpoint {mask_rcnn} --detector cascade", "is another detector than asked"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(request, monkeypatch, capsys, tmp_path, task, flags, message):
    places = {}
    for kind in re.findall(r"\{(\w+)\}", flags):
        if kind in EVALUATE:
            places[kind] = request.getfixturevalue(kind).folder
        elif kind in ("torn", "emptied"):
            places[kind] = tmp_path / kind
            shutil.copytree(request.getfixturevalue("mask_rcnn").folder / "model", places[kind])
            weights = places[kind] / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[: -1000 if kind == "torn" else 4])
        else:
            places[kind] = broken(tmp_path, kind)
    flags = flags.format(**places).split()
    flags += [] if "--checkpoint" in flags else NANO
    sizes = {"segment": (32, "--short-side", 40), "detect": (48,)}[task]
    error = refused(monkeypatch, capsys, finetune, task, *COMMON[2:], "--image-size", *sizes, *flags,
                    run_dir=tmp_path / "run")  # fmt: skip
    assert message in error
