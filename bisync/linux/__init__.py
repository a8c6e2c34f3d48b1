"""What Linux offers and Python does not: the only home of ctypes.

Every function raises ``OSError`` with the kernel's own number; "not here" is reported as
``None`` or ``False`` where the docstring says so, never by guessing.
"""
