"""Mistakes that somebody could make, one at a time: do the tests say so?

    python tests/mistakes.py                 all of them
    python tests/mistakes.py clip decay      those whose name or code contains one of these words

Each mistake replaces a piece of code, which stands exactly once in the scripts (whichever file that is, so that moving
code moves the mistake with it), in a copy of the tree, and runs the tests that are to notice. They pass without it
first. The last line printed is a JSON object; exit code 1 if anything went unnoticed.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*_cache", "docs")

Mistake = namedtuple("Mistake", "name old new tests")

STEP = "tests/test_train_step.py"

MISTAKES = [
    Mistake('clipping without effect', 'clip_grad_norm_(model.parameters(), clip or math.inf)', 'clip_grad_norm_(model.parameters(), math.inf)', STEP),
    Mistake('the norm after clipping is logged', 'norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of FSDP', 'norm = norm.clamp(max=clip or math.inf)', STEP),
    Mistake('the learning rate one step ahead', 'lr = learning_rate(step, total, warmup, peak, args.recipe.min_lr)', 'lr = learning_rate(step + 1, total, warmup, peak, args.recipe.min_lr)', STEP),
    Mistake('the rate is not scaled by the batch', 'peak = args.recipe.lr * data.effective_batch_size / 2048', 'peak = args.recipe.lr', STEP),
    Mistake("the rate is scaled by a process's batch", 'peak = args.recipe.lr * data.effective_batch_size / 2048', 'peak = args.recipe.lr * data.batch_size / 2048', STEP),
    Mistake('no --min-lr', 'lr = learning_rate(step, total, warmup, peak, args.recipe.min_lr)', 'lr = learning_rate(step, total, warmup, peak, 0.0)', STEP),
    Mistake('the warm-up is that of the default', 'length_of_run(args.run, data, source, args.recipe.warmup_epochs)', 'length_of_run(args.run, data, source)', STEP),
    Mistake('a cosine over a step too many', 'math.cos(math.pi * step / max(total - 1, 1))', 'math.cos(math.pi * step / total)', STEP),
    Mistake('decay on every group', 'decay if group["decay"] else 0.0', 'decay', STEP),
    Mistake('decay on no group', 'decay if group["decay"] else 0.0', '0.0', STEP),
    Mistake('tokens are decayed', 'groups[parameter.ndim < 2 or name.endswith("token")]["params"].append(parameter)', 'groups[parameter.ndim < 2]["params"].append(parameter)', STEP),
    Mistake('decay does not move to its end', 'decay = cosine(step, total, args.recipe.weight_decay, args.recipe.weight_decay_end)', 'decay = args.recipe.weight_decay', STEP),
    Mistake('256 for 255', 'pixels = pixels.float() / 255                                                # (B, 3, S, S)', 'pixels = pixels.float() / 256', STEP),
    Mistake('the teacher sees normalised pixels', 'target = teacher(pixels)  # the one line', 'target = teacher(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD))  # the one line', STEP),
    Mistake('the student sees pixels that are not normalised', 'losses = model(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), visible, masked, target)', 'losses = model(pixels, visible, masked, target)', STEP),
    Mistake("the student sees CLIP's normalisation", 'losses = model(normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), visible, masked, target)', 'losses = model(normalize(pixels, CLIP_MEAN, CLIP_STD), visible, masked, target)', STEP),
    Mistake('evaluation mode', 'model, optimizer = prepare(accelerator, model, optimizer)\n    model.train()', 'model, optimizer = prepare(accelerator, model, optimizer)\n    model.eval()', STEP),
    Mistake('finite() dropped', 'accelerator.backward(losses["loss"] * finite(losses["loss"]) / accumulation)', 'accelerator.backward(losses["loss"] / accumulation)', STEP),
    Mistake('gradients are summed over micro-batches', 'accelerator.backward(losses["loss"] * finite(losses["loss"]) / accumulation)', 'accelerator.backward(losses["loss"] * finite(losses["loss"]))', STEP),
    Mistake('gradients of the last micro-batch alone', 'with nullcontext() if whole else accelerator.no_sync(model), attention_for(device, precision):', 'optimizer.zero_grad()\n            with nullcontext() if whole else accelerator.no_sync(model), attention_for(device, precision):', STEP),
    Mistake('losses of the last micro-batch alone', 'sums[name] = sums.get(name, 0.0) + value.detach() / accumulation', 'sums[name] = value.detach()', STEP),
    Mistake('losses are summed over micro-batches', 'sums[name] = sums.get(name, 0.0) + value.detach() / accumulation', 'sums[name] = sums.get(name, 0.0) + value.detach()', STEP),
    Mistake('gradients are never cleared', '    optimizer.step()\n    optimizer.zero_grad(set_to_none=True)\n    return norm, bad', '    optimizer.step()\n    return norm, bad', STEP),
    Mistake('a bad step is taken', '    skip_if(bad, accelerator, optimizer)\n    optimizer.step()\n    optimizer.zero_grad(set_to_none=True)', '    optimizer.step()\n    optimizer.zero_grad(set_to_none=True)', STEP),
    Mistake("betas are the default's", 'betas = (args.recipe.beta1, args.recipe.beta2)', 'betas = (0.9, 0.999)', STEP),
    Mistake('betas exchanged', 'betas = (args.recipe.beta1, args.recipe.beta2)', 'betas = (args.recipe.beta2, args.recipe.beta1)', STEP),
    Mistake("eps is the default's", 'lr=0.0, betas=betas, eps=args.recipe.adam_eps, fused=True)', 'lr=0.0, betas=betas, fused=True)', STEP),
    Mistake('Adam for AdamW', 'optimizer = torch.optim.AdamW(parameter_groups(model), lr=0.0, betas', 'optimizer = torch.optim.Adam(parameter_groups(model), lr=0.0, betas', STEP),
    Mistake('the model starts from another seed', '    torch.manual_seed(args.run.seed)\n    model = CAE(config)', '    torch.manual_seed(0)\n    model = CAE(config)', STEP),
    Mistake("the model's flags do not reach it", 'config = model_config(args, target_dim=teacher.target_dim)', 'config = CAEConfig.from_size(args.model.size, args.model.method, target_dim=teacher.target_dim)', STEP),
    Mistake('masks exchanged', 'visible, masked, target)\n                accelerator.backward', 'masked, visible, target)\n                accelerator.backward', STEP),
    Mistake("the image's mask is drawn from its complement", '        return image, visible[0], masked[0]', '        return image, masked[0], visible[0]', 'tests/test_train.py::test_crops_are_a_pure_function_of_image_and_seed'),
    Mistake('the released initial weights are not kept', 'whole.load_state_dict(weights)', 'weights', STEP),
    Mistake("the teacher's class token comes last", 'return self.model.visual_projection(tower.post_layernorm(x))                     # (B, 1 + N, C)', 'return self.model.visual_projection(tower.post_layernorm(x)).roll(-1, 1)', STEP),
]


def sources(root=ROOT):
    """{file: its text} of the code that mistakes are made in."""
    files = [*root.glob("*.py"), *root.glob("engine/*.py"), *root.glob("bench/*.py")]
    return {file: file.read_text() for file in sorted(files)}


def place_of(mistake, texts):
    """The one file in which the code of a mistake stands. Raises ValueError."""
    found = [file for file, text in texts.items() for _ in range(text.count(mistake.old))]
    if len(found) != 1:
        raise ValueError(f"{mistake.name}: this stands {len(found)} times in the code instead of once: {mistake.old}")
    return found[0]


def pytest(root, tests, timeout=600):
    """Exit code and last lines of these tests, in this tree."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x", "--tb=line", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run([*command, *tests], cwd=root, env=environment, text=True, timeout=timeout,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, [f"FAILED {tests[0]} did not end in {timeout} s"]
    return done.returncode, done.stdout.strip().splitlines()


def notice(mistake, root):
    """The test that notices a mistake made in the tree `root`, or None."""
    texts = sources(root)
    file = place_of(mistake, texts)
    file.write_text(texts[file].replace(mistake.old, mistake.new))
    try:
        code, lines = pytest(root, mistake.tests.split())
    finally:
        file.write_text(texts[file])
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if code == 1 and failed else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only the mistakes with one of these in their name, code or tests")
    parser.add_argument("--jobs", type=int, default=2, help="mistakes at a time")
    flags = parser.parse_args()
    wanted = [m for m in MISTAKES if not flags.words or any(w in " ".join(m) for w in flags.words)]
    texts = sources()
    for mistake in wanted:
        place_of(mistake, texts)
    start, unnoticed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        trees = queue.Queue()
        for i in range(flags.jobs):
            trees.put(shutil.copytree(ROOT, Path(folder) / f"tree{i}", ignore=NOT_COPIED))
        code, lines = pytest(Path(folder) / "tree0", sorted({t for m in wanted for t in m.tests.split()}), 3600)
        if code:
            sys.exit("\n".join(["without any mistake the tests fail:", *lines[-5:]]))
        print(f"without a mistake: {lines[-1]}", flush=True)

        def attempt(mistake):
            tree, began = trees.get(), time.monotonic()
            try:
                noticed = notice(mistake, tree)
            finally:
                trees.put(tree)
            if noticed is None:
                unnoticed.append(mistake.name)
            print(f"{mistake.name}: {noticed or 'UNNOTICED'} ({time.monotonic() - began:.0f} s)", flush=True)

        with ThreadPoolExecutor(flags.jobs) as pool:
            list(pool.map(attempt, wanted))
    print(json.dumps({"mistakes": len(wanted), "unnoticed": unnoticed, "seconds": round(time.monotonic() - start)}))
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
