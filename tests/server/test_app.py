"""The endpoints around the answers: models, tokens, metrics; and what the front must not load."""

import subprocess
import sys
from pathlib import Path

import octavo
from octavo.server.model import name_of
from tests.server.serving import TOKENIZER, Server, run


@run
async def test_models(server: Server):
    listed = (await server.get("/v1/models")).json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["owned_by"], card["max_model_len"]) == ("tiny", "model", "octavo", 512)
    assert (await server.get("/v1/models/tiny")).json() == card


@run
async def test_names_with_slashes(server: Server):
    server.service.model.name = "org/model"
    assert (await server.get("/v1/models/org/model")).json()["id"] == "org/model"


@run
async def test_tokenize_and_back(server: Server):
    reply = (await server.post("/tokenize", {"model": "tiny", "prompt": "wörld 🙂"})).json()
    assert reply == {"count": 11, "max_model_len": 512, "tokens": TOKENIZER.encode("wörld 🙂")}
    back = await server.post("/detokenize", {"tokens": reply["tokens"]})
    assert back.json() == {"prompt": "wörld 🙂"}
    for body in ({}, {"prompt": "a", "messages": []}, {"prompt": "a", "add_generation_prompt": True}):
        assert (await server.post("/tokenize", body)).status_code == 400
    for tokens in ([-1], [258], ["a"]):
        assert (await server.post("/detokenize", {"tokens": tokens})).json()["error"]["param"].startswith("tokens")


@run
async def test_version_and_schema(server: Server):
    assert (await server.get("/version")).json() == {"version": octavo.__version__}
    schema = (await server.get("/openapi.json")).json()
    assert "messages" in schema["components"]["schemas"]["ChatRequest"]["required"]


@run
async def test_metrics(server: Server):
    await server.chat(n=2)
    await server.complete("hello", stream=True, max_tokens=3)
    await server.complete(max_tokens=0)
    await server.get("/a-name-that-a-client-made-up")
    lines = (await server.get("/metrics")).text.splitlines()
    for line in (
        "octavo_requests_running 0.0",
        'octavo_kv_blocks{state="owned"} 0.0',
        'octavo_kv_tokens{state="stored"} 0.0',
        'octavo_kv_tokens{state="empty"} 0.0',
        "octavo_kv_waste_percent 0.0",
        "octavo_kv_block_references 0.0",
        "octavo_kv_host_blocks_used 0.0",
        "octavo_swaps_total 0.0",
        "octavo_blocks_swapped_out_total 0.0",
        'octavo_requests_finished_total{finish_reason="stop"} 2.0',
        'octavo_requests_finished_total{finish_reason="length"} 1.0',
        "octavo_time_to_first_token_seconds_count 2.0",
        "octavo_time_per_output_token_seconds_count 2.0",
        "octavo_request_queue_time_seconds_count 2.0",
        "octavo_e2e_request_latency_seconds_count 2.0",
        'octavo_http_requests_total{method="POST",path="/v1/completions",status="400"} 1.0',
        'octavo_http_requests_total{method="GET",path="other",status="404"} 1.0',
    ):
        assert line in lines, line
    for name in ("prefix_hit_tokens", "preemptions", "wasted_tokens", "prompt_tokens", "generation_tokens"):
        assert any(line.startswith(f"octavo_{name}_total ") for line in lines), name


def test_the_served_name(tmp_path: Path):
    (tmp_path / "model.Q4.gguf").touch()
    assert name_of("smollm2:135m") == "smollm2:135m"
    assert name_of(str(tmp_path / "model.Q4.gguf")) == "model.Q4"
    assert name_of(f"{tmp_path}/") == tmp_path.name


def test_the_application_starts_without_torch():
    code = "import octavo.server.app, octavo.server.run, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
