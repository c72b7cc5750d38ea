"""With document masks, a packed sequence gives every document the logits of that document alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as configs
from fp8jax.data import packing, pipeline, shards, sources, tokenizer
from fp8jax.models.definition import define
from fp8jax.models.model_recipes import model_recipes

BYTE = tokenizer.load("byte")
TEXTS = ["Anne Elliot", "", "of Kellynch Hall, in Somersetshire", "was a man"]
# Scales found from the tensor would differ between the batches: a fixed one says whether anything else does.
FP8 = {"recipe": "fp8_dpa", "scaling": "static"}


def windows(directory, kind):
    """The batch of a packed directory, and for every document of TEXTS the batch of it alone, at the same length."""
    data = configs.DataConfig(
        sequence_length=64, source=str(directory), packing=kind, document_masks=True
    )
    stream = sources.load(data, "train")
    made = (
        packing.ConcatWindows(stream, data)
        if kind == "concat"
        else packing.BestFitWindows(stream, data, packing.open_best_fit(directory, 64, len(stream)))
    )
    alone = [
        packing.ConcatWindows(
            sources.TokenStream((shards.ended(BYTE.encode(text), BYTE),), ("",), BYTE), data
        )
        for text in TEXTS
    ]
    return pipeline._read([(made, index) for index in range(len(made))], data), pipeline._read(
        [(windows, 0) for windows in alone], data
    )


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
@pytest.mark.parametrize(
    "fp8",
    [
        FP8 | {"attention_backend": "emulated"},
        FP8 | {"attention_backend": "composed"},
        {"recipe": "bf16"},
    ],
    ids=["emulated", "composed", "bf16"],
)
def test_packed_documents_have_the_logits_of_each_alone(tmp_path, kind, fp8):
    shards.write_shards(
        tmp_path, BYTE, {"train": map(BYTE.encode, TEXTS), "held_out": [BYTE.encode("x")]}
    )
    packing.write_best_fit(tmp_path, BYTE, 64)
    packed, alone = windows(tmp_path, kind)
    model = {"layers": 2, "width": 64, "ffn_width": 64, "heads": 2, "kv_heads": 1}
    config = configs.from_dict(
        {"model": model, "fp8": fp8, "data": {"document_masks": True, "sequence_length": 64}}
    )
    definition = define(config.model, 384)
    recipes = model_recipes(config, gated=definition.gated(), emulated=True)
    bound = definition.bind(definition.init(0))
    logits = jax.jit(lambda batch: bound(batch, bound.prepare(recipes))[0].astype(jnp.float32))
    packed_btv, alone_btv = (
        np.asarray(logits({name: jnp.asarray(a) for name, a in batch.items()}))
        for batch in (packed, alone)
    )
    compared = 0
    for text, expected_tv in zip(TEXTS, alone_btv, strict=True):
        ids = [256, *text.encode()]
        places = [
            (row, start)
            for row in range(len(packed["inputs"]))
            for start in range(64 - len(text))
            if packed["inputs"][row, start : start + len(ids)].tolist() == ids
            and packed["mask"][row, start : start + len(ids)].all()
            and packed["targets"][row, start + len(text)] == 256
        ]
        for row, start in places:
            np.testing.assert_array_equal(
                packed_btv[row, start : start + len(ids)], expected_tv[: len(ids)]
            )
        compared += len(places)
    assert compared == len(TEXTS) and np.ptp(packed_btv) > 0.1
    unmasked = packed | {"segment_ids": np.zeros_like(packed["segment_ids"])}
    unmasked_btv = np.asarray(logits({name: jnp.asarray(a) for name, a in unmasked.items()}))
    assert np.abs(unmasked_btv - packed_btv).max() > 1e-3
