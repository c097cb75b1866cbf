"""The paper: fusion strategies, conditioner, DiT, flow matching, text encoder, latent codecs, sampling pipeline."""

from sr_model.build import build
from sr_model.convert import load_authors_checkpoint, load_authors_llm
from sr_model.dit import DiT
from sr_model.fusedit import FuseDiT
from sr_model.fusion import STRATEGIES
from sr_model.pipeline import SemanticRoutingPipeline
from sr_model.text_encoder import TextEncoder
from sr_model.text_features import TextFeatures, TextKV

__all__ = [
    "STRATEGIES",
    "DiT",
    "FuseDiT",
    "SemanticRoutingPipeline",
    "TextEncoder",
    "TextFeatures",
    "TextKV",
    "build",
    "load_authors_checkpoint",
    "load_authors_llm",
]
