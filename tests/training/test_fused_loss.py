"""The loss that never stores its logits, against PyTorch's in float64; on the CPU through Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from modeling_rebased.training import fused_loss


pytest.importorskip("triton")


def reference(hidden, weight, target):
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    loss = F.cross_entropy(h @ w.T, target)
    (3 * loss).backward()
    return loss, h.grad, w.grad


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize(("n", "v", "d"), [(300, 200, 16), (128, 256, 64), (5, 130, 32), (2100, 128, 16)])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float16, 2e-2)])
def test_loss_and_gradients(n, v, d, dtype, bar):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(n + v)
    hidden = torch.randn(n, d, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator).to(device, dtype).requires_grad_()
    target = torch.randint(v, (n,), generator=generator).to(device)
    loss = fused_loss._LinearCrossEntropy.apply(hidden, weight, target, dtype)
    (3 * loss).backward()
    expected = reference(hidden, weight, target)
    assert relative(loss.detach(), expected[0].detach()) < bar
    assert relative(hidden.grad, expected[1]) < bar
    assert relative(weight.grad, expected[2]) < bar


def test_without_a_gpu_it_is_pytorchs():
    hidden = torch.randn(6, 24, requires_grad=True)
    weight, target = torch.randn(10, 24), torch.randint(10, (6,))
    loss = fused_loss.linear_cross_entropy(hidden, weight, target)
    assert torch.equal(loss, F.cross_entropy(hidden @ weight.T, target))


@pytest.mark.gpu
def test_on_a_gpu_under_autocast():
    hidden = torch.randn(5000, 64, device="cuda", requires_grad=True)
    weight = torch.randn(8192, 64, device="cuda", requires_grad=True)
    target = torch.randint(8192, (5000,), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        loss = fused_loss.linear_cross_entropy(hidden, weight, target)
    assert loss.grad_fn.name().startswith("_LinearCrossEntropy")
    (3 * loss).backward()
    expected = reference(hidden, weight, target)
    assert relative(loss.detach(), expected[0].detach()) < 2e-2
    assert relative(hidden.grad, expected[1]) < 2e-2
    assert relative(weight.grad, expected[2]) < 2e-2
