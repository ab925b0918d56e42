"""What makes a network fast on this machine: packed, quantised, run by kernels."""
