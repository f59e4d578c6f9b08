"""Videos: which there are, which frames and boxes a step reads, and how they become pixels."""
