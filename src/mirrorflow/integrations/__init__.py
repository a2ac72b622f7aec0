"""One file for each framework; nothing in the package imports them."""
