"""The comparison of linearized students with their teacher, on tiny models."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from modeling_rebased.conversion import compare_students, linearize
from modeling_rebased.conversion.compare_students import decode_speed, load, main, stages_of
from modeling_rebased.conversion.distill import batch_tokens, perplexity
from modeling_rebased.conversion.distill import main as distill
from modeling_rebased.conversion.generation import answer, judge_answers, judged_by, repeated
from modeling_rebased.conversion.prompts import TWENTY, more_prompts, on_topic
from modeling_rebased.conversion.recall import DISTANCES, FILLER, KINDS, make_item, recall
from modeling_rebased.training import text
from modeling_rebased.training.byte_tokenizer import byte_tokenizer
from modeling_rebased.training.sampling import chat
from modeling_rebased.training.text import TokenBlocks
from tests.conversion.teacher import make_teacher


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
TEXT = "the cat sat on the mat and the dog sat on the log <|endoftext|>" * 10


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = None  # as some that come out of GGUF files
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, a student that has gone through both stages, and one that has only been started."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "text.txt").write_text(TEXT)
    teacher = make_teacher(max_position_embeddings=512, eos_token_id=byte_tokenizer().eos_token_id)
    teacher.save_pretrained(folder / "teacher")
    chat_tokenizer().save_pretrained(folder / "teacher")
    for name, layers in (("pure", "pure"), ("window", "window")):
        window = 4 if layers == "window" else None
        linearize(folder / "teacher", folder / name / "start", layers=layers, feature_dim=4, window=window)
    student = "start"
    for stage in ("transfer", "logits"):
        options = f"--stage {stage} --teacher teacher --student pure/{student} --output_dir pure/{stage}".split()
        options = [str(folder / each) if not each.startswith("--") and each != stage else each for each in options]
        options += ["--train_file", str(folder / "text.txt"), "--eval_file", str(folder / "text.txt")]
        options += ["--context_length", "32", "--max_steps", "2", "--logging_steps", "1", "--save_strategy", "no"]
        assert distill([*options, "--report_to", "none", "--use_cpu", "True", "--disable_tqdm", "True"]) == 0
        student = f"{stage}/final"
    return folder


def compare(folder, output, *more):
    options = ["--teacher", str(folder / "teacher"), "--text", str(folder / "text.txt"), "--lengths", "32", "64"]
    options += ["--student", f"pure={folder / 'pure'}", "--student", f"window={folder / 'window'}"]
    options += ["--new-tokens", "4", "--context", "24", "--batches", "1", "2", "--steps", "2"]
    options += ["--no-more", "--distances", "100", "--items", "1"]
    main([str(output), *options, *more])
    return json.loads((output / "results.json").read_text())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--student", "teacher=x"], "--student: two models have the same name, of teacher, pure, window, teacher"),
        (["--text", "no.txt"], "No such file or directory: 'no.txt'"),
        (["--lengths", "1"], "--lengths is 1; it must be at least 2"),
        (
            ["--text", "elsewhere/text.npy"],
            "--text: two texts have the same name without folder and ending, of text, text",
        ),
        (["--student", "=x"], "; each must be NAME=FOLDER"),
        (["--items", "0"], "--items: must be an integer of at least 1, got '0'"),
    ],
)
def test_wrong_arguments_are_named(folder, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        compare(folder, tmp_path / "out", *more)
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_everything_is_measured_and_written(folder, tmp_path):
    results = compare(folder, tmp_path)
    found = {(row["model"], row["stage"], row["length"]): row["perplexity"] for row in results["perplexity"]}
    stages = [("teacher", ""), ("pure", "start"), ("pure", "transfer"), ("pure", "logits"), ("window", "start")]
    assert list(found) == [(*stage, length) for stage in stages for length in (32, 64)]
    said = json.loads((folder / "pure" / "logits" / "perplexity.json").read_text())["perplexity"][0]
    assert found["pure", "logits", 32] == said["student"] and found["pure", "transfer", 32] == said["before"]
    for (name, stage, length), value in found.items():
        path = folder / name / {"": "", "start": "start"}.get(stage, f"{stage}/final")
        model = load(path, torch.float32, "eager", "cpu")
        blocks = TokenBlocks([str(folder / "text.txt")], byte_tokenizer(), length)
        assert value == pytest.approx(perplexity(model, blocks), rel=1e-4)
    assert list(results["answers"]) == ["teacher", "pure", "window"] and results["prompts"] == list(TWENTY)
    assert all(len(row["texts"]) == 20 and row["judged"] > 1 for row in results["answers"].values())
    assert [(row["model"], row["batch"]) for row in results["speed"]] == [
        (name, batch) for name in ("teacher", "pure", "window") for batch in (1, 2)
    ]
    assert [(row["stage"], row["steps"]) for row in results["training"]] == [("transfer", 2), ("logits", 2)]
    own, teachers = found["pure", "logits", 32], found["teacher", "", 32]
    assert f"{own:.2f} ({own / teachers:.3f})" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "answers.md").read_text().count("| teacher | pure | window |") == 20
    assert results["notes"] == []
    worth = [(row["model"], row["prompts"], row["mode"]) for row in results["generation"]]
    assert worth == [(name, "twenty", mode) for name in results["answers"] for mode in ("greedy", "sampled")]
    assert results["generation"][0]["judged"] == results["answers"]["teacher"]["judged"]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 2 * 20
    assert [line["answer"] for line in lines[:20]] == results["answers"]["teacher"]["texts"]
    assert len(results["recall"]) == 3 * len(KINDS)


def test_a_broken_student_does_not_lose_the_others(folder, tmp_path):
    broken = shutil.copytree(folder / "window", tmp_path / "window")
    weights = broken / "start" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    students = ("--student", f"broken={broken}", "--student", f"none={tmp_path}")
    results = compare(folder, tmp_path / "out", *students, "--parts", "perplexity", "speed")
    assert {row["model"] for row in results["speed"]} == {"teacher", "pure", "window"}
    assert results["notes"][0] == f"{tmp_path} holds no stage of none."
    assert results["notes"][1:] == [
        "Failed: perplexity of broken start.",
        "Failed: speed of broken start.",
        "Failed: speed of broken start, eager.",
    ]


def test_no_time_is_noted(folder, tmp_path):
    results = compare(folder, tmp_path, "--max-seconds", "0")
    assert "There was no time for speed of teacher." in results["notes"] and "speed" not in results


def test_a_run_that_is_cut_off_has_all_parts_of_the_first_models(folder, tmp_path, monkeypatch):
    """It keeps what was measured of the model that it stopped in, and no text is encoded once per length."""
    encoded, measured = [], []

    def count_texts(documents, tokenizer, encode_all=text.encode_all):
        encoded.append(documents)
        return encode_all(documents, tokenizer)

    def cut_off(model, blocks):
        measured.append(blocks.length)
        if len(measured) == 5:  # in the window's second length
            raise KeyboardInterrupt
        return float(len(measured))

    monkeypatch.setattr(text, "encode_all", count_texts)
    monkeypatch.setattr(compare_students, "perplexity", cut_off)
    with pytest.raises(KeyboardInterrupt):
        compare(folder, tmp_path, "--parts", "perplexity", "recall")
    assert len(encoded) == 1 and measured == [32, 64, 64, 32, 64]  # distill has measured a student at 32
    results = json.loads((tmp_path / "results.json").read_text())
    found = [(row["model"], row["stage"], row["length"]) for row in results["perplexity"]]
    assert [each for each in found if each[1] != "transfer"] == [
        ("teacher", "", 32),
        ("teacher", "", 64),
        ("pure", "start", 32),
        ("pure", "logits", 32),
        ("pure", "logits", 64),
        ("window", "start", 32),
    ]
    assert {row["model"] for row in results["recall"]} == {"teacher", "pure"}


def test_answers_of_a_backend_that_fails_are_replaced(folder, tmp_path, monkeypatch):
    """answers.jsonl holds the answers of one run, each of them once."""
    calls = []

    def judge(model, tokenizer, topics, answers):
        calls.append(topics)
        if len(calls) == 2:
            raise RuntimeError("a kernel that cannot be compiled")
        return dict.fromkeys(("judged", "repeated", "ended", "on_topic", "good"), 0.5)

    monkeypatch.setattr(
        compare_students, "answer", lambda model, tokenizer, prompts, *_: [("yes", True)] * len(prompts)
    )
    monkeypatch.setattr(compare_students, "judge_answers", judge)
    (tmp_path / "answers.jsonl").write_text("of another run\n")
    results = compare(folder, tmp_path, "--parts", "answers")
    assert results["notes"] == ["Failed: answers of teacher."]
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == len({(line["model"], line["mode"], line["prompt"]) for line in lines}) == 3 * 2 * 20
    assert len(results["generation"]) == 3 * 2


def test_a_student_without_a_finished_stage_does_not_stop_the_others(folder, tmp_path):
    """distill has measured it, but the model is not there."""
    shutil.copytree(folder / "pure" / "transfer", tmp_path / "lost" / "transfer")
    shutil.rmtree(tmp_path / "lost" / "transfer" / "final")
    results = compare(folder, tmp_path / "out", "--student", f"lost={tmp_path / 'lost'}", "--parts", "perplexity")
    assert results["notes"] == [f"{tmp_path / 'lost'} holds no stage of lost."]
    assert {row["model"] for row in results["perplexity"]} == {"teacher", "pure", "window", "lost"}


def test_weights_are_not_made_up(folder, tmp_path):
    """The library only warns of a weight that is missing."""
    shutil.copytree(folder / "window" / "start", tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        load(tmp_path / "part", torch.float32, "eager", "cpu")


def test_perplexity(folder):
    model = load(folder / "teacher", torch.float64, "eager", "cpu")
    blocks = TokenBlocks([str(folder / "text.txt")], byte_tokenizer(), 40)
    with torch.no_grad():
        losses = [model(**{name: ids[None] for name, ids in block.items()}).loss.item() for block in blocks]
    assert perplexity(model, blocks) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)


@pytest.mark.parametrize(("vocab_size", "tokens"), [(258, 16384), (49152, 16384), (151936, 7067), (10**6, 4096)])
def test_the_logits_of_a_batch_fit_a_gpu(vocab_size, tokens):
    config = ReBasedConfig(vocab_size=vocab_size)
    assert batch_tokens(SimpleNamespace(device=torch.device("cuda"), config=config)) == tokens
    assert batch_tokens(SimpleNamespace(device=torch.device("cpu"), config=config)) == 4096


def test_decoding_goes_on_from_the_context(folder):
    """Each row of a repeated cache says what one pass over all tokens says; only softmax's cache grows."""
    sizes = {}
    for name in ("teacher", "pure/start", "window/start"):
        model = load(folder / name, torch.float32, "eager", "cpu")
        for length in (20, 40):
            ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))
            seen = []
            model.register_forward_hook(
                lambda module, args, kwargs, output, seen=seen: seen.append((kwargs["input_ids"], output.logits)),
                with_kwargs=True,
            )
            rows = decode_speed(model, ids, [1, 3], steps=2, piece=7)
            sizes[name, length] = [row["cache_mib"] for row in rows]
            ones, threes = ([each for each in seen if each[0].shape == (n, 1)] for n in (1, 3))
            ones = ones[-5:]  # a piece of the context may be one token too
            assert len(threes) == 5
            text = torch.cat([ids, *(each for each, _ in ones), *(each[:1] for each, _ in threes)], dim=1)
            with torch.no_grad():
                whole = model(input_ids=text, use_cache=False).logits[:, -5:]
            for step, (_, logits) in enumerate(threes):
                torch.testing.assert_close(logits[:, 0], whole[:, step].expand(3, -1), atol=1e-4, rtol=1e-4)
    assert sizes["pure/start", 20] == sizes["pure/start", 40]
    assert sizes["teacher", 40][0] > 1.5 * sizes["teacher", 20][0]
    assert all(two > 2.9 * one for one, two in sizes.values())


def test_the_judge(folder):
    judge = load(folder / "teacher", torch.float32, "eager", "cpu")
    tokenizer = chat_tokenizer()
    before = chat(tokenizer, ("Hello?",))["input_ids"]
    after = torch.tensor([list(b"Hi there")])
    with torch.no_grad():
        logits = judge(input_ids=torch.cat([before, after], dim=1)).logits[0, before.shape[1] - 1 : -1]
    expected = math.exp(torch.nn.functional.cross_entropy(logits, after[0]).item())
    assert judged_by(judge, tokenizer, ("Hello?", "What?"), ["Hi there", ""]) == pytest.approx(expected, rel=1e-4)


def test_answers_that_end_are_told_from_those_that_do_not(folder):
    model, tokenizer = load(folder / "teacher", torch.float32, "eager", "cpu"), chat_tokenizer()
    said = answer(model, tokenizer, ["Hi", "A longer question"], 60, "sampled")
    assert said == answer(model, tokenizer, ["Hi", "A longer question"], 60, "sampled")
    (text, ended), _ = said
    assert ended == (len(text.encode()) < 60) or "\ufffd" in text
    alone = chat(tokenizer, ["Hi"])["input_ids"]
    greedy = model.generate(alone, max_new_tokens=3, do_sample=False, repetition_penalty=1.1)[0, alone.shape[1] :]
    assert answer(model, tokenizer, ["Hi", "A longer question"], 3, "greedy")[0][0] == tokenizer.decode(greedy)


def test_what_answers_are_worth(folder):
    judge, tokenizer = load(folder / "teacher", torch.float32, "eager", "cpu"), chat_tokenizer()
    topics = {"About dogs?": ("dog", "pupp"), "And 40 plus 2?": ("42",), "Say what.": ("light",)}
    answers = [("Puppies bark at a dog.", True), ("It is 420 or so.", False), ("I am delighted.", True)]
    worth = judge_answers(judge, tokenizer, topics, answers)
    assert worth["ended"] == pytest.approx(2 / 3) and worth["on_topic"] == pytest.approx(2 / 3)
    assert worth["good"] == pytest.approx(1 / 3)
    assert worth["judged"] == judged_by(judge, tokenizer, list(topics), [text for text, _ in answers])


def test_prompts():
    more = more_prompts()
    assert len(TWENTY) == 20 and len(more) == 200 and not set(TWENTY) & set(more)
    assert all(
        "{" not in prompt and all(on_topic(prompt, (word,)) for word in words) for prompt, words in more.items()
    )
    assert on_topic("Sleeping well", ("sleep",)) and not on_topic("asleep", ("sleep",))


def test_recall_asks_for_what_stands_before(folder):
    tokenizer = chat_tokenizer()
    for kind in KINDS:
        before, value = make_item(tokenizer, kind, 3 * len(FILLER) + 5, seed=1)
        text, said = tokenizer.decode(before), tokenizer.decode(value)
        assert text.count(FILLER) == 3 and text.count(said.strip()) == 1 and text.startswith("<user>Some special")
        assert text.index(said.strip()) < text.index(FILLER) and text.endswith("<a>" + text.split("<a>")[1])
        assert tokenizer(text + said, add_special_tokens=False)["input_ids"] == [*before.tolist(), *value.tolist()]
        assert make_item(tokenizer, kind, 300, seed=1)[1].tolist() == value.tolist()
        assert any(make_item(tokenizer, kind, 300, seed=i)[1].tolist() != value.tolist() for i in range(2, 5))
    assert max(DISTANCES) == 4000

    class Perfect(torch.nn.Module):
        """Knows the value of one item, and is sure of something else in others."""

        device = torch.device("cpu")
        known = make_item(tokenizer, "name", 200, 0)

        def forward(self, input_ids, logits_to_keep, **kwargs):
            before, value = self.known
            logits = torch.zeros(1, logits_to_keep, 258)
            if input_ids[0, : len(before)].tolist() == before.tolist():
                logits[0, torch.arange(len(value)), value] = 50.0
            return type("Output", (), {"logits": logits})

    rows = {(row["kind"], row["distance"]): row for row in recall(Perfect(), tokenizer, [200, 400], 1)}
    assert rows["name", 200]["right"] == 1 and rows["name", 200]["loss"] < 1e-6
    assert rows["name", 400]["right"] == rows["number", 200]["right"] == 0
    assert rows["name", 400]["loss"] == pytest.approx(math.log(258), rel=1e-5)


def test_repetition():
    assert repeated(["one two three four five six"]) == 0.0
    assert repeated(["a b c d a b c d"]) == pytest.approx(1 / 5)
    assert repeated(["", "word"]) == 0.0


def test_stages(folder):
    assert list(stages_of(folder / "pure")) == ["start", "transfer", "logits"]
    assert stages_of(folder / "teacher") == {"student": folder / "teacher"}
    assert stages_of(folder) == {}


def test_the_student_is_one_of_ours(folder):
    assert isinstance(load(folder / "pure" / "start", torch.float32, "eager", "cpu"), ReBasedForCausalLM)
