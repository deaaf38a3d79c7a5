"""The fused operations of the transformer block, one folder per operation.

Each folder's `__init__` holds the public function and its equation; `reference.py` is the definition in plain
PyTorch: differentiable, and the path that every device without a kernel takes.
"""
