"""A folder of images, listed in one go with os.scandir: 1.3 million files in seconds. datasets, which matches 66
patterns with every file, takes a quarter of an hour at every start.

What comes out is what datasets makes of the same folder: splits, order, class names, columns. A folder with more in it
(metadata, tables, archives, settings, links to folders, splits told by file names) is left to datasets.
"""

from engine.errors import speaks_for_others
from engine.files import publish

import hashlib
import json
import os
import re
import time
from collections import Counter
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
IGNORED = {"", ".db", ".ini", ".md5", ".txt"}  # of files that mean nothing to datasets beside images
KINDS = IMAGES | IGNORED
SHARDED = re.compile(r"-\d{5}-of-\d{5}")  # of names in data/ that datasets looks for first
# datasets' words for splits: a folder whose name is one of them, begins, ends or goes on with it after one of "-._ 0-9"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
WORD = "|".join(word for words in SPLITS.values() for word in words)
SHAPES = ("{word}", "{word}[-._ 0-9].*", ".*[-._ 0-9]{word}", ".*[-._ 0-9]{word}[-._ 0-9].*")
PATTERNS = {split: [re.compile(shape.format(word=word), re.DOTALL) for word in words for shape in SHAPES]
            for split, words in SPLITS.items()}  # fmt: skip
SPLIT_IN_FILE = re.compile(rf"(?:^|[-._ 0-9])(?:{WORD})[-._ 0-9]")
SETTLED = 2e9  # nanoseconds after which a further change of a folder shows in its time


class NotCoveredError(Exception):
    """A folder that is left to datasets."""


class ImageFolder:
    """A listed folder, as much of a builder of datasets as open_source asks for. Raises NotCoveredError, and OSError
    for what cannot be listed.

    The list is kept in datasets' cache, as an Arrow file that all processes map instead of holding it. The first
    process of a machine looks at the times of the folders, and lists them anew if one has changed; the others take its
    list.
    """

    name = "imagefolder"

    def __init__(self, root):
        import datasets

        root = Path(root).expanduser().resolve()
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "image_folders"
        file = cache / f"{hashlib.blake2b(os.fsencode(root), digest_size=16).hexdigest()}.arrow"
        listing, table = read_listing(file), None
        if listing is None or not is_current(root, listing, must_be_settled=speaks_for_others()):
            table = list_folder(root)
            listing = listing_of(table.schema)
            with suppress(OSError):  # a full or read-only cache: in memory then
                write_listing(file, table)
                if read_listing(file) == listing:  # not another process's
                    table = None
        if table is None:
            self.data = datasets.Dataset.from_file(str(file))
        else:
            self.data = datasets.Dataset(datasets.table.InMemoryTable(table))
        self.splits = listing["splits"]

    def as_dataset(self, split):
        return self.data.select(range(*self.splits[split]))

    def as_streaming_dataset(self):
        return {split: self.as_dataset(split).to_iterable_dataset() for split in self.splits}

    def download_and_prepare(self):
        """Everything is there."""


def list_folder(root):
    """The Arrow table of a folder, in whose metadata the listing is. Raises NotCoveredError and OSError."""
    import datasets
    import pyarrow as pa

    began = time.time_ns()
    files, folders = scan(root)
    splits = splits_of(files)
    names = class_names(splits, root.name)
    rows = [path for paths in splits.values() for path in paths]
    ends = [0, *accumulate(map(len, splits.values()))]
    listing = {"splits": dict(zip(splits, pairwise(ends), strict=True)),
               "folders": folders, "listed": began}  # fmt: skip
    features = {"image": datasets.Image(decode=False)}
    prefix = "" if root == Path("/") else root.as_posix()
    try:
        paths = pa.array([f"{prefix}/{path}" for path in rows], pa.string())
    except UnicodeEncodeError:
        raise NotCoveredError from None
    columns = [pa.StructArray.from_arrays([pa.nulls(len(rows), pa.binary()), paths], ["bytes", "path"])]
    if names:
        number = {name: i for i, name in enumerate(names)}
        columns.append(pa.array([number[label_of(path.rpartition("/")[0], root.name)] for path in rows], pa.int64()))
        features["label"] = datasets.ClassLabel(names=names)
    schema = datasets.Features(features).arrow_schema
    return pa.table(columns, schema.with_metadata({**schema.metadata, "listing": json.dumps(listing)}))


def scan(root):
    """{folder: names of its files} of a tree without what is hidden, and {folder: its time in nanoseconds}. A folder is
    named from the root on and ends with "/"; the root is "". Raises NotCoveredError and OSError."""
    files, times, left = {}, {}, [""]
    while left:
        folder = left.pop()
        path, names = os.path.join(root, folder), []
        times[folder] = os.stat(path).st_mtime_ns  # before it is listed: a change in between shows
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    if not name.strip(".") or (folder == "" and name.startswith(".huggingface")):  # settings
                        raise NotCoveredError
                elif entry.is_file(follow_symlinks=False):
                    names.append(name)
                elif entry.is_dir(follow_symlinks=False):
                    if not name.startswith("__"):
                        left.append(f"{folder}{name}/")
                elif entry.is_symlink():
                    if entry.is_dir():
                        raise NotCoveredError
                    if entry.is_file():
                        names.append(name)
        files[folder] = [name for name in names if name != "README.md"]
    card = Path(root) / "README.md"
    if card.is_file() and card.read_bytes().startswith(b"---"):  # settings
        raise NotCoveredError
    return files, times


def split_of_folder(folder):
    """{split: which of its patterns} of all that name a folder or one of those around it. Raises NotCoveredError for a
    split that is named twice, whose images datasets would give twice."""
    found = {}
    for split, patterns in PATTERNS.items():
        matching = [i for i, pattern in enumerate(patterns)
                    if any(pattern.fullmatch(part) for part in folder.split("/")[:-1])]  # fmt: skip
        if len(matching) > 1:
            raise NotCoveredError
        if matching:
            found[split] = matching[0]
    return found


def splits_of(files):
    """{split: its images in datasets' order} of {folder: names of files}. Raises NotCoveredError."""
    split_of = {folder: split_of_folder(folder) for folder in files}
    if any(SHARDED.search(name) for name in files.get("data/", ())):
        raise NotCoveredError
    if not any(split_of[folder] for folder, names in files.items() if names):
        if any(SPLIT_IN_FILE.search(name) for names in files.values() for name in names):
            raise NotCoveredError
        split_of = {folder: {"train": 0} for folder in files}
    found, kinds = {split: {} for split in SPLITS}, {split: Counter() for split in SPLITS}
    for folder, names in files.items():
        kinds_here = [kind_of(name) for name in names]
        images = [folder + name for name, kind in zip(names, kinds_here, strict=True) if kind in IMAGES]
        for split, pattern in split_of[folder].items():
            kinds[split].update(kinds_here)
            found[split].setdefault(pattern, []).extend(images)
    found = {split: [path for pattern in sorted(of_pattern) for path in sorted(of_pattern[pattern])]
             for split, of_pattern in found.items() if kinds[split]}  # fmt: skip
    if not found:
        raise NotCoveredError
    for split in found:  # datasets goes by the most frequent kind of file
        if max((kinds[split][kind] for kind in IMAGES), default=0) <= kinds[split][".txt"]:
            raise NotCoveredError
    return found


def kind_of(name):
    """The ending of a file's name in small letters. Raises NotCoveredError for one that may mean something."""
    stem, dot, ending = name.rpartition(".")
    kind = dot + ending if stem else ""
    if kind not in KINDS:
        kind = kind.lower() if kind.isupper() else kind
        if kind not in KINDS:
            raise NotCoveredError
    if "." in stem and any(c.isalpha() for c in stem.partition(".")[2]):
        raise NotCoveredError
    return kind


def label_of(folder, root):
    """The last name of a folder in a tree; `root` is the whole tree's."""
    return folder.rpartition("/")[2] or root


def class_names(splits, root):
    """Sorted; None where the images do not lie in several folders, all at one depth. Raises NotCoveredError where that
    changes from split to split."""
    names, depths, answers = set(), set(), set()
    for paths in splits.values():
        folders = {path.rpartition("/")[0] for path in paths}
        names |= {label_of(folder, root) for folder in folders}
        depths |= {f"{folder}/".count("/") if folder else 0 for folder in folders}
        answers.add(len(names) > 1 and len(depths) == 1)
    if len(answers) > 1:
        raise NotCoveredError
    return sorted(names) if answers == {True} else None


def write_listing(file, table):
    """Raises OSError."""
    import pyarrow as pa

    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1 << 16)
        publish(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def read_listing(file):
    """The listing of such a file; None if there is none."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
            return listing_of(reader.schema)
    except (OSError, ValueError, KeyError):
        return None


def listing_of(schema):
    return json.loads(schema.metadata[b"listing"])


def is_current(root, listing, must_be_settled):
    """Whether no folder has changed since the listing; if it `must_be_settled`, not at the very time of it either."""
    folders = listing["folders"]
    if must_be_settled and listing["listed"] - max(folders.values()) < SETTLED:
        return False
    try:
        return all(os.stat(os.path.join(root, folder)).st_mtime_ns == then for folder, then in folders.items())
    except OSError:
        return False
