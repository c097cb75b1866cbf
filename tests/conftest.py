"""Small real parts that several tests share: a tokenizer, a random Llama, a tiny DiT for it."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from sr_model import build

WORDS = """a an the red green blue circle square triangle on of two three is left right to big small""".split()  # noqa: SIM905
LLM_LAYERS, LLM_WIDTH = 4, 24


@pytest.fixture(scope="session")
def tokenizer():
    """One token a word; no special token is added, so that an empty prompt has none."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="session")
def llm(tokenizer):
    """A random Llama with grouped queries: 4 layers of width 24."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=LLM_WIDTH,
        intermediate_size=32,
        num_hidden_layers=LLM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
    )
    return LlamaModel(config).eval()


TINY = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_size": 48,
    "patch_size": 2,
    "in_channels": 3,
    "text_dim": LLM_WIDTH,
    "text_layers": LLM_LAYERS,
}


def randomize(model, seed=0):
    """Random weights everywhere, also where the initialisation is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(parameter + 0.2 * noise)
    return model


@pytest.fixture
def tiny_dit():
    """A function strategy -> random DiT of two blocks for `llm`, on pixels; the same at every call."""

    def make(strategy, **sizes):
        torch.manual_seed(0)
        return randomize(build(strategy, "demo", **{**TINY, **sizes})).eval()

    return make
