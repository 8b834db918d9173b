"""probe.py as its users run it: real processes on the demo data (its first images), alone and in two. Those that are
warm find the libraries imported."""

import json
import shutil

import pytest
import torch
from hub import serve
from images import noise_png, write_clothes, write_parquet
from launch import launch, log_of, succeeded
from safetensors.torch import load_file

from cae import CAE, CAEConfig
from convert import to_beit


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A model/ folder with random weights."""
    folder = tmp_path_factory.mktemp("encoder") / "model"
    torch.manual_seed(0)
    CAE(CAEConfig.from_size("nano")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_probe(tmp_path_factory):
    """probe.py on the first images of the demo: its result and output; the file and the last line say the same."""
    few = write_clothes(tmp_path_factory.mktemp("clothes"), train=1500, test=501)

    def run(run_dir, *command, **options):
        flags = ["--dataset", few, "--streaming", "--run-dir", run_dir, "--workers", "1"]
        process = succeeded(launch("probe.py", *command, *flags, **options))
        result = json.loads((run_dir / "result.json").read_text())
        assert json.loads(process.stdout.strip().splitlines()[-1]) == result
        assert result["processes"] == options.get("processes", 1) and result["images"] == 501 and result["skipped"] == 0
        return result, process.stdout

    return run


def test_knn_is_the_same_in_one_process_and_in_two(encoder, run_probe, tmp_path):
    one, output = run_probe(tmp_path / "one", "knn", "--checkpoint", encoder, warm=True)
    two, _ = run_probe(tmp_path / "two", "knn", "--checkpoint", encoder, processes=2)
    assert one["weights"] == two["weights"] and one["top1"] > 50
    for a, b in zip(one["knn"], two["knn"], strict=True):
        assert {k: a[k] for k in ("pool", "k", "temperature")} == {k: b[k] for k in ("pool", "k", "temperature")}
        assert abs(a["top1"] - b["top1"]) < 0.21, "batches differ, so the last bits of the features do"
    assert f"{'k = 20':34}{one['top1']:8.1f}" in output and str(encoder) in output


def test_a_probe_on_cached_features(encoder, run_probe, tmp_path):
    """In two processes. (Without a cache: test_probe_step.py.)"""
    command = ["linear", "--cache-features", "--steps", "140", "--warmup-epochs", "1", "--lr", "30", "--pool", "class",
               "both"]  # fmt: skip
    result, output = run_probe(tmp_path, *command, "--checkpoint", encoder, processes=2, warm=True)
    assert result["best_of"] == len(result["heads"]) == 4 and "2 processes x " in output
    assert all(0 <= head["top1"] <= head["top5"] <= 100 for head in result["heads"])
    assert result["best"]["top1"] > 60, "140 steps of a linear layer on random features"


@pytest.mark.parametrize("form", ["cae", "transformers"])
def test_an_encoder_of_the_hub(encoder, run_probe, tmp_path, form):
    """Over HTTP, from the stand-in: a model of this project, and one of transformers."""
    model = CAE.from_pretrained(encoder)
    (model if form == "cae" else to_beit(model)).save_pretrained(tmp_path / "repo")
    with serve(tmp_path / "repo") as (environment, requests):
        flags = ["knn", "--checkpoint", "some/pictures", "--k", "20", "--temperature", "0.07"]
        result, _ = run_probe(tmp_path / "run", *flags, HF_HOME=str(tmp_path / "cache"), **environment)
    assert any("model.safetensors" in request for request in requests) and result["encoder"] == "some/pictures"
    assert result["kind"] == {"cae": "cae-v2", "transformers": "beit"}[form] and result["top1"] > 50


def test_a_probe_resumes_in_two_processes(encoder, run_probe, tmp_path):
    command = ["attentive", "--kind", "ep", "--checkpoint", encoder, "--steps", "4", "--checkpoint-every", "2",
               "--effective-batch-size", "32", "--lr", "2", "--log-every", "1"]  # fmt: skip
    expected, _ = run_probe(tmp_path / "whole", *command, processes=2, warm=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000004")
    (tmp_path / "resumed" / "result.json").unlink()
    resumed, output = run_probe(tmp_path / "resumed", *command, processes=2, warm=True)
    assert "continuing from" in output
    assert all(resumed[name] == expected[name] for name in ("top1", "top5", "heads", "best", "knn"))
    for a, b in zip(log_of(tmp_path / "resumed"), log_of(tmp_path / "whole"), strict=True):
        assert (a["step"], a["loss_heads"]) == (b["step"], b["loss_heads"])
    ours, theirs = (load_file(tmp_path / name / "checkpoints" / "step_00000004" / "model.safetensors")
                    for name in ("resumed", "whole"))  # fmt: skip
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), "the statistics of BatchNorm included"


@pytest.mark.parametrize("command", [("linear", "--cache-features", "--steps", "2"), ("attentive", "--steps", "2")])
def test_a_rank_may_have_nothing_to_evaluate(tmp_path, command):
    """Streams with fewer shards than processes, and one single image: they count once all the same."""
    write_parquet(tmp_path / "data", (40, 40), encode=noise_png)
    write_parquet(tmp_path / "data", (1,), split="test", encode=noise_png)
    flags = ["--dataset", tmp_path / "data", "--streaming", "--workers", "0", "--random-init", "nano"]
    flags += ["--effective-batch-size", "16"]
    process = succeeded(launch("probe.py", *command, *flags, "--run-dir", tmp_path / "run", processes=2, warm=True))
    assert json.loads(process.stdout.strip().splitlines()[-1])["images"] == 1
