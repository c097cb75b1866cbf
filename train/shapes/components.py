"""Connected components of a label image, with numpy alone."""

from __future__ import annotations

import numpy as np


def connected_components(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """Numbers the 4-connected regions of equal label, leaving out negative labels.

    labels: int [H, W]. Returns (components, count): components is int64 [H, W], -1 where the label is negative and
    otherwise in [0, count), numbered in the order in which rows meet them.
    """
    height, width = labels.shape
    # Runs of equal label within a row; the row number in the key keeps runs from crossing into the next row.
    starts = np.ones((height, width), dtype=bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    run_of = starts.ravel().cumsum().reshape(height, width) - 1
    parent = list(range(int(run_of[-1, -1]) + 1)) if labels.size else []

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    touching = (labels[1:] == labels[:-1]) & (labels[1:] >= 0)
    # One pair for each stretch where two runs lie over each other, not one for each pixel.
    touching[:, 1:] &= starts[1:, 1:] | starts[:-1, 1:] | ~touching[:, :-1]
    for above, below in zip(run_of[:-1][touching].tolist(), run_of[1:][touching].tolist(), strict=True):
        a, b = root(above), root(below)
        if a != b:
            parent[max(a, b)] = min(a, b)

    run_labels = labels[starts]
    number = np.full(len(parent), -1, dtype=np.int64)
    count = 0
    for run in range(len(parent)):
        if run_labels[run] >= 0:
            top = root(run)
            if top == run:
                number[run] = count
                count += 1
            else:
                number[run] = number[top]
    return number[run_of], count
