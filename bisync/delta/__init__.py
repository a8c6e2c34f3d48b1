"""The arithmetic of content: digests. No disk, no clock."""
