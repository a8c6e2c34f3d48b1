"""One pair of endpoints: configuration, cycle, archive commits and the report."""
