"""Run: device, processes, signals, skipped steps, log and checkpoints. It hands out steps; the script takes them."""

from engine.arguments import cores_per_process, flat, marks_of, world_size
from engine.checkpoints import (
    Progress,
    checkpoints,
    load_checkpoint,
    lock_run_dir,
    make_run_dir,
    plan_resume,
    report_resume,
    run_to_resume,
    save_checkpoint,
    whole_weights,
    write_config,
    write_model_folder,
)
from engine.errors import (
    STOP_SIGNALS,
    RunError,
    UserError,
    first_line,
    printable,
    require,
    speaks_for_others,
)
from engine.files import write_text
from engine.images import to_device
from engine.log import Log, Status, WaitingNote
from engine.network import growing_pauses, patience_at_start
from engine.seeds import seed_of
from engine.stream import Stream

import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm


@dataclass
class Length:
    """How long a run is."""

    steps: int
    """Optimizer steps."""
    steps_per_pass: float | None
    """Steps of a pass over the data; None where the number of images is unknown."""
    data: str = ""
    """Name of the data set."""

    @property
    def epochs(self):
        """Passes over the data; None where the number of images is unknown."""
        return self.steps / self.steps_per_pass if self.steps_per_pass else None

    def warmup(self, epochs, share):
        """Steps in which the learning rate rises: so many epochs or, for None, one of `share` parts of the run. Raises
        UserError."""
        if epochs is None:
            return self.steps // share
        require(self.steps_per_pass is not None,
                f"the number of images in {self.data} is unknown: --warmup-epochs needs --num-images")
        steps = round(epochs * self.steps_per_pass)
        require(steps < self.steps, f"--warmup-epochs {epochs} is not shorter than the run")
        return steps


def length_of_run(run, data, source):
    """RunArgs, DataArgs, Source -> Length. Raises UserError."""
    known = source.num_images is not None
    unknown = f"the number of images in {source.name} is unknown"
    require(known or run.steps is not None, f"{unknown}: pass --num-images, or --steps for --epochs")
    steps_per_pass = source.num_images / data.effective_batch_size if known else None
    return Length(total_steps(run, steps_per_pass), steps_per_pass, source.name)


def total_steps(run, steps_per_pass):
    """Optimizer steps that RunArgs ask for; `steps_per_pass` counts where these are epochs."""
    return run.steps or max(1, math.ceil(run.epochs * steps_per_pass - 1e-9))


def completes_passes(step, total, steps_per_pass, every):
    """Whether the step that ends at `step` completes another `every` passes, or the run."""
    passed = (steps_per_pass or math.inf) * every
    return step == total or int(step / passed + 1e-9) > int((step - 1) / passed + 1e-9)


@dataclass
class SkippedSteps:
    """Counts of steps that were skipped, as tensors on the device: the host does not wait for them."""

    streak: torch.Tensor
    """Of the last steps, one after the other."""
    longest: torch.Tensor
    """The longest streak since the last line of the log."""
    total: torch.Tensor

    def count(self, skipped):
        """One more step; `skipped` is a boolean tensor."""
        self.streak = torch.where(skipped, self.streak + 1, 0)
        self.longest = torch.maximum(self.longest, self.streak)
        self.total = self.total + skipped


@dataclass
class Interval:
    """What comes together between two lines of the log."""

    sums: dict = field(default_factory=dict)
    """{name: sum over the steps that were not skipped}, tensors on the device."""
    numbers: dict = field(default_factory=dict)
    """{name: value of the last step}, Python's numbers."""
    good: int | torch.Tensor = 0
    """Steps that were not skipped."""
    steps: int = 0
    waited: float = 0.0
    """Seconds in which there were no data."""
    began: float = field(default_factory=time.perf_counter)

    def add(self, values, skipped):
        """The values of one more step; `skipped` is a boolean tensor."""
        self.good, self.steps = self.good + ~skipped, self.steps + 1
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                self.sums[name] = self.sums.get(name, 0) + torch.where(skipped, 0, value.detach())
            else:
                self.numbers[name] = value


class Interruption(Exception):  # noqa: N818 (no error)
    """No further step: a stop was asked for or, in __cause__, this process has no data."""


class Run:
    """One run of a script. In the script's order:

        with Run(args) as run:                       # device and processes
            with run.main_process_first():           # work that downloads and checks
                run.open_folder(args)                # is it the same run? where does it go on?
                ...
            model, optimizer = run.prepare(model, optimizer)
            run.resume(length, ...)                  # model, optimizers and run.memory, if there is a checkpoint
            stream = run.stream(source, view)        # from where the checkpoint stands in the data
            for step in run.steps(stream):           # logs, evaluates and writes checkpoints between the steps
                for images, ... in run.micro_batches():  # of one step, on the device
                    with run.accumulate(model):
                        ...
                        run.backward(loss)
                    run.log(losses)
                run.update(optimizer)                # or the script's own step, and run.record(...)

    The stream is engine.stream.Stream, or what has the same: `next(stream)`, a dict with a tensor for each of its
    `names`; `part`, the part of the data that it came from; `state_dict()`; `skipped`, the number of files that could
    not be used, `skipped_names`, those not reported yet, and `reported()`, which empties them.

    A signal, or data that cannot be had, end the run after a checkpoint of the last step that was taken: out of the
    loop, with SystemExit(0), UserError or RunError.

    Fields: device, rank, world (number of processes), is_main; folder; accumulation (micro-batches of a step); memory,
    a dict of what the script keeps in checkpoints, fit for JSON.
    """

    def __init__(self, args, project="cae"):
        """args: a script's, with the groups `run` and `data`; project: the tracker's name for such runs."""
        self.began, self.args, self.project = time.perf_counter(), args, project
        self.accelerator, self.precision = make_accelerator(args.run, args.data, getattr(args.run, "tracker", "none"))
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.folder, self.progress, self.memory = Path(args.run.run_dir), Progress(), {}
        self.log_file, self.peers, self.values_of_step, self.recorded_step = None, None, {}, None
        self.lock_file = None

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if isinstance(error, Interruption):
                self._leave(error.__cause__)
        finally:
            self._close()
            if self.lock_file:
                self.lock_file.close()

    def _close(self):
        for part in (self.log_file, self.peers):
            if part:
                part.close()

    # ---------------------------------------------------------------------------------------------- before the loop

    @contextmanager
    def main_process_first(self):
        """Work that downloads and checks, on the main process first; where there is a checkpoint, servers are waited
        for. A UserError or RunError on one rank becomes one on all of them, so that all end."""
        mistake = None
        with self.accelerator.main_process_first():
            try:
                with patience_at_start(self.args.data.patience if self._goes_on() else 0.0):
                    yield
            except (UserError, RunError) as error:
                mistake = error
        raise_together(mistake)

    def _goes_on(self):
        """Whether there is a checkpoint to go on from. Raises UserError."""
        if getattr(self.args.run, "resume", "never") == "never":  # some sub-commands have nothing to resume
            return False
        folder, checkpoint = run_to_resume(self.args.run)
        return checkpoint is not None or bool(checkpoints(folder))

    @property
    def frozen_dtype(self):
        """The dtype for what is frozen and runs outside of autocast; None: its own. (fp16 is slow on CPUs.)"""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16 if self.device.type != "cpu" else None}
        return half.get(self.precision)

    def open_folder(self, args, **more):
        """Check the run folder against these arguments, all of them resolved (and `more` that tells this run from
        others), by the rule of engine.checkpoints.plan_resume. Raises UserError."""
        self.args, self.folder = args, Path(args.run.run_dir)
        self.values = {**json.loads(json.dumps(flat(args))), **more}
        if self.folder.exists():
            self.lock_folder()  # before a look at what another run may be writing
        self.plan = plan_resume(args.run, self.values, marks_of(args))
        make_run_dir(self.folder / "checkpoints")
        self.lock_folder()
        self.accumulation = args.data.effective_batch_size // (args.data.batch_size * self.world)

    def lock_folder(self):
        """No other run may write to this folder until this one ends. Raises UserError."""
        if self.is_main and not self.lock_file:
            self.lock_file = lock_run_dir(self.folder)

    def header(self, what, length=None):
        """The first line: what is run, and how."""
        if self.is_main:
            data, epochs = self.args.data, "evaluation only"
            if length:
                epochs = f"{length.steps} steps, {round(length.epochs, 1) if length.epochs else '?'} epochs"
            note = f" ({data.batch_note})" if data.batch_note else ""
            line = (f"{what}; {self.world} process{'es' * (self.world > 1)} x {data.batch_size} images x "
                    f"{self.accumulation} = {data.effective_batch_size} images a step{note}; {epochs}; "
                    f"{'fp32' if self.precision == 'no' else self.precision} on "
                    f"{'cpu' if self.device.type == 'cpu' else self.device}; {self.folder}")  # fmt: skip
            print(printable(line), flush=True)

    def prepare(self, model, *optimizers):
        """The model, wrapped for its device and processes, and the optimizers: what a checkpoint holds. Raises
        UserError."""
        require(
            self.accelerator.scaler is None or len(optimizers) == 1,
            "--precision fp16 scales the gradients of one optimizer, here are several: use bf16 or fp32",
        )
        with warnings.catch_warnings():  # newer versions of torch rename broadcast_buffers, accelerate does not yet
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            self.model, *optimizers = self.accelerator.prepare(model, *optimizers)
        return self.model, *optimizers

    def resume(self, length, model_config):
        """Go on from the best checkpoint, if there is one: weights, optimizers, self.progress and self.memory. Writes
        config.json, and says so. Raises UserError."""
        self.length = length
        error = None
        try:
            self.progress = load_checkpoint(self.accelerator, self.plan, self.folder, self.args.data.parts)
        except UserError as mistake:
            error = mistake
        raise_together(error)
        self.memory = self.progress.more
        if self.is_main:
            changes = self.plan.changes(self.progress.step) if self.progress.path else ()
            write_config(self.folder, self.values, model_config, changes)
            report_resume(self.progress, self.plan, length.steps, self.folder)

    def stream(self, source, view):
        """This process's endless stream of batches, from where the checkpoint stands in the data. Raises UserError."""
        progress, args = self.progress, self.args
        try:
            return Stream(source, view, args.data, args.run.seed, self.rank, self.world, progress.data_states,
                          progress.first_pass)  # fmt: skip
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            require(not progress.data_states, f"checkpoint {progress.path} does not fit: its position in the data has "
                                              f"another shape ({first_line(error)})")  # fmt: skip
            raise

    # ------------------------------------------------------------------------------------------------------ the loop

    def steps(self, stream, *, evaluate=None, evaluate_every=1.0, evaluate_steps=None, write_model=None,
              before_checkpoint=None):  # fmt: skip
        """The steps that are left, as numbers from 0: an iterator for the script's `for`. In between it logs, evaluates
        and writes checkpoints.

        evaluate(line) -> dict is called every `evaluate_every` passes (or so many `evaluate_steps`) and at the end, on
        all ranks, with the line of the log that what it returns is added to. write_model(folder, step, weights), on the
        main process, writes model/ beside each checkpoint; weights is the model's whole state_dict.
        before_checkpoint() is called on all ranks.
        Raises RunError and UserError.
        """
        run, start, total = self.args.run, self.progress.step, self.length.steps
        self.batch_stream, self.evaluate, self.before_checkpoint = stream, evaluate, before_checkpoint
        self.write_model = write_model
        start_tracker(self.accelerator, self.project, self.args)
        unevaluated = self.progress.unevaluated
        self.peers = Peers(self.world, run.timeout + self.args.data.patience)
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped_steps = SkippedSteps(zero, zero, zero + self.progress.skipped_steps)
        self.interval, self.reported_streak = Interval(), 0
        self.checkpoint_step, self.save_pending = start, False
        self.save_pause = self.save_again = 0  # steps between attempts to write a checkpoint, and the step of the next
        self.micro_batches_done, self.waiting_since = 0, None  # of the step in progress; seconds, while there are none
        self.log_file = Log(self.accelerator, self.folder, start - bool(unevaluated), total, self._status)
        self.waiting_note = WaitingNote(self.args.data)
        if unevaluated:
            with self.log_file.silence():
                line = {**unevaluated, **evaluate(unevaluated)}
            self.log_file.write(line)
        for self.step in range(start, total):
            self.states_before = stream.state_dict()  # to go back to, should this step not be taken
            yield self.step
            assert self.recorded_step == self.step, "the loop took no step: call run.update() in it"
            done, per_pass = self.step + 1, self.length.steps_per_pass
            if evaluate_steps:
                self._after_step(done, done == total or done % evaluate_steps == 0)
            else:
                self._after_step(done, completes_passes(done, total, per_pass, evaluate_every))
        self._close()
        if start >= total:
            self._complete(start)

    def micro_batches(self):
        """The micro-batches of one step, on the device, each when all processes have theirs: a tuple of what the view
        and the labels give. Raises Interruption."""
        stream, parts = self.batch_stream, self.args.data.parts // self.world  # parts that this process carries
        for micro in range(self.accumulation):
            asked, batch, trouble = time.perf_counter(), None, None
            self.micro_batches_done, self.waiting_since = micro, asked
            try:
                self.peers.interruptible = True
                batch = next(stream)
            except Stop:
                pass
            except Exception as error:  # a server that stays away, bad files, a loading process that died
                trouble = error
            finally:
                self.peers.interruptible = False
            if self.peers.any(batch is None or (self.peers.signal and micro == 0)):
                raise Interruption from trouble
            self.interval.waited, self.waiting_since = self.interval.waited + time.perf_counter() - asked, None
            if micro == 0 and self.step == self.progress.step:
                self.log_file.begin(self.step)
            # stochastic depth and the like: a function of the seed, the step and the part of the data
            torch.manual_seed(seed_of(self.args.run.seed, self.step, micro // parts, stream.part))
            self.last_micro_batch = micro == self.accumulation - 1
            yield tuple(to_device(batch[name], self.device) for name in stream.names)

    @contextmanager
    def accumulate(self, model):
        """Around forward and backward of a micro-batch: processes join their gradients after the last one only."""
        no_sync = nullcontext() if self.last_micro_batch else self.accelerator.no_sync(model)
        with no_sync, attention_for(self.device, self.precision):
            yield

    def backward(self, loss):
        """(loss / accumulation).backward(). Where the loss is not finite every gradient of every process becomes nan,
        so that the step is skipped."""
        self.accelerator.backward(loss * finite(loss) / self.accumulation)

    def log(self, losses):
        """For the next line of the log: {name: tensor} of a micro-batch, as the mean over micro-batches, steps and
        processes; or numbers of the step, as they are."""
        for name, value in losses.items():
            if isinstance(value, torch.Tensor):
                value = self.values_of_step.get(name, 0.0) + value.detach() / self.accumulation
            self.values_of_step[name] = value

    def update(self, *optimizers, clip_grad=0.0):
        """Clip the gradient's norm (0: not), optimizer.step(), optimizer.zero_grad(); a gradient that is not finite
        changes nothing, and the step counts as skipped."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), clip_grad or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of FSDP
        skipped = ~torch.isfinite(norm)
        for optimizer in optimizers:
            step_unless(skipped, optimizer, self.accelerator.scaler)
            optimizer.zero_grad(set_to_none=True)
        self.record({"grad_norm": norm}, skipped)

    def record(self, values, not_finite):
        """The script took a step by itself, without update(): values of it, as log() takes them (tensors as the mean
        over steps and processes), and whether it was `not_finite`, a boolean tensor on the device."""
        assert self.recorded_step != self.step, "two updates in one step"
        values, self.values_of_step = {**self.values_of_step, **values}, {}
        self.skipped_steps.count(not_finite)
        self.interval.add(values, not_finite)
        self.recorded_step = self.step

    # ---------------------------------------------------------------------------------------------- between the steps

    def _after_step(self, done, evaluates):
        """Log, evaluate and write a checkpoint where it is time."""
        run, total = self.args.run, self.length.steps
        self.micro_batches_done = 0
        self.log_file.step_done()
        evaluates = evaluates and self.evaluate is not None
        writes = done == total or done % run.checkpoint_every == 0
        writes = writes or (run.milestone_every and done % run.milestone_every == 0)
        logs = done % run.log_every == 0
        if not (logs or evaluates or writes):
            if self.log_file.is_due:
                self.log_file.tell(self._own_loss())
            return
        states = self.batch_stream.state_dict()
        streak = self._report(done, states, evaluates, shown=logs or done == total or self.log_file.is_due)
        if writes or (self.save_pending and done >= self.save_again):
            self.save_pending = bool(streak) or not self._save(done, states)  # ruined weights are not written
            for pause in growing_pauses(self.args.data.patience):
                if not self.save_pending or done < total or self.peers.any(self.peers.signal):
                    break
                time.sleep(pause)
                self.save_pending = not self._save(done, states)
            if self.save_pending and done == total:
                raise RunError(f"the last checkpoint could not be written: make room in {self.folder}, and start again")

    def _report(self, step, states, evaluates, shown):
        """One line of the log; the number of skipped steps that it ends with. Here and in _save the host waits for the
        device."""
        interval, effective = self.interval, self.args.data.effective_batch_size
        means, unusable, names = self._means()
        streak, all_skipped, seen = self._count_skipped(step, states)
        seconds, steps_per_pass = time.perf_counter() - interval.began, self.length.steps_per_pass
        line = {
            "step": step,
            "epoch": round(step / steps_per_pass, 4) if steps_per_pass else None,
            **means,
            **interval.numbers,
            "images": step * effective,
            "images_per_second": round(interval.steps * effective / seconds, 1),
            "data_wait": round(interval.waited / seconds, 4),
            "skipped": unusable,
            "bad_steps": all_skipped,
            "seen": seen,
            **({"skipped_files": names} if names else {}),
        }
        if evaluates:
            try:
                with self.log_file.silence():
                    line |= self.evaluate(line)
            except (UserError, RunError):  # images to evaluate on that cannot be had: a resumed run tries them again
                self._save(step, states, unjudged=line)
                raise
        self.log_file.write(line, shown)
        if self.is_main:
            self.waiting_note.add(seconds, interval.waited)
        self.interval, self.reported_streak = Interval(), streak
        return streak

    def _status(self):
        """Where the run is: asked by the log's thread at any moment, of numbers that the host knows."""
        interval, effective, now = self.interval, self.args.data.effective_batch_size, time.perf_counter()
        done, waiting_since = self.micro_batches_done * effective // self.accumulation, self.waiting_since
        seconds = max(now - interval.began, 1e-9)
        waited = interval.waited + (now - waiting_since if waiting_since else 0)
        return Status((interval.steps * effective + done) / seconds, min(waited / seconds, 1), done, effective)

    def _own_loss(self):
        """The mean loss of this process in this interval; None if the script names none. The host waits for the
        device, and for no other process."""
        loss = self.interval.sums.get("loss")
        return None if loss is None else (loss / self.interval.good).item()

    def _means(self):
        """{name: mean over steps and processes} of the interval; the number of files of all processes that could not be
        used, and the names of those that have not been reported yet."""
        stream, sums = self.batch_stream, self.interval.sums
        counts = [stream.skipped, len(stream.skipped_names)]
        flat_means = torch.cat([(value / self.interval.good).flatten() for value in sums.values()]) / self.world
        counts = torch.tensor(counts, dtype=flat_means.dtype, device=self.device)
        *numbers, unusable, unreported = self.accelerator.reduce(torch.cat([flat_means, counts]), "sum").tolist()
        means = {}
        for name, value in sums.items():
            values, numbers = numbers[: value.numel()], numbers[value.numel() :]
            means[name] = values if value.ndim else values[0]
        names = self.gather(stream.skipped_names) if unreported else []
        stream.reported()
        return means, round(unusable), names

    def _count_skipped(self, step, states):
        """The number of steps skipped in a row up to this one, and of all; and a fingerprint of all images so far in
        their order, equal for runs that have seen the same. Raises RunError for too many in a row."""
        skipped = self.skipped_steps
        counts = torch.stack([skipped.streak, skipped.longest, skipped.total])
        seen = torch.tensor([state["seen"] for state in states.values()], device=self.device)
        gathered = self.accelerator.gather(torch.cat([counts, seen])[None])  # (world, 3 + parts of each)
        streak, longest, total = gathered[:, :3].amax(dim=0).tolist()
        skipped.longest = torch.full_like(skipped.longest, streak)
        in_health = self.accelerator.scaler is not None  # fp16's scaler skips steps in health
        if longest >= self.args.run.max_bad_steps or (step == self.length.steps and streak and not in_health):
            last = next(reversed(checkpoints(self.folder)), None)
            raise RunError(
                f"loss or gradient was not finite in {longest} steps in a row, up to step {step}; the last good "
                f"checkpoint is {last or 'none: none was written yet'}"
            )
        return 0 if in_health else streak, total, f"{seed_of(*gathered[:, 3:].T.flatten().tolist()):016x}"

    def _save(self, step, states, **more):
        """Write a checkpoint; False if that was not possible, which is reported."""
        self.log_file.sync()
        write = self._model_writer(step)
        trainer = {**self.memory, "bad_steps": self.skipped_steps.total.item(), **more}
        problem = save_checkpoint(self.accelerator, self.args.run, step, states, trainer, write)
        self.interval.began = time.perf_counter()
        if problem is None:
            self.checkpoint_step, self.save_pause = step, 0
            return True
        run = self.args.run  # again after 1, 2, 4, ... lines of the log, and with every checkpoint that is due
        self.save_pause = min(2 * self.save_pause or run.log_every, run.checkpoint_every)
        self.save_again = step + self.save_pause
        if self.is_main:
            last = next(reversed(checkpoints(self.folder)), "none")
            line = (f"warning: the checkpoint of step {step} could not be written: {problem}; the run goes on and "
                    f"tries again; the last checkpoint is {last}")  # fmt: skip
            tqdm.write(printable(line), file=sys.stderr)
        return False

    def _model_writer(self, step):
        """What writes model/ into a folder, or None. Called on all ranks."""
        if self.before_checkpoint:
            self.before_checkpoint()
        if self.write_model is None:
            return None
        weights = whole_weights(self.model)
        return lambda folder: self.write_model(folder, step, weights)

    def _complete(self, step):
        """A finished run: resumed by its path into a new folder, or cut off before model/ was written."""
        write = self._model_writer(step)
        if self.is_main and write and checkpoints(self.folder):
            problem = write_model_folder(self.folder / "model", write)
            if problem:
                raise RunError(f"{self.folder / 'model'} could not be written: {problem}")
        if not checkpoints(self.folder) and not self._save(step, self.batch_stream.state_dict()):
            raise RunError(f"the checkpoint could not be written: make room in {self.folder}, and start again")

    def _leave(self, trouble):
        """Out of the loop before `self.step`, with a checkpoint."""
        step, states, run = self.step, self.states_before, self.args.run
        streak = self._report(step, states, False, True) if self.interval.steps else self.reported_streak
        if self.checkpoint_step != step and not streak:
            self._save(step, states)
        self._close()
        ours = [self.peers.signal, trouble and (isinstance(trouble, UserError), first_line(trouble))]
        signals, troubles = zip(*self.gather([ours]), strict=True)
        first = next((t for t in troubles if t), None)
        last = next(reversed(checkpoints(self.folder)), None)
        command = "the same command" if run.resume == "auto" else "the same command with --resume auto"
        going_on = f"{command} continues from {last}" if last else "there is no checkpoint yet"
        if first is None:
            if self.is_main:
                line = f"stopped by {next(filter(None, signals))} after step {step}: {going_on}"
                print(printable(line), flush=True)
            self.accelerator.end_training()
            raise SystemExit(0)
        if trouble and not isinstance(trouble, (UserError, RunError)):
            raise trouble
        raise (UserError if first[0] else RunError)(f"{first[1]}; {going_on}") from trouble

    # ----------------------------------------------------------------------------------------------- after the loop

    def gather(self, values):
        """The lists of all ranks, one after the other."""
        from accelerate.utils import gather_object

        return gather_object(values)

    def end(self):
        """After the last step, on all ranks."""
        self.accelerator.end_training()

    def write_result(self, script, result):
        """result.json, with how it came about; returned. On the main process."""
        return write_result(self.folder, script, {**result, "processes": self.world}, self.began)

    def print_result(self, lines, result):
        """The last lines of a script. On the main process."""
        print_result(self.folder, lines, result)


def write_result(folder, script, result, began):
    """result.json of what a script has found since `began` (time.perf_counter's), with how it came about; returned.
    Raises RunError."""
    result |= {"seconds": round(time.perf_counter() - began, 1), "command": shlex.join([script, *sys.argv[1:]])}
    write_text(folder / "result.json", json.dumps(result, indent=2))
    return result


def print_result(folder, lines, result):
    """The last lines of a script: those of a table, the path of result.json and, where standard output is no terminal,
    the same object on one line: scripts read it."""
    in_terminal = sys.stdout.isatty()
    lines = [*lines, "", f"{folder / 'result.json'}{'' if in_terminal else ':'}"]
    print(*map(printable, lines), sep="\n", flush=True)
    if not in_terminal:
        print(json.dumps(result), flush=True)


# ----------------------------------------------------------------------------------------------------------------
# What a step needs.


def finite(loss):
    """A factor for the loss: 1, or nan where it is not finite, so that then every gradient of every process is nan."""
    return 1 + 0 * loss.detach()


def step_unless(skipped, optimizer, scaler=None):
    """optimizer.step(), but for what `skipped`, a boolean tensor on the device, says.

    fp16's scaler looks for itself. torch's fused Adam and AdamW take its answer from the device, and then the host need
    not know it. For any other optimizer the host waits for the device and asks. (Fused SGD claims to do as fused Adam,
    but when its first step is skipped it goes on with momentum that nobody has written.)
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    is_adam = isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
    if scaler is not None:
        optimizer.step()
    elif is_adam and getattr(inner, "_step_supports_amp_scaling", False):
        inner.found_inf = skipped.float()
        optimizer.step()
    elif not skipped.item():
        optimizer.step()


def attention_for(device, precision):
    """A context for what is trained: fused attention, but for bf16 on a CPU, where its backward pass takes longer than
    plain products do."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" and precision == "bf16" else nullcontext()


# ----------------------------------------------------------------------------------------------------------------
# Devices and processes.


def make_accelerator(run, data, tracker="none"):
    """DeviceArgs, ImagesArgs -> Accelerator and the name of its autocast ("no", "bf16", "fp16"). Raises UserError."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.utils import parse_flag_from_env

    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = {"auto": "bf16" if has_bf16 else "no", "fp32": "no"}.get(run.precision, run.precision)
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=None if tracker == "none" else tracker,
        project_dir=run.run_dir,
        # the buffers are fixed positions, or statistics that are joined where they are used: nothing to broadcast
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(minutes=run.timeout + data.patience)),
        ],
    )
    launched = world_size()
    require(accelerator.num_processes >= launched,
            f"{launched} processes were launched for GPUs, and no GPU was found: for processes on a CPU start with "
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {launched} {Path(sys.argv[0]).name} ...")  # fmt: skip
    if accelerator.device.type == "cpu":
        torch.set_num_threads(cores_per_process())  # accelerate launch leaves one
    return accelerator, precision


def join_statistics(accelerator, model):
    """The running statistics of every BatchNorm become the mean over all ranks, which saw different images."""
    for name, buffer in model.named_buffers():
        if "running_" in name and accelerator.num_processes > 1:
            buffer.copy_(accelerator.reduce(buffer.clone(), "mean"))


def raise_together(error):
    """A UserError or RunError of one rank (None on the others) becomes one on all of them, so that all end."""
    from accelerate.utils import gather_object

    found = [e for e in gather_object([error and (isinstance(error, UserError), str(error))]) if e]
    if found:
        raise (UserError if found[0][0] else RunError)(found[0][1]) from error


def start_tracker(accelerator, project, args):
    """The tracker of --tracker, on the main process. Raises UserError, on all ranks."""
    mistake, name = None, args.run.tracker
    try:
        if name != "none":
            accelerator.init_trackers(project, config={k: str(v) for k, v in flat(args).items()})
    except Exception as error:  # each tracker has its own
        mistake = UserError(f"--tracker {name} cannot be started: {first_line(error)}; log in, or use another")
    raise_together(mistake)


def answer(message):
    """A line on standard error, from a signal's handler: print() could be in the middle of another line."""
    with suppress(OSError):  # closed
        os.write(2, ("\n" * os.isatty(2) + message + "\n").encode())


class Stop(BaseException):
    """A signal while waiting for data; no Exception, which would be taken for a bad file."""


class Peers:
    """What the processes of a run say to each other between steps, from host to host: no device is waited for.

    From here on SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop (unless they are ignored, as in the background of
    a script), and are answered at once; a second Ctrl-C ends the process. `signal` is the name of the one that came.
    """

    def __init__(self, processes, minutes):
        self.signal, self.group = None, None
        self.interruptible = False  # while waiting for data, which a server may not give for a long time
        if processes > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
        handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.handle) for number in handled}
        # torch reports the death of a loading process wherever the program is; here, when its data are asked for
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def handle(self, number, frame):
        name, answered = signal.Signals(number).name, self.signal is not None
        self.signal = name
        if number == signal.SIGINT:  # a terminal sends it to all processes: one answers
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if speaks_for_others():
                answer("stopping after this step; again to end now")
        elif not answered:
            answer(f"{name}: stopping after this step")
        if self.interruptible:
            raise Stop

    def any(self, value):
        """Whether the value is true on any process."""
        if self.group is None:
            return bool(value)
        value = torch.tensor(int(bool(value)))
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, self.group)
        return bool(value.item())

    def close(self):
        """Give signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
