"""Which boot of the machine this is."""

_PATH = "/proc/sys/kernel/random/boot_id"


def boot_id() -> str:
    """A random name of this boot; another one means that unflushed data may be gone."""
    with open(_PATH, encoding="ascii") as file:
        return file.read().strip()
