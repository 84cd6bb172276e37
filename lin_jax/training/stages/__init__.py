"""Several runs in one YAML file, one after the other, with a report."""
