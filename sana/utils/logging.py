"""Log lines on stderr, so that stdout holds only results."""

import logging

from sana.utils import distributed

NOISY = (
    "torch.utils._pytree",  # torchao's enums
    "diffusers.quantizers.torchao.torchao_quantizer",  # layouts that this torchao no longer has; not used here
    "bitsandbytes.backends.cpu.ops",  # a faster CPU kernel that would be downloaded
)
"""Loggers of libraries that warn when they are imported, of what no user can change."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (`get_logger(__name__)`), below the package's logger "sana"."""
    return logging.getLogger(name if name == "sana" or name.startswith("sana.") else f"sana.{name}")


def configure(level: str = "INFO") -> None:
    """Show the package's log lines of at least `level` on stderr; entry points call it once, libraries never.

    Processes other than the main one show warnings and errors only, marked with their rank.
    """
    logger = logging.getLogger("sana")
    if not logger.handlers:
        prefix = "" if distributed.is_main() else f"[rank {distributed.rank()}] "
        handler = logging.StreamHandler()
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        )
        logger.addHandler(handler)
    logger.setLevel(
        level if distributed.is_main() else max(logging.WARNING, logging.getLevelNamesMapping()[level])
    )


def hush_imports() -> None:
    """Let the `NOISY` libraries speak of errors only; before they are imported."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def first_line(error: BaseException) -> str:
    """What an error says first; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
