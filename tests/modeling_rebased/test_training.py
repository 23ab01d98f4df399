"""Training: everything that Trainer, PEFT, accelerate and torch.compile do to a model."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from modeling_rebased import (
    ReBasedForCausalLM,
    ReBasedForSequenceClassification,
    ReBasedForTokenClassification,
)
from tests.modeling_rebased.cases import BASE, MODELS, make_config, make_ids, make_model, make_small_model
from tests.processes import run_with_processes


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Copies(Dataset):
    """Rows that say the same thing twice."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        half = torch.randint(1, BASE["vocab_size"], (8,), generator=torch.Generator().manual_seed(index))
        ids = torch.cat([half, half])
        return {"input_ids": ids, "labels": ids}


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(value.norm().item(), 1e-3)
        assert (actual[name] - value).norm().item() < tolerance * scale, name


@pytest.mark.parametrize("name", ["paper", "mqar", "every_type"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(name, use_reentrant):
    model, ids = make_model(name).train(), make_ids()
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert_close(gradients(model, ids), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["paper", "every_type"])
def test_autocast(name, dtype):
    model, ids = make_model(name), make_ids()
    expected = model(ids, labels=ids)
    with torch.autocast("cpu", dtype):
        out = model(ids, labels=ids)
        out.loss.backward()
    assert abs(out.loss - expected.loss) < 0.05 * expected.loss
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    model, ids = make_model("every_type"), make_ids()
    expected = model(ids).logits
    out = model.to(dtype)(ids)
    assert out.logits.dtype == dtype
    assert (out.logits.float() - expected).norm() < 0.1 * expected.norm()
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 26)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("paper", {}),
        ("every_type", {}),
        ("softmax_first", {"layer_types": ["sliding_attention", "linear_attention"], "num_hidden_layers": 2}),
    ],
)
def test_compile_forward_and_backward(name, changes):
    model, ids = make_small_model(name, **changes), make_ids()
    expected = gradients(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(ids, labels=ids).loss.backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


@torch.no_grad()
def test_compile_with_dynamic_shapes():
    """Numbers such as `attention_eps` are symbols then, and a message about one cannot be traced."""
    model, ids = make_small_model("paper"), make_ids()
    expected = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_compile_by_inductor():
    model, ids = make_small_model("paper", mlp_type="none"), make_ids()  # each kernel of an MLP takes a second too
    expected = gradients(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad()
    compiled(ids, labels=ids).loss.backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=12,
        learning_rate=3e-3,
        logging_steps=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Copies(), eval_dataset=Copies())


def test_trainer(tmp_path):
    model = make_model("paper")
    run = trainer(model, tmp_path)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.3
    run.save_model(tmp_path / "out")
    loaded = ReBasedForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(loaded(make_ids()).logits, model.eval()(make_ids()).logits)


@pytest.mark.parametrize("head", [ReBasedForCausalLM, ReBasedForSequenceClassification, ReBasedForTokenClassification])
def test_accumulated_batches_have_the_gradient_of_one(tmp_path, head):
    ids = make_ids(8, 6)
    labels = ids % 3 if head is ReBasedForTokenClassification else ids
    labels = ids[:, 0] % 3 if head is ReBasedForSequenceClassification else labels
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]
    found = []
    for accumulated in (1, 4):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=8 // accumulated,
            gradient_accumulation_steps=accumulated,
            logging_steps=1,
            max_grad_norm=1e9,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        run = Trainer(head(make_config("paper", num_labels=3, pad_token_id=0)), arguments, train_dataset=data)
        run.train()
        found.append([run.state.log_history[0][name] for name in ("loss", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_lora(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = make_model("every_type")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapped = get_peft_model(model, LoraConfig(target_modules=PROJECTIONS, r=4, task_type="CAUSAL_LM"))
    adapted = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    # Four attention layers of four projections, two matrices each.
    assert len(adapted) == 4 * 4 * 2
    trainer(wrapped, tmp_path).train()
    for name, value in base.items():
        trained = next(p for n, p in wrapped.named_parameters() if n.replace(".base_layer", "").endswith(name))
        assert torch.equal(trained, value), name
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.eval()
    expected = wrapped(make_ids()).logits
    reloaded = PeftModel.from_pretrained(make_model("every_type"), tmp_path / "adapter").eval()
    torch.testing.assert_close(reloaded(make_ids()).logits, expected)
    out = reloaded.generate(input_ids=make_ids(), max_new_tokens=3, do_sample=False)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(merged(make_ids()).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(make_ids(), max_new_tokens=3, do_sample=False), out)


def test_resize_token_embeddings_keeps_the_tie(tmp_path):
    model, ids = make_model("paper"), make_ids()
    expected = model(ids).logits
    model.resize_token_embeddings(64)
    assert model.config.vocab_size == 64
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(model(ids).logits[..., :50], expected)
    model.save_pretrained(tmp_path)
    loaded = ReBasedForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.shape == (64, 48)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_untied_head():
    model = make_model("paper", tie_word_embeddings=False)
    assert model.lm_head.weight is not model.get_input_embeddings().weight


@torch.no_grad()
def test_device_map_through_accelerate(tmp_path):
    model, ids = make_model("every_type"), make_ids()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = ReBasedForCausalLM.from_pretrained(tmp_path, device_map="auto").eval()
    torch.testing.assert_close(loaded(ids.to(loaded.device)).logits.cpu(), expected)  # on a GPU if there is one
    # Half of the layers on disk: every weight is fetched by its module's hook.
    placed = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.linear_rotary_emb": "cpu"}
    placed |= {f"model.layers.{i}": "disk" if i % 2 == 0 else "cpu" for i in range(5)}
    placed |= {"model.norm": "cpu", "lm_head": "cpu"}
    offloaded = ReBasedForCausalLM.from_pretrained(
        tmp_path, device_map=placed, offload_folder=str(tmp_path / "offload")
    ).eval()
    torch.testing.assert_close(offloaded(ids).logits, expected)
    out = offloaded.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, model.generate(ids, max_new_tokens=3, do_sample=False))


TENSOR_PARALLEL = ["paper", "softmax_first", "every_type", "based"]


@pytest.fixture(scope="module")
def tensor_parallel(tmp_path_factory):
    """Run each model on two processes, one model after another, and return the folder of their results."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    for name in TENSOR_PARALLEL:
        make_model(name).save_pretrained(folder / name)
    torch.save(make_ids(), folder / "ids.pt")
    script = folder / "tensor_parallel.py"
    script.write_text(
        """
import sys
import torch
from modeling_rebased import ReBasedForCausalLM
folder, *names = sys.argv[1:]
ids = torch.load(f"{folder}/ids.pt", weights_only=True)
for name in names:
    model = ReBasedForCausalLM.from_pretrained(f"{folder}/{name}", tp_plan="auto").eval()
    sizes = {n: tuple(p.to_local().shape if hasattr(p, "to_local") else p.shape) for n, p in model.named_parameters()}
    with torch.no_grad():
        logits = model(ids).logits
        out = model.generate(ids, max_new_tokens=3, do_sample=False)
    if torch.distributed.get_rank() == 0:
        torch.save({"logits": logits, "out": out, "sizes": sizes}, f"{folder}/{name}.pt")
torch.distributed.destroy_process_group()  # or its threads may abort the process as it ends
"""
    )
    run_with_processes(2, script, folder, *TENSOR_PARALLEL)
    return folder


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_tensor_parallel(tensor_parallel, name):
    """The plan of all heads' scope and the plan by heads."""
    model, ids = make_model(name), make_ids()
    result = torch.load(tensor_parallel / f"{name}.pt", weights_only=True)
    with torch.no_grad():
        torch.testing.assert_close(result["logits"], model(ids).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(result["out"], model.generate(ids, max_new_tokens=3, do_sample=False))
    whole = {n: tuple(p.shape) for n, p in model.named_parameters()}
    halved = {n for n in whole if result["sizes"][n] != whole[n]}
    assert any("q_proj" in n for n in halved) and any("up_proj" in n for n in halved)


def test_fsdp2(tmp_path):
    """fully_shard over two processes takes the step that one process takes on both halves of the batch."""
    model, ids = make_model("every_type"), make_ids(4)
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "fsdp.py"
    script.write_text(
        """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from modeling_rebased import ReBasedForCausalLM
dist.init_process_group("gloo")
rank = dist.get_rank()
mesh = dist.init_device_mesh("cpu", (2,))
model = ReBasedForCausalLM.from_pretrained(sys.argv[1])
model.gradient_checkpointing_enable({"use_reentrant": False})
model.train()
for layer in model.model.layers:
    assert type(layer).__name__ in model._no_split_modules
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
ids = torch.load(sys.argv[2], weights_only=True)[2 * rank : 2 * rank + 2]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(ids, labels=ids).loss.backward()
optimizer.step()
state = {name: p.full_tensor() for name, p in model.named_parameters()}
if rank == 0:
    torch.save(state, sys.argv[3])
dist.destroy_process_group()
"""
    )
    torch.save(ids, tmp_path / "ids.pt")
    run_with_processes(2, script, tmp_path / "model", tmp_path / "ids.pt", tmp_path / "result.pt")
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    model.train()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result[name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name):
    grads = gradients(make_model(name), make_ids())
    assert all(grad.norm() > 0 for grad in grads.values())
