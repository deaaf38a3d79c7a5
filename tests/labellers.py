"""Small random vision-language models and a small random CLIP, saved as transformers folders."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

SIDE, CONTEXT = 32, 16
BLOCKS = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
VISION = BLOCKS | dict(image_size=SIDE, patch_size=16)
TEMPLATE = (
    "<bos>{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant:{% endif %}"
)


def make_tokenizer(*, ends: bool) -> PreTrainedTokenizerFast:
    """One token a byte; `ends`: <bos> and <eos> around each text, as CLIP has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<image>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def write_captioner(folder: Path, seed: int = 0) -> Path:
    """A LLaVA whose answers depend on the picture."""
    tokenizer = make_tokenizer(ends=False)
    ids = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
    text = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.3, **BLOCKS, **ids
    )
    vision = CLIPVisionConfig(**VISION, initializer_range=0.3)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, vision_feature_layer=-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.model.multi_modal_projector.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder


def write_qwen(folder: Path) -> Path:
    """A Qwen2-VL: pictures of other sizes take other numbers of tokens, so that a batch of them is padded."""
    tokenizer = make_tokenizer(ends=False)
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    tokens = [f"<|{name}|>" for name in names]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    ids = zip(("image", "video", "vision_start", "vision_end"), tokens, strict=True)
    text = dict(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.3)
    text |= dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
    vision = dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2, initializer_range=0.3)
    patches = dict(patch_size=4, temporal_patch_size=2)
    config = Qwen2VLConfig(
        text_config=BLOCKS | text | dict(rope_parameters=rope),
        vision_config=vision | patches | dict(spatial_merge_size=2),
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in ids},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    sizes = patches | dict(merge_size=2, min_pixels=16 * 16, max_pixels=48 * 48)
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
    ).save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    """A CLIP of `CONTEXT` tokens, whose scores lie far apart and on both sides of 0."""
    tokenizer = make_tokenizer(ends=True)
    text = BLOCKS | dict(vocab_size=len(tokenizer), max_position_embeddings=CONTEXT)
    text |= dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=4))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    return folder
