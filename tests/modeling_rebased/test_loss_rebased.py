"""The loss without logits, in Triton's interpreter where there is no GPU, against the library's loss in float64."""

import re
import types

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_rebased import ReBasedForCausalLM, loss_rebased
from modeling_rebased.loss_rebased import linear_cross_entropy
from tests.modeling_rebased.cases import make_config, make_ids, make_model


pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fused(monkeypatch):
    """The fused loss on this machine's device, in several chunks."""
    monkeypatch.setattr("modeling_rebased.modeling_rebased.can_fuse_loss", lambda *_: True)
    monkeypatch.setattr(loss_rebased, "MAX_CHUNK_BYTES", 13 * 50 * 4)


def relative_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    reference = reference.to(x.device).double()
    return ((x.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients(fused, dtype, bar, num_items):
    torch.manual_seed(0)
    hidden = torch.randn(37, 24, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(50, 24, device=DEVICE).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (37,), device=DEVICE)
    labels[::5] = -100
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = ForCausalLMLoss(exact[0] @ exact[1].T, None, 50, num_items_in_batch=num_items, shift_labels=labels)
    loss = linear_cross_entropy(hidden, weight, labels, num_items_in_batch=num_items)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) < bar
    assert relative_error(hidden.grad, exact[0].grad) < bar
    assert relative_error(weight.grad, exact[1].grad) < bar
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels, num_items_in_batch=num_items) == loss


def test_large_logits_and_labels_outside_the_vocabulary(fused):
    hidden, weight = torch.full((3, 4), 1e4, device=DEVICE), torch.eye(4, device=DEVICE)[:3] * 1e4
    labels = torch.tensor([0, 1, 2], device=DEVICE)
    assert linear_cross_entropy(hidden, weight, labels).isfinite()
    labels[1] = 3
    assert linear_cross_entropy(hidden, weight, labels).isnan()


@pytest.mark.parametrize(
    "options", [{}, {"num_items_in_batch": 11}, {"ignore_index": 7}, {"shift_labels": True}], ids=str
)
def test_the_model_computes_the_same_loss_with_and_without_logits(fused, options):
    model = make_model("paper").to(DEVICE).train()
    ids = make_ids().to(DEVICE)
    labels = ids.clone()
    labels[0, :9] = options.get("ignore_index", -100)
    if "shift_labels" in options:
        options = {"shift_labels": labels.roll(-1, 1)}
    gradients = []
    losses = []
    for skip in (False, True):
        model.zero_grad()
        outputs = model(ids, labels=labels, skip_logits=skip, **options)
        outputs.loss.backward()
        assert (outputs.logits is None) == skip
        losses.append(outputs.loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert relative_error(gradients[1], gradients[0]) < 1e-5


def test_logits_are_left_out_in_training_on_a_gpu_only():
    model = make_model("paper").to(DEVICE)
    ids = make_ids().to(DEVICE)
    assert model.eval()(ids, labels=ids).logits is not None
    assert model.train()(ids).logits is not None
    assert (model(ids, labels=ids).logits is None) == (DEVICE == "cuda")
    assert model(ids, labels=ids, skip_logits=False).logits is not None


def test_why_logits_cannot_be_left_out(fused, monkeypatch):
    model = make_model("paper").to(DEVICE).train()
    ids = make_ids().to(DEVICE)

    def refused(why):
        return pytest.raises(ValueError, match=f"^{re.escape(f'`skip_logits=True` is not possible: {why}.')} Trainer")

    with refused("there are no `labels`"):
        model(ids, skip_logits=True)
    for kept in (3, torch.tensor([0])):
        with refused("`logits_to_keep` asks for some of the logits"):
            model(ids, labels=ids, logits_to_keep=kept, skip_logits=True)
    for hook in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.lm_head, hook)(lambda *_: None)
        with refused("`lm_head` is wrapped, adapted or hooked"):
            model(ids, labels=ids, skip_logits=True)
        handle.remove()
    model.lm_head._hf_hook = None  # as accelerate leaves one
    with refused("`lm_head` is wrapped, adapted or hooked"):
        model(ids, labels=ids, skip_logits=True)
    del model.lm_head._hf_hook
    model.loss_function = lambda **kwargs: 0.0
    with refused("the model's loss function is not ForCausalLMLoss"):
        model(ids, labels=ids, skip_logits=True)
    monkeypatch.setattr("modeling_rebased.modeling_rebased.can_fuse_loss", lambda *_: False)
    with refused("it takes a GPU, Triton and an output layer that is not sharded"):
        ReBasedForCausalLM(make_config("paper"))(make_ids(), labels=make_ids(), skip_logits=True)


def test_what_the_fused_loss_takes(monkeypatch):
    """A GPU's hidden states, a plain weight and Triton."""
    weight = torch.nn.Parameter(torch.zeros(2, 2))

    class Sharded(torch.Tensor):
        pass

    sharded = torch.zeros(2, 2).as_subclass(Sharded)
    on_gpu, on_cpu = (types.SimpleNamespace(is_cuda=is_cuda) for is_cuda in (True, False))
    can = loss_rebased.can_fuse_loss
    assert can(on_gpu, weight) and can(on_gpu, weight.data)
    assert not can(on_cpu, weight) and not can(on_gpu, sharded)
    monkeypatch.setattr(loss_rebased, "triton", None)
    assert not can(on_gpu, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_large_vocabulary_on_a_gpu(compiled):
    """Against the plain loss of the same model, under autocast, as Trainer trains in mixed precision."""
    torch.manual_seed(0)
    model = ReBasedForCausalLM(make_config("paper", vocab_size=50304, hidden_size=64)).cuda().train()
    ids = torch.randint(0, 50304, (8, 1024), device="cuda")
    call = torch.compile(model) if compiled else model
    gradients, losses = [], []
    for run, skip in ((model, False), (call, True)):
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = run(ids, labels=ids, skip_logits=skip).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert relative_error(gradients[1], gradients[0]) < 2e-2
