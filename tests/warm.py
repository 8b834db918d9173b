"""A process that has imported the libraries, and the scripts that are forked from it: each saves the five seconds of
importing them. Nothing of this project is imported before the fork. tests/launch.py starts it and asks it.

    python tests/warm.py        requests, a line of JSON each, are answered with a line each

{"command": [...], "cwd": ..., "environments": [{...}, ...], "output": [stdout, stderr], "timeout": seconds} starts a
process for every environment, and is answered with their ids; {"wait": [id, ...]} with their exit codes once all have
ended; {"poll": id} with its exit code or null.
"""

import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path

codes = {}  # {id: exit code} of the processes that have ended


def import_libraries():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as engine/__init__.py does; that it does: tests/test_house.py
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import einops  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch.distributed.checkpoint.state_dict  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401
    import tyro  # noqa: F401
    from transformers import BeitForImageClassification, CLIPVisionModelWithProjection  # noqa: F401


def become(command, cwd, environment, output, timeout):
    """This forked process becomes that of a command: the path of its script."""
    signal.alarm(timeout)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate((os.devnull, *output)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.argv = command
    script = Path(command[0]).resolve()
    sys.path[0] = str(script.parent)
    return str(script)


def reap(options=0):
    ended, status = os.waitpid(-1, options)
    if ended:
        codes[ended] = os.waitstatus_to_exitcode(status)


def wait(children):
    """Their exit codes; when one of them fails the others are asked to end, as torchrun does it."""
    while running := [child for child in children if child not in codes]:
        if any(codes.get(child) for child in children):
            for child in running:
                os.kill(child, signal.SIGTERM)
        reap()
    return [codes[child] for child in children]


def poll(child):
    if child not in codes:
        reap(os.WNOHANG)
    return codes.get(child)


def requested_script():
    """Serves until there are no more requests; in a forked process: the script that it is to run."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"])
        elif "poll" in request:
            answer = poll(request["poll"])
        else:
            answer = []
            for environment in request.pop("environments"):
                child = os.fork()
                if child == 0:
                    return become(**request, environment=environment)
                codes.pop(child, None)  # of an earlier process with this id
                answer.append(child)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    import_libraries()
    gc.freeze()  # or each of them would look through all of torch for cycles, at its end
    print("ready", flush=True)
    if script := requested_script():
        runpy.run_path(script, run_name="__main__")
