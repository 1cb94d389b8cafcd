"""Our attention modules against the published reference layers, tensor by tensor."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffx.config.model import DiffV1Config, DiffV2Config, TransformerConfig
from diffx.models.decoder import ATTENTION
from diffx.models.layers import rope_tables

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
CONFIGS = {"diff_v1": DiffV1Config, "diff_v2": DiffV2Config, "transformer": TransformerConfig}
OURS = {
    "out_proj.weight": "o_proj.weight",
    "subln.weight": "sublayer_norm.weight",
}  # else the names are the same


def run_case(name, dtype, implementation):
    """Run our module on a case; return {tensor: (ours, golden)} for outputs and gradients."""
    case, golden = CASES[name], load_file(GOLDEN / f"{name}.safetensors")
    pairs = 2 if case["arch"] == "diff_v1" else 1  # a config counts the baseline's heads
    config = CONFIGS[case["arch"]](
        hidden_size=case["embed_dim"],
        num_heads=pairs * case["num_heads"],
        num_kv_heads=pairs * case["num_kv_heads"],
        vocab_size=16,
    )
    module = ATTENTION[config.kind](config, case.get("depth", 0)).double()
    params = {
        name.removeprefix("param."): tensor
        for name, tensor in golden.items()
        if name.startswith("param.")
    }
    module.load_state_dict({OURS.get(name, name): tensor for name, tensor in params.items()})
    module = module.to(dtype)
    module.implementation = implementation

    x = golden["x"].to(dtype).requires_grad_()
    tables = [golden[name].to(torch.promote_types(dtype, torch.float32)) for name in ("cos", "sin")]
    out = module(x, *tables)
    out.backward(golden["grad_out"].to(dtype))
    ours = dict(module.named_parameters())
    results = {"out": (out, golden["out"]), "grad_x": (x.grad, golden["grad_x"])}
    results |= {
        f"grad.{name}": (ours[OURS.get(name, name)].grad, golden[f"grad.{name}"]) for name in params
    }
    assert len(results) == 2 + len(ours) == 2 + sum(name.startswith("grad.") for name in golden)
    return results


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-10), (torch.float32, 2e-6), (torch.bfloat16, 1.5e-2)],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", ["blocks", "sdpa"])
def test_golden(name, dtype, rtol, impl):
    for tensor, (ours, golden) in run_case(name, dtype, impl).items():
        # lambda's gradient sums over the whole batch and cancels:
        # inputs rounded to bf16 alone change it by 3e-2
        bound = (
            10 * rtol
            if "lambda_" in tensor and "proj" not in tensor and dtype != torch.float64
            else rtol
        )
        assert ours.shape == golden.shape
        error = (ours.double() - golden).norm() / golden.norm()
        assert error < bound, f"{tensor}: {error:.2e}"


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case["arch"] == "diff_v1"]
)
def test_golden_by_the_fused_kernels(name):
    triton_attention = pytest.importorskip("diffx.ops.triton_attention", exc_type=ImportError)
    for tensor, (ours, golden) in run_case(name, torch.float32, triton_attention).items():
        assert (ours.double() - golden).norm() < 2e-5 * golden.norm(), tensor


@pytest.mark.parametrize("name", CASES)
def test_rope_tables(name):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    length, half = golden["cos"].shape
    for ours, expected in zip(
        rope_tables(torch.arange(length), 2 * half, 10000.0),
        (golden["cos"], golden["sin"]),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=3e-6)
