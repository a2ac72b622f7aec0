"""Figure 2: recovery of a low-rank matrix from linear measurements."""
