"""Studies of the estimators against other methods."""
