"""Memory of activations in finetune.py segment and detect: what autograd keeps for each image, counted.

    python bench/memory.py        # a minute, any machine: the tensors have no values

Encoder and pyramid, for `segment` with UperNet of 150 classes on them and the loss, in float32; in bfloat16 it is about
half. Attention as its fused kernels do it, which keep queries, keys, values and output, but no T x T matrix. With
--relative-position-bias such a matrix is kept in every block, 4 x heads x T^2 bytes.
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import BeitBackbone, BeitConfig, UperNetConfig, UperNetForSemanticSegmentation

from cae import SIZES
from dense import out_indices, recompute


class Fused(torch.autograd.Function):
    """Keeps what a fused kernel keeps."""

    @staticmethod
    def forward(ctx, q, k, v):
        output, sums = torch.empty_like(q), q.new_empty(q.shape[:-1])
        ctx.save_for_backward(q, k, v, output, sums)
        return output


def kept(model, call):
    """GiB that the graph of call() holds, without parameters."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = tensor, storage.nbytes()  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = call()  # noqa: F841 (or the graph would be gone)
    return sum(size for _, size in storages.values()) / 2**30


def backbone(size, image_size):
    row = SIZES[size]["encoder"]
    config = BeitConfig(
        hidden_size=row["dim"], num_hidden_layers=row["depth"], num_attention_heads=row["heads"],
        intermediate_size=4 * row["dim"], image_size=image_size, patch_size=16, use_absolute_position_embeddings=True,
        use_relative_position_bias=False, use_mean_pooling=True, layer_scale_init_value=0.1, drop_path_rate=0.1,
        out_indices=out_indices(row["depth"]), add_fpn=True,
    )  # fmt: skip
    return BeitBackbone(config).train()


def run(model, task, images, shape):
    x = torch.randn(images, 3, *shape)
    return model(x, labels=torch.zeros(images, *shape, dtype=torch.int64)).loss if task == "segment" else model(x)


def main():
    F.scaled_dot_product_attention = lambda q, k, v, **_: Fused.apply(q, k, v)
    print(f"{'GiB for each image':24}{'segment, 512 x 512':>22}{'detect, 800 x 1,344':>22}")
    for size in ("small", "base", "large"):
        for again in (False, True):
            figures = []
            with FakeTensorMode(allow_non_fake_inputs=True):
                for task, image_size, shape in (("segment", 512, (512, 512)), ("detect", 800, (800, 1344))):
                    from engine.detectors import FeaturePyramid

                    beit = backbone(size, image_size)
                    if again:
                        recompute(beit)
                    model = FeaturePyramid(beit)
                    if task == "segment":
                        width = beit.config.hidden_size
                        model = UperNetForSemanticSegmentation(
                            UperNetConfig(backbone_config=beit.config, hidden_size=width, num_labels=150)).train()
                        if again:
                            recompute(model.backbone)
                    figures.append(-kept(model, partial(run, model, task, 2, shape)))
                    figures[-1] += kept(model, partial(run, model, task, 3, shape))
            name = f"{size}{', --checkpoint-blocks' * again}"
            print(f"{name:24}{figures[0]:22.2f}{figures[1]:22.2f}", flush=True)


if __name__ == "__main__":
    main()
