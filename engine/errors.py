"""What can go wrong, in one line each: by whom (the user, the run), with which exit code, on which process."""

import atexit
import html
import multiprocessing.util  # registers its handler of the exit: ours, registered later, runs first
import os
import pickle
import re
import shutil
import signal
import sys
import threading
from contextlib import contextmanager, suppress


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


LONGEST_SOCKET_FOLDER = 85  # bytes; a path of 104 to 108 with /listener-XXXXXXXX. Beyond, nothing would ever come
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


def printable(text):
    """Text that may hold names from strangers, fit for a terminal: what is no character to print (escape sequences,
    line breaks, signs that turn the direction of writing) as \\x1b, \\n, \\u202e."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def markdown(text):
    """The same for a page of Markdown, in a line of text or a cell of a table: shown, and nothing but shown."""
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(printable(text), quote=False))


def speaks_for_others():
    """Whether this is the process of its machine that says what all of them would."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def command_line(work):
    """Call work(): exit code 2 for what the user gave, 1 for a run that failed; 130 for Ctrl-C and 143 for SIGTERM
    before the steps of a run, which answer them by themselves."""
    before = end_on_signals()
    try:
        with dead_peers():
            work()
    except (UserError, RunError) as error:
        seen_alone = (BadFilesError, ServerGoneError, LoadingError, PeerError)
        if speaks_for_others() or isinstance(error, seen_alone):
            print(f"error: {printable(error)}", file=sys.stderr, flush=True)
        if isinstance(error, PeerError):
            stop_workers()
            remove_temporary_folders()
            os._exit(1)  # a proper end would wait for the dead
        sys.exit(1 if isinstance(error, RunError) else 2)
    except KeyboardInterrupt:
        if speaks_for_others():
            print("\n" * sys.stderr.isatty() + "interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    finally:
        stop_workers()
        for number, handler in before.items():
            signal.signal(number, handler)


def end_on_signals():
    """Where no step of a run is under way, the signals that ask for a stop (unless they are ignored) end the process
    with one line and 128 + their number: the handlers of before, {signal: handler}.

    No exception: half-imported libraries swallow one, and in C++ code that calls Python it aborts.
    """
    process = os.getpid()

    def end(number, frame):
        with suppress(Exception):
            if os.getpid() == process:  # not a process that was forked from it a moment ago
                stop_workers()
                remove_temporary_folders()
                line = f"interrupted by {signal.Signals(number).name}; give the same command again"
                os.write(2, ("\n" * os.isatty(2) + f"{line}\n").encode() * speaks_for_others())
        os._exit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # others cannot
        return {}
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    return {number: signal.signal(number, end) for number in handled}


temporary_folders = set()  # that go when this process ends, whichever way: only os._exit has to be told


def remove_temporary_folders():
    for folder in temporary_folders:
        shutil.rmtree(folder, ignore_errors=True)


def share_temporary_folder():
    """One for the sockets of all loading processes, which are killed and would leave theirs behind: to be called before
    they are forked."""
    folder = multiprocessing.util.get_temp_dir()  # the first call makes one, to be removed at a proper end
    require(len(os.fsencode(folder)) <= LONGEST_SOCKET_FOLDER,
            f"the temporary folder {folder} has too long a path for the sockets of loading processes: set TMPDIR to "
            "a shorter one")  # fmt: skip
    os.makedirs(folder, mode=0o700, exist_ok=True)  # weeks later whoever tidies /tmp may have taken it
    if folder not in temporary_folders:
        atexit.register(os.makedirs, folder, 0o700, True)  # the removal, which comes then, wants to find it
    temporary_folders.add(folder)


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
