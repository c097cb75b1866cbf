"""The packed text encoder against transformers' own padded run of the same model."""

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLModel

from sr_kernels import layer_stats
from sr_model import TextEncoder

PROMPTS = ["a red circle", "the big blue square on the left of a small green triangle", "two"]


def padded_hidden_states(llm, tokenizer, prompts):
    """Hidden states 1..n of transformers with its own attention on a right-padded batch, packed."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
    llm.set_attn_implementation("eager")
    with torch.no_grad():
        out = llm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    return torch.stack(out.hidden_states[1:])[:, batch["attention_mask"].bool()]


def test_packed_equals_padded(llm, tokenizer):
    expected = padded_hidden_states(llm, tokenizer, PROMPTS)
    text = TextEncoder(llm, tokenizer).encode(PROMPTS)
    assert text.lengths == [3, 12, 1]
    assert text.layer_ids == (1, 2, 3, 4)
    assert ((text.hidden - expected).norm() / expected.norm()).item() < 2e-6


def test_qwen3_vl_language_model(tokenizer):
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
                       "deepstack_visual_indexes": [0]},
    )  # fmt: skip
    llm = Qwen3VLModel(config).eval()
    expected = padded_hidden_states(llm.language_model, tokenizer, PROMPTS)
    text = TextEncoder(llm, tokenizer, cache_bytes=0).encode(PROMPTS)
    assert ((text.stacked - expected).norm() / expected.norm()).item() < 2e-6


def test_layers_are_kept_where_they_were_computed(llm, tokenizer):
    """No layer is stored twice, and the statistics are those of what is kept."""
    outputs = []
    handles = [m.register_forward_hook(lambda *a: outputs.append(a[2])) for m in (*llm.layers[:-1], llm.norm)]
    text = TextEncoder(llm, tokenizer, cache_bytes=0).encode(PROMPTS)
    for handle in handles:
        handle.remove()
    places = [(out[0] if isinstance(out, tuple) else out).data_ptr() for out in outputs]
    assert [layer.data_ptr() for layer in text.hidden] == places
    for mine, whole in zip((text.mean, text.rstd), layer_stats(text.stacked), strict=True):
        assert torch.equal(mine, whole)


def test_only_the_layers_asked_for_are_run(llm, tokenizer):
    everything = TextEncoder(llm, tokenizer, cache_bytes=0).encode(PROMPTS)
    runs = []
    handles = [layer.register_forward_hook(lambda *_, i=i: runs.append(i)) for i, layer in enumerate(llm.layers)]
    penultimate = TextEncoder(llm, tokenizer, layer_ids=(3,), cache_bytes=0).encode(PROMPTS)
    for handle in handles:
        handle.remove()
    assert runs == [0, 1, 2]
    assert torch.equal(penultimate.stacked[0], everything.stacked[2])
    assert len(llm.layers) == 4


def test_the_cache_returns_the_same_and_spares_the_llm(llm, tokenizer):
    encoder = TextEncoder(llm, tokenizer)
    first = encoder.encode(PROMPTS)
    again = encoder.encode([PROMPTS[2], PROMPTS[0], PROMPTS[0]])
    assert encoder.encoded == 3
    assert torch.equal(again.hidden, torch.cat([first.hidden[:, -1:], first.hidden[:, :3], first.hidden[:, :3]], 1))


def test_the_cache_is_bounded(llm, tokenizer):
    encoder = TextEncoder(llm, tokenizer, cache_bytes=2000)  # a token takes 4 layers x (24 x 4 + 8) bytes
    for prompt in ("a red", "the blue", "two small", "three big"):
        encoder.encode([prompt])
    assert 0 < encoder._cached_bytes <= 2000
    assert encoder._cached_bytes == sum(f.nbytes for f in encoder._cache.values())
    encoder.encode(["a red"])  # dropped meanwhile
    assert encoder.encoded == 5


def test_template_limit_and_empty_prompts(llm, tokenizer):
    encoder = TextEncoder(llm, tokenizer, template="the big ", max_tokens=3)
    text = encoder.encode(["red circle on a square", "", "red"])
    assert text.lengths == [3, 2, 3]
    assert encoder.truncated == 1
    bare = TextEncoder(llm, tokenizer)
    assert bare.tokenize([""]) == [(tokenizer.pad_token_id,)]
    assert bare.encode(["", "red"]).lengths == [1, 1]


def test_refusals(llm, tokenizer):
    with pytest.raises(ValueError, match=r"layer_ids: wanted ids in 1..4, got \[5\]"):
        TextEncoder(llm, tokenizer, layer_ids=(5,))
    with pytest.raises(ValueError, match="max_tokens: wanted at least 1"):
        TextEncoder(llm, tokenizer, max_tokens=0)
    with pytest.raises(ValueError, match="llm: wanted a decoder-only language model"):
        TextEncoder(torch.nn.Linear(2, 2), tokenizer)
    with pytest.raises(TypeError, match="prompts: wanted a list"):
        TextEncoder(llm, tokenizer).encode("red")
