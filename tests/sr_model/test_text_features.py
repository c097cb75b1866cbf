"""Packing of text features, and its refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sr_model import TextFeatures, TextKV
from sr_model.text_features import Places


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), left=st.booleans(), layers=st.integers(1, 3))
def test_padding_on_either_side_is_dropped(lengths, left, layers):
    width = max(lengths) + 1
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, width - n :] = 1 if left else 0
        mask[row, :n] = 0 if left and n < width - n else mask[row, :n] if left else 1
        if left:
            mask[row] = torch.cat([torch.zeros(width - n), torch.ones(n)]).long()
    hidden = torch.randn(layers, len(lengths), width, 5)
    text = TextFeatures.from_padded(hidden, mask)
    assert text.lengths == lengths
    assert text.cu_seqlens.tolist() == list(text.cu_seqlens_host)
    assert text.layer_ids == tuple(range(1, layers + 1))
    start = 0
    for row, n in enumerate(lengths):
        assert torch.equal(text.hidden[:, start : start + n], hidden[:, row][:, mask[row].bool()])
        start += n
    assert text.positions().tolist() == [i for n in lengths for i in range(n)]
    assert torch.allclose(text.mean, text.hidden.mean(-1), atol=1e-6)


def test_split_and_cat_keep_values_and_statistics():
    text = TextFeatures.pack(torch.randn(3, 6, 4), [2, 4])
    again = TextFeatures.cat(text.split())
    assert torch.equal(again.hidden, text.hidden)
    assert torch.equal(again.rstd, text.rstd)


def test_select_finds_layers_by_their_ids():
    hidden = torch.randn(3, 5, 4)
    text = TextFeatures.pack(tuple(hidden), [5], layer_ids=(4, 7, 9))
    chosen = text.select((9, 4))
    assert torch.equal(chosen.stacked, hidden[[2, 0]])
    assert torch.equal(chosen.mean, text.mean[[2, 0]])
    with pytest.raises(ValueError, match=r"wanted hidden states \[5\], the features hold \[4, 7, 9\]"):
        text.select((4, 5))


def test_refusals():
    hidden = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="at least one token in every prompt"):
        TextFeatures.pack(hidden, [5, 0])
    with pytest.raises(ValueError, match="wanted a sum of 5 tokens, got 4"):
        TextFeatures.pack(hidden, [2, 2])
    with pytest.raises(ValueError, match="wanted 2 ids"):
        TextFeatures.pack(hidden, [5], layer_ids=(1,))
    with pytest.raises(ValueError, match=r"wanted \[L, B, N, C\] and \[B, N\]"):
        TextFeatures.from_padded(hidden, torch.ones(2, 5))


def test_taking_prompts_gathers_their_keys_and_values():
    k, v = torch.randn(2, 6, 1, 4), torch.randn(2, 6, 1, 4)
    kv = TextKV(k, v, torch.tensor([0, 2, 6], dtype=torch.int32), (0, 2, 6))
    taken = kv.take(Places.of(kv, [1, 0, 1]))
    assert taken.cu_seqlens_host == (0, 4, 6, 10)
    assert taken.cu_seqlens.tolist() == [0, 4, 6, 10]
    assert taken.max_len == 4
    for before, after in ((k, taken.k), (v, taken.v)):
        assert torch.equal(after, torch.cat([before[:, 2:], before[:, :2], before[:, 2:]], 1))
    assert kv.take(Places.of(kv, [0, 1])) is kv
