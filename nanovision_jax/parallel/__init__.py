"""Devices: the mesh, and how arrays are laid over it."""
