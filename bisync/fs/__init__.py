"""One local tree: its root, index, scan, stage, changes, kept versions and state on disk."""
