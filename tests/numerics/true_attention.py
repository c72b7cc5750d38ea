"""Softmax attention and its gradients in float64 NumPy, from the mathematics: knows of no format, cast or backend."""

import numpy as np


def attention(q_btkgh, k_bskh, v_bskh, do_btkgh, softmax_scale, segment_ids=None, first=0):
    """o, dq, dk, dv of causal grouped-query attention; query t has position `first` + t."""
    q, k, v, do = (np.asarray(x).astype(np.float64) for x in (q_btkgh, k_bskh, v_bskh, do_btkgh))
    queries, keys = first + np.arange(q.shape[1]), np.arange(k.shape[1])
    seen = (queries[:, None] >= keys)[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, queries, None] == segment_ids[:, None, :])
    scores = softmax_scale * np.einsum("btkgh,bskh->bkgts", q, k)
    scores = np.where(seen[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = np.einsum("bkgts,bskh->btkgh", p, v)
    dp = np.einsum("btkgh,bskh->bkgts", do, v)
    ds = p * (dp - np.sum(p * dp, -1, keepdims=True))
    dq = softmax_scale * np.einsum("bkgts,bskh->btkgh", ds, k)
    dk = softmax_scale * np.einsum("bkgts,btkgh->bskh", ds, q)
    return o, dq, dk, np.einsum("bkgts,btkgh->bskh", p, do)


def distance(found, expected) -> float:
    found, expected = (np.asarray(x).astype(np.float64) for x in (found, expected))
    assert found.shape == expected.shape and np.isfinite(found).all()
    return np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-300)
