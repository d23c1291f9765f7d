"""The compiled elementwise parts of a layer against the same functions in fp32, uncompiled."""

import pytest
import torch

from parallel import fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("shape", [(4096, 1, 512), (1023, 3, 8, 64), (4096, 16, 512)], ids=str)
def test_rms_norm(shape):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, device="cuda", generator=generator)
    weight = torch.rand(shape[-1], device="cuda", generator=generator)
    compare(lambda a, w: fused.rms_norm(a, w, 1e-6), lambda a, w: fused._rms_norm(a, w, 1e-6), x, weight)


def test_rotate():
    x = torch.randn(1000, 2, 8, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    half = torch.arange(1000, device="cuda")[:, None] * torch.linspace(0, 1, 32, device="cuda")
    angles = torch.cat((half, half), 1)[:, None, None]
    compare(lambda a: fused.rotate(a, angles), lambda a: fused._rotate(a, angles), x)


@pytest.mark.parametrize("shape", [(2048, 1, 4096), (63, 5, 50), (1024, 16, 4096)], ids=str)
def test_cross_entropy(shape):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = 3 * torch.randn(shape, device="cuda", generator=generator)
    labels = torch.randint(0, shape[-1], shape[:-1], device="cuda", generator=generator)
    compare(
        lambda a: fused.cross_entropy(a, labels),
        lambda a: torch.nn.functional.cross_entropy(a.flatten(0, 1), labels.flatten(), reduction="none").view(
            shape[:-1]
        ),
        logits,
    )


def compare(compiled, plain, *inputs):
    """Output and gradients of bf16 inputs through `compiled` against those of the same values in fp32."""
    half = [x.bfloat16().requires_grad_() for x in inputs]
    full = [x.detach().float().requires_grad_() for x in half]
    out, expected = compiled(*half), plain(*full)
    upstream = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    upstream = upstream.to(out.dtype)
    out.backward(upstream)
    expected.backward(upstream.float())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(half, full, strict=True))]
    for ours, theirs in pairs:
        assert (ours.float() - theirs).norm() <= 6e-3 * theirs.norm()
