"""Measure whether a decay per token keeps a linear layer exact beyond the length at which it was fitted.

    python eval/results/conversion/decay.py TEACHER START TRAIN.txt HELD_OUT.txt > eval/results/conversion/decay.csv

TEACHER has softmax in every layer, and START is what `linearize --layers pure` made of it. Each layer by itself is
fitted to the teacher's attention by L-BFGS on 4,096 tokens, in rows of 512 or of 2,048. With a decay r, the weight of
a token n tokens before is multiplied by exp(-r n). The error is |output - teacher's|^2 / |teacher's|^2 on two held-out
texts of 2,048 tokens, by position.
"""

import sys

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_rebased.conversion.distill_trainer import AttentionTap
from modeling_rebased.modeling_rebased import apply_rotary_pos_emb
from modeling_rebased.training.text import TokenBlocks


LAYERS = (3, 8, 14, 26)
SETTINGS = ((512, 0.0), (512, 1 / 1024), (512, 1 / 256), (512, 1 / 64), (2048, 0.0), (2048, 1 / 256))
PLACES = ((0, 256), (256, 512), (512, 1024), (1024, 1536), (1536, 2048))
ITERATIONS = 16


def attend(attention, rotary, x, decay):
    """Return the layer's output for inputs x [B, T, hidden_size], as in ReBasedLinearAttention, with a decay."""
    features, width = attention.feature_dim, attention.head_dim
    q = attention.q_norm(attention.q_proj(x).unflatten(-1, (-1, features)))
    k = attention.k_norm(attention.k_proj(x).unflatten(-1, (-1, features)))
    v = attention.v_proj(x).unflatten(-1, (-1, width))
    place = torch.arange(x.shape[1], device=x.device)
    cos, sin = rotary(x, place[None])
    q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    distance = place[:, None] - place
    seen = torch.where(distance >= 0, torch.exp(-decay * distance), 0.0)
    outputs = []
    for head in range(q.shape[2]):
        of = head // (q.shape[2] // k.shape[2])
        weights = (q[:, :, head] @ k[:, :, of].mT / features**0.5).square() * seen
        outputs.append(weights @ v[:, :, of] / (weights.sum(-1, keepdim=True) + attention.eps))
    return F.linear(torch.cat(outputs, -1), attention.o_proj.weight)


def fit(attention, rotary, x, target, decay):
    """Fit queries and keys in place, and return the errors of all evaluations."""
    fitted = [each for name, each in attention.named_parameters() if name.startswith(("q_", "k_"))]
    optimizer = torch.optim.LBFGS(fitted, max_iter=ITERATIONS, history_size=8, line_search_fn="strong_wolfe")
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = (attend(attention, rotary, x, decay) - target).square().sum() / target.square().sum()
        loss.backward()
        seen.append(loss.item())
        return loss

    optimizer.step(closure)
    return seen


def main(teacher_folder, start_folder, train_file, held_out_file):
    """Print a row per layer and setting."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32).to(device).eval()
    train, held_out = (TokenBlocks([name], tokenizer, 2048) for name in (train_file, held_out_file))
    tap = AttentionTap({i: teacher.model.layers[i].self_attn for i in LAYERS})

    @torch.no_grad()
    def pairs(ids):
        teacher.model(input_ids=ids.to(device), use_cache=False)
        return {i: (tap.inputs[i].clone(), tap.outputs[i].clone()) for i in LAYERS}

    rows = torch.cat([train.blocks(i, i + 1) for i in (0, len(train) // 2)])
    fits = {512: pairs(rows.reshape(-1, 512)), 2048: pairs(rows)}
    tests = pairs(torch.cat([held_out.blocks(i, i + 1) for i in (5, 12)]))
    print("layer,fitted_at,decay,fit_before,fit_after," + ",".join(f"error_{a}_{b}" for a, b in PLACES))
    for i in LAYERS:
        for length, decay in SETTINGS:
            start = AutoModelForCausalLM.from_pretrained(start_folder, dtype=torch.float32).to(device)
            attention, rotary = start.model.layers[i].self_attn, start.model.linear_rotary_emb
            x, target = fits[length][i]
            seen = fit(attention, rotary, x, target, decay)
            with torch.no_grad():
                x, target = tests[i]
                wrong = (attend(attention, rotary, x, decay) - target).square().sum((0, 2))
                right = target.square().sum((0, 2))
            errors = [(wrong[a:b].sum() / right[a:b].sum()).item() for a, b in PLACES]
            figures = [f"{each:.3f}" for each in (seen[0], min(seen), *errors)]
            print(",".join([str(i), str(length), str(decay), *figures]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
