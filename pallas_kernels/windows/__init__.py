"""Windows before a linear memory: which tokens are near, rows cut into chunks for them, features and sinks."""
