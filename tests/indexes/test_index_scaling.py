import json

import pytest

from hsr_attention.experiments import index_scaling


def test_rows_exponents_crossovers_and_plot(tmp_path):
    pytest.importorskip("scipy")
    result = index_scaling.run(
        dims=[2, 3], sizes=[500, 1000, 2000], queries=3, data=["gaussian", "boundary"]
    )
    assert len(result["rows"]) == (3 + 2) * 3 * 2
    assert all(fit["low"] <= fit["exponent"] <= fit["high"] for fit in result["exponents"])
    assert {row["kind"] for row in result["crossovers"]} == set(index_scaling.KINDS)
    json.dumps(result)
    pytest.importorskip("matplotlib")
    index_scaling.plot(result, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
