"""Decode with 2-dimensional heads: the cost of a token grows like log n + k, not like n.

Transformers that run programs look positions up with heads of two dimensions: the key of a
position lies on a circle, and the query of a token points at the positions it needs. Here every
token attends to the keys within a small angle of its query, by convex layers and by all keys.

    python examples/two_dimensional_heads.py --tokens 1000000
"""

import argparse
import time

import numpy as np

from hsr_attention import ConvexLayersIndex, relu_attention, softmax_attention

VALUE_DIM = 8
NEEDED = 500  # positions a token looks up
QUERIES = 50


def dense(weights, values):
    """Return the average of the values under the weights of each row."""
    return (weights @ values) / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)


def main():
    """Append, report, attend, and compare with all keys."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    tokens = parser.parse_args().tokens

    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 2 * np.pi, tokens)
    keys = np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    values = rng.normal(size=(tokens, VALUE_DIM)).astype(np.float32)

    print("tokens   index us   dense us   keys scored   max error: relu, softmax")
    index, held = ConvexLayersIndex(keys[:0]), 0
    for n in (10**e for e in range(4, 10) if 10**e <= tokens):
        index.append(keys[held:n])
        held = n
        towards = rng.uniform(0, 2 * np.pi, QUERIES)
        queries = np.column_stack([np.cos(towards), np.sin(towards)]).astype(np.float32)
        threshold = np.cos(np.pi * NEEDED / n)  # keys within this angle of the query
        sharpness = 12 / (1 - threshold)  # what is outside weighs less than e^-12

        start = time.perf_counter()
        head = queries[None, None], keys[None, None, :n], values[None, None, :n]
        relu = relu_attention(*head, threshold=threshold, scale=1.0, index=index)[0, 0]
        softmax = softmax_attention(
            *head, threshold=sharpness * threshold, scale=sharpness, index=index
        )[0, 0]
        sparse_time = time.perf_counter() - start

        start = time.perf_counter()
        scores = queries.astype(np.float64) @ keys[:n].T.astype(np.float64)
        exact_relu = dense(np.maximum(scores - threshold, 0), values[:n])
        dense_time = time.perf_counter() - start
        weights = np.exp(sharpness * (scores - scores.max(axis=1, keepdims=True)))
        scored = index.report(queries, threshold).work.keys_scored
        errors = (
            abs(relu - exact_relu).max(),
            abs(softmax - dense(weights, values[:n])).max(),
        )
        print(
            f"{n:8} {1e6 * sparse_time / QUERIES:9.1f} {1e6 * dense_time / QUERIES:10.1f} "
            f"{scored / QUERIES:13.0f}   {errors[0]:.0e}, {errors[1]:.0e}"
        )
    print(
        "ReLU attention over the report is exact; softmax leaves out what weighs e^-12 and less."
    )


if __name__ == "__main__":
    main()
