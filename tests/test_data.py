"""Which images a rank sees, in which order, and what becomes of each file."""

from engine.arguments import DataArgs
from engine.errors import UserError
from engine.images import to_device
from engine.sources import open_source
from engine.stream import RowChunks, Stream, one_pass

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch
from images import Numbers, number_of, png, write_folder, write_parquet, write_tars
from launch import ROOT

CPU = torch.device("cpu")
COUNTS = (23, 7, 31, 12, 19, 5, 11)  # seven shards of 108 images: neither divides by 2, 3 or the batch size


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {
        "parquet": write_parquet(root / "parquet", COUNTS, group=10),
        "tar": write_tars(root / "tar", COUNTS),
        "folder": write_folder(root / "folder", sum(COUNTS)),
    }


def open_stream(path, streaming, rank=0, world=1, workers=0, state=None, batch_size=5, seed=3, **options):
    args = DataArgs(dataset=str(path), streaming=streaming, workers=workers, batch_size=batch_size, **options)
    args.shuffle_window, args.interleave = options.get("shuffle_window", 16), 3
    source = open_source(args, world)
    return Stream(source, Numbers(), args, seed, rank, world, state), source


def read_passes(stream, passes, size=5):
    """The first whole passes of a rank: for each, its numbers and its ids in order."""
    seen = {}
    while max(seen, default=0) < passes:
        batch = next(stream)
        assert len(batch["numbers"]) == size
        for number, (epoch, image_id) in zip(batch["numbers"].tolist(), batch["ids"].tolist(), strict=True):
            assert epoch >= max(seen, default=0), "a rank's stream is its part of pass 0, then of pass 1"
            seen.setdefault(epoch, []).append((number, image_id))
    return [[number for number, _ in seen[e]] for e in range(passes)], [[i for _, i in seen[e]] for e in range(passes)]


CASES = [(kind, streaming) for kind in ("parquet", "tar", "folder") for streaming in (True, False)]
CASES.remove(("folder", True))


@pytest.mark.parametrize(("kind", "streaming"), CASES)
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 3), (2, 1), (2, 0), (2, 3), (3, 2)])
def test_a_pass_is_every_image_exactly_once(data_sets, kind, streaming, world, workers):
    ranks = [open_stream(data_sets[kind], streaming, rank, world, workers)[0] for rank in range(world)]
    parts, ids = zip(*(read_passes(rank, 2) for rank in ranks), strict=True)
    for epoch in range(2):
        counted = Counter(number for part in parts for number in part[epoch])
        assert counted == Counter(range(sum(COUNTS)))
        # on disk the parts differ by one image at most, streams by one shard (the upper half of an id)
        sizes = [len({i >> 32 for i in part[epoch]} if streaming else part[epoch]) for part in ids]
        assert max(sizes) - min(sizes) <= 1
    assert parts[0][0] != parts[0][1], "every pass has an order of its own"


def test_shards_are_dealt_anew_in_every_pass(data_sets):
    stream, _ = open_stream(data_sets["tar"], True, rank=0, world=2)
    parts, _ = read_passes(stream, 6)
    assert len({frozenset(part) for part in parts}) > 2


def test_a_window_mixes_shards(data_sets):
    (part,), _ = read_passes(open_stream(data_sets["tar"], True)[0], 1)
    shard = [next(i for i in range(7) if n < sum(COUNTS[: i + 1])) for n in part]
    assert sum(a != b for a, b in pairwise(shard)) > len(part) / 3


def test_few_files_are_read_by_row_group(tmp_path):
    write_parquet(tmp_path, [57], group=10)
    parts = [read_passes(open_stream(tmp_path, True, rank, 3)[0], 1)[0][0] for rank in range(3)]
    assert Counter(n for part in parts for n in part) == Counter(range(57))
    assert all(len(part) in (17, 20) for part in parts)


@pytest.mark.parametrize(("kind", "streaming"), CASES)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_continues_from_its_place(data_sets, kind, streaming, workers):
    """From any place, in the middle of a window, of a chunk and across the end of a pass, and through JSON."""
    stream, _ = open_stream(data_sets[kind], streaming, workers=workers)
    batches, places = [], []
    for _ in range(50):
        places.append(json.dumps(stream.state_dict()))
        batches.append(next(stream))
    assert batches[-1]["ids"][0, 0] >= 1
    for at in (0, 1, 7, 21, 22, 40):
        again, _ = open_stream(data_sets[kind], streaming, workers=workers, state=json.loads(places[at]))
        for expected in batches[at : at + 8]:
            got = next(again)
            assert all(torch.equal(got[name], expected[name]) for name in ("ids", "numbers", "seeds"))
        assert json.dumps(again.state_dict()) == places[at + 8] if at + 8 < 50 else True


def test_order_on_disk_does_not_depend_on_workers(data_sets):
    one, three = (open_stream(data_sets["folder"], False, workers=w)[0] for w in (0, 3))
    for _ in range(30):
        assert torch.equal(next(one)["numbers"], next(three)["numbers"])


def test_two_ranks_see_the_global_batch_of_one(data_sets):
    whole, _ = open_stream(data_sets["folder"], False, batch_size=6)
    halves = [open_stream(data_sets["folder"], False, rank, 2, batch_size=3)[0] for rank in range(2)]
    for _ in range(17):
        batch = next(whole)
        parts = [next(half) for half in halves]
        assert sorted(batch["numbers"].tolist()) == sorted(torch.cat([p["numbers"] for p in parts]).tolist())
        pairs = lambda b: set(zip(b["numbers"].tolist(), b["seeds"].tolist(), strict=True))  # noqa: E731
        assert pairs(batch) == pairs(parts[0]) | pairs(parts[1]), "what is random about an image is the image's own"


class NumbersWithTargets:
    """Of images with targets: what is stacked, and what stays a list of tensors, dicts and words."""

    names, lists = ("numbers", "images", "targets"), ("images", "targets")

    def __call__(self, image, target, seed):
        number = number_of(image)
        image = image[:, : 1 + number % 3]
        return torch.tensor(number), image, {"target": target, "boxes": torch.full((number % 4, 4), 1.0 * number)}


@pytest.mark.parametrize(("streaming", "workers"), [(False, 0), (False, 2), (True, 2)])
def test_what_has_many_sizes_stays_a_list(data_sets, streaming, workers):
    """Beside what is stacked, in its order, over chunks and passes, from any number of loading processes."""
    args = DataArgs(dataset=str(data_sets["parquet"]), streaming=streaming, workers=workers, batch_size=5)
    source = open_source(args)
    source.targets = lambda row, image: f"of {number_of(image)}, {row['label']}"
    stream = Stream(source, NumbersWithTargets(), args, 3)
    assert stream.names == ("numbers", "images", "targets")
    seen = Counter()
    for _ in range(44):  # two passes of 108
        batch = next(stream)
        images, targets = to_device(batch["images"], CPU), to_device(batch["targets"], CPU)
        assert len(images) == len(targets) == 5
        for number, image, target in zip(batch["numbers"].tolist(), images, targets, strict=True):
            assert image.shape == (3, 1 + number % 3, 8) and number_of(image) == number
            assert target["target"] == f"of {number}, {number % 2}"
            assert torch.equal(target["boxes"], torch.full((number % 4, 4), 1.0 * number))
            seen[number] += 1
    assert set(seen) == set(range(sum(COUNTS))) and set(seen.values()) <= {2, 3}


def test_lists_are_taken_up_where_a_checkpoint_left_them(data_sets):
    args = DataArgs(dataset=str(data_sets["parquet"]), streaming=False, workers=0, batch_size=5)
    source = open_source(args)
    source.targets = lambda row, image: row["label"]
    streams = [Stream(source, NumbersWithTargets(), args, 3)]
    for _ in range(23):  # into the second pass, within a chunk
        next(streams[0])
    streams.append(Stream(source, NumbersWithTargets(), args, 3, state=json.loads(json.dumps(streams[0].state_dict()))))
    for _ in range(5):
        whole, continued = (next(stream) for stream in streams)
        assert torch.equal(whole["numbers"], continued["numbers"])
        assert [t["target"] for t in whole["targets"]] == [t["target"] for t in continued["targets"]]


def test_a_target_that_is_none_is_a_bad_file(tmp_path):
    """It is skipped and named as one whose image cannot be read."""
    source = open_source(DataArgs(dataset=str(write_parquet(tmp_path / "some", (200,))), streaming=False, workers=0))

    def targets(row, image):
        if number_of(image) == 7:
            raise ValueError("nothing is drawn on it")
        return None

    source.targets = targets
    (skipped,) = [name for chunk in one_pass(source, NumbersWithTargets(), 50, 0) for name in chunk["skipped"]]
    assert skipped.startswith("7.png (id ") and skipped.endswith(": nothing is drawn on it")


def test_seed_changes_order_and_augmentation(data_sets):
    a, b = (next(open_stream(data_sets["folder"], False, batch_size=50, seed=s)[0]) for s in (0, 1))
    assert a["numbers"].tolist() != b["numbers"].tolist()
    assert not set(a["seeds"].tolist()) & set(b["seeds"].tolist())


@pytest.mark.parametrize("kind", ["tar", "parquet", "folder"])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (2, 0), (0, 2)])
def test_another_number_of_workers_continues_exactly(data_sets, kind, before, after):
    """A stream keeps the division of the workers that it began with; on disk their number means nothing."""
    streaming = kind != "folder"
    stream, _ = open_stream(data_sets[kind], streaming, workers=before)
    batches = [next(stream)["ids"] for _ in range(7)]
    again, _ = open_stream(data_sets[kind], streaming, workers=after, state=stream.state_dict())
    for _ in range(30):
        batches.append(next(stream)["ids"])
        assert torch.equal(next(again)["ids"], batches[-1])
    assert again.state_dict()[0]["seen"] == stream.state_dict()[0]["seen"]


def test_another_division_of_a_stream_is_refused(data_sets):
    stream, _ = open_stream(data_sets["tar"], True, workers=2)
    next(stream)
    with pytest.raises(UserError, match="batch_size 5 -> 6"):
        open_stream(data_sets["tar"], True, workers=2, batch_size=6, state=stream.state_dict())
    with pytest.raises(UserError, match="parts 1 -> 2"):
        open_stream(data_sets["tar"], True, world=2, workers=2, state=stream.state_dict())


@pytest.mark.parametrize(("kind", "streaming"), [("parquet", True), ("tar", True), ("folder", False)])
def test_undecodable_files_are_skipped_counted_and_named(tmp_path, kind, streaming):
    bad = {40: b"", 200: b"<html>not found</html>", 333: png(333)[:20]}
    encode = lambda number: bad.get(number, png(number))  # noqa: E731
    write = {"parquet": lambda p: write_parquet(p, [200, 200], encode=encode),
             "tar": lambda p: write_tars(p, [200, 200], encode=encode),
             "folder": lambda p: write_folder(p, 400, encode=encode)}[kind]  # fmt: skip
    stream, _ = open_stream(write(tmp_path / kind), streaming, workers=2)
    (part,), _ = read_passes(stream, 1)
    assert sorted(part) == sorted(set(range(400)) - set(bad))
    assert stream.skipped >= 3
    for number in bad:
        assert any(f"{number}" in name for name in stream.skipped_names)


def test_more_than_one_percent_of_bad_files_stops_the_run(tmp_path):
    write_folder(tmp_path / "folder", 400, encode=lambda n: b"bad" if n % 50 == 0 else png(n))
    stream, _ = open_stream(tmp_path / "folder", False)
    message = r"of the \d+ files that this process read of .*/folder could not be used, more than 1 %"
    with pytest.raises(UserError, match=message):
        read_passes(stream, 1)


def test_num_images_is_counted(data_sets):
    for kind in ("parquet", "tar", "folder"):
        assert open_stream(data_sets[kind], kind != "folder")[1].num_images == sum(COUNTS)


def test_workers_are_at_most_shards(data_sets, capsys):
    stream, _ = open_stream(data_sets["tar"], True, world=2, workers=8)
    assert len(stream.parts[0].reader.loaders) == 3
    assert "shards: 7, processes: 2; loading workers of each process: 3 instead of 8" in capsys.readouterr().err


def error_of(**data):
    with pytest.raises(UserError) as caught:
        open_source(DataArgs(**data), data.pop("slots", 1))
    return str(caught.value)


def test_data_set_mistakes_are_named(data_sets, tmp_path):
    assert "no such folder" in error_of(dataset=str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert "holds no images, Parquet or .tar files" in error_of(dataset=str(tmp_path / "empty"))
    (tmp_path / "notes.txt").write_text("hello")
    assert "neither a folder nor" in error_of(dataset=str(tmp_path / "notes.txt"))
    parquet = str(data_sets["parquet"])
    assert "no split 'validation': it has train" in error_of(dataset=parquet, split="validation")
    assert "--image-column photo does not exist" in error_of(dataset=parquet, image_column="photo")
    assert f"the columns of {parquet} are image, label" in error_of(dataset=parquet, label_column="class")
    assert "--image-column label holds no images but" in error_of(dataset=parquet, image_column="label")
    assert "--dataset is empty" in error_of(dataset="")
    write_parquet(tmp_path / "none", [0])
    for streaming in (True, False):
        assert "holds no images" in error_of(dataset=str(tmp_path / "none"), streaming=streaming)
    with pytest.raises(UserError, match="has 7 shards, fewer than the 9 processes"):
        open_source(DataArgs(dataset=str(data_sets["tar"]), streaming=True, workers=0), 9)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train-00000.parquet").write_bytes(b"PAR1 this is not Parquet")
    assert "cannot be read" in error_of(dataset=str(tmp_path / "broken"), streaming=True)


@pytest.mark.parametrize(("form", "what"), [("folder", "images 24 -> 25"), ("parquet", "shards 3 -> 4")])
def test_data_that_changed_since_the_checkpoint_are_refused(tmp_path, form, what):
    if form == "folder":
        write_folder(tmp_path / "a", 24), write_folder(tmp_path / "b", 25)
    else:
        write_parquet(tmp_path / "a", (8, 8, 8), group=10), write_parquet(tmp_path / "b", (8, 8, 8, 1), group=10)
    stream, _ = open_stream(tmp_path / "a", True)
    next(stream)
    with pytest.raises(UserError, match=f"divides the data otherwise \\({what}\\)"):
        open_stream(tmp_path / "b", True, state=stream.state_dict())


def test_what_loads_rows_can_be_sent_to_a_new_process(data_sets):
    """As where processes are not forked: macOS, Python 3.14."""
    source = open_source(DataArgs(dataset=str(data_sets["folder"]), workers=0, batch_size=5))
    rows = RowChunks(source, Numbers(), 5, 3, 0, 1, 0)
    again = pickle.loads(pickle.dumps(rows))
    for j in (0, 21, 22):  # the 22nd chunk lies in two passes of 108 images
        assert torch.equal(rows[j]["ids"], again[j]["ids"])
    assert {epoch for epoch, _ in rows[21]["ids"].tolist()} == {0, 1} and rows.kept[0] == 1


PROGRAM = """
import sys
from engine.arguments import DataArgs
from engine.sources import open_source
from engine.stream import Stream
from images import Numbers
streams = []
for path in sys.argv[1:]:
    args = DataArgs(dataset=path, streaming=True, workers=2, batch_size=4)
    streams.append(Stream(open_source(args), Numbers(), args, 3))
    print(next(streams[-1])["ids"].shape)
raise ValueError("of its own")
"""


def test_a_program_that_ends_with_open_streams_ends(data_sets):
    """Of shards and of rows. Loading processes ignore the SIGTERM by which Python ends them: somebody else has to, and
    before it waits for them (what is imported first has its turn last)."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    command = [sys.executable, "-c", PROGRAM, str(data_sets["tar"]), str(data_sets["folder"])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path})
    assert run.stdout.count("torch.Size([4, 2])") == 2
    assert run.returncode == 1 and run.stderr.splitlines()[-1] == "ValueError: of its own"
