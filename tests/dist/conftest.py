import pytest

from tests.dist.ranks import crashes, stop_zygote


@pytest.fixture(autouse=True, scope="session")
def _ranks_end_with_the_session():
    yield
    stop_zygote()


def pytest_terminal_summary(terminalreporter):
    if crashes:
        terminalreporter.section("ranks that crashed and were run again")
        for crash in crashes:
            terminalreporter.line(crash)
