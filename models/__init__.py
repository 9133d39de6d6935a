"""The learned side of steering."""
