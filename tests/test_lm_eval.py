"""A RULER task of lm-eval-harness through ``hsr.enable``; needs the group ``lm-eval``."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
lm_eval = pytest.importorskip("lm_eval")

import hsr_attention as hsr  # noqa: E402
import tiny  # noqa: E402
from hsr_attention.integrations.cache_argument import cache_argument  # noqa: E402

pytestmark = [pytest.mark.transformers, pytest.mark.slow]


def test_a_ruler_task_answers_the_same_through_an_exact_policy(tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    model, tokenizer = tiny.model(max_position_embeddings=2048), tiny.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=2048, batch_size=1)

    def answers():
        found = lm_eval.simple_evaluate(
            model=harness,
            tasks=["ruler_fwe"],
            metadata={"pretrained": str(tmp_path), "max_seq_lengths": [1024]},
            limit=2,
            log_samples=True,
            bootstrap_iters=0,
        )
        return [sample["resps"] for sample in found["samples"]["ruler_fwe"]], found["results"]

    dense, _ = answers()
    with hsr.enable(model, hsr.SoftmaxPolicy(epsilon=1e-6, exact=True)) as enabled:
        seen = []
        original = enabled.forward

        def forward(*args, **kwargs):
            seen.append(type(kwargs.get(cache_argument(enabled))).__name__)
            return original(*args, **kwargs)

        monkeypatch.setattr(enabled, "forward", forward)
        sparse, results = answers()
    assert sparse == dense
    assert set(seen) == {"HSRCache"}
    assert "1024,none" in results["ruler_fwe"]
