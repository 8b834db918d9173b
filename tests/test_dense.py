"""dense.py in parts: the backbone against the encoder it starts from, groups, views, windows, losses, scores,
schedules, recipes, pictures."""

from engine.annotations import Objects, encode_masks, masks_of
from engine.arguments import parse
from engine.errors import UserError
from engine.run import join_statistics
from engine.sources import Source

import inspect
import io
import json
import math
import re
import typing
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from arguments import assert_documented, assert_used
from PIL import Image
from safetensors.torch import load_file
from transformers import BeitConfig, BeitForImageClassification, BeitModel

import dense
import finetune
from cae import CAE, CAEConfig
from demo.scenes import CLASSES, Scenes, png
from dense import Detect, Detection, DetectView, Segment, Segmentation, SegmentView, SquareView, TruthView, windows
from finetune import of_cae, parameter_groups, to_input

pytestmark = pytest.mark.usefixtures("seeded")

SHAPE = dict(dim=24, depth=4, heads=2, image_size=32, patch_size=8, regressor_dim=24, regressor_heads=2, drop_path=0.0)
THREE = ["sky", "sea", "sand"]


def encoder(**config):
    """A small CAE none of whose biases and scales is at its initial value."""
    model = CAE(CAEConfig.from_size("nano", **{**SHAPE, **config})).eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model


def origin_of(**config):
    return of_cae(encoder(**config), "here")


def resolved(task, origin, *flags, world=1, images=118_287):
    """As with these flags, which are set without tyro: it takes half a second for each command. COCO's images."""
    asked = Segment() if isinstance(task, Segmentation) else Detect()
    asked.model.checkpoint = asked.data.dataset = "x"
    asked.data.workers = 0
    words = iter(" ".join(map(str, flags)).split("--")[1:])
    for name, *values in map(str.split, words):
        name, value = name.removeprefix("no-").replace("-", "_"), not name.startswith("no-")
        group = next(group for group in vars(asked).values() if hasattr(group, name))
        hint = str(typing.get_type_hints(type(group))[name])
        if values or "tuple" in hint:
            kind = float if "float" in hint else int if "int" in hint else str
            value = tuple(map(kind, values)) if "tuple" in hint else kind(*values)
        setattr(group, name, value)
    return task.resolve(asked, origin, world, images)


def segmenter(origin, *flags, classes=THREE):
    """(task, its model in training mode), as the loop makes them."""
    task = Segmentation()
    task.classes, task.ignore = list(classes), 255 if len(classes) <= 255 else 65535
    args = resolved(task, origin, "--head-dim", 8, "--image-size", 32, "--batch-size", 2, *flags)
    return task, task.build(args, origin)


RCNN = ("--channels", 8, "--box-channels", 16, "--image-size", 64, "--proposals", 20, "--rois", 8, "--short-sides", 64,
        "--long-side", 64, "--anchors", 8, 16, 24, 32, 48)  # fmt: skip
DETR = ("--detector", "lw-detr", "--channels", 32, "--image-size", 64, "--windows", 4, "--queries", 6, "--groups", 2,
        "--decoder-depth", 2)  # fmt: skip


def detector(origin, *flags, classes=THREE):
    task = Detection()
    args = resolved(task, origin, *flags)
    task.classes, task.masks = list(classes), args.model.masks
    return task, task.build(args, origin)


def noise(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


# The backbone.


def blocks_of(model, images):
    """The output of each block of a CAE's encoder: [(B, 1 + N, D)]."""
    outputs = []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[-1])) for block in model.encoder.blocks]
    with torch.no_grad():
        model.encode(images)
    for hook in hooks:
        hook.remove()
    return outputs


def as_map(tokens, grid):
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))


@pytest.mark.parametrize(("depth", "blocks"), [(12, [4, 6, 8, 12]), (24, [8, 12, 16, 24]), (4, [1, 2, 3, 4]),
                                               (32, [11, 16, 21, 32]), (1, [1, 1, 1, 1])])  # fmt: skip
def test_maps_are_taken_after_the_papers_blocks(depth, blocks):
    assert dense.out_indices(depth) == blocks


@pytest.mark.parametrize(("bias", "size", "depth"), [(True, 32, 4), (True, 48, 4), (False, 48, 4), (True, 32, 6)])
def test_maps_are_the_outputs_of_the_encoders_blocks(bias, size, depth):
    """At the checkpoint's own size and another one; tables of relative positions begin with zeros."""
    model = encoder(depth=depth)
    args = dense.SegmentModel(image_size=size, drop_path=0.0, relative_position_bias=bias)
    backbone = dense.build_backbone(args, of_cae(model, "here"), False).eval()
    images = torch.randn(2, 3, size, size)
    expected = [as_map(blocks_of(model, images)[i - 1], size // 8) for i in dense.out_indices(depth)]
    with torch.no_grad():
        maps = backbone(images).feature_maps
    assert len(maps) == 4
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    tables = [p for name, p in backbone.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(tables) == depth * bias and not any(table.any() for table in tables)
    assert not backbone.beit.embeddings.position_embeddings.requires_grad, "fixed positions stay fixed"


def test_the_pyramid_is_made_of_the_blocks_outputs():
    """Strides P/4, P/2, P and 2P; the third map is that of its block itself, the fourth the largest of 2 x 2."""
    model = encoder()
    args = dense.SegmentModel(image_size=48, drop_path=0.0)
    backbone = dense.build_backbone(args, of_cae(model, "here"), True).eval()
    images = torch.randn(1, 3, 48, 48)
    blocks = [as_map(block, 6) for block in blocks_of(model, images)]
    with torch.no_grad():
        maps = backbone(images).feature_maps
    assert [tuple(x.shape[-2:]) for x in maps] == [(48 // stride,) * 2 for stride in (2, 4, 8, 16)]
    torch.testing.assert_close(maps[2], blocks[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[3], F.max_pool2d(blocks[3], 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[1], backbone.fpn.fpn2(blocks[1]), rtol=1e-4, atol=1e-5)


BEITS = {
    "mean": dict(use_absolute_position_embeddings=True, use_mean_pooling=True),
    "class": dict(use_absolute_position_embeddings=True, use_mean_pooling=False, use_mask_token=True),
    "bias": dict(use_relative_position_bias=True, use_mean_pooling=True),
    "shared": dict(use_shared_relative_position_bias=True, use_mean_pooling=False),
}


@pytest.mark.parametrize("kind", BEITS)
@pytest.mark.parametrize("tuned", [True, False])
def test_a_beit_is_an_encoder_as_well(tmp_path, kind, tuned):
    """A folder of transformers, fine-tuned or not, whatever its norms and positions."""
    config = BeitConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=20,
                        image_size=16, patch_size=4, num_labels=3, **BEITS[kind])  # fmt: skip
    model = (BeitForImageClassification if tuned else BeitModel)(config).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(tmp_path)
    origin = dense.open_origin(dense.SegmentModel(checkpoint=str(tmp_path)), 0, ("upernet",), None)
    assert origin.tuned is None and origin.cae is None
    beit = model.beit if tuned else model
    for size in (16, 24):
        args = dense.SegmentModel(image_size=size, drop_path=0.0)
        backbone = dense.build_backbone(args, origin, False).eval()
        images = torch.randn(1, 3, size, size)
        with torch.no_grad():
            maps = backbone(images).feature_maps
            states = beit(images, output_hidden_states=True).hidden_states[1:]
        if size == 16 or kind in ("mean", "class"):  # transformers resizes tables of relative positions in its own way
            for ours, theirs in zip(maps, states, strict=True):
                torch.testing.assert_close(ours, as_map(theirs, size // 4), rtol=1e-4, atol=1e-4)
        if kind in ("mean", "class"):
            assert backbone.beit.embeddings.position_embeddings.requires_grad, "learned positions are learned on"


# Gradients.


def computed_twice(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("pyramid", ["on", "off"])
def test_all_of_the_segmenter_learns_and_computing_twice_changes_nothing(pyramid):
    """Every trainable parameter has a gradient, and --checkpoint-blocks gives the same ones, with dropout as well."""
    origin = origin_of()
    images, annotations = noise(2, 3, 32, 32), torch.randint(3, (2, 32, 32), dtype=torch.uint8)
    found = []
    for flags in ((), ("--checkpoint-blocks",)):
        torch.manual_seed(1)
        task, model = segmenter(origin, "--pyramid", pyramid, "--drop-path", 0.3, *flags)
        assert computed_twice(model) == bool(flags)
        loss = task.losses(model, images, annotations)["loss"]
        loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing and sum(p.requires_grad for p in model.parameters()) > 80
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert frozen == ["backbone.beit.embeddings.position_embeddings"]
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (again, same) = found
    torch.testing.assert_close(loss, again, rtol=1e-6, atol=1e-6)
    assert set(gradients) == set(same)
    for name in gradients:
        torch.testing.assert_close(gradients[name], same[name], rtol=1e-4, atol=1e-6, msg=name)
    assert gradients["backbone.beit.embeddings.patch_embeddings.projection.weight"].abs().max() > 0


def targets_of(task, view_size=64):
    """Images and targets as the task's view gives them: two objects, and none."""
    two = objects([[8, 8, 40, 30], [20, 30, 60, 62]], [0, 2])
    view = task.train_view()
    pairs = [view(noise(3, view_size, view_size), these, seed) for seed, these in enumerate((two, objects([], [])))]
    images, targets = [list(values) for values in zip(*pairs, strict=True)]
    return torch.stack(images) if task.is_detr else images, targets


def objects(boxes, labels, crowd=None, size=(64, 64)):
    """Objects whose masks are their boxes."""
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().clamp(min=0).tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    crowd = torch.tensor(crowd or [False] * len(boxes), dtype=torch.bool)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return Objects(boxes, torch.tensor(labels, dtype=torch.int64), crowd, area, encode_masks(masks))


@pytest.mark.parametrize("flags", [RCNN, (*RCNN, "--detector", "cascade"), (*RCNN, "--relative-position-bias"), DETR])
def test_all_of_a_detector_learns_and_computing_twice_changes_nothing(flags):
    origin = origin_of()
    found = []
    for more in ((), ("--checkpoint-blocks",)):
        torch.manual_seed(1)
        task, model = detector(origin, *flags, *more)
        assert computed_twice(model) == bool(more)
        images, targets = targets_of(task)
        torch.manual_seed(2)  # of the proposals that are drawn
        losses = task.losses(model, images, targets)
        losses["loss"].backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        found.append((losses["loss"].detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, gradients), (again, same) = found
    assert loss.isfinite() and loss > 0
    torch.testing.assert_close(loss, again, rtol=1e-5, atol=1e-5)
    for name in gradients:
        torch.testing.assert_close(gradients[name], same[name], rtol=1e-3, atol=1e-5, msg=name)
    patches = next(name for name in gradients if name.endswith("projection.weight") and "embeddings" in name)
    assert gradients[patches].abs().max() > 0, "down to the patches"


# Groups.


@pytest.mark.parametrize("kind", ["segment", "mask-rcnn", "lw-detr"])
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_layer_decay_is_the_encoders_alone(kind, factor):
    """decay^(5 - id), id 0 for embeddings, i + 1 for block i, times the encoder's factor; 1 for all else, of which
    LW-DETR's decoder has `layers.0`, too. Every trainable parameter once; no decay of vectors and the class token."""
    origin = origin_of()
    make, flags = {"segment": (segmenter, ()), "mask-rcnn": (detector, RCNN), "lw-detr": (detector, DETR)}[kind]
    task, model = make(origin, *flags)
    embeddings, blocks, compiled = task.encoder(model)
    prefix = {"segment": "backbone.beit.", "mask-rcnn": "backbone.beit.beit.",
              "lw-detr": "model.backbone.backbone."}[kind]  # fmt: skip
    layers = prefix + ("encoder.layer." if kind == "lw-detr" else "layers.")
    assert len(blocks) == 4 and isinstance(compiled, torch.nn.Module)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales, decays = {}, {}
    for group in parameter_groups(model, embeddings, blocks, 0.5, 0.07, factor):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in scales, "once"
            scales[name], decays[name] = group["scale"], group["weight_decay"]
    assert set(scales) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = dict(model.named_parameters())
    for name, scale in scales.items():
        expected = 1.0
        if name.startswith(layers):
            expected = factor * 0.5 ** (4 - int(name.removeprefix(layers).split(".")[0]))
        elif name.startswith(f"{prefix}embeddings."):
            expected = factor * 0.5**5
        assert scale == pytest.approx(expected), name
        assert decays[name] == (0.0 if parameters[name].ndim == 1 or name.endswith("cls_token") else 0.07), name
    others = [name for name, scale in scales.items() if scale == 1.0 and ".layers.0." in name]
    assert bool(others) == (kind == "lw-detr"), "the decoder's"
    assert any("fpn" in name and scale == 1.0 for name, scale in scales.items()) == (kind != "lw-detr")
    lowest = [name for name in scales if name.startswith(f"{prefix}embeddings.")]
    assert len(lowest) == (2 if kind == "lw-detr" else 3), "weight and bias of the patches, the class token"


# Windows.


@pytest.mark.parametrize(("rows", "columns", "size", "stride", "expected"), [
    (683, 512, 512, 341, [(0, 0), (171, 0)]),
    (1024, 1024, 512, 341, [(t, l) for t in (0, 341, 512) for l in (0, 341, 512)]),  # noqa: E741
    (300, 200, 512, 341, [(0, 0)]),
    (512, 512, 512, 341, [(0, 0)]),
    (512, 853, 512, 341, [(0, 0), (0, 341)]),  # the second ends where the image does
    (512, 854, 512, 341, [(0, 0), (0, 341), (0, 342)]),
    (8, 8, 4, 4, [(0, 0), (0, 4), (4, 0), (4, 4)]),
])  # fmt: skip
def test_windows_by_hand(rows, columns, size, stride, expected):
    assert windows(rows, columns, size, stride) == expected


def test_windows_cover_every_pixel_and_nothing_else():
    for seed in range(300):
        draw = torch.Generator().manual_seed(seed)
        size, rows, columns = (torch.randint(low, 60, (), generator=draw).item() for low in (4, 1, 1))
        stride = torch.randint(1, size + 1, (), generator=draw).item()
        seen = torch.zeros(max(rows, size), max(columns, size), dtype=torch.int32)
        corners = windows(*seen.shape, size, stride)
        assert len(set(corners)) == len(corners)
        for top, left in corners:
            assert 0 <= top <= seen.shape[0] - size and 0 <= left <= seen.shape[1] - size
            seen[top : top + size, left : left + size] += 1
        assert seen.min() > 0


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (40, 70), (20, 50), (10, 12)])
def test_scores_are_the_mean_over_windows(rows, columns):
    task, model = segmenter(origin_of(), "--stride", 20)
    model.eval()
    x = torch.randn(1, 3, rows, columns)
    padded = torch.zeros(1, 3, max(32, rows), max(32, columns))  # 0 is the mean of all images
    padded[..., :rows, :columns] = x
    height, width = padded.shape[-2:]
    total, count = torch.zeros(3, height, width), torch.zeros(height, width)
    with torch.no_grad():
        for top in {*range(0, height - 32, 20), height - 32}:
            for left in {*range(0, width - 32, 20), width - 32}:
                part = padded[..., top : top + 32, left : left + 32]
                total[:, top : top + 32, left : left + 32] += model(part).logits[0]
                count[top : top + 32, left : left + 32] += 1
        scores = task.scores(model, x)
    assert scores.shape == (1, 3, rows, columns) and count.min() > 0
    torch.testing.assert_close(scores[0], (total / count)[:, :rows, :columns], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(32, 48), (37, 50), (10, 12)])
def test_scores_of_whole_images(rows, columns):
    """Those of the model on the image, padded to whole patches of the coarsest map."""
    task, model = segmenter(origin_of(), "--window", "whole")
    model.eval()
    x = torch.randn(1, 3, rows, columns)
    padded = F.pad(x, (0, -columns % 16, 0, -rows % 16))
    with torch.no_grad():
        expected = model(padded).logits[..., :rows, :columns]
        torch.testing.assert_close(task.scores(model, x), expected, rtol=1e-5, atol=1e-6)


def test_predictions_have_the_annotations_size():
    task, model = segmenter(origin_of())
    model.eval()
    image = noise(3, 40, 52)
    with torch.no_grad():
        predicted = task.predict(model, image, (80, 104))
        scores = task.scores(model, to_input(image[None]))
    expected = F.interpolate(scores, (80, 104), mode="bilinear", align_corners=False)[0].argmax(0)
    assert predicted.shape == (80, 104) and torch.equal(predicted, expected)


# Views to learn segmentation from.


def segment_view(size=32, ignore=255, **recipe):
    recipe = {"jitter": 0.0, "flip": 0.5, "random_scale": (0.5, 2.0), "class_share": 0.75, "short_side": 48, **recipe}
    return SegmentView(size, SimpleNamespace(**recipe), ignore)


def pair(rows=60, columns=80, classes=8, cell=10):
    """An annotation of cells, and an image that is a function of it: class c is (10 + 24 c, 240 - 24 c, 16 c)."""
    cells = torch.randint(classes, (-(-rows // cell), -(-columns // cell)))
    annotation = cells.repeat_interleave(cell, 0).repeat_interleave(cell, 1)[:rows, :columns]
    return painted(annotation), annotation.to(torch.uint8)


def painted(annotation):
    c = annotation.long()
    return torch.stack([10 + 24 * c, 240 - 24 * c, 16 * c]).to(torch.uint8)


@pytest.mark.parametrize("flip", [0.0, 0.5, 1.0])
def test_image_and_annotation_stay_together(flip):
    """Under scale, crop and flip the image is what the annotation says, but for the edges between the classes."""
    image, annotation = pair()
    view, shares = segment_view(flip=flip), []
    for seed in range(40):
        crop, numbers = view(image, annotation, seed)
        assert crop.shape == (3, 32, 32) and crop.dtype == torch.uint8 and type(crop) is type(numbers) is torch.Tensor
        assert numbers.shape == (32, 32) and numbers.dtype == torch.uint8
        known = numbers != 255
        near = (crop.int() - painted(torch.where(known, numbers, 0)).int()).abs().amax(0) <= 12
        inside = -F.max_pool2d(-known.float()[None], 3, 1, 1)[0] > 0  # neither beside the padding
        same = F.max_pool2d(numbers.float()[None], 5, 1, 2) == -F.max_pool2d(-numbers.float()[None], 5, 1, 2)
        inside[2:-2, 2:-2] &= same[0, 2:-2, 2:-2]  # what is beyond the crop is not known
        assert near[2:-2, 2:-2][inside[2:-2, 2:-2]].all(), "away from edges exactly"
        shares.append(near[known].float().mean().item())
    assert min(shares) > 0.5 and sum(shares) / 40 > 0.7


def test_the_flip_is_of_both():
    """Nothing but a flip: image and annotation of the crop's size, at scale 1."""
    image, annotation = pair(32, 32)
    for flip in (0.0, 1.0):
        view = segment_view(flip=flip, random_scale=(1.0, 1.0), short_side=32)
        crop, numbers = view(image, annotation, 5)
        assert torch.equal(crop, image.flip(-1) if flip else image)
        assert torch.equal(numbers, annotation.flip(-1) if flip else annotation)


def test_sizes_are_drawn_between_the_factors():
    image, annotation = pair(50, 50)
    view = segment_view(size=64, random_scale=(0.5, 1.5), short_side=32, flip=0.0)
    sides = [(view(image, annotation, seed)[1][0] != 255).sum().item() for seed in range(60)]
    assert 16 <= min(sides) < 20 and 44 < max(sides) <= 48 and len(set(sides)) > 20


def test_what_is_too_small_is_padded_with_grey_that_does_not_count():
    image, annotation = pair(20, 24)
    view = segment_view(size=64, flip=0.0, random_scale=(1.0, 1.0), short_side=40)
    crop, numbers = view(image, annotation, 0)
    assert (numbers[:40, :48] != 255).all() and (numbers[40:] == 255).all() and (numbers[:, 48:] == 255).all()
    grey = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None]
    assert (crop[:, 40:].flatten(1) == grey).all() and (crop[:, :, 48:].flatten(1) == grey).all()
    assert to_input(grey[None, :, :, None]).abs().max() < 0.01, "which is 0 to the model"


@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_a_segment_view_is_a_pure_function(jitter):
    image, annotation = pair()
    before = image.clone(), annotation.clone()
    view = segment_view(jitter=jitter)
    first = view(image, annotation, 3)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(view(image, annotation, 3), first, strict=True))
    assert len({view(image, annotation, seed)[0].float().mean().item() for seed in range(30)}) > 25
    assert torch.equal(image, before[0]) and torch.equal(annotation, before[1])


def test_jitter_changes_the_colours_and_nothing_else():
    """Brightness, contrast, saturation and hue; red stays red: channels are not exchanged."""
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0], image[1], image[2] = 200, 60, 40
    annotation = torch.arange(32, dtype=torch.uint8).repeat(32, 1) % 5
    plain = segment_view(flip=0.0, random_scale=(1.0, 1.0), short_side=32)
    colours = segment_view(flip=0.0, random_scale=(1.0, 1.0), short_side=32, jitter=1.0)
    means = []
    for seed in range(40):
        crop, numbers = colours(image, annotation, seed)
        assert torch.equal(numbers, plain(image, annotation, seed)[1])
        means.append(crop.float().mean(dim=(1, 2)))
        assert means[-1].argmax() == 0, "hue turns by 18 degrees at most"
    assert torch.stack(means).std(0).min() > 5


def test_crops_of_one_class_are_drawn_anew():
    """Where there are others: of an image half of which is one class, most crops have more than a fourth of others."""
    annotation = torch.zeros(32, 128, dtype=torch.uint8)
    annotation[:, 96:] = 1
    image = painted(annotation)
    counts = []
    for share in (0.75, 1.0):
        view = segment_view(random_scale=(1.0, 1.0), short_side=32, class_share=share)
        shares = torch.stack([(view(image, annotation, seed)[1] == 1).float().mean() for seed in range(100)])
        counts.append(((shares > 0.25) & (shares < 0.75)).sum().item())
    assert counts[0] > 70 > 60 > counts[1], "of ten crops one is such in 83 cases of 100"
    ignored = torch.where(annotation == 0, 255, 1).to(torch.uint8)
    view = segment_view(random_scale=(1.0, 1.0), short_side=32)
    assert view(image, ignored, 0)[1].shape == (32, 32), "and where it is impossible, a crop it is"
    assert view(image, torch.full_like(annotation, 255), 0)[1].eq(255).all()


def test_more_than_255_classes():
    annotation = torch.randint(300, (6, 8)).repeat_interleave(10, 0).repeat_interleave(10, 1).int()
    annotation[:10] = 65535
    image = noise(3, 60, 80)
    view = segment_view(size=64, ignore=65535, random_scale=(1.0, 1.0), short_side=60, flip=0.0)
    _, numbers = view(image, annotation, 0)
    assert numbers.dtype == torch.int32 and numbers.shape == (64, 64) and (numbers[60:] == 65535).all()
    assert set(numbers.unique().tolist()) <= set(annotation.unique().tolist()) and numbers[10:60].max() < 300


@pytest.mark.parametrize(("size", "short", "expected"), [
    ((100, 200), 50, [50, 100]), ((200, 100), 50, [100, 50]), ((1, 1000), 64, [1, 256]), ((1000, 10), 64, [256, 3]),
    ((33, 47), 33, [33, 47]), ((10, 40), 20, [20, 80]), ((683, 512), 512, [683, 512]),
])  # fmt: skip
def test_sizes_by_the_shorter_side(size, short, expected):
    """The longer side is four times `short` at most."""
    assert dense.scaled(torch.empty(3, *size), short) == expected


def test_whole_images_keep_their_annotation():
    image, annotation = pair(60, 80)
    scaled, same = dense.WholeView(30)(image, annotation, 0)
    assert scaled.shape == (3, 30, 40) and scaled.dtype == torch.uint8 and torch.equal(same, annotation)


# Views to learn detection from.


def coloured(boxes, size=(64, 64)):
    """A black image with rectangles of grey 255, 200, 150, ..."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for n, (left, top, right, bottom) in enumerate(boxes):
        image[:, top:bottom, left:right] = 255 - 50 * n
    return image


def box_around(mask):
    """x1 y1 x2 y2 of what is not 0 in a mask (H, W)."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


def test_boxes_masks_and_image_are_flipped_together():
    boxes = [[5, 8, 20, 40], [30, 10, 64, 25]]
    image, there = coloured(boxes, (50, 64)), objects(boxes, [0, 2], size=(50, 64))
    flipped = 0
    for seed in range(20):
        out, target = DetectView(0.5, True)(image, there, seed)
        assert target["labels"].tolist() == [1, 3], "torchvision's 0 is the background"
        assert target["boxes"].dtype == torch.float32 and target["masks"].dtype == torch.uint8
        for n, grey in enumerate((255, 205)):
            assert target["boxes"][n].tolist() == box_around(out[0] == grey) == box_around(target["masks"][n])
            assert torch.equal(out[0] == grey, target["masks"][n].bool())
        flipped += not torch.equal(out, image)
        again, same = DetectView(0.5, True)(image, there, seed)
        assert torch.equal(again, out) and all(torch.equal(same[name], target[name]) for name in target)
    assert 4 < flipped < 16
    assert "masks" not in DetectView(0.0, False)(image, there, 0)[1]


def test_what_is_not_learned_from():
    """Crowds, boxes of less than a pixel, within the image as well; their masks neither."""
    boxes = [[4, 4, 20, 20], [10, 10, 40, 40], [30, 30, 30.5, 50], [63.5, 0, 80, 30], [-10, -5, 12, 9], [50, 9, 40, 20],
             [70, 70, 90, 90]]  # fmt: skip
    there = objects(boxes, [0, 1, 2, 0, 1, 2, 0], crowd=[False, True, False, False, False, False, False])
    image = noise(3, 64, 64)
    _, target = DetectView(0.0, True)(image, there, 0)
    assert target["labels"].tolist() == [1, 2] and target["boxes"].tolist() == [[4, 4, 20, 20], [0, 0, 12, 9]]
    assert torch.equal(target["masks"], masks_of([there.segmentations[0], there.segmentations[4]], 64, 64))
    for seed in range(10):
        _, square = SquareView(32, 0.5)(image, there, seed)
        assert set(square["class_labels"].tolist()) <= {0, 1}
        assert (square["boxes"][:, 2:] > 0).all() and len(square["boxes"]) == len(square["class_labels"])
    assert there.boxes.tolist()[4] == [-10, -5, 12, 9], "what was given is as it was"


@pytest.mark.parametrize("masks", [True, False])
def test_images_without_objects(masks):
    image, none = noise(3, 40, 50), objects([], [], size=(40, 50))
    bare = Objects(none.boxes, none.labels, none.crowd, none.area, None)
    only_crowd = objects([[3, 3, 30, 30]], [1], crowd=[True], size=(40, 50))
    for there in (none, bare, only_crowd):
        for flip in (0.0, 1.0):
            _, target = DetectView(flip, masks)(image, there, 0)
            assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)
            assert not masks or target["masks"].shape == (0, 40, 50)
        for seed in range(6):
            square, target = SquareView(32, 0.5)(image, there, seed)
            assert square.shape == (3, 32, 32) and target["boxes"].shape == (0, 4)
            assert target["class_labels"].shape == (0,) and target["class_labels"].dtype == torch.int64
    truth = TruthView(None, masks)(image, bare, 0)[1]
    assert truth["boxes"].shape == (0, 4) and truth["masks"] == ([] if masks else None)


def test_boxes_of_squares_stay_tight():
    """After the part, the flip and the resizing: within a pixel around what is bright."""
    boxes = [[10, 20, 60, 70]]
    image, there, kinds = coloured(boxes, (90, 120)), objects(boxes, [2], size=(90, 120)), Counter()
    for seed in range(60):
        square, target = SquareView(100, 0.5)(image, there, seed)
        assert square.shape == (3, 100, 100) and square.dtype == torch.uint8
        if not len(target["boxes"]):
            assert (square > 127).float().mean() < 0.03, "a sliver at most"
            continue
        assert target["class_labels"].tolist() == [2]
        ((cx, cy, w, h),) = (100 * target["boxes"]).tolist()
        box = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
        assert min(box) > -1e-3 and max(box) < 100.001
        assert max(abs(a - b) for a, b in zip(box, box_around(square[0] > 127), strict=True)) <= 1
        kinds["whole" if abs(w - 100 * 50 / 120) < 1e-3 and abs(h - 100 * 50 / 90) < 1e-3 else "part"] += 1
        kinds["left" if cx < 50 else "right"] += 1
        again, same = SquareView(100, 0.5)(image, there, seed)
        assert torch.equal(again, square) and torch.equal(same["boxes"], target["boxes"])
    assert min(kinds["whole"], kinds["part"]) > 15 and min(kinds["left"], kinds["right"]) > 10


def test_parts_are_within_the_image():
    for side in (1, 2, 3, 50):
        for seed in range(50):
            torch.manual_seed(seed)
            start, length = dense.random_part(side)
            assert start >= 0 and start + length <= side and length >= max(1, math.floor(0.6 * side))


@pytest.mark.parametrize("square", [None, 32])
def test_truths_are_whole(square):
    """What is to be found: crowds and boxes without area, uncut, at the image's own size."""
    boxes = [[4, 4, 20, 20], [10, 10, 40, 40], [30, 30, 30, 50], [-10, -5, 12, 9]]
    there = objects(boxes, [0, 1, 2, 1], crowd=[False, True, False, False])
    image = noise(3, 64, 64)
    out, truth = TruthView(square, True)(image, there, 0)
    assert out.shape == ((3, 32, 32) if square else (3, 64, 64)) and (truth["height"], truth["width"]) == (64, 64)
    assert torch.equal(truth["boxes"], there.boxes) and truth["labels"].tolist() == [0, 1, 2, 1]
    assert truth["crowd"].tolist() == [False, True, False, False] and torch.equal(truth["area"], there.area)
    assert truth["masks"] == there.segmentations
    assert TruthView(square, False)(image, there, 0)[1]["masks"] is None


# Losses.


def test_the_loss_is_upernets_own():
    """The mean over pixels that count, and 0.4 of the auxiliary head's; also where one of the images has none."""
    for weight in (0.4, 0.7, 0.0):
        task, model = segmenter(origin_of(), "--dropout", 0, "--drop-path", 0, "--auxiliary-weight", weight)
        images, annotations = noise(2, 3, 32, 32), torch.randint(3, (2, 32, 32), dtype=torch.uint8)
        annotations[0, :20] = 255
        for some in (annotations, torch.stack([annotations[0], torch.full_like(annotations[1], 255)])):
            loss = task.losses(model, images, some)["loss"]
            maps = model.backbone(to_input(images)).feature_maps
            counts = some != 255
            expected = 0.0
            for head, part in ((model.decode_head, 1.0), (model.auxiliary_head, weight)):
                if not part:
                    assert head is None
                    continue
                logits = F.interpolate(head(maps), (32, 32), mode="bilinear", align_corners=False)
                chosen = logits.log_softmax(1).permute(0, 2, 3, 1)[counts]  # (pixels, C)
                expected = expected - part * chosen.gather(1, some[counts].long()[:, None]).mean()
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_in_which_nothing_counts():
    for classes in (THREE, list(map(str, range(300)))):
        task, model = segmenter(origin_of(), classes=classes)
        loss = task.losses(model, noise(2, 3, 32, 32), torch.full((2, 32, 32), task.ignore, dtype=torch.int32))["loss"]
        loss.backward()
        assert loss.item() == 0
        assert all((p.grad == 0).all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("flags", [RCNN, (*RCNN, "--detector", "cascade"), (*RCNN, "--no-masks"), DETR])
def test_detectors_learn_from_images_without_objects(flags):
    task, model = detector(origin_of(), *flags)
    view = task.train_view()
    pairs = [view(noise(3, 64, 64), objects([], []), seed) for seed in range(2)]
    images, targets = [list(values) for values in zip(*pairs, strict=True)]
    losses = task.losses(model, torch.stack(images) if task.is_detr else images, targets)
    losses["loss"].backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    if not task.is_detr:
        torch.testing.assert_close(losses["loss"], sum(loss for name, loss in losses.items() if name != "loss"))
        assert ("loss_mask" in losses) == task.masks


def test_channels_are_dropped_in_training_only():
    _, model = segmenter(origin_of(), "--dropout", 0.5)
    seen = {}
    for name in ("decode_head", "auxiliary_head"):
        getattr(model, name).classifier.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    for training in (True, False):
        model.train(training)
        model(torch.randn(2, 3, 32, 32))
        for x in seen.values():
            dropped = (x == 0).flatten(2).all(2).float().mean()
            assert (0.2 < dropped < 0.9) == training
    assert len(seen) == 2


# Evaluation.


class Alone:
    """The parts of an Accelerator that evaluations use, for one of several ranks after the other: sums over all ranks
    are right for the last of them."""

    device, num_processes = torch.device("cpu"), 1
    autocast = staticmethod(nullcontext)

    def __init__(self, rank=0, world=1, sums=None):
        self.process_index, self.num_processes, self.is_main_process = rank, world, rank == 0
        self.sums, self.at = [] if sums is None else sums, 0

    def reduce(self, tensor, how):
        if self.at == len(self.sums):
            self.sums.append(torch.zeros_like(tensor))
        self.sums[self.at] += tensor
        self.at += 1
        total = self.sums[self.at - 1]
        return total / self.num_processes if how == "mean" else total.clone()


class FakeRun(SimpleNamespace):
    """Lists of all ranks are whole for the last of them, too; `lists` of those before."""

    device = torch.device("cpu")

    def gather(self, values):
        if not hasattr(self, "lists"):
            return values
        self.at = getattr(self, "at", -1) + 1
        self.lists += [[]] * (self.at == len(self.lists))
        self.lists[self.at] = self.lists[self.at] + values
        return self.lists[self.at]


def scenes(count, what, damaged=()):
    """Rows of a data set; of the damaged ones the image is cut to nothing, or (negative numbers) the annotation."""
    rows = list(Scenes("test", count, 48, what).__getitems__(range(count)))
    for i in damaged:
        rows[abs(i)] = {**rows[abs(i)]}
        rows[abs(i)]["image" if i > 0 else "annotation" if what == "maps" else "objects"] = (
            {"bytes": b"no image", "path": f"{abs(i)}.png"} if i > 0 or what == "maps" else "no json"
        )
    return rows


def segment_task(rows, monkeypatch, predict=None):
    task, model = segmenter(origin_of(), "--short-side", 40, classes=["background", *CLASSES])
    task.val_source = Source(rows, "image", "annotation", len(rows), "scenes")
    task.val_source.targets = dense.ReadMap(task.val_source, 11, {"ignore_index": 255})
    if predict:
        monkeypatch.setattr(task, "predict", predict)
    return task, model.eval()


def test_a_perfect_segmenter_has_all_points(monkeypatch):
    """The truth, in the order of the data; a class that is left out costs points."""
    rows = scenes(6, "maps")
    truths = [dense.decode_annotation(row["annotation"]["bytes"]) for row in rows]
    served = iter([*truths, *(t * (t != t.max()) for t in truths)])

    def predict(model, image, shape):
        truth = next(served)
        assert image.shape == (3, 40, 40) and shape == truth.shape == (48, 48)
        return truth

    task, model = segment_task(rows, monkeypatch, predict)
    scores, images = task.evaluate(FakeRun(accelerator=Alone()), model)
    assert (scores["miou"], scores["mean_accuracy"], scores["pixel_accuracy"]) == (100, 100, 100) and images == 6
    present = torch.cat([t.flatten() for t in truths]).unique().tolist()
    assert [c for c, iou in enumerate(scores["iou"]) if iou is not None] == present and len(present) > 5
    worse, _ = task.evaluate(FakeRun(accelerator=Alone()), model)
    assert 0 < worse["miou"] < 90 and worse["pixel_accuracy"] < 100
    assert task.skipped == []


def test_the_matrix_of_all_ranks_is_that_of_one(monkeypatch):
    """Seven images on one, two and three ranks, of which some have fewer, and on nine, of which two have none."""
    task, model = segment_task(scenes(7, "maps"), monkeypatch)
    alone = task.evaluate(FakeRun(accelerator=Alone()), model)
    matrices = []
    monkeypatch.setattr(dense, "segmentation_scores", lambda matrix: matrices.append(matrix.clone()))
    for world in (1, 2, 3, 9):
        sums = []
        for rank in range(world):
            _, images = task.evaluate(FakeRun(accelerator=Alone(rank, world, sums)), model)
        assert images == 7 == alone[1]
        assert torch.equal(matrices[-1], matrices[0]) and matrices[-1].dtype == torch.int64
    assert matrices[-1].sum() == 7 * 48 * 48


def test_files_that_cannot_be_segmented_are_counted(monkeypatch):
    """One image of 120, or one annotation, is skipped; the others are evaluated."""
    for damaged in (7, -7):
        rows = scenes(8, "maps", [damaged])
        good = [row for i, row in enumerate(rows) if i != 7]
        task, model = segment_task([*(good * 17), rows[7]], monkeypatch, lambda model, image, shape: torch.zeros(shape))
        scores, images = task.evaluate(FakeRun(accelerator=Alone()), model)
        assert images == 7 * 17 and len(task.skipped) == 1 and scores["pixel_accuracy"] < 100
        task.evaluate(FakeRun(accelerator=Alone()), model)
        assert len(task.skipped) == 1, "of the last evaluation"


def detect_task(rows, monkeypatch, flags=RCNN, predict=None):
    task, model = detector(origin_of(), *flags, classes=CLASSES)
    task.val_source = Source(rows, "image", "objects", len(rows), "scenes")
    task.val_source.targets = dense.ReadObjects(task.val_source, list(CLASSES), "xywh", task.masks)
    if predict:
        monkeypatch.setattr(task, "predict", predict)
    return task, model.eval()


def true_detections(model, images, targets):
    """As the model would give them: boxes, scores, labels, and masks not yet encoded."""
    found = []
    for target in targets:
        one = {"boxes": target["boxes"].clone(), "labels": target["labels"].clone(),
               "scores": torch.linspace(0.9, 0.5, len(target["boxes"]))}  # fmt: skip
        if target["masks"] is not None:
            one["masks"] = masks_of(target["masks"], target["height"], target["width"]).bool()
        found.append(one)
    return found


@pytest.mark.parametrize("flags", [RCNN, (*RCNN, "--no-masks"), DETR])
def test_a_perfect_detector_has_all_points(monkeypatch, flags):
    rows = scenes(6, "objects")
    task, model = detect_task(rows, monkeypatch, flags, true_detections)
    scores, images = task.evaluate(FakeRun(accelerator=Alone()), model)
    kinds = ["", "mask_"] if task.masks else [""]
    for name in (f"{kind}{score}" for kind in kinds for score in ("ap", "ap50", "ap75", "ap_small")):
        assert scores[name] == pytest.approx(100), name
    assert images == 6 and ("mask_ap" in scores) == task.masks and task.skipped == []
    present = {thing["category"] for row in rows for thing in json.loads(row["objects"])}
    assert {c for c, ap in enumerate(scores["ap_per_class"]) if ap is not None} == present

    def shifted(model, images, targets):
        found = true_detections(model, images, targets)
        return [{**one, "labels": (one["labels"] + 1) % 10} for one in found]

    monkeypatch.setattr(task, "predict", shifted)
    assert task.evaluate(FakeRun(accelerator=Alone()), model)[0]["ap"] < 50


def test_the_precision_of_all_ranks_is_that_of_one(monkeypatch):
    """Five images on one, two and three ranks, and on seven, of which two have none."""

    def predict(model, images, targets):
        found = true_detections(model, images, targets)
        for one in found:  # boxes and classes that are right for some; of equal scores the order would count
            one["scores"] = (one["boxes"] @ torch.tensor([0.123, 0.0717, 0.0331, 0.0113])).frac()
            one["boxes"] += torch.arange(len(one["boxes"]))[:, None]
            one["labels"][::3] = 0
        return found

    task, model = detect_task(scenes(5, "objects"), monkeypatch, (*RCNN, "--batch-size", 2), predict)
    alone, _ = task.evaluate(FakeRun(accelerator=Alone()), model)
    assert 5 < alone["ap"] < 95 and 5 < alone["mask_ap"] < 95
    for world in (2, 3, 7):
        lists = []
        for rank in range(world):
            try:
                scores, images = task.evaluate(FakeRun(accelerator=Alone(rank, world), lists=lists), model)
            except ValueError:  # before all of them have been there
                assert rank < world - 1
        assert images == 5
        for name, value in alone.items():
            assert scores[name] == (value if isinstance(value, list) else pytest.approx(value)), name


def test_files_that_cannot_be_searched_are_counted(monkeypatch):
    rows = scenes(8, "objects", [7])
    task, model = detect_task([*(rows[:7] * 15), rows[7]], monkeypatch, (*RCNN, "--no-masks"), true_detections)
    scores, images = task.evaluate(FakeRun(accelerator=Alone()), model)
    assert images == 7 * 15 and len(task.skipped) == 1 and scores["ap"] == pytest.approx(100)


@pytest.mark.parametrize("flags", [RCNN, DETR])
def test_detections_count_classes_from_0_in_pixels_of_the_image(monkeypatch, flags):
    """An untrained model through the whole evaluation: its scores are numbers."""
    rows = scenes(2, "objects")
    task, model = detect_task(rows, monkeypatch, flags)
    image = noise(3, 64, 64) if task.is_detr else noise(3, 40, 50)
    if not task.is_detr:
        model.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        (found,) = task.predict(model, [image], [{"height": 40, "width": 50}])
    assert len(found["labels"]) > 3 and found["labels"].min() >= 0 and found["labels"].max() < 10
    left, top, right, bottom = found["boxes"].T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 50 and bottom.max() <= 40
    if not task.is_detr:
        assert found["masks"].shape == (len(found["labels"]), 40, 50) and found["masks"].dtype == torch.bool
        packed = dense.packed(dict(found))
        assert all(mask["size"] == [40, 50] for mask in packed["masks"]) and "masks" in found
    else:
        assert right.max() > 10, "not relative ones"
    with torch.no_grad():
        scores, images = task.evaluate(FakeRun(accelerator=Alone()), model)
    assert images == 2 and 0 <= scores["ap"] < 50


def test_an_annotation_of_another_size_is_none():
    source = Source([], "image", "annotation", 0, "here")
    read = dense.ReadMap(source, 3, {"ignore_index": 255})
    row = {"annotation": {"bytes": png(Image.new("L", (5, 4))), "path": None}}
    assert read(row, torch.empty(3, 4, 5)).shape == (4, 5)
    with pytest.raises(ValueError, match="it has 5 x 4 pixels, its image 6 x 4"):
        read(row, torch.empty(3, 4, 6))
    with pytest.raises(ValueError, match="no masks: pass --no-masks"):
        dense.ReadObjects(Source([], "image", "objects", 0, "here"), THREE, "xywh", True)(
            {"objects": '[{"bbox": [1, 2, 3, 4], "category": 1}]'}, torch.empty(3, 9, 9)
        )


def test_wrong_rows_are_told_before_the_work():
    rows = scenes(3, "maps", [-1])
    source = Source(rows, "image", "annotation", 3, "scenes")
    source.targets = dense.ReadMap(source, 11, {"ignore_index": 255})
    with pytest.raises(UserError, match=r"annotation of .*: it is no image of a known format"):
        dense.check_rows(source)
    source.targets = dense.ReadMap(source, 2, {"ignore_index": 255})
    with pytest.raises(UserError, match="is none of the 2 classes: pass --num-classes"):
        dense.check_rows(Source(rows[:1], "image", "annotation", 1, "scenes", targets=source.targets))
    damaged = Source(scenes(2, "maps", [1]), "image", "annotation", 2, "scenes")
    damaged.targets = dense.ReadMap(damaged, 11, {"ignore_index": 255})
    dense.check_rows(damaged)  # an image that is none is skipped later


# Schedules.


@pytest.mark.parametrize(("step", "rate"), [(0, 0.0), (750, 0.5 * (1 - 750 / 160_000)), (1500, 1 - 1500 / 160_000),
                                            (40_000, 0.75), (80_000, 0.5), (159_999, 1 / 160_000)])  # fmt: skip
def test_linear_decay_by_hand(step, rate):
    assert dense.linear_decay(step, 160_000, 1500, 4e-4) == pytest.approx(4e-4 * rate)
    assert dense.linear_decay(step, 160_000, 0, 4e-4) == pytest.approx(4e-4 * (1 - step / 160_000))


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.0), (0.25, 0.5), (0.5, 1), (8.99, 1), (9, 0.1), (10.99, 0.1),
                                             (11.001, 0.01), (11.99, 0.01)])  # fmt: skip
def test_steps_down_by_hand(epoch, rate):
    """Twelve epochs of 1,000 steps, 500 to warm up, a tenth after the ninth and the eleventh."""
    step = round(1000 * epoch)
    assert dense.stepped(step, 12_000, 500, 3e-4, (0.75, 0.9167)) == pytest.approx(3e-4 * rate)
    assert dense.stepped(step, 12_000, 0, 3e-4, ()) == 3e-4


def test_rates_are_scaled_with_the_batch():
    task, _ = segmenter(origin_of(), "--effective-batch-size", 64, "--lr", 1e-4)
    assert task.peak() == pytest.approx(4e-4) and task.warmup(SimpleNamespace(steps=160_000)) == 1500
    assert task.learning_rate(80_000, SimpleNamespace(steps=160_000), 1500) == pytest.approx(2e-4)
    with pytest.raises(UserError, match="--warmup-steps 1500 is not shorter than the run"):
        task.warmup(SimpleNamespace(steps=1500))
    task, _ = detector(origin_of(), *RCNN, "--effective-batch-size", 16, "--lr", 1e-4)
    assert task.peak() == pytest.approx(5e-5) and task.warmup(SimpleNamespace(steps=5000)) == 500
    assert task.learning_rate(4000, SimpleNamespace(steps=5000), 500) == pytest.approx(5e-6)
    with pytest.raises(UserError, match="--warmup-steps 500 is not shorter than the run"):
        task.warmup(SimpleNamespace(steps=400))


# Classes.


@pytest.mark.parametrize(("text", "known", "number", "expected"), [
    (None, THREE, None, THREE),
    (None, None, 3, ["0", "1", "2"]),
    (None, THREE, 3, THREE),
    ("cat\n dog \n\ncow\n", THREE, None, ["cat", "dog", "cow"]),
    ('["cat", "dog"]', None, 2, ["cat", "dog"]),
    ('{"2": "cow", "10": "hen", "0": "cat"}', None, None, ["cat", "cow", "hen"]),
])  # fmt: skip
def test_classes(tmp_path, text, known, number, expected):
    file = tmp_path / "names"
    if text is not None:
        file.write_text(text)
    labels = dense.SegmentLabels(num_classes=number, class_names=text and str(file))
    assert dense.choose_classes(labels, known, "here") == expected


@pytest.mark.parametrize(("content", "known", "number", "message"), [
    (None, None, None, "data set here does not name its classes: pass --num-classes, or --class-names"),
    (None, THREE, 4, "--num-classes is 4, data set here has 3 classes"),
    (None, None, 0, "--num-classes, --class-names|does not name its classes"),
    (None, THREE, -1, "--num-classes is -1"),
    (b"cat\ndog", None, 3, "--num-classes is 3, .*names has 2 classes"),
    (b"[1, 2", None, None, "--class-names .*names cannot be read: "),
    (b'{"a": "cat"}', None, None, "--class-names .*names cannot be read: "),
    (b"\xff\xfe\xfa", None, None, "--class-names .*names cannot be read: "),
    (False, None, None, "--class-names .*names cannot be read: .*No such file"),
    (b"\n\n", None, None, "does not name its classes"),
])  # fmt: skip
def test_classes_that_are_none(tmp_path, content, known, number, message):
    file = tmp_path / "names"
    if content:
        file.write_bytes(content)
    labels = dense.SegmentLabels(num_classes=number, class_names=None if content is None else str(file))
    with pytest.raises(UserError, match=message) as caught:
        dense.choose_classes(labels, known, "here")
    assert "\n" not in str(caught.value)


# Recipes.


def paper(size, patch=16, image=224, depth=12):
    """An origin of this size, without weights."""
    config = BeitConfig(image_size=image, patch_size=patch, num_hidden_layers=depth, hidden_size=768)
    return finetune.Origin(SimpleNamespace(config=config), None, None, "cae-v2", size, "here", cae=SimpleNamespace())


@pytest.mark.parametrize(("size", "lr", "decay", "drop"), [
    ("tiny", 4e-4, 0.65, 0.0), ("small", 4e-4, 0.65, 0.1), ("base", 4e-4, 0.65, 0.1), ("large", 4e-5, 0.95, 0.15),
    ("huge", 4e-5, 0.95, 0.15),
])  # fmt: skip
def test_segmentation_as_in_the_papers(size, lr, decay, drop):
    args = resolved(Segmentation(), paper(size))
    model, recipe, data, run = args.model, args.recipe, args.data, args.run
    assert (recipe.lr, recipe.layer_decay, model.drop_path, recipe.weight_decay) == (lr, decay, drop, 0.05)
    assert (model.image_size, model.pyramid, model.auxiliary_weight, recipe.clip_grad) == (512, "on", 0.4, 0.0)
    assert (run.steps, run.epochs, recipe.warmup_steps, recipe.eval_steps) == (160_000, None, 1500, 8000)
    assert (data.effective_batch_size, data.batch_size) == (16, 16) and model.relative_position_bias
    assert (recipe.short_side, recipe.stride, recipe.window, recipe.random_scale) == (512, 341, "slide", (0.5, 2.0))
    assert (recipe.class_share, recipe.flip, recipe.jitter, recipe.ema) == (0.75, 0.5, 0.5, 0.0)
    assert resolved(Segmentation(), paper(size), world=8).data.batch_size == 2


@pytest.mark.parametrize(("size", "lr", "decay", "drop"), [
    ("tiny", 3e-4, 0.75, 0.0), ("small", 3e-4, 0.75, 0.1), ("base", 3e-4, 0.75, 0.2), ("large", 2e-4, 0.8, 0.2),
    ("huge", 2e-4, 0.8, 0.2),
])  # fmt: skip
def test_detection_as_in_the_papers(size, lr, decay, drop):
    args = resolved(Detection(), paper(size), world=8)
    model, recipe, data, run = args.model, args.recipe, args.data, args.run
    assert (recipe.lr, recipe.layer_decay, model.drop_path, recipe.weight_decay) == (lr, decay, drop, 0.05)
    assert (run.epochs, run.steps, recipe.warmup_steps, recipe.drops) == (12, None, 500, (0.75, 0.9167))
    assert (data.effective_batch_size, data.batch_size, recipe.encoder_factor) == (32, 4, 1.0)
    assert recipe.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800) and recipe.long_side == 1333
    assert model.anchors == (32, 64, 128, 256, 512) and (model.image_size, model.channels) == (800, 256)
    assert (recipe.clip_grad, recipe.ema, model.masks, model.proposals, model.rois) == (0, 0, True, 2000, 512)
    assert (model.detections, model.box_channels, model.canonical_scale) == (100, 1024, 224)


def test_lw_detr_as_in_its_paper():
    args = resolved(Detection(), paper("small"), "--detector", "lw-detr")
    model, recipe, data, run = args.model, args.recipe, args.data, args.run
    assert (recipe.lr, recipe.lr * recipe.encoder_factor) == (1e-4, pytest.approx(1.5e-4))
    assert (recipe.layer_decay, recipe.weight_decay, recipe.ema, recipe.clip_grad) == (0.8, 1e-4, 0.9997, 0.1)
    assert (model.groups, model.queries, model.decoder_depth, model.windows) == (13, 300, 3, 16)
    assert (run.epochs, data.effective_batch_size, recipe.drops, recipe.warmup_steps) == (60, 32, (), 0)
    assert (model.image_size, model.drop_path, model.masks) == (640, 0.0, False)
    assert model.detections == 300, "one for each query, as released"


def test_recipes_of_the_demo():
    nano = paper("nano", patch=4, image=28, depth=4)
    args = resolved(Segmentation(), nano)
    model, recipe = args.model, args.recipe
    assert (model.image_size, model.pyramid, model.head_dim, recipe.short_side) == (64, "off", 48, 96)
    assert args.run.steps == recipe.eval_steps == 300 and recipe.warmup_steps == 30 and recipe.layer_decay == 1
    assert (args.data.batch_size, args.data.effective_batch_size, recipe.random_scale) == (8, 8, (1, 1))
    args = resolved(Detection(), nano)
    assert (args.run.steps, args.data.batch_size, args.data.effective_batch_size) == (280, 4, 4)
    assert args.recipe.warmup_steps == 28 and args.recipe.short_sides == (96,)
    told = " ".join(inspect.getsource(dense.DetectModel).split("anchors:")[1].split('"""')[1].split())
    assert f"nano {' '.join(map(str, args.model.anchors))}." in told, "as its flag says"


@pytest.mark.parametrize(("task", "flags", "warmup", "ema"), [
    (Segmentation, "--epochs 20", 125, 0.0), (Detection, "", 37, 0.0),
    (Detection, "--detector lw-detr", 0, 1 - 10 / 1875), (Detection, "--steps 300", 30, 0.0),
])  # fmt: skip
def test_short_runs_have_short_warm_ups_and_averages(task, flags, warmup, ema):
    """Of a thousand images: 1,250, 375 and 1,875 steps. Nothing of it has to be told by a flag."""
    recipe = resolved(task(), paper("small"), flags, images=1000).recipe
    assert (recipe.warmup_steps, recipe.ema) == (warmup, pytest.approx(ema))
    assert resolved(task(), paper("small"), flags, images=None).run.steps in (None, 300), "before they are counted"


def test_a_longer_run_keeps_what_followed_from_its_length(tmp_path):
    """--steps may grow: what was derived from it stays as the run began."""
    flags = ["--steps", 1000, "--run-dir", tmp_path]
    first = resolved(Segmentation(), paper("small"), *flags)
    (tmp_path / "config.json").write_text(json.dumps({"args": finetune.flat(first), "model": {}}))
    (tmp_path / "log.jsonl").touch()  # something has begun
    flags[1] = 2000
    second = resolved(Segmentation(), paper("small"), *flags)
    assert (first.recipe.eval_steps, first.recipe.warmup_steps) == (50, 100)
    assert (second.recipe.eval_steps, second.recipe.warmup_steps) == (50, 100)


def test_an_earlier_result_is_gone_on_with_as_it_was():
    """Its size, widths, anchors and the like, unless other flags are given."""
    _, model = detector(origin_of(), *RCNN, "--detections", 7)
    tuned = dense.of_tuned(model, model.backbone.beit.beit, "here")
    args = resolved(Detection(), tuned, "--channels 24")
    assert args.model.anchors == (8, 16, 24, 32, 48) and (args.model.channels, args.model.box_channels) == (24, 16)
    assert (args.model.image_size, args.model.detections, args.model.proposals) == (64, 7, 20)
    assert (args.recipe.short_sides, args.recipe.long_side) == ((64,), 64)
    _, model = segmenter(origin_of(), "--head-dim 12", "--image-size 40", "--pyramid on")
    model.config.id2label = dict(enumerate(THREE))
    args = resolved(Segmentation(), dense.of_tuned(model, model.backbone.beit, "here"))
    assert (args.model.head_dim, args.model.image_size, args.model.pyramid) == (12, 40, "on")
    _, model = detector(origin_of(), *DETR)
    tuned = dense.of_tuned(model, model.model.backbone.backbone, "here")
    its = resolved(Detection(), tuned, "--detector lw-detr").model
    assert (its.queries, its.groups, its.channels, its.windows, its.image_size) == (6, 2, 32, 4, 64)
    assert its.decoder_depth == 2


def test_a_detector_looks_at_one_image_at_a_time():
    """What it finds in an image does not depend on the others of its batch, which would pad it."""
    task, model = detector(origin_of(), *RCNN)
    model.eval().roi_heads.score_thresh = 0.0
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((48, 64), (72, 40))]
    with torch.no_grad():
        together = task.predict(model, images, [{}, {}])
        alone = [task.predict(model, [image], [{}])[0] for image in images]
    for one, other in zip(together, alone, strict=True):
        assert len(one["boxes"]) and all(torch.equal(one[name], other[name]) for name in ("boxes", "labels", "scores"))


def test_splits_of_other_categories_are_refused(tmp_path):
    """In another order, or with one less: numbers of one split would be other classes in the next."""
    for split, names in (("train2017", ("cat", "dog")), ("val2017", ("dog", "cat"))):
        (tmp_path / split).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / split / "a.png")
        content = {"images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 20}], "annotations": [],
                   "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)]}  # fmt: skip
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    asked = Detect()
    asked.model.checkpoint, asked.data.dataset, asked.data.workers = "x", str(tmp_path), 0
    task = Detection()
    args = task.resolve(asked, origin_of(), 1)
    with pytest.raises(UserError, match=r"disagree on their classes \(2 and 2\): all need the same, in one order"):
        task.open(args, origin_of(), 1)


SEGMENT_FLAGS = {
    "--drop-path 0.3": ("model", "drop_path", 0.3), "--pyramid off": ("model", "pyramid", "off"),
    "--head-dim 64": ("model", "head_dim", 64), "--lr 1e-4": ("recipe", "lr", 1e-4),
    "--layer-decay 0.9": ("recipe", "layer_decay", 0.9), "--short-side 600": ("recipe", "short_side", 600),
    "--stride 100": ("recipe", "stride", 100), "--steps 100": ("recipe", "warmup_steps", 10),
    "--steps 40": ("recipe", "eval_steps", 2), "--warmup-steps 7": ("recipe", "warmup_steps", 7),
    "--epochs 3": ("run", "steps", None), "--image-size 640": ("recipe", "stride", 426),
    "--eval-steps 9": ("recipe", "eval_steps", 9), "--eval-every 2": ("recipe", "eval_steps", None),
    "--effective-batch-size 8": ("data", "batch_size", 8),
}  # fmt: skip
DETECT_FLAGS = {
    "--drop-path 0.3": ("model", "drop_path", 0.3), "--channels 64": ("model", "channels", 64),
    "--box-channels 99": ("model", "box_channels", 99), "--anchors 8 16 32 64 128": ("model", "anchors",
                                                                                     (8, 16, 32, 64, 128)),
    "--canonical-scale 100": ("model", "canonical_scale", 100), "--proposals 50": ("model", "proposals", 50),
    "--rois 40": ("model", "rois", 40), "--detections 7": ("model", "detections", 7), "--lr 1": ("recipe", "lr", 1),
    "--encoder-factor 2": ("recipe", "encoder_factor", 2), "--weight-decay 0.3": ("recipe", "weight_decay", 0.3),
    "--clip-grad 2": ("recipe", "clip_grad", 2), "--ema 0.9": ("recipe", "ema", 0.9),
    "--warmup-steps 3": ("recipe", "warmup_steps", 3), "--drops 0.5": ("recipe", "drops", (0.5,)),
    "--short-sides 200 300": ("recipe", "short_sides", (200, 300)), "--steps 1000": ("recipe", "warmup_steps", 100),
    "--detector lw-detr --queries 9": ("model", "queries", 9), "--detector lw-detr --groups 2": ("model", "groups", 2),
    "--detector lw-detr --decoder-depth 1": ("model", "decoder_depth", 1),
    "--detector lw-detr --windows 1": ("model", "windows", 1), "--no-masks": ("model", "masks", False),
}  # fmt: skip


@pytest.mark.parametrize("task", [Segmentation, Detection])
def test_flags_that_are_given_win(task):
    for flags, (group, name, value) in (SEGMENT_FLAGS if task is Segmentation else DETECT_FLAGS).items():
        assert getattr(getattr(resolved(task(), paper("base"), *flags.split()), group), name) == value, flags


@pytest.mark.parametrize(("flags", "message"), [
    ("--image-size 500", "--image-size 500 is not divisible by the patch of 16 pixels"),
    ("--size large", "--size large was asked for, but here is base"),
    ("--drop-path 1", "--drop-path is 1.0: it must lie in [0, 1)"),
    ("--dropout 1", "--dropout is 1.0: it must lie in [0, 1)"),
    ("--stride 600", "--stride 600 is longer than the window of 512 pixels"),
    ("--stride 0", "--stride is 0"),
    ("--short-side 0", "--short-side is 0"),
    ("--head-dim 0", "--head-dim is 0"),
    ("--random-scale 2 1", "--random-scale is 2.0 1.0: two factors with 0 < first <= second <= 100"),
    ("--random-scale 0 1", "--random-scale is 0.0 1.0"),
    ("--batch-size 1", "--batch-size must be 2 or more"),
    ("--class-share 1.5", "--class-share is 1.5: it must lie between 0 and 1"),
    ("--jitter -1", "--jitter is -1.0: it must lie between 0 and 1"),
    ("--flip 2", "--flip is 2.0: it must lie between 0 and 1"),
    ("--ema 1.5", "--ema is 1.5: it must lie between 0 and 1"),
    ("--lr 0", "--lr is 0.0"),
    ("--weight-decay -1", "--weight-decay is -1.0"),
    ("--warmup-steps -1", "--warmup-steps is -1"),
    ("--auxiliary-weight -1", "--auxiliary-weight is -1.0"),
    ("--eval-steps 0", "--eval-steps is 0"),
    ("--steps 5 --epochs 5", "--epochs and --steps are both given: give one"),
    ("--effective-batch-size 7 --batch-size 2", "--effective-batch-size 7 is not a multiple of --batch-size 2"),
])  # fmt: skip
def test_mistakes_in_segmentation(flags, message):
    with pytest.raises(UserError) as caught:
        resolved(Segmentation(), paper("base"), *flags.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_patch_without_a_fourth():
    with pytest.raises(UserError, match="--pyramid on: a patch of 14 pixels has no fourth; pass --pyramid off"):
        resolved(Segmentation(), paper("base", patch=14))
    assert resolved(Segmentation(), paper("base", patch=14), "--pyramid", "off").model.image_size == 448
    assert resolved(Segmentation(), paper("base"), "--eval-only", "--batch-size", 1).data.batch_size == 1


@pytest.mark.parametrize(("flags", "message"), [
    ("--image-size 500", "--image-size 500 is not divisible by the patch of 16 pixels"),
    ("--short-sides", "--short-sides must be one positive number or more"),
    ("--short-sides 400 0", "--short-sides must be one positive number or more"),
    ("--anchors 32 64 -1", "--anchors must be positive numbers, one for each map of the pyramid"),
    ("--anchors", "--anchors must be positive numbers"),
    ("--drops 0.5 1", "--drops must be parts of the run, between 0 and 1"),
    ("--long-side 0", "--long-side is 0"),
    ("--encoder-factor 0", "--encoder-factor is 0.0"),
    ("--warmup-steps -1", "--warmup-steps is -1"),
    ("--clip-grad -1", "--clip-grad is -1.0"),
    *((f"--{name} 0", f"--{name} is 0") for name in ("channels", "box-channels", "canonical-scale", "proposals", "rois",
                                                     "detections", "queries", "groups", "decoder-depth", "windows")),
    ("--detector lw-detr --relative-position-bias", "LW-DETR has neither"),
    ("--detector lw-detr --drop-path 0.1", "LW-DETR has neither"),
])  # fmt: skip
def test_mistakes_in_detection(flags, message):
    with pytest.raises(UserError) as caught:
        resolved(Detection(), paper("base"), *flags.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_lw_detr_takes_a_cae():
    origin = paper("base")
    origin.cae = None
    with pytest.raises(UserError, match="--detector lw-detr takes the encoder of a CAE, and here is a BEiT"):
        resolved(Detection(), origin, "--detector", "lw-detr")


def test_what_does_not_fit_is_said_in_one_line():
    for make, flags, message in (
        (detector, (*RCNN, "--anchors", 8, 16), "--anchors has 2 values: it must be 5, one for each map"),
        (detector, (*DETR, "--windows", 5), "5 windows do not fit an image of 64 pixels"),
        (detector, (*RCNN, "--eval-only"), "--eval-only: here detects nothing yet; give the run folder of"),
        (segmenter, ("--eval-only",), "--eval-only: here segments nothing yet; give the run folder of"),
    ):
        with pytest.raises(UserError) as caught:
            make(origin_of(), *flags)
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("flags", "message"), [
    ("--val-fraction 0.1", "--val-fraction: the demo has a split to evaluate on"),
    ("--val-split dev", "--val-split dev: the demo has train, test"),
    ("--split all", "--split all: the demo has train, test"),
])  # fmt: skip
def test_splits_of_the_demo(flags, message):
    for task, command in ((Segmentation(), Segment), (Detection(), Detect)):
        asked = parse(command, ["--random-init", "nano", "--dataset", "demo", *flags.split()])
        with pytest.raises(UserError, match=message):
            task.open(asked, paper("nano"), 1)


def test_the_demo_is_opened():
    for task, command, count in ((Segmentation(), Segment, 11), (Detection(), Detect, 10)):
        asked = parse(command, ["--random-init", "nano", "--dataset", "demo"])
        task.open(asked, paper("nano"), 1)
        assert len(task.train_source.data) > len(task.val_source.data) > 50 and len(task.classes) == count
        scenes = task.train_source.data
        assert asked.labels.val_split == "test" and task.val_source.targets is not None
        asked = parse(command, ["--random-init", "nano", "--dataset", "demo", "--eval-only", "--val-split", "train"])
        task.open(asked, paper("nano"), 1)
        assert task.train_source is None and len(task.val_source.data) == len(scenes)


@pytest.mark.parametrize("size", ["base", "large"])
def test_published_rows(size):
    """The release's figures, of one size; only those that were measured for the task."""
    rows = dict(dense.published_rows("segment", size))
    assert rows["CAE-B, 1600 epochs" if size == "base" else "CAE-L, 1600 epochs"] == {
        "miou": 50.3 if size == "base" else 54.9}  # fmt: skip
    found = dict(dense.published_rows("detect", size))
    assert all(set(figures) == {"ap", "mask_ap"} for figures in found.values())
    assert not any("v2" in name for name in found) and len(rows) == (7 if size == "base" else 3)
    assert dense.published_rows("segment", "nano") == []


# Arguments.


@pytest.mark.parametrize("command", [Segment, Detect])
def test_every_argument_is_documented_and_grouped(capsys, command):
    with pytest.raises(SystemExit) as stop:
        parse(command, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert_documented(command, text)
    told = " ".join(text.replace("│", " ").split())
    for value in ("detection 12, lw-detr 60", "segmentation 160,000, nano 300", "16, detection 32"):
        assert value in told, "the default is the task's, not that of classification"


def test_every_argument_is_used():
    shared = [finetune.resolve_encoder, finetune.require_optimizer, finetune.tune, finetune.finish, finetune.model_card]
    source = "".join(map(inspect.getsource, shared))  # what the loop reads, and not what its own task does
    names = set(re.findall(r"\b(?:args|recipe|run|data|model)\.(?=(\w+))", source))
    names |= set(re.findall(r'getattr\([\w.]+, "(\w+)"', source))  # what not every task has
    assert_used([Segment, Detect], dense, elsewhere=names)


# BatchNorm's statistics.


def test_statistics_of_all_ranks_become_their_mean():
    models = [torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)) for _ in range(2)]
    for i, model in enumerate(models):
        model[1].running_mean += torch.arange(3.0) + 4 * i
        model[1].running_var *= 1 + 2 * i
        model[1].num_batches_tracked += 5 + 3 * i
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    sums = []
    join_statistics(Alone(0, 2, sums), models[0])  # which brings its own to the sums
    models[0].load_state_dict(before[0])
    join_statistics(Alone(1, 2, sums), models[1])
    after = models[1].state_dict()
    for name, value in after.items():
        mean = (before[0][name].double() + before[1][name].double()) / 2
        expected = mean.to(value.dtype) if "running_" in name else before[1][name]
        torch.testing.assert_close(value, expected, msg=name)
    join_statistics(Alone(0, 1), models[0])
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, before[0][name]), "one process has nothing to join"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six images of noise and their annotations, two of them to evaluate on."""
    root = tmp_path_factory.mktemp("folder")
    draw = torch.Generator().manual_seed(0)
    for i in range(6):
        split = "training" if i < 4 else "validation"
        annotation = torch.randint(3, (6, 6), generator=draw).repeat_interleave(4, 0).repeat_interleave(4, 1)
        for kind, picture in (("images", painted(annotation).permute(1, 2, 0)), ("annotations", annotation.byte())):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.numpy()).save(root / kind / split / f"{i}.png")
    return root


def tuned(folder, run_dir, *flags):
    command = ["--random-init", "nano", "--dataset", folder, "--num-classes", 3, "--image-size", 16, "--head-dim", 4,
               "--short-side", 16, "--batch-size", 2, "--effective-batch-size", 2, "--steps", 6, "--workers", 0,
               "--run-dir", run_dir, *flags]  # fmt: skip
    finetune.tune(parse(Segment, [str(word) for word in command]), Segmentation())
    return load_file(run_dir / "model" / "model.safetensors"), json.loads((run_dir / "result.json").read_text())


def test_a_moving_average_has_the_models_own_statistics(folder, tmp_path):
    """Weights are averaged; BatchNorm's statistics, which are averages already, are copied."""
    plain, result = tuned(folder, tmp_path / "plain")
    average, _ = tuned(folder, tmp_path / "average", "--ema", 0.5)
    statistics = [name for name in plain if "running_" in name]
    assert len(statistics) > 10 and result["images"] == 2 and result["classes"] == 3
    for name in statistics:
        assert torch.equal(average[name], plain[name]), name
        assert not torch.equal(plain[name], torch.full_like(plain[name], float("var" in name))), "it has learned"
    assert not torch.equal(average["decode_head.classifier.weight"], plain["decode_head.classifier.weight"])


def test_one_class_is_none(folder, tmp_path):
    with pytest.raises(UserError, match="two classes or more"):
        tuned(folder, tmp_path / "run", "--num-classes", 1)
    assert not (tmp_path / "run").exists()


# Pictures.


def test_colours_differ():
    for count in (1, 11, 80, 150, 255):
        colours = dense.palette(count)
        assert len(set(colours)) == count and all(len(c) == 3 and max(c) > 150 for c in colours)
        for a, b in pairwise(colours):
            assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 60, "neighbours can be told apart"


@pytest.mark.parametrize(("wanted", "size"), [(3, 48), (9, 200)])
def test_pictures(tmp_path, wanted, size):
    """Rows of what `draw` gives, enlarged to 192 pixels at least; titles above, the classes' colours below."""
    rows = list(Scenes("test", 5, size, "maps").__getitems__(range(5)))
    source = Source(rows, "image", "annotation", 5, "scenes")
    source.targets = dense.ReadMap(source, 11, {"ignore_index": 255})
    legend = [(str(i), colour) for i, colour in enumerate(dense.palette(6))]
    drawn = []

    def draw(image, annotation):
        assert image.dtype == torch.uint8 and annotation.shape == (size, size)
        drawn.append(image)
        return [image, torch.full_like(image, 99)], legend

    run = SimpleNamespace(folder=tmp_path, args=SimpleNamespace(run=dense.DenseRun(save_pictures=wanted)))
    assert dense.write_pictures(run, source, dense.WholeView(size), draw, ("image", "grey")) == tmp_path / "pictures"
    count = min(wanted, 5)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"{i:04d}.png" for i in range(count)]
    assert len(drawn) == count
    side = size * max(1, math.ceil(192 / size))
    sheet = Image.open(tmp_path / "pictures" / "0001.png")
    assert sheet.size == (2 * side + 8, side + 18 + 32), "two rows of a legend of six"
    image = Image.fromarray(drawn[1].permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.NEAREST)
    assert sheet.crop((0, 18, side, 18 + side)).tobytes() == image.tobytes()
    assert sheet.getpixel((side + 8 + side // 2, 18 + side // 2)) == (99, 99, 99)
    assert sheet.crop((0, 0, side, 18)).getcolors() != [(side * 18, (255, 255, 255))], "a title"
    below = {colour for _, colour in sheet.crop((0, 18 + side, *sheet.size)).getcolors(9999)}
    assert {colour for _, colour in legend} <= below


@pytest.mark.parametrize("kind", ["segment", "detect", "lw-detr"])
def test_pictures_of_a_task(tmp_path, monkeypatch, kind):
    rows = scenes(2, "maps" if kind == "segment" else "objects")
    task, model = (segment_task(rows, monkeypatch) if kind == "segment" else
                   detect_task(rows, monkeypatch, RCNN if kind == "detect" else DETR, true_detections))  # fmt: skip
    args = SimpleNamespace(run=dense.DenseRun(save_pictures=2))
    task.save_pictures(FakeRun(folder=tmp_path, args=args), model)
    for path in sorted((tmp_path / "pictures").iterdir()):
        sheet = Image.open(io.BytesIO(path.read_bytes()))
        assert sheet.width == 3 * 192 + 16 and sheet.height >= 192 + 18
        left, truth = (sheet.crop((x, 18, x + 192, 210)).tobytes() for x in (0, 200))
        assert left != truth, "the truth is drawn in"
    assert len(list((tmp_path / "pictures").iterdir())) == 2
