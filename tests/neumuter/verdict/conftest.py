"""The tokenizer of all tests here."""

import pytest

from tests import models


@pytest.fixture(scope="module")
def words():
    return models.tokenizer()
