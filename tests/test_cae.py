"""Tests of cae.py, and of what convert.py reads and what it makes for BEiT: against golden values of the released
implementation (tests/golden, see its metadata), and against slow, written-out formulas in this file. No expected number
here was produced by cae.py itself."""

import argparse
import collections
import copy
import dataclasses
import functools
import json
import logging
import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cae
import convert
from cae import CAE, CAEConfig, block_mask, random_mask
from convert import load_official, to_beit

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = ["cae_v1", "cae_v2", "cae_v2_narrow"]
LOSS_KEYS = {
    "visible": {"loss", "loss_cls", "loss_visible"},
    "masked": {"loss", "loss_masked"},
    "both": {"loss", "loss_cls", "loss_visible", "loss_masked"},
}
SETTINGS = {  # every combination of method and excluded parts, as CAEConfig fields
    "v2 visible": dict(method="cae-v2", supervise="visible"),
    "v2 masked": dict(method="cae-v2", supervise="masked"),
    "v2 both": dict(method="cae-v2", supervise="both"),
    "v2 both, R = D": dict(method="cae-v2", supervise="both", regressor_dim=16),
    "v1": dict(method="cae", decoder_depth=2),
    "v1, R = D": dict(method="cae", decoder_depth=1, regressor_dim=16),
    "v1 without decoder blocks": dict(method="cae", decoder_depth=0),
    "v1 without alignment": dict(method="cae", decoder_depth=1, align_weight=0.0),
    "v1 without reconstruction": dict(method="cae", decoder_depth=1, reconstruct_weight=0.0),
}
EVERY_SETTING = pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS.keys())

# ---------------------------------------------------------------------------------------------------------- helpers


@functools.cache
def golden(name):
    """Tensors of a golden file, and its configuration."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["config"])


def released(name, prefix=""):
    """The weights of a golden file under the released names."""
    tensors, _ = golden(name)
    return {prefix + k.removeprefix("weight."): v.clone() for k, v in tensors.items() if k.startswith("weight.")}


def load_golden(name, weights=None, **overrides):
    """The model of a golden file; heads are what no shape tells."""
    fields = {"heads": 4, "regressor_heads": 4, "drop_path": 0.0, **overrides}
    return load_official(released(name) if weights is None else weights, **fields)


def indices(mask):
    """Boolean mask (B, N), True = masked -> visible and masked indices, ascending."""
    return tuple(torch.stack([row.nonzero()[:, 0] for row in m]) for m in (~mask, mask))


def golden_batch(name):
    """images, visible, masked, target of a golden file."""
    tensors, _ = golden(name)
    target = tensors["codebook"] if "codebook" in tensors else tensors["clip_tokens"]
    return tensors["images"].clone(), *indices(tensors["mask"]), target


def small_config(**fields):
    """4 x 4 patches, D = 16, R = 8 unless said otherwise."""
    small = dict(image_size=16, patch_size=4, dim=16, depth=2, heads=2, target_dim=12, drop_path=0.0)
    small.update(regressor_dim=8, regressor_depth=2, regressor_heads=4)
    return CAEConfig(**{**small, **fields})


def small_model(seed=0, **fields):
    """A small model in train mode whose parameters are all random, so that no bias is 0 and no scale is 1."""
    torch.manual_seed(seed)
    model = CAE(small_config(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "scale" in name or (".norm" in name and name.endswith("weight")):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3)
    return model


def small_batch(config, num_masked=6, batch=2, size=(16, 16), pixels=False, seed=1):
    """images, visible, masked, target; codes for cae unless pixels are asked for."""
    generator = torch.Generator().manual_seed(seed)
    n = (size[0] // config.patch_size) * (size[1] // config.patch_size)
    order = torch.rand(batch, n, generator=generator).argsort(1)
    masked, visible = order[:, :num_masked].sort(1).values, order[:, num_masked:].sort(1).values
    images = torch.randn(batch, 3, *size, generator=generator)
    if config.method == "cae-v2":
        target = torch.randn(batch, 1 + n, config.target_dim, generator=generator)
    elif pixels:
        target = torch.randn(batch, n, config.target_dim, generator=generator)
    else:
        target = torch.randint(config.target_dim, (batch, n), generator=generator)
    return images, visible, masked, target


def close(actual, expected, tolerance):
    """Equal to an absolute tolerance, shapes and all."""
    torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=tolerance)


def close_relative(actual, expected, tolerance):
    """Equal to a tolerance relative to the largest expected value."""
    close(actual, expected, tolerance * expected.detach().abs().max().item())


def refuse(*args, **kwargs):
    raise AssertionError("this must not run")


# ------------------------------------------------------------------------------------------- golden values, section 6


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_configuration_is_read_from_the_tensors(name, caplog):
    config = dict(golden(name)[1])
    config.pop("num_masked")
    with caplog.at_level(logging.WARNING, logger="convert"):
        model = load_golden(name)
    actual = dataclasses.asdict(model.config)
    assert {k: actual[k] for k in config} == config
    assert caplog.records == []  # nothing was assumed or made up


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_outputs(name):
    tensors, config = golden(name)
    model, (images, visible, masked, target) = load_golden(name), golden_batch(name)
    assert masked.shape[1] == config["num_masked"]
    grid = (4, 4)
    z_visible = model.latents(images, visible)
    z_masked = model.regressor(z_visible[:, 1:], visible, masked, grid)
    close(z_masked, tensors["latent_predict"], 1e-5)
    if config["method"] == "cae":
        close(model.decoder(z_masked, masked, grid), tensors["logits"], 1e-5)
        close(model.alignment_target(images, masked), tensors["latent_target"], 1e-5)
    else:
        close(model.head(torch.cat([z_visible, z_masked], dim=1)), tensors["prediction"], 1e-5)
    close(model.encode(images), tensors["encoder_full"], 1e-5)
    losses = model(images, visible, masked, target)
    assert losses.keys() == {k for k in tensors if k.startswith("loss")}
    for part, value in losses.items():
        close(value, tensors[part], 1e-5)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_gradients(name):
    tensors, _ = golden(name)
    model, (images, visible, masked, target) = load_golden(name).train(), golden_batch(name)
    images.requires_grad_()
    model(images, visible, masked, target)["loss"].backward()
    close_relative(images.grad, tensors["grad.images"], 1e-4)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    ours = {convert.released_name(n): n for n in model.state_dict()}
    norms = {ours[k[10:]]: v for k, v in tensors.items() if k.startswith("grad_norm.")}
    without_norm = {n for n in gradients if n.endswith("norm_k.bias")}  # its gradient is rounding noise
    assert norms.keys() == gradients.keys() - without_norm
    wrong = {n: (gradients[n].norm().item(), v.item()) for n, v in norms.items()}
    wrong = {n: pair for n, pair in wrong.items() if abs(pair[0] - pair[1]) > 1e-4 * pair[1]}
    assert not wrong
    whole = {k[5:]: v for k, v in tensors.items() if k.startswith("grad.") and k != "grad.images"}
    assert len(whole) >= 8
    for key, expected in whole.items():
        actual = gradients[ours[key]].view_as(expected)
        close(actual, expected, 1e-5)
        close_relative(actual, expected, 1e-4)


def test_alignment_target_ignores_stochastic_depth():
    """The released code's targets are perturbed in train mode; ours are those of evaluation, without a mode switch."""
    tensors, _ = golden("cae_v1")
    model, (images, visible, masked, _) = load_golden("cae_v1", drop_path=0.9).train(), golden_batch("cae_v1")
    torch.manual_seed(0)
    for _ in range(5):
        target = model.alignment_target(images, masked)
        close(target, tensors["latent_target"], 1e-5)
        assert not target.requires_grad
    assert all(module.training for module in model.modules())
    latents = [model.latents(images, visible) for _ in range(20)]  # while the student's latents are perturbed
    assert any(not torch.equal(latents[0], other) for other in latents[1:])


def test_aligned_loss_in_train_mode_uses_the_undisturbed_target():
    """loss_align is lambda times the MSE between what the regressor really returned and the golden target."""
    tensors, _ = golden("cae_v1")
    model, batch = load_golden("cae_v1", drop_path=0.9).train(), golden_batch("cae_v1")
    regressed = []
    model.regressor.register_forward_hook(lambda module, args, output: regressed.append(output))
    for seed in range(5):
        torch.manual_seed(seed)
        loss = model(*batch)["loss_align"]
        close(loss, 2 * F.mse_loss(regressed[-1], tensors["latent_target"]), 1e-5)
    assert any(not torch.equal(regressed[0], other) for other in regressed[1:])


# ------------------------------------------------------------------------------------- load_official: what it accepts


def assert_same_weights(model, expected):
    """Two models hold the same parameters and configuration."""
    assert model.config == expected.config
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_load_from_training_checkpoint_and_safetensors(name, tmp_path):
    weights, expected = released(name), load_golden(name)
    args = argparse.Namespace(lr=1.5e-3, model="cae_base", flags=["--a"], nested=argparse.Namespace(x=None))
    training, bare, tensors = tmp_path / "training.pth", tmp_path / "bare.pth", tmp_path / "weights.safetensors"
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 299, "args": args}, training)
    torch.save(weights, bare)
    save_file(weights, tensors)
    for path in (training, bare, tensors):
        assert_same_weights(load_golden(name, path), expected)
        assert_same_weights(load_golden(name, str(path)), expected)
    assert_same_weights(load_golden(name, {"model": weights}), expected)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed for our reading only
    assert not load_golden(name, training).training


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_load_with_ddp_prefix(name):
    assert_same_weights(load_golden(name, released(name, prefix="module.")), load_golden(name))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_with_aliased_alignment_encoder(prefix):
    """Released v1 files hold the encoder twice, and only that tells v1 where the decoder has no blocks."""
    weights = released("cae_v1")
    aliases = {f"alignment_{k}": v.clone() for k, v in weights.items() if k.startswith("encoder.")}
    whole = {prefix + k: v for k, v in {**weights, **aliases}.items()}
    assert_same_weights(load_golden("cae_v1", whole), load_golden("cae_v1"))
    shallow = {k: v for k, v in whole.items() if "decoder_blocks" not in k}
    model = load_golden("cae_v1", shallow)
    assert (model.config.method, model.config.decoder_depth) == ("cae", 0)


@pytest.mark.parametrize("name", ["cae_v2", "cae_v2_narrow"])
def test_load_v2_with_and_without_its_unused_norm(name):
    weights = released(name)
    without = {k: v for k, v in weights.items() if not k.startswith("regresser.norm.")}
    assert len(without) == len(weights) - 2
    assert_same_weights(load_golden(name, without), load_golden(name, weights))


def test_load_without_fixed_positions():
    """The positions are a formula, not weights: a file may lack both tables; then the size is assumed."""
    weights = {k: v for k, v in released("cae_v2").items() if "pos_embed" not in k}
    assert_same_weights(load_golden("cae_v2", weights, image_size=32), load_golden("cae_v2"))


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_load_encoder_only(name, caplog):
    """LW-DETR's files: {"model": {"encoder.*"}}. The encoder is whole; the rest is new, and the log says so."""
    tensors, _ = golden(name)
    weights = {"model": {k: v for k, v in released(name).items() if k.startswith("encoder.")}}
    with caplog.at_level(logging.WARNING, logger="convert"):
        model = load_official(weights)  # heads too have to be assumed
    assert f"heads={model.config.heads}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="convert"):
        model = load_official(weights, heads=4, method="cae-v2")
    assert "regressor and head" in caplog.text and "freshly initialised" in caplog.text
    assert "assumed" not in caplog.text and "class token" not in caplog.text
    close(model.encode(tensors["images"]), tensors["encoder_full"], 1e-5)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def with_narrow_attention(heads):
    """A v1 checkpoint whose regressor and decoder have attention of heads * (width // heads), as the released modules
    would: what the flags of v1's large script ask for, 12 heads in 1,024 channels, is 1,020 wide."""
    weights = released("cae_v1")
    width = weights["mask_token"].shape[-1]
    inner = heads * (width // heads)
    assert inner < width
    for name in list(weights):
        if name.startswith(("regresser.", "decoder.")):
            if re.search(r"cross_attn\.([qkv]\.weight|[qv]_bias)$|\.attn\.[qv]_bias$", name):
                weights[name] = weights[name][:inner]
            elif name.endswith("attn.qkv.weight"):
                weights[name] = weights[name].view(3, width, width)[:, :inner].flatten(0, 1)
            elif name.endswith("attn.proj.weight"):
                weights[name] = weights[name][:, :inner]
    return weights, inner, width


def test_of_attention_narrower_than_its_regressor_the_encoder_is_taken(caplog):
    weights, inner, width = with_narrow_attention(12)
    with caplog.at_level(logging.WARNING, logger="convert"):
        model = load_official({"model": weights}, heads=4, regressor_heads=4, drop_path=0.0)
    assert f"attention {inner} wide in a regressor of {width}" in caplog.text
    assert "only its encoder is taken, regressor and decoder are freshly initialised" in caplog.text
    assert "assumed" not in caplog.text and caplog.text.count("freshly") == 1
    whole, (tensors, _) = load_golden("cae_v1"), golden("cae_v1")
    assert model.config == whole.config and not model.regressor.mask_token.equal(whole.regressor.mask_token)
    assert torch.equal(model.encode(tensors["images"]), whole.encode(tensors["images"]))
    assert torch.isfinite(torch.stack([p.sum() for p in model.parameters()])).all()


def test_attention_1020_wide_is_that_of_12_heads_in_1024_channels():
    """At its real widths, beside what is damaged: one matrix alone, or no number of heads that gives it."""
    def weights(*shapes):
        names = [f"regresser.regressor_blocks.{i}.cross_attn.{part}.weight" for i in range(4) for part in "qkv"]
        return {name: torch.zeros(1).expand(shapes[i % len(shapes)]) for i, name in enumerate(names)}

    assert convert._narrow_attention(weights((1020, 1024))) == (1020, 1024)
    for shapes in ([(1024, 1024)], [(768, 768)], [(1020, 1024), (1024, 1024)], [(1024, 1020)], [(1000, 1024)], [(9,)]):
        assert convert._narrow_attention(weights(*shapes)) is None
    assert convert._narrow_attention({}) is None


def test_a_damaged_encoder_beside_narrow_attention_is_named():
    weights, _, _ = with_narrow_attention(12)
    del weights["encoder.blocks.0.mlp.fc1.weight"]
    with pytest.raises(ValueError, match=r"missing: encoder\.blocks\.0\.mlp\.fc1\.weight$"):
        load_official(weights, heads=4)


def test_load_encoder_with_fewer_blocks_and_no_positions(caplog):
    tensors, _ = golden("cae_v2")
    weights = {k: v for k, v in released("cae_v2").items() if k.startswith("encoder.") and "blocks.1" not in k}
    del weights["encoder.pos_embed"]
    with caplog.at_level(logging.WARNING, logger="convert"):
        model = load_official({"model": weights}, heads=4)
    assert "image_size=" in caplog.text and "regressor and head" in caplog.text
    assert model.config.depth == 1
    whole = load_golden("cae_v2")
    whole.encoder.blocks = whole.encoder.blocks[:1]
    assert torch.equal(model.encode(tensors["images"]), whole.encode(tensors["images"]))


def test_load_encoder_without_class_token_and_norm(caplog):
    weights = {k: v for k, v in released("cae_v2").items() if k.startswith("encoder.")}
    weights = {k: v for k, v in weights.items() if not k.startswith(("encoder.cls_token", "encoder.norm."))}
    with caplog.at_level(logging.WARNING, logger="convert"):
        model = load_official(weights, heads=4)
    assert "class token and final LayerNorm" in caplog.text and "freshly initialised" in caplog.text
    whole = load_golden("cae_v2").encoder.state_dict()
    for name, value in model.encoder.state_dict().items():
        if name.startswith(("blocks.", "patch_embed.")):
            assert torch.equal(value, whole[name])


@pytest.mark.parametrize(
    ("dim", "regressor_dim", "heads", "regressor_heads"), [(192, 96, 12, 12), (384, 768, 12, 12), (768, 256, 12, 4)]
)
def test_load_assumes_heads_by_the_table_and_says_so(dim, regressor_dim, heads, regressor_heads, caplog):
    """Real widths: the narrow golden file's names, its shapes scaled up. Off the table, a head has 64 channels."""
    d, r = dim, regressor_dim
    scaled = {1: 1, 32: d, 96: 3 * d, 128: 4 * d, 16: r, 64: 4 * r, 24: 512, 17: 197}
    shapes = {k: [scaled.get(s, s) for s in v.shape] for k, v in released("cae_v2_narrow").items()}
    weights = {k: torch.zeros(1).expand(shape) for k, shape in shapes.items()}
    weights["encoder.patch_embed.proj.weight"] = torch.zeros(1).expand(d, 3, 16, 16)
    with caplog.at_level(logging.WARNING, logger="convert"):
        config = load_official(weights).config
    assert (config.dim, config.regressor_dim, config.image_size, config.patch_size) == (d, r, 224, 16)
    assert (config.heads, config.regressor_heads, config.target_dim) == (heads, regressor_heads, 512)
    assert f" heads={heads}" in caplog.text and f"regressor_heads={regressor_heads}" in caplog.text


def config_read(monkeypatch, weights):
    """The configuration that load_official finds, without a model of it."""
    found = []
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(convert, "CAE", lambda config: found.append(config) or 1 / 0)
        load_official(weights)
    return found[0]


@pytest.mark.parametrize(("size", "expected"), [
    ("tiny", CAEConfig(dim=192, depth=2, heads=12, regressor_dim=96, regressor_depth=1, regressor_heads=12)),
    ("large", CAEConfig(dim=1024, depth=2, heads=16, regressor_dim=1024, regressor_depth=4, regressor_heads=16,
                        layer_scale=1e-5)),
])  # fmt: skip
def test_the_table_gives_what_no_tensor_tells(size, expected, monkeypatch):
    """Of an encoder alone: heads, LayerScale's start, and all that pretraining would need."""
    scaled = {32: expected.dim, 96: 3 * expected.dim, 128: 4 * expected.dim, 17: 197}
    shapes = {k: [scaled.get(n, n) for n in v.shape] for k, v in released("cae_v2").items() if k.startswith("encoder.")}
    shapes["encoder.patch_embed.proj.weight"] = (expected.dim, 3, 16, 16)
    assert config_read(monkeypatch, {k: torch.zeros(1).expand(shape) for k, shape in shapes.items()}) == expected


def test_codes_alone_tell_the_method(monkeypatch):
    """v1 without decoder blocks, and without the alignment encoder's copy."""
    weights = {k: v for k, v in released("cae_v1").items() if "decoder_blocks" not in k}
    weights["decoder.head.weight"] = torch.zeros(1).expand(8192, 32)
    weights["decoder.head.bias"] = torch.zeros(8192)
    config = config_read(monkeypatch, weights)
    assert (config.method, config.decoder_depth, config.target_dim) == ("cae", 0, 8192)


def test_load_respects_overrides():
    config = load_golden("cae_v2", supervise="visible", layer_scale=0.3, drop_path=0.25).config
    assert (config.supervise, config.layer_scale, config.drop_path) == ("visible", 0.3, 0.25)
    tensors, _ = golden("cae_v1")
    losses = load_golden("cae_v1", align_weight=0.5, reconstruct_weight=3.0)(*golden_batch("cae_v1"))
    close(losses["loss_align"], tensors["loss_align"] * 0.5 / 2, 1e-5)
    close(losses["loss_reconstruct"], tensors["loss_reconstruct"] * 3, 3e-5)
    assert load_golden("cae_v1", heads=8).config.heads == 8
    with pytest.raises(ValueError, match="another shape"):
        load_golden("cae_v1", dim=64)


def test_load_from_the_hub(tmp_path, monkeypatch):
    """owner/name::path goes through hf_hub_download, here replaced by a fake that needs no network."""
    path = tmp_path / "downloaded.pth"
    torch.save({"model": released("cae_v2")}, path)
    asked = []

    def fake_hf_hub_download(repo_id, filename, **kwargs):
        asked.append((repo_id, filename))
        return str(path)

    monkeypatch.setattr(convert, "hf_hub_download", fake_hf_hub_download)
    model = load_golden("cae_v2", "xbsu/LW-DETR::pretrain_weights/caev2_tiny.pth")
    assert asked == [("xbsu/LW-DETR", "pretrain_weights/caev2_tiny.pth")]
    assert_same_weights(model, load_golden("cae_v2"))


# ------------------------------------------------------------------------------------- load_official: what it refuses


@pytest.mark.parametrize(
    "missing",
    [
        "encoder.blocks.0.mlp.fc1.weight",
        "encoder.blocks.1.attn.q_bias",
        "encoder.cls_token",
        "encoder.patch_embed.proj.bias",
        "regresser.regressor_blocks.1.cross_attn.q.weight",
        "decoder.norm.weight",
        "mask_token",
    ],
)
@pytest.mark.parametrize("name", ["cae_v1", "cae_v2"])
def test_load_names_a_missing_tensor(name, missing):
    weights = released(name)
    del weights[missing]
    with pytest.raises(ValueError, match="missing") as error:
        load_golden(name, weights)
    assert missing in str(error.value)


def test_load_names_a_missing_block():
    weights = {k: v for k, v in released("cae_v2").items() if not k.startswith("encoder.blocks.0.")}
    with pytest.raises(ValueError, match=r"missing.*encoder\.blocks\.0\.attn\.qkv\.weight"):
        load_golden("cae_v2", weights)


def test_load_names_a_surplus_tensor():
    weights = {**released("cae_v2"), "encoder.blocks.0.attn.relative_position_bias_table": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=r"surplus.*encoder\.blocks\.0\.attn\.relative_position_bias_table"):
        load_golden("cae_v2", weights)


@pytest.mark.parametrize(
    "key", ["encoder.blocks.0.mlp.fc1.weight", "regresser.regressor_blocks.0.norm1_k.weight", "decoder.head.bias"]
)
def test_load_names_a_wrong_shape(key):
    weights = released("cae_v2")
    weights[key] = weights[key][:-1].clone()
    with pytest.raises(ValueError, match="shape") as error:
        load_golden("cae_v2", weights)
    assert f"{key} {tuple(weights[key].shape)}" in str(error.value)


@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
@pytest.mark.parametrize(
    "key", ["encoder.patch_embed.proj.weight", "encoder.pos_embed", "mask_token", "decoder.head.weight"]
)
def test_load_refuses_wrong_ranks_where_widths_are_read(key, shape):
    """The tensors that the configuration is read from may be damaged too: a ValueError, never an IndexError."""
    with pytest.raises(ValueError):
        load_golden("cae_v2", {**released("cae_v2"), key: torch.zeros(shape)})


def test_load_refuses_what_is_no_state_dict(tmp_path):
    resnet = {k: torch.zeros(2) for k in ("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.bias")}
    with pytest.raises(ValueError, match=r"conv1\.weight"):
        load_official(resnet)
    torch.save([1, 2, 3], tmp_path / "list.pth")
    for source in ({}, {"model": {}}, {"model": 3}, {"model": {"encoder.norm.weight": "text"}}, tmp_path / "list.pth"):
        with pytest.raises(ValueError):
            load_official(source)


def test_load_refuses_a_missing_file(tmp_path):
    for path in (tmp_path / "nowhere.pth", str(tmp_path / "nowhere.safetensors"), tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            load_official(path)


@pytest.mark.parametrize("form", ["zip.pth", "legacy.pth", "weights.safetensors"])
def test_load_refuses_truncated_files(form, tmp_path):
    """Cut anywhere, also within the first bytes: a ValueError that names the file, no other exception."""
    path, weights = tmp_path / form, {k: v for k, v in released("cae_v2").items() if k.startswith("encoder.")}
    if form.endswith("safetensors"):
        save_file(weights, path)
    else:
        checkpoint = {"model": weights, "args": argparse.Namespace(a=1)}
        torch.save(checkpoint, path, _use_new_zipfile_serialization=form == "zip.pth")
    whole = path.read_bytes()
    load_official(path, heads=4)
    problems = collections.Counter()
    for size in [*range(0, 64), *range(64, 4096, 256), *(len(whole) * i // 40 for i in range(1, 40)), len(whole) - 1]:
        path.write_bytes(whole[:size])
        try:
            load_official(path, heads=4)
            problems["no exception"] += 1
        except ValueError as error:
            problems["file not named"] += str(path) not in str(error)
        except Exception as error:
            problems[repr(error)] += 1
    assert not +problems


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_load_refuses_text(ending, tmp_path):
    """Empty files, error pages, Git LFS pointers; and words whose first letter is an operation of pickle's machine."""
    path = tmp_path / f"checkpoint.{ending}"
    texts = ["", "\n", "<html><body>404</body></html>", "version https://git-lfs.github.com/spec/v1\n", '{"model": {}}']
    texts += [chr(letter) + "ome words, no checkpoint\n" for letter in range(32, 127)]
    escaped = set()
    for text in texts:
        path.write_text(text)
        try:
            load_official(path)
            escaped.add(f"{text!r}: no exception")
        except ValueError as error:
            assert str(path) in str(error)
        except Exception as error:
            escaped.add(f"{text!r}: {error!r}")
    assert not escaped


class Payload:
    """A pickled object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("where", ["args", "inside a Namespace", "model"])
def test_load_executes_nothing(where, tmp_path):
    path, folder = tmp_path / "evil.pth", str(tmp_path / "made by the payload")
    checkpoint = {"model": released("cae_v2")}
    if where == "args":
        checkpoint["args"] = Payload(folder)
    elif where == "model":
        checkpoint["model"]["encoder.extra"] = Payload(folder)
    else:
        checkpoint["args"] = argparse.Namespace(payload=Payload(folder))
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_golden("cae_v2", path)
    assert not os.path.exists(folder)
    torch.load(path, weights_only=False)  # the payload is live: an unsafe reader does execute it
    assert os.path.exists(folder)


# -------------------------------------------------------------------------------------------------------------- masks

MASKS = [("block", block_mask), ("random", random_mask)]
BOTH_MASKS = pytest.mark.parametrize("draw", [m for _, m in MASKS], ids=[name for name, _ in MASKS])


@BOTH_MASKS
@pytest.mark.parametrize(
    ("grid", "counts"),
    [
        ((1, 2), [1]),
        ((2, 2), [1, 2, 3]),
        ((1, 10), [1, 5, 9]),
        ((10, 1), [1, 5, 9]),
        ((3, 17), [1, 15, 16, 17, 25, 50]),
        ((7, 7), [1, 13, 25, 48]),
        ((14, 14), [1, 15, 16, 17, 30, 49, 98, 150, 195]),
        ((32, 20), [1, 160, 639]),
    ],
    ids=str,
)
def test_masks_partition_the_grid(draw, grid, counts):
    """Exact counts, ascending int64 indices, and visible and masked together are every patch once."""
    n, batch = grid[0] * grid[1], 40
    for count in counts:
        visible, masked = draw(batch, grid, count, generator=torch.Generator().manual_seed(count))
        assert visible.dtype == masked.dtype == torch.int64
        assert visible.shape == (batch, n - count) and masked.shape == (batch, count)
        for index in (visible, masked):
            assert (index[:, 1:] > index[:, :-1]).all()
        together = torch.cat([visible, masked], dim=1).sort(1).values
        assert torch.equal(together, torch.arange(n).expand(batch, n))


@BOTH_MASKS
def test_masks_depend_on_the_generator_alone(draw):
    """On 1 x 10 no block fits, so that block_mask's fallback is drawn from the generator too."""

    def drawn(seed, grid, count):
        return draw(8, grid, count, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    for grid, count in (((1, 10), 4), ((14, 14), 98)):
        first, same, other = drawn(1, grid, count), drawn(1, grid, count), drawn(2, grid, count)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
        assert not torch.equal(first[1], other[1])
    assert len({tuple(row.tolist()) for row in first[1]}) == 8  # each image has its own
    torch.manual_seed(5)
    implicit = draw(8, (14, 14), 98)
    torch.manual_seed(5)
    assert torch.equal(implicit[1], draw(8, (14, 14), 98)[1])
    assert not torch.equal(implicit[1], draw(8, (14, 14), 98)[1])


@BOTH_MASKS
@pytest.mark.parametrize(("grid", "count"), [((14, 14), 0), ((14, 14), 196), ((14, 14), -1), ((2, 2), 5), ((1, 1), 1)])
def test_masks_need_a_visible_and_a_masked_patch(draw, grid, count):
    with pytest.raises(ValueError, match=str(count)):
        draw(2, grid, count)


def test_block_mask_completes_where_no_block_fits():
    """With blocks larger than the grid the fallback draws single patches: exact counts, every patch equally often."""
    draws, count = 4000, 5
    masked = block_mask(draws, (4, 4), count, min_block=100_000, generator=torch.Generator().manual_seed(0))[1]
    frequency = masked.flatten().bincount(minlength=16) / draws
    p = count / 16
    assert (frequency - p).abs().max() < 5 * math.sqrt(p * (1 - p) / draws)


def test_blocks_are_sixteen_patches_unless_said_otherwise():
    def drawn(**options):
        return block_mask(20, (14, 14), 98, generator=torch.Generator().manual_seed(0), **options)[1]

    assert torch.equal(drawn(), drawn(min_block=16)) and not torch.equal(drawn(), drawn(min_block=15))


def occupancy(masked, n):
    """Masked indices (B, Nm) -> boolean (B, N)."""
    return torch.zeros(len(masked), n, dtype=torch.bool).scatter_(1, masked, True)


def count_components(masks):
    """Boolean (B, rows, columns) -> number of 4-connected components of each: the least label of a component spreads
    to all its patches; one patch of each keeps the label that it had."""
    rows, columns = masks.shape[1:]
    nobody = rows * columns
    own = torch.arange(nobody, dtype=torch.int16).view(rows, columns)
    labels = torch.where(masks, own, nobody)
    active = torch.arange(len(masks))
    while len(active):
        old = labels[active]
        padded = F.pad(old, (1, 1, 1, 1), value=nobody)
        above, below, left, right = padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]
        new = torch.where(masks[active], torch.stack([old, above, below, left, right]).amin(0), nobody)
        labels[active] = new
        active = active[(new != old).flatten(1).any(1)]
    return ((labels == own) & masks).sum((1, 2))


def test_count_components():
    """The counter itself, on pictures: a spiral is one component, diagonal contact is none."""
    spiral = ["#####", "....#", "###.#", "#...#", "#####"]
    diagonal = ["#.#.#", ".#.#.", ".....", "##..#", "##..#"]
    masks = torch.tensor([[[c == "#" for c in row] for row in m] for m in (spiral, diagonal, ["....."] * 5)])
    assert count_components(masks).tolist() == [1, 7, 0]


@pytest.mark.parametrize("grid", [(4, 16), (16, 4)])
def test_blocks_of_a_mask_are_rectangles_of_its_own_grid(grid):
    """Of 12 patches the first block has 9 at least, so that few others are left for other components."""
    _, masked = block_mask(200, grid, 12, min_block=12, generator=torch.Generator().manual_seed(0))
    assert count_components(occupancy(masked, 64).view(200, *grid)).float().mean() < 1.5


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_block_mask_statistics(size):
    """The released sampler's distribution: where it masks, and how clustered (30, 49 and 98 of 196)."""
    expected = json.loads((GOLDEN / "block_mask_statistics.json").read_text())[size]
    draws, (rows, columns), count = 50_000, expected["grid"], expected["num_masked"]
    generator = torch.Generator().manual_seed(count)
    _, masked = block_mask(draws, (rows, columns), count, min_block=expected["min_block"], generator=generator)
    masks = occupancy(masked, rows * columns).view(draws, rows, columns)
    close(masks.float().mean(0), torch.tensor(expected["frequency"]), 0.012)
    pairs = (masks[:, 1:] & masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] & masks[:, :, :-1]).sum((1, 2))
    pairs = pairs / count
    components = count_components(masks[:20_000]).float()
    for values, name in ((pairs, "neighbour_pairs_per_masked_patch"), (components, "components")):
        assert values.mean().item() == pytest.approx(expected[f"{name}_mean"], rel=0.03)
        assert values.std().item() == pytest.approx(expected[f"{name}_std"], rel=0.06)


def test_random_mask_is_uniform():
    """Every patch equally often, and every pair of patches too, within 5 and 6 sigma."""
    draws, (rows, columns), count = 20_000, (6, 7), 17
    n = rows * columns
    _, masked = random_mask(draws, (rows, columns), count, generator=torch.Generator().manual_seed(0))
    masks = occupancy(masked, n).float()
    p, pair = count / n, count * (count - 1) / (n * (n - 1))
    assert (masks.mean(0) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / draws)
    together = (masks.T @ masks / draws)[~torch.eye(n, dtype=torch.bool)]
    assert (together - pair).abs().max() < 6 * math.sqrt(pair * (1 - pair) / draws)


# ------------------------------------------------------------------- the formulas of DESIGN section 2, slow and obvious


def reference_positions(rows, columns, dim):
    """[sin(r w), cos(r w), sin(c w), cos(c w)] with w_i = 10000^(-i / (dim / 4)), one number at a time."""
    frequencies = [10000 ** (-i / (dim / 4)) for i in range(dim // 4)]
    table = []
    for r in range(rows):
        for c in range(columns):
            quarters = ((math.sin, r), (math.cos, r), (math.sin, c), (math.cos, c))
            table.append([function(x * w) for function, x in quarters for w in frequencies])
    return torch.tensor(table, dtype=torch.float64).float().double()  # the model's table is float32


@pytest.mark.parametrize(("rows", "columns", "dim"), [(3, 5, 12), (14, 14, 768), (1, 7, 4), (9, 2, 96)])
def test_positions(rows, columns, dim):
    close(cae.sincos_positions(rows, columns, dim).double(), reference_positions(rows, columns, dim), 1e-6)


def norm(x, p, name):
    centred = x - x.mean(-1, keepdim=True)
    x = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(x, p, name):
    x = x @ p[f"{name}.weight"].T
    return x + p[f"{name}.bias"] if f"{name}.bias" in p else x


def attention(q, k, v, heads):
    """Softmax attention, one head after the other."""
    width, outputs = q.shape[-1] // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(width)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outputs.append(weights @ v[..., part])
    return torch.cat(outputs, dim=-1)


def mlp(x, p, name):
    x = linear(x, p, f"{name}.fc1")
    return linear(x * 0.5 * (1 + torch.erf(x / math.sqrt(2))), p, f"{name}.fc2")


def reference_block(x, p, name, heads):
    dim = x.shape[-1]
    normed, weight = norm(x, p, f"{name}.norm1"), p[f"{name}.attn.qkv.weight"]
    q = normed @ weight[:dim].T + p[f"{name}.attn.q_bias"]
    k = normed @ weight[dim : 2 * dim].T
    v = normed @ weight[2 * dim :].T + p[f"{name}.attn.v_bias"]
    x = x + p[f"{name}.scale1"] * linear(attention(q, k, v, heads), p, f"{name}.attn.proj")
    return x + p[f"{name}.scale2"] * mlp(norm(x, p, f"{name}.norm2"), p, f"{name}.mlp")


def reference_latents(p, config, images, chosen):
    """Encoder, then the projection where R != D; chosen patches, boolean (B, N)."""
    size, dim = config.patch_size, config.dim
    weight = p["encoder.patch_embed.weight"].view(dim, 3, size, size)
    x = F.conv2d(images, weight, p["encoder.patch_embed.bias"], stride=size)
    x = x.flatten(2).transpose(1, 2) + reference_positions(*x.shape[2:], dim)
    x = x[chosen].view(len(images), -1, dim)
    x = torch.cat([p["encoder.class_token"].expand(len(images), 1, dim), x], dim=1)
    for i in range(config.depth):
        x = reference_block(x, p, f"encoder.blocks.{i}", config.heads)
    x = norm(x, p, "encoder.norm")
    if config.regressor_dim != dim:
        x = norm(linear(x, p, "to_regressor.0"), p, "to_regressor.1")
    return x


def reference_regressor(p, config, z, positions, hidden):
    """Q' = Q + g1 attn(LNq(Q + pm), LNk(M + [pv; pm]), LNv(M)); Q'' = LN(Q'); Q <- Q'' + g2 mlp(Q'')."""
    batch, width = len(hidden), config.regressor_dim
    positions = positions.expand(batch, -1, -1)
    pm, pv = positions[hidden].view(batch, -1, width), positions[~hidden].view(batch, -1, width)
    q = p["regressor.mask_token"].expand(batch, pm.shape[1], width)
    for i in range(config.regressor_depth):
        name = f"regressor.blocks.{i}"
        memory = torch.cat([z, q], dim=1)
        queries = linear(norm(q + pm, p, f"{name}.norm_q"), p, f"{name}.attn.q")
        keys = linear(norm(memory + torch.cat([pv, pm], dim=1), p, f"{name}.norm_k"), p, f"{name}.attn.k")
        values = linear(norm(memory, p, f"{name}.norm_v"), p, f"{name}.attn.v")
        attended = attention(queries, keys, values, config.regressor_heads)
        q = norm(q + p[f"{name}.scale1"] * linear(attended, p, f"{name}.attn.proj"), p, f"{name}.norm2")
        q = q + p[f"{name}.scale2"] * mlp(q, p, f"{name}.mlp")
    return norm(q, p, "regressor.norm") if config.method == "cae" else q


def reference_losses(p, config, images, hidden, target, positions):
    """The parts of the loss by name; hidden is boolean (B, N)."""
    batch, width = len(images), config.regressor_dim
    z_visible = reference_latents(p, config, images, ~hidden)
    z_masked = reference_regressor(p, config, z_visible[:, 1:], positions, hidden)
    if config.method == "cae-v2":
        distance = {}
        clip = {"cls": target[:, :1], "visible": target[:, 1:][~hidden], "masked": target[:, 1:][hidden]}
        for part, z in (("cls", z_visible[:, :1]), ("visible", z_visible[:, 1:]), ("masked", z_masked)):
            y = linear(norm(z, p, "head.norm"), p, "head.linear")
            t = clip[part].reshape(y.shape)
            cosine = (y * t).sum(-1) / ((y**2).sum(-1).sqrt() * (t**2).sum(-1).sqrt())
            distance[part] = 1 - cosine
        counted = {"visible": ["cls", "visible"], "masked": ["masked"], "both": ["cls", "visible", "masked"]}
        counted = counted[config.supervise]
        losses = {f"loss_{part}": distance[part].mean() for part in counted}
        return {"loss": torch.cat([distance[part] for part in counted], dim=1).mean(), **losses}
    x = z_masked + positions.expand(batch, -1, -1)[hidden].view(batch, -1, width)
    for i in range(config.decoder_depth):
        x = reference_block(x, p, f"decoder.blocks.{i}", config.regressor_heads)
    x = linear(norm(x, p, "decoder.norm"), p, "decoder.head")
    if target.dtype == torch.int64:
        log_probability = x - x.exp().sum(-1, keepdim=True).log()
        reconstruct = -log_probability.gather(-1, target[hidden].view(batch, -1, 1)).mean()
    else:
        reconstruct = ((x - target[hidden].view_as(x)) ** 2).mean()
    with torch.no_grad():
        z_target = reference_latents(p, config, images, hidden)[:, 1:]
    losses = {}
    if config.reconstruct_weight > 0:
        losses["loss_reconstruct"] = config.reconstruct_weight * reconstruct
    if config.align_weight > 0:
        losses["loss_align"] = config.align_weight * ((z_masked - z_target) ** 2).mean()
    return {"loss": sum(losses.values()), **losses}


def in_float64(model, *tensors):
    """The model in float64, a copy of its parameters for the reference, and float tensors in float64."""
    model = model.double()
    parameters = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
    return model, parameters, [t.double() if t.is_floating_point() else t for t in tensors]


SIZES_TRIED = pytest.mark.parametrize("size", [(16, 16), (12, 20)], ids=["trained size", "not square"])


@SIZES_TRIED
@pytest.mark.parametrize("method", ["cae", "cae-v2"])
@pytest.mark.parametrize("regressor_dim", [16, 8])
def test_latents_and_regressor_against_the_formulas(method, regressor_dim, size):
    """Encoder and regressor in float64, forward and backward, to 1e-10 of the largest value."""
    model = small_model(method=method, regressor_dim=regressor_dim)
    config = model.config
    images, visible, masked, _ = small_batch(config, num_masked=5, batch=3, size=size)
    model, p, (images, visible, masked) = in_float64(model, images, visible, masked)
    twin = images.clone().requires_grad_()
    images.requires_grad_()
    grid = (size[0] // 4, size[1] // 4)
    hidden = occupancy(masked, grid[0] * grid[1])
    z = model.latents(images, visible)
    regressed = model.regressor(z[:, 1:], visible, masked, grid)
    z_reference = reference_latents(p, config, twin, ~hidden)
    positions = reference_positions(*grid, regressor_dim)
    regressed_reference = reference_regressor(p, config, z_reference[:, 1:], positions, hidden)
    assert regressed.dtype == torch.float64
    close(z, z_reference, 1e-10)
    close(regressed, regressed_reference, 1e-10)
    torch.manual_seed(0)
    weight_z, weight_q = torch.randn_like(z), torch.randn_like(regressed)
    ((z * weight_z).sum() + (regressed * weight_q).sum()).backward()
    ((z_reference * weight_z).sum() + (regressed_reference * weight_q).sum()).backward()
    close_relative(images.grad, twin.grad, 1e-10)
    compared = 0
    for name, parameter in model.named_parameters():
        if not name.startswith(("decoder.", "head.")) and not name.endswith("norm_k.bias"):  # (rounding noise)
            close_relative(parameter.grad, p[name].grad, 1e-10)
            compared += 1
    assert compared == sum(not n.startswith(("decoder.", "head.")) for n in p) - config.regressor_depth


@SIZES_TRIED
@EVERY_SETTING
@pytest.mark.parametrize("pixels", [False, True], ids=["codes", "pixels"])
def test_losses_against_the_formulas(fields, pixels, size):
    """Every loss and its gradients. The heads compute in float32 whatever the model's type, hence 1e-6 and 1e-5."""
    if pixels and fields["method"] == "cae-v2":
        fields = {**fields, "target_dim": 48}
    model = small_model(**fields, **({"target_dim": 48} if pixels and fields["method"] == "cae" else {}))
    config, grid = model.config, (size[0] // 4, size[1] // 4)
    images, visible, masked, target = small_batch(config, num_masked=7, batch=3, size=size, pixels=pixels)
    model, p, (images, target) = in_float64(model, images, target)
    twin = images.clone().requires_grad_()
    images.requires_grad_()
    losses = model(images, visible, masked, target)
    positions = reference_positions(*grid, config.regressor_dim)
    hidden = occupancy(masked, grid[0] * grid[1])
    expected = reference_losses(p, config, twin, hidden, target, positions)
    assert losses.keys() == expected.keys()
    for name in expected:
        assert losses[name].shape == ()
        assert losses[name].item() == pytest.approx(expected[name].item(), rel=1e-6, abs=1e-6)
    losses["loss"].backward()
    expected["loss"].backward()
    close_relative(images.grad, twin.grad, 1e-5)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
        elif not name.endswith("norm_k.bias"):
            close_relative(parameter.grad, p[name].grad, 1e-5)


def test_patch_values_in_both_orders():
    """The encoder's patches are (channel, row, column); pixel targets, as MAE's, (row, column, channel)."""
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    for b in range(2):
        for patch in range(6):
            r, c = patch // 3, patch % 3
            pixels = images[b, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
            values = [pixels[channel, y, x].item() for channel in range(3) for y in range(2) for x in range(2)]
            assert cae.patchify(images, 2)[b, patch].tolist() == values
            values = [pixels[channel, y, x].item() for y in range(2) for x in range(2) for channel in range(3)]
            assert cae.patchify(images, 2, "p q c")[b, patch].tolist() == values


# ------------------------------------------------------------------------------- what is computed, and what is skipped


@pytest.mark.parametrize("supervise", LOSS_KEYS)
def test_keys_of_v2(supervise):
    model = small_model(supervise=supervise)
    losses = model(*small_batch(model.config))
    assert losses.keys() == LOSS_KEYS[supervise]
    assert all(value.shape == () and value.dtype == torch.float32 for value in losses.values())


def test_visible_supervision_does_not_run_the_regressor():
    model = small_model(supervise="visible")
    model.regressor.forward = refuse
    model(*small_batch(model.config))["loss"].backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.regressor.parameters())
    both = small_model(supervise="both")
    both.regressor.forward = refuse
    with pytest.raises(AssertionError, match="must not run"):
        both(*small_batch(both.config))


def test_supervision_settings_agree():
    """The loss of both is the mean over all tokens, so the parts weighted by their numbers of tokens."""
    num_visible, num_masked = 10, 6
    batch = small_batch(small_config(), num_masked)
    losses = {s: small_model(supervise=s)(*batch) for s in LOSS_KEYS}
    both, visible, masked = losses["both"], losses["visible"], losses["masked"]
    close(visible["loss_cls"], both["loss_cls"], 1e-6)
    close(visible["loss_visible"], both["loss_visible"], 1e-6)
    close(masked["loss_masked"], both["loss_masked"], 1e-6)
    close(masked["loss"], both["loss_masked"], 1e-6)
    sums = both["loss_cls"] + num_visible * both["loss_visible"]
    close(visible["loss"], sums / (1 + num_visible), 1e-6)
    close(both["loss"], (sums + num_masked * both["loss_masked"]) / (1 + num_visible + num_masked), 1e-6)
    assert len({round(value.item(), 4) for value in both.values()}) == 4  # or the comparison would be empty


@pytest.mark.parametrize(("supervise", "tokens"), [("visible", 1 + 10), ("masked", 6), ("both", 1 + 10 + 6)])
def test_head_gets_only_supervised_tokens(supervise, tokens):
    model = small_model(supervise=supervise)
    seen = []
    model.head.linear.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    model(*small_batch(model.config, num_masked=6))
    assert seen == [(2, tokens, 8)]


def test_v1_parts_add_up():
    model = small_model(method="cae", decoder_depth=1, align_weight=0.7, reconstruct_weight=1.9)
    losses = model(*small_batch(model.config))
    assert losses.keys() == {"loss", "loss_reconstruct", "loss_align"}
    close(losses["loss"], losses["loss_reconstruct"] + losses["loss_align"], 1e-6)
    plain = small_model(method="cae", decoder_depth=1, align_weight=1.0, reconstruct_weight=1.0)
    plain = plain(*small_batch(model.config))
    close(losses["loss_align"], 0.7 * plain["loss_align"], 1e-6)
    close(losses["loss_reconstruct"], 1.9 * plain["loss_reconstruct"], 1e-5)


def test_v1_without_alignment_computes_no_target():
    model = small_model(method="cae", decoder_depth=1, align_weight=0.0)
    model.alignment_target = refuse
    seen = []
    model.encoder.register_forward_hook(lambda *_: seen.append(1))
    assert model(*small_batch(model.config)).keys() == {"loss", "loss_reconstruct"}
    assert len(seen) == 1


def test_v1_without_reconstruction_runs_no_decoder():
    model = small_model(method="cae", decoder_depth=1, reconstruct_weight=0.0)
    for part in (model.decoder, model.decoder.norm, model.decoder.head, *model.decoder.blocks):
        part.forward = refuse
    losses = model(*small_batch(model.config))
    assert losses.keys() == {"loss", "loss_align"}
    losses["loss"].backward()


def test_v1_without_decoder_blocks():
    model = small_model(method="cae", decoder_depth=0)
    assert len(model.decoder.blocks) == 0
    z, index = torch.randn(2, 3, 8), torch.tensor([[0, 5, 15], [1, 2, 3]])
    table = reference_positions(4, 4, 8).float()
    expected = model.decoder.head(model.decoder.norm(z + table[index]))
    close(model.decoder(z, index, (4, 4)), expected, 1e-5)


def test_target_type_selects_the_loss():
    """int64 codes of N patches, or floats of the same patches: each is compared with the masked patches only."""
    model = small_model(method="cae", decoder_depth=1, target_dim=12, align_weight=0.0)
    images, visible, masked, codes = small_batch(model.config)
    z = model.latents(images, visible)
    prediction = model.decoder(model.regressor(z[:, 1:], visible, masked, (4, 4)), masked, (4, 4))
    pixels = torch.randn(2, 16, 12)
    expected = 0.0
    for b in range(2):
        for i, patch in enumerate(masked[b].tolist()):
            expected += ((prediction[b, i] - pixels[b, patch]) ** 2).mean() / masked.numel()
    close(model(images, visible, masked, pixels)["loss"], expected, 1e-5)
    expected = 0.0
    for b in range(2):
        for i, patch in enumerate(masked[b].tolist()):
            expected -= prediction[b, i].log_softmax(-1)[codes[b, patch]] / masked.numel()
    close(model(images, visible, masked, codes)["loss"], expected, 1e-5)
    visible_only = pixels.clone()  # targets of visible patches do not count
    visible_only[torch.arange(2)[:, None], visible] += 100
    close(model(images, visible, masked, visible_only)["loss"], model(images, visible, masked, pixels)["loss"], 1e-6)


@EVERY_SETTING
def test_encoder_embeds_only_the_patches_it_sees(fields):
    """(B, Nv, 3 P^2) into the patch embedding; v1's alignment embeds the masked ones besides. Blocks likewise."""
    model = small_model(**fields)
    embedded, blocks = [], []
    model.encoder.patch_embed.register_forward_hook(lambda m, args, output: embedded.append(tuple(args[0].shape)))
    model.encoder.blocks[0].register_forward_hook(lambda m, args, output: blocks.append(tuple(args[0].shape)))
    model(*small_batch(model.config, num_masked=6))
    aligned = model.config.method == "cae" and model.config.align_weight > 0
    assert embedded == [(2, 10, 48)] + [(2, 6, 48)] * aligned
    assert blocks == [(2, 11, 16)] + [(2, 7, 16)] * aligned


def test_masked_pixels_do_not_reach_the_prediction():
    """What the regressor predicts must not depend on the pixels that it is to predict."""
    model = small_model()
    images, visible, masked, target = small_batch(model.config)
    images.requires_grad_()
    model(images, visible, masked, target)["loss"].backward()
    gradient = cae.patchify(images.grad, 4)
    assert (cae.take(gradient, masked) == 0).all()
    assert (cae.take(gradient, visible) != 0).any(-1).all()


@EVERY_SETTING
def test_every_trainable_parameter_gets_a_gradient(fields):
    """And no other: DDP waits for each parameter that requires one."""
    model = small_model(**fields)
    model(*small_batch(model.config))["loss"].backward()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    expected = set()
    if model.config.method == "cae-v2" and model.config.supervise == "visible":
        expected = {n for n, _ in model.named_parameters() if n.startswith("regressor.")}
    elif model.config.method == "cae" and model.config.reconstruct_weight == 0:
        expected = {n for n, _ in model.named_parameters() if n.startswith("decoder.")}
    assert frozen == expected
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {n for n in without & trainable if not n.endswith("norm_k.bias")} == set()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable


# ---------------------------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize("size", [(24, 24), (8, 32), (20, 4), (64, 64)])
def test_encode_at_other_sizes(size):
    """Positions are computed anew: as a model configured for that size; and as the formulas where it is not square."""
    model = small_model().eval()
    images = torch.randn(2, 3, *size)
    encoded = model.encode(images)
    n = size[0] // 4 * (size[1] // 4)
    assert encoded.shape == (2, 1 + n, 16)
    if size[0] == size[1]:
        fresh = CAE(small_config(image_size=size[0])).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(encoded, fresh.encode(images))
    model, p, (images,) = in_float64(model, images)
    config = dataclasses.replace(model.config, regressor_dim=16)  # no projection in the reference: encode has none
    close(model.encode(images), reference_latents(p, config, images, torch.ones(2, n, dtype=torch.bool)), 1e-10)


def test_encode_ignores_masks_and_projection():
    """All patches in order are what encode sees; another order of the indices reorders the output and nothing else."""
    model = small_model(regressor_dim=8).eval()
    images = torch.randn(2, 3, 16, 16)
    encoded = model.encode(images)
    every = torch.arange(16).expand(2, 16)
    close(model.encoder(images, every), encoded, 1e-6)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = model.encoder(images, order.expand(2, 16))
    close(shuffled[:, 0], encoded[:, 0], 1e-5)
    close(shuffled[:, 1:], encoded[:, 1 + order], 1e-5)
    assert encoded.shape[-1] == 16 and model.latents(images, every).shape[-1] == 8


def test_encode_at_other_sizes_keeps_the_type():
    """A model cast to bfloat16 or float64 encodes any size, not only the trained one."""
    for dtype in (torch.bfloat16, torch.float64):
        model = small_model().to(dtype).eval()
        for size in ((16, 16), (24, 8)):
            assert model.encode(torch.randn(1, 3, *size, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("size", [(18, 16), (16, 18), (3, 4), (15, 15)])
def test_sizes_that_the_patch_does_not_divide(size):
    model = small_model()
    images, (_, visible, masked, target) = torch.randn(2, 3, *size), small_batch(model.config)
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        model.encode(images)
    with pytest.raises(ValueError, match="4 pixels"):
        model(images, visible, masked, target)


# ---------------------------------------------------------------------------------------------------------- to_beit


def beit_source(size):
    """A model of a size (its regressor shrunk) in which no bias is 0, no LayerNorm trivial, no LayerScale uniform."""
    torch.manual_seed(0)
    model = CAE(CAEConfig.from_size(size, regressor_dim=32, regressor_heads=4, regressor_depth=1)).eval()
    with torch.no_grad():
        for parameter in [p for p in model.encoder.parameters() if p.dim() != 2]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("size", "pixels"),
    [("nano", None), ("nano", 44), ("tiny", None), ("tiny", 96), ("small", None), ("small", 80), ("base", None)],
)
def test_beit_has_identical_outputs(size, pixels):
    model = beit_source(size)
    side = pixels or model.config.image_size
    beit = to_beit(model) if pixels is None else to_beit(model, pixels)
    assert not beit.training
    images = torch.randn(1 if size == "base" else 2, 3, side, side)
    with torch.no_grad():
        expected = model.encode(images)
        close(beit(images).last_hidden_state, expected, 1e-5)
    assert expected.std() > 0.5  # or equality would be cheap


def test_beit_round_trip(tmp_path):
    from transformers import BeitModel

    model = beit_source("nano")
    to_beit(model, 36).save_pretrained(tmp_path)
    beit = BeitModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    images = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        close(beit(images).last_hidden_state, model.encode(images), 1e-5)


def test_beit_is_configured_as_the_encoder_is():
    """What its outputs do not show: the LayerNorms' eps to the digit, stochastic depth for whoever tunes it."""
    config = to_beit(CAE(small_config(drop_path=0.25, layer_scale=1e-5)), 24).config
    assert (config.layer_norm_eps, config.drop_path_rate, config.layer_scale_init_value) == (1e-6, 0.25, 1e-5)
    assert (config.image_size, config.patch_size, config.intermediate_size) == (24, 4, 64)
    assert config.use_absolute_position_embeddings and not config.use_mean_pooling
    assert not config.use_relative_position_bias and not config.use_shared_relative_position_bias


def test_beit_is_a_copy():
    """Training the exported model must not change ours."""
    model = beit_source("nano")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for parameter in to_beit(model).parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("size", [30, 0, -28, (28, 56)])
def test_beit_needs_a_square_size_that_the_patch_divides(size):
    with pytest.raises(ValueError, match="image_size"):
        to_beit(CAE(CAEConfig.from_size("nano")), size)


# ------------------------------------------------------------------------------------ saving, configuration, size table


@pytest.mark.parametrize(
    "fields",
    [
        dict(method="cae-v2", supervise="masked", drop_path=0.25, layer_scale=1e-5),
        dict(method="cae", decoder_depth=2, align_weight=0.5, reconstruct_weight=0.25, regressor_dim=16),
    ],
)
def test_save_and_load(fields, tmp_path):
    model = small_model(**fields)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == dataclasses.asdict(model.config)
    loaded = CAE.from_pretrained(tmp_path)
    assert isinstance(loaded.config, CAEConfig)
    assert_same_weights(loaded, model)
    batch = small_batch(model.config)
    assert torch.equal(loaded.eval()(*batch)["loss"], model.eval()(*batch)["loss"])
    assert not any("table" in k for k in load_file(tmp_path / "model.safetensors"))  # positions are no weights


def test_load_of_an_imported_model(tmp_path):
    model = load_golden("cae_v2_narrow", supervise="masked")
    model.save_pretrained(tmp_path)
    assert_same_weights(CAE.from_pretrained(str(tmp_path)), model)


def under_former_names(model):
    """The state dict of a model as it was when decoder and head were both called "objective"."""
    renamed = {"head.norm": "objective.norm", "head.linear": "objective.head", "decoder": "objective"}
    state = {}
    for name, tensor in model.state_dict().items():
        start = next((start for start in renamed if name.startswith(f"{start}.")), None)
        state[name if start is None else renamed[start] + name.removeprefix(start)] = tensor.clone()
    return state


@EVERY_SETTING
def test_former_names(fields, tmp_path):
    """Of a state dict, a model/ folder, a checkpoint of Accelerate, and of a model that is part of another."""
    model = small_model(**fields)
    former = under_former_names(model)
    assert [cae.former_name(name) for name in model.state_dict()] == list(former)
    assert any(name.startswith("objective.") for name in former)
    assert not any(name.startswith(("decoder.", "head.")) for name in former)
    names = list(former)
    loaded = CAE(model.config)
    loaded.load_state_dict(former)
    assert_same_weights(loaded, model)
    assert list(former) == names  # the caller's dict is left alone
    nested = torch.nn.ModuleDict({"module": CAE(model.config)})
    nested.load_state_dict({f"module.{name}": tensor for name, tensor in former.items()})
    assert_same_weights(nested["module"], model)
    twin = copy.deepcopy(CAE(model.config))
    twin.load_state_dict(former)
    assert_same_weights(twin, model)

    model.save_pretrained(tmp_path / "model")
    save_file(former, tmp_path / "model" / "model.safetensors")
    assert_same_weights(CAE.from_pretrained(tmp_path / "model"), model)

    accelerator = Accelerator(cpu=True)
    resumed = accelerator.prepare(CAE(model.config))
    accelerator.save_state(tmp_path / "checkpoint")
    save_file(former, tmp_path / "checkpoint" / "model.safetensors")
    accelerator.load_state(tmp_path / "checkpoint")
    assert_same_weights(accelerator.unwrap_model(resumed), model)


@pytest.mark.parametrize("fields", [dict(method="cae-v2"), dict(method="cae", decoder_depth=1)], ids=["v2", "v1"])
def test_former_names_of_another_model(fields):
    """They are no way around the check that every tensor is there and none is left."""
    model = small_model(**fields)
    former = under_former_names(model)
    bias = former.pop("objective.head.bias")
    with pytest.raises(RuntimeError, match=r"Missing.*(decoder\.head|head\.linear)\.bias"):
        model.load_state_dict(former)
    former |= {"objective.head.bias": bias, "objective.blocks.7.scale1": torch.zeros(8)}
    with pytest.raises(RuntimeError, match=r"Unexpected.*objective\.blocks\.7\.scale1"):
        model.load_state_dict(former)


@pytest.mark.parametrize("key", ["regressor.mask_token", "encoder.blocks.1.scale2", "head.linear.bias"])
def test_load_of_a_file_that_lacks_a_tensor(key, tmp_path):
    small_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=key):
        CAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(method="mae"), "method"),
        (dict(supervise="none"), "supervise"),
        *((dict([(name, value)]), name) for value in (0, -4) for name in ("image_size", "patch_size", "dim", "depth")),
        *((dict([(name, value)]), name) for value in (0, -4) for name in ("heads", "target_dim", "regressor_dim")),
        *((dict([(name, value)]), name) for value in (0, -4) for name in ("regressor_depth", "regressor_heads")),
        (dict(decoder_depth=-1), "decoder_depth"),
        (dict(image_size=225), "image_size 225"),
        (dict(dim=770), "dim 770 is not divisible by heads 12"),
        (dict(dim=22, heads=11), "dim 22 is not divisible by 4"),
        (dict(regressor_dim=100), "regressor_dim 100 is not divisible by regressor_heads 12"),
        (dict(regressor_dim=18, regressor_heads=9), "regressor_dim 18 is not divisible by 4"),
        (dict(drop_path=1.0), "drop_path"),
        (dict(drop_path=-0.1), "drop_path"),
        (dict(drop_path=math.nan), "drop_path"),
        (dict(align_weight=-1.0), "align_weight"),
        (dict(reconstruct_weight=-0.5), "reconstruct_weight"),
        (dict(method="cae", align_weight=0.0, reconstruct_weight=0.0), "both 0"),
    ],
    ids=str,
)
def test_configuration_refuses(fields, named):
    with pytest.raises(ValueError, match=named):
        CAEConfig(**fields)


def test_configuration_accepts_what_v2_does_not_read():
    config = CAEConfig(image_size=64, patch_size=8, align_weight=0.0, reconstruct_weight=0.0)
    assert (config.grid, config.num_patches) == ((8, 8), 64)


@pytest.mark.parametrize(
    ("size", "dim", "depth", "heads", "v2", "v1", "layer_scale"),
    [  # DESIGN section 3; v2 and v1 are R, heads, depth of the regressor, and v1's also of the decoder
        ("tiny", 192, 12, 12, (96, 12, 1), (192, 12, 4), 0.1),
        ("small", 384, 12, 12, (384, 12, 1), (384, 12, 4), 0.1),
        ("base", 768, 12, 12, (768, 12, 4), (768, 12, 4), 0.1),
        ("large", 1024, 24, 16, (1024, 16, 4), (1024, 16, 4), 1e-5),
        ("huge", 1280, 32, 16, (1280, 16, 4), (1280, 16, 4), 1e-5),
    ],
)
def test_size_table(size, dim, depth, heads, v2, v1, layer_scale):
    encoder = dict(image_size=224, patch_size=16, dim=dim, depth=depth, heads=heads, layer_scale=layer_scale)
    for method, (r, r_heads, r_depth), decoder_depth, target_dim in (("cae-v2", v2, 0, 512), ("cae", v1, v1[2], 8192)):
        config = CAEConfig.from_size(size, method=method)
        assert config == CAEConfig(
            method=method,
            regressor_dim=r,
            regressor_heads=r_heads,
            regressor_depth=r_depth,
            decoder_depth=decoder_depth,
            target_dim=target_dim,
            drop_path=0.1,
            supervise="both",
            align_weight=2.0,
            reconstruct_weight=1.0,
            **encoder,
        )
        assert config.grid == (14, 14)
        assert CAEConfig.from_size(size, method, dim=64, heads=4).dim == 64
    assert CAEConfig.from_size(size).method == "cae-v2"


def test_size_nano_and_unknown_sizes():
    assert all(CAEConfig.from_size("nano", method).num_patches >= 16 for method in ("cae", "cae-v2"))
    with pytest.raises(ValueError) as error:
        CAEConfig.from_size("giant")
    assert all(size in str(error.value) for size in ("giant", "nano", "tiny", "small", "base", "large", "huge"))
    with pytest.raises(ValueError, match="method"):
        CAEConfig.from_size("base", method="mae")


# -------------------------------------------------------------------------------------------- initialisation


def assert_uniform(weight, bound):
    """Uniform in +-bound: the extremes are reached, the standard deviation is bound / sqrt(3)."""
    assert 0.97 * bound < weight.abs().max().item() <= bound * (1 + 1e-6)
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert abs(weight.mean().item()) < 5 * bound / math.sqrt(3 * weight.numel())


@pytest.mark.parametrize("method", ["cae", "cae-v2"])
def test_initialisation(method):
    torch.manual_seed(0)
    d, r, c = 96, 64, 80
    fields = dict(dim=d, regressor_dim=r, target_dim=c, patch_size=8, decoder_depth=0 if method == "cae-v2" else 1)
    model = CAE(small_config(method=method, **fields))
    parameters, checked = dict(model.named_parameters()), set()
    fans = {"attn.qkv": (1, 3), "attn.proj": (1, 1), "mlp.fc1": (1, 4), "mlp.fc2": (4, 1), "attn.k": (1, 1)}
    fans.update({"attn.q": (1, 1), "attn.v": (1, 1)})
    for name, p in parameters.items():
        width = d if name.startswith("encoder.") else r
        layer = ".".join(name.split(".")[-3:-1])
        if name in ("encoder.patch_embed.weight", "encoder.class_token", "regressor.mask_token"):
            assert p.abs().max() <= 0.02 and p.abs().max() > 0.018
            if p.numel() > 1000:  # a normal of std 0.02 cut at one sigma has std 0.02 * 0.5396
                assert p.std().item() == pytest.approx(0.02 * 0.5396, rel=0.02)
        elif "norm" in name or name.startswith("to_regressor.1."):
            assert (p == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        elif "scale" in name:
            assert torch.equal(p, torch.full_like(p, 0.1))
        elif name in ("decoder.head.weight", "head.linear.weight", "to_regressor.0.weight"):
            assert_uniform(p, math.sqrt(6 / sum(p.shape)))
        else:  # xavier: sqrt(6 / (fan in + fan out)); q, k and v of a self-attention are one matrix
            assert_uniform(p, math.sqrt(6 / (sum(fans[layer]) * width)))
        checked.add(name)
    assert checked == parameters.keys()
    assert {n for n in checked if n.endswith("attn.qkv.weight")} and {n for n in checked if n.endswith("attn.q.weight")}


@pytest.mark.parametrize("size", ["nano", "tiny", "small", "base", "large", "huge"])
def test_initial_layer_scale(size):
    """0.1 up to base, 1e-5 above, in encoder, regressor and decoder."""
    narrow = dict(dim=32, heads=2, depth=1, regressor_dim=32, regressor_heads=2, regressor_depth=1, decoder_depth=1)
    model = CAE(CAEConfig.from_size(size, "cae", **narrow))
    scales = [p for n, p in model.named_parameters() if "scale" in n]
    assert len(scales) == 6
    assert all(torch.equal(p, torch.full_like(p, 1e-5 if size in ("large", "huge") else 0.1)) for p in scales)


def test_keys_have_no_bias():
    model = small_model(method="cae", decoder_depth=1)
    assert not [n for n, _ in model.named_parameters() if n.endswith(("attn.k.bias", "qkv.bias", "k_bias"))]


# ------------------------------------------------------------------------------------------------- stochastic depth


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_drop_path_zeroes_whole_images_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    n = 20_000
    out = cae.stochastic_depth(torch.ones(n, 2, 3), rate)
    kept = out[:, 0, 0] != 0
    assert torch.equal(out, torch.where(kept, 1 / (1 - rate), 0.0)[:, None, None].expand_as(out))
    assert abs(kept.float().mean().item() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / n)
    x = torch.randn(4, 2, 3)
    assert torch.equal(cae.stochastic_depth(x, 0), x)


def test_both_branches_of_a_block_are_dropped_independently():
    """At rate 0.5 a quarter of the images leaves each kind of block as if it had no branch at all."""
    torch.manual_seed(0)
    n, rate = 4000, 0.5
    block = cae.Block(8, 2, 1.0, rate).train()
    x = torch.randn(n, 3, 8)
    unchanged = (block(x) == x).all((1, 2)).float().mean().item()
    assert abs(unchanged - rate**2) < 5 * math.sqrt(rate**2 * (1 - rate**2) / n)
    assert torch.equal(block(x, stochastic=False), block.eval()(x))
    block = cae.RegressorBlock(8, 2, 1.0, rate).train()
    z, pv, pm = torch.randn(n, 2, 8), torch.randn(n, 2, 8), torch.randn(n, 3, 8)
    unchanged = (block(x, z, pv, pm) == block.norm2(x)).all((1, 2)).float().mean().item()
    assert abs(unchanged - rate**2) < 5 * math.sqrt(rate**2 * (1 - rate**2) / n)


def test_stochastic_depth_rises_linearly_from_zero():
    model = CAE(small_config(method="cae", depth=5, regressor_depth=3, decoder_depth=2, drop_path=0.4))
    for blocks, rates in (
        (model.encoder.blocks, [0.0, 0.1, 0.2, 0.3, 0.4]),
        (model.regressor.blocks, [0.0, 0.2, 0.4]),
        (model.decoder.blocks, [0.0, 0.4]),
    ):
        assert [block.drop_path for block in blocks] == pytest.approx(rates)
    single = CAE(small_config(depth=1, regressor_depth=1, drop_path=0.4))
    assert (single.encoder.blocks[0].drop_path, single.regressor.blocks[0].drop_path) == (0, 0)


@pytest.mark.parametrize("method", ["cae", "cae-v2"])
def test_stochastic_depth_acts_in_train_mode_only(method):
    model = small_model(method=method, drop_path=0.5, decoder_depth=2 if method == "cae" else 0)
    batch = small_batch(model.config, batch=4)

    def results():
        return {model(*batch)["loss"].item() for _ in range(8)}

    assert len(results()) > 1
    parts = [model.encoder, model.regressor] + ([model.decoder] if method == "cae" else [])  # v2's head has no blocks
    for part in parts:  # each by itself, the others in eval mode
        model.eval()
        part.train()
        assert len(results()) > 1
    model.eval()
    assert len(results()) == 1
    undropped = small_model(method=method, drop_path=0.0, decoder_depth=2 if method == "cae" else 0)
    assert results() == {undropped(*batch)["loss"].item()}


# ------------------------------------------------------------------------------------- compilation, no synchronisation


@pytest.mark.parametrize("name", ["v2 both", "v1"])
def test_compiled_equals_eager(name):
    """One graph without breaks. aot_eager captures and differentiates it as inductor would, but does not spend a
    minute per configuration on generating C++; what our code can break is the capture."""
    torch._dynamo.reset()
    model = small_model(**SETTINGS[name])
    batch = small_batch(model.config)
    expected = model(*batch)
    expected["loss"].backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    losses = torch.compile(model, fullgraph=True, backend="aot_eager")(*batch)
    losses["loss"].backward()
    assert losses.keys() == expected.keys()
    for part in expected:
        close(losses[part], expected[part], 1e-6)
    for n, p in model.named_parameters():
        if p.requires_grad:
            close(p.grad, gradients[n], 1e-5)


@pytest.mark.parametrize(("compiled", "tolerance"), [(False, 0), (True, 1e-5)])
def test_checkpointed_blocks_change_nothing_but_memory(compiled, tolerance):
    """The same loss and gradients, to the bit where not compiled, stochastic depth included; each block runs twice."""
    torch._dynamo.reset()
    model = small_model(drop_path=0.0 if compiled else 0.5)
    batch, runs = small_batch(model.config), []

    def gradients(step):
        torch.manual_seed(0)
        model.zero_grad()
        loss = step(*batch)["loss"]
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = gradients(model)
    model.encoder.checkpoint_blocks = True
    if not compiled:
        model.encoder.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
    got = gradients(torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model)
    assert compiled or len(runs) == 2
    assert all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(got, expected, strict=True))


@EVERY_SETTING
def test_forward_and_backward_without_reading_a_value(fields):
    """On the meta device no tensor has values, so that any .item(), comparison in an `if` or nonzero() raises: on an
    accelerator each would be a wait for the device. Stochastic depth included."""
    with pytest.raises((RuntimeError, NotImplementedError)):  # the proof works: this is what a wait would do
        torch.ones((), device="meta").item()
    with torch.device("meta"):
        model = CAE(small_config(**{**fields, "drop_path": 0.5})).train()
    batch = [tensor.to("meta") for tensor in small_batch(model.config)]
    losses = model(*batch)
    losses["loss"].backward()
    assert all(value.device.type == "meta" for value in losses.values())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
