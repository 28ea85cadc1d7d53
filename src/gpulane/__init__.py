"""One address in front of every GPU."""
