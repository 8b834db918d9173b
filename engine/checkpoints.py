"""The run folder: config.json, checkpoints/step_00000123/, model/. What is in it, what is whole, where a run goes on.

A checkpoint holds what Accelerate saves (model, optimizers, generators), data_N.json (the position in part N of the
data), trainer.json (the step, and what a script adds) and SHA256SUMS of all of these.
"""

from engine.arguments import Mark
from engine.errors import BAD_PICKLE, UserError, first_line, printable, require
from engine.files import publish, replace_files, write_text

import errno
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

SUMS = "SHA256SUMS"  # of a checkpoint's files, as `sha256sum --check` reads it


def checkpoints(run_dir):
    """Finished checkpoints of a run folder, oldest first."""
    found = (Path(run_dir) / "checkpoints").glob("step_*")
    return sorted((path for path in found if re.fullmatch(r"step_\d{8,}", path.name)), key=step_of)


def step_of(checkpoint):
    """The number of steps that a checkpoint's name tells."""
    return int(checkpoint.name.removeprefix("step_"))


# ----------------------------------------------------------------------------------------------------------------
# Is this the same run, where does it go on, do the data begin anew?


@dataclass
class Resume:
    """Where a run goes on, or begins."""

    candidates: list = field(default_factory=list)
    """Checkpoints to start from, the best first."""
    changed: dict = field(default_factory=dict)
    """{name: [old value, new value]} of what may change, and does."""
    added: dict = field(default_factory=dict)
    """{name: value} of flags that the run's config.json does not know yet."""
    history: list = field(default_factory=list)
    """Changes of before, as config.json lists them: [{"step": ..., "values": {name: [old, new]}}]."""
    marks: dict = field(default_factory=dict)
    """{name: Mark} of the flags."""

    def changes(self, step):
        """All changes, if the run goes on from this step: a later one counts from here."""
        past = [{**change, "step": min(change["step"], step)} for change in self.history]
        return past + ([{"step": step, "values": self.changed}] if self.changed else [])

    def data_begin_anew(self, step):
        """Whether the data begin anew at this step, by the table of plan_resume. (config.json holds a change from the
        start, a checkpoint only once it is written: until then the checkpoint is of before.)"""
        late = [name for change in self.changes(step) if change["step"] >= step for name in change["values"]]
        return any(self.marks.get(name) is Mark.DATA for name in late)


def plan_resume(run, values, marks):
    """The rule: is this the same run, where does it go on, do the data begin anew? Raises UserError.

    Args: run, the RunArgs; values, {name: value} of everything that config.json is to say; marks, {flag: Mark}.

    Where to start, by --resume and what the run folder holds:

        auto     no checkpoint                 the beginning
                 checkpoints                   the last one that is whole
        never    no checkpoint                 the beginning
                 checkpoints                   UserError
        PATH     none, or none beyond PATH     PATH; of a run folder, its last checkpoint that is whole
                 one beyond PATH               UserError: that would be a branch

    What may differ from the config.json of the run folder, and of the one that PATH names, by the mark at the flag:

                                     as it is                         with --resume-changed
        FREE                         goes on                          goes on
        LENGTH, longer than before   goes on; the learning rate       goes on
                                     follows the new length
        LENGTH, otherwise            UserError                        goes on
        DATA                         UserError                        goes on; the data begin anew, with the pass after
                                                                      the last one that was seen
        no mark                      UserError                        goes on
        a name that only one has     goes on (the code has changed)   goes on
    """
    run_dir = Path(run.run_dir)
    if run.resume == "never" and checkpoints(run_dir):
        raise UserError(f"run folder {run_dir} already holds a run: pass --resume auto, or another --run-dir")
    compare_runs(values, marks, run_dir, config_of_run(run_dir), run.resume_changed)
    folder, checkpoint = run_to_resume(run)
    candidates = [checkpoint] if checkpoint else checkpoints(folder)[::-1]
    branch = branches_off(run_dir, candidates[0]) if run.resume not in ("auto", "never") else None
    if branch:
        raise UserError(branch)
    config = config_of_run(folder) if candidates else {}
    changed = compare_runs(values, marks, folder, config, run.resume_changed)
    added = {name: value for name, value in values.items() if name not in config["args"]} if config else {}
    return Resume(candidates, changed, added, config.get("changed", []), marks)


def branches_off(run_dir, checkpoint):
    """Why a run must not go on in this folder from this checkpoint, or None: the folder is farther."""
    last = next(reversed(checkpoints(run_dir)), None)
    if last is None or step_of(last) <= step_of(checkpoint):
        return None
    return f"run folder {run_dir} goes on to {last.name}: pass --resume auto, or to branch off another --run-dir"


def compare_runs(values, marks, folder, config, allowed):
    """{name: [old, new]} of what differs from a run's config.json and may. Raises UserError for what may not."""
    old, new = config.get("args", {}), json.loads(json.dumps(values))
    names = [name for name in old if name in new and old[name] != new[name] and marks.get(name) is not Mark.FREE]
    refused = [name for name in names if not (marks.get(name) is Mark.LENGTH and is_longer(old[name], new[name]))]
    if refused and not allowed:
        changes = "; ".join(f"{name} {old[name]} -> {new[name]}" for name in refused)
        raise UserError(
            f"run folder {folder} holds a run of another configuration ({changes}): "
            "pass its values, or another --run-dir, or --resume-changed to go on with the new ones"
        )
    return {name: [old[name], new[name]] for name in names}


def is_longer(old, new):
    """Whether a number of steps or epochs grew."""
    return old is not None and new is not None and new > old


def config_of_run(folder):
    """config.json of a run folder in which something has begun, or {}. Raises UserError."""
    written = Path(folder) / "config.json"
    try:
        if not written.exists() or not (checkpoints(folder) or (Path(folder) / "log.jsonl").exists()):
            return {}
    except OSError as error:  # a name that no folder can have
        raise UserError(f"run folder {folder} cannot be: {error.strerror}; choose another --run-dir") from error
    try:
        config = json.loads(written.read_text())
        return {**config, "args": dict(config["args"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{written} is damaged: {first_line(error)}; choose another --run-dir") from error


def flags_of_checkpoint(checkpoint):
    """{flag: value} of the run that a --checkpoint is from, where it is a run folder or its model/; otherwise {}.
    Raises UserError."""
    folder = Path(checkpoint).expanduser()
    return config_of_run(folder.parent if folder.name == "model" else folder).get("args", {})


def run_to_resume(run):
    """(run folder, checkpoint or None) that --resume names. Raises UserError."""
    if run.resume in ("auto", "never"):
        return Path(run.run_dir), None
    path = Path(run.resume)
    if (path / "trainer.json").exists():
        return path.resolve().parent.parent, path
    if not checkpoints(path):
        raise UserError(f"--resume {path} is neither a checkpoint nor a run folder with one")
    return path, None


def args_of_run(run):
    """The arguments of the run that is resumed, or {}. Raises UserError."""
    return config_of_run(run_to_resume(run)[0]).get("args", {}) if run.run_dir else {}


def report_resume(progress, resume, total, run_dir):
    """Say where the run goes on, and with what."""
    if progress.path:
        done = progress.step >= total
        line = f"{run_dir} is complete: {progress.step} steps" if done else f"continuing from {progress.path}"
        print(printable(line))
    for name, (old, new) in resume.changed.items():
        grows = resume.marks.get(name) is Mark.LENGTH and is_longer(old, new)
        then = "; the learning rate follows the schedule of the new length" if grows else ""
        print(printable(f"  changed: {name} {old} -> {new}{then}"))
    for name, value in resume.added.items() if progress.path else ():
        print(printable(f"  new since the run began: {name} {value}"))
    if progress.first_pass:
        print(f"  the data begin anew, with pass {progress.first_pass}")
    sys.stdout.flush()


# ----------------------------------------------------------------------------------------------------------------
# Writing.


def make_run_dir(folder):
    """Make a folder and see that it can be written to. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        test = folder / f".write_test_{os.getpid()}"
        test.touch()
        test.unlink(missing_ok=True)  # another machine's process may have the same number
    except OSError as error:
        raise UserError(f"run folder {folder} is not writable: {error.strerror}; choose another --run-dir") from error


def lock_run_dir(folder):
    """Take a run folder for this process, until the file that is returned is closed or the process ends in any way.
    Raises UserError, saying who has it.

    A POSIX lock: it also holds between machines that share the folder (NFS), and loading processes, which may outlive a
    killed trainer for a moment, do not inherit it. It does not hold within one process, and closing the file by another
    name there would give it up.
    """
    path = folder / "run.lock"
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise UserError(f"run folder {folder} is not writable: {error.strerror}; choose another --run-dir") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # ENOLCK, ENOSYS, EOPNOTSUPP: there are none here
            print(printable(f"note: the file system of {folder} has no locks ({error.strerror}): see that no other run "
                            "writes to it"), file=sys.stderr, flush=True)  # fmt: skip
            return file
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip() or "another process"
        file.close()
        raise UserError(
            f"run folder {folder} is in use by another run ({holder}): wait for its end, or pass another --run-dir; "
            f"if that process is no more, its machine lost, remove {path}"
        ) from error
    with suppress(OSError):  # a full disk: who has it is not told, that somebody has it is
        file.truncate(0)
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {began}\n".encode())
    return file


def write_config(run_dir, values, model, changed=()):
    """config.json: the arguments in use, the model, and what has changed since the run began, from which step on."""
    config = {"args": values, "model": model, **({"changed": changed} if changed else {})}
    write_text(Path(run_dir) / "config.json", json.dumps(config, indent=2))


def sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_problem(error, folder):
    """What a full disk raises, in one line: Python's, torch's or safetensors' error. Raises any other one."""
    from safetensors import SafetensorError

    if not isinstance(error, (OSError, RuntimeError, SafetensorError)):
        raise error
    if isinstance(error, RuntimeError):  # torch's tells a line of its code, the file system why
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())
        except OSError as reason:
            error = reason
    found = re.search(r"os error (\d+)", str(error))  # of safetensors
    number = getattr(error, "errno", None) or (found and int(found[1]))
    return f"[Errno {number}] {os.strerror(number)}, in {folder}" if number else first_line(error)


def write_model_folder(folder, write):
    """Let write(temporary folder) write a model, and give it its place. Returns what went wrong (a full disk), or
    None."""
    try:
        replace_files(folder, write)
    except Exception as error:
        return write_problem(error, folder.parent)
    return None


def save_checkpoint(accelerator, run, step, data_states, trainer, write_model=None):
    """checkpoints/step_..., with the position in each part of the data and a dict for trainer.json; then model/, by
    write_model(folder). Called on all ranks. Returns what went wrong (a full disk), or None; if it did, the checkpoints
    of before are as they were."""
    from accelerate.utils import gather_object

    run_dir, is_main = Path(run.run_dir), accelerator.is_main_process
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    temporary = folder.with_name(folder.name + ".tmp")

    def attempt(work):
        """work() on this rank; the first problem of any rank."""
        problem = None
        try:
            work()
        except Exception as error:
            problem = write_problem(error, run_dir)
        return next((problem for problem in gather_object([problem]) if problem), None)

    def begin():
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def write():
        accelerator.save_state(str(temporary))
        for part, state in data_states.items():
            (temporary / f"data_{part}.json").write_text(json.dumps(state))

    def finish():
        if is_main:
            (temporary / "trainer.json").write_text(json.dumps({**trainer, "step": step}))
            files = sorted(file for file in temporary.rglob("*") if file.is_file())  # FSDP may write folders
            lines = [f"{sha256(file)}  {file.relative_to(temporary)}\n" for file in files]
            (temporary / SUMS).write_text("".join(lines))
            if folder.exists():  # whole since an earlier attempt, of which only what follows failed
                shutil.rmtree(temporary)
            else:
                publish(temporary, folder)
            for old in checkpoints(run_dir)[: -run.keep]:
                if not run.milestone_every or step_of(old) % run.milestone_every:
                    gone = old.rename(old.with_name(old.name + ".tmp"))  # a kill leaves no half of a checkpoint
                    shutil.rmtree(gone, ignore_errors=True)  # what a reader holds open goes with the next start
            if write_model:  # last: old checkpoints make room for it on a full disk
                replace_files(run_dir / "model", write_model)

    problem = attempt(begin) or attempt(write) or attempt(finish)
    if problem and is_main:
        shutil.rmtree(temporary, ignore_errors=True)
    return problem


def whole_weights(model):
    """The state_dict of a model that DDP, FSDP or compilation wraps, under its own names and whole, in memory of the
    host: on the main process at least. Called on all ranks."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def newest_weights(run_dir):
    """The model's whole state_dict in a run folder's last checkpoint, on the host. Raises UserError."""
    from safetensors.torch import load_file

    checkpoint = next(reversed(checkpoints(run_dir)), None)
    require(checkpoint is not None, f"{run_dir} holds no checkpoint: it is no run, or has not written one yet")
    problem = damage(checkpoint)
    require(problem is None, f"checkpoint {checkpoint} is damaged: {problem}")
    return load_file(checkpoint / "model.safetensors")


def fingerprint(state):
    """A short name of weights, {name: tensor}."""
    hasher = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        hasher.update(f"{name} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


# ----------------------------------------------------------------------------------------------------------------
# Reading.


@dataclass
class Progress:
    """How far a run has come: what a checkpoint tells beside weights and optimizers."""

    step: int = 0
    """Steps that are done."""
    data_states: dict = field(default_factory=dict)
    """{part: its state}, for a Stream; empty where the data begin, or begin anew."""
    first_pass: int = 0
    """The pass that data which begin anew begin with."""
    skipped_steps: int = 0
    """Steps that were skipped so far."""
    unevaluated: dict | None = None
    """The line of the log of the last step, if its evaluation failed."""
    more: dict = field(default_factory=dict)
    """What the script keeps in a checkpoint."""
    path: Path | None = None
    """The checkpoint."""


def damage(checkpoint):
    """What is wrong with a checkpoint's files, or None."""
    try:
        lines = (checkpoint / SUMS).read_text().splitlines()
        sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
        if "trainer.json" not in sums:
            return f"{SUMS} is cut short"
        for name, digest in sums.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if sha256(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return f"{SUMS} cannot be read: {first_line(error)}"
    return next((f"{file.name} does not hold what a run writes" for file in [checkpoint / "trainer.json",
                 *sorted(checkpoint.glob("data_*.json"))] if not is_written_by_a_run(file)), None)  # fmt: skip


def is_written_by_a_run(file):
    """Whether a trainer.json or data_N.json has the shape that it must have; sums do not tell of a mistake before."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(content, dict):
        return False
    if file.name != "trainer.json":
        return counts_only(content)
    numbers = [content.get("step"), content.get("bad_steps", 0)]
    line = content.get("unjudged")
    return all(isinstance(n, int) and counts_only(n) for n in numbers) and (line is None or isinstance(line, dict))


def counts_only(value):
    """Whether every number in a value of JSON is a whole one that may count something."""
    if isinstance(value, (dict, list)):
        return all(counts_only(part) for part in (value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (str, bool)) or (isinstance(value, int) and 0 <= value < 2**63)


def tidy(run_dir):
    """Take away what an earlier process left behind in the middle of a write."""
    for left in [*Path(run_dir).glob("*.tmp"), *Path(run_dir, "checkpoints").glob("step_*.tmp")]:
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def sound_checkpoint(accelerator, candidates, run_dir):
    """The first candidate whose files are what was written, None if there are none. A damaged one is named; in the
    run's own folder it is set aside. Raises UserError if all are damaged. Called on all ranks."""
    from accelerate.utils import broadcast_object_list

    found, problems = None, {}
    if accelerator.is_main_process:
        tidy(run_dir)
        for path in candidates:
            problem = damage(path)
            if problem is None:
                found = path
                break
            problems[path] = f"checkpoint {path} is damaged: {problem}"
        for path, problem in problems.items() if found else ():
            print(printable(f"warning: {problem}; the one before is used"), file=sys.stderr)
            if path.parent == Path(run_dir) / "checkpoints":
                aside = path.with_name(path.name + ".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    branch = branches_off(run_dir, found) if found else None  # of another run, after a damaged one
    found, branch, problem = broadcast_object_list([found, branch, next(iter(problems.values()), None)])
    if branch:
        raise UserError(branch)
    if candidates and found is None:
        raise UserError(f"{problem}; there is no other one: pass another --run-dir, or --resume PATH")
    return found


def check_pickles(folder):
    """Raises UserError for a pickled file that is damaged, or holds more than tensors and plain data.

    Nothing in it is executed. Accelerate itself would: what is registered with it (finetune.py's average) it reads
    without this care, and of a bad file of generator states it says nothing.
    """
    from accelerate.utils import load

    for file in sorted(f for f in folder.glob("*") if f.suffix in (".bin", ".pkl", ".pt")):
        try:
            load(file, map_location="cpu", weights_only=True, mmap=True)  # mmap: no tensor is read
        except Exception as error:  # a damaged pickle can fail in any way
            raise UserError(
                f"checkpoint {folder} does not fit or is damaged: {file.name} cannot be read: {BAD_PICKLE}"
            ) from error


def load_checkpoint(accelerator, resume, run_dir, parts):
    """Model and optimizers in place, from the best candidate that is whole: a Progress. `parts` is the number of parts
    of the data. Called on all ranks. Raises UserError."""
    from safetensors import SafetensorError

    path = sound_checkpoint(accelerator, resume.candidates, run_dir)
    if path is None:
        return Progress()
    check_pickles(path)
    try:
        accelerator.load_state(str(path))
        more = json.loads((path / "trainer.json").read_text())
        step, skipped, line = more.pop("step"), more.pop("bad_steps", 0), more.pop("unjudged", None)
        states = {
            int(file.stem.removeprefix("data_")): json.loads(file.read_text()) for file in path.glob("data_*.json")
        }
        if resume.data_begin_anew(step):
            first_pass = 1 + max(state["pass"] for state in states.values())
            return Progress(step, {}, first_pass, skipped, line, more, path)
        return Progress(step, {part: states[part] for part in range(parts)}, 0, skipped, line, more, path)
    except (OSError, RuntimeError, ValueError, SafetensorError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"checkpoint {path} does not fit: {first_line(error)}") from error
