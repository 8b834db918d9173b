"""Run folders written by the code before engine/ go on under this code, to the same end. old_runs/README.md says how
they came about. Since then the learning rates and the linear probe's crop have become the released code's; those of
before are put in their place here, so that everything else is seen to be as it was.

On the machine that wrote them the end is the same to the last bit. Another processor, or another version of torch,
rounds otherwise: here losses may differ by 1e-5 of themselves, and weights by 2e-5.
"""

import json
import math
import shutil
import sys

import pytest
import torch
from launch import ROOT, log_of
from safetensors.torch import load_file

import cae
import finetune
import probe
import train
from convert import load_model

OLD = ROOT / "tests" / "old_runs"
COMMON = "--dataset demo --workers 0 --seed 5 --log-every 1 --steps 8 --checkpoint-every 4"
PARTS = "--batch-size 8 --effective-batch-size 32 --parts 2"
SIZE = f"--size nano --shuffle-window 64 --weight-decay-end 0.1 {PARTS}"
RUNS = {
    "cae-v2": (train, f"{SIZE} --teacher demo/clip_teacher"),
    "cae": (train, f"{SIZE} --method cae --target pixels --lr 0.01"),
    "linear": (probe, "linear --batch-size 32 --effective-batch-size 64 --eval-every 0.004 --num-classes 10"),
    "classify": (finetune, f"classify --mixup 0.2 --erasing 0.3 --ema 0.5 {PARTS}"),
}
MEASURED = {"images_per_second", "data_wait"}


@pytest.fixture
def pico(monkeypatch):
    """nano with 8 channels."""
    row = {
        "encoder": dict(dim=8, depth=1, heads=2, layer_scale=0.1, image_size=28, patch_size=4, drop_path=0.2),
        "cae-v2": dict(regressor_dim=12, regressor_heads=2, regressor_depth=1, decoder_depth=0, target_dim=64),
        "cae": dict(regressor_dim=8, regressor_heads=2, regressor_depth=1, decoder_depth=1, target_dim=48),
    }
    monkeypatch.setitem(cae.SIZES, "nano", row)
    monkeypatch.chdir(ROOT)


def former_cosine(step, total, start, end):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / max(total - 1, 1)))


def former_rate(step, total, warmup, peak, final):
    return peak * step / warmup if step < warmup else former_cosine(step - warmup, total - warmup, peak, final)


def go_on(name, monkeypatch, capsys, tmp_path):
    """The log of a copy of an old run, continued."""
    script, flags = RUNS[name]
    flags = f"{flags} {COMMON} --run-dir {tmp_path / name}"
    if script is not train:
        flags += f" --checkpoint {OLD / 'cae-v2'}"
    shutil.copytree(OLD / name, tmp_path / name)
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags.split()])
    script.main()
    assert "continuing from" in capsys.readouterr().out
    return log_of(tmp_path / name)


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_goes_on(name, pico, monkeypatch, capsys, tmp_path):
    """The second half of its log, image for image and loss for loss, and its last weights."""
    monkeypatch.setattr(train, "cosine", former_cosine)
    for script in (train, finetune):
        monkeypatch.setattr(script, "learning_rate", former_rate)
    monkeypatch.setattr(probe, "learning_rate", lambda step, total, warmup, peak, attentive: former_rate(
        step, total, warmup, peak, 0.0))  # fmt: skip
    augment = probe.Augment
    monkeypatch.setattr(probe, "Augment", lambda size, scale, flip, once: augment(size, scale, flip, once=False))
    found, expected = go_on(name, monkeypatch, capsys, tmp_path), log_of(OLD / name)
    if RUNS[name][0] is train:  # which is new
        assert 0 <= found[-1].pop("knn_top1") <= 100
    assert [list(line) for line in found] == [list(line) for line in expected]
    for new, old in zip(found, expected, strict=True):
        for key in set(old) - MEASURED:
            is_rounded = isinstance(old[key], (float, list))
            assert new[key] == (pytest.approx(old[key], rel=1e-5, abs=1e-7) if is_rounded else old[key]), key
    last = tmp_path / name / "checkpoints" / "step_00000008" / "model.safetensors"
    weights, former = load_file(last), load_file(OLD / name / "final.safetensors")
    weights = {cae.former_name(key): w for key, w in weights.items()}
    assert weights.keys() == former.keys()
    for key, w in weights.items():
        torch.testing.assert_close(w, former[key], rtol=0, atol=2e-5, msg=key)


@pytest.mark.parametrize("name", RUNS)
def test_an_old_run_goes_on_at_todays_learning_rates(name, pico, monkeypatch, capsys, tmp_path):
    found, expected = go_on(name, monkeypatch, capsys, tmp_path), log_of(OLD / name)
    assert [line["step"] for line in found] == [line["step"] for line in expected] and found[:4] == expected[:4]
    assert all(line["lr"] > old["lr"] for line, old in zip(found[4:], expected[4:], strict=True))


def test_an_old_model_is_read(pico):
    """Under its names of today, weight for weight."""
    model = load_model(OLD / "cae-v2")
    former = load_file(OLD / "cae-v2" / "model" / "model.safetensors")
    assert any(key.startswith("objective.") for key in former)
    for key, w in model.state_dict().items():
        assert torch.equal(w, former[cae.former_name(key)]), key


def test_another_seed_is_another_run(pico, monkeypatch, capsys, tmp_path):
    shutil.copytree(OLD / "cae", tmp_path / "cae")
    script, flags = RUNS["cae"]
    flags = f"{flags} {COMMON} --seed 6 --run-dir {tmp_path / 'cae'}"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and "another configuration (seed 5 -> 6)" in capsys.readouterr().err
    assert json.loads((tmp_path / "cae" / "config.json").read_text())["args"]["seed"] == 5
