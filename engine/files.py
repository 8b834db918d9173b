"""Files that nobody ever sees half-written: under a temporary name, synced, renamed."""

from engine.errors import RunError, first_line

import os
import shutil


def fsync(path):
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary, final):
    """Give a finished file or folder its name: a file replaces its older self, a folder must be new or empty there.
    Raises OSError."""
    for path in [*sorted(temporary.rglob("*")), temporary]:
        fsync(path)
    temporary.replace(final)
    fsync(final.parent)


def write_text(path, text):
    """Replace a file of text. Raises RunError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        publish(temporary, path)
    except OSError as error:
        raise RunError(f"{path} could not be written: {first_line(error)}; make room, and start again") from error


def replace_files(folder, write):
    """Let write(temporary folder) write files, and move them into `folder`, each replacing its older self in one go: a
    reader finds a whole model at any moment. Raises what `write` raises, and OSError."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        folder.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            publish(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
