"""The two stages of training a linearized model, on a tiny one."""

import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaForCausalLM, TrainingArguments

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.conversion import ConversionError, distill, distill_arguments, linearize
from modeling_rebased.conversion.distill import check_pair, main, parse_arguments, perplexity
from modeling_rebased.conversion.distill_arguments import DistillArguments
from modeling_rebased.conversion.distill_trainer import DistillTrainer, freeze_all_but_transferred, without_mlps
from modeling_rebased.conversion.losses import LogitsLoss, _loss_part, logits_loss, relative_error
from modeling_rebased.training import train_lm
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.text import TokenBlocks, read_token_ids
from tests.conversion.teacher import make_teacher
from tests.processes import ROOT, run_with_processes


LAUNCH_ON_CPU = ROOT / "tests/training/launch_on_cpu.py"
TEXT = "the cat sat on the mat and the dog sat on the log <|endoftext|>" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher that has learnt the text a little, its student, and the text."""
    folder = tmp_path_factory.mktemp("distill")
    (folder / "text.txt").write_text(TEXT)
    byte_tokenizer().save_pretrained(folder / "teacher")
    teacher = make_teacher()
    blocks = TokenBlocks([folder / "text.txt"], byte_tokenizer(), 32)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
    for step in range(40):
        ids = blocks.blocks(0, len(blocks))[step % 4 :: 4]
        teacher(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher.save_pretrained(folder / "teacher")
    linearize(folder / "teacher", folder / "start", layers="linear_attention,hybrid_sliding", feature_dim=4, window=4)
    return folder


def command(folder, stage, output, *more, steps=20):
    return [
        *("--stage", stage, "--teacher", str(folder / "teacher"), "--student", str(folder / "start")),
        *("--train_file", str(folder / "text.txt"), "--eval_file", str(folder / "text.txt")),
        *("--output_dir", str(output), "--context_length", "32", "--max_steps", str(steps)),
        *("--learning_rate", "1e-2", "--per_device_train_batch_size", "8", "--report_to", "none", "--use_cpu", "True"),
        *("--save_strategy", "no", "--disable_tqdm", "True", *more),
    ]


def start_of(folder):
    return ReBasedForCausalLM.from_pretrained(folder / "start").eval()


def error_of(student, folder, watch=None):
    """The loss of stage transfer; `watch` is called with the model that is trained."""
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher")
    distill = DistillArguments("transfer", "", "", [])
    arguments = TrainingArguments(str(folder / "unused"), report_to="none", use_cpu=True)
    model = without_mlps(student)
    if watch is not None:
        watch(model)
    trainer = DistillTrainer(model=model, args=arguments, teacher=teacher, distill=distill)
    ids = TokenBlocks([folder / "text.txt"], byte_tokenizer(), 32).blocks(0, 4)
    return trainer.compute_loss(model, {"input_ids": ids, "labels": ids})


def test_transfer_trains_the_maps_alone_and_lowers_the_error(folder, tmp_path):
    assert main(command(folder, "transfer", tmp_path / "out")) == 0
    before, after = start_of(folder), ReBasedForCausalLM.from_pretrained(tmp_path / "out" / "final").eval()
    moved = {name for (name, a), b in zip(before.named_parameters(), after.parameters()) if not torch.equal(a, b)}
    expected = {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qk"}
    expected |= {f"model.layers.{i}.self_attn.{x}_norm.{y}" for i in (0, 1) for x in "qk" for y in ("weight", "bias")}
    assert moved == expected | {"model.layers.1.self_attn.gate"}
    with torch.no_grad():
        assert error_of(after, folder) < 0.7 * error_of(before, folder)
    said = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    (row,) = said["perplexity"]
    assert said["stage"] == "transfer" and said["steps"] == 20 and said["tokens"] == 20 * 8 * 32
    assert row["file"] == "text" and row["length"] == 32
    assert row["teacher"] < row["student"] < row["before"]
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 20
    assert (tmp_path / "out" / "final" / "tokenizer.json").is_file()


def test_in_transfer_each_layer_learns_by_itself(folder):
    """With an MLP spoilt the error stays: layers hear the teacher. And nothing is kept for gradients across layers."""
    student = start_of(folder)
    crossing = []

    def watch(model):
        model.lm_head.register_forward_hook(lambda module, inputs, output: crossing.append(output.requires_grad))
        freeze_all_but_transferred(model)

    losses = []
    for _ in range(2):
        trainer_loss = error_of(student, folder, watch)
        losses.append(trainer_loss.item())
        with torch.no_grad():
            student.model.layers[0].mlp.down_proj.weight.normal_(std=10)
    assert losses[0] == losses[1] and crossing == [False, False]
    trainer_loss.backward()
    gradients = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert gradients and all(".self_attn." in name for name in gradients)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_logits_bring_the_student_to_the_teacher(folder, tmp_path, lora_rank):
    started = shutil.copytree(folder / "start", tmp_path / "start")
    GenerationConfig(eos_token_id=[7, 256], temperature=0.3, do_sample=True).save_pretrained(started)
    options = ("--lora_rank", str(lora_rank), "--student", str(started))
    assert main(command(folder, "logits", tmp_path / "out", *options)) == 0
    blocks = TokenBlocks([folder / "text.txt"], byte_tokenizer(), 32)
    student = ReBasedForCausalLM.from_pretrained(tmp_path / "out" / "final")
    said = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    (row,) = said["perplexity"]
    assert perplexity(start_of(folder), blocks) == pytest.approx(row["before"], rel=1e-3)
    assert perplexity(student, blocks) == pytest.approx(row["student"], rel=1e-3)
    assert row["student"] < 0.8 * row["before"]
    assert set(student.state_dict()) == set(start_of(folder).state_dict())
    assert student.generation_config.eos_token_id == [7, 256] and student.generation_config.temperature == 0.3


class Ticks:
    """A clock on which every look takes a second."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("modeling_rebased.conversion.clock.time.monotonic", self)

    def __call__(self):
        self.now += 1.0
        return self.now


def test_the_clock_ends_a_run_and_its_learning_rate(folder, tmp_path, monkeypatch):
    """The step that takes the time over its end is the last, after a restart too, with the rate in a line before."""
    Ticks(monkeypatch)
    saving = ("--save_strategy", "steps", "--save_steps", "3", "--logging_steps", "1", "--warmup_steps", "2")
    main(command(folder, "logits", tmp_path / "whole", *saving, "--max_seconds", "9", steps=-1))
    main(command(folder, "logits", tmp_path / "parts", *saving, "--max_seconds", "100", steps=3))
    main(command(folder, "logits", tmp_path / "parts", *saving, "--max_seconds", "9", steps=-1))
    whole, parts = (
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("whole", "parts")
    )
    rates = [row["learning_rate"] for row in whole if "learning_rate" in row]
    # Second 1 goes by before the first step has ended, and is not counted.
    assert rates[:4] == pytest.approx([1e-2 / 3, 2e-2 / 3 * (1 - 0 / 8), 1e-2 * (1 - 1 / 8), 1e-2 * (1 - 2 / 8)])
    assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True) and len(rates) == 9
    assert len([row for row in parts if "learning_rate" in row]) < 12


def test_time_that_is_no_time(folder, tmp_path, capsys):
    assert main(command(folder, "logits", tmp_path / "out", "--max_seconds", "0")) == 1
    assert "--max_seconds is 0.0; it must be positive" in capsys.readouterr().err
    share = ("--max_seconds", "9", "--warmup_steps", "0.1")
    assert main(command(folder, "logits", tmp_path / "out", *share, steps=-1)) == 1
    assert "--warmup_steps is 0.1, a share of all steps" in capsys.readouterr().err


def test_in_bfloat16_the_perplexity_is_still_that_of_the_saved_model(folder, tmp_path):
    """Training's mixed precision does not reach into the measurement."""
    assert main(command(folder, "logits", tmp_path / "out", "--bf16", "True", steps=5)) == 0
    (row,) = json.loads((tmp_path / "out" / "perplexity.json").read_text())["perplexity"]
    blocks = TokenBlocks([folder / "text.txt"], byte_tokenizer(), 32)
    student = ReBasedForCausalLM.from_pretrained(tmp_path / "out" / "final")
    assert next(student.parameters()).dtype == torch.float32
    assert row["student"] == pytest.approx(perplexity(student, blocks), rel=1e-5)


def test_tokens_in_an_array_are_those_of_the_text(folder, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    ids = TokenBlocks([str(folder / "text.txt")], tokenizer, 2).tokens
    np.save(tmp_path / "ids.npy", ids)
    both = TokenBlocks([str(folder / "text.txt"), str(tmp_path / "ids.npy")], tokenizer, 2)
    assert np.array_equal(both.tokens, np.concatenate([ids, ids]))
    for bad in (np.array([[1, 2]]), np.array([1.0, 2.0]), np.array([1, 258])):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(ValueError, match=r"must be a vector of token ids below 258, but is"):
            read_token_ids(tmp_path / "bad.npy", tokenizer)
    np.save(tmp_path / "bad.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="is no array of numbers"):
        read_token_ids(tmp_path / "bad.npy", tokenizer)


@pytest.mark.parametrize("stage", ["transfer", "logits"])
def test_compiled_layers_learn_the_same(folder, tmp_path, stage, monkeypatch):
    """With a compiler that traces and generates no code, which is the slow part; layers of a kind are traced once."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_with(*args, **kwargs, backend=backend))
    monkeypatch.setattr("modeling_rebased.conversion.losses._compiled_part", compile_with(_loss_part, backend=backend))
    torch.compiler.reset()
    for name, compiled in (("plain", "False"), ("compiled", "True")):
        assert main(command(folder, stage, tmp_path / name, "--compile", compiled, steps=4)) == 0
        assert bool(traced) == (name == "compiled")
    plain, compiled = (
        ReBasedForCausalLM.from_pretrained(tmp_path / name / "final").state_dict() for name in ("plain", "compiled")
    )
    assert set(plain) == set(compiled)
    for name in plain:
        torch.testing.assert_close(plain[name], compiled[name], atol=1e-4, rtol=1e-3, msg=name)


def two_heads(**options):
    """Hidden states [2, 5, 4] and output layers [7, 4] of a student and a teacher, and the logits of both."""
    torch.manual_seed(0)
    parts = [torch.randn(*shape, requires_grad=True, **options) for shape in ((2, 5, 4), (7, 4)) * 2]
    return parts, parts[0] @ parts[1].T, (parts[2] @ parts[3].T).detach()


def test_the_loss_of_logits():
    (states, weight, _, _), logits, _ = two_heads()
    labels = torch.randint(0, 7, (2, 5))
    assert logits_loss(states, weight, states, weight, labels, 2.0, 0.0).abs() < 1e-6
    text = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    other = torch.randn(2, 5, 4), torch.randn(7, 4)
    torch.testing.assert_close(logits_loss(states, weight, *other, labels, 2.0, 1.0), text)
    p, q = (torch.softmax(x / 2, -1) for x in (torch.zeros_like(logits), logits))
    divergence = 4 * (p * (p / q).log()).sum(-1).mean()
    found = logits_loss(states, weight, torch.zeros_like(states), weight, labels, 2.0, 0.0)
    torch.testing.assert_close(found, divergence)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradients_of_the_loss_in_parts(temperature, monkeypatch):
    monkeypatch.setattr(LogitsLoss, "TOKENS", 3)
    parts, logits, expected = two_heads(dtype=torch.float64)
    labels = torch.randint(0, 7, (2, 5))
    student, teacher = ((x / temperature).log_softmax(-1) for x in (logits, expected))
    plain = 0.7 * temperature**2 * (teacher.exp() * (teacher - student)).sum() / 10
    plain = plain + 0.3 * torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    wanted = torch.autograd.grad(plain, parts[:2])
    loss = logits_loss(*parts, labels, temperature, 0.3)
    torch.testing.assert_close(loss, plain.float())
    found = torch.autograd.grad(3 * loss, parts[:2])
    for each, other in zip(found, wanted):
        torch.testing.assert_close(each, 3 * other, atol=1e-6, rtol=1e-5)
    frozen = parts[1].detach()
    (alone,) = torch.autograd.grad(logits_loss(parts[0], frozen, *parts[2:], labels, temperature, 0.3), parts[:1])
    torch.testing.assert_close(alone, wanted[0], atol=1e-6, rtol=1e-5)


def test_no_step_has_the_logits_of_all_tokens(folder, tmp_path, monkeypatch):
    sizes, part = [], _loss_part
    monkeypatch.setattr(LogitsLoss, "TOKENS", 50)
    monkeypatch.setattr(
        "modeling_rebased.conversion.losses._loss_part", lambda *given: sizes.append(given[0].shape) or part(*given)
    )
    assert main(command(folder, "logits", tmp_path / "out", steps=1)) == 0
    assert sizes == [(50, 258)] * 5 + [(6, 258)]  # 8 examples of 32 tokens


def test_a_batch_in_parts_has_the_same_error():
    """So that several GPUs and accumulated gradients train as one large batch does."""
    outputs, expected = torch.randn(4, 5, 6), torch.randn(4, 5, 6) * torch.arange(1, 5)[:, None, None]
    parts = [relative_error(outputs[i : i + 2], expected[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(relative_error(outputs, expected), torch.stack(parts).mean())
    torch.testing.assert_close(relative_error(torch.zeros_like(expected), expected), torch.tensor(1.0))


def test_a_teacher_of_this_package(folder, tmp_path):
    """Such as a GGUF file becomes with `linearize --layers softmax`: it teaches what the original does."""
    linearize(folder / "teacher", tmp_path / "softmax", layers="softmax")
    for teacher in (folder / "teacher", tmp_path / "softmax"):
        arguments = command(folder, "transfer", tmp_path / f"by_{teacher.name}", steps=2)
        arguments[arguments.index("--teacher") + 1] = str(teacher)
        assert main(arguments) == 0
    one, other = (
        ReBasedForCausalLM.from_pretrained(tmp_path / name / "final").state_dict()
        for name in ("by_teacher", "by_softmax")
    )
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("which", ["teacher", "start"])
def test_weights_that_are_missing_are_not_made_up(folder, tmp_path, which, capsys):
    for name in ("teacher", "start"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "text.txt", tmp_path)
    state = load_file(tmp_path / which / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / which / "model.safetensors", metadata={"format": "pt"})
    assert main(command(tmp_path, "logits", tmp_path / "out")) == 1
    assert "missing 'model.layers.1.mlp.up_proj.weight'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_saved_leaves_the_one_before(folder, tmp_path, monkeypatch):
    assert main(command(folder, "transfer", tmp_path / "out", steps=1)) == 0
    before = (tmp_path / "out" / "final" / "model.safetensors").read_bytes()

    def fail(self, path, **kwargs):
        Path(path).mkdir()
        raise OSError("no space")

    monkeypatch.setattr(ReBasedForCausalLM, "save_pretrained", fail)
    assert main(command(folder, "transfer", tmp_path / "out", steps=2)) == 1
    assert (tmp_path / "out" / "final" / "model.safetensors").read_bytes() == before
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_wrong_arguments(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_lm, "triton_unavailable_reason", lambda *given: "no GPU")
    assert main(command(folder, "transfer", tmp_path / "out", "--lora_rank", "2")) == 1
    assert "--lora_rank is for stage logits" in capsys.readouterr().err
    for name, value in (("temperature", "2"), ("text_weight", "0")):
        assert main(command(folder, "transfer", tmp_path / "out", f"--{name}", value)) == 1
        assert f"--{name} is for stages logits and long" in capsys.readouterr().err
    assert main(command(folder, "logits", tmp_path / "out", "--label_smoothing_factor", "0.1")) == 1
    assert "--label_smoothing_factor has no place" in capsys.readouterr().err
    assert main(command(folder, "transfer", tmp_path / "out", "--student", str(tmp_path / "missing"))) == 1
    assert "as save_pretrained writes it.\n" in capsys.readouterr().err
    config = ReBasedConfig(num_hidden_layers=2, layer_types=["full_attention"] * 2, vocab_size=9)
    config.save_pretrained(tmp_path / "softmax")
    assert main(command(folder, "transfer", tmp_path / "out", "--student", str(tmp_path / "softmax"))) == 1
    assert "--student has no linear layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(command(folder, "logits", tmp_path / "out", "--context_length", "99999")) == 1
    assert "--context_length is 99999" in capsys.readouterr().err
    for name, value in (
        ("temperature", "0"),
        ("temperature", "inf"),
        ("text_weight", "1.5"),
        ("lora_rank", "-1"),
        ("max_seconds", "nan"),
        ("eval_length", "1"),
    ):
        assert main(command(folder, "logits", tmp_path / "out", f"--{name}", value)) == 1
        assert f"rebased-distill: error: --{name} is " in capsys.readouterr().err
    for name in ("teacher", "student"):
        arguments = command(folder, "logits", tmp_path / "out")
        arguments[arguments.index(f"--{name}") + 1] = str(tmp_path / "nowhere")
        assert main(arguments) == 1
        expected = "nowhere' has no config.json" if name == "student" else "--teacher is"
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    shutil.copytree(folder / "teacher", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    for more, message in (
        (("--train_file", "no.txt"), "--train_file: there is no no.txt"),
        (("--output_dir", __file__), "is a file; it must be a folder"),
        (("--eval_file", str(folder / "text.txt"), "--eval_length", "99999"), "--eval_length is 99999, but "),
        (("--kernel_backend", "triton"), "--kernel_backend triton cannot run here: no GPU"),
        (("--teacher", str(tmp_path / "mute")), "mute' gives no tokenizer"),
    ):
        assert main([*command(folder, "transfer", tmp_path / "out"), *more]) == 1
        assert message in capsys.readouterr().err
    with monkeypatch.context() as launched:
        launched.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        launched.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
        assert main(command(folder, "logits", tmp_path / "out", "--lora_rank", "2")) == 1
        assert "--lora_rank cannot be used with tp_size above 1" in capsys.readouterr().err
    other = ReBasedForCausalLM(ReBasedConfig(vocab_size=11, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(ConversionError, match="vocab_size must be the same"):
        check_pair(LlamaForCausalLM.from_pretrained(folder / "teacher"), other)


def test_a_run_goes_on_from_the_checkpoint_that_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "trainer_state.json").write_text("{}")
    taken = []
    monkeypatch.setattr(distill, "train_from", lambda trainer, checkpoint: taken.append(checkpoint) or trainer.train())
    more = ["--resume_from_checkpoint", str(tmp_path / "kept")]
    assert main(command(folder, "transfer", tmp_path / "out", *more, steps=1)) == 0
    assert taken == [str(tmp_path / "kept")]


def test_a_finished_run_says_so_and_another_is_refused(folder, tmp_path, capsys):
    arguments = command(folder, "transfer", tmp_path / "out", steps=2)
    assert main(arguments) == 0
    before = (tmp_path / "out" / "final" / "model.safetensors").stat()
    first = capsys.readouterr().out
    assert main(arguments) == 0
    again = capsys.readouterr().out
    assert "is finished, after 2 steps: nothing is left to do" in again
    assert first.splitlines()[-1] == again.splitlines()[-1]  # the perplexities once more
    assert (tmp_path / "out" / "final" / "model.safetensors").stat() == before
    (tmp_path / "other.txt").write_text("another text " * 99)
    for more, words in (
        (["--stage", "logits"], "--stage was 'transfer' and is 'logits' now"),
        (["--train_file", str(tmp_path / "other.txt")], "--train_file (a hash of its text) was "),
        (["--student", str(tmp_path / "out" / "final")], "--student (a hash of its weights) was "),
    ):
        assert main([*arguments, *more]) == 1
        said = capsys.readouterr().err
        assert "holds another run: " in said and words in said


def test_a_stopped_run_goes_on_and_passes_over_a_torn_checkpoint(folder, tmp_path):
    """Stopped at half and started again, the run ends with the weights of one that was not."""
    saving = ("--save_strategy", "steps", "--save_steps", "2", "--lr_scheduler_type", "constant")
    main(command(folder, "logits", tmp_path / "whole", *saving, steps=4))
    main(command(folder, "logits", tmp_path / "torn", *saving, steps=2))
    torn = tmp_path / "torn" / "checkpoint-4"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 4, "log_hist')
    assert main(command(folder, "logits", tmp_path / "torn", *saving, steps=4)) == 0
    whole, parts = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "torn"))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], msg=name)


def test_the_defaults_are_the_published_recipe(tmp_path):
    for stage, rate, length, batch in (("transfer", 1e-2, 512, 24), ("logits", 6e-4, 1024, 12)):
        given = ["--stage", stage, "--teacher", "t", "--student", "s", "--train_file", "x", "--output_dir", "o"]
        distill, arguments = parse_arguments([*given, "--max_steps", "1000"])
        assert (arguments.learning_rate, distill.context_length) == (rate, length)
        assert (arguments.per_device_train_batch_size, arguments.warmup_steps) == (batch, 30)
        assert (distill.temperature, distill.text_weight, arguments.adam_beta2) == (1.0, 0.4, 0.95)
        assert parse_arguments([*given, "--learning_rate", "1e-3"])[1].learning_rate == 1e-3


def test_the_card_of_a_student(folder, tmp_path, monkeypatch, capsys):
    """And its upload, offline: the calls to the Hub are caught."""
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **rest: RepoUrl(f"https://huggingface.co/{name}"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: calls.append(given))
    push = ("--push_to_hub", "True", "--hub_model_id", "user/student", "--hub_token", "hf_secret")
    for _ in range(2):  # the second time the run is finished
        assert main(command(folder, "logits", tmp_path / "out", *push, steps=1)) == 0
        assert (calls[-1]["repo_id"], calls[-1]["folder_path"]) == ("user/student", tmp_path / "out" / "final")
    assert len(calls) == 2
    monkeypatch.setattr(HfApi, "create_repo", lambda *given, **named: 1 / 0)
    assert main(command(folder, "logits", tmp_path / "new", *push, steps=1)) == 1
    assert "rebased-distill: error: --push_to_hub cannot upload to 'user/student'" in capsys.readouterr().err
    card = (tmp_path / "out" / "final" / "README.md").read_text()
    for words in (
        "python -m modeling_rebased.conversion.distill --stage logits",
        "| text.txt | training |",
        "| teacher | teacher |",
        "perplexity per token of text, 32 tokens",
        "model.generate(",
        'from_pretrained("user/student", trust_remote_code',
    ):
        assert words in card, words
    assert "hf_secret" not in card
    assert "license" not in card and "kernel_backend" in (tmp_path / "out" / "final" / "config.json").read_text()


def test_stages_of_a_recipe_follow_one_another(folder, tmp_path, capsys):
    common = {"teacher": str(folder / "teacher"), "student": str(folder / "start"), "report_to": "none"}
    common |= {"output_dir": str(tmp_path / "out"), "train_file": [str(folder / "text.txt")] * 2, "use_cpu": True}
    common |= {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "context_length": 16}
    stages = {"transfer": None, "logits": {"text_weight": 0.0}, "long": {"context_length": 64, "text_weight": 1.0}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(common | {"stages": stages}))
    assert main([str(recipe), "--stage", "logits"]) == 1
    assert "transfer/final" in capsys.readouterr().err
    for stage, length in (("transfer", 16), ("logits", 16), ("long", 64)):
        assert main([str(recipe), "--stage", stage, "--disable_tqdm", "True"]) == 0
        said = json.loads((tmp_path / "out" / stage / "perplexity.json").read_text())
        assert said["stage"] == stage and said["tokens"] == 2 * 4 * length
    weights = [load_file(tmp_path / "out" / stage / "final" / "model.safetensors") for stage in stages]
    for before, after in itertools.pairwise(weights):
        name = "model.layers.0.mlp.up_proj.weight"
        assert 0 < (before[name] - after[name]).abs().max() < 0.1
    assert parse_arguments([str(recipe), "--stage", "long", "--max_steps", "7"])[1].max_steps == 7
    for wrong, message in (
        ("stages: 3", "must have a section"),
        ("a: [", "no YAML"),
        ("stages: {x: }", "stages: x"),
        ("stages: {logits: 3}", "stage logits must hold arguments, one per line, but holds 3"),
    ):
        recipe.write_text(wrong)
        assert main([str(recipe), "--stage", "logits"]) == 1
        assert message in capsys.readouterr().err


def test_the_recipe_of_smollm2_can_be_read():
    path = Path(distill_arguments.__file__).with_name("smollm2.yaml")
    for stage in ("transfer", "logits", "long"):
        distill, arguments = parse_arguments([str(path), "--stage", stage])
        assert distill.stage == stage and arguments.output_dir == f"output/smollm2/{stage}"


def test_every_process_loads_the_whole_teacher(folder, monkeypatch):
    """FSDP2 sends the student's weights to other processes, which hold zeros before. Nothing sends the teacher's."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    saves_memory, load = [], distill.load_model

    def recorded(*args, **kwargs):
        saves_memory.append(os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"])
        return load(*args, **kwargs)

    monkeypatch.setattr(distill, "load_model", recorded)
    teacher, student = str(folder / "teacher"), str(folder / "start")
    distill.load_pair(DistillArguments("logits", teacher, student, []), torch.float32)
    assert saves_memory == ["false", "true"]


@pytest.mark.parametrize("stage", ["transfer", "logits"])
def test_stages_under_fsdp2(folder, tmp_path, stage):
    """Two processes that share the weights train the same student as one."""
    assert main(command(folder, stage, tmp_path / "one", steps=2)) == 0
    two = command(folder, stage, tmp_path / "two", "--per_device_train_batch_size", "4", steps=2)
    run_with_processes(2, LAUNCH_ON_CPU, "fsdp2", "modeling_rebased.conversion.distill", *two)
    one, two = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


@pytest.mark.parametrize("stage, layers", [("transfer", "pure"), ("logits", "linear_attention,hybrid_sliding")])
def test_stages_under_tensor_parallelism(folder, tmp_path, stage, layers):
    """Two processes that share every layer train the same student as one, which goes on from their checkpoint.

    The heads of a pure student share the gains of their norms, and each process has one head.
    """
    window = None if layers == "pure" else 4
    linearize(folder / "teacher", tmp_path / "start", layers=layers, feature_dim=4, window=window)
    saving = ("--student", str(tmp_path / "start"), "--save_strategy", "steps", "--save_steps", "1")
    saving += ("--lr_scheduler_type", "constant", "--per_device_train_batch_size", "4")
    saving += ("--gradient_accumulation_steps", "2")
    for name in ("one", "two", "on"):
        given = command(folder, stage, tmp_path / name, *saving, steps=2)
        if name == "two":
            run_with_processes(2, LAUNCH_ON_CPU, "tp", "modeling_rebased.conversion.distill", *given)
            shutil.copytree(tmp_path / "two" / "checkpoint-1", tmp_path / "on" / "checkpoint-1")
        else:
            assert main(given) == 0
    one, *others = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two", "on"))
    for other in others:
        assert one.keys() == other.keys()
        assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5
    said = [json.loads((tmp_path / name / "perplexity.json").read_text()) for name in ("one", "two")]
    rows = [each["perplexity"][0] for each in said]
    assert said[0]["tokens"] == said[1]["tokens"]
    for name in ("before", "teacher", "student"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-4)
