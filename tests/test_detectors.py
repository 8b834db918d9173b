"""Detectors: torchvision's and slow references, gradients, odd batches, bfloat16."""

from engine.detectors import (
    BoxPredictor,
    CascadeRoIHeads,
    Criterion,
    FeaturePyramid,
    MaskPredictor,
    lw_detr,
    lw_detr_detections,
    lw_detr_losses,
    mask_rcnn,
)

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_convert, box_iou
from transformers import BeitBackbone, BeitConfig, LwDetrViTBackbone, LwDetrViTConfig
from transformers.loss.loss_lw_detr import LwDetrForObjectDetectionLoss, LwDetrHungarianMatcher

VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 4}
CLASSES = 3
SMALL = {"channels": 16, "box_channels": 32, "rois_per_image": 32, "proposals_train": 100, "proposals_test": 50,
         "min_sizes": None, "canonical_scale": 56}  # fmt: skip


def beit_backbone(**changes):
    settings = {**VIT, "intermediate_size": 64, "use_absolute_position_embeddings": True, "use_mean_pooling": False,
                "layer_norm_eps": 1e-6, "drop_path_rate": 0.0, "add_fpn": True, "out_indices": [1, 2, 3, 4],
                **changes}  # fmt: skip
    return BeitBackbone(BeitConfig(**settings))


def vit_backbone(**changes):
    return LwDetrViTBackbone(LwDetrViTConfig(**{**VIT, "pretrain_image_size": 64, "num_windows": 1, **changes}))


def three_maps(**changes):
    """A Mask R-CNN at strides 2, 4 and 8."""
    return mask_rcnn(FeaturePyramid(beit_backbone(), 16, (1, 2, 3)), CLASSES, **{**SMALL, **changes})


def targets(counts=(2, 1), size=64, seed=0):
    """Boxes, labels from 1 and masks of as many objects as told for every image."""
    random, made = torch.Generator().manual_seed(seed), []
    for count in counts:
        corner = torch.rand(count, 2, generator=random) * size / 2
        boxes = torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=random) * (size / 2 - 9)], dim=1)
        masks = torch.zeros(count, size, size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        labels = torch.randint(1, CLASSES + 1, (count,), generator=random)
        labels[:1] = CLASSES
        made.append({"boxes": boxes, "labels": labels, "masks": masks})
    return made


def relative(made, size=64):
    """The same as LW-DETR has them: cx cy w h as parts of the image, labels from 0."""
    return [{"class_labels": one["labels"] - 1, "boxes": box_convert(one["boxes"], "xyxy", "cxcywh") / size}
            for one in made]  # fmt: skip


def without_gradient(model):
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


def close(found, expected, **tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


# ----------------------------------------------------------------------------------------------------------------
# The pyramid, and Mask R-CNN on it.


@pytest.mark.parametrize("maps, strides", [(None, [1, 2, 4, 8]), ((1, 2, 3), [2, 4, 8]), ((2, 3), [4, 8])])
def test_pyramid(maps, strides):
    pyramid = FeaturePyramid(beit_backbone(), 16, maps).train()
    found = pyramid(torch.rand(2, 3, 64, 96))
    assert pyramid.strides == strides and pyramid.size_divisible == 8 and pyramid.out_channels == 16
    assert list(found) == [*map(str, range(len(strides))), "pool"]
    for x, stride in zip(found.values(), [*strides, 16], strict=True):
        assert x.shape == (2, 16, 64 // stride, 96 // stride)
    sum(x.square().sum() for x in found.values()).backward()
    assert not without_gradient(pyramid)
    assert [name for name, p in pyramid.named_parameters() if not p.requires_grad] == [
        "beit.beit.layernorm.weight", "beit.beit.layernorm.bias"]  # fmt: skip


def test_pyramid_takes_the_maps_that_it_names():
    beit, images = beit_backbone().eval(), torch.rand(1, 3, 64, 64)
    maps = beit(images).feature_maps
    pyramid = FeaturePyramid(copy.deepcopy(beit), 16, (1, 2, 3)).eval()
    expected = pyramid.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps[1:])))
    close([pyramid(images)], [expected], rtol=0, atol=0)


@pytest.mark.parametrize("changes, maps, message", [
    ({}, (0, 2), "neighbours"),
    ({}, (3, 4), "neighbours"),
    ({}, (), "neighbours"),
    ({"patch_size": 2}, None, "stride 0.5: maps must begin later"),
    ({"patch_size": 14, "image_size": 56}, None, "power of two"),
    ({"out_indices": [1, 2, 3]}, None, "4 integers"),  # transformers' own
    ({}, (0, 1), "block 2"),
])  # fmt: skip
def test_pyramid_refuses(changes, maps, message):
    with pytest.raises(ValueError, match=message):
        FeaturePyramid(beit_backbone(**changes), 16, maps)


def test_pyramid_without_upsampling():
    model = mask_rcnn(FeaturePyramid(beit_backbone(add_fpn=False, out_indices=[2, 4]), 16), CLASSES, **SMALL).train()
    assert model.backbone.strides == [4, 4] and model.roi_heads.box_roi_pool.featmap_names == ["0"]
    sum(model(list(torch.rand(2, 3, 64, 64)), targets()).values()).backward()
    assert not without_gradient(model)


def test_bad_numbers_are_told():
    pyramid = FeaturePyramid(beit_backbone(), 16, (1, 2, 3))
    with pytest.raises(ValueError, match="anchor_sizes has 3 values: 4 are needed"):
        mask_rcnn(pyramid, CLASSES, anchor_sizes=(8, 16, 32))
    with pytest.raises(ValueError, match="num_classes is 0"):
        mask_rcnn(pyramid, 0)


KINDS = {"mask": {}, "faster": {"masks": False}, "cascade": {"cascade": True},
         "cascade without masks": {"cascade": True, "masks": False}}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_detectors_learn_detect_and_are_restored(kind):
    def build():
        torch.manual_seed(0)
        return three_maps(score_threshold=0.01, **KINDS[kind])

    model, images = build(), list(torch.rand(2, 3, 64, 64))
    masks = KINDS[kind].get("masks", True)
    assert type(model) is (MaskRCNN if masks else FasterRCNN)
    losses = model.train()(images, targets())
    names = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg", *["loss_mask"] * masks}
    assert losses.keys() == names and all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert not without_gradient(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    found = model.eval()(images)
    assert [len(one["boxes"]) > 0 for one in found] == [True, True]
    for one in found:
        assert one["labels"].min() >= 1 and one["labels"].max() <= CLASSES
        assert one["boxes"].min() >= 0 and one["boxes"].max() <= 64
        assert not masks or one["masks"].shape == (len(one["boxes"]), 1, 64, 64)
    again = build()
    again.load_state_dict(model.state_dict())
    close(again.eval()(images), found, rtol=0, atol=0)


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("counts", [(2, 0), (0, 0)])
def test_images_without_objects(cascade, counts):
    torch.manual_seed(0)
    model = three_maps(cascade=cascade).train()
    losses = model(list(torch.rand(2, 3, 64, 64)), targets(counts))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert not without_gradient(model)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_bfloat16_leaves_boxes_exact():
    torch.manual_seed(0)
    model, seen = three_maps(cascade=True, score_threshold=0.0), []
    model.roi_heads.register_forward_pre_hook(lambda _, args: seen.append((args[1], *args[0].values())))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(list(torch.rand(2, 3, 64, 64)), targets())
        found = model.eval()(list(torch.rand(2, 3, 64, 64)))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(value.dtype == torch.float32 for one in found for name, value in one.items() if name != "labels")
    for proposals, *maps in seen:
        assert all(x.dtype == torch.float32 for x in maps)
        inside = torch.cat(proposals).flatten()
        inside = inside[(inside > 0) & (inside < 64)]
        assert (inside != inside.bfloat16().float()).float().mean() > 0.9  # not rounded


def test_sizes():
    """Images as they come are padded to what every map divides; else the shorter side is resized."""
    torch.manual_seed(0)
    seen, images = [], [torch.rand(3, 50, 64), torch.rand(3, 64, 33)]
    for sizes, shape in ((None, (2, 3, 64, 64)), ((40,), (2, 3, 80, 56))):
        model = three_maps(min_sizes=sizes)
        model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for mode in (True, False):
            model.train(mode)(list(images), [{**one, "boxes": one["boxes"] / 2} for one in targets()] if mode else None)
            assert seen[-1].shape == shape
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(seen[0][0, :, :50], (images[0] - mean) / std)
    assert not seen[0][0, :, 50:].any()
    model = three_maps(image_mean=(0,) * 3, image_std=(1,) * 3)
    batch, _ = model.transform.eval()(list(images))
    assert torch.equal(batch.tensors[1, :, :, :33], images[1])


def test_rois_are_pooled_at_the_maps_strides():
    """Told, not inferred from a first batch of small images in much padding; and by the scale that is told."""
    model = three_maps()
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        assert pool.scales == [1 / 2, 1 / 4, 1 / 8]
        x = {str(i): torch.full((1, 1, 64, 64), float(i)) for i in range(3)}
        boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 13, 13], [0, 0, 15, 15], [0, 0, 29, 29], [0, 0, 60, 60.0]])
        # side 56 belongs to stride 16, which there is not: 28 to 8, 14 to 4, less to 2
        assert pool(x, [boxes], [(17, 17)])[:, 0, 0, 0].tolist() == [0, 0, 1, 2, 2]


# ----------------------------------------------------------------------------------------------------------------
# Cascade.

SHAPES = [(64, 64), (48, 56)]


def cascade(stages=3, masks=True, **changes):
    """Random heads with offsets that move boxes, on one map of stride 4."""
    torch.manual_seed(1)
    heads = [TwoMLPHead(8 * 7**2, 16) for _ in range(stages)]
    predictors = [BoxPredictor(16, CLASSES + 1, agnostic=True) for _ in range(stages)]
    for predictor in predictors:
        nn.init.normal_(predictor.bbox_pred.weight, std=1.0)
        nn.init.normal_(predictor.cls_score.weight, std=1.0)
    parts = {}
    if masks:
        parts = {"mask_roi_pool": MultiScaleRoIAlign(["0"], 14, 2), "mask_head": MaskRCNNHeads(8, (8, 8), 1),
                 "mask_predictor": MaskPredictor(8, 8, CLASSES + 1)}  # fmt: skip
    settings = {"rois_per_image": 24, "score_threshold": 0.02, "detections": 20, **parts, **changes}
    return CascadeRoIHeads(MultiScaleRoIAlign(["0"], 7, 2), heads, predictors, **settings), settings


def inputs(counts=(2, 1), boxes=30):
    random = torch.Generator().manual_seed(2)
    features = {"0": torch.randn(2, 8, 16, 16, generator=random)}
    corner = torch.rand(2, boxes, 2, generator=random) * 36  # some boxes leave the second image
    proposals = list(torch.cat([corner, corner + 3 + torch.rand(2, boxes, 2, generator=random) * 15], dim=2))
    made = targets(counts, 48)
    for proposal, one in zip(proposals, made, strict=True):  # some that are near
        near = one["boxes"].repeat(6, 1)[:, :4]
        proposal[: len(near)] = near + torch.randn(near.shape, generator=random).clamp(-2, 2)
    return features, proposals, made


class OfAllClasses(nn.Module):
    """A class-agnostic predictor as torchvision's RoIHeads want it: the same box for every class."""

    def __init__(self, predictor):
        super().__init__()
        self.predictor = predictor

    def forward(self, x):
        scores, deltas = self.predictor(x)
        return scores, deltas.repeat(1, CLASSES + 1)


def test_one_stage_is_torchvisions():
    heads, settings = cascade(1, thresholds=(0.5,), weights=((10, 10, 5, 5),), loss_weights=(1,))
    stage = heads.stages[0]
    masks = {name: part for name, part in settings.items() if name.startswith("mask")}
    theirs = RoIHeads(stage.box_roi_pool, stage.box_head, OfAllClasses(stage.box_predictor), 0.5, 0.5, 24, 0.25, None,
                      0.02, 0.5, 20, **masks)  # fmt: skip
    features, proposals, made = inputs()
    found = []
    for module in (heads.train(), theirs.train()):
        torch.manual_seed(3)
        losses = module(features, proposals, SHAPES, made)[1]
        module.zero_grad()
        sum(losses.values()).backward()
        found.append({**losses, **{name: p.grad for name, p in sorted(stage.named_parameters())}})
    assert found[0]["loss_box_reg"] > 0 and found[0]["loss_mask"] > 0
    close(found[:1], found[1:], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        ours, expected = (module.eval()(features, proposals, SHAPES)[0] for module in (heads, theirs))
    assert len(ours[0]["boxes"]) > 3
    close(ours, expected, rtol=1e-4, atol=1e-5)


def decode(deltas, box, weights):
    """One box, moved: the formulas of R-CNN, cut to nothing."""
    width, height = box[2] - box[0], box[3] - box[1]
    dx, dy, dw, dh = (d / w for d, w in zip(deltas, weights, strict=True))
    x, y = box[0] + width / 2 + dx * width, box[1] + height / 2 + dy * height
    longest = torch.log(torch.tensor(1000 / 16))
    width, height = width * dw.minimum(longest).exp(), height * dh.minimum(longest).exp()
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


def cut(box, shape):
    limit = torch.tensor([shape[1], shape[0], shape[1], shape[0]], dtype=box.dtype)
    return box.clamp(min=0).minimum(limit)


@torch.no_grad()
def test_three_stages_detect_as_a_slow_reference():
    heads, _ = cascade()
    features, proposals, _ = inputs()
    found = heads.eval()(features, proposals, SHAPES)[0]
    weights = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
    for i, (boxes, shape) in enumerate(zip(proposals, SHAPES, strict=True)):
        last, scores = [], []
        for box in boxes:
            total = torch.zeros(CLASSES + 1)
            for stage, coder in zip(heads.stages, weights, strict=True):
                # one box of one image; the scale of the map is that of the whole batch
                pooled = stage.box_roi_pool({"0": features["0"][i : i + 1]}, [box[None]], SHAPES)
                score, deltas = stage.box_predictor(stage.box_head(pooled))
                total += score[0].softmax(-1)
                box = cut(decode(deltas[0], box, coder), shape)
            last.append(box)
            scores.append(total / 3)
        rows = [(scores[n][c], last[n], c) for n in range(len(last)) for c in range(1, CLASSES + 1)]
        rows = [row for row in rows if row[0] > 0.02 and (row[1][2:] - row[1][:2]).min() >= 1e-2]
        kept = []
        for row in sorted(rows, key=lambda row: -row[0]):  # greedy suppression within each class
            if all(row[2] != other[2] or box_iou(row[1][None], other[1][None]) <= 0.5 for other in kept):
                kept.append(row)
        kept = kept[:20]
        assert found[i]["labels"].tolist() == [row[2] for row in kept] and len(kept) > 3
        torch.testing.assert_close(found[i]["scores"], torch.stack([row[0] for row in kept]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[i]["boxes"], torch.stack([row[1] for row in kept]), rtol=1e-4, atol=1e-3)
        masks = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(
            {"0": features["0"][i : i + 1]}, [found[i]["boxes"]], SHAPES))).sigmoid()  # fmt: skip
        expected = torch.stack([mask[label] for mask, label in zip(masks, found[i]["labels"], strict=True)])[:, None]
        torch.testing.assert_close(found[i]["masks"], expected, rtol=1e-4, atol=1e-5)


def test_three_stages_learn_as_a_slow_reference():
    """All proposals are taken, so that no draw is in the way: 1,000 a stage, of which all may be positive."""
    heads, _ = cascade(rois_per_image=1000, positive_fraction=1.0)
    features, proposals, made = inputs()
    pooled_for_masks = []
    heads.mask_roi_pool.register_forward_pre_hook(lambda _, args: pooled_for_masks.append(args[1]))
    losses = heads.train()(features, proposals, SHAPES, made)[1]
    weights = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15))
    classifier = box_reg = 0
    boxes = proposals
    for k, (stage, coder, threshold, part) in enumerate(zip(heads.stages, weights, (0.5, 0.6, 0.7), (1, 0.5, 0.25),
                                                            strict=True)):  # fmt: skip
        crosses, smooth, after, positives = [], [], [], []
        for i, one in enumerate(made):
            after.append([])
            for box in torch.cat([boxes[i], one["boxes"]]):
                pooled = stage.box_roi_pool({"0": features["0"][i : i + 1]}, [box[None]], SHAPES)
                score, deltas = stage.box_predictor(stage.box_head(pooled))
                iou = box_iou(box[None], one["boxes"])[0]
                best = iou.argmax()
                label = int(one["labels"][best]) if iou[best] >= threshold else 0
                crosses.append(-score[0].log_softmax(-1)[label])
                if label:
                    positives.append((i, box))
                    (x1, y1, x2, y2), (u1, v1, u2, v2) = box, one["boxes"][best]
                    wanted = torch.stack([(u1 + u2 - x1 - x2) / 2 / (x2 - x1), (v1 + v2 - y1 - y2) / 2 / (y2 - y1),
                                          ((u2 - u1) / (x2 - x1)).log(), ((v2 - v1) / (y2 - y1)).log()])  # fmt: skip
                    off = (deltas[0] - wanted * torch.tensor(coder)).abs()
                    smooth.append(torch.where(off < 1 / 9, 4.5 * off**2, off - 1 / 18).sum())
                box = cut(decode(deltas[0].detach(), box, coder), SHAPES[i])
                if (box[2:] - box[:2]).min() >= 1e-2:
                    after[i].append(box)
        classifier += part * sum(crosses) / len(crosses)
        box_reg += part * sum(smooth) / len(crosses)
        boxes = [torch.stack(box) for box in after]
        assert len(smooth) > (4, 2, 2)[k]
        if k == 0:
            masked = positives
    torch.testing.assert_close(losses["loss_classifier"], classifier, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss_box_reg"], box_reg, rtol=1e-4, atol=1e-5)
    for image, found in enumerate(pooled_for_masks[0]):  # the mask head has the first stage's positive samples
        torch.testing.assert_close(found, torch.stack([box for i, box in masked if i == image]))


def test_all_stages_get_gradients_and_no_stage_those_of_another():
    heads, _ = cascade()
    features, proposals, made = inputs()
    losses = heads.train()(features, proposals, SHAPES, made)[1]
    (losses["loss_classifier"] + losses["loss_box_reg"]).backward()
    for stage in heads.stages:
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.parameters())
    assert all(p.grad is None for p in heads.mask_head.parameters())
    heads.zero_grad(set_to_none=True)
    heads.loss_weights = (0, 0, 1)  # the third stage's loss must not reach the second's offsets
    heads(features, proposals, SHAPES, made)[1]["loss_box_reg"].backward()
    assert not any(p.grad.any() for stage in heads.stages[:2] for p in stage.parameters() if p.grad is not None)


@pytest.mark.parametrize("counts", [(1, 0), (0, 0)])
def test_cascade_without_objects_or_boxes(counts):
    heads, _ = cascade()
    features, proposals, made = inputs(counts)
    for boxes in (proposals, [box[:0] for box in proposals]):
        losses = heads.train()(features, boxes, SHAPES, made)[1]
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
    found = heads.eval()(features, [box[:0] for box in proposals], SHAPES)[0]
    assert [one["boxes"].shape for one in found] == [(0, 4)] * 2


def test_boxes_without_width_do_not_reach_the_next_stage():
    heads, _ = cascade()
    features, proposals, made = inputs()
    with torch.no_grad():
        heads.stages[0].box_predictor.bbox_pred.bias.copy_(torch.tensor([900.0, 0, 0, 0]))  # far out of the image
    pooled = []
    heads.stages[0].box_roi_pool.register_forward_pre_hook(lambda _, args: pooled.append(torch.cat(args[1])))
    losses = heads.train()(features, proposals, SHAPES, made)[1]
    assert all(loss.isfinite() for loss in losses.values())
    assert len(pooled) == 3 and pooled[1].equal(torch.cat([one["boxes"] for one in made]))  # the true ones are left
    assert all((boxes[:, 2:] > boxes[:, :2]).all() for boxes in pooled)


def test_cascade_tells_of_unequal_stages():
    with pytest.raises(ValueError, match=r"\[2, 2, 3, 3, 3\] stages"):
        cascade(2)


# ----------------------------------------------------------------------------------------------------------------
# LW-DETR.

TINY = {"d_model": 32, "decoder_layers": 2, "groups": 3, "queries": 10, "windows": 4, "self_heads": 2, "cross_heads": 4,
        "ffn_dim": 64}  # fmt: skip


def tiny(**changes):
    torch.manual_seed(0)
    model = lw_detr(vit_backbone(), CLASSES, **{**TINY, **changes})
    with torch.no_grad():  # boxes that differ from layer to layer
        for p in (*model.bbox_embed.parameters(), *model.model.enc_out_bbox_embed.parameters()):
            p.add_(0.1 * torch.randn_like(p))
    return model


def test_lw_detr_learns_detects_and_is_restored():
    model, images = tiny(), torch.rand(2, 3, 64, 64)
    outputs = model.train()(images)
    assert outputs.logits.shape == (2, 30, CLASSES)
    losses = lw_detr_losses(model, outputs, relative(targets()))
    assert losses.keys() == {"loss", "loss_class", "loss_box", "loss_giou"}
    torch.testing.assert_close(losses["loss"], losses["loss_class"] + losses["loss_box"] + losses["loss_giou"])
    losses["loss"].backward()
    assert not without_gradient(model) and all(p.requires_grad for p in model.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.model.backbone.backbone.parameters())
    with torch.no_grad():
        outputs = model.eval()(images)
    found = lw_detr_detections(outputs, [(64, 64), (32, 128)], 7)
    for i, (one, (height, width)) in enumerate(zip(found, [(64, 64), (32, 128)], strict=True)):
        rows = [(outputs.logits[i, q, c].sigmoid(), q, c) for q in range(10) for c in range(CLASSES)]
        for n, (score, q, c) in enumerate(sorted(rows, key=lambda row: -row[0])[:7]):
            x, y, w, h = outputs.pred_boxes[i, q]
            box = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2]) * torch.tensor([width, height] * 2)
            torch.testing.assert_close(one["boxes"][n], cut(box, (height, width)))
            torch.testing.assert_close(one["scores"][n], score)
            assert one["labels"][n] == c
    again = tiny()
    again.load_state_dict({name: value + 0 for name, value in model.state_dict().items()})
    assert torch.equal(again.eval()(images).logits, outputs.logits)


def test_lw_detr_has_the_vits_weights():
    vit = vit_backbone()
    model = lw_detr(vit, CLASSES, **{**TINY, "windows": 1})
    inner = model.model.backbone.backbone
    assert inner.state_dict().keys() == vit.state_dict().keys()
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in inner.state_dict().items())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():  # one window: what the ViT gives
        torch.testing.assert_close(inner.eval()(images).feature_maps[-1], vit.eval()(images).feature_maps[-1])
    assert not model.model.reference_point_embed.weight.any()


@pytest.mark.parametrize("depth, out, inside", [
    (10, [3, 5, 6, 10], [0, 1, 3, 6, 7, 9]),
    (6, [2, 4, 6], [0, 2, 4]),
    (12, [3, 6, 9, 12], [0, 1, 3, 4, 6, 7, 9, 10]),
    (3, [1, 2, 3], []),
])  # fmt: skip
def test_lw_detr_layers(depth, out, inside):
    model = lw_detr(vit_backbone(num_hidden_layers=depth), CLASSES, **TINY)
    config = model.config.backbone_config
    assert (list(config.out_indices), list(config.window_block_indices)) == (out, inside)
    assert (config.num_windows, config.num_windows_side) == (4, 2)
    blocks = model.model.backbone.backbone.encoder.layer
    assert [i for i, block in enumerate(blocks) if block.window] == inside
    lw_detr_losses(model.train(), model(torch.rand(1, 3, 64, 64)), relative(targets((2,))))["loss"].backward()
    assert not without_gradient(model)


def test_lw_detr_small_is_the_default():
    model = lw_detr(vit_backbone(num_hidden_layers=10, hidden_size=16, image_size=128, pretrain_image_size=128), 80)
    config = model.config
    assert (config.num_queries, config.group_detr, config.decoder_layers, config.d_model) == (300, 13, 3, 256)
    assert (config.decoder_self_attention_heads, config.decoder_cross_attention_heads) == (8, 16)
    assert (config.decoder_n_points, config.decoder_ffn_dim) == (2, 2048)
    assert config.backbone_config.num_windows == 16 and config.projector_scale_factors == [1.0]
    assert config.num_labels == 80 and config.auxiliary_loss


@pytest.mark.parametrize("changes, message", [
    ({"windows": 16, "image_size": 56}, "16 windows do not fit an image of 56 pixels"),
    ({"windows": 8}, "8 windows do not fit"),
    ({"windows": 16, "image_size": 48}, "transformers refuses 16 windows at image_size 48: take a multiple of 64"),
    ({"image_size": 66, "windows": 1}, "66 pixels"),
    ({"queries": 257}, "queries is 257, but an image of 64 pixels has 256 tokens"),
    ({"image_size": 256, "queries": 62**2 + 1}, "has 3844 tokens"),  # of 64 x 64, the border's are left out
    ({"out_indices": (1, 2)}, "ends with 2: it must end with 4"),
])  # fmt: skip
def test_lw_detr_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def their_loss(model, outputs, made):
    """transformers' own, for the same outputs."""
    hidden, reference = outputs.intermediate_hidden_states, outputs.intermediate_reference_points
    delta = model.bbox_embed(hidden)
    centre, sides = delta[..., :2] * reference[..., 2:] + reference[..., :2], delta[..., 2:].exp() * reference[..., 2:]
    boxes = torch.cat([centre, sides], dim=-1)
    loss, terms = LwDetrForObjectDetectionLoss(
        outputs.logits, made, outputs.logits.device, outputs.pred_boxes, model.config, model.class_embed(hidden), boxes,
        outputs.enc_outputs_class, outputs.enc_outputs_coord_logits)[:2]  # fmt: skip
    return {"loss": loss, "terms": terms}


@pytest.mark.parametrize("counts", [(3, 2), (2, 0)])
def test_lw_detr_loss_is_transformers(counts):
    model, images, made = tiny(decoder_layers=3).train(), torch.rand(2, 3, 64, 64), relative(targets(counts))
    labelled = model(images, labels=made)
    outputs = model(images)
    found, grads = [], []
    for ours in (True, False):
        loss = lw_detr_losses(model, outputs, made) if ours else their_loss(model, outputs, made)
        grads.append(torch.autograd.grad(loss["loss"], list(model.parameters()), retain_graph=True))
        found.append(loss)
    torch.testing.assert_close(found[0]["loss"], found[1]["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0]["loss"], labelled.loss, rtol=1e-5, atol=0)
    close([dict(enumerate(grads[0]))], [dict(enumerate(grads[1]))], rtol=1e-3, atol=1e-5)
    named = ("loss_class", "loss_ce", 1), ("loss_box", "loss_bbox", 5), ("loss_giou", "loss_giou", 2)
    for name, prefix, weight in named:
        terms = [value for term, value in found[1]["terms"].items() if term.startswith(prefix)]
        assert len(terms) == 4  # three layers and the encoder
        torch.testing.assert_close(found[0][name], weight * sum(terms), rtol=1e-5, atol=0)


def test_lw_detr_loss_in_evaluation():
    """Of the one group that there is: as transformers' with a single group, not with three of a third each."""
    model, made = tiny().eval(), relative(targets())
    outputs = model(torch.rand(2, 3, 64, 64))
    loss = lw_detr_losses(model, outputs, made)["loss"]
    assert (their_loss(model, outputs, made)["loss"] - loss).abs() > 0.01 * loss
    model.config.group_detr = 1
    torch.testing.assert_close(their_loss(model, outputs, made)["loss"], loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [9, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lw_detr_loss_of_sure_logits(size, dtype):
    model, made = tiny().train(), relative(targets())
    outputs = model(torch.rand(2, 3, 64, 64))
    signs = torch.randn(outputs.logits.shape).sign()
    outputs.logits = (signs * size).to(dtype).requires_grad_()
    outputs.enc_outputs_class = (-signs * size).to(dtype).requires_grad_()
    if dtype == torch.bfloat16 or size == 30:
        assert not their_loss(model, outputs, made)["loss"].isfinite()
    with torch.autocast("cpu", torch.bfloat16):
        losses = lw_detr_losses(model, outputs, made)
    losses["loss"].backward()
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert outputs.logits.grad.isfinite().all() and outputs.enc_outputs_class.grad.isfinite().all()
    # a wrong sure logit costs its own size: of 30 x 3 x 2 ones, half are wrong
    assert losses["loss_class"] > 0.25 * size * outputs.logits.numel() / (3 * 3)


@pytest.mark.parametrize("counts", [(2, 0), (0, 0)])
def test_lw_detr_without_objects(counts):
    model = tiny().train()
    losses = lw_detr_losses(model, model(torch.rand(2, 3, 64, 64)), relative(targets(counts)))
    losses["loss"].backward()
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_class"] > 0
    assert not without_gradient(model)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if not any(counts):
        assert losses["loss_box"] == losses["loss_giou"] == 0


def test_lw_detr_autocast():
    model, images, made = tiny().train(), torch.rand(2, 3, 64, 64), relative(targets())
    exact = lw_detr_losses(model, model(images), made)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images)
        losses = lw_detr_losses(model, outputs, made)
    outside = lw_detr_losses(model, outputs, made)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0)
        torch.testing.assert_close(loss, outside[name], rtol=1e-6, atol=0)  # autocast ends before the loss
    losses["loss"].backward()
    assert not without_gradient(model)


def test_lw_detr_says_that_a_step_is_not_finite():
    """Where transformers raises an error, and a run that skips a step would end."""
    model, made = tiny().train(), relative(targets())
    outputs = model(torch.rand(2, 3, 64, 64))
    outputs.pred_boxes = outputs.pred_boxes * float("nan")
    with pytest.raises(ValueError):
        their_loss(model, outputs, made)
    assert not lw_detr_losses(model, outputs, made)["loss"].isfinite()


def test_lw_detr_cross_entropy_as_a_slow_reference():
    torch.manual_seed(0)
    logits, boxes = torch.randn(1, 4, CLASSES), torch.rand(1, 4, 4) * 0.2 + 0.4
    true = {"class_labels": torch.tensor([2, 0]), "boxes": torch.rand(2, 4) * 0.2 + 0.4}
    criterion = Criterion(LwDetrHungarianMatcher(2, 5, 2), CLASSES, 0.25, ["labels"], 1)
    pairs = {3: 0, 1: 1}  # query: object
    found = criterion.loss_labels({"logits": logits, "pred_boxes": boxes}, [true],
                                  [(torch.tensor([3, 1]), torch.tensor([0, 1]))], 2)["loss_ce"]  # fmt: skip
    total = 0
    for q in range(4):
        for c in range(CLASSES):
            p = logits[0, q, c].sigmoid()
            if q in pairs and true["class_labels"][pairs[q]] == c:
                pair = boxes[0, q], true["boxes"][pairs[q]]
                iou = box_iou(*(torch.cat([x[:2] - x[2:] / 2, x[:2] + x[2:] / 2])[None] for x in pair))[0, 0]
                quality = max(p**0.25 * iou**0.75, torch.tensor(0.01))
                total -= quality * p.log() + (1 - quality) * (1 - p).log()
            else:
                total -= p**2 * (1 - p).log()
    torch.testing.assert_close(found, total / 2)
