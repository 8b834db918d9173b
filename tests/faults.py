"""What a run survives, shown on the demo: repeated SIGKILL, and memory that stays level.

    python tests/faults.py                  20 kills of a two-process run, each resumed; about six minutes on two cores
    python tests/faults.py --kills 5
    python tests/faults.py --soak 2000      memory of main and loading processes over 2,000 steps of streaming

The killed run must end as the run that nobody killed: the same images in the same order, the same losses in every line
of the log, the same bits in the weights; and after each kill every finished checkpoint must be whole. The last line
printed is a JSON object; exit code 1 if anything differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from engine.checkpoints import checkpoints, damage  # noqa: E402

from launch import command_of, environment_of, launch, log_of, succeeded  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

EQUAL = ("step", "epoch", "loss", "loss_cls", "loss_visible", "loss_masked", "grad_norm", "lr", "images", "skipped",
         "bad_steps", "seen")  # fmt: skip


def start(run_dir, *flags, processes=2):
    """The run in the background, in a process group of its own."""
    command = command_of("train.py", "--dataset", "demo", "--run-dir", run_dir, *flags, processes=processes)
    return subprocess.Popen(command, cwd=ROOT, env=environment_of(processes), start_new_session=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip


def ranks_of(process):
    """The training processes: `process` itself, or torchrun's children in the order of their ranks."""
    main, found = psutil.Process(process.pid), {}
    if "torch.distributed.run" not in " ".join(main.cmdline()):
        return [main]
    for child in main.children():
        with suppress(psutil.Error):  # torchrun starts others, for a moment
            if "train.py" in " ".join(child.cmdline()):
                found[child.environ()["RANK"]] = child
    return [found[rank] for rank in sorted(found)]


def last_step(run_dir):
    lines = (Path(run_dir) / "log.jsonl").read_text().splitlines() if (Path(run_dir) / "log.jsonl").exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return json.loads(whole[-1])["step"] if whole else 0


def wait_for(process, reached, seconds=120):
    """Wait until reached() or the process ends; whether it was reached."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if reached():
            return True
        time.sleep(0.002)
    return False


def assert_same(run_dir, reference):
    """The same log and the same weights. Raises AssertionError."""
    ours, theirs = log_of(run_dir), log_of(reference)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in EQUAL:
            assert a.get(name) == b.get(name), (a["step"], name, a.get(name), b.get(name))
    ours, theirs = (load_file(Path(path) / "model" / "model.safetensors") for path in (run_dir, reference))
    assert set(ours) == set(theirs) and all(ours[name].equal(theirs[name]) for name in theirs)


def kill_and_resume(folder, kills=20, steps=120, seed=0, report=print):
    """Kill a two-process run at random moments, half of them during saves, and resume it each time. Raises
    AssertionError if it does not end as the uninterrupted one; returns the figures."""
    chance = random.Random(seed)
    flags = ["--steps", steps, "--checkpoint-every", 3, "--keep", 2, "--log-every", 1, "--batch-size", 8,
             "--effective-batch-size", 32, "--workers", 2, "--drop-path", 0.2]  # fmt: skip
    reference, run_dir = folder / "uninterrupted", folder / "killed"
    succeeded(launch("train.py", "--dataset", "demo", "--run-dir", reference, *flags, processes=2, warm=True))
    moments = sorted(chance.sample(range(2, steps - 20), kills))
    done, during_saves, redone, reached = 0, 0, 0, 0
    for i, moment in enumerate(moments):
        at_save, victim = i % 2 == 0, chance.choice(["rank 0", "rank 1", "all"])
        process = start(run_dir, *flags)
        temporary = lambda: list((run_dir / "checkpoints").glob("*.tmp"))  # noqa: E731
        moment = max(moment, reached + 1)  # the log of before is there from the start
        assert wait_for(process, lambda: last_step(run_dir) >= moment), process.communicate()[0]  # noqa: B023
        if at_save:
            wait_for(process, temporary, seconds=10)
        time.sleep(chance.uniform(0, 0.03 if at_save else 0.2))
        assert process.poll() is None, f"the run was over before kill {i + 1}: give more --steps"
        ranks = ranks_of(process)
        if victim == "all":
            os.killpg(process.pid, signal.SIGKILL)
            targets = ranks
        else:
            targets = [ranks[int(victim[-1])]]
        for target in targets:
            target.kill()
        process.communicate()  # torchrun ends the other one
        done, half_written, reached = done + 1, bool(temporary()), last_step(run_dir)
        during_saves += half_written
        whole = checkpoints(run_dir)
        assert all(damage(path) is None for path in whole), "a finished checkpoint is damaged"
        resumes_at = int(whole[-1].name[5:]) if whole else 0
        redone += reached - resumes_at
        report(f"kill {done:2}: {victim:6} at step {reached:3}{', during a save' * half_written:15}  "
               f"resumes at step {resumes_at}")  # fmt: skip
    succeeded(launch("train.py", "--dataset", "demo", "--run-dir", run_dir, *flags, processes=2, warm=True))
    assert_same(run_dir, reference)
    assert not list(run_dir.rglob("*.tmp"))
    return {"kills": done, "during_saves": during_saves, "steps": steps, "steps_redone": redone, "same": True}


def soak(folder, steps=2000):
    """Memory of the training process and of its loading processes over a streamed run, in MB: their proportional share
    (what two of them share counts half for each), the median of each fifth of the run."""
    run_dir = folder / "soak"
    process = start(run_dir, "--steps", steps, "--checkpoint-every", steps // 4, "--log-every", 20, "--batch-size", 16,
                    "--effective-batch-size", 16, "--workers", 2, processes=1)  # fmt: skip
    samples = []
    while process.poll() is None:
        try:
            main = psutil.Process(process.pid)
            used = [p.memory_full_info().pss / 2**20 for p in (main, *main.children())]
            samples.append((last_step(run_dir), used[0], sum(used[1:])))
        except psutil.Error:
            pass
        time.sleep(0.5)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    result = {"steps": steps}
    for name, column in (("main", 1), ("workers", 2)):
        fifths = [[s[column] for s in samples if steps * k <= 5 * s[0] < steps * (k + 1)] for k in range(5)]
        result[f"{name}_mb"] = [round(statistics.median(fifth), 1) for fifth in fifths]
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--soak", type=int, metavar="STEPS", help="measure memory over so many steps instead")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    began = time.monotonic()
    try:
        if args.soak:
            result = soak(folder, args.soak)
        else:
            result = kill_and_resume(folder, args.kills, args.steps, args.seed)
            print("log, images and weights are those of the uninterrupted run")
    finally:
        shutil.rmtree(folder)
    print(json.dumps({**result, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
