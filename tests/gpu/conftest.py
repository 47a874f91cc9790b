from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the tests themselves"
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device under test, computing float32 as such."""
    found = torch.device(request.config.getoption("--device"))
    if found.type == "cuda" and not torch.cuda.is_available():
        pytest.fail("torch sees no NVIDIA GPU: 'make test' has the tests that need none")
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield found
    torch.backends.cudnn.allow_tf32 = allowed
