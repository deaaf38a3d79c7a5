"""Every kernel compiles for an A100 and an H100, without a GPU, at the settings of real shapes, within their limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of shared memory that a program may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
KERNELS = {
    *("linear_attention.state_kernel", "linear_attention.output_kernel"),
    *("linear_attention.query_gradient_kernel", "linear_attention.key_value_gradient_kernel"),
    *("mix_ffn.depthwise_glu_kernel", "mix_ffn.depthwise_gradient_kernel"),
    *("norm_modulate.forward_kernel", "norm_modulate.backward_kernel"),
    *("gate_residual.forward_kernel", "gate_residual.backward_kernel"),
    *("rms_norm.forward_kernel", "rms_norm.backward_kernel"),
}
CASES = [
    pytest.param(90, "bfloat16", "1.6B", id="sm_90-bfloat16-1.6B"),
    *(
        pytest.param(capability, dtype, model, id=f"sm_{capability}-{dtype}-{model}", marks=pytest.mark.slow)
        for capability in SHARED_LIMIT
        for dtype in ("bfloat16", "float16", "float32")
        for model in ("0.6B", "1.6B")
        if (capability, dtype, model) != (90, "bfloat16", "1.6B")
    ),
]


def compiled(capability, dtype, model, cache):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    result = subprocess.run(
        [sys.executable, script, str(capability), dtype, model],
        cwd=script.parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(script.parents[2])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(("capability", "dtype", "model"), CASES)
def test_no_spills_and_shared_memory_fits(capability, dtype, model, tmp_path):
    rows = compiled(capability, dtype, model, tmp_path)
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["stack"] == 0, f"registers spill: {row}"
        assert row["shared"] <= SHARED_LIMIT[capability], f"too much shared memory: {row}"
        assert row["registers"] * row["warps"] * 32 <= 65536, f"too many registers: {row}"
