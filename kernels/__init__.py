"""Triton and library kernels, one family per file; installed as ``dualpipe_ext.kernels``."""
