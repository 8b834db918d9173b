"""How fast training is, and the plain baseline that says whether that is fast."""
