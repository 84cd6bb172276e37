import pytest
from support.corpora import write_tables


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """The parts of the mixture as files."""
    return write_tables(tmp_path_factory.mktemp("parts"))
