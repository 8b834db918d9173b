"""Files from others: in place of every pickled file that our loaders read stands one with a payload. Each is refused
in plain words, and the payload does not run."""

from engine.arguments import DEMO, DataArgs, RunArgs
from engine.checkpoints import Resume, fingerprint, load_checkpoint, save_checkpoint
from engine.errors import UserError
from engine.sources import open_source

import argparse
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import tarfile
from contextlib import suppress

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import hub_mixin
from images import png, write_folder, write_tars
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

import convert
import finetune
import probe
import train
from cae import CAE, CAEConfig
from convert import load_model, load_official, to_beit

ATTACKS = ["mkdir", "system", "setstate"]


class Mkdir:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


class System(Mkdir):
    def __reduce__(self):
        return os.system, (f"mkdir '{self.mark}'",)


class Setstate(Mkdir):
    """A class that exists where it is read, and acts in __setstate__."""

    def __reduce__(self):
        return Setstate.empty, (), {"mark": self.mark}

    @staticmethod
    def empty():
        return Setstate.__new__(Setstate)

    def __setstate__(self, state):
        os.mkdir(state["mark"])


def payload(attack, mark):
    return {"mkdir": Mkdir, "system": System, "setstate": Setstate}[attack](mark)


def poison(file, attack, mark, bare):
    """Hide a payload in a file of torch.save, among what it holds; or (bare) in a plain pickle in its place."""
    if bare:
        file.write_bytes(pickle.dumps({"state": payload(attack, mark)}))
    else:
        held = torch.load(file, weights_only=False, map_location="cpu") if file.exists() else {}
        torch.save({**held, "payload": payload(attack, mark)}, file)


def is_live(file, mark):
    """Whether an unsafe reader executes the payload; if so, its trace is removed."""
    with suppress(RuntimeError):  # a plain pickle is no file of torch.save: too late
        torch.load(file, weights_only=False)
    alive = mark.exists()
    if alive:
        mark.rmdir()
    return alive


# -------------------------------------------------------------------------------------------------------- checkpoints


def prepared():
    """An accelerator with a model, an optimizer and, as in finetune.py, an average; and with a scaler, as fp16 has."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    average = AveragedModel(model)
    accelerator.register_for_checkpointing(average)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    return accelerator, model, average


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    assert save_checkpoint(prepared()[0], RunArgs(run_dir=str(run_dir)), 1, {0: {"taken": 0}}, {}) is None
    return run_dir / "checkpoints" / "step_00000001"


def load(accelerator, folder):
    return load_checkpoint(accelerator, Resume([folder]), folder.parent, 1)


PICKLED = ["optimizer.bin", "scaler.pt", "random_states_0.pkl", "custom_checkpoint_0.pkl"]
PLAIN = {"model.safetensors", "trainer.json", "data_0.json", "SHA256SUMS"}


def sign(folder):
    """What whoever changes a file can do as well: write its checksum anew, if the folder has checksums."""
    sums = folder / "SHA256SUMS"
    if sums.exists():
        names = {line.split(maxsplit=1)[1].lstrip("*") for line in sums.read_text().splitlines()}
        names |= {file.name for file in folder.iterdir() if file != sums}
        found = sorted(name for name in names if (folder / name).exists())
        sums.write_text("".join(f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in found))


def test_every_file_of_a_checkpoint_is_one_of_these(checkpoint):
    """Another one would need a test below."""
    names = {file.name for file in checkpoint.iterdir()}
    assert set(PICKLED) <= names <= set(PICKLED) | PLAIN


def test_a_checkpoint_without_payload_loads(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "step_00000001")
    sign(folder)
    accelerator, model, average = prepared()
    for weight in (*model.parameters(), *average.parameters()):
        weight.data.fill_(7)
    random.seed(5)
    progress = load(accelerator, folder)
    assert progress.step == 1 and progress.data_states == {0: {"taken": 0}} and progress.path == folder
    assert not any((weight == 7).any() for weight in (*model.parameters(), *average.parameters()))
    state = random.getstate()
    random.seed(5)
    assert random.getstate() != state, "the generators' file is read, too"


@pytest.mark.parametrize("bare", [False, True], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", [*PICKLED, "pytorch_model.bin"])
def test_a_checkpoint_with_a_payload_is_refused(checkpoint, tmp_path, name, attack, bare):
    folder, mark = shutil.copytree(checkpoint, tmp_path / "step_00000001"), tmp_path / "mark"
    if name == "pytorch_model.bin":  # accelerate's second choice
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
    poison(folder / name, attack, mark, bare)
    sign(folder)
    accelerator, model, _ = prepared()
    before = [weight.clone() for weight in model.parameters()]
    with pytest.raises(UserError) as caught:
        load(accelerator, folder)
    assert not mark.exists()
    assert str(folder) in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert "nothing in it was executed" in str(caught.value) and "weights_only" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "nothing was loaded"
    assert is_live(folder / name, mark)


@pytest.mark.parametrize("name", PICKLED)
def test_a_damaged_pickle_ends_with_one_line(checkpoint, tmp_path, name):
    whole = (checkpoint / name).read_bytes()
    files = (b"", b"no pickle\n", whole[:50], whole[: len(whole) // 2], b"\x80\x04.", b"cos\nsystem\n.")
    for i, data in enumerate(files):
        folder = shutil.copytree(checkpoint, tmp_path / str(i))
        (folder / name).write_bytes(data)
        sign(folder)
        with pytest.raises(UserError, match=name):
            load(prepared()[0], folder)


# ------------------------------------------------------------------------------------------ files of the released code


def read_released(path):
    return load_official(path, heads=4)


@pytest.mark.parametrize("bare", [False, True], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("where", ["bare", "model", "beside the model", "Namespace"])
@pytest.mark.parametrize("read", [read_released, load_model, lambda p: finetune.load_origin(checkpoint_args(p)),
                                  lambda p: probe.load_encoder(checkpoint_args(p))],
                         ids=["load_official", "load_model", "finetune", "probe"])  # fmt: skip
def test_a_released_file_with_a_payload_is_refused(tmp_path, read, where, attack, bare):
    file, mark = tmp_path / "released.pth", tmp_path / "mark"
    state, bad = {"encoder.patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, payload(attack, mark)
    held = {"bare": {**state, "bad": bad}, "model": {"model": {**state, "bad": bad}},
            "beside the model": {"model": state, "optimizer": bad},
            "Namespace": {"model": state, "args": argparse.Namespace(output_dir="x", bad=bad)}}[where]  # fmt: skip
    file.write_bytes(pickle.dumps(held)) if bare else torch.save(held, file)
    with pytest.raises((ValueError, UserError), match="nothing in it was executed") as caught:
        read(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not mark.exists()
    assert is_live(file, mark)


def checkpoint_args(path):
    """What load_encoder and load_origin read of their arguments."""
    return argparse.Namespace(checkpoint=str(path), random_init=None)


# ------------------------------------------------------------------------------------------------------ whole folders


def with_bin(folder, attack, mark, bare):
    """A folder of from_pretrained in which pytorch_model.bin, with a payload, stands for model.safetensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    poison(folder / "pytorch_model.bin", attack, mark, bare)
    return folder


@pytest.fixture(scope="module")
def beit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beit") / "model"
    to_beit(CAE(CAEConfig.from_size("nano"))).save_pretrained(folder)
    return folder


def read_teacher(folder):
    return train.CLIPTeacher(train.TargetArgs(teacher=str(folder)), 4)


READERS = {
    "--teacher": read_teacher,
    "probe": lambda folder: probe.load_encoder(checkpoint_args(folder)),
    "finetune": lambda folder: finetune.load_origin(checkpoint_args(folder)),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("bare", [False, True], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("reader", READERS)
def test_a_folder_of_transformers_with_a_payload_is_refused(beit, tmp_path, reader, attack, bare, sharded):
    source = DEMO / "clip_teacher" if reader == "--teacher" else beit
    folder, mark = shutil.copytree(source, tmp_path / "folder"), tmp_path / "mark"
    names = list(load_file(folder / "model.safetensors"))
    file = with_bin(folder, attack, mark, bare) / "pytorch_model.bin"
    if sharded:
        file = file.rename(folder / "pytorch_model-00001-of-00001.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, file.name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="nothing in it was executed") as caught:
        READERS[reader](folder)
    assert not mark.exists()
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "no advice to switch the protection off"
    assert is_live(file, mark)


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_of_transformers_with_an_honest_pickle_is_read(beit, tmp_path, reader):
    """Older models of the Hub have nothing else."""
    folder = shutil.copytree(DEMO / "clip_teacher" if reader == "--teacher" else beit, tmp_path / "folder")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    expected = READERS[reader](folder)
    (folder / "model.safetensors").unlink()
    found = READERS[reader](folder)
    if reader == "finetune":
        expected, found = expected.beit, found.beit
    assert fingerprint(expected.state_dict()) == fingerprint(found.state_dict())


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_of_a_folder_is_not_executed(beit, tmp_path, attack):
    """A config.json that asks for classes of its own, in a file beside it: the library's own are used."""
    folder, mark = shutil.copytree(beit, tmp_path / "folder"), tmp_path / "mark"
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    for reader in ("probe", "finetune"):
        READERS[reader](folder)
    assert not mark.exists()


@pytest.mark.parametrize("bare", [False, True], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_cae_with_a_payload_is_refused(tmp_path, monkeypatch, attack, bare):
    """A folder of ours is read from model.safetensors alone; of the Hub, huggingface_hub takes a pickle, too."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    CAE(CAEConfig.from_size("nano")).save_pretrained(folder)
    with_bin(folder, attack, mark, bare)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(folder)

    def download(repo_id, filename, **_):
        if not (folder / filename).exists():
            raise hub_mixin.EntryNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(convert, "hf_hub_download", download)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", download)
    with pytest.raises(ValueError, match="some/model cannot be loaded") as caught:
        load_model("some/model")
    assert not mark.exists()
    assert "nothing in it was executed" in str(caught.value) and "weights_only" not in str(caught.value)
    assert is_live(folder / "pytorch_model.bin", mark)


# ---------------------------------------------------------------------------------------------------------- data sets


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("extension", ["pth", "pickle", "pyd", "npy"])
def test_a_tar_with_a_payload_beside_its_images_executes_nothing(tmp_path, extension, attack):
    """datasets decodes what lies beside an image by its extension."""
    file, mark, data = write_tars(tmp_path / "tar", [3]) / "train-00000.tar", tmp_path / "mark", io.BytesIO()
    if extension == "npy":
        np.save(data, np.array([payload(attack, mark)], dtype=object), allow_pickle=True)
    elif extension == "pth":
        torch.save(payload(attack, mark), data)
    else:
        pickle.dump(payload(attack, mark), data)
    with tarfile.open(file, "w") as tar:
        for i in range(3):
            for end, held in (("png", png(i)), ("cls", b"0"), (extension, data.getvalue())):
                member = tarfile.TarInfo(f"{i}.{end}")
                member.size = len(held)
                tar.addfile(member, io.BytesIO(held))
    for streaming in (True, False):
        with suppress(UserError):
            assert len(list(open_source(DataArgs(dataset=str(file.parent), streaming=streaming, workers=0)).data)) == 3
    assert not mark.exists()


def test_a_script_in_a_folder_of_images_is_not_executed(tmp_path):
    """datasets once ran FOLDER/FOLDER.py."""
    write_folder(tmp_path / "pictures", 4)
    (tmp_path / "pictures" / "pictures.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    with pytest.raises(UserError, match=r"scripts are no longer supported, but found pictures\.py"):
        open_source(DataArgs(dataset=str(tmp_path / "pictures"), workers=0))
    assert not (tmp_path / "mark").exists()
