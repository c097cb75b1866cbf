"""Joint attention written out per sample in fp64, the LLM's keys and values from transformers' own cache."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3Model

from sr_model import TextEncoder, TextKV, build
from sr_model.build import parameter_count
from sr_model.flops import paper_sampling
from tests.conftest import LLM_LAYERS, TINY, randomize

PROMPTS = ["a red circle on the blue square", "two"]


@pytest.fixture
def fusedit():
    sizes = {k: v for k, v in TINY.items() if k != "text_dim"}
    return randomize(build("fusedit", "demo", rope_base=1e4, **sizes)).double().eval()


def test_one_sample_trains_in_bf16(tokenizer, llm):
    sizes = {k: v for k, v in TINY.items() if k != "text_dim"}
    model = torch.nn.Module.to(randomize(build("fusedit", "demo", rope_base=1e4, **sizes)).train(), torch.bfloat16)
    encoder = TextEncoder(copy.deepcopy(llm).bfloat16(), tokenizer, **model.reads(LLM_LAYERS))
    model(torch.randn(1, 3, 8, 8).bfloat16(), torch.zeros(1), encoder.encode(["two"])).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def tapped(model, llm, tokenizer):
    encoder = TextEncoder(copy.deepcopy(llm).double(), tokenizer, **model.reads(LLM_LAYERS))
    return encoder.encode(PROMPTS)


def rotate(x, row, column, base):
    """x [hd]: pairs (i, i + hd/2); the first hd/4 turn by row, the next by column."""
    half, quarter = x.numel() // 2, x.numel() // 4
    angles = torch.tensor([(row if i < quarter else column) * base ** (-2 * (i % quarter) / half) for i in range(half)],
                          dtype=torch.float64)  # fmt: skip
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag])


def rms(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def reference(model, x, text):
    """One sample at a time, one token's rotation at a time."""
    c, outs = model.config, []
    for b in range(x.shape[0]):
        h = model.patch_embed(x[b : b + 1])[0].flatten(1).T  # [N, H]
        side, start = x.shape[-1] // c.patch_size, text.lengths[b]
        span = slice(*text.cu_seqlens_host[b : b + 2])
        for d, block in enumerate(model.blocks):
            att, y = block.self_attn, rms(h, block.norm1.weight)
            q, k, v = (getattr(att, f"{n}_proj")(y).unflatten(-1, (-1, c.head_dim)) for n in "qkv")
            q, k = rms(q, att.q_norm), rms(k, att.k_norm)
            for z in (q, k):
                for n in range(z.shape[0]):
                    for head in range(z.shape[1]):
                        at = (start + n // side, start + n % side)
                        z[n, head] = rotate(z[n, head].clone(), *at, c.rope_base)
            k, v = torch.cat([text.k[d, span], k]), torch.cat([text.v[d, span], v])
            group = c.num_heads // c.num_kv_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            p = torch.einsum("qhc,khc->hqk", q, k).div(c.head_dim**0.5).softmax(-1)
            h = h + att.o_proj(torch.einsum("hqk,khc->qhc", p, v).flatten(1))
            y = rms(h, block.norm2.weight)
            h = h + block.mlp.down_proj(F.silu(block.mlp.gate_proj(y)) * block.mlp.up_proj(y))
        out = model.proj_out(rms(h, model.norm_out.weight)).view(side, side, c.patch_size, c.patch_size, -1)
        outs.append(out.permute(4, 0, 2, 1, 3).reshape(x.shape[1:]))
    return torch.stack(outs)


@torch.no_grad()
def test_forward_is_joint_attention_written_out(fusedit, llm, tokenizer):
    text = tapped(fusedit, llm, tokenizer)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = reference(fusedit, x, text)
    for _ in range(2):  # the second time on the kept buffers
        got = fusedit(x, torch.zeros(1), text)
        assert (got - expected).norm() <= 1e-6 * expected.norm()  # RoPE angles are fp32
    assert len(text.joint) == 1


def test_gradients_reach_every_parameter_and_checkpointing_changes_none(fusedit, llm, tokenizer):
    text, x = tapped(fusedit, llm, tokenizer), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gradients = {}
    for mode in ("none", "full", "selective"):
        fusedit.enable_gradient_checkpointing(mode)
        out = fusedit(x, torch.zeros(1), text)
        gradients[mode] = torch.autograd.grad(out.square().sum(), list(fusedit.parameters()))
    assert all(g.norm() > 0 for g in gradients["none"])
    for mode in ("full", "selective"):
        for a, b in zip(gradients[mode], gradients["none"], strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        kept = fusedit(x, torch.zeros(1), text)
    assert torch.allclose(kept, out, rtol=1e-12)


def test_its_blocks_compile_whole(fusedit, llm, tokenizer):
    text, x = tapped(fusedit, llm, tokenizer), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = fusedit(x, torch.zeros(1), text)
    fusedit.compile_blocks()
    got = fusedit(x, torch.zeros(1), text)
    assert torch.allclose(got, expected, rtol=1e-9)
    got.sum().backward()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_taps_are_what_transformers_caches(llm, tokenizer, kind):
    if kind == "qwen3":  # with a norm on its keys
        torch.manual_seed(0)
        llm = Qwen3Model(Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )).eval()  # fmt: skip
    llm = copy.deepcopy(llm)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="right")
    llm.set_attn_implementation("eager")
    with torch.no_grad():
        cache = llm(**{k: batch[k] for k in ("input_ids", "attention_mask")}, use_cache=True).past_key_values
    keep = batch["attention_mask"].bool()
    runs = []
    for i, layer in enumerate(llm.layers):
        layer.register_forward_hook(lambda *_, i=i: runs.append(i))
    kv = TextEncoder(llm, tokenizer, kv_layers=(1, 2), cache_bytes=0).encode(PROMPTS)
    assert isinstance(kv, TextKV)
    assert kv.lengths == keep.sum(1).tolist()
    assert runs == [0, 1, 2]
    for d, layer in enumerate((1, 2)):
        for mine, theirs in ((kv.k[d], cache.layers[layer].keys), (kv.v[d], cache.layers[layer].values)):
            assert (mine - theirs.transpose(1, 2)[keep]).norm() <= 2e-6 * mine.norm()


def test_the_paper_size_and_table_4():
    model = build("fusedit", device="meta")
    assert parameter_count(model) == 1_711_646_784
    assert model.reads(36)["kv_layers"] == tuple(range(6, 30))
    llm = Qwen3Config(hidden_size=2560, num_hidden_layers=36, intermediate_size=9728, num_attention_heads=32,
                      num_key_value_heads=8, head_dim=128)  # fmt: skip
    assert paper_sampling(model, llm).total / 1e12 == pytest.approx(357, rel=0.002)


def test_refusals():
    for sizes, message in (
        ({"depth": 40}, "depth: wanted at most the LLM's 36 layers"),
        ({"first_layer": 13}, "first_layer: wanted 0 to 12, got 13"),
        ({"head_dim": 6}, "head_dim: wanted a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            build("fusedit", device="meta", **sizes)
    model = build("fusedit", "demo", device="meta")
    text = TextKV.pack(*torch.zeros(2, 6, 5, 3, 64, device="meta"), [2, 3])
    with pytest.raises(ValueError, match="text: wanted 1 prompts, one a sample of x, got 2"):
        model(torch.zeros(1, 3, 32, 32, device="meta"), torch.zeros(1, device="meta"), text)
