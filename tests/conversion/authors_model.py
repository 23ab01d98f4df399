"""The authors' model in plain PyTorch, written from its description, as the oracle of the conversion.

It shares no code with the package: attention is the sum of squared scores, written out.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Conv(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.conv = nn.Conv1d(d, d, 3, groups=d, padding=2)


class BaseConv(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.projection = nn.Linear(d, d)
        self.conv = Conv(d)

    def forward(self, u):
        conv = self.conv.conv(u.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2)
        return conv * self.projection(u) + u


class Scale(nn.Module):
    def __init__(self, size, use_beta):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(size))
        self.beta = nn.Parameter(torch.zeros(size))
        self.use_beta = use_beta

    def forward(self, x):
        return x * self.gamma + self.beta if self.use_beta else x * self.gamma


class Standardize(nn.Module):
    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class Attention(nn.Module):
    """ReBased, w = s^2, or Based, w = 1 + s + s^2/2, with the normalisation that the three flags select."""

    def __init__(self, d, heads, features, based=False, normalize=True, gamma=True, beta=True):
        super().__init__()
        self.heads, self.features, self.based = heads, features, based
        self.proj_q = nn.Linear(d, heads * features, bias=False)
        self.proj_k = nn.Linear(d, heads * features, bias=False)
        self.proj_v = nn.Linear(d, heads * (d // heads), bias=False)
        self.proj_o = nn.Linear(heads * (d // heads), d, bias=False)
        size = heads * features
        if normalize and gamma and beta:
            self.ln_q, self.ln_k = nn.LayerNorm(size), nn.LayerNorm(size)
        elif normalize:
            self.ln_q, self.ln_k = Standardize(), Standardize()
        elif gamma:
            self.ln_q, self.ln_k = Scale(size, beta), Scale(size, beta)
        else:
            self.ln_q, self.ln_k = nn.Identity(), nn.Identity()

    def forward(self, x):
        q, k, v = self.ln_q(self.proj_q(x)), self.ln_k(self.proj_k(x)), self.proj_v(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        s = q @ k.transpose(-1, -2) * self.features**-0.5
        w = 1 + s + 0.5 * s * s if self.based else s * s
        w = w.tril()
        o = (w @ v) / (w.sum(-1, keepdim=True) + 1e-12)
        return self.proj_o(o.transpose(1, 2).flatten(-2))


class Mixer(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        return self.mixer(x)


class MLP(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, d, mixer, mlp):
        super().__init__()
        self.sequence_mixer = mixer
        self.state_mixer = MLP(d) if mlp else nn.Identity()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        x = x + self.sequence_mixer(self.norm1(x))
        return x + self.state_mixer(self.norm2(x))


class Embeddings(nn.Module):
    def __init__(self, vocab, d, positions):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab, d)
        if positions:
            self.position_embeddings = nn.Embedding(positions, d)

    def forward(self, ids):
        x = self.word_embeddings(ids)
        if hasattr(self, "position_embeddings"):
            x = x + self.position_embeddings.weight[: ids.shape[1]]
        return x


class Backbone(nn.Module):
    def __init__(self, vocab, d, layers, mlp, positions):
        super().__init__()
        self.embeddings = Embeddings(vocab, d, positions)
        self.layers = nn.ModuleList([Layer(d, mixer, mlp) for mixer in layers])
        self.ln_f = nn.LayerNorm(d)

    def forward(self, ids):
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.ln_f(x)


class AuthorsModel(nn.Module):
    """`kinds` holds "conv" and "attention", one per layer; other keywords are `Attention`'s."""

    def __init__(
        self,
        kinds=("conv", "attention"),
        vocab=31,
        d=32,
        heads=3,
        features=4,
        mlp=False,
        positions=16,
        nested=True,
        **attention,
    ):
        super().__init__()
        mixers = [BaseConv(d) if kind == "conv" else Attention(d, heads, features, **attention) for kind in kinds]
        self.backbone = Backbone(vocab, d, [Mixer(m) if nested else m for m in mixers], mlp, positions)
        self.lm_head = nn.Linear(d, vocab, bias=False)
        self.lm_head.weight = self.backbone.embeddings.word_embeddings.weight

    def forward(self, ids):
        return self.lm_head(self.backbone(ids))


def make_authors_model(**arguments) -> AuthorsModel:
    """A model all of whose numbers are random, so that one out of place shows; an unused beta too."""
    torch.manual_seed(0)
    model = AuthorsModel(**arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = 1.0 if "norm" in name or ("ln_" in name and not name.endswith(("bias", "beta"))) else 0.0
            parameter.copy_(one + 0.3 * torch.randn(parameter.shape))
    return model.eval()
