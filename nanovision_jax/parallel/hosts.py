"""The one place that knows about processes: which of them this is, and which devices belong to it."""

import jax


def is_first() -> bool:
    """Whether this process is the one that writes what all processes share."""
    return jax.process_index() == 0


def first_device() -> jax.Device:
    """The first of this process's own devices."""
    return jax.local_devices()[0]
