"""Language-model training: the finished folder, and exact resume after kill -9."""

import functools
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainingArguments

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.conversion import distill
from modeling_rebased.training import train_lm
from modeling_rebased.training.arguments import _wrong_value, command_line, gpu_defaults
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.resume import RunRecord, latest_complete_checkpoint
from modeling_rebased.training.text import TokenBlocks, read_documents
from modeling_rebased.training.train_lm import LMTrainer, LMTrainingArguments, parse_arguments
from tests.processes import run_python, start_python


REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 24


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A configuration, a text and a recipe for a run of a few seconds. Dropout makes the random state matter."""
    folder = tmp_path_factory.mktemp("recipe")
    config = {"model_type": "rebased", "vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "feature_dim": 4, "max_position_embeddings": 64, "residual_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    line = "The quick brown fox jumps over the lazy dog, and number {} is the next.\n"
    documents = ["".join(line.format(i * j) for i in range(40)) for j in range(8)]
    (folder / "train.txt").write_text("<|endoftext|>".join(documents))
    (folder / "heldout.txt").write_text(
        "<|endoftext|>A quick brown dog jumps over the lazy fox. " + "Dogs are slow. " * 50
    )
    (folder / "recipe.yaml").write_text(f"""
config: {folder}
train_file: [{folder / "train.txt"}]
eval_file: [{folder / "heldout.txt"}]
max_steps: {STEPS}
save_steps: 6
logging_steps: 1
per_device_train_batch_size: 2
learning_rate: 0.01
use_cpu: true
disable_tqdm: true
""")
    return folder / "recipe.yaml"


def _command(recipe: Path, output: Path) -> tuple[object, ...]:
    return ("-m", "modeling_rebased.training.train_lm", recipe, "--output_dir", output)


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _train(recipe: Path, output: Path) -> str:
    """Run the training script to its end and return what it wrote to stderr."""
    done = run_python(*_command(recipe, output), environment=_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory) -> Path:
    """The output of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("finished")
    _train(recipe, output)
    return output


def _losses(output: Path) -> dict[int, float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_training_learns_and_reports_bits_per_byte(recipe, finished):
    losses = _losses(finished)
    assert losses[STEPS] < losses[1] - 0.5
    figures = json.loads((finished / "final" / "training_figures.json").read_text())
    assert figures["steps"] == STEPS
    assert figures["tokens_per_step"] == 2 * 64
    # A token is a byte, but for the one token that stands before the document.
    size = len(read_documents([str(recipe.parent / "heldout.txt")])[0].encode())
    expected = figures["eval_loss"] / math.log(2) * (size + 1) / size
    assert figures["eval_bits_per_byte"] == pytest.approx(expected, abs=1e-3)


def test_the_finished_folder_is_what_a_user_loads(finished):
    final = finished / "final"
    names = {path.name for path in final.iterdir()}
    assert names >= {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (REPOSITORY / "modeling_rebased").glob("*_rebased.py")} <= names
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(final / "model.safetensors").values())
    # A process that does not know the package, in a folder where it cannot be imported.
    code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainingArguments
model = AutoModelForCausalLM.from_pretrained({str(final)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(final)!r}, trust_remote_code=True)
output = model.generate(**tokenizer("The quick", return_tensors="pt"), max_new_tokens=5, do_sample=False)
print(type(model).__module__.split(".")[0], output.shape[1])
"""
    done = run_python("-c", code, folder=finished)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].split() == ["transformers_modules", "14"]


def test_a_run_killed_by_sigkill_resumes_exactly(recipe, finished, tmp_path):
    output = tmp_path / "killed"
    process = start_python(*_command(recipe, output), environment=_environment(), output=tmp_path)
    # Kill it while it trains on, after its first checkpoint and before its last.
    deadline = time.monotonic() + 240
    while latest_complete_checkpoint(str(output)) is None:
        assert process.is_alive(), (tmp_path / "stderr").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (output / "final").exists()
    # What a kill in the middle of saving would leave: the newest folder, without its last file's end.
    torn = output / "checkpoint-18"
    torn.mkdir(exist_ok=True)
    (torn / "trainer_state.json").write_text('{"global_step": 18, "log_hist')

    messages = _train(recipe, output)
    assert "checkpoint-18 is incomplete and is ignored" in messages
    assert "Resuming from" in messages
    expected, got = (load_file(folder / "final" / "model.safetensors") for folder in (finished, output))
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    assert _losses(output) == _losses(finished)


def test_latest_complete_checkpoint(tmp_path):
    assert latest_complete_checkpoint(str(tmp_path / "missing")) is None
    for step in (9, 10, 200):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save({}, folder / "rng_state.pth")
    assert latest_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-200")
    (tmp_path / "checkpoint-200" / "trainer_state.json").write_text("")
    assert latest_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    # Two processes go on with what one has trained.
    assert latest_complete_checkpoint(str(tmp_path), processes=2) == str(tmp_path / "checkpoint-10")
    # Two processes trained, one of them was killed before it saved its random state.
    (tmp_path / "checkpoint-10" / "rng_state.pth").rename(tmp_path / "checkpoint-10" / "rng_state_0.pth")
    (tmp_path / "checkpoint-9" / "rng_state.pth").unlink()
    assert latest_complete_checkpoint(str(tmp_path), processes=2) is None
    torch.save({}, tmp_path / "checkpoint-10" / "rng_state_1.pth")
    assert latest_complete_checkpoint(str(tmp_path), processes=2) == str(tmp_path / "checkpoint-10")


def test_a_run_knows_the_fewest_processes_that_trained_it(tmp_path):
    RunRecord(tmp_path, {"data": 1}, processes=4).write()
    second = RunRecord(tmp_path, {"data": 1}, processes=2)
    second.check()
    second.write()
    third = RunRecord(tmp_path, {"data": 1}, processes=8)
    third.check()
    assert third.fewest_processes == 2


def test_the_command_line_wins_over_the_recipe(recipe, tmp_path):
    _, data_args, args = parse_arguments([str(recipe), "--max_steps", "7", "--output_dir", str(tmp_path)])
    assert args.max_steps == 7
    assert args.save_steps == 6
    assert args.use_cpu is True
    assert data_args.train_file[0].endswith("train.txt")


def test_a_recipe_may_leave_fields_out_and_hold_lists_and_objects():
    content = {"eval_file": None, "train_file": ["a", "b"], "lr_scheduler_kwargs": {"min_lr": 1e-5}, "bf16": False}
    assert command_line(content) == [
        *("--train_file", "a", "b", "--lr_scheduler_kwargs", '{"min_lr": 1e-05}', "--bf16", "False")
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file or directory: '.*recipe.yaml'"),
        ("", "recipe .*recipe.yaml must hold lines .* but holds None"),
        ("- learning_rate", "recipe .*recipe.yaml must hold lines"),
        ("a: [1", "recipe .*recipe.yaml is no YAML"),
        ("a: \udcff", "recipe .*recipe.yaml is no YAML: 'utf-8' codec"),
    ],
)
def test_a_wrong_recipe_is_an_error_that_names_it(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit, match=f"rebased-train: error: .*{message}"):
        train_lm.main([str(path), "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--learning_rat", "3"), "unrecognized arguments: --learning_rat 3;"),
        (("--eval_delayed", "3"), "unrecognized arguments: --eval_delayed 3;"),
        (("--load_best_model_at_end", "True", "--eval_strategy", "no"), "--load_best_model_at_end requires"),
        (("--learning_rate", "-1"), "--learning_rate must be at least 0 and finite, got -1"),
        (("--weight_decay", "nan"), "--weight_decay must be at least 0 and finite, got nan"),
        (("--adam_beta2", "1"), "--adam_beta2 must be at least 0 and less than 1, got 1"),
        (("--max_grad_norm", "-1"), "--max_grad_norm must be at least 0 and finite, got -1"),
        (("--save_steps", "0"), "--save_steps must be positive, got 0; --save_strategy no writes"),
        (("--per_device_train_batch_size", "0"), "--per_device_train_batch_size must be at least 1, got 0"),
        (("--gradient_accumulation_steps", "0"), "--gradient_accumulation_steps must be at least 1, got 0"),
        (("--label_smoothing_factor", "2"), "--label_smoothing_factor must be at least 0 and less than 1, got 2"),
        (("--dataloader_num_workers", "-1"), "--dataloader_num_workers must be at least 0, got -1"),
        (("--max_steps", "0"), "--max_steps must be at least 1, or -1 to train for --num_train_epochs, got 0"),
        (("--max_steps", "-1", "--num_train_epochs", "0"), "--num_train_epochs must be positive and finite, got 0"),
        (("--warmup_steps", "nan"), "--warmup_steps must be at least 0 and finite, got nan"),
        (("--save_total_limit", "0"), "--save_total_limit must be at least 1, got 0"),
        (("--eval_accumulation_steps", "0"), "--eval_accumulation_steps must be at least 1, got 0"),
        (("--logging_steps", "-1"), "--logging_steps must be positive and finite, got -1"),
        (("--seed", "-1"), "--seed must be at least 0 and less than 2**32, got -1"),
        (("--eval_steps", "5"), "--eval_steps is for --eval_strategy steps, which is no"),
        (("--eval_strategy", "steps", "--eval_steps", "-3"), "--eval_steps must be positive and finite, got -3"),
        (("--eval_delay", "-1"), "--eval_delay must be at least 0 and finite, got -1"),
        (("--metric_for_best_model", "bleu"), "--metric_for_best_model must be one of loss, bits_per_byte, got bleu"),
        (("--report_to", "nothing"), "--report_to must be of none"),
        (("--optim", "adamw_bnb_8bit"), "--optim adamw_bnb_8bit: You need to install `bitsandbytes`"),
        (("--lr_scheduler_type", "cosine_with_min_lr"), "--lr_scheduler_type cosine_with_min_lr with --lr_scheduler_"),
        (("--lr_scheduler_kwargs", '{"x": 1}'), '--lr_scheduler_type cosine with --lr_scheduler_kwargs {"x": 1}: '),
        (("--torch_compile_mode", "x"), "--torch_compile_mode must be one of default, "),
        (("--torch_compile_backend", "x"), "--torch_compile_backend must be one of no, eager, "),
        (("--gradient_checkpointing_kwargs", '{"x": 1}'), "--gradient_checkpointing_kwargs is for --gradient_check"),
        (("--resume_from_checkpoint", "no"), "--resume_from_checkpoint no is no checkpoint"),
        (("--use_liger_kernel", "True"), "--use_liger_kernel has no kernels for ReBased"),
        (("--push_to_hub", "True"), "--push_to_hub needs a token of the Hub"),
        (("--push_to_hub", "True", "--hub_model_id", "a/b/c"), "--hub_model_id a/b/c is no repository's name"),
        (("--push_to_hub", "True", "--output_dir", "a b"), "--output_dir (used as --hub_model_id) a b is no repos"),
        (("--push_to_hub", "True", "--hub_strategy", "checkpoint"), "--hub_strategy checkpoint is not possible"),
        (("--hub_model_id", "a/b"), "--hub_model_id is for --push_to_hub True, which is not given"),
        (("--hub_token", "hf_x"), "--hub_token is for --push_to_hub True, which is not given"),
    ],
)
def test_an_unknown_or_impossible_argument_is_an_error_with_a_short_usage(
    recipe, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr("modeling_rebased.training.hub.get_token", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        parse_arguments([str(recipe), "--output_dir", str(tmp_path), *arguments])
    usage, error = capsys.readouterr().err.split("\n", 1)
    assert usage == "usage: rebased-train [RECIPE.yaml] [options]"
    assert error.startswith("rebased-train: error: ") and message in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--train_file", "nowhere.txt"), "--train_file: there is no nowhere.txt"),
        (("--eval_file", "nowhere.txt"), "--eval_file: there is no nowhere.txt"),
        (("--context_length", "0"), "--context_length is 0; it must be at least 2"),
        (("--tokenizer", "./nowhere"), "--tokenizer ./nowhere gives no tokenizer"),
        (("--output_dir", __file__), "--output_dir .* is a file"),
        (("--output_dir", f"{__file__}/out"), "--output_dir .* would lie in the file .*test_train_lm.py; it must be"),
        (("--kernel_backend", "triton"), "--kernel_backend triton cannot run here: no GPU"),
    ],
)
def test_a_path_length_or_backend_that_cannot_be_used_is_an_error(recipe, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(train_lm, "triton_unavailable_reason", lambda *given: "no GPU")
    with pytest.raises(SystemExit, match=f"rebased-train: error: {message}"):
        train_lm.main([str(recipe), "--output_dir", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_an_evaluation_needs_text_and_the_best_model_has_the_fewest_bits(recipe, tmp_path, capsys):
    arguments = [str(recipe), "--output_dir", str(tmp_path / "out")]
    for given in (("--eval_strategy", "steps"), ("--eval_on_start", "True")):
        with pytest.raises(SystemExit, match="2"):
            parse_arguments(["--train_file", "a", *arguments[1:], *given])
        assert f"error: {' '.join(given)} needs --eval_file, which is not given" in capsys.readouterr().err
    for metric in ("loss", "eval_bits_per_byte"):
        assert parse_arguments([*arguments, "--metric_for_best_model", metric])[2].greater_is_better is False


def test_too_little_text_leaves_no_folder(recipe, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    arguments = [str(recipe), "--output_dir", str(tmp_path / "out"), "--train_file", str(tmp_path / "short.txt")]
    with pytest.raises(SystemExit, match=r"--context_length is 64, but .*short.txt holds only 6 tokens"):
        train_lm.main(arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "has no config.json that is a JSON object: "),
        ("[]", "has no config.json that is a JSON object: "),
        ({}, "has no configuration of a known and possible model: "),
        ({"feature_dim": "x"}, "has no configuration of a known and possible model: .*'feature_dim'"),
        ({"num_key_value_heads": 5}, "has no configuration of a known and possible model: .*`num_key_value_heads`"),
        (
            {"position_embedding_type": "learned", "max_position_embeddings": 8},
            "--context_length is 64, but the model has learned positions for 8 tokens",
        ),
    ],
)
def test_a_wrong_configuration_is_an_error_and_leaves_no_folder(recipe, tmp_path, content, message):
    if isinstance(content, dict):
        content = json.dumps(content and {"model_type": "rebased", "vocab_size": 264, **content})
    (tmp_path / "config.json").write_text(content)
    arguments = [str(recipe), "--config", str(tmp_path), "--context_length", "64"]
    with pytest.raises(SystemExit, match=f"rebased-train: error: .*{message}"):
        train_lm.main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("has_bf16", [True, False])
def test_defaults_of_a_gpu(recipe, tmp_path, monkeypatch, has_bf16):
    """They are off on the CPU, and bfloat16 where the command or accelerate asks for float16."""

    def defaults(*given, **environment):
        with monkeypatch.context() as launched:
            for name, value in environment.items():
                launched.setenv(name, value)
            _, fp16, _, bf16, _, compiled, *more = gpu_defaults(given, "compile_layers")
        assert more == (["--accelerator_config", '{"non_blocking": true}'] if compiled == "True" else [])
        return fp16 == "True", bf16 == "True", compiled == "True"

    assert defaults() == (False, False, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: has_bf16)
    assert defaults() == defaults("--use_cpu", "false") == (False, has_bf16, True)
    assert defaults("--use_cpu") == defaults("--use-cpu", "True", "--seed", "1") == (False, False, False)
    assert defaults(ACCELERATE_USE_CPU="True") == (False, False, False)  # `accelerate launch --cpu`
    assert defaults("--fp16") == defaults(ACCELERATE_MIXED_PRECISION="fp16") == (True, False, True)
    assert defaults("--bf16", ACCELERATE_MIXED_PRECISION="fp16") == (False, has_bf16, True)
    assert defaults(ACCELERATE_MIXED_PRECISION="no") == (False, has_bf16, True)  # also where nothing is asked for
    assert gpu_defaults(["--use_cpu", "maybe"]) == []  # the parser of all arguments says what is wrong
    arguments = [str(recipe), "--output_dir", str(tmp_path)]  # the recipe says `use_cpu: true`
    args = parse_arguments(arguments)[2]
    assert (args.use_cpu, args.bf16, args.compile_layers) == (True, False, False)
    assert args.accelerator_config.non_blocking is False
    assert parse_arguments([*arguments, "--bf16", "True"])[2].bf16 is True
    distilled = ["--stage", "logits", "--teacher", "t", "--student", "s", "--train_file", "f", "--use_cpu"]
    assert distill.parse_arguments([*distilled, "--output_dir", str(tmp_path)])[1].bf16 is False


def test_one_process_uses_one_gpu(recipe, tmp_path, monkeypatch, caplog):
    """The Trainer would use all of a machine by nn.DataParallel."""
    gpus = property(lambda args: vars(args).get("_n_gpu") or 4)
    monkeypatch.setattr(TrainingArguments, "n_gpu", gpus)
    args = parse_arguments([str(recipe), "--output_dir", str(tmp_path)])[2]
    assert (args.n_gpu, args.train_batch_size) == (1, args.per_device_train_batch_size)
    assert "accelerate launch --multi_gpu --num_processes 4" in caplog.text


def test_processes_on_a_cpu_that_would_each_train_alone(recipe, tmp_path, monkeypatch):
    args = parse_arguments([str(recipe), "--output_dir", str(tmp_path)])[2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _wrong_value(args) is None  # a variable of another program
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "2 processes would each train alone into one folder" in _wrong_value(args)


def test_blocks_hold_the_text_in_order(tmp_path, finished):
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    text = tmp_path / "text.txt"
    text.write_text("<|endoftext|>abc<|endoftext|>defgh")
    blocks = TokenBlocks([str(text)], tokenizer, 4, str(tmp_path))
    assert [block["input_ids"].tolist() for block in blocks] == [[256, 97, 98, 99], [256, 100, 101, 102]]
    assert [path.suffix for path in tmp_path.glob("tokens-*")] == [".bin"]
    with pytest.raises(ValueError, match="context_length is 400"):
        TokenBlocks([str(text)], tokenizer, 400, str(tmp_path))


def test_the_model_is_given_blocks_and_no_mask(recipe, tmp_path, monkeypatch):
    given = []

    class Seen(Exception):
        pass

    def look(self, model, inputs, *args, **kwargs):
        given.append(inputs)
        raise Seen

    monkeypatch.setattr(train_lm.LMTrainer, "training_step", look)
    with pytest.raises(Seen):
        train_lm.main([str(recipe), "--output_dir", str(tmp_path)])
    assert sorted(given[0]) == ["input_ids", "labels"]  # a mask of ones would cost time in every layer
    assert given[0]["input_ids"].shape == (2, 64)


def _again(recipe: Path, output: Path, *more: str) -> None:
    """Give the command once more, in this process."""
    train_lm.main([str(recipe), "--output_dir", str(output), *more])


def test_a_finished_run_says_so_and_is_left_alone(recipe, finished, capsys):
    before = (finished / "final" / "model.safetensors").stat()
    for more in ([], ["--max_steps", str(STEPS - 1)]):
        _again(recipe, finished, *more)
        assert f"is finished, after {STEPS} steps: nothing is left to do" in capsys.readouterr().out
    assert (finished / "final" / "model.safetensors").stat() == before


def test_a_run_without_a_whole_batch_is_an_error_and_writes_no_model(recipe, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match="error: nothing was trained: the text holds less than a batch"):
        _again(recipe, output, "--dataloader_drop_last", "True", "--per_device_train_batch_size", "9999")
    assert not (output / "final").exists()


def test_a_checkpoint_of_another_model_is_an_error(recipe, finished, tmp_path):
    config = {"model_type": "rebased", "vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 2}))
    checkpoint = latest_complete_checkpoint(str(finished))
    arguments = ("--config", str(tmp_path), "--context_length", "64", "--resume_from_checkpoint", checkpoint)
    with pytest.raises(SystemExit, match=r"--resume_from_checkpoint .* holds another model: .* size mismatch"):
        _again(recipe, tmp_path / "out", *arguments, "--max_steps", "99")


def test_push_to_hub_uploads_the_finished_model_alone(recipe, tmp_path, monkeypatch):
    """Offline: the calls to the Hub are caught. The first upload fails, and the command is given again."""
    output, calls, reached = tmp_path / "out", [], []

    def create_repo(self, repo_id, **arguments):
        calls.append(("create", repo_id, self.token, arguments))
        if repo_id == "refused":
            raise ConnectionError("no such host")
        return RepoUrl(f"https://huggingface.co/user/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **arguments):
        calls.append(("upload", repo_id, self.token, arguments))
        assert Path(folder_path) == output / "final"
        if not reached:
            raise ConnectionError("no such host")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_branch", lambda self, *given, **named: calls.append(("branch", given, named)))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    step = LMTrainer.training_step
    monkeypatch.setattr(LMTrainer, "training_step", lambda *given: calls.append("step") or step(*given))
    arguments = ["--push_to_hub", "True", "--hub_token", "hf_secret", "--hub_private_repo", "True"]
    arguments += ["--max_steps", "1", "--save_steps", "1"]
    with pytest.raises(SystemExit, match=r"--push_to_hub cannot upload to 'refused': ConnectionError: no such host"):
        _again(recipe, output, *arguments, "--hub_model_id", "refused")
    calls.clear()
    arguments += ["--hub_revision", "v1"]
    with pytest.raises(SystemExit, match=r"final is complete, but its upload to 'user/out' failed: Conn"):
        _again(recipe, output, *arguments)
    create = ("create", "out", "hf_secret", {"private": True, "exist_ok": True})
    branch = ("branch", ("user/out",), {"branch": "v1", "exist_ok": True})
    upload = ("upload", "user/out", "hf_secret", {"revision": "v1", "commit_message": "Upload the model"})
    assert calls == [create, branch, "step", upload]
    assert (output / "checkpoint-1").is_dir()
    card = (output / "final" / "README.md").read_text()
    assert card.count('from_pretrained("user/out"') == card.count("from_pretrained(") == 2
    assert "hf_secret" not in card and "--hub_token ..." in card
    calls.clear()
    reached.append(True)
    _again(recipe, output, *arguments)
    assert calls == [create, branch, upload]


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(recipe, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "more")
    _again(recipe, tmp_path / "more", "--max_steps", str(STEPS + 2))
    assert list(_losses(tmp_path / "more")) == list(range(1, STEPS + 3))


def test_a_run_killed_after_its_last_checkpoint_takes_no_further_step(recipe, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "final")
    _again(recipe, tmp_path / "killed")
    assert _losses(tmp_path / "killed") == _losses(finished)
    expected, got = (load_file(folder / "final" / "model.safetensors") for folder in (finished, tmp_path / "killed"))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_folder_of_another_run_is_refused(recipe, finished, tmp_path):
    (tmp_path / "other.txt").write_text("Another text. " * 40)
    config = json.loads((recipe.parent / "config.json").read_text()) | {"hidden_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for more, words in (
        (
            ["--train_file", str(tmp_path / "other.txt")],
            r"--train_file \(a hash of its text\) was '\w+' and is '\w+' now",
        ),
        (["--config", str(tmp_path)], "configuration.hidden_size was 32 and is 48 now"),
        (["--context_length", "32"], "--context_length was 64 and is 32 now"),
        (["--seed", "1"], "--seed was 42 and is 1 now"),
        (["--tokenizer", str(finished / "final")], None),  # the same one, from a folder
    ):
        if words is None:
            _again(recipe, finished, *more)
            continue
        with pytest.raises(SystemExit, match=f"holds another run: .*{words}"):
            _again(recipe, finished, *more)


def test_a_model_is_trained_further(recipe, finished, tmp_path, caplog):
    without_config = tmp_path / "recipe.yaml"
    without_config.write_text(recipe.read_text().replace(f"config: {recipe.parent}\n", ""))
    shutil.copytree(finished / "final", tmp_path / "trained")
    settings = {"do_sample": True, "temperature": 0.7, "eos_token_id": [256, 65]}
    GenerationConfig(**settings).save_pretrained(tmp_path / "trained")
    _again(without_config, tmp_path / "out", "--model", str(tmp_path / "trained"), "--max_steps", "1")
    kept = json.loads((tmp_path / "out" / "final" / "generation_config.json").read_text())
    kept.pop("transformers_version")
    assert kept == settings | {"bos_token_id": 256, "pad_token_id": 257}
    # its first loss is that of a trained model: all but the dropout and bfloat16's rounding
    assert _losses(tmp_path / "out")[1] == pytest.approx(_losses(finished)[STEPS], abs=0.5)
    assert _losses(tmp_path / "out")[1] < _losses(finished)[1] - 0.5


def test_arguments_that_cannot_be(recipe, finished, tmp_path):
    without_config = tmp_path / "recipe.yaml"
    without_config.write_text(recipe.read_text().replace(f"config: {recipe.parent}\n", ""))
    for arguments, words in (
        ([], "give either --config, to train a new model, or --model"),
        (["--config", "nope"], "--config nope is no folder, nor one of the configurations 1.3b-rebased, .*english-6m"),
        (["--model", "nope"], "--model nope is no folder"),
        (["--model", str(recipe.parent)], r"holds no \.safetensors; --config .* would train a new model"),
        (["--config", str(recipe.parent), "--context_length", "99999"], "--context_length is 99999"),
    ):
        with pytest.raises(SystemExit, match=words):
            _again(without_config, tmp_path / "out", *arguments)


def test_what_may_be_a_mistake_is_said(recipe, finished, monkeypatch):
    said = []
    monkeypatch.setattr(train_lm.logger, "warning", said.append)
    config = train_lm.load_config(train_lm.ModelArguments(config=str(finished / "final")))
    assert f"--model {finished / 'final'} would start from the weights there" in said[0]
    config.vocab_size = 50257
    train_lm.load_tokenizer(train_lm.ModelArguments(config="x"), config, 64)
    assert "vocab_size is 50257, but the tokenizer 'bytes' has only 258 tokens" in said[1]


def test_the_card_says_how_the_model_was_trained(recipe, finished):
    card = (finished / "final" / "README.md").read_text(encoding="utf-8")
    assert f"python -m modeling_rebased.training.train_lm {recipe}" in card
    for words in (
        "| train.txt | training |",
        "| learning rate | 0.01, cosine |",
        f"torch {torch.__version__}",
        "bits per byte of the held-out text",
        "model.generate(**inputs, max_new_tokens=50)",
        f'AutoTokenizer.from_pretrained("{finished / "final"}", trust_remote_code=True)',
    ):
        assert words in card, words
    assert "license" not in card


def test_generation_settings_are_the_tokens_alone(finished):
    settings = json.loads((finished / "final" / "generation_config.json").read_text())
    settings.pop("transformers_version")
    assert settings == {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}


def test_the_tokenizer_pads_left_and_knows_the_length(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished / "final")
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length == 64


def test_help_shows_the_scripts_own_options_first(capsys):
    for argument, hidden in (("--help", True), ("--help-all", False)):
        with pytest.raises(SystemExit, match="0"):
            parse_arguments([argument])
        said = capsys.readouterr().out
        assert said.index("\n  --config CONFIG") < said.index("\n  --output_dir")
        assert "english-6m" in said and "(default: 0.001)" in said
        assert ("\n  --ddp_timeout" not in said) is hidden
        assert len(said.splitlines()) < 120 or not hidden


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_the_residual_stream_of_mixed_precision_is_narrow(norm):
    """Embeddings and norms give bfloat16 under autocast; weights and gradients stay in float32."""
    config = ReBasedConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=2, layer_types=["conv", "linear_attention"], norm_type=norm,
        intermediate_size=8, num_attention_heads=1, head_dim=4, feature_dim=2, position_embedding_type="learned",
    )  # fmt: skip
    torch.manual_seed(0)
    model = ReBasedForCausalLM(config)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    expected = model(ids, labels=ids).loss
    train_lm.narrow_activations(model)
    assert torch.equal(model(ids, labels=ids).loss, expected)
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.extend((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert set(seen) == {torch.bfloat16} and abs(loss - expected) < 1e-2
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_every_kind_of_layer_has_compiled_versions_of_its_own(monkeypatch):
    """Dynamo counts the versions of all layers together, and would run what comes after the last uncompiled."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    config = ReBasedConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=2, layer_types=["conv", "linear_attention"], mlp_type="none",
        num_attention_heads=1, head_dim=4, feature_dim=2,
    )  # fmt: skip
    model = ReBasedForCausalLM(config).eval()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        train_lm.compile_layers(model)
        assert torch._dynamo.config.recompile_limit == 16
        with torch.no_grad():
            model(torch.zeros(1, 5, dtype=torch.int64), use_cache=False)
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [False, True])
def test_label_smoothing_in_training_only(tmp_path, recipe, compiled):
    """The training loss is that of the shifted labels, also of a compiled model; bits per byte are not smoothed."""
    data = TokenBlocks([str(recipe.parent / "heldout.txt")], byte_tokenizer(), 64, str(tmp_path))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "feature_dim": 4, "num_hidden_layers": 2}
    model = ReBasedForCausalLM(ReBasedConfig(vocab_size=264, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        batch = [data[i] for i in range(len(data))]
        log = model(torch.stack([row["input_ids"] for row in batch])).logits[:, :-1].double().log_softmax(-1)
        nll = -torch.stack([log[i].gather(-1, row["labels"][1:, None])[:, 0] for i, row in enumerate(batch)]).mean()
        smoothed = 0.9 * nll - 0.1 * log.mean()
    arguments = LMTrainingArguments(
        str(tmp_path),
        label_smoothing_factor=0.1,
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        per_device_train_batch_size=len(data),
        use_cpu=True,
        report_to=[],
        torch_compile=compiled,
        torch_compile_backend="eager" if compiled else None,
    )
    trainer = LMTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(smoothed.item(), abs=2e-4)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(nll.item(), abs=1e-4)
    assert trainer.state.log_history[-1]["eval_bits_per_byte"] == pytest.approx(
        nll.item() / math.log(2) * len(data.tokens) / data.num_bytes, abs=1e-3
    )


def test_two_models_see_the_same_batches_in_the_same_order(recipe, tmp_path):
    """A model draws random numbers for its weights, another amount for each kind. They must not change the batches."""
    data = TokenBlocks([str(recipe.parent / "train.txt")], byte_tokenizer(), 64)
    orders = []
    for kinds in (["conv", "linear_attention"], ["full_attention"]):
        train_lm.set_seed(3)
        config = ReBasedConfig(hidden_size=16, num_attention_heads=2, layer_types=kinds, num_hidden_layers=len(kinds))
        args = LMTrainingArguments(output_dir=str(tmp_path), seed=3, per_device_train_batch_size=4, use_cpu=True)
        loader = LMTrainer(model=ReBasedForCausalLM(config), args=args, train_dataset=data).get_train_dataloader()
        orders.append(torch.cat([batch["input_ids"] for batch in loader]))
    assert torch.equal(*orders) and not torch.equal(orders[0], data.blocks(0, len(data))[: len(orders[0])])


def test_batches_that_the_host_does_not_wait_for_are_the_same(recipe, tmp_path):
    """The option that `gpu_defaults` gives reaches accelerate's loader, and changes nothing else of it."""
    data = TokenBlocks([str(recipe.parent / "train.txt")], byte_tokenizer(), 64)
    config = ReBasedConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    orders = []
    for given in ([], ["--accelerator_config", '{"non_blocking": true}']):
        args = parse_arguments([str(recipe), "--output_dir", str(tmp_path), *given])[2]
        loader = LMTrainer(model=ReBasedForCausalLM(config), args=args, train_dataset=data).get_train_dataloader()
        assert loader._non_blocking is bool(given)
        orders.append(torch.cat([batch["input_ids"] for batch in loader]))
    assert torch.equal(*orders)


def test_a_peer_is_trained_and_saved_like_a_model_of_this_package(recipe, tmp_path):
    """Without flash-linear-attention this is transformers' own Mamba-2, which has the same configuration."""
    (tmp_path / "peer").mkdir()
    config = {"model_type": "mamba2", "vocab_size": 264, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    config |= {"num_heads": 4, "state_size": 4, "n_groups": 1, "expand": 2, "chunk_size": 16}
    (tmp_path / "peer" / "config.json").write_text(json.dumps(config))
    command = [
        str(recipe),
        "--config",
        str(tmp_path / "peer"),
        "--max_steps",
        "2",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    with pytest.raises(SystemExit, match="context_length must be given"):
        train_lm.main(command)
    train_lm.main([*command, "--context_length", "32"])
    figures = json.loads((tmp_path / "o" / "final" / "training_figures.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o" / "final", dtype=torch.float32)
    assert type(model).__name__ == "Mamba2ForCausalLM" and figures["parameters"] == model.num_parameters()
    ids = torch.tensor([list(b"The quick brown fox")])
    assert math.isfinite(model(ids, labels=ids).loss.item())
    with pytest.raises(SystemExit, match="--kernel_backend is for ReBased"):
        train_lm.main([*command, "--kernel_backend", "eager"])


def test_the_compared_models_have_the_same_size():
    """Models of flash-linear-attention are counted where it is installed."""
    sizes = {}
    peers = sorted((REPOSITORY / "configuration" / "peers").glob("*"))
    for name in ("150m-rebased", "150m-based", "150m-softmax", "150m-hybrid", *map(str, peers)):
        arguments = train_lm.ModelArguments(config=name)
        try:
            config = train_lm.load_config(arguments)
        except ValueError as error:
            assert name.endswith(("150m-gated-deltanet", "150m-rwkv7")) and "flash-linear-attention" in str(error)
            continue
        with torch.device("meta"):
            model = train_lm.load_model(arguments, config)
        model.tie_weights()
        sizes[name] = model.num_parameters()
    assert all(abs(size / sizes["150m-rebased"] - 1) < 0.02 for size in sizes.values()) and len(sizes) >= 5
