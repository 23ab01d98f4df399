"""transformers' own ways of serving: continuous batching and `transformers serve`."""

import shutil
import socket
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from modeling_rebased import ReBasedConfig, ReBasedForCausalLM
from tests.processes import start_python


ENGLISH = Path(__file__).resolve().parents[2] / "checkpoints" / "english-6m"


def tiny(layer_types: list[str]) -> ReBasedForCausalLM:
    config = ReBasedConfig(
        vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, layer_types=layer_types
    )
    return ReBasedForCausalLM(config).eval()


@pytest.mark.parametrize("layer_types", [["conv", "linear_attention"], ["full_attention", "hybrid_sliding"]])
def test_continuous_batching_is_refused_at_once(layer_types):
    """`generate_batch` names the layers that it would have to serve, and points to vLLM."""
    model = tiny(layer_types)
    generation_config = GenerationConfig(max_new_tokens=2, eos_token_id=1)
    with pytest.raises(ValueError, match="vllm serve") as error:
        model.generate_batch([[1, 2, 3]], generation_config=generation_config)
    assert all(repr(layer_type) in str(error.value) for layer_type in layer_types)
    with pytest.raises(ValueError, match="vllm serve"):
        model.init_continuous_batching(generation_config=generation_config)


@pytest.fixture(scope="module")
def transformers_server(tmp_path_factory):
    """A client of `transformers serve` with ReBased's classes, and the folder of a model with a chat template."""
    for name in ("fastapi", "uvicorn", "accelerate", "httpx"):
        pytest.importorskip(name, reason=f"`transformers serve` needs {name}")
    import httpx

    folder = tmp_path_factory.mktemp("model") / "english"
    shutil.copytree(ENGLISH, folder, symlinks=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = ("--host", "127.0.0.1", "--port", port, "--device", "cpu")
    process = start_python("-m", "modeling_rebased.serving.transformers_serve", *given, output=folder.parent)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            deadline = time.monotonic() + 180
            while True:
                said = (folder.parent / "stderr").read_text() if not process.is_alive() else ""
                assert process.is_alive() and time.monotonic() < deadline, said[-3000:]
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield client, folder
    finally:
        process.terminate()
        process.join(30)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_transformers_serve(path, transformers_server):
    """Completions and chat are served, greedily the same as `generate`."""
    client, folder = transformers_server
    text = "The king said"
    prompt = {"prompt": text} if path == "completions" else {"messages": [{"role": "user", "content": text}]}
    generation_config = GenerationConfig(do_sample=False, max_new_tokens=12, eos_token_id=256, pad_token_id=257)
    body = {"model": str(folder), "generation_config": generation_config.to_json_string(), "stream": False} | prompt
    response = client.post(f"/v1/{path}", json=body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    answer = choice["text"] if path == "completions" else choice["message"]["content"]
    model = ReBasedForCausalLM.from_pretrained(folder)
    expected = model.generate(torch.tensor([list(text.encode())]), generation_config=generation_config)
    assert answer == bytes(expected[0, len(text) :].tolist()).decode()


def test_generate_accepts_a_tokenizer():
    """`transformers serve` gives one to `generate`, which passes it on to the model."""
    options = {"do_sample": False, "max_new_tokens": 2, "pad_token_id": 0}
    model = tiny(["conv", "linear_attention"])
    ids = torch.tensor([[1, 2, 3]])
    tokenizer = AutoTokenizer.from_pretrained(ENGLISH)
    assert torch.equal(model.generate(ids, tokenizer=tokenizer, **options), model.generate(ids, **options))
