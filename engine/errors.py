"""What can go wrong, in one line each: by whom (the user, the run), with which exit code, on which process."""

import atexit
import multiprocessing.util  # registers its handler of the exit: ours, registered later, runs first
import os
import pickle
import signal
import sys
from contextlib import contextmanager


class UserError(Exception):
    """What the user gave cannot work: one line that names the thing and the remedy; exit code 2."""


class BadFilesError(UserError):
    """Too many undecodable files: one rank may see it alone, and says so itself."""


class HubAwayError(UserError):
    """The Hub cannot be reached, and what was asked for is not in its cache."""


class RunError(Exception):
    """The run itself went wrong: one line; exit code 1."""


class ServerGoneError(RunError):
    """A data server stayed away for too long: one rank may see it alone, and says so itself."""


class LoadingError(RunError):
    """A loading process was killed: one rank may see it alone, and says so itself."""


class PeerError(RunError):
    """Another process of this run died or does not answer: nothing that waits for it may follow."""


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # a preempted machine, Slurm, Ctrl-C
BAD_PICKLE = "it is damaged, or holds more than tensors and plain data; nothing in it was executed"


def require(condition, message):
    if not condition:
        raise UserError(message)


def first_line(error):
    """What an error of any library says, in one line."""
    if isinstance(error, (pickle.UnpicklingError, EOFError)):  # PyTorch's own would recommend to switch safety off
        return BAD_PICKLE
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def speaks_for_others():
    """Whether this is the process of its machine that says what all of them would."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def command_line(work):
    """Call work(): exit code 2 for what the user gave, 1 for a run that failed, 130 for Ctrl-C before the steps of a
    run, which answer it by themselves."""
    try:
        with dead_peers():
            work()
    except (UserError, RunError) as error:
        seen_alone = (BadFilesError, ServerGoneError, LoadingError, PeerError)
        if speaks_for_others() or isinstance(error, seen_alone):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, PeerError):
            stop_workers()
            os._exit(1)  # a proper end would wait for the dead
        sys.exit(1 if isinstance(error, RunError) else 2)
    except KeyboardInterrupt:
        if speaks_for_others():
            print("\n" * sys.stderr.isatty() + "interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    finally:
        stop_workers()


@contextmanager
def dead_peers():
    """Errors of the connection to other processes become a PeerError."""
    try:
        yield
    except RuntimeError as error:  # gloo's have no class of their own
        from torch.distributed import DistError

        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        raise PeerError(
            f"another process of this run has died or does not answer ({first_line(error)[:200]}); "
            "the same command continues from the last checkpoint"
        ) from error


def stop_workers():
    """End the loading processes, of which one may be waiting for a server."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take it for an accident
    for child in children:
        child.kill()


atexit.register(stop_workers)  # Python ends daemons with SIGTERM, which these ignore, and would wait for ever
