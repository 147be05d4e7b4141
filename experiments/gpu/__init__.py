"""What only a GPU can tell, in one command: memory, hard caps, times, kernels, copies to the host."""
