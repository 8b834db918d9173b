"""Run the real scripts as their users do."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def environment_of(**more):
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def launch(*command, processes=1, cwd=ROOT, timeout=300, **environment):
    """The finished process of such a command, with its output as text."""
    return subprocess.run(command_of(*command, processes=processes), cwd=cwd, env=environment_of(**environment),
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
