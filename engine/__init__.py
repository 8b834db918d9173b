"""The machine: what every run needs and no paper mentions. Trusted and imported; the scripts beside it are the lesson.

Import this package first: it sets what has to be set before torch is imported, and does nothing else.
"""

import os
import signal
import sys

# Idle threads of torch that spin would take the cores from the loading workers: on two cores the demo then runs at less
# than half its speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _end(number, frame):
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, f"interrupted by {signal.Signals(number).name}; give the same command again\n".encode())
    finally:
        os._exit(128 + number)


# Libraries take seconds to import. A signal ends a script of ours there with a line: an exception would be swallowed by
# some, and a long traceback in others. engine/errors.py takes over from here; whoever imports this has their own way.
_script = getattr(sys.modules["__main__"], "__file__", None)
_root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _script and os.path.dirname(os.path.realpath(_script)) == _root:  # a notebook has none
    for _number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        if signal.getsignal(_number) != signal.SIG_IGN:
            signal.signal(_number, _end)
