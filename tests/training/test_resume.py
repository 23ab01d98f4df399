"""Where a run goes on, and when its folder holds another one: the record and the checkpoints, without training."""

import contextlib
import hashlib
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerState

from modeling_rebased.training.resume import (
    RunRecord,
    latest_complete_checkpoint,
    train_from,
    weights_identity,
)


def refused(message: str, whole: bool = True):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}{'$' if whole else ''}")


def make_checkpoint(folder, step=3, text=None, states=("rng_state.pth",)):
    folder.mkdir(parents=True)
    text = json.dumps({"global_step": step}) if text is None else text
    (folder / "trainer_state.json").write_text(text)
    for name in states:
        torch.save({"cpu": torch.get_rng_state()}, folder / name)
    return str(folder)


def test_the_newest_complete_checkpoint(tmp_path, caplog):
    assert latest_complete_checkpoint(tmp_path) is None
    kept = make_checkpoint(tmp_path / "checkpoint-3")
    make_checkpoint(tmp_path / "checkpoint-20", step=19)
    make_checkpoint(tmp_path / "checkpoint-30-old", step=30)
    make_checkpoint(tmp_path / "xcheckpoint-40", step=40)
    for number, text in enumerate(("{", "[]", "{}", '"')):
        make_checkpoint(tmp_path / f"checkpoint-{100 + number}", text=text)
    (tmp_path / "checkpoint-200").mkdir()
    assert latest_complete_checkpoint(str(tmp_path)) == kept
    told = [record.message for record in caplog.records]
    assert len(told) == 5 and told[0].startswith(f"{tmp_path / 'checkpoint-200'} is incomplete and is ignored: ")


def test_random_states_of_all_processes(tmp_path, caplog):
    two = make_checkpoint(tmp_path / "checkpoint-3", states=("rng_state_0.pth", "rng_state_1.pth"))
    assert [latest_complete_checkpoint(tmp_path, n) for n in (1, 2, 3)] == [two, two, None]
    assert caplog.records[-1].message == (
        f"{two} is incomplete and is ignored: the states of some processes' random number generators are missing"
    )
    torn = tmp_path / "checkpoint-3" / "rng_state_1.pth"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-100])
    assert latest_complete_checkpoint(tmp_path, 2) is None
    torn.write_bytes(whole)
    one = make_checkpoint(tmp_path / "one" / "checkpoint-3", states=("rng_state_0.pth",))
    assert latest_complete_checkpoint(tmp_path / "one") == one
    alone = make_checkpoint(tmp_path / "checkpoint-4", 4)
    assert latest_complete_checkpoint(tmp_path, 8) == alone
    none = make_checkpoint(tmp_path / "checkpoint-5", 5, states=())
    assert latest_complete_checkpoint(tmp_path) == alone != none


class FakeTrainer:
    """What train_from uses of a Trainer."""

    def __init__(self, max_steps, is_fsdp_enabled=False):
        self.args = SimpleNamespace(max_steps=max_steps, main_process_first=lambda **_: contextlib.nullcontext())
        self.is_fsdp_enabled, self.model = is_fsdp_enabled, torch.nn.Linear(2, 2)
        self.loaded, self.trained, self.state = None, [], TrainerState()

    def _load_from_checkpoint(self, checkpoint):
        self.loaded = checkpoint

    def train(self, resume_from_checkpoint):
        self.trained.append(resume_from_checkpoint)
        self.state.global_step = 9


@pytest.mark.parametrize("max_steps, is_done", [(3, True), (2, True), (4, False), (0, False), (-1, False)])
def test_a_checkpoint_of_the_last_step_is_only_loaded(tmp_path, caplog, max_steps, is_done):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    TrainerState(global_step=3, epoch=1.5).save_to_json(str(folder / "trainer_state.json"))
    trainer = FakeTrainer(max_steps)
    train_from(trainer, str(folder))
    assert caplog.records[-1].message == f"Resuming from {folder}"
    assert trainer.trained == ([] if is_done else [str(folder)])
    assert trainer.loaded == (str(folder) if is_done else None)
    if is_done:
        assert (trainer.state.global_step, trainer.state.epoch) == (3, 1.5)


def test_a_run_without_a_checkpoint_starts(caplog):
    trainer = FakeTrainer(3)
    train_from(trainer, None)
    assert trainer.trained == [None] and not caplog.records


@pytest.mark.parametrize("sharded", [True, False])
def test_a_checkpoint_that_cannot_be_rewritten(tmp_path, sharded):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    TrainerState(global_step=3).save_to_json(str(folder / "trainer_state.json"))
    if sharded:
        (folder / "pytorch_model_fsdp_0").mkdir()
    written, now = ("with", "without") if sharded else ("without", "with")
    with refused(f"{folder} was written {written} FSDP, this launch trains {now} it, and", whole=False) as error:
        train_from(FakeTrainer(9, not sharded), str(folder))
    assert str(error.value).endswith("). Launch as before, with any number of processes")
    trainer = FakeTrainer(9, sharded)
    train_from(trainer, str(folder))
    assert trainer.trained == [str(folder)]


def test_the_identity_of_weights(tmp_path):
    parts = {"a.safetensors": bytes(range(256)) * (1 << 17), "b.safetensors": b"xyz"}
    for name, content in parts.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "other.bin").write_bytes(b"1")
    expected = hashlib.sha256(b"".join(name.encode() + content for name, content in parts.items())).hexdigest()[:16]
    assert weights_identity(tmp_path) == expected
    assert weights_identity("user/one") == weights_identity("user/one") != weights_identity("user/two")


def test_a_record_is_written_and_found_again(tmp_path):
    folder = tmp_path / "new" / "run"
    record = RunRecord(str(folder), {"data": ("a", 1), "config": {"x": 2}}, processes=2)
    record.check()
    assert record.finished is None and str(record) == f"{folder}: unfinished"
    record.write()
    assert (folder / "run.json").read_text().endswith("}\n") and [path.name for path in folder.iterdir()] == [
        "run.json"
    ]
    content = {"identity": {"data": ["a", 1], "config": {"x": 2}}, "fewest_processes": 2, "finished": None}
    assert (folder / "run.json").read_text() == json.dumps(content, indent=1) + "\n"
    more = RunRecord(folder, {"data": ("a", 1), "config": {"x": 2}}, processes=4)
    more.check()
    assert more.fewest_processes == 2
    record.write({"steps": 7})
    record.write()
    again = RunRecord(folder, {"data": ["a", 1], "config": {"x": 2, "new": 3}})
    again.check()
    assert again.finished == {"steps": 7} and again.fewest_processes == 1
    text = f"{folder / 'final'} is finished, after 7 steps: nothing is left to do"
    assert str(again) == text
    (folder / "run.json").write_text(json.dumps({"identity": {"data": ["a", 1]}}))
    older = RunRecord(folder, {"data": ["a", 1]}, processes=4)
    older.check()
    assert older.fewest_processes == 4 and older.finished is None


def test_another_run_is_told_by_what_differs(tmp_path):
    RunRecord(tmp_path, {"data": "a", "seed": 1, "config": {"x": 2, "y": {"z": 3}}}).write()
    for identity, words in (
        ({"data": "b", "seed": 1, "config": {"x": 2, "y": {"z": 3}}}, "data was 'a' and is 'b' now"),
        ({"data": "a", "config": {"x": 2, "y": {"z": 3}}}, "seed was 1 and is None now"),
        ({"data": "a", "seed": 1, "config": {"x": 2, "y": {"z": 3}}, "more": 4}, "more was None and is 4 now"),
        (
            {"data": "a", "seed": 1, "config": {"x": 5, "y": {"z": 6}}},
            "config.x was 2 and is 5 now; config.y.z was 3 and is 6 now",
        ),
        ({"data": "a", "seed": 1, "config": 7}, "config was {'x': 2, 'y': {'z': 3}} and is 7 now"),
    ):
        with refused(f"--output_dir {tmp_path} holds another run: {words}. Choose another folder, or remove this one"):
            RunRecord(tmp_path, identity).check()


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_a_record_that_cannot_be_read(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with refused(f"{tmp_path / 'run.json'} cannot be read (", whole=False) as error:
        RunRecord(tmp_path, {"data": "a"}).check()
    assert str(error.value).endswith("); choose another --output_dir")


def test_when_a_run_is_finished(tmp_path):
    record = RunRecord(tmp_path, {})
    steps, epochs = (
        SimpleNamespace(max_steps=10, num_train_epochs=9),
        SimpleNamespace(max_steps=-1, num_train_epochs=2),
    )
    assert not record.is_finished(steps)
    record.finished = {"steps": 10, "epochs": 2.0, "seconds": 60.0}
    assert not record.is_finished(steps)  # no model
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").touch()
    assert record.is_finished(steps) and record.is_finished(epochs)
    assert not record.is_finished(SimpleNamespace(max_steps=0, num_train_epochs=3))
    for finished, answers in (
        ({"steps": 9, "epochs": 2.0 - 1e-7}, (False, True)),
        ({"steps": 11, "epochs": 1.9}, (True, False)),
    ):
        record.finished = finished
        assert (record.is_finished(steps), record.is_finished(epochs)) == answers
    record.finished = {"steps": 3, "epochs": 2.0, "seconds": 60.0}
    assert [record.is_finished(epochs, seconds) for seconds in (59, 60, 61)] == [True, True, False]
    assert [record.is_finished(steps, seconds) for seconds in (60, 61)] == [True, False]
    record.finished = {"steps": 10, "epochs": 0.5}
    assert record.is_finished(steps, 1) and not record.is_finished(epochs, 1)
    assert os.listdir(tmp_path) == ["final"]
