"""Devices, meshes, hosts, memory and progress."""
