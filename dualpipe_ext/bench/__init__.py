"""Benchmarks: what they measure, how they time it, and where their rows go.

``dualpipe bench`` and the scripts in ``benchmarks/`` use it; nothing else in the package does.
"""
