"""The decay of linear attention, in the operator of both backends, against the definition in float64."""

import itertools

import pytest
import torch

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM, rebased_attention
from modeling_rebased.attention_rebased import rebased_attention_decode
from modeling_rebased.configuration_rebased import n_features
from modeling_rebased.eager_rebased import feature_map, naive_rebased_attention
from modeling_rebased.triton_decay_rebased import decay_gradient


BACKENDS = ["eager", "triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed_and_device():
    """All tensors of a test are made on the GPU where there is one: Triton's kernels run there, not interpreted."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def make_inputs(batch=2, length=150, q_heads=4, kv_heads=2, feature_dim=8, head_dim=6, dtype=torch.float32):
    """Return q, k, v and a decay: one head hardly forgets, another within a few tokens, with a few hard cuts."""
    q = torch.randn(batch, length, q_heads, feature_dim, dtype=dtype)
    k = torch.randn(batch, length, kv_heads, feature_dim, dtype=dtype)
    v = torch.randn(batch, length, kv_heads, head_dim, dtype=dtype)
    half_life = torch.logspace(0, 2.5, kv_heads)
    log_decay = -torch.rand(batch, length, kv_heads) / half_life
    log_decay[torch.rand(log_decay.shape) < 0.01] = -30.0
    return q, k, v, log_decay


def error(actual, expected):
    """Relative Frobenius error; NaN never passes."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


def recurrence(q, k, v, log_decay, state):
    """The rule token by token in float64: decay the state, add the token, read. No cumulative sum is involved."""
    q, k, v, log_decay, state = (x.double() for x in (q, k, v, log_decay, state))
    coefficients, groups, outputs = (0.0, 0.0, 1.0), q.shape[2] // k.shape[2], []
    for t in range(q.shape[1]):
        values = torch.cat([v[:, t], torch.ones_like(v[:, t, :, :1])], -1)
        state = state * log_decay[:, t, :, None, None].exp()
        state = state + feature_map(k[:, t], coefficients)[..., None] * values[:, :, None]
        read = feature_map(q[:, t] * q.shape[3] ** -0.5, coefficients)[:, :, None] @ state.repeat_interleave(groups, 1)
        outputs.append(read[:, :, 0, :-1] / (read[:, :, 0, -1:] + 1e-12))
    return torch.stack(outputs, 1), state


def make_state(batch=2, kv_heads=2, feature_dim=8, head_dim=6):
    """Return the state after 20 tokens."""
    features = feature_map(torch.randn(batch, kv_heads, 20, feature_dim), (0.0, 0.0, 1.0))
    values = torch.randn(batch, kv_heads, 20, head_dim)
    return features.transpose(-1, -2) @ torch.cat([values, torch.ones_like(values[..., :1])], -1)


# The kernels have segments of 64 tokens here, in tiles of 32. States of F > 16 are another path in them.
@pytest.mark.parametrize(
    ("batch", "length", "feature_dim", "head_dim", "heads", "backend"),
    [
        (2, 1, 8, 6, (2, 2), "eager"),
        (2, 63, 5, 10, (4, 2), "eager"),
        (2, 300, 16, 21, (2, 1), "eager"),
        (1, 1, 8, 6, (1, 1), "triton"),
        (2, 63, 5, 10, (2, 1), "triton"),
        (1, 200, 16, 21, (1, 1), "triton"),
        (1, 140, 20, 5, (1, 1), "triton"),
    ],
)
def test_forward_and_backward(batch, length, feature_dim, head_dim, heads, backend):
    inputs = make_inputs(batch, length, *heads, feature_dim, head_dim)
    mask = torch.rand(batch, length) > 0.2
    mask[:, 0] = True
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o, _ = rebased_attention(*inputs[:3], log_decay=inputs[3], attention_mask=mask, backend=backend)
    expected = naive_rebased_attention(*exact[:3], log_decay=exact[3], attention_mask=mask)
    assert error(o, expected) < 1e-5
    grad = torch.randn_like(o)
    o.backward(grad)
    expected.backward(grad.double())
    if length == 1:  # the weight of a single key cancels: only the gradient by the value is not 0
        assert error(inputs[2].grad, exact[2].grad) < 1e-5
        return
    for actual, reference in zip(inputs, exact):
        assert error(actual.grad, reference.grad) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_definition_is_the_recurrence(backend):
    """States in and out, with their gradients and that of the decay, against autograd of the rule itself."""
    q, k, v, log_decay = make_inputs(1, 140, 2, 1)
    state = make_state(1, 1)
    inputs = [x.requires_grad_() for x in (q, k, v, log_decay, state)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o, final = rebased_attention(
        *inputs[:3], log_decay=inputs[3], initial_state=inputs[4], output_final_state=True, backend=backend
    )
    expected, expected_final = recurrence(*exact)
    assert error(o, expected) < 1e-5
    assert error(final, expected_final) < 1e-5
    grads = torch.randn_like(o), torch.randn_like(final) * 0.1
    torch.autograd.backward((o, final), grads)
    torch.autograd.backward((expected, expected_final), [x.double() for x in grads])
    for actual, reference in zip(inputs, exact):
        assert error(actual.grad, reference.grad) < 1e-5


@pytest.mark.parametrize(
    ("backend", "with_states"), [("eager", False), ("eager", True), ("triton", False), ("triton", True)]
)
def test_packed_sequences_equal_single_ones(with_states, backend):
    lengths = [3, 0, 130]
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    q, k, v, log_decay = (x.requires_grad_() for x in make_inputs(1, sum(lengths), 1, 1))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, log_decay)]
    states = make_state(len(lengths), 1) if with_states else None
    o, final = rebased_attention(
        q,
        k,
        v,
        log_decay=log_decay,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        initial_state=states,
        output_final_state=with_states,
        backend=backend,
    )
    zero = torch.zeros(1, 1, n_features(8), 7)
    parts = [
        recurrence(*(x[:, a:b] for x in exact), zero if states is None else states[i : i + 1])
        for i, (a, b) in enumerate(itertools.pairwise(bounds))
        if b > a
    ]
    expected = torch.cat([x[0] for x in parts], 1)
    assert error(o, expected) < 1e-5
    grad = torch.randn_like(o)
    loss, reference = (o * grad).sum(), (expected * grad).sum()
    if with_states:
        expected_final = torch.cat([x[1] for x in parts])
        kept = [i for i, n in enumerate(lengths) if n]
        assert error(final[kept], expected_final) < 1e-5
        torch.testing.assert_close(final[1], states[1])
        weights = torch.randn_like(final)
        loss, reference = loss + (final * weights).sum(), reference + (expected_final * weights[kept]).sum()
    loss.backward()
    reference.backward()
    for actual, other in zip((q, k, v, log_decay), exact):
        assert error(actual.grad, other.grad) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_errors_of_the_gradient_do_not_add_up(packed):
    """Without an initial state, the first decay of a sequence has no gradient: an error of all tokens is known."""
    lengths = [3, 0, 5]
    bounds = torch.tensor([0, 3, 3, 8]) if packed else None
    counts = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths)) if packed else torch.tensor(8)
    query_part, key_part = torch.randn(1, 4, 8), torch.randn(1, 2, 8)
    final, grad_final = torch.randn(2, 3 if packed else 1, 2, 36, 7)
    for states in ((None, None), (final, grad_final)):
        gradient = decay_gradient(query_part, key_part, bounds, False, *states)
        assert gradient[0, [0, 3] if packed else 0].abs().max() < 1e-5
        wrong = decay_gradient(query_part + 10 / counts, key_part, bounds, False, *states)
        torch.testing.assert_close(wrong, gradient, atol=1e-5, rtol=1e-5)
        # With one, nothing is known.
        known, wrong = (decay_gradient(x, key_part, bounds, True, *states) for x in (query_part, query_part + 1))
        left = torch.tensor([3, 2, 1, 5, 4, 3, 2, 1] if packed else range(8, 0, -1))
        torch.testing.assert_close(wrong - known, 2.0 * left[None, :, None].expand(1, 8, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_slots", [False, True])
def test_decoding_continues(with_slots, backend):
    """Tokens one by one, with a row of padding and with slots, against the whole."""
    q, k, v, log_decay = make_inputs(length=4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2] = False
    expected = naive_rebased_attention(q.double(), k.double(), v.double(), log_decay=log_decay, attention_mask=mask)
    state = torch.zeros(2, 2, n_features(8), 7)
    slots = None
    if with_slots:
        state, slots = torch.randn(4, 2, n_features(8), 7), torch.tensor([2, 0])
        state[slots] = 0.0
        others = state[[1, 3]]
    for t in range(4):
        step = slice(t, t + 1)
        part = [x[:, step] for x in (q, k, v)]
        o = rebased_attention_decode(
            *part,
            state,
            log_decay=log_decay[:, step],
            attention_mask=mask[:, step],
            state_indices=slots,
            backend=backend,
        )
        rows = mask[:, t]
        assert error(o[rows], expected[rows, step]) < 1e-5
    if with_slots:
        assert torch.equal(state[[1, 3]], others)
        before = state.clone()
        part = [x[:, :1] for x in (q, k, v)]
        nobody = torch.tensor([-1, -1])
        o = rebased_attention_decode(*part, state, log_decay=log_decay[:, :1], state_indices=nobody, backend=backend)
        assert torch.equal(state, before)
        assert not o.any()


@pytest.mark.parametrize(
    ("backend", "dtype"), [("eager", torch.bfloat16), ("eager", torch.float16), ("triton", torch.bfloat16)]
)
def test_half_precision(backend, dtype):
    inputs = [x.requires_grad_() for x in make_inputs(1, 140, 2, 1, dtype=dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o, _ = rebased_attention(*inputs[:3], log_decay=inputs[3], backend=backend)
    expected = naive_rebased_attention(*exact[:3], log_decay=exact[3])
    assert o.dtype == dtype
    assert error(o, expected) < 5e-3
    grad = torch.randn_like(o)
    o.backward(grad)
    expected.backward(grad.double())
    for actual, reference in zip(inputs, exact):
        assert actual.grad.dtype == actual.dtype
        assert error(actual.grad, reference.grad) < 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_and_absent_decay(backend):
    """A decay of zero is none, and one that forgets all leaves each token its own value, over any length."""
    q, k, v, log_decay = make_inputs(1, 140, 2, 1)
    plain, _ = rebased_attention(q, k, v, backend=backend)
    torch.testing.assert_close(rebased_attention(q, k, v, log_decay=log_decay * 0, backend=backend)[0], plain)
    alone, _ = rebased_attention(q, k, v, log_decay=torch.full_like(log_decay, -1000.0), backend=backend)
    assert error(alone, v.repeat_interleave(2, dim=2)) < 1e-5


def test_the_gate_of_a_layer():
    """The weights of a layer are those without the gate, times the product of the gates of all later tokens."""
    fields = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "feature_dim": 4, "vocab_size": 5}
    config = ReBasedConfig(**fields, layer_types=["linear_attention"], num_hidden_layers=1, decay="gate")
    model = ReBasedForCausalLM(config)
    layer = model.model.layers[0].self_attn
    torch.testing.assert_close(layer.decay_proj.bias.sigmoid(), torch.full((2,), 8192 / 8193))
    torch.nn.init.normal_(layer.decay_proj.bias)
    x = torch.randn(2, 9, 24)
    gates = (x @ layer.decay_proj.weight.T + layer.decay_proj.bias).sigmoid()  # [B, T, H_kv]
    q, k, v = (project(x).unflatten(-1, (heads, -1)) for project, heads in (
        (lambda x: layer.q_norm(layer.q_proj(x)), 4), (lambda x: layer.k_norm(layer.k_proj(x)), 2), (layer.v_proj, 2)
    ))  # fmt: skip
    expected = torch.zeros(2, 9, 4, 6)
    for b, i, h in itertools.product(range(2), range(9), range(4)):
        w = [(q[b, i, h] @ k[b, j, h // 2]) ** 2 * gates[b, j + 1 : i + 1, h // 2].prod() for j in range(i + 1)]
        expected[b, i, h] = sum(w[j] * v[b, j, h // 2] for j in range(i + 1)) / sum(w)
    torch.testing.assert_close(layer(x)[0], layer.o_proj(expected.flatten(2)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_decay": torch.zeros(2, 5, 4)}, r"`log_decay` must be floating point \[batch, tokens, kv heads\]"),
        ({"log_decay": torch.full((2, 5, 2), 0.1)}, "`log_decay` must be finite and at most 0"),
        ({"log_decay": torch.full((2, 5, 2), -torch.inf)}, "`log_decay` must be finite and at most 0"),
        ({"coefficients": (1.0, 1.0, 0.5)}, "`log_decay` needs a kernel of squares alone"),
    ],
)
def test_bad_decays_are_refused(changes, message):
    q, k, v, log_decay = make_inputs(length=5)
    with pytest.raises(ValueError, match=message):
        rebased_attention(q, k, v, **{"log_decay": log_decay, **changes})
