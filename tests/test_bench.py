"""bench.py as its users run it, at a size at which its times mean nothing: only what it reports is looked at."""

import json
import math

import pytest
import torch
from launch import launch, succeeded

from bench import baseline, scale
from cae import CAEConfig

TINY = ["bench/bench.py", "--size", "nano", "--batch-size", "2", "--images", "3", "--repeats", "1", "--seconds", "0"]
ROWS = {"masks", "decode", "transform", "data", "data-timm", "data-released", "small", "small-timm", "small-released",
        "stream", "randaugment", "teacher", "encoder", "regressor", "optimizer", "step", "train"}  # fmt: skip
CAE_ROWS = ("encoder", "regressor", "alignment", "step")
COUNTED = {"encoder", "regressor", "alignment", "step", "step-bf16", "train"}


def report(*flags, warm=False):
    """The last line of the output, and the lines before it."""
    *lines, last = succeeded(launch(*TINY, *flags, warm=warm)).stdout.splitlines()
    return json.loads(last), lines


def numbers(value):
    """All numbers in rows of rows."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers(inner)]
    return [value]


def encoder_flops(config, visible):
    """Of one image, forward and backward, counted by hand."""
    n, d = 1 + visible, config.dim
    embedding = 2 * visible * 3 * config.patch_size**2 * d  # the images take no gradient: its weights alone do
    linear = 2 * n * 12 * d * d  # qkv 3, projection 1, MLP 8; the backward pass is twice the forward pass
    attention = 2 * 2 * n * n * d  # scores and their sum of values
    return 2 * embedding + config.depth * 3 * (linear + attention)


@pytest.mark.parametrize("method", ["cae-v2", "cae"])
def test_every_row_is_reported(method):
    # of cae what differs
    flags = ["--target", "pixels", "--only", *CAE_ROWS, "cost"] if method == "cae" else []
    result, lines = report("--method", method, *flags, warm=method == "cae")
    rows, bf16 = result["rows"], bool(result["cpu_bf16"])
    expected = set(CAE_ROWS)
    if method == "cae-v2":
        expected = ROWS | ({"teacher-bf16", "step-bf16"} if bf16 else set())
        expected |= {"crop", "small-crop"} if result["turbojpeg"] else set()
    assert set(rows) == expected
    for name, row in rows.items():
        ours = {key: value for key, value in row.items() if key not in ("spread", "cpu_spread", "data_wait")}
        assert all(math.isfinite(number) and number > 0 for number in numbers(ours)), (name, row)
        assert {"ms", "images_per_second", "ratio"} <= set(row) and {"ms", "images_per_second"} <= set(row["baseline"])
        if name in COUNTED:
            assert {"gflop_per_image", "tflops", "mfu", "memory_mb"} <= set(row)
        assert sum(line.split()[:1] == [name] for line in lines) == 1
    config = CAEConfig.from_size("nano", method)
    flops = encoder_flops(config, result["patches"] - result["masked"])
    assert rows["encoder"]["gflop_per_image"] == pytest.approx(flops / 1e9, rel=1e-12)
    if method == "cae":
        cost = result["cost"]
        assert cost["parameters_ratio"] > 1 and all(math.isfinite(number) for number in numbers(cost))


def test_a_baseline_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(baseline.nn, "GELU", lambda: torch.nn.functional.silu)
    with pytest.raises(AssertionError, match=r"the baseline is off by .* in cae-v2"):
        baseline.check_equal()


def test_the_part_of_many_images(tmp_path, monkeypatch):
    """Few of them here: every part measures something, and a part that fails is named without ending the others."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, *size in (("folder", 1200), ("groups", 60, 4), ("order", 3000, 2), ("stream", 5120, 10)):
        found = scale.PARTS[name](tmp_path / name, *size)
        assert found and all(math.isfinite(value) and value >= 0 for value in found.values()), (name, found)
    lines = []
    found = scale.measure_all((("groups", 2, 1),), lambda line, **_: lines.append(line))
    assert "Sample larger than population" in found["groups 2 1"]["error"] in lines[0] and len(lines) == 1
