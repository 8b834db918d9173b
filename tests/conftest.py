"""For every test file: the scripts under test lie beside this folder, and tensors here are too small for threads.

With one thread the tests take a third of the time that they take with two on two cores that others use as well.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)
