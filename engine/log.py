"""What a run says on its way: log.jsonl, the terminal, the tracker."""

from engine.errors import first_line
from engine.files import fsync, write_text

import json
import math
import sys
import time

from tqdm.auto import tqdm


def step_of_line(line):
    """The step of a line of log.jsonl; infinite for what a lost machine left of one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Log:
    """log.jsonl, the terminal and the tracker. Main process only; the others call it in vain."""

    def __init__(self, accelerator, run_dir, start, total):
        self.accelerator, self.path, self.total, self.start = accelerator, run_dir / "log.jsonl", total, start
        self.main = accelerator.is_main_process
        if self.main and self.path.exists():  # lines beyond the checkpoint are written again
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            lines = [line for line in lines if step_of_line(line) <= start]
            write_text(self.path, "".join(line + "\n" for line in lines))
        # a full disk may cut a line off: it is written again, after the last whole one
        self.size, self.pending = self.path.stat().st_size if self.main and self.path.exists() else 0, ""
        bar = self.main and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, unit="step", disable=not bar, dynamic_ncols=True, smoothing=0.05)
        self.began, self.top1 = time.perf_counter(), ""

    def write(self, values, shown=True):
        """One line of the log; in the terminal too, if shown."""
        if not self.main:
            return
        values = json.loads(json.dumps(values), parse_constant=lambda _: None)  # JSON has no number for nan
        self.pending += json.dumps(values) + "\n"
        try:
            with self.path.open("ab") as file:
                file.truncate(self.size)
                file.write(self.pending.encode())
            self.size, self.pending = self.size + len(self.pending.encode()), ""
        except OSError as error:
            tqdm.write(f"warning: {self.path} cannot be written: {first_line(error)}", file=sys.stderr)
        try:
            tracked = {name: value for name, value in values.items() if isinstance(value, (int, float))}
            self.accelerator.log(tracked, step=values["step"])
        except (OSError, RuntimeError) as error:  # the run is worth more than its curves
            tqdm.write(f"warning: the tracker failed: {first_line(error)}", file=sys.stderr)
        loss = "not finite" if values["loss"] is None else f"{values['loss']:.4f}"
        line = (f"loss {loss}  {values['images_per_second']:.0f} images/s  "
                f"waiting for data {values['data_wait']:.0%}")  # fmt: skip
        if "top1" in values:
            self.top1 = f"  top-1 {values['top1']:.1f}"
        line += self.top1
        if self.bar.disable and shown:
            step = values["step"]
            eta = (time.perf_counter() - self.began) / max(step - self.start, 1) * (self.total - step)
            left = tqdm.format_interval(eta)
            print(f"step {step}/{self.total}  {line}  {left} left", flush=True)
        elif not self.bar.disable:
            self.bar.set_postfix_str(line)
        for name in values.get("skipped_files", []):
            tqdm.write(f"skipped {name}", file=sys.stderr)

    def sync(self):
        """See that a line is there whenever the checkpoint of its step is."""
        if self.main and self.path.exists() and not self.pending:
            try:
                fsync(self.path)
            except OSError as error:  # on this rank alone: the others wait for it in the checkpoint
                tqdm.write(f"warning: {self.path} cannot be written: {first_line(error)}", file=sys.stderr)

    def close(self):
        self.bar.close()


def watch(chunks, total, what, shown):
    """Pass chunks on, with a bar of images, images/s, the share of time waiting for data and the time left; outside a
    terminal a line every ten seconds."""
    bar = tqdm(total=total, desc=what, unit="image", disable=not (shown and sys.stderr.isatty()), dynamic_ncols=True)
    began, waited, done, last = time.perf_counter(), 0.0, 0, time.perf_counter()
    chunks = iter(chunks)
    while True:
        asked = time.perf_counter()
        chunk = next(chunks, None)
        now = time.perf_counter()
        waited += now - asked
        if chunk is None:
            break
        yield chunk
        done += len(chunk["ids"])
        bar.update(len(chunk["ids"]))
        bar.set_postfix_str(f"waiting for data {waited / (now - began):.0%}", refresh=False)
        if shown and bar.disable and now - last > 10:
            last, rate = now, done / (now - began)
            left = tqdm.format_interval((total - done) / rate) if total else "?"
            print(f"{what}: {done}/{total or '?'} images  {rate:.0f} images/s  waiting for data "
                  f"{waited / (now - began):.0%}  {left} left", flush=True)  # fmt: skip
    bar.close()
