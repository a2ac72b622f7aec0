"""What lies beyond the paper: discrete training in the same R_a."""
