"""The closed forms against torch's own counter, and against Table 4."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaModel, Qwen3Config

from sr_model import TextFeatures, build, flops
from sr_model.fusion import fused_states

QWEN3_VL_4B = Qwen3Config(
    hidden_size=2560, num_hidden_layers=36, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128,
)  # fmt: skip
TABLE_4 = {"b1": 454, "b2": 454, "b3": 454, "s1": 454, "s2": 470, "s3": 470}


@pytest.mark.parametrize("strategy", TABLE_4)
def test_the_papers_accounting_gives_table_4(strategy):
    total = flops.paper_sampling(build(strategy, device="meta"), QWEN3_VL_4B).total
    assert total / 1e12 == pytest.approx(TABLE_4[strategy], rel=0.001)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("strategy", TABLE_4)
@pytest.mark.parametrize("preset", ["paper", "demo"])
def test_a_forward_pass_is_what_the_counter_counts(preset, strategy, fold):
    model, lengths = build(strategy, preset, device="meta"), [40, 40]  # alike: the counter would see padding
    model.conditioner.fold = fold
    c, side = model.config, 16
    text = TextFeatures.pack(torch.randn(c.text_layers, 80, c.text_dim, device="meta"), lengths)
    x = torch.randn(2, c.in_channels, side * c.patch_size, side * c.patch_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, torch.rand(2, device="meta"), text)
    gates = 2 * 2 * sum(p.numel() for p in model.fusion.parameters() if p.ndim == 3)  # 2 samples; not counted by ours
    layers = 1 if strategy == "b1" else c.text_layers
    rows = fused_states(strategy, c.depth)
    routing = 2 * rows * layers * 80 * c.text_dim  # our own op, which the counter does not know
    assert flops.forward(model, side * side, lengths).total == counter.get_total_flops() - gates + routing


def test_a_packed_llm_is_what_the_counter_counts(llm):
    config, length = llm.config, 7
    model = LlamaModel(config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long))
    layers = config.num_hidden_layers
    pairs = layers * 2 * 2 * config.num_attention_heads * config.head_dim
    masked = pairs * length * (length - 1) // 2  # eager multiplies what the mask hides
    rope = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] - pairs * length**2
    assert 2 * flops.llm_products(config, layers, [length]) == counter.get_total_flops() - masked - rope


@pytest.mark.parametrize("tokens", [128, 512])
def test_routing_is_free_but_for_the_keys_and_values_of_each_step(tokens):
    counted = {s: flops.sampling(build(s, device="meta"), QWEN3_VL_4B, 1024, tokens) for s in TABLE_4}
    base = counted["b1"].total
    assert counted["s2"].total <= 1.005 * base
    assert counted["s3"].total - counted["s3"].text + counted["s2"].text <= 1.005 * base
    assert counted["s3"].total <= (1.01 if tokens == 128 else 1.03) * base


def test_parts_add_up():
    a = flops.Flops(1, 2, 3, 4)
    assert (a * 2 + a).parts == (3, 6, 9, 12)
    assert (a.total, a.model) == (10, 6)
