"""Streams over HTTP, from a server that fails by script: nothing is lost, nothing comes twice, no wait is endless."""

import engine.network
from engine.arguments import DataArgs
from engine.errors import BadFilesError, ServerGoneError, UserError
from engine.network import HubFile, HubFiles
from engine.sources import open_source
from engine.stream import ShardChunks, Stream, one_pass

import itertools
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
from hub import serve
from images import Numbers, noise_png, write_folder, write_parquet, write_tars
from launch import launch, log_of, succeeded

COUNTS = (12, 9, 15, 8)
BATCHES = 20  # of 5 images: two passes and a half


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_parquet(root / "parquet" / "data", COUNTS, group=3)
    write_tars(root / "tar" / "data", COUNTS)
    write_folder(root / "folder" / "train", 44)
    return root


@pytest.fixture
def on_hub(monkeypatch, tmp_path_factory):
    """serve(), with this process pointed there; short pauses, small blocks, a third of a second until silence ends.
    Nothing is known from earlier tests: with a card in the cache a data set would be waited for that is not there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    for name, value in (("FIRST_PAUSE", 0.02), ("LONGEST_PAUSE", 0.1), ("TAR_BLOCK", 6000)):
        monkeypatch.setattr(engine.network, name, value)
    monkeypatch.setattr(HubFile, "DEFAULT_BLOCK_SIZE", 1000)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    # what the library itself tries again while a data set is opened
    monkeypatch.setattr(huggingface_hub.utils._http, "time", SimpleNamespace(sleep=lambda seconds: None))

    @contextmanager
    def start(*args, **options):
        monkeypatch.setattr(HubFiles, "known", {})  # a later server may get the port of an earlier one
        HubFiles.clear_instance_cache()
        with serve(*args, **options) as (environment, requests):
            here = environment["HF_ENDPOINT"]
            template = here + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", here)
            monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr(datasets.config, "HF_ENDPOINT", here)
            yield environment, requests

    return start


class Script:
    """Faults by script: every shard's requests with these numbers fail in this way, once the script is `on`."""

    def __init__(self, kind=None, numbers=(0, 1, 4, 8), suffixes=(".parquet", ".tar", ".png")):
        self.kind, self.numbers, self.suffixes, self.on = kind, numbers, suffixes, False
        self.seen, self.done = Counter(), Counter()

    def __call__(self, name):
        if not self.on or not name.endswith(self.suffixes):
            return None
        self.seen[name] += 1
        if self.seen[name] - 1 not in self.numbers:
            return None
        self.done[name] += 1
        return self.kind


def open_stream(workers=0, state=None, **options):
    args = DataArgs(dataset="some/pictures", streaming=True, workers=workers, batch_size=5, num_images=44, **options)
    args.shuffle_window, args.interleave = 8, 2
    return Stream(open_source(args), Numbers(), args, seed=3, state=state)


def read(stream, batches=BATCHES):
    found = [next(stream) for _ in range(batches)]
    return [b["ids"].tolist() for b in found], [b["numbers"].tolist() for b in found]


def end(stream):
    """Without its loading processes it gives nothing more."""
    stream.parts[0].reader.loaders.clear()


@pytest.fixture(scope="module")
def expected(repositories):
    """What comes from the same files without a network."""
    found = {}
    for form in ("parquet", "tar"):
        for workers in (0, 2):
            patched = pytest.MonkeyPatch()
            # on disk Parquet is dealt by row group, on the Hub by file
            patched.setattr(datasets.IterableDataset, "reshard", lambda data: data)
            args = DataArgs(dataset=str(repositories / form), streaming=True, workers=workers, batch_size=5)
            args.shuffle_window, args.interleave = 8, 2
            found[form, workers] = read(Stream(open_source(args), Numbers(), args, seed=3))
            patched.undo()
    return found


KINDS = ("refuse", "drop", "end", "truncate", "stall", "500", "503")


@pytest.mark.parametrize(("kind", "form", "workers"), [
    *itertools.product(KINDS, ("parquet", "tar"), (0, 2)),
    ("429", "parquet", 0),  # whose waits are whole seconds
])  # fmt: skip
def test_faults_change_nothing(repositories, on_hub, expected, form, kind, workers):
    script = Script(kind, numbers=(0, 2) if kind in ("stall", "429") else (0, 1, 4, 8))
    with on_hub(repositories / form, script):
        stream = open_stream(workers)
        script.on = True
        found = read(stream)
        end(stream)  # workers that read ahead end while their server is still there
    assert len(script.done) == 4 and min(script.done.values()) >= 2, "every shard has failed, more than once"
    assert found == expected[form, workers]
    assert stream.skipped == 0


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_a_pass_for_evaluation_over_faults(repositories, on_hub, form):
    script = Script("drop")
    with on_hub(repositories / form, script):
        args = DataArgs(dataset="some/pictures", streaming=True, workers=2, num_images=44)
        source = open_source(args)
        script.on = True
        numbers = [n for chunk in one_pass(source, Numbers(), 5, 2) for n in chunk["numbers"].tolist()]
    assert script.done and sorted(numbers) == list(range(44))


def test_single_files_are_no_bad_files_when_the_network_fails(repositories, on_hub):
    script = Script("503", numbers=(0, 1))
    with on_hub(repositories / "folder", script):
        source = open_source(DataArgs(dataset="some/pictures", streaming=True, workers=0, num_images=44))
        script.on = True
        chunks = list(one_pass(source, Numbers(), 5, 0))
    assert sorted(n for chunk in chunks for n in chunk["numbers"].tolist()) == list(range(44))
    assert len(script.done) == 44 and not any(chunk["skipped"] for chunk in chunks)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_a_server_that_comes_back(repositories, on_hub, expected, form, workers, capfd):
    with on_hub(repositories / form) as (environment, _):
        stream = open_stream(workers)
        first = read(stream, 2)
    with ExitStack() as stack:
        port = int(environment["HF_ENDPOINT"].rsplit(":", 1)[1])
        threading.Timer(0.7, lambda: stack.enter_context(serve(repositories / form, port=port))).start()
        rest = read(stream, BATCHES - 2)
        end(stream)
    assert (first[0] + rest[0], first[1] + rest[1]) == expected[form, workers]
    told = capfd.readouterr().err
    assert "waiting for the server of data set some/pictures" in told
    assert "data set some/pictures comes again, after" in told
    assert told.count("waiting for") <= max(workers, 1), "once for an outage, not for each attempt"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_a_server_that_stays_away(repositories, on_hub, expected, form, workers):
    """Everything that came before is given; then the error; and the place from which all else follows."""
    found = [], []
    with on_hub(repositories / form) as (environment, _):
        stream = open_stream(workers, patience=0.01)
    with pytest.raises(ServerGoneError) as caught:
        while True:
            for part, more in zip(found, read(stream, 1), strict=True):
                part.extend(more)
    message = str(caught.value)
    assert "the server of data set some/pictures has been away for 0.01 minutes (--patience)" in message
    assert "Connection refused" in message and "\n" not in message
    assert len(found[0]) < BATCHES
    state = stream.state_dict()
    end(stream)  # kept by the error, their workers would be waited for in the middle of a later test
    with on_hub(repositories / form, port=int(environment["HF_ENDPOINT"].rsplit(":", 1)[1])):
        again = open_stream(workers, state)
        rest = read(again, BATCHES - len(found[0]))
        end(again)
    assert (found[0] + rest[0], found[1] + rest[1]) == expected[form, workers]


class Bytes(Numbers):
    names = ("sums",)

    def __call__(self, image, seed):
        return (image.sum(),)


def test_a_place_in_a_large_parquet_file_costs_its_tail_only(tmp_path, on_hub, monkeypatch):
    monkeypatch.setattr(HubFile, "DEFAULT_BLOCK_SIZE", 8000)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 10)  # nobody tries again here
    write_parquet(tmp_path / "data", [400], group=10, encode=noise_png)
    file = next((tmp_path / "data").iterdir())
    size, footer = file.stat().st_size, pq.read_metadata(file)
    groups = [footer.row_group(g) for g in range(40)]
    starts = [min(g.column(c).dictionary_page_offset or g.column(c).data_page_offset for c in range(g.num_columns))
              for g in groups]  # fmt: skip
    with on_hub(tmp_path) as (_, requests):
        source = open_source(DataArgs(dataset="some/pictures", streaming=True, workers=0, num_images=400))
        assert source.data.num_shards == 1
        chunks = ShardChunks(source, Bytes(), 5, 0, 0, 1, 0, 1, 8, 2)
        whole = list(chunks.read(0, 0))
        for row in (395, 303, 300, 10, 9, 1):
            del requests[:]
            assert list(chunks.read(0, row)) == whole[row:]
            ranges = [tuple(map(int, r.split("bytes=")[1].split("-"))) for r in requests if "bytes=" in r]
            data = [(first, last) for first, last in ranges if last < size - 1]  # the others hold the footer
            assert min(first for first, _ in ranges) >= starts[row // 10], "nothing before its row group"
            assert sum(last + 1 - first for first, last in data) < 1.2 * (size - starts[row // 10])
        assert list(chunks.read(0, 400)) == []


def test_few_files_of_the_hub_are_read_by_row_group(tmp_path, on_hub):
    """Where they would not go round: a footer is a request. The card says how many images each split has."""
    write_parquet(tmp_path / "data", COUNTS, group=3)  # 15 row groups in 4 files
    write_parquet(tmp_path / "data", (2,), split="test")
    splits = "".join(f"  - name: {name}\n    num_examples: {count}\n" for name, count in (("test", 2), ("train", 44)))
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{splits}---\n")
    with on_hub(tmp_path):
        for slots, workers, shards in ((1, 4, 4), (2, 2, 4), (4, 0, 4), (1, 5, 15), (3, 2, 15), (5, 0, 15)):
            args = DataArgs(dataset="some/pictures", streaming=True, workers=workers)
            source = open_source(args, slots)
            assert (source.data.num_shards, source.num_images) == (shards, 44)
            assert len(source.files) == (4 if shards == 4 else 0)


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_bad_shards_are_not_waited_for(repositories, tmp_path, on_hub, form):
    """Cut off in the repository itself: with half an hour of patience it ends at once."""
    files = sorted((repositories / form / "data").iterdir())
    (tmp_path / "data").mkdir()
    for file in files:
        data = file.read_bytes()
        (tmp_path / "data" / file.name).write_bytes(data if file == files[0] else data[: 512 * 5 + 100])
    with on_hub(tmp_path):
        stream = open_stream(0)
        with pytest.raises(BadFilesError, match=r"shard \d of data set some/pictures cannot be read beyond its row"):
            read(stream)


def test_opening_waits_too(repositories, on_hub, capfd):
    for path, kind in (("/api/datasets/some/pictures", "503"), ("/api/datasets/some/pictures", "refuse"),
                       ("data/train-00000.tar", "503"), ("data/train-00000.tar", "stall")):  # fmt: skip
        script = Script(kind, numbers=(0, 1), suffixes=(path,))
        script.on = True
        with on_hub(repositories / "tar", script):
            assert open_stream().state_dict()[0]["read"] == 0
        assert script.done[path] == 2 or path.startswith("/api")
        assert script.done and "waiting for the server of data set some/pictures" in capfd.readouterr().err
    script = Script("503", numbers=range(1000), suffixes=("pictures",))
    script.on = True
    with on_hub(repositories / "tar", script), pytest.raises(UserError, match=r"cannot be reached: .* HTTP 503"):
        open_stream(patience=0.005)
    with pytest.raises(UserError, match="cannot be reached: Couldn't reach"):  # no server: at once
        open_stream()


@pytest.mark.parametrize(("name", "message"), [
    ("secret/pictures", r"is gated: accept its terms at http.*/datasets/secret/pictures and log in with `hf auth"),
    ("nobody/nothing", r"was not found on the Hub \(nor as a local folder\).*hf auth login"),
])  # fmt: skip
def test_data_sets_that_the_hub_does_not_give(on_hub, name, message):
    with on_hub(), pytest.raises(UserError, match=message):
        open_source(DataArgs(dataset=name, streaming=True))


def test_a_run_over_faults_is_the_run_without(tmp_path):
    """train.py itself: the same log, line by line."""
    write_parquet(tmp_path / "repo" / "data", (30, 30, 20, 10), group=10)
    flags = ["--dataset", "some/pictures", "--size", "nano", "--teacher", "demo/clip_teacher", "--steps", "8",
             "--batch-size", "16", "--effective-batch-size", "16", "--num-images", "90", "--workers", "2",
             "--log-every", "1"]  # fmt: skip
    logs, script = {}, Script("drop", numbers=(1, 3))
    for name, faults in (("with", script), ("without", lambda name: None)):
        script.on = True
        with serve(tmp_path / "repo", faults) as (environment, _):
            run = launch("train.py", *flags, "--run-dir", tmp_path / name, HF_HOME=str(tmp_path / "cache"),
                         **environment)  # fmt: skip
        assert "Traceback" not in succeeded(run).stderr
        assert ("waiting for the server" in run.stderr) == (name == "with")
        keys = ("step", "epoch", "loss", "loss_cls", "loss_visible", "loss_masked", "grad_norm", "skipped", "seen")
        logs[name] = [[line[key] for key in keys] for line in log_of(tmp_path / name)]
    assert sum(script.done.values()) >= 4
    assert len(logs["with"]) == 8 and logs["with"] == logs["without"]
