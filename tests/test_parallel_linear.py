"""Linear layers in parts: the same sums, only where that is asked for, and undone after the block."""

import copy

import pytest

torch = pytest.importorskip("torch")

import hsr_attention as hsr  # noqa: E402
from hsr_attention.integrations import parallel_linear as module  # noqa: E402

pytestmark = pytest.mark.transformers


@pytest.fixture(autouse=True)
def always_faster(monkeypatch):
    """Which way is faster is the machine's business; these tests are about the sums."""
    monkeypatch.setattr(module, "_faster", lambda layers, parts: True)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def layers(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    made = torch.nn.Sequential(
        torch.nn.Linear(40, 96, bias=bias), torch.nn.ReLU(), torch.nn.Linear(96, 35, bias=bias)
    )
    return made.to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (1, 1, 40), (3, 40), (2, 5, 40), (0, 40)])
def test_the_sums_are_those_of_torch(dtype, bias, shape):
    model = layers(dtype, bias)
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        expected = model(x)
        with hsr.parallel_linear(model) as split:
            assert split == {(96, 40): 3}  # no part of 35 fits three or two threads
            found = model(x)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_rows_in_parts_add_up_in_float64():
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((1, 1, 24), (30, 24), (30,)))
    for parts in (2, 3, 5, 30):
        found = module.in_parts(x, module.columns(weight, parts), bias)
        torch.testing.assert_close(found, x @ weight.T + bias, rtol=1e-14, atol=1e-14)


def test_only_one_token_without_gradients_is_split(monkeypatch):
    calls = []
    real = module.in_parts
    monkeypatch.setattr(module, "in_parts", lambda *a: calls.append(1) or real(*a))
    model = layers()
    with hsr.parallel_linear(model):
        with torch.no_grad():
            model(torch.randn(2, 40))
        assert not calls
        x = torch.randn(1, 40)
        model(x).sum().backward()
        assert not calls and model[0].weight.grad is not None
        with torch.no_grad():
            model(x)
        assert len(calls) == 1


def test_weights_may_change_inside():
    model, other = layers(), layers()
    x = torch.randn(1, 40)
    with torch.no_grad(), hsr.parallel_linear(model):
        for parameter in model.parameters():
            parameter.mul_(2)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(x), other(x), rtol=1e-5, atol=1e-5)
        model.to(torch.float64)
        torch.testing.assert_close(model(x.double()), other.double()(x.double()))
        copied = copy.deepcopy(model)
        model[0].weight.zero_()
        torch.testing.assert_close(copied(x.double()), other(x.double()))


def test_all_is_undone_and_blocks_nest():
    model = layers()
    with pytest.raises(RuntimeError, match="on purpose"), hsr.parallel_linear(model):
        assert "forward" in model[0].__dict__
        with hsr.parallel_linear(model) as inner:
            assert inner == {}
        assert "forward" in model[0].__dict__
        raise RuntimeError("on purpose")
    assert "forward" not in model[0].__dict__


def test_other_classes_and_one_thread_are_left_alone():
    class Halved(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    with hsr.parallel_linear(torch.nn.Sequential(Halved(8, 6))) as split:
        assert split == {}
    torch.set_num_threads(1)
    with hsr.parallel_linear(layers()) as split:
        assert split == {}


def test_what_is_not_a_model_is_refused():
    refused = pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str")
    with refused, hsr.parallel_linear("model"):
        pass


def test_the_faster_way_is_measured(monkeypatch):
    monkeypatch.undo()
    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    assert not module._faster([layers()[0]], 2)  # equal: not worth it
    ticks = iter([0, 3, 3, 4] * 20)
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    assert module._faster([layers()[0]], 2)
