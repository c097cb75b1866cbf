"""The released implementation's own outputs (tests/vectors), through `load_authors_checkpoint`; and its refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config

from sr_model import TextEncoder, TextFeatures, load_authors_checkpoint, load_authors_llm

VECTORS = Path(__file__).parent.parent / "vectors"


def vector(strategy):
    tensors = load_file(VECTORS / f"authors_{strategy}.safetensors")
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    return state, {k.removeprefix("in."): v for k, v in tensors.items() if k.startswith("in.")}, tensors


@pytest.mark.parametrize("strategy", ["b1", "b2", "b3", "s1", "s2", "s3"])
def test_released_outputs_are_reproduced(strategy):
    state, inputs, tensors = vector(strategy)
    model = load_authors_checkpoint(state, strategy if strategy in ("b1", "b2") else None)
    assert model.config.strategy == strategy
    text = TextFeatures.from_padded(inputs["hidden"], inputs["mask"])
    ours = model(inputs["x"], 1 - inputs["sigma"], text)
    theirs = tensors["out.noise_minus_data"]
    assert ((-ours - theirs).norm() / theirs.norm()).item() < 5e-6


FUSED_LLM = Qwen3Config(
    vocab_size=50, hidden_size=40, num_hidden_layers=6, intermediate_size=64, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, rope_theta=5e6, rms_norm_eps=1e-6,
)  # fmt: skip


def test_released_joint_attention_is_reproduced(tokenizer):
    state, inputs, tensors = vector("fusedit")
    model = load_authors_checkpoint(state, llm_config=FUSED_LLM, first_layer=2)
    encoder = TextEncoder(load_authors_llm(state, FUSED_LLM), tokenizer, **model.reads(6))
    rows = [tuple(ids[keep].tolist()) for ids, keep in zip(inputs["input_ids"], inputs["mask"].bool(), strict=True)]
    ours = model(inputs["x"], 1 - inputs["sigma"], encoder.encode_tokens(rows))
    theirs = tensors["out.noise_minus_data"]
    assert ((-ours - theirs).norm() / theirs.norm()).item() < 5e-6


def test_joint_attention_refusals(tokenizer):
    state, *_ = vector("fusedit")
    for change, arguments, message in (
        ({}, {}, "llm_config: wanted the LLM's"),
        ({}, {"strategy": "s2", "llm_config": FUSED_LLM}, "those of 'fusedit', got 's2'"),
        ({}, {"llm_config": FUSED_LLM, "first_layer": 4}, "first_layer: wanted 0 to 3, got 4"),
        ({"dit.layers": None}, {"llm_config": FUSED_LLM}, r"no layers.\* tensors"),
        ({"dit.extra": torch.zeros(1)}, {"llm_config": FUSED_LLM}, "1 unknown tensors, the first named 'extra'"),
        ({"dit.proj_out.bias": torch.zeros(3)}, {"llm_config": FUSED_LLM}, r"proj_out.bias wants shape \[64\]"),
    ):
        changed = {k: v for k, v in state.items() if not any(v is None and k.startswith(c) for c, v in change.items())}
        with pytest.raises(ValueError, match=message):
            load_authors_checkpoint({**changed, **{k: v for k, v in change.items() if v is not None}}, **arguments)
    for key, message in (("llm.norm.weight", "llm.norm.weight is missing"), ("llm.", "no llm")):
        with pytest.raises(ValueError, match=message):
            load_authors_llm({k: v for k, v in state.items() if not k.startswith(key)}, FUSED_LLM)


def test_text_as_ready_keys_and_values_gives_the_same(tmp_path):
    state, inputs, _ = vector("s3")
    model = load_authors_checkpoint(state)
    text = TextFeatures.from_padded(inputs["hidden"], inputs["mask"])
    t = 1 - inputs["sigma"]
    assert torch.equal(model(inputs["x"], t, text), model(inputs["x"], t, model.condition(text, t)))


def test_a_file_and_a_folder_load_alike(tmp_path):
    from safetensors.torch import save_file

    state, *_ = vector("s2")
    keys = sorted(state)
    save_file({k: state[k] for k in keys[:10]}, tmp_path / "a.safetensors")
    save_file({k: state[k] for k in keys[10:]}, tmp_path / "b.safetensors")
    torch.save(state, tmp_path / "c.pt")
    for source in (tmp_path, tmp_path / "c.pt"):
        loaded = load_authors_checkpoint(source).state_dict()
        for name, value in load_authors_checkpoint(state).state_dict().items():
            assert torch.equal(loaded[name], value)


def test_refusals_name_what_is_wrong(tmp_path):
    state, *_ = vector("s2")
    b1, *_ = vector("b1")
    for source, strategy, message in (
        (b1, None, "wanted 'b1' or 'b2', got None"),
        (state, "s3", "tensors are those of 's2', got 's3'"),
        ({k: v for k, v in state.items() if k != "layers.1.mlp.up_proj.weight"}, None, "layers.1.mlp.up_proj.weight"),
        ({**state, "extra": torch.zeros(1)}, None, "1 unknown tensors, the first named 'extra'"),
        ({**state, "proj_out.bias": torch.zeros(3)}, None, r"proj_out.bias wants shape \[64\], .* gives \[3\]"),
        ({**state, "layers.1.cross_attn.text_k_proj.weight": torch.zeros(3)}, None, r"layers.1.cross_attn.text_k_proj"),
        ({**state, "layers.0.cross_attn.text_v_proj.weight": torch.zeros(3, 3)}, None, "text_v_proj.weight has shape"),
        ({**state, "layers.1.cross_attn.k_norm.weight": torch.zeros(3)}, None, "layers.1.cross_attn.k_norm.weight has"),
        ({**state, "text_fusion_weights.1": torch.zeros(3)}, None, r"text_fusion_weights.1 has shape \[3\]"),
        ({**state, "layers.0.self_attn.q_norm.weight": torch.zeros(0)}, None, "q_norm.weight wants more dimensions"),
        ({"a": torch.zeros(1)}, None, "not in the authors' released format"),
        (tmp_path, None, "found none"),
    ):
        with pytest.raises(ValueError, match=message):
            load_authors_checkpoint(source, strategy)
    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(b"no checkpoint")
        with pytest.raises(ValueError, match=f"cannot read .*{name}"):
            load_authors_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_authors_checkpoint(tmp_path / "absent.safetensors")
