"""What a run costs before it is started: GFLOP and bytes by part, memory, hours, and what the loader must deliver."""

from cohobate.planning.calibration import Measured, calibrate
from cohobate.planning.estimate import Memory, Plan, StagePlan, decode_facts, fit_share, make_plan, usual_data
from cohobate.planning.hardware import Hardware, facts, load, names
from cohobate.planning.parts import Part, step_parts
from cohobate.planning.shapes import Shapes

__all__ = [
    "Hardware",
    "Measured",
    "Memory",
    "Part",
    "Plan",
    "Shapes",
    "StagePlan",
    "calibrate",
    "decode_facts",
    "facts",
    "fit_share",
    "load",
    "make_plan",
    "names",
    "step_parts",
    "usual_data",
]
