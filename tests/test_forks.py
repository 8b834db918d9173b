"""docs/change_it.md: every diff is applied to a copy of the project, every command run there. And what forks rest on:
older run folders, longer runs, optimizers of any kind."""

from engine.arguments import Mark, RunArgs, parse
from engine.checkpoints import Resume, plan_resume, write_config
from engine.errors import UserError
from engine.run import Run, step_unless

import json
import re
import shutil
import subprocess

import pytest
import torch
from launch import ROOT, launch, log_of, succeeded
from safetensors.torch import load_file

import train
from probe import LARS

DOC = (ROOT / "docs" / "change_it.md").read_text()
FORKS = re.findall(r"^## .*?```sh\n(.*?)\n```.*?\[change_it/(\w+)\.diff\].*?```diff\n(.*?)```", DOC, re.M | re.S)


def fork(folder, name):
    """A copy of the project with one of the changes."""
    ignored = shutil.ignore_patterns("__pycache__", "tests", "docs")
    for path in [*ROOT.glob("*.py"), ROOT / "engine", ROOT / "demo"]:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=ignored)
        else:
            shutil.copy(path, folder)
    diff = ROOT / "docs" / "change_it" / f"{name}.diff"
    subprocess.run(["git", "apply", str(diff)], cwd=folder, check=True)
    return folder


def test_the_document_shows_what_is_applied():
    files = {path.stem: path.read_text() for path in (ROOT / "docs" / "change_it").glob("*.diff")}
    assert {name: text for _, name, text in FORKS} == files and len(files) == 5
    for name, text in files.items():
        changed = [line for line in text.splitlines() if re.match(r"[+-](?![+-]{2} )", line) and line.strip("+- ")]
        assert 6 <= len(changed) <= 15, (name, len(changed))


@pytest.mark.parametrize(("command", "name"), [(command, name) for command, name, _ in FORKS],
                         ids=[name for _, name, _ in FORKS])  # fmt: skip
def test_a_change_is_what_it_says(command, name, tmp_path):
    folder = fork(tmp_path, name)
    assert subprocess.run(["git", "apply", "-R", "--check", str(ROOT / "docs" / "change_it" / f"{name}.diff")],
                          cwd=folder).returncode == 0  # fmt: skip
    command = command.removeprefix("python ").split()
    output = succeeded(launch(*command, cwd=folder, warm=name != "teacher")).stdout
    assert re.search(r"^step 20/20  loss \d", output, re.M), output
    run_dir = folder / "runs" / name
    losses = [line["loss"] for line in log_of(run_dir)]
    assert len(losses) == 1 + (name == "optimizer") and losses[0] > 0
    if name == "optimizer":  # both optimizers are in a checkpoint
        resumes_exactly(folder, command, run_dir)
    if name == "architecture":
        is_refused(folder, run_dir)


def resumes_exactly(folder, command, run_dir):
    whole = load_file(run_dir / "model" / "model.safetensors")
    assert (run_dir / "checkpoints" / "step_00000010" / "optimizer_1.bin").exists()
    shutil.rmtree(run_dir / "checkpoints" / "step_00000020")
    assert "continuing from" in succeeded(launch(*command, cwd=folder, warm=True)).stdout
    again = load_file(run_dir / "model" / "model.safetensors")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def is_refused(folder, run_dir):
    """What BEiT has no place for is named, by whoever would lose it."""
    for command in ("convert.py --to beit --output out", "finetune.py classify --dataset demo"):
        process = launch(*command.split(), "--checkpoint", run_dir, cwd=folder, warm=True)
        assert process.returncode == 2 and "register_token" in process.stderr, process.stderr
        assert len(process.stderr.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------ the run folder

MARKS = {"steps": Mark.LENGTH, "epochs": Mark.LENGTH, "seed": Mark.DATA, "workers": Mark.FREE}


def begun(folder, **values):
    """A run folder in which something has happened."""
    write_config(folder, values, {})
    (folder / "log.jsonl").touch()
    (folder / "checkpoints" / "step_00000020").mkdir(parents=True)
    return RunArgs(run_dir=str(folder))


def test_a_new_flag_does_not_stop_an_old_run(tmp_path):
    run = begun(tmp_path, lr=0.1, gone=3)
    resume = plan_resume(run, {"lr": 0.1, "loss": "cosine"}, MARKS)
    assert resume.changed == {} and resume.added == {"loss": "cosine"} and len(resume.candidates) == 1
    with pytest.raises(UserError, match=r"another configuration \(lr 0.1 -> 0.2\): .* --resume-changed"):
        plan_resume(run, {"lr": 0.2, "loss": "cosine"}, MARKS)


def test_a_change_beyond_the_checkpoint_counts_from_there():
    """A run that goes on from step 50 though its data changed at 100: they begin anew there, and only there."""
    resume = Resume(history=[{"step": 100, "values": {"seed": [0, 1]}}], marks=MARKS)
    assert resume.data_begin_anew(50) and not resume.data_begin_anew(101)
    again = Resume(history=resume.changes(50), marks=MARKS)
    assert again.history == [{"step": 50, "values": {"seed": [0, 1]}}]
    assert again.data_begin_anew(50), "killed before its first checkpoint"
    assert not again.data_begin_anew(60)


@pytest.mark.parametrize(("old", "new", "allowed"), [
    ({"steps": 20, "epochs": None}, {"steps": 40, "epochs": None}, True),
    ({"steps": 20, "epochs": None}, {"steps": 10, "epochs": None}, False),
    ({"steps": None, "epochs": 2.0}, {"steps": None, "epochs": 3.0}, True),
    ({"steps": None, "epochs": 2.0}, {"steps": 500, "epochs": None}, False),
    ({"steps": 20, "epochs": None}, {"steps": None, "epochs": 10.0}, False),
])  # fmt: skip
def test_a_run_may_be_made_longer(old, new, allowed, tmp_path):
    run = begun(tmp_path, **old)
    changed = {name: [old[name], new[name]] for name in old if old[name] != new[name]}
    if allowed:
        assert plan_resume(run, new, MARKS).changed == changed
    else:
        with pytest.raises(UserError, match=r"another configuration .* or --resume-changed"):
            plan_resume(run, new, MARKS)
        run.resume_changed = True
        assert plan_resume(run, new, MARKS).changed == changed


def test_a_longer_run_follows_the_schedule_of_its_length(tmp_path, capsys, monkeypatch):
    """It says so, goes on with the very next image, and its config.json tells both lengths."""
    monkeypatch.chdir(ROOT)
    flags = ["--dataset", "demo", "--workers", "0", "--batch-size", "4", "--effective-batch-size", "4"]
    flags += ["--log-every", "1", "--warmup-epochs", "0"]

    def go(run_dir, steps):
        train.train(parse(train.Args, [*flags, "--run-dir", str(tmp_path / run_dir), "--steps", str(steps)]))
        return log_of(tmp_path / run_dir), capsys.readouterr().out

    go("run", 2)
    longer, output = go("run", 5)
    whole, _ = go("whole", 5)
    assert "changed: steps 2 -> 5; the learning rate follows the schedule of the new length" in output
    assert [line["seen"] for line in longer] == [line["seen"] for line in whole]
    assert [line["lr"] for line in longer[2:]] == [line["lr"] for line in whole[2:]]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["args"]["steps"] == 5 and config["changed"] == [{"step": 2, "values": {"steps": [2, 5]}}]


# ---------------------------------------------------------------------------------------------------------- optimizers

OPTIMIZERS = {
    "fused AdamW": lambda weights: torch.optim.AdamW(weights, 0.1, fused=True),
    "AdamW": lambda weights: torch.optim.AdamW(weights, 0.1),
    "SGD": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, weight_decay=0.1),
    "fused SGD": lambda weights: torch.optim.SGD(weights, 0.1, momentum=0.9, fused=True),
    "Muon": lambda weights: torch.optim.Muon(weights, 0.1),
    "LARS": lambda weights: LARS(weights, 0.1, weight_decay=0.1),
}


class Prepared:
    """What Accelerate makes of an optimizer."""

    def __init__(self, optimizer):
        self.optimizer, self.step = optimizer, optimizer.step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_nothing_whatever_the_optimizer(name, seeded):
    """Neither the weights nor what the optimizer remembers, in the first step and in a later one; the next does."""
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = OPTIMIZERS[name]([weight])

    def state():
        moments = optimizer.state[weight].items() if weight in optimizer.state else ()
        return {"weight": weight.detach().clone(), **{k: torch.as_tensor(v).clone() for k, v in moments}}

    for skipped in (True, False, True, False):
        before = state()
        weight.grad = torch.full_like(weight, torch.nan) if skipped else torch.randn_like(weight)
        step_unless(torch.tensor(skipped), Prepared(optimizer))
        after = state()
        moved = {key for key in after if not torch.equal(after[key], before.get(key, torch.zeros_like(after[key])))}
        assert bool(moved) is not skipped and ("weight" in moved) is not skipped, (skipped, moved)


def test_the_scaler_of_fp16_has_one_optimizer():
    """Accelerate would unscale the second one's gradients twice."""
    run = object.__new__(Run)
    run.accelerator = type("Accelerator", (), {"scaler": object()})()
    with pytest.raises(UserError, match="--precision fp16 scales the gradients of one optimizer, here are several"):
        run.prepare(None, None, None)


