"""A GPU that nobody has. Tensors of torch's FakeTensorMode claim to lie on cuda:0 and have no values: where one of them
meets a tensor of another device, or where a value is asked for, which would let the host wait for the device, they
raise. Every forward is run so; backward cannot be, which needs a real device."""

import engine.evaluation
import engine.log
import engine.run
from engine.arguments import DEMO, parse
from engine.evaluation import accuracy, confusion, hits, knn, nearest, votes
from engine.frozen import CLIP_MEAN, load_frozen
from engine.images import normalize, per_channel, to_device
from engine.run import Interval, Run, SkippedSteps, finite

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

import convert
import dense
import finetune
import probe
import train
from cae import CAE, IMAGENET_MEAN, IMAGENET_STD, CAEConfig
from convert import to_beit

CUDA = torch.device("cuda", 0)
CLIP = str(DEMO / "clip_teacher")  # 7 x 7 patches of 32, 64 wide


@pytest.fixture(autouse=True)
def no_constant_of_another_test():
    """What per_channel keeps would be a tensor without values in one test, and with values in the next."""
    per_channel.cache_clear()
    yield
    per_channel.cache_clear()


def moved(module):
    """module.to(CUDA), in FakeTensorMode, of one that was made on the CPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, old in tensors.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device=CUDA)
                    is_weight = isinstance(old, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(new, old.requires_grad) if is_weight else new
    return module


def images(*size, batch=2):
    return torch.rand(batch, 3, *(size or (28, 28)), device=CUDA)


def classes(*shape):
    return torch.zeros(*shape, dtype=torch.int64, device=CUDA)


def on_cuda(*tensors):
    assert tensors and all(tensor.device == CUDA for tensor in tensors)
    return tensors[0]


def test_what_these_tests_rest_on():
    with FakeTensorMode():
        on_cuda(images())
        with pytest.raises(RuntimeError, match="device"):
            images() + torch.zeros(28)
        for wait in (lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x.flatten().tolist()):
            with pytest.raises(DataDependentOutputException):
                wait(images())
        with pytest.raises(AssertionError):
            on_cuda(torch.zeros(1))


NANO = dict(regressor_dim=48, decoder_depth=2)  # narrower than the encoder
METHODS = [
    *(dict(method="cae-v2", supervise=supervise) for supervise in ("visible", "masked", "both")),
    dict(method="cae-v2", regressor_dim=96),
    dict(method="cae"),
    dict(method="cae", decoder_depth=0, regressor_dim=96),
    dict(method="cae", align_weight=0.0),
    dict(method="cae", reconstruct_weight=0.0),
]


@pytest.mark.parametrize("fields", METHODS, ids=lambda fields: " ".join(map(str, fields.values())))
def test_the_losses_of_a_step(fields):
    """From uint8 images to what backward() is called for, in training mode, at the trained size and at another one."""
    model = CAE(CAEConfig.from_size("nano", **{**NANO, **fields, "drop_path": 0.5})).train()
    with FakeTensorMode():
        moved(model)
        for side, masked in ((28, 13), (40, 37)):
            n = (side // 4) ** 2
            pixels = classes(2, 3, side, side).to(torch.uint8).float() / 255
            codes, floats = classes(2, n), torch.rand(2, n, 8192, device=CUDA)
            targets = [torch.rand(2, 1 + n, 64, device=CUDA)] if model.config.method == "cae-v2" else [codes, floats]
            for target in targets:
                x = normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)
                losses = model(x, classes(2, n - masked), classes(2, masked), target)
                on_cuda(*losses.values(), losses["loss"] * finite(losses["loss"]) / 2)


@pytest.mark.parametrize("size", [(28, 28), (20, 36), (56, 56)])
def test_encode_at_any_size(size):
    model = CAE(CAEConfig.from_size("nano")).eval()
    with FakeTensorMode():
        tokens = on_cuda(moved(model).encode(images(*size)))
    assert tokens.shape == (2, 1 + size[0] * size[1] // 16, 96)


@pytest.mark.parametrize(("dtype", "patch"), [(torch.float32, 4), (torch.bfloat16, 4), (torch.bfloat16, 7)])
def test_clip_teacher(dtype, patch):
    """The demo's own grid, and a foreign one."""
    teacher = train.CLIPTeacher(train.TargetArgs(teacher=CLIP), patch).eval().to(dtype)
    with FakeTensorMode():
        assert on_cuda(moved(teacher)(images())).shape == (2, 1 + (28 // patch) ** 2, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dalle_teacher(tmp_path, dtype):
    config = FlavaImageCodebookConfig(hidden_size=8, vocab_size=50, num_blocks_per_group=1)
    FlavaImageCodebook(config).save_pretrained(tmp_path)
    teacher = train.DALLETeacher(train.TargetArgs(teacher=str(tmp_path)), 4).eval().to(dtype)
    with FakeTensorMode():
        assert on_cuda(moved(teacher)(images())).shape == (2, 49)


@pytest.mark.parametrize("normal", [False, True])
def test_pixel_teacher(normal):
    teacher = train.PixelTeacher(train.TargetArgs(normalize_pixels=normal), 4)
    with FakeTensorMode():
        assert on_cuda(moved(teacher)(images())).shape == (2, 49, 48)


def test_pixels_are_brought_to_the_device_once(monkeypatch):
    """From pinned memory, or the host would wait; what is there already is left alone."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.device.type) or tensor)
    with FakeTensorMode():
        on_cuda(finetune.to_input(to_device(torch.zeros(2, 3, 28, 28, dtype=torch.uint8), CUDA)))
        assert pinned == ["cpu"]
        on_cuda(to_device(images(), CUDA))
        assert to_device(torch.zeros(3), torch.device("cpu")).device.type == "cpu"
    assert pinned == ["cpu"]


def test_the_constants_of_each_device_are_made_once():
    with FakeTensorMode():
        first, second = (per_channel(CLIP_MEAN, CUDA) for _ in range(2))
        assert on_cuda(first) is second and per_channel(CLIP_MEAN, torch.device("cpu")) is not first


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_fine_tuning(pooling, bias):
    """The fine-tuned BEiT on images with erased boxes, and its loss for labels and for mixed labels."""
    origin = finetune.of_cae(CAE(CAEConfig.from_size("nano")), "")
    args = finetune.ModelArgs(image_size=32, pooling=pooling, relative_position_bias=bias, drop_path=0.5)
    model = finetune.build_model(args, origin, ["even", "odd"])
    model(torch.zeros(1, 3, 32, 32))  # transformers keeps an index for each grid: here one with values
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = on_cuda(finetune.erase(images(32, 32), classes(2, 4)))
        logits = on_cuda(moved(model)(x).logits.float())
        for labels in (classes(2), torch.rand(2, 2, device=CUDA)):
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
            on_cuda(loss * finite(loss))
        on_cuda(hits(model.eval()(x).logits, classes(2)))


@pytest.mark.parametrize("flags", ["", "--pyramid on --window whole --dropout 0.3"])
def test_segmentation(flags):
    """A loss, and an image evaluated: windows, classes at another size, the confusion matrix."""
    args = parse(dense.Segment, ["--random-init", "nano", "--dataset", "demo", "--image-size", "32", *flags.split()])
    task = dense.Segmentation()
    origin = task.load(args.model, 0)
    args = task.resolve(args, origin, 1)
    task.classes, task.ignore = ["even", "odd"], 255
    model = task.build(args, origin)
    for size in (32, 48, 56):  # transformers keeps an index for each grid: here one with values
        model(torch.zeros(2, 3, size, size))
    with FakeTensorMode(allow_non_fake_inputs=True):
        losses = task.losses(moved(model), classes(2, 3, 32, 32).to(torch.uint8), classes(2, 32, 32).to(torch.uint8))
        on_cuda(losses["loss"] * finite(losses["loss"]))
        predicted = on_cuda(task.predict(model.eval(), classes(3, 48, 56).to(torch.uint8), (40, 44)))
        assert predicted.shape == (40, 44)
        on_cuda(confusion(predicted, classes(40, 44), 2))


def frozen(kind, folder):
    if kind == "cae":
        return convert.frozen_cae(CAE(CAEConfig.from_size("nano")))
    if kind == "clip":
        return load_frozen(CLIP, "--checkpoint")
    to_beit(CAE(CAEConfig.from_size("nano"))).save_pretrained(folder)
    return load_frozen(str(folder), "--checkpoint")


@pytest.mark.parametrize("kind", ["cae", "beit", "clip"])
def test_frozen_encoders(kind, tmp_path):
    """At their own size and at another one."""
    encoder = frozen(kind, tmp_path)
    own, patch = encoder.image_size, encoder.patch_size
    with FakeTensorMode():
        moved(encoder)
        for size in ((own, own), (own + patch, own - patch), (own + patch, own + patch)):
            tokens = on_cuda(encoder(images(*size)))
            assert tokens.shape == (2, 1 + math.prod(size) // patch**2, encoder.dim)
            assert on_cuda(probe.pooled(tokens)).shape == (2, 2, encoder.dim)


def heads_of(kind):
    if kind == "linear":
        return [probe.LinearHead(pool, 96, 7) for pool in ("class", "mean", "both")]
    return [probe.AttentiveHead(96, 4, 7) if kind == "attentive" else probe.EfficientHead(96, 8, 7)]


@pytest.mark.parametrize("kind", ["linear", "attentive", "ep"])
def test_heads_and_their_step(kind):
    heads = probe.Heads(heads_of(kind))
    with FakeTensorMode():
        moved(heads)
        features = torch.rand(5, 2 if kind == "linear" else 49, 96, device=CUDA)
        loss = torch.nn.functional.cross_entropy(on_cuda(heads(features)).flatten(0, 1), classes(5 * len(heads)))
        on_cuda(loss, *heads.buffers(), hits(heads.eval()(features), classes(5)))
        optimizer = probe.LARS(heads.parameters(), 0.1, weight_decay=1e-4)
        for weight in heads.parameters():
            weight.grad = torch.rand_like(weight)
        for _ in range(2):
            optimizer.step()
        on_cuda(*(state["momentum_buffer"] for state in optimizer.state.values()))


def test_a_step_that_may_be_skipped():
    """Clipping and fused AdamW: whether the gradient was finite is known to the device alone."""
    model = torch.nn.Linear(4, 3)
    with FakeTensorMode():
        optimizer = torch.optim.AdamW(moved(model).parameters(), lr=0.1, fused=True)
        accelerator = SimpleNamespace(scaler=None, clip_grad_norm_=torch.nn.utils.clip_grad_norm_)
        wrapped = SimpleNamespace(optimizer=optimizer, step=optimizer.step, zero_grad=optimizer.zero_grad)
        run = object.__new__(Run)
        run.__dict__.update(accelerator=accelerator, model=model, values_of_step={}, recorded_step=None,
                            interval=Interval(), skipped_steps=SkippedSteps(*classes(3)))  # fmt: skip
        for run.step in range(2):
            for weight in model.parameters():
                weight.grad = torch.rand_like(weight)
            run.update(wrapped, clip_grad=0.1)
            on_cuda(run.interval.sums["grad_norm"], run.interval.good, *vars(run.skipped_steps).values())
        on_cuda(*(value for state in optimizer.state.values() for value in state.values()))


def test_nearest_neighbours(monkeypatch):
    """Of a bank of several blocks, and with more neighbours asked for than there are."""
    monkeypatch.setattr(engine.evaluation, "BLOCK", 7)
    with FakeTensorMode():
        bank, labels = torch.rand(20, 16, device=CUDA), classes(20)
        for k in (3, 30):
            cosines, found = nearest(torch.rand(5, 16, device=CUDA), bank, labels, k)
            on_cuda(cosines, found)
            scores = on_cuda(votes(cosines, found, 0.07, 4))
            assert on_cuda(hits(scores, classes(5), above=0)).shape == (2,)


def test_knn_waits_for_its_results_alone(monkeypatch):
    """Every vote is counted on the device; the first number that is asked for is the first row's accuracy."""
    counts, one = [], SimpleNamespace(gather=lambda x: x)

    def counted(*args, **options):
        counts.append(hits(*args, **options))
        return counts[-1]

    monkeypatch.setattr(engine.evaluation, "gather_rows", lambda accelerator, x: x)  # it asks for numbers of rows
    monkeypatch.setattr(engine.evaluation, "hits", counted)
    with FakeTensorMode():
        bank, queries = (torch.rand(n, 2, 16, device=CUDA) for n in (9, 1500))
        with pytest.raises(DataDependentOutputException):
            knn(one, bank, classes(9), queries, classes(1500), 4, (3, 5), (0.1, 1.0))
        on_cuda(*counts)
    assert len(counts) == 2 * 4, "two blocks of queries, four settings"


def test_what_ranks_have_of_features_is_on_the_device():
    """The two sums of an evaluation, and a part of the features of which nothing was there to be extracted."""
    reduced = []

    def reduce(tensor, how):
        reduced.append(tensor)
        if len(reduced) == 2:
            raise StopIteration  # the next line asks for the number of images, as it may at the end of a pass
        return tensor

    accelerator = SimpleNamespace(device=CUDA, autocast=lambda: torch.autocast("cpu", enabled=False), reduce=reduce)
    work = object.__new__(probe.Extractor)
    work.__dict__.update(args=parse(probe.Command, ["knn"]), device=CUDA, batches=lambda *_: [],
                         encoder=SimpleNamespace(patch_size=4, dim=96))  # fmt: skip
    work.args.encoder.image_size = 28
    model = torch.nn.Linear(4, 7)
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.evaluation, "raise_together", lambda trouble: None)
        batches = [(torch.rand(5, 4, device=CUDA), classes(5))] * 2
        with pytest.raises(StopIteration):
            accuracy(accelerator, moved(model), batches)
        on_cuda(*reduced, *work.extract(None, probe.pooled, "val"))


# --------------------------------------------------------------------------------------- the step of each script itself


class Done(Exception):  # noqa: N818 (no error)
    """Two steps were taken."""


class InMode:
    """A stream whose first batches were read before, as tensors of FakeTensorMode on the CPU."""

    def __init__(self, stream, mode, count):
        self.names, self.state_dict = stream.names, stream.state_dict
        self.batches, self.mode = [(next(stream), stream.part) for _ in range(count)], mode

    def __next__(self):
        batch, self.part = self.batches.pop(0)
        return {name: self.mode.from_tensor(x) for name, x in batch.items()}


def take_steps(monkeypatch, work):
    """Run a script up to its loop; there, two steps on the GPU, each of two micro-batches from its own stream. What
    cannot be had is replaced: moving a module, pinned memory, backward, and Accelerate, which would look for the
    GPU."""
    mode, prepared = FakeTensorMode(allow_non_fake_inputs=True), []

    def to(part, *_):
        with mode:
            return moved(part)

    def prepare(model, optimizer):
        old = list(model.parameters())
        new = dict(zip(map(id, old), to(model).parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [new[id(weight)] for weight in group["params"]]
        prepared.append(model)
        return model, SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups, step=optimizer.step,
                                      zero_grad=optimizer.zero_grad)  # fmt: skip

    def backward(loss):
        on_cuda(loss)
        for weight in prepared[0].parameters():
            weight.grad = torch.rand_like(weight) if weight.requires_grad else None

    steps = Run.steps

    def two_steps(run, stream, **options):
        stream = InMode(stream, mode, 4)
        with mode:
            for step in steps(run, stream, **options):
                yield step
                on_cuda(*run.interval.sums.values(), run.interval.good, *vars(run.skipped_steps).values())
                on_cuda(*(weight for part in prepared for weight in part.state_dict().values()))
                if step == 1:
                    assert not stream.batches
                    raise Done

    accelerator = SimpleNamespace(
        device=CUDA, process_index=0, num_processes=1, is_main_process=True, scaler=None, backward=backward,
        prepare=prepare, unwrap_model=lambda model: model, autocast=nullcontext, main_process_first=nullcontext,
        no_sync=lambda model: nullcontext(), clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
        register_for_checkpointing=prepared.append)  # fmt: skip
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.optim.swa_utils.AveragedModel, "update_parameters", lambda average, model: None)
    monkeypatch.setattr(engine.log.Log, "is_due", False)  # what a start says first, and half a minute without a word
    monkeypatch.setattr(engine.run, "make_accelerator", lambda *_: (accelerator, "no"))
    monkeypatch.setattr(Run, "steps", two_steps)
    with pytest.raises(Done):
        work()


FLAGS = ["--dataset", "demo", "--workers", "0", "--steps", "4", "--batch-size", "4", "--effective-batch-size", "8"]


@pytest.mark.parametrize("flags", [[], ["--method", "cae"]], ids=str)
def test_a_step_of_pretraining(flags, monkeypatch, tmp_path):
    args = parse(train.Args, [*FLAGS, *flags, "--probe-every", "0", "--run-dir", str(tmp_path)])
    take_steps(monkeypatch, lambda: train.train(args))


def test_a_step_of_fine_tuning(monkeypatch, tmp_path):
    """With erasing and a moving average. (Mixing is torchvision's, which draws its numbers on the host.)"""
    flags = ["--random-init", "nano", "--erasing", "0.5", "--ema", "0.2", "--clip-grad", "1"]
    args = parse(finetune.Classify, [*FLAGS, *flags, "--run-dir", str(tmp_path)])
    origin = finetune.of_cae(CAE(CAEConfig.from_size("nano")), "")
    model = finetune.build_model(finetune.ModelArgs(image_size=28, drop_path=0.0, pooling="mean"), origin, ["a", "b"])
    model(torch.zeros(1, 3, 28, 28))  # what transformers keeps, with values
    take_steps(monkeypatch, lambda: finetune.tune(args, finetune.Classification()))


@pytest.mark.parametrize("command", ["linear", "attentive", "ep"])
def test_a_step_of_a_probe(command, monkeypatch, tmp_path):
    command = ["attentive", "--kind", "ep"] if command == "ep" else [command]
    args = parse(probe.Command, [*command, *FLAGS, "--random-init", "nano", "--run-dir", str(tmp_path)])
    monkeypatch.setattr(probe, "extract_once", lambda *_: (None, None))  # features without augmentation
    take_steps(monkeypatch, lambda: probe.evaluate_encoder(args))
