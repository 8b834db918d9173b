"""Data streams: endless shuffled batches with an exact place. `next(stream)` and `state_dict()` are the interface.

A rank's stream is its part of pass 0, then of pass 1, and so on; it never ends and drops nothing. Workers send chunks:
up to a batch of prepared images, fewer where a file could not be decoded or a pass ends. The training process joins
chunks to batches. Every chunk says at which position its worker stands "after" it.
"""

from engine.arguments import DataArgs, ImagesArgs
from engine.errors import (
    STOP_SIGNALS,
    BadFilesError,
    LoadingError,
    ServerGoneError,
    UserError,
    first_line,
    share_temporary_folder,
)
from engine.images import decode, view_of_part
from engine.network import NetworkError, Outage
from engine.seeds import KeyedPermutation, permutation, seed_of
from engine.sources import read_image

import copy
import itertools
import math
import signal
import sys

import torch
from torch.utils.data import DataLoader, default_collate

IN_MEMORY = 2**24  # images whose order each loading process holds, 4 bytes each; of more it is computed
ROWS_AT_ONCE = 32


def load_chunk(source, view, seed, wanted):
    """Read and decode images, and make a view of each. wanted: (pass, image id, row) triples -> chunk.

    A chunk has one list for each of view.names, "ids" [(pass, image id)], "labels" where the source has classes, and
    "skipped": what could not be decoded or has no label. What the other side of --val-fraction has is left out. A view
    of images with targets is called with both; what it gives by a name in view.lists (images of many sizes) is not
    stacked.
    """
    lists = getattr(view, "lists", ())
    labelled = ("labels",) if source.classes else ()
    chunk = {name: [] for name in (*view.names, "ids", *labelled, "skipped")}
    for epoch, image_id, row in wanted:
        path, image_seed = None, seed_of(seed, epoch, image_id)
        try:
            image = row[source.image_column]
            path = image and image.get("path")
            data = read_image(image, source.name, source.patience)
            if not source.has(data):
                continue
            views = view_of_part(view, data, image_seed)
            tensor = decode(data) if views is None else None
            label = torch.tensor(source.label(row)) if labelled else None
            if source.targets:
                views = view(tensor, source.targets(row, tensor), image_seed)
        except ServerGoneError:
            raise
        except Exception as error:  # decoders raise whatever they like
            chunk["skipped"].append(f"{path or 'image'} (id {image_id}): {first_line(error)}")
            continue
        for name, value in zip(view.names, views or view(tensor, image_seed), strict=True):
            chunk[name].append(by_value(value) if name in lists else value)
        if labelled:
            chunk["labels"].append(label)
        chunk["ids"].append(torch.tensor([epoch, image_id]))
    # in a loading process default_collate stacks straight into the memory that the training process takes them from
    return {name: default_collate(values) if values and name not in ("skipped", *lists) else values
            for name, values in chunk.items()}  # fmt: skip


def by_value(value):
    """Tensors in dicts as numpy's arrays, which are sent as they are: each tensor would take a file of the few that a
    process may open."""
    if isinstance(value, dict):
        return {name: by_value(part) for name, part in value.items()}
    return value.numpy() if isinstance(value, torch.Tensor) else value


class RowChunks(torch.utils.data.Dataset):
    """Data on disk: chunk j of a rank's rows, which are every world-th of a pass from the r-th on, so that the parts
    differ by at most one image. With a seed they go on for ever, each pass a permutation keyed by (seed, pass), which
    is computed number by number if `keyed`; without, they are one pass in the order of the data."""

    def __init__(self, source, view, size, seed, rank, world, first_pass=0, keyed=False):
        self.source, self.view, self.size, self.seed = source, view, size, seed
        self.rank, self.world, self.first_pass, self.keyed = rank, world, first_pass, keyed
        self.length = len(range(rank, len(source.data), world))
        self.kept = None, None  # a pass and its order

    def row(self, epoch, i):
        """The i-th row of this rank in a pass."""
        if self.seed is None:
            return self.rank + i * self.world
        if epoch != self.kept[0]:
            self.kept = None, None  # before another is made: in a process of its own, each takes 4 bytes an image
            make = KeyedPermutation if self.keyed else permutation
            order = make(self.source.num_images, self.seed, epoch)
            if not self.keyed and self.world > 1:
                order = order[self.rank :: self.world].clone()
            self.kept = epoch, order
        return int(self.kept[1][self.rank + i * self.world if self.keyed else i])

    def __getitem__(self, j):
        end = (j + 1) * self.size if self.seed is not None else min((j + 1) * self.size, self.length)
        positions = [divmod(i, self.length) for i in range(j * self.size, end)]
        rows = [(self.first_pass + epoch, self.row(self.first_pass + epoch, i)) for epoch, i in positions]
        return {**load_chunk(self.source, self.view, self.seed or 0, self.read(rows)), "after": j + 1}

    def read(self, rows):
        """(pass, row) pairs -> with what is there. Of datasets in pieces: a tenth of the time of one by one."""
        data = self.source.data
        several = getattr(data, "__getitems__", None) or (lambda numbers: [data[number] for number in numbers])
        for start in range(0, len(rows), ROWS_AT_ONCE):
            piece = rows[start : start + ROWS_AT_ONCE]
            yield from ((*place, row) for place, row in zip(piece, several([row for _, row in piece]), strict=True))


class ShardChunks(torch.utils.data.IterableDataset):
    """Streams: the chunks of one worker, pass after pass; an empty chunk marked "end" closes each pass.

    Shards are assigned anew for every pass: of a permutation keyed by (seed, pass), rank r takes every world-th shard
    from the r-th on, and worker w of them every workers-th. A worker reads `interleave` shards in turn and shuffles
    within windows, by a permutation keyed by (seed, pass, first image of the window): the whole state is a position.
    """

    def __init__(self, source, view, size, seed, rank, world, worker, workers, window, interleave):
        self.source, self.view, self.size, self.seed = source, view, size, seed
        self.rank, self.world, self.worker, self.workers = rank, world, worker, workers
        self.window, self.interleave = window, interleave
        self.start = self.beginning(0)

    def beginning(self, epoch):
        return {"epoch": epoch, "open": [], "next": 0, "turn": 0, "offset": 0}

    def shards(self, epoch):
        """Numbers of the shards that this worker reads in a pass, in order."""
        order = permutation(self.source.num_shards, self.seed, epoch)[: self.source.most_shards]
        return order[self.rank :: self.world][self.worker :: self.workers].tolist()

    def rows(self, shard, row):
        """The rows of a shard from `row` on; where the network fails, the shard is opened anew at the row that comes
        next. Raises ServerGoneError, and BadFilesError for a shard that cannot be read."""
        outage = Outage(self.source.name, self.source.patience)
        while True:
            try:
                for example in self.read(shard, row):
                    outage.over()
                    yield example
                    row += 1
                return
            except Exception as error:  # every reader has its own way to refuse a file
                passing = outage.doubted(error)
                if not isinstance(passing, NetworkError):
                    raise BadFilesError(
                        f"shard {shard} of data set {self.source.name} cannot be read beyond its row {row}: "
                        f"{first_line(error)}{self.source.file_of(shard)}"
                    ) from error
                outage.wait(passing)

    def read(self, shard, row):
        """A Parquet file is read from the row group of `row` on, anything else from its beginning."""
        import fsspec
        import pyarrow.parquet as pq

        if self.source.row_groups:
            return self.source.row_groups.read(shard, row)
        data = self.source.data.shard(num_shards=self.source.num_shards, index=shard)
        if not row or not self.source.files:
            return iter(data.skip(row) if row else data)
        with fsspec.open(self.source.files[shard], "rb") as file:
            footer = pq.read_metadata(file)
        group = 0
        while group < footer.num_row_groups and footer.row_group(group).num_rows <= row:
            row -= footer.row_group(group).num_rows
            group += 1
        groups = data.reshard()
        rest = [groups.shard(num_shards=groups.num_shards, index=i) for i in range(group, groups.num_shards)]
        return itertools.islice(itertools.chain.from_iterable(rest), row, None)

    def windows(self, epoch, start):
        """The rest of a pass: (position of the window, [(image id, row)]), where an image's id is shard << 32 | row."""
        shards, current, following = self.shards(epoch), start["turn"], start["next"]
        opened = [[k, row, self.rows(shards[k], row)] for k, row in start["open"]]
        while True:
            position = {"epoch": epoch, "open": [[k, row] for k, row, _ in opened], "next": following, "turn": current}
            window = []
            while len(window) < self.window and (opened or following < len(shards)):
                while len(opened) < self.interleave and following < len(shards):
                    opened.append([following, 0, self.rows(shards[following], 0)])
                    following += 1
                current %= len(opened)
                k, row, rows = opened[current]
                example = next(rows, None)
                if example is None:
                    del opened[current]
                else:
                    window.append((shards[k] << 32 | row, example))
                    opened[current][1] += 1
                    current += 1
            if not window:
                return
            yield position, window

    def __iter__(self):
        try:
            yield from self.chunks()
        except (ServerGoneError, BadFilesError) as error:  # raised by whoever takes it, without a worker's traceback
            yield {"failed": error}

    def chunks(self):
        start = self.start
        for epoch in itertools.count(start["epoch"]):
            wanted, after, offset = [], start, start["offset"]
            for position, window in self.windows(epoch, start):
                order = permutation(len(window), self.seed, epoch, window[0][0]).tolist()
                for i in range(offset, len(window)):
                    wanted.append((epoch, *window[order[i]]))
                    after = {**position, "offset": i + 1}
                    if len(wanted) == self.size:
                        yield {**load_chunk(self.source, self.view, self.seed, wanted), "after": after}
                        wanted = []
                offset = 0
            if wanted:
                yield {**load_chunk(self.source, self.view, self.seed, wanted), "after": after}
            start = self.beginning(epoch + 1)
            yield {"end": True, "after": start}


class ChunkReader:
    """The chunks of one part of the data, from its loading processes: `next_chunk()`, None where a pass ends.

    Data on disk: one DataLoader, whose chunks arrive in order whatever the number of its workers. Streams: a DataLoader
    for each worker; they are asked in turn, without those whose part of the pass has ended, until it has ended for
    all. (One DataLoader over several workers would let those with fewer shards run ahead into the next pass.)

    `position` is where the next chunk begins, in plain numbers: "places" of the loaders, "turn" of the one that is
    asked next, "ended" ones, images "read" and "skipped" so far.
    """

    def __init__(self, source, view, data, seed, part, parts, position=None, first_pass=0, readers=None, keyed=False):
        import torchvision.io  # noqa: F401 (here, or each loading process would import it for itself)

        share_temporary_folder()
        self.source, self.in_process = source, not data.workers
        # images of a pass by which bad files are judged: of this part or, in an evaluation, of all
        self.images = max(1, (source.num_images or 1000) // (1 if seed is None else parts))
        options = dict(batch_size=None, prefetch_factor=2 if data.workers else None, worker_init_fn=ignore_signals)
        if source.streaming:
            readers = readers or num_readers(source, data.workers, parts)
            shuffling = (data.shuffle_window, data.interleave) if seed is not None else (data.batch_size, 1)
            chunks = [ShardChunks(source, view, data.batch_size, seed or 0, part, parts, reader, readers, *shuffling)
                      for reader in range(readers)]  # fmt: skip
            beginnings = [reader.beginning(first_pass) for reader in chunks]
        else:
            rows = RowChunks(source, view, data.batch_size, seed, part, parts, first_pass, keyed)
            beginnings = [0]
        self.position = position or {"places": beginnings, "ended": [], "turn": 0, "read": 0, "skipped": 0}
        if source.streaming:
            for reader, start in zip(chunks, self.position["places"], strict=True):
                reader.start = start
            self.loaders = [iter(DataLoader(c, num_workers=min(data.workers, 1), **options)) for c in chunks]
        else:
            (start,) = self.position["places"]
            order = range(math.ceil(rows.length / data.batch_size)) if seed is None else itertools.count(start)
            self.loaders = [iter(DataLoader(rows, sampler=order, num_workers=data.workers, **options))]

    def next_chunk(self):
        """Raises BadFilesError for too many bad files, ServerGoneError, LoadingError for a killed loading process."""
        position = self.position
        while position["turn"] in position["ended"]:
            position["turn"] = (position["turn"] + 1) % len(self.loaders)
        reader = position["turn"]
        try:
            chunk = next(self.loaders[reader])
        except StopIteration:  # data on disk, one pass
            return None
        except (RuntimeError, OSError, EOFError) as error:
            if self.in_process or str(error).startswith("Caught "):  # raised by what a loading process does
                raise
            raise LoadingError(f"a loading process was killed; is there enough memory? {first_line(error)}") from error
        if "failed" in chunk:
            raise chunk["failed"]
        position["places"][reader] = chunk.pop("after")
        position["turn"] = (reader + 1) % len(self.loaders)
        if "end" in chunk:
            last = len(position["ended"]) + 1 == len(self.loaders)
            position["ended"] = [] if last else position["ended"] + [reader]
            return None if last else self.next_chunk()
        position["read"] += len(chunk["ids"]) + len(chunk["skipped"])
        position["skipped"] += len(chunk["skipped"])
        # of small data whole passes count, since each meets the same bad files
        read = position["read"]
        read = math.ceil(read / self.images) * self.images if self.images < 1000 else max(read, 1000)
        if position["skipped"] > 0.01 * read:
            raise BadFilesError(
                f"{position['skipped']} of the {position['read']} files that this process read of {self.source.name} "
                f"could not be used, more than 1 %: repair or remove them; the last was {chunk['skipped'][-1]}"
            )
        return chunk


def num_readers(source, workers, parts):
    """Loading processes for one part of a stream: one without a shard would idle, so there are never more of them than
    the poorest part has shards."""
    return max(1, min(workers, source.num_shards // parts))


def ignore_signals(worker):
    """Loading processes leave signals to the process that they load for, until it ends them; and say nothing if that
    one stops in the middle of taking a batch from them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    before = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, ConnectionError) else before(kind, *rest)


def one_pass(source, view, batch_size, workers, rank=0, world=1):
    """The chunks of one pass over this rank's part, for evaluation: every image once, nothing added to fill a batch.
    Parts may differ in size or be empty, so nothing in such a pass may wait for another rank. Raises what
    ChunkReader.next_chunk raises."""
    reader = ChunkReader(source, view, ImagesArgs(batch_size=batch_size, workers=workers), None, rank, world)
    while (chunk := reader.next_chunk()) is not None:
        yield chunk


def sample(source, view, count, seed, workers=0):
    """So many images drawn at random (all, if there are fewer), as a batch of a Stream: the same for the same seed, on
    any number of cores. Raises what ChunkReader.next_chunk raises."""
    data = DataArgs(batch_size=min(count, source.num_images or count), workers=workers, parts=1)
    if source.streaming:  # one reader, of shards of which each may hold a single class
        data.workers, data.interleave = min(workers, 1), min(max(data.interleave, source.num_shards), 16)
    batch = next(Stream(source, view, data, seed))
    is_first = batch["ids"][:, 0] == 0  # where there are fewer than was thought, the others would come again
    return {name: values[is_first] for name, values in batch.items()}


def join(pieces):
    """Tensors, or lists, one after the other."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces) if isinstance(pieces[0], torch.Tensor) else [value for piece in pieces for value in piece]


class Part:
    """One part of every pass as an endless stream of batches. `state_dict()` is a position from which another Part
    continues with the very next image, in the division that the first one had."""

    def __init__(self, source, view, data, seed, part, parts, state=None, first_pass=0):
        self.size = data.batch_size
        old = state["layout"] if state else {}
        first_pass = old.get("first_pass", first_pass)
        self.layout = {"streaming": source.streaming, "parts": parts, "batch_size": self.size, "first_pass": first_pass}
        self.layout |= {"shards": source.num_shards} if source.streaming else {"images": source.num_images}
        readers, keyed = None, False
        if not source.streaming and source.num_images > IN_MEMORY and old.get("keyed", not old):
            keyed = self.layout["keyed"] = True  # runs from before keep their order
        if source.streaming:
            readers = self.layout["workers"] = old.get("workers", num_readers(source, data.workers, parts))
            if part == 0 and readers != data.workers and data.workers:
                why = "as the run began" if old else f"shards: {source.num_shards}, processes: {parts}"
                print(f"{why}; loading workers of each process: {readers} instead of {data.workers}", file=sys.stderr)
        state = state or {"layout": self.layout, "taken": 0, "pass": first_pass, "seen": 0}
        if state["layout"] != self.layout:
            changes = [f"{k} {old.get(k)} -> {v}" for k, v in self.layout.items() if old.get(k) != v]
            raise UserError(
                f"the checkpoint divides the data otherwise ({', '.join(changes)}): keep the old values and --workers; "
                "if the data are others now, another --seed with --resume-changed begins them anew"
            )
        self.epoch, self.seen = state["pass"], state["seen"]  # of the last image; a fingerprint of all so far, in order
        position = {k: state[k] for k in ("places", "ended", "turn", "read", "skipped")} if "places" in state else None
        self.reader = ChunkReader(source, view, data, seed, part, parts, position, first_pass, readers, keyed)
        self.buffer, self.buffered, self.taken, self.skipped_names = [], 0, 0, []
        while self.buffered < state["taken"]:
            self._fill()
        self.taken, self.buffered = state["taken"], self.buffered - state["taken"]
        self.skipped_names = []  # named before the checkpoint

    @property
    def skipped(self):
        """Files that could not be used, so far."""
        return self.reader.position["skipped"]

    def state_dict(self):
        """The position before the next image: plain numbers, fit for JSON."""
        position = self.buffer[0][0] if self.buffer else self.reader.position
        more = {"layout": self.layout, "taken": self.taken, "pass": self.epoch, "seen": self.seen}
        return copy.deepcopy({**more, **position})

    def _fill(self):
        """Append the next chunk to the buffer, with the position before it."""
        before = copy.deepcopy(self.reader.position)
        chunk = self.reader.next_chunk()
        if chunk is None:
            if not self.reader.position["read"]:
                raise BadFilesError("the shards of this process hold no images at all")
            return
        self.skipped_names += chunk.pop("skipped")
        if len(chunk["ids"]):
            self.buffer.append((before, chunk))
            self.buffered += len(chunk["ids"])

    def __next__(self):
        while self.buffered < self.size:
            self._fill()
        pieces, missing = [], self.size
        while missing:
            chunk = self.buffer[0][1]
            piece = {name: values[self.taken : self.taken + missing] for name, values in chunk.items()}
            pieces.append(piece)
            missing -= len(piece["ids"])
            self.taken += len(piece["ids"])
            if self.taken == len(chunk["ids"]):
                self.buffer.pop(0)
                self.taken = 0
        self.buffered -= self.size
        batch = {name: join([piece[name] for piece in pieces]) for name in pieces[0]}
        self.epoch = int(batch["ids"][-1, 0])
        self.seen = seed_of(self.seen, batch["ids"].numpy().tobytes())
        return batch


class Stream:
    """A process's endless stream of batches: `next(stream)` -> {"images": uint8 (b, 3, S, S), ..., "ids": (b, 2)}, with
    a tensor for each of view.names, or a list for one of view.lists.

    A pass is divided into `data.parts` parts (None: one for each process). A process that carries several of them,
    since a run goes on with fewer processes than it began with, gives a batch of each in turn: what the run sees stays
    the same. `part` is the number of the one that the last batch came from. `state_dict()` is {part: state}, from
    which another Stream continues with the very next image.
    """

    def __init__(self, source, view, data, seed, rank=0, world=1, state=None, first_pass=0):
        self.names = (*view.names, *(("labels",) if source.classes else ()))
        states = {int(part): part_state for part, part_state in (state or {}).items()}
        parts = data.parts or world
        self.parts = {part: Part(source, view, data, seed, part, parts, states.get(part), first_pass)
                      for part in range(rank, parts, world)}  # fmt: skip
        self.part_cycle = itertools.cycle(self.parts)
        self.part = None

    def __next__(self):
        self.part = next(self.part_cycle)
        return next(self.parts[self.part])

    def state_dict(self):
        return {part: stream.state_dict() for part, stream in self.parts.items()}

    @property
    def skipped(self):
        """Files that could not be used, so far."""
        return sum(stream.skipped for stream in self.parts.values())

    @property
    def skipped_names(self):
        """Those of them that have not been reported yet."""
        return [name for stream in self.parts.values() for name in stream.skipped_names]

    def reported(self):
        """The names of skipped files have been passed on."""
        for stream in self.parts.values():
            stream.skipped_names = []
