"""Handwritten digits three ways: without SE, with SE in plain PyTorch, and with `se_ext`.

Run `python -m examples.digits --help` from the repository root.
"""
