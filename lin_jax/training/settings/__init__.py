"""Settings of runs: YAML read by the types of its fields, and changes between two ways to run one folder."""
