"""Fixtures shared by all tests."""

import pytest

from hsr_attention import _native


@pytest.fixture(params=_native.isa_available())
def isa(request):
    """Run the test at every instruction-set level of this machine."""
    before = _native.isa_in_use()
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)
