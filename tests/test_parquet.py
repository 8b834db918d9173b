"""Parquet on disk: row groups are what datasets makes of them, and a file that does not belong is named."""

from engine.arguments import DataArgs
from engine.errors import UserError
from engine.parquet import RowGroups, footer
from engine.sources import open_source
from engine.stream import Stream

import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from images import Numbers, png, write_parquet

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image(kind, number):
    data = png(number)
    return {"bytes": data, "path": f"{number}.png"} if pa.types.is_struct(kind) else data


def write_files(folder, counts, kind, label, group=7, order=("image", "note", "label")):
    """Files of so many rows each with a column that nobody reads."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for i, count in enumerate(counts):
        numbers = range(number, number + count)
        columns = {"image": pa.array([image(kind, n) for n in numbers], kind),
                   "note": pa.array([f"note {n}" for n in numbers]),
                   "label": pa.array([label[0](n) for n in numbers], label[1])}  # fmt: skip
        table = pa.table({name: columns[name] for name in (order if i else sorted(order))})
        pq.write_table(table, folder / f"train-{i:05d}.parquet", row_group_size=group)
        number += count
    return folder


KINDS = [(IMAGE, (lambda n: n % 5, pa.int64())), (pa.binary(), (lambda n: f"class {n % 5}", pa.string())),
         (pa.large_binary(), (lambda n: n % 5, pa.uint8())),
         (pa.struct([("path", pa.string()), ("bytes", pa.binary())]),
          (lambda n: None if n % 9 == 4 else n, pa.int32()))]  # fmt: skip


@pytest.mark.parametrize(("kind", "label"), KINDS)
def test_row_groups_are_those_of_datasets(tmp_path, kind, label):
    """Every row group from any of its rows on, also beside files without one, or with other orders of columns."""
    write_files(tmp_path, (40, 7, 1, 100), kind, label)
    table = pq.read_table(tmp_path / "train-00001.parquet")
    pq.ParquetWriter(tmp_path / "train-00001b.parquet", table.schema).close()
    assert footer(str(tmp_path / "train-00001b.parquet")).num_row_groups == 0
    source = open_source(DataArgs(dataset=str(tmp_path), streaming=True, workers=0, image_column="image"))
    data = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    data = data.cast_column("image", datasets.Image(decode=False)).select_columns(["image", "label"]).reshard()
    assert source.num_shards == data.num_shards > 20 and source.num_images == 148
    for shard in range(data.num_shards):
        expected = list(data.shard(num_shards=data.num_shards, index=shard))
        assert list(source.row_groups.read(shard)) == expected
        assert list(source.row_groups.read(shard, 3)) == expected[3:]
        assert list(source.row_groups.read(shard, len(expected))) == []


def test_files_without_rows(tmp_path):
    """One with an empty row group, where datasets fails; in whatever place."""
    for where, counts in (("first", (0, 9, 9)), ("second", (9, 0, 9))):
        args = DataArgs(dataset=str(write_files(tmp_path / where, counts, *KINDS[0])), streaming=True, workers=0)
        source = open_source(args)
        assert [row["image"]["path"] for row in source.row_groups] == [f"{n}.png" for n in range(18)]
        args.streaming = False
        with pytest.raises(UserError, match=rf"train-0000{counts.index(0)}.parquet has no rows"):
            open_source(args)


def test_a_large_row_group_is_read_from_any_row(tmp_path):
    """It is decoded piece by piece."""
    write_files(tmp_path, (300,), *KINDS[0], group=150)
    groups = open_source(DataArgs(dataset=str(tmp_path), streaming=True, workers=0)).row_groups
    whole = [row["image"]["path"] for row in groups.read(1)]
    assert whole == [f"{n}.png" for n in range(150, 300)]
    for row in (1, 31, 32, 33, 64, 149, 150):
        assert [r["image"]["path"] for r in groups.read(1, row)] == whole[row:]


def test_a_shard_is_found_by_its_file():
    groups = RowGroups([], [], datasets.Features())
    chance, files = random.Random(0), []
    for number in range(50):
        files += [(f"file {number}", group) for group in range(chance.choice((0, 1, 3, 40)))]
        groups.files.append(f"file {number}")
        groups.ends.append(len(files))
    assert groups.num_shards == len(files) > 100
    assert [groups.place(shard) for shard in range(groups.num_shards)] == files


def test_images_keep_their_numbers(tmp_path):
    """Those that datasets' row groups gave them: a run that was begun with these goes on."""
    write_parquet(tmp_path, (20, 25), group=10)
    args = DataArgs(dataset=str(tmp_path), streaming=True, workers=0, batch_size=45)
    batch = next(Stream(open_source(args), Numbers(), args, seed=3))
    data = datasets.load_dataset(str(tmp_path), split="train", streaming=True).decode(False).reshard()
    expected = {}
    for shard in range(data.num_shards):
        for row, example in enumerate(data.shard(num_shards=data.num_shards, index=shard)):
            expected[shard << 32 | row] = example["image"]["bytes"]
    found = dict(zip(batch["ids"][:, 1].tolist(), batch["numbers"].tolist(), strict=True))
    assert {image: png(number) for image, number in found.items()} == expected


def broken(folder, what):
    """Three files, of which the second is broken."""
    write_files(folder, (10, 10, 10), *KINDS[0])
    file = folder / "train-00001.parquet"
    if what == "empty":
        file.write_bytes(b"")
    elif what == "cut short":
        file.write_bytes(file.read_bytes()[:-30])
    elif what == "no image":
        pq.write_table(pa.table({"label": [1, 2]}), file)
    elif what == "other image":
        pq.write_table(pa.table({"image": [1.5, 2.5], "note": ["", ""], "label": [1, 2]}), file)
    return file


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("what", "message"), [
    ("empty", "cannot be read: Parquet file size is 0 bytes"),
    ("cut short", "cannot be read: Parquet magic bytes not found"),
    ("no image", "has no column image, which other files of its split have: its columns are label"),
    ("other image", "has columns of another kind than other files of its split: "),
])  # fmt: skip
def test_a_file_that_does_not_belong_is_named(tmp_path, what, message, streaming):
    file = broken(tmp_path, what)
    with pytest.raises(UserError) as caught:
        open_source(DataArgs(dataset=str(tmp_path), streaming=streaming, workers=0))
    assert f"{file} {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_so_is_the_first(tmp_path):
    write_files(tmp_path, (10, 10), *KINDS[0])
    (tmp_path / "train-00000.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-00000.parquet cannot be read: Parquet file size is 0 bytes"):
        open_source(DataArgs(dataset=str(tmp_path), streaming=True, workers=0))


def test_a_file_that_was_written_anew_is_read_anew(tmp_path):
    write_files(tmp_path, (10,), *KINDS[0])
    (file,) = tmp_path.iterdir()
    assert footer(str(file)).num_rows == 10
    write_files(tmp_path, (25,), *KINDS[0])
    assert footer(str(file)).num_rows == 25
