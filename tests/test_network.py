"""Streams over HTTP, from a server that fails by script: nothing is lost, nothing comes twice, no wait is endless."""

import engine.network
import engine.sources
from engine.arguments import DEMO, DataArgs, parse
from engine.checkpoints import checkpoints
from engine.errors import BadFilesError, HubAwayError, RunError, ServerGoneError, UserError
from engine.frozen import load_frozen
from engine.network import FEW_TRIES, HubFile, HubFiles, hub_file, patience_at_start
from engine.sources import open_source
from engine.stream import ShardChunks, Stream, one_pass

import itertools
import re
import shutil
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
from hub import COMMIT, serve
from huggingface_hub import constants as hub_constants
from images import Numbers, noise_png, write_folder, write_parquet, write_tars
from launch import launch, log_of, succeeded

import train

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
    for name, value in (("FIRST_PAUSE", 0.02), ("LONGEST_PAUSE", 0.1), ("TAR_BLOCK", 6000), ("LONGEST_ANSWER", 0.5),
                        ("HUB_PAUSES", (0,)), ("hub_answers", {})):  # fmt: skip
        monkeypatch.setattr(engine.network, name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(HubFile, "DEFAULT_BLOCK_SIZE", 1000)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    # what the library itself tries again while a data set is opened
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))

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

    def __init__(self, kind=None, numbers=(0, 1, 4, 8), suffixes=(".parquet", ".tar", ".png"), on=False):
        self.kind, self.numbers, self.suffixes, self.on = kind, numbers, suffixes, on
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
            patched.setattr(engine.sources, "RowGroups", lambda *of: None)
            args = DataArgs(dataset=str(repositories / form), streaming=True, workers=workers, batch_size=5,
                            num_images=44)  # fmt: skip
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


@pytest.mark.parametrize("form", ["parquet", "tar"])
@pytest.mark.parametrize("kind", ["403", "page", "garbage"])
def test_a_refusal_or_garbage_may_be_a_moments(repositories, on_hub, expected, monkeypatch, form, kind):
    """What a proxy, a signature that has run out or a cache gives: the server is asked again."""
    monkeypatch.setattr(HubFile, "DEFAULT_BLOCK_SIZE", 100000)  # garbage takes a file's beginning and end with it
    script = Script(kind, numbers=(0, 1))
    with on_hub(repositories / form, script):
        stream = open_stream()
        script.on = True
        found = read(stream)
    assert len(script.done) == 4 and min(script.done.values()) == 2 and found == expected[form, 0]
    assert stream.skipped == 0


@pytest.mark.parametrize(("kind", "tries"), [("403", 1 + FEW_TRIES), ("401", 1), ("404", 1)])
def test_a_refusal_that_stays_is_final(repositories, on_hub, kind, tries):
    """After a few tries, with half an hour of patience; at once where there is nothing to wait for."""
    script = Script(kind, numbers=range(1000))
    with on_hub(repositories / "parquet", script):
        stream = open_stream()
        script.on = True
        with pytest.raises(BadFilesError, match=f"cannot be read beyond its row 0: .*{kind}"):
            read(stream)
    assert list(script.seen.values()) == [tries]


def test_no_tries_beyond_the_patience_nor_for_what_is_here(repositories, on_hub, tmp_path, capfd):
    script = Script("403", numbers=range(1000))
    with on_hub(repositories / "parquet", script):
        stream = open_stream(patience=1e-6)
        script.on = True
        with pytest.raises(BadFilesError, match="cannot be read beyond its row 0"):
            read(stream)
    assert max(script.seen.values()) <= 2
    write_tars(tmp_path, (4, 4))
    args = DataArgs(dataset=str(tmp_path), streaming=True, workers=0, batch_size=5)
    stream = Stream(open_source(args), Numbers(), args, seed=3)
    capfd.readouterr()
    for file in tmp_path.iterdir():
        file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(BadFilesError, match="cannot be read beyond its row 0"):
        next(stream)
    assert "waiting" not in capfd.readouterr().err


@pytest.mark.parametrize("form", ["parquet", "tar"])
@pytest.mark.parametrize("kind", ["drip", "drip head"])
def test_a_byte_at_a_time_is_no_answer(repositories, on_hub, expected, form, kind, capfd):
    """It would take for ever, without a word: each byte comes before the limit on silence."""
    script = Script(kind, numbers=(0,))
    with on_hub(repositories / form, script):
        stream = open_stream()
        script.on = True
        found = read(stream)
    assert len(script.done) == 4 and found == expected[form, 0]
    assert capfd.readouterr().err.count("waiting for the server of data set some/pictures") == 4


@pytest.mark.parametrize("path", ["/api/datasets/some/pictures", COMMIT, "data/train-00000.tar"])
def test_opening_by_the_byte_ends(repositories, on_hub, path):
    """At a description of the data set, at a list of its files, at the first of them: they are asked for again."""
    script = Script("drip", numbers=(0,), suffixes=(path,), on=True)
    with on_hub(repositories / "tar", script):
        assert open_stream().state_dict()[0]["read"] == 0
    assert script.done


def test_a_slow_answer_is_an_answer(repositories, on_hub, monkeypatch, capfd):
    """Twice as long as LONGEST_ANSWER, which is a second more for so many bytes."""
    monkeypatch.setattr(engine.network, "SLOWEST_ANSWER", 10)
    monkeypatch.setattr(hub_constants, "HF_HUB_DOWNLOAD_TIMEOUT", 10)
    script = Script("slow", numbers=(0,))
    with on_hub(repositories / "parquet", script):
        stream = open_stream()
        script.on = True
        read(stream, 2)
    assert script.done and "waiting" not in capfd.readouterr().err


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


@pytest.mark.parametrize(("path", "kind"), [
    ("*", "403"), ("/api/datasets/some/pictures", "403"), ("README.md", "403"), ("data/train-00000.tar", "403"),
    ("data/train-00000.tar", "garbage"), ("data/train-00000.tar", "page"),
])  # fmt: skip
def test_a_moments_refusal_or_garbage_at_opening(repositories, on_hub, tmp_path, path, kind):
    shutil.copytree(repositories / "tar", tmp_path / "repo")
    (tmp_path / "repo" / "README.md").write_text("pictures" if path == "README.md" else "")
    script = Script(kind, numbers=range(4 if path == "*" else 2), suffixes=(path,), on=True)
    if path.startswith("/api"):
        (tmp_path / "repo" / "README.md").unlink()
    with on_hub(tmp_path / "repo", script):
        assert open_stream().state_dict()[0]["read"] == 0
    assert script.done[path] == len(script.numbers)


@pytest.mark.parametrize("cut", [1793, 2660, 10540, 21012])
@pytest.mark.parametrize("shard", [0, 1])
def test_a_tar_cut_short_is_named(tmp_path, on_hub, shard, cut):
    """In an image or a header, where its images are counted; on a server when its row comes."""
    write_tars(tmp_path / "data", (12, 40))
    file = tmp_path / "data" / f"train-0000{shard}.tar"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match=f"tar {file} is damaged or cut short: (unexpected end of|truncated)"):
        open_source(DataArgs(dataset=str(tmp_path), streaming=True, workers=0))
    if cut == 10540:  # in a header, which tarfile takes for the end
        return
    with on_hub(tmp_path), pytest.raises(UserError, match=r"unexpected end of data") as caught:
        read(open_stream())
    if isinstance(caught.value, BadFilesError):  # otherwise when its first images were looked at
        told = rf"shard {shard} of .* its row \d+: unexpected end of data \(hf.*{file.name}\)"
        assert re.search(told, str(caught.value))


# ------------------------------------------------------------------------------------------- a run that goes on waits


@pytest.fixture
def teacher(tmp_path):
    """The demo's teacher, as a repository of the Hub."""
    shutil.copytree(DEMO / "clip_teacher", tmp_path / "teacher")
    return tmp_path / "teacher"


def train_on_hub(run_dir, steps, *flags):
    args = ["--dataset", "some/pictures", "--teacher", "some/teacher", "--size", "nano", "--steps", steps,
            "--batch-size", 8, "--effective-batch-size", 8, "--num-images", 44, "--workers", 0, "--run-dir", run_dir,
            *flags]  # fmt: skip
    train.train(parse(train.Args, [str(arg) for arg in args]))


def test_a_run_that_goes_on_waits_for_a_server(repositories, on_hub, teacher, tmp_path, monkeypatch, capfd):
    """At its start, for data and teacher, of which nothing is in the cache; a first start does not."""
    with on_hub(repositories / "parquet", model=teacher) as (environment, _):
        train_on_hub(tmp_path / "run", 2)
    port = int(environment["HF_ENDPOINT"].rsplit(":", 1)[1])

    def on_a_new_machine():
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / f"cache{len(list(tmp_path.iterdir()))}"))
        monkeypatch.setattr(engine.network, "hub_answers", {})
        monkeypatch.setattr(HubFiles, "known", {})
        HubFiles.clear_instance_cache()
        capfd.readouterr()

    on_a_new_machine()
    with pytest.raises(UserError, match=r"the Hub cannot be reached .*: pass a folder, Parquet or tar of your own"):
        train_on_hub(tmp_path / "first", 2)
    assert "waiting" not in capfd.readouterr().err
    engine.network.tell_offline(False)
    on_a_new_machine()
    with pytest.raises(RunError, match=r"the server of data set some/pictures has been away for 0\.005 minutes"):
        train_on_hub(tmp_path / "run", 4, "--patience", 0.005)
    engine.network.tell_offline(False)
    on_a_new_machine()
    script = Script("503", numbers=range(6), suffixes=("*",), on=True)
    with ExitStack() as stack:
        threading.Timer(0.7, lambda: stack.enter_context(
            serve(repositories / "parquet", script, port, teacher))).start()  # fmt: skip
        train_on_hub(tmp_path / "run", 4)
    told = capfd.readouterr().err
    assert "waiting for the server of data set some/pictures" in told and "comes again, after" in told
    assert script.done["*"] == 6
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000002", "step_00000004"]
    on_a_new_machine()
    script = Script("503", numbers=range(4), suffixes=("config.json", "model.safetensors"), on=True)
    with on_hub(repositories / "parquet", script, port, teacher):
        train_on_hub(tmp_path / "run", 6)
    assert "waiting for the server of --teacher some/teacher" in capfd.readouterr().err
    assert script.done["config.json"] == script.done["model.safetensors"] == 4


@pytest.mark.parametrize(("kind", "path"), [
    ("503", "*"), ("429", "*"), ("refuse", "*"), ("503", "config.json"), ("drop", "config.json"),
    ("503", "model.safetensors"), ("drip", "model.safetensors"), ("stall", "model.safetensors"),
    ("refuse", "preprocessor_config.json"),
])  # fmt: skip
def test_a_teacher_is_waited_for_at_a_resume(on_hub, teacher, kind, path):
    script = Script(kind, numbers=range(1 if kind == "429" else 8), suffixes=(path,), on=True)
    with on_hub(model=teacher, fault=script), patience_at_start(1):
        assert load_frozen("some/teacher", "--teacher", projection=True).dim == 128
    assert script.done[path] == max(script.numbers) + 1
    assert not hub_constants.HF_HUB_OFFLINE


def test_what_lies_in_the_cache_is_not_waited_for(on_hub, teacher, capfd):
    with on_hub(model=teacher):
        load_frozen("some/teacher", "--teacher", projection=True)
    engine.network.hub_answers.clear()
    with patience_at_start(30):  # no server
        load_frozen("some/teacher", "--teacher", projection=True)
        assert "waiting" not in capfd.readouterr().err
    engine.network.hub_answers.clear()
    engine.network.tell_offline(False)
    with on_hub(model=teacher, fault=Script("503", range(1000), ("*",), on=True)), patience_at_start(30):
        load_frozen("some/teacher", "--teacher", projection=True)
    assert "waiting" not in capfd.readouterr().err


def test_what_is_final_is_not_waited_for_at_a_resume(on_hub, teacher, monkeypatch, capfd):
    """What is not there, gated, or not to be asked for, since the user has said so."""
    with patience_at_start(30):
        with on_hub(model=teacher):
            for name, message in (("secret/pictures", "is gated"), ("nobody/nothing", "was not found on the Hub")):
                with pytest.raises(UserError, match=message):
                    open_source(DataArgs(dataset=name, streaming=True))
            with pytest.raises(UserError, match="cannot be loaded"):
                load_frozen("nobody/nothing", "--teacher", projection=True)
            with pytest.raises(huggingface_hub.errors.EntryNotFoundError):
                hub_file("some/teacher", "nothing.json")
        engine.network.hub_answers.clear()
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
        for work in (lambda: open_stream(), lambda: load_frozen("other/teacher", "--teacher", projection=True)):
            with pytest.raises(HubAwayError, match="HF_HUB_OFFLINE is set"):
                work()
    assert "waiting" not in capfd.readouterr().err


def test_a_first_start_is_soon_answered_by_a_server_in_trouble(repositories, on_hub, capfd):
    """With the alternatives; the library's own "couldn't find any data file" would be no help."""
    script = Script("503", range(1000), ("*",), on=True)
    with on_hub(repositories / "parquet", script):
        with pytest.raises(HubAwayError, match=r"pictures cannot be reached: HTTP 503 .*; try again, or pass a folder"):
            open_stream()
        with patience_at_start(0.005), pytest.raises(ServerGoneError, match=r"has been away for 0\.005 minutes"):
            open_stream(patience=0.005)
    assert "waiting for the server of data set some/pictures" in capfd.readouterr().err


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
