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


def test_command_line():
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from hsr_attention.cli.bench_index import bench_index

    app = typer.Typer()
    app.command()(bench_index)
    run = CliRunner().invoke(app, ["--dim", "3", "--n", "500", "--queries", "2", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["rows"][0]["d"] == 3
    assert CliRunner().invoke(app, ["--dim", "x"]).exit_code == 2
