"""The house: who may import whom, which flags there are, and that a wrong one is answered before any heavy import."""

import engine.arguments
from engine.arguments import parse

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
import tyro
from launch import ROOT

import convert
import dense
import finetune
import pictures
import probe
import train

# Arrows run only downwards: a file imports from those before it. The five scripts do not import each other; dense.py,
# the other half of finetune.py, imports that one, which imports it where a command asks for it.
ENGINE = ["errors", "files", "seeds", "arguments", "turbojpeg", "images", "network", "folders", "annotations",
          "parquet", "sources", "stream", "frozen", "detectors", "checkpoints", "log", "run", "evaluation",
          "watching"]  # fmt: skip
SCRIPTS = ["train", "probe", "finetune", "pictures"]


def imports_of(path):
    """The project's own modules that a file imports, anywhere in it."""
    ours = {"engine", "bench", "demo", "cae", "convert", "dense", *SCRIPTS}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide where things come from"
            names = [node.module] if node.module != "engine" else [f"engine.{alias.name}" for alias in node.names]
        found |= {name for name in names if name.split(".")[0] in ours}
    return found


def test_every_file_has_its_room():
    assert {path.stem for path in (ROOT / "engine").glob("*.py")} == {"__init__", *ENGINE}
    assert {path.stem for path in ROOT.glob("*.py")} == {"cae", "convert", "dense", *SCRIPTS}


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_imports_downwards(name):
    """Neither the model nor a script, and of the engine what stands before it."""
    allowed = {f"engine.{other}" for other in ENGINE[: ENGINE.index(name)]}
    assert imports_of(ROOT / "engine" / f"{name}.py") <= allowed


@pytest.mark.parametrize("name", ["__init__", "errors", "seeds"])
def test_what_stands_on_nothing(name):
    assert imports_of(ROOT / "engine" / f"{name}.py") == set()


def test_the_model_imports_nothing_of_ours():
    assert imports_of(ROOT / "cae.py") == set()


@pytest.mark.parametrize("name", ["convert", *SCRIPTS])
def test_scripts_import_model_bridges_and_engine(name):
    """No script imports another. (convert.py is a script as well, and the one way to other people's weights.)"""
    others = {"cae"} if name == "convert" else {"cae", "convert"}
    if name == "finetune":
        others |= {"dense"}
    assert {module for module in imports_of(ROOT / f"{name}.py") if not module.startswith("engine.")} <= others


def test_the_dense_tasks_are_imported_where_they_are_asked_for():
    """By one function of finetune.py; the demo's scenes by the tasks' own."""
    assert {module for module in imports_of(ROOT / "dense.py") if not module.startswith("engine.")} == {
        "cae", "convert", "finetune", "demo.scenes"}  # fmt: skip
    at_the_top = [node for node in ast.parse((ROOT / "finetune.py").read_text()).body if isinstance(node, ast.Import)]
    assert "dense" not in {alias.name for node in at_the_top for alias in node.names}


def test_benchmarks_stand_on_everything_and_carry_nothing():
    for path in [*ROOT.glob("*.py"), *(ROOT / "engine").glob("*.py")]:
        assert not any(module.startswith("bench") for module in imports_of(path)), path.name


COMMANDS = {
    "train.py": (train.Args, []),
    "probe.py knn": (probe.Command, ["knn"]),
    "probe.py linear": (probe.Command, ["linear"]),
    "probe.py attentive": (probe.Command, ["attentive"]),
    "finetune.py classify": (finetune.Classify, []),
    "finetune.py segment": (dense.Segment, []),
    "finetune.py detect": (dense.Detect, []),
    "convert.py": (convert.Export, []),
    **{f"pictures.py {name}": (kind, []) for name, kind in pictures.KINDS.items()},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_new_flag_is_a_decision(command, capsys, monkeypatch):
    """--help of every script against flags.txt: who adds a flag writes it there, too."""
    kind, start = COMMANDS[command]
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        if command == "convert.py":
            tyro.cli(kind, args=["--help"])
        else:
            parse(kind, [*start, "--help"])
    # A flag begins a line, its text stands behind or below it; around it is a box, where the terminal has one.
    columns = re.findall(r"(?m)^(?:│ |  )(-\S.*?)(?:  | *│|$)", capsys.readouterr().out)
    found = sorted({flag for column in columns for flag in re.findall(r"--[a-z][\w-]*", column)})
    listed = (ROOT / "tests" / "flags.txt").read_text()
    listed = dict(block.split(":\n") for block in listed.strip().split("\n\n"))
    assert found == sorted(listed[command].split()), command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_begins_with_the_essentials(command, capsys, monkeypatch):
    """And two examples; what they name there is."""
    kind, start = COMMANDS[command]
    script, *words = command.split()
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    beginning, _, rest = capsys.readouterr().out.partition("examples:\n")
    examples = [line.split() for line in rest.partition("\n\n")[0].splitlines()]
    assert stop.value.code == 0 and len(examples) == 2
    for example in examples:
        flags = example[example.index(script) + 1 :]
        kind, start = COMMANDS[f"{script} {flags[0]}" if words else script]
        flags = flags if start or not words else flags[1:]
        tyro.cli(kind, args=flags) if script == "convert.py" else parse(kind, flags)
    if script == "convert.py":  # it has no more flags than it needs
        return
    listed = (ROOT / "tests" / "flags.txt").read_text()
    found = re.findall(r"(?m)^  (--[\w-]+)  *[A-Z0-9.]+  +\S", beginning)
    assert found[0] == ("--dataset" if script == "train.py" else "--checkpoint") and found[-1] == "--run-dir"
    assert len(found) == 7 and all(re.search(rf"{flag}\s", listed) for flag in found)


def script_of(command):
    return command.split()[0]


def test_commands_of_the_documents_are_possible(monkeypatch):
    """Each command line of README and docs has flags that there are. (Those of change_it.md are run.)"""
    monkeypatch.setattr(engine.arguments, "local_path", lambda dataset: None)  # folders that there are not
    found = set()
    for path in {ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "change_it.md"}:
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.S):
            if "xargs" in block:  # a loop: test_findings.py
                continue
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.partition(" > ")[0], comments=True)
                scripts = [word for word in words if word in {script_of(command) for command in COMMANDS}]
                if not scripts or "change_it/" in line:
                    continue
                flags = words[words.index(scripts[0]) + 1 :]
                command = " ".join([scripts[0], *flags[: scripts[0] not in ("train.py", "convert.py")]])
                flags = flags[1:] if scripts[0] in ("finetune.py", "pictures.py") else flags
                if command == "convert.py":
                    tyro.cli(convert.Export, args=flags)
                else:
                    parse(COMMANDS[command][0], flags)
                found.add(command)
    assert found == set(COMMANDS)


def test_help_may_be_cut_off():
    """By head, say: without a traceback."""
    command = [sys.executable, "train.py", "--help"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(120) == 0
    process.stderr.close()


def test_threads_of_torch_wait_without_spinning():
    """Of every script, before it imports torch: later it has no effect, and the loading workers get no core."""
    check = "import os, sys\nclass Finder:\n    def find_spec(name, *_):\n"
    check += "        if name == 'torch': sys.exit(os.environ.get('OMP_WAIT_POLICY'))\n"
    check += "sys.meta_path.insert(0, Finder)\n"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for script in ("convert", *SCRIPTS):
        process = subprocess.run([sys.executable, "-c", f"{check}import {script}"], cwd=ROOT, capture_output=True,
                                 text=True, env=environment, timeout=120)  # fmt: skip
        assert process.stderr.split() == ["PASSIVE"], (script, process.stderr)


def test_a_notebook_keeps_its_own_handlers():
    """A kernel in docs/ is no script of ours, although its folder is one below the root: Ctrl-C interrupts a cell."""
    check = "import engine, signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    process = subprocess.run([sys.executable, "-c", check], cwd=ROOT / "docs", capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)  # fmt: skip
    assert process.stdout == "True\n", process.stderr


@pytest.mark.parametrize("command", ["train.py --no-such-flag", "train.py --size huger", "probe.py knn --no-such-flag",
                                     "finetune.py classify --no-such-flag", "finetune.py segment --no-such-flag",
                                     "finetune.py detect --no-such-flag", "convert.py --no-such-flag",
                                     "pictures.py attention --no-such-flag", "pictures.py sweep --no-such-flag",
                                     "pictures.py --no-such-flag"])  # fmt: skip
def test_a_wrong_flag_is_answered_without_what_only_a_run_needs(command):
    """Each of these costs as much as half of `import torch`."""
    script, *flags = command.split()
    heavy = ["accelerate", "datasets", "transformers", "torchvision", "pandas", "pyarrow", "timm", "onnx",
             "matplotlib", "sklearn", "torch.distributed.checkpoint", "torch._dynamo", "sympy"]  # fmt: skip
    code = f"import sys; sys.argv = {[script, *flags]!r}; import {script.removesuffix('.py')} as script\n"
    code += "try: script.main()\nexcept SystemExit as stop: print('code', stop.code)\n"
    code += f"print([name for name in {heavy!r} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.stdout.split("\n")[-3:-1] == ["code 2", "[]"], process.stdout + process.stderr
