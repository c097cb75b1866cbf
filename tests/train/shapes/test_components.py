"""Connected components against scipy's."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from train.shapes.components import connected_components


def expected(labels: np.ndarray) -> np.ndarray:
    """scipy's components of each label, numbered in the order of their first pixels."""
    numbered, count = np.full(labels.shape, -1), 0
    for label in np.unique(labels[labels >= 0]):
        parts, n = ndimage.label(labels == label)
        numbered[parts > 0] = parts[parts > 0] + count
        count += n
    order = list(dict.fromkeys(number for number in numbered.ravel().tolist() if number >= 0))
    number_of = {-1: -1, **{number: i for i, number in enumerate(order)}}
    return np.vectorize(number_of.get, otypes=[int])(numbered)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_equals_scipy(height, width, colors, seed):
    labels = np.random.default_rng(seed).integers(-1, colors, (height, width))
    components, count = connected_components(labels)
    np.testing.assert_array_equal(components, expected(labels))
    assert count == components.max() + 1


def test_branches_that_meet_late_are_one():
    comb = np.full((40, 41), -1)
    comb[:, ::2] = 3
    assert connected_components(comb)[1] == 21
    comb[-1] = 3
    components, count = connected_components(comb)
    assert count == 1
    np.testing.assert_array_equal(components, np.where(comb == 3, 0, -1))


def test_diagonal_neighbours_are_apart():
    components, count = connected_components(np.array([[0, 1], [1, 0]]))
    assert count == 4
    assert components.tolist() == [[0, 1], [2, 3]]


def test_all_negative_is_none():
    components, count = connected_components(np.full((3, 4), -1))
    assert count == 0
    assert (components == -1).all()
