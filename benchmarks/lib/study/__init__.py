"""The paper's study: parts, their cells, and the report."""
