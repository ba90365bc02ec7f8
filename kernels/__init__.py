"""Triton kernels of diffgap; installed as ``diffgap.kernels``."""
