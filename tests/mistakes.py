"""Mistakes that somebody could make, one at a time: do the tests say so?

    python tests/mistakes.py                 all of known_mistakes.py
    python tests/mistakes.py clip decay      those with one of these words in their name, code or tests

Each mistake replaces a piece of code, which stands once in the scripts (whichever file that is, so that moving code
moves the mistake with it), in a copy of the tree, and runs the tests that are to notice. Without it they pass first.
Code that is not there any more is told: mend the list with the change, or drop what has lost its meaning. The last line
printed is a JSON object; exit code 1 if anything went unnoticed.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*_cache")
TIMEOUT = 600  # seconds


def sources(root=ROOT):
    """{file: its text} of the code that mistakes are made in."""
    files = [*root.glob("*.py"), *root.glob("engine/*.py"), *root.glob("bench/*.py")]
    return {file: file.read_text() for file in sorted(files)}


def place_of(mistake, texts):
    """The one file in which the code of a mistake stands, or None."""
    found = [file for file, text in texts.items() for _ in range(text.count(mistake.old))]
    return found[0] if len(found) == 1 else None


def import_libraries(folder):
    """Once for all: a child that forks from here has no need to."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
                   "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}  # fmt: skip
    import warm

    warm.import_libraries()
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)


def run_tests(root, tests, timeout=TIMEOUT):
    """Exit code and output lines of these tests in this tree, in a child process; code 1 if they do not end."""
    output = root / "output.txt"
    child = os.fork()
    if child == 0:
        signal.alarm(timeout)
        os.chdir(root)
        sys.path[:0] = [str(root), str(root / "tests")]
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        import pytest

        code = pytest.main(["-o", "addopts=", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", *tests])
        sys.stdout.flush()
        os._exit(int(code))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = output.read_text(errors="replace").strip().splitlines()
    if code < 0:
        return 1, [*lines, f"FAILED {tests[0]} ended by signal {-code}, after {timeout} s at most"]
    return code, lines


def notice(mistake, root):
    """The test that notices a mistake made in the tree `root`, or None."""
    texts = sources(root)
    file = place_of(mistake, texts)
    file.write_text(texts[file].replace(mistake.old, mistake.new))
    code, lines = run_tests(root, mistake.tests.split())
    file.write_text(texts[file])
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if code == 1 and failed else None


def work(root, mistakes, results):
    """A share of the mistakes, in a tree of its own."""
    for mistake in mistakes:
        began = time.monotonic()
        noticed = notice(mistake, root)
        print(f"{mistake.name}: {noticed or 'UNNOTICED'} ({time.monotonic() - began:.0f} s)", flush=True)
        results.put((mistake.name, noticed))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only the mistakes with one of these in their name, code or tests")
    parser.add_argument("--jobs", type=int, default=2, help="mistakes at a time")
    flags = parser.parse_args()
    from known_mistakes import MISTAKES

    texts, start = sources(), time.monotonic()
    wanted = [m for m in MISTAKES if not flags.words or any(w in " ".join(m) for w in flags.words)]
    stale = [m.name for m in wanted if place_of(m, texts) is None]
    wanted = [m for m in wanted if m.name not in stale]
    for name in stale:
        print(f"{name}: its code does not stand once in the scripts any more")
    if not wanted:
        sys.exit("no mistake has these words")
    with tempfile.TemporaryDirectory() as folder:
        import_libraries(Path(folder) / "cache")
        trees = [shutil.copytree(ROOT, Path(folder) / f"tree{i}", ignore=NOT_COPIED) for i in range(flags.jobs)]
        code, lines = run_tests(trees[0], sorted({test for m in wanted for test in m.tests.split()}), 3600)
        if code:
            sys.exit("\n".join(["without any mistake these tests fail:", *lines[-5:]]))
        print(f"without a mistake: {lines[-1]}", flush=True)
        fork = multiprocessing.get_context("fork")
        results = fork.Queue()
        workers = [fork.Process(target=work, args=(tree, wanted[i :: flags.jobs], results))
                   for i, tree in enumerate(trees)]  # fmt: skip
        for worker in workers:
            worker.start()
        found = dict(results.get() for _ in wanted)
        for worker in workers:
            worker.join()
    unnoticed = [name for name, noticed in found.items() if noticed is None]
    seconds = round(time.monotonic() - start)
    print(json.dumps({"mistakes": len(found), "unnoticed": unnoticed, "stale": stale, "seconds": seconds}))
    sys.exit(bool(unnoticed or stale))


if __name__ == "__main__":
    main()
