"""Kernels for GPUs, in Triton. Nothing that serves on processors imports this: it brings torch and triton."""
