"""What tells that something may have changed below a root. A mark is a hint, never a fact."""
