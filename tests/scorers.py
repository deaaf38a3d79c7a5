"""Random weights of metric networks, saved under the names of the published files; and folders of pictures."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from sana.metrics.image_reward import RewardConfig
from sana.metrics.inception import Inception

TINY_REWARD = RewardConfig(
    vision=dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    ),
    text=dict(
        vocab_size=260,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    ),
)


def write_inception(path: Path) -> Path:
    """A random Inception whose features neither vanish nor explode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Inception()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.BatchNorm2d):
                for values, low, high in ((module.weight, 0.5, 1.5), (module.running_var, 0.5, 1.5)):
                    nn.init.uniform_(values, low, high)
                for values in (module.bias, module.running_mean):
                    nn.init.normal_(values, std=0.1)
        torch.save(network.state_dict(), path)
    return path


def published_reward_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """ImageReward.pt in small: the names of BLIP's own modules, with what the file holds and the score does not need."""
    wide, text, layers = 32, 24, 2
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, wide),
        "blip.visual_encoder.pos_embed": (1, 5, wide),
        "blip.visual_encoder.patch_embed.proj.weight": (wide, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": (wide,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (260, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (64, text),
    }

    def linear(name, inputs, outputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name, width):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width,), (width,)

    norm("blip.visual_encoder.norm", wide)
    norm("blip.text_encoder.embeddings.LayerNorm", text)
    for layer in range(layers):
        block, bert = f"blip.visual_encoder.blocks.{layer}", f"blip.text_encoder.encoder.layer.{layer}"
        norm(f"{block}.norm1", wide)
        norm(f"{block}.norm2", wide)
        linear(f"{block}.attn.qkv", wide, 3 * wide)
        linear(f"{block}.attn.proj", wide, wide)
        linear(f"{block}.mlp.fc1", wide, 48)
        linear(f"{block}.mlp.fc2", 48, wide)
        for attention, source in (("attention", text), ("crossattention", wide)):
            linear(f"{bert}.{attention}.self.query", text, text)
            linear(f"{bert}.{attention}.self.key", source, text)
            linear(f"{bert}.{attention}.self.value", source, text)
            linear(f"{bert}.{attention}.output.dense", text, text)
            norm(f"{bert}.{attention}.output.LayerNorm", text)
        linear(f"{bert}.intermediate.dense", text, 40)
        linear(f"{bert}.output.dense", 40, text)
        norm(f"{bert}.output.LayerNorm", text)
    for place, inputs, outputs in ((0, text, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        linear(f"mlp.layers.{place}", inputs, outputs)
    for head, width in (("vision_proj", wide), ("text_proj", text)):
        linear(f"blip.{head}", width, 8)
    generator = torch.Generator().manual_seed(seed)

    def draw(name, shape):
        norm_scale = len(shape) == 1 and name.endswith("weight")
        spread = 0.3 if len(shape) < 2 else 1.5 / float(np.prod(shape[1:])) ** 0.5
        return torch.randn(shape, generator=generator) * spread + (1.0 if norm_scale else 0.0)

    state = {name: draw(name, shape) for name, shape in shapes.items()}
    return state | {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}


def write_pictures(folder: Path, count: int = 5, *, side: int = 40, seed: int = 0) -> Path:
    """Noise on plain colours, `id0.png` and so on, with their prompts in `<folder>.json`, in two categories."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    prompts = {}
    for number in range(count):
        noise = generator.integers(-40, 40, (side, side + 8, 3)) + generator.integers(40, 215, 3)
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"id{number}.png")
        prompts[f"id{number}"] = {"category": "ab"[number % 2], "prompt": f"picture {number}"}
    prompts_path(folder).write_text(json.dumps(prompts))
    return folder


def prompts_path(folder: Path) -> Path:
    """The prompts of `write_pictures`."""
    return folder.with_name(f"{folder.name}.json")


def truncate(path: Path) -> None:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
