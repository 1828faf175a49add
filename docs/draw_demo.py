"""Draw the picture of the README from the output of ``make demo``.

    python docs/draw_demo.py demo-output docs/images/demo.png

The test subjects with the worst, the median and the best Dice of Mean Teacher; in each the slice with the largest
reference area.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from scantly.data.dataset import Dataset
from scantly.imaging import read_label
from scantly.training.run import Run

COLORS = ("#4cc9f0", "#f9c74f", "#f94144")
TITLES = {"supervised": "2 labeled subjects alone", "mean_teacher": "with unlabeled ones: Mean Teacher"}


def main(folder: Path, out: Path) -> None:
    """Write the picture."""
    dataset = Dataset.open(folder / "dataset")
    runs = {method: Run.open(folder / "runs" / method) for method in TITLES}
    table = runs["mean_teacher"].evaluation("test")
    means = table.groupby("case")["dice"].mean().sort_values()
    cases = [means.index[0], means.index[len(means) // 2], means.index[-1]]
    figure = Figure(figsize=(7.2, 2.55 * len(cases)), dpi=90, facecolor="white")
    axes = figure.subplots(len(cases), 3)
    for number, case in enumerate(cases):
        image, reference = dataset.read_image(case).array[0], dataset.read_label(case).array
        z = int((reference > 0).sum((1, 2)).argmax())
        maps = [("scan and reference", reference)]
        for method, run in runs.items():
            maps.append((TITLES[method], read_label(run.predictions("test") / f"{case}.nii.gz").array))
        for axis, (title, labels) in zip(axes[number], maps, strict=True):
            low, high = np.percentile(image[z], (1, 99.5))
            axis.imshow(image[z], cmap="gray", vmin=low, vmax=high)
            for value, color in enumerate(COLORS, start=1):
                if (labels[z] == value).any():
                    axis.contour(labels[z] == value, levels=[0.5], colors=[color], linewidths=1.4)
            axis.set_axis_off()
            if number == 0:
                axis.set_title(title, fontsize=9)
    for position, (name, color) in enumerate(zip(dataset.classes[1:], COLORS, strict=True)):
        figure.text(0.36 + 0.1 * position, 0.012, name, color=color, fontsize=10, weight="bold")
    figure.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.045, wspace=0.03, hspace=0.03)
    drawn = io.BytesIO()
    figure.savefig(drawn, metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(96).save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
