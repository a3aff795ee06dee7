"""Devices, meshes and hosts, memory and progress."""
