"""probe.py's steps against a loop that is written out here: features, learning rates, optimizers, statistics."""

from engine.arguments import DataArgs
from engine.sources import open_source
from engine.stream import Stream

import json
import math
from collections import namedtuple

import pytest
import torch
from images import squares, write_squares
from launch import call, launch, log_of, succeeded
from reference import IMAGENET, channels, seed_of
from safetensors.torch import load_file

import probe
from cae import CAE, CAEConfig
from probe import AttentiveHead, EfficientHead, LinearHead

TRAIN, TEST = range(53), range(1000, 1061)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set, and an encoder none of whose weights is at its initial value, with stochastic depth."""
    root = tmp_path_factory.mktemp("step")
    write_squares(root / "data", train=TRAIN, test=TEST)
    torch.manual_seed(0)
    model = CAE(CAEConfig.from_size("nano", drop_path=0.5))
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(root / "encoder")
    return root


def centres(numbers):
    """Of 40 x 40 pixels, the middle 28 x 28 that --crop-ratio 0.7 takes."""
    return torch.stack([squares(n)[:, 6:34, 6:34] for n in numbers])


def crops(path, size, rank, world, once):
    """A rank's batches of random crops, image by image a function of the seed, and their labels."""
    data = DataArgs(dataset=str(path), workers=0, streaming=False, batch_size=size)
    source = open_source(data, 1, labelled=True)
    stream = Stream(source, probe.Augment(28, (0.5, 1.0), 0.3, once), data, 3, rank, world)
    while True:
        batch = next(stream)
        yield batch["images"], batch["labels"]


def cached(size):
    """Batches of the whole images, pass after pass, each in an order of its own."""
    rows, passes = [], 0
    while True:
        while len(rows) < size:
            order = torch.Generator().manual_seed(seed_of(3, passes, 0))
            rows, passes = rows + torch.randperm(len(TRAIN), generator=order).tolist(), passes + 1
        yield centres(TRAIN[i] for i in rows[:size]), torch.tensor([TRAIN[i] % 7 for i in rows[:size]])
        rows = rows[size:]


def pooled(tokens):
    return torch.stack([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)


def without_class(tokens):
    return tokens[:, 1:]


def lars(w, g, buffer, lr, case):
    """You et al.: no decay and no trust ratio for one dimension."""
    if w.ndim > 1:
        g = g + case.decay * w
        g = g * case.trust * w.norm() / g.norm()
    buffer = case.momentum * buffer + g
    return w - lr * buffer, buffer


def nesterov(w, g, buffer, lr, case):
    g = g + case.decay * w
    buffer = case.momentum * buffer + g
    return w - lr * (g + case.momentum * buffer), buffer


Case = namedtuple("Case", "flags heads rates select update momentum decay trust pixels")
OTHER = channels(0.3, 0.4, 0.5), channels(0.2, 0.3, 0.4)
LINEAR, EP = 6.4, 1.6  # peaks of the recipes: data this small keep them at any batch; other rates are per 256 images
CASES = {
    "linear": Case(
        ["linear", "--pool", "class", "mean", "both", "--lr", 400, "--weight-decay", 0.1,
         "--trust-coefficient", 0.01,
         "--pixel-mean", 0.3, 0.4, 0.5, "--pixel-std", 0.2, 0.3, 0.4],
        [lambda pool=pool: LinearHead(pool, 96, 7) for pool in ("class", "class", "mean", "mean", "both", "both")],
        [LINEAR, 400] * 3, pooled, lars, 0.9, 0.1, 0.01, OTHER),
    "attentive": Case(
        ["attentive", "--lr", 0.2, "--momentum", 0.8, "--weight-decay", 0.1],
        [lambda: AttentiveHead(96, 4, 7)] * 2, [0.4 / 32, 0.2], without_class, nesterov, 0.8, 0.1, None, IMAGENET),
    "cached": Case(
        ["attentive", "--lr", 0.2, "--tokens", "all", "--cache-features"],
        [lambda: AttentiveHead(96, 4, 7)] * 2, [0.4 / 32, 0.2], lambda tokens: tokens, nesterov, 0.9, 0, None,
        IMAGENET),
    "ep": Case(
        ["attentive", "--kind", "ep", "--queries", 8, "--lr", 50, "--trust-coefficient", 0.04],
        [lambda: EfficientHead(96, 8, 7)] * 2, [EP, 50], without_class, lars, 0.9, 0, 0.04, IMAGENET),
}  # fmt: skip


def rate_of(case, peak, step, steps, warmup):
    """With LARS MAE's, 0 in the first step and the peak in the first one after the warm-up; with SGD the peak is in the
    last one of the warm-up, and 1e-6 would follow the last."""
    rise, end = (warmup, 0) if case.update is lars else (warmup - 1, 1e-6)
    if step < warmup:
        return peak * step / rise if step else 0.0
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def follow(case, root, run_dir, size, effective, steps, warmup, every, checkpoints, streams):
    """Every line of the log and every checkpoint of a run against a plain loop over the streams of its processes."""
    encoder = CAE.from_pretrained(root / "encoder").eval()
    mean, std = case.pixels

    @torch.no_grad()
    def features(images):
        return case.select(encoder.encode((images / torch.tensor(255.0) - mean) / std))

    torch.manual_seed(3)
    heads, inputs = [make() for make in case.heads], []
    for head in heads:
        head.norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
        for parameter in head.parameters():
            parameter.start, parameter.buffer = parameter.detach().clone(), 0.0
        assert not head.linear.bias.any() and head.linear.weight.abs().max() < 0.06, "normal, 0.01"
    width = [head.norm.num_features for head in heads]
    statistics = [[(torch.zeros(n), torch.ones(n)) for n in width] for _ in streams]
    test, answers = features(centres(TEST)), torch.tensor([n % 7 for n in TEST])
    lines, world = log_of(run_dir), len(streams)
    assert len(lines) == steps
    for step, line in enumerate(lines):
        losses = [0.0] * len(heads)
        for rank, stream in enumerate(streams):
            batches = [next(stream) for _ in range(effective // (size * world))]
            seen = torch.cat([features(images) for images, _ in batches])  # one batch for BatchNorm
            labels = torch.cat([labels for _, labels in batches])
            for i, head in enumerate(heads):
                logits = head.train()(seen)
                x, (m, v) = inputs.pop(), statistics[rank][i]
                statistics[rank][i] = 0.9 * m + 0.1 * x.mean(0), 0.9 * v + 0.1 * x.var(0)
                loss = (logits.exp().sum(1).log() - logits[torch.arange(len(labels)), labels]).mean() / world
                loss.backward()
                losses[i] += loss.item()
        for head, rate in zip(heads, case.rates, strict=True):
            for w in head.parameters():
                peak = rate if rate in (LINEAR, EP) else rate * effective / 256
                lr = rate_of(case, peak, step, steps, warmup)
                new, w.buffer = case.update(w.detach().double(), w.grad.double(), w.buffer, lr, case)
                w.data, w.grad = new.float(), None
        own = case.rates[0] * (1 if case.update is lars else effective / 256)
        assert line["lr"] == pytest.approx(rate_of(case, own, step, steps, warmup), rel=1e-12, abs=1e-15)
        assert line["loss_heads"] == pytest.approx(losses, rel=1e-4) and line["loss"] == line["loss_heads"][0]

        count = [int(done * effective / len(TRAIN) / every) for done in (step, step + 1)]
        evaluates, done = count[1] > count[0] or step == steps - 1, step + 1
        if evaluates or done in checkpoints:  # the mean over the processes, on all of them
            means = [[torch.stack(parts).mean(0) for parts in zip(*of_head, strict=True)]
                     for of_head in zip(*statistics, strict=True)]  # fmt: skip
            statistics = [list(map(tuple, means)) for _ in streams]
            for head, (m, v) in zip(heads, means, strict=True):
                head.norm.running_mean.copy_(m)
                head.norm.running_var.copy_(v)
        assert ("top1" in line) == evaluates
        if evaluates:  # on scores that lie 1e-4 apart at least, so that rounding changes none
            ranks = []
            for head in heads:
                first = head.eval()(test).argsort(dim=1, descending=True)
                ranks.append((first == answers[:, None]).nonzero()[:, 1])
            inputs.clear()
            assert line["top1_heads"] == pytest.approx([100 * (r < 1).sum().item() / len(TEST) for r in ranks])
            assert line["top5"] == pytest.approx(100 * (ranks[0] < 5).sum().item() / len(TEST))
        if done in checkpoints:
            found = load_file(run_dir / "checkpoints" / f"step_{done:08d}" / "model.safetensors")
            for i, head in enumerate(heads):
                for name, w in head.named_parameters():  # biases before BatchNorm have no gradient but noise
                    moved, error = (w - w.start).norm(), (found[f"{i}.{name}"] - w).norm()
                    assert error < 1e-4 * moved + 1e-7, (done, i, name, moved, error)
                for name in ("running_mean", "running_var"):
                    expected = getattr(head.norm, name)
                    torch.testing.assert_close(found[f"{i}.norm.{name}"], expected, rtol=1e-5, atol=1e-5)


FLAGS = ["--image-size", 28, "--crop-ratio", 0.7, "--crop-scale", 0.5, 1.0, "--flip", 0.3, "--seed", 3,
         "--log-every", 1, "--precision", "fp32", "--no-streaming"]  # fmt: skip


@pytest.mark.parametrize(("name", "steps", "warmup"), [
    ("linear", 18, 2), ("attentive", 17, 1), ("cached", 9, 1), ("ep", 9, 1)])  # fmt: skip
def test_the_steps_are_those_of_a_plain_loop(data, tmp_path, monkeypatch, capsys, name, steps, warmup):
    """Each of two forward passes; a ninth of them are the warm-up."""
    flags = ["--checkpoint", data / "encoder", "--dataset", data / "data", *FLAGS, "--steps", steps, "--batch-size", 8,
             "--effective-batch-size", 16, "--eval-every", 1.2]  # fmt: skip
    result, _ = call(monkeypatch, capsys, probe, *CASES[name].flags, *flags, run_dir=tmp_path / "run")
    assert result["images"] == len(TEST)
    streams = [cached(8) if name == "cached" else crops(data / "data", 8, 0, 1, name == "linear")]
    follow(CASES[name], data, tmp_path / "run", 8, 16, steps, warmup, 1.2, [steps], streams)


def test_the_steps_of_two_processes_are_those_of_a_plain_loop(data, tmp_path):
    """BatchNorm sees the images of a process; its statistics are joined before evaluations and checkpoints."""
    flags = ["--checkpoint", data / "encoder", "--dataset", data / "data", *FLAGS, "--steps", 6, "--batch-size", 4,
             "--effective-batch-size", 8, "--eval-every", 0.3, "--checkpoint-every", 3, "--workers", 0]  # fmt: skip
    command = ["probe.py", *CASES["linear"].flags, *flags, "--run-dir", tmp_path]
    process = succeeded(launch(*command, processes=2, warm=True))
    result = json.loads(process.stdout.strip().splitlines()[-1])
    assert (result["images"], result["processes"]) == (len(TEST), 2)
    streams = [crops(data / "data", 4, rank, 2, True) for rank in range(2)]
    follow(CASES["linear"], data, tmp_path, 4, 8, 6, 0, 0.3, [3, 6], streams)
