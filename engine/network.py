"""Patience with data servers: what may pass is tried again, by those who know where to go on."""

from engine.errors import ServerGoneError, UserError, first_line

import json
import math
import multiprocessing
import os
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.spec import AbstractBufferedFile
from huggingface_hub import HfFileSystem, get_session, hf_hub_download, set_client_factory
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import GatedRepoError, HTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
from huggingface_hub.utils._http import default_client_factory

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts
FEW_TRIES = 4  # more, of what a server refuses, and of what came and cannot be read
LONGEST_ANSWER, SLOWEST_ANSWER = 60.0, 10_000  # seconds for an answer, and one more for so many bytes of it
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


def limit_time(event, info):
    """For the `trace` of httpx, which calls it with each new connection: answers to what is written there have
    LONGEST_ANSWER seconds and one more for each SLOWEST_ANSWER bytes that came. The usual limit is one on silence:
    a byte a second would pass for ever, and huggingface_hub lists files without any."""
    if not event.endswith(("connect_tcp.complete", "start_tls.complete")):
        return
    stream, until = info["return_value"], 0.0
    read, write = stream.read, stream.write

    def limited_read(size, timeout=None):
        nonlocal until
        left = max(until - time.monotonic(), 0.001)  # then it times out by itself
        data = read(size, min(left, timeout or left))
        until += len(data) / SLOWEST_ANSWER
        return data

    def limited_write(data, timeout=None):
        nonlocal until
        until = time.monotonic() + LONGEST_ANSWER
        write(data, timeout)

    stream.read, stream.write = limited_read, limited_write


def client_with_limits():
    """The client of all that huggingface_hub, datasets and transformers ask for."""
    client = default_client_factory()
    client.event_hooks["request"].append(lambda request: request.extensions.update(trace=limit_time))
    return client


set_client_factory(client_with_limits)

hub_answers = {}  # {address: why the Hub cannot be reached there, or None}, as hub_problem found out
resume_patience = 0.0  # minutes for which the start of a run that goes on waits; see patience_at_start


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
        tell_offline(True)
    return hub_answers[address]


def tell_offline(offline):
    """Tell the libraries whether to ask the Hub at all."""
    hub_constants.HF_HUB_OFFLINE = offline
    os.environ["HF_HUB_OFFLINE"] = str(int(offline))  # for what is imported from now on
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = offline


def ask_hub_again():
    """Where the Hub was away: is it still?"""
    if hub_answers.get(hub_constants.ENDPOINT):
        del hub_answers[hub_constants.ENDPOINT]
        tell_offline(False)
        hub_problem()


def status_of(error):
    """The HTTP status that an error tells, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)


def cause_of(error):
    """The failure of the network behind an error of any library; the error itself where there is none."""
    cause = error
    while cause is not None and not isinstance(cause, (NetworkError, HTTPError)):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def passing(error, what):
    """The failure of the network behind an error of any library, as a NetworkError; None if it will not pass."""
    away, error = hub_answers.get(hub_constants.ENDPOINT), cause_of(error)
    if isinstance(error, NetworkError):
        return error
    if not isinstance(error, HTTPError):  # without the Hub libraries only say that something is not in the cache
        return NetworkError(away) if away and isinstance(error, OSError) else None
    status = status_of(error)
    if status is None:
        return NetworkError(f"{type(error).__name__}: {error} ({what})")
    after = error.response.headers.get("Retry-After", "")
    may_pass = status in (408, 429) or status >= 500
    return NetworkError(f"HTTP {status} ({what})", int(after) if after.isdigit() else 0) if may_pass else None


@contextmanager
def network_errors(what):
    """Failures of the network that may pass become NetworkErrors that say what was asked for. What libraries make of
    them does so where a run goes on only: at a first start it is soon said."""
    try:
        yield
    except Exception as error:
        failure = passing(error, what) if isinstance(error, HTTPError) or is_resuming() else None
        if failure is None or failure is error:
            raise
        raise failure from error


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
            data, is_range = answer.content, answer.status_code == 206
            expected = end - start if is_range else self.size  # else it may be somebody's page
            if len(data) != expected:
                raise NetworkError(f"{len(data)} bytes came instead of {expected} ({self.path.split('/')[-1]})")
            return data if is_range else data[start:end]


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
    """Waits for a data server: growing pauses, until it has given nothing for `minutes`. `kind` says what the name is
    one of."""

    def __init__(self, name, minutes, kind="data set"):
        self.name, self.kind, self.minutes, self.since, self.tries = name, kind, minutes, None, 0

    def doubted(self, error):
        """An error that is none of the network as a NetworkError, if it is worth another try: of what is on a server a
        refusal or garbage may be a moment's, a few times; 401, 404 and terms that wait to be accepted are final."""
        cause, now = cause_of(error), time.monotonic()
        final = isinstance(cause, (NetworkError, UserError, GatedRepoError, FileNotFoundError))
        final = final or status_of(cause) in (401, 404) or Path(self.name).expanduser().exists()
        if final or self.tries == FEW_TRIES or now >= (self.since or now) + 60 * self.minutes:
            return error
        self.tries += 1
        return NetworkError(first_line(cause))

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
                f"the server of {self.kind} {self.name} has been away for {self.minutes:g} minutes (--patience): "
                f"{error}; give the same command again when it is back"
            ) from error
        pause = min(max(next(self.pauses), error.after), left)
        if first:
            print(f"waiting for the server of {self.kind} {self.name}, {pause:.0f} s at first: {error}",
                  file=sys.stderr, flush=True)  # fmt: skip
        time.sleep(pause)
        trainer = multiprocessing.parent_process()
        if trainer is not None and not trainer.is_alive():
            os._exit(1)  # nobody waits for this loading process any more

    def over(self):
        """Data have come."""
        self.tries = 0
        if self.since is not None:
            seconds = time.monotonic() - self.since
            print(f"{self.kind} {self.name} comes again, after {seconds:.0f} s", file=sys.stderr, flush=True)
            self.since = None


def is_dubious(error):
    """Whether a server refused something, or gave something else."""
    from pyarrow import ArrowInvalid

    garbage = (ArrowInvalid, tarfile.TarError, json.JSONDecodeError)
    return status_of(cause_of(error)) == 403 or isinstance(error, garbage)


def patiently(work, name, minutes, kind="data set"):
    """work(), again and again while the network fails, and a few times if it is refused or garbage comes. Raises
    ServerGoneError."""
    outage = Outage(name, minutes, kind)
    while True:
        try:
            with network_errors(name):
                result = work()
            outage.over()
            return result
        except Exception as error:
            outage.wait(outage.doubted(error) if is_dubious(error) else error)
            ask_hub_again()


# ----------------------------------------------------------------------------------------------------------------
# A run that goes on waits from its very start. A first start has nothing to lose: it says soon what is missing.


@contextmanager
def patience_at_start(minutes):
    """Within it data and models of the Hub are waited for so long, in whatever way a library says that it is away; but
    not for what is whole in the cache."""
    global resume_patience
    resume_patience = minutes
    try:
        yield
    finally:
        resume_patience = 0.0


def is_resuming():
    """Whether this is within patience_at_start."""
    return resume_patience > 0


def reach_hub(name):
    """Why the Hub, which has this data set, cannot be reached, None if it answers; on a resume it is waited for. Raises
    ServerGoneError."""
    def ask():
        problem = hub_problem()
        if problem and problem == hub_answers.get(hub_constants.ENDPOINT):
            raise NetworkError(problem)
        return problem

    return patiently(ask, name, resume_patience) if is_resuming() else hub_problem()


def from_hub(work, name, kind="model"):
    """work(), which asks the Hub or its cache for a model, or reads a folder; on a resume the Hub is waited for. Raises
    ServerGoneError."""
    if not is_resuming() or Path(name).exists():
        return work()
    return patiently(work, name, resume_patience, kind)


def hub_file(name, file):
    """hf_hub_download of a model's file; on a resume the Hub is waited for. Raises ServerGoneError."""
    return from_hub(lambda: hf_hub_download(name, file), name)
