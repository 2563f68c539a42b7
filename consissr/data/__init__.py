"""Training data: which photographs, how they are read, cropped and degraded."""
