"""Patience with data servers: what may pass is tried again, by those who know where to go on."""

from engine.errors import ServerGoneError, first_line

import math
import multiprocessing
import os
import sys
import time
from contextlib import contextmanager

import fsspec
from fsspec.spec import AbstractBufferedFile
from huggingface_hub import HfFileSystem, get_session
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts
TAR_BLOCK = 16 << 20
HUB_PAUSES, HUB_SILENCE = (0, 1, 2), 5.0  # seconds before each question whether the Hub is there, and for its answer


def growing_pauses(minutes=math.inf):
    """Seconds to wait between attempts, each twice the one before: 1, 2, 4, ... 60, 60, for so many minutes."""
    pause, total = FIRST_PAUSE, 0.0
    while total < 60 * minutes:
        yield pause
        pause, total = min(2 * pause, LONGEST_PAUSE), total + pause


class NetworkError(ConnectionError):
    """A failure that may pass: no connection, silence, an answer cut off, a server that is busy (408, 429, 5xx)."""

    def __init__(self, message, after=0):
        super().__init__(message)
        self.after = after  # seconds that the server asked to be left alone


hub_answers = {}  # {address: why the Hub cannot be reached there, or None}, as hub_problem found out


def hub_problem():
    """Why the Hub cannot be reached, None if it answers in any way. Asked at the start, three times in a few seconds.
    Without it all libraries are told so: they look into the cache, where they would go on asking for most of a
    minute."""
    address = hub_constants.ENDPOINT
    if address in hub_answers or hub_constants.HF_HUB_OFFLINE:
        return hub_answers.get(address, "HF_HUB_OFFLINE is set")
    for pause in HUB_PAUSES:
        time.sleep(pause)
        try:
            get_session().head(address, timeout=HUB_SILENCE)
            hub_answers[address] = None
            break
        except (HTTPError, OSError) as error:
            hub_answers[address] = f"{address} does not answer: {first_line(error)}"
    if hub_answers[address]:
        hub_constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported from now on
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return hub_answers[address]


@contextmanager
def network_errors(what):
    """Failures of the network that may pass become NetworkErrors that say what was asked for."""
    try:
        yield
    except HTTPError as error:
        answer = getattr(error, "response", None)
        if answer is not None and answer.status_code not in (408, 429) and answer.status_code < 500:
            raise
        text = f"{type(error).__name__}: {error}" if answer is None else f"HTTP {answer.status_code}"
        after = "" if answer is None else answer.headers.get("Retry-After", "")
        raise NetworkError(f"{text} ({what})", int(after) if after.isdigit() else 0) from error


class HubFile(AbstractBufferedFile):
    """A file of the Hub, read by ranges. Each must come whole: where an answer is cut off without a word on its length,
    tarfile takes that for the end of the shard, and its other images are never seen.

    One attempt for each range: huggingface_hub's own files pause up to 23 seconds in each call, those of datasets up to
    20 minutes, unseen by whoever counts for how long a server has been away.
    """

    def _fetch_range(self, start, end):
        with network_errors(self.path.split("/")[-1]):
            headers = {"Range": f"bytes={start}-{end - 1}", **build_hf_headers(token=self.fs.token)}
            silence = hub_constants.HF_HUB_DOWNLOAD_TIMEOUT  # 10 seconds, or the environment variable of that name
            answer = get_session().get(self.fs.url(self.path), headers=headers, timeout=silence)
            hf_raise_for_status(answer)
            data = answer.content if answer.status_code == 206 else answer.content[start:end]
            if len(data) != end - start:
                raise NetworkError(f"{len(data)} bytes came instead of {end - start} ({self.path.split('/')[-1]})")
            return data


class HubFiles(HfFileSystem):
    """What fsspec opens for hf://, and so datasets too.

    All instances share what they know of repositories and sizes, so that no worker has to list files again:
    huggingface_hub sets no limit on silence there.
    """

    known = {}  # noqa: RUF012

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        account = self.endpoint, self.token
        self.dircache, self._repo_and_revision_exists_cache = self.known.setdefault(account, ({}, {}))

    def _open(self, path, mode="rb", block_size=None, revision=None, **options):
        if mode != "rb":
            return super()._open(path, mode, block_size=block_size, revision=revision, **options)
        # datasets asks for 0, one long answer, where it reads from beginning to end (tar). Large blocks cost few more
        # requests, and can be checked and asked for again.
        block_size = self.block_size if block_size is None else block_size
        with network_errors(path.split("/")[-1]):
            path = self.resolve_path(path, revision=revision).unresolve()
            return HubFile(self, path, mode, TAR_BLOCK if block_size == 0 else block_size, **options)


fsspec.register_implementation("hf", HubFiles, clobber=True)


class Outage:
    """Waits for a data server: growing pauses, until it has given nothing for `minutes`."""

    def __init__(self, name, minutes):
        self.name, self.minutes, self.since = name, minutes, None

    def wait(self, error):
        """Pause before the next attempt. Raises the error if it will not pass, ServerGoneError after the limit."""
        if not isinstance(error, NetworkError):
            raise error
        now, first = time.monotonic(), self.since is None
        if first:
            self.since, self.pauses = now, growing_pauses()
        left = self.since + 60 * self.minutes - now
        if left <= 0:
            raise ServerGoneError(
                f"the server of data set {self.name} has been away for {self.minutes:g} minutes (--patience): {error}; "
                "give the same command again when it is back"
            ) from error
        pause = min(max(next(self.pauses), error.after), left)
        if first:
            print(f"waiting for the server of data set {self.name}, {pause:.0f} s at first: {error}",
                  file=sys.stderr, flush=True)  # fmt: skip
        time.sleep(pause)
        trainer = multiprocessing.parent_process()
        if trainer is not None and not trainer.is_alive():
            os._exit(1)  # nobody waits for this loading process any more

    def over(self):
        """Data have come."""
        if self.since is not None:
            seconds = time.monotonic() - self.since
            print(f"data set {self.name} comes again, after {seconds:.0f} s", file=sys.stderr, flush=True)
            self.since = None


def patiently(work, name, minutes):
    """work(), again and again while the network fails. Raises ServerGoneError."""
    outage = Outage(name, minutes)
    while True:
        try:
            with network_errors(name):
                result = work()
            outage.over()
            return result
        except Exception as error:
            outage.wait(error)
