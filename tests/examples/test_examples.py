"""Each program of examples/ runs and finds what it says it finds."""

import importlib.util
import json
import pathlib
import re
import threading
import urllib.error
import urllib.request

import jax
import pytest

from fp8jax.runs import load_run
from tests.helpers.runs import micro, save_untrained

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def as_users_have_it():
    """JAX as it is outside of these tests: dtypes promote."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def load(name):
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(name, capsys):
    load(name).main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["own_model_nnx", "own_model_linen"])
def test_own_models_train_as_without_fp8(name, capsys):
    fp8, plain, ratio = map(float, re.findall(r"[\d.]*\d", printed(name, capsys).split("FP8")[1]))
    assert 1 < plain < 1.3 and ratio == pytest.approx(1, abs=0.01) and fp8 != plain


def test_an_existing_model_is_quantised_trained_and_restored(capsys):
    shown = printed("quantize_existing", capsys)
    assert "14 of 15 layers with GEMMs in FP8" in shown
    fp8, plain = map(float, re.findall(r"(?:FP8|without) (\d+\.\d+)", shown))
    assert plain < 0.3 and fp8 == pytest.approx(plain, rel=0.2)
    assert "flax.nnx.nn.linear, the same parameters: True" in shown


def test_outliers_are_found_in_bf16(capsys):
    shown = printed("outliers_only", capsys)
    found = re.findall(r"block (\d)  block_out .*kurtosis +([\d.]+)", shown)
    kurtosis = {int(block): float(value) for block, value in found}
    assert kurtosis[0] < 4 and kurtosis[1] > 30


def ask(port, body):
    request = urllib.request.Request(f"http://127.0.0.1:{port}", data=body)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_served_run_answers(tmp_path):
    save_untrained(micro(), tmp_path)
    run = load_run(tmp_path, devices=jax.devices()[:1])
    serve = load("serve")
    with serve.server(run, 0) as serving:
        port = serving.server_port
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            status, found = ask(port, b'{"prompt": "Anne", "tokens": 4}')
            assert status == 200 and isinstance(found["text"], str)
            wrong = [b"no JSON", b"[]", b'{"tokens": 4}', b'{"prompt": "a", "tokens": 1.5}']
            wrong += [b'{"prompt": "a", "top_p": 9}', b'{"prompt": "a", "x": 1}', b"[" * 100_000]
            for body in wrong:
                status, found = ask(port, body)
                assert status == 400 and "\n" not in found["error"], body[:40]
        finally:
            serving.shutdown()
            thread.join()
