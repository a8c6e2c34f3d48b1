"""bisync: two-way file synchronisation for Linux."""
