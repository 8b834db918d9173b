"""Run the real scripts as their users do, in processes of their own or in this one."""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def command_of(*command, processes=1):
    """`script.py --flag value ...` in one process or under torchrun.

    `accelerate launch --cpu --num_processes 2` would silently start one process, hence torchrun.
    """
    starter = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
        "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
    ]  # fmt: skip
    return [*starter, *map(str, command)]


def environment_of(processes=1, **more):
    """Of one process that leaves a core to other tests, or of a launcher."""
    if processes == 1:
        more.setdefault("LOCAL_WORLD_SIZE", "2")
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def launch(*command, processes=1, cwd=ROOT, timeout=300, warm=False, **environment):
    """The finished process of such a command, with its output as text.

    warm, where neither the start nor the launcher is under test: forked with the libraries imported (warm.py), which
    have read their environment by then, hence no other one. Its exit code is the first that is not 0.
    """
    if warm:
        assert not environment
        return launch_warm(command, processes, cwd, timeout)
    return subprocess.run(command_of(*command, processes=processes), cwd=cwd,
                          env=environment_of(processes, **environment),
                          capture_output=True, text=True, timeout=timeout)  # fmt: skip


def launch_warm(command, processes, cwd, timeout):
    environments = [environment_of()] if processes == 1 else environments_of_ranks(processes)
    with tempfile.TemporaryDirectory() as folder:
        output = [f"{folder}/stdout", f"{folder}/stderr"]
        codes = ask_warm(wait=fork_warm(command, environments, cwd, output, timeout))
        return subprocess.CompletedProcess(command, next(filter(None, codes), 0),
                                           *(Path(path).read_text() for path in output))  # fmt: skip


class WarmProcess:
    """One that runs in the background, used as a Popen is; its output, errors included, goes to a file."""

    def __init__(self, command, environment, output, cwd=ROOT, timeout=300):
        self.output, self.returncode = output, None
        (self.pid,) = fork_warm(command, [environment], cwd, [output, output], timeout)

    def poll(self):
        if self.returncode is None:
            self.returncode = ask_warm(poll=self.pid)
        return self.returncode

    def communicate(self, timeout=300):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.output, timeout)
            time.sleep(0.01)
        return Path(self.output).read_text(), None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def environments_of_ranks(processes):
    """What torchrun tells its processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [environment_of(processes, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                           LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=port)
            for rank in range(processes)]  # fmt: skip


@functools.cache
def warm_server():
    """Started once for all tests of this process, and ends with it."""
    server = subprocess.Popen([sys.executable, ROOT / "tests" / "warm.py"], env=environment_of(), text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    atexit.register(server.wait)
    atexit.register(server.kill)  # first: loading processes of tests hold its input open, too
    assert server.stdout.readline() == "ready\n"
    return server


def ask_warm(**request):
    print(json.dumps(request), file=warm_server().stdin, flush=True)
    return json.loads(warm_server().stdout.readline())


def fork_warm(command, environments, cwd, output, timeout):
    """Ids of the processes."""
    return ask_warm(command=[str(word) for word in command], environments=environments, cwd=str(cwd),
                    output=[str(path) for path in output], timeout=timeout)  # fmt: skip


def succeeded(process):
    assert process.returncode == 0, process.stdout + process.stderr
    return process


def log_of(run_dir):
    """The lines of log.jsonl; every step must be there once, in order."""
    lines = [json.loads(line) for line in (Path(run_dir) / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return lines


def call(monkeypatch, capsys, module, *command, run_dir):
    """probe.py or finetune.py in this process: its result, as result.json and last line tell it; its output."""
    command = [*map(str, command), "--workers", "0", "--run-dir", str(run_dir)]
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *command])
    module.main()
    output = capsys.readouterr().out
    result = json.loads((Path(run_dir) / "result.json").read_text())
    assert json.loads(output.strip().splitlines()[-1]) == result
    return result, output


def refused(monkeypatch, capsys, module, *command, run_dir):
    """A script in this process with a mistake in its command, which ends with one line, code 2 and no run folder: that
    line."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, command), "--run-dir", str(run_dir)])
    with pytest.raises(SystemExit) as stop:
        module.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.strip().splitlines()) == 1, error
    assert not Path(run_dir).exists(), "nothing is left behind"
    return error
