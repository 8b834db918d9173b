"""For every test file: the scripts under test lie beside this folder, and tensors here are too small for threads.

With one thread the tests take a third of the time that they take with two on two cores that others use as well.
"""

import os
import sys
import tempfile
from pathlib import Path

_cache = tempfile.TemporaryDirectory()  # what datasets writes for the tests goes when they end
os.environ.setdefault("HF_HOME", _cache.name)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# torch is imported below: the process that hands tests to others has no need of it, and they wait for it


@pytest.fixture
def seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def graphs(monkeypatch):
    """What --compile traces is run without a C++ compiler; a list of the modules that were compiled."""
    import torch

    compiled, compile = [], torch.nn.Module.compile

    def traced(module, **options):
        compiled.append(type(module).__name__)
        compile(module, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    yield compiled
    torch.compiler.reset()


@pytest.fixture(scope="session", autouse=True)
def one_core():
    """Training in this process leaves the other core to other tests."""
    import engine.arguments
    import engine.run

    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (engine.arguments, engine.run):
            patch.setattr(module, "cores_per_process", lambda: 1)
        yield
