"""Report on students and their teacher: quality by position, free-running agreement, ablations, state, speed."""
