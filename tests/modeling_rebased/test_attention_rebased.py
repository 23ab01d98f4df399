"""The operator against its definition in float64."""

import itertools
import math
import re
import types

import pytest
import torch
from torch._subclasses import FakeTensorMode

from modeling_rebased import attention_rebased as operator
from modeling_rebased import eager_rebased, rebased_attention
from modeling_rebased.attention_rebased import rebased_attention_decode
from modeling_rebased.configuration_rebased import n_features
from modeling_rebased.eager_rebased import feature_map, naive_rebased_attention
from modeling_rebased.triton_rebased import triton_unavailable_reason


REBASED, BASED = (0.0, 0.0, 1.0), (1.0, 1.0, 0.5)


def make_qkv(batch=2, length=100, q_heads=4, kv_heads=2, feature_dim=16, head_dim=20, dtype=torch.float32):
    return (
        torch.randn(batch, length, q_heads, feature_dim, dtype=dtype),
        torch.randn(batch, length, kv_heads, feature_dim, dtype=dtype),
        torch.randn(batch, length, kv_heads, head_dim, dtype=dtype),
    )


def oracle(q, k, v, **options):
    return naive_rebased_attention(q.double(), k.double(), v.double(), **options)


def error(actual, expected):
    """Relative Frobenius error; NaN never passes."""
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("coefficients", [REBASED, BASED, (0.0, 0.0, 0.3), (1.0, 0.0, 2.0)])
@pytest.mark.parametrize("feature_dim", [1, 5, 16])
def test_features_have_the_kernel_as_inner_product(coefficients, feature_dim):
    x, y = torch.randn(7, feature_dim, dtype=torch.double), torch.randn(7, feature_dim, dtype=torch.double)
    present = tuple(float(c != 0) for c in coefficients)
    phi_x, phi_y = feature_map(x, coefficients), feature_map(y, coefficients)
    assert phi_x.shape[-1] == n_features(feature_dim, coefficients)
    s = (x * y).sum(-1)
    torch.testing.assert_close((phi_x * phi_y).sum(-1), present[0] + present[1] * s + present[2] * s**2)


def test_feature_layout():
    x = torch.tensor([2.0, 3.0, 5.0])
    root = 2**0.5
    expected = torch.tensor([4.0, 9, 25, 6 * root, 10 * root, 15 * root, 2, 3, 5, 1])
    torch.testing.assert_close(feature_map(x, BASED), expected)


def test_features_do_not_depend_on_who_asked_first():
    """What is kept between calls is made for training, whoever makes it, and never by a call that is traced."""
    x = torch.randn(3, 5, dtype=torch.float64)
    eager_rebased._kept_selectors.cache_clear()
    with FakeTensorMode() as mode:
        feature_map(mode.from_tensor(x), REBASED)
    expected = torch.func.vmap(lambda row: feature_map(row, REBASED))(x)
    assert eager_rebased._kept_selectors.cache_info().currsize == 0
    with torch.inference_mode():
        assert torch.equal(feature_map(x, REBASED), expected)
    assert torch.autograd.gradcheck(lambda x: feature_map(x, REBASED), x.requires_grad_())
    assert eager_rebased._kept_selectors.cache_info().currsize == 1


@pytest.mark.parametrize("coefficients", [REBASED, BASED])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize(
    ("length", "feature_dim", "head_dim"),
    [(1, 16, 64), (2, 1, 1), (63, 5, 10), (300, 16, 21), (513, 16, 42), (700, 3, 5), (560, 33, 7)],
)
def test_forward_and_backward(length, feature_dim, head_dim, heads, coefficients):
    q, k, v = make_qkv(2, length, *heads, feature_dim, head_dim)
    mask = torch.rand(2, length) > 0.2
    mask[:, 0] = True
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    o, state = rebased_attention(*inputs, coefficients=coefficients, attention_mask=mask)
    expected = naive_rebased_attention(*exact, coefficients=coefficients, attention_mask=mask)
    assert state is None
    assert o.dtype == torch.float32
    assert error(o, expected) < 1e-5
    grad = torch.randn_like(o)
    o.backward(grad)
    expected.backward(grad.double())
    for actual, reference in zip(inputs, exact):
        if length <= 2:
            # One key's weight cancels where it is all there is: the exact gradient of q and k is then zero, and what
            # is left is rounding of terms as large as grad * v / s.
            assert (actual.grad - reference.grad).norm() < 1e-4 * (grad.norm() + reference.grad.norm())
        else:
            assert error(actual.grad, reference.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    q, k, v = (x.requires_grad_() for x in make_qkv(length=500, dtype=dtype))
    o, _ = rebased_attention(q, k, v)
    assert o.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = naive_rebased_attention(*exact)
    assert error(o, expected) < 5e-3
    grad = torch.randn_like(o)
    o.backward(grad)
    expected.backward(grad.double())
    for actual, reference in zip((q, k, v), exact):
        assert error(actual.grad, reference.grad) < 1e-2


@pytest.mark.parametrize("coefficients", [REBASED, BASED])
@pytest.mark.parametrize("sizes", [(200,), (1,) * 5 + (195,), (64, 64, 72), (130, 1, 1, 68), (7, 193)])
def test_pieces_equal_the_whole(sizes, coefficients):
    q, k, v = make_qkv(length=200)
    mask = torch.rand(2, 200) > 0.2
    expected = oracle(q, k, v, coefficients=coefficients, attention_mask=mask)
    outputs, state, start = [], None, 0
    for size in sizes:
        piece = slice(start, start + size)
        o, state = rebased_attention(
            q[:, piece],
            k[:, piece],
            v[:, piece],
            coefficients=coefficients,
            attention_mask=mask[:, piece],
            initial_state=state,
            output_final_state=True,
        )
        outputs.append(o)
        start += size
    assert state.dtype == torch.float32
    assert state.shape == (2, 2, n_features(16, coefficients), 21)
    # (q.k)**2 near zero is a difference of large products in the state's form.
    assert error(torch.cat(outputs, 1), expected) < 2e-5


@pytest.mark.parametrize("coefficients", [REBASED, BASED])
def test_one_token_at_a_time(coefficients):
    q, k, v = make_qkv(length=40)
    mask = torch.rand(2, 40) > 0.3
    expected, final = rebased_attention(
        q, k, v, coefficients=coefficients, attention_mask=mask, output_final_state=True
    )
    state = torch.zeros_like(final)
    outputs = [
        rebased_attention_decode(
            *(x[:, i : i + 1] for x in (q, k, v)),
            state,
            coefficients=coefficients,
            attention_mask=mask[:, i : i + 1],
        )
        for i in range(40)
    ]
    # (q.k)**2 near zero is a difference of large products in the state's form: element by element it is less exact.
    assert error(torch.cat(outputs, 1), expected.double()) < 2e-5
    assert error(state, final.double()) < 1e-6


@pytest.mark.parametrize("coefficients", [REBASED, BASED, (0.5, 0.0, 1.0), (0.25, 1.0, 1.0)])
@pytest.mark.parametrize("start", [1, 20])
@pytest.mark.parametrize(
    ("dtype", "q_size", "k_size"),
    [
        (torch.float32, 3e9, 3e9),
        (torch.float32, 1e18, 1e15),  # NaN where the query is not scaled
        (torch.float32, 1e19, 1e-6),
        (torch.bfloat16, 1e18, 1e15),
        (torch.float16, 6e4, 6e4),
        (torch.float64, 1e100, 1e75),
    ],
)
def test_one_token_at_a_time_of_large_inputs(dtype, q_size, k_size, start, coefficients):
    """Decoding on from a state of large keys is as exact as the whole forward, whose (q.k)^2 the dtype cannot hold."""
    q, k, v = make_qkv(length=30, dtype=torch.float64)
    q, k, v = (q / q.abs().max() * q_size).to(dtype), (k / k.abs().max() * k_size).to(dtype), v.to(dtype)
    # The weights keep their proportions in these units, and the oracle its float64.
    unit = float(q_size * k_size)
    c0, c1, c2 = coefficients
    expected = naive_rebased_attention(
        q.double() / q_size, k.double() / k_size, v.double(), coefficients=(c0 / unit / unit, c1 / unit, c2)
    )
    bar = 1e-2 if dtype.itemsize == 2 else 2e-5
    o, state = rebased_attention(
        q[:, :start], k[:, :start], v[:, :start], coefficients=coefficients, output_final_state=True
    )
    outputs = [o]
    for i in range(start, 30):
        token = (x[:, i : i + 1] for x in (q, k, v))
        outputs.append(rebased_attention_decode(*token, state, coefficients=coefficients))
    assert error(torch.cat(outputs, 1), expected) < bar
    assert error(rebased_attention(q, k, v, coefficients=coefficients)[0], expected) < bar


def test_gradients_of_states():
    q, k, v = (x.double().requires_grad_() for x in make_qkv(1, 70, 2, 1, 3, 2))
    initial = torch.rand(1, 1, 6, 3, dtype=torch.double, requires_grad=True)

    def function(q, k, v, initial):
        return rebased_attention(q, k, v, initial_state=initial, output_final_state=True)

    assert torch.autograd.gradcheck(function, (q, k, v, initial), fast_mode=True)


@pytest.mark.parametrize("with_state", [False, True])
def test_packed_sequences_equal_separate_ones(with_state):
    lengths = [1, 7, 100, 64, 3, 350, 60]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = make_qkv(1, int(bounds[-1]))
    expected = torch.cat([oracle(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(bounds)], 1)
    o, state = rebased_attention(q, k, v, cu_seqlens=bounds.int(), output_final_state=with_state)
    assert error(o, expected) < 1e-5
    if with_state:
        last = slice(int(bounds[-2]), None)
        _, alone = rebased_attention(q[:, last], k[:, last], v[:, last], output_final_state=True)
        torch.testing.assert_close(state[-1:], alone, rtol=1e-5, atol=1e-4)


def test_packed_sequences_continue_from_their_states():
    """Three sequences in two calls, one of which holds no token of the second and one none of the third."""
    q, k, v = make_qkv(1, 150)
    whole = [(0, 60), (60, 90), (90, 150)]
    expected = torch.cat([oracle(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in whole], 1)
    first = [range(25), range(60, 60), range(90, 150)]
    second = [range(25, 60), range(60, 90), range(150, 150)]
    output, state = torch.zeros(1, 150, 4, 20), None
    for parts in (first, second):
        tokens = [token for part in parts for token in part]
        bounds = torch.tensor([0, *itertools.accumulate(len(part) for part in parts)])
        o, state = rebased_attention(
            *(x[:, tokens] for x in (q, k, v)), cu_seqlens=bounds, initial_state=state, output_final_state=True
        )
        output[:, tokens] = o
    assert error(output, expected) < 1e-5
    for (a, b), row in zip(whole, state):
        phi = feature_map(k[0, a:b].double(), REBASED)  # [T, H, features]
        ones = torch.ones(b - a, 2, 1, dtype=torch.double)
        assert error(row, torch.einsum("thf,thd->hfd", phi, torch.cat([v[0, a:b].double(), ones], -1))) < 1e-5


def test_segments_by_number_equal_segments_by_bounds():
    q, k, v = make_qkv(1, 300)
    bounds = torch.tensor([0, 1, 1, 130, 300])
    numbers = torch.tensor([[0] + [2] * 129 + [7] * 170])
    by_bounds, _ = rebased_attention(q, k, v, cu_seqlens=bounds)
    by_number, _ = rebased_attention(q, k, v, segment_ids=numbers)
    assert torch.equal(by_number, by_bounds)
    twice = [torch.cat([x, x.flip(1)]) for x in (q, k, v)]
    rows, _ = rebased_attention(*twice, segment_ids=torch.cat([numbers, 7 - numbers.flip(1)]))
    assert error(rows[:1], by_bounds.double()) < 1e-6
    expected = [oracle(*(x.flip(1)[:, a:b] for x in (q, k, v))) for a, b in ((0, 170), (170, 299), (299, 300))]
    assert error(rows[1:], torch.cat(expected, 1)) < 1e-5


def test_long_sequence_in_pieces_does_not_drift():
    """1,000,000 tokens, fp32 against float64."""
    length, piece = 1_000_000, 250_000
    q, k, v = (x[0].transpose(0, 1) for x in make_qkv(1, length, 1, 1, 4, 2))
    state = None
    for start in range(0, length, piece):
        part = [x[None, :, start : start + piece].transpose(1, 2) for x in (q, k, v)]
        o, state = rebased_attention(*part, initial_state=state, output_final_state=True)
    scale = 4**-0.5
    s = torch.einsum("f,tf->t", q[0, -1].double() * scale, k[0].double())
    expected = (s.square() @ v[0].double()) / s.square().sum()
    assert error(o[0, -1, 0], expected) < 1e-5 * max(1.0, 1e-2 / expected.norm().item())
    phi = feature_map(k[0].double(), REBASED)
    exact = phi.T @ torch.cat([v[0].double(), torch.ones(length, 1, dtype=torch.double)], 1)
    assert error(state[0, 0], exact) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 1e4), (torch.float32, 1e15), (torch.bfloat16, 1e18), (torch.float32, 1e-15)]
)
def test_extreme_inputs_stay_finite(dtype, size):
    q, k, v = make_qkv(1, 300, 2, 2, 8, 8)
    q, k, v = [(q / 4).to(dtype), (k / k.norm(dim=-1, keepdim=True) * size).to(dtype), (v * 100).to(dtype)]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o, _ = rebased_attention(*inputs)
    assert error(o, oracle(q, k, v)) < (1e-5 if dtype == torch.float32 else 5e-3)
    o.float().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("coefficients", [REBASED, BASED])
def test_nothing_to_attend_to_is_zero(coefficients):
    q, k, v = make_qkv(length=10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, :4] = False
    o, _ = rebased_attention(q, k, v, coefficients=coefficients, attention_mask=mask)
    assert (o[0, :4] == 0).all()
    assert o.isfinite().all()


def test_sums_stay_fp32_under_autocast():
    q, k, v = make_qkv(length=300)
    with torch.autocast("cpu", torch.bfloat16):
        o, _ = rebased_attention(q, k, v)
    assert error(o, oracle(q, k, v)) < 1e-5


SIZES = {"q": torch.zeros(2, 9, 4, 16), "k": torch.zeros(2, 9, 2, 16), "v": torch.zeros(2, 9, 2, 20)}
NUMBERS = torch.zeros(2, 9, dtype=torch.int64)
STATE_SIZE = "[batch or sequences, kv heads, features, head_dim + 1] = (2, 2, 136, 21), but its shape is"
BOUNDS = "`cu_seqlens` must be a vector of at least two int32 or int64, but it is"


def wide(size):
    return {name: torch.zeros(2, 9, 2, size) for name in "qk"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (
                {name: torch.zeros(2, 4, 16)},
                f"`{name}` must be [batch, tokens, heads, dim], but its shape is (2, 4, 16).",
            )
            for name in "qkv"
        ),
        ({"k": SIZES["k"].long()}, "`k` must be floating point, but its dtype is torch.int64."),
        *(
            (
                {name: SIZES[name].half()},
                "`q`, `k` and `v` must have one dtype, but they have "
                + "{}, {} and {}.".format(*("torch.float16" if x == name else "torch.float32" for x in "qkv")),
            )
            for name in "qkv"
        ),
        *(
            (
                {name: torch.zeros(size)},
                "`q`, `k` and `v` must agree in batch and tokens, but they are "
                + "{}, {} and {}.".format(*(size[:2] if x == name else (2, 9) for x in "qkv")),
            )
            for name, size in (("q", (2, 8, 4, 16)), ("k", (3, 9, 2, 16)), ("v", (2, 8, 2, 20)))
        ),
        ({name: x[:, :0] for name, x in SIZES.items()}, "`q` must have at least one token, but it has 0."),
        ({"q": torch.zeros(2, 9, 4, 8)}, "`q` and `k` must agree in size, but they have 8 and 16."),
        ({"v": torch.zeros(2, 9, 4, 20)}, "`k` and `v` must have the same number of heads, but they have 2 and 4."),
        (
            {"q": torch.zeros(2, 9, 3, 16)},
            "The heads of `q` must be a multiple of those of `k`, but they are 3 and 2.",
        ),
        *((wide(n), f"The last dimension of `q` and `k` must be 1 to 128, but it is {n}.") for n in (0, 129)),
        *(
            ({"v": torch.zeros(2, 9, 2, n)}, f"The last dimension of `v` must be 1 to 256, but it is {n}.")
            for n in (0, 257)
        ),
        *(
            ({"coefficients": c}, f"`coefficients` must be (c0, c1, c2), not all zero, but got {c}.")
            for c in ((0.0, 0.0, 0.0), (1.0, 1.0), (0.0, 0.0, 1.0, 1.0))
        ),
        *(({"eps": eps}, f"`eps` must be positive, but got {eps}.") for eps in (0.0, -1e-3, math.nan)),
        *(
            (
                {"attention_mask": torch.ones(size)},
                f"`attention_mask` must be [batch, tokens] = (2, 9), but its shape is {size}.",
            )
            for size in ((2, 8), (1, 9), (2, 9, 1))
        ),
        (
            {"cu_seqlens": torch.tensor([0, 9])},
            "`cu_seqlens` packs sequences into a batch of 1, but the batch of `q` is 2.",
        ),
        ({"initial_state": torch.zeros(2, 2, 10, 21)}, f"`initial_state` must be {STATE_SIZE} (2, 2, 10, 21)."),
        ({"backend": "cuda"}, "`backend` must be one of ('auto', 'eager', 'triton'), but got 'cuda'."),
        *(
            (
                {"segment_ids": ids},
                f"`segment_ids` must be int64 [batch, tokens] = (2, 9), but it is {ids.dtype} {tuple(ids.shape)}.",
            )
            for ids in (NUMBERS[:, :8], NUMBERS.int())
        ),
        (
            {"segment_ids": torch.arange(9).flip(0).expand(2, 9)},
            "`segment_ids` must never decrease along a row, but they do.",
        ),
        *(
            (
                {"segment_ids": NUMBERS, **other},
                "`segment_ids` goes with none of `cu_seqlens`, `initial_state` and `output_final_state`.",
            )
            for other in ({"output_final_state": True}, {"initial_state": torch.zeros(2, 2, 136, 21)})
        ),
        (
            {"segment_ids": NUMBERS, "backend": "triton"},
            "`segment_ids` needs the eager backend: give `backend='triton'` `cu_seqlens`.",
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rebased_attention(**{**SIZES, **change})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        *(
            (bounds, f"`cu_seqlens` must rise from 0 to the number of tokens, 9, but it is {bounds.tolist()}.")
            for bounds in map(torch.tensor, ([0, 5, 8], [1, 9], [0, 7, 5, 9]))
        ),
        (torch.tensor([0]), f"{BOUNDS} (1,) of torch.int64."),
        (torch.tensor([[0, 9]]), f"{BOUNDS} (1, 2) of torch.int64."),
        (torch.tensor([0.0, 9.0]), f"{BOUNDS} (2,) of torch.float32."),
    ],
)
def test_bad_bounds_are_named(bounds, message):
    row = {name: x[:1] for name, x in SIZES.items()}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rebased_attention(**row, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="`segment_ids` goes with none of"):
        rebased_attention(**row, cu_seqlens=torch.tensor([0, 9]), segment_ids=NUMBERS[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(2, 2, 4, 16)},
            "`q`, `k` and `v` must agree in batch and tokens, but they are (2, 2), (2, 1) and (2, 1).",
        ),
        ({name: x[:, :2] for name, x in SIZES.items()}, "`q` must hold one token, but it holds 2."),
        ({"state": torch.zeros(2, 2, 136, 20)}, f"`state` must be {STATE_SIZE} (2, 2, 136, 20)."),
        (
            {"state": torch.zeros(2, 2, 136, 21, dtype=torch.bfloat16)},
            "`state` must be float32 or float64, but its dtype is torch.bfloat16.",
        ),
        *(({"eps": eps}, f"`eps` must be positive, but got {eps}.") for eps in (0.0, math.nan)),
        (
            {"attention_mask": torch.ones(2, 2)},
            "`attention_mask` must be [batch, tokens] = (2, 1), but its shape is (2, 2).",
        ),
        *(
            (
                {"state_indices": torch.tensor(x)},
                f"`state_indices` must be int32 or int64 [batch] = (2,), but it is ({len(x)},) of "
                f"{torch.tensor(x).dtype}.",
            )
            for x in ([0], [0.0, 1.0])
        ),
        *(
            (
                {"state_indices": torch.tensor(x)},
                f"`state_indices` must be different slots below 2, or negative, but they are {x}.",
            )
            for x in ([0, 2], [1, 1], [-1, 3])
        ),
    ],
)
def test_bad_arguments_of_one_token_are_named(change, message):
    one = {name: x[:, :1] for name, x in SIZES.items()}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rebased_attention_decode(**{**one, "state": torch.zeros(2, 2, 136, 21), **change})


def test_sizes_at_the_limits():
    """The largest and the smallest; a mask of integers; bounds in int32; slots of padding, twice."""
    for size, dim in ((128, 256), (1, 1)):
        q, k, v = make_qkv(1, 3, 2, 2, size, dim)
        o, state = rebased_attention(
            q, k, v, eps=1e-20, attention_mask=torch.ones(1, 3).int(), output_final_state=True
        )
        assert error(o, oracle(q, k, v)) < 1e-5
        slots = torch.cat([state, state])
        rows = [torch.cat([x[:, :1]] * 3) for x in (q, k, v)]
        decoded = rebased_attention_decode(*rows, slots, state_indices=torch.tensor([-1, 1, -1], dtype=torch.int32))
        assert not decoded[::2].any() and torch.equal(slots[:1], state)
        expected = rebased_attention_decode(q[:, :1], k[:, :1], v[:, :1], state)
        assert error(decoded[1:2], expected.double()) < 1e-6 and error(slots[1:], state.double()) < 1e-6


def test_triton_that_cannot_run_says_why():
    q, k, v = make_qkv(dtype=torch.double)
    reason = triton_unavailable_reason(q.device, q.dtype, 16, 20)
    message = f"`backend='triton'` cannot run here: {reason}. Use backend='auto' or 'eager'."
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        rebased_attention(q, k, v, backend="triton")


@pytest.mark.parametrize("coefficients", [REBASED, BASED])
def test_one_token_by_slot(coefficients):
    """Rows read and change their own slots of a larger pool; a row without one gets 0."""
    q, k, v = make_qkv(3, 21)
    scale, mask = 0.3, torch.tensor([[True], [True], [False]])
    _, states = rebased_attention(q[:, :20], k[:, :20], v[:, :20], coefficients=coefficients, output_final_state=True)
    pool = torch.randn(6, *states.shape[1:])
    pool[[4, 0]] = states[[0, 2]]
    before, last = pool.clone(), [x[:, 20:] for x in (q, k, v)]
    options = {"coefficients": coefficients, "scale": scale, "attention_mask": mask}
    o = rebased_attention_decode(*last, pool, state_indices=torch.tensor([4, -1, 0]), **options)
    expected = rebased_attention_decode(*last, states, **options)
    exact = oracle(q, k, v, coefficients=coefficients, scale=scale)
    assert error(o[:1], exact[:1, 20:]) < 2e-5 and error(o[2:], expected[2:].double()) < 1e-6
    assert not o[1].any()
    assert error(pool[4], states[0].double()) < 1e-6 and torch.equal(pool[0], before[0])
    assert torch.equal(pool[[1, 2, 3, 5]], before[[1, 2, 3, 5]])
    with pytest.raises(ValueError, match=r"different slots below 6, or negative, but they are \[0, 0, 1\]"):
        rebased_attention_decode(*last, pool, state_indices=torch.tensor([0, 0, 1]), **options)


@pytest.mark.parametrize("reason", [None, "no reason"])
def test_how_a_backend_is_chosen(monkeypatch, reason):
    asked = []
    monkeypatch.setattr(operator, "triton_unavailable_reason", lambda *sizes: asked.append(sizes) or reason)
    q, _, v = make_qkv()
    on_gpu = types.SimpleNamespace(is_cuda=True, device="gpu", dtype=torch.float32, shape=q.shape)
    assert operator.choose_backend("auto", q, v) is operator.choose_backend("eager", on_gpu, v) is operator.EAGER
    assert asked == []
    assert operator.choose_backend("auto", on_gpu, v) is (operator.TRITON if reason is None else operator.EAGER)
    if reason is None:
        assert operator.choose_backend("triton", q, v) is operator.TRITON
    assert asked[0] == ("gpu", torch.float32, 16, 20, False)


def test_values_are_read_only_where_nothing_waits_for_them(monkeypatch):
    readable = operator._is_readable
    x = torch.tensor([1])
    assert readable(x) and not readable(x.to("meta")) and not readable(torch.nn.Parameter(x.float()))
    for module, name in ((torch.compiler, "is_compiling"), (torch.jit, "is_tracing")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: True)
            assert not readable(x)


def test_packed_sequences_with_a_mask_and_states():
    q, k, v = make_qkv(1, 60)
    mask = torch.rand(1, 60) > 0.3
    bounds = torch.tensor([0, 25, 25, 60])
    for coefficients in (REBASED, BASED):
        options = {"coefficients": coefficients, "attention_mask": mask}
        o, states = rebased_attention(q, k, v, cu_seqlens=bounds, output_final_state=True, **options)
        parts = [slice(0, 25), slice(25, 60)]
        exact = [
            oracle(*(x[:, p] for x in (q, k, v)), coefficients=coefficients, attention_mask=mask[:, p]) for p in parts
        ]
        assert error(o, torch.cat(exact, 1)) < 1e-5
        assert states.shape[0] == 3 and not states[1].any()
        again, none = rebased_attention(q, k, v, cu_seqlens=bounds, initial_state=states * 0, **options)
        assert none is None and torch.equal(again, o)
