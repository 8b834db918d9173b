"""What independent fault tests found: two runs in one folder, signals during the start, values that nobody can mean,
files that have the right sums and the wrong shape, names that are made for a terminal."""

import engine.checkpoints
import engine.sources
from engine.arguments import DataArgs
from engine.checkpoints import checkpoints, damage, lock_run_dir
from engine.errors import UserError, markdown, printable, share_temporary_folder
from engine.log import Log
from engine.run import Run
from engine.sources import open_source

import errno
import fcntl
import hashlib
import json
import multiprocessing.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from faults import assert_same, last_step, wait_for
from huggingface_hub import ModelCard
from images import noise_png, write_parquet, write_squares
from launch import ROOT, WarmProcess, environment_of, launch, log_of, refused
from test_faults import FLAGS, copy_of, reference, run  # noqa: F401 (reference is a fixture)

import convert
import finetune
import probe
import train

# ----------------------------------------------------------------------------------------------- two runs in one folder


@pytest.fixture
def held(tmp_path):
    """A run folder that another process holds."""
    folder = tmp_path / "run"
    folder.mkdir()
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from engine.checkpoints import lock_run_dir
from pathlib import Path
lock = lock_run_dir(Path({str(folder)!r}))
print("held", flush=True)
input()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("command", ["train", "knn", "linear", "classify"])
def test_a_folder_belongs_to_one_run(command, held, monkeypatch, capsys):
    """Nothing in it is touched; who has it is told."""
    folder, process = held
    flags = ["--dataset", "demo", "--workers", "0", "--run-dir", str(folder)]
    module, words = {"train": (train, []), "classify": (finetune, [command])}.get(command, (probe, [command]))
    flags += ["--steps", "1"] if command != "knn" else []
    flags += ["--random-init", "nano"] if command != "train" else []
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words, *flags])
    with pytest.raises(SystemExit) as stop:
        module.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    assert re.search(rf"run folder {folder} is in use by another run \(process {process.pid} on \S+, since 20", error)
    assert {path.name for path in folder.iterdir()} <= {"run.lock", "checkpoints"} and not checkpoints(folder)


def test_a_lock_goes_with_its_process_and_not_with_its_loading_processes(tmp_path):
    folder = tmp_path / "run"
    command = ["train.py", *FLAGS, "--steps", "2000", "--workers", "1", "--run-dir", folder]
    first = WarmProcess(command, environment_of(), tmp_path / "output.txt")
    try:
        assert wait_for(first, lambda: last_step(folder) >= 2), first.communicate()
        with pytest.raises(UserError, match=f"process {first.pid} on"):
            run(folder, "--steps", "2000", "--workers", "1")
        reached = last_step(folder)
        assert wait_for(first, lambda: last_step(folder) > reached), "the first one goes on"
    finally:
        first.kill()
    while first.poll() is None:
        time.sleep(0.01)
    lock_run_dir(folder).close()
    log_of(folder)


def test_without_locks_a_run_goes_on_with_a_note(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    lock_run_dir(tmp_path).close()
    assert re.fullmatch(r"note: the file system of \S+ has no locks \(No locks available\): see that .*\n",
                        capsys.readouterr().err)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- labels


def labels_of(folder, labels, **options):
    """The classes of images with these labels."""
    import datasets

    folder.mkdir()
    rows = {"image": [{"bytes": noise_png(0), "path": "0.png"}] * len(labels), "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    return open_source(DataArgs(dataset=str(folder), workers=0), labelled=True, **options).classes


def test_one_absurd_label_is_refused(tmp_path, monkeypatch):
    """Names of as many classes would fill the memory. A few of ImageNet-21k's classes are welcome."""
    monkeypatch.setattr(engine.sources, "range", lambda n: range(min(n, 10**6)), raising=False)
    with pytest.raises(UserError, match=r"--label-column label holds numbers up to 1000000000, and only 3 different one"
                                        r"s: .*; mend the column, or pass --num-classes"):  # fmt: skip
        labels_of(tmp_path / "absurd", [0, 1, 10**9, 1])
    assert len(labels_of(tmp_path / "few", [3, 7, 20_000])) == 20_001
    assert len(labels_of(tmp_path / "meant", [3, 200_000], num_classes=200_001)) == 200_001


# --------------------------------------------------------------------------------- files of the right sum, all the same


def put(file, content):
    """Other content in a file of a checkpoint, with sums that are right."""
    file.write_text(content)
    sums = file.with_name("SHA256SUMS")
    lines = [line for line in sums.read_text().splitlines() if line.split()[1] != file.name]
    sums.write_text("\n".join([*lines, f"{hashlib.sha256(content.encode()).hexdigest()}  {file.name}"]) + "\n")


@pytest.mark.parametrize("name", ["trainer.json", "data_0.json"])
def test_a_file_of_another_shape_is_damaged(name, reference, tmp_path):  # noqa: F811
    """Whatever JSON can say; what a run wrote is not."""
    last = checkpoints(copy_of(reference, tmp_path / "run"))[-1]
    file = last / name
    written = json.loads(file.read_text())
    shapes = [[], "text", None, 3, "[" * 100_000]
    if name == "trainer.json":
        shapes += [{**written, "step": step} for step in (-5, 1e99, 6.5, 10**99, "6", None, [6])]
        shapes += [{**written, "bad_steps": -1}, {**written, "unjudged": [1]}, {"bad_steps": 0}]
    else:
        shapes += [{**written, "taken": taken} for taken in (-1, 1e99, 0.5, [-1], {"a": [-3]})]
    for shape in shapes:
        put(file, shape if isinstance(shape, str) and shape[0] == "[" else json.dumps(shape))
        assert damage(last) == f"{name} does not hold what a run writes", shape
    put(file, json.dumps(written))
    assert damage(last) is None


@pytest.mark.parametrize(("name", "content"), [("trainer.json", "[]"), ("data_0.json", '{"taken": -1}')])
def test_the_checkpoint_before_one_of_another_shape_is_used(name, content, reference, tmp_path, capsys):  # noqa: F811
    folder = copy_of(reference, tmp_path / "run", last=6)
    put(folder / "checkpoints" / "step_00000006" / name, content)
    run(folder)
    captured = capsys.readouterr()
    assert f"step_00000006 is damaged: {name} does not hold what a run writes; the one before is used" in captured.err
    assert_same(folder, reference)


def test_a_position_that_lacks_something_is_told(reference, tmp_path):  # noqa: F811
    folder = copy_of(reference, tmp_path / "run", last=3)
    put(folder / "checkpoints" / "step_00000003" / "data_0.json", '{"taken": 0, "pass": 0}')
    with pytest.raises(UserError, match=r"step_00000003 does not fit: its position in the data has another shape"):
        run(folder)


def test_a_log_with_lost_bytes_is_read(reference, tmp_path):  # noqa: F811
    """Broken lines are dropped, as those that a lost machine cut off."""
    folder = copy_of(reference, tmp_path / "run", last=6)
    lines = (folder / "log.jsonl").read_bytes().splitlines()
    broken = [b"\xff\x00\xfe\x80}", b'{"step": 2, "loss": "\xff"}', b'{"step": "3"}', b"[" * 100_000 + b"}"]
    (folder / "log.jsonl").write_bytes(b"\n".join([*lines[:3], *broken, *lines[3:]]) + b"\n")
    run(folder)
    assert_same(folder, reference)


# ---------------------------------------------------------------------------------------------------------- a full disk


def test_a_full_disk_is_told_plainly(tmp_path, monkeypatch, capfd):
    """torch names a line of its code. Tried again after 1, 2, 4, ... lines of the log, and when a checkpoint is due;
    log lines, which are kept, are told of once."""
    full, attempts = [True], []
    save_state, write = Accelerator.save_state, Log.write

    def save(accelerator, folder):
        attempts.append(int(re.search(r"step_(\d+)", folder)[1]))
        if full:
            torch.save({"w": torch.zeros(10**6)}, "/dev/full")
        save_state(accelerator, folder)

    def makes_room(log, values, *options):
        full[:] = [True] * (values["step"] < 22)
        write(log, values, *options)

    monkeypatch.setattr(Accelerator, "save_state", save)
    monkeypatch.setattr(Log, "write", makes_room)
    monkeypatch.setattr(engine.checkpoints.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))  # noqa: SIM115
    run(tmp_path / "run", "--steps", "24", "--checkpoint-every", "16")
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert attempts == [16, 17, 19, 23, 24]
    assert len(told) == 3 and "inline_container" not in "".join(told)
    for line, step in zip(told, attempts, strict=False):
        assert f"of step {step} could not be written: [Errno 28] No space left on device, in {tmp_path}" in line
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000023", "step_00000024"]


def test_a_log_on_a_full_disk_is_told_of_once(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    accelerator = SimpleNamespace(is_main_process=True, log=lambda *_, **__: None)
    log = Log(accelerator, tmp_path, 0, 9)
    line = {"loss": 1.0, "images_per_second": 1.0, "data_wait": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", full)
        for step in (1, 2, 3):
            log.write({"step": step, **line})
    assert capsys.readouterr().err.count("cannot be written: [Errno 28] No space left") == 1
    log.write({"step": 4, **line})
    log.close()
    assert [entry["step"] for entry in log_of(tmp_path)] == [1, 2, 3, 4]


# --------------------------------------------------------------------------------------------- signals during the start


def interrupted(name):
    return f"interrupted by {name}; give the same command again\n"


@pytest.mark.parametrize("script", ["train.py", "probe.py", "finetune.py", "convert.py"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_signal_while_libraries_are_imported(script, name, code, tmp_path):
    """In place of the first of them stands one that sends the signal. (Where it is ignored, in the background of a
    shell, nothing comes of it.)"""
    library = tmp_path / ("torch.py" if script == "convert.py" else "tyro.py")
    library.write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\nos.write(1, b'on')\nos._exit(0)")
    for ignored in (False, True):
        handler = signal.SIG_IGN if ignored else signal.SIG_DFL if name != "SIGINT" else signal.default_int_handler
        process = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True,
                                 env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60,
                                 preexec_fn=lambda: signal.signal(getattr(signal, name), handler))  # fmt: skip # noqa: B023
        found = process.returncode, process.stdout, process.stderr
        assert found == ((0, "on", "") if ignored else (code, "", interrupted(name)))


# A script elsewhere that uses one of ours: with these lines before it is called.
WRAPPED = f"""
import os, signal, sys, tempfile, threading, time

sys.path.insert(0, {str(ROOT)!r})

import engine.run
import probe
import train

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
"""


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_while_data_are_opened(name, code, processes, tmp_path):
    """To every process; one speaks. No exception, which here would be swallowed; the other one is waiting for it."""
    (tmp_path / "script.py").write_text(WRAPPED + f"""
def opened(*_):
    try:
        time.sleep({processes - 1})
        os.kill(os.getpid(), signal.{name})
        time.sleep(60)
    except BaseException:
        return None

def waits(run):
    if run.rank:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.{name})).start()
    return first(run)

first, engine.run.Run.main_process_first, train.open_source = engine.run.Run.main_process_first, waits, opened
train.main()
""")
    process = launch(tmp_path / "script.py", *FLAGS, "--run-dir", tmp_path / "run", processes=processes, warm=True)
    assert (process.returncode, process.stderr) == (code, interrupted(name))


def test_whoever_imports_the_engine_keeps_their_handlers():
    code = "import signal; before = signal.getsignal(15), signal.getsignal(2); import engine.errors as errors\n"
    code += "errors.command_line(lambda: print(signal.getsignal(15)))\n"
    code += "assert before == (signal.getsignal(15), signal.getsignal(2))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0 and "end_on_signals" in process.stdout, process.stderr


def test_an_interrupted_export_leaves_nothing(tmp_path):
    (tmp_path / "script.py").write_text(WRAPPED + """
import convert

convert.load_model = lambda name: convert.CAE(convert.CAEConfig.from_size("nano"))
convert.write_beit = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
convert.main()
""")
    flags = ["--checkpoint", "any", "--to", "beit", "--output", tmp_path / "out" / "beit"]
    process = launch(tmp_path / "script.py", *flags, warm=True)
    assert (process.returncode, process.stderr) == (143, interrupted("SIGTERM"))
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def short_folder():
    """A temporary one whose path does not grow with the test's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("end", ["done", "stopped", "interrupted"])
def test_no_folder_stays_in_the_temporary_one(end, tmp_path, short_folder):
    """Those of loading processes, which are killed at the end: also where the trainer ends without one."""
    act = "os.kill(os.getpid(), signal.SIGTERM)"
    (tmp_path / "script.py").write_text(WRAPPED + f"""
os.environ["TMPDIR"] = tempfile.tempdir = {str(short_folder)!r}

def told(log, values, *options):
    write(log, values, *options)
    if {end == "stopped"}:
        {act}

def rows(*_):
    {act}

write, engine.run.Log.write, probe.knn_rows = engine.run.Log.write, told, rows
(probe if sys.argv[1] == "knn" else train).main()
""")
    data = write_squares(tmp_path / "data", train=range(20), test=range(20))
    knn = ["knn", "--dataset", data, "--random-init", "nano", "--batch-size", "4"]
    command = knn if end == "interrupted" else [*FLAGS, "--steps", "3"]
    process = launch(tmp_path / "script.py", *command, "--workers", "2", "--run-dir", tmp_path / "run", warm=True)
    assert process.returncode == (143 if end == "interrupted" else 0), process.stderr
    assert ("stopped by SIGTERM" in process.stdout) == (end == "stopped")
    assert not list(short_folder.glob("pymp-*"))


def test_a_path_that_is_too_long_for_sockets_is_told(monkeypatch, short_folder):
    """Nothing would come from loading processes, for ever."""
    for length, fits in ((85, True), (86, False)):
        folder = f"{short_folder}/".ljust(length, "x")
        monkeypatch.setattr(multiprocessing.util, "get_temp_dir", lambda: folder)  # noqa: B023
        with nullcontext() if fits else pytest.raises(UserError, match="set TMPDIR to a shorter one"):
            share_temporary_folder()


def test_a_folder_that_somebody_tidied_away_is_made_again():
    """Loading processes without one would give nothing, for ever."""
    share_temporary_folder()
    folder = multiprocessing.util.get_temp_dir()
    shutil.rmtree(folder)
    share_temporary_folder()
    assert multiprocessing.util.get_temp_dir() == folder and os.path.isdir(folder)
    code = "import engine.errors as e, shutil; e.share_temporary_folder(); shutil.rmtree(*e.temporary_folders)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stderr == b""


# ------------------------------------------------------------------------------------------ values that nobody can mean

HUGE = "1" + "0" * 30


@pytest.mark.parametrize("flags", [
    "--patience inf", "--timeout inf", "--timeout 1e30", "--patience 1e30", "--epochs inf", "--warmup-epochs inf",
    f"--seed {2**70}", f"--effective-batch-size {HUGE}", f"--batch-size {HUGE}", f"--steps {HUGE}", "--workers 1000000",
    "--num-images -5", "--lr inf", "--crop-scale 0.1 nan", "--drop-path nan", f"--parts {10**9}",
    f"--image-size {HUGE}",
])  # fmt: skip
def test_a_value_that_nobody_can_mean_is_one_line(flags, tmp_path, monkeypatch, capsys):
    error = refused(monkeypatch, capsys, train, "--dataset", "demo", *flags.split(), run_dir=tmp_path / "run")
    assert error.startswith(f"error: {flags.split()[0]} is {flags.split()[-1][:1]}")


@pytest.mark.parametrize(("module", "command"), [
    (probe, "knn --temperature nan"), (probe, f"knn --k {HUGE}"), (probe, "linear --lr inf"),
    (probe, "attentive --momentum nan"), (probe, f"knn --num-classes {10**9}"),
    (finetune, "classify --mixup inf"), (finetune, f"classify --seed {2**70}"),
])  # fmt: skip
def test_nor_in_the_other_scripts(module, command, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", "demo", "--random-init", "nano"]
    error = refused(monkeypatch, capsys, module, *command.split(), *flags, run_dir=tmp_path / "run")
    assert error.startswith(f"error: {command.split()[1]} is ")


def test_nor_one_that_is_no_float(tmp_path, monkeypatch, capsys):
    refused(monkeypatch, capsys, train, "--dataset", "demo", "--log-every", "1" + "0" * 400, run_dir=tmp_path / "run")


def test_a_seed_may_be_negative(tmp_path):
    run(tmp_path / "run", "--steps", "1", "--seed", "-1")


@pytest.mark.parametrize(("name", "told"), [
    ("", "--run-dir is empty: name a folder"), ("x" * 300, r"--run-dir x{100} cannot be a folder: File name too long"),
])  # fmt: skip
@pytest.mark.parametrize("module", [train, probe, finetune])
def test_a_run_folder_that_cannot_be(module, name, told, monkeypatch, capsys):
    words = {probe: ["knn", "--random-init", "nano"], finetune: ["classify", "--random-init", "nano"]}.get(module, [])
    command = [f"{module.__name__}.py", *words, "--dataset", "demo", "--run-dir", name]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 2 and re.fullmatch(f"error: {told}.*\n", capsys.readouterr().err)


def test_a_default_run_folder_that_cannot_be(tmp_path, monkeypatch):
    """Made of a name that fits by itself."""
    data = tmp_path / ("x" * 250)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    write_parquet(data, (4,))
    with pytest.raises(UserError, match=r"run folder runs/cae-v2-base-x+ cannot be: File name too long"):
        train.resolve(train.parse(train.Args, ["--dataset", str(data)]))


def test_the_size_of_an_export_that_nobody_can_mean(tmp_path, monkeypatch, capsys):
    convert.CAE(convert.CAEConfig.from_size("nano")).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["convert.py", "--checkpoint", str(tmp_path / "model"), "--to", "beit", "--output",
                                      str(tmp_path / "beit"), "--image-size", "4" + "0" * 30])  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        convert.main()
    assert stop.value.code == 2 and "error: --image-size is 4000" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- strangers' names

ESCAPE = "\x1b]0;owned\x07\x1b[31m"  # changes the title of a window, and the colour


def test_names_are_shown_and_nothing_else():
    assert printable("Straße 東京 🙂 <b>|") == "Straße 東京 🙂 <b>|"
    assert printable(f"a{ESCAPE}\nb\r\u202ec\udcff") == r"a\x1b]0;owned\x07\x1b[31m\nb\r\u202ec\udcff"
    shown = markdown("a|b`c`<script>*d*[e](f)\n# g\\")
    assert shown == r"a\|b\`c\`&lt;script&gt;\*d\*\[e\](f)\\n# g\\"


def test_file_and_class_names_do_not_reach_the_terminal(tmp_path, capfd):
    """The log has them as they are."""
    folder = tmp_path / "data" / f"<b>|{ESCAPE}"
    folder.mkdir(parents=True)
    for n in range(320):
        bad = n in (7, 8)
        (folder / f"{n:03}{ESCAPE * bad}.png").write_bytes(b"no image" if bad else noise_png(n))
    run(tmp_path / f"run{ESCAPE}", "--dataset", str(tmp_path / "data"), "--size", "nano", "--no-streaming", "--teacher",
        "demo/clip_teacher", "--steps", "20", "--checkpoint-every", "20")  # fmt: skip
    captured = capfd.readouterr()
    shown = captured.out + captured.err
    assert "\x1b" not in shown and "\x07" not in shown
    assert captured.err.count(r"skipped ") == 2 and r"008\x1b]0;owned\x07\x1b[31m.png" in captured.err
    names = [name for line in log_of(tmp_path / f"run{ESCAPE}") for name in line.get("skipped_files", [])]
    assert len(names) == 2 and all(ESCAPE in name for name in names)


def test_an_error_shows_names_escaped(tmp_path, monkeypatch, capsys):
    """Those of classes, say."""
    data = write_parquet(tmp_path / "data", (8,))
    write_parquet(data, (9,), split="validation", names=(f"dog{ESCAPE}", "odd", "prime"))
    flags = ["--random-init", "nano", "--dataset", data, "--streaming", "--workers", "0"]
    error = refused(monkeypatch, capsys, finetune, "classify", *flags, run_dir=tmp_path / "run")
    assert "\x1b" not in error and r"dog\x1b]0;owned\x07\x1b[31m" in error


def test_the_last_lines_show_names_escaped(tmp_path, capsys):
    Run.print_result(SimpleNamespace(folder=tmp_path / ESCAPE), [f"mine{ESCAPE}", "  80.0"], {"encoder": ESCAPE})
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.startswith("mine\\x1b]0;owned\\x07\\x1b[31m\n  80.0\n")
    assert json.loads(out.splitlines()[-1]) == {"encoder": ESCAPE}


def test_a_model_card_is_one_of_text(tmp_path):
    """A table of as many rows as there are values, and no element or code of a name."""
    name = f"me/x`|<script>alert(1)</script>\n\n# Owned\n| a | b |{ESCAPE}"
    args = finetune.Classify()
    args.data.dataset = args.data.split = args.labels.val_split = args.model.checkpoint = name
    args.recipe.lr, args.recipe.layer_decay, args.model.image_size = 1.0, 1.0, 28
    task = finetune.Classification()
    task.args, task.classes = args, ["a", "b"]
    task.origin = finetune.Origin(None, None, None, name, "nano", name)
    args.data.effective_batch_size = 1024
    evaluation = {"scores": {"top1": 1.0, "top5": 2.0}, "images": 3}
    finetune.model_card(task, 1, evaluation).save(tmp_path / "README.md")
    content = ModelCard.load(tmp_path / "README.md").text
    assert "<script" not in content and "\x1b" not in content and "# Owned" not in content.splitlines()
    rows = [line for line in content.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(finetune.flat(args)) + 1
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
