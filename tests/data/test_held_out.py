"""`data.held_out`: which text held-out losses are taken of, by its names; none where there is none."""

import pytest

from fp8jax import config as configs
from fp8jax.data import fingerprints, pipeline, shards, sources, tokenizer
from tests.helpers.megatron import write as write_megatron

BYTE = tokenizer.load("byte")


def ended(*texts):
    return [token for text in texts for token in (*text.encode(), 256)]


def prepared(directory, train, held_out=()):
    """A directory of bytes; without held-out text as `prepare --validation_fraction=0` leaves it."""
    texts = {"train": train, "held_out": held_out}
    splits = {
        split: shards.summary(
            shards._write_split(directory, split, BYTE, map(BYTE.encode, texts[split]), 1 << 28)
        )
        for split in texts
    }
    shards.write_index(directory, shards.header(BYTE) | {"splits": splits})
    return directory


@pytest.fixture
def directories(tmp_path):
    found = {name: tmp_path / name for name in ("train", "alone", "wiki")}
    for path in found.values():
        path.mkdir()
    prepared(found["train"], ["Sir Walter", "Elliot"], ["of Kellynch Hall"])
    prepared(found["alone"], ["in Somersetshire"])
    prepared(found["wiki"], ["was a man"])
    return found


def config_of(source, held_out="auto", every=200, **data):
    return configs.from_dict(
        {
            "data": {
                "source": str(source),
                "held_out": str(held_out),
                "sequence_length": 4,
                "read_threads": 0,
            }
            | data,
            "evaluation": {"every": every},
            "training": {"batch_size": 2},
        }
    )


def read(config):
    return {
        name: stream.read(0, 10**6).tolist()
        for name, stream in pipeline.held_out_streams(config).items()
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", ()),
        ("none", ()),
        ("/d/wiki", (("wiki", "/d/wiki"),)),
        ("w=/d/a, c=/d/b", (("w", "/d/a"), ("c", "/d/b"))),
        ("/d/lang=en/tokens", (("tokens", "/d/lang=en/tokens"),)),
        ("en=/d/lang=en/tokens", (("en", "/d/lang=en/tokens"),)),
        ("/d/lang=en", (("lang_en", "/d/lang=en"),)),
        ("embedded", (("embedded", "embedded"),)),
    ],
)
def test_names(text, expected):
    assert configs.parse_held_out(text) == expected


@pytest.mark.parametrize("text", ["", "a,", "a=", "/d/a,/e/a", "w=/d/a,w=/d/b", "/", "=a"])
def test_what_is_no_list_of_sources(text):
    with pytest.raises(
        configs.ConfigError,
        match=r"config.data.held_out: .* is not a source with a name of its own",
    ):
        configs.from_dict({"data": {"held_out": text}})


def test_auto_is_what_the_source_holds_out(directories):
    assert read(config_of(directories["train"])) == {"": ended("of Kellynch Hall")}


def test_a_source_of_ones_own(directories):
    """All of one that holds nothing out; else what it holds out."""
    assert read(config_of(directories["alone"], directories["wiki"])) == {
        "wiki": ended("was a man")
    }
    assert read(config_of(directories["alone"], directories["train"])) == {
        "train": ended("of Kellynch Hall")
    }
    both = config_of(directories["alone"], f"w={directories['wiki']},t={directories['train']}")
    assert read(both) == {"w": ended("was a man"), "t": ended("of Kellynch Hall")}
    with pytest.raises(
        configs.ConfigError,
        match="config.data.held_out: .*alone holds nothing out, and the run trains on it",
    ):
        read(config_of(directories["alone"], directories["alone"]))
    with pytest.raises(
        configs.ConfigError, match=r"config.data.held_out: \S+away/index.json: no such file"
    ):
        read(config_of(directories["alone"], directories["wiki"].parent / "away"))


def test_none_and_no_evaluations(directories):
    alone = directories["alone"]
    assert (
        read(config_of(alone, "none"))
        == read(config_of(alone, every=0))
        == read(config_of(directories["train"], "none"))
        == {}
    )
    assert next(pipeline.train_iterator(config_of(alone, every=0)))["targets"].shape == (2, 4)
    with pytest.raises(
        configs.ConfigError,
        match="lists no shards of split 'held_out'; set config.data.held_out to other text, or to none",
    ):
        pipeline.train_iterator(config_of(alone))
    with pytest.raises(
        configs.ConfigError, match="config.checkpoint.keep_best: 2 needs a held-out loss"
    ):
        configs.from_dict({"data": {"held_out": "none"}, "checkpoint": {"keep_best": 2}})


def test_megatron_holds_out_nothing_where_other_text_is_given(tmp_path, directories):
    one = write_megatron(tmp_path / "one", [[[*b"all of it", 256]]])
    two = write_megatron(tmp_path / "two", [[[*b"first", 256]], [[*b"second", 256]]])
    with pytest.raises(
        configs.ConfigError,
        match="holds 1 document with tokens; there is nothing to hold out: set config.data.held_out",
    ):
        pipeline.train_iterator(config_of(one, tokenizer="byte"))
    trained = {
        held_out: sources.load(config_of(two, held_out, tokenizer="byte").data, "train")
        .read(0, 99)
        .tolist()
        for held_out in ("auto", "none", one, two, str(directories["wiki"]))
    }
    assert trained["auto"] == trained[two] == ended("first")
    assert (
        trained["none"]
        == trained[one]
        == trained[str(directories["wiki"])]
        == ended("first", "second")
    )
    assert read(config_of(one, two, tokenizer="byte")) == {"two": ended("first", "second")}
    assert read(config_of(two, two, tokenizer="byte")) == {"two": ended("second")}
    digests = [
        fingerprints.of(config_of(two, held_out, tokenizer="byte").data)["train"]
        for held_out in ("auto", two, one)
    ]
    assert fingerprints.same(digests[0], digests[1]) and not fingerprints.same(
        digests[0], digests[2]
    )
