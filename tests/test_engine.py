"""What every run needs and no paper mentions, part by part: data sets and the order of their images, the network, the
run folder, the log, and the loop. Each is compared with what it promises, written out here."""

import engine.arguments
import engine.errors
import engine.log
import engine.network
import engine.run
import engine.stream
from engine.arguments import (
    DEMO,
    DataArgs,
    LabelArgs,
    Mark,
    RunArgs,
    cores_per_process,
    default_run_dir,
    fill,
    flat,
    parse,
    require_not_negative,
    require_positive,
    resolve_images,
)
from engine.checkpoints import (
    Progress,
    Resume,
    checkpoints,
    damage,
    fingerprint,
    load_checkpoint,
    make_run_dir,
    plan_resume,
    report_resume,
    save_checkpoint,
    sound_checkpoint,
    write_config,
)
from engine.errors import (
    STOP_SIGNALS,
    BadFilesError,
    LoadingError,
    PeerError,
    RunError,
    ServerGoneError,
    UserError,
    command_line,
    dead_peers,
)
from engine.evaluation import accuracy
from engine.files import replace_files
from engine.log import Log, watch
from engine.network import HubFile, HubFiles, NetworkError, Outage, growing_pauses, network_errors
from engine.run import (
    Interval,
    Length,
    Peers,
    Run,
    Stop,
    attention_for,
    completes_passes,
    make_accelerator,
    raise_together,
)
from engine.sources import Source, choose_columns, open_labelled, open_source
from engine.stream import Stream, load_chunk, one_pass

import hashlib
import itertools
import json
import math
import multiprocessing
import re
import signal
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import accelerate
import datasets
import pytest
import torch
from huggingface_hub.errors import HTTPError
from images import Numbers, png, write_folder, write_parquet, write_tars
from reference import seed_of
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

import convert
import train
from cae import CAEConfig

CPU = torch.device("cpu")


def alone(**more):
    """What save, load, log and evaluation ask of an Accelerator, of a single process unless said otherwise."""
    first = dict(process_index=0, num_processes=1, is_main_process=True, device=CPU, scaler=None)
    return SimpleNamespace(**{**first, "save_state": lambda folder: None, "load_state": lambda folder: None,
                              "log": lambda values, step: None, "autocast": nullcontext,
                              "reduce": lambda x, how: x, "gather": lambda x: x, **more})  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ data sets


def columns(names, **flags):
    kinds = {"i": datasets.Image(), "b": datasets.Value("binary"), "n": datasets.Value("int64"),
             "s": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}  # fmt: skip
    features = {name: kinds[kind] for name, kind in (pair.split(":") for pair in names.split())}
    return choose_columns(DataArgs(dataset="x", **flags), features)


@pytest.mark.parametrize(("names", "flags", "found"), [
    ("thumb:i image:i label:n", {}, ("image", "label")),
    ("n:n photo:i scan:i cls:n", {}, ("photo", "cls")),
    ("image:i cls:n label:n", {}, ("image", "label")),
    ("photo:i kind:n", {}, ("photo", None)),
    ("image:i scan:i label:n kind:n", {"image_column": "scan", "label_column": "kind"}, ("scan", "kind")),
    ("image:b label:n", {}, ("image", "label")),
    ("image:s", {}, ("image", None)),
])  # fmt: skip
def test_columns_that_nobody_named(names, flags, found):
    assert columns(names, **flags) == found


def labelled(path, streaming=False, split="train", num_images=None, world=1, **labels):
    data = DataArgs(dataset=str(path), streaming=streaming, workers=0, split=split, num_images=num_images)
    return open_labelled(data, LabelArgs(**labels), world)


def test_the_split_to_evaluate_on(tmp_path):
    """The first that exists of four, never the one that is learned from; one process reads it, with its own number of
    images."""
    for split, count in (("train", 8), ("test", 2), ("validation", 4)):
        write_parquet(tmp_path, (count,), group=4, split=split)
    for streaming in (True, False):
        ours, val = labelled(tmp_path, streaming, num_images=8, world=2)
        assert (ours.num_images, val.num_images) == (8, 4)
        assert labelled(tmp_path, streaming, split="validation")[1].num_images == 2
        assert labelled(tmp_path, streaming, val_split="test")[1].num_images == 2
    assert labelled(tmp_path, True)[0].num_shards == 2, "on disk a shard is a row group"
    assert ours.name == val.name == str(tmp_path)
    with pytest.raises(UserError, match="has 2 shards, fewer than the 3 processes"):
        labelled(tmp_path, True, world=3)


def test_classes_are_those_that_are_learned(tmp_path):
    """Named in another order they are refused; as numbers, a split may lack some."""
    write_parquet(tmp_path / "named", (8,))
    write_parquet(tmp_path / "named", (4,), split="test", names=("odd", "even"))
    for streaming in (True, False):
        with pytest.raises(UserError, match="disagree on their classes"):
            labelled(tmp_path / "named", streaming)
    write_parquet(tmp_path / "numbers", (8,), labels="numbers")
    write_parquet(tmp_path / "numbers", (1,), split="test", labels="numbers")
    ours, val = labelled(tmp_path / "numbers")
    assert ours.classes == val.classes == ["0", "1"]
    write_parquet(tmp_path / "words", (8,), labels="words", names=("z", "a"))
    write_parquet(tmp_path / "words", (1,), split="test", labels="words", names=("z", "a"))
    ours, val = labelled(tmp_path / "words")
    assert ours.classes == val.classes == ["a", "z"], "words are classes in the order of the alphabet"


def test_the_number_of_a_class():
    source = Source(None, "image", "label", 3, "here", ["7", "b", "c"])
    for value, number in ((0, 0), (2, 2), ("c", 2), ("7", 0)):
        assert source.label({"label": value}) == number
    for value in (-1, 3, "d", None, 1.0, "2"):
        with pytest.raises(ValueError, match="none of the 3 classes"):
            source.label({"label": value})


def test_images_are_counted_in_their_split(tmp_path):
    for write, kind in ((write_parquet, "parquet"), (write_tars, "tar")):
        for split, counts in (("train", (5, 4)), ("test", (3,))):
            write(tmp_path / kind, counts, split=split)
        for streaming in (True, False):  # what is prepared on disk is known of later streams, too
            for split, number in (("train", 9), ("test", 3)):
                data = DataArgs(dataset=str(tmp_path / kind), streaming=streaming, workers=0, split=split)
                assert open_source(data).num_images == number
                data.num_images = 77
                assert open_source(data).num_images == (77 if streaming else number)


def test_a_file_is_a_data_set(tmp_path):
    """A single one, of its ending; its only split is train."""
    write_parquet(tmp_path, (3,), split="test")
    write_tars(tmp_path, (4,))
    for name, number in (("test-00000-of-00001.parquet", 3), ("train-00000.tar", 4)):
        for streaming in (True, False):
            assert open_source(DataArgs(dataset=str(tmp_path / name), streaming=streaming)).num_images == number


# ------------------------------------------------------------------------------------------------------ order of images


def shuffled(n, *parts):
    """A permutation by the first 63 bits of a hash of its seed."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(*parts))).tolist()


def stream_of(path, streaming, rank=0, world=1, window=7, interleave=2, state=None, first_pass=0, size=5):
    args = DataArgs(dataset=str(path), streaming=streaming, workers=0, batch_size=size)
    args.shuffle_window, args.interleave = window, interleave
    return Stream(open_source(args, world), Numbers(), args, 3, rank, world, state, first_pass)


def numbers_of(stream, count):
    """The first images of a stream, as (pass, number)."""
    found = []
    while len(found) < count:
        batch = next(stream)
        found += list(zip(batch["ids"][:, 0].tolist(), batch["numbers"].tolist(), strict=True))
    return found[:count]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("first_pass", [0, 4])
def test_the_order_of_a_stream(tmp_path, rank, first_pass):
    """Shards are dealt, read two at a time, one image each, and mixed within windows of seven."""
    counts = (9, 4, 1, 6, 5)
    write_tars(tmp_path, counts)
    first = [sum(counts[:i]) for i in range(len(counts))]
    ids = {first[i] + row: i << 32 | row for i in range(len(counts)) for row in range(counts[i])}
    expected = []
    for epoch in range(first_pass, first_pass + 3):
        waiting = [list(range(first[i], first[i] + counts[i])) for i in shuffled(5, 3, epoch)[rank::2]]
        opened, order, turn = [], [], 0
        while waiting or opened:
            while len(opened) < 2 and waiting:
                opened.append(waiting.pop(0))
            turn %= len(opened)
            if opened[turn]:
                order.append(opened[turn].pop(0))
                turn += 1
            else:
                del opened[turn]
        for window in (order[i : i + 7] for i in range(0, len(order), 7)):
            expected += [(epoch, window[i]) for i in shuffled(len(window), 3, epoch, ids[window[0]])]
    assert numbers_of(stream_of(tmp_path, True, rank, 2, first_pass=first_pass), len(expected)) == expected


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("first_pass", [0, 4])
def test_the_order_on_disk(tmp_path, rank, first_pass):
    """Every third image of a permutation of all, from the rank's own on."""
    write_folder(tmp_path, 11)
    evens = [n for n in range(11) if n % 2 == 0]
    rows = evens + [n for n in range(11) if n % 2]  # even/ comes before odd/
    expected = [(epoch, rows[i]) for epoch in range(first_pass, first_pass + 3)
                for i in shuffled(11, 3, epoch)[rank::3]]  # fmt: skip
    assert numbers_of(stream_of(tmp_path, False, rank, 3, first_pass=first_pass), len(expected)) == expected


def test_the_pass_of_a_stream_is_that_of_its_last_image(tmp_path):
    """Data that change begin anew with the next one."""
    stream = stream_of(write_folder(tmp_path, 7), False)
    passes = []
    for _ in range(3):
        batch = next(stream)
        passes.append((batch["ids"][0, 0].item(), stream.state_dict()[0]["pass"]))
    assert passes == [(0, 0), (0, 1), (1, 2)]


def test_bad_files_are_named_once(tmp_path):
    """Not again by a run that goes on in the middle of their chunk; and they count as read."""
    bad = stream_of(write_folder(tmp_path / "all", 7, encode=lambda n: b"bad"), False)
    with pytest.raises(BadFilesError, match=r"5 of the 5 files that this process read of .*/all could not be used"):
        next(bad)
    write_parquet(tmp_path / "two", (240,), encode=lambda n: b"bad" if n in (60, 120) else png(n))
    stream = stream_of(tmp_path / "two", False)
    while len(stream.skipped_names) < 2:
        next(stream)
    again = stream_of(tmp_path / "two", False, state=stream.state_dict())
    assert stream.skipped == again.skipped == 2
    assert stream.state_dict()[0]["skipped"] == 1, "it goes on before the second"
    assert again.skipped_names == []
    assert numbers_of(again, 50) == numbers_of(stream, 50)


def test_loading_processes_are_as_many_as_asked_for(tmp_path):
    source = open_source(DataArgs(dataset=str(write_tars(tmp_path, (4, 4))), streaming=True, workers=0))
    for workers in (0, 2):
        args = DataArgs(streaming=True, workers=workers, batch_size=2)
        for begin in (lambda: Stream(source, Numbers(), args, 3),  # noqa: B023
                      lambda: one_pass(source, Numbers(), 2, workers)):  # noqa: B023
            before = set(multiprocessing.active_children())
            chunks = begin()
            next(chunks)
            assert len(set(multiprocessing.active_children()) - before) == workers
            del chunks


def test_a_pass_with_a_broken_shard_is_no_pass(tmp_path):
    """Its other images would be an accuracy of something else."""
    write_tars(tmp_path, (4, 4))
    shard = tmp_path / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    source = open_source(DataArgs(dataset=str(tmp_path), streaming=True, num_images=8, workers=0))
    with pytest.raises(BadFilesError, match=r"shard 1 .* cannot be read beyond its row"):
        list(one_pass(source, Numbers(), 2, 0))


def test_a_file_of_a_server_that_is_gone_is_no_bad_file(tmp_path, monkeypatch):
    def refused(path):
        raise NetworkError("connection refused")

    source = open_source(DataArgs(dataset=str(write_folder(tmp_path, 2)), patience=1e-5))
    assert source.patience == 1e-5
    assert load_chunk(source, Numbers(), 0, [(0, 1, source.data[1])])["numbers"].tolist() == [1]
    monkeypatch.setattr(engine.sources, "read_file", refused)
    with pytest.raises(ServerGoneError):
        load_chunk(source, Numbers(), 0, [(0, 1, source.data[1])])


# ---------------------------------------------------------------------------------------------------------- the network


def test_pauses_double_up_to_a_minute():
    assert list(itertools.islice(growing_pauses(), 9)) == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert list(itertools.islice(growing_pauses(2), 9)) == [1, 2, 4, 8, 16, 32, 60], "begun within two minutes"
    assert list(growing_pauses(0)) == []


def answer(status, **headers):
    error = HTTPError("said so")
    error.response = SimpleNamespace(status_code=status, headers=headers)
    return error


@pytest.mark.parametrize(("error", "after"), [
    (HTTPError("cut off"), 0), (answer(408), 0), (answer(429, **{"Retry-After": "7"}), 7), (answer(500), 0),
    (answer(503, **{"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}), 0),
])  # fmt: skip
def test_failures_that_may_pass(error, after):
    with pytest.raises(NetworkError) as caught, network_errors("a shard"):
        raise error
    assert caught.value.after == after and "a shard" in str(caught.value)


@pytest.mark.parametrize("error", [answer(400), answer(401), answer(403), answer(404), answer(499), OSError("disk")])
def test_failures_that_stay(error):
    with pytest.raises(type(error)) as caught, network_errors("a shard"):
        raise error
    assert caught.value is error


def test_a_server_is_waited_for_as_long_as_it_asks_and_patience_lasts(monkeypatch, capsys):
    now, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(engine.network.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(engine.network.time, "sleep", sleep)
    outage = Outage("pictures", 0.5)
    with pytest.raises(ZeroDivisionError):
        outage.wait(ZeroDivisionError())
    for error in (NetworkError("busy"), NetworkError("busy", 9), NetworkError("busy")):
        outage.wait(error)
    assert slept == [1, 9, 4]
    outage.over()
    assert re.findall(r"waiting for|comes again, after 14 s", capsys.readouterr().err) == [
        "waiting for", "comes again, after 14 s"]  # fmt: skip
    del slept[:]
    with pytest.raises(ServerGoneError, match=r"pictures has been away for 0\.5 minutes"):
        while True:
            outage.wait(NetworkError("busy", 25))
    assert slept == [25, 5], "never beyond its patience, which begins with each outage"


def test_a_range_of_a_file_comes_whole(monkeypatch):
    """Asked for by its first and last byte, in the name of the user, with a limit on silence."""
    whole, asked, answers = bytes(range(100)), [], []

    class Session:
        def get(self, url, headers, timeout):
            asked.append((url, headers["Range"], headers["authorization"], timeout))
            return answers.pop(0)

    monkeypatch.setattr(engine.network, "get_session", Session)
    monkeypatch.setattr(engine.network, "hf_raise_for_status", lambda answer: None)
    monkeypatch.setattr(engine.network.hub_constants, "HF_HUB_DOWNLOAD_TIMEOUT", 17)
    fs = SimpleNamespace(token="hf_secret", url=lambda path: f"https://hub/{path}")
    fetch = partial(HubFile._fetch_range, SimpleNamespace(path="owner/name/a.tar", fs=fs, size=100))
    answers += [SimpleNamespace(status_code=206, content=whole[10:30]), SimpleNamespace(status_code=200, content=whole)]
    assert fetch(10, 30) == fetch(10, 30) == whole[10:30]
    assert asked == [("https://hub/owner/name/a.tar", "bytes=10-29", "Bearer hf_secret", 17)] * 2
    for content in (whole[10:29], b"", whole[10:31]):
        answers.append(SimpleNamespace(status_code=206, content=content))
        with pytest.raises(NetworkError, match=f"{len(content)} bytes came instead of 20"):
            fetch(10, 30)
    answers.append(SimpleNamespace(status_code=200, content=b"<html>" * 20))
    with pytest.raises(NetworkError, match="120 bytes came instead of 100"):
        fetch(10, 30)


def test_files_of_the_hub_share_what_they_know(monkeypatch):
    """And tar shards, which datasets asks for as one long answer, come in blocks of 16 MB."""
    opened = []
    monkeypatch.setattr(engine.network, "HubFile", lambda fs, path, mode, size, **options: opened.append(size))
    monkeypatch.setattr(HubFiles, "resolve_path", lambda self, path, revision: SimpleNamespace(unresolve=str))
    first, second, other = (HubFiles(token=token, skip_instance_cache=True) for token in ("a", "a", "b"))
    assert first is not second and first.dircache is second.dircache is not other.dircache
    for size in (0, None, 1234):
        first._open("datasets/owner/name/a.tar", block_size=size)
    assert opened == [2**24, first.block_size, 1234]


# ------------------------------------------------------------------------------------------- run folder and checkpoints


def test_what_a_failed_write_of_the_model_leaves(tmp_path):
    """Nothing; and nothing of an earlier attempt gets into the model."""
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "earlier").touch()
    replace_files(tmp_path / "model", lambda folder: (folder / "x").write_text("whole"))
    with pytest.raises(OSError, match="full"):
        replace_files(tmp_path / "model", lambda folder: (_ for _ in ()).throw(OSError("full")))
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "x"]


def test_checkpoints_are_named_by_their_step(tmp_path):
    for name in ("step_00000020", "step_00000003", "step_123456789", "step_00000021.tmp", "step_00000022.damaged",
                 "step_5", "other"):  # fmt: skip
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step_00000003", "step_00000020", "step_123456789"]


def saved(folder, step=4, places=({"seen": 1},), accelerator=None, **trainer):
    """A checkpoint with these positions of part 0, 1, ... or {part: position}."""
    accelerator = accelerator or alone(save_state=state_of_two_files)
    places = places if isinstance(places, dict) else dict(enumerate(places))
    assert save_checkpoint(accelerator, RunArgs(run_dir=str(folder)), step, places, trainer) is None
    return folder / "checkpoints" / f"step_{step:08d}"


def state_of_two_files(folder):
    (Path(folder) / "weights").mkdir()  # as FSDP does
    (Path(folder) / "weights" / "part_0").write_text("w")
    (Path(folder) / "model.safetensors").write_text("o")


def test_a_checkpoint_is_summed_whole(tmp_path):
    """Every file but the sums themselves, also within a folder; a change to any is noticed."""
    checkpoint = saved(tmp_path, places=({"seen": 1}, {"seen": 2}), bad_steps=2)
    lines = (checkpoint / "SHA256SUMS").read_text().splitlines()
    files = {"weights/part_0", "model.safetensors", "trainer.json", "data_0.json", "data_1.json"}
    assert {line.split("  ")[1]: line.split("  ")[0] for line in lines} == {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in files}  # fmt: skip
    assert json.loads((checkpoint / "trainer.json").read_text()) == {"step": 4, "bad_steps": 2}
    assert damage(checkpoint) is None
    for name in files:
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:-1] + b"?")
        assert damage(checkpoint) == f"{name} is not what was written"
        (checkpoint / name).unlink()
        assert damage(checkpoint) == f"{name} is missing"
        (checkpoint / name).write_bytes(whole)
    (checkpoint / "SHA256SUMS").write_text("\n".join(line for line in lines if "trainer" not in line))
    assert damage(checkpoint) == "SHA256SUMS is cut short"
    (checkpoint / "SHA256SUMS").unlink()
    assert "SHA256SUMS cannot be read" in damage(checkpoint)


def test_each_part_of_the_data_goes_on_where_it_belongs(tmp_path):
    """Rank 1 of two has the parts 1 and 3 of four, in a checkpoint and from it."""
    ranks = [alone(process_index=rank, num_processes=2, is_main_process=rank == 0) for rank in (0, 1)]
    source = open_source(DataArgs(dataset=str(write_folder(tmp_path / "images", 44)), workers=0))
    data = DataArgs(workers=0, batch_size=3, parts=4)
    streams = [Stream(source, Numbers(), data, 3, rank, 2) for rank in (0, 1)]
    for taken, stream in enumerate(streams, 2):
        for _ in range(taken):
            next(stream)
    states = {part: state for stream in streams for part, state in stream.state_dict().items()}
    assert [list(stream.state_dict()) for stream in streams] == [[0, 2], [1, 3]]
    assert len({state["seen"] for state in states.values()}) == 4
    temporary = tmp_path / "checkpoints" / "step_00000007.tmp"
    temporary.mkdir(parents=True)
    saved(tmp_path, 7, streams[1].state_dict(), ranks[1])
    found = {path.name: json.loads(path.read_text()) for path in temporary.iterdir()}
    assert found == {"data_1.json": states[1], "data_3.json": states[3]}, "the rest is for rank 0 to write"
    whole = saved(tmp_path, 8, states)
    for rank, parts in ((0, [0, 2]), (1, [1, 3])):
        ranks[rank].is_main_process = True  # it alone looks at the sums
        progress = load_checkpoint(ranks[rank], Resume([whole]), tmp_path, 4)
        assert progress.step == 8 and progress.data_states == states and progress.path == whole
        again = Stream(source, Numbers(), data, 3, rank, 2, progress.data_states)
        assert again.state_dict() == {part: states[part] for part in parts}
    assert load_checkpoint(ranks[1], Resume(), tmp_path, 4) == Progress()
    assert vars(Progress()) == {"step": 0, "data_states": {}, "first_pass": 0, "skipped_steps": 0,
                                "unevaluated": None, "more": {}, "path": None}  # fmt: skip


def test_data_that_begin_anew_begin_after_every_part(tmp_path):
    """With the pass after the latest of all parts; what only the recipe changes goes on."""
    checkpoint = saved(tmp_path, 8, [{"pass": 2}, {"pass": 5}])
    history, marks = [{"step": 3, "values": {"seed": [4, 0]}}], {"seed": Mark.DATA}
    for changed, first_pass in (({"seed": [0, 1]}, 6), ({"lr": [1, 2]}, 0)):
        resume = Resume([checkpoint], changed, {}, history, marks)
        progress = load_checkpoint(alone(), resume, tmp_path, 2)
        assert progress.first_pass == first_pass
        assert progress.data_states == ({} if first_pass else {0: {"pass": 2}, 1: {"pass": 5}})
        assert resume.changes(progress.step) == [*history, {"step": 8, "values": changed}]


def test_a_damaged_checkpoint_of_another_run_is_left_alone(tmp_path, capsys):
    good, bad = saved(tmp_path / "theirs", 3), saved(tmp_path / "theirs", 6)
    (bad / "data_0.json").write_text("?")
    found = sound_checkpoint(alone(), [bad, good], tmp_path / "ours")
    assert found == good and bad.exists() and "step_00000006 is damaged: data_0.json is not" in capsys.readouterr().err
    assert sound_checkpoint(alone(), [bad, good], tmp_path / "theirs") == good
    assert not bad.exists() and bad.with_name("step_00000006.damaged").exists()


def test_a_damaged_checkpoint_of_another_run_makes_no_branch(tmp_path):
    """The one before it is older than what the run's own folder has."""
    good, bad = saved(tmp_path / "theirs", 3), saved(tmp_path / "theirs", 6)
    saved(tmp_path / "ours", 5)
    assert sound_checkpoint(alone(), [bad, good], tmp_path / "ours") == bad
    (bad / "data_0.json").write_text("?")
    with pytest.raises(UserError, match="goes on to step_00000005: pass --resume auto, or to branch off another"):
        sound_checkpoint(alone(), [bad, good], tmp_path / "ours")


def test_left_overs_are_taken_away(tmp_path):
    """Files and folders that have no name yet, and nothing else."""
    saved(tmp_path, 3)
    for name in ("best.tmp/x", "checkpoints/step_00000006.tmp/y", "checkpoints/step_00000002.damaged/z", "model/w"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "log.jsonl.tmp").touch()
    sound_checkpoint(alone(), [], tmp_path)
    assert sorted(path.name for path in [*tmp_path.iterdir(), *(tmp_path / "checkpoints").iterdir()]) == [
        "checkpoints", "model", "step_00000002.damaged", "step_00000003"]  # fmt: skip


def test_the_last_checkpoint_of_a_run_may_be_named(tmp_path):
    """--resume PATH in the run's own folder; only an earlier one would branch off."""
    run = RunArgs(run_dir=str(tmp_path))
    for step in (3, 6):
        last = saved(tmp_path, step)
    write_config(tmp_path, {"seed": 0}, {}, [{"step": 3, "values": {}}])
    run.resume = str(last)
    resume = plan_resume(run, {"seed": 0}, {})
    assert resume == Resume([last], history=[{"step": 3, "values": {}}])
    run.resume = "auto"
    assert [path.name[-1] for path in plan_resume(run, {"seed": 0}, {}).candidates] == ["6", "3"]


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    """Before the work; and a look leaves nothing behind."""
    make_run_dir(tmp_path / "a" / "run")
    assert list((tmp_path / "a" / "run").iterdir()) == []
    monkeypatch.setattr(Path, "touch", lambda path: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(UserError, match="is not writable: Read-only file system; choose another --run-dir"):
        make_run_dir(tmp_path / "a" / "run")


def test_what_is_told_when_a_run_goes_on(capsys):
    resume = Resume(changed={"lr": [1, 2], "steps": [8, 10]}, added={"new": 3}, marks={"steps": Mark.LENGTH})
    report_resume(Progress(path="here", step=9, first_pass=2), resume, 10, "run")
    report_resume(Progress(path="here", step=10), Resume(), 10, "run")
    report_resume(Progress(), Resume(), 10, "run")
    assert capsys.readouterr().out.splitlines() == [
        "continuing from here", "  changed: lr 1 -> 2",
        "  changed: steps 8 -> 10; the learning rate follows the schedule of the new length",
        "  new since the run began: new 3", "  the data begin anew, with pass 2",
        "run is complete: 10 steps"]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- log and terminal


class Clock:
    """In place of time, of a run and its log alone: it stands still until somebody lets it run."""

    def __init__(self):
        self.now, self.sleep, self.monotonic = 1000.0, time.sleep, time.monotonic

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (engine.log, engine.run):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(engine.run, "Interval", lambda: Interval(began=clock.now))
    return clock


VALUES = {"loss": 0.12345, "images_per_second": 1234.5, "data_wait": 0.256}


def test_a_log_goes_on_after_the_step_of_its_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"no step": 1}\n{"step": 6')
    log = Log(alone(), tmp_path, 3, 10)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": step} for step in (1, 2, 3)]
    log.write({"step": 4, **VALUES, "loss": math.nan})
    log.close()
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 4, **VALUES, "loss": None}
    before = path.read_bytes()
    other = Log(alone(is_main_process=False), tmp_path, 0, 10)
    other.write({"step": 1, **VALUES})
    other.close()
    assert path.read_bytes() == before, "the main process alone writes"


def test_a_line_of_the_terminal(tmp_path, clock, capsys):
    """Begun at step 10, twenty steps in twenty seconds: of a hundred, seventy are left."""
    tracked = []
    log = Log(alone(log=lambda values, step: tracked.append((step, values))), tmp_path, 10, 100)
    clock.now += 20
    log.write({"step": 30, **VALUES, "top1": 71.26, "seen": "abc", "skipped_files": ["x.png (id 3)"]})
    log.write({"step": 31, **VALUES, "loss": math.inf}, shown=False)
    clock.now += 25
    log.write({"step": 55, **VALUES, "loss": math.inf})
    log.close()
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "step 30/100  loss 0.1235  1234 images/s  waiting for data 26%  top-1 71.3  01:10 left",
        "step 55/100  loss not finite  1234 images/s  waiting for data 26%  top-1 71.3  00:45 left"]  # fmt: skip
    assert captured.err == "skipped x.png (id 3)\n"
    assert tracked[0] == (30, {**VALUES, "top1": 71.26}), "numbers alone, and no curve of the step"
    assert [step for step, _ in tracked] == [30, 31, 55]


def test_what_is_told_of_a_pass(clock, capsys):
    """After ten seconds, in which eight images came every second and a quarter of the time was spent on waiting."""
    def chunks():
        for _ in range(30):
            clock.now += 0.125
            yield {"ids": range(4)}

    passed = 0
    for chunk in watch(chunks(), 200, "images to see", True):
        clock.now += 0.375
        passed += len(chunk["ids"])
    assert passed == 120
    told = re.fullmatch(r"images to see: 84/200 images  8 images/s  waiting for data (\d+)%  00:(\d\d) left\n",
                        capsys.readouterr().out)  # fmt: skip
    assert abs(int(told[1]) - 25) <= 1 and abs(int(told[2]) - 116 / 8) < 2
    for _ in watch(chunks(), 200, "images", False):
        clock.now += 0.375
    assert capsys.readouterr().out == "", "one process is enough"


# ------------------------------------------------------------------------------------------------------------- the loop


@pytest.fixture
def handlers():
    """Puts back what receives the signals that ask for a stop."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Batches:
    """In place of engine.stream.Part: batches of nothing, each in a second."""

    skipped, skipped_names, clock = 0, (), None

    def __init__(self, *_):
        self.taken = 0

    def __next__(self):
        if self.clock:
            self.clock.now += 1
        self.taken += 1
        return {"images": torch.zeros(4)}

    def state_dict(self):
        return {"seen": self.taken}


def fitted(tmp_path, learn, total, clock=None, images=40, evaluate=None, every=1.0, every_steps=None,
           parts=1, **flags):  # fmt: skip
    """A run with a model of nothing, 4 images a micro-batch, 8 a step; the lines of its log. learn(step, micro-batches)
    gives the values of a step and, as "bad", whether it is skipped."""
    args = train.Args(data=DataArgs(batch_size=4, effective_batch_size=8, parts=parts))
    args.run = RunArgs(run_dir=str(tmp_path), **{"log_every": 1, "checkpoint_every": 100, **flags})
    with pytest.MonkeyPatch.context() as patch, Run(args) as run:
        patch.setattr(engine.stream, "Part", Batches)
        patch.setattr(Batches, "clock", clock)
        run.open_folder(args)
        run.resume(Length(total, images / 8), {})
        stream = run.stream(SimpleNamespace(classes=None), SimpleNamespace(names=("images",)))
        for step in run.steps(stream, evaluate=evaluate, evaluate_every=every, evaluate_steps=every_steps):
            values = learn(step, run.micro_batches())
            run.record(values, values.pop("bad"))
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


def test_a_line_of_the_log_is_the_mean_of_its_steps(tmp_path, clock):
    """Of what is a tensor; numbers are the last step's. A skipped step counts in neither mean, but takes time."""
    def learn(step, batches):
        assert len(list(batches)) == 2
        clock.now += 2
        bad = torch.tensor(step == 3)
        loss = torch.tensor(math.nan if step == 3 else float(step))
        return {"loss": loss, "loss_heads": torch.stack([loss, 10 * loss]), "bad": bad, "lr": step / 8}

    def evaluate(line):
        clock.now += 100
        return {"top1": 50.0}

    lines = fitted(tmp_path, learn, 8, clock, log_every=3, evaluate=evaluate, every=0.8)
    wanted = {3: (1.0, 0), 4: (None, 1), 6: (4.5, 1), 8: (6.5, 1)}
    assert [line["step"] for line in lines] == list(wanted)
    for line in lines:
        loss, bad = wanted[line["step"]]
        assert (line["loss"], line["bad_steps"]) == (loss, bad)
        assert line["loss_heads"] == ([loss, 10 * loss] if loss is not None else [None, None])
        assert (line["lr"], line["images"]) == ((line["step"] - 1) / 8, 8 * line["step"])
        assert line["epoch"] == line["step"] / 5, "a pass is five steps of eight images"
        assert line["images_per_second"] == 2 and line["data_wait"] == 0.5, "8 images in 4 seconds, 2 of them waiting"
        assert ("top1" in line) == (line["step"] in (4, 8))


def test_evaluations_may_be_counted_in_steps(tmp_path):
    """Whatever a pass is; the last step has one, too."""
    lines = fitted(tmp_path, learned(), 8, log_every=100, evaluate=lambda line: {"top1": 1.0}, every=0.2, every_steps=3)
    assert [line["step"] for line in lines if "top1" in line] == [3, 6, 8]


@pytest.mark.parametrize(("every", "steps"), [(1.0, [3, 5, 8, 9]), (0.5, [2, 3, 4, 5, 7, 8, 9]), (2.0, [5, 9]),
                                              (0.1, list(range(1, 10))), (100.0, [9])])  # fmt: skip
def test_when_an_evaluation_is_due(every, steps):
    """With the step in which another so many passes of 2.5 steps are complete, and at the end."""
    assert [step for step in range(1, 10) if completes_passes(step, 9, 2.5, every)] == steps
    assert [step for step in range(1, 10) if completes_passes(step, 9, None, every)] == [9], "of unknown length"
    assert completes_passes(30, 99, 10, 0.1 * 3 * 10), "three passes, but for the rounding of 0.1 * 3"


def learned(bad=()):
    return lambda step, batches: {"loss": torch.ones(len(list(batches))).mean(), "bad": torch.tensor(step in bad)}


def test_a_last_step_that_is_not_finite_fails_the_run(tmp_path, handlers):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(RunError, match=r"in 1 steps in a row, up to step 5; .* is none: none was written yet"):
        fitted(tmp_path, learned({4}), 5)
    assert not checkpoints(tmp_path)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before, "the run receives them no more"


@pytest.mark.parametrize(("row", "fails"), [(2, False), (3, True)])
def test_so_many_bad_steps_in_a_row(tmp_path, handlers, row, fails):
    """Also where the row lies between two lines of the log, and has ended before the second."""
    bad = {*range(1, 1 + row), 6}
    if fails:
        with pytest.raises(RunError, match="in 3 steps in a row, up to step 10"):
            fitted(tmp_path, learned(bad), 10, log_every=10, max_bad_steps=3)
    else:
        assert fitted(tmp_path, learned(bad), 10, log_every=10, max_bad_steps=3)[-1]["bad_steps"] == row + 1


@pytest.mark.parametrize(("keep", "steps"), [(9, [3, 4, 6, 7]), (1, [3, 6, 7])])
def test_the_checkpoints_of_a_loop(tmp_path, keep, steps):
    """Of every fourth step and of the last, as many as are kept; every third for good. Each holds the places of its two
    parts, which share the micro-batches: one in each step."""
    fitted(tmp_path, learned(), 7, parts=2, checkpoint_every=4, milestone_every=3, keep=keep, log_every=7)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == steps
    for path, taken in zip(checkpoints(tmp_path), steps, strict=True):
        assert [json.loads((path / f"data_{part}.json").read_text()) for part in (0, 1)] == [{"seen": taken}] * 2


def test_signals_that_ask_for_a_stop(handlers):
    """Noted; while data are waited for, also raised; a second Ctrl-C is the system's; what is ignored stays so."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    peers = Peers(1, 5)
    assert peers.signal is None and peers.any(False) is False and peers.any(3) is True
    signal.raise_signal(signal.SIGTERM)
    assert peers.signal is None
    signal.raise_signal(signal.SIGUSR1)
    assert peers.signal == "SIGUSR1" and signal.getsignal(signal.SIGINT) != signal.SIG_DFL
    peers.interruptible = True
    with pytest.raises(Stop):
        signal.raise_signal(signal.SIGINT)
    assert peers.signal == "SIGINT" and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    peers.close()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


@pytest.mark.parametrize(("error", "kind"), [
    (RuntimeError("[gloo] Connection closed by peer"), PeerError), (RuntimeError("shapes differ"), RuntimeError),
    (torch.distributed.DistBackendError("NCCL timeout"), PeerError), (ValueError("gloo"), ValueError),
])  # fmt: skip
def test_errors_of_the_connection_to_other_processes(error, kind):
    with pytest.raises(kind) as caught, dead_peers():
        raise error
    assert type(caught.value) is kind and str(error) in str(caught.value)


# ---------------------------------------------------------------------------------------- device, processes, evaluation


@pytest.mark.parametrize(("gpu", "bf16", "cpu_asked", "expected"), [
    (True, True, False, "bf16"), (True, False, False, "no"), (False, True, False, "no"), (True, True, True, "no"),
])  # fmt: skip
def test_precision_and_timeout(monkeypatch, gpu, bf16, cpu_asked, expected):
    """bf16 by itself only on a GPU that has it; a process is waited for beyond the patience for a server."""
    made = []
    monkeypatch.setattr(accelerate, "Accelerator", lambda **options: made.append(options) or alone())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(cpu_asked))
    wanted = {"auto": expected, "fp32": "no", "bf16": "bf16", "fp16": "fp16"}
    for asked, precision in wanted.items():
        run = RunArgs(run_dir="here", precision=asked, timeout=3.0)
        assert make_accelerator(run, DataArgs(patience=4.0), "wandb")[1] == precision
        options = made.pop()
        assert (options["mixed_precision"], options["log_with"], options["project_dir"]) == (precision, "wandb", "here")
        ddp, group = options["kwargs_handlers"]
        assert not ddp.broadcast_buffers and ddp.gradient_as_bucket_view
        assert group.timeout == timedelta(minutes=7)
    make_accelerator(RunArgs(), DataArgs())
    assert made[0]["log_with"] is None


def test_plain_attention_in_bf16_on_a_cpu_alone():
    flash = torch.backends.cuda.flash_sdp_enabled
    assert flash(), "or nothing would be switched off"
    for kind, precision, fused in (("cpu", "bf16", False), ("cpu", "no", True), ("cpu", "fp16", True),
                                   ("cuda", "bf16", True)):  # fmt: skip
        with attention_for(torch.device(kind), precision):
            assert flash() == fused
    assert flash()


def test_an_error_of_one_process_is_one_of_all(monkeypatch):
    """Of the same kind and with the same words; the first one's, if there are several."""
    raise_together(None)
    for others, kind, words in (
        ([None, (True, "his")], UserError, "his"), ([None, (False, "hers")], RunError, "hers"),
        ([(False, "first"), (True, "second")], RunError, "first"),
    ):  # fmt: skip
        monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine, others=others: others)
        with pytest.raises(kind, match=words):
            raise_together(None)
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: mine)
    for error, kind in ((BadFilesError("x"), UserError), (ServerGoneError("x"), RunError)):
        with pytest.raises(kind, match="x"):
            raise_together(error)


def test_work_that_checks_ends_all_processes_or_none(monkeypatch):
    """The main process first; a mistake that another one finds ends this one, too, and after its work."""
    order = []

    @contextmanager
    def main_process_first():
        order.append("waited")
        yield
        order.append("done")

    run = object.__new__(Run)
    run.accelerator = alone(main_process_first=main_process_first)
    run.args = SimpleNamespace(run=SimpleNamespace(resume="never"), data=None)
    with run.main_process_first():
        order.append("work")
    with pytest.raises(UserError, match="mine"), run.main_process_first():
        raise UserError("mine")
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: [None, (True, "his")])
    with pytest.raises(UserError, match="his"), run.main_process_first():
        order.append("work")
    assert order == ["waited", "work", "done", "waited", "done", "waited", "work", "done"]


def test_accuracy_is_over_all_images(monkeypatch):
    """Not over batches, which may be of different sizes; of two heads at once; in percent."""
    scores = torch.eye(7)
    batches = [(scores[[0, 1, 2]], torch.tensor([0, 6, 2])), (scores[[3]], torch.tensor([4]))]
    heads = lambda x: torch.stack([x, -x])  # noqa: E731
    tops, images = accuracy(alone(), heads, batches, (2,))
    # ties keep the order of the classes or not: of -x only "not the first" is certain
    assert images == 4 and tops[0][0] == 50 and tops[1][0] == 0
    assert accuracy(alone(), heads, [], (2,)) == ([[0, 0], [0, 0]], 0)
    double = alone(reduce=lambda x, how: 2 * x if how == "sum" else x)  # another process with the same images
    assert accuracy(double, heads, batches, (2,)) == (tops, 8)

    def fails(error):
        yield batches[0]
        raise error

    for error in (BadFilesError("too many"), ServerGoneError("away"), RunError("killed")):
        sent = []
        monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine, sent=sent: sent.extend(mine) or mine)
        with pytest.raises(UserError if isinstance(error, UserError) else RunError, match=str(error)):
            accuracy(alone(), heads, fails(error), (2,))
        assert sent == [(isinstance(error, UserError), str(error))], "the other processes hear of it"
    monkeypatch.setattr(accelerate.utils, "gather_object", lambda mine: [*mine, (True, "his")])
    with pytest.raises(UserError, match="his"):
        accuracy(alone(), heads, batches, (2,))


# ----------------------------------------------------------------------------------------------- commands and arguments


@pytest.mark.parametrize(("error", "rank", "code", "told"), [
    (UserError("a"), "0", 2, True), (RunError("a"), "0", 1, True), (UserError("a"), "1", 2, False),
    (RunError("a"), "1", 1, False), (BadFilesError("a"), "1", 2, True),
    (ServerGoneError("a"), "1", 1, True), (PeerError("a"), "1", 1, True), (LoadingError("a"), "1", 1, True),
])  # fmt: skip
def test_exit_codes(error, rank, code, told, monkeypatch, capsys):
    """One line for all processes, by the first; what one of them may see alone, it says itself."""
    def leave(code):
        raise SystemExit(code)

    ended = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(engine.errors, "stop_workers", lambda: ended.append(1))
    monkeypatch.setattr(engine.errors.os, "_exit", leave)  # without waiting for the dead
    with pytest.raises(SystemExit) as stop:
        command_line(lambda: (_ for _ in ()).throw(error))
    assert stop.value.code == code and ended
    assert capsys.readouterr().err == ("error: a\n" if told else "")


def test_a_command_without_a_mistake_ends_its_loading_processes_too(monkeypatch):
    ended = []
    monkeypatch.setattr(engine.errors, "stop_workers", lambda: ended.append(1))
    command_line(lambda: None)
    with pytest.raises(ZeroDivisionError):
        command_line(lambda: 1 / 0)
    assert ended == [1, 1]


def resolved(*flags, world=1):
    args = train.resolve(parse(train.Args, flags), world)
    return SimpleNamespace(**flat(args), config=train.model_config(args))


@pytest.mark.parametrize(("flags", "expected"), [
    ("", dict(size="base", image_size=224, patch_size=16, mask_ratio=0.5, min_block=16, lr=1.5e-3, batch_size=256,
              effective_batch_size=2048, epochs=300, crop_scale=(0.4, 1.0), color_jitter=0.4, streaming=True,
              teacher="openai/clip-vit-base-patch16", run_dir="runs/cae-v2-base")),
    ("--method cae", dict(size="base", mask_ratio=0.5, target="dalle", teacher="facebook/flava-image-codebook",
                          crop_scale=(0.08, 1.0), color_jitter=0, min_block=16, run_dir="runs/cae-base")),
    ("--dataset demo", dict(size="nano", image_size=28, patch_size=4, mask_ratio=0.25, min_block=4, lr=8e-2, epochs=10,
                            batch_size=64, effective_batch_size=64, crop_scale=(0.6, 1.0), color_jitter=0,
                            streaming=True, teacher=str(DEMO / "clip_teacher"),
                            run_dir="runs/cae-v2-nano-demo")),
    ("--dataset demo --method cae --size tiny", dict(size="tiny", image_size=28, target="pixels", teacher="",
                                                     mask_ratio=0.5, run_dir="runs/cae-tiny-demo")),
    ("--size nano", dict(image_size=28, min_block=4, lr=8e-2, epochs=10, effective_batch_size=64, batch_size=64,
                         teacher="openai/clip-vit-base-patch16", run_dir="runs/cae-v2-nano")),
    ("--size tiny --steps 5 --weight-decay 0.1", dict(epochs=None, steps=5, mask_ratio=0.15, weight_decay_end=0.1)),
])  # fmt: skip
def test_defaults(flags, expected):
    found = resolved(*flags.split())
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.parts == 1 and found.supervise == "both"


def test_a_local_data_set_is_no_stream_unless_asked_for(tmp_path):
    write_folder(tmp_path, 2)
    for flags, streaming in (([], False), (["--streaming"], True)):
        assert resolved("--dataset", str(tmp_path), *flags).streaming == streaming
    assert not resolved("--no-streaming").streaming


def test_what_the_model_takes_from_the_arguments():
    """Each method only what is its own, and every shape that is asked for."""
    flags = ["--supervise", "masked", "--align-weight", "3", "--reconstruct-weight", "0.5", "--regressor-dim", "96",
             "--regressor-depth", "2", "--regressor-heads", "6", "--layer-scale", "0.3", "--drop-path",
             "0.2"]  # fmt: skip
    shapes = dict(regressor_dim=96, regressor_depth=2, regressor_heads=6, layer_scale=0.3, drop_path=0.2)
    for method, own in (("cae-v2", dict(supervise="masked", align_weight=2.0, reconstruct_weight=1.0, decoder_depth=0)),
                        ("cae", dict(supervise="both", align_weight=3.0, reconstruct_weight=0.5, decoder_depth=4))):
        config = vars(resolved("--method", method, *flags).config)
        assert {name: config[name] for name in {**shapes, **own}} == {**shapes, **own} and config["dim"] == 768


def test_the_mask_covers_at_least_the_ratio():
    config = CAEConfig.from_size("base")
    for ratio, masked in ((0.15, 30), (0.25, 49), (0.5, 98), (0.501, 99)):
        args = train.Args(target=train.TargetArgs(mask_ratio=ratio))
        assert train.num_masked(args, config) == masked


def test_limits_of_numbers():
    """What must be positive may not be 0; what must not be negative may; None is nobody's mistake."""
    group = SimpleNamespace(some_value=0, other=None)
    with pytest.raises(UserError, match=r"--some-value is 0: it must be positive"):
        require_positive(group, "other", "some_value")
    require_not_negative(group, "other", "some_value")
    group.some_value = -1e-9
    with pytest.raises(UserError, match=r"--some-value is -1e-09: it must not be negative"):
        require_not_negative(group, "other", "some_value")
    fill(group, "some_value", 5)
    fill(group, "other", 5)
    assert vars(group) == {"some_value": -1e-9, "other": 5}


def test_a_share_of_the_cores(monkeypatch, tmp_path):
    """Those that this process may use; of a container that is given fewer, these. Loading processes follow them."""
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(engine.arguments, "CPU_QUOTA", quota)
    monkeypatch.setattr(engine.arguments.os, "sched_getaffinity", lambda pid: range(12), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for text, cores in (("max 100000", 12), ("400000 100000", 4), ("50000 100000", 1), ("9900000 9", 12), ("", 12)):
        quota.write_text(text)
        assert cores_per_process() == cores
    quota.unlink()
    for processes, cores in (("1", 12), ("4", 3), ("5", 2), ("100", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert cores_per_process() == cores
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert cores_per_process() == 12
    for cores, workers in ((1, 1), (12, 12), (31, 31), (200, 32)):
        monkeypatch.setattr(engine.arguments, "cores_per_process", lambda: cores)  # noqa: B023
        data = DataArgs()
        resolve_images(data)
        assert data.workers == workers


def test_a_run_folder_is_named_after_one_origin():
    def name(checkpoint, size):
        return default_run_dir("knn", SimpleNamespace(checkpoint=checkpoint, random_init=size), data)

    data = SimpleNamespace(dataset="some/ImageNet-1k")
    assert name("runs/a b", None) == "runs/knn-a-b-ImageNet-1k"
    assert name(None, "tiny") == "runs/knn-random-tiny-ImageNet-1k"
    for both in ((None, None), ("x", "tiny")):
        with pytest.raises(UserError, match="give either --checkpoint or --random-init"):
            name(*both)


# ---------------------------------------------------------------------------------------------- other people's encoders


def test_a_teacher_is_frozen(tmp_path):
    args = train.Args(model=train.ModelArgs(method="cae"), data=DataArgs(dataset="demo"))
    for normal in (True, False):
        args.target.normalize_pixels = normal
        resolved = train.resolve(args)
        assert train.build_teacher(resolved, train.model_config(resolved)).normalize_patches == normal
    FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=50)).save_pretrained(tmp_path)
    dalle = train.TargetArgs(target="dalle", teacher=str(tmp_path))
    for args in (train.Args(), train.Args(model=train.ModelArgs(method="cae"), target=dalle)):
        args.data.dataset = "demo"
        args = train.resolve(args)
        teacher = train.build_teacher(args, train.model_config(args))
        assert not any(module.training for module in teacher.modules())
        assert not any(weight.requires_grad for weight in teacher.parameters())


def test_a_random_encoder_is_that_of_its_seed():
    def weights_of(model):
        return fingerprint(model.state_dict())

    origin = SimpleNamespace(checkpoint=None, random_init="nano")
    digests = []
    for before, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(before)
        digests.append(convert.open_encoder(origin, seed, weights_of, None))
    assert digests[0] == digests[1] != digests[2]
    origin.random_init = "giant"
    with pytest.raises(UserError, match="--random-init giant does not exist: nano, tiny"):
        convert.open_encoder(origin, 5, weights_of, None)
