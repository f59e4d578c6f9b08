"""Where targets come from: frozen teachers, out of any ViT."""

from cohobate.teacher.frozen import FrozenTeacher, from_student
from cohobate.teacher.loading import ResizedTeacher, Teacher, load_teacher
from cohobate.teacher.original import OriginalTeacher
from cohobate.teacher.sources import load_source

__all__ = [
    "FrozenTeacher", "OriginalTeacher", "ResizedTeacher", "Teacher", "from_student", "load_source", "load_teacher",
]  # fmt: skip
