"""Triton kernels and their launchers: the only part of fastrl that imports triton."""
