"""The size of ImageNet and beyond: what grows with the number of images, on data that are made up here.

    python bench/bench.py --only scale       all of it: under three minutes on two cores
    python bench/scale.py folder 1281167     one part, in this process: its last line is a JSON object

    folder N         open a folder of N (empty) files in class subfolders; again, once nothing has changed for a while
    groups N FILES   find the first row of some of N row groups of local Parquet files
    order N WORLD    memory of one loading process for the order of N images, dealt to WORLD processes, over two passes
    stream N SHARDS  N tiny images in Parquet shards: start, first batch, speed, memory, and going on in mid-pass
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the project's files are

from engine.arguments import DataArgs
from engine.errors import stop_workers
from engine.sources import Source, open_source
from engine.stream import RowChunks, ShardChunks, Stream

import io
import json
import multiprocessing
import os
import random
import subprocess
import tempfile
import time

import psutil
import torch
from PIL import Image

ROWS = (("folder", 20_000), ("folder", 300_000), ("groups", 500, 1), ("groups", 5_000, 1), ("groups", 12_936, 1),
        ("groups", 12_936, 100), ("order", 1_281_167, 1), ("order", 14_200_000, 1), ("order", 14_200_000, 8),
        ("order", 400_000_000, 64), ("stream", 1_000_000, 1_000))  # fmt: skip


class Pixel:
    """A view that costs nothing."""

    names = ("images",)

    def __call__(self, image, seed):
        return (image[:, :1, :1],)


def png(number, side=4):
    file = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256 % 256, 0)).save(file, "PNG")
    return file.getvalue()


def seconds_of(work):
    """Seconds, processor seconds, result."""
    start, processor = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - start, time.process_time() - processor, result


def memory(what="VmRSS"):
    """VmRSS or VmHWM, its peak, of this process in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def folder(root, count):
    """A thousand images a class, as in ImageNet."""
    for number in range(count):
        if number % 1000 == 0:
            of_class = root / "train" / f"n{number // 1000:08d}"
            of_class.mkdir(parents=True)
        os.close(os.open(f"{of_class}/n{number // 1000:08d}_{number}.JPEG", os.O_CREAT | os.O_WRONLY))
    for path in [*(root / "train").iterdir(), root / "train", root]:
        os.utime(path, (time.time() - 3600,) * 2)  # as if made an hour ago
    args = DataArgs(dataset=str(root), workers=0)
    import datasets  # noqa: F401 (which takes a while by itself)

    first, processor, source = seconds_of(lambda: open_source(args, labelled=True))
    again, _, _ = seconds_of(lambda: open_source(args, labelled=True))
    assert source.num_images == count and len(source.classes) == -(-count // 1000)
    return {"s": first, "processor_s": processor, "again_s": again}


def write_parquet(root, rows, shards, group):
    """Shards of rows that are all alike in a file: what they hold does not matter."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": png(n), "path": None} for n in range(rows // shards)], kind)
    table = pa.table({"image": images, "label": [n % 1000 for n in range(rows // shards)]})
    first = root / f"train-{0:05d}-of-{shards:05d}.parquet"
    pq.write_table(table, first, row_group_size=group)
    for number in range(1, shards):
        os.link(first, root / f"train-{number:05d}-of-{shards:05d}.parquet")


def groups(root, count, files):
    write_parquet(root, count // files * files, files, 1)
    source = open_source(DataArgs(dataset=str(root), streaming=True, workers=0))
    chunks = ShardChunks(source, Pixel(), 256, 0, 0, 1, 0, 1, 1, 1)
    some = random.Random(0).sample(range(count // files * files), 50)
    next(iter(chunks.read(some[0], 0)))
    seconds, processor, _ = seconds_of(lambda: [next(iter(chunks.read(shard, 0))) for shard in some])
    return {"ms": 1000 * seconds / len(some), "processor_ms": 1000 * processor / len(some)}


class Many:
    """So many rows, all alike."""

    def __init__(self, count):
        self.count, self.row = count, {"image": {"bytes": png(0), "path": None}}

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return self.row


def order(root, count, world):
    keyed = {"keyed": True} if count > 2**24 and hasattr(RowChunks, "row") else {}
    rows = RowChunks(Source(Many(count), "image", None, count, "made up"), Pixel(), 1, 0, 0, world, **keyed)
    RowChunks(Source(Many(9), "image", None, 9, "made up"), Pixel(), 1, 0, 0, 1)[0]  # what it imports
    before = memory()
    seconds, _, _ = seconds_of(lambda: rows[0])
    held = memory() - before
    last = rows.length - 1
    rows[last], rows[last + 1]
    return {"s": seconds, "held_mb": held, "peak_mb": memory("VmHWM") - before}


def stream(root, count, shards):
    write_parquet(root, count, shards, 100)
    args = DataArgs(dataset=str(root), streaming=True, workers=2, batch_size=256)
    start, _, source = seconds_of(lambda: open_source(args))
    reading = Stream(source, Pixel(), args, 0)
    first, _, _ = seconds_of(lambda: next(reading))
    batches = max(1, min(100, count // 2560))
    seconds, _, _ = seconds_of(lambda: [next(reading) for _ in range(batches)])
    workers = [psutil.Process(child.pid) for child in multiprocessing.active_children()]
    used = [process.memory_full_info().pss / 2**20 for process in (psutil.Process(), *workers)]
    while reading.parts[0].taken or reading.parts[0].reader.position["read"] < count // 20:
        next(reading)  # into the pass, and across the middle of a chunk
    state = json.loads(json.dumps(reading.state_dict()))
    expected = next(reading)["ids"]
    on, _, batch = seconds_of(lambda: next(Stream(open_source(args), Pixel(), args, 0, state=state)))
    assert torch.equal(batch["ids"], expected)
    stop_workers()
    return {"start_s": start, "first_batch_s": first, "images_per_second": batches * args.batch_size / seconds,
            "main_mb": used[0], "worker_mb": sum(used[1:]) / len(used[1:]), "goes_on_s": on}  # fmt: skip


PARTS = {"folder": folder, "groups": groups, "order": order, "stream": stream}


def measure_all(rows=ROWS, report=print):
    """{part and numbers: what it measured, or what failed}, each in a process of its own; a line for each."""
    found = {}
    for name, *numbers in rows:
        command = [sys.executable, __file__, name, *map(str, numbers)]
        done = subprocess.run(command, capture_output=True, text=True)
        title = " ".join([name, *(f"{number:,}" for number in numbers)])
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["killed"]
        found[title] = json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1]}
        report(title.ljust(26) + "  ".join(f"{key} {value:,.{2 if value < 10 else 0}f}" if key != "error" else value
                                           for key, value in found[title].items()), flush=True)  # fmt: skip
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        os.environ.setdefault("HF_DATASETS_CACHE", f"{place}/cache")  # read when datasets is imported
        print(json.dumps(PARTS[sys.argv[1]](Path(place, "data"), *map(int, sys.argv[2:]))))
