"""Sana: text to image with a deep-compression autoencoder and a linear diffusion transformer (arXiv 2410.10629).

Importing the package loads nothing: each public name is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana.config import load_config
    from sana.models.zoo import build_transformer
    from sana.pipeline import SanaPipeline

__version__ = "0.1.0"
__all__ = ["SanaPipeline", "__version__", "build_transformer", "load_config"]

_HOMES = {
    "SanaPipeline": "sana.pipeline",
    "load_config": "sana.config",
    "build_transformer": "sana.models.zoo",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'sana' has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
