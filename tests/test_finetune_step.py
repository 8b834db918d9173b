"""finetune.py's step against a loop that is written out here: views, mixing, losses, clipping, AdamW, the average."""

from engine.arguments import parse
from engine.stream import Stream

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from images import CLASSES, squares, write_squares
from launch import call, log_of
from reference import IMAGENET, seed_of
from safetensors.torch import load_file
from torchvision.transforms import v2
from transformers import AutoModelForImageClassification

import finetune
from cae import CAE, CAEConfig

TRAIN, TEST = range(53), range(1000, 1061)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set, and a fine-tuned folder none of whose weights is at its initial value."""
    root = tmp_path_factory.mktemp("step")
    write_squares(root / "data", train=TRAIN, test=TEST)
    torch.manual_seed(0)
    args = finetune.ModelArgs(image_size=28, drop_path=0.0)
    model = finetune.build_model(args, finetune.of_cae(CAE(CAEConfig.from_size("nano")), "here"), CLASSES)
    for name, weight in model.named_parameters():
        if "position_embeddings" not in name:
            weight.data += (0.3 if "classifier" in name else 0.1) * torch.randn_like(weight)
    model.save_pretrained(root / "start")
    return root


from_folder = AutoModelForImageClassification.from_pretrained


def normalized(images):
    return (images / torch.tensor(255.0) - IMAGENET[0]) / IMAGENET[1]


@torch.no_grad()
def accuracy(model):
    """Top-1 and top-5 in percent on the test split, of which --crop-ratio 0.7 takes the middle 28 of 40 pixels."""
    images = torch.stack([squares(n)[:, 6:34, 6:34] for n in TEST])
    first = model.eval()(normalized(images)).logits.argsort(dim=1, descending=True)
    ranks = (first == torch.tensor(TEST)[:, None] % 7).nonzero()[:, 1]
    return [100 * (ranks < k).sum().item() / len(TEST) for k in (1, 5)]


def decayed(name, weight):
    """DESIGN 2: none on parameters of one dimension, nor on the class token."""
    return weight.ndim > 1 and name != "beit.embeddings.cls_token"


def layer_of(name):
    """0 for patch embedding and tokens, i + 1 for block i, depth + 1 for the rest; nano has four blocks."""
    block = re.match(r"beit\.layers\.(\d)\.", name)
    return int(block[1]) + 1 if block else 0 if name.startswith("beit.embeddings.") else 5


FLAGS = ["--image-size", 28, "--crop-ratio", 0.7, "--seed", 3, "--log-every", 1, "--precision", "fp32"]


@pytest.mark.parametrize("everything", [True, False])
def test_the_steps_are_those_of_a_plain_loop(data, tmp_path, monkeypatch, capsys, everything):
    """With everything: six steps of two micro-batches, the fourth of which has a loss that is not finite though its
    gradient is. Else one batch a step, neither mixed nor clipped nor averaged, and the warm-up that 20 steps have.

    Random are here RandAugment, erasing, mixing and stochastic depth. Clipped that far, the gradient is as small as
    AdamW's eps, so that its length is seen.
    """
    if everything:
        lr, decay, smoothing, ema, size, accumulation = 6.0, 0.7, 0.2, 0.4, 8, 2
        clip, steps, warmup, final, drop_path = 1e-5, 6, round(0.6 * 53 / 16), 0.004, 0.4
        more, every = ["--warmup-epochs", 0.6, "--mixup", 0.8, "--cutmix", 1.0, "--erasing", 0.5], 0.6
    else:
        lr, decay, smoothing, ema, size, accumulation = 0.6, 0.8, 0.1, 0.0, 4, 1
        clip, steps, warmup, final, drop_path = 0.0, 20, 1, 1e-6, 0.3
        more, every = ["--mixup", 0, "--cutmix", 0, "--erasing", 0], 0.5
    effective = size * accumulation
    more += ["--steps", steps, "--lr", lr, "--layer-decay", decay, "--label-smoothing", smoothing, "--ema", ema,
             "--clip-grad", clip, "--min-lr", final, "--drop-path", drop_path, "--batch-size", size,
             "--effective-batch-size", effective, "--weight-decay", 0.9, "--eval-every", every]  # fmt: skip
    batches, take, calls, cross_entropy = [], Stream.__next__, [], F.cross_entropy

    def recorded(stream):
        batches.append(take(stream))
        return batches[-1]

    def broken(*inputs, **options):
        calls.append(None)
        bad = everything and len(calls) == 8  # the fourth step's second
        return cross_entropy(*inputs, **options) + (math.inf if bad else 0.0)

    monkeypatch.setattr(Stream, "__next__", recorded)
    monkeypatch.setattr(F, "cross_entropy", broken)
    result, _ = call(monkeypatch, capsys, finetune, "classify", "--checkpoint", data / "start", "--dataset",
                     data / "data", *FLAGS, *more, run_dir=tmp_path / "run")  # fmt: skip
    monkeypatch.undo()
    lines = log_of(tmp_path / "run")
    assert len(lines) == steps and len(batches) == len(calls) == steps * accumulation

    model, average = from_folder(data / "start", drop_path_rate=drop_path), from_folder(data / "start")
    start = {name: w.detach().clone() for name, w in model.named_parameters()}
    weights = {name: w for name, w in model.named_parameters() if "position_embeddings" not in name}
    moments, taken, evaluations = {name: (0.0, 0.0) for name in weights}, 0, []
    peak, lengths = lr * effective / 1024, []
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=7), v2.CutMix(alpha=1.0, num_classes=7)])
    for step, line in enumerate(lines):
        losses = []
        for micro in range(accumulation):
            batch = batches[step * accumulation + micro]
            images, labels = normalized(batch["images"]), batch["labels"]
            torch.manual_seed(seed_of(3, step, micro, 0))
            if everything:
                noises = torch.randn(size, 3, 28, 28)
                for image, other, (i, j, h, w) in zip(images, noises, batch["erase"].tolist(), strict=True):
                    image[:, i : i + h, j : j + w] = other[:, i : i + h, j : j + w]
                images, labels = mix(images, labels)
            else:
                labels = torch.eye(7)[labels]
            logits = model.train()(images).logits
            target = (1 - smoothing) * labels + smoothing / 7
            loss = (target * (logits.exp().sum(1, keepdim=True).log() - logits)).sum(1).mean()
            (loss / accumulation).backward()
            losses.append(loss.item() / accumulation)
        norm = math.sqrt(sum(w.grad.double().square().sum().item() for w in weights.values()))
        # linear from 0 to the peak in the last step of the warm-up, a cosine towards --min-lr over the rest
        turn = math.pi * (step - warmup) / (steps - warmup)
        rising = (step / (warmup - 1) if warmup > 1 else 0.0) * peak
        rate = rising if step < warmup else final + (peak - final) * (1 + math.cos(turn)) / 2
        assert line["lr"] == pytest.approx(rate, rel=1e-12)
        bad = everything and step == 3
        if bad:
            assert line["loss"] is None and line["grad_norm"] is None
        else:  # of the other nothing is left, neither in the weights nor in the moments
            assert line["loss"] == pytest.approx(sum(losses), rel=1e-5)
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
            lengths.append(norm)
            taken += 1
        for name, w in weights.items():
            if not bad:
                g = w.grad.double() * (clip / norm if clip else 1)
                m, v = moments[name]
                m, v = moments[name] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                update = m / (1 - 0.9**taken) / ((v / (1 - 0.999**taken)).sqrt() + 1e-8)
                own = rate * decay ** (5 - layer_of(name))
                w.data = (w.double() * (1 - own * 0.9 * decayed(name, w)) - own * update).detach().float()
            other = average.get_parameter(name)
            other.data = ema * other.data + (1 - ema) * w.data
        model.zero_grad()
        count = [int(done * effective / 53 / every) for done in (step, step + 1)]
        assert ("top1" in line) == (count[1] > count[0] or step == steps - 1)
        if "top1" in line:  # of the average, in evaluation mode
            right = accuracy(average)
            assert [line["top1"], line["top5"]] == pytest.approx(right)
            evaluations.append((right[0], line["epoch"], copy.deepcopy(average)))
    assert any(batch["erase"].any() for batch in batches) == everything
    assert warmup > 0 and len(evaluations) > 2 and (not clip or min(lengths) > 1e3 * clip)
    best = max(evaluations, key=lambda evaluation: evaluation[0])  # the first of equals
    assert result["best_epoch"] == best[1]
    for file, wanted in (("checkpoints/step_*", model), ("model", average), ("best", best[2])):
        (folder,) = (tmp_path / "run").glob(file)
        found = load_file(folder / "model.safetensors") if wanted is model else from_folder(folder).state_dict()
        for name, w in wanted.named_parameters():
            moved = (w - start[name]).norm()
            if name not in weights:
                assert found[name].equal(start[name]), "fixed positions stay"
            else:
                assert moved > 1e-3 and (found[name] - w).norm() < 1e-4 * moved, (file, name)


def test_eval_only_is_that_of_a_plain_loop(data, tmp_path, monkeypatch, capsys):
    """In evaluation mode, though --drop-path is not 0."""
    result, _ = call(monkeypatch, capsys, finetune, "classify", "--checkpoint", data / "start", "--dataset",
                     data / "data", "--eval-only", "--drop-path", 0.9, *FLAGS, "--batch-size", 16,
                     run_dir=tmp_path / "run")  # fmt: skip
    expected = accuracy(from_folder(data / "start"))
    assert [result["top1"], result["top5"]] == pytest.approx(expected, abs=1e-3) and result["images"] == len(TEST)
    assert 0 < expected[0] < expected[1] < 100


def test_the_warm_up_is_at_most_a_tenth_of_the_run():
    args = parse(finetune.Classify, ["--random-init", "nano", "--epochs", "8"])
    assert finetune.resolve(args, finetune.load_origin(args.model)).recipe.warmup_epochs == 0.8


def test_the_best_evaluation_is_the_first_of_the_highest_top_1():
    evaluations = [{"step": i, "scores": {"top1": top1, "top5": top5}}
                   for i, (top1, top5) in enumerate([(40.0, 95.0), (60.0, 70.0), (60.0, 80.0)])]  # fmt: skip
    assert finetune.best_of(evaluations, "top1")["step"] == 1
    assert finetune.best_of(evaluations, "top5")["step"] == 0
