"""What segmenters and detectors make of the demo's scenes, from the pictures that --save-pictures left in their runs.

    python demo/plot.py docs/dense.png RUN=TITLE ...
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt


def dense(output, *runs, columns=2):
    """The first pictures of each of the runs: a row for each run."""
    figure, axes = plt.subplots(len(runs), columns, figsize=(5.2 * columns, 2.2 * len(runs)), squeeze=False)
    for row, run in zip(axes, runs, strict=True):
        folder, _, title = run.partition("=")
        for axis, file in zip(row, sorted(Path(folder, "pictures").glob("*.png")), strict=False):
            axis.imshow(plt.imread(file))
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(title or folder, fontsize=11)
    figure.tight_layout(pad=0.4)
    figure.savefig(output, dpi=90)


if __name__ == "__main__":
    dense(*sys.argv[1:])
