"""Data sets: opening one, with every mistake named.

The libraries that read them are imported where they are used: a wrong flag is answered without them.
"""

from engine.arguments import local_path
from engine.errors import HubAwayError, ServerGoneError, UserError, first_line, require
from engine.folders import ImageFolder, NotCoveredError
from engine.network import is_resuming, passing, patiently, reach_hub
from engine.parquet import RowGroups, footer

import dataclasses
import hashlib
import itertools
import os
import re
import tarfile
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, HTTPError


@dataclass
class Source:
    """An opened data set. `data` yields {image_column: {"bytes", "path"}, ...}; decoding is ours, so that one bad file
    does not end an iterator."""

    data: object
    """datasets.Dataset or datasets.IterableDataset."""
    image_column: str
    label_column: str | None
    num_images: int | None
    name: str
    classes: list | None = None
    """Class names, in the order of their numbers; None where labels are not read."""
    patience: float = 30.0
    """Minutes to wait for a server that is away."""
    files: list = field(default_factory=list)
    """The Parquet files of a stream whose shards are files."""
    side: tuple | None = None
    """Streams with --val-fraction, (fraction, whether these are the images held out): others are passed over."""
    most_shards: int | None = None
    """Of a stream that is not read whole: how many shards of a pass are."""
    tars: list = field(default_factory=list)
    """The tar files of a stream, which are its shards."""
    row_groups: RowGroups | None = None
    """Of Parquet files on disk that are streamed: they are the shards."""
    targets: object = None
    """Where labels are more than numbers of classes: (row, uint8 (3, H, W)) -> what the view takes beside the image.
    Raises an exception of any kind for what is no such label."""
    folder: object = None
    """The builder of a folder that has more to say about its labels; see LabelKind."""

    @property
    def num_shards(self):
        """Of a stream."""
        return self.row_groups.num_shards if self.row_groups else self.data.num_shards

    @property
    def streaming(self):
        return not hasattr(self.data, "__len__")

    def file_of(self, shard):
        """For messages: the file that a shard is, in brackets, or nothing."""
        if self.row_groups:
            return f" ({self.row_groups.place(shard)[0]})"
        files = self.tars or self.files
        return f" ({files[shard]})" if files else ""

    def has(self, image):
        """Whether an image, encoded bytes, is on this side of --val-fraction."""
        return self.side is None or is_held_out(image, self.side[0]) == self.side[1]

    def label(self, row):
        """The number of a row's class. Raises ValueError."""
        value = row[self.label_column]
        number = self.classes.index(value) if isinstance(value, str) and value in self.classes else value
        if not isinstance(number, int) or not 0 <= number < len(self.classes):
            raise ValueError(f"label {value!r} is none of the {len(self.classes)} classes")
        return int(number)


@dataclass
class LabelKind:
    """What is learned beside the images, and how data sets hold it."""

    columns: tuple
    """Names of columns that are looked for."""
    folder: type = ImageFolder
    """Of folders on disk: builder(path), which raises NotCoveredError for those that datasets is to read."""
    pictures: bool = False
    """Whether such a column holds encoded pictures."""


CLASSES = LabelKind(("label", "cls"))


def is_held_out(image, fraction):
    """Whether --val-fraction holds an image out, by its encoded bytes: whatever its name, and in whatever form the data
    set comes. A larger fraction holds out the same images and more."""
    return int.from_bytes(hashlib.blake2b(image, digest_size=8).digest()) < fraction * 2**64


def read_image(image, name, patience):
    """The encoded bytes of an image column's value {"bytes", "path"}, here or on the Hub. Raises ServerGoneError, and
    whatever a damaged one raises."""
    image = image or {}
    if image.get("bytes") is not None:
        return image["bytes"]
    require(image.get("path"), "the row holds no image")
    return patiently(partial(read_file, image["path"]), name, patience)


def read_file(path):
    """The bytes of a file, here or on the Hub."""
    import fsspec

    with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:  # fsspec takes as long as the reading
        return file.read()


def held_out_rows(rows, column, fraction, stamp=""):
    """A batch of rows on disk -> {"held_out": [bool]}, for datasets' map, which remembers the answer; `stamp` is of the
    files as they are now. What cannot be read stays among the images to learn from, where it is counted."""
    answers = []
    for image in rows[column]:
        try:
            answers.append(is_held_out(read_image(image, "", 0), fraction))
        except (UserError, OSError):
            answers.append(False)
    return {"held_out": answers}


def stamp_of_files(data, column):
    """Another number once a file that is read in place has changed."""
    stamp = hashlib.blake2b(digest_size=8)
    for path in data.data.column(column).combine_chunks().field("path").to_pylist():
        with suppress(OSError, TypeError, ValueError):  # on the Hub, none, no name of a file
            status = os.stat(path)
            stamp.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    return stamp.hexdigest()


def take_side(data, column, fraction, held_out):
    """The rows of a datasets.Dataset that --val-fraction holds out, or the others."""
    import numpy as np

    options = dict(batched=True, batch_size=100)
    options["fn_kwargs"] = dict(column=column, fraction=fraction, stamp=stamp_of_files(data, column))
    answers = data.select_columns(column).map(held_out_rows, remove_columns=[column], desc="hashing images", **options)
    return data.select(np.flatnonzero(np.array(answers["held_out"], dtype=bool) == held_out))


def with_first_classes(source, count):
    """A Source with classes, and of its images on disk those of the first so many of them; a stream stays as it is."""
    names = source.classes[:count]
    if source.streaming or len(names) == len(source.classes):
        return source
    labels = source.data.select_columns([source.label_column])[:][source.label_column]
    rows = [row for row, label in enumerate(labels)
            if (label in names if isinstance(label, str) else label is not None and 0 <= label < count)]  # fmt: skip
    return dataclasses.replace(source, data=source.data.select(rows), num_images=len(rows))


def open_builder(dataset, patience=30.0, folder=ImageFolder):
    """The datasets builder of a Hub id, folder or file; `folder` is a LabelKind's. Raises UserError."""
    import datasets

    path = local_path(dataset)
    problem = reach_hub(dataset) if path is None else None
    other = "pass a folder, Parquet or tar of your own, or --dataset demo"
    if problem:
        raise HubAwayError(f"data set {dataset} is no local folder, and the Hub cannot be reached ({problem}): {other}")
    try:
        if path is None:
            # no connection at all is a mistake at a first start: datasets' ConnectionError is waited for at a resume
            return patiently(partial(datasets.load_dataset_builder, dataset), dataset, patience)
        if path.is_dir():
            with suppress(NotCoveredError, OSError):
                return folder(path)
            return datasets.load_dataset_builder(str(path.absolute()))  # "parquet" alone would be one of its readers
        kind = {".parquet": "parquet", ".tar": "webdataset"}.get(path.suffix)
        if kind is None:
            raise UserError(f"data set {path} is neither a folder nor a .parquet or .tar file")
        return datasets.load_dataset_builder(kind, data_files={"train": str(path)})
    except (GatedRepoError, datasets.exceptions.DatasetNotFoundError) as error:
        if isinstance(error, GatedRepoError) or "gated" in str(error):
            raise UserError(
                f"data set {dataset} is gated: accept its terms at https://huggingface.co/datasets/{dataset} "
                "and log in with `hf auth login` (or set HF_TOKEN)"
            ) from error
        raise UserError(
            f"data set {dataset} was not found on the Hub (nor as a local folder): check the id; "
            "a private one needs `hf auth login`"
        ) from error
    except (datasets.exceptions.DatasetsError, FileNotFoundError) as error:
        if path is None and (failure := passing(error, dataset)):
            raise HubAwayError(f"data set {dataset} cannot be reached: {failure}; try again, or {other}") from error
        if path is None:
            raise UserError(f"data set {dataset} cannot be read: {first_line(error)}") from error
        raise UserError(f"data set folder {path} holds no images, Parquet or .tar files") from error
    except (ServerGoneError, HTTPError, OSError) as error:
        if isinstance(error, ServerGoneError) and is_resuming():
            raise
        raise UserError(f"data set {dataset} cannot be reached: {first_line(error)}") from error
    except RuntimeError as error:  # a script of its own, which datasets no longer executes
        raise UserError(f"data set {dataset} cannot be read: {first_line(error)}") from error


EVALUATION_SPLITS = ("validation", "val", "valid", "test")  # the first that there is
MANY_CLASSES = 100_000  # any numbers below, a part of ImageNet-21k's too, may be those of classes
ENCODED = ("binary", "large_binary", "binary_view")  # encoded images without the metadata that says so


def choose_columns(args, features, kind=CLASSES):
    """(image column, label column or None) of the data set's features. Raises UserError, listing what there is."""
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image_column = args.image_column or ("image" if "image" in features else images[0] if images else None)
    label_column = args.label_column or next(
        (name for name in kind.columns if name in features and name != image_column), None)
    there_are = f"the columns of {args.dataset} are {', '.join(features)}"
    if image_column is None:
        raise UserError(f"no column holds images; pass --image-column if one holds encoded bytes: {there_are}")
    for flag, column in (("--image-column", image_column), ("--label-column", label_column)):
        if column is not None and column not in features:
            raise UserError(f"{flag} {column} does not exist: {there_are}")
    feature = features[image_column]
    is_struct = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
    if not isinstance(feature, datasets.Image) and not is_struct and getattr(feature, "dtype", "") not in ENCODED:
        raise UserError(f"--image-column {image_column} holds no images but {feature}: {there_are}")
    return image_column, label_column


def read_classes(args, data, column, features, num_classes=None):
    """Class names of an opened split: of its features or, where these name none, of the labels themselves (numbers name
    themselves). Raises UserError."""
    import datasets

    if column is None:
        others = len(data.features) > 1
        raise UserError(
            f"data set {args.dataset} has no labels: {'pass --label-column, or ' if others else ''}give class "
            f"subfolders, or a metadata.csv with file_name and label; its columns are {', '.join(data.features)}"
        )
    feature = features[column]
    kind = getattr(feature, "dtype", "")
    if isinstance(feature, datasets.ClassLabel):
        require(
            num_classes in (None, feature.num_classes),
            f"--num-classes is {num_classes}, data set {args.dataset} has {feature.num_classes} classes",
        )
        return list(feature.names)
    if not kind.startswith(("int", "uint", "string", "large_string")):
        raise UserError(f"--label-column {column} holds no class labels but {feature}")
    require(num_classes is None or num_classes > 0, f"--num-classes is {num_classes}: it must be positive")
    if num_classes is not None and "string" not in kind:
        return [str(number) for number in range(num_classes)]
    if isinstance(data, datasets.Dataset):
        labels = data.unique(column)
    elif "__url__" in data.features:  # a tar has to be read whole for its labels
        raise UserError(f"the tar shards of {args.dataset} do not name their classes: pass --num-classes"
                        + (", and numbers as labels" if "string" in kind else ""))  # fmt: skip
    else:  # Parquet: the one column
        labels = [row[column] for row in data.select_columns(column)]
    labels = {label for label in labels if label is not None}
    largest = max(labels, default=-1) if "string" not in kind else -1
    require(largest < max(MANY_CLASSES, 10 * len(labels)),
            f"--label-column {column} holds numbers up to {largest}, and only {len(labels)} different ones: no numbers "
            "of classes; mend the column, or pass --num-classes if there are so many")  # fmt: skip
    return sorted(labels) if "string" in kind else [str(number) for number in range(max(labels, default=-1) + 1)]


def open_labelled(data, labels, world=1, learn=True):
    """ImagesArgs, LabelArgs -> the Source to learn from (None if not to `learn`) and the one to evaluate on; they agree
    on their classes. Raises UserError."""
    import datasets

    val_data = choose_val_split(data, labels, learn)
    held_out = data.val_fraction is not None
    val = open_source(val_data, 1, True, labels.num_classes, held_out)
    if not learn:
        return None, val
    train = open_source(data, world, True, labels.num_classes)
    if held_out:
        return train, val
    named = isinstance(val.data.features[val.label_column], datasets.ClassLabel)
    if set(val.classes) - set(train.classes) or (named and train.classes != val.classes):
        raise UserError(
            f"the splits of data set {data.dataset} disagree on their classes: {data.split} has {len(train.classes)} "
            f"({', '.join(train.classes[:3])}, ...), {labels.val_split} has {len(val.classes)} "
            f"({', '.join(val.classes[:3])}, ...)"
        )
    if not (train.streaming or val.streaming):  # what is really there
        surplus = set(val.data.unique(val.label_column)) - set(train.data.unique(train.label_column)) - {None}
        names = [val.classes[n] if isinstance(n, int) and 0 <= n < len(val.classes) else str(n) for n in surplus]
        require(
            not names,
            f"split {labels.val_split} of data set {data.dataset} has {len(names)} classes of which split {data.split} "
            f"has no image: {', '.join(sorted(names)[:5])}",
        )
    return train, dataclasses.replace(val, classes=train.classes)


def open_annotated(data, labels, kind, world=1, learn=True):
    """The same for labels of another kind: the Source to learn from and the one to evaluate on, without classes and
    `targets`. Raises UserError."""
    val_data = choose_val_split(data, labels, learn, kind)
    val = open_source(val_data, held_out=data.val_fraction is not None, kind=kind)
    return open_source(data, world, kind=kind) if learn else None, val


def choose_val_split(data, labels, learn=True, kind=CLASSES):
    """What the split to evaluate on is opened with; fills labels.val_split. Raises UserError."""
    hint = f"pass --val-fraction 0.1, which holds out a tenth of {data.split}, the same in all scripts"
    if data.val_fraction is not None:
        require(labels.val_split is None, "--val-fraction and --val-split are both given: give one")
        labels.val_split = f"{data.val_fraction:g} of {data.split}"
        return data
    if labels.val_split is None:
        splits = list(open_splits(data.dataset, data.patience, kind.folder))
        others = [name for name in EVALUATION_SPLITS if name in splits and name != data.split]
        if not others:
            raise UserError(f"data set {data.dataset} has no split to evaluate on: it has {', '.join(splits)}; {hint}, "
                            "or --val-split")  # fmt: skip
        labels.val_split = others[0]
    require(labels.val_split != data.split or not learn,
            f"--val-split {data.split} is the split to learn from, where every image would find itself: {hint}, or "
            "another split")  # fmt: skip
    return dataclasses.replace(data, split=labels.val_split, num_images=None)


def open_splits(dataset, patience=30.0, folder=ImageFolder):
    """{split: stream} of a data set. Raises UserError."""
    builder = open_builder(dataset, patience, folder)
    try:
        return patiently(builder.as_streaming_dataset, dataset, patience)
    except ServerGoneError:
        raise
    except Exception as error:  # every reader has its own way to refuse a file
        raise UserError(f"data set {dataset} cannot be read: {first_line(error)}") from error


def open_source(args, slots=1, labelled=False, num_classes=None, held_out=False, kind=CLASSES):
    """ImagesArgs -> Source. `slots` is how many processes share a stream; `labelled` asks for classes; with
    --val-fraction it has the images that are not `held_out`, or those that are. Raises UserError."""
    import datasets
    import pyarrow.parquet as pq

    builder, local = open_builder(args.dataset, args.patience, kind.folder), local_path(args.dataset) is not None
    streams = args.streaming and (not local or builder.name in ("parquet", "webdataset"))  # local images: in place

    def opened():
        if builder.name == "parquet" and local:
            for files in builder.config.data_files.values():
                footer(files[0])  # where datasets finds the columns, and names no file
        splits = builder.as_streaming_dataset()  # for a look at schema and first row before any download
        if args.split not in splits:
            raise UserError(f"data set {args.dataset} has no split {args.split!r}: it has {', '.join(splits)}")
        data = splits[args.split]
        image_column, label_column = choose_columns(args, data.features or {}, kind)
        if any(isinstance(data.features[column], datasets.Image) for column in {image_column, label_column} - {None}):
            data = data.decode(False)
        pictures = [image_column, *([label_column] if label_column and kind.pictures else [])]
        for column in pictures:
            data = data.cast_column(column, datasets.Image(decode=False))
        # Parquet's shards are row groups: always on disk; on the Hub, where a footer costs a request, if files are few.
        files, row_groups = list(builder.config.data_files[args.split]) if builder.name == "parquet" else [], None
        if files and local:
            columns = {image_column, label_column} - {None}
            row_groups = RowGroups(files, sorted(columns), data.features)  # also for what it checks
        first = next(iter(row_groups or data), None)
        if first is None:
            raise UserError(f"split {args.split} of data set {args.dataset} holds no images")
        if first[image_column] is not None:
            first[image_column]["bytes"]
        if not streams and row_groups:
            require(not row_groups.empty, f"{row_groups.empty} has no rows, which only --streaming can read: remove it")
        if not streams:
            builder.download_and_prepare()
            data, row_groups = builder.as_dataset(split=args.split), None
            for column in pictures:
                data = data.cast_column(column, datasets.Image(decode=False))
        elif not local and data.num_shards < slots * max(args.workers or 1, 1):
            data, files = data.reshard(), []
        return data, image_column, label_column, files if streams and not local else [], row_groups

    try:
        data, image_column, label_column, files, row_groups = patiently(opened, args.dataset, args.patience)
    except (UserError, ServerGoneError):
        raise
    except Exception as error:  # every reader has its own way to refuse a file
        if isinstance(error, tarfile.TarError) and local:
            count_images(builder, args.split)  # names the file
        raise UserError(f"data set {args.dataset} cannot be read: {first_line(error)}") from error
    count = len(data) if not streams else args.num_images or count_images(builder, args.split, row_groups)
    whole, fraction, side = data, args.val_fraction, None
    if fraction is not None and streams:  # sorted out as they are read: how many there are is not known before
        side, count = (fraction, held_out), count and round(count * (fraction if held_out else 1 - fraction))
    elif fraction is not None:
        data = take_side(whole, image_column, fraction, held_out)
        count = len(data)
        none, larger = ("none", "larger") if held_out else ("all", "smaller")
        require(count, f"--val-fraction {fraction} holds out {none} of the {len(whole)} images: use a {larger} one")
    source = Source(data, image_column, label_column, count, args.dataset, None, args.patience, files, side)
    source.row_groups, source.folder = row_groups, builder if hasattr(builder, "classes") else None
    parts, kind = (source.num_shards, "shards") if streams else (len(data), "images")
    if parts < slots:
        raise UserError(
            f"data set {args.dataset} has {parts} {kind}, fewer than the {slots} processes that share them: "
            "use fewer processes" + (", more or smaller shards, or --no-streaming" if streams else "")
        )
    features = data.features
    if labelled and builder.name == "parquet" and local:  # datasets takes the first split's features for all
        features = datasets.Features.from_arrow_schema(pq.read_schema(builder.config.data_files[args.split][0]))
    read = partial(read_classes, args, whole, label_column, features, num_classes)
    source.classes = patiently(read, args.dataset, args.patience) if labelled else None
    if streams and builder.name == "webdataset":
        source.tars = list(builder.config.data_files[args.split])
    return source


def count_images(builder, split, row_groups=None):
    """Images of a streamed split: from its metadata, from Parquet footers or tar headers on disk; None if unknown.
    Raises UserError for a tar that is cut short."""
    if row_groups is not None:
        return row_groups.num_rows
    info = (builder.info.splits or {}).get(split)
    if info is not None and info.num_examples:
        return info.num_examples
    files = [str(f) for f in (builder.config.data_files or {}).get(split, ["unknown"])]
    if not all(Path(f).is_file() for f in files):
        return None
    count = 0
    for name in files:
        try:
            with tarfile.open(name) as tar:  # one sample is a run of members that share their path up to the first dot
                keys = [re.match(r"((?:.*/|)[^.]+)[.]", m.name) for m in tar if m.isfile()]
                tar.fileobj.seek(tar.offset)
                if len(tar.fileobj.read(512)) not in (0, 512):  # which tarfile takes for the end
                    raise tarfile.ReadError("truncated header")
        except (tarfile.TarError, EOFError) as error:
            why = str(error).splitlines()[-1]
            raise UserError(f"tar {name} is damaged or cut short: {why}; replace it, or move it away") from error
        count += sum(1 for _ in itertools.groupby(k.group(1) for k in keys if k))
    return count


def names_classes(source):
    """Whether the data set itself names its classes."""
    import datasets

    return isinstance(source.data.features[source.label_column], datasets.ClassLabel)
