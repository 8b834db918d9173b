"""Randomness: which draws differ from which, by what a run is known again, and what of it may differ on a resume."""

import engine.stream
from engine.arguments import DataArgs, RunArgs, flat, marks_of, parse
from engine.checkpoints import load_checkpoint, plan_resume
from engine.errors import UserError
from engine.seeds import KeyedPermutation
from engine.sources import Source, open_source
from engine.stream import RowChunks, Stream, one_pass

import hashlib
import json
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from arguments import flags
from images import Numbers, noise_png, png, write_parquet
from launch import call, log_of
from reference import seed_of
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import BeitForImageClassification

import finetune
import probe
import train
from cae import CAE


def in_memory(images, **options):
    """A data set on disk, but in memory: encoded images."""
    return Source([{"image": {"bytes": data, "path": None}} for data in images], "image", None, len(images), "here",
                  **options)  # fmt: skip


def stream_of(source, seed=0, rank=0, world=1, batch_size=1, window=16, interleave=1):
    data = DataArgs(batch_size=batch_size, workers=0, shuffle_window=window, interleave=interleave)
    return Stream(source, Numbers(), data, seed, rank, world)


def passes_of(stream, images, passes):
    """The first passes of a stream whose batches are single images: of each, what next(stream) gave."""
    return [[next(stream) for _ in range(images)] for _ in range(passes)]


def ids_of(batches):
    return [batch["ids"][0, 1].item() for batch in batches]


# Images, windows, shards, passes.


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of 64 images each; seven of two."""
    root = tmp_path_factory.mktemp("shards")
    long, short = write_parquet(root / "long", (64, 64)), write_parquet(root / "short", (2,) * 7)
    return [open_source(DataArgs(dataset=str(path), streaming=True, workers=0)) for path in (long, short)]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_image_has_a_seed_of_its_own_in_every_pass_and_run(shards, streaming):
    source = shards[0] if streaming else in_memory([png(n) for n in range(128)])
    seeds = [[[batch["seeds"].item() for batch in batches] for batches in passes_of(stream_of(source, seed), 128, 2)]
             for seed in (0, 1)]  # fmt: skip
    assert len({s for run in seeds for one in run for s in one}) == 2 * 2 * 128


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 64, 65, 1000, 4097, 70_000])
def test_a_permutation_without_memory_is_one(n):
    for parts in ((0, 0), (0, 1), (7, 3)):
        permutation = KeyedPermutation(n, *parts)
        order = [permutation[i] for i in range(n)]
        assert sorted(order) == list(range(n))
        assert order == [KeyedPermutation(n, *parts)[i] for i in range(n)]
        if n >= 17:
            assert order != [KeyedPermutation(n, parts[0], parts[1] + 1)[i] for i in range(n)]


def test_a_permutation_without_memory_mixes():
    """Of 4,000 permutations of 100 each number comes to a place about 40 times (chi-squared of 99 degrees of freedom),
    and neighbours are as far from each other as strangers."""
    n, orders = 100, [KeyedPermutation(100, 0, epoch) for epoch in range(4000)]
    for place in (0, 1, 50, 99):
        counts = torch.bincount(torch.tensor([order[place] for order in orders]), minlength=n)
        assert 99 - 5 * 14.1 < ((counts - 40) ** 2 / 40).sum() < 99 + 5 * 14.1
    large = KeyedPermutation(400_000_000, 3, 1)
    found = torch.tensor([large[i] for i in range(3000)], dtype=torch.float64) / 400_000_000
    assert (found.diff().abs().mean() - 1 / 3).abs() < 0.03 and (found.mean() - 0.5).abs() < 0.03


class Many:
    """As many rows as it takes, none of which is read."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n


def test_the_order_of_a_pass_takes_four_bytes_an_image_of_this_process():
    n = 2_000_000
    rows = RowChunks(Source(Many(n), "image", None, n, "here"), Numbers(), 256, 0, 3, 8)
    for epoch, last in ((0, 0), (1, n // 8 - 1)):
        whole = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(0, epoch)))
        assert [rows.row(epoch, i) for i in (0, 1, 77, last)] == [whole[3 + 8 * i] for i in (0, 1, 77, last)]
    held = rows.kept[1].untyped_storage().nbytes()
    assert held == 4 * n // 8


def test_very_many_images_have_an_order_without_memory(monkeypatch):
    """Every one is still seen once in a pass; and a run that was begun before goes on in the order that it had."""
    source, monkey = in_memory([png(n) for n in range(23)]), monkeypatch.setattr
    numbers = lambda stream, count=46: [next(stream)["numbers"].item() for _ in range(count)]  # noqa: E731
    before = stream_of(source)
    expected = numbers(stream_of(source))
    assert numbers(before, 11) == expected[:11]
    monkey(engine.stream, "IN_MEMORY", 20)
    data = DataArgs(batch_size=1, workers=0)
    assert numbers(Stream(source, Numbers(), data, 0, state=before.state_dict()), 35) == expected[11:]
    keyed = stream_of(source)
    found = numbers(keyed, 11)
    state = keyed.state_dict()
    found += numbers(Stream(source, Numbers(), data, 0, state=state), 35)
    assert found != expected and found[:23] != found[23:]
    assert sorted(found[:23]) == sorted(found[23:]) == list(range(23))
    parts = [numbers(stream_of(source, rank=rank, world=2), 11 + (rank == 0)) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == list(range(23))
    monkey(engine.stream, "IN_MEMORY", 30)
    with pytest.raises(UserError, match="divides the data otherwise"):
        Stream(source, Numbers(), data, 0, state=state)


def test_every_pass_on_disk_has_an_order_of_its_own():
    source = in_memory([png(n) for n in range(50)])
    orders = [ids_of(batches) for seed in (0, 1) for batches in passes_of(stream_of(source, seed), 50, 3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


def test_every_pass_deals_the_shards_anew(shards):
    orders = []
    for seed in (0, 1):
        for batches in passes_of(stream_of(shards[1], seed, window=1), 14, 3):
            orders.append(tuple(i >> 32 for i in ids_of(batches)[::2]))
            assert [i >> 32 for i in ids_of(batches)[1::2]] == list(orders[-1]), "one shard after the other"
    assert all(sorted(order) == list(range(7)) for order in orders) and len(set(orders)) == 6


def test_every_window_is_shuffled_in_a_way_of_its_own(shards):
    """Of two shards with rows of the same numbers, in two passes of two runs: 32 windows of 16."""
    windows = []
    for seed in (0, 1):
        for batches in passes_of(stream_of(shards[0], seed, window=16), 128, 2):
            rows = [i & 0xFFFFFFFF for i in ids_of(batches)]
            for at in range(0, 128, 16):
                first = min(rows[at : at + 16])
                windows.append(tuple(row - first for row in rows[at : at + 16]))
    assert all(sorted(window) == list(range(16)) for window in windows)
    assert len(set(windows)) == len(windows) == 32


def test_cached_features_have_an_order_of_every_pass_run_and_process():
    orders = []
    for seed in (0, 1):
        for rank in (0, 1):
            stream = probe.CachedStream(torch.zeros(50, 1), torch.arange(50), 50, seed, rank, 2)
            orders += [next(stream)["labels"].tolist() for _ in range(2)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 8


@pytest.mark.parametrize("kind", ["disk", "stream", "cached"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_seen_tells_the_six_orders_of_three_images_apart(tmp_path, kind, batch_size):
    """Also those that end alike. It is a function of the images alone: two seeds with the same order have the same."""
    seen = {}
    source = in_memory([png(n) for n in range(3)])
    if kind == "stream":
        write_parquet(tmp_path, (3,))
        source = open_source(DataArgs(dataset=str(tmp_path), streaming=True, workers=0))
    for seed in range(40):
        if kind == "cached":
            stream = probe.CachedStream(torch.zeros(3, 1), torch.arange(3), batch_size, seed)
        else:
            stream = stream_of(source, seed, batch_size=batch_size)
        name = "labels" if kind == "cached" else "numbers"
        order = tuple(torch.cat([next(stream)[name] for _ in range(3 // batch_size)]).tolist())
        seen.setdefault(order, set()).add(stream.state_dict()[0]["seen"])
    assert len(seen) == 6 and len(set.union(*seen.values())) == 6 and all(len(found) == 1 for found in seen.values())


# Steps, micro-batches, parts.


@contextmanager
def before_forward(kind, note):
    """note(module, *inputs) before every forward of a module of this class, wherever it is called."""
    handle = register_module_forward_pre_hook(
        lambda module, inputs: note(module, *inputs) if isinstance(module, kind) else None)  # fmt: skip
    try:
        yield
    finally:
        handle.remove()


DEMO = ["--dataset", "demo", "--batch-size", "4", "--effective-batch-size", "16", "--steps", "2", "--log-every", "1",
        "--workers", "0"]  # fmt: skip


def pretrain(run_dir, *flags):
    """Two steps of four micro-batches: the generator's seed, the images and the weights of every forward."""
    notes = []
    with before_forward(CAE, lambda model, images, *_: notes.append(
            (torch.initial_seed(), images.clone(), model.encoder.patch_embed.weight.detach().clone()))):  # fmt: skip
        train.train(parse(train.Args, [*DEMO, "--run-dir", str(run_dir), *flags]))
    return zip(*notes, strict=True)


def test_every_step_micro_batch_and_part_draws_for_itself(tmp_path):
    one, images, weights = pretrain(tmp_path / "one")
    two, _, _ = pretrain(tmp_path / "two", "--parts", "2")
    other, other_images, other_weights = pretrain(tmp_path / "other", "--seed", "1")
    assert len(set(one)) == len(set(two)) == 2 * 4 and not set(one) & set(other)
    # part 0 draws the same whoever else there is, part 1 what nobody else does
    assert (two[0], two[2], two[4], two[6]) == (one[0], one[1], one[4], one[5])
    assert not {two[1], two[3], two[5], two[7]} & set(one)
    # the run's seed decides on images and first weights, too
    assert not torch.equal(images[0], other_images[0]) and not torch.equal(weights[0], other_weights[0])
    values = json.loads((tmp_path / "one" / "config.json").read_text())["args"]
    assert set(values) == flags(train.Args)


def test_micro_batches_take_turns_at_the_parts(tmp_path):
    """Images, places of the data in the checkpoint, and what the log calls seen: each part as a stream by itself."""
    _, images, _ = pretrain(tmp_path, "--parts", "2")
    args = train.resolve(parse(train.Args, [*DEMO, "--parts", "2"]))
    source, view = open_source(args.data, 2), train.Crops(args, train.model_config(args))
    parts = [Stream(source, view, args.data, 0, part, 2) for part in range(2)]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for micro, got in enumerate(images):
        expected = (next(parts[micro % 2])["images"].float() / 255 - mean) / std
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    places = [state for part in parts for state in part.state_dict().values()]
    written = [json.loads((tmp_path / "checkpoints" / "step_00000002" / f"data_{i}.json").read_text()) for i in (0, 1)]
    assert written == places and places[0]["seen"] != places[1]["seen"]
    assert log_of(tmp_path)[-1]["seen"] == f"{seed_of(*(place['seen'] for place in places)):016x}"


@pytest.mark.parametrize("script", ["finetune", "probe"])
def test_fine_tuning_and_probes_draw_for_every_image_pass_and_run(tmp_path, monkeypatch, capsys, script):
    """Two passes over 40 images, with two seeds: views, steps, first weights and orders."""
    write_parquet(tmp_path / "data", (40,), encode=noise_png)
    write_parquet(tmp_path / "data", (4,), encode=noise_png, split="test")
    module, command, view, model, command_class = {
        "finetune": (finetune, "classify", finetune.TrainView, BeitForImageClassification, finetune.Classify),
        "probe": (probe, "linear", probe.Augment, probe.Heads, probe.Linear),
    }[script]  # fmt: skip
    views, steps, weights, orders = [], [], [], []
    show = view.__call__
    monkeypatch.setattr(view, "__call__", lambda self, image, seed: (views.append(seed), show(self, image, seed))[1])

    def note(model, *_):
        if model.training:
            steps.append(torch.initial_seed())
            weights.append([weight.detach().clone() for weight in model.parameters() if weight.ndim > 1][-1])

    for seed in (0, 1):
        with before_forward(model, note):
            call(monkeypatch, capsys, module, command, "--random-init", "nano", "--dataset", tmp_path / "data",
                 "--effective-batch-size", 20, "--epochs", 2, "--eval-every", 2, "--log-every", 1, "--seed", seed,
                 run_dir=tmp_path / f"run{seed}")  # fmt: skip
        orders.append(log_of(tmp_path / f"run{seed}")[-1]["seen"])
    assert len(views) == len(set(views)) == 2 * 2 * 40
    assert len(steps) == len(set(steps)) == 2 * 4
    assert not torch.equal(weights[0], weights[4]) and orders[0] != orders[1]
    values = json.loads((tmp_path / "run0" / "config.json").read_text())["args"]
    assert set(values) == flags(command_class) | {"task", "weights"}


# The share of files that cannot be used: 1 % is the most.


@cache
def order_of(images, world):
    return ids_of(passes_of(stream_of(in_memory([png(0)] * images), world=world), images // world, 1)[0])


def read_with(bad, images, passes=1, world=1):
    """Files that a stream read until it gave up, None if it did not; `bad`: places of bad ones in its first pass."""
    encoded = [png(0)] * images
    for place in bad:
        encoded[order_of(images, world)[place]] = b"<html>"
    stream = stream_of(in_memory(encoded), world=world)
    try:
        for _ in range(passes * (images // world - len(bad))):
            next(stream)
    except UserError as error:
        assert "could not be used, more than 1 %" in str(error)
        return stream.state_dict()[0]["read"]
    return None


def test_one_percent_of_bad_files_is_the_most_in_training():
    # of small data whole passes count
    assert read_with([0, 1], 200, passes=2) is None
    assert read_with([0, 1, 2], 200) == 3 and read_with([0, 1, 198], 200) == 199
    assert read_with([0], 200, world=2) is None and read_with([0, 98], 200, world=2) == 99, "of a part of 100"
    # of others what was read, at first a thousand
    assert read_with(range(11), 1102) == 11
    assert read_with([*range(10), 1098], 1102) == 1099 and read_with([*range(10), 1099], 1102) is None


def test_one_percent_of_bad_files_is_the_most_in_an_evaluation():
    def read_with(bad, images, world=1):
        source, read = in_memory([b"<html>" if n in bad else png(0) for n in range(images)]), 0
        try:
            for chunk in one_pass(source, Numbers(), 1, 0, 0, world):
                read += len(chunk["ids"]) + len(chunk["skipped"])
        except UserError as error:
            assert "could not be used, more than 1 %" in str(error)
            return read + 1
        return None

    assert read_with([0, 1], 200) is None and read_with([0, 1, 2], 200) == 3
    assert read_with([0, 4], 200, world=4) is None and read_with([0, 4, 8], 200, world=4) == 3, "of the whole split"
    assert read_with(range(11), 1102) == 11
    assert read_with([*range(10), 1098], 1102) == 1099 and read_with([*range(10), 1099], 1102) is None


# What a run that goes on may change.

FREE = {"run_dir", "resume", "resume_changed", "log_every", "checkpoint_every", "keep", "milestone_every", "tracker",
        "compile", "compile_teacher", "checkpoint_blocks", "workers", "timeout", "patience", "max_bad_steps",
        "checkpoint", "beside", "push_to_hub", "probe_every", "probe_split"}  # fmt: skip
BEGINS_ANEW = {"dataset", "split", "image_column", "streaming", "val_fraction", "num_images", "seed", "batch_size",
               "parts", "shuffle_window", "interleave"}  # fmt: skip


@pytest.mark.parametrize("command", [train.Args, finetune.Classify, probe.Linear, probe.Attentive])
def test_every_argument_is_free_or_compared_on_a_resume(tmp_path, command):
    """A new one is compared, unless it is named above; some begin the data anew. A run may become longer by itself, and
    a flag that it did not know yet does not stop it."""
    values = {**flat(command()), "task": "this", "weights": "these"}
    checkpoint, place = tmp_path / "checkpoints" / "step_00000007", {"pass": 4, "seen": 5}
    checkpoint.mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"args": values, "model": {}}))
    (checkpoint / "trainer.json").write_text(json.dumps({"step": 7}))
    (checkpoint / "data_0.json").write_text(json.dumps(place))
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in checkpoint.iterdir()]
    (checkpoint / "SHA256SUMS").write_text("".join(sums))
    alone = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True, load_state=lambda path: None)

    def go_on(values, allowed=False):
        run = RunArgs(run_dir=str(tmp_path), resume_changed=allowed)
        resume = plan_resume(run, values, marks_of(command()))
        progress = load_checkpoint(alone, resume, tmp_path, 1)
        return resume.changed, progress.first_pass, progress.data_states

    assert go_on(values) == ({}, 0, {0: place})
    for name, old in values.items():
        other = {**values, name: "another"}
        if name in FREE:
            assert go_on(other) == ({}, 0, {0: place}), name
        else:
            with pytest.raises(UserError, match=rf"another configuration \({name} {old!s:.0}.*--resume-changed"):
                go_on(other)
            begins = (5, {}) if name in BEGINS_ANEW else (0, {0: place})
            changed = {name: [json.loads(json.dumps(old)), "another"]}
            assert go_on(other, allowed=True) == (changed, *begins), name
    (tmp_path / "config.json").write_text(json.dumps({"args": {**values, "epochs": 2.5, "steps": 4}, "model": {}}))
    for name, old, new in (("epochs", 2.5, 3), ("steps", 4, 5)):
        longer = {**values, "epochs": 2.5, "steps": 4, "unknown": 1, name: new}
        assert go_on(longer) == ({name: [old, new]}, 0, {0: place})
    for other in ({"epochs": 2.5, "steps": 3}, {"epochs": 2, "steps": 4}, {"epochs": 2.5, "steps": None}):
        with pytest.raises(UserError, match="another configuration"):
            go_on({**values, **other})
    everywhere = map(flags, (train.Args, finetune.Classify, probe.Linear, probe.Attentive))
    assert set().union(*everywhere) >= FREE | BEGINS_ANEW
