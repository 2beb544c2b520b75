"""A small DeepSeek-style MoE language model that uses every part of the package."""

from dualpipe_ext.models.config import PRESETS, ModelConfig
from dualpipe_ext.models.language_model import LanguageModelStage, initialize, split_layers
from dualpipe_ext.models.moe import Experts, MoELayer
from dualpipe_ext.models.router import Router

__all__ = [
    "PRESETS",
    "Experts",
    "LanguageModelStage",
    "MoELayer",
    "ModelConfig",
    "Router",
    "initialize",
    "split_layers",
]
