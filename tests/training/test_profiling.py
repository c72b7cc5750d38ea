"""A traced window: the steps asked for, with the names of roles and passes in it."""

from tests.helpers.runs import micro, train

PLAIN = {"evaluation": {"batches": 1}, "monitor": {"every": 0}, "checkpoint": {"every": 0}}


def test_window(tmp_path, capfd):
    train(micro(profile={"start": 3, "steps": 2}, training={"steps": 5}, **PLAIN), tmp_path)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for name in (b"attention_scores.dgrad", b"mlp_down.wgrad", b"qkv.fprop", b"feed_forward"):
        assert name in content, name
    assert "profile of 2 steps" in capfd.readouterr().out


def test_a_run_shorter_than_the_window_still_writes_it(tmp_path):
    config = micro(
        profile={"start": 3, "steps": 9},
        training={"steps": 3},
        model={"layers": 1, "width": 32, "ffn_width": 32, "heads": 2, "kv_heads": 1},
        fp8={"recipe": "bf16"},
        **PLAIN,
    )
    train(config, tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
