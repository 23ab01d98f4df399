"""The checkpoints that ship with the repository."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_rebased.eval.judge_stories import repeated
from modeling_rebased.training.write_stories import plots
from tests.processes import run_python


REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.parent for path in (REPOSITORY / "checkpoints").glob("*/config.json"))
ENGLISH = REPOSITORY / "checkpoints" / "english-6m"
STORIES = REPOSITORY / "checkpoints" / "stories-12m"
PROMPTS = {ENGLISH: ["It was", "My fellow citizens, "], STORIES: ["Once", "Long ago, a kind farmer named Tom"]}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_checkpoint_links_to_the_code_of_the_package(folder):
    expected = {source.name: source for source in (REPOSITORY / "modeling_rebased").glob("*_rebased.py")}
    links = {path.name: path for path in folder.glob("*.py")}
    assert links.keys() == expected.keys()
    for name, link in links.items():
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == expected[name]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_copy_of_a_checkpoint_loads_elsewhere(folder, tmp_path):
    """`cp -rL` makes a folder that holds code and weights itself."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert not any(path.is_symlink() for path in copy.iterdir())
    code = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(copy)!r}, trust_remote_code=True)
print(type(model).__module__)
"""
    done = run_python("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "transformers_modules" in done.stdout


def test_english_6m_is_small_and_in_bfloat16():
    weights = load_file(ENGLISH / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert 3e6 < sum(tensor.numel() for tensor in weights.values()) < 8e6


def test_english_6m_scores_the_start_of_held_out_english():
    """1.5016 bits per byte measured on a CPU; other weights differ, and wrong code scores 3 and more."""
    tokenizer = AutoTokenizer.from_pretrained(ENGLISH, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(ENGLISH, trust_remote_code=True, dtype=torch.float32).eval()
    line = (REPOSITORY / "eval" / "tasks" / "heldout_english.jsonl").read_text(encoding="utf-8").split("\n")[0]
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(json.loads(line)["text"])["input_ids"][:2047]]])
    with torch.no_grad():
        bits = model(ids, labels=ids).loss.item() / math.log(2)
    assert bits == pytest.approx(1.5016, abs=0.005)


def test_english_6m_card_has_the_figures_of_the_three_models():
    """The card is written by hand: its table must say what training_figures.json says."""
    figures = json.loads((ENGLISH / "training_figures.json").read_text(encoding="utf-8"))
    card = (ENGLISH / "README.md").read_text(encoding="utf-8")
    parameters = {"english-6m": figures["parameters"], **figures["twins_parameters"]}
    assert figures["heldout_english"].keys() == parameters.keys()
    for name, scores in figures["heldout_english"].items():
        bits, byte, word = (scores[key] for key in ("bits_per_byte", "byte_perplexity", "word_perplexity"))
        assert f"| {parameters[name]:,} | {bits:.3f} | {byte:.3f} | {word:,.0f} |" in card
        assert abs(math.log2(byte) - bits) < 1e-3
    assert f"{figures['steps']:,} steps" in card


def test_stories_12m_is_small_and_in_bfloat16():
    weights = load_file(STORIES / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in weights.values()) < 16e6
    assert (STORIES / "model.safetensors").stat().st_size < 32e6


def test_stories_12m_scores_held_out_stories():
    """0.2687 nats per token of the first 20 measured on a CPU; a constant guess scores 7.6."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(STORIES, trust_remote_code=True, dtype=torch.float32).eval()
    text = (REPOSITORY / "eval" / "tasks" / "heldout_stories.jsonl").read_text(encoding="utf-8")
    total = count = 0
    for line in text.split("\n")[:20]:
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.bos_token_id
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert total / count == pytest.approx(0.2687, abs=0.005)


def test_stories_12m_writes_a_story_to_its_end():
    """Greedily: the persons of the beginning are there, nothing is said twice, and the model ends the story."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(STORIES, trust_remote_code=True, dtype=torch.float32)
    prompt = "Once upon a time, there was a little girl named Lily. Her best friend was a small fox named Otto."
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=300)[0]
    assert ids[-1] == tokenizer.eos_token_id
    story = tokenizer.decode(ids, skip_special_tokens=True)
    assert story.startswith(prompt) and story.count("Lily") >= 2 and story.count("Otto") >= 3
    assert 80 < len(story.split()) < 250 and repeated(story) < 0.05


def test_stories_12m_card_has_the_figures():
    figures = json.loads((STORIES / "training_figures.json").read_text(encoding="utf-8"))
    card = (STORIES / "README.md").read_text(encoding="utf-8")
    own = figures["models"]["stories-12m"]
    assert f"{own['eval_loss']:.3f} nats per token, or {own['eval_bits_per_byte']:.3f} bits per byte" in card
    assert f"{figures['steps']:,} steps" in card and f"{len(plots()[1])} plots" in card


def test_english_6m_loads_where_the_package_is_unknown(tmp_path):
    code = f"""
from transformers import pipeline
write = pipeline("text-generation", {str(ENGLISH)!r}, trust_remote_code=True)
print(repr(write("It was", max_new_tokens=12)[0]["generated_text"]))
"""
    done = run_python("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith(("'It was", '"It was'))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_batch_is_greedy_and_continues_each_row_as_it_would_alone(folder):
    """The tokenizer pads on the left, and no setting of a demonstration samples or overrules a length."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    prompts = PROMPTS.get(folder, ["7 5000 7", "9 6000 8 5001 9"])
    rows = [
        model.generate(**tokenizer(each, return_tensors="pt"), max_length=len(tokenizer(each)["input_ids"]) + 5)[
            0, -5:
        ]
        for each in prompts
    ]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    batch = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(batch[:, -5:], torch.stack(rows))
