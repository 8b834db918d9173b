"""train.py as its users run it: real processes on the demo data, alone and in two, killed and resumed."""

from engine.arguments import parse
from engine.errors import UserError, stop_workers

import dataclasses
import json
import math
import os
import re
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hub import serve
from images import write_folder, write_parquet
from launch import launch, log_of, succeeded
from safetensors.torch import load_file

import train
from cae import CAE

SHORT = ["train.py", "--dataset", "demo", "--batch-size", "16", "--effective-batch-size", "16", "--log-every", "1"]
# random access, so that two processes share the very batches of one; no stochastic depth, which ranks draw apart
EXACT = [*SHORT, "--no-streaming", "--drop-path", "0", "--steps", "6"]


def run(run_dir, *flags, command=SHORT, **options):
    return succeeded(launch(*command, "--run-dir", run_dir, *flags, **options))


def run_here(run_dir, *flags, command=SHORT):
    """The same in this process, where a test is not about processes."""
    try:
        train.train(parse(train.Args, [*command[1:], "--run-dir", str(run_dir), *map(str, flags)]))
    finally:
        stop_workers()  # as the script does


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Eight steps without interruption, with a checkpoint half-way: streamed, two workers, stochastic depth."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = run(folder, *RESUMABLE)
    return folder, process


RESUMABLE = ["--steps", "8", "--checkpoint-every", "4", "--workers", "2", "--drop-path", "0.3"]


def test_a_run_leaves_what_it_promises(whole):
    folder, process = whole
    config = json.loads((folder / "config.json").read_text())
    assert set(config) == {"args", "model"}
    assert config["args"]["mask_ratio"] == 0.25
    assert config["model"] == dataclasses.asdict(CAE.from_pretrained(folder / "model").config)
    lines = log_of(folder)
    assert [line["step"] for line in lines] == list(range(1, 9))
    for line in lines:
        assert {"loss", "loss_cls", "loss_visible", "loss_masked", "lr", "weight_decay", "grad_norm",
                "images_per_second", "data_wait", "skipped", "epoch"} <= set(line)  # fmt: skip
        assert 0 <= line["data_wait"] <= 1 and line["skipped"] == 0
    assert lines[-1]["epoch"] == pytest.approx(8 * 16 / 6000, abs=1e-4)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_00000004", "step_00000008"]
    saved, checkpoint = (load_file(folder / p / "model.safetensors") for p in ("model", "checkpoints/step_00000008"))
    assert all(torch.equal(saved[k], checkpoint[k]) for k in saved)
    assert re.search(r"step 8/8  loss \d\.\d+  \d+ images/s  waiting for data \d+%", process.stdout)


def test_resume_equals_uninterrupted(whole, tmp_path, capsys):
    """The run that lost everything after its checkpoint ends with the same log and the same bits. (Two processes:
    tests/test_faults.py, killed.)"""
    reference = whole[0]
    folder = tmp_path / "resumed"
    os.system(f"cp -r {reference} {folder}")
    os.system(f"rm -r {folder}/checkpoints/step_00000008 {folder}/model")
    run_here(folder, *RESUMABLE)
    assert "continuing from" in capsys.readouterr().out
    for ours, theirs in zip(log_of(folder), log_of(reference), strict=True):
        for name in ("step", "epoch", "loss", "loss_cls", "loss_visible", "loss_masked", "lr", "grad_norm"):
            assert ours[name] == theirs[name], name
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder, reference))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    run_here(folder, *RESUMABLE)
    assert "is complete: 8 steps" in capsys.readouterr().out and len(log_of(folder)) == 8


def test_one_two_processes_and_accumulation_give_the_same_losses(tmp_path):
    """The same global batches, images and masks: losses and weights differ by rounding only."""
    for name, flags in (("one", []), ("accumulated", ["--batch-size", "8"])):
        run_here(tmp_path / name, *flags, command=EXACT)
    both = run(tmp_path / "both", "--batch-size", "4", command=EXACT, processes=2, warm=True)
    assert "2 processes x 4 images x 2 = 16 images a step" in both.stdout
    expected = log_of(tmp_path / "one")
    assert expected[0]["loss"] > expected[-1]["loss"]
    for other in ("accumulated", "both"):
        for a, b in zip(expected, log_of(tmp_path / other), strict=True):
            for name in ("loss", "loss_cls", "loss_visible", "loss_masked", "grad_norm"):
                assert abs(a[name] - b[name]) < 1e-5, (other, a["step"], name)


@pytest.mark.parametrize("flags", [
    ["--method", "cae"],
    ["--method", "cae", "--normalize-pixels", "--mask", "random", "--align-weight", "0", "--workers", "0"],
    ["--supervise", "visible", "--size", "tiny"],
    ["--supervise", "masked", "--precision", "bf16", "--tracker", "tensorboard"],
])  # fmt: skip
def test_every_method_trains(tmp_path, flags):
    processes = 2 if "visible" in flags else 1
    effective = str(16 * processes)
    more = ["--steps", "3", "--workers", "0", "--effective-batch-size", effective]
    if processes == 1:
        AcceleratorState._reset_state(True)  # which would keep the precision of another run in this process
        run_here(tmp_path, *flags, *more)
        AcceleratorState._reset_state(True)
    else:
        run(tmp_path, *flags, *more, processes=processes, warm=True)
    lines = log_of(tmp_path)
    parts = {"0": "reconstruct", "cae": "reconstruct align", "visible": "cls visible", "masked": "masked"}
    wanted = next(names.split() for word, names in parts.items() if word in flags)
    assert {name for name in lines[0] if name.startswith("loss_")} == {f"loss_{name}" for name in wanted}
    assert all(math.isfinite(value) for line in lines for name, value in line.items() if name != "seen")
    assert CAE.from_pretrained(tmp_path / "model").encode(torch.rand(1, 3, 28, 28)).shape[1] == 50
    if "tensorboard" in flags:
        assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(("method", "precision", "tolerance"), [("cae", "fp32", 1e-5), ("cae-v2", "bf16", 2e-2)])
def test_a_compiled_run_takes_the_same_steps(tmp_path, graphs, method, precision, tolerance):
    flags = ["--method", method, "--drop-path", "0", "--workers", "0", "--batch-size", "8", "--steps", "4"]
    AcceleratorState._reset_state(True)
    run_here(tmp_path / "eager", *flags, "--precision", precision)
    assert not graphs
    run_here(tmp_path / "compiled", *flags, "--precision", precision, "--compile")
    AcceleratorState._reset_state(True)
    assert graphs[0] == "CAE" and len(graphs) == (2 if method == "cae-v2" else 1)
    for a, b in zip(log_of(tmp_path / "eager"), log_of(tmp_path / "compiled"), strict=True):
        assert a["seen"] == b["seen"]
        assert all(abs(a[name] - b[name]) < tolerance for name in a if name.startswith(("loss", "grad")))


def test_a_tracker_that_cannot_start_is_told_in_one_line(tmp_path, monkeypatch):
    def no_login(*_, **__):
        raise RuntimeError("no API key\nsome advice")

    monkeypatch.setattr(Accelerator, "init_trackers", no_login)
    with pytest.raises(UserError, match=r"^--tracker tensorboard cannot be started: no API key; log in, or use"):
        run_here(tmp_path, "--tracker", "tensorboard", "--steps", "1", "--workers", "0")


def test_the_demo_learns(tmp_path):
    """The README's first command, cut short: its loss clearly falls."""
    succeeded(launch("train.py", "--dataset", "demo", "--steps", "60", "--run-dir", tmp_path, warm=True))
    first, _, last = log_of(tmp_path)
    assert first["step"] == 20 and last["loss"] < 0.8 * first["loss"]


def test_a_loss_that_stays_not_finite_stops_the_run(tmp_path, monkeypatch, capsys):
    """A learning rate that ruins the weights: no later step is finite, and no checkpoint holds them."""
    flags = ["--steps", "40", "--checkpoint-every", "2", "--log-every", "5", "--lr", "1e38", "--warmup-epochs", "0.01"]
    monkeypatch.setattr(sys, "argv", [*SHORT, "--run-dir", str(tmp_path), "--workers", "0", *flags])
    with pytest.raises(SystemExit) as stop:
        train.main()
    error = capsys.readouterr().err
    pattern = (r"error: loss or gradient was not finite in (\d+) steps in a row, up to step (\d+); the last good "
               r"checkpoint is (.*)")  # fmt: skip
    found = re.search(pattern, error)
    assert stop.value.code == 1 and found, error
    row, step = int(found.group(1)), int(found.group(2))
    assert row >= 10 and step < 20
    good = sorted((tmp_path / "checkpoints").iterdir())
    assert found.group(3) == (str(good[-1]) if good else "none: none was written yet")
    for checkpoint in good:
        assert int(checkpoint.name[5:]) <= step - row
        assert all(torch.isfinite(v).all() for v in load_file(checkpoint / "model.safetensors").values())


def test_a_sharded_model_takes_the_same_steps():
    process = succeeded(launch("tests/fsdp.py", processes=2, warm=True))
    assert process.stdout.count("sharded over 2 processes, each holds 50%: the losses of the whole model") == 2


def test_skipped_files_are_in_the_log(tmp_path, capfd):
    write_folder(tmp_path / "data", 300)
    (tmp_path / "data" / "even" / "000000.png").write_bytes(b"<html>gone</html>")
    flags = ["--dataset", tmp_path / "data", "--size", "nano", "--teacher", "demo/clip_teacher", "--epochs", "1"]
    run_here(tmp_path / "run", *flags, "--workers", "1")
    assert log_of(tmp_path / "run")[-1]["skipped"] == 1
    named = [name for line in log_of(tmp_path / "run") for name in line.get("skipped_files", [])]
    assert len(named) == 1 and "000000.png" in named[0]
    told = capfd.readouterr().err
    assert "skipped" in told and "000000.png" in told


@pytest.mark.parametrize(("flags", "processes"), [([], 2), (["--no-streaming"], 1)])
def test_a_data_set_of_the_hub(tmp_path, flags, processes):
    """Streamed over HTTP or downloaded, from a stand-in that knows the Hub's interface. (Tar shards, single files and
    all that a network does: tests/test_network.py.)"""
    write_parquet(tmp_path / "repo" / "data", (30, 30, 20, 10), group=10)
    card = "---\ndataset_info:\n  splits:\n  - name: train\n    num_examples: 90\n---\n"
    (tmp_path / "repo" / "README.md").write_text(card)
    with serve(tmp_path / "repo") as (environment, requests):
        train = ["--dataset", "some/pictures", "--size", "nano", "--teacher", "demo/clip_teacher", "--epochs", "1"]
        process = run(tmp_path / "run", *train, *flags, "--workers", "1", "--effective-batch-size", str(16 * processes),
                      processes=processes, HF_HOME=str(tmp_path / "cache"), **environment)  # fmt: skip
    last = log_of(tmp_path / "run")[-1]
    assert last["epoch"] >= 1 and last["skipped"] == 0
    assert last["step"] == math.ceil(90 / (16 * processes)) and "1." in process.stdout
    whole_files = [r for r in requests if r.startswith("GET") and "/data/train" in r and r.endswith(" ")]
    assert bool(whole_files) == ("--no-streaming" in flags), "a stream asks for ranges, a download for files"


def test_a_mistake_that_two_processes_see_is_told_once(tmp_path):
    flags = ["--effective-batch-size", "32", "--image-column", "photo"]
    process = launch(*SHORT, "--run-dir", tmp_path, *flags, processes=2)
    assert process.returncode != 0
    assert process.stderr.count("--image-column photo does not exist: the columns of demo are image, label") == 1
    assert "train.py" not in "".join(line for line in process.stderr.splitlines() if line.startswith("  File"))


def test_a_finished_run_can_be_taken_to_a_new_folder(whole, tmp_path, capsys):
    run_here(tmp_path, *RESUMABLE, "--resume", whole[0])
    assert "is complete: 8 steps" in capsys.readouterr().out
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (tmp_path, whole[0]))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_mistake_ends_a_real_process_with_code_2(tmp_path):
    process = launch(*SHORT, "--run-dir", tmp_path / "run", "--mask-ratio", "2")
    assert process.returncode == 2, process.stderr
    assert process.stderr == "error: --mask-ratio is 2.0: it must lie between 0 and 1\n"
