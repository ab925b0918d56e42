"""What makes a network fast on this machine: compiled, packed, quantised."""
