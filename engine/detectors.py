"""Object detectors: torchvision's Mask R-CNN on a BEiT, Cascade R-CNN's three stages, and transformers' LW-DETR.

Heavy imports stand at the top: whoever needs this module imports it where it is used. Whatever a box is made of is
float32 under autocast as well: torchvision takes anchors and boxes to the type of the features and offsets that it is
given, and in bfloat16 a position of 1,300 pixels is known to 8.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import (
    FeaturePyramidNetwork,
    MultiScaleRoIAlign,
    box_convert,
    box_iou,
    clip_boxes_to_image,
    remove_small_boxes,
)
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper
from transformers import LwDetrConfig, LwDetrForObjectDetection, LwDetrViTConfig
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
MIN_SIZES = tuple(range(480, 801, 32))  # of the shorter side in training; the last one in evaluation


# ----------------------------------------------------------------------------------------------------------------
# Mask R-CNN.


class FeaturePyramid(nn.Module):
    """A transformers.BeitBackbone and the pyramid on it, as torchvision's detectors want their backbone: images
    (B, 3, H, W) -> {"0": (B, channels, H / stride, W / stride), ..., "pool": of half the last one's sides}, float32.

    With add_fpn=True (and four out_indices) the BEiT gives maps at strides P/4, P/2, P and 2P; `maps` takes some of
    them: (1, 2, 3) for patches of 4 pixels, whose map 0 has the image's own size. Without add_fpn all maps have stride
    P: RoIs are then pooled from the first alone, the others are the RPN's.

    What is never used gets no gradient, and DDP would wait for it: the BEiT's final LayerNorm is frozen, the
    upsampling of maps that are left out is taken away. Attributes: out_channels, strides (of `maps`), names,
    size_divisible (of H and W). Raises ValueError for maps or a patch that cannot be used.
    """

    def __init__(self, beit, channels=256, maps=None):
        super().__init__()
        config = beit.config
        patch, count = config.patch_size, len(config.out_indices)
        strides = [patch / 4, patch / 2, patch, 2 * patch] if config.add_fpn else [patch] * count
        maps = tuple(range(count)) if maps is None else tuple(maps)
        if not maps or maps[0] < 0 or maps[-1] >= count or maps != tuple(range(maps[0], maps[-1] + 1)):
            raise ValueError(f"maps is {maps}: neighbours in ascending order are needed, from 0 to {count - 1}")
        if patch & (patch - 1) or strides[maps[0]] < 1:  # torchvision takes scales for powers of two, strides for whole
            remedy = "maps must begin later" if not patch & (patch - 1) else "it must be a power of two"
            raise ValueError(f"patch_size is {patch}, which gives map {maps[0]} stride {strides[maps[0]]:g}: {remedy}")
        if config.out_indices[maps[-1]] not in (-1, config.num_hidden_layers):
            raise ValueError(f"the last map comes from block {config.out_indices[maps[-1]]}: it must come from the "
                             f"last, {config.num_hidden_layers}, or those behind get no gradient")  # fmt: skip
        self.beit, self.maps, self.out_channels = beit, maps, channels
        self.strides = [int(strides[i]) for i in maps]
        self.names = [str(i) for i in range(len(maps))]
        self.size_divisible = max(patch, *self.strides)
        for i, name in enumerate(("fpn1", "fpn2")):
            if config.add_fpn and i not in maps:
                setattr(beit.fpn, name, nn.Identity())
        beit.beit.layernorm.requires_grad_(False)
        widths = [config.hidden_size] * len(maps)
        self.fpn = FeaturePyramidNetwork(widths, channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images):
        maps = self.beit(images).feature_maps
        maps = OrderedDict((name, maps[i]) for name, i in zip(self.names, self.maps, strict=True))
        return OrderedDict((name, x.float()) for name, x in self.fpn(maps).items())


class ProposalHead(RPNHead):
    """torchvision's, with outputs in float32."""

    def forward(self, x):
        return tuple([y.float() for y in outputs] for outputs in super().forward(x))


class BoxPredictor(FastRCNNPredictor):
    """torchvision's, with outputs in float32: (n, D) -> scores (n, num_classes), offsets (n, 4 num_classes), or (n, 4)
    if one box serves all classes (`agnostic`)."""

    def __init__(self, dim, num_classes, agnostic=False):
        super().__init__(dim, num_classes)
        if agnostic:
            self.bbox_pred = nn.Linear(dim, 4)

    def forward(self, x):
        return tuple(y.float() for y in super().forward(x))


class MaskPredictor(MaskRCNNPredictor):
    """torchvision's, with outputs in float32."""

    def forward(self, x):
        return super().forward(x).float()


class SameSize(GeneralizedRCNNTransform):
    """Normalises and pads, but leaves sizes alone. (torchvision's own `_skip_resize` holds in training only.)"""

    def resize(self, image, target=None):
        return image, target


def mask_rcnn(backbone, num_classes, *, masks=True, cascade=False, channels=256, box_channels=1024, anchor_sizes=None,
              aspect_ratios=(0.5, 1.0, 2.0), min_sizes=MIN_SIZES, max_size=1333, canonical_scale=224, image_mean=MEAN,
              image_std=STD, proposals_train=2000, proposals_test=1000, rois_per_image=512, score_threshold=0.05,
              nms_threshold=0.5, detections=100):  # fmt: skip
    """torchvision's MaskRCNN (without `masks`: FasterRCNN) on a FeaturePyramid; a bare BeitBackbone gets one.

    The model is torchvision's in all: a list of images (3, H, W) and, in training, of targets {"boxes": (n, 4) x1 y1 x2
    y2 in pixels, "labels": (n) int64, "masks": (n, H, W) uint8} -> a dict of losses, or in evaluation a list of
    {"boxes", "labels", "scores", "masks"}. Labels are 1 to num_classes: 0 is the background, which num_classes does
    not count. A box without width or height is an AssertionError there: drop it before.

    Args:
        cascade: Cascade R-CNN's three box heads.
        channels: width of the mask head (four convolutions), and of a pyramid that is made here. box_channels: width
            of the box head's two layers.
        anchor_sizes: pixels, one for each map and one for the coarsest, pooled one. Default 8 times the stride.
        min_sizes, max_size: the shorter side is drawn from these (in evaluation: the last), the longer is bounded.
            min_sizes=None: images are taken as they come.
        canonical_scale: a RoI of this side in pixels is pooled at stride 16, one of half the side at stride 8, ...
            Too large for small scenes, whose RoIs then all come from the finest map.
        image_mean, image_std: 0 and 1, three times each, for images that are already normalised.
        proposals_train, proposals_test: kept of each level before NMS, and of all levels after it.
    Raises ValueError for a number of anchor sizes or of classes that does not fit.
    """
    if not isinstance(backbone, FeaturePyramid):
        backbone = FeaturePyramid(backbone, channels)
    strides = [*backbone.strides, 2 * backbone.strides[-1]]
    anchor_sizes = [8 * stride for stride in strides] if anchor_sizes is None else anchor_sizes
    if len(anchor_sizes) != len(strides):
        raise ValueError(f"anchor_sizes has {len(anchor_sizes)} values: {len(strides)} are needed, one for each map of "
                         f"the pyramid and one for the pooled one")  # fmt: skip
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}: it must be at least 1, the background is not counted")
    anchors = AnchorGenerator(tuple((size,) for size in anchor_sizes), (tuple(aspect_ratios),) * len(strides))

    def pool(size):
        same = backbone.strides[0] == backbone.strides[-1]
        names, used = (["0"], backbone.strides[:1]) if same else (backbone.names, backbone.strides)
        pool = MultiScaleRoIAlign(names, size, sampling_ratio=2, canonical_scale=canonical_scale)
        # torchvision would infer both once and for all from the first batch, where padding can mislead it
        pool.scales = [1 / stride for stride in used]
        pool.map_levels = LevelMapper(int(math.log2(used[0])), int(math.log2(used[-1])), canonical_scale)
        return pool

    width, total, agnostic = backbone.out_channels, num_classes + 1, cascade
    heads = [TwoMLPHead(width * 7**2, box_channels) for _ in range(3 if cascade else 1)]
    predictors = [BoxPredictor(box_channels, total, agnostic) for _ in heads]
    mask_parts = {}
    if masks:
        mask_parts = {"mask_roi_pool": pool(14), "mask_head": MaskRCNNHeads(width, (channels,) * 4, 1),
                      "mask_predictor": MaskPredictor(channels, channels, total)}  # fmt: skip
    model = (MaskRCNN if masks else FasterRCNN)(
        backbone,
        rpn_anchor_generator=anchors,
        rpn_head=ProposalHead(width, anchors.num_anchors_per_location()[0]),
        rpn_pre_nms_top_n_train=proposals_train,
        rpn_post_nms_top_n_train=proposals_train,
        rpn_pre_nms_top_n_test=proposals_test,
        rpn_post_nms_top_n_test=proposals_test,
        box_roi_pool=pool(7),
        box_head=heads[0],
        box_predictor=predictors[0],
        box_batch_size_per_image=rois_per_image,
        box_score_thresh=score_threshold,
        box_nms_thresh=nms_threshold,
        box_detections_per_img=detections,
        **mask_parts,
    )
    if cascade:
        model.roi_heads = CascadeRoIHeads(
            pool(7), heads, predictors, rois_per_image=rois_per_image, score_threshold=score_threshold,
            nms_threshold=nms_threshold, detections=detections, **mask_parts,
        )  # fmt: skip
    sizes, transform = ((1,), SameSize) if min_sizes is None else (tuple(min_sizes), GeneralizedRCNNTransform)
    model.transform = transform(sizes, max_size, list(image_mean), list(image_std), backbone.size_divisible)
    return model


class CascadeRoIHeads(nn.Module):
    """Cascade R-CNN (Cai & Vasconcelos 2018) in the place of torchvision's RoIHeads: each stage refines the boxes of
    the one before and learns from those that overlap an object by its own, higher threshold. One box for all classes.

    Where implementations differ: every stage draws its samples anew, with the true boxes among the proposals, as
    mmdetection does (detectron2's later stages take all that the first one drew). The one mask head learns from the
    first stage's positive samples and is applied to the last stage's boxes, and scores are the mean of the stages'
    softmaxes, each for its own box of the same chain, as in detectron2 (mmdetection has three mask heads, and
    averages before the softmax). The box loss is torchvision's smooth L1 (beta 1/9; mmdetection's is 1).

    Args:
        box_roi_pool: MultiScaleRoIAlign, the stages share it.
        box_heads, box_predictors: of every stage; a predictor gives scores (n, 1 + classes) and offsets (n, 4).
        thresholds, weights, loss_weights: of every stage: a positive sample's least IoU, box coder, part in the loss.
        mask_roi_pool, mask_head, mask_predictor: torchvision's; without them no masks.
    Raises ValueError where the numbers of stages differ.
    """

    def __init__(self, box_roi_pool, box_heads, box_predictors, *, thresholds=(0.5, 0.6, 0.7),
                 weights=((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)), loss_weights=(1, 0.5, 0.25),
                 rois_per_image=512, positive_fraction=0.25, score_threshold=0.05, nms_threshold=0.5, detections=100,
                 mask_roi_pool=None, mask_head=None, mask_predictor=None):  # fmt: skip
        super().__init__()
        counts = [len(x) for x in (box_heads, box_predictors, thresholds, weights, loss_weights)]
        if len(set(counts)) > 1:
            raise ValueError(f"box_heads, box_predictors, thresholds, weights and loss_weights have {counts} stages: "
                             f"they must have equally many")  # fmt: skip
        parts = zip(box_heads, box_predictors, thresholds, weights, strict=True)
        self.stages = nn.ModuleList(
            RoIHeads(box_roi_pool, head, predictor, threshold, threshold, rois_per_image, positive_fraction, coder,
                     score_threshold, nms_threshold, detections)
            for head, predictor, threshold, coder in parts
        )  # fmt: skip
        self.loss_weights = loss_weights
        self.mask_roi_pool, self.mask_head, self.mask_predictor = mask_roi_pool, mask_head, mask_predictor

    def forward(self, features, proposals, image_shapes, targets=None):
        """Maps {name: (B, C, h, w)}, proposals [(n, 4)], sizes [(height, width)] and targets -> (detections, losses),
        of which one is empty. Losses: loss_classifier and loss_box_reg, summed over the stages, and loss_mask."""
        if self.training:
            return [], self.losses(features, proposals, image_shapes, targets)
        return self.detections(features, proposals, image_shapes), {}

    def predict(self, stage, features, rois, image_shapes):
        return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, rois, image_shapes)))

    def masks(self, features, rois, image_shapes):
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, rois, image_shapes)))

    @torch.no_grad()
    def refine(self, stage, deltas, rois, image_shapes):
        """The boxes that a stage makes of its RoIs, cut to the image: [(n, 4)]."""
        boxes = stage.box_coder.decode(deltas, rois).reshape(-1, 4).split([len(roi) for roi in rois])
        return [clip_boxes_to_image(box, shape) for box, shape in zip(boxes, image_shapes, strict=True)]

    def losses(self, features, proposals, image_shapes, targets):
        classifier, box_reg, first = 0.0, 0.0, None
        for stage, weight in zip(self.stages, self.loss_weights, strict=True):
            rois, matched, labels, box_targets = stage.select_training_samples(proposals, targets)
            scores, deltas = self.predict(stage, features, rois, image_shapes)
            loss_classifier, loss_box_reg = stage_loss(scores, deltas, torch.cat(labels), torch.cat(box_targets))
            classifier, box_reg = classifier + weight * loss_classifier, box_reg + weight * loss_box_reg
            first = first or (rois, matched, labels)
            # a box without width has no logarithm for the next stage to learn
            proposals = [box[remove_small_boxes(box, 1e-2)] for box in self.refine(stage, deltas, rois, image_shapes)]
        losses = {"loss_classifier": classifier, "loss_box_reg": box_reg}
        if self.mask_head is not None:
            positive = [torch.where(label > 0)[0] for label in first[2]]
            rois, matched = ([x[p] for x, p in zip(xs, positive, strict=True)] for xs in first[:2])
            true = [[target[name] for target in targets] for name in ("masks", "labels")]
            losses["loss_mask"] = maskrcnn_loss(self.masks(features, rois, image_shapes), rois, *true, matched)
        return losses

    def detections(self, features, proposals, image_shapes):
        probabilities, rois, last = 0.0, proposals, self.stages[-1]
        for stage in self.stages:
            scores, deltas = self.predict(stage, features, rois, image_shapes)
            probabilities = probabilities + scores.softmax(-1) / len(self.stages)
            if stage is not last:
                rois = self.refine(stage, deltas, rois, image_shapes)
        # torchvision's wants a box for each class, and takes a softmax: of log(p) that is p
        boxes, scores, labels = last.postprocess_detections(
            probabilities.log(), deltas.repeat(1, probabilities.shape[1]), rois, image_shapes
        )
        found = [{"boxes": box, "labels": label, "scores": score}
                 for box, label, score in zip(boxes, labels, scores, strict=True)]  # fmt: skip
        if self.mask_head is not None:
            masks = maskrcnn_inference(self.masks(features, boxes, image_shapes), labels)
            found = [{**one, "masks": mask} for one, mask in zip(found, masks, strict=True)]
        return found


def stage_loss(scores, deltas, labels, box_targets):
    """torchvision's two losses where one box serves all classes. scores (n, 1 + classes), deltas (n, 4), labels (n),
    0 for the background, box_targets (n, 4) -> cross-entropy, and smooth L1 of the positive ones over n."""
    positive = torch.where(labels > 0)[0]
    count = max(len(labels), 1)  # no proposal at all: zeros, not 0 / 0
    box_reg = F.smooth_l1_loss(deltas[positive], box_targets[positive], beta=1 / 9, reduction="sum") / count
    return F.cross_entropy(scores, labels, reduction="sum") / count, box_reg


# ----------------------------------------------------------------------------------------------------------------
# LW-DETR.

# Of 6 (tiny) and 10 blocks (small, medium), as released: maps after these (hidden states, 0 is the embedding) and
# blocks with attention in windows, counted from 0.
RELEASED = {6: ((2, 4, 6), (0, 2, 4)), 10: ((3, 5, 6, 10), (0, 1, 3, 6, 7, 9))}


def lw_detr(vit, num_labels, *, image_size=None, d_model=256, decoder_layers=3, groups=13, queries=300, windows=16,
            out_indices=None, window_blocks=None, dropout=0.0, scales=(1.0,), self_heads=8, cross_heads=16, points=2,
            ffn_dim=2048):  # fmt: skip
    """transformers' LwDetrForObjectDetection with the weights of a LwDetrViTBackbone, as convert.to_lw_detr makes it.
    The other weights are drawn from torch's global generator. Defaults: LW-DETR small on COCO.

    model(images (B, 3, S, S)) -> an output with logits (B, queries, num_labels), without a background, and pred_boxes
    (B, queries, 4), cx cy w h relative to the image; in training of all groups, (B, groups * queries, ...). Give the
    model no labels, its own loss overflows (see lw_detr_losses). The ViT is model.model.backbone.backbone.

    Args:
        image_size: side in pixels of the square images (None: the ViT's own).
        groups: how many sets of queries learn side by side; one is left in evaluation.
        windows: a square number, 4 for 2 x 2; 1: attention is global everywhere.
        out_indices: after which blocks maps are taken, 1 for the first. Default as released for 6 and 10 blocks, else
            four at equal distances. A block behind the last one would get no gradient, so that must be the last block.
        window_blocks: blocks with attention in windows, 0 for the first. Default as released, else those without a map.
        scales: 2, 1 or 0.5 for every map that the decoder looks at, relative to the grid.
    Raises ValueError where windows do not divide the grid, queries exceed the tokens, or the last block is left out.
    """
    old = vit.config
    size, patch, depth = image_size or old.image_size, old.patch_size, old.num_hidden_layers
    spread = tuple(sorted({max(1, round(depth * i / 4)) for i in range(1, 5)}))
    maps, in_windows = RELEASED.get(depth, (spread, tuple(i for i in range(depth) if i + 1 not in spread)))
    maps = maps if out_indices is None else tuple(out_indices)
    in_windows = in_windows if window_blocks is None else tuple(window_blocks)
    side, grid = math.isqrt(windows), size // patch
    if size % patch or side**2 != windows or grid % max(side, 1):
        raise ValueError(f"{windows} windows do not fit an image of {size} pixels and a patch of {patch}: windows must "
                         f"be a square number, and image_size a multiple of the patch times its root")  # fmt: skip
    if size % side**3:  # a check of transformers' own
        raise ValueError(f"transformers refuses {windows} windows at image_size {size}: take a multiple of {side**3} "
                         f"pixels, or fewer windows")  # fmt: skip
    # transformers leaves out centres within 1 % of the border, which would be boxes without width
    inside = [sum(0.01 < (i + 0.5) / n < 0.99 for i in range(n)) for n in (int(grid * scale) for scale in scales)]
    tokens = sum(n**2 for n in inside)
    if queries > tokens:
        raise ValueError(f"queries is {queries}, but an image of {size} pixels has {tokens} tokens to choose them "
                         f"from: take fewer queries or a larger image_size")  # fmt: skip
    if maps[-1] != depth:
        raise ValueError(f"out_indices ends with {maps[-1]}: it must end with {depth}, the last block")

    derived = {"num_windows_side", "stage_names", "out_features", "out_indices"}
    settings = {name: value for name, value in old.to_dict().items() if name not in derived}
    settings |= {"image_size": size, "num_windows": windows, "window_block_indices": list(in_windows)}
    model = LwDetrForObjectDetection(
        LwDetrConfig(
            backbone_config=LwDetrViTConfig(**settings, out_indices=list(maps)),
            num_labels=num_labels,
            projector_scale_factors=list(scales),
            d_model=d_model,
            decoder_layers=decoder_layers,
            decoder_ffn_dim=ffn_dim,
            decoder_n_points=points,
            decoder_self_attention_heads=self_heads,
            decoder_cross_attention_heads=cross_heads,
            num_queries=queries,
            group_detr=groups,
            dropout=dropout,
        )
    )
    nn.init.zeros_(model.model.reference_point_embed.weight)  # as released; transformers means to, by another name
    model.model.backbone.backbone.load_state_dict(vit.state_dict())
    return model


class Criterion(LwDetrImageLoss):
    """transformers', with a cross-entropy that logits cannot overflow."""

    def loss_labels(self, outputs, targets, indices, num_boxes):
        """A matched query's class is drawn towards p^alpha IoU^(1 - alpha), all else towards 0 with the weight p^2.
        log(1 - sigmoid(x)) is -inf from 17 on (in bfloat16 from 6), logsigmoid(-x) is exact."""
        logits, alpha = outputs["logits"], self.focal_alpha
        at = self._get_source_permutation_idx(indices)
        pairs = list(zip(targets, indices, strict=True))
        classes = torch.cat([target["class_labels"][j] for target, (_, j) in pairs])
        true = torch.cat([target["boxes"][j] for target, (_, j) in pairs])
        boxes = (box_convert(x, "cxcywh", "xyxy") for x in (outputs["pred_boxes"][at].detach(), true))
        at, probability = tuple(index.to(logits.device) for index in (*at, classes)), logits.sigmoid()
        quality = (probability[at].pow(alpha) * box_iou(*boxes).diagonal().pow(1 - alpha)).clamp(min=0.01).detach()
        towards_one = torch.zeros_like(logits).index_put(at, quality)
        towards_zero = probability.square().index_put(at, 1 - quality)
        loss = -(towards_one * F.logsigmoid(logits) + towards_zero * F.logsigmoid(-logits))
        return {"loss_ce": loss.sum() / num_boxes}


def lw_detr_losses(model, outputs, targets):
    """LW-DETR's loss of what the model gave for images alone, in float32 whatever the autocast.

    targets: for each image {"class_labels": (n) int64 from 0, "boxes": (n, 4) cx cy w h relative to the image}; n may
    be 0. Returns {"loss", "loss_class", "loss_box", "loss_giou"}, scalars, already weighted: the last three make up the
    first. Each is the sum over the decoder's layers and the encoder's choice of queries, per true box (of all
    processes, on average). In evaluation mode it is that of the one group. Outputs that are not finite make a loss that
    is not.
    """
    config = model.config
    with torch.autocast(outputs.logits.device.type, enabled=False):
        pairs = [(outputs.logits, outputs.pred_boxes)]
        if config.auxiliary_loss:  # the layers before the last one, through the same heads
            hidden = outputs.intermediate_hidden_states[:-1].float()                     # (layers - 1, B, Q, D)
            reference = outputs.intermediate_reference_points[-1].float()                # (B, Q, 4)
            delta = model.bbox_embed(hidden)
            centre = delta[..., :2] * reference[..., 2:] + reference[..., :2]
            boxes = torch.cat([centre, delta[..., 2:].exp() * reference[..., 2:]], dim=-1)
            pairs += zip(model.class_embed(hidden), boxes, strict=True)
        pairs.append((outputs.enc_outputs_class, outputs.enc_outputs_coord_logits))
        pairs = [(logits.float(), boxes.float()) for logits, boxes in pairs]
        # transformers raises an error at boxes that are not numbers; a step that can be skipped is better
        last, *layers, encoder = [{"logits": x, "pred_boxes": torch.nan_to_num(boxes, nan=0.5)} for x, boxes in pairs]
        targets = [{"class_labels": target["class_labels"], "boxes": target["boxes"].float()} for target in targets]
        matcher = LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
        criterion = Criterion(matcher, config.num_labels, config.focal_alpha, ["labels", "boxes"], config.group_detr)
        criterion.train(model.training)  # transformers' own always counts with all groups
        terms = criterion({**last, "auxiliary_outputs": layers, "enc_outputs": encoder}, targets)
        parts = {
            name: weight * sum(value for term, value in terms.items() if term.startswith(prefix))
            for name, prefix, weight in (
                ("loss_class", "loss_ce", config.class_loss_coefficient),
                ("loss_box", "loss_bbox", config.bbox_loss_coefficient),
                ("loss_giou", "loss_giou", config.giou_loss_coefficient),
            )
        }
        finite = sum(0 * boxes.detach().sum() for _, boxes in pairs)  # 0, or not a number
        return {"loss": sum(parts.values()) + finite, **parts}


@torch.no_grad()
def lw_detr_detections(outputs, sizes, count=300):
    """The `count` best of all queries and classes of a model in evaluation mode: for each image {"boxes": (count, 4)
    x1 y1 x2 y2 in pixels, "scores": (count), "labels": (count) from 0}, best first. sizes: [(height, width)]."""
    scores = outputs.logits.float().sigmoid()                                            # (B, Q, C)
    best, index = scores.flatten(1).topk(min(count, scores[0].numel()), dim=1)
    boxes = box_convert(outputs.pred_boxes.float(), "cxcywh", "xyxy")
    found = []
    for score, at, box, (height, width) in zip(best, index, boxes, sizes, strict=True):
        box = box[at // scores.shape[-1]] * box.new_tensor([width, height, width, height])
        box = clip_boxes_to_image(box, (height, width))
        found.append({"boxes": box, "scores": score, "labels": at % scores.shape[-1]})
    return found
