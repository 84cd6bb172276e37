"""Int8 weights in folders: matrices rounded to one byte a number, with a float32 factor for each output."""
