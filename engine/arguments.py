"""Command lines: the groups of flags that the scripts share, reading them, filling them in, checking them.

A script's arguments are one dataclass of such groups. Values of None follow from others.
"""

from engine.errors import UserError, require

import dataclasses
import enum
import gc
import inspect
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
DEMO = Path(__file__).resolve().parent.parent / "demo"


class Mark(enum.Enum):
    """How a flag may differ between a run and its continuation. The mark stands at the flag, in its Annotated type;
    without one, another value needs --resume-changed. engine/checkpoints.py has the rule."""

    FREE = "may change at any time"
    LENGTH = "may grow"
    DATA = "decides which image comes when: with another value the data begin anew"


def marks_of(args):
    """{flag name: Mark} of all groups. A field that is declared again in a subclass keeps its mark."""
    return {
        name: mark
        for group in dataclasses.fields(args)
        for kind in reversed(type(getattr(args, group.name)).__mro__)
        for name, hint in inspect.get_annotations(kind).items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, Mark)
    }


# None: by the recipe, or read from the data. --help then shows the docstring's "Default: ..." alone.
AutoInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
AutoFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
AutoStr = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]
# Any number of them.
Ints = Annotated[tuple[int, ...], tyro.conf.arg(help_behavior_hint="")]
Floats = Annotated[tuple[float, ...], tyro.conf.arg(help_behavior_hint="")]
Strs = Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="")]


@dataclass
class ImagesArgs:
    """Which images, and who reads them. All scripts have these."""

    dataset: Annotated[str, Mark.DATA] = "ILSVRC/imagenet-1k"
    """Hub id; local folder (class subfolders, Parquet or webdataset .tar) or file; or `demo`."""
    split: Annotated[str, Mark.DATA] = "train"
    """Split of the data set."""
    image_column: Annotated[AutoStr, Mark.DATA] = None
    """Column with the images. Default: `image`, or the first column of images."""
    label_column: AutoStr = None
    """Column with the labels; pretraining learns nothing from it. Default: `label` or `cls`, where there is one."""
    streaming: Annotated[bool, tyro.conf.arg(help_behavior_hint=""), Mark.DATA] = False
    """Read shards as a stream instead of downloading them first (Parquet, tar). Default: on for Hub ids and `demo`."""
    val_fraction: Annotated[AutoFloat, Mark.DATA] = None
    """Share of the split that is held out to evaluate on, by a hash of each image's bytes: the same images in train.py,
    probe.py and finetune.py, never trained on. Default: none. For data without a validation split."""
    num_images: Annotated[AutoInt, Mark.DATA] = None
    """Images in the split. Default: read from the data; needed for remote tar shards only."""
    batch_size: Annotated[AutoInt, Mark.DATA] = None
    """Images per process and forward pass. Default: 256, or the effective batch size's share if that is less."""
    workers: Annotated[AutoInt, Mark.FREE] = None
    """Data loading processes per training process; 0 loads in the training process. Default: one a core, at most 32."""
    patience: Annotated[float, Mark.FREE] = 30.0
    """Minutes that a data server may stay away before the run ends, with a checkpoint."""


@dataclass
class DataArgs(ImagesArgs):
    """Which images, and how they reach the model."""

    effective_batch_size: AutoInt = None
    """Images per optimizer step over all processes, reached by accumulation. Default: 2048 (nano and demo: 64); where a
    pass would be shorter than eight steps half of it, a quarter, ... down to 32."""
    parts: Annotated[AutoInt, Mark.DATA] = None
    """Parts that every pass is divided into, each with an order of its own; a multiple of the number of processes. A
    resumed run keeps them, on fewer processes too. Default: the number of processes."""
    shuffle_window: Annotated[int, Mark.DATA] = 512
    """Streams: images of a worker that are shuffled among each other."""
    interleave: Annotated[int, Mark.DATA] = 4
    """Streams: shards that a worker reads in turn, one image each."""
    batch_note: str = field(default="", init=False)  # no flag: why it is neither the recipe's batch nor a given one


@dataclass
class LabelArgs:
    """The split to evaluate on, and the classes."""

    val_split: AutoStr = None
    """Split to evaluate on. Default: the first that exists of validation, val, valid and test."""
    num_classes: AutoInt = None
    """Number of classes. Default: read from the data; needed for streamed tar shards only."""


@dataclass
class WatchArgs:
    """Is it learning? kNN of the encoder so far, among labelled images. See engine/watching.py."""

    probe_every: Annotated[AutoFloat, Mark.FREE] = None
    """Epochs between probes, and one at the end; 0: none. Default: a fiftieth of the run, at least 1; of less than 3200
    images several."""
    probe_split: Annotated[AutoStr, Mark.FREE] = None
    """Split with labels. Default: what --val-fraction holds out, validation, val, valid, test, or the split itself."""


@dataclass
class DeviceArgs:
    """Where to, and on what. All scripts have these."""

    run_dir: Annotated[AutoStr, Mark.FREE] = None
    """Run folder. Default: one in runs/, named after what is run."""
    seed: Annotated[int, Mark.DATA] = 0
    """Seed of everything random."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast. auto: bf16 on a GPU that has it, otherwise fp32."""
    compile: Annotated[bool, Mark.FREE] = False
    """Compile model and teacher, or the frozen encoder, with torch.compile."""
    timeout: Annotated[float, Mark.FREE] = 10.0
    """Minutes that a process waits for another one, beyond --patience, before the run ends; also while the first one
    downloads data that are not streamed."""


@dataclass
class RunArgs(DeviceArgs):
    """How long, where to, and on what."""

    epochs: Annotated[AutoFloat, Mark.LENGTH] = None
    """Passes over the data. Default: 300 (nano and demo: 10)."""
    steps: Annotated[AutoInt, Mark.LENGTH] = None
    """Optimizer steps, instead of epochs."""
    log_every: Annotated[int, Mark.FREE] = 20
    """Steps between log lines. Only there, in evaluations and in checkpoints does the host wait for the device."""
    checkpoint_every: Annotated[int, Mark.FREE] = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep: Annotated[int, Mark.FREE] = 3
    """Last checkpoints that are kept."""
    milestone_every: Annotated[int, Mark.FREE] = 0
    """Steps between checkpoints that are kept for good; 0: none."""
    resume: Annotated[str, Mark.FREE] = "auto"
    """auto: continue the run folder; never: refuse one with checkpoints; PATH: start from this checkpoint or run."""
    resume_changed: Annotated[bool, Mark.FREE] = False
    """Continue with other values than the run began with; they are listed in config.json."""
    max_bad_steps: Annotated[int, Mark.FREE] = 10
    """A step whose loss or gradient is not finite is skipped; so many in a row end the run."""
    tracker: Annotated[Literal["none", "tensorboard", "wandb", "trackio"], Mark.FREE] = "none"
    """Accelerate tracker that receives every logged value, beside log.jsonl."""


def parse(kind, argv=None, **options):
    """Command line -> `kind`, a dataclass or a choice of them. The default of --streaming depends on the data set,
    hence the second reading."""
    try:
        first = tyro.cli(kind, args=argv, config=(tyro.conf.OmitArgPrefixes,), **options)
        args = first
        if hasattr(first, "data"):  # not where runs are drawn
            default = type(first)()
            default.data.streaming = local_path(first.data.dataset) is None or first.data.dataset == "demo"
            args = tyro.cli(kind, args=argv, default=default, config=(tyro.conf.OmitArgPrefixes,), **options)
        require_possible(flat(args))
        return args
    except BrokenPipeError:  # of --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(0) from None
    except SystemExit:  # --help, or a wrong flag
        gc.freeze()  # the end would look through all of torch for cycles, for a fifth of the time of an answer
        raise


DECADE = 5_256_000  # minutes: what torch adds to its clock does not overflow
LARGEST = {"seed": 2**63 - 1, "patience": DECADE, "timeout": DECADE, "epochs": 10**9, "workers": 1024, "parts": 2**16,
           "batch_size": 2**20, "image_size": 2**14, "num_classes": 10**7}  # fmt: skip


def require_possible(values):
    """{flag name: value}: numbers that nobody can mean, and a run folder that cannot be, are told before anything is
    loaded. Raises UserError."""
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                require(math.isfinite(number), f"{flag} is {number}: it must be a finite number")
            if isinstance(number, (int, float)):
                limit = LARGEST.get(name, 10**12 if isinstance(number, int) else math.inf)
                require(abs(number) <= limit, f"{flag} is {number}: it must not go beyond {limit:,}")
    try:
        run_dir = values.get("run_dir")
        require(run_dir != "", "--run-dir is empty: name a folder, or leave it out")
        Path(run_dir or ".").expanduser().stat()
    except (FileNotFoundError, NotADirectoryError):  # which is told with what it is
        pass
    except OSError as error:
        raise UserError(f"--run-dir {run_dir[:100]} cannot be a folder: {error.strerror}; choose another") from error


def fill(group, name, value):
    """Give a field that was left out its value."""
    if getattr(group, name) is None:
        setattr(group, name, value)


def require_positive(group, *names):
    for name in names:
        value = getattr(group, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')} is {value}: it must be positive")


def require_not_negative(group, *names):
    for name in names:
        value = getattr(group, name) or 0
        require(value >= 0, f"--{name.replace('_', '-')} is {value}: it must not be negative")


def require_crop_scale(group):
    low, high = group.crop_scale
    require(0 < low <= high <= 1, f"--crop-scale is {low} {high}: two areas with 0 < first <= second <= 1")


def require_views(group):
    """The two values that crop_and_flip takes."""
    require_crop_scale(group)
    require(0 <= group.flip <= 1, f"--flip is {group.flip}: it must lie between 0 and 1")


PASS_STEPS, SMALLEST_BATCH = 8, 32  # a recipe's batch is halved until a pass has so many steps, but not below


def fitting_batch(effective, images):
    """A recipe's effective batch, or what of it fits a data set of so many images (None: unknown)."""
    while images and effective > SMALLEST_BATCH and images < PASS_STEPS * effective:
        effective //= 2
    return effective


def resolve_run(data, run, world, old, *, batch, effective, epochs, images=None):
    """Batch sizes and length of a training run, in place, from the recipe's where None. `old` are the arguments of the
    run that is resumed, or {}; `images` the number of images, once it is known. Raises UserError."""
    require(run.epochs is None or run.steps is None, "--epochs and --steps are both given: give one")
    if run.steps is None:
        fill(run, "epochs", epochs)
    resolve_images(data)
    require_positive(data, "effective_batch_size", "shuffle_window", "interleave")
    require_positive(run, "log_every", "checkpoint_every", "keep", "max_bad_steps", "timeout", "steps", "epochs")
    require_not_negative(run, "milestone_every")
    fill(data, "parts", old.get("parts", world))
    fits = [str(n) for n in range(1, data.parts + 1) if data.parts % n == 0]
    require(
        data.parts > 0 and data.parts % world == 0,
        f"--parts {data.parts}{' of the run that is resumed' if old.get('parts') == data.parts else ''} cannot be "
        f"shared by {world} processes: start {' or '.join(fits) or 'a positive number'}, or use another --run-dir",
    )
    asked, asked_batch, fitting = data.effective_batch_size, data.batch_size, fitting_batch(effective, images)
    wanted = asked or old.get("effective_batch_size") or fitting
    default = max(1, min(batch, wanted // data.parts))
    kept = old.get("batch_size") or default
    fill(data, "batch_size", kept if wanted % (kept * data.parts) == 0 else default)
    together = data.batch_size * data.parts

    def nearest(size):
        """What this number of processes can do. (A size that was given must be met.)"""
        return together * max(1, round(size / together))

    data.effective_batch_size = asked or nearest(wanted)
    of_folder = asked_batch is None and data.batch_size != default
    if of_folder or (asked is None and data.effective_batch_size != nearest(fitting)):
        data.batch_note = f"as the run in {run.run_dir if run.resume == 'auto' else run.resume} began"
    elif asked is None and fitting != effective:
        data.batch_note = f"the recipe's {effective} would be too many for {images} images"
    require(
        data.effective_batch_size % together == 0,
        f"--effective-batch-size {data.effective_batch_size} is not a multiple of --batch-size {data.batch_size} times "
        f"{data.parts} {'processes' if data.parts == world else 'parts'}: try {nearest(wanted)}",
    )
    require(
        run.tracker == "none" or find_spec(run.tracker) is not None,
        f"--tracker {run.tracker} is not installed: pip install {run.tracker}",
    )


MOST_WORKERS = 32  # by default: they load more than any GPU takes, and each holds memory


def resolve_images(data):
    """What every script asks of its ImagesArgs. Raises UserError."""
    fill(data, "workers", min(MOST_WORKERS, cores_per_process()))
    require_not_negative(data, "workers")
    require_positive(data, "patience", "batch_size", "num_images")
    require(data.val_fraction is None or 0 < data.val_fraction < 1,
            f"--val-fraction is {data.val_fraction}: it must lie between 0 and 1, such as 0.1")  # fmt: skip


def world_size():
    """The number of processes of this run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def cores_per_process():
    """This process's share of the cores that may be used."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):  # of a container, which sees all of its machine's
        quota, period = CPU_QUOTA.read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def flat(args):
    """{flag name: value} of all groups."""
    groups = [getattr(args, group.name) for group in dataclasses.fields(args)]
    return {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group) if f.init}


def as_name(text):
    """Fit for the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def name_of_data(dataset):
    """A short name of a data set: imagenet-1k for ILSVRC/imagenet-1k, photos for /data/photos."""
    return as_name(Path(dataset).expanduser().absolute().stem) or "data"


def default_run_dir(task, origin, data):
    """Run folder of probe.py and finetune.py where none is given, runs/TASK-ORIGIN-DATA; `origin` is the group of
    --checkpoint and --random-init. Raises UserError."""
    require((origin.checkpoint is None) != (origin.random_init is None), "give either --checkpoint or --random-init")
    name = as_name((origin.checkpoint or f"random-{origin.random_init}").removeprefix("runs/"))
    data = name_of_data(data.dataset)
    return f"runs/{task}-{name}" + f"-{data}" * (data not in name)


def local_path(dataset):
    """Path of a local data set; None for a Hub id. Raises UserError for a path that does not exist."""
    if dataset == "demo":
        return DEMO / "fashion_mnist"
    if not dataset:
        raise UserError("--dataset is empty: give a Hub id, a folder, a file, or demo")
    path = Path(dataset).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", dataset):
        raise UserError(f"data set {dataset} does not exist: no such folder or file, and not an id of the Hub")
    return None
