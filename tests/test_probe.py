"""probe.py: every piece of its mathematics against slow, obvious references, its encoders, and its evaluation."""

import engine.evaluation
from engine.arguments import DataArgs, LabelArgs, default_run_dir, parse
from engine.errors import UserError
from engine.evaluation import hits, knn, votes
from engine.frozen import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from engine.images import CenterCrop, decode, normalize
from engine.run import Run, length_of_run
from engine.sources import open_labelled, open_source
from engine.stream import one_pass

import copy
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from arguments import assert_documented, assert_used
from images import Numbers, noise_png, write_clothes, write_folder, write_parquet, write_tars
from launch import ROOT, call, launch, log_of, refused, succeeded
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BeitConfig,
    BeitModel,
    BertConfig,
    BertModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

import convert
import probe
from cae import CAE, CAEConfig
from convert import released_name, to_beit
from probe import LARS, AttentiveHead, EfficientHead, EncoderArgs, Heads, LinearHead, load_encoder

pytestmark = pytest.mark.usefixtures("seeded")
GOLDEN = ROOT / "tests" / "golden"


# The optimizer and the heads.


def test_lars_equals_the_golden_steps():
    with safe_open(GOLDEN / "lars.safetensors", "pt") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = [torch.nn.Parameter(golden[f"{name}.0"].clone()) for name in ("weight", "bias")]
    options = {name: config[name] for name in ("lr", "momentum", "weight_decay", "trust_coefficient")}
    optimizer = LARS(weights, **options)
    for step in range(config["steps"]):
        for w, name in zip(weights, ("weight", "bias"), strict=True):
            w.grad = golden[f"{name}_grad.{step}"].clone()
        optimizer.step()
        for w, name in zip(weights, ("weight", "bias"), strict=True):
            torch.testing.assert_close(w.detach(), golden[f"{name}.{step + 1}"], rtol=1e-6, atol=1e-6)


def test_lars_with_weight_decay_and_with_nothing_to_go_by():
    """Weight decay enters the gradient before the trust ratio; weights or gradients of length 0 have a ratio of 1."""
    w = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    expected, buffer = w.detach().clone(), torch.zeros(3, 4, dtype=torch.float64)
    optimizer = LARS([w], lr=0.5, momentum=0.8, weight_decay=0.1, trust_coefficient=0.02)
    for _ in range(4):
        w.grad = torch.randn(3, 4, dtype=torch.float64)
        optimizer.step()
        decayed = 0.1 * expected + torch.as_tensor(w.grad)
        buffer = 0.8 * buffer + 0.02 * expected.norm() / decayed.norm() * decayed
        expected = expected - 0.5 * buffer
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-12)
    for start, grad in ((torch.zeros(2, 2), torch.ones(2, 2)), (torch.ones(2, 2), torch.zeros(2, 2))):
        w = torch.nn.Parameter(start.clone())
        w.grad = grad
        LARS([w], lr=0.5).step()
        assert torch.equal(w.detach(), start - 0.5 * grad)
    still = torch.nn.Parameter(torch.ones(2, 2))
    LARS([still], lr=0.5).step()  # a parameter without a gradient stays
    assert torch.equal(still.detach(), torch.ones(2, 2))


def batch_norm(x, eps):
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + eps).sqrt()


@pytest.mark.parametrize("pool", ["class", "mean", "both"])
def test_linear_head(pool):
    tokens = torch.randn(6, 10, 8, dtype=torch.float64) * 1e-3  # so small that the eps counts
    head = LinearHead(pool, 8, 5).double()
    x = {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(1)}
    x["both"] = torch.cat([x["class"], x["mean"]], dim=1)
    expected = batch_norm(x[pool], 1e-6) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(probe.pooled(tokens)), expected, rtol=1e-10, atol=1e-12)
    assert [name for name, _ in head.named_parameters()] == ["linear.weight", "linear.bias"], "BatchNorm has no affine"
    assert abs(LinearHead("class", 400, 500).linear.weight.std().item() - 0.01) < 1e-3


def written_out_attentive(head, tokens):
    """One query, every step by hand: LN on q, k and v, softmax over the tokens per head, projection, BatchNorm."""
    def norm(x, layer):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * layer.weight + layer.bias

    a, pooled = head.attn, []
    for image in tokens:
        q = norm(head.query[0, 0], head.norm_q) @ a.q.weight.T + a.q.bias
        k = norm(image, head.norm_k) @ a.k.weight.T
        v = norm(image, head.norm_v) @ a.v.weight.T + a.v.bias
        width = len(q) // a.heads
        parts = []
        for h in range(a.heads):
            cut = slice(h * width, (h + 1) * width)
            weights = torch.softmax(k[:, cut] @ q[cut] / math.sqrt(width), dim=0)
            parts.append(weights @ v[:, cut])
        pooled.append(torch.cat(parts) @ a.proj.weight.T + a.proj.bias)
    return batch_norm(torch.stack(pooled), 1e-5) @ head.linear.weight.T + head.linear.bias


def written_out_efficient(head, tokens):
    """The efficient probe literally: values of every token, its channels in groups, group m pooled by query m."""
    queries, dim = head.query.shape[1:]
    values = tokens @ head.value.weight.T                                                # (B, n, D)
    groups = values.unflatten(-1, (queries, dim // queries))                             # (B, n, M, D / M)
    weights = torch.softmax(torch.einsum("md,bnd->bmn", head.query[0], tokens) / math.sqrt(dim), dim=-1)
    x = torch.einsum("bmn,bnmc->bmc", weights, groups).flatten(1)
    return batch_norm(x, 1e-6) @ head.linear.weight.T + head.linear.bias


@pytest.mark.parametrize("kind", ["attentive", "ep"])
def test_attentive_heads_equal_their_definition(kind):
    """Forward and backward, in float64."""
    head = (AttentiveHead(12, 3, 5) if kind == "attentive" else EfficientHead(12, 4, 5)).double()
    for parameter in head.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    tokens, target = torch.randn(6, 9, 12, dtype=torch.float64), torch.arange(6) % 5
    written_out = written_out_attentive if kind == "attentive" else written_out_efficient
    ours, theirs = head(tokens), written_out(head, tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    names, parameters = zip(*head.named_parameters(), strict=True)
    gradients = (torch.autograd.grad(F.cross_entropy(logits, target), parameters) for logits in (ours, theirs))
    for name, a, b in zip(names, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=name)


def test_the_attentive_query_starts_at_zero_and_attends_evenly():
    head = AttentiveHead(12, 3, 5).double().eval()
    tokens = torch.randn(4, 9, 12, dtype=torch.float64)
    assert not head.query.any()
    value = (head.norm_v(tokens) @ head.attn.v.weight.T).mean(1) @ head.attn.proj.weight.T
    expected = (value / math.sqrt(1 + 1e-5)) @ head.linear.weight.T
    torch.testing.assert_close(head(tokens), expected)


def test_heads_do_not_see_each_other():
    """Gradients side by side are those of each head alone."""
    features, target = torch.randn(8, 2, 6), torch.arange(8) % 3
    heads = Heads([LinearHead("class", 6, 3), LinearHead("mean", 6, 3), LinearHead("both", 6, 3)])
    logits = heads(features)
    assert logits.shape == (3, 8, 3)
    sum(F.cross_entropy(x, target) for x in logits).backward()
    for head in heads:
        alone = copy.deepcopy(head)
        alone.zero_grad()
        F.cross_entropy(alone(features), target).backward()
        torch.testing.assert_close(head.linear.weight.grad, alone.linear.weight.grad)


# kNN.


def slow_knn(bank, labels, queries, k, temperature, num_classes):
    """Scores by sorting everything, in float64."""
    scores = torch.zeros(len(queries), num_classes, dtype=torch.float64)
    for i, query in enumerate(queries.double()):
        cosines = [(F.cosine_similarity(query, row, dim=0).item(), label.item())
                   for row, label in zip(bank.double(), labels, strict=True)]  # fmt: skip
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            scores[i, label] += math.exp(cosine / temperature)
    return scores


@pytest.mark.parametrize("block", [7, 1000])
def test_knn_equals_a_plain_loop(monkeypatch, block):
    monkeypatch.setattr(engine.evaluation, "BLOCK", block)
    bank, queries = torch.randn(61, 2, 5), torch.randn(23, 2, 5)
    labels, query_labels = torch.randint(8, (61,)), torch.randint(8, (23,))
    rows = knn(Accelerator(cpu=True), bank, labels, queries, query_labels, 8, (3, 20), (0.07, 0.5))
    assert [(r["pool"], r["k"], r["temperature"]) for r in rows] == [
        (pool, k, t) for pool in ("class", "mean") for k in (3, 20) for t in (0.07, 0.5)]  # fmt: skip
    for row in rows:
        p = ("class", "mean").index(row["pool"])
        scores = slow_knn(bank[:, p], labels, queries[:, p], row["k"], row["temperature"], 8)
        ranks = (scores > scores.gather(1, query_labels[:, None])).sum(1)  # classes with more votes
        voted = scores.gather(1, query_labels[:, None])[:, 0] > 0
        assert row["top1"] == pytest.approx(100 * (voted & (ranks == 0)).double().mean().item(), abs=1e-3)
        assert row["top5"] == pytest.approx(100 * (voted & (ranks < 5)).double().mean().item(), abs=1e-3)
    assert len({row["top1"] for row in rows}) > 2, "the cases differ"


def test_votes_do_not_overflow_at_low_temperatures():
    scores = votes(torch.tensor([[1.0, 0.9, 0.9]]), torch.tensor([[0, 1, 1]]), 0.001, 3)
    assert torch.isfinite(scores).all() and scores.argmax() == 0


def test_hits():
    scores = torch.tensor([[[0.1, 0.5, 0.2, 0.3, 0.4, 0.6, 0.7]] * 3, [[0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]] * 3])
    assert hits(scores, torch.tensor([6, 0, 1])).tolist() == [[1, 2], [1, 2]]
    assert hits(torch.tensor([[0.2, 0.8]]), torch.tensor([0])).tolist() == [0, 1], "fewer than five classes"
    votes = torch.tensor([[1.0, 0, 0, 0, 0, 0]] * 6)
    assert hits(votes, torch.arange(6), above=0).tolist() == [1, 1], "a class without a vote is no hit"


# Encoders.


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same encoder in every form that it may come in, and others."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(1)
    model = CAE(CAEConfig.from_size("nano", drop_path=0.5)).eval()
    for weight in model.parameters():  # biases and scales that are not their initial values
        weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(root / "run" / "model")
    (root / "run" / "config.json").write_text(json.dumps({"args": {}, "model": {}}))
    (root / "unfinished").mkdir()
    (root / "unfinished" / "config.json").write_text(json.dumps({"args": {}, "model": {}}))
    state = {released_name(name): tensor for name, tensor in model.state_dict().items()}
    weight = state["encoder.patch_embed.proj.weight"]
    state["encoder.patch_embed.proj.weight"] = weight.view(96, 3, 4, 4)
    state["encoder.pos_embed"] = torch.zeros(1, 50, 96)
    torch.save({"model": state}, root / "released.pth")
    to_beit(model).save_pretrained(root / "beit")
    to_beit(model).half().save_pretrained(root / "half")
    pooling = BeitModel(BeitConfig(**{**to_beit(model).config.to_dict(), "use_mean_pooling": True})).eval()
    for weight in pooling.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    pooling.save_pretrained(root / "mean_pooling")
    shape = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=7)
    ViTModel(ViTConfig(**shape, intermediate_size=20)).save_pretrained(root / "vit")
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(root / "dinov2")
    registers = Dinov2WithRegistersConfig(**shape, num_register_tokens=3)
    Dinov2WithRegistersModel(registers).save_pretrained(root / "registers")
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
                         vocab_size=20)).save_pretrained(root / "bert")  # fmt: skip
    CLIPVisionModel.from_pretrained(GOLDEN / "clip_tiny").save_pretrained(root / "clip_bare")
    (root / "text.pth").write_text("no checkpoint at all")
    torch.save({"model": {"some.weight": torch.zeros(2)}}, root / "other.pth")
    (root / "empty").mkdir()
    return root, model


@pytest.mark.parametrize("form", ["run", "run/model", "released.pth", "beit"])
def test_one_encoder_in_every_form(checkpoints, form):
    root, model = checkpoints
    encoder = load_encoder(EncoderArgs(checkpoint=str(root / form)))
    assert (encoder.image_size, encoder.patch_size, encoder.dim) == (28, 4, 96)
    pixels = torch.rand(3, 3, 28, 28)
    expected = model.encode(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-5, atol=1e-5)
    assert encoder.heads == 4


def test_beit_with_mean_pooling_has_its_last_norm_in_the_pooler(checkpoints):
    path = checkpoints[0] / "mean_pooling"
    encoder, model = load_encoder(EncoderArgs(checkpoint=str(path))), BeitModel.from_pretrained(path).eval()
    pixels = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        hidden = model(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state
        torch.testing.assert_close(encoder(pixels), model.pooler.layernorm(hidden))


def test_a_half_precision_folder_is_run_in_float32(checkpoints):
    encoder = load_encoder(EncoderArgs(checkpoint=str(checkpoints[0] / "half")))
    assert encoder(torch.rand(1, 3, 28, 28)).dtype == torch.float32


@pytest.mark.parametrize("form", ["clip_tiny", "clip_bare"])
def test_clip_gives_every_token_after_its_last_norm(checkpoints, form):
    path = GOLDEN / form if form == "clip_tiny" else checkpoints[0] / form
    encoder = load_encoder(EncoderArgs(checkpoint=str(path)))
    tower = CLIPVisionModel.from_pretrained(GOLDEN / "clip_tiny")
    size = tower.config.image_size
    pixels = torch.rand(2, 3, size, size)
    tokens = encoder(pixels)
    with torch.no_grad():
        expected = tower(normalize(pixels, CLIP_MEAN, CLIP_STD)).pooler_output
    torch.testing.assert_close(tokens[:, 0], expected)
    golden = load_file(GOLDEN / "clip_tokens.safetensors")
    encoder.mean, encoder.std = (0.0,) * 3, (1.0,) * 3  # those pixel values are normalised already
    with torch.no_grad():
        projected = CLIPVisionModelWithProjection.from_pretrained(GOLDEN / "clip_tiny").visual_projection(
            encoder(golden["pixel_values"]))  # fmt: skip
    torch.testing.assert_close(projected, golden["tokens"], rtol=1e-5, atol=1e-5)
    bigger = encoder(torch.rand(1, 3, size + encoder.patch_size, size + encoder.patch_size))
    assert bigger.shape[1] == 1 + (size // encoder.patch_size + 1) ** 2


@pytest.mark.parametrize("form", ["vit", "dinov2", "registers"])
def test_other_transformers_encoders(checkpoints, form):
    """Class token and patches, without registers; at their own size and another."""
    path = checkpoints[0] / form
    encoder, model = load_encoder(EncoderArgs(checkpoint=str(path))), AutoModel.from_pretrained(path).eval()
    pixels = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        hidden = model(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state
    expected = torch.cat([hidden[:, :1], hidden[:, 4:]], dim=1) if form == "registers" else hidden
    torch.testing.assert_close(encoder(pixels), expected)
    assert encoder(torch.rand(1, 3, 42, 42)).shape == (1, 37, 12) and encoder.heads == 3


def test_the_processor_of_a_folder_says_what_the_encoder_sees(checkpoints, tmp_path):
    (tmp_path / "vit").symlink_to(checkpoints[0] / "vit")
    assert load_encoder(EncoderArgs(checkpoint=str(tmp_path / "vit"))).mean == IMAGENET_MEAN
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in (checkpoints[0] / "vit").iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}')
    encoder = load_encoder(EncoderArgs(checkpoint=str(copied)))
    assert (encoder.mean, encoder.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def test_random_init_is_the_floor():
    a, b, c = (load_encoder(EncoderArgs(random_init="nano"), seed) for seed in (0, 0, 1))
    assert probe.weights_of(a) == probe.weights_of(b) != probe.weights_of(c)


def test_frozen_means_frozen(checkpoints):
    """No mode, no gradient and no statistics: train() changes nothing, stochastic depth does not act."""
    encoder = load_encoder(EncoderArgs(checkpoint=str(checkpoints[0] / "run")))
    pixels = torch.rand(4, 3, 28, 28)
    before, tokens = probe.weights_of(encoder), encoder(pixels)
    encoder.train()
    assert torch.equal(encoder(pixels), tokens) and not any(m.training for m in encoder.modules())
    assert not tokens.requires_grad and not any(p.requires_grad for p in encoder.parameters())
    encoder.model.encoder.blocks[0].mlp.fc1.weight.data[0, 0] += 1e-6
    assert probe.weights_of(encoder) != before, "a single bit is seen"


# Evaluation.

COUNTS = (401, 7, 350, 245)  # 1,003 images in uneven shards


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    root = tmp_path_factory.mktemp("thousand")
    write_parquet(root / "parquet", COUNTS, group=100)
    write_parquet(root / "noise", COUNTS, group=100, encode=noise_png)
    write_tars(root / "tar", COUNTS)
    write_folder(root / "folder", 1003)
    return root


FORMS = [("parquet", True), ("parquet", False), ("tar", True), ("folder", False)]


@pytest.mark.parametrize(("kind", "streaming"), FORMS)
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 1), (3, 0), (3, 2)])
def test_a_pass_of_evaluation_is_every_image_once(thousand, kind, streaming, world, workers):
    data = DataArgs(dataset=str(thousand / kind), streaming=streaming, workers=workers)
    source = open_source(data, 1, labelled=True, num_classes=2)
    seen = []
    for rank in range(world):
        for chunk in one_pass(source, Numbers(), 64, workers, rank, world):
            assert len(chunk["ids"]) <= 64
            seen += list(zip(chunk["numbers"].tolist(), chunk["labels"].tolist(), strict=True))
    assert sorted(seen) == [(number, number % 2) for number in range(1003)]


SCRIPT = """
import sys
sys.path[:0] = [{root!r}]

from engine.arguments import parse
from engine.evaluation import accuracy, knn
from engine.run import Run
from engine.sources import open_source

import json
import torch

import probe

encoder = probe.load_encoder(probe.EncoderArgs(random_init="nano"))
args = probe.resolve(parse(probe.Command, ["linear", "--dataset", {data!r}, "--random-init", "nano", "--workers", "2",
    "--streaming", "--run-dir", "unused"]), encoder, 2)
with Run(args) as run:
    assert run.world == 2
    source = open_source(args.data, 1, labelled=True)
    extractor = probe.Extractor(args, encoder, run)
    torch.manual_seed(5)
    heads = probe.Heads(probe.LinearHead(pool, 96, 2) for pool in ("class", "both"))
    for head in heads:
        head.linear.weight.data *= 100
    batches = extractor.batches(source, probe.pooled, "val")
    tops, images = accuracy(run.accelerator, heads.eval(), batches, (2,))
    bank = extractor.extract(source, probe.pooled, "val")
    near = knn(run.accelerator, *bank, *bank, 2, (3, 10), (0.07,))
    if run.is_main:
        print(json.dumps([tops, images, near]))
    run.end()
"""


def test_two_processes_evaluate_as_a_plain_loop_does(thousand, tmp_path):
    data = thousand / "noise"
    (tmp_path / "evaluate.py").write_text(SCRIPT.format(root=str(ROOT), data=str(data)))
    process = succeeded(launch(tmp_path / "evaluate.py", processes=2, warm=True))
    accuracy, images, near = json.loads(process.stdout.strip().splitlines()[-1])
    assert images == 1003

    # one image after the other, and every pair of images
    encoder, view = load_encoder(EncoderArgs(random_init="nano")), CenterCrop(28, 1.0)
    source = open_source(DataArgs(dataset=str(data), streaming=True, workers=0), 1, labelled=True)
    rows = [row for row in source.data]
    labels = torch.tensor([row["label"] for row in rows])
    pixels = torch.stack([view(decode(row["image"]["bytes"]), 0)[0] for row in rows])
    features = torch.cat([probe.pooled(encoder(x.float() / 255)) for x in pixels.split(59)])
    torch.manual_seed(5)
    heads = [LinearHead(pool, 96, 2).eval() for pool in ("class", "both")]
    for head, got in zip(heads, accuracy, strict=True):
        head.linear.weight.data *= 100
        right = sum(int(head(x[None]).argmax()) == y for x, y in zip(features, labels.tolist(), strict=True))
        assert got == [pytest.approx(100 * right / 1003), 100.0]
    for row in near:
        unit = F.normalize(features[:, ("class", "mean").index(row["pool"])].double(), dim=-1)
        cosines, index = (unit @ unit.T).sort(dim=1, descending=True)
        weights = (cosines[:, : row["k"]] / 0.07).exp() * (2 * labels[index[:, : row["k"]]] - 1)
        right = ((weights.sum(1) > 0).long() == labels).sum().item()
        assert abs(row["top1"] - 100 * right / 1003) < 0.11, "a pair that rounding may swap apart, equal"


# Labels.


def labelled(path, **options):
    streaming = options.pop("streaming", False)
    labels = LabelArgs(**{name: options.pop(name) for name in ("val_split", "num_classes") if name in options})
    return open_labelled(DataArgs(dataset=str(path), streaming=streaming, workers=0, **options), labels)


def splits(root, train_counts=(8,), val_counts=(4,), write=write_parquet, name="validation", **options):
    """A data set with two splits."""
    if write is write_folder:
        write_folder(root / "train", sum(train_counts))
        write_folder(root / name, sum(val_counts))
    else:
        write(root, train_counts, **options)
        write(root, val_counts, split=name, **options)
    return root


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("kind", "classes"), [("names", ["even", "odd"]), ("numbers", ["0", "1"]), ("words", ["even", "odd"])]
)
def test_classes(tmp_path, kind, classes, streaming):
    """Class names of the features; numbers; words."""
    ours, val = labelled(splits(tmp_path, labels=kind), streaming=streaming)
    assert ours.classes == val.classes == classes
    for source in (ours, val):
        found = {(n, y) for chunk in one_pass(source, Numbers(), 5, 0)
                 for n, y in zip(chunk["numbers"].tolist(), chunk["labels"].tolist(), strict=True)}  # fmt: skip
        assert found == {(n, n % 2) for n in range(source.num_images)}


@pytest.mark.parametrize("name", ["validation", "test"])
def test_class_folders(tmp_path, name):
    ours, val = labelled(splits(tmp_path, write=write_folder, name=name))
    assert ours.classes == ["even", "odd"] and (len(ours.data), len(val.data)) == (8, 4)


def test_tar_shards_need_their_number_of_classes(tmp_path):
    path = splits(tmp_path, write=write_tars)
    with pytest.raises(UserError, match="do not name their classes: pass --num-classes"):
        labelled(path, streaming=True)
    assert labelled(path, streaming=True, num_classes=3)[0].classes == ["0", "1", "2"]
    assert labelled(path)[0].classes == ["0", "1"], "on disk they are counted"


def test_images_without_a_label_are_skipped_and_counted(tmp_path):
    write_parquet(tmp_path, (300,), labels="numbers", missing={7})
    source = open_source(DataArgs(dataset=str(tmp_path), workers=0), 1, labelled=True)
    chunks = list(one_pass(source, Numbers(), 100, 0))
    assert sum(len(chunk["ids"]) for chunk in chunks) == 299
    (skipped,) = [name for chunk in chunks for name in chunk["skipped"]]
    assert "7.png" in skipped and "label None is none of the 2 classes" in skipped


def test_data_sets_that_cannot_be_evaluated_on(tmp_path):
    alone = write_parquet(tmp_path / "alone", (8,))
    with pytest.raises(UserError, match=r"has no split to evaluate on: it has train; pass --val-fraction 0.1"):
        labelled(alone)
    with pytest.raises(UserError, match=r"has no split 'dev': it has train"):
        labelled(alone, val_split="dev")
    bare = splits(tmp_path / "bare", labels=None)
    with pytest.raises(UserError, match=r"has no labels: give class subfolders, .*; its columns are image"):
        labelled(bare)
    with pytest.raises(UserError, match=r"--label-column image holds no class labels"):
        labelled(bare, label_column="image")
    folders = splits(tmp_path / "folders", write=write_folder)
    (folders / "validation" / "prime").mkdir()
    (folders / "validation" / "prime" / "3.png").write_bytes((folders / "train" / "odd" / "000003.png").read_bytes())
    with pytest.raises(UserError, match=r"has 1 classes of which split train has no image: prime"):
        labelled(folders)
    named = write_parquet(tmp_path / "named", (8,))
    write_parquet(named, (9,), split="validation", names=("even", "odd", "prime"))
    for streaming in (True, False):
        with pytest.raises(UserError, match=r"disagree on their classes: train has 2 .*, validation has 3"):
            labelled(named, streaming=streaming)
    numbers = splits(tmp_path / "numbers", labels="numbers")
    write_parquet(numbers, (4,), split="validation", labels="numbers", offset=1)
    with pytest.raises(UserError, match=r"disagree on their classes: train has 2 .*, validation has 3"):
        labelled(numbers)
    with pytest.raises(UserError, match=r"--num-classes is 5, data set .* has 2 classes"):
        labelled(splits(tmp_path / "five"), num_classes=5)


# Arguments, tables and mistakes.


def test_every_argument_is_used():
    assert_used([probe.KNN, probe.Linear, probe.Attentive], probe)


@pytest.mark.parametrize("command", ["knn", "linear", "attentive"])
def test_every_argument_is_documented_and_grouped(capsys, command):
    with pytest.raises(SystemExit) as stop:
        parse(probe.Command, [command, "--help"])
    assert stop.value.code == 0
    kind = {"knn": probe.KNN, "linear": probe.Linear, "attentive": probe.Attentive}[command]
    assert_documented(kind, capsys.readouterr().out)


def parsed(*flags, encoder=None, world=1):
    encoder = encoder or convert.frozen_cae(CAE(CAEConfig.from_size("tiny", depth=1)))
    return probe.resolve(parse(probe.Command, [*flags, "--run-dir", "x"]), encoder, world)


def test_the_papers_recipes():
    linear = parsed("linear", "--checkpoint", "x")
    assert linear.data.effective_batch_size == 16384 and linear.run.epochs == 90
    assert linear.data.dataset == "ILSVRC/imagenet-1k" and linear.data.streaming
    assert linear.probe.crop_scale == (0.08, 1.0) and linear.encoder.crop_ratio == 0.875
    encoder = load_encoder(EncoderArgs(random_init="nano"))
    for args, kind, peak, momentum in [
        (linear, LARS, 6.4, 0.9),
        (parsed("attentive", "--checkpoint", "x"), torch.optim.SGD, 0.4, 0.9),
        (parsed("attentive", "--kind", "ep", "--checkpoint", "x"), LARS, 1.6, 0.9),
    ]:
        heads, settings, optimizer = probe.make_heads(args, encoder, 10)
        (group,) = optimizer.param_groups
        assert isinstance(optimizer, kind) and len(heads) == len(settings) == 1
        assert group["peak"] == pytest.approx(peak) and group["momentum"] == momentum and group["weight_decay"] == 0
    assert parsed("attentive", "--checkpoint", "x").data.effective_batch_size == 8192
    assert parsed("linear", "--checkpoint", "x", "--image-size", "384").encoder.crop_ratio == 1.0
    assert probe.make_heads(parsed("attentive", "--checkpoint", "x"), encoder, 10)[2].param_groups[0]["nesterov"]
    smaller = parsed("linear", "--checkpoint", "x", "--effective-batch-size", "1024")
    assert probe.make_heads(smaller, encoder, 10)[2].param_groups[0]["peak"] == pytest.approx(0.4)


@pytest.mark.parametrize(("size", "method", "batch"), [
    ("tiny", "cae-v2", 16384), ("small", "cae-v2", 8192), ("base", "cae-v2", 8192), ("large", "cae-v2", 16384),
    ("tiny", "cae", 16384), ("small", "cae", 16384), ("base", "cae", 16384), ("large", "cae", 16384),
])  # fmt: skip
def test_the_released_batches_of_the_linear_probe(size, method, batch):
    """6.4 at 16384, 3.2 at 8192."""
    with torch.device("meta"):
        encoder = convert.frozen_cae(CAE(CAEConfig.from_size(size, method, depth=1)))
    args = parsed("linear", "--checkpoint", "x", encoder=encoder)
    (group,) = probe.make_heads(args, encoder, 10)[2].param_groups
    assert args.data.effective_batch_size == batch and group["peak"] == pytest.approx(0.1 * batch / 256)
    for kind, same in (("cae", 8192), ("ep", 4096)):
        args = parsed("attentive", "--kind", kind, "--queries", "8", "--checkpoint", "x", encoder=encoder)
        assert args.data.effective_batch_size == same


@pytest.mark.parametrize(("total", "warmup"), [(2110, 234), (80, 8), (40, 2), (40, 1), (40, 0)])
def test_the_learning_rates_are_the_released_ones(total, warmup):
    """The linear probe's is a function of the epoch, i / n in the warm-up and after it; the attentive one's is that of
    pretraining, numpy's linspace and a cosine to 1e-6."""
    epochs, passes = np.arange(total) / 7, warmup / 7
    falling = (1 + np.cos(np.pi * (epochs - passes) / (total / 7 - passes))) / 2
    expected = np.where(epochs < passes, epochs / (passes or 1), falling)
    rates = [probe.learning_rate(step, total, warmup, 6.4, False) for step in range(total)]
    np.testing.assert_allclose(rates, 6.4 * expected, rtol=1e-9, atol=1e-12)
    rest = 1e-6 + (0.4 - 1e-6) * (1 + np.cos(np.pi * np.arange(total - warmup) / (total - warmup))) / 2
    rates = [probe.learning_rate(step, total, warmup, 0.4, True) for step in range(total)]
    np.testing.assert_allclose(rates, np.concatenate([np.linspace(0, 0.4, warmup), rest]), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(("task", "flags", "images", "batch", "peak"), [
    ("linear", "", 8 * 16384, 16384, 6.4),
    ("linear", "", 8 * 16384 - 1, 8192, 6.4),
    ("linear", "", 300, 32, 6.4),
    ("linear", "--effective-batch-size 128", 300, 128, 6.4),
    ("linear", "--effective-batch-size 128", 8 * 16384, 128, 0.05),
    ("linear", "--dataset demo", 6000, 256, 10.0),
    ("attentive", "", 300, 32, 0.4 / 256),
    ("attentive", "--kind ep", 300, 32, 1.6),
])  # fmt: skip
def test_small_data_get_a_small_batch(task, flags, images, batch, peak):
    """LARS keeps the peak of the recipe's batch, SGD follows the batch."""
    encoder = load_encoder(EncoderArgs(random_init="nano"))
    asked = parse(probe.Command, [task, "--checkpoint", "x", "--run-dir", "x", *flags.split()])
    args = probe.resolve(asked, encoder, 1, images)
    assert args.data.effective_batch_size == batch
    assert probe.make_heads(args, encoder, 10)[2].param_groups[0]["peak"] == pytest.approx(peak)


def test_heads_are_every_combination_and_the_recipe_is_first():
    args = parsed("linear", "--checkpoint", "x", "--lr", "1", "0.1", "--pool", "both", "class")
    heads, settings, optimizer = probe.make_heads(args, load_encoder(EncoderArgs(random_init="nano")), 10)
    assert settings == [{"pool": "class", "lr": 0.1}, {"pool": "class", "lr": 1.0}, {"pool": "both", "lr": 0.1},
                        {"pool": "both", "lr": 1.0}]  # fmt: skip
    assert [head.pool for head in heads] == ["class", "class", "both", "both"]
    assert [round(group["peak"] / 64, 6) for group in optimizer.param_groups] == [0.1, 1.0, 0.1, 1.0]


def test_the_table_shows_the_reference_of_the_same_model():
    for method, size, names in [("cae", "base", ["CAE-B, 300 epochs", "CAE-B, 800 epochs", "CAE-B, 1600 epochs"]),
                                ("cae-v2", "large", ["CAE v2-L, 300 epochs"]), ("cae-v2", "tiny", [])]:  # fmt: skip
        encoder = convert.frozen_cae(CAE(CAEConfig.from_size(size, method, depth=1, regressor_depth=1)))
        shown = [row["model"] for row in probe.references("linear", encoder)]
        assert shown[: len(names)] == names and bool(shown) == bool(names)
        assert all(name.split(",")[0].rstrip("/16")[-1] == names[0].split(",")[0][-1] for name in shown)
        if size == "base":
            assert "CLIP-B/16, EP bench" in {row["model"] for row in probe.references("ep", encoder)}
            result = {"task": "linear", "top1": 12.3, "encoder": "mine", "classes": 1000,
                      "reference": probe.references("linear", encoder)}  # fmt: skip
            text = "\n".join(probe.table(result, [{"task": "attentive", "top1": 45.6, "encoder": "other"}]))
            assert "12.3" in text and "64.5" in text and "74.0" in text and "45.6" in text and "mine" in text
    encoder.kind, encoder.dim, encoder.patch_size = "clip", 768, 32
    assert not probe.references("linear", encoder), "a patch of 32 pixels is another model"


def test_the_best_epoch_and_the_best_head_are_told_apart_from_the_last_and_the_recipe():
    args = parsed("linear", "--checkpoint", "x", "--lr", "1")
    evaluations = [{"step": s, "epoch": s / 2, "images": 7, "loss": [0.5, None], "accuracy": a} for s, a in
                   [(2, [[60.0, 90.0], [50.0, 80.0]]), (4, [[55.0, 91.0], [70.0, 95.0]])]]  # fmt: skip
    found = probe.summary(args, [{"lr": 0.1}, {"lr": 1.0}], evaluations)
    assert (found["top1"], found["top5"], found["best_epoch_top1"], found["best_epoch"]) == (55.0, 91.0, 60.0, 1.0)
    best = {"lr": 1.0, "top1": 70.0, "top5": 95.0, "best_top1": 70.0, "best_epoch": 2.0, "loss": None}
    assert found["best_of"] == 2 and found["best"] == best


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("knn", "give either --checkpoint or --random-init"),
        ("knn --checkpoint {root}/run --random-init nano", "give either --checkpoint or --random-init"),
        ("knn --random-init giant", "--random-init giant does not exist: nano, tiny"),
        ("knn --checkpoint no/such/thing", "--checkpoint no/such/thing cannot be loaded: no/such/thing does not exist"),
        ("knn --checkpoint {root}/empty", "empty holds no config.json"),
        ("knn --checkpoint {root}/unfinished", "is a run folder without a model/ yet"),
        ("knn --checkpoint {root}/bert", "bert is a bert: no encoder that is known here"),
        ("linear --checkpoint {root}/text.pth", "cannot be read as a checkpoint"),
        ("linear --checkpoint {root}/other.pth", "is not a checkpoint of CAE or CAE v2"),
        ("linear --random-init nano --image-size 30", "--image-size 30 is not divisible by the encoder's patch of 4"),
        ("attentive --random-init nano --kind ep --queries 5", "--queries 5 does not divide the encoder's width of 96"),
        ("linear --random-init nano --effective-batch-size 100 --batch-size 64", "try 128"),
        ("linear --random-init nano --lr -1", "--lr is (-1.0,): they must be positive"),
        ("linear --random-init nano --crop-scale 0 1", "--crop-scale is 0.0 1.0"),
        ("linear --random-init nano --eval-every 0", "--eval-every is 0.0: it must be positive"),
        ("knn --random-init nano --temperature 0", "--temperature must be positive"),
        ("knn --random-init nano --k 0", "they must be positive"),
        ("knn --random-init nano --crop-ratio 2", "--crop-ratio is 2.0: it must lie in (0, 1]"),
        ("knn --random-init nano --beside {root}", "holds no result.json of a probe"),
        ("linear --random-init nano --effective-batch-size 1", "BatchNorm needs two images in every process"),
        ("linear --random-init nano --warmup-epochs 100", "--warmup-epochs 100.0 is not shorter than the run"),
        ("knn --random-init nano --val-split dev", "has no split 'dev': it has train, test"),
        ("knn --random-init nano --label-column colour", "--label-column colour does not exist"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(checkpoints, tmp_path, monkeypatch, capsys, flags, message):
    flags = flags.format(root=checkpoints[0]).split()
    error = refused(monkeypatch, capsys, probe, *flags, "--dataset", "demo", run_dir=tmp_path / "run")
    assert message in error


# Runs. In this process where one is enough; test_scripts.py has the same in processes of their own.


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    return write_clothes(tmp_path_factory.mktemp("clothes"), train=600, test=203)


@pytest.fixture
def run(monkeypatch, capsys, clothes, tmp_path):
    """probe.py in this process: run("linear", "--lr", 1) -> its result and output."""
    def probe_run(*flags, run_dir=tmp_path / "run"):
        result, output = call(monkeypatch, capsys, probe, *flags, "--dataset", clothes, run_dir=run_dir)
        assert result["images"] == 203 and result["skipped"] == 0
        return result, output
    return probe_run


SMALL_BATCH = ("--random-init", "nano", "--effective-batch-size", 64, "--log-every", 1)


def test_knn_run(run):
    result, output = run("knn", "--random-init", "nano", "--k", 7, 3, "--temperature", 0.1)
    assert result["task"] == "knn" and result["classes"] == 10
    assert [(r["pool"], r["k"]) for r in result["knn"]] == [("class", 7), ("class", 3), ("mean", 7), ("mean", 3)]
    assert result["top1"] == result["knn"][0]["top1"] > 30
    assert f"{'k = 7':34}{result['top1']:8.1f}" in output
    result, _ = run("knn", "--random-init", "nano")  # again in the same folder: computed anew
    assert {r["k"] for r in result["knn"]} == {5, 10, 15, 20, 50, 100, 200}


def test_more_neighbours_than_images_are_refused(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("knn", "--random-init", "nano", "--k", 601)
    assert stop.value.code == 2 and "--k 601 is more than the 600 images to learn from" in capsys.readouterr().err


def test_linear_run_on_cached_features(run, tmp_path):
    flags = ("linear", *SMALL_BATCH, "--cache-features", "--epochs", 20, "--eval-every", 10)
    result, output = run(*flags, "--lr", 100, "--pool", "class", "both")
    settings = [("class", 25.6), ("class", 100.0), ("both", 25.6), ("both", 100.0)]  # 6.4 at 64 images
    assert [(head["pool"], head["lr"]) for head in result["heads"]] == settings
    assert result["augmentation"] == "none: features cached" and "features cached" in output
    assert result["best_of"] == 4 and result["best"]["top1"] == max(h["top1"] for h in result["heads"]) > 30
    assert result["top1"] == result["heads"][0]["top1"] and "(recipe)" in output
    assert {r["k"] for r in result["knn"]} == {5, 10, 15, 20, 50, 100, 200}
    lines = log_of(tmp_path / "run")
    assert len(lines) == math.ceil(20 * 600 / 64) and [line["epoch"] for line in lines if "top1" in line] == [
        pytest.approx(epochs, abs=0.11) for epochs in (10, 20)]  # fmt: skip
    assert lines[-1]["top1"] == pytest.approx(result["top1"], abs=1e-3)

    # the recipe's head is the same without others beside it
    alone, _ = run(*flags, run_dir=tmp_path / "alone")
    assert alone["top1"] == result["top1"] and alone["best_of"] == 1
    for a, b in zip(lines, log_of(tmp_path / "alone"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)

    # a finished run is told again, not computed again; --beside shows it in another's table
    again, told = run(*flags, run_dir=tmp_path / "alone")
    assert again == alone and "is complete: 188 steps" in told
    _, compared = run("knn", "--random-init", "nano", "--beside", tmp_path / "alone", run_dir=tmp_path / "knn")
    assert sum(line.startswith("random init nano") for line in compared.splitlines()) == 2


@pytest.mark.parametrize("flags", [
    ("linear",),
    ("attentive", "--tokens", "all", "--lr", 0.1),
    ("attentive", "--kind", "ep", "--lr", 1, "--queries", 8),
    ("attentive", "--kind", "ep", "--cache-features"),
])  # fmt: skip
def test_trained_probes(run, flags, tmp_path):
    result, _ = run(*flags, *SMALL_BATCH, "--steps", 3)
    assert result["task"] == ("ep" if "ep" in flags else flags[0])
    assert len(result["heads"]) == 1 + ("--lr" in flags) and result["steps"] == 3
    cached = "--cache-features" in flags
    assert result["augmentation"].startswith("none" if cached else "random crop")
    assert ("knn" in result) == ("ep" in flags)
    assert 0 <= result["top1"] <= result["top5"] <= 100
    assert {"best_epoch", "best_epoch_top1", "command", "seed", "epochs", "batch", "weights"} <= set(result)
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3]


def test_not_one_bit_of_the_encoder_changes(checkpoints, clothes, tmp_path):
    """Weights, buffers and mode, over the training and evaluation of every kind of head."""
    commands = [["linear", "--cache-features"], ["linear"], ["attentive"], ["attentive", "--kind", "ep"]]
    for command in commands:
        flags = [*command, "--checkpoint", str(checkpoints[0] / "run"), "--dataset", str(clothes), "--steps", "2"]
        flags += ["--effective-batch-size", "32", "--workers", "0", "--run-dir", str(tmp_path / "-".join(command))]
        args = parse(probe.Command, flags)
        encoder = load_encoder(args.encoder)
        args = probe.resolve(args, encoder)
        before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
        sources = open_labelled(args.data, args.labels)
        length = length_of_run(args.run, args.data, sources[0])
        with Run(args) as run:
            run.open_folder(args)
            probe.train_heads(run, probe.Extractor(args, encoder, run), *sources, length, 0, {})
            run.end()
        after = encoder.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert all(p.grad is None for p in encoder.parameters()) and not encoder.training


@pytest.mark.parametrize("flags", [("linear", "--streaming"), ("attentive", "--kind", "ep", "--cache-features")])
def test_resume_equals_uninterrupted(run, flags, tmp_path):
    flags = (*flags, *SMALL_BATCH, "--lr", 1, "--steps", 8, "--checkpoint-every", 3, "--eval-every", 0.2)
    whole, _ = run(*flags, run_dir=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for lost in ("checkpoints/step_00000008", "checkpoints/step_00000006"):
        shutil.rmtree(tmp_path / "resumed" / lost)
    (tmp_path / "resumed" / "result.json").unlink()
    resumed, output = run(*flags, run_dir=tmp_path / "resumed")
    assert "continuing from" in output
    for name in ("top1", "top5", "heads", "best", "best_epoch"):
        assert resumed[name] == whole[name]
    for a, b in zip(log_of(tmp_path / "resumed"), log_of(tmp_path / "whole"), strict=True):
        for name in ("step", "epoch", "loss", "loss_heads", "lr", *(["top1", "top1_heads"] if "top1" in a else [])):
            assert a[name] == b[name]
    ours, theirs = (load_file(tmp_path / name / "checkpoints" / "step_00000008" / "model.safetensors")
                    for name in ("resumed", "whole"))  # fmt: skip
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_folder_knows_its_encoder_by_the_weights(run, capsys, tmp_path):
    flags = ("linear", *SMALL_BATCH, "--steps", 1, "--cache-features")
    run(*flags)
    shutil.move(tmp_path / "run", tmp_path / "kept")
    assert "is complete" in run(*flags, run_dir=tmp_path / "kept")[1]
    with pytest.raises(SystemExit):
        run(*flags, "--seed", 1, run_dir=tmp_path / "kept")
    error = capsys.readouterr().err
    assert "another configuration" in error and "weights" in error


def test_a_head_that_diverges_leaves_the_others_alone(run, tmp_path):
    """Weight decay that multiplies the recipe's weights by -1e9 a step; the other's rate is too small to feel it."""
    flags = ("attentive", "--random-init", "nano", "--effective-batch-size", 32, "--weight-decay", 1e9, "--lr", 1e-36)
    result, output = run(*flags, "--steps", 30, "--log-every", 5)
    assert result["heads"][0]["loss"] is None and math.isfinite(result["heads"][1]["loss"])
    assert "loss not finite" in output and "(recipe) diverged" in output
    assert log_of(tmp_path / "run")[-1]["loss_heads"][0] is None


def test_knn_keeps_off_the_folders_of_other_runs(run, capsys, tmp_path):
    run("linear", *SMALL_BATCH, "--steps", 1, "--cache-features")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        run("knn", "--random-init", "nano")
    assert stop.value.code == 2 and "holds a run of another kind" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_cached_features_in_another_order_are_not_continued():
    features, labels = torch.randn(10, 2, 4), torch.arange(10)
    stream = probe.CachedStream(features, labels, 4, 0)
    first = [next(stream)["labels"].tolist() for _ in range(5)]
    assert sorted(y for batch in first for y in batch) == sorted(list(range(10)) * 2), "two passes, each image once"
    again = probe.CachedStream(features, labels, 4, 0, state={0: {**stream.state_dict()[0], "taken": 8}})
    assert [next(again)["labels"].tolist() for _ in range(3)] == first[2:]
    with pytest.raises(UserError, match="divides the data otherwise"):
        probe.CachedStream(features, labels.flip(0), 4, 0, state=stream.state_dict())


def test_a_folder_is_named_after_task_encoder_and_data():
    for flags, name in [
        ("knn --random-init nano --dataset demo", "runs/knn-random-nano-demo"),
        ("linear --checkpoint runs/cae-v2-nano-demo --dataset demo", "runs/linear-cae-v2-nano-demo"),
        ("attentive --kind ep --checkpoint ../x/y.pth", "runs/ep-x-y.pth-imagenet-1k"),
    ]:
        args = parse(probe.Command, flags.split())
        assert default_run_dir(probe.task_of(args), args.encoder, args.data) == name


def test_skipped_images_are_in_the_result(monkeypatch, capsys, tmp_path):
    for split, count in (("train", 200), ("test", 110)):
        write_folder(tmp_path / "data" / split, count)
    (tmp_path / "data" / "test" / "even" / "000000.png").write_bytes(b"<html>gone</html>")
    monkeypatch.setattr(sys, "argv", ["probe.py", "knn", "--random-init", "nano", "--dataset", str(tmp_path / "data"),
                                      "--workers", "0", "--run-dir", str(tmp_path / "run")])  # fmt: skip
    probe.main()
    captured = capsys.readouterr()
    result = json.loads(captured.out.strip().splitlines()[-1])
    assert (result["images"], result["skipped"], result["train_skipped"]) == (109, 1, 0)
    assert "000000.png" in captured.err
