"""One side of a session, wherever it is."""
