"""One module per command, loaded when it is asked for."""
