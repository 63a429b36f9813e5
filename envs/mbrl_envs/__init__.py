"""The worlds: datasets, tasks and environments."""
