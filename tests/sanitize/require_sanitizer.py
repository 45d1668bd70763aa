"""A plugin of pytest: refuses to run tests on a library without a sanitizer."""

from se_ext import _loader


def pytest_configure() -> None:
    assert b"__asan_init" in _loader.LIBRARY.read_bytes(), f"{_loader.LIBRARY} has no sanitizer in it"
