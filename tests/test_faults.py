"""What a run survives: kills, signals, dead processes, full disks, damaged checkpoints, losses that are not finite."""

import engine.checkpoints
import engine.network
import engine.run
from engine.arguments import DEMO, DataArgs, RunArgs, parse
from engine.checkpoints import checkpoints, damage
from engine.errors import RunError, UserError, command_line, stop_workers
from engine.files import replace_files
from engine.log import Log
from engine.network import NetworkError
from engine.run import finite, make_accelerator, step_unless
from engine.stream import ShardChunks

import errno
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from faults import assert_same, kill_and_resume, last_step, start, wait_for
from images import noise_png, write_folder, write_parquet, write_tars
from launch import ROOT, WarmProcess, environment_of, environments_of_ranks, launch, log_of, succeeded
from safetensors.torch import load_file, save_file

import train

FLAGS = ["--dataset", "demo", "--steps", "8", "--checkpoint-every", "3", "--log-every", "1", "--batch-size", "8",
         "--effective-batch-size", "16", "--workers", "0", "--drop-path", "0.3"]  # fmt: skip


def run(run_dir, *flags):
    """train.py in this process."""
    try:
        train.train(parse(train.Args, [*FLAGS, "--run-dir", str(run_dir), *map(str, flags)]))
    finally:
        stop_workers()  # as the script does


def steps_of(run_dir):
    return [int(path.name[5:]) for path in checkpoints(run_dir)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Eight steps of two micro-batches each that nothing interrupts."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run(folder)
    return folder


def copy_of(reference, folder, last=None):
    """A copy of a run without its checkpoints after step `last`."""
    shutil.copytree(reference, folder)
    for path in checkpoints(folder):
        if last is not None and int(path.name[5:]) > last:
            shutil.rmtree(path)
    return folder


def after_step(monkeypatch, step, act):
    """Call act() once the log has the line of this step."""
    write = Log.write

    def wrapped(self, values, *options):
        write(self, values, *options)
        if values["step"] == step:
            act()

    monkeypatch.setattr(Log, "write", wrapped)


# ---------------------------------------------------------------------------------------------------------------- kills


def test_a_killed_run_ends_as_if_nobody_had_killed_it(tmp_path):
    """The short form of tests/faults.py: two processes, SIGKILL, aimed at a save."""
    figures = kill_and_resume(tmp_path, kills=1, steps=24, seed=2)
    assert figures["kills"] == 1 and figures["same"]


# -------------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(name, reference, tmp_path, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    with monkeypatch.context() as patch:
        after_step(patch, 5, lambda: os.kill(os.getpid(), getattr(signal, name)))
        with pytest.raises(SystemExit) as caught:
            run(tmp_path / "run")
    assert caught.value.code == 0
    last = tmp_path / "run" / "checkpoints" / "step_00000005"
    assert f"stopped by {name} after step 5: the same command continues from {last}" in capsys.readouterr().out
    assert steps_of(tmp_path / "run") == [3, 5] and damage(last) is None
    run(tmp_path / "run")
    assert_same(tmp_path / "run", reference)


@pytest.mark.parametrize(("kind", "flags", "stops"), [
    ("tar", ["--streaming", "--workers", "2", "--shuffle-window", "24"], (3, 4)),
    ("tar", ["--no-streaming", "--workers", "0"], (5,)),
    ("folder", ["--workers", "2", "--parts", "2", "--batch-size", "4"], (1, 6)),
    ("folder", ["--workers", "0"], (7,)),
    ("parquet", ["--streaming", "--workers", "0", "--shuffle-window", "9", "--parts", "2", "--batch-size", "4"], (5,)),
])  # fmt: skip
def test_whatever_is_read_a_stopped_run_ends_as_the_whole_one(kind, flags, stops, tmp_path, monkeypatch):
    """In the middle of windows and of parts, and across the end of a pass of 121 images, one of which is none."""
    encode = lambda n: b"<html>" if n == 33 and "--parts" not in flags else noise_png(n)  # noqa: E731
    write = {"tar": lambda: write_tars(tmp_path / kind, (43, 37, 41), encode=encode),
             "parquet": lambda: write_parquet(tmp_path / kind, (43, 37, 41), group=9, encode=encode),
             "folder": lambda: write_folder(tmp_path / kind, 121, encode=encode)}[kind]  # fmt: skip
    flags = ["--dataset", str(write()), "--size", "nano", "--teacher", str(DEMO / "clip_teacher"), *flags]
    run(tmp_path / "whole", *flags)
    last = log_of(tmp_path / "whole")[-1]
    assert last["epoch"] > 1 and last["skipped"] == ("--parts" not in flags)
    for step in stops:
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            after_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGUSR1))
            run(tmp_path / "run", *flags)
    run(tmp_path / "run", *flags)
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint(workers, tmp_path, monkeypatch):
    flags = ["--shuffle-window", "32", "--interleave", "1", "--workers", workers, "--probe-every", "0"]
    run(tmp_path / "whole", *flags)

    def dies(*args, gone=[]):  # noqa: B006 (once for all shards)
        if not gone:
            yield from itertools.islice(read(*args), 90)
        gone.append(1)
        raise NetworkError("connection refused")

    with monkeypatch.context() as patch:
        read = ShardChunks.read
        patch.setattr(ShardChunks, "read", dies)
        with pytest.raises(RunError, match=r"has been away for .* minutes \(--patience\).*; .* continues from .*step_"):
            run(tmp_path / "run", *flags, "--checkpoint-every", "8", "--patience", "0.001")
    assert steps_of(tmp_path / "run") == [last_step(tmp_path / "run")]
    run(tmp_path / "run", *flags)
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_signal_is_heard_while_a_server_is_away(workers, reference, tmp_path, monkeypatch, capsys):
    """The patience is 30 minutes; a preempted machine has one."""
    flags = ["--shuffle-window", "64", "--interleave", "1", "--workers", workers, "--probe-every", "0"]

    def hang(*_):
        time.sleep(1000)

    with monkeypatch.context() as patch:
        rows = ShardChunks.rows
        patch.setattr(ShardChunks, "rows", lambda *a: itertools.chain(itertools.islice(rows(*a), 100),
                                                                      iter(hang, None)))  # fmt: skip
        after_step(patch, 4, lambda: threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start())
        with pytest.raises(SystemExit) as caught:
            run(tmp_path / "run", *flags)
    assert caught.value.code == 0 and "stopped by SIGTERM after step" in capsys.readouterr().out
    last = steps_of(tmp_path / "run")[-1]
    assert last_step(tmp_path / "run") == last < 8
    stop_workers()
    run(tmp_path / "run", *flags)
    run(tmp_path / "whole", *flags)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    """Also that torchrun passes SIGTERM on, and that loading processes leave it to their trainer."""
    flags = [*FLAGS[2:], "--steps", "400", "--checkpoint-every", "300", "--workers", "1"]
    both = two_processes(tmp_path / "run", *flags)
    assert wait_for(both[0], lambda: last_step(tmp_path / "run") >= 3)
    for child in psutil.Process(both[1].pid).children():
        child.terminate()
    both[1].send_signal(signal.SIGUSR1)
    output = "".join(process.communicate(timeout=60)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0], output
    (step,) = steps_of(tmp_path / "run")
    assert f"stopped by SIGUSR1 after step {step}" in output
    assert last_step(tmp_path / "run") == step
    process = start(tmp_path / "run", *flags)
    assert wait_for(process, lambda: last_step(tmp_path / "run") >= step + 3)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert re.search(r"stopped by SIGTERM after step \d+", output), output
    assert len(steps_of(tmp_path / "run")) == 2 and damage(checkpoints(tmp_path / "run")[-1]) is None


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    """In the middle of a step that takes several seconds."""
    flags = ["--steps", "4", "--batch-size", "16", "--effective-batch-size", "4096", "--workers", "1", "--parts", "1"]
    process = start(tmp_path / "run", *flags, processes=1)
    assert wait_for(process, lambda: (tmp_path / "run" / "config.json").exists())
    main = psutil.Process(process.pid)
    assert wait_for(process, lambda: main.children()), "loading has begun"
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the first one waits for the step"
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and not checkpoints(tmp_path / "run")


def two_processes(run_dir, *flags, script="train.py"):
    """Two ranks that no launcher watches."""
    command = [script, *FLAGS, "--steps", "2000", "--run-dir", run_dir, *flags]
    return [WarmProcess(command, environment, f"{run_dir}.{environment['RANK']}.txt")
            for environment in environments_of_ranks(2)]  # fmt: skip


# Six seconds between steps; at the start, of which a busy machine makes a minute, the default's minutes.
IMPATIENT = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})

import engine.run

import train

class Impatient(engine.run.Peers):
    def __init__(self, processes, minutes):
        super().__init__(processes, 0.1)

engine.run.Peers = Impatient
train.main()
"""


@pytest.mark.parametrize(("blow", "victim"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_dead_process_does_not_leave_the_other_hanging(tmp_path, blow, victim):
    """Killed: the connection breaks. Stopped, as by a lost machine: only the timeout tells."""
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    script = tmp_path / "impatient.py" if blow == signal.SIGSTOP else "train.py"
    both = two_processes(tmp_path / "run", script=script)
    try:
        assert wait_for(both[0], lambda: last_step(tmp_path / "run") >= 4), both[0].poll()
        both[victim].send_signal(blow)
        output = both[1 - victim].communicate(timeout=120)[0]
        assert both[1 - victim].returncode == 1, output
        assert "another process of this run has died or does not answer" in output and "Traceback" not in output
    finally:
        for process in both:
            process.kill()
    assert checkpoints(tmp_path / "run") and damage(checkpoints(tmp_path / "run")[-1]) is None


def test_a_process_that_never_comes_is_told_in_one_line(monkeypatch, capsys):
    """The other rank's machine is missing from the start: torch's error is long."""
    left = []
    monkeypatch.setattr(os, "_exit", left.append)  # a proper end would wait for the dead

    def alone():
        raise torch.distributed.DistNetworkError("The client socket has timed out after 600000ms\nsome advice")

    with pytest.raises(SystemExit):
        command_line(alone)
    error = capsys.readouterr().err
    assert left == [1] and len(error.splitlines()) == 1 and "has died or does not answer (The client socket" in error


def test_processes_wait_for_each_other_as_long_as_asked(tmp_path, monkeypatch):
    waits, peers = [], engine.run.Peers

    def recorded(processes, minutes):
        waits.append(minutes)
        return peers(processes, minutes)

    monkeypatch.setattr(engine.run, "Peers", recorded)
    run(tmp_path, "--steps", "1", "--timeout", "3", "--patience", "4")
    args = parse(train.Args, ["--timeout", "3", "--patience", "4"])
    accelerator, _ = make_accelerator(args.run, args.data)
    assert waits == [7] and accelerator.init_handler.timeout.total_seconds() == 420


def test_a_loading_process_that_is_killed_ends_the_run_with_a_checkpoint(reference, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        after_step(patch, 4, lambda: [child.kill() for child in multiprocessing.active_children()])
        with pytest.raises(RunError, match="a loading process was killed; is there enough memory"):
            run(tmp_path / "run", "--workers", "1")
    assert steps_of(tmp_path / "run")[-1] in (4, 5, 6), "what was loaded before is used"
    run(tmp_path / "run", "--workers", "1")
    assert_same(tmp_path / "run", reference)


def test_bad_files_of_one_process_end_both_with_a_checkpoint(tmp_path):
    """The other one is not left waiting for a gradient; the message is told once."""
    encode = lambda n: b"<html>" if n >= 290 and n % 3 == 0 else noise_png(n)  # noqa: E731
    write_parquet(tmp_path / "data", [150, 150], group=150, encode=encode)
    flags = ["--dataset", tmp_path / "data", "--streaming", "--size", "nano", "--teacher", "demo/clip_teacher"]
    process = launch("train.py", *flags, *FLAGS[4:], "--steps", "40", "--checkpoint-every", "30",
                     "--effective-batch-size", "32", "--run-dir", tmp_path / "run", processes=2,
                     warm=True)  # fmt: skip
    assert process.returncode != 0
    message = f"files that this process read of {tmp_path / 'data'} could not be used, more than 1 %"
    assert process.stderr.count(message) == 1, process.stderr
    step = last_step(tmp_path / "run")
    assert steps_of(tmp_path / "run") == [step] and damage(checkpoints(tmp_path / "run")[-1]) is None
    assert f"the same command continues from {checkpoints(tmp_path / 'run')[-1]}" in process.stderr


# ---------------------------------------------------------------------------------------------------------- checkpoints


def damage_by(kind, checkpoint):
    if kind == "truncated":
        file = checkpoint / "optimizer.bin"
        os.truncate(file, file.stat().st_size // 2)
    elif kind == "flipped":
        file = checkpoint / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1
        file.write_bytes(data)
    elif kind == "missing":
        file = checkpoint / "data_0.json"
        file.unlink()
    else:
        file = checkpoint / "SHA256SUMS"
        file.write_text("")
    return file.name


@pytest.mark.parametrize("kind", ["truncated", "flipped", "missing", "sums"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(kind, reference, tmp_path, capsys):
    folder = copy_of(reference, tmp_path / "run", last=6)
    name = damage_by(kind, folder / "checkpoints" / "step_00000006")
    run(folder)
    captured = capsys.readouterr()
    assert f"step_00000006 is damaged: {name}" in captured.err
    assert "continuing from" in captured.out and "step_00000003" in captured.out
    assert_same(folder, reference)
    assert (folder / "checkpoints" / "step_00000006.damaged").exists() and steps_of(folder) == [3, 6, 8]


def test_if_every_checkpoint_is_damaged_nothing_is_touched(reference, tmp_path):
    folder = copy_of(reference, tmp_path / "run", last=3)
    name = damage_by("flipped", folder / "checkpoints" / "step_00000003")
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(UserError, match=f"step_00000003 is damaged: {name} is not what was written; there is no other"):
        run(folder)
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_sums_are_those_of_sha256sum(reference):
    process = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=checkpoints(reference)[-1],
                             capture_output=True, text=True)  # fmt: skip
    assert process.returncode == 0 and "model.safetensors: OK" in process.stdout


def test_what_a_killed_save_left_behind_is_taken_away(reference, tmp_path):
    folder = copy_of(reference, tmp_path / "run", last=6)
    (folder / "checkpoints" / "step_00000007.tmp").mkdir()
    (folder / "model.tmp").mkdir()
    (folder / "config.json.tmp").write_text("{")
    run(folder)
    assert_same(folder, reference)
    assert not list(folder.rglob("*.tmp"))


def test_last_checkpoints_and_milestones_are_kept(tmp_path):
    run(tmp_path, "--checkpoint-every", "2", "--milestone-every", "3", "--keep", "1", "--steps", "10")
    assert steps_of(tmp_path) == [3, 6, 9, 10]


def test_a_reader_always_finds_a_whole_model(tmp_path):
    """While the files are replaced over and over, each load gives one of the models, never a mixture or an error."""
    replace_files(tmp_path / "model", lambda folder: save_file({"w": torch.full((50_000,), 0.0)}, folder / "w"))
    ends, seen, trouble = threading.Event(), set(), []

    def read():
        while not ends.is_set():
            try:
                seen.update([tuple(load_file(tmp_path / "model" / "w")["w"].unique().tolist())])
            except Exception as error:
                trouble.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        weights = torch.full((50_000,), float(i))
        replace_files(tmp_path / "model", lambda folder: save_file({"w": weights}, folder / "w"))  # noqa: B023
    ends.set()
    reader.join()
    assert not trouble and len(seen) > 3 and all(len(values) == 1 for values in seen)


def test_a_full_disk_does_not_end_the_run(tmp_path):
    """No file may grow beyond a limit for a while: checkpoints fail, training goes on, and they are made up for."""
    flags = [*FLAGS[2:], "--steps", "60", "--log-every", "2", "--drop-path", "0"]
    run(tmp_path / "reference", *flags)
    command = ["train.py", "--dataset", "demo", "--run-dir", tmp_path / "run", *flags]
    process = WarmProcess(command, environment_of(), tmp_path / "output.txt")
    assert wait_for(process, lambda: steps_of(tmp_path / "run")), process.communicate()[0]
    limits = psutil.Process(process.pid).rlimit
    unlimited = limits(psutil.RLIMIT_FSIZE)
    limits(psutil.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    before = steps_of(tmp_path / "run")
    reached = last_step(tmp_path / "run")
    assert wait_for(process, lambda: last_step(tmp_path / "run") >= reached + 10)
    assert set(steps_of(tmp_path / "run")) <= {*before, before[-1] + 3}, "nothing new, nothing lost"
    assert all(damage(path) is None for path in checkpoints(tmp_path / "run"))
    limits(psutil.RLIMIT_FSIZE, unlimited)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert re.search(r"warning: the checkpoint of step \d+ could not be written: .*; the run goes on", output), output
    assert "Traceback" not in output
    assert_same(tmp_path / "run", tmp_path / "reference")


def test_a_model_that_could_not_be_written_is_made_up_for(tmp_path, monkeypatch, reference, capfd):
    failures = [OSError(errno.ENOSPC, "No space left on device")] * 2

    def fails(*args):
        if failures:
            raise failures.pop()
        replace_files(*args)

    monkeypatch.setattr(engine.checkpoints, "replace_files", fails)
    monkeypatch.setattr(engine.network, "FIRST_PAUSE", 0.01)
    run(tmp_path / "run", "--checkpoint-every", "8")
    assert capfd.readouterr().err.count("could not be written: [Errno 28]") == 2 and not failures
    assert steps_of(tmp_path / "run") == [8] and not list(tmp_path.rglob("*.tmp"))
    assert_same(tmp_path / "run", reference)


def test_a_line_that_a_full_disk_cut_off_is_written_again(tmp_path, monkeypatch, reference):
    """The log on a disk that takes half a line, then nothing, then all."""
    from pathlib import Path

    class Full:
        left = 2

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def truncate(self, size):
            self.file.truncate(size)

        def write(self, data):
            Full.left -= 1
            if Full.left >= 0:
                self.file.write(data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(data)

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", *a, **k: Full(opened(path, mode)) if mode == "ab" else
                        opened(path, mode, *a, **k))  # fmt: skip
    run(tmp_path / "run")
    assert_same(tmp_path / "run", reference)


# ------------------------------------------------------------------------------------------------- other configurations


def test_fewer_processes_continue_with_the_same_images_and_losses(tmp_path):
    """Two processes' parts, taken over by one; a loading process more changes nothing; three are refused."""
    two, one = tmp_path / "two", tmp_path / "one"
    more = ["--effective-batch-size", "32", "--drop-path", "0.2", "--workers", "1"]
    succeeded(launch("train.py", *FLAGS, "--run-dir", two, *more, processes=2, warm=True))
    copy_of(two, one, last=3)
    run(one, *more[:-1], "2", "--parts", "2")
    for ours, theirs in zip(log_of(one), log_of(two), strict=True):
        assert (ours["step"], ours["seen"], ours["skipped"]) == (theirs["step"], theirs["seen"], theirs["skipped"])
        assert abs(ours["loss"] - theirs["loss"]) < 1e-5 and abs(ours["grad_norm"] - theirs["grad_norm"]) < 1e-5
    args = parse(train.Args, [*FLAGS, "--run-dir", str(one), *more])
    args.data.batch_size = None
    assert train.resolve(args, 1).data.parts == 2 and train.resolve(args, 1).data.batch_size == 8
    with pytest.raises(UserError, match="--parts 2 of the run that is resumed cannot be shared by 3 processes: start"):
        train.resolve(args, 3)


def test_more_processes_take_over_parts_that_one_began(tmp_path):
    """Two parts each: what is drawn in a step, and which place of the data is whose, go by the part."""
    more = ["--effective-batch-size", "32", "--parts", "4"]
    run(tmp_path / "one", *more)
    copy_of(tmp_path / "one", tmp_path / "two", last=3)
    succeeded(launch("train.py", *FLAGS, "--run-dir", tmp_path / "two", *more, processes=2, warm=True))
    for ours, theirs in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        assert ours["seen"] == theirs["seen"] and abs(ours["loss"] - theirs["loss"]) < 1e-5
    places = [[json.loads((checkpoints(tmp_path / run)[-1] / f"data_{part}.json").read_text()) for part in range(4)]
              for run in ("one", "two")]  # fmt: skip
    assert places[0] == places[1]


def test_a_changed_recipe_is_shown_and_refused_unless_asked_for(reference, tmp_path, capsys):
    """More steps need no leave: of them test_forks.py tells."""
    folder = copy_of(reference, tmp_path / "run", last=6)
    with pytest.raises(UserError, match=r"configuration \(lr 0.08 -> 0.01; steps 8 -> 7\).*--resume-changed"):
        run(folder, "--steps", "7", "--lr", "0.01")
    with pytest.raises(UserError, match=r"configuration \(lr 0.08 -> 0.01\).*--resume-changed"):
        run(folder, "--steps", "10", "--lr", "0.01")
    assert steps_of(folder) == [3, 6]
    run(folder, "--steps", "10", "--lr", "0.01", "--resume-changed")
    out = capsys.readouterr().out
    assert "changed: steps 8 -> 10" in out and "begin anew" not in out
    assert [line["step"] for line in log_of(folder)] == list(range(1, 11))
    assert [line["seen"] for line in log_of(folder)][:8] == [line["seen"] for line in log_of(reference)]
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["steps"] == 10
    assert config["changed"] == [{"step": 6, "values": {"lr": [0.08, 0.01], "steps": [8, 10]}}]
    run(folder, "--steps", "10", "--lr", "0.01")
    assert json.loads((folder / "config.json").read_text())["changed"] == config["changed"], "the history stays"


def test_a_change_of_the_data_survives_a_kill_before_the_next_checkpoint(reference, tmp_path):
    """config.json knows of the change before a checkpoint does: the old places mean nothing until then."""
    kept, killed = copy_of(reference, tmp_path / "kept", last=3), copy_of(reference, tmp_path / "killed", last=3)
    changed = ["--seed", "5", "--resume-changed"]
    run(kept, *changed)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after_step(patch, 4, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        run(killed, *changed)
    assert steps_of(killed) == [3]
    run(killed, "--seed", "5")
    assert_same(killed, kept)


def test_other_data_begin_anew_with_the_next_pass(reference, tmp_path, capsys):
    folder = copy_of(reference, tmp_path / "run", last=6)
    with pytest.raises(UserError, match="seed 0 -> 1"):
        run(folder, "--seed", "1")
    with pytest.raises(UserError, match="streaming True -> False"):
        run(folder, "--no-streaming")
    run(folder, "--seed", "1", "--resume-changed")
    assert "the data begin anew, with pass 1" in capsys.readouterr().out
    for path in checkpoints(folder)[-1:]:
        place = json.loads((path / "data_0.json").read_text())
        assert place["layout"]["first_pass"] == place["pass"] == 1


# ---------------------------------------------------------------------------------------------------------- bad numbers


def poison(monkeypatch, steps):
    """The teacher's targets are nan in these steps (two micro-batches each)."""
    calls, forward = [], train.CLIPTeacher.forward

    def poisoned(self, pixels):
        calls.append(None)
        step = (len(calls) - 2) // 2  # the first call looks whether the grids match
        target = forward(self, pixels)
        return target * float("nan") if len(calls) > 1 and step in steps else target

    monkeypatch.setattr(train.CLIPTeacher, "forward", poisoned)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    """Of a line of the log over several steps the good ones are averaged."""
    with monkeypatch.context() as patch:
        poison(patch, [3, 5])
        run(tmp_path / "run", "--checkpoint-every", "1", "--keep", "20")
    assert steps_of(tmp_path / "run") == [1, 2, 3, 5, 7, 8], "no checkpoint while the end of the row is open"
    lines = log_of(tmp_path / "run")
    assert [line["bad_steps"] for line in lines] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [line["step"] for line in lines if line["loss"] is None] == [4, 6]
    with monkeypatch.context() as patch:
        poison(patch, [3, 5])
        run(tmp_path / "mean", "--log-every", "8", "--checkpoint-every", "8")
    good = [line["loss"] for line in lines if line["loss"] is not None]
    assert log_of(tmp_path / "mean")[0]["loss"] == pytest.approx(sum(good) / 6, rel=1e-6)


def test_a_stop_in_a_row_of_bad_steps_writes_no_checkpoint(reference, tmp_path, monkeypatch):
    """Right after a line of the log too: the weights may be what is not finite."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        poison(patch, [3, 4])
        after_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        run(tmp_path / "run")
    assert last_step(tmp_path / "run") == 5 and steps_of(tmp_path / "run") == [3]
    run(tmp_path / "run")
    assert_same(tmp_path / "run", reference)


def test_half_precision_with_a_scaler(tmp_path, monkeypatch):
    """fp16: a step that is not finite is skipped by the scaler and counted; resumed exactly, the scaler's state too."""
    flags = ["--precision", "fp16", "--steps", "6"]
    AcceleratorState._reset_state(True)
    with monkeypatch.context() as patch:
        poison(patch, [1])
        run(tmp_path / "whole", *flags)
    lines = log_of(tmp_path / "whole")
    assert [line["bad_steps"] for line in lines] == [0, 1, 1, 1, 1, 1]
    assert lines[-1]["loss"] < lines[0]["loss"]
    copy_of(tmp_path / "whole", tmp_path / "run", last=3)
    run(tmp_path / "run", *flags)
    AcceleratorState._reset_state(True)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_skipped_step_changes_nothing():
    torch.manual_seed(0)
    accelerator, _ = make_accelerator(RunArgs(run_dir="unused"), DataArgs())
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step(bad):
        model(torch.ones(1, 3)).sum().backward()
        if bad:
            model.weight.grad[0, 0] = float("inf")
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        step_unless(~torch.isfinite(norm), optimizer, accelerator.scaler)
        optimizer.zero_grad()
        state = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
        return [p.detach().clone() for p in model.parameters()] + state

    first = step(False)
    assert all(torch.equal(a, b) for a, b in zip(first, step(True), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, step(False), strict=True))


def test_many_bad_steps_in_a_row_end_the_run_at_its_last_good_checkpoint(reference, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, range(4, 8))
        with pytest.raises(RunError, match=r"not finite in 3 steps in a row, up to step 7; the last good checkpoint is "
                                           r".*step_00000003"):  # fmt: skip
            run(tmp_path / "run", "--max-bad-steps", "3")
    assert steps_of(tmp_path / "run") == [3]
    run(tmp_path / "run", "--max-bad-steps", "3")
    assert_same(tmp_path / "run", reference)


def test_a_loss_that_is_not_finite_on_one_process_skips_the_step_on_all():
    loss = torch.tensor([2.0, float("nan"), float("inf"), float("-inf")])
    assert torch.equal(finite(loss).isnan(), torch.tensor([False, True, True, True]))
    assert finite(loss)[0] == 1
    weight = torch.tensor(3.0, requires_grad=True)
    overflow = (weight * 1e38) * 10  # inf, with a finite gradient of its own
    (overflow * finite(overflow)).backward()
    assert not torch.isfinite(weight.grad)
