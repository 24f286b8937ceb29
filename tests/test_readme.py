"""The code of README.md runs, as do the examples in docstrings."""

import doctest
import re
from pathlib import Path

import pytest

import hsr_attention
import hsr_attention.kv_cache

README = Path(__file__).parent.parent / "README.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", range(len(blocks())))
def test_code_runs(block, capsys):
    code = blocks()[block]
    if "transformers" in code:
        pytest.skip("needs a model; tests/test_transformers_*.py cover it")
    exec(compile(code, f"README.md, block {block}", "exec"), {})


def test_the_first_block_is_short_and_needs_no_model():
    lines = [line for line in blocks()[0].splitlines() if line.strip()]
    assert len(lines) <= 16 and "torch" not in blocks()[0] and "transformers" not in blocks()[0]


@pytest.mark.parametrize("module", [hsr_attention.kv_cache])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
