"""Based's released model in plain PyTorch, written from its description, as the oracle of the conversion.

It shares no code with the package: the linear attention goes through the Taylor feature map
phi(x) = (1, x / F^(1/4), x x^T / (sqrt(2) sqrt(F))), the window is a mask, the rotation complex multiplication.
"""

import math

import torch
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class ShortConvolution(nn.Module):
    def __init__(self, d, size, bias):
        super().__init__()
        self.conv = nn.Conv1d(d, d, size, groups=d, padding=size - 1, bias=bias)

    def forward(self, x):
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class BaseConv(nn.Module):
    def __init__(self, d, expand=4, size=3, bias=False, conv_name="conv"):
        super().__init__()
        self.in_proj = nn.Linear(d, expand * d)
        self.out_proj = nn.Linear(expand * d // 2, d)
        self.conv_name = conv_name
        self.add_module(conv_name, ShortConvolution(expand * d // 2, size, bias))

    def forward(self, u):
        u1, u2 = self.in_proj(u).tensor_split(2, dim=-1)
        v = getattr(self, self.conv_name)(u1)
        return self.out_proj(v * v.sigmoid() * u2)


class LinearAttention(nn.Module):
    def __init__(self, d, heads, features, eps=1e-12):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.proj_q = nn.Linear(d, heads * features, bias=False)
        self.proj_k = nn.Linear(d, heads * features, bias=False)
        self.proj_v = nn.Linear(d, d, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)

    def features(self, x):
        root = math.sqrt(x.shape[-1])
        second = (x[..., :, None] * x[..., None, :]).flatten(-2) / (math.sqrt(2) * root)
        return torch.cat([torch.ones_like(x[..., :1]), x / math.sqrt(root), second], dim=-1)

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.proj_q, self.proj_k, self.proj_v)
        )
        q, k = self.features(q), self.features(k)
        y = (q @ k.transpose(-1, -2)).tril() @ v
        z = (q * k.cumsum(2)).sum(-1, keepdim=True) + self.eps
        return self.out_proj((y / z).transpose(1, 2).flatten(-2))


class SlidingAttention(nn.Module):
    def __init__(self, d, heads, window_size, theta=10000.0):
        super().__init__()
        self.heads, self.window_size, self.theta = heads, window_size, theta
        self.Wqkv = nn.Linear(d, 3 * d, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)

    def rotate(self, x):
        first, second = x.tensor_split(2, dim=-1)
        size = first.shape[-1]
        angle = torch.arange(x.shape[2])[:, None] * self.theta ** (-torch.arange(size) / size)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def forward(self, x):
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.rotate(q) @ self.rotate(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        seen = (distance >= 0) & (distance <= self.window_size // 2)
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(-2))


class GatedMlp(nn.Module):
    def __init__(self, d, inner):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, 2 * inner, bias=False), nn.Linear(inner, d, bias=False)

    def forward(self, x):
        y, gate = self.fc1(x).tensor_split(2, dim=-1)
        return self.fc2(y * gate * gate.sigmoid())


class Block(nn.Module):
    def __init__(self, d, mixer, inner, eps):
        super().__init__()
        self.mixer, self.mlp = mixer, GatedMlp(d, inner)
        self.norm1, self.norm2 = RMSNorm(d, eps), RMSNorm(d, eps)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, vocab, blocks, d, eps):
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(blocks)
        self.ln_f = RMSNorm(d, eps)

    def forward(self, ids):
        x = self.embeddings.word_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.ln_f(x)


class BasedModel(nn.Module):
    """`kinds` holds "conv", "linear" and "sliding", one per layer; `conv` are `BaseConv`'s further keywords."""

    def __init__(
        self,
        kinds=("conv", "linear", "sliding", "conv"),
        vocab=40,
        d=32,
        heads=4,
        features=5,
        inner=24,
        window_size=8,
        attention_eps=1e-12,
        eps=1e-5,
        theta=10000.0,
        tied=True,
        **conv,
    ):
        super().__init__()

        def mixer(kind):
            if kind == "conv":
                return BaseConv(d, **conv)
            if kind == "linear":
                return LinearAttention(d, heads, features, attention_eps)
            return SlidingAttention(d, heads, window_size, theta)

        self.transformer = Transformer(vocab, [Block(d, mixer(kind), inner, eps) for kind in kinds], d, eps)
        self.lm_head = nn.Linear(d, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.transformer.embeddings.word_embeddings.weight

    def forward(self, ids):
        return self.lm_head(self.transformer(ids))


def make_based_model(**arguments) -> BasedModel:
    """A model all of whose numbers are random, so that one out of place shows."""
    torch.manual_seed(0)
    model = BasedModel(**arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = 1.0 if "norm" in name or "ln_f" in name else 0.0
            parameter.copy_(one + 0.3 * torch.randn(parameter.shape))
    return model.eval()


def based_config(**changes) -> dict:
    """`config.json` of such a model, in the form of the released ones."""
    return {
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 4,
        "n_inner": 24,
        "n_positions": 64,
        "vocab_size": 40,
        "activation_function": "swiglu",
        "rms_norm": True,
        "layer_norm_epsilon": 1e-5,
        "residual_in_fp32": True,
        "rotary_emb_fraction": 1,
        "max_position_embeddings": 0,
        "pad_vocab_size_multiple": 8,
        "bos_token_id": 3,
        "eos_token_id": 3,
        "alt_mixer_layers": [1],
        "alt_mixer_2_layers": [2],
        "mixer": {"_target_": "based.models.mixers.convolution.BaseConv", "expand_proj": 4, "kernel_sizes": 3},
        "alt_mixer": {
            "_target_": "based.models.mixers.linear_attention.LinearAttention",
            "feature_map": {"_target_": "based.models.mixers.linear_attention.TaylorExp", "input_dim": 5},
            "feature_dim": 5,
            "num_heads": 4,
        },
        "alt_mixer_2": {
            "_target_": "based.models.mixers.slide_attention.SlidingAttention",
            "window_size": 8,
            "num_heads": 4,
            "causal": True,
        },
        **changes,
    }
