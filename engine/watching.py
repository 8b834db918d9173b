"""Is it learning? kNN of the encoder so far while a run trains, without labels: top-1 among images that have some, each
judged by its nearest of the others. The labels are not learned."""

from engine.arguments import LabelArgs
from engine.errors import RunError, UserError, first_line, printable, require
from engine.evaluation import evaluation_chunks, gather_rows, hits, nearest, votes
from engine.images import CenterCrop, crop_ratio, to_device
from engine.seeds import permutation
from engine.sources import Source, choose_val_split, open_source

import dataclasses
import hashlib
import math
import sys
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

K, TEMPERATURE = 20, 0.07  # probe.py's headline
PROBES = 50  # in a run, or fewer: no more than one an epoch, and each of
ENOUGH = 100  # images
# Images of the sample for each image trained on between two probes. A forward pass of all patches takes a sixth to six
# tenths of what training on an image does (computed: small with CLIP as its teacher; huge at half of the patches).
SHARE = 1 / 32
MOST = 10_000  # images in the sample: their accuracy is within a percent of that of all
LEAST_READ, READ = 10_000, 100_000  # images of a stream, about, from which the sample is chosen: ten times its own
FEW = 1000  # images to which loading processes would come too late


# ----------------------------------------------------------------------------------------------------------------
# The images.


@dataclass
class Labelled(Source):
    """A source whose labels are numbers by themselves: nobody reads all of them, to count the classes first."""

    def label(self, row):
        """A number for the class, the same wherever the label is. Raises ValueError."""
        value = row[self.label_column]
        if isinstance(value, str):
            return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest()) >> 1
        if not is_label(value):
            raise ValueError(f"label {value!r} is none of a class")
        return value


def is_label(value):
    """Whether a row's label is one of a class: many data sets have -1 where there is none."""
    return isinstance(value, str) or (isinstance(value, int) and value >= 0)


def open_labelled_part(probe, data, source):
    """The images for kNN while training, as (Source, what they are), or (None, why there are none).

    probe: has probe_every and probe_split; data: DataArgs; source: what is trained on. Without a flag that names a
    split: what probe.py evaluates on, and where that is missing what is trained on. That is fair, since no image is its
    own neighbour, and no label is learned. Raises UserError for what was asked for and cannot be.
    """
    if probe.probe_every == 0:
        return None, ""
    require(source.num_images or not probe.probe_every,
            f"the number of images in {source.name} is unknown: --probe-every needs --num-images")  # fmt: skip
    asked = probe.probe_split
    labels, found, what = LabelArgs(), source, f"split {data.split}, whose labels are not learned"
    try:
        if asked:
            what = f"split {asked}"
            found = open_source(dataclasses.replace(data, split=asked, val_fraction=None, num_images=None))
        elif other := other_split(data, labels):
            held_out = data.val_fraction is not None
            what = labels.val_split if held_out else f"split {labels.val_split}"
            found = open_source(other, held_out=held_out)
        column = found.label_column
        require(column is not None, f"data set {data.dataset} has no labels")
        kind = found.data.features[column]
        is_class = getattr(kind, "dtype", "").startswith(("int", "uint", "string", "large_string"))
        require(is_class, f"--label-column {column} of data set {data.dataset} holds no class labels but {kind}")
    except (UserError, RunError) as error:
        if asked:
            raise UserError(f"--probe-split {asked} cannot be used: {first_line(error)}") from error
        return None, first_line(error)
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(Source)}
    return Labelled(**{**fields, "classes": ["any"]}), what


def other_split(data, labels):
    """What the split to evaluate on is opened with; None if there is no such split."""
    try:
        return choose_val_split(data, labels)
    except UserError:  # of the data set itself nothing is wrong: it is open
        return None


def chosen(source, wanted):
    """The Labelled with so many of its images, or all if there are no more: evenly chosen, and the same whatever the
    run's seed and its number of processes."""
    if source.streaming:  # by their bytes, as --val-fraction does: a shard may hold a single class
        held_out = source.side[0] if source.side else 1.0  # of which a part is chosen
        looked_at = min(READ, max(LEAST_READ, 10 * wanted))
        images, shards = source.num_images or looked_at, source.num_shards
        read = max(1, min(shards, math.ceil(shards * looked_at * held_out / images)))
        images = images * read / shards
        share = min(1.0, wanted / max(images, 1))
        return dataclasses.replace(source, side=(share * held_out, True), most_shards=read,
                                   num_images=math.ceil(share * images))  # fmt: skip
    looked_at = permutation(len(source.data), 0)[: 10 * wanted].tolist()
    labels = source.data.select_columns([source.label_column])[looked_at][source.label_column]
    rows = sorted([row for row, label in zip(looked_at, labels, strict=True) if is_label(label)][:wanted])
    return dataclasses.replace(source, data=source.data.select(rows), num_images=len(rows))


def read_images(run, source, size):
    """(images (m, 3, S, S) uint8, labels (m), ids (m)) of this rank's part of a source, on the host. Raises an
    exception of any kind."""
    view = CenterCrop(size, crop_ratio(size))
    workers = run.args.data.workers if (source.num_images or 0) > FEW else 0
    data, skipped, parts, count = dataclasses.replace(run.args.data, workers=workers), [], [], 0
    for chunk in evaluation_chunks(run.accelerator, source, view, data, "images for kNN", skipped):
        if len(chunk["ids"]):
            parts.append((chunk["images"], chunk["labels"], chunk["ids"][:, 1]))
            count += len(chunk["ids"])
        require(count <= 2 * MOST, f"the shards of {source.name} are too large to choose {MOST} images from them")
    none = torch.zeros(0, 3, size, size, dtype=torch.uint8), *(torch.zeros(0, dtype=torch.int64),) * 2
    return tuple(map(torch.cat, zip(*(parts or [none]), strict=True)))


# ----------------------------------------------------------------------------------------------------------------
# The probe.


@torch.no_grad()
def leave_one_out(accelerator, bank, labels, own, k=K, temperature=TEMPERATURE):
    """Top-1 accuracy in percent of weighted kNN among the images themselves: each by its k nearest of the others (all
    of them, where there are fewer).

    bank (n, D), labels (n) 0..C-1: features and classes of all images, on all ranks; own (m): the rows that this rank
    judges, each row by one rank.
    """
    k, numbers = min(k, len(bank) - 1), torch.arange(len(bank), device=bank.device)
    num_classes, right = int(labels.max()) + 1, torch.zeros(2, dtype=torch.int64, device=bank.device)
    for rows in own.split(1024):
        cosines, found = nearest(bank[rows], bank, numbers, k + 1)                       # (Q, k + 1) twice
        # By its number, not by a cosine of 1, which a copy has too. Where k + 1 copies come first, the last one goes.
        is_other = found != rows[:, None]
        is_other[:, -1] &= ~is_other.all(dim=1)
        cosines, found = cosines[is_other].view(-1, k), found[is_other].view(-1, k)      # (Q, k) twice
        right += hits(votes(cosines, labels[found], temperature, num_classes), labels[rows], above=0)
    return 100 * accelerator.reduce(right, "sum")[0].item() / len(bank)


class KNNProbe:
    """For Run.steps: `evaluate`, None where there is nothing to evaluate on, every `passes` over the data or, if these
    are not known, `steps`.

    The images are read, decoded and cropped once, here, and stay on the host as they are: a probe costs forward passes.
    It draws no random number, and leaves the model as it was.
    """

    def __init__(self, run, encode, image_size, part, every, length):
        """encode(model, uint8 (B, 3, S, S) on the device) -> features (B, D), by model.encode(); part: what
        open_labelled_part gave; every: --probe-every; length: Length. After run.resume, on all ranks."""
        self.run, self.encode, self.model = run, encode, run.accelerator.unwrap_model(run.model)
        if run.world > 1:  # of FSDP, which would join weights in forward() alone; any other model is left as it is
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(self.model, "encode")
        self.evaluate, self.passes, self.steps = None, 1.0, None
        if every == 0 or run.progress.step >= length.steps:
            return
        when = self.plan(every, length, run.args.data.effective_batch_size)
        source, what = part
        trouble = None if source else what
        try:
            if source:
                images = SHARE * self.steps_between * run.args.data.effective_batch_size
                own = read_images(run, chosen(source, max(K + 1, min(MOST, round(images)))), image_size)
        except Exception as error:  # of any reader, or a server that stays away: the run can do without
            trouble = first_line(error)
        trouble = next(filter(None, run.gather([trouble])), None)  # without on one rank is without on all
        if trouble is None:
            trouble = self.keep(*own)
        if run.is_main and trouble:
            tqdm.write(printable(f"note: no kNN while it trains: {trouble}; the run goes on without it "
                                 "(--probe-every 0 does not try)"), file=sys.stderr)  # fmt: skip
        elif run.is_main:
            print(printable(f"kNN {when}: {len(self.labels)} images of {what}, each by its nearest of the others"),
                  flush=True)  # fmt: skip
        self.evaluate = None if trouble else self.top1

    def plan(self, every, length, batch):
        """Fills passes and steps, and steps_between two probes; when that is, in words."""
        per_pass, fewest = length.steps_per_pass, ENOUGH / SHARE / batch  # steps
        if per_pass is None:
            self.steps = self.steps_between = min(length.steps, math.ceil(max(length.steps / PROBES, fewest)))
            return f"every {self.steps} steps" if self.steps < length.steps else "at the end"
        self.passes = every or math.ceil(max(1.0, length.epochs / PROBES, fewest / per_pass) - 1e-9)
        self.steps_between = min(length.steps, self.passes * per_pass)
        if self.steps_between == length.steps:
            return "at the end"
        return "every epoch" if self.passes == 1 else f"every {self.passes:g} epochs"

    def keep(self, images, labels, ids):
        """The images of this rank, and where they are among all; why that cannot be, or None."""
        device = self.run.device
        images, labels, ids = images, labels.to(device), ids.to(device)
        every_id, every_label = gather_rows(self.run.accelerator, ids), gather_rows(self.run.accelerator, labels)
        if len(every_id) < 2:
            return "there are not two images with a label"
        every_id, self.order = every_id.sort()  # the same on any number of ranks
        values, self.labels, counts = every_label[self.order].unique(return_inverse=True, return_counts=True)
        if len(values) < 2:
            return f"all {len(every_id)} images have the same label"
        if counts.max() < 2:
            return f"no two of {len(every_id)} images have the same label"
        self.own = torch.searchsorted(every_id, ids)
        # FSDP joins weights in each forward pass: all ranks do as many, over images of nothing if need be
        most = max(self.run.gather([len(images)]))
        self.images = torch.cat([images, images.new_zeros(most - len(images), *images.shape[1:])])
        return None

    @torch.no_grad()
    def top1(self, line):
        """For the log: {"knn_top1": percent}. On all ranks."""
        self.model.eval()
        with self.run.accelerator.autocast():
            features = [self.encode(self.model, to_device(images, self.run.device)).float()
                        for images in self.images.split(self.run.args.data.batch_size)]  # fmt: skip
        self.model.train()
        if hasattr(self.model, "reshard"):  # of FSDP: without a backward pass its weights would stay whole
            self.model.reshard()
        features = torch.cat(features)[: len(self.own)]                                  # (m, D)
        bank = gather_rows(self.run.accelerator, features)[self.order]                   # (n, D)
        return {"knn_top1": round(leave_one_out(self.run.accelerator, bank, self.labels, self.own), 3)}
