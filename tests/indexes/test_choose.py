import numpy as np
import pytest

from hsr_attention.indexes.base import HalfspaceIndex
from hsr_attention.indexes.choose import KINDS, choose, halfspace_index


@pytest.mark.parametrize("kind", list(KINDS))
def test_asked_for_kinds_agree(kind):
    keys = np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32)
    queries = np.random.default_rng(1).normal(size=(5, 2)).astype(np.float32)
    index = halfspace_index(keys, kind)
    assert isinstance(index, HalfspaceIndex)
    assert (index.kind, index.reason) == (kind, "asked for")
    wanted = halfspace_index(keys, "flat").report(queries, 1.0)
    np.testing.assert_array_equal(index.report(queries, 1.0).indices, wanted.indices)


def test_automatic_choice_says_why():
    rng = np.random.default_rng(0)
    assert halfspace_index(rng.normal(size=(100, 2))).kind == "flat"
    index = halfspace_index(rng.normal(size=(200_000, 2)))
    assert index.kind == "convex_layers"
    assert "us a query" in index.reason and index.reason in repr(index)
    assert choose(1_000_000, 3)[0] == "partition_tree"
    assert choose(1_000_000, 12)[0] == "flat"
    assert choose(1_000_000, 64)[0] == "sketch"
    assert choose(10, 3)[0] == "flat"


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind must be one of 'auto', 'flat'"):
        halfspace_index(np.ones((3, 2)), "octree")


def test_an_asked_for_kind_never_falls_back():
    with pytest.raises(ValueError, match="ConvexLayersIndex serves head_dim 2, got 3"):
        halfspace_index(np.ones((3, 3)), "convex_layers")
