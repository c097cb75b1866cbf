"""Pictures people look at: the sample grid with its captions, and the loss curve."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont


def sample_grid(images: Sequence[Image.Image], captions: Sequence[str], path: Path, columns: int = 6) -> None:
    """Write a PNG of the pictures, each over its caption; small ones are enlarged by whole factors."""
    cell = max(128, images[0].width)
    factor = max(1, cell // images[0].width)
    cell, gap, lines = images[0].width * factor, 8, 3
    font = ImageFont.load_default(11)
    text_height = 13 * lines + 6
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = images[0].height * factor
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (height + text_height + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (height + text_height + gap)
        sheet.paste(image.resize((cell, height), Image.Resampling.NEAREST), (x, y))
        wrapped = textwrap.wrap(caption, max(10, cell // 6))[:lines]
        draw.multiline_text((x, y + height + 3), "\n".join(wrapped), fill="black", font=font, spacing=2)
    sheet.save(path)


def loss_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG of training and validation loss over steps, from the rows of metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, label, style in (("loss", "training (mean since the last line)", "-"), ("val_loss", "validation", "o-")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axis.set(xlabel="step", ylabel="velocity MSE", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
