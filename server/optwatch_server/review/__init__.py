"""The weekly review, and the forms in which people get it."""
