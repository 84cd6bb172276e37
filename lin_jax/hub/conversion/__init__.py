"""Folders from folders, one block of numbers at a time: memory does not grow with the model."""
