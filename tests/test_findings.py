"""The loops of README.md and docs/findings.md, with a stand-in for python that writes down what it was asked to do: all
runs, each once, what is done skipped, no probe of a run that failed or was stopped. And their flags are possible."""

from engine.arguments import parse

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
from launch import ROOT

import pictures
import probe
import train

STAND_IN = """#!{python} -SE
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # train.py ends by itself, with code 0
script, *flags = sys.argv[1:]
with open("commands", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if script == "pictures.py":
    sys.exit()
folder = pathlib.Path(flags[flags.index("--run-dir") + 1])
time.sleep(float(os.environ.get("SECONDS_OF_TRAINING", 0)) * (script == "train.py"))
if script == "train.py" and os.environ.get("FAILS", "nothing") in folder.name:
    sys.exit(1)
folder.mkdir(parents=True)
if script == "probe.py":
    (folder / "result.json").write_text("{{}}")
"""


def loop_of(document):
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), re.S)
    (loop,) = (block for block in blocks if "xargs" in block)
    return loop


@pytest.fixture
def run_loop(tmp_path):
    """run(document, **environment) -> the finished process; commands() -> what python was asked to do."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)

    def start(document, seeds="0", **environment):
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        command = ["sh", "-c", loop_of(document).replace("0 1 2", seeds, 1)]
        return subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                start_new_session=True, env={**os.environ, **environment, "PATH": path})  # fmt: skip

    def commands():
        lines = (tmp_path / "commands").read_text().splitlines()
        (tmp_path / "commands").unlink()
        return lines

    return start, commands


@pytest.mark.parametrize("document, runs, drawn", [("README.md", 54, 1), ("docs/findings.md", 21, 2)])
def test_a_loop_runs_everything_once(run_loop, document, runs, drawn):
    start, commands = run_loop
    _, errors = start(document, "0 1 2").communicate(timeout=120)
    assert errors == ""
    lines = commands()
    trained = [line for line in lines if line.startswith("train.py")]
    probed = [line for line in lines if line.startswith("probe.py knn")]
    assert len(trained) == len(set(trained)) == len(probed) == len(set(probed)) == runs
    assert [line.split()[0] for line in lines[-drawn:]] == ["pictures.py"] * drawn
    start(document, "0 1 2").communicate(timeout=120)
    assert [line.split()[0] for line in commands()] == ["pictures.py"] * drawn, "all is done"


def test_a_run_that_fails_is_not_probed_and_tried_again(run_loop):
    start, commands = run_loop
    start("README.md", FAILS="nano-0.4-both-0").communicate(timeout=120)
    lines = commands()
    assert len([line for line in lines if line.startswith("train.py")]) == 18
    assert len([line for line in lines if line.startswith("probe.py")]) == 17
    start("README.md").communicate(timeout=120)
    assert len([line for line in commands() if line.startswith("train.py")]) == 1


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_ctrl_c_ends_the_loop_without_a_probe_of_what_it_stopped(run_loop, tmp_path, shell):
    """train.py ends with code 0 after Ctrl-C and a checkpoint: the encoder is no finished one. (bash would go on.)"""
    start, commands = run_loop
    (tmp_path / "bin" / "sh").symlink_to(shutil.which(shell) or pytest.skip("there is no bash"))
    process = start("README.md", SECONDS_OF_TRAINING="1.5")
    deadline = time.monotonic() + 30
    while not (tmp_path / "commands").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    # to all of the terminal's processes, as Ctrl-C
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=30)
    time.sleep(2.5)
    lines = commands()
    assert len(lines) <= 2 and not any(line.startswith("probe.py") for line in lines)


VALUES = {"$size": "nano", "$ratio": "0.4", "$supervise": "both", "$seed": "0", "$run": "runs/x", "$depth": "1",
          "$weight": "2", "$@": ""}  # fmt: skip


@pytest.mark.parametrize("document", ["README.md", "docs/findings.md"])
def test_flags_of_a_loop_are_possible(document):
    text = loop_of(document)
    for name, value in VALUES.items():
        text = text.replace(f'"{name}"', value).replace(name, value)
    found = []
    for line in text.replace("'", "").splitlines():
        words = shlex.split(line.partition(" > ")[0].partition(" >> ")[0].removesuffix(" &&"))
        if words[:1] == ["python"]:
            kind, flags = {"train.py": (train.Args, words[2:]), "probe.py": (probe.Command, words[2:]),
                           "pictures.py": (pictures.Command, words[2:])}[words[1]]  # fmt: skip
            parse(kind, flags)
            found.append(words[1])
        elif "echo" in words and "--" in line:  # flags that reach train.py as "$@"
            flags = line[line.index("--") :].partition(";")[0].split()
            parse(train.Args, flags)
    assert set(found) == {"train.py", "probe.py", "pictures.py"}
