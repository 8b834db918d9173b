"""pictures.py: what its figures show, by their numbers and not by their pixels, against slow and obvious references;
what cae.py and engine/ compute for it; and every sub-command on the demo and on a folder of pictures."""

import engine.stream
from engine.arguments import DataArgs, parse
from engine.checkpoints import flags_of_checkpoint
from engine.errors import UserError
from engine.evaluation import psnr
from engine.frozen import load_frozen
from engine.images import CenterCrop, coverage, normalize
from engine.sources import open_source

import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from arguments import assert_documented, assert_used, groups
from images import noise_png, write_folder
from launch import ROOT, launch, succeeded
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BeitConfig,
    BeitModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTModel,
)
from zoo import picture

import pictures
import probe
import train
from cae import (
    CAE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    CAEConfig,
    attention_weights,
    block_mask,
    patchify,
    random_mask,
    sincos_positions,
    take,
    unpatchify,
)
from convert import frozen_cae, load_encoder, weights_of

pytestmark = pytest.mark.usefixtures("seeded")
CLIP = ROOT / "demo" / "clip_teacher"


def scrambled(model):
    """With biases, scales and stochastic depth that are not their initial values; in evaluation mode."""
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model.eval()


def nano(method="cae-v2", **options):
    options = {"target_dim": 48 if method == "cae" else 64, "drop_path": 0.5, **options}
    torch.manual_seed(3)
    return scrambled(CAE(CAEConfig.from_size("nano", method, **options)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Run folders, as far as pictures.py reads them, and encoders of other people."""
    root = tmp_path_factory.mktemp("models")
    flags = {"mask_ratio": 0.5, "min_block": 4, "normalize_pixels": False, "teacher": None}
    for name, model, more in [
        ("pixels", nano("cae"), {}),
        ("normalized", nano("cae", align_weight=0.0), {"normalize_pixels": True}),
        ("codes", nano("cae", target_dim=8192), {}),
        ("v2", nano(), {"mask_ratio": 0.25, "teacher": str(CLIP)}),
        ("visible", nano(supervise="visible"), {"teacher": str(CLIP)}),
        ("wide", nano(target_dim=65), {"teacher": str(CLIP)}),
        ("coarse", nano("cae", image_size=28, patch_size=7, target_dim=147), {}),
    ]:
        model.save_pretrained(root / name / "model")
        (root / name / "config.json").write_text(json.dumps({"args": {**flags, **more}, "model": {}}))
        (root / name / "log.jsonl").write_text('{"step": 1}\n')
    torch.manual_seed(4)
    shape = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, image_size=28, patch_size=7)
    wide = dict(**shape, intermediate_size=20)
    kinds = {
        "vit": ViTModel(ViTConfig(**wide)),
        "beit": BeitModel(BeitConfig(**wide, use_relative_position_bias=True)),
        "dinov2": Dinov2Model(Dinov2Config(**shape)),
        "registers": Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_register_tokens=3)),
        "dinov3": DINOv3ViTModel(DINOv3ViTConfig(**wide, num_register_tokens=2)),
    }
    for name, model in kinds.items():
        scrambled(model).save_pretrained(root / name)
    (root / "other_task").mkdir()
    (root / "other_task" / "log.jsonl").write_text("")
    (root / "broken").mkdir()
    (root / "broken" / "log.jsonl").write_text('{"step"')
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Six pictures of odd sizes in one folder, without labels."""
    folder = tmp_path_factory.mktemp("own")
    sizes = [(64, 48), (33, 71), (28, 28), (9, 40), (300, 20), (101, 100)]
    for number, size in enumerate(sizes):
        picture("L" if number == 2 else "RGB", size).rotate(5 * number).save(folder / f"{number}.png")
    return folder


def run(monkeypatch, *command):
    monkeypatch.setattr(sys, "argv", ["pictures.py", *map(str, command)])
    pictures.main()


@pytest.fixture
def draw(monkeypatch, capsys, tmp_path):
    """pictures.py in this process: draw("masks", "--dataset", "demo") -> its result, its output, and the figure, which
    it drew."""
    figures, save = [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, files: (figures.append(figure), save(figure, files)))

    def draw_now(*command, run_dir=tmp_path / "run"):
        capsys.readouterr()
        run(monkeypatch, *command, "--run-dir", run_dir)
        output = capsys.readouterr().out
        result = json.loads((Path(run_dir) / "result.json").read_text())
        assert json.loads(output.strip().splitlines()[-1]) == result and result["task"] == command[0]
        assert result["seed"] == 0 or "--seed" in command
        for file in map(Path, result["output"]):
            assert str(file) in output and file.stat().st_size > 1000
            if file.suffix == ".png":
                with Image.open(file) as image:
                    image.load()
                    assert min(image.size) > 100 and len(set(image.convert("L").get_flattened_data())) > 10
        return SimpleNamespace(result=result, output=output, figure=figures[-1])

    return draw_now


def shown(axis):
    """What an axis's last imshow was given."""
    return torch.from_numpy(np.array(axis.get_images()[-1].get_array()))


# What cae.py gives.


def attention_by_loops(model, images, block):
    """Attention of one block in float64, from the weights by their names, head by head."""
    state = {name: w.double() for name, w in model.encoder.state_dict().items()}
    config = model.config
    patch, width = config.patch_size, config.dim // config.heads

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    maps = []
    for image in images.double():
        rows, columns = image.shape[1] // patch, image.shape[2] // patch
        patches = [image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten()
                   for r in range(rows) for c in range(columns)]  # fmt: skip
        x = torch.stack(patches) @ state["patch_embed.weight"].T + state["patch_embed.bias"]
        x = torch.cat([state["class_token"][0], x + sincos_positions(rows, columns, config.dim).double()])
        for i in range(block + 1):
            name = f"blocks.{i}"
            qkv = norm(f"{name}.norm1", x) @ state[f"{name}.attn.qkv.weight"].T
            q, k, v = qkv.split(config.dim, dim=1)
            q, v, weights, parts = q + state[f"{name}.attn.q_bias"], v + state[f"{name}.attn.v_bias"], [], []
            for head in range(config.heads):
                cut = slice(head * width, (head + 1) * width)
                scores = (q[:, cut] @ k[:, cut].T / math.sqrt(width)).exp()
                weights.append(scores / scores.sum(1, keepdim=True))
                parts.append(weights[-1] @ v[:, cut])
            attended = torch.cat(parts, 1) @ state[f"{name}.attn.proj.weight"].T + state[f"{name}.attn.proj.bias"]
            x = x + state[f"{name}.scale1"] * attended
            hidden = norm(f"{name}.norm2", x) @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"]
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            x = x + state[f"{name}.scale2"] * (hidden @ state[f"{name}.mlp.fc2.weight"].T
                                               + state[f"{name}.mlp.fc2.bias"])  # fmt: skip
        maps.append(torch.stack(weights))
    return torch.stack(maps)


@torch.no_grad()
@pytest.mark.parametrize("size", [(28, 28), (20, 32)])
def test_attention_is_the_softmax_written_out(size):
    """Of every block, from the first and from the last, at any size, also while the model trains."""
    model, images = nano().train(), torch.randn(2, 3, *size)
    tokens = 1 + size[0] * size[1] // 16
    for block in range(4):
        found = model.encoder.attention(images, block)
        assert found.shape == (2, 4, tokens, tokens)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, tokens))
        torch.testing.assert_close(found.double(), attention_by_loops(model, images, block), rtol=1e-4, atol=1e-6)
        assert torch.equal(model.encoder.attention(images, block - 4), found)
    assert torch.equal(model.encoder.attention(images), found)
    for block in (4, -5, 99):
        with pytest.raises(IndexError):
            model.encoder.attention(images, block)


class Recorder:
    """Queries, keys and masks of every fused attention, and what came out."""

    def __init__(self, monkeypatch):
        self.calls, fused = [], F.scaled_dot_product_attention

        def recorded(q, k, v, attn_mask=None, scale=None, **options):
            out = fused(q, k, v, attn_mask=attn_mask, scale=scale, **options)
            assert scale is None or scale == pytest.approx(q.shape[-1] ** -0.5)
            self.calls.append((q, k, v, attn_mask, out))
            return out

        monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)

    def weights(self, block):
        q, k, _, mask, _ = self.calls[block]
        scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
        return (scores if mask is None else scores + mask).softmax(-1)


@torch.no_grad()
def test_attention_weights_are_those_of_the_fused_kernel(monkeypatch):
    model, images = nano("cae", drop_path=0.0), torch.randn(2, 3, 28, 28)
    visible, masked = block_mask(2, (7, 7), 25, min_block=4)
    recorder = Recorder(monkeypatch)
    model.predict(images, visible, masked)
    assert len(recorder.calls) == 4 + 2 + 2, "encoder, regressor, decoder"
    for q, k, v, _, out in recorder.calls:
        torch.testing.assert_close(attention_weights(q, k) @ v, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("supervise", ["both", "visible", "masked"])
def test_a_prediction_is_what_the_loss_of_cae_v2_is_made_of(supervise):
    """Whatever is supervised: all tokens, class token first, then visible and masked patches."""
    model, images, target = nano(supervise=supervise), torch.randn(3, 3, 28, 28), torch.randn(3, 50, 64)
    visible, masked = block_mask(3, (7, 7), 13, min_block=4)
    with torch.no_grad():
        prediction, losses = model.predict(images, visible, masked), model(images, visible, masked, target)
    assert prediction.shape == (3, 50, 64) and torch.allclose(prediction.norm(dim=-1), torch.ones(3, 50))
    distances = torch.empty(3, 50)
    for image in range(3):
        for place, token in enumerate([0, *(1 + visible[image]).tolist(), *(1 + masked[image]).tolist()]):
            distances[image, place] = 1 - F.cosine_similarity(prediction[image, place], target[image, token], dim=0)
    parts = {"loss_cls": distances[:, :1], "loss_visible": distances[:, 1:37], "loss_masked": distances[:, 37:]}
    assert losses.keys() - {"loss"} == {"both": set(parts), "masked": {"loss_masked"},
                                        "visible": {"loss_cls", "loss_visible"}}[supervise]  # fmt: skip
    for name in losses.keys() - {"loss"}:
        torch.testing.assert_close(parts[name].mean(), losses[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["pixels", "codes"])
def test_a_prediction_is_what_the_loss_of_cae_is_made_of(kind):
    model, images = nano("cae"), torch.randn(3, 3, 28, 28)
    visible, masked = block_mask(3, (7, 7), 25, min_block=4)
    target = torch.randn(3, 49, 48) if kind == "pixels" else torch.randint(48, (3, 49))
    with torch.no_grad():
        prediction, losses = model.predict(images, visible, masked), model(images, visible, masked, target)
    wanted = torch.stack([target[image, index] for image, index in enumerate(masked)])
    expected = ((prediction - wanted) ** 2).mean() if kind == "pixels" else -prediction.log_softmax(-1).gather(
        2, wanted[..., None]).mean()  # fmt: skip
    torch.testing.assert_close(expected, losses["loss_reconstruct"], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_latents_are_decoded_without_the_regressor():
    """The encoder sees all patches; of the regressor no weight counts."""
    model, images = nano("cae"), torch.randn(2, 3, 28, 28)
    everything = torch.arange(49).expand(2, -1)
    found = model.decode_latents(images)
    assert found.shape == (2, 49, 48)
    torch.testing.assert_close(found, model.decoder(model.encode(images)[:, 1:], everything, (7, 7)))
    for weight in model.regressor.parameters():
        weight.fill_(math.nan)
    assert torch.equal(model.decode_latents(images), found)
    model.encoder.norm.weight[0] += 1
    assert not torch.allclose(model.decode_latents(images), found)


@pytest.mark.parametrize("order", ["c p q", "p q c"])
@pytest.mark.parametrize("size", [(28, 28), (8, 20)])
def test_unpatchify_undoes_patchify(order, size):
    images = torch.randn(2, 3, *size)
    assert torch.equal(unpatchify(patchify(images, 4, order), 4, (size[0] // 4, size[1] // 4), order), images)
    patch = patchify(images, 4, "p q c")[1, 1]  # the second: right of the first
    assert torch.equal(unpatchify(patch[None, None], 4, (1, 1)), images[1:, :, :4, 4:8]), "MAE's order is the default"


# Attention of any encoder.


@pytest.mark.parametrize("size", [28, 42])
@pytest.mark.parametrize("kind", ["vit", "beit", "dinov2", "registers", "dinov3", "clip", "cae"])
def test_attention_of_a_frozen_encoder(models, monkeypatch, kind, size):
    """Of the class token to the patches, as its fused kernel weighs them in a forward pass; which runs as before."""
    if kind == "cae":
        encoder = frozen_cae(nano())
        size = 28 if size == 28 else 40
    else:
        encoder = load_frozen(str(CLIP if kind == "clip" else models / kind), "--checkpoint")
        size = size if kind != "clip" else encoder.own_size * size // 28
        before = encoder.model.config._attn_implementation
        assert before == "sdpa", "what pictures are not drawn with"
    pixels = torch.rand(2, 3, size, size)
    tokens = encoder(pixels)
    patches = (size // encoder.patch_size) ** 2
    recorder = Recorder(monkeypatch)
    assert torch.equal(encoder(pixels), tokens)
    expected = [recorder.weights(block)[:, :, 0, -patches:] for block in range(len(recorder.calls))]
    recorder.calls.clear()
    for block in (0, 1, -1):
        found = encoder.attention(pixels, block)
        assert found.shape == (2, encoder.heads, patches) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected[block], rtol=1e-4, atol=1e-6)
        assert (found.sum(-1) < 1).all() and not found.requires_grad
    with pytest.raises(IndexError):
        encoder.attention(pixels, 99)
    if kind != "cae":
        assert not recorder.calls, "the softmax was written out"
        assert encoder.model.config._attn_implementation == before
    assert torch.equal(encoder(pixels), tokens) and recorder.calls


# Attention of a probe's query.


def test_where_an_attentive_query_looks(monkeypatch):
    head, tokens = probe.AttentiveHead(24, 3, 5), torch.randn(4, 9, 24)
    scrambled(head)
    recorder = Recorder(monkeypatch)
    head(tokens)
    found = pictures.query_attention(head.state_dict(), tokens, 3)
    assert found.shape == (4, 3, 9)
    torch.testing.assert_close(found.double(), recorder.weights(0)[:, :, 0], rtol=1e-5, atol=1e-6)
    # by hand, for one image and one head
    weights = {name: w.double() for name, w in head.state_dict().items()}

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    q = norm("norm_q", weights["query"][0, 0]) @ weights["attn.q.weight"].T + weights["attn.q.bias"]
    k = norm("norm_k", tokens[2].double()) @ weights["attn.k.weight"].T
    expected = (k[:, 8:16] @ q[8:16] / math.sqrt(8)).softmax(0)
    torch.testing.assert_close(found[2, 1].double(), expected, rtol=1e-5, atol=1e-6)


def test_where_the_queries_of_an_efficient_probe_look(monkeypatch):
    head, tokens = scrambled(probe.EfficientHead(24, 4, 5)), torch.randn(3, 9, 24)
    recorder = Recorder(monkeypatch)
    head(tokens)
    found = pictures.query_attention(head.state_dict(), tokens, 3)
    assert found.shape == (3, 4, 9)
    torch.testing.assert_close(found.double(), recorder.weights(0), rtol=1e-5, atol=1e-6)
    expected = (tokens[1].double() @ head.query[0, 2].double() / math.sqrt(24)).softmax(0)
    torch.testing.assert_close(found[1, 2].double(), expected, rtol=1e-5, atol=1e-6)


def write_probe(folder, encoder, head, more_heads=(), **flags):
    """A run folder of probe.py attentive, as far as pictures.py reads it."""
    checkpoint = folder / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    state = probe.Heads([head, *more_heads]).state_dict()
    save_file({name: w.contiguous() for name, w in state.items()}, checkpoint / "model.safetensors")
    (checkpoint / "trainer.json").write_text('{"step": 2}')
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in checkpoint.iterdir()]
    (checkpoint / "SHA256SUMS").write_text("".join(sums))
    flags = {"task": "attentive", "weights": weights_of(encoder), "tokens": "patches", **flags}
    (folder / "config.json").write_text(json.dumps({"args": flags, "model": {}}))
    return folder


# Reconstructions.


def test_psnr():
    assert psnr(0.01) == pytest.approx(20) and psnr(1.0) == 0 and psnr(1e-5) == pytest.approx(50)
    assert psnr(0) == math.inf


class Fake(SimpleNamespace):
    """In place of a CAE: given predictions."""

    config = CAEConfig.from_size("nano", "cae", target_dim=48)

    def predict(self, inputs, visible, masked):
        return self.prediction[masked.shape[1]]

    def decode_latents(self, inputs):
        return self.prediction[49]


@pytest.mark.parametrize("normalized", [False, True])
def test_a_perfect_prediction_gives_back_the_image(normalized):
    """By train.py's own targets, with and without --normalize-pixels."""
    images = torch.rand(3, 3, 28, 28)
    visible, masked = block_mask(3, (7, 7), 25, min_block=4)
    target = train.PixelTeacher(SimpleNamespace(normalize_pixels=normalized), 4)(images)
    fake = Fake(prediction={25: take(target, masked), 49: target})
    found, errors = pictures.reconstructed(fake, images, visible, masked, normalized)
    for name in ("regressed", "encoded"):
        torch.testing.assert_close(found[name], images, rtol=1e-4, atol=1e-5)
        assert errors[name] < 1e-9
    _, errors = pictures.reconstructed(fake, images, visible, masked, not normalized)
    assert min(errors.values()) > 1e-3, "the flag of the run counts"


@pytest.mark.parametrize("normalized", [False, True])
def test_errors_of_reconstructions_equal_a_slow_loop(normalized):
    model, images = nano("cae"), torch.rand(2, 3, 28, 28)
    visible, masked = block_mask(2, (7, 7), 25, min_block=4)
    inputs = normalize(images, IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        predicted, decoded = model.predict(inputs, visible, masked), model.decode_latents(inputs)
    pictured, errors = pictures.reconstructed(model, images, visible, masked, normalized)
    squares = {"regressed": [], "encoded": []}
    for image in range(2):
        of_patch = {"regressed": dict(zip(masked[image].tolist(), predicted[image], strict=True)),
                    "encoded": dict(enumerate(decoded[image]))}  # fmt: skip
        for name, patches in of_patch.items():
            for patch in range(49):
                top, left = 4 * (patch // 7), 4 * (patch % 7)
                cut = (slice(None), slice(top, top + 4), slice(left, left + 4))
                if patch not in patches:
                    assert torch.equal(pictured[name][image][cut], images[image][cut]), "the visible are copied"
                    continue
                values = patches[patch].view(4, 4, 3).permute(2, 0, 1)
                if normalized:
                    own = inputs[image][cut]
                    values = values * (own.var() + 1e-6).sqrt() + own.mean()
                values = torch.stack([values[c] * IMAGENET_STD[c] + IMAGENET_MEAN[c] for c in range(3)]).clamp(0, 1)
                torch.testing.assert_close(pictured[name][image][cut], values, rtol=1e-4, atol=1e-5)
                squares[name] += ((values - images[image][cut]) ** 2).flatten().tolist()
    assert len(squares["regressed"]) == 2 * 25 * 48 and len(squares["encoded"]) == 2 * 49 * 48
    for name, values in squares.items():
        assert errors[name] == pytest.approx(sum(values) / len(values), rel=1e-4)


@pytest.mark.parametrize("grid", [(7, 7), (2, 5)])
def test_covered_are_the_masked_patches(grid):
    images = torch.rand(2, 3, 4 * grid[0], 4 * grid[1])
    _, masked = random_mask(2, grid, 6)
    covered, colour = pictures.cover(images, masked, 4), torch.tensor(pictures.MASKED)
    for image in range(2):
        for patch in range(grid[0] * grid[1]):
            top, left = 4 * (patch // grid[1]), 4 * (patch % grid[1])
            cut = (image, slice(None), slice(top, top + 4), slice(left, left + 4))
            expected = colour[:, None, None].expand(3, 4, 4) if patch in masked[image] else images[cut]
            assert torch.equal(covered[cut], expected)


def test_reconstruct(draw, models):
    """Two models side by side, each as its run says; their PSNR is that of all the images that were measured."""
    folders = [models / "pixels", models / "normalized" / "model"]
    found = draw("reconstruct", "--checkpoint", *folders, "--dataset", "demo", "--count", 3, "--measured", 70)
    first, second = found.result["models"]
    assert (first["align_weight"], first["normalize_pixels"]) == (2.0, False)
    assert (second["align_weight"], second["normalize_pixels"]) == (0.0, True)
    assert (found.result["measured"], found.result["images"], found.result["masked"]) == (70, 3, 25)
    assert len(found.figure.axes) == 3 * (2 + 2 * 2)
    # the same once more, in one piece
    args = parse(pictures.Reconstruct, ["--dataset", "demo"])
    images = pictures.pictures(args.data, 28, 70, 0)[0] / 255
    assert images.shape == (70, 3, 28, 28)
    count = pictures.resolve_masks(args.target, Fake.config, {})
    visible, masked = pictures.draw_masks(args, Fake.config, 70, count)
    for model, of in ((nano("cae"), first), (nano("cae", align_weight=0.0), second)):
        pictured, errors = pictures.reconstructed(model, images, visible, masked, of["normalize_pixels"])
        for name, error in errors.items():
            assert of["psnr"][name] == pytest.approx(psnr(error), abs=0.011)
            assert f"{of['psnr'][name]:.2f}" in found.output
        rows = found.figure.axes[6:12] if of is first else found.figure.axes[12:]
        for axis, image in zip(rows, [*pictured["regressed"][:3], *pictured["encoded"][:3]], strict=True):
            torch.testing.assert_close(shown(axis), image.permute(1, 2, 0), rtol=1e-4, atol=1e-5)
    for axis, image in zip(found.figure.axes[3:6], pictures.cover(images[:3], masked[:3], 4), strict=True):
        torch.testing.assert_close(shown(axis), image.permute(1, 2, 0))
    titles = [axis.get_ylabel() for axis in found.figure.axes[::3]]
    assert titles[:2] == ["image", "masked"] and "λ = 2" in titles[2] and "λ = 0" in titles[5]


def test_masks_follow_flags_then_the_run_then_the_recipe(models):
    def drawn(*flags, of_run=None, seed=0):
        args = parse(pictures.Targets, [*flags, "--seed", str(seed)])
        count = pictures.resolve_masks(args.target, Fake.config, of_run or {})
        visible, masked = pictures.draw_masks(args, Fake.config, 40, count)
        together = torch.cat([visible, masked], 1).sort(1).values
        assert torch.equal(together, torch.arange(49).expand(40, -1))
        return masked

    assert drawn().shape == (40, 25), "half of 49 patches, rounded up"
    of_run = flags_of_checkpoint(models / "v2")
    assert of_run["mask_ratio"] == 0.25 and flags_of_checkpoint(models / "v2" / "model") == of_run
    assert flags_of_checkpoint(models / "vit") == flags_of_checkpoint("some/hub-id") == {}
    assert drawn(of_run=of_run).shape == (40, 13) and drawn("--mask-ratio", "0.1", of_run=of_run).shape == (40, 5)
    assert torch.equal(drawn(), drawn()) and not torch.equal(drawn(), drawn(seed=1))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(drawn("--min-block", "9"), block_mask(40, (7, 7), 25, min_block=9, generator=generator)[1])
    generator = torch.Generator().manual_seed(0)
    random = random_mask(40, (7, 7), 25, generator=generator)[1]
    assert torch.equal(drawn("--mask", "random"), random) and torch.equal(drawn(of_run={"mask": "random"}), random)


# Targets.


def test_cosines_are_one_less_the_losses(models):
    """Of training itself, with its teacher, on the same images."""
    model, images = nano(), torch.rand(6, 3, 28, 28)
    visible, masked = block_mask(6, (7, 7), 13, min_block=4)
    teacher = train.CLIPTeacher(SimpleNamespace(teacher=str(CLIP)), 4).eval()
    with torch.no_grad():
        losses = model(normalize(images, IMAGENET_MEAN, IMAGENET_STD), visible, masked, teacher(images))
    clip = load_frozen(str(CLIP), "--teacher", ("clip_vision_model", "clip"), projection=True)
    of_class, of_patches = pictures.cosines(model, clip, images, visible, masked)
    assert of_class.shape == (6,) and of_patches.shape == (6, 49)
    assert 1 - of_class.mean().item() == pytest.approx(losses["loss_cls"].item(), abs=1e-6)
    assert 1 - of_patches.gather(1, visible).mean().item() == pytest.approx(losses["loss_visible"].item(), abs=1e-6)
    assert 1 - of_patches.gather(1, masked).mean().item() == pytest.approx(losses["loss_masked"].item(), abs=1e-6)


def test_targets(draw, models):
    """A frame around each masked patch; the map is of the cosines that the result has the means of."""
    found = draw("targets", "--checkpoint", models / "v2", "--dataset", "demo", "--count", 2, "--measured", 70)
    assert found.result["teacher"] == str(CLIP) and found.result["mask_ratio"] == 0.25
    assert (found.result["masked"], found.result["measured"]) == (13, 70)
    axes = found.figure.axes
    assert [axis.get_ylabel().split("\n")[0] for axis in axes[:6:2]] == ["image", "masked", "cosine"]
    args = parse(pictures.Targets, ["--dataset", "demo"])
    images = pictures.pictures(args.data, 28, 70, 0)[0] / 255
    count = pictures.resolve_masks(args.target, Fake.config, {"mask_ratio": 0.25})
    visible, masked = pictures.draw_masks(args, Fake.config, 70, count)
    clip = load_frozen(str(CLIP), "--teacher", ("clip_vision_model", "clip"), projection=True)
    of_class, of_patches = pictures.cosines(nano(), clip, images, visible, masked)
    means = {"class": of_class.mean(), "visible": of_patches.gather(1, visible).mean(),
             "masked": of_patches.gather(1, masked).mean()}  # fmt: skip
    for name, mean in means.items():
        assert found.result["cosine"][name] == pytest.approx(mean.item(), abs=1e-4)
    for column in range(2):
        torch.testing.assert_close(shown(axes[4 + column]), of_patches[column].view(7, 7), rtol=1e-4, atol=1e-5)
        frames = {(int(line.get_ydata()[0]) // 4, int(line.get_xdata()[0]) // 4) for line in axes[4 + column].lines}
        assert frames == {divmod(patch, 7) for patch in masked[column].tolist()}
        assert len(axes[4 + column].lines) == 13
    found = draw("targets", "--checkpoint", models / "visible", "--dataset", "demo", "--count", 1, "--measured", 4)
    assert "nothing has taught the regressor" in found.output


# Embeddings.


def test_principal_components():
    """Against numpy's singular values; of the two signs the one in which the farthest row is positive."""
    x = torch.randn(40, 7) @ torch.diag(torch.tensor([9.0, 5, 3, 2, 1, 0.5, 0.1])) + 3
    found = pictures.principal_components(x, 3)
    centred = x.double().numpy() - x.double().numpy().mean(0)
    _, _, rows = np.linalg.svd(centred, full_matrices=False)
    for i in range(3):
        expected = centred @ rows[i]
        expected *= np.sign(expected[np.abs(expected).argmax()])
        np.testing.assert_allclose(found[:, i].numpy(), expected, rtol=1e-6, atol=1e-6)
        assert found[found[:, i].abs().argmax(), i] > 0
    # fewer rows than values, and rows that are all the same
    assert pictures.principal_components(torch.randn(5, 30), 2).shape == (5, 2)
    assert not pictures.principal_components(torch.ones(5, 3), 2).any()


def test_colours_are_colours():
    components = torch.randn(500, 3, dtype=torch.float64) * torch.tensor([1.0, 100, 1e-5])
    found = pictures.as_colours(components)
    assert found.min() == 0 and found.max() == 1
    assert ((found == 0).sum(0) == 10).all() and ((found == 1).sum(0) == 10).all(), "2 % of 500, at either end"
    for i in range(3):
        order = components[:, i].argsort()
        assert (found[order, i].diff() >= 0).all(), "the scale of each goes up"
    assert pictures.as_colours(torch.ones(5, 3)).isfinite().all()


@pytest.mark.parametrize("kind", ["tsne", "pca"])
def test_a_projection_is_that_of_its_seed(kind):
    features = torch.cat([torch.randn(20, 8) + 9 * torch.eye(8)[i] for i in range(3)])
    found = pictures.project(features, kind, 0)
    assert found.shape == (60, 2) and torch.equal(found, pictures.project(features, kind, 0))
    nearest = torch.cdist(found.double(), found.double()).fill_diagonal_(math.inf).argmin(1)
    assert (nearest // 20 == torch.arange(60) // 20).double().mean() > 0.9, "groups stay together"


def groups_of(axis):
    """{label: points} of a scatter plot."""
    return {dots.get_label(): np.array(dots.get_offsets()) for dots in axis.collections}


@pytest.mark.parametrize("projection", ["tsne", "pca"])
def test_embedding(draw, models, projection):
    """Each point under its class, and what the result says of them; encoders see the same images."""
    flags = ["--dataset", "demo", "--points", 60, "--count", 3, "--classes", 4, "--projection", projection]
    found = draw("embedding", "--checkpoint", models / "v2", CLIP, "--random-init", "nano", *flags, "--pool", "mean")
    assert [of["encoder"] for of in found.result["encoders"]] == ["random init nano", str(models / "v2"), str(CLIP)]
    assert found.result["classes"] == ["t-shirt", "trouser", "pullover", "dress"] and found.result["pool"] == "mean"
    data = parse(pictures.Embedding, ["--dataset", "demo"]).data
    images, labels, classes = pictures.pictures(data, 28, 60, 0, classes=4)
    assert len(classes) == 4 and 50 < len(labels) <= 60 and labels.max() == 3, "of a stream more are drawn"
    with torch.no_grad():
        features = frozen_cae(nano())(images / 255)
    points = pictures.project(features[:, 1:].mean(1), projection, 0)
    above, below = found.figure.subfigs
    titles = [axis.get_title() for axis in above.axes]
    assert titles[0] == "random weights, nano" and len(titles) == 3
    groups = groups_of(above.axes[1])
    assert list(groups) == found.result["classes"]
    right = []
    for number, (name, dots) in enumerate(groups.items()):
        assert len(dots) == (labels == number).sum()
        if projection == "pca":
            np.testing.assert_allclose(dots, points[labels == number].numpy(), rtol=1e-3, atol=1e-4, err_msg=name)
    dots = np.concatenate(list(groups.values()))
    of_dots = np.concatenate([[number] * len(dots) for number, dots in enumerate(groups.values())])
    for i, dot in enumerate(dots):
        distances = ((dots - dot) ** 2).sum(1)
        distances[i] = math.inf
        right.append(of_dots[distances.argmin()] == of_dots[i])
    of = found.result["encoders"][1]
    assert of["points"] == len(dots) and of["same_class"] == pytest.approx(100 * np.mean(right), abs=0.01)
    # below: the pictures, and for each encoder their patches in colours
    assert len(below.axes) == 4 * 3
    colours = pictures.as_colours(pictures.principal_components(features[:3, 1:].flatten(0, 1), 3)).view(3, 7, 7, 3)
    for column in range(3):
        torch.testing.assert_close(shown(below.axes[column]), images[column].permute(1, 2, 0) / 255)
        torch.testing.assert_close(shown(below.axes[6 + column]).double(), colours[column], rtol=1e-3, atol=1e-3)


# Crops.


def test_coverage_is_a_count():
    boxes = torch.stack([torch.randint(5, (30,)), torch.randint(7, (30,)), torch.randint(4, (30,)),
                         torch.randint(4, (30,))], dim=1)  # fmt: skip
    boxes = torch.cat([boxes, torch.tensor([[0, 0, 8, 10], [7, 9, 1, 1]])])  # the whole image, and its last pixel
    expected = torch.zeros(8, 10, dtype=torch.int64)
    for top, left, height, width in boxes.tolist():
        expected[top : top + height, left : left + width] += 1
    assert torch.equal(coverage(boxes, 8, 10), expected)


def test_frequencies_of_crops_and_masks(monkeypatch):
    asked = pictures.Crops.Views(height=60, width=90, grid=7, min_block=4, draws=300, mask_ratio=0.3)
    maps = pictures.frequencies(asked, 5)
    assert [maps[name].shape for name in ("crop", "masked", "block", "random")] == [(60, 90), (60, 90), (7, 7), (7, 7)]
    for name in ("block", "random"):
        assert maps[name].mean().item() == pytest.approx(15 / 49, abs=1e-6), "exactly so many are masked in each draw"
    assert (maps["masked"] <= maps["crop"]).all() and maps["crop"].max() <= 1
    assert maps["masked"].sum() / maps["crop"].sum() == pytest.approx(15 / 49, abs=0.02)
    assert maps["crop"][30, 45] > 3 * maps["crop"][0, 0] and maps["block"][3, 3] > 2 * maps["block"][0, 0]
    again = pictures.frequencies(asked, 5)
    assert all(torch.equal(again[name], values) for name, values in maps.items())
    assert not torch.equal(pictures.frequencies(asked, 6)["crop"], maps["crop"])
    # were all patches masked, each pixel of the crop would be, once
    monkeypatch.setattr(pictures, "block_mask", lambda batch, grid, *_, **__: (None, torch.arange(49).repeat(batch, 1)))
    maps = pictures.frequencies(asked, 5)
    torch.testing.assert_close(maps["masked"], maps["crop"])
    # and were it the upper left one, it would be the upper left seventh of each crop
    monkeypatch.setattr(pictures, "block_mask", lambda batch, *_, **__: (None, torch.zeros(batch, 1).long()))
    boxes = []
    coverage = pictures.coverage
    monkeypatch.setattr(pictures, "coverage", lambda found, *size: (boxes.append(found), coverage(found, *size))[1])
    maps, expected = pictures.frequencies(asked, 5), torch.zeros(60, 90)
    crops = max(boxes, key=lambda found: found[:, 2].sum())
    for top, left, height, width in crops.tolist():
        expected[top : top + round(height / 7), left : left + round(width / 7)] += 1 / 300
    torch.testing.assert_close(maps["masked"], expected, rtol=1e-4, atol=1e-5)


def test_crops(draw):
    flags = ["--draws", 200, "--height", 50, "--width", 80, "--grid", 7, "--min-block", 4, "--mask-ratio", 0.4]
    found = draw("crops", *flags)
    maps = pictures.frequencies(pictures.Crops.Views(height=50, width=80, grid=7, min_block=4, mask_ratio=0.4,
                                                     draws=200), 0)  # fmt: skip
    assert found.result["draws"] == 200 and found.result["frequency"].keys() == maps.keys()
    for axis, (name, values) in zip(found.figure.axes, maps.items(), strict=False):
        torch.testing.assert_close(shown(axis), values)
        middle, corner = values[values.shape[0] // 2, values.shape[1] // 2], values[0, 0]
        assert found.result["frequency"][name] == {"middle": pytest.approx(100 * middle.item(), abs=0.01),
                                                   "corner": pytest.approx(100 * corner.item(), abs=0.01)}  # fmt: skip
        assert axis.get_title() == pictures.CROP_TITLES[name] and f"{middle:.0%}" in [t.get_text() for t in axis.texts]


# Masks, attention.


def test_masks(draw):
    """As many patches in colour as the title says."""
    found = draw("masks", "--dataset", "demo", "--mask-ratio", 0.1, 0.6, "--count", 2)
    assert found.result["grid"] == [7, 7] and found.result["masked"] == [5, 30]
    axes = np.array(found.figure.axes).reshape(2, 5)
    assert [axis.get_title() for axis in axes[0]] == ["image", "block-wise\n10%", "block-wise\n60%", "random\n10%",
                                                      "random\n60%"]  # fmt: skip
    colour = torch.tensor(pictures.MASKED)
    for row in axes:
        whole = shown(row[0])
        for axis, count in zip(row[1:], (5, 30, 5, 30), strict=True):
            is_covered = torch.isclose(shown(axis), colour, atol=1e-6).all(-1)
            patches = is_covered.unfold(0, 4, 4).unfold(1, 4, 4).flatten(2).sum(-1)
            assert set(patches.flatten().tolist()) <= {0, 16} and (patches == 16).sum() == count
            assert torch.equal(shown(axis)[~is_covered], whole[~is_covered])
    other = draw("masks", "--dataset", "demo", "--mask-ratio", 0.1, 0.6, "--count", 2, "--seed", 1)
    assert not torch.equal(shown(other.figure.axes[1]), shown(found.figure.axes[1]))


@pytest.mark.parametrize("name", ["v2", "clip", "registers"])
def test_attention(draw, models, name):
    """A column for the mean, one for each head, at a size of one's own."""
    path = CLIP if name == "clip" else models / name
    encoder = load_encoder(SimpleNamespace(checkpoint=str(path), random_init=None))
    size = encoder.image_size + 2 * encoder.patch_size
    flags = ["--dataset", "demo", "--block", 1, "--image-size", size, "--count", 2]
    found = draw("attention", "--checkpoint", path, *flags)
    data = parse(pictures.Attention, ["--dataset", "demo"]).data
    images = pictures.pictures(data, size, 2, 0)[0] / 255
    maps = encoder.attention(images, 1)
    side = size // encoder.patch_size
    axes = np.array(found.figure.axes).reshape(2, 2 + encoder.heads)
    assert [a.get_title() for a in axes[0][:3]] == ["image", "mean of\nheads", "head 0"]
    for row, image, heads in zip(axes, images, maps, strict=True):
        torch.testing.assert_close(shown(row[0]), image.permute(1, 2, 0))
        for axis, values in zip(row[1:], [heads.mean(0), *heads], strict=True):
            torch.testing.assert_close(shown(axis), values.view(side, side), rtol=1e-4, atol=1e-6)
            assert axis.get_images()[-1].get_clim() == (0, pytest.approx(values.max().item(), rel=1e-4))
    assert found.result["heads"] == encoder.heads and found.result["block"] == 1
    assert found.result["to_patches"] == pytest.approx(maps.sum(-1).mean().item(), abs=1e-4)
    expected = 1 if name != "registers" else None  # some goes to the registers
    assert expected is None or 0 < found.result["to_patches"] < expected


@pytest.mark.parametrize("kind", ["attentive", "ep", "attentive, all tokens"])
def test_attention_of_a_probe(draw, models, tmp_path, kind):
    """Of its first head, on the tokens that it was trained on; its run folder knows the encoder."""
    encoder = frozen_cae(CAE.from_pretrained(models / "v2" / "model"))
    make = (lambda: probe.EfficientHead(96, 4, 5)) if kind == "ep" else (lambda: probe.AttentiveHead(96, 4, 5))
    head, other = scrambled(make()), scrambled(make())
    folder = write_probe(tmp_path / "probe", encoder, head, [other], task=kind.split(",")[0],
                         tokens="all" if "all" in kind else "patches", checkpoint=str(models / "v2"))  # fmt: skip
    found = draw("attention", "--probe", folder, "--dataset", "demo", "--count", 2)
    images = pictures.pictures(parse(pictures.Attention, ["--dataset", "demo"]).data, 28, 2, 0)[0] / 255
    tokens = encoder(images)
    with torch.no_grad():
        expected = pictures.query_attention(head.state_dict(), tokens if "all" in kind else tokens[:, 1:], 4)
    axes = np.array(found.figure.axes).reshape(2, 7)
    assert axes[0][2].get_title() == "attentive\nprobe" and found.result["probe"] == str(folder)
    for row, maps in zip(axes, expected, strict=True):
        values = maps.mean(0)[-49:].view(7, 7)
        torch.testing.assert_close(shown(row[2]), values, rtol=1e-3, atol=1e-6)
        assert ("all" in kind) == (values.sum() < 0.9999)


# Images.


def test_a_folder_of_pictures_is_shown_by_name(own):
    """Flat, without labels, any size; fewer than asked for are no mistake. Of a data set they are drawn."""
    data = pictures.PictureData(images=str(own))
    images, labels, classes = pictures.pictures(data, 28, 100, 7)
    assert images.shape == (6, 3, 28, 28) and labels is None and classes is None
    source, view = open_source(DataArgs(dataset=str(own), workers=0)), CenterCrop(28, 1.0)
    names = [Path(file).name for file in sorted(own.iterdir())]
    assert names == [f"{i}.png" for i in range(6)]
    for number, image in enumerate(images):
        with Image.open(own / f"{number}.png") as file:
            pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(image, view(pixels, 0)[0])
    assert source.num_images == 6
    few = pictures.pictures(pictures.PictureData(images=str(own)), 28, 2, 0)[0]
    assert torch.equal(few, images[:2])
    data = pictures.PictureData(dataset=str(own))
    drawn = pictures.pictures(data, 28, 2, 7)[0]
    assert torch.equal(drawn, pictures.pictures(pictures.PictureData(dataset=str(own)), 28, 2, 7)[0])
    others = [pictures.pictures(pictures.PictureData(dataset=str(own)), 28, 2, seed)[0] for seed in range(5)]
    assert not all(torch.equal(other, drawn) for other in others)


def test_labels_are_those_of_the_pictures(tmp_path):
    """Of a folder with class folders, in order; and by loading processes as well."""
    write_folder(tmp_path, 80, lambda n: noise_png(n, (12, 12)))
    data = pictures.PictureData(images=str(tmp_path), workers=2)
    images, labels, classes = pictures.pictures(data, 12, 70, 0)
    assert labels is None and classes is None and images.shape == (70, 3, 12, 12), "nobody asked for labels"
    alone = pictures.pictures(pictures.PictureData(images=str(tmp_path), workers=0), 12, 70, 0)[0]
    assert torch.equal(images, alone)
    for workers in (0, 2):  # at random among all of them, and yet in the order of the data
        data = pictures.PictureData(images=str(tmp_path), workers=workers)
        some, labels, classes = pictures.pictures(data, 12, 70, 0, classes=2)
        assert classes == ["even", "odd"] and labels.tolist() == sorted(labels.tolist()) and len(labels) == 70
        assert labels.sum() > 30 and not torch.equal(some, images)
    some, labels, classes = pictures.pictures(data, 12, 70, 0, classes=1)
    assert classes == ["even"] and labels.tolist() == [0] * 40 and torch.equal(some, images[:40])


def test_a_sample_is_that_of_its_seed():
    data = DataArgs(dataset="demo", streaming=True, split="test", workers=0)
    source = open_source(data, labelled=True)
    a, b, c = (engine.stream.sample(source, CenterCrop(28, 1.0), 5, seed) for seed in (0, 0, 1))
    assert torch.equal(a["images"], b["images"]) and not torch.equal(a["images"], c["images"])
    assert len(a["labels"]) == 5
    for workers in (1, 3):  # and of no number of cores
        again = engine.stream.sample(source, CenterCrop(28, 1.0), 5, 0, workers)
        assert torch.equal(a["images"], again["images"])
    unknown = dataclasses.replace(source, num_images=None)
    assert len(engine.stream.sample(unknown, CenterCrop(28, 1.0), 1100, 0)["images"]) == 1000, "none twice"


# Curves.


def write_run(folder, lines, **flags):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"args": flags, "model": {}}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line_of(step, **values):
    return {"step": step, "epoch": step / 10, "images": 64 * step, **values}


@pytest.fixture
def runs(tmp_path):
    one = write_run(tmp_path / "one", [
        line_of(20, loss=1.5, lr=0.1, loss_masked=0.7, images_per_second=90.0, weight_decay=0.05),
        line_of(40, loss=math.nan, lr=0.2, loss_masked=0.6, images_per_second=80.0),
        line_of(50, knn_top1=30.0),
        line_of(60, loss=1.1, lr=None, loss_masked="0.5", images_per_second=math.inf),
    ])  # fmt: skip
    with (one / "log.jsonl").open("a") as file:
        file.write('"a word"\n{"step": 70, "loss": 1.0, "ima')
    two = write_run(tmp_path / "two", [line_of(20, loss=2.0, top1=40.0), line_of(40, loss=1.0, top1=50.0)])
    return one, two


def test_curves_are_what_the_runs_have_logged(runs):
    """Without what is not finite, no number, or cut off."""
    one, two = map(str, runs)
    found = pictures.curves_of([one, f"{two}=mine"], "images")
    assert set(found) == {"loss", "loss_masked", "knn_top1", "top1", "lr", "images_per_second"}
    assert found["loss"] == {one: ([1280, 3840], [1.5, 1.1]), "mine": ([1280, 2560], [2.0, 1.0])}
    assert found["loss_masked"] == {one: ([1280, 2560], [0.7, 0.6])}
    assert found["lr"][one] == ([1280, 2560], [0.1, 0.2]) and found["images_per_second"][one][1] == [90.0, 80.0]
    assert found["knn_top1"] == {one: ([3200], [30.0])} and found["top1"] == {"mine": ([1280, 2560], [40.0, 50.0])}
    assert pictures.curves_of([one], "step")["loss"][one][0] == [20, 60]
    assert pictures.curves_of([one], "epoch")["loss"][one][0] == [2.0, 6.0]
    assert [line["step"] for line in pictures.read_log(one)] == [20, 40, 50, 60]


def test_the_figure_of_curves(draw, runs):
    one, two = map(str, runs)
    found = draw("curves", one, f"{two}=mine")
    axes = {axis.get_title(): axis for axis in found.figure.axes if axis.get_visible()}
    assert next(iter(axes)) == "loss" and axes.keys() == {"loss", "loss, masked patches", "kNN top-1, %", "top-1, %",
                                                          "learning rate", "images/s"}  # fmt: skip
    lines = {line.get_label(): line for line in axes["loss"].lines}
    assert lines.keys() == {one, "mine"}
    assert list(lines[one].get_xdata()) == [1280, 3840] and list(lines[one].get_ydata()) == [1.5, 1.1]
    assert list(lines["mine"].get_ydata()) == [2.0, 1.0]
    (line,) = axes["top-1, %"].lines
    assert line.get_color() == lines["mine"].get_color() != lines[one].get_color(), "a run has its colour everywhere"
    assert axes["images/s"].get_ylim()[0] == 0
    assert {Path(file).suffix for file in found.result["output"]} == {".png", ".svg"}
    assert found.result["last"]["loss"] == {one: 1.1, "mine": 1.0} and found.result["runs"] == [one, f"{two}=mine"]
    assert found.result["parts"] == ["loss_masked"] and "1.1" in found.output


def test_many_images_are_counted_in_thousands():
    found = {"loss": {"a": ([1000, 12_000], [2.0, 1.0])}}
    figure = pictures.draw_curves(found, ["a"], "images")
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, 12] and figure.axes[0].get_xlabel() == "thousand images"
    figure = pictures.draw_curves(found, ["a"], "step")
    assert list(figure.axes[0].lines[0].get_xdata()) == [1000, 12_000] and figure.axes[0].get_xlabel() == "step"


# Sweeps.


def write_probed(folder, top1, task="knn", steps=10, done=10, **flags):
    """A pretraining run, and the probe of it in its folder."""
    flags = {"mask_ratio": 0.5, "size": "nano", "supervise": "both", "steps": steps, "epochs": None, **flags}
    write_run(folder, [line_of(1), line_of(done)], **flags)
    if top1 is not None:
        (folder / task).mkdir()
        result = {"task": task, "top1": top1, "encoder": str(folder)}
        (folder / task / "result.json").write_text(json.dumps(result))
    return str(folder)


@pytest.fixture
def swept(tmp_path):
    root, number = tmp_path / "sweep", 0
    for supervise in ("both", "visible"):
        for size in ("tiny", "nano"):
            for ratio in (0.75, 0.25):
                for seed in range(2):
                    value = 40 + 10 * (size == "tiny") + 20 * ratio + seed + 3 * (supervise == "both")
                    flags = {"size": size, "mask_ratio": ratio, "supervise": supervise, "seed": seed}
                    write_probed(root / f"r{number}", value, **flags)
                    number += 1
    write_probed(root / "short", 90.0, done=4)
    write_probed(root / "short_epochs", 90.0, steps=None, epochs=2.0, done=15)
    write_probed(root / "bare", None)
    return root


KEYS = ("supervise", "size", "mask_ratio")


def test_a_sweep_groups_runs_by_their_flags(swept):
    folders = [str(path) for path in sorted(swept.iterdir())]
    scores, task, left_out = pictures.sweep_of(folders, KEYS)
    assert task == "knn" and len(scores) == 8
    assert sorted(scores["both", "tiny", 0.75]) == [68.0, 69.0]
    assert sorted(scores["visible", "nano", 0.25]) == [45.0, 46.0]
    assert sorted(note.rpartition("/")[2] for note in left_out) == [
        "bare: no result yet", "short: not trained to its end", "short_epochs: not trained to its end"]  # fmt: skip
    complete = write_probed(swept / "whole", 1.0, steps=None, epochs=2.0, done=20)
    assert pictures.sweep_of([complete], KEYS)[0] == {("both", "nano", 0.5): [1.0]}
    # a flag of several values
    cropped = [write_probed(swept / f"c{low}", low, crop_scale=[low, 1.0]) for low in (0.2, 0.6)]
    assert set(pictures.sweep_of(cropped, ("supervise", "size", "crop_scale"))[0]) == {
        ("both", "nano", "0.2 1.0"), ("both", "nano", "0.6 1.0")}  # fmt: skip


def test_what_a_sweep_cannot_use_is_left_out(tmp_path):
    """A run whose log is lost, an encoder that is no run; and of a flag that nobody gave counts what the model has."""
    whole, lost = write_probed(tmp_path / "whole", 50.0, regressor_depth=None), write_probed(tmp_path / "lost", 90.0)
    (tmp_path / "lost" / "log.jsonl").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "result.json").write_text('{"task": "knn", "top1": 66.0, "encoder": "random init nano"}')
    scores, _, left_out = pictures.sweep_of([whole, lost, str(tmp_path / "other")], KEYS)
    assert scores == {("both", "nano", 0.5): [50.0]}
    assert left_out == [f"{lost}: not trained to its end", "random init nano: no run folder of train.py"]
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps({**config, "model": {"regressor_depth": 2}}))
    given = write_probed(tmp_path / "given", 60.0, regressor_depth=2)
    keys = ("supervise", "size", "regressor_depth")
    assert pictures.sweep_of([whole, given], keys)[0] == {("both", "nano", 2): [50.0, 60.0]}


def test_names_of_runs(tmp_path):
    """A folder may have = in its name; two runs of one name would be one line."""
    odd = str(write_run(tmp_path / "lr=0.1", [line_of(1, loss=1.0)]))
    assert list(pictures.curves_of([odd], "step")["loss"]) == [odd]
    assert list(pictures.curves_of([f"{odd}=mine"], "step")["loss"]) == ["mine"]
    with pytest.raises(UserError, match="two runs are called mine: give RUN=NAME"):
        pictures.curves_of([f"{odd}=mine", f"{odd}=mine"], "step")


@pytest.mark.parametrize("form", ["", "/model"])
def test_a_probes_own_folder_stands_for_its_run(tmp_path, form):
    run = write_probed(tmp_path / "run", None)
    (tmp_path / "run" / "model").mkdir()
    folder = tmp_path / "linear"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps({"task": "linear", "top1": 61.5, "encoder": run + form}))
    assert pictures.sweep_of([str(folder)], KEYS) == ({("both", "nano", 0.5): [61.5]}, "linear", [])


def test_results_of_several_tasks_need_a_choice(tmp_path):
    run = write_probed(tmp_path / "run", 50.0)
    (tmp_path / "run" / "linear").mkdir()
    (tmp_path / "run" / "linear" / "result.json").write_text('{"task": "linear", "top1": 70.0, "encoder": "x"}')
    (tmp_path / "run" / "drawn").mkdir()
    (tmp_path / "run" / "drawn" / "result.json").write_text('{"task": "attention", "heads": 3}')
    (tmp_path / "run" / "cut").mkdir()
    (tmp_path / "run" / "cut" / "result.json").write_text('{"task": "li')
    with pytest.raises(UserError, match="results of several tasks, knn, linear: pass --task"):
        pictures.sweep_of([run], KEYS)
    assert pictures.sweep_of([run], KEYS, "linear") == ({("both", "nano", 0.5): [70.0]}, "linear", [])
    with pytest.raises(UserError, match=r"no run has a result to draw; .*run: no result of ep yet"):
        pictures.sweep_of([run], KEYS, "ep")


def test_the_figure_of_a_sweep(draw, swept):
    found = draw("sweep", *sorted(swept.iterdir()), "--task", "knn")
    assert [axis.get_title() for axis in found.figure.axes] == ["supervise: both", "supervise: visible"]
    assert found.figure.axes[0].get_ylabel() == "kNN top-1, %"
    lines = {line.get_label(): line for line in found.figure.axes[0].lines if not line.get_label().startswith("_")}
    assert list(lines) == ["nano", "tiny"], "as SIZES has them"
    assert list(lines["tiny"].get_xdata()) == [0.25, 0.75] and list(lines["tiny"].get_ydata()) == [58.5, 68.5]
    assert list(lines["nano"].get_ydata()) == [48.5, 58.5]
    dots = sorted(y for line in found.figure.axes[1].lines if line.get_marker() == "." for y in line.get_ydata())
    assert dots == [45.0, 46.0, 55.0, 55.0, 56.0, 56.0, 65.0, 66.0], "every run is a point"
    (row,) = [r for r in found.result["rows"] if [r[key] for key in KEYS] == ["both", "tiny", 0.75]]
    assert sorted(row["values"]) == [68.0, 69.0] == [row["min"], row["max"]]
    assert (row["runs"], row["mean"]) == (2, 68.5)
    assert len(found.result["left_out"]) == 3 and found.result["of"] == "knn" and found.output.count("left out: ") == 3
    # other flags, of which one is no number
    found = draw("sweep", *sorted(swept.glob("r*")), "--x", "size", "--line", "mask_ratio", "--panel", "seed")
    axis = found.figure.axes[0]
    assert axis.get_title() == "seed: 0" and [t.get_text() for t in axis.get_xticklabels()] == ["nano", "tiny"]
    assert [line.get_label() for line in axis.lines if not line.get_label().startswith("_")] == ["0.25", "0.75"]


# Every sub-command.


def test_without_labels_and_with_few_pictures(draw, own, models):
    """Six pictures of odd sizes are enough for all that show pictures."""
    found = draw("embedding", "--checkpoint", models / "pixels", "--images", own)
    of = found.result["encoders"][0]
    assert of["points"] == 6 and "same_class" not in of and found.result["classes"] is None
    assert found.result["dataset"] == str(own) and len(found.figure.subfigs[1].axes) == 2 * 6
    found = draw("reconstruct", "--checkpoint", models / "pixels", "--images", own)
    assert found.result["measured"] == 6
    assert len(found.figure.axes) == 4 * 6
    found = draw("targets", "--checkpoint", models / "v2", "--images", own)
    assert found.result["measured"] == 6
    found = draw("attention", "--checkpoint", models / "dinov3", "--images", own, "--count", 5)
    assert found.result["images"] == 5
    found = draw("masks", "--images", own, "--image-size", 64)
    assert found.result["grid"] == [4, 4] and found.result["images"] == 4


def test_real_processes_draw_the_same_files(draw, models, runs, tmp_path):
    """As this one does, bit by bit: .png, .svg and .pdf. Nothing but them and result.json is in the run folder."""
    for command, kinds in [(("attention", "--checkpoint", models / "v2", "--dataset", "demo", "--count", 2), ["png"]),
                           (("curves", *runs), ["png", "svg"])]:  # fmt: skip
        folders = [tmp_path / command[0] / name for name in ("here", "process")]
        draw(*command, run_dir=folders[0])
        process = succeeded(launch("pictures.py", *command, "--run-dir", folders[1], warm=True))
        result = json.loads((folders[1] / "result.json").read_text())
        assert json.loads(process.stdout.strip().splitlines()[-1]) == result and not process.stderr
        for kind in kinds:
            first, second = (folder / f"{command[0]}.{kind}" for folder in folders)
            assert first.read_bytes() == second.read_bytes(), kind
        assert {path.name for path in folders[1].iterdir()} == {"result.json", *(f"{command[0]}.{k}" for k in kinds)}


def test_a_figure_is_the_same_each_time_in_every_format(draw, tmp_path):
    for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        files = [tmp_path / "somewhere" / f"{name}.{kind}" for name in "ab"]
        for file in files:
            assert draw("crops", "--draws", 20, "--output", file).result["output"] == [str(file)]
        assert files[0].read_bytes() == files[1].read_bytes() and files[0].read_bytes().startswith(start), kind
    assert len(list((tmp_path / "somewhere").iterdir())) == 6, "no temporary file is left"


def test_files_of_curves(draw, runs, tmp_path):
    assert draw("curves", *runs, "--output", tmp_path / "c.pdf").result["output"] == [str(tmp_path / "c.pdf")]
    expected = [str(tmp_path / "c.png"), str(tmp_path / "c.svg")]
    assert draw("curves", *runs, "--output", tmp_path / "c.svg").result["output"] == expected


def test_the_default_folder_is_named_after_what_is_drawn():
    for command, name in [
        (["masks", "--dataset", "demo"], "runs/pictures-masks-demo"),
        (["attention", "--checkpoint", "runs/cae-demo", "--dataset", "demo"], "runs/pictures-attention-cae-demo"),
        (["targets", "--checkpoint", "runs/mine/model", "--images", "/x/my pictures"],
         "runs/pictures-targets-mine-my-pictures"),
        (["reconstruct", "--checkpoint", "runs/a", "runs/b", "--dataset", "demo"], "runs/pictures-reconstruct-a-demo"),
        (["crops"], "runs/pictures-crops"), (["curves", "runs/a"], "runs/pictures-curves"),
    ]:  # fmt: skip
        args = parse(pictures.KINDS[command[0]], command[1:])
        assert pictures.default_folder(command[0], args) == name


@pytest.mark.parametrize(("flags", "message"), [
    ("reconstruct --dataset demo", "give --checkpoint: run folders of train.py --method cae --target pixels"),
    ("attention --dataset demo", "give either --checkpoint or --random-init"),
    ("attention --dataset demo --checkpoint {models}/v2 --random-init nano", "give either --checkpoint or"),
    ("embedding --dataset demo", "give --checkpoint or --random-init"),
    ("targets --dataset demo", "give --checkpoint: a run folder of train.py, of CAE v2"),
    ("reconstruct --dataset demo --checkpoint {models}/codes", "predicts 8192 codes, of which no picture can be made"),
    ("reconstruct --dataset demo --checkpoint {models}/v2", "v2 is cae-v2: run folders of train.py --method cae"),
    ("reconstruct --dataset demo --checkpoint {models}/pixels {models}/coarse", "another grid of patches"),
    ("reconstruct --dataset demo --checkpoint {models}/vit", "vit cannot be loaded"),
    ("reconstruct --dataset demo --checkpoint {models}/empty", "empty cannot be loaded"),
    ("reconstruct --dataset demo --checkpoint {models}/pixels --mask-ratio 0", "--mask-ratio 0.0 masks 0 of 49"),
    ("reconstruct --dataset demo --checkpoint {models}/pixels --mask-ratio 1", "--mask-ratio 1.0 masks 49 of 49"),
    ("reconstruct --dataset demo --checkpoint {models}/pixels --min-block 0", "--min-block is 0: it must be positive"),
    ("reconstruct --dataset demo --checkpoint {models}/pixels --measured 0", "--measured is 0: it must be positive"),
    ("targets --dataset demo --checkpoint {models}/pixels", "pixels is cae: a run folder of train.py, of CAE v2"),
    ("targets --dataset demo --checkpoint {models}/wide", "has latents of 64 values, --checkpoint"),
    ("targets --dataset demo --checkpoint {models}/v2 --teacher {models}/vit", "is a vit: a CLIP vision model"),
    ("targets --dataset demo --checkpoint {models}/v2 --mask-ratio 1", "--mask-ratio 1.0 masks 49 of 49"),
    ("attention --dataset demo --checkpoint {models}/v2 --block 99", "--block 99 does not exist: blocks are counted"),
    ("attention --dataset demo --checkpoint {models}/vit --block -4", "--block -4 does not exist"),
    ("attention --dataset demo --checkpoint {models}/v2 --image-size 30", "--image-size 30 is not divisible by"),
    ("attention --dataset demo --checkpoint {models}/v2 --image-size 0", "--image-size 0 is not divisible by"),
    ("attention --dataset demo --checkpoint {models}/v2 --probe {models}/v2", "is no run folder of probe.py attentive"),
    ("attention --dataset demo --checkpoint {models}/v2 --probe {probe}", "whose weights are others"),
    ("attention --dataset demo --checkpoint {models}/v2 --count 0", "--count is 0: it must be positive"),
    ("masks --dataset demo --count 0", "--count is 0: it must be positive"),
    ("masks --dataset demo --count 100000", "--count 100000 does not fit in a figure"),
    ("masks --dataset demo --mask-ratio 0.5 0", "--mask-ratio 0.0 masks 0 of 49 patches"),
    ("masks --dataset demo --mask-ratio 1", "--mask-ratio 1.0 masks 49 of 49 patches"),
    ("masks --dataset demo --image-size 30", "--image-size 30 is not divisible by --patch-size 4"),
    ("masks --dataset demo --patch-size 0", "--patch-size is 0: it must be positive"),
    ("masks --dataset demo --output x.jpg", "--output x.jpg is no .png, .svg or .pdf"),
    ("masks --dataset no/such/folder/here", "data set no/such/folder/here does not exist"),
    ("masks --images {models}/empty", "empty"),
    ("masks --images {models}/gone", "gone"),
    ("masks --images {own}/0.png", "0.png is no folder: name one with pictures"),
    ("masks --dataset demo --split dev", "has no split 'dev': it has train, test"),
    ("embedding --dataset demo --checkpoint {models}/v2 --points 2", "--points 2 is too few"),
    ("embedding --dataset demo --checkpoint {models}/v2 --classes 0", "--classes is 0: it must be positive"),
    ("embedding --dataset demo --random-init giant", "--random-init giant does not exist: nano, tiny"),
    ("embedding --images {own} --count 3 --points 3 --checkpoint {models}/v2", "at least four are needed"),
    ("crops --mask-ratio 1", "--mask-ratio 1.0 masks 196 of 196 patches"),
    ("crops --mask-ratio 0", "--mask-ratio 0.0 masks 0 of 196 patches"),
    ("crops --crop-scale 0 1", "--crop-scale is 0.0 1.0: two areas"),
    ("crops --draws 0", "--draws is 0: it must be positive"),
    ("curves", "name run folders: pictures.py curves runs/a runs/b"),
    ("curves {models}/vit", "vit is no run folder: its log.jsonl cannot be read"),
    ("curves {models}/gone=mine", "gone is no run folder"),
    ("curves {models}/other_task", "has no line yet: wait for the run's first steps"),
    ("curves {models}/broken", "has no line yet"),
    ("curves {models}/v2", "have nothing to draw against images"),
    ("sweep", "name run folders: pictures.py sweep runs/sweep/*"),
    ("sweep {models}/v2", "no run has a result to draw; "),
    ("sweep {probed} --x no_such_flag", "has no flag no_such_flag in its config.json: choose others of mask_ratio"),
    ("sweep {probed} --task ep", "no result of ep yet"),
])  # fmt: skip
def test_mistakes_end_with_one_line_and_code_2(models, own, tmp_path, monkeypatch, capsys, flags, message):
    """And leave nothing behind."""
    if "{probe}" in flags:
        write_probe(tmp_path / "probe", frozen_cae(nano("cae")), probe.AttentiveHead(96, 4, 5))
    if "{probed}" in flags:
        write_probed(tmp_path / "probed", 50.0)
    command = flags.format(models=models, own=own, probe=tmp_path / "probe", probed=tmp_path / "probed").split()
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *command, "--run-dir", tmp_path / "run")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1, error
    assert message in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["checkpoints", "log.jsonl", "model"])
def test_runs_of_another_kind_keep_their_folder(monkeypatch, capsys, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "crops", "--draws", "10", "--run-dir", tmp_path / "run")
    assert stop.value.code == 2 and "holds a run of another kind" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


@pytest.mark.parametrize("command", [("crops",), ("attention", "--random-init", "nano", "--dataset", "demo")])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_two_processes_are_refused(monkeypatch, capsys, tmp_path, command, rank):
    """As a launcher starts them; one of them says it."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", rank), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *command, "--run-dir", tmp_path / "run")
    line = "error: pictures.py draws in one process: start it with python, without a launcher\n"
    assert stop.value.code == 2 and capsys.readouterr().err == (line if rank == "0" else "")
    assert not (tmp_path / "run").exists()


def test_every_argument_is_used():
    assert_used(pictures.KINDS.values(), pictures)


@pytest.mark.parametrize("command", pictures.KINDS)
def test_every_argument_is_documented_and_grouped(capsys, command):
    with pytest.raises(SystemExit) as stop:
        parse(pictures.KINDS[command], ["--help"])
    assert stop.value.code == 0 and set(groups(pictures.KINDS[command]))
    assert_documented(pictures.KINDS[command], capsys.readouterr().out)
