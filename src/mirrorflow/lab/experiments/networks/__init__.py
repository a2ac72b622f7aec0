"""Tables 2 and 3, Figures 3, 13, 15 and 16: decay in transformers."""
