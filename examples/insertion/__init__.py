"""Is it worth it? A CNN on photographs of solar cells: as it is, with SE blocks that `se_ext.insert_se` puts in, and
with twice the depth.

Run `python -m examples.insertion --help` from the repository root. The images come with the package `elpv-dataset`.
"""
