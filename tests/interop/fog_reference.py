"""A FOG decoder in plain NumPy, float64, on Hugging Face's tensors and config keys; written from the paper's appendix B."""

import json
import math

import numpy as np

LAYERS, WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2, 24, 40, 4, 2, 6, 37
BASE = {
    "model_type": "fog",
    "architectures": ["FOGForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "tie_word_embeddings": False,
}
VARIANTS = {
    "fog_max": {
        "hidden_act": "xielu",
        "qk_type": "rms",
        "freeze_qk": True,
        "input_upscale": 50.0,
        "softmax_scale": 0.125,
        "final_layernorm": False,
    },
    "fog_opt_tied": {
        "hidden_act": "gelu",
        "qk_type": "rms",
        "freeze_qk": True,
        "input_upscale": 50.0,
        "softmax_scale": 0.125,
        "final_layernorm": False,
        "tie_word_embeddings": True,
        "intermediate_size": 41,
    },
    "fog_flash": {
        "hidden_act": "gelu",
        "qk_type": "dyt",
        "input_upscale": 50.0,
        "softmax_scale": 0.125,
        "final_layernorm": False,
    },
    "trained_gains": {
        "hidden_act": "silu",
        "qk_type": "rms",
        "freeze_qk": False,
        "final_layernorm": True,
        "rope_theta": 10000.0,
    },
    "smooth": {
        "hidden_act": "smoothswiglu",
        "qk_norm": False,
        "pre_norm": True,
        "post_norm": False,
        "layerscale": False,
    },
}
DEFAULTS = {
    "qk_norm": True,
    "pre_norm": False,
    "post_norm": True,
    "input_upscale": 1.0,
    "softmax_scale": None,
    "final_layernorm": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
}


def random_tensors(keys, seed=0, *, ones=True):
    """Every tensor of a `fog` directory, float32, so that each matters; frozen gains are 1, as FOG's are, unless `ones` is false."""
    rng, hidden = np.random.default_rng(seed), keys["intermediate_size"]
    keys = DEFAULTS | keys
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    if not keys["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, WIDTH)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        shapes |= {
            p + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, WIDTH),
            p + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            p + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, WIDTH),
            p + "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD_DIM),
            p + "mlp.up_proj.weight": (hidden, WIDTH),
            p + "mlp.down_proj.weight": (WIDTH, hidden),
            p + "attention_layernorm.weight": (WIDTH,),
            p + "feedforward_layernorm.weight": (WIDTH,),
        }
        if keys["hidden_act"] in ("silu", "smoothswiglu"):
            shapes[p + "mlp.gate_proj.weight"] = (hidden, WIDTH)
        if keys["hidden_act"] == "xielu":
            shapes |= {p + "mlp.act_fn.alpha_p": (1,), p + "mlp.act_fn.alpha_n": (1,)}
        if keys["qk_norm"]:
            shapes |= {
                p + "self_attn.q_norm.weight": (HEAD_DIM,),
                p + "self_attn.k_norm.weight": (HEAD_DIM,),
            }
            if keys["qk_type"] == "dyt":
                shapes |= {p + "self_attn.q_norm.alpha": (1,), p + "self_attn.k_norm.alpha": (1,)}
    tensors = {
        n: (rng.normal(0, 0.2, s) if len(s) == 2 else 1 + rng.normal(0, 0.2, s)).astype(np.float32)
        for n, s in shapes.items()
    }
    frozen = [
        n
        for n in tensors
        if "self_attn" in n
        and n.endswith("_norm.weight")
        and (keys.get("freeze_qk") or keys["qk_type"] == "dyt")
    ]
    frozen += [] if keys["final_layernorm"] else ["model.norm.weight"]
    return tensors | {name: np.ones_like(tensors[name]) for name in frozen if ones}


def write_directory(directory, keys, tensors):
    """config.json and model.safetensors, byte by byte."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(keys))
    header, start = {}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": array.shape,
            "data_offsets": [start, start + array.nbytes],
        }
        start += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in tensors.values())
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def forward(keys, tensors, tokens):
    """Logits [batch, length, vocab] and mean next-token loss, float64."""
    keys = DEFAULTS | keys
    t = {name: array.astype(np.float64) for name, array in tensors.items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + keys["rms_norm_eps"]) * t[name]

    x = keys["input_upscale"] * t["model.embed_tokens.weight"][tokens]
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        y = norm(x, p + "attention_layernorm.weight") if keys["pre_norm"] else x
        y = _attention(keys, t, p + "self_attn.", y)
        x = x + (norm(y, p + "attention_layernorm.weight") if keys["post_norm"] else y)
        y = norm(x, p + "feedforward_layernorm.weight") if keys["pre_norm"] else x
        y = _feed_forward(keys, t, p + "mlp.", y)
        x = x + (norm(y, p + "feedforward_layernorm.weight") if keys["post_norm"] else y)
    if keys["final_layernorm"]:
        x = norm(x, "model.norm.weight")
    logits = (
        x @ t["model.embed_tokens.weight" if keys["tie_word_embeddings"] else "lm_head.weight"].T
    )
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logits, -np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], -1).mean()


def _attention(keys, t, p, x):
    length = x.shape[1]
    out = np.zeros((*x.shape[:2], HEADS * HEAD_DIM))
    frequency = keys["rope_theta"] ** (-2.0 * np.arange(HEAD_DIM // 2) / HEAD_DIM)

    def head(name, index):
        return (
            x @ t[f"{p}{name}_proj.weight"][index * HEAD_DIM : (index + 1) * HEAD_DIM].T
        )  # [b, t, h]

    def regularised(y, name):
        if not keys["qk_norm"]:
            return y
        if keys["qk_type"] == "dyt":
            return np.tanh(t[f"{p}{name}.alpha"] * y) * t[f"{p}{name}.weight"]
        return (
            y
            / np.sqrt((y**2).mean(-1, keepdims=True) + keys["rms_norm_eps"])
            * t[f"{p}{name}.weight"]
        )

    def rotated(y):  # the pair (j, j + h/2) as a complex number
        z = (y[..., : HEAD_DIM // 2] + 1j * y[..., HEAD_DIM // 2 :]) * np.exp(
            1j * np.arange(length)[:, None] * frequency
        )
        return np.concatenate([z.real, z.imag], -1)

    scale = keys["softmax_scale"] or 1 / math.sqrt(HEAD_DIM)
    for n in range(HEADS):
        group = n // (HEADS // KV_HEADS)
        q, k, v = (
            rotated(regularised(head("q", n), "q_norm")),
            rotated(regularised(head("k", group), "k_norm")),
            head("v", group),
        )
        for row in range(length):
            s = scale * np.einsum("bh,bsh->bs", q[:, row], k[:, : row + 1])
            w = np.exp(s - s.max(-1, keepdims=True))
            out[:, row, n * HEAD_DIM : (n + 1) * HEAD_DIM] = np.einsum(
                "bs,bsh->bh", w / w.sum(-1, keepdims=True), v[:, : row + 1]
            )
    return out @ t[p + "o_proj.weight"].T


def _feed_forward(keys, t, p, x):
    up, kind = x @ t[p + "up_proj.weight"].T, keys["hidden_act"]
    if kind in (
        "silu",
        "smoothswiglu",
    ):  # the smooth kind's factor cancels where nothing is rounded
        gate = x @ t[p + "gate_proj.weight"].T
        hidden = gate / (1 + np.exp(-gate)) * up
    elif kind == "gelu":
        hidden = up * (1 + np.vectorize(math.erf)(up / math.sqrt(2))) / 2
    else:
        alpha_p, alpha_n = (
            np.log1p(np.exp(t[p + "act_fn.alpha_p"])),
            0.5 + np.log1p(np.exp(t[p + "act_fn.alpha_n"])),
        )
        negative = alpha_n * (np.expm1(np.minimum(up, -1e-6)) - up)
        hidden = np.where(up > 0, alpha_p * up**2, negative) + 0.5 * up
    return hidden @ t[p + "down_proj.weight"].T
