"""Where experts live and how their load is spread. NumPy, no torch."""
