"""Choice of implementation, shared by all operations."""

BACKENDS = ("auto", "torch")


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` names an implementation of the operations."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
