"""Models of the transformers library: loaded whole, or refused in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from sana.utils import hub
from sana.utils.logging import first_line
from sana.utils.oom import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

_NOT_LOADABLE = (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError, SafetensorError)


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Without the bar that transformers draws for each model it loads: between the lines of a log it says nothing."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_pretrained(
    what: str,
    name_or_path: str | Path,
    model_class: type,
    *others: type,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Any, ...]:
    """The model of a transformers folder or hub name, frozen, and what belongs to it. No code of the folder is run.

    Args:
        what: says in errors what was wanted.
        model_class: of the model, or an `AutoModelFor...`.
        others: classes with `from_pretrained`: tokenizer, image processor, ...

    Raises:
        ValueError: nothing loadable is there, it is a model of another class, or weights are missing.
    """
    from transformers import AutoConfig  # lazy: utils is imported where transformers is not

    folder = hub.resolve_model(name_or_path)
    try:
        config = AutoConfig.from_pretrained(folder)
        wanted = getattr(model_class, "config_class", None)
        if wanted is not None and not isinstance(config, wanted):
            raise ValueError(f"it is a {config.model_type}, not a {wanted.model_type}")
        beside = [other.from_pretrained(folder) for other in others]
        with no_loading_bar():
            model, report = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except _NOT_LOADABLE as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"cannot load {what} from {str(name_or_path)!r}: {first_line(error)}") from error
    # transformers would go on with random weights.
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{what} in {str(name_or_path)!r} lacks {len(missing)} weights, {missing[0]} among them"
        )
    return model.to(device).eval().requires_grad_(False), *beside


def chat_answers(
    model: Any, processor: Any, pictures: Sequence[Image], texts: Sequence[str], max_new_tokens: int
) -> Tensor:
    """What a chat model writes, greedily, about each picture to the text at its place: tokens (B, n)."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        for picture, text in zip(pictures, texts, strict=True)
    ]
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device, model.dtype)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    return tokens[:, inputs["input_ids"].shape[1] :]
