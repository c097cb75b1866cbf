"""Model sizes by name. A preset gives DiT's arguments, all but the strategy."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Section 4.1: 2.25B parameters, conditioned on Qwen3-VL-4B-Instruct, in SD3's latent space.
    "paper": {
        "depth": 24,
        "hidden_size": 2048,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "mlp_size": 8192,
        "in_channels": 16,
        "patch_size": 2,
        "text_dim": 2560,
        "text_layers": 36,
    },
    # For two CPU cores: conditioned on SmolLM2-135M, on 32x32 pixels.
    "demo": {
        "depth": 6,
        "hidden_size": 192,
        "num_heads": 3,
        "num_kv_heads": 3,
        "head_dim": 64,
        "mlp_size": 512,
        "in_channels": 3,
        "patch_size": 4,
        "text_dim": 576,
        "text_layers": 30,
        "rope_base": 10.0,  # a grid of 8 x 8: at the paper's 1e5 most frequencies hardly turn
    },
}
