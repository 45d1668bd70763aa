"""What changes a user's network: convert makes its modules run on the fused ops, revert takes that back; insert_se puts
SE blocks into it.

trace.py          the graph of one module's forward
blocks.py         SE blocks in it, by their structure
neighbours.py     what stands around them and around batch norms, as steps; the forward that is made of these
steps.py          what such a forward calls; in_place.py: where a step may overwrite a convolution's output
fused_class.py    the class that a converted module gets
check.py          whether a block's conversion computes the same; verify.py: whether a network's does
convert.py        the two functions; report.py: what they tell
places.py         where an SE block goes in a network that has none
inserted_class.py the class of a module with an inserted block; insertion.py: the function
command.py        `python -m se_ext convert-report`; measure.py: the times and the memory that it prints
"""

from .convert import convert, revert
from .insertion import InsertionReport, insert_se
from .report import ConversionReport

__all__ = ["ConversionReport", "InsertionReport", "convert", "insert_se", "revert"]
