"""train.py's step against a loop that is written out here, and against the released code's own training."""

import engine.run
from engine.arguments import parse
from engine.sources import Source
from engine.stream import Stream

import json
import math

import pytest
import torch
from images import noise_png, write_parquet
from launch import ROOT, log_of
from reference import IMAGENET, OPENAI, seed_of
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

import cae
import train
from cae import CAE, CAEConfig
from convert import load_official, released_name

GOLDEN = ROOT / "tests" / "golden"
DEMO_TEACHER = ROOT / "demo" / "clip_teacher"


def record(monkeypatch):
    """The list of all batches that streams give from now on."""
    batches, take = [], Stream.__next__

    def recorded(stream):
        batches.append(take(stream))
        return batches[-1]

    monkeypatch.setattr(Stream, "__next__", recorded)
    return batches


def clip_targets(pixels):
    """Every token through post_layernorm and visual_projection, from the crop in [0, 1]."""
    model = CLIPVisionModelWithProjection.from_pretrained(DEMO_TEACHER).eval()
    with torch.no_grad():
        x = model.vision_model((pixels - OPENAI[0]) / OPENAI[1]).last_hidden_state
        return model.visual_projection(model.vision_model.post_layernorm(x))


def pixel_targets(pixels):
    """(B, N, row, column, channel) of patches of 4."""
    x = ((pixels - IMAGENET[0]) / IMAGENET[1]).unfold(2, 4, 4).unfold(3, 4, 4)           # (B, 3, 7, 7, row, column)
    return x.permute(0, 2, 3, 4, 5, 1).reshape(len(x), 49, 48)


class AdamW:
    """Loshchilov and Hutter's algorithm 2, in float64, with the values of the test."""

    def __init__(self, beta1, beta2, eps):
        self.beta1, self.beta2, self.eps, self.moments, self.steps = beta1, beta2, eps, {}, 0

    def step(self, weights, gradients, lr, decay_of):
        self.steps += 1
        for name, w in weights.items():
            g, w64 = gradients[name].double(), w.data.double()
            m, v = self.moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = self.beta1 * m + (1 - self.beta1) * g, self.beta2 * v + (1 - self.beta2) * g * g
            self.moments[name] = m, v
            w64 = w64 - lr * decay_of(name, w) * w64
            m_hat, v_hat = m / (1 - self.beta1**self.steps), v / (1 - self.beta2**self.steps)
            w.data = (w64 - lr * m_hat / (v_hat.sqrt() + self.eps)).float()


def decays(name, weight):
    """DESIGN 3: none on parameters with one dimension, nor on the class and mask tokens."""
    return weight.ndim > 1 and name not in ("encoder.class_token", "regressor.mask_token")


FLAGS = ["--size", "nano", "--workers", "0", "--batch-size", "8", "--effective-batch-size", "16", "--log-every", "1",
         "--seed", "3", "--steps", "5", "--warmup-epochs", "0.6", "--lr", "20", "--min-lr", "0.01",
         "--weight-decay", "0.9", "--weight-decay-end", "0.3", "--clip-grad", "0.03", "--beta1", "0.8",
         "--beta2", "0.9", "--adam-eps", "2e-3", "--drop-path", "0.4", "--precision", "fp32"]  # fmt: skip


@pytest.mark.parametrize("method", ["cae-v2", "cae"])
def test_the_steps_are_those_of_a_plain_loop(tmp_path, monkeypatch, method):
    """Five steps of two micro-batches, the fourth of which has a loss that is not finite, though its gradient is.

    The weights matter to every loss, the gradient is clipped throughout, and eps is as large as the gradient, so that
    its length is seen. Random are here the model's start and stochastic depth.
    """
    write_parquet(tmp_path / "data", [53], encode=noise_png)
    batches, calls, forward = record(monkeypatch), [], CAE.forward

    def broken(model, *inputs):
        losses = forward(model, *inputs)
        calls.append(None)
        return {**losses, "loss": losses["loss"] + (math.inf if len(calls) == 8 else 0.0)}  # the fourth's second

    monkeypatch.setattr(CAE, "forward", broken)
    more = ["--target", "pixels"] if method == "cae" else ["--teacher", str(DEMO_TEACHER)]
    flags = ["--dataset", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run"), "--method", method]
    train.train(parse(train.Args, [*flags, *FLAGS, *more]))
    monkeypatch.undo()
    lines = log_of(tmp_path / "run")
    assert len(batches) == 10 and [line["bad_steps"] for line in lines] == [0, 0, 0, 1, 1]

    torch.manual_seed(3)
    model = CAE(CAEConfig.from_size("nano", method, drop_path=0.4, **({"target_dim": 48} if method == "cae" else {})))
    start = {name: w.detach().clone() for name, w in model.named_parameters()}
    optimizer, weights = AdamW(0.8, 0.9, 2e-3), dict(model.named_parameters())
    peak, warmup, clipped = 20 * 16 / 2048, round(0.6 * 53 / 16), []
    for step, line in enumerate(lines):
        sums = {}
        for micro, batch in enumerate(batches[2 * step : 2 * step + 2]):
            pixels = batch["images"] / torch.tensor(255.0)
            target = (clip_targets if method == "cae-v2" else pixel_targets)(pixels)
            torch.manual_seed(seed_of(3, step, micro, 0))
            losses = model.train()((pixels - IMAGENET[0]) / IMAGENET[1], batch["visible"], batch["masked"], target)
            (losses["loss"] / 2).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.item() / 2
        gradients = {name: w.grad for name, w in weights.items()}
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        model.zero_grad()
        # linear from 0 to the peak in the last step of the warm-up, a cosine towards --min-lr over the rest
        turn = math.pi * (step - warmup) / (len(lines) - warmup)
        lr = peak * step / (warmup - 1) if step < warmup else 0.01 + (peak - 0.01) * (1 + math.cos(turn)) / 2
        decay = 0.3 + (0.9 - 0.3) * (1 + math.cos(math.pi * step / len(lines))) / 2
        assert line["lr"] == pytest.approx(lr, rel=1e-12) and line["weight_decay"] == pytest.approx(decay, rel=1e-12)
        if step == 3:
            assert {name for name in line if line[name] is None} >= {"loss", "grad_norm"}
            continue  # nothing of it is left, neither in the weights nor in the moments
        assert set(sums) == {name for name in line if name.startswith("loss")}
        for name, loss in sums.items():
            assert line[name] == pytest.approx(loss, rel=1e-5), (step, name)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        clipped.append(norm / 0.03)
        gradients = {name: g * 0.03 / norm for name, g in gradients.items()}
        optimizer.step(weights, gradients, lr, lambda name, w: decay * decays(name, w))  # noqa: B023
    assert min(clipped) > 2 and warmup == 2
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, w in weights.items():
        if not name.endswith("norm_k.bias"):  # without a true gradient
            moved, off = (w - start[name]).norm(), (found[name] - w).norm()
            assert moved > 1e-5 and off < 1e-4 * moved, (name, moved, off)


class StoredStream:
    """In place of Stream: the images and masks of the released code's own run."""

    names, part, skipped, skipped_names = ("images", "visible", "masked"), 0, 0, ()

    def __init__(self, golden, size):
        masks = golden["masks"]
        self.images = golden["images"].flatten(0, 1).split(size)
        self.visible, self.masked = (wanted.flatten(0, 1).nonzero()[:, 1].view(masks.shape[0] * masks.shape[1], -1)
                                     .split(size) for wanted in (~masks, masks))  # fmt: skip
        self.taken = 0

    def state_dict(self):
        return {0: {"seen": self.taken, "pass": 0}}

    def reported(self):
        pass

    def __next__(self):
        self.taken, i = self.taken + 1, self.taken
        return {"images": self.images[i], "visible": self.visible[i], "masked": self.masked[i]}


class StoredTeacher(torch.nn.Module):
    """The targets of the same run, one batch after the other."""

    patch_pixels = 4

    def __init__(self, golden, size, target_dim):
        super().__init__()
        self.targets, self.target_dim = iter(golden["targets"].flatten(0, 1).split(size)), target_dim

    def forward(self, pixels):
        return next(self.targets)


@pytest.mark.parametrize("token_decay", [True, False])
@pytest.mark.parametrize(("version", "batch_size"), [("v1", 12), ("v2", 6)])
def test_forty_steps_are_those_of_the_released_code(tmp_path, monkeypatch, version, batch_size, token_decay):
    """Through train.train, v2 with accumulation, which it has not. Data and teacher are stored, the model starts from
    its weights. With token_decay, class and mask token are decayed as in its code: the one thing that is undone of what
    is ours by intention. The learning rates are train.py's own, to the last digit.
    """
    with safe_open(GOLDEN / f"trajectory_{version}.safetensors", "pt") as file:
        golden, config = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["config"])  # noqa: SIM118
    parts = {part: {name.removeprefix(f"{part}."): t for name, t in golden.items() if name.startswith(f"{part}.")}
             for part in ("weight", "final")}  # fmt: skip
    method, steps = config["method"], config["epochs"] * config["steps_per_epoch"]
    heads = {name: config[name] for name in ("heads", "regressor_heads")}
    start = load_official(parts["weight"], image_size=28, **heads).state_dict()
    names = ("image_size", "patch_size", "dim", "depth", "heads", "layer_scale", "drop_path")
    size = {"encoder": {name: config[name] for name in names}}
    names = ("regressor_dim", "regressor_heads", "regressor_depth", "decoder_depth", "target_dim")
    size[method] = {name: config[name] for name in names}
    monkeypatch.setitem(cae.SIZES, "golden", size)
    monkeypatch.setitem(train.MASK_RATIO, "golden", 0.5)
    monkeypatch.setattr(cae, "init_weights", lambda model: model.load_state_dict(start))
    images = config["batch"] * config["steps_per_epoch"]
    monkeypatch.setattr(train, "open_source", lambda *_: Source(None, "image", None, images, "stored"))
    monkeypatch.setattr(train, "build_teacher", lambda *_: StoredTeacher(golden, batch_size, config["target_dim"]))
    monkeypatch.setattr(engine.run, "Stream", lambda *_: StoredStream(golden, batch_size))

    def released_groups(model, groups_of=train.parameter_groups):
        decayed, plain = (group["params"] for group in groups_of(model))
        tokens = [model.encoder.class_token, model.regressor.mask_token]
        decayed += tokens
        return [{"params": decayed, "decay": True},
                {"params": [p for p in plain if all(p is not token for token in tokens)], "decay": False}]  # fmt: skip

    if token_decay:
        monkeypatch.setattr(train, "parameter_groups", released_groups)
    flags = ["--dataset", "demo", "--run-dir", tmp_path, "--size", "golden", "--method", method, "--workers", "0",
             "--target", "clip" if version == "v2" else "dalle", "--image-size", "28", "--patch-size", "4",
             "--batch-size", batch_size, "--effective-batch-size", config["batch"], "--log-every", "1",
             "--epochs", config["epochs"], "--warmup-epochs", config["warmup_epochs"],
             "--lr", config["lr_as_used"] * 2048 / config["batch"], "--precision", "fp32"]  # fmt: skip
    train.train(parse(train.Args, [str(flag) for flag in flags]))

    lines = log_of(tmp_path)
    assert len(lines) == steps == 40
    if not token_decay:
        off = [abs(line["loss"] / loss.item() - 1) for line, loss in zip(lines, golden["loss"], strict=True)]
        assert 1e-5 < max(off) < 5e-5, "small, and seen"
        assert [line["lr"] for line in lines] == golden["lr"].tolist()
        return
    for line, loss, norm, lr, decay in zip(
            lines, *(golden[k] for k in ("loss", "grad_norm", "lr", "weight_decay")), strict=True):  # fmt: skip
        assert line["loss"] == pytest.approx(loss.item(), rel=2e-6), line["step"]
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5), line["step"]
        assert (line["lr"], line["weight_decay"]) == (lr, decay), line["step"]
    for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        if not name.endswith("norm_k.bias"):  # without a true gradient
            expected = parts["final"][released_name(name)].view_as(tensor)
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-5, msg=name)
