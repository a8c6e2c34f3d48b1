"""The protocol between two machines: bytes in, messages out, and back. Pure: no socket, no disk."""
