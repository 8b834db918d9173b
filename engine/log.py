"""What a run says on its way: log.jsonl, the terminal, the tracker."""

from engine.arguments import cores_per_process, local_path
from engine.errors import first_line, printable
from engine.files import fsync, write_text

import json
import math
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tqdm.auto import tqdm

SCORES = {"top1": "top-1", "knn_top1": "kNN", "miou": "mIoU", "ap": "AP"}  # of evaluations, as the bar calls them
QUIET = 30.0  # seconds without a line, after which the terminal is told where the run is
MUCH_WAITING, JUDGED_AFTER = 0.1, 30.0  # share of the time without data that is worth a line, and seconds to judge by
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # tqdm's own without its rate


def step_of_line(line):
    """The step of a line of log.jsonl, as bytes; infinite for what a lost machine left of one."""
    try:
        step = json.loads(line.decode())["step"]
        return step if isinstance(step, int) else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


@dataclass
class Status:
    """Where a run is since its last line of the log, in plain numbers."""

    images_per_second: float
    data_wait: float
    """Share of the time in which there were no data."""
    done: int
    """Images of the step in progress that are done."""
    of: int
    """Images of a step."""


class Log:
    """log.jsonl, the terminal and the tracker. Main process only; the others call it in vain.

    The terminal also gets what the log does not have: the first step of this start and, after QUIET seconds without a
    line, where the run is. A thread tells it, since one step may take minutes; it asks status() -> Status.
    """

    def __init__(self, accelerator, run_dir, start, total, status=None):
        self.accelerator, self.path, self.total, self.start = accelerator, run_dir / "log.jsonl", total, start
        self.main = accelerator.is_main_process
        if self.main and self.path.exists():  # lines beyond the checkpoint are written again
            lines = [line for line in self.path.read_bytes().split(b"\n") if line.endswith(b"}")]
            lines = [line for line in lines if step_of_line(line) <= start]
            write_text(self.path, "".join(line.decode() + "\n" for line in lines))
        # a full disk may cut a line off: it is written again, after the last whole one
        self.size, self.pending = self.path.stat().st_size if self.main and self.path.exists() else 0, ""
        self.failed = False  # it is told once that lines cannot be written
        bar = self.main and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, bar_format=BAR, disable=not bar, dynamic_ncols=True, smoothing=0.05)
        self.began, self.step = time.perf_counter(), start
        self.loss, self.top1 = "", ""  # the last ones, as words
        self.told = self.stepped = self.began  # when something was shown last, and when a step was done
        self.is_first = True  # no step of this start has been shown yet
        self.status, self.silent = status, False
        self.lock, self.closed = threading.Lock(), threading.Event()
        if self.main and status:
            threading.Thread(target=self._tell_where, daemon=True).start()

    def begin(self, step):
        """The first batch of this start has come: the time left is reckoned from here."""
        self.began, self.start, self.step = time.perf_counter(), step, step
        self.stepped, self.is_first = self.began, True
        if not self.bar.disable:
            self.bar.n = step
            self.bar.unpause()

    def step_done(self):
        self.step, self.stepped = self.step + 1, time.perf_counter()
        self.bar.update()

    def write(self, values, shown=True):
        """One line of the log; in the terminal too, if shown."""
        if not self.main:
            return
        values = json.loads(json.dumps(values), parse_constant=lambda _: None)  # JSON has no number for nan
        self.pending += json.dumps(values) + "\n"
        try:
            with self.path.open("ab") as file:
                file.truncate(self.size)
                file.write(self.pending.encode())
            self.size, self.pending, self.failed = self.size + len(self.pending.encode()), "", False
        except OSError as error:
            if not self.failed:
                tqdm.write(printable(f"warning: {self.path} cannot be written: {first_line(error)}; its lines are kept "
                                     "until it can"), file=sys.stderr)  # fmt: skip
            self.failed = True
        try:
            tracked = {name: value for name, value in values.items()
                       if isinstance(value, (int, float)) and name not in ("step", "epoch")}  # fmt: skip
            self.accelerator.log(tracked, step=values["step"])
        except (OSError, RuntimeError) as error:  # the run is worth more than its curves
            tqdm.write(f"warning: the tracker failed: {first_line(error)}", file=sys.stderr)
        with self.lock:
            for name, word in SCORES.items():
                if values.get(name) is not None:
                    self.top1 = f"  {word} {values[name]:.1f}"
            self._know(values["loss"])
            if shown or not self.bar.disable:
                self.is_first = False
                self._show(values["step"], values["images_per_second"], values["data_wait"])
        for name in values.get("skipped_files", []):
            tqdm.write(printable(f"skipped {name}"), file=sys.stderr)

    @property
    def is_due(self):
        """Whether to tell() of the step just taken, for which the log has no line. (It knows its loss, the thread does
        not: in the last tenth of QUIET it goes first.)"""
        quiet = self.is_first or time.perf_counter() - self.told > 0.9 * QUIET
        return self.main and quiet and not self.closed.is_set()

    def tell(self, loss):
        """Show the step just taken, in the terminal alone. loss: a number, or None if there is none."""
        with self.lock:
            if loss is not None:
                self._know(loss)
            self.is_first, status = False, self.status()
            self._show(self.step, status.images_per_second, status.data_wait)

    @contextmanager
    def silence(self):
        """While an evaluation speaks for itself."""
        with self.lock:
            self.silent = True
        try:
            yield
        finally:
            self.silent, self.told = False, time.perf_counter()

    def _tell_where(self):
        """The thread: where the run is, and that the bar's clock goes on. It asks no device for anything."""
        while not self.closed.wait(min(1.0, QUIET / 10)):
            with self.lock, suppress(OSError):  # nobody reads any more: the run itself will notice
                if self.silent or self.closed.is_set():
                    continue
                now = time.perf_counter()
                if now - self.told > QUIET:
                    status, is_long = self.status(), now - self.stepped > QUIET and self.step < self.total
                    self._show(self.step, status.images_per_second, status.data_wait, status if is_long else None)
                elif not self.bar.disable:
                    self.bar.refresh()

    def _know(self, loss):
        self.loss = "loss not finite  " if loss is None or not math.isfinite(loss) else f"loss {loss:.4f}  "

    def _show(self, step, images_per_second, data_wait, in_step=None):
        """A line, or the bar's text. in_step: the Status of a step that takes long."""
        part = in_step.done / in_step.of if in_step else 0.0
        text = f"{in_step.done} of {in_step.of} images of the next step  " if in_step else ""
        rate = f"{images_per_second:.{int(images_per_second < 10)}f} images/s  " if images_per_second else ""
        text += f"{self.loss}{rate}waiting for data {data_wait:.0%}{self.top1}"
        self.told = time.perf_counter()
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
            return
        if done := step + part - self.start:
            left = (self.told - self.began) / done * (self.total - step - part)
            text += f"  {tqdm.format_interval(left)} left"
        print(f"step {step}/{self.total}  {text}", flush=True)

    def sync(self):
        """See that a line is there whenever the checkpoint of its step is."""
        if self.main and self.path.exists() and not self.pending:
            try:
                fsync(self.path)
            except OSError as error:  # on this rank alone: the others wait for it in the checkpoint
                tqdm.write(printable(f"warning: {self.path} cannot be written: {first_line(error)}"), file=sys.stderr)

    def close(self):
        with self.lock:  # not in the middle of a line
            self.closed.set()
        self.bar.close()


class WaitingNote:
    """Says, in one line and once, that a run waits for its data, and what would help."""

    def __init__(self, data):
        """data: ImagesArgs."""
        self.data, self.is_told, self.is_first = data, False, True
        self.seconds = self.waited = 0.0

    def add(self, seconds, waited):
        """Seconds between two lines of the log, and of these the ones without data."""
        if self.is_first:  # the loading processes have only just begun
            self.is_first = False
            return
        self.seconds, self.waited = self.seconds + seconds, self.waited + waited
        if self.is_told or self.seconds < JUDGED_AFTER:
            return
        if self.waited > MUCH_WAITING * self.seconds:
            self.is_told = True
            tqdm.write(f"note: {self.waited / self.seconds:.0%} of the time there are no data to train on: "
                       f"{help_with_waiting(self.data)}", file=sys.stderr)  # fmt: skip
        self.seconds = self.waited = 0.0


def help_with_waiting(data):
    """What would make the data of ImagesArgs come faster."""
    cores = cores_per_process()
    if data.workers < cores:
        return f"--workers {cores} would load on all {cores} cores of each process instead of {data.workers}"
    if data.streaming and local_path(data.dataset) is None:
        return "--no-streaming would read from a copy on disk; more or faster cores, or smaller images, help too"
    return (f"{data.workers} loading processes share {cores} core{'s' * (cores > 1)}: more or faster cores for each "
            "process would help, images that are stored smaller, or a faster disk")  # fmt: skip


def watch(chunks, total, what, shown):
    """Pass chunks on, with a bar of images, images/s, the share of time waiting for data and the time left; outside a
    terminal a line every ten seconds."""
    bar = tqdm(total=total, desc=what, unit="image", disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True)
    began, waited, done, last = time.perf_counter(), 0.0, 0, time.perf_counter()
    chunks = iter(chunks)
    while True:
        asked = time.perf_counter()
        chunk = next(chunks, None)
        now = time.perf_counter()
        waited += now - asked
        if chunk is None:
            break
        yield chunk
        done += len(chunk["ids"])
        bar.update(len(chunk["ids"]))
        bar.set_postfix_str(f"waiting for data {waited / (now - began):.0%}", refresh=False)
        if shown and bar.disable and now - last > 10:
            last, rate = now, done / (now - began)
            left = tqdm.format_interval((total - done) / rate) if total else "?"
            print(f"{what}: {done}/{total or '?'} images  {rate:.0f} images/s  waiting for data "
                  f"{waited / (now - began):.0%}  {left} left", flush=True)  # fmt: skip
    bar.close()
