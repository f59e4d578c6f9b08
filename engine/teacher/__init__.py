"""Where targets come from: the frozen teacher."""

from cohobate.teacher.frozen import FrozenTeacher, from_student

__all__ = ["FrozenTeacher", "from_student"]
