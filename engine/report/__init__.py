"""The run report: plots as PNG files and one self-contained page, made from a run folder alone.

``write_report(folder)`` needs only the files that training leaves (see :mod:`cohobate.report.run`); it imports neither
torch nor the rest of the engine, so a report can be made on another machine, after a crash, or while the run goes on.
"""

from cohobate.report.page import write_report
from cohobate.report.run import Evaluation, Retrieval, Run, Samples, read_run

__all__ = ["Evaluation", "Retrieval", "Run", "Samples", "read_run", "write_report"]
