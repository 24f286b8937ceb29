"""``HSRCache`` as a data structure: what transformers' cache interface asks of every cache."""

import copy
import gc
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hsr_attention as hsr  # noqa: E402
from hsr_attention import _native  # noqa: E402
from hsr_attention.integrations import torch_threads  # noqa: E402
from hsr_attention.integrations.cache_argument import with_cache  # noqa: E402
from hsr_attention.integrations.layer import CachedRows, DenseSlidingLayer, HSRLayer  # noqa: E402

pytestmark = pytest.mark.transformers

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 16


def config(**changes):
    settings = {
        "vocab_size": 97,
        "hidden_size": HEADS * DIM,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
    }
    return transformers.LlamaConfig(**(settings | changes))


def states(tokens, batch=BATCH, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, KV_HEADS, tokens, DIM)
    return torch.randn(shape, generator=generator).to(dtype).unbind(0)


def filled(*lengths, dtype=torch.float32, **settings):
    """Return an HSRCache and a DynamicCache that were given the same tokens."""
    ours = hsr.HSRCache(config(), **settings)
    theirs = transformers.DynamicCache(config=config())
    for seed, tokens in enumerate(lengths):
        for layer in range(2):
            new = states(tokens, seed=10 * seed + layer, dtype=dtype)
            ours.update(*new, layer)
            theirs.update(*new, layer)
    return ours, theirs


def assert_same(ours, theirs):
    assert ours.get_seq_length() == theirs.get_seq_length()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        keys, values = a.tensors()
        assert torch.equal(keys, b.keys)
        assert torch.equal(values, b.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_update_keeps_every_token(dtype):
    ours, theirs = filled(37, 1, 1, 5, dtype=dtype)
    assert_same(ours, theirs)
    assert ours.get_mask_sizes(3, 0) == theirs.get_mask_sizes(3, 0) == (47, 0)
    assert ours.get_max_length() == theirs.get_max_length() == -1
    assert ours.is_croppable and not ours.is_compileable and ours.is_initialized
    assert ours.is_sliding == [False, False]


@pytest.mark.parametrize("removed", [0, 1, 17, 40, 41])
def test_crop(removed):
    ours, theirs = filled(40)
    ours.crop(-removed)
    theirs.crop(-removed)
    assert ours.get_seq_length() == theirs.get_seq_length()
    if removed < 40:
        assert_same(ours, theirs)
    for layer in range(2):
        new = states(3, seed=99)
        ours.update(*new, layer)
    assert ours.get_seq_length() == max(40 - removed, 0) + 3


def test_crop_refuses_a_positive_length():
    ours, _ = filled(40)
    with pytest.raises(ValueError, match=r"tokens_to_remove must be <= 0 .* got 8"):
        ours.crop(8)


@pytest.mark.parametrize("rows", [[0, 1], [1, 0], [1, 1], [0, 0, 1, 1, 0]])
def test_reorder(rows):
    ours, theirs = filled(40)
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor(rows))
    assert_same(ours, theirs)


def test_repeat_and_select():
    ours, theirs = filled(40)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(3)
    assert_same(ours, theirs)
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([0, 4, 5]))
    assert_same(ours, theirs)
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([True, False, True]))
    assert_same(ours, theirs)
    for cache in (ours, theirs):
        cache.update(*states(2, seed=5), 0)
        cache.update(*states(2, seed=6), 1)
    assert_same(ours, theirs)


def test_operations_on_an_empty_cache_do_nothing():
    cache = hsr.HSRCache(config())
    cache.crop(-3)
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(7, 1) == (7, 0)
    assert not cache.is_initialized


def test_reset_forgets_tokens_and_shapes():
    ours, _ = filled(40, collect=True)
    ours.reset()
    assert ours.get_seq_length() == 0
    assert ours.nbytes == 0
    ours.update(*states(4, batch=5), 0)
    assert ours.get_seq_length() == 4


def test_copy_is_independent():
    ours, theirs = filled(40)
    other = copy.deepcopy(ours)
    for layer in range(2):
        other.update(*states(2, seed=3), layer)
    assert_same(ours, theirs)
    assert other.get_seq_length() == 42


def test_bytes():
    ours, theirs = filled(64)
    rows = sum(2 * layer.keys.numel() * 4 for layer in theirs.layers)
    assert ours.row_nbytes == rows
    assert 0 < ours.code_nbytes < rows
    assert ours.nbytes == ours.row_nbytes + ours.code_nbytes


def test_memory_is_freed_without_the_garbage_collector():
    ours, _ = filled(40)
    layer = weakref.ref(ours.layers[0])
    gc.disable()
    try:
        del ours
        assert layer() is None
    finally:
        gc.enable()


def test_handles_know_shapes_and_refuse_to_be_read():
    cache = hsr.HSRCache(config())
    cache.update(*states(8), 0)
    keys, values = cache.update(*states(3), 0)
    assert isinstance(keys, CachedRows)
    assert keys.shape == values.shape == (BATCH, KV_HEADS, 11, DIM)
    assert keys.dtype is torch.float32 and keys.device.type == "cpu" and keys.ndim == 4
    assert keys.to(keys.device) is keys
    cache.layers[0].crop(-3)
    for read in (
        lambda k: k.to(torch.bfloat16),
        lambda k: k @ k,
        lambda k: k[:, :, 0],
        lambda k: torch.cat([k, k]),
    ):
        keys, _ = cache.update(*states(3), 0)
        with pytest.raises(ValueError, match=r"attn_implementation='hsr'"):
            read(keys)
        assert cache.get_seq_length() == 8  # the append is undone


def test_layers_of_a_mixed_model():
    gemma = transformers.Gemma3TextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=32,
    )
    cache = hsr.HSRCache(gemma)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [DenseSlidingLayer] * 5 + [HSRLayer]
    assert list(cache.hsr_layers) == [5]
    assert cache.is_sliding == [True] * 5 + [False]


def test_statistics():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config()).eval()
    model.set_attn_implementation("hsr")
    cache = hsr.HSRCache(model.config, hsr.SoftmaxPolicy(top_r=8), collect=True)
    ids = torch.randint(0, 97, (BATCH, 200))
    with torch.no_grad():
        model(ids, **with_cache(model, cache))
        assert [s.density.size for s in cache.statistics()] == [0, 0]
        for _ in range(3):
            model(ids[:, :1], **with_cache(model, cache))
    for index, found in enumerate(cache.statistics()):
        assert found.layer == index
        for array in (found.density, found.omitted_mass, found.error_bound, found.estimated_error):
            assert array.shape == (HEADS, 3 * BATCH)
            assert np.isfinite(array).all()
        assert (found.density > 0).all() and (found.density <= 1).all()
        values = cache.layers[index].tensors()[1]
        assert found.value_max == float(values.abs().max())
        assert found.work["sketch_scored"] > 0
    cache.reset()
    assert cache.statistics()[0].density.size == 0


def test_certificates_are_computed_only_when_collected():
    cache, _ = filled(40)
    with pytest.raises(ValueError, match="collect=True"):
        cache.statistics()


@pytest.fixture
def threads(monkeypatch):
    """Restore the numbers of threads of both sides; nothing is chosen at the start."""
    ours, torchs = hsr.info()["num_threads"], torch.get_num_threads()
    monkeypatch.delenv("HSR_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch_threads, "_followed", ours)
    yield
    torch.set_num_threads(torchs)
    hsr.set_num_threads(ours)


def test_threads_follow_torch(threads):
    for count in (3, 1, 2):
        torch.set_num_threads(count)
        hsr.HSRCache(config())
        assert hsr.info()["num_threads"] == count


def test_threads_that_were_chosen_stay(threads, monkeypatch):
    torch.set_num_threads(3)
    hsr.set_num_threads(5)
    hsr.HSRCache(config())
    assert hsr.info()["num_threads"] == 5
    monkeypatch.setattr(torch_threads, "_followed", 5)
    monkeypatch.setenv("HSR_NUM_THREADS", "5")
    hsr.HSRCache(config())
    assert hsr.info()["num_threads"] == 5


def test_sharing_the_threads_of_torch():
    shared = torch_threads.share_openmp()
    try:
        assert hsr.info()["shares_openmp"] == shared
        ours, _ = filled(300)
        query = states(1, seed=4)[0].repeat_interleave(2, 1)
        found = ours.layers[0].attend(query, None, None)
        _native.set_openmp(0)
        assert torch.equal(found, ours.layers[0].attend(query, None, None))
    finally:
        _native.set_openmp(0)


def test_appending_costs_the_same_at_every_length():
    # Bytes, not times: the memory of a full cache is the tokens, and views do not survive growth.
    cache = hsr.HSRCache(config())
    sizes = []
    for tokens in (1024, 1024, 1024):
        for layer in range(2):
            cache.update(*states(tokens), layer)
        sizes.append(cache.nbytes)
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1]
