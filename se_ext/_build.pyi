"""What setup.py writes into _build.py."""

TORCH_VERSION: str
