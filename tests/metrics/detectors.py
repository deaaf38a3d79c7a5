"""A small random Mask2Former of COCO's 80 classes, saved as a transformers folder."""

from pathlib import Path

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig


def write_mask2former(folder: Path, *, labels: int = 80, queries: int = 12) -> Path:
    """Its masks differ and no class is improbable: the weights are wider than a new network's."""
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    swin = SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=stages
    )
    widths = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    widths |= dict.fromkeys(("encoder_feedforward_dim", "dim_feedforward"), 16)
    config = Mask2FormerConfig(
        backbone_config=swin,
        num_queries=queries,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_labels=labels,
        **widths,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.0 if "queries" in name or "class" in name else 0.2)
        model.save_pretrained(folder)
    return folder
