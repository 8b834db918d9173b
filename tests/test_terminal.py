"""What somebody at a terminal sees, and what a pipe gets instead: the first line, the quiet while, Ctrl-C, the end."""

import engine.errors
import engine.log
from engine.arguments import ImagesArgs, parse
from engine.errors import command_line, stop_workers
from engine.log import Log, Status, WaitingNote
from engine.run import Peers, Run
from engine.stream import Stream

import fcntl
import itertools
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from faults import EQUAL
from images import write_clothes
from launch import ROOT, command_of, environment_of, log_of

import probe
import train

# Three steps of two micro-batches; by default no line of the log but the last.
FLAGS = ["--dataset", "demo", "--steps", "3", "--batch-size", "8", "--effective-batch-size", "16", "--workers", "0",
         "--log-every", "1000"]  # fmt: skip
RATE = r"\d+(\.\d)? images/s  waiting for data \d+%"


def run(run_dir, *flags):
    """train.py in this process."""
    try:
        train.train(parse(train.Args, [*FLAGS, "--run-dir", str(run_dir), *flags]))
    finally:
        stop_workers()


def wait_for(text, pattern, seconds=60):
    """Until the text, which grows, has the pattern."""
    until = time.monotonic() + seconds
    while not re.search(pattern, text()):
        assert time.monotonic() < until, text()
        time.sleep(0.01)


class Terminal:
    """A pseudo-terminal of 130 columns: what is written to `file` is collected."""

    def __init__(self):
        self.keyboard, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 130, 0, 0))
        self.file, self.output = os.fdopen(slave, "w", buffering=1), b""
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        try:
            while data := os.read(self.keyboard, 65536):
                self.output += data
        except OSError:  # nobody has it open any more
            pass

    def text(self):
        return self.output.decode(errors="ignore").replace("\r\n", "\n")

    def end(self):
        """What was on the screen, when the last process has left it."""
        self.file.close()
        self.thread.join(60)
        return self.text()


@pytest.fixture
def terminal():
    terminal = Terminal()
    yield terminal
    terminal.end()
    os.close(terminal.keyboard)


@pytest.fixture
def output(capsys):
    """What has come on standard output, which is no terminal, so far: called while it is written."""
    return lambda: sys.stdout.getvalue()


@pytest.fixture
def silent_log(tmp_path):
    """The log of a run of which nothing more than its log is wanted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "is_due", False)
        patch.setattr(engine.log, "QUIET", 1e9)
        run(tmp_path / "silent")
    return log_of(tmp_path / "silent")


def same(lines, others):
    return [[line[name] for name in EQUAL] for line in lines] == [[line[name] for name in EQUAL] for line in others]


def slow_stream(monkeypatch, text, *patterns):
    """The second micro-batch of the first step comes when the text has the first pattern, that of the second step when
    it has the second, ..."""
    following, taken = Stream.__next__, itertools.count()

    def wait(stream):
        n = next(taken)
        if n % 2 and n // 2 < len(patterns):
            wait_for(text, patterns[n // 2])
        return following(stream)

    monkeypatch.setattr(Stream, "__next__", wait)


# ------------------------------------------------------------------------------------------------------- while it runs


@pytest.mark.parametrize(("flags", "remedy"), [
    ({"workers": 2}, "--workers 6 would load on all 6 cores of each process instead of 2"),
    ({"workers": 6, "streaming": True, "dataset": "some/pictures"}, "--no-streaming would read from a copy on disk; "),
    ({"workers": 6}, "6 loading processes share 6 cores: more or faster cores for each process would help, images"),
])  # fmt: skip
def test_a_run_that_waits_for_its_data_says_so_once(flags, remedy, monkeypatch, capsys):
    """If it is more than a tenth of the time, the beginning left out."""
    monkeypatch.setattr(engine.log, "cores_per_process", lambda: 6)
    told = lambda: capsys.readouterr().err  # noqa: E731
    note = WaitingNote(ImagesArgs(**{"dataset": "demo", **flags}))
    for seconds, waited in ((40, 40), (20, 2.0), (20, 2.0), (29, 29)):  # begins; a tenth of 40 s; is not judged yet
        note.add(seconds, waited)
        assert not told()
    note.add(1, 1)
    line = told()
    assert line.startswith(f"note: 100% of the time there are no data to train on: {remedy}") and line.count("\n") == 1
    for _ in range(5):
        note.add(100, 100)
        assert not told()


def test_the_loop_tells_how_long_it_waited(tmp_path, monkeypatch, capsys):
    """The main process, between two lines of the log."""
    following, heard = Stream.__next__, []

    def slow(stream):
        time.sleep(0.05)
        return following(stream)

    monkeypatch.setattr(Stream, "__next__", slow)
    monkeypatch.setattr(WaitingNote, "add", lambda note, seconds, waited: heard.append((seconds, waited)))
    run(tmp_path / "run", "--log-every", "1")
    assert len(heard) == len(log_of(tmp_path / "run")) > 2
    assert all(0.1 < waited < seconds for seconds, waited in heard)


def test_the_first_line_comes_with_the_first_step(tmp_path, output, silent_log):
    """Of this start, whatever --log-every is; the log has nothing of it."""
    run(tmp_path / "run", "--checkpoint-every", "2")
    lines = [line for line in output().splitlines() if line.startswith("step ")]
    assert re.fullmatch(rf"step 1/3  loss 0\.\d{{4}}  {RATE}  \d\d:\d\d left", lines[0]), lines
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"]
    assert [line["step"] for line in log_of(tmp_path / "run")] == [2, 3], "a checkpoint's own, and the last"
    run(tmp_path / "run", "--steps", "5")
    assert [line.split()[1] for line in output().splitlines() if "step " in line[:5]][2:] == ["4/5", "5/5"]
    run(tmp_path / "plain")
    assert same(log_of(tmp_path / "plain"), silent_log)


def test_a_long_step_tells_where_it_is(tmp_path, output, monkeypatch, silent_log):
    monkeypatch.setattr(engine.log, "QUIET", 0.2)
    halfway = "8 of 16 images of the next step"
    slow_stream(monkeypatch, output, rf"(?m)^step 0/3  {halfway}  {RATE}  \d\d:\d\d left$",
                rf"(?m)^step 1/3  {halfway}  loss 0\.\d{{4}}  {RATE}  \d\d:\d\d left$")  # fmt: skip
    run(tmp_path / "run")
    assert same(log_of(tmp_path / "run"), silent_log), "one line, with the mean of all steps"


def test_an_evaluation_speaks_alone(tmp_path, output, monkeypatch):
    monkeypatch.setattr(engine.log, "QUIET", 0.2)
    steps, heard = Run.steps, []

    def evaluate(line):
        before = output()
        time.sleep(0.5)
        heard.append(output().removeprefix(before))
        return {"top1": 50.0}

    monkeypatch.setattr(Run, "steps", lambda *a, **options: steps(*a, **{**options, "evaluate": evaluate}))
    run(tmp_path / "run")
    assert heard == [""]
    assert re.search(r"(?m)^step 3/3  loss .*  top-1 50\.0  00:00 left$", output())


def test_the_thread_of_a_log(tmp_path, output, monkeypatch):
    """It speaks of what it is told, not when it is silenced, not after the end, and keeps no process alive."""
    monkeypatch.setattr(engine.log, "QUIET", 0.05)
    accelerator = SimpleNamespace(is_main_process=True, log=lambda *a, **k: None)
    before = set(threading.enumerate())
    log = Log(accelerator, tmp_path, 7, 10, lambda: Status(0.0, 1.0, 0, 2048))
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon
    wait_for(output, r"^step 7/10  0 of 2048 images of the next step  waiting for data 100%\n")
    log.status = lambda: Status(3.94, 0.0, 512, 2048)
    wait_for(output, r"\nstep 7/10  512 of 2048 images of the next step  3\.9 images/s  .* left\n")
    with log.silence():
        told = output()
        time.sleep(0.3)
        assert output() == told
    log.close()
    told = output()
    thread.join(60)
    assert output() == told and not thread.is_alive()
    others = Log(SimpleNamespace(is_main_process=False), tmp_path, 7, 10, lambda: Status(1.0, 0.0, 1, 2))
    assert not others.is_due and set(threading.enumerate()) <= before
    others.close()


def test_the_bar_of_a_terminal(tmp_path, output, terminal, monkeypatch):
    """A loss from the first step on, the rate once, and no lines; a long step tells where it is there, too."""
    monkeypatch.setattr(engine.log, "QUIET", 0.2)
    monkeypatch.setattr(sys, "stderr", terminal.file)
    slow_stream(monkeypatch, terminal.text, r"0/3 \[\S+<\S+, 8 of 16 images of the next step  ")
    run(tmp_path / "run")
    states = terminal.end().split("\r")
    first = next(state for state in states if " 1/3 " in state and "loss" in state)
    assert re.fullmatch(rf" 33%\|.*\| 1/3 \[\d\d:\d\d<\d\d:\d\d, loss 0\.\d{{4}}  {RATE}\]", first.rstrip()), first
    assert all(state.count("/s") <= 1 for state in states)
    assert "step 1/3" not in output() and "100%" in states[-1]


def test_trackers_get_no_curves_of_step_and_epoch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path / "run", "--tracker", "tensorboard", "--log-every", "1")
    steps = {}
    for file in (tmp_path / "run").rglob("events.out.tfevents*"):  # one of them holds the arguments
        events = EventAccumulator(str(file))
        events.Reload()
        steps |= {name: [point.step for point in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert {"loss", "lr", "images_per_second", "knn_top1"} <= set(steps) and not set(steps) & {"step", "epoch"}
    assert steps["loss"] == [1, 2, 3]


# -------------------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_is_answered_at_once(tmp_path, terminal):
    def own_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background

    process = subprocess.Popen(command_of("train.py", *FLAGS, "--steps", "2000", "--run-dir", tmp_path / "run"),
                               stdin=terminal.file, stdout=terminal.file, stderr=terminal.file, cwd=ROOT,
                               env=environment_of(), start_new_session=True, preexec_fn=own_terminal)  # fmt: skip
    wait_for(terminal.text, r" \d+/2000 \[.*loss 0\.\d{4}")
    os.write(terminal.keyboard, b"\x03")
    assert process.wait(60) == 0
    lines = terminal.end().splitlines()
    assert lines.count("stopping after this step; again to end now") == 1
    assert re.match(r"stopped by SIGINT after step \d+: the same command continues from .*step_", lines[-1]), lines


@pytest.mark.parametrize(("rank", "answers"), [
    ("0", "SIGTERM: stopping after this step\nstopping after this step; again to end now\n"),
    ("1", "SIGTERM: stopping after this step\n"),
])  # fmt: skip
def test_who_answers_a_signal(rank, answers, monkeypatch, capfd):
    """A terminal sends Ctrl-C to all processes, others send theirs to one; more than once, some of them."""
    monkeypatch.setenv("LOCAL_RANK", rank)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    peers = Peers(1, 5)
    try:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.raise_signal(number)
    finally:
        peers.close()
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == answers


@pytest.mark.parametrize(("rank", "told"), [("0", "interrupted\n"), ("1", "")])
def test_ctrl_c_before_the_first_step(rank, told, monkeypatch, capsys):
    """Nothing is lost yet: a line instead of a traceback, and no loading processes are left."""
    def loading():
        raise KeyboardInterrupt

    ended = []
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(engine.errors, "stop_workers", lambda: ended.append(True))
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
        command_line(loading)
    assert stop.type is SystemExit and stop.value.code == 130 and capsys.readouterr().err == told and ended == [True]


# ------------------------------------------------------------------------------------------------------------- the end

KNN = {"k": 20, "temperature": 0.07, "top1": 81.0}
RESULT = {"task": "linear", "top1": 82.8, "encoder": "runs/mine", "classes": 10, "reference": [],
          "knn": [{"pool": "class", **KNN}, {"pool": "mean", **KNN}]}  # fmt: skip


def print_last_lines(folder):
    """probe.py's, of a result of these figures."""
    table = probe.table(RESULT, [{**RESULT, "encoder": "random"}])
    Run.print_result(SimpleNamespace(folder=Path(folder)), table, RESULT)


def test_the_last_lines(tmp_path, terminal, output, monkeypatch):
    """A table and a path; where no terminal reads them also the object of result.json."""
    print_last_lines(tmp_path)
    *table, path, last = output().splitlines()
    assert json.loads(last) == RESULT and path == f"{tmp_path / 'result.json'}:"
    monkeypatch.setattr(sys, "stdout", terminal.file)
    print_last_lines(tmp_path)
    assert terminal.end().splitlines() == [*table, str(tmp_path / "result.json")]
    assert table[-2].split() == ["runs/mine", "81.0", "82.8"] and table[-1] == ""


def test_the_last_lines_of_a_script_in_a_terminal(tmp_path, terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", terminal.file)
    monkeypatch.setattr(sys, "argv", ["probe.py", "knn", "--dataset", str(write_clothes(tmp_path, train=200, test=100)),
                                      "--random-init", "nano", "--workers", "0", "--run-dir", str(tmp_path / "run")])
    probe.main()
    lines = terminal.end().splitlines()
    assert lines[-1] == str(tmp_path / "run" / "result.json") and lines[-3].startswith("random init nano ")
    assert not any(line.startswith("{") for line in lines)


STUB = """#!/bin/sh
echo "$0 $*" >> calls
test -z "$FAILS" || {{ echo "error: it fails" >&2; exit 2; }}
cat {output}
"""


@pytest.fixture
def demo(tmp_path):
    """demo/run.sh in a tree of its own, with commands that take no time; they fail if FAILS is set."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "run.sh").write_bytes((ROOT / "demo" / "run.sh").read_bytes())
    (tmp_path / "output").write_text("")
    for name in ("accelerate", "python"):
        (tmp_path / name).write_text(STUB.format(output=tmp_path / "output" if name == "python" else "/dev/null"))
        (tmp_path / name).chmod(0o755)

    def start(**more):
        path = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.run(["sh", tmp_path / "demo" / "run.sh"], env={**os.environ, "PATH": path, **more}, text=True,
                              capture_output=True)  # fmt: skip

    return start


def test_the_demo_ends_with_one_table(demo, tmp_path, output):
    print_last_lines("runs/mine")
    (tmp_path / "output").write_text(output())
    process = demo()
    assert process.returncode == 0 and process.stderr == ""
    lines = process.stdout.splitlines()
    assert [line.split() for line in lines[-5:-2]] == [["top-1", "kNN", "linear"], ["random", "81.0", "82.8"],
                                                       ["runs/mine", "81.0", "82.8"]]  # fmt: skip
    assert lines[-2:] == ["", "runs/mine/result.json"] and "{" not in process.stdout
    shown = [line[2:].split(" > ")[0] for line in lines if line.startswith("$ ")]
    calls = (tmp_path / "calls").read_text().replace(f"{tmp_path}/", "").splitlines()
    assert len(calls) == 4 and shown == calls, "what is shown can be copied"


def test_a_demo_that_fails_ends_there(demo, tmp_path):
    process = demo(FAILS="yes")
    assert process.returncode == 2 and process.stderr == "error: it fails\n"
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_the_launcher_of_the_demo_warns_of_nothing(capfd, caplog):
    """One process, on a GPU if there is one."""
    config = ROOT / "demo" / "accelerate.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "train.py"])
    arguments, *_ = _validate_launch_command(arguments)
    command, environment = prepare_simple_launcher_cmd_env(arguments)
    assert not (arguments.multi_gpu or arguments.use_cpu or arguments.cpu) and arguments.num_processes == 1
    assert environment["ACCELERATE_USE_CPU"] == "False" and arguments.gpu_ids == "all"
    assert command[1:] == ["train.py"] and not caplog.records and capfd.readouterr().err == ""
    assert yaml.safe_load(config.read_text())["use_cpu"] is False
