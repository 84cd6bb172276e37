"""Start of a run: its base, its teacher, and what is fitted to the teacher before the first step."""
