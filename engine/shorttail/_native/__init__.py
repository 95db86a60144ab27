"""Compiled kernels, built from native/; native/README.md lists their functions."""
