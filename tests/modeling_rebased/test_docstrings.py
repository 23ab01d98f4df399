"""The examples in the docstrings do what they show."""

import doctest

import pytest

from modeling_rebased import attention_rebased, configuration_rebased


@pytest.mark.parametrize("module", [attention_rebased, configuration_rebased])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
