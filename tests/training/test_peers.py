"""The mixers of flash-linear-attention in our models: with stand-ins for its layers, and the real ones on a GPU."""

import dataclasses
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from modeling_rebased.training import peers, train_icll, train_mad, train_mqar
from modeling_rebased.training.fast_loop import FastTrainer
from modeling_rebased.training.mqar_runs import Run
from modeling_rebased.training.recipe import Options, build_model
from modeling_rebased.training.train_mad import MADRun


MQAR = Run(model="rebased", hidden=64, length=32, pairs=4, lr=1e-2, seed=0, vocab_size=64, epochs=1, batch_size=8)
MQAR = dataclasses.replace(MQAR, train_examples=16, test_examples=8)
MAD = MADRun(task="recall", model="rebased", vocab_size=8, length=16, hidden=64, lr=1e-2, seed=0, train_examples=16)
CPU = Options(device="cpu", bf16=False, compile=False, cuda_graph=False, progress=False)


class Layer(nn.Module):
    """Stands for a layer of flash-linear-attention, and keeps what it was made of."""

    def __init__(self, hidden_size, **sizes):
        super().__init__()
        self.sizes = sizes
        self.proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.A_log = nn.Parameter(torch.ones(4))
        self.A_log._no_weight_decay = True

    def forward(self, hidden_states):
        return self.proj(hidden_states) * self.A_log.sum(), None, None


@pytest.fixture
def fla(monkeypatch):
    layers = types.ModuleType("fla.layers")
    layers.GatedDeltaNet = layers.Mamba2 = layers.RWKV7Attention = Layer
    package = types.ModuleType("fla")
    package.layers = layers
    monkeypatch.setitem(sys.modules, "fla", package)
    monkeypatch.setitem(sys.modules, "fla.layers", layers)


@pytest.mark.parametrize("run", [MQAR, MAD], ids=["mqar", "mad"])
@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_peer_takes_the_place_of_the_attention_alone(run, peer, fla):
    ours, model = build_model(run), build_model(dataclasses.replace(run, model=peer))
    layers = [name for name, module in model.named_modules() if isinstance(module, Layer)]
    assert layers == ["model.layers.1.self_attn.layer"]
    found, expected = (
        {name: weight for name, weight in one.named_parameters() if "self_attn" not in name} for one in (model, ours)
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)  # also the same first weights


def test_the_states_of_peers_are_about_as_large_as_ours(fla):
    """Numbers per unit of width. Ours has 12 heads of 136 x 6 in MQAR at width 64, and 16 of 36 x 9 in MAD."""
    assert 12 * 136 * 6 / 64 == 153 and 16 * 36 * 9 / 128 == 40.5
    for run, expected in ((MQAR, 128), (MAD, 32)):
        for peer in peers.PEERS:
            sizes = build_model(dataclasses.replace(run, model=peer)).model.layers[1].self_attn.layer.sizes
            per_width = {
                "gated_deltanet": lambda s: s["num_heads"] * s["head_dim"] * s["head_dim"] * s["expand_v"] / 64,
                "mamba2": lambda s: 2 * s["state_size"],
                "rwkv7": lambda s: s["head_dim"],
            }[peer](sizes)
            assert per_width == (min(64, expected) if peer == "rwkv7" else expected)
    assert [peers.state_of_head(head) for head in (8, 16)] == [32, 128]


def test_a_peer_trains_and_keeps_its_rates_of_decay(fla):
    run = dataclasses.replace(MQAR, model="gated_deltanet", weight_decay=0.5)
    trainer = FastTrainer(run, CPU)
    decays = {
        name: group["weight_decay"]
        for name, weight in trainer.model.named_parameters()
        for group in trainer.optimizer.param_groups
        if any(weight is other for other in group["params"])
    }
    assert decays.pop("model.layers.1.self_attn.layer.A_log") == 0.0
    assert set(decays.values()) == {0.5}
    assert trainer.train(run)["epochs_trained"] == 1
    assert {group["weight_decay"] for group in FastTrainer(MQAR, CPU).optimizer.param_groups} == {0.1}


@pytest.mark.parametrize("command", [train_mqar, train_mad, train_icll])
def test_what_a_peer_cannot_is_told(command, fla, tmp_path, capsys):
    argv = ["--models", "rebased,mamba2", "--device", "cpu", "--output", str(tmp_path / "r")]
    for more, words in (
        (["--save", str(tmp_path)], "--save: only models of this package can be saved, not mamba2"),
        (["--hidden", "64,48"], "--hidden: mamba2 have heads of "),
    ):
        with pytest.raises(SystemExit):
            command.parse([*argv, *more])
        assert words in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="flash-linear-attention is installed")
@pytest.mark.parametrize("command", [train_mqar, train_mad, train_icll])
def test_peers_need_their_package(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.parse(["--models", "rwkv7", "--device", "cpu", "--output", str(tmp_path / "r")])
    assert "the model 'rwkv7' needs flash-linear-attention: pip install" in capsys.readouterr().err


def stand_in(monkeypatch, name, **contents):
    """Put a module with these contents where `import` finds it."""
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def machine(monkeypatch, hopper, above_3_4, above_3_7_1):
    """Let flash-linear-attention say that it runs on such a machine."""
    found = {"IS_NVIDIA_HOPPER": hopper, "TRITON_ABOVE_3_4_0": above_3_4, "TRITON_ABOVE_3_7_1": above_3_7_1}
    stand_in(monkeypatch, "fla.utils", **found)


# Hopper, Triton 3.4 or newer, Triton 3.7.1 or newer; the first is the only one whose chunked gradient is refused
MACHINES = [(True, True, False), (True, False, False), (True, True, True), (False, True, False)]


@pytest.mark.parametrize("hopper, above_3_4, above_3_7_1", MACHINES)
def test_mamba2_takes_the_kernel_whose_gradient_is_right(hopper, above_3_4, above_3_7_1, fla, monkeypatch):
    """The scan of a layer with stand-ins for the kernels, against its recurrence written down."""
    taken = []

    def kernel(name):
        def attention(q, k, v, g, scale):
            taken.append(name)
            state, out = 0, []
            for t in range(q.shape[1]):
                state = g[:, t, :, None, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
                out.append((q[:, t, :, None] @ state)[:, :, 0] * scale)
            return torch.stack(out, 1), None

        return attention

    machine(monkeypatch, hopper, above_3_4, above_3_7_1)
    names = ("chunk_simple_gla", "fused_recurrent_simple_gla")
    stand_in(monkeypatch, "fla.ops.simple_gla", **{name: kernel(name) for name in names})
    stand_in(monkeypatch, "fla.modules.convolution", causal_conv1d=lambda x, **_: (x, None))
    torch.manual_seed(0)
    layer = types.SimpleNamespace(intermediate_size=8, ssm_state_size=4, num_heads=2, head_dim=4, conv_dim=16)
    layer.in_proj, layer.out_proj = nn.Linear(8, 26, bias=False), nn.Identity()
    layer.conv1d = nn.Conv1d(16, 16, 4, groups=16)
    layer.dt_bias, layer.A_log, layer.D = torch.randn(2), torch.randn(2), torch.randn(2)
    layer.norm = lambda y, gate: y * gate
    inputs = torch.randn(1, 3, 8)
    found = peers.scan(layer, inputs)
    assert taken == [names[(hopper, above_3_4, above_3_7_1) == (True, True, False)]]

    gate, x, b, c, step = layer.in_proj(inputs).split([8, 8, 4, 4, 2], dim=-1)
    step, x = nn.functional.softplus(step + layer.dt_bias), x.unflatten(-1, (2, 4))
    state, rows = torch.zeros(2, 4, 4), []  # heads, state, head
    for t in range(3):
        state = torch.exp(-layer.A_log.exp() * step[0, t])[:, None, None] * state
        state = state + step[0, t, :, None, None] * b[0, t, :, None] * x[0, t, :, None]
        rows.append((c[0, t] @ state + layer.D[:, None] * x[0, t]).flatten() * gate[0, t])
    torch.testing.assert_close(found, torch.stack(rows)[None])


@pytest.mark.parametrize("hopper, above_3_4, above_3_7_1", MACHINES)
@pytest.mark.parametrize("command", [train_mqar, train_mad, train_icll])
def test_gated_deltanet_is_refused_where_its_gradient_is_wrong(
    command, hopper, above_3_4, above_3_7_1, fla, monkeypatch, tmp_path, capsys
):
    machine(monkeypatch, hopper, above_3_4, above_3_7_1)
    stand_in(monkeypatch, "triton", __version__="3.6.0")
    tilelang = "fla.ops.common.backends.tilelang"
    argv = ["--device", "cpu", "--output", str(tmp_path / "r"), "--models"]
    stand_in(monkeypatch, tilelang, CommonTileLangBackend=types.SimpleNamespace(can_use=lambda: False))
    command.parse([*argv, "rebased,mamba2,rwkv7"])
    if (hopper, above_3_4, above_3_7_1) == (True, True, False):
        with pytest.raises(SystemExit):
            command.parse([*argv, "rebased,mamba2,gated_deltanet"])
        error = " ".join(capsys.readouterr().err.split())
        assert "--models: gated_deltanet cannot be trained on a Hopper GPU with Triton 3.6.0" in error
        assert "install Triton 3.7.1 or newer, or tilelang beside CUDA's nvcc (pip install tilelang)" in error
        stand_in(monkeypatch, tilelang, CommonTileLangBackend=types.SimpleNamespace(can_use=lambda: True))
    command.parse([*argv, "rebased,mamba2,gated_deltanet"])


def test_another_release_of_flash_linear_attention_is_taken_as_right(fla, monkeypatch):
    stand_in(monkeypatch, "fla.utils", IS_NVIDIA_HOPPER=True)
    assert peers.why_untrainable(peers.PEERS) is None


@pytest.mark.gpu
def test_mamba2_is_the_layer_of_flash_linear_attention():
    """The scan by its kernels for linear attention against the layer's own form, which is quadratic in memory."""
    pytest.importorskip("fla.layers", reason="needs flash-linear-attention")
    torch.manual_seed(0)
    layer = peers.Peer("mamba2", 64, 128).cuda().layer
    layer.D.data.normal_()
    x = torch.randn(2, 96, 64, device="cuda", requires_grad=True)
    found, expected = peers.scan(layer, x), layer.torch_forward(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    inputs = [x, *layer.parameters()]
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))):
        assert ((one - other).norm() / other.norm()).item() < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("peer", peers.PEERS)
def test_graph_and_compiled_code_train_a_peer_as_eager_code_does(peer):
    pytest.importorskip("fla.layers", reason="needs flash-linear-attention")
    if reason := peers.why_untrainable([peer]):
        pytest.skip(reason)
    run = dataclasses.replace(MQAR, model=peer, train_examples=160, epochs=2, length=128, pairs=16)
    losses = {}
    for name, options in {
        "eager": Options(compile=False, cuda_graph=False, progress=False),
        "fast": Options(progress=False),
    }.items():
        losses[name] = [entry["loss"] for entry in FastTrainer(run, options).train(run)["history"]]
    assert losses["fast"] == pytest.approx(losses["eager"], rel=2e-2)
