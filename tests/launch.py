"""Run the real scripts as their users do, in processes of their own or in this one."""

import json
import os
import subprocess
import sys
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


def launch(*command, processes=1, cwd=ROOT, timeout=300, **environment):
    """The finished process of such a command, with its output as text."""
    return subprocess.run(command_of(*command, processes=processes), cwd=cwd,
                          env=environment_of(processes, **environment),
                          capture_output=True, text=True, timeout=timeout)  # fmt: skip


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
