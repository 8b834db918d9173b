"""Own images: a batch that fits few of them, a share held out, no network, and what the first line says of it."""

import engine
from engine.arguments import DataArgs, LabelArgs, fitting_batch, name_of_data, parse
from engine.errors import UserError
from engine.sources import held_out_rows, is_held_out, open_labelled, open_source
from engine.stream import Stream, one_pass

import importlib
import json
import re
import shutil
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch
from images import CLASSES, Numbers, noise_png, png, write_folder, write_parquet, write_squares, write_tars
from launch import ROOT, log_of, refused
from PIL import Image as Pillow

import finetune
import probe
import train
from cae import CAE, CAEConfig
from convert import load_model, load_official

IMAGES = 60


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same sixty images in every form that a data set may have."""
    root = tmp_path_factory.mktemp("forms")
    write_folder(root / "classes", IMAGES)
    (root / "flat").mkdir()
    for number in range(IMAGES):
        (root / "flat" / f"photo {IMAGES - number}.png").write_bytes(png(number))
    write_parquet(root / "parquet", (25, 35), group=10)
    write_tars(root / "tar", (20, 20, 20))
    return root


FORMS = ["classes", "flat", "parquet", "tar", "parquet --streaming", "tar --streaming"]


def data_of(forms, form, **values):
    form, _, streaming = form.partition(" ")
    return DataArgs(dataset=str(forms / form), streaming=bool(streaming), workers=0, batch_size=7, parts=1, **values)


def numbers(source):
    return sorted(int(n) for chunk in one_pass(source, Numbers(), 7, 0) for n in chunk["numbers"])


# ------------------------------------------------------------------------------------------------------ --val-fraction


@pytest.mark.parametrize("form", FORMS)
def test_the_same_images_are_held_out_in_every_form(forms, form):
    """By their bytes alone: what one holds out is what all hold out, and nothing else is missing or seen twice."""
    expected = [n for n in range(IMAGES) if is_held_out(png(n), 0.25)]
    assert 5 < len(expected) < 30
    data = data_of(forms, form, val_fraction=0.25)
    assert numbers(open_source(data, held_out=True)) == expected
    rest = open_source(data)
    assert numbers(rest) == sorted(set(range(IMAGES)) - set(expected))
    assert rest.num_images == (45 if "streaming" in form else IMAGES - len(expected)), "of a stream as expected"


@pytest.mark.parametrize("form", ["classes", "parquet --streaming", "tar --streaming"])
def test_what_is_held_out_is_never_trained_on(forms, form):
    """Two passes of two processes; and a stream goes on from anywhere, whatever was passed over."""
    data = data_of(forms, form, val_fraction=0.25)
    held_out = {n for n in range(IMAGES) if is_held_out(png(n), 0.25)}
    data.parts, seen = 2, {}
    for rank in range(2):
        stream = Stream(open_source(data, 2), Numbers(), data, 3, rank, 2)
        batches, states = [], []
        for _ in range(16):
            states.append(json.loads(json.dumps(stream.state_dict())))
            batches.append(next(stream))
        again = Stream(open_source(data, 2), Numbers(), data, 3, rank, 2, states[5])
        assert [next(again)["numbers"].tolist() for _ in range(5)] == [b["numbers"].tolist() for b in batches[5:10]]
        for batch in batches:
            for (epoch, _), number in zip(batch["ids"].tolist(), batch["numbers"].tolist(), strict=True):
                seen.setdefault(epoch, []).append(number)
    for epoch in (0, 1):
        assert sorted(seen[epoch]) == sorted(set(range(IMAGES)) - held_out)


def test_a_larger_fraction_holds_out_more_of_the_same():
    share = {f: {n for n in range(4000) if is_held_out(b"%d" % n, f)} for f in (0.1, 0.2, 0.5)}
    assert share[0.1] < share[0.2] < share[0.5]
    for fraction, held_out in share.items():
        assert len(held_out) == pytest.approx(4000 * fraction, abs=4 * (4000 * fraction * (1 - fraction)) ** 0.5)


def test_copies_of_an_image_stay_together(tmp_path):
    """Under any name and in any class, so that no image to evaluate on has been seen."""
    for i in range(20):
        for copy in ("a", "b"):
            (tmp_path / copy).mkdir(exist_ok=True)
            (tmp_path / copy / f"{i}.png").write_bytes(png(i))
    held_out = numbers(open_source(DataArgs(dataset=str(tmp_path), val_fraction=0.3), held_out=True))
    assert held_out and all(held_out.count(n) == 2 for n in held_out)


def test_a_file_that_cannot_be_read_stays_with_those_to_learn_from(tmp_path):
    """Where it is counted and named."""
    rows = [{"bytes": None, "path": str(tmp_path / "gone.png")}, None, {"bytes": b"", "path": None}]
    rows += [{"bytes": png(n), "path": None} for n in range(20)]
    answers = held_out_rows({"image": rows}, "image", 0.25)["held_out"]
    assert answers[:2] == [False, False] and answers[3:] == [is_held_out(png(n), 0.25) for n in range(20)]


def test_the_split_to_evaluate_on(forms):
    def opened(labels=None, **values):
        return open_labelled(data_of(forms, "classes", **values), labels or LabelArgs())

    labels = LabelArgs()
    learn, val = opened(labels, val_fraction=0.25)
    assert labels.val_split == "0.25 of train" and learn.classes == val.classes == ["even", "odd"]
    assert learn.num_images + val.num_images == IMAGES
    with pytest.raises(UserError, match=r"no split to evaluate on: it has train; pass --val-fraction 0.1, which holds"):
        opened()
    with pytest.raises(UserError, match=r"--val-split train is the split to learn from, .* pass --val-fraction 0.1"):
        opened(LabelArgs(val_split="train"))
    with pytest.raises(UserError, match="--val-fraction and --val-split are both given"):
        opened(LabelArgs(val_split="test"), val_fraction=0.25)
    for fraction, words in ((1e-6, "holds out none of the 60 images: use a larger"), (0.9999, "all of the 60 images")):
        with pytest.raises(UserError, match=words):
            opened(val_fraction=fraction)
    # to look at what was learned from is no mistake where nothing is learned
    nothing, val = open_labelled(data_of(forms, "classes"), LabelArgs(val_split="train"), learn=False)
    assert nothing is None and val.num_images == IMAGES


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1"])
def test_a_fraction_lies_between_0_and_1(monkeypatch, capsys, tmp_path, value):
    error = refused(monkeypatch, capsys, train, "--dataset", "demo", "--val-fraction", value, run_dir=tmp_path / "run")
    assert f"--val-fraction is {float(value)}: it must lie between 0 and 1" in error


# ------------------------------------------------------------------------------------------------------- a small batch


@pytest.mark.parametrize(("recipe", "images", "expected"), [
    (2048, 1_281_167, 2048), (2048, 16384, 2048), (2048, 16383, 1024), (2048, 1020, 64), (2048, 300, 32), (2048, 8, 32),
    (2048, None, 2048), (64, 300, 32), (32, 8, 32), (16, 8, 16), (4096, 100_000, 4096),
])  # fmt: skip
def test_a_batch_that_fits(recipe, images, expected):
    assert fitting_batch(recipe, images) == expected


def resolved(tmp_path, *flags, images, world=1):
    flags = ["--dataset", str(tmp_path), "--size", "tiny", "--run-dir", str(tmp_path / "run"), *flags]
    return train.resolve(parse(train.Args, flags), world, images)


def test_what_was_given_is_never_changed(tmp_path):
    for flags in (["--effective-batch-size", "2048"], ["--effective-batch-size", "96", "--batch-size", "32"]):
        data = resolved(tmp_path, *flags, images=300).data
        assert data.effective_batch_size == int(flags[1]) and data.batch_note == ""
    data = resolved(tmp_path, "--batch-size", "24", images=300).data
    assert (data.batch_size, data.effective_batch_size) == (24, 24), "as near as it comes to 32"
    data = resolved(tmp_path, images=300, world=4).data
    assert (data.batch_size, data.effective_batch_size) == (8, 32)
    assert data.batch_note == "the recipe's 2048 would be too many for 300 images"
    assert resolved(tmp_path, images=20_000).data.batch_note == ""


@pytest.mark.parametrize(("size", "flags", "images", "batch", "peak"), [
    ("tiny", "", 8 * 1024, 1024, 4e-3),
    ("tiny", "", 8 * 1024 - 1, 512, 4e-3),
    ("tiny", "", 300, 32, 4e-3),
    ("tiny", "--effective-batch-size 64", 300, 64, 4e-3),
    ("tiny", "--effective-batch-size 2048", 300, 2048, 8e-3),
    ("tiny", "--effective-batch-size 64", 8 * 1024, 64, 4e-3 / 16),
    ("tiny", "--lr 4e-3", 300, 32, 4e-3 / 32),
    ("nano", "", 300, 32, 4e-2 / 32),
])  # fmt: skip
def test_fine_tuning_keeps_its_peak_where_data_are_few(size, flags, images, batch, peak):
    """Unless --lr is given, which is per 1024 images as ever."""
    origin = finetune.of_cae(CAE(CAEConfig.from_size(size)), "here")
    asked = parse(finetune.Classify, ["--checkpoint", "x", "--run-dir", "x", *flags.split()])
    args = finetune.resolve(asked, origin, 1, images)
    assert args.data.effective_batch_size == batch
    assert args.recipe.lr * batch / 1024 == pytest.approx(peak)


def begun(folder, **args):
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text(json.dumps({"args": args, "model": {}}))
    (folder / "run" / "log.jsonl").touch()


def test_a_run_that_goes_on_keeps_its_batch_and_says_so(tmp_path):
    begun(tmp_path, batch_size=256, effective_batch_size=2048, parts=1)
    data = resolved(tmp_path, images=300).data
    assert (data.batch_size, data.effective_batch_size) == (256, 2048)
    assert data.batch_note == f"as the run in {tmp_path / 'run'} began"
    (tmp_path / "run" / "config.json").write_text(json.dumps({"args": {"batch_size": 8}, "model": {}}))
    data = resolved(tmp_path, images=300).data
    assert (data.batch_size, data.effective_batch_size) == (8, 32), "of one process's batch, too"
    assert data.batch_note == f"as the run in {tmp_path / 'run'} began"


def test_a_batch_that_nobody_gave_is_not_held_against_a_flag(tmp_path):
    begun(tmp_path, batch_size=256, effective_batch_size=2048, parts=1)
    data = resolved(tmp_path, "--effective-batch-size", "64", images=300).data
    assert (data.batch_size, data.effective_batch_size, data.batch_note) == (64, 64, "")


@pytest.fixture
def photos(tmp_path):
    """Noise, without labels."""
    (tmp_path / "my photos").mkdir()
    for number in range(70):
        (tmp_path / "my photos" / f"{number}.png").write_bytes(noise_png(number, (40 + number % 9, 36)))
    return tmp_path / "my photos"


PIXELS = ["--method", "cae", "--target", "pixels", "--size", "nano", "--workers", "0", "--image-size", "16"]


def test_own_images_without_labels(photos, tmp_path, monkeypatch, capsys):
    """The header tells what was chosen and why; the run is named after the data; the learning rate is the recipe's for
    this batch."""
    monkeypatch.chdir(tmp_path)
    train.train(parse(train.Args, ["--dataset", str(photos), *PIXELS, "--steps", "3", "--log-every", "1"]))
    output = capsys.readouterr().out
    assert "(the recipe's 64 would be too many for 70 images)" in output and ", 16 pixels; " in output
    folder = tmp_path / "runs" / "cae-nano-my-photos"
    args = json.loads((folder / "config.json").read_text())["args"]
    assert args["effective_batch_size"] == 32 and "batch_note" not in args
    assert log_of(folder)[0]["lr"] == pytest.approx(args["lr"] * 32 / 2048)


def test_a_folder_may_be_called_like_a_reader(forms, monkeypatch):
    """datasets would take "parquet" for one."""
    monkeypatch.chdir(forms)
    assert open_source(DataArgs(dataset="parquet")).num_images == IMAGES


def test_a_run_is_named_after_its_data():
    names = {"ILSVRC/imagenet-1k": "imagenet-1k", "/data/my photos/": "my-photos", "a/photos.parquet": "photos",
             "demo": "demo", "/": "data"}  # fmt: skip
    assert {dataset: name_of_data(dataset) for dataset in names} == names
    assert train.resolve(parse(train.Args, [])).run.run_dir == "runs/cae-v2-base", "the main command's, as ever"
    assert train.resolve(parse(train.Args, ["--dataset", "demo"])).run.run_dir == "runs/cae-v2-nano-demo"


def test_the_header_tells_what_the_teacher_sees(photos, tmp_path, capsys):
    """Patches of 8 pixels for the student, of 4 for the teacher."""
    train.train(parse(train.Args, ["--dataset", str(photos), "--size", "nano", "--teacher", "demo/clip_teacher",
                                   "--image-size", "64", "--patch-size", "8", "--steps", "1", "--workers", "0",
                                   "--run-dir", str(tmp_path / "run")]))  # fmt: skip
    assert "16 of 64 patches masked, 64 pixels (32 for the teacher); " in capsys.readouterr().out


def test_pretrained_probed_and_tuned_on_what_was_not_held_out(tmp_path, monkeypatch, capsys):
    """A data set without a validation split through all scripts; an encoder that has seen the images is told apart."""
    photos = write_squares(tmp_path / "squares", train=range(140))
    common = ["--dataset", str(photos), "--val-fraction", "0.25"]
    for folder, flags in (("mine", common), ("all", common[:2])):
        train.train(parse(train.Args, [*flags, *PIXELS, "--steps", "2", "--run-dir", str(tmp_path / folder)]))
    rows = (row["image"]["bytes"] for row in open_source(DataArgs(dataset=str(photos))).data)
    held_out = sum(is_held_out(data, 0.25) for data in rows)
    capsys.readouterr()
    commands = [(probe, "knn"), (probe, "linear --epochs 2"), (finetune, "classify --epochs 1")]
    for module, command in ((module, command.split()) for module, command in commands):
        for folder in ("mine", "all"):
            run_dir = tmp_path / f"{command[0]}-{folder}"
            flags = [*command, *common, "--checkpoint", tmp_path / folder]
            monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags), "--workers", "0", "--run-dir",
                                              str(run_dir)])  # fmt: skip
            module.main()
            captured = capsys.readouterr()
            result = json.loads((run_dir / "result.json").read_text())
            assert result["images"] == held_out and result["val_split"] == "0.25 of train"
            assert ("has learned from the images that are held out here" in captured.err) == (folder == "all")
    assert result["classes"] == len(CLASSES)


def test_an_untrained_encoder_of_the_shape_of_a_run(tmp_path, monkeypatch, capsys):
    """The baseline of a run with patches of its own; and a run that is not there is not looked for on the Hub."""
    CAE(CAEConfig.from_size("nano", image_size=16, patch_size=8)).save_pretrained(tmp_path / "runs" / "mine" / "model")
    monkeypatch.chdir(tmp_path)
    encoder = probe.load_encoder(probe.EncoderArgs(random_init="runs/mine"), seed=1)
    assert (encoder.patch_size, encoder.image_size) == (8, 16)
    trained, again = load_model("runs/mine").encoder, probe.load_encoder(probe.EncoderArgs(random_init="runs/mine"), 1)
    weights = encoder.model.encoder.patch_embed.weight
    assert not torch.equal(weights, trained.patch_embed.weight)
    assert torch.equal(weights, again.model.encoder.patch_embed.weight)
    common = ["knn", "--dataset", "demo"]
    error = refused(monkeypatch, capsys, probe, *common, "--random-init", "mine", run_dir=tmp_path / "a")
    assert "--random-init mine does not exist: nano, tiny, small, base, large, huge, or a run folder" in error
    error = refused(monkeypatch, capsys, probe, *common, "--checkpoint", "runs/mien", run_dir=tmp_path / "a")
    assert "--checkpoint runs/mien does not exist; in runs/ there is mine" in error


def test_readme_leads_from_a_jpeg_to_features(tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"## From a JPEG to features\n+```python\n(.*?)```", readme, re.S).group(1)
    CAE(CAEConfig.from_size("nano", image_size=32, patch_size=8)).save_pretrained(tmp_path / "runs" / "mine" / "model")
    Pillow.new("RGB", (90, 50), "red").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.endswith("torch.Size([1, 17, 96])\n")


# ------------------------------------------------------------------------------------------------- without the network


@pytest.fixture
def no_network(monkeypatch):
    """The Hub's name cannot be resolved; a list of who asked for it. What the process finds out is forgotten after."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    network, asked = importlib.import_module("engine.network"), []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise HTTPError("[Errno -2] Name or service not known")

    monkeypatch.setattr(network, "hub_answers", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "get_session", Session)
    monkeypatch.setattr(network, "HUB_PAUSES", (0, 0, 0))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    return asked


def test_without_the_hub_one_line_names_the_ways_out(no_network, photos, tmp_path, monkeypatch, capsys):
    away = r"the Hub cannot be reached \(https://huggingface.co does not answer: .*Name or service not known\)"
    error = refused(monkeypatch, capsys, train, run_dir=tmp_path / "run")
    assert re.search(rf"data set ILSVRC/imagenet-1k is no local folder, and {away}: pass a folder, Parquet or tar of "
                     "your own, or --dataset demo", error)  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset", str(photos), "--run-dir", str(tmp_path / "own")])
    with pytest.raises(SystemExit) as stop:
        train.main()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert re.search(rf"--teacher openai/clip-vit-base-patch16 is no local folder .*{away}: pass a folder, or --method "
                     "cae --target pixels, which needs none, or --dataset demo", error)  # fmt: skip
    flags = ["knn", "--checkpoint", "openai/clip-vit-base-patch16", "--dataset", "demo"]
    error = refused(monkeypatch, capsys, probe, *flags, run_dir=tmp_path / "knn")
    assert re.search("--checkpoint openai/clip-vit-base-patch16 .*Name or service not known", error)
    assert len(no_network) == 3 and no_network[0][1] <= 5, "asked by the first of them, for five seconds each"
    from huggingface_hub import is_offline_mode

    assert is_offline_mode() and datasets.config.HF_HUB_OFFLINE, "nor do libraries ask"


def test_what_lies_in_the_cache_needs_no_hub(no_network, tmp_path, monkeypatch):
    """The teacher of an earlier run, found without asking for it again."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--me--teacher" / "snapshots" / ("0" * 40)
    shutil.copytree(engine.arguments.DEMO / "clip_teacher", snapshot)
    (tmp_path / "models--me--teacher" / "refs").mkdir()
    (tmp_path / "models--me--teacher" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    args = parse(train.Args, ["--teacher", "me/teacher", "--size", "nano"]).target
    assert train.CLIPTeacher(args, 4).target_dim == 64
    assert len(no_network) == 3


def test_a_hub_that_answers_late_is_there(no_network, monkeypatch):
    """The second time, and with an error of its own; then it is not asked again."""
    from huggingface_hub import is_offline_mode

    network, answers = importlib.import_module("engine.network"), []
    refuse = network.get_session().head

    def head(url, timeout):
        answers.append("503" if no_network else refuse(url, timeout))

    monkeypatch.setattr(network, "get_session", lambda: SimpleNamespace(head=head))
    assert network.hub_problem() is None and network.hub_problem() is None
    assert len(no_network) == 1 and answers == ["503"] and not is_offline_mode()


def test_where_released_weights_are_to_be_had():
    for load in (load_official, load_model):
        with pytest.raises(FileNotFoundError, match=r"https://github.com/Atten4Vis/CAE.*xbsu/LW-DETR::pretrain_weights"):
            load("cae_base.pth")


def test_processes_for_gpus_that_are_not_there(monkeypatch, capsys, tmp_path):
    """accelerate launch --multi_gpu starts two, of which each believes to be alone."""
    monkeypatch.setattr(engine.run, "world_size", lambda: 2)
    error = refused(monkeypatch, capsys, train, "--dataset", "demo", "--steps", 1, run_dir=tmp_path / "run")
    assert "2 processes were launched for GPUs, and no GPU was found" in error
    assert "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train.py" in error


# -------------------------------------------------------------------------------------- the paper's sets, as imitations


def test_one_domain_of_several(tmp_path, monkeypatch):
    """The lines of docs/data.md on Parquet as DomainNet's: its images alone, bytes and labels as they were."""
    (code,) = re.findall(r"```python\n(from datasets .*?DomainNet.*?)```", (ROOT / "docs/data.md").read_text(), re.S)
    names = ["clipart", "infograph", "painting", "quickdraw", "real", "sketch"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]),
                                  "domain": datasets.ClassLabel(names=names)})  # fmt: skip
    for split, count in (("train", 36), ("test", 12)):
        rows = {"image": [{"bytes": png(n), "path": None} for n in range(count)],
                "label": [n // 6 % 2 for n in range(count)], "domain": [n % 6 for n in range(count)]}  # fmt: skip
        (tmp_path / "all").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "all" / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    exec(code.replace("wltjr1007/DomainNet", "all"), {})
    train_source, val_source = open_labelled(DataArgs(dataset="clipart", workers=0), LabelArgs())
    assert numbers(train_source) == [0, 6, 12, 18, 24, 30] and numbers(val_source) == [0, 6]
    assert train_source.classes == ["cat", "dog"]
    assert [train_source.label(row) for row in train_source.data] == [0, 1] * 3


def test_food_101_and_the_folders_of_cmplaces(tmp_path):
    """A train and a validation split with class names; folders of classes, of which a part is held out."""
    for split, count, first in (("train", 20, 0), ("validation", 8, 20)):
        write_parquet(tmp_path / "food101", (count,), first=first, split=split, names=("apple pie", "waffles"))
    train_source, val_source = open_labelled(DataArgs(dataset=str(tmp_path / "food101"), workers=0), LabelArgs())
    assert train_source.classes == ["apple pie", "waffles"] and len(numbers(train_source)) == 20
    assert numbers(val_source) == list(range(20, 28))
    write_folder(tmp_path / "clipart", 40)
    data = DataArgs(dataset=str(tmp_path / "clipart"), val_fraction=0.25, workers=0)
    learned, held_out = map(numbers, open_labelled(data, LabelArgs()))
    assert sorted(learned + held_out) == list(range(40)) and 3 <= len(held_out) <= 17
