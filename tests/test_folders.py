"""A folder of images is listed by ourselves: the same splits, images, order, labels and errors as datasets has."""

import engine.folders
from engine.arguments import DataArgs
from engine.folders import ImageFolder, NotCoveredError, list_folder, scan
from engine.sources import is_held_out, open_builder, open_source

import os
import random
from collections import Counter
from pathlib import Path

import datasets
import pytest
from images import noise_png

FOLDERS = ("train", "training", "val", "validation", "dev", "test", "eval", "train-2", "my_train", "a test b", "latest",
           "trains", "cat", "dog", "1", "Train", "data", "c.d", "__x", ".y", "ü", "...")  # fmt: skip
FILES = ("a.jpg", "b.JPEG", "c.png", "d.Png", "e.2020.jpg", "f.old.jpg", "g.jpg.bak", "h", "i.txt", "j.ini", ".k.jpg",
         "__l.jpg", "train.jpg", "train_1.jpg", "m-val.png", "n.gif", "README.md", "o.csv", "metadata.csv", "p.zip",
         "q.eval", "r-00000-of-00002.jpg", "s t.webp", "t.tar", "u.json", "latest.jpg", "é.png")  # fmt: skip
USUAL_FOLDERS, USUAL_FILES = ("train", "val", "test", "cat", "dog", "1"), ("a.jpg", "b.JPEG", "c.png", "n.gif", "h")


def write(root, paths):
    for path in paths:
        file = Path(root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"file_name,label\n" if file.suffix == ".csv" else b"")
    return root


def random_tree(chance):
    """Some paths; half of the trees are of the usual kind."""
    usual = chance.random() < 0.5
    folders, files = (USUAL_FOLDERS, USUAL_FILES) if usual else (FOLDERS, FILES)
    depths = [chance.randint(0, 2)] if chance.random() < 0.7 else [0, 1, 2, 3]
    some = lambda names: chance.sample(names, chance.randint(2, min(len(names), 5)))  # noqa: E731
    folders, files = some(folders), some(files)
    return {"/".join([*chance.choices(folders, k=chance.choice(depths)), chance.choice(files)]) for _ in range(12)}


def rows_of(builder):
    """What a builder says: (features, {split: [(path, label)]})."""
    splits = builder.as_streaming_dataset()
    features, rows = {}, {}
    for split, data in splits.items():
        features[split] = {name: "image" if isinstance(feature, datasets.Image) else feature
                           for name, feature in data.features.items()}  # fmt: skip
        data = data.cast_column("image", datasets.Image(decode=False))
        rows[split] = [(row["image"]["path"], row["image"]["bytes"], row.get("label")) for row in data]
    return features, list(rows), rows


def of_datasets(root):
    """rows_of what datasets makes of a folder; None where it refuses it."""
    try:
        builder = datasets.load_dataset_builder(str(root))
        assert builder.name == "imagefolder"
        return rows_of(builder)
    except Exception:
        return None


def of_ours(root):
    """The same by our list; None where it is left to datasets."""
    try:
        return rows_of(ImageFolder(root))
    except NotCoveredError:
        return None


def test_any_folder_is_what_datasets_makes_of_it(tmp_path):
    chance, seen = random.Random(0), Counter()
    for i in range(60):
        root = write(tmp_path / f"tree-{i}", random_tree(chance))
        ours = of_ours(root)
        if ours is not None:
            theirs = of_datasets(root)
            assert theirs is not None, sorted(p.relative_to(root) for p in root.rglob("*"))
            assert ours == theirs
            seen |= Counter(len(ours[1]) * ["split"] + ["label"] * ("label" in next(iter(ours[0].values()))))
        seen["ours" if ours else "theirs"] += 1
    assert seen["ours"] > 20 and seen["theirs"] > 5 and seen["split"] == 3 and seen["label"], seen


@pytest.mark.parametrize("paths", [
    [f"{label}/{i}.{kind}" for label in ("dog", "cat", "a b") for i, kind in enumerate(("JPEG", "jpg", "png"))],
    [f"{split}/{label}/{i}.jpg" for split in ("train", "validation", "test") for label in "xy" for i in range(3)],
    [f"data/{split}/{label}/{i}.png" for split in ("train", "val") for label in "yx" for i in range(3)],
    ["b.jpg", "a.jpg", "sub/c.jpg", "sub-2/d.jpg", "sub/.hidden/e.jpg", "__MACOSX/f.jpg", "LICENSE", "classes.txt"],
    ["train/x/a.jpg", "train/y/a.jpg", "train/words.txt", "val/x/b.jpg", "val/y/b.jpg", "README.md"],
])  # fmt: skip
def test_usual_folders_are_listed_by_ourselves(tmp_path, paths):
    """With links to files, and a hidden folder around it all."""
    root = write(tmp_path / ".data" / "my[1] images", paths)
    (tmp_path / "elsewhere.png").touch()
    (root / Path(paths[0]).parent / "link.png").symlink_to(tmp_path / "elsewhere.png")
    ours = of_ours(root)
    plain = write(tmp_path / "my images", paths)  # datasets would take my[1] for a pattern
    (plain / Path(paths[0]).parent / "link.png").symlink_to(tmp_path / "elsewhere.png")
    theirs = of_datasets(plain)
    strip = lambda found, base: {s: [(p.removeprefix(f"{base}/"), *rest) for p, *rest in rows]  # noqa: E731
                                 for s, rows in found[2].items()}  # fmt: skip
    assert strip(ours, root) == strip(theirs, plain) and ours[1] == theirs[1]
    assert all(ours[0][split].get("label") == theirs[0][split].get("label") for split in ours[1])


@pytest.mark.parametrize("extra", ["metadata.csv", "train/metadata.jsonl", "x/table.csv", "x/a.zip", "x/b.parquet",
                                   "x/c.tar", "train_1.jpg", "x/d.avif", "train/training/a.jpg", ".huggingface.yaml",
                                   "README.md"])  # fmt: skip
def test_what_may_mean_more_is_left_to_datasets(tmp_path, extra):
    root = write(tmp_path, ["x/a.jpg", "y/a.jpg", extra])
    (root / "README.md").write_text("---\nconfigs: []\n---\n" if extra == "README.md" else "# Images\n")
    with pytest.raises(NotCoveredError):
        list_folder(root)


def test_links_to_folders_and_names_of_no_text_are_left_to_datasets(tmp_path):
    write(tmp_path / "a", ["x/a.jpg", "y/a.jpg"])
    (tmp_path / "a" / "z").symlink_to(tmp_path / "a" / "x")
    write(tmp_path / "b", ["x/a.jpg", "y/a.jpg"])
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b/x/\xff.jpg")).touch()
    for root in ("a", "b"):
        with pytest.raises(NotCoveredError):
            list_folder(tmp_path / root)


def settle(root, seconds=100):
    """As if nothing had been done to a folder for some time."""
    for folder in (root, *root.rglob("*/")):
        then = os.stat(folder).st_mtime - seconds
        os.utime(folder, (then, then))


def counted(monkeypatch):
    calls = []
    monkeypatch.setattr(engine.folders, "scan", lambda root: calls.append(root) or scan(root))
    return calls


def test_a_list_is_kept_until_a_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root, calls = write(tmp_path / "data", ["x/a.jpg", "y/b.jpg"]), counted(monkeypatch)
    names = lambda: [row["image"]["path"][-7:] for row in ImageFolder(root).as_dataset("train")]  # noqa: E731
    assert names() == ["x/a.jpg", "y/b.jpg"] and names() and len(calls) == 2, "just made: a change would not show"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert names() and len(calls) == 2, "another process takes the list of the first"
    monkeypatch.delenv("LOCAL_RANK")
    settle(root)
    assert names() and len(calls) == 3
    assert names() and len(calls) == 3
    (root / "y" / "c.jpg").touch()
    assert names() == ["x/a.jpg", "y/b.jpg", "y/c.jpg"] and len(calls) == 4
    settle(root)
    assert names() and names() and len(calls) == 5
    (root / "x" / "a.jpg").rename(root / "x" / "z.jpg")
    assert names() == ["x/z.jpg", "y/b.jpg", "y/c.jpg"]
    settle(root)
    for change in (lambda: write(root, ["z/d.jpg"]), lambda: (root / "z" / "d.jpg").unlink()):
        names()
        settle(root)
        count = len(names())
        change()
        assert len(names()) != count


def test_without_room_in_the_cache_it_is_listed_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "cache").touch()  # no folder
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert len(ImageFolder(write(tmp_path / "data", ["x/a.jpg", "y/b.jpg"])).as_dataset("train")) == 2


def test_a_damaged_list_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root, calls = write(tmp_path / "data", ["x/a.jpg", "y/b.jpg"]), counted(monkeypatch)
    ImageFolder(root)
    settle(root)
    ImageFolder(root)
    (file,) = (tmp_path / "cache").rglob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert len(ImageFolder(root).as_dataset("train")) == 2 and len(calls) == 3


def test_scripts_open_folders_so(tmp_path):
    """And rows are what they were: read in place, with the class names of the folders."""
    write(tmp_path, ["x/a.jpg", "y/b.jpg", "y/c.jpg"])
    assert isinstance(open_builder(str(tmp_path)), ImageFolder)
    source = open_source(DataArgs(dataset=str(tmp_path)), labelled=True)
    assert source.classes == ["x", "y"] and source.num_images == 3 and not source.streaming
    assert source.data[1] == {"image": {"bytes": None, "path": str(tmp_path / "y" / "b.jpg")}, "label": 1}


def test_a_file_that_changed_in_place_is_judged_anew(tmp_path, monkeypatch):
    """What --val-fraction holds out is remembered, though no folder tells of such a change."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = write(tmp_path / "data", [f"{name}/{i}.png" for name in "xy" for i in range(40)])
    files = sorted(root.rglob("*.png"))
    for i, file in enumerate(files):
        file.write_bytes(noise_png(i))
    settle(root)

    def held_out():
        source = open_source(DataArgs(dataset=str(root), val_fraction=0.3), held_out=True)
        return {Path(image["path"]) for image in source.data["image"]}

    before = held_out()
    assert before == held_out() == {file for file in files if is_held_out(file.read_bytes(), 0.3)} and before
    for i, file in enumerate(files):
        file.write_bytes(noise_png(100 + i))
    after = held_out()
    assert after == {file for file in files if is_held_out(file.read_bytes(), 0.3)} and after != before
