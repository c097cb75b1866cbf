"""The projection's arithmetic, redone by hand from Section 4.1's sizes."""

import pytest
import torch

from bench import projection
from bench.setting import PAPER, dit, language_model

PRODUCTS, COPY = 0.5 * 989.4e12, 0.8 * 4.3e12


@pytest.fixture(scope="module")
def llm():
    return language_model(PAPER, torch.device("meta"), torch.bfloat16).config


def test_a_picture_of_joint_routing(llm):
    """s3 makes keys and values of 513 tokens at each of 50 steps."""
    model = dit("s3", PAPER, "meta", torch.bfloat16)
    kv = 2560 * (24 * 36 + 24 * 2048)  # fusion and the folded projections, a token
    text = 2 * (50 * 513 * kv + 24 * 2048 * 2560**2)
    block = 2048 * (4 * 4096 + 2 * 1024 + 3 * 8192)  # queries and outputs of both attentions, keys, values, SwiGLU
    image = 2 * 2 * 1024 * 50 * (24 * block + 2 * 64 * 2048)
    attention = 2 * 50 * 24 * 2 * 4096 * 1024 * (2 * 1024 + 513)
    layer = 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728)
    pairs = 512 * 513 // 2 + 1
    language = 2 * 36 * (513 * layer + 2 * 4096 * pairs)
    moved = 50 * 513 * 2560 * 2 * (36 + 24)
    expected = (text + image + attention + language) / PRODUCTS + moved / COPY
    assert projection.picture(model, llm, 512, (0.5, 0.8)) == pytest.approx(expected, rel=1e-12)


def test_a_training_step_moves_what_it_reads(llm):
    """b1 routes one layer, forward and backward; twice the share of the peak and of the bandwidth is half the time."""
    model = dit("b1", PAPER, "meta", torch.bfloat16)
    assert projection.routing_bytes(model, 4096) == 2 * 4096 * 2560 * 2
    slow, fast = (projection.step(model, llm, False, (share, share)) for share in (0.4, 0.8))
    assert slow == pytest.approx(2 * fast, rel=1e-12)
    assert projection.step(model, llm, True, (0.4, 0.4)) > slow
