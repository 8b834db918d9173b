"""Two processes: CAE sharded by FSDP2 (fully_shard) takes the steps of the whole model, and logs the same kNN. Run by
tests/test_scripts.py.

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 tests/fsdp.py

Accelerate shards on accelerators only, so that on a CPU this is shown with PyTorch's own call, by which Accelerate does
it: one group a block, gradients clipped, fused AdamW, a step that is not finite skipped on the device.
"""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.arguments import DataArgs, WatchArgs
from engine.checkpoints import whole_weights
from engine.run import Length
from engine.sources import open_source
from engine.watching import KNNProbe, open_labelled_part

from cae import CAE, CAEConfig, block_mask
from train import parameter_groups


def take_steps(model, batches, rank=0, world=1):
    """Losses and gradient norms of some steps; in the third the loss is not finite."""
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2, weight_decay=0.05, fused=True)
    results = []
    for i, batch in enumerate(batches):
        part = [x[rank::world] for x in batch]
        loss = model(*part)["loss"]
        (loss * (float("nan") if i == 2 else 1)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        results.append((loss.item() / world, norm.item()))
    return results


def knn_top1(model, rank, world):
    """What a run with this model would log, and of how many images."""
    from accelerate import Accelerator
    from accelerate.utils import gather_object

    data = DataArgs(dataset="demo", streaming=True, workers=0, batch_size=16, effective_batch_size=64, parts=1)
    run = SimpleNamespace(accelerator=Accelerator(), device=torch.device("cpu"), is_main=rank == 0, world=world,
                          model=model, gather=gather_object, args=SimpleNamespace(data=data),
                          progress=SimpleNamespace(step=0))  # fmt: skip
    part = open_labelled_part(WatchArgs(), data, open_source(data))
    encode = lambda model, images: model.encode(images.float() / 255)[:, 0]  # noqa: E731
    probe = KNNProbe(run, encode, 28, part, None, Length(64, 94.0))
    return probe.evaluate({})["knn_top1"], len(probe.labels)


def main():
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == 2
    for method, target in (("cae-v2", lambda: torch.randn(4, 50, 64)), ("cae", lambda: torch.randn(4, 49, 48))):
        torch.manual_seed(0)
        options = {"target_dim": 48} if method == "cae" else {}
        whole = CAE(CAEConfig.from_size("nano", method, drop_path=0.0, **options))
        sharded = copy.deepcopy(whole)
        for module in (*sharded.encoder.blocks, *sharded.regressor.blocks):
            fully_shard(module)
        fully_shard(sharded)
        (top1, images), (top1_whole, _) = (knn_top1(model, rank, world) for model in (sharded, whole))
        assert abs(top1 - top1_whole) < 101 / images and 0 < top1 < 100 < images, (top1, top1_whole, images)
        assert all(isinstance(p, DTensor) for p in sharded.parameters()) and sharded.training
        batches = [(torch.randn(4, 3, 28, 28), *block_mask(4, (7, 7), 13, min_block=4), target()) for _ in range(5)]
        expected = take_steps(whole, batches)
        got = take_steps(sharded, batches, rank, world)
        for (loss, norm), (loss_whole, norm_whole) in zip(got, expected, strict=True):
            assert abs(loss - loss_whole) < 1e-5, (method, loss, loss_whole)
            assert abs(norm - norm_whole) < 1e-4 or norm != norm != norm_whole, (method, norm, norm_whole)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        held = sum(p.to_local().numel() for p in sharded.parameters()) / sum(p.numel() for p in whole.parameters())
        assert held < 0.55, held
        weights = whole_weights(sharded)  # as for model/, which the main process writes
        assert rank or set(weights) == set(whole.state_dict())
        for name, value in weights.items():
            if not name.endswith("norm_k.bias"):  # its gradient is rounding noise, which AdamW makes as large as others
                assert torch.allclose(value, whole.state_dict()[name], atol=1e-4), name
        if rank == 0:
            print(f"{method}: sharded over {world} processes, each holds {held:.0%}: the losses of the whole model")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
