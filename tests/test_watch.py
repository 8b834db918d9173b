"""Is it learning? kNN while train.py trains: what it counts, on which images, and that it changes nothing else."""

import engine.errors
import engine.images
import engine.watching
from engine.arguments import DataArgs, WatchArgs, parse
from engine.errors import UserError, stop_workers
from engine.run import Length
from engine.sources import open_source
from engine.stream import one_pass
from engine.watching import K, KNNProbe, chosen, leave_one_out, open_labelled_part

import dataclasses
import math
import shutil
from collections import Counter

import datasets
import pytest
import torch
from images import Numbers, noise_png, write_folder, write_parquet, write_tars
from launch import ROOT, launch, log_of, refused, succeeded
from safetensors.torch import load_file

import train
from cae import CAE

# Random access and one micro-batch, so that two processes share the very images of one.
FLAGS = ["--dataset", "demo", "--no-streaming", "--workers", "0", "--batch-size", "16", "--effective-batch-size", "16",
         "--log-every", "1", "--steps", "6", "--drop-path", "0.2"]  # fmt: skip
OFTEN = ["--probe-every", "0.01", *FLAGS]  # 60 images: after steps 4 and 6


@pytest.fixture(autouse=True)
def larger_samples(monkeypatch):
    """As in a longer run: two images for each that is trained on in between."""
    monkeypatch.setattr(engine.watching, "SHARE", 2)


def run(run_dir, *flags):
    """train.py in this process."""
    try:
        train.train(parse(train.Args, [*flags, "--run-dir", str(run_dir)]))
    finally:
        stop_workers()


class Alone:
    """An Accelerator of one process."""

    @staticmethod
    def reduce(x, how):
        return x


# What is counted.


def slow_top1(bank, labels, k):
    """One image after the other, in float64; votes that are equal are judged by the smaller label."""
    right = 0
    bank = torch.nn.functional.normalize(bank.double(), dim=1)
    for i, query in enumerate(bank):
        others, scores = [j for j in range(len(bank)) if j != i], Counter()
        for cosine, label in sorted([(float(query @ bank[j]), int(labels[j])) for j in others], reverse=True)[:k]:
            scores[label] += math.exp(cosine / 0.07)
        right += max(scores, key=lambda label: (scores[label], -label)) == int(labels[i])
    return 100 * right / len(bank)


@pytest.mark.parametrize("n", [2, 3, 20, 21, 22, 150])
def test_each_image_is_judged_by_its_nearest_of_the_others(seeded, n):
    bank, labels = torch.randn(n, 3), torch.randint(4, (n,))
    assert leave_one_out(Alone, bank, labels, torch.arange(n)) == pytest.approx(slow_top1(bank, labels, K))


@pytest.mark.parametrize("k", [1, 5])
def test_no_image_is_its_own_neighbour(seeded, k):
    """Pairs of copies with different labels: each image is taken for the other, never for itself."""
    bank = torch.randn(12, 8).repeat_interleave(2, dim=0)
    labels = torch.arange(24)
    assert leave_one_out(Alone, bank, labels, torch.arange(24), k) == 0.0
    assert leave_one_out(Alone, bank, labels // 2, torch.arange(24), k) == 100.0


def test_more_copies_than_neighbours(seeded):
    """Of forty copies the image itself may not be among the first 21: one of the others goes, and none counts twice."""
    bank, labels = torch.ones(40, 4), torch.arange(40) % 2
    labels[:3] = 0
    found = leave_one_out(Alone, bank, labels, torch.arange(40), 39)
    assert found == pytest.approx(52.5)  # each sees 39 others, 20 or 21 of which are 0: those 21 are right
    assert 0 <= leave_one_out(Alone, bank, labels, torch.arange(40)) <= 100


def test_the_rows_of_each_process_add_up(seeded):
    bank, labels = torch.randn(50, 3), torch.randint(3, (50,))
    whole = leave_one_out(Alone, bank, labels, torch.arange(50))
    parts = [leave_one_out(Alone, bank, labels, torch.arange(rank, 50, 3)) for rank in range(3)]
    assert sum(parts) == pytest.approx(whole)


# On which images.


def sample(source, wanted, world=1):
    """Numbers of the chosen images, as the parts of so many ranks see them together."""
    source = chosen(source, wanted)
    chunks = [chunk for rank in range(world) for chunk in one_pass(source, Numbers(), 7, 0, rank, world)]
    return sorted(int(n) for chunk in chunks for n in chunk["numbers"])


def part_of(folder, probe=None, streaming=False, **values):
    data = DataArgs(dataset=str(folder), streaming=streaming, workers=0, batch_size=7, parts=1, **values)
    return open_labelled_part(probe or WatchArgs(), data, open_source(data))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_sample_is_even_and_fixed(tmp_path, streaming, monkeypatch):
    write_parquet(tmp_path, [100, 100, 100], group=50)
    source, what = part_of(tmp_path, streaming=streaming)
    assert what == "split train, whose labels are not learned"
    found = sample(source, 60)
    assert found == sample(source, 60, world=2) == sample(source, 60, world=4) and set(found) <= set(sample(source, 90))
    assert len(found) == 60 if not streaming else 40 <= len(found) <= 80
    assert all(12 <= count <= 30 for count in Counter(n // 100 for n in found).values()), "of every shard"
    assert sample(source, 10**6) == list(range(300))
    if streaming:  # of many images not all are read, but some shards
        monkeypatch.setattr(engine.watching, "READ", 100)
        shards = Counter(n // 50 for n in sample(source, 60))
        assert len(shards) == 2 and 40 <= sum(shards.values()) <= 80
        assert sample(source, 60) == sample(source, 60, world=3)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_held_out_is_the_split(tmp_path, streaming):
    write_parquet(tmp_path, [200, 200])
    data = dict(streaming=streaming, val_fraction=0.3)
    source, what = part_of(tmp_path, **data)
    assert what == "0.3 of train"
    held_out = sample(source, 10**6)
    assert 80 < len(held_out) < 160 and set(sample(source, 50)) < set(held_out)
    args = DataArgs(dataset=str(tmp_path), workers=0, batch_size=7, parts=1, **data)
    learned = [int(n) for chunk in one_pass(open_source(args), Numbers(), 7, 0) for n in chunk["numbers"]]
    assert not set(learned) & set(held_out) and len(learned) + len(held_out) == 400


def test_splits_that_are_found_and_asked_for(tmp_path):
    for split, first in (("train", 0), ("validation", 20), ("test", 40)):
        write_parquet(tmp_path, [20], first=first, split=split)
    assert sample(part_of(tmp_path)[0], 100) == list(range(20, 40))
    source, what = part_of(tmp_path, WatchArgs(probe_split="test"))
    assert sample(source, 100) == list(range(40, 60)) and what == "split test"
    assert sample(part_of(tmp_path, WatchArgs(probe_split="train"), val_fraction=0.2)[0], 100) == list(range(20))
    with pytest.raises(UserError, match=r"--probe-split another cannot be used: .* has no split 'another'"):
        part_of(tmp_path, WatchArgs(probe_split="another"))
    assert part_of(tmp_path, WatchArgs(probe_every=0.0, probe_split="another")) == (None, "")


def test_images_without_a_label_are_passed_over(tmp_path):
    """None and -1, of which many data sets have more than bad files may be."""
    write_parquet(tmp_path / "none", [40], labels="numbers", missing=range(0, 40, 4))
    assert len(sample(part_of(tmp_path / "none")[0], 100)) == 30
    write_parquet(tmp_path / "minus", [40], labels="numbers", offset=-1)
    assert sample(part_of(tmp_path / "minus")[0], 100) == list(range(1, 40, 2))


@pytest.mark.parametrize(("labels", "flags"), [("words", False), ("numbers", True), ("names", True)])
def test_labels_of_every_kind_are_told_apart(tmp_path, labels, flags):
    source = part_of(write_parquet(tmp_path, [30], labels=labels), streaming=flags)[0]
    chunks = list(one_pass(chosen(source, 100), Numbers(), 7, 0))
    pairs = {(int(n) % 2, int(y)) for chunk in chunks for n, y in zip(chunk["numbers"], chunk["labels"], strict=True)}
    assert len(pairs) == 2 and len({y for _, y in pairs}) == 2


def test_tars_need_not_name_their_classes(tmp_path):
    source, _ = part_of(write_tars(tmp_path, (20, 20)), streaming=True)
    assert {int(y) for chunk in one_pass(source, Numbers(), 7, 0) for y in chunk["labels"]} == {0, 1}


def test_why_there_are_none(tmp_path):
    write_parquet(tmp_path / "unlabelled", [8], labels=None)
    source, why = part_of(tmp_path / "unlabelled")
    assert source is None and why.endswith("unlabelled has no labels")
    heights = datasets.Dataset.from_dict({"image": [{"bytes": noise_png(0), "path": None}] * 8, "label": [0.5] * 8})
    (tmp_path / "heights").mkdir()
    heights.cast_column("image", datasets.Image()).to_parquet(tmp_path / "heights" / "train.parquet")
    assert "holds no class labels but Value('float64')" in part_of(tmp_path / "heights")[1]


# When.


@pytest.mark.parametrize(("every", "length", "when", "steps"), [
    (None, Length(940, 94.0), "every epoch", 94), (None, Length(9400, 94.0), "every 2 epochs", 188),
    (0.5, Length(940, 94.0), "every 0.5 epochs", 47), (None, Length(50, 94.0), "at the end", 50),
    (None, Length(10**4, None), "every 200 steps", 200), (None, Length(300, None), "every 50 steps", 50),
    (None, Length(300, 9.0), "every 6 epochs", 54), (None, Length(3, None), "at the end", 3),
])  # fmt: skip
def test_when_a_probe_is_due(every, length, when, steps, monkeypatch):
    """At 64 images a step."""
    probe = object.__new__(KNNProbe)
    probe.steps = None
    monkeypatch.setattr(engine.watching, "SHARE", 1 / 32)
    assert probe.plan(every, length, 64) == when and probe.steps_between == steps


def test_epochs_of_unknown_length(tmp_path):
    data = DataArgs(dataset=str(write_parquet(tmp_path, [8])), workers=0)
    source = dataclasses.replace(open_source(data), num_images=None)
    with pytest.raises(UserError, match="is unknown: --probe-every needs --num-images"):
        open_labelled_part(WatchArgs(probe_every=2.0), data, source)
    assert open_labelled_part(WatchArgs(), data, source)[0].num_images is None


# In a run.


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Six steps, with probes after the fourth and the last."""
    folder = tmp_path_factory.mktemp("runs") / "probed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.watching, "SHARE", 2)
        run(folder, *OFTEN, "--checkpoint-every", "3")
    return folder


def test_a_run_is_the_same_with_and_without(probed, tmp_path, capsys):
    """To the last bit, but for what is new."""
    run(tmp_path / "without", *FLAGS, "--probe-every", "0")
    assert "kNN" not in "".join(capsys.readouterr())
    lines, others = log_of(probed), log_of(tmp_path / "without")
    assert [line["step"] for line in lines if "knn_top1" in line] == [4, 6]
    assert not any("knn_top1" in line for line in others)
    new = {"knn_top1", "images_per_second", "data_wait"}
    assert [{k: v for k, v in line.items() if k not in new} for line in lines] == [
        {k: v for k, v in line.items() if k not in new} for line in others]  # fmt: skip
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (probed, tmp_path / "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_run_logs_the_same_figures(probed, tmp_path, capsys):
    shutil.copytree(probed, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000006")
    run(tmp_path / "resumed", *OFTEN, "--checkpoint-every", "3")
    assert "continuing from" in capsys.readouterr().out
    figures = [[line.get("knn_top1") for line in log_of(path)] for path in (probed, tmp_path / "resumed")]
    assert figures[0] == figures[1]
    run(tmp_path / "resumed", *OFTEN, "--checkpoint-every", "3")
    assert "kNN" not in capsys.readouterr().out, "nothing is read for a run that is complete"


def test_the_figure_is_that_of_the_model_in_its_folder(probed):
    """Images read by themselves, features in evaluation mode, no autocast: the last line again."""
    model = CAE.from_pretrained(probed / "model").eval()
    source, what = part_of("demo")
    assert what == "split test"
    view = engine.images.CenterCrop(28, 1.0)
    chunks = [c for c in one_pass(chosen(source, math.ceil(2 * 60)), view, 50, 0) if len(c["ids"])]
    images, labels = (torch.cat([chunk[name] for chunk in chunks]) for name in ("images", "labels"))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (train.IMAGENET_MEAN, train.IMAGENET_STD))
    with torch.no_grad():
        features = model.encode((images / 255 - mean) / std)[:, 0]
    expected = slow_top1(features, labels, 20)
    assert log_of(probed)[-1]["knn_top1"] == pytest.approx(expected, abs=100 / len(images) + 1e-3)


def test_two_processes_log_what_one_does(tmp_path):
    """At a learning rate of next to nothing, so that their weights do not drift apart by rounding."""
    script = tmp_path / "train_a_little.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport engine.watching, train\n"
                      "engine.watching.SHARE = 2\ntrain.main()\n")  # fmt: skip
    flags = [*FLAGS, "--lr", "1e-9", "--min-lr", "0", "--drop-path", "0", "--val-fraction", "0.01", "--batch-size", "8",
             "--steps", "2"]  # fmt: skip
    processes = [succeeded(launch(script, *flags, "--run-dir", tmp_path / str(n), processes=n, warm=True))
                 for n in (1, 2)]  # fmt: skip
    (first,), (second,) = ([line["knn_top1"] for line in log_of(tmp_path / n) if "knn_top1" in line] for n in "12")
    assert first == second and 0 < first < 100
    lines = [next(line for line in p.stdout.splitlines() if line.startswith("kNN")) for p in processes]
    assert lines[0] == lines[1] and lines[0].endswith(" images of 0.01 of train, each by its nearest of the others")


def test_without_labels_a_run_goes_on(tmp_path, capsys):
    """And says so, in one line, unless nobody asked."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(noise_png(number))
    flags = ["--dataset", str(folder), "--size", "nano", "--method", "cae", "--target", "pixels", "--workers", "0",
             "--steps", "1"]  # fmt: skip
    run(tmp_path / "run", *flags)
    told = [line for line in capsys.readouterr().err.splitlines() if "kNN" in line]
    assert told == [f"note: no kNN while it trains: data set {folder} has no labels; the run goes on without it "
                    "(--probe-every 0 does not try)"]  # fmt: skip
    run(tmp_path / "quiet", *flags, "--probe-every", "0")
    assert "kNN" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(("missing", "why"), [
    (None, "no two of 2 images have the same label"),
    (range(11), "there are not two images with a label"),
    (range(1, 12, 2), "all 6 images have the same label"),
])  # fmt: skip
def test_labels_that_tell_nothing(tmp_path, missing, why, capsys):
    if missing is None:
        write_folder(tmp_path / "data", 2)
    else:
        write_parquet(tmp_path / "data", [12], labels="numbers", missing=missing)
    flags = ["--dataset", str(tmp_path / "data"), "--size", "nano", "--method", "cae", "--target", "pixels",
             "--workers", "0", "--steps", "1", "--batch-size", "2", "--effective-batch-size", "2"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.watching, "SHARE", 50)
        run(tmp_path / "run", *flags)
    assert why in capsys.readouterr().err and "knn_top1" not in log_of(tmp_path / "run")[-1]


def test_a_sample_that_cannot_be_read_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise engine.errors.ServerGoneError("the server has been away for 30 minutes")

    monkeypatch.setattr(engine.watching, "read_images", fail)
    run(tmp_path / "run", *FLAGS, "--steps", "1")
    told = capsys.readouterr()
    assert "note: no kNN while it trains: the server has been away for 30 minutes; the run goes on" in told.err
    assert "done: " in told.out


def test_a_split_that_is_not_there(tmp_path, monkeypatch, capsys):
    told = refused(monkeypatch, capsys, train, *FLAGS, "--probe-split", "holdout", run_dir=tmp_path / "run")
    assert told.startswith("error: --probe-split holdout cannot be used: data set demo has no split 'holdout'")
    told = refused(monkeypatch, capsys, train, *FLAGS, "--probe-every", "-1", run_dir=tmp_path / "run")
    assert "--probe-every is -1.0: it must not be negative" in told


def test_the_bar_and_the_first_lines_tell(tmp_path, capsys):
    run(tmp_path / "run", *OFTEN)
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "kNN every 0.01 epochs: 120 images of split test, each by its nearest of the others"
    last = log_of(tmp_path / "run")[-1]["knn_top1"]
    assert any(f"kNN {last:.1f}" in line for line in out if line.startswith("step 6/6"))
