"""The tasks of GLUE: their files, templates that turn examples into rows, and batches."""
