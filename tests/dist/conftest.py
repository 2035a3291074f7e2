import pytest

from tests.dist.ranks import stop_zygote


@pytest.fixture(autouse=True, scope="session")
def _ranks_end_with_the_session():
    yield
    stop_zygote()
